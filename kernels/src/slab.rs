//! Memory for the matrices of experts, in huge pages.
//!
//! An expert's matrix is smaller than a huge page of 2 MiB, and there are thousands. Were each a mapping of its own,
//! all of them would lie in pages of 4 KiB, and streaming through them would miss the translation cache at every
//! page; in a virtual machine such a miss walks two tables. So they are cut from chunks of many huge pages.
//!
//! A piece that is given back returns its memory to the system at once and its place to the next piece of the same
//! size. Experts of a model have few sizes, so a worker that moves experts does not grow.

use std::collections::BTreeMap;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use memmap2::MmapMut;

/// Bytes of a huge page on x86-64 and aarch64.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of a chunk. Pages that nobody uses take no memory.
const CHUNK: usize = 64 << 20;
/// Pieces begin at pages, so that the system can take them back.
const PAGE: usize = 4096;

/// All chunks that have a piece in use.
static CHUNKS: Mutex<Vec<Weak<Chunk>>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Some mebibytes of address space, cut into pieces.
struct Chunk {
    /// Only its address and length are used after it was made: pieces are the ones who read and write.
    map: MmapMut,
    start: NonNull<u8>,
    bytes: usize,
    places: Mutex<Places>,
}

// SAFETY: `start` points into `map`, which is Send; pieces of it do not overlap.
unsafe impl Send for Chunk {}
// SAFETY: as above, and everything that changes is behind a lock.
unsafe impl Sync for Chunk {}

/// Which bytes of a chunk are free.
#[derive(Default)]
struct Places {
    /// Everything from here on.
    unused: usize,
    /// Offsets of pieces that were given back, by their size.
    free: BTreeMap<usize, Vec<usize>>,
}

impl Places {
    fn take(&mut self, bytes: usize, end: usize) -> Option<usize> {
        if let Some(offset) = self.free.get_mut(&bytes).and_then(Vec::pop) {
            return Some(offset);
        }
        let offset = self.unused;
        let after = offset.checked_add(bytes).filter(|after| *after <= end)?;
        self.unused = after;
        Some(offset)
    }
}

impl Chunk {
    fn new() -> Option<Arc<Self>> {
        // One huge page more, so that the chunk can begin at one.
        let mut map = memmap2::MmapOptions::new()
            .len(CHUNK + HUGE_PAGE)
            .no_reserve_swap()
            .map_anon()
            .ok()?;
        #[cfg(target_os = "linux")]
        if let Err(error) = map.advise(memmap2::Advice::HugePage) {
            tracing::debug!(%error, "no huge pages");
        }
        let skip = map.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        // SAFETY: at most one huge page is skipped, and the map has one more than the chunk.
        let start = unsafe { NonNull::new(map.as_mut_ptr())?.add(skip) };
        Some(Arc::new(Self {
            bytes: map.len() - skip,
            map,
            start,
            places: Mutex::default(),
        }))
    }

    fn piece(self: &Arc<Self>, bytes: usize, whole: usize) -> Option<Piece> {
        let offset = lock(&self.places).take(whole, self.bytes)?;
        Some(Piece {
            chunk: Arc::clone(self),
            offset,
            whole,
            bytes,
        })
    }
}

/// Zeroed bytes of a chunk.
pub(crate) struct Piece {
    chunk: Arc<Chunk>,
    offset: usize,
    /// Bytes in whole pages.
    whole: usize,
    bytes: usize,
}

impl Piece {
    /// `bytes` zeroed bytes that begin at a page; `None` when the system has no memory, or a chunk no room for so many.
    pub(crate) fn zeroed(bytes: usize) -> Option<Self> {
        let whole = bytes.max(1).checked_next_multiple_of(PAGE)?;
        if whole > CHUNK {
            return None;
        }
        let mut chunks = lock(&CHUNKS);
        chunks.retain(|chunk| chunk.strong_count() > 0);
        let kept = chunks.iter().rev().filter_map(Weak::upgrade);
        if let Some(piece) = kept.into_iter().find_map(|chunk| chunk.piece(bytes, whole)) {
            return Some(piece);
        }
        let chunk = Chunk::new()?;
        chunks.push(Arc::downgrade(&chunk));
        chunk.piece(bytes, whole)
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the piece lies in its chunk, which lives as long, and nobody else has these bytes.
        unsafe {
            std::slice::from_raw_parts(self.chunk.start.as_ptr().add(self.offset), self.bytes)
        }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.chunk.start.as_ptr().add(self.offset),
                self.bytes,
            )
        }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let map = &self.chunk.map;
        let skip = self.chunk.start.as_ptr() as usize - map.as_ptr() as usize;
        if !forget(map, skip + self.offset, self.whole) {
            self.as_mut_slice().fill(0);
        }
        let mut places = lock(&self.chunk.places);
        places.free.entry(self.whole).or_default().push(self.offset);
    }
}

/// Gives the memory of these bytes back: they read as zero from now on. False where the system does not do that.
#[cfg(target_os = "linux")]
fn forget(map: &MmapMut, offset: usize, bytes: usize) -> bool {
    // SAFETY: the mapping is private and anonymous; the bytes are in it and belong to a piece that is being dropped.
    unsafe {
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, bytes)
            .is_ok()
    }
}

#[cfg(not(target_os = "linux"))]
fn forget(_map: &MmapMut, _offset: usize, _bytes: usize) -> bool {
    false
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Piece")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_come_back_zeroed() {
        let mut pieces: Vec<Piece> = (0..200)
            .map(|i| Piece::zeroed(1_000_000 + i % 3).unwrap())
            .collect();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert!(piece.as_slice().iter().all(|b| *b == 0));
            piece.as_mut_slice().fill(i as u8 + 1);
        }
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.as_slice().iter().all(|b| *b == i as u8 + 1));
        }
        pieces.truncate(100);
        let again: Vec<Piece> = (0..100).map(|_| Piece::zeroed(999_999).unwrap()).collect();
        for piece in &again {
            assert!(piece.as_slice().iter().all(|b| *b == 0));
        }
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.as_slice().iter().all(|b| *b == i as u8 + 1));
        }
    }

    #[test]
    fn places_are_used_again_by_pieces_of_their_size() {
        let mut places = Places::default();
        assert_eq!(places.take(PAGE, 4 * PAGE), Some(0));
        assert_eq!(places.take(2 * PAGE, 4 * PAGE), Some(PAGE));
        places.free.entry(PAGE).or_default().push(0);
        assert_eq!(places.take(2 * PAGE, 4 * PAGE), None);
        assert_eq!(places.take(PAGE, 4 * PAGE), Some(0));
        assert_eq!(places.take(PAGE, 4 * PAGE), Some(3 * PAGE));
        assert_eq!(places.take(PAGE, 4 * PAGE), None);
    }

    #[test]
    fn too_much_is_refused() {
        assert!(Piece::zeroed(CHUNK + 1).is_none());
        assert!(Piece::zeroed(usize::MAX).is_none());
    }
}
