//! Rows in blocks and out of them again. Nothing is taken on trust: what came from another process is checked before it
//! is counted with.
//!
//! ```text
//!  request   rows u32 · routes u32 · routes × (row u32 · expert u32) · rows × hidden f32 · rest of the block unused
//!  answer    routes u32 · found u32 · routes × hidden f32 · unused
//! ```
//!
//! All little-endian. An answer has one row per route of the request that it answers, in the order of the routes; with
//! `found` 0 an expert was not there, and the rows mean nothing.

use foregate_api::ids::ExpertId;
use foregate_wire::frame::Route;

use super::capacity::Sizes;

/// A block that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// More rows or routes than a block has room for.
    #[error("{rows} rows and {routes} routes do not fit a block of {bytes} bytes")]
    Room {
        /// Rows.
        rows: usize,
        /// Routes.
        routes: usize,
        /// Bytes of the block.
        bytes: usize,
    },
    /// A route names a row that is not in the block.
    #[error("a route names row {row} of {rows}")]
    Row {
        /// The row.
        row: u32,
        /// Rows of the block.
        rows: u32,
    },
    /// An answer to another number of routes.
    #[error("an answer of {found} routes to a request of {wanted}")]
    Answer {
        /// Routes of the answer.
        found: usize,
        /// Routes of the request.
        wanted: usize,
    },
}

/// Rows for one rank in one round.
#[derive(Debug, Clone, Copy)]
pub struct Parcel<'a> {
    /// The batch's rows, `… × hidden`.
    pub input: &'a [f32],
    /// Which of them go.
    pub rows: &'a [u32],
    /// What to run; `row` counts rows of the parcel from `first_row` on.
    pub routes: &'a [Route],
    /// What the parcel's first row is called in its routes.
    pub first_row: u32,
}

/// Writes requests.
#[derive(Debug, Clone, Copy)]
pub struct Requests(pub Sizes);

impl Requests {
    /// Writes a parcel to the begin of `block`.
    ///
    /// # Errors
    /// It does not fit.
    pub fn write(self, parcel: Parcel<'_>, block: &mut [u8]) -> Result<(), PackError> {
        let Sizes { hidden, .. } = self.0;
        let (rows, routes) = (parcel.rows.len(), parcel.routes.len());
        let bytes = block.len();
        let room = PackError::Room {
            rows,
            routes,
            bytes,
        };
        let used = block.get_mut(..self.0.request(rows, routes)).ok_or(room)?;
        let (header, rest) = used.split_at_mut(Sizes::HEADER);
        header[..4].copy_from_slice(&count(rows).to_le_bytes());
        header[4..].copy_from_slice(&count(routes).to_le_bytes());
        let (to_routes, to_rows) = rest.split_at_mut(routes * Sizes::ROUTE);
        for (to, route) in to_routes.chunks_exact_mut(Sizes::ROUTE).zip(parcel.routes) {
            let row = route.row.wrapping_sub(parcel.first_row);
            to[..4].copy_from_slice(&row.to_le_bytes());
            to[4..].copy_from_slice(&route.expert.0.to_le_bytes());
        }
        for (to, row) in to_rows
            .chunks_exact_mut(hidden * size_of::<f32>())
            .zip(parcel.rows)
        {
            let at = *row as usize * hidden;
            put(to, parcel.input.get(at..at + hidden).unwrap_or_default());
        }
        Ok(())
    }
}

/// The rows of all ranks for this one, one after the other.
#[derive(Debug, Default)]
pub struct Incoming {
    /// `rows × hidden`.
    pub input: Vec<f32>,
    /// All routes; `row` counts rows of `input`.
    pub routes: Vec<Route>,
    /// Routes of each rank, in the order of ranks.
    pub of_rank: Vec<usize>,
}

impl Incoming {
    /// Forgets what it holds, and keeps its memory.
    pub fn clear(&mut self) {
        self.input.clear();
        self.routes.clear();
        self.of_rank.clear();
    }

    /// Rows of `input`.
    #[must_use]
    pub fn rows(&self, sizes: Sizes) -> usize {
        self.input.len() / sizes.hidden.max(1)
    }

