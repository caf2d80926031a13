//! What this machine lacks to serve on cards: a line each, with its remedy.
//!
//! [`Seen::look`] reads, [`checks`] judges: it is pure, so machines that nobody has are tested. Nothing here needs a card.

use std::fs;
use std::io;
use std::path::Path;

use foregate_cuda::comm::{FLOOR, Library, Version};
use foregate_cuda::probe::{CardInfo, Probe};

use super::{Check, Verdict};
use crate::environment;

/// Shared memory that NCCL gets by with between ranks of a node; container runtimes give 64 MiB by default.
const SHARED_MEMORY: u64 = 1 << 30;
/// The oldest cards that there is code for: portable code, which the driver compiles for newer ones.
const OLDEST: (u32, u32) = (8, 0);
/// PCI vendor NVIDIA, and the classes of cards that compute: display and 3D controllers.
const VENDOR: &str = "0x10de";
const CLASSES: [&str; 2] = ["0x0300", "0x0302"];
/// Where the driver's devices are: control, memory, and one per card.
const CONTROL: [&str; 2] = ["nvidiactl", "nvidia-uvm"];

/// What runs around this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Around {
    /// Nothing.
    Machine,
    /// A container.
    Container,
    /// A pod.
    Pod,
}

/// A device file of the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    name: String,
    /// Why it cannot be opened for reading and writing.
    closed: Option<io::ErrorKind>,
}

/// What there is to see.
#[derive(Debug)]
pub(super) struct Seen {
    around: Around,
    /// Cards on the bus, whether or not a driver has them.
    on_bus: usize,
    /// Version of the kernel's module.
    module: Option<String>,
    nodes: Vec<Node>,
    probe: Probe,
    /// What this binary carries code for; empty: built without feature `cuda`.
    code: Vec<String>,
    /// NCCL's version, or why it cannot be opened.
    nccl: Result<Version, String>,
    /// Size of `/dev/shm` in bytes; `None`: there is none.
    shared_memory: Option<u64>,
    /// `NVIDIA_VISIBLE_DEVICES`.
    visible: Option<String>,
    /// Whether the container runtimes of this machine are told of cards.
    toolkit: bool,
}

impl Seen {
    /// Looks at this machine. `nccl` names a library other than the one that the loader finds.
    pub(super) fn look(nccl: Option<&Path>) -> Self {
        let opened = Library::open(nccl).map(|library| library.version());
        let files = Files {
            root: Path::new("/"),
        };
        Self {
            around: files.around(environment::variable("KUBERNETES_SERVICE_HOST").is_some()),
            on_bus: files.on_bus(),
            module: files.module(),
            nodes: files.nodes(),
            probe: foregate_cuda::probe::probe(),
            code: foregate_cuda::probe::targets()
                .iter()
                .map(|&name| name.to_owned())
                .collect(),
            nccl: opened.map_err(|error| error.to_string()),
            shared_memory: files.shared_memory(),
            visible: environment::variable("NVIDIA_VISIBLE_DEVICES"),
            toolkit: files.toolkit(),
        }
    }
}

/// The system's files, below a root of its own in tests.
struct Files<'a> {
    root: &'a Path,
}

