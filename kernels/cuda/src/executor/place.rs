//! What the layers of a step read again, in one piece of the device's memory.

use std::sync::Arc;

use foregate_kernels::{OpError, Placed, StepRows, View};

use crate::driver::Driver;
use crate::kernel::{Address, size};

/// Most queries of an attention's tile: heads up to 128 wide, and wider ones.
const QUERIES: [usize; 2] = [64, 32];
/// Width of a head from which on a tile has fewer queries.
const WIDE: usize = 128;
/// Positions of a split.
const SPLIT: u32 = 512;

/// Where the parts are, in the order in which they stand in [`Placed::parts`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    pub(super) positions: Address,
    pub(super) sequence_of_row: Address,
    pub(super) tables: Address,
    pub(super) tile_first: Address,
    pub(super) tile_rows: Address,
    pub(super) cos: Address,
    pub(super) sin: Address,
    pub(super) rows: usize,
    pub(super) table_stride: u32,
    pub(super) tiles: u32,
    pub(super) splits: u32,
    pub(super) half: usize,
}

/// Numbers in [`Placed::parts`].
const PARTS: usize = 12;

impl Places {
    /// Those that [`fill`] wrote, if it was for this device.
    pub(super) fn of(
        driver: &Arc<dyn Driver>,
        op: &'static str,
        placed: &Placed,
    ) -> Result<Self, OpError> {
        let elsewhere = || OpError::OnHost {
            op,
            what: "the step's rows",
        };
        let View::Device(words) = placed.words.view() else {
            return Err(elsewhere());
        };
        let parts: &[usize; PARTS] = placed
            .parts
            .as_slice()
            .try_into()
            .map_err(|_| elsewhere())?;
        if words.region().device() != driver.id() {
            return Err(elsewhere());
        }
        let at = |part: usize| words.address() + (parts[part] * size_of::<u32>()) as u64;
        Ok(Self {
            positions: at(0),
            sequence_of_row: at(1),
            tables: at(2),
            tile_first: at(3),
            tile_rows: at(4),
            cos: at(5),
            sin: at(6),
            rows: parts[7],
            table_stride: size(op, "pages of a sequence", parts[8])?,
            tiles: size(op, "tiles", parts[9])?,
            splits: size(op, "splits", parts[10])?,
            half: parts[11],
        })
    }
}

/// Tiles of an attention: runs of rows of one sequence with ascending positions, none with more than `most` rows.
fn tiles(rows: &StepRows<'_>, most: usize, mut tile: impl FnMut(usize, usize)) -> usize {
    let sequences = rows.pages.sequence_of_row;
    let (mut first, mut count) = (0, 0);
    for row in 1..=rows.positions.len() {
        let goes_on = row < rows.positions.len()
            && row - first < most
            && sequences[row] == sequences[row - 1]
            && rows.positions[row] > rows.positions[row - 1];
        if !goes_on {
            tile(first, row - first);
            count += 1;
            first = row;
        }
    }
    count
}

/// Lays a step's rows out in [`Placed::staged`]; the caller copies them.
pub(super) fn fill(rows: &StepRows<'_>, placed: &mut Placed) -> Result<(), OpError> {
    const OP: &str = "place";
    let count = rows.positions.len();
    let half = rows.angles.half();
    if rows.pages.sequence_of_row.len() != count || rows.angles.cos().len() != count * half {
        let error = foregate_kernels::ShapeError {
            op: OP,
            what: "sequences and angles of rows",
            want: count,
            got: rows.pages.sequence_of_row.len(),
        };
        return Err(error.into());
    }
    let queries = QUERIES[usize::from(2 * half > WIDE)];
    if rows.group > queries {
        return Err(OpError::Unsupported {
            op: "attention",
            what: format!(
                "{} query heads share a key head, kernels take at most {queries} for heads of {} values",
                rows.group,
                2 * half
            ),
        });
    }
    let (words, parts) = (&mut placed.staged, &mut placed.parts);
    words.clear();
    parts.clear();
    parts.push(words.len());
    words.extend_from_slice(rows.positions);
    parts.push(words.len());
    words.extend_from_slice(rows.pages.sequence_of_row);
    parts.push(words.len());
    let stride = rows
        .pages
        .tables
        .iter()
        .map(|table| table.len())
        .max()
        .unwrap_or(0);
    for table in rows.pages.tables {
        words.extend_from_slice(table);
        words.extend(std::iter::repeat_n(0, stride - table.len()));
    }
    let most = queries / rows.group.max(1);
    parts.push(words.len());
    let tile_count = tiles(rows, most, |first, _| words.push(number(first)));
    parts.push(words.len());
    tiles(rows, most, |_, rows| words.push(number(rows)));
    for angles in [rows.angles.cos(), rows.angles.sin()] {
        parts.push(words.len());
        words.extend(angles.iter().map(|value| value.to_bits()));
    }
    let last = rows.positions.iter().max().copied().unwrap_or(0);
    parts.extend([count, stride, tile_count, (last / SPLIT) as usize + 1, half]);
    Ok(())
}

/// Rows of a step fit 32 bits: memory bounds them.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
const fn number(value: usize) -> u32 {
    value as u32
}

#[cfg(test)]
mod tests {
    use foregate_kernels::{PageMap, RopeTable};

    use super::*;

    #[test]
    fn rows_of_a_sequence_make_tiles_and_pages_are_padded() {
        let positions = [5, 6, 7, 0, 9, 3];
        let angles = RopeTable::new(&[1.0; 8], &positions);
        let tables: [&[u32]; 3] = [&[4, 5], &[6], &[]];
        let rows = StepRows {
            positions: &positions,
            pages: PageMap {
                sequence_of_row: &[0, 0, 0, 1, 2, 2],
                tables: &tables,
            },
            angles: &angles,
            group: 32,
        };
        let mut placed = Placed::default();
        fill(&rows, &mut placed).unwrap();
        let (words, parts) = (&placed.staged, &placed.parts);
        // Two rows of 32 queries fill a tile; a position that falls begins one.
        assert_eq!(words[parts[3]..parts[4]], [0, 2, 3, 4, 5]);
        assert_eq!(words[parts[4]..parts[5]], [2, 1, 1, 1, 1]);
        assert_eq!(words[parts[2]..parts[3]], [4, 5, 6, 0, 0, 0]);
        assert_eq!(parts[7..], [6, 2, 5, 1, 8]);
        assert_eq!(words.len(), parts[6] + 6 * 8);
        let wide = StepRows { group: 65, ..rows };
        let error = fill(&wide, &mut placed).unwrap_err().to_string();
        assert!(error.contains("65 query heads"), "{error}");
        let short = StepRows {
            positions: &positions[1..],
            ..rows
        };
        assert!(fill(&short, &mut placed).is_err());
    }
}
