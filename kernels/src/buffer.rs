//! Owned, aligned memory and mapped files.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::ptr::NonNull;

/// A cache line, and the width of the widest vector register.
pub(crate) const ALIGN: usize = 64;
/// From this size on, a buffer is laid on a huge-page boundary and asks for huge pages.
const HUGE: usize = 2 << 20;

/// Zeroed bytes on a cache-line boundary, of a length fixed at creation.
pub(crate) struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its memory like a Box<[u8]>; nothing in it is bound to a thread.
unsafe impl Send for Buffer {}
// SAFETY: shared access gives out `&[u8]` only.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `None` when `bytes` is beyond what an allocation may have.
    pub(crate) fn zeroed(bytes: usize) -> Option<Self> {
        let align = if bytes >= HUGE { HUGE } else { ALIGN };
        let layout = Layout::from_size_align(bytes.max(1), align).ok()?;
        // SAFETY: the layout has a size of at least one byte.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        Some(Self { start, layout })
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `start` points at `layout.size()` initialised bytes that live as long as self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this same layout and never freed before.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("bytes", &self.layout.size())
            .finish_non_exhaustive()
    }
}

/// A file mapped read-only into memory.
///
/// The file must not be cut short while it is mapped: reading a lost page ends the process (SIGBUS).
/// Checkpoints are written once and then only read.
#[derive(Debug)]
pub struct MappedFile {
    map: Option<memmap2::Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`; an empty file gives an empty slice.
    ///
    /// # Errors
    /// When the file cannot be opened or mapped; the text names the path.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let file = File::open(path).map_err(named)?;
        let meta = file.metadata().map_err(named)?;
        if meta.is_dir() {
            return Err(named(io::Error::new(
                io::ErrorKind::IsADirectory,
                "is a directory",
            )));
        }
        if meta.len() == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the mapping is private and read-only; the type's documentation states the condition
        // that the file is not truncated meanwhile.
        let map = unsafe { memmap2::MmapOptions::new().map_copy_read_only(&file) };
        Ok(Self {
            map: Some(map.map_err(named)?),
        })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_and_aligned() {
        for bytes in [0, 1, 64, 4097, HUGE + 1] {
            let buffer = Buffer::zeroed(bytes).unwrap();
            assert_eq!(buffer.as_slice().as_ptr() as usize % ALIGN, 0);
            assert!(buffer.as_slice().iter().all(|b| *b == 0));
        }
        assert!(Buffer::zeroed(usize::MAX).is_none());
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = MappedFile::open("/no/such/file").unwrap_err();
        assert!(error.to_string().contains("/no/such/file"), "{error}");
        assert!(MappedFile::open(std::env::temp_dir()).is_err());
    }
}