impl Files<'_> {
    fn text(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path)).ok()
    }

    fn around(&self, in_kubernetes: bool) -> Around {
        let marks = [".dockerenv", "run/.containerenv"];
        if in_kubernetes {
            Around::Pod
        } else if marks.iter().any(|mark| self.root.join(mark).exists()) {
            Around::Container
        } else {
            Around::Machine
        }
    }

    fn on_bus(&self) -> usize {
        let Ok(devices) = fs::read_dir(self.root.join("sys/bus/pci/devices")) else {
            return 0;
        };
        let is_card = |folder: &Path| {
            let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
            let class = text("class");
            text("vendor").trim() == VENDOR
                && CLASSES.iter().any(|known| class.starts_with(known))
        };
        devices
            .flatten()
            .filter(|entry| is_card(&entry.path()))
            .count()
    }

    /// "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue …", with or without "Open" and "for x86_64".
    fn module(&self) -> Option<String> {
        let text = self.text("proc/driver/nvidia/version")?;
        let line = text.lines().find(|line| line.starts_with("NVRM"))?;
        let is_version = |word: &&str| {
            word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.')
        };
        Some(
            line.split_whitespace()
                .find(is_version)
                .unwrap_or("of unknown version")
                .to_owned(),
        )
    }

    fn nodes(&self) -> Vec<Node> {
        let folder = self.root.join("dev");
        let Ok(entries) = fs::read_dir(&folder) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| CONTROL.contains(&name.as_str()) || card_number(name).is_some())
            .collect();
        names.sort();
        let node = |name: String| {
            let opened = fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(folder.join(&name));
            let closed = opened.err().map(|error| error.kind());
            Node { name, closed }
        };
        names.into_iter().map(node).collect()
    }

    fn shared_memory(&self) -> Option<u64> {
        let mounts = self.text("proc/self/mounts")?;
        let meminfo = self.text("proc/meminfo").unwrap_or_default();
        shared_memory(&mounts, super::field_bytes(&meminfo, "MemTotal:"))
    }

    /// The container toolkit, or a description of cards for runtimes (CDI).
    fn toolkit(&self) -> bool {
        [
            "usr/bin/nvidia-ctk",
            "usr/local/nvidia/toolkit/nvidia-ctk",
            "usr/bin/nvidia-container-runtime",
            "etc/cdi/nvidia.yaml",
            "var/run/cdi/nvidia.yaml",
        ]
        .iter()
        .any(|path| self.root.join(path).exists())
    }
}

/// The number of a card's device file.
fn card_number(name: &str) -> Option<u32> {
    name.strip_prefix("nvidia")?.parse().ok()
}

