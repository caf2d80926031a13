//! int4 as GPTQ and AWQ pack it: eight weights in a 32-bit word.
//!
//! Both keep scales and zero points per group of inputs, `groups × outputs`. GPTQ packs eight inputs of an
//! output, lowest first; AWQ eight outputs of an input, in an order of its own.

use super::{SCALES, Source, Wrong, beside, tensor, widen};
use crate::header::Dtype;
use crate::index::{Index, Tensor};

/// Weights in a word.
const PER_WORD: usize = 8;
/// Which output of a word's eight stands in the nibble of each number, counted from the lowest.
const AWQ_ORDER: [usize; PER_WORD] = [0, 2, 4, 6, 1, 3, 5, 7];
/// The same for zero points of GPTQ, where nothing is interleaved.
const PLAIN_ORDER: [usize; PER_WORD] = [0, 1, 2, 3, 4, 5, 6, 7];

/// What brings back zero points that were stored less one. The subtraction was done on whole words, so
/// a zero point of 0 borrowed from its neighbour; adding to the whole word returns what was borrowed.
const ONE_EACH: u32 = 0x1111_1111;

/// A matrix whose inputs are cut into groups.
#[derive(Clone, Copy)]
struct Grid {
    n: usize,
    k: usize,
    /// Inputs of a group.
    group: usize,
}

impl Grid {
    fn new(n: usize, k: usize, group: u32) -> Self {
        let group = (group as usize).clamp(1, k.max(1));
        Self { n, k, group }
    }

    const fn groups(self) -> usize {
        self.k.div_ceil(self.group)
    }

    const fn row_bytes(self) -> usize {
        self.k.div_ceil(2)
    }
}

pub(super) fn gptq_sources(
    name: &str,
    n: usize,
    k: usize,
    group: u32,
    reordered: bool,
) -> Vec<Source> {
    let grid = Grid::new(n, k, group);
    let words = [k.div_ceil(PER_WORD), n];
    let mut sources = common(name, grid, words);
    sources.push(Source {
        optional: !reordered,
        ..Source::new(beside(name, "g_idx"), &[Dtype::I32], [k])
    });
    sources
}

pub(super) fn awq_sources(name: &str, n: usize, k: usize, group: u32) -> Vec<Source> {
    common(name, Grid::new(n, k, group), [k, n.div_ceil(PER_WORD)])
}

fn common(name: &str, grid: Grid, words: [usize; 2]) -> Vec<Source> {
    let groups = grid.groups();
    let zeros = [groups, grid.n.div_ceil(PER_WORD)];
    vec![
        Source::new(beside(name, "qweight"), &[Dtype::I32], words),
        Source::new(beside(name, "qzeros"), &[Dtype::I32], zeros),
        Source::new(beside(name, "scales"), SCALES, [groups, grid.n]),
    ]
}

/// Canonical bytes of a GPTQ matrix.
pub(super) fn gptq(
    index: &Index,
    name: &str,
    n: usize,
    k: usize,
    group: u32,
    zero_less_one: bool,
) -> Result<Vec<u8>, Wrong> {
    let grid = Grid::new(n, k, group);
    in_order(index, name, grid)?;
    let packed = tensor(index, &beside(name, "qweight"))?;
    let mut out = vec![0; n * grid.row_bytes()];
    for (at, words) in words(&packed).chunks_exact(n.max(1)).enumerate() {
        for (row, word) in out.chunks_exact_mut(grid.row_bytes().max(1)).zip(words) {
            // A word's bytes are four pairs of inputs, the even one low: as in canonical bytes.
            for (byte, value) in row.iter_mut().skip(at * PER_WORD / 2).zip(word) {
                *byte = *value;
            }
        }
    }
    scale(index, name, grid, &mut out)?;
    zero_points(
        index,
        name,
        grid,
        PLAIN_ORDER,
        if zero_less_one { ONE_EACH } else { 0 },
        &mut out,
    )?;
    Ok(out)
}

/// Canonical bytes of an AWQ matrix.
pub(super) fn awq(
    index: &Index,
    name: &str,
    n: usize,
    k: usize,
    group: u32,
) -> Result<Vec<u8>, Wrong> {
    let grid = Grid::new(n, k, group);
    let packed = tensor(index, &beside(name, "qweight"))?;
    let (row_bytes, across) = (grid.row_bytes(), n.div_ceil(PER_WORD));
    let mut out = vec![0; n * row_bytes];
    for (input, words) in words(&packed).chunks_exact(across.max(1)).enumerate() {
        for (eight, word) in words.iter().enumerate() {
            let word = u32::from_le_bytes(*word);
            for (place, output) in AWQ_ORDER.iter().enumerate() {
                let at = (eight * PER_WORD + output) * row_bytes + input / 2;
                if let Some(byte) = out.get_mut(at) {
                    *byte |= nibble(word, place) << (4 * (input % 2));
                }
            }
        }
    }
    scale(index, name, grid, &mut out)?;
    zero_points(index, name, grid, AWQ_ORDER, 0, &mut out)?;
    Ok(out)
}

/// Inputs in the order of importance (`desc_act`) are not supported: each input's group must be the one
/// its number tells.
fn in_order(index: &Index, name: &str, grid: Grid) -> Result<(), Wrong> {
    let Some(order) = index.get(&beside(name, "g_idx")) else {
        return Ok(());
    };
    let odd = words(&order)
        .iter()
        .enumerate()
        .find(|(input, group)| u32::from_le_bytes(**group) as usize != input / grid.group);
    match odd {
        None => Ok(()),
        Some((input, group)) => Err((
            beside(name, "g_idx"),
            format!(
                "input {input} is in group {}: inputs out of order (`desc_act`) are not supported; \
                 use a checkpoint with `desc_act` false",
                i32::from_le_bytes(*group)
            ),
        )),
    }
}

fn words<'a>(tensor: &Tensor<'a>) -> &'a [[u8; 4]] {
    tensor.bytes.as_chunks::<4>().0
}

const fn nibble(word: u32, place: usize) -> u8 {
    ((word >> (4 * place)) & 0xf) as u8
}

/// Appends scales, the groups of an output beside each other.
fn scale(index: &Index, name: &str, grid: Grid, out: &mut Vec<u8>) -> Result<(), Wrong> {
    let scales = widen(&tensor(index, &beside(name, "scales"))?);
    out.reserve(grid.n * grid.groups() * 5);
    for output in 0..grid.n {
        for group in 0..grid.groups() {
            let scale = scales.get(group * grid.n + output).copied();
            out.extend_from_slice(&scale.unwrap_or_default().to_le_bytes());
        }
    }
    Ok(())
}

/// Appends zero points likewise, from words to which `add` was added.
fn zero_points(
    index: &Index,
    name: &str,
    grid: Grid,
    order: [usize; PER_WORD],
    add: u32,
    out: &mut Vec<u8>,
) -> Result<(), Wrong> {
    let zeros = tensor(index, &beside(name, "qzeros"))?;
    let (words, across) = (words(&zeros), grid.n.div_ceil(PER_WORD));
    let mut place_of = [0; PER_WORD];
    for (place, output) in order.into_iter().enumerate() {
        place_of[output] = place;
    }
    for output in 0..grid.n {
        for group in 0..grid.groups() {
            let word = words.get(group * across + output / PER_WORD).copied();
            let word = u32::from_le_bytes(word.unwrap_or_default()).wrapping_add(add);
            out.push(nibble(word, place_of[output % PER_WORD]));
        }
    }
    Ok(())
}
