//! NCCL between threads of this process: the true host side over a library (`nccl.c`) that moves bytes as NVIDIA's does,
//! and lanes whose device is this process's memory.
#![expect(
    unsafe_code,
    reason = "the library reads and writes memory by its address"
)]
#![allow(dead_code, unreachable_pub, reason = "each test target uses its part")]
#![allow(
    clippy::expect_used,
    reason = "part of a test: it says what it expects by failing"
)]

use std::ffi::c_int;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, ThreadId};

use foregate_cuda::comm::{Library, RawStream, StagedComms};
use foregate_cuda::{DriverError, Lane};

/// What every byte of new device memory is.
const POISON: u8 = 0xff;
/// `CUDA_ERROR_INVALID_CONTEXT`.
const NO_CONTEXT: i32 = 201;

/// What the others of a group see of a rank that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// Nothing: they wait for it, as over shared memory or NVLink.
    Silent,
    /// An error, as over a network.
    Told,
}

/// Groups over the library.
pub fn comms(gone: Gone) -> StagedComms {
    StagedComms::new(library(gone), || Ok(Box::new(EmulatedLane::default())))
}

/// The library, compiled once in a process for each way.
pub fn library(gone: Gone) -> Arc<Library> {
    static SILENT: OnceLock<Arc<Library>> = OnceLock::new();
    static TOLD: OnceLock<Arc<Library>> = OnceLock::new();
    let (once, definition) = match gone {
        Gone::Silent => (&SILENT, "-DSILENT"),
        Gone::Told => (&TOLD, "-DTELL"),
    };
    Arc::clone(once.get_or_init(|| compile(definition)))
}

/// The file may go once it is open.
fn compile(definition: &str) -> Arc<Library> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("libnccl.so.2");
    let source = folder.path().join("nccl.c");
    std::fs::write(&source, include_str!("nccl.c")).expect("it is written");
    let output = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-pthread"])
        .args(["-Wl,-Bsymbolic", definition, "-o"])
        .arg(&path)
        .arg(&source)
        .output()
        .expect("cc runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    Library::open(Some(&path)).expect("it opens")
}

/// A lane whose stream is a counter that the library counts down, and whose device is memory here.
#[derive(Debug, Default)]
pub struct EmulatedLane {
    /// Operations that the stream has not passed.
    pending: Box<AtomicI32>,
    sent: Memory,
    got: Memory,
    outbox: Vec<u8>,
    inbox: Vec<u8>,
    /// A copy that waits for the stream.
    download: Option<usize>,
    /// Where the device is that of the thread.
    entered: Option<ThreadId>,
}

impl EmulatedLane {
    fn current(&self, call: &'static str) -> Result<(), DriverError> {
        if self.entered == Some(thread::current().id()) {
            return Ok(());
        }
        Err(DriverError {
            call,
            code: NO_CONTEXT,
            text: "another thread entered the device".to_owned(),
        })
    }
}

impl Lane for EmulatedLane {
    fn enter(&mut self) -> Result<(), DriverError> {
        self.entered = Some(thread::current().id());
        Ok(())
    }

    fn stream(&self) -> RawStream {
        // An `atomic_int` to the library.
        const { assert!(size_of::<AtomicI32>() == size_of::<c_int>()) };
        (&raw const *self.pending).cast_mut().cast()
    }

    fn reserve(&mut self, bytes: usize) -> Result<(), DriverError> {
        self.current("reserve")?;
        if self.outbox.len() < bytes {
            self.outbox.resize(bytes, 0);
            self.inbox.resize(bytes, 0);
            (self.sent, self.got) = (Memory::new(bytes), Memory::new(bytes));
        }
        Ok(())
    }

    fn rooms(&self) -> (u64, u64) {
        (self.sent.address(), self.got.address())
    }

    fn outbox(&mut self) -> &mut [u8] {
        &mut self.outbox
    }

    fn inbox(&self) -> &[u8] {
        &self.inbox
    }

    fn upload(&mut self, bytes: usize) -> Result<(), DriverError> {
        self.current("upload")?;
        assert_eq!(
            self.pending.load(Ordering::SeqCst),
            0,
            "the stream is not idle"
        );
        // SAFETY: the memory has as many bytes as the outbox, and the library is not using it.
        unsafe { std::ptr::copy_nonoverlapping(self.outbox.as_ptr(), self.sent.at, bytes) };
        Ok(())
    }

    fn download(&mut self, bytes: usize) -> Result<(), DriverError> {
        self.current("download")?;
        self.download = Some(bytes);
        Ok(())
    }

    fn passed(&mut self) -> Result<bool, DriverError> {
        self.current("passed")?;
        if self.pending.load(Ordering::SeqCst) > 0 {
            return Ok(false);
        }
        if let Some(bytes) = self.download.take() {
            // SAFETY: the memory has as many bytes as the inbox, and the library is done with it.
            unsafe {
                std::ptr::copy_nonoverlapping(self.got.at, self.inbox.as_mut_ptr(), bytes);
                // Who reads what did not come finds no numbers of the call before.
                std::ptr::write_bytes(self.got.at, POISON, self.got.bytes);
            }
        }
        Ok(true)
    }
}

impl Drop for EmulatedLane {
    fn drop(&mut self) {
        assert!(
            self.pending.load(Ordering::SeqCst) == 0 || thread::panicking(),
            "its memory goes while the library uses it"
        );
    }
}

/// Bytes that only the library and copies look at.
#[derive(Debug)]
struct Memory {
    at: *mut u8,
    bytes: usize,
}

// SAFETY: owned memory.
unsafe impl Send for Memory {}

impl Default for Memory {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Memory {
    fn new(bytes: usize) -> Self {
        let memory = vec![POISON; bytes].into_boxed_slice();
        Self {
            at: Box::into_raw(memory).cast(),
            bytes,
        }
    }

    fn address(&self) -> u64 {
        self.at.expose_provenance() as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let whole = std::ptr::slice_from_raw_parts_mut(self.at, self.bytes);
        // SAFETY: made by `new` from a box of this length.
        drop(unsafe { Box::from_raw(whole) });
    }
}
