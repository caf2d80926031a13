//! Angles of rotary position embeddings.

use crate::ops::RopeTable;

impl RopeTable {
    /// One row of `inv_freq.len()` angles per position, so for heads of `2 * inv_freq.len()`.
    #[must_use]
    pub fn new(inv_freq: &[f32], positions: &[u32]) -> Self {
        let mut table = Self {
            half: inv_freq.len(),
            cos: Vec::new(),
            sin: Vec::new(),
        };
        for position in positions {
            for frequency in inv_freq {
                let angle = f64::from(*position as f32 * frequency);
                table.cos.push(angle.cos() as f32);
                table.sin.push(angle.sin() as f32);
            }
        }
        table
    }
}
