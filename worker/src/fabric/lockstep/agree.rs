//! What the ranks of a group do next: the same conclusion everywhere, from the same values.

use foregate_api::ids::Epoch;

/// What one rank brings to a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// The placement that its new steps use; 0 before the first.
    pub epoch: Epoch,
    /// Rows that its engine wants to step; 0: it only computes for others.
    pub rows: u32,
}

/// What all conclude.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agreement {
    /// Some use another placement than others: no step now. The switch is on its way to everybody.
    Apart,
    /// Nobody has rows.
    Idle {
        /// The placement that all use.
        epoch: Epoch,
    },
    /// A step.
    Step {
        /// The placement that all use.
        epoch: Epoch,
        /// Rows of the rank that has most.
        rows: u32,
    },
}

impl Wish {
    /// Bytes of a wish.
    pub const BYTES: usize = 12;

    /// As it is gathered: little-endian.
    #[must_use]
    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let (epoch, rows) = bytes.split_at_mut(8);
        epoch.copy_from_slice(&self.epoch.0.to_le_bytes());
        rows.copy_from_slice(&self.rows.to_le_bytes());
        bytes
    }

    /// All that were gathered, in the order of ranks.
    pub fn decode(all: &[u8]) -> impl Iterator<Item = Self> {
        let (chunks, _) = all.as_chunks::<{ Self::BYTES }>();
        chunks
            .iter()
            .map(|[a, b, c, d, e, f, g, h, rows @ ..]| Self {
                epoch: Epoch(u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h])),
                rows: u32::from_le_bytes(*rows),
            })
    }
}

/// The conclusion. Ranks that all wish for the same placement step if any of them has rows.
pub fn agree(wishes: impl Iterator<Item = Wish>) -> Agreement {
    let mut epochs: Option<Epoch> = None;
    let mut most = 0;
    for Wish { epoch, rows } in wishes {
        if epochs.is_some_and(|other| other != epoch) {
            return Agreement::Apart;
        }
        epochs = Some(epoch);
        most = most.max(rows);
    }
    let epoch = epochs.unwrap_or_default();
    match most {
        _ if epoch == Epoch(0) => Agreement::Apart,
        0 => Agreement::Idle { epoch },
        rows => Agreement::Step { epoch, rows },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wish(epoch: u64, rows: u32) -> Wish {
        Wish {
            epoch: Epoch(epoch),
            rows,
        }
    }

    #[test]
    fn ranks_step_together_or_not_at_all() {
        let epoch = Epoch(7);
        let cases = [
            (vec![wish(7, 0), wish(7, 0)], Agreement::Idle { epoch }),
            (
                vec![wish(7, 0), wish(7, 9), wish(7, 3)],
                Agreement::Step { epoch, rows: 9 },
            ),
            (vec![wish(7, 5), wish(8, 5)], Agreement::Apart),
            (vec![wish(0, 5), wish(0, 5)], Agreement::Apart),
            (vec![], Agreement::Apart),
        ];
        for (wishes, expected) in cases {
            assert_eq!(agree(wishes.iter().copied()), expected, "{wishes:?}");
        }
    }

    proptest! {
        /// The order in which ranks stand is the same everywhere, but does not matter either.
        #[test]
        fn all_conclude_the_same(
            wishes in proptest::collection::vec((0_u64..3, 0_u32..4), 1..6),
            turn in 0_usize..6,
        ) {
            let mut wishes: Vec<Wish> = wishes.into_iter().map(|(e, r)| wish(e, r)).collect();
            let bytes: Vec<u8> = wishes.iter().flat_map(|wish| wish.encode()).collect();
            prop_assert_eq!(Wish::decode(&bytes).collect::<Vec<_>>(), wishes.clone());
            let before = agree(wishes.iter().copied());
            let turn = turn % wishes.len();
            wishes.rotate_left(turn);
            prop_assert_eq!(agree(wishes.iter().copied()), before);
        }
    }
}
