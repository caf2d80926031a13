//! `foregate op`: one operation on tensors of a file, for a check that has its own idea of what must come out
//! (`kernels/cuda/gpu_check.py`). Hidden: nobody serves with it.
//!
//! In: a safetensors file with the inputs by name, and numbers in its metadata. Out: another with the outputs, which were
//! filled with NaN (or 2³²−1) before. Which names an operation wants stands beside it in [`compute`].

mod compute;
mod tensors;

use std::path::PathBuf;
use std::sync::Arc;

use foregate_api::manifest::DeviceClass;
use foregate_cuda::comm::{Library, StagedComms, trial};
use foregate_kernels::{Comms, Cpu, Executor, OnHost};
use foregate_worker::fabric::nccl::trial as fabric;
use tokio::runtime::Handle;

use crate::error::{CliError, print};
use tensors::Tensors;

/// Arguments of `foregate op`.
#[derive(Debug, clap::Args)]
pub(crate) struct OpArgs {
    /// The operation: that of an executor; or one that takes no files: `nccl`, a group of one rank on one card, or
    /// `collective`, what workers of the fabric `nccl` do, between so many ranks on one card.
    name: String,
    /// What to compute on.
    #[arg(long, value_name = "cpu|cuda", default_value = "cpu", value_parser = super::doctor::device)]
    device: DeviceClass,
    /// Number of the card.
    #[arg(long, default_value_t = 0)]
    ordinal: u32,
    /// The inputs.
    #[arg(long = "in", value_name = "FILE")]
    input: Option<PathBuf>,
    /// Where the outputs go.
    #[arg(long = "out", value_name = "FILE")]
    output: Option<PathBuf>,
    /// NCCL's library, where the loader does not find it.
    #[arg(long, value_name = "FILE")]
    nccl_library: Option<PathBuf>,
    /// Ranks of `collective`. More than one want NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    ranks: u32,
}

/// Runs the operation.
///
/// # Errors
/// An operation or file that is none, inputs that do not fit each other, a device that is not there or fails.
pub(crate) fn run(args: &OpArgs) -> Result<(), CliError> {
    match args.name.as_str() {
        "nccl" => return nccl(args),
        "collective" => return collective(args),
        _ => {}
    }
    let (Some(input), Some(output)) = (&args.input, &args.output) else {
        return Err(CliError::Usage("--in and --out name the files".to_owned()));
    };
    let inputs = Tensors::read(input).map_err(CliError::Runtime)?;
    let (executor, cpu) = executor(args)?;
    let outputs = compute::run(&args.name, executor.as_ref(), cpu.as_deref(), &inputs)
        .map_err(|why| CliError::Runtime(format!("{}: {why}", args.name)))?;
    outputs.write(output).map_err(CliError::Runtime)
}

/// What computes; and the processor itself, where it is that.
fn executor(args: &OpArgs) -> Result<(Arc<dyn Executor>, Option<Arc<Cpu>>), CliError> {
    match args.device {
        DeviceClass::Cpu => {
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            let cpu = Arc::new(Cpu::new(threads));
            Ok((Arc::new(OnHost::cpu(Arc::clone(&cpu))), Some(cpu)))
        }
        DeviceClass::Cuda => {
            let executor = foregate_cuda::open(args.ordinal)
                .map_err(|error| CliError::Runtime(error.to_string()))?;
            Ok((Arc::new(executor), None))
        }
    }
}

fn nccl(args: &OpArgs) -> Result<(), CliError> {
    let failed = |error: &dyn std::fmt::Display| CliError::Runtime(format!("nccl: {error}"));
    let library =
        Library::open(args.nccl_library.as_deref()).map_err(|error| failed(&error))?;
    trial::one_rank(&library, args.ordinal as usize).map_err(|error| failed(&error))?;
    print(&format!(
        "NCCL {} of {}",
        library.version(),
        library.path().display()
    ));
    Ok(())
}

fn collective(args: &OpArgs) -> Result<(), CliError> {
    let failed = |error: String| CliError::Runtime(format!("collective: {error}"));
    let library = Library::open(args.nccl_library.as_deref())
        .map_err(|error| failed(error.to_string()))?;
    let version = library.version();
    let comms: Arc<dyn Comms> = Arc::new(StagedComms::on_card(library, args.ordinal));
    let told = fabric::run(&comms, args.ranks, &Handle::current()).map_err(failed)?;
    print(&format!("NCCL {version}, {told}"));
    Ok(())
}
