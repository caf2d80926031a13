//! Owned, aligned memory and mapped files.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;
use std::ptr::NonNull;

use crate::place::Region;
use crate::slab::Piece;

/// A cache line, and the width of the widest vector register.
pub(crate) const ALIGN: usize = 64;
/// From this size on, a buffer is a mapping of its own, in huge pages where the system gives them:
/// streaming through weights then misses the translation cache less.
const HUGE: usize = 2 << 20;
/// From this size on, a smaller buffer is cut from a chunk of huge pages.
const PIECE: usize = 64 << 10;

/// Zeroed bytes on a cache-line boundary, of a length fixed at creation; or those of a device.
#[derive(Debug)]
pub(crate) enum Buffer {
    Small(Small),
    Piece(Piece),
    Mapped(memmap2::MmapMut),
    /// A device's; there is nothing to read here.
    Device(Box<dyn Region>),
}

impl Buffer {
    /// `None` when the system has no such memory.
    pub(crate) fn zeroed(bytes: usize) -> Option<Self> {
        if bytes < PIECE {
            return Small::zeroed(bytes).map(Self::Small);
        }
        if bytes < HUGE {
            return Piece::zeroed(bytes).map(Self::Piece);
        }
        let map = memmap2::MmapOptions::new().len(bytes).map_anon().ok()?;
        #[cfg(target_os = "linux")]
        if let Err(error) = map.advise(memmap2::Advice::HugePage) {
            tracing::debug!(%error, "no huge pages");
        }
        Some(Self::Mapped(map))
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Small(small) => small.as_slice(),
            Self::Piece(piece) => piece.as_slice(),
            Self::Mapped(map) => map,
            Self::Device(_) => &[],
        }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        match self {
            Self::Small(small) => small.as_mut_slice(),
            Self::Piece(piece) => piece.as_mut_slice(),
            Self::Mapped(map) => map,
            Self::Device(_) => &mut [],
        }
    }
}

/// Aligned bytes from the allocator.
pub(crate) struct Small {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its memory like a Box<[u8]>; nothing in it is bound to a thread.
unsafe impl Send for Small {}
// SAFETY: shared access gives out `&[u8]` only.
unsafe impl Sync for Small {}

impl Small {
    fn zeroed(bytes: usize) -> Option<Self> {
        let layout = Layout::from_size_align(bytes.max(1), ALIGN).ok()?;
        // SAFETY: the layout has a size of at least one byte.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { start, layout })
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: `start` points at `layout.size()` initialised bytes that live as long as self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this same layout and never freed before.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl fmt::Debug for Small {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Small")
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

    /// Gives the memory of these bytes back; the next read takes them from the file again. Bytes beyond the
    /// end are left out, and a system that refuses keeps the memory.
    pub fn release(&self, range: Range<usize>) {
        let Some(map) = &self.map else { return };
        let end = range.end.min(map.len());
        let length = end.saturating_sub(range.start);
        if length == 0 {
            return;
        }
        #[cfg(unix)]
        // SAFETY: nobody writes to this mapping, so its pages have nothing that the file lacks, and they
        // come back as they were. `range.start + length` is `end`, which is inside.
        if let Err(error) = unsafe {
            map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, length)
        } {
            tracing::debug!(%error, "mapped memory is not given back");
        }
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
        for bytes in [0, 1, 64, 4097, PIECE, HUGE - 1, HUGE + 1] {
            let mut buffer = Buffer::zeroed(bytes).unwrap();
            assert_eq!(buffer.as_slice().as_ptr() as usize % ALIGN, 0);
            assert!(buffer.as_slice().iter().all(|b| *b == 0));
            buffer.as_mut_slice().fill(7);
            assert!(buffer.as_slice().len() >= bytes);
        }
        assert!(Buffer::zeroed(usize::MAX).is_none());
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = MappedFile::open("/no/such/file").unwrap_err();
        assert!(error.to_string().contains("/no/such/file"), "{error}");
        assert!(MappedFile::open(std::env::temp_dir()).is_err());
    }

    /// KiB of files that this process has in memory; those of a file system in memory count apart.
    #[cfg(target_os = "linux")]
    fn resident_of_files() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        ["RssFile:", "RssShmem:"]
            .iter()
            .map(|name| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                let number = line.unwrap().split_whitespace().next();
                number.unwrap().parse::<u64>().unwrap()
            })
            .sum()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn released_bytes_take_no_memory_and_come_back() {
        const BYTES: usize = 64 << 20;
        let path = std::env::temp_dir().join(format!("foregate-mapped-{}", std::process::id()));
        std::fs::write(&path, vec![3_u8; BYTES]).unwrap();
        let file = MappedFile::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(file.iter().all(|byte| *byte == 3));
        let before = resident_of_files();
        // Neither whole pages nor inside the file.
        file.release(5..usize::MAX);
        file.release(BYTES + 1..BYTES + 9);
        let given = before.saturating_sub(resident_of_files());
        assert!(given > (BYTES as u64 / 1024) * 3 / 4, "{given} KiB");
        assert!(file.iter().all(|byte| *byte == 3));
    }
}