/// Bytes of the file system at `/dev/shm`, which without a size of its own is half of the memory (tmpfs(5)).
fn shared_memory(mounts: &str, memory: Option<u64>) -> Option<u64> {
    // The last one mounted there is the one that is seen.
    let mount = mounts
        .lines()
        .rfind(|line| line.split(' ').nth(1) == Some("/dev/shm"))?;
    let options = mount.split(' ').nth(3)?;
    let size = options
        .split(',')
        .find_map(|option| option.strip_prefix("size="));
    let Some(size) = size else {
        return Some(memory.unwrap_or_default() / 2);
    };
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match size.get(digits.len()..) {
        Some("k") => 1 << 10,
        Some("m") => 1 << 20,
        Some("g") => 1 << 30,
        _ => 1,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

/// One line per thing that a worker on cards needs. `wanted` makes what lacks a failure.
pub(super) fn checks(seen: &Seen, wanted: bool) -> Vec<Check> {
    let bad = if wanted { Verdict::Fail } else { Verdict::Warn };
    let mut lines = vec![
        card(seen, bad),
        driver(seen, bad),
        code(seen, bad),
        nccl(seen),
    ];
    if seen.driver_is_there() {
        lines.push(devices(seen, bad));
        lines.push(shared(seen));
    }
    lines.push(runtime(seen, bad));
    lines
}

impl Seen {
    fn driver_is_there(&self) -> bool {
        self.module.is_some() || self.probe.driver.is_ok()
    }

    fn cards(&self) -> &[CardInfo] {
        self.probe.cards.as_deref().unwrap_or_default()
    }

    fn has_hardware(&self) -> bool {
        self.on_bus > 0 || self.module.is_some() || !self.nodes.is_empty()
    }
}

fn card(seen: &Seen, bad: Verdict) -> Check {
    let name = "card";
    match seen.cards() {
        [] if seen.has_hardware() => {
            let finding = format!(
                "{} on the bus, none usable: see the lines below",
                seen.on_bus
            );
            Check::new(name, bad, finding)
        }
        [] => {
            let finding = "none: serves on the processor; for spec.workers.device cuda use a node with one";
            let verdict = if bad == Verdict::Fail {
                bad
            } else {
                Verdict::Ok
            };
            Check::new(name, verdict, finding)
        }
        [first, ..] => {
            let finding = format!(
                "{} × {}, compute capability {}.{}, {} MiB",
                seen.cards().len(),
                first.name,
                first.capability.0,
                first.capability.1,
                first.memory >> 20
            );
            let old = seen.cards().iter().find(|card| card.capability < OLDEST);
            match old {
                None => Check::new(name, Verdict::Ok, finding),
                Some(old) => Check::new(
                    name,
                    bad,
                    format!(
                        "{} has compute capability {}.{}: {}.{} or newer is needed (A100 and later)",
                        old.name, old.capability.0, old.capability.1, OLDEST.0, OLDEST.1
                    ),
                ),
            }
        }
    }
}

fn driver(seen: &Seen, bad: Verdict) -> Check {
    let name = "driver";
    match (&seen.probe.driver, &seen.module) {
        (Ok(cuda), module) => {
            let module = module.as_deref().unwrap_or("of unknown version");
            let finding = format!("{module}, speaks CUDA {}.{}", cuda.0, cuda.1);
            match &seen.probe.cards {
                Ok(_) if *cuda < foregate_cuda::probe::CUDA => Check::new(
                    name,
                    bad,
                    format!(
                        "{finding}: this binary is built for CUDA {}.{}; install driver 580 or newer",
                        foregate_cuda::probe::CUDA.0,
                        foregate_cuda::probe::CUDA.1
                    ),
                ),
                Ok(_) => Check::new(name, Verdict::Ok, finding),
                Err(why) => Check::new(
                    name,
                    bad,
                    format!(
                        "{finding}, but does not start: {why}; is the module loaded, and of the same version as the library?"
                    ),
                ),
            }
        }
        (Err(why), Some(module)) => Check::new(
            name,
            bad,
            format!(
                "the kernel has {module}, but {why}: {}",
                match seen.around {
                    Around::Machine => "install libcuda1 of the same version",
                    Around::Container | Around::Pod =>
                        "the container runtime mounts it: NVIDIA_DRIVER_CAPABILITIES must have compute",
                }
            ),
        ),
        (Err(why), None) => {
            let remedy = if seen.on_bus > 0 {
                "install NVIDIA's driver 580 or newer on this node"
            } else {
                "no driver here"
            };
            let verdict = if seen.has_hardware() { bad } else { mild(bad) };
            Check::new(name, verdict, format!("{why}: {remedy}"))
        }
    }
}

/// What lacks on a machine without cards lacks for nobody who does not want them.
fn mild(bad: Verdict) -> Verdict {
    if bad == Verdict::Fail {
        bad
    } else {
        Verdict::Ok
    }
}

fn code(seen: &Seen, bad: Verdict) -> Check {
    if seen.code.is_empty() {
        let verdict = if seen.has_hardware() { bad } else { mild(bad) };
        let finding = "this binary has no code for cards: build with --features cuda, or take the image whose tag ends in -cuda";
        return Check::new("code", verdict, finding);
    }
    let finding = format!("for {}", seen.code.join(", "));
    Check::new("code", Verdict::Ok, finding)
}

/// Only several cards need it, so it never fails.
fn nccl(seen: &Seen) -> Check {
    match &seen.nccl {
        Ok(version) => Check::new("nccl", Verdict::Ok, format!("NCCL {version}")),
        Err(why) => {
            let verdict = if seen.cards().len() > 1 {
                Verdict::Warn
            } else {
                Verdict::Ok
            };
            let remedy = format!(
                "only several cards need it: version {FLOOR} or newer, on the loader's path or by --nccl-library"
            );
            Check::new("nccl", verdict, format!("{why}: {remedy}"))
        }
    }
}

fn devices(seen: &Seen, bad: Verdict) -> Check {
    let name = "devices";
    let missing: Vec<&str> = CONTROL
        .into_iter()
        .filter(|wanted| seen.nodes.iter().all(|node| node.name != *wanted))
        .collect();
    let numbered = seen
        .nodes
        .iter()
        .filter(|node| card_number(&node.name).is_some())
        .count();
    if let Some(node) = seen.nodes.iter().find(|node| node.closed.is_some()) {
        let why = match node.closed {
            Some(io::ErrorKind::PermissionDenied) => "no permission",
            _ => "cannot be opened",
        };
        let remedy = match seen.around {
            Around::Machine => "give this user read and write (udev rule, group video)",
            Around::Container | Around::Pod => {
                "ask for the card by the runtime (limits nvidia.com/gpu, docker run --gpus), not by mounting /dev"
            }
        };
        return Check::new(name, bad, format!("/dev/{}: {why}: {remedy}", node.name));
    }
    if numbered == 0 {
        let remedy = match seen.around {
            Around::Machine => "run nvidia-modprobe -c 0 -u, or nvidia-smi once as root",
            Around::Container => "start the container with docker run --gpus all",
            Around::Pod => "ask for one: spec.workers.resources.limits nvidia.com/gpu: 1",
        };
        return Check::new(name, bad, format!("no /dev/nvidia0: {remedy}"));
    }
    if !missing.is_empty() {
        let finding = format!(
            "no /dev/{}: run nvidia-modprobe -u on the node",
            missing.join(", no /dev/")
        );
        return Check::new(name, bad, finding);
    }
    Check::new(
        name,
        Verdict::Ok,
        format!("{numbered} in /dev, readable and writable"),
    )
}

fn shared(seen: &Seen) -> Check {
    let name = "shm";
    let remedy = match seen.around {
        Around::Machine => "mount a larger tmpfs there",
        Around::Container => "docker run --shm-size 1g",
        Around::Pod => {
            "a volume with emptyDir medium Memory at /dev/shm, as the operator gives its pods"
        }
    };
    match seen.shared_memory {
        Some(bytes) if bytes >= SHARED_MEMORY => Check::new(
            name,
            Verdict::Ok,
            format!("/dev/shm has {} MiB", bytes >> 20),
        ),
        Some(bytes) => Check::new(
            name,
            Verdict::Warn,
            format!(
                "/dev/shm has {} MiB, NCCL between ranks of a node wants {}: {remedy}",
                bytes >> 20,
                SHARED_MEMORY >> 20
            ),
        ),
        None => Check::new(
            name,
            Verdict::Warn,
            format!("no /dev/shm, which NCCL needs between ranks of a node: {remedy}"),
        ),
    }
}

/// What the container runtime was told, or will be.
fn runtime(seen: &Seen, bad: Verdict) -> Check {
    let name = "runtime";
    let hidden = seen
        .visible
        .as_deref()
        .filter(|value| matches!(*value, "void" | "none"));
    match (seen.around, hidden) {
        (Around::Container | Around::Pod, Some(value)) => Check::new(
            name,
            bad,
            format!(
                "NVIDIA_VISIBLE_DEVICES is {value:?}, so the runtime mounts no card: leave it to the device plugin or to docker run --gpus"
            ),
        ),
        (Around::Pod, None) if !seen.driver_is_there() => Check::new(
            name,
            mild(bad),
            "in a pod without a card: for one, limits nvidia.com/gpu: 1, and where nvidia is not the default runtime spec.pods.runtimeClassName: nvidia",
        ),
        (Around::Container, None) if !seen.driver_is_there() => Check::new(
            name,
            mild(bad),
            "in a container without a card: for one, docker run --gpus all, or podman run --device nvidia.com/gpu=all",
        ),
        (Around::Container | Around::Pod, None) => {
            Check::new(name, Verdict::Ok, "the card is mounted into this container")
        }
        (Around::Machine, _) if seen.has_hardware() && !seen.toolkit => Check::new(
            name,
            Verdict::Warn,
            "containers here get no cards: install nvidia-container-toolkit and run nvidia-ctk runtime configure; processes outside containers need neither",
        ),
        (Around::Machine, _) if seen.toolkit => {
            Check::new(name, Verdict::Ok, "containers here can get cards")
        }
        (Around::Machine, _) => Check::new(name, Verdict::Ok, "not in a container"),
    }
}

#[cfg(test)]
mod tests;
