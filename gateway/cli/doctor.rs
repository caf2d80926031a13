//! `foregate doctor`: can this machine serve? One line per check, each with its remedy.

mod cards;

use std::path::{Path, PathBuf};
use std::process::Command;

use foregate_api::manifest::DeviceClass;
use foregate_api::model::ModelSpec;
use foregate_api::weights::WeightSettings;
use foregate_checkpoint::Checkpoint;

use crate::error::{CliError, print};
use crate::status;
use crate::weights::WeightArgs;

/// Arguments of `foregate doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    /// Also check this model directory.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    #[command(flatten)]
    weights: WeightArgs,
    /// Port that `foregate up` would use.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Also fail if something is missing that `spec.workers.device` of this value needs.
    #[arg(long, value_name = "cpu|cuda", default_value = "cpu", value_parser = device)]
    device: DeviceClass,
    /// NCCL's library, where the loader does not find it.
    #[arg(long, value_name = "FILE")]
    nccl_library: Option<PathBuf>,
}

pub(crate) fn device(name: &str) -> Result<DeviceClass, String> {
    match name {
        "cpu" => Ok(DeviceClass::Cpu),
        "cuda" => Ok(DeviceClass::Cuda),
        _ => Err("cpu or cuda".to_owned()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One line of the report.
#[derive(Debug)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    finding: String,
}

impl Check {
    fn new(name: &'static str, verdict: Verdict, finding: impl Into<String>) -> Self {
        Self {
            name,
            verdict,
            finding: finding.into(),
        }
    }

    fn line(&self) -> String {
        let word = match self.verdict {
            Verdict::Ok => "OK  ",
            Verdict::Warn => "WARN",
            Verdict::Fail => "FAIL",
        };
        format!("{word}  {:<7} {}", self.name, self.finding)
    }
}

/// Runs the checks.
///
/// # Errors
/// If one of them fails (exit code 1).
pub(crate) async fn run(args: &DoctorArgs) -> Result<(), CliError> {
    let mut checks = vec![
        processor(),
        cores(),
        memory(),
        etcd(),
        port(args.port).await,
    ];
    let seen = cards::Seen::look(args.nccl_library.as_deref());
    checks.extend(cards::checks(&seen, args.device == DeviceClass::Cuda));
    if let Some(directory) = &args.model {
        checks.push(model(directory, args.weights.settings()));
    }
    for check in &checks {
        print(&check.line());
    }
    let failed = checks.iter().filter(|c| c.verdict == Verdict::Fail).count();
    match failed {
        0 => Ok(()),
        n => Err(CliError::Runtime(format!(
            "{n} of {} checks failed",
            checks.len()
        ))),
    }
}

fn processor() -> Check {
    let path = foregate_kernels::Cpu::new(1).path();
    let name = path.to_string();
    if name == "portable" {
        let finding = "portable path only: serves, but slowly; AVX2 or AVX-512 would be used";
        return Check::new("cpu", Verdict::Warn, finding);
    }
    let mut finding = format!("kernels use the {name} path");
    if foregate_kernels::Path::Amx.is_present() {
        finding.push_str("; amx is there if spec.workers.cpuPath asks for it");
    }
    Check::new("cpu", Verdict::Ok, finding)
}

fn cores() -> Check {
    match std::thread::available_parallelism().map(usize::from) {
        Ok(1) => Check::new(
            "cores",
            Verdict::Warn,
            "1: workers share it; prefer `foregate up --workers 1`",
        ),
        Ok(n) => Check::new("cores", Verdict::Ok, format!("{n}")),
        Err(error) => Check::new(
            "cores",
            Verdict::Warn,
            format!("cannot be counted: {error}"),
        ),
    }
}

fn memory() -> Check {
    const WANTED: u64 = 2 << 30;
    let available = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| field_bytes(&text, "MemAvailable:"));
    match available {
        Some(bytes) if bytes >= WANTED => Check::new(
            "memory",
            Verdict::Ok,
            format!("{} MiB available", bytes >> 20),
        ),
        Some(bytes) => Check::new(
            "memory",
            Verdict::Warn,
            format!(
                "{} MiB available: lower spec.workers.kvMemory or the number of workers",
                bytes >> 20
            ),
        ),
        None => Check::new("memory", Verdict::Warn, "/proc/meminfo cannot be read"),
    }
}

/// Bytes of memory of this machine, if it tells.
pub(crate) fn total_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    field_bytes(&text, "MemTotal:")
}

fn field_bytes(meminfo: &str, field: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn etcd() -> Check {
    match Command::new("etcd").arg("--version").output() {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            let first = text.lines().next().unwrap_or_default().to_owned();
            Check::new("etcd", Verdict::Ok, first)
        }
        _ => Check::new(
            "etcd",
            Verdict::Warn,
            "not on PATH: only `up --processes` needs it; apt-get install etcd-server, or give --etcd URL",
        ),
    }
}

async fn port(port: u16) -> Check {
    match status::bind(&format!("127.0.0.1:{port}")).await {
        Ok(_) => Check::new("port", Verdict::Ok, format!("{port} is free")),
        Err(error) => Check::new("port", Verdict::Fail, error.to_string()),
    }
}

fn model(directory: &Path, weights: WeightSettings) -> Check {
    match Checkpoint::open_with(directory, &weights) {
        Ok(checkpoint) => Check::new("model", Verdict::Ok, describe(checkpoint.spec())),
        Err(error) => Check::new("model", Verdict::Fail, error.to_string()),
    }
}

/// The shape, and what the weights take in memory.
fn describe(spec: &ModelSpec) -> String {
    let mib = |bytes: usize| bytes.div_ceil(1 << 20);
    let experts = spec.experts * spec.moe_layers() * spec.expert_bytes();
    let formats = spec.formats;
    format!(
        "{:?}, {} layers, {} experts, top {}; experts {} MiB of {}, other weights {} MiB (attention {}, output {})",
        spec.family,
        spec.layers,
        spec.experts,
        spec.top_k,
        mib(experts),
        formats.expert,
        mib(spec.dense_bytes()),
        formats.attention,
        formats.output,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_bytes() {
        let text = "MemTotal:  4 kB\nMemAvailable:     2048 kB\n";
        assert_eq!(field_bytes(text, "MemAvailable:"), Some(2 << 20));
        assert_eq!(field_bytes("MemTotal: 4 kB\n", "MemAvailable:"), None);
    }

    #[tokio::test]
    async fn a_port_in_use_fails_with_a_remedy() {
        let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let check = port(taken.local_addr().unwrap().port()).await;
        assert_eq!(check.verdict, Verdict::Fail);
        assert!(check.finding.contains("--port"), "{}", check.finding);
    }
}
