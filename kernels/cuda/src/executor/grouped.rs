//! Feed-forwards of several experts, grouped so that every weight is read once.
//!
//! ```text
//!  expert_ffn:   rows by expert, from the host ──► offsets, row_of_slot ─┐
//!  expert_layer: the gate's choice, on the device ─► counts ► offsets,   ├─► tiles ► gate·up ► down
//!                row_of_slot, slot_of_choice ───────────────────────────-┘          └─► combine
//! ```

use std::mem;
use std::ops::Range;

use foregate_kernels::{Anywhere, Dtype, ExpertFfn, ExpertGroup, ExpertLayer, Extent, OpError};

use super::format::{Coding, Kind, Tile};
use super::product::{BLOCKS_PER_UNIT, NO_BIAS, THREADS};
use super::{Cuda, Scratch};
use crate::kernel::{
    Address, CodedDown, CodedGateUp, Combined, Counted, Down, GateUp, NULL, Offsets, Pairwise,
    Permuted, Rows, Tiles, failed, size,
};

/// Where lists of `u32` stand in one piece of memory.
struct Lists {
    at: Address,
    next: usize,
}

impl Lists {
    /// Room for `count` numbers.
    const fn take(&mut self, count: usize) -> Address {
        let at = self.at + (self.next * size_of::<u32>()) as u64;
        self.next += count;
        at
    }
}

/// One grouped feed-forward, all of it where the device computes.
struct Grouped {
    x: Address,
    row_of_slot: Address,
    offsets: Address,
    tile_lists: [Address; 3],
    /// Addresses of gates, ups and downs, as many as there are groups each.
    weights: [Address; 3],
    groups: u32,
    slots: usize,
    /// Rows of the fullest expert, as far as is known.
    fullest: usize,
    hidden: usize,
    inner: usize,
    /// Formats of gates and ups, and of downs: bfloat16 or codes.
    dtypes: [Dtype; 2],
    out: Address,
}

impl Cuda {
    /// Numbers that the lists of tiles have at most.
    const fn tile_room(slots: usize, groups: usize) -> usize {
        slots / 8 + groups + 1
    }

    fn grouped(
        &self,
        scratch: &mut Scratch,
        op: &'static str,
        work: &Grouped,
    ) -> Result<(), OpError> {
        let coded = matches!(Kind::of(work.dtypes[0], work.hidden), Kind::Coded(_));
        let tile = Tile::of(coded, work.fullest);
        let [tile_group, tile_first, tile_count] = work.tile_lists;
        let driver = self.driver();
        Tiles {
            offsets: work.offsets,
            groups: work.groups,
            tile_rows: size(op, "rows of a tile", tile.rows)?,
            tile_group,
            tile_first,
            tile_count,
        }
        .run(driver, (op, "fg_tiles"), [1, 1, 1], THREADS)?;
        let bytes = work.slots * work.inner * 2;
        let between = scratch
            .inner
            .bytes(&self.shared.driver, "inner activations", bytes)?;
        self.gate_up(op, work, tile, between)?;
        self.down(op, work, tile, between)
    }

    /// First halves, a row of `out` per slot.
    fn gate_up(
        &self,
        op: &'static str,
        work: &Grouped,
        tile: &Tile,
        out: Address,
    ) -> Result<(), OpError> {
        let (driver, by) = (self.driver(), (op, tile.gate_up));
        let grid = [self.shared.driver.units() * BLOCKS_PER_UNIT, 1, 1];
        let [gate, up, _] = work.weights;
        let [tile_group, tile_first, tile_count] = work.tile_lists;
        let (x, row_of_slot, offsets) = (work.x, work.row_of_slot, work.offsets);
        let hidden = size(op, "hidden", work.hidden)?;
        let inner = size(op, "inner", work.inner)?;
        if let Kind::Coded(coding) = Kind::of(work.dtypes[0], work.hidden) {
            let Coding {
                format,
                block_n,
                block_k,
            } = coding;
            let halves = CodedGateUp {
                x,
                row_of_slot,
                gate,
                up,
                format,
                block_n,
                block_k,
                offsets,
                tile_group,
                tile_first,
                tile_count,
                out,
                inner,
                hidden,
            };
            return halves.run(driver, by, grid, tile.threads);
        }
        let halves = GateUp {
            x,
            row_of_slot,
            gate,
            up,
            offsets,
            tile_group,
            tile_first,
            tile_count,
            out,
            inner,
            hidden,
        };
        halves.run(driver, by, grid, tile.threads)
    }

