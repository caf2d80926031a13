//! The device code in this binary: the one file that knows whether there is any.

/// Code of one family of kernels, for several cards.
#[derive(Debug, Clone, Copy)]
pub struct Fatbin {
    /// Name of its source in `cu/`, without the ending.
    pub family: &'static str,
    /// What the driver loads.
    pub bytes: &'static [u8],
}

/// All families; none without feature `cuda`.
#[cfg(feature = "cuda")]
pub const FATBINS: &[Fatbin] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// All families; none without feature `cuda`.
#[cfg(not(feature = "cuda"))]
pub const FATBINS: &[Fatbin] = &[];