    /// Adds the next rank's block.
    ///
    /// # Errors
    /// It claims more than it has.
    pub fn read(&mut self, sizes: Sizes, block: &[u8]) -> Result<(), PackError> {
        let (rows, routes) = header(block);
        let (rows, routes) = (rows as usize, routes as usize);
        let bytes = block.len();
        // Before any product of them: both are below the bytes, so no product overflows.
        let fits = rows <= bytes && routes <= bytes && sizes.request(rows, routes) <= bytes;
        if !fits {
            return Err(PackError::Room {
                rows,
                routes,
                bytes,
            });
        }
        let first = count(self.rows(sizes));
        let routes_end = Sizes::HEADER + routes * Sizes::ROUTE;
        for bytes in block[Sizes::HEADER..routes_end].chunks_exact(Sizes::ROUTE) {
            let (row, expert) = header(bytes);
            if row as usize >= rows {
                return Err(PackError::Row {
                    row,
                    rows: count(rows),
                });
            }
            self.routes.push(Route {
                row: first + row,
                expert: ExpertId(expert),
            });
        }
        let rows_end = sizes.request(rows, routes);
        take(&block[routes_end..rows_end], &mut self.input);
        self.of_rank.push(routes);
        Ok(())
    }
}

/// Writes and reads answers.
#[derive(Debug, Clone, Copy)]
pub struct Answers(pub Sizes);

impl Answers {
    /// Writes rows, one per route, given in any order by `row`; `None`: an expert was not there.
    ///
    /// # Errors
    /// They do not fit.
    pub fn write<'a>(
        self,
        rows: Option<impl ExactSizeIterator<Item = &'a [f32]>>,
        routes: usize,
        block: &mut [u8],
    ) -> Result<(), PackError> {
        let bytes = block.len();
        let room = PackError::Room {
            rows: routes,
            routes,
            bytes,
        };
        let used = block.get_mut(..self.0.answer(routes)).ok_or(room)?;
        let (header, rest) = used.split_at_mut(Sizes::HEADER);
        header[..4].copy_from_slice(&count(routes).to_le_bytes());
        header[4..].copy_from_slice(&u32::from(rows.is_some()).to_le_bytes());
        let blocks = rest.chunks_exact_mut(self.0.hidden * size_of::<f32>());
        for (to, row) in blocks.zip(rows.into_iter().flatten()) {
            put(to, row);
        }
        Ok(())
    }

    /// Appends the rows of an answer to a request of `routes` routes; false: an expert was not there, and nothing is
    /// appended.
    ///
    /// # Errors
    /// It answers something else.
    pub fn read(
        self,
        block: &[u8],
        routes: usize,
        out: &mut Vec<f32>,
    ) -> Result<bool, PackError> {
        let (found, there) = header(block);
        let answer = (found as usize == routes).then(|| block.get(..self.0.answer(routes)));
        let Some(used) = answer.flatten() else {
            return Err(PackError::Answer {
                found: found as usize,
                wanted: routes,
            });
        };
        if there == 1 {
            take(&used[Sizes::HEADER..], out);
        }
        Ok(there == 1)
    }
}

/// Two numbers at the begin of a block; zeros where there is none.
fn header(block: &[u8]) -> (u32, u32) {
    match block.first_chunk::<8>() {
        Some([a, b, c, d, e, f, g, h]) => (
            u32::from_le_bytes([*a, *b, *c, *d]),
            u32::from_le_bytes([*e, *f, *g, *h]),
        ),
        None => (0, 0),
    }
}

fn put(to: &mut [u8], row: &[f32]) {
    for (to, value) in to.chunks_exact_mut(size_of::<f32>()).zip(row) {
        to.copy_from_slice(&value.to_le_bytes());
    }
}

fn take(bytes: &[u8], out: &mut Vec<f32>) {
    let (values, _) = bytes.as_chunks::<{ size_of::<f32>() }>();
    out.extend(values.iter().map(|value| f32::from_le_bytes(*value)));
}

