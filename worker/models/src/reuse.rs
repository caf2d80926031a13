//! Memory of vectors whose values borrow from one step only.

/// An empty vector with the memory of `values`, for values that differ in nothing but a lifetime.
///
/// The standard library collects a vector's own iterator in place when sizes agree; were that ever to change,
/// this would still be right and only allocate (`worker/tests/no_alloc.rs` would tell).
#[must_use]
pub fn emptied<A, B>(mut values: Vec<A>) -> Vec<B> {
    values.clear();
    values.into_iter().filter_map(|_| None).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_kept() {
        let mut values: Vec<&[u32]> = Vec::with_capacity(9);
        values.push(&[1]);
        let at = values.as_ptr() as usize;
        let empty: Vec<&'static [u32]> = emptied(values);
        assert_eq!((empty.len(), empty.as_ptr() as usize), (0, at));
        assert!(empty.capacity() >= 9);
    }
}