    /// Second halves, of what [`Self::gate_up`] wrote to `x`.
    fn down(
        &self,
        op: &'static str,
        work: &Grouped,
        tile: &Tile,
        x: Address,
    ) -> Result<(), OpError> {
        let (driver, by) = (self.driver(), (op, tile.down));
        let grid = [self.shared.driver.units() * BLOCKS_PER_UNIT, 1, 1];
        let [_, _, down] = work.weights;
        let [tile_group, tile_first, tile_count] = work.tile_lists;
        let (offsets, out) = (work.offsets, work.out);
        let hidden = size(op, "hidden", work.hidden)?;
        let inner = size(op, "inner", work.inner)?;
        if let Kind::Coded(coding) = Kind::of(work.dtypes[1], work.inner) {
            let Coding {
                format,
                block_n,
                block_k,
            } = coding;
            let halves = CodedDown {
                x,
                down,
                format,
                block_n,
                block_k,
                offsets,
                tile_group,
                tile_first,
                tile_count,
                out,
                hidden,
                inner,
            };
            return halves.run(driver, by, grid, tile.threads);
        }
        let halves = Down {
            x,
            down,
            offsets,
            tile_group,
            tile_first,
            tile_count,
            out,
            hidden,
            inner,
        };
        halves.run(driver, by, grid, tile.threads)
    }

    /// See [`ExpertFfn`].
    pub(super) fn run_expert_ffn(&self, op: ExpertFfn<'_, Anywhere>) -> Result<(), OpError> {
        const OP: &str = "expert_ffn";
        op.check()?;
        let rows = op.x.extent() / op.hidden;
        let (x, out) = (self.input(OP, "x", op.x)?, self.output(OP, "out", op.out)?);
        let mut scratch = self.lock();
        let mut rest = op.groups;
        while let Some(first) = rest.first() {
            // Groups of one shape whose results follow each other are one launch.
            let mut next = first.out_offset;
            let together = rest.iter().take_while(|group| {
                let same = group.out_offset == next
                    && group.gate.n() == first.gate.n()
                    && group.gate.dtype() == first.gate.dtype();
                next += group.rows.len();
                same
            });
            let (groups, others) = rest.split_at(together.count());
            rest = others;
            let to = out + (first.out_offset * op.hidden * size_of::<f32>()) as u64;
            let input = (x, rows, op.hidden);
            match Kind::of(first.gate.dtype(), op.hidden) {
                Kind::Plain(..) => self.plain_groups(&mut scratch, OP, input, groups, to)?,
                Kind::Bf16 | Kind::Coded(_) => {
                    self.tiled_groups(&mut scratch, OP, input, groups, to)?;
                }
            }
        }
        Ok(())
    }

