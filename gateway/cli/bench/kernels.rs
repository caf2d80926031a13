//! `foregate bench kernels`: each operation alone, beside what memory and arithmetic allow on this machine.
//!
//! Weights are read from memory, not from a cache: there are as many copies as it takes, used in turn, and keys and
//! values of one layer after the other. The bandwidth is that of the same run. The rate of arithmetic is what this
//! build reaches on bfloat16 weights that stay in the nearest caches: a rate to compare with, no datasheet's figure.

mod attention;
mod clock;
mod figures;
mod products;
mod rows;
mod shape;

use std::path::PathBuf;
use std::sync::Arc;

use foregate_api::weights::WeightFormat;
use foregate_kernels::{Cpu, Dtype};

use self::clock::Clock;
use self::figures::{Figures, Table};
use self::shape::Shape;
use super::engine::bandwidth;
use super::serve::write_json;
use crate::error::{CliError, print};
use crate::progress::Progress;

/// Milliseconds to find a rate of arithmetic in.
const RATE_MILLISECONDS: u64 = 300;

/// Additions and multiplications per second on cached weights, in the arithmetic of a format of weights.
pub(super) fn matrix_rate(cpu: &Cpu, format: WeightFormat) -> Result<f64, CliError> {
    let dtype = match format {
        WeightFormat::Float32 | WeightFormat::Float16 => Dtype::F32,
        WeightFormat::Bfloat16
        | WeightFormat::Int8
        | WeightFormat::Int4 { .. }
        | WeightFormat::Fp8 { .. }
        | WeightFormat::Mxfp4 => Dtype::Bf16,
    };
    products::cached_rate(cpu, dtype, Clock::new(RATE_MILLISECONDS))
}

/// Arguments of `foregate bench kernels`.
#[derive(Debug, clap::Args)]
pub(crate) struct KernelsArgs {
    /// Model directory to take sizes from; default: those of `bench model --preset bench09`.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Compute threads; default: all cores.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Formats of the weights.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "f32,bf16,f16,int8,int4,fp8,mxfp4"
    )]
    formats: Vec<Format>,
    /// Rows of activations.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,512", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    rows: Vec<u32>,
    /// Tokens before the one that attends.
    #[arg(long, value_delimiter = ',', default_value = "128,1024,4096", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    context: Vec<u32>,
    /// MiB of weights to go through in turn: more than the processor's caches hold.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    weights_mib: u32,
    /// Milliseconds for each figure; the best pass counts.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    milliseconds: u64,
    /// Give the figures as JSON: to this file, or to stdout in place of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<Option<PathBuf>>,
}

/// A format of weights, as one names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// float32
    F32,
    /// bfloat16
    Bf16,
    /// float16
    F16,
    /// int8, a scale per output
    Int8,
    /// int4, a scale per 128 inputs
    Int4,
    /// float8 e4m3, a scale per block of 128 × 128
    Fp8,
    /// MXFP4
    Mxfp4,
}

impl Format {
    const fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::Bf16,
            Self::F16 => Dtype::F16,
            Self::Int8 => Dtype::Int8,
            Self::Int4 => Dtype::Int4 { group: 128 },
            Self::Fp8 => Dtype::Fp8 {
                block_n: 128,
                block_k: 128,
            },
            Self::Mxfp4 => Dtype::Mxfp4,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Fp8 => "fp8",
            Self::Mxfp4 => "mxfp4",
        }
    }
}

/// What all measurements share.
struct Bench {
    cpu: Arc<Cpu>,
    shape: Shape,
    /// Bytes of weights that are gone through in turn.
    weight_bytes: usize,
    clock: Clock,
    table: Table,
}

/// Measures and prints.
pub(super) fn run(args: &KernelsArgs, progress: &Progress) -> Result<(), CliError> {
    let shape = match &args.model {
        Some(dir) => Shape::read(dir)?,
        None => Shape::bench09()?,
    };
    let threads = match args.threads {
        Some(threads) => threads as usize,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let cpu = Arc::new(Cpu::new(threads));
    let clock = Clock::new(args.milliseconds);
    let bandwidth = bandwidth(&cpu)?;
    let rate = products::cached_rate(&cpu, Dtype::Bf16, clock)?;
    let mut bench = Bench {
        cpu,
        shape,
        weight_bytes: (args.weights_mib as usize) << 20,
        clock,
        table: Table::new(bandwidth, rate),
    };
    let task = progress.steps("kernels", args.formats.len() as u64 + 2);
    for format in &args.formats {
        bench.matmul(*format, &args.rows)?;
        bench.experts(*format, &args.rows)?;
        task.add(1);
    }
    bench.attention(&args.rows, &args.context)?;
    task.add(1);
    bench.by_row(&args.rows)?;
    task.finish("done");
    let figures = Figures::new(&bench.cpu, bench.shape, bench.table);
    match &args.json {
        None => print(&figures.text()),
        Some(Some(path)) => {
            print(&figures.text());
            write_json(path, &figures)?;
        }
        Some(None) => {
            let text = serde_json::to_string_pretty(&figures)
                .map_err(|error| CliError::runtime("--json", &error))?;
            print(&text);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
