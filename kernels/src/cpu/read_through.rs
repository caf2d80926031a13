//! Memory that is read from front to back: what a memory-bound kernel could reach at most.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Cpu;
use super::lanes::{Lanes, WIDTH, on_path};
use crate::buffer::Buffer;
use crate::error::ShapeError;

/// Bytes of one item of work: long enough for the processor's prefetcher, short enough to share out.
const PIECE: usize = 1 << 20;
/// Bytes from the place read to the line asked for.
const AHEAD: usize = 1024;
/// Sums side by side, so that no addition waits for another.
const SUMS: usize = 4;

/// A buffer to read with all threads of a [`Cpu`].
///
/// The pass of [`ReadThrough::read`] is STREAM's (McCalpin, "Memory Bandwidth and Machine Balance in Current
/// High Performance Computers", 1995) without a store: one addition per load, sequential, as wide as the
/// instruction path loads. It has no clock: who measures times a pass and divides by [`ReadThrough::bytes`].
#[derive(Debug)]
pub struct ReadThrough {
    cpu: Cpu,
    data: Buffer,
    bytes: usize,
}

impl ReadThrough {
    /// At least `bytes`, in whole MiB, each page written once by the threads that will read.
    ///
    /// # Errors
    /// When the system has no such memory.
    pub fn new(cpu: &Cpu, bytes: usize) -> Result<Self, ShapeError> {
        let refused = || ShapeError::new("read through", "bytes of memory", 0, bytes);
        let whole = bytes.max(1).checked_next_multiple_of(PIECE);
        let bytes = whole.ok_or_else(refused)?;
        let mut data = Buffer::zeroed(bytes).ok_or_else(refused)?;
        // Each piece is a lock that one thread takes once.
        let pieces: Vec<_> = data
            .as_mut_slice()
            .chunks_mut(PIECE)
            .map(Mutex::new)
            .collect();
        cpu.shared.threads.run(pieces.len(), &|piece| {
            if let Ok(mut piece) = pieces[piece].lock() {
                bytemuck::cast_slice_mut(&mut piece).fill(1.0_f32);
            }
        });
        drop(pieces);
        let cpu = cpu.clone();
        Ok(Self { cpu, data, bytes })
    }

    /// Bytes that one pass reads.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Reads all of it once; gives the float32 values read, which nobody can know without reading them.
    #[must_use]
    pub fn read(&self) -> u64 {
        let total = AtomicU64::new(0);
        let shared = &self.cpu.shared;
        shared.threads.run(self.bytes / PIECE, &|piece| {
            let piece = &self.data.as_slice()[piece * PIECE..(piece + 1) * PIECE];
            let mut sum = 0.0;
            // SAFETY: an `Isa` is of this processor; the kernel reads inside the slice.
            unsafe { sum_slice(shared.isa, bytemuck::cast_slice(piece), &mut sum) }
            total.fetch_add(sum as u64, Ordering::Relaxed);
        });
        total.into_inner()
    }
}

on_path! {
    /// Sum of ones, `SUMS` vectors at a time.
    fn sum_slice(x: &[f32], out: &mut f32) = sum_kernel
}

/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
unsafe fn sum_kernel<L: Lanes>(x: &[f32], out: &mut f32) {
    // SAFETY: each load is inside its chunk, a prefetched address need not be valid; the rest is the
    // caller's promise.
    unsafe {
        let mut sums = [L::splat(0.0); SUMS];
        for chunk in x.chunks_exact(SUMS * WIDTH) {
            for (i, sum) in sums.iter_mut().enumerate() {
                let at = chunk.as_ptr().add(i * WIDTH);
                L::prefetch(at.cast::<u8>().wrapping_add(AHEAD));
                *sum = L::load(at).add(*sum);
            }
        }
        *out = sums.iter().map(|sum| sum.sum()).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Path;

    #[test]
    fn every_byte_is_read_once_on_every_path() {
        let paths = [Path::Portable, Path::Avx2, Path::Avx512, Path::Neon];
        for cpu in paths
            .iter()
            .filter_map(|path| Cpu::with_path(*path, 3).ok())
        {
            for (asked, bytes) in [(0, PIECE), (PIECE, PIECE), (4 * PIECE + 1, 5 * PIECE)] {
                let memory = ReadThrough::new(&cpu, asked).unwrap();
                assert_eq!(memory.bytes(), bytes);
                assert_eq!(memory.read(), bytes as u64 / 4, "{}", cpu.path());
            }
        }
    }

    #[test]
    fn more_than_there_is_gets_refused() {
        let cpu = Cpu::new(1);
        assert!(ReadThrough::new(&cpu, usize::MAX).is_err());
        assert!(ReadThrough::new(&cpu, usize::MAX / 4).is_err());
    }
}