    /// Groups whose weights meet inputs of bfloat16, all of one format, in one grouped product.
    fn tiled_groups(
        &self,
        scratch: &mut Scratch,
        op: &'static str,
        (x, rows, hidden): (Address, usize, usize),
        groups: &[ExpertGroup<'_>],
        out: Address,
    ) -> Result<(), OpError> {
        let driver = &self.shared.driver;
        let mut lists = Vec::new();
        let (mut slots, mut fullest) = (0, 0);
        for group in groups {
            lists.push(size(op, "rows", slots)?);
            slots += group.rows.len();
            fullest = fullest.max(group.rows.len());
        }
        lists.push(size(op, "rows", slots)?);
        if slots == 0 {
            return Ok(());
        }
        let in_order = groups.len() == 1 && is_all(groups[0].rows, rows);
        for group in groups.iter().filter(|_| !in_order) {
            lists.extend_from_slice(group.rows);
        }
        let dtypes = alike(op, groups)?;
        let mut weights = Vec::with_capacity(3 * groups.len());
        let parts: [for<'a> fn(&ExpertGroup<'a>) -> &'a foregate_kernels::Matrix; 3] =
            [|group| group.gate, |group| group.up, |group| group.down];
        for part in parts {
            for group in groups {
                weights.push(self.weight(op, part(group))?);
            }
        }
        let weights = scratch
            .weights
            .holding(driver, "addresses of experts", &weights)?;
        let told = lists.len();
        let tiles = Self::tile_room(slots, groups.len());
        lists.resize(told + 2 * tiles + 1, 0);
        let at = scratch.lists.holding(driver, "lists of experts", &lists)?;
        let mut lists = Lists { at, next: 0 };
        let offsets = lists.take(groups.len() + 1);
        let row_of_slot = lists.take(if in_order { 0 } else { slots });
        let tile_lists = [lists.take(tiles), lists.take(tiles), lists.take(1)];
        let each = (groups.len() * size_of::<u64>()) as u64;
        let x = self.rounded(&mut scratch.rounded, op, x, rows * hidden)?;
        self.grouped(
            scratch,
            op,
            &Grouped {
                x,
                row_of_slot: if in_order { NULL } else { row_of_slot },
                offsets,
                tile_lists,
                weights: [weights, weights + each, weights + 2 * each],
                groups: size(op, "groups", groups.len())?,
                slots,
                fullest,
                hidden,
                inner: groups[0].gate.n(),
                dtypes,
                out,
            },
        )
    }

    /// Groups whose weights meet inputs of float32, one after the other.
    fn plain_groups(
        &self,
        scratch: &mut Scratch,
        op: &'static str,
        (x, rows, hidden): (Address, usize, usize),
        groups: &[ExpertGroup<'_>],
        mut out: Address,
    ) -> Result<(), OpError> {
        alike(op, groups)?;
        for group in groups {
            let count = group.rows.len();
            if count == 0 {
                continue;
            }
            let x = if is_all(group.rows, rows) {
                x
            } else {
                self.gathered(scratch, op, (x, hidden), group.rows)?
            };
            let half = count * group.gate.n();
            let bytes = 2 * half * size_of::<f32>();
            let gate = scratch
                .inner
                .bytes(&self.shared.driver, "inner activations", bytes)?;
            let up = gate + (half * size_of::<f32>()) as u64;
            self.product(scratch, op, group.gate, count, (x, NO_BIAS, gate))?;
            self.product(scratch, op, group.up, count, (x, NO_BIAS, up))?;
            let both = Pairwise {
                x: gate,
                y: up,
                count: half as u64,
            };
            let grid = [self.blocks(half), 1, 1];
            both.run(self.driver(), (op, "fg_silu_mul"), grid, THREADS)?;
            self.product(scratch, op, group.down, count, (gate, NO_BIAS, out))?;
            out += (count * hidden * size_of::<f32>()) as u64;
        }
        Ok(())
    }

    /// Rows one after the other.
    pub(super) fn gathered(
        &self,
        scratch: &mut Scratch,
        op: &'static str,
        (x, width): (Address, usize),
        rows: &[u32],
    ) -> Result<Address, OpError> {
        let driver = &self.shared.driver;
        let ids = scratch.ids.holding(driver, "numbers of rows", rows)?;
        let bytes = rows.len() * width * size_of::<f32>();
        let out = scratch.gathered.bytes(driver, "gathered rows", bytes)?;
        let grid = [size(op, "rows", rows.len())?, 1, 1];
        Rows {
            table: x,
            ids,
            out,
            width: size(op, "width", width)?,
        }
        .run(self.driver(), (op, "fg_gather_rows"), grid, THREADS)?;
        Ok(out)
    }

    /// See [`ExpertLayer`].
    pub(super) fn run_expert_layer(&self, op: ExpertLayer<'_>) -> Result<(), OpError> {
        const OP: &str = "expert_layer";
        op.check()?;
        if op.rows == 0 {
            return Ok(());
        }
        let dtypes = op.table.dtypes.ok_or(OpError::OnHost {
            op: OP,
            what: "the table of experts",
        })?;
        one_kind(OP, dtypes)?;
        if let Kind::Plain(symbol, _) = Kind::of(dtypes[0], op.table.hidden) {
            return self.layer_by_host(op, symbol);
        }
        let (groups, choices) = (op.table.experts, op.rows * op.top_k);
        let (hidden, inner) = (op.table.hidden, op.table.inner);
        let x = self.input(OP, "x", op.x)?;
        let experts = self.input(OP, "experts", op.experts)?;
        let sums = self.input(OP, "weights", op.weights)?;
        let table = self.input(OP, "the table of experts", op.table.addresses.view())?;
        let out = self.output(OP, "out", op.out)?;
        let mut scratch = self.lock();
        let scratch = &mut *scratch;
        let driver = &self.shared.driver;
        let tiles = Self::tile_room(choices, groups);
        let room = groups + (groups + 1) + 2 * choices + 2 * tiles + 1;
        let at = scratch
            .lists
            .bytes(driver, "lists of experts", room * size_of::<u32>())?;
        let mut lists = Lists { at, next: 0 };
        let (counts, offsets) = (lists.take(groups), lists.take(groups + 1));
        let (row_of_slot, slot_of_choice) = (lists.take(choices), lists.take(choices));
        let tile_lists = [lists.take(tiles), lists.take(tiles), lists.take(1)];
        let (count, top_k) = (size(OP, "choices", choices)?, size(OP, "top_k", op.top_k)?);
        let group_count = size(OP, "experts", groups)?;
        driver
            .zero(counts, groups * size_of::<u32>())
            .map_err(failed(OP))?;
        let grid = [self.blocks(choices), 1, 1];
        Counted {
            experts,
            choices: count,
            counts,
            groups: group_count,
        }
        .run(self.driver(), (OP, "fg_expert_counts"), grid, THREADS)?;
        Offsets {
            counts,
            groups: group_count,
            offsets,
        }
        .run(self.driver(), (OP, "fg_expert_offsets"), [1, 1, 1], THREADS)?;
        Permuted {
            experts,
            choices: count,
            top_k,
            offsets,
            row_of_slot,
            slot_of_choice,
        }
        .run(
            self.driver(),
            (OP, "fg_permute"),
            [group_count, 1, 1],
            THREADS,
        )?;
        let parts = choices * hidden * size_of::<f32>();
        let parts = scratch.parts.bytes(driver, "results of experts", parts)?;
        let x = self.rounded(&mut scratch.rounded, OP, x, op.rows * hidden)?;
        let each = (groups * size_of::<u64>()) as u64;
        self.grouped(
            scratch,
            OP,
            &Grouped {
                x,
                row_of_slot,
                offsets,
                tile_lists,
                weights: [table, table + each, table + 2 * each],
                groups: group_count,
                slots: choices,
                // Twice of what each would have if all had the same, and no more than there are rows.
                fullest: op.rows.min(2 * choices.div_ceil(groups)),
                hidden,
                inner,
                dtypes,
                out: parts,
            },
        )?;
        self.combined(
            OP,
            (op.rows, op.top_k, hidden),
            (parts, slot_of_choice, sums, out),
        )
    }

    fn combined(
        &self,
        op: &'static str,
        (rows, top_k, width): (usize, usize, usize),
        (parts, slot_of_choice, weights, out): (Address, Address, Address, Address),
    ) -> Result<(), OpError> {
        let combined = Combined {
            parts,
            slot_of_choice,
            weights,
            top_k: size(op, "top_k", top_k)?,
            width: size(op, "width", width)?,
            out,
        };
        let grid = [size(op, "rows", rows)?, 1, 1];
        combined.run(self.driver(), (op, "fg_combine"), grid, THREADS)
    }

    /// Experts whose weights meet inputs of float32, in products of `symbol`: the choice comes to the host, which sorts it.
    /// Right, and slow.
    fn layer_by_host(&self, op: ExpertLayer<'_>, symbol: &'static str) -> Result<(), OpError> {
        const OP: &str = "expert_layer";
        let (hidden, inner, groups) = (op.table.hidden, op.table.inner, op.table.experts);
        let mut chosen = vec![0; op.rows * op.top_k];
        op.experts.read(&mut chosen)?;
        let x = self.input(OP, "x", op.x)?;
        let sums = self.input(OP, "weights", op.weights)?;
        let out = self.output(OP, "out", op.out)?;
        let mut scratch = self.lock();
        let scratch = &mut *scratch;
        let driver = &self.shared.driver;
        let parts = chosen.len() * hidden * size_of::<f32>();
        let parts = scratch.parts.bytes(driver, "results of experts", parts)?;
        let (by_expert, slots) = sort(&chosen, op.top_k, groups);
        let by = (OP, symbol);
        for (expert, rows) in by_expert.iter().enumerate() {
            let Range { start, end } = rows.slots;
            let count = end - start;
            if count == 0 {
                continue;
            }
            let x = self.gathered(scratch, OP, (x, hidden), &rows.rows)?;
            let half = count * inner;
            let bytes = 2 * half * size_of::<f32>();
            let gate = scratch.inner.bytes(driver, "inner activations", bytes)?;
            let up = gate + (half * size_of::<f32>()) as u64;
            let weight = |part: usize| op.table.here.get(part * groups + expert).copied();
            let (Some(w_gate), Some(w_up), Some(w_down)) = (weight(0), weight(1), weight(2))
            else {
                return Err(OpError::OnHost {
                    op: OP,
                    what: "the table of experts",
                });
            };
            let to = parts + (start * hidden * size_of::<f32>()) as u64;
            self.plain_product(by, (x, w_gate, NO_BIAS, gate), (count, inner, hidden))?;
            self.plain_product(by, (x, w_up, NO_BIAS, up), (count, inner, hidden))?;
            let both = Pairwise {
                x: gate,
                y: up,
                count: half as u64,
            };
            let grid = [self.blocks(half), 1, 1];
            both.run(self.driver(), (OP, "fg_silu_mul"), grid, THREADS)?;
            self.plain_product(by, (gate, w_down, NO_BIAS, to), (count, hidden, inner))?;
        }
        let slots = scratch.lists.holding(driver, "lists of experts", &slots)?;
        self.combined(OP, (op.rows, op.top_k, hidden), (parts, slots, sums, out))
    }
}

/// Rows of one expert, and where their results stand.
struct OfExpert {
    rows: Vec<u32>,
    slots: Range<usize>,
}

/// Choices by expert, stable, and each choice's slot; those of experts that do not exist have none.
fn sort(chosen: &[u32], top_k: usize, experts: usize) -> (Vec<OfExpert>, Vec<u32>) {
    let mut slot_of_choice = vec![u32::MAX; chosen.len()];
    let mut next = 0;
    let by_expert = (0..experts)
        .map(|expert| {
            let start = next;
            let mut rows = Vec::new();
            for (choice, of) in chosen.iter().enumerate() {
                if *of as usize == expert {
                    rows.push(number(choice / top_k));
                    slot_of_choice[choice] = number(next);
                    next += 1;
                }
            }
            OfExpert {
                rows,
                slots: start..next,
            }
        })
        .collect();
    (by_expert, slot_of_choice)
}

/// Choices of a step fit 32 bits: memory bounds them.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
const fn number(value: usize) -> u32 {
    value as u32
}

/// Whether `rows` are all rows of `count`, in their order.
fn is_all(rows: &[u32], count: usize) -> bool {
    rows.len() == count && rows.iter().enumerate().all(|(at, row)| at == *row as usize)
}

/// Formats of gates and ups, and of downs, which all groups have.
fn alike(op: &'static str, groups: &[ExpertGroup<'_>]) -> Result<[Dtype; 2], OpError> {
    let dtypes = [groups[0].gate.dtype(), groups[0].down.dtype()];
    let same = |group: &ExpertGroup<'_>| {
        [group.gate.dtype(), group.up.dtype(), group.down.dtype()]
            == [dtypes[0], dtypes[0], dtypes[1]]
    };
    if groups.iter().all(same) {
        one_kind(op, dtypes)?;
        return Ok(dtypes);
    }
    Err(mixed(op))
}

/// Whether both halves of a feed-forward have the same kernels.
fn one_kind(op: &'static str, [first, second]: [Dtype; 2]) -> Result<(), OpError> {
    if mem::discriminant(&first) == mem::discriminant(&second) {
        return Ok(());
    }
    Err(mixed(op))
}

fn mixed(op: &'static str) -> OpError {
    OpError::Unsupported {
        op,
        what: "experts whose three matrices have several formats".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_sorted_by_expert_and_keep_their_order() {
        let (by_expert, slots) = sort(&[0, 2, 2, 9, 0, 1], 2, 3);
        let rows: Vec<&[u32]> = by_expert.iter().map(|of| of.rows.as_slice()).collect();
        assert_eq!(rows, [&[0, 2][..], &[2], &[0, 1]]);
        assert_eq!(slots, [0, 3, 4, u32::MAX, 1, 2]);
        assert!(is_all(&[0, 1], 2) && !is_all(&[1, 0], 2) && !is_all(&[0], 2));
    }
}
