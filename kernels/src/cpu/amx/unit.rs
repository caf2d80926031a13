//! What a tile unit does: eight tiles of up to 16 rows of 64 bytes, and a product of three of them.

/// Rows of a full tile.
pub(super) const TILE_ROWS: usize = 16;
/// Bytes of a full row.
pub(super) const ROW_BYTES: usize = 64;

/// The shapes of all tiles, as `LDTILECFG` reads them (Intel SDM, volume 2, palette 1).
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(in crate::cpu) struct Config {
    palette: u8,
    /// Only set where a load or store was interrupted.
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row, per tile; the second half is reserved.
    row_bytes: [u16; 16],
    /// Rows, per tile; the second half is reserved.
    rows: [u8; 16],
}

impl Config {
    /// Tiles of whole rows, each with so many of them (at most [`TILE_ROWS`]); a tile without rows cannot be used.
    pub(super) fn of(rows: [usize; 8]) -> Self {
        let mut config = Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for (tile, rows) in rows.into_iter().enumerate().filter(|(_, rows)| *rows > 0) {
            config.row_bytes[tile] = ROW_BYTES as u16;
            config.rows[tile] = rows.min(TILE_ROWS) as u8;
        }
        config
    }

    /// Rows of a tile.
    pub(super) fn rows(&self, tile: u8) -> usize {
        usize::from(self.rows[usize::from(tile)])
    }
}

/// Eight tiles of one thread.
///
/// # Safety
/// The processor has what the implementation needs; a unit is used by the thread that made it. Tiles that are named have
/// rows in the configuration, and those of a product fit each other.
pub(in crate::cpu) trait TileUnit {
    /// A unit without a configuration.
    unsafe fn new() -> Self;
    /// Gives the tiles their shapes and makes them zero.
    unsafe fn configure(&mut self, config: &Config);
    /// Forgets configuration and tiles, so that a switch of threads has nothing to save.
    unsafe fn release(&mut self);
    /// Makes a tile zero.
    unsafe fn zero<const T: u8>(&mut self);
    /// Loads the rows of a tile, `stride` bytes apart.
    unsafe fn load<const T: u8>(&mut self, from: *const u8, stride: usize);
    /// Stores the rows of a tile, `stride` bytes apart.
    unsafe fn store<const T: u8>(&mut self, to: *mut u8, stride: usize);
    /// `c[m][n] += Σ a[m][2k] b[k][2n] + Σ a[m][2k + 1] b[k][2n + 1]`: bfloat16 products, float32 sums, each sum of its own
    /// from zero over ascending `k`.
    unsafe fn multiply<const C: u8, const A: u8, const B: u8>(&mut self);
    /// Asks for the cache line at an address that need not be valid.
    unsafe fn prefetch(from: *const u8);
}
