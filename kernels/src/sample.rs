//! Picking from a row of logits or log-probabilities.

use std::cmp::Ordering;

/// Greater value first, then the lower id; NaN behind everything.
fn better(a: (u32, f32), b: (u32, f32)) -> Ordering {
    let key = |v: f32| if v.is_nan() { f32::NEG_INFINITY } else { v };
    key(b.1)
        .partial_cmp(&key(a.1))
        .unwrap_or(Ordering::Equal)
        .then(a.0.cmp(&b.0))
}

fn numbered(row: &[f32]) -> impl Iterator<Item = (u32, f32)> {
    (0_u32..).zip(row.iter().copied())
}

/// Index of the greatest value, of equals the lower; 0 for an empty row. NaN never wins over a number.
#[must_use]
pub fn argmax(row: &[f32]) -> u32 {
    // First the value, sixteen at a time, then where it is.
    let (chunks, rest) = row.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (best, value) in lanes.iter_mut().zip(chunk) {
            *best = if *value > *best { *value } else { *best };
        }
    }
    let greater = |best: f32, value: &f32| if *value > best { *value } else { best };
    let best = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, greater);
    numbered(row)
        .find(|(_, value)| *value == best)
        .map_or(0, |(id, _)| id)
}

/// The `count` greatest values with their indices, greatest first, of equals the lower index first.
#[must_use]
pub fn top_n(row: &[f32], count: usize) -> Vec<(u32, f32)> {
    let count = count.min(row.len());
    if count == 0 {
        return Vec::new();
    }
    let mut all: Vec<(u32, f32)> = numbered(row).collect();
    if count < all.len() {
        let _ = all.select_nth_unstable_by(count - 1, |a, b| better(*a, *b));
        all.truncate(count);
    }
    all.sort_unstable_by(|a, b| better(*a, *b));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, f32::NAN]), 1);
        assert_eq!(argmax(&[]), 0);
        let mut long = vec![f32::NAN; 100];
        assert_eq!(argmax(&long), 0);
        (long[37], long[53], long[98]) = (-1.0, 2.0, 2.0);
        assert_eq!(argmax(&long), 53);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), 0);
        assert_eq!(
            top_n(&[1.0, 3.0, 2.0, 3.0], 3),
            [(1, 3.0), (3, 3.0), (2, 2.0)]
        );
        assert_eq!(top_n(&[f32::NAN, 1.0], 9)[0], (1, 1.0));
        assert!(top_n(&[1.0], 0).is_empty());
    }
}