/// Rows and routes of a step fit 32 bits: a batch that large has no memory to stand in.
const fn count(number: usize) -> u32 {
    number as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZES: Sizes = Sizes {
        hidden: 3,
        top_k: 2,
    };

    fn route(row: u32, expert: u32) -> Route {
        Route {
            row,
            expert: ExpertId(expert),
        }
    }

    #[test]
    fn rows_come_out_as_they_went_in_one_rank_after_the_other() {
        let input: Vec<f32> = (0_u8..12).map(f32::from).collect();
        // The second half of a call: its first row is called 2.
        let parcel = Parcel {
            input: &input,
            rows: &[3, 1],
            routes: &[route(2, 7), route(3, 5), route(3, 9)],
            first_row: 2,
        };
        let mut block = vec![0xAA; SIZES.full_request(2)];
        Requests(SIZES).write(parcel, &mut block).unwrap();
        let mut incoming = Incoming::default();
        incoming.read(SIZES, &block).unwrap();
        incoming
            .read(SIZES, &vec![0; SIZES.full_request(2)])
            .unwrap();
        incoming.read(SIZES, &block).unwrap();
        let once = [9.0, 10.0, 11.0, 3.0, 4.0, 5.0];
        assert_eq!(incoming.input, [once, once].concat());
        let routes = [(0, 7), (1, 5), (1, 9), (2, 7), (3, 5), (3, 9)];
        assert_eq!(
            incoming.routes,
            routes.map(|(row, expert)| route(row, expert))
        );
        assert_eq!(incoming.of_rank, [3, 0, 3]);
    }

    #[test]
    fn answers_come_out_as_they_went_in() {
        let rows: [&[f32]; 2] = [&[1.0, 2.0, f32::NAN], &[-0.0, 5.0, 6.0]];
        let mut block = vec![0xAA; SIZES.full_answer(1)];
        Answers(SIZES)
            .write(Some(rows.into_iter()), 2, &mut block)
            .unwrap();
        let mut out = Vec::new();
        assert!(Answers(SIZES).read(&block, 2, &mut out).unwrap());
        let bits = |rows: &[f32]| rows.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&out), bits(&rows.concat()));
        let none = None::<std::array::IntoIter<&[f32], 0>>;
        let missing = Answers(SIZES).write(none, 2, &mut block);
        missing.unwrap();
        assert!(!Answers(SIZES).read(&block, 2, &mut out).unwrap());
        assert_eq!(out.len(), 6);
        let error = Answers(SIZES).read(&block, 1, &mut out).unwrap_err();
        assert_eq!(
            error,
            PackError::Answer {
                found: 2,
                wanted: 1
            }
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let parcel = Parcel {
            input: &[0.0; 9],
            rows: &[0, 1, 2],
            routes: &[route(0, 0)],
            first_row: 0,
        };
        let mut small = vec![0; SIZES.request(2, 1)];
        assert!(matches!(
            Requests(SIZES).write(parcel, &mut small),
            Err(PackError::Room { .. })
        ));
        let mut answer = vec![0; SIZES.answer(1)];
        let rows: [&[f32]; 2] = [&[0.0; 3]; 2];
        let written = Answers(SIZES).write(Some(rows.into_iter()), 2, &mut answer);
        assert!(matches!(written, Err(PackError::Room { .. })));
    }

    proptest! {
        /// Whatever a peer sends, reading it neither panics nor takes more than is there.
        #[test]
        fn nothing_is_taken_on_trust(bytes in proptest::collection::vec(any::<u8>(), 0..80), routes in 0_usize..5) {
            let mut incoming = Incoming::default();
            if incoming.read(SIZES, &bytes).is_ok() {
                let rows = incoming.rows(SIZES);
                prop_assert!(rows * 12 <= bytes.len());
                prop_assert!(incoming.routes.iter().all(|route| (route.row as usize) < rows));
            }
            let mut out = Vec::new();
            if Answers(SIZES).read(&bytes, routes, &mut out).is_ok_and(|there| there) {
                prop_assert_eq!(out.len(), routes * 3);
            }
        }
    }
}
