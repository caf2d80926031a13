//! All figures of a run: as JSON and as a table.

use foregate_kernels::Cpu;
use serde::Serialize;

use super::shape::Shape;

/// What an operation has to do, and how long it took.
#[derive(Debug)]
pub(super) struct Pass {
    pub(super) op: &'static str,
    /// Of the weights; empty for operations without any.
    pub(super) format: &'static str,
    /// Its size, for people.
    pub(super) size: String,
    /// Bytes that it must read and write.
    pub(super) bytes: f64,
    /// Additions and multiplications.
    pub(super) flops: f64,
    pub(super) seconds: f64,
}

/// One line of the table.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    pub(super) op: &'static str,
    format: &'static str,
    size: String,
    microseconds: f64,
    pub(super) gb_s: f64,
    pub(super) gflop_s: f64,
    /// Of the bandwidth of this run; above 1 where caches serve.
    pub(super) bandwidth_share: f64,
    /// Of the rate of arithmetic of this run.
    pub(super) rate_share: f64,
}

/// Lines, and what they are shares of.
#[derive(Debug)]
pub(super) struct Table {
    /// Bytes per second.
    bandwidth: f64,
    /// Operations per second.
    rate: f64,
    pub(super) lines: Vec<Line>,
}

impl Table {
    /// Shares of `bandwidth` bytes and `rate` operations per second.
    pub(super) const fn new(bandwidth: f64, rate: f64) -> Self {
        Self {
            bandwidth,
            rate,
            lines: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, pass: Pass) {
        let (bytes, flops) = (pass.bytes / pass.seconds, pass.flops / pass.seconds);
        self.lines.push(Line {
            op: pass.op,
            format: pass.format,
            size: pass.size,
            microseconds: pass.seconds * 1e6,
            gb_s: bytes / 1e9,
            gflop_s: flops / 1e9,
            bandwidth_share: bytes / self.bandwidth,
            rate_share: flops / self.rate,
        });
    }
}

/// One run.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    path: String,
    threads: usize,
    shape: Shape,
    /// Read bandwidth of all threads, 10⁹ bytes per second.
    bandwidth_gb_s: f64,
    /// 10⁹ operations per second on bfloat16 weights in the nearest caches.
    rate_gflop_s: f64,
    operations: Vec<Line>,
}

impl Figures {
    pub(super) fn new(cpu: &Cpu, shape: Shape, table: Table) -> Self {
        Self {
            path: cpu.path().to_string(),
            threads: cpu.threads(),
            shape,
            bandwidth_gb_s: table.bandwidth / 1e9,
            rate_gflop_s: table.rate / 1e9,
            operations: table.lines,
        }
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![
            format!(
                "{} threads, {} path: {:.1} GB/s from memory, {:.0} GFLOP/s on cached bfloat16 weights",
                self.threads, self.path, self.bandwidth_gb_s, self.rate_gflop_s
            ),
            format!(
                "{:<18} {:<6} {:<32} {:>10} {:>8} {:>8} {:>9} {:>7}",
                "operation", "format", "size", "µs", "GB/s", "GFLOP/s", "bandwidth", "rate"
            ),
        ];
        lines.extend(self.operations.iter().map(|line| {
            format!(
                "{:<18} {:<6} {:<32} {:>10.1} {:>8.1} {:>8.1} {:>9.2} {:>7.2}",
                line.op,
                line.format,
                line.size,
                line.microseconds,
                line.gb_s,
                line.gflop_s,
                line.bandwidth_share,
                line.rate_share
            )
        }));
        lines.join("\n")
    }
}
