//! How large blocks are. Fixed sizes need no look at the host and fit a graph, but carry empty room; a few sizes keep
//! that below half of a block.

/// Rows of a block per pair of ranks. Each step takes the smallest that holds its rows; beyond the largest it takes
/// several rounds of it.
const BUCKETS: [u32; 5] = [8, 32, 64, 128, 256];

/// Rounds of the largest bucket that a layer takes at most. A step with more rows is prefill: there the bytes count, not
/// the calls, and counted blocks carry no empty room.
const MOST_ROUNDS: u32 = 2;

/// How a step's blocks are sized: the same at all ranks, from the agreed number of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Blocks of a fixed size.
    Fixed {
        /// Rows that a block has room for.
        capacity: u32,
        /// Rounds of a layer.
        rounds: u32,
    },
    /// Blocks as large as what is in them, after their sizes were gathered.
    Counted {
        /// Rows of the rank that has most: nobody sends more to anybody.
        most: u32,
    },
}

impl Form {
    /// For a step of which no rank has more than `rows` rows. A row goes to a rank at most once per layer, so no pair has
    /// more either.
    #[must_use]
    pub fn of(rows: u32) -> Self {
        let largest = BUCKETS.into_iter().max().unwrap_or(1);
        if let Some(capacity) = BUCKETS.into_iter().find(|bucket| *bucket >= rows) {
            return Self::Fixed {
                capacity,
                rounds: 1,
            };
        }
        let rounds = rows.div_ceil(largest);
        if rounds <= MOST_ROUNDS {
            return Self::Fixed {
                capacity: largest,
                rounds,
            };
        }
        Self::Counted { most: rows }
    }
}

/// Bytes of blocks, from the shape of what is in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Values of a row.
    pub hidden: usize,
    /// Experts of a row at most.
    pub top_k: usize,
}

impl Sizes {
    /// Bytes before rows and routes.
    pub const HEADER: usize = 8;
    /// Bytes of a route: row of the block, expert.
    pub const ROUTE: usize = 8;

    /// A request's bytes for `rows` rows with `routes` routes.
    #[must_use]
    pub const fn request(self, rows: usize, routes: usize) -> usize {
        Self::HEADER + routes * Self::ROUTE + rows * self.hidden * size_of::<f32>()
    }

    /// A fixed request's bytes.
    #[must_use]
    pub const fn full_request(self, capacity: usize) -> usize {
        self.request(capacity, capacity * self.top_k)
    }

    /// An answer's bytes: one row per route.
    #[must_use]
    pub const fn answer(self, routes: usize) -> usize {
        Self::HEADER + routes * self.hidden * size_of::<f32>()
    }

    /// A fixed answer's bytes.
    #[must_use]
    pub const fn full_answer(self, capacity: usize) -> usize {
        self.answer(capacity * self.top_k)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_rows_has_room() {
        let mut counted = false;
        for rows in 0..2000 {
            match Form::of(rows) {
                Form::Fixed { capacity, rounds } => {
                    assert!(!counted, "{rows} rows: fixed again after counted");
                    assert!(capacity * rounds >= rows && capacity * (rounds - 1) < rows.max(1));
                    assert!(rounds <= MOST_ROUNDS && BUCKETS.contains(&capacity));
                }
                Form::Counted { most } => counted = most == rows,
            }
        }
        assert!(counted);
        assert_eq!(
            Form::of(1),
            Form::Fixed {
                capacity: 8,
                rounds: 1
            }
        );
        assert_eq!(
            Form::of(33),
            Form::Fixed {
                capacity: 64,
                rounds: 1
            }
        );
        assert_eq!(
            Form::of(257),
            Form::Fixed {
                capacity: 256,
                rounds: 2
            }
        );
        assert_eq!(Form::of(513), Form::Counted { most: 513 });
    }

    #[test]
    fn a_full_block_is_one_with_all_of_its_routes() {
        let sizes = Sizes {
            hidden: 3,
            top_k: 2,
        };
        assert_eq!(sizes.full_request(8), 8 + 16 * 8 + 8 * 12);
        assert_eq!(sizes.full_answer(8), 8 + 16 * 12);
        assert_eq!(sizes.request(0, 0), Sizes::HEADER);
    }
}
