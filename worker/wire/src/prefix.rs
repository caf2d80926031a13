//! Names of prompt prefixes: what a worker calls a full page of its KV cache, and a gateway looks for.

/// Name of a full page: BLAKE3 over the predecessor's name (zeroes for the first) and the tokens.
pub type Name = [u8; 32];

/// Name of the page that does not exist before the first.
pub const ROOT: Name = [0; 32];

/// Name of the page after `parent` that holds `tokens`.
#[must_use]
pub fn name(parent: &Name, tokens: &[u32]) -> Name {
    let mut hasher = blake3::Hasher::new();
    hasher.update(parent);
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// The part of a name that workers tell: enough to choose a worker by, while only the whole name may give a page out.
#[must_use]
pub const fn short(name: &Name) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *name;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gateways and workers of different versions must agree.
    #[test]
    fn names_stay_as_they_are() {
        let first = name(&ROOT, &[1, 2, 3]);
        let again = name(&first, &[1, 2, 3]);
        assert_ne!(short(&first), short(&again));
        assert_eq!(first, name(&ROOT, &[1, 2, 3]));
        let bytes: Vec<u8> =
            [[0_u8; 32].as_slice(), &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]].concat();
        assert_eq!(first, *blake3::hash(&bytes).as_bytes());
        assert_eq!(short(&first).to_le_bytes(), first[..8]);
    }
}
