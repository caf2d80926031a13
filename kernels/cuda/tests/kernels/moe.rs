//! Experts as grouped products, from slots to slots.

use foregate_kernels::{Dtype, ExpertFfn, ExpertGroup, Matrix, Ops, Oracle};

use crate::call::{Call, bytes_of};
use crate::gemm::TILES;
use crate::numbers::{Random, assert_close, bits, widened};

struct Experts {
    hidden: usize,
    inner: usize,
    gate: Vec<Vec<u16>>,
    up: Vec<Vec<u16>>,
    down: Vec<Vec<u16>>,
}

impl Experts {
    fn random(random: &mut Random, count: usize, hidden: usize, inner: usize) -> Self {
        let mut all = |n: usize| (0..count).map(|_| random.halves(n)).collect();
        Self {
            hidden,
            inner,
            gate: all(inner * hidden),
            up: all(inner * hidden),
            down: all(hidden * inner),
        }
    }
}

fn as_bytes(all: &[Vec<u16>]) -> Vec<Vec<u8>> {
    all.iter().map(|w| bytes_of(w)).collect()
}

/// Which row goes to each slot, and where each expert's slots begin.
struct Slots {
    rows: Vec<u32>,
    offsets: Vec<u32>,
}

impl Slots {
    fn of(lists: &[Vec<u32>]) -> Self {
        let mut offsets = vec![0];
        for list in lists {
            offsets.push(offsets.last().unwrap() + list.len() as u32);
        }
        Self {
            rows: lists.concat(),
            offsets,
        }
    }

    fn tiles(&self, tile: usize) -> (Vec<u32>, Vec<u32>) {
        let groups = self.offsets.len() - 1;
        let of = |g: usize| {
            (self.offsets[g]..self.offsets[g + 1])
                .step_by(tile)
                .map(move |f| (g as u32, f))
        };
        (0..groups).flat_map(of).unzip()
    }

    /// The lists of the permutation, as arguments.
    fn give(&self, call: &mut Call, tile: usize) {
        let (group, first) = self.tiles(tile);
        call.memory(&self.offsets);
        call.memory(&group);
        call.memory(&first);
        call.memory(&[group.len() as u32]);
    }
}

fn gate_up(experts: &Experts, x: &[u16], slots: &Slots, tile: usize, blocks: u32) -> Vec<u16> {
    let mut call = Call::new(&format!("fg_moe_gate_up_bf16_m{tile}"));
    call.memory(x);
    call.memory(&slots.rows);
    call.addresses(&as_bytes(&experts.gate));
    call.addresses(&as_bytes(&experts.up));
    slots.give(&mut call, tile);
    let out = call.output::<u16>(slots.rows.len() * experts.inner);
    call.value(experts.inner as u32)
        .value(experts.hidden as u32);
    call.run([blocks, 1, 1]);
    call.read(out)
}

fn down(experts: &Experts, x: &[u16], slots: &Slots, tile: usize, blocks: u32) -> Vec<f32> {
    let mut call = Call::new(&format!("fg_moe_down_bf16_m{tile}"));
    call.memory(x);
    call.addresses(&as_bytes(&experts.down));
    slots.give(&mut call, tile);
    let out = call.output::<f32>(slots.rows.len() * experts.hidden);
    call.value(experts.hidden as u32)
        .value(experts.inner as u32);
    call.run([blocks, 1, 1]);
    call.read(out)
}

fn oracle(experts: &Experts, x: &[u16], slots: &Slots) -> Vec<f32> {
    let (hidden, inner) = (experts.hidden, experts.inner);
    let pack = |all: &[Vec<u16>], n, k| -> Vec<Matrix> {
        let each = all
            .iter()
            .map(|w| Matrix::pack(Dtype::Bf16, n, k, &bytes_of(w)).unwrap());
        each.collect()
    };
    let (gate, up) = (
        pack(&experts.gate, inner, hidden),
        pack(&experts.up, inner, hidden),
    );
    let down = pack(&experts.down, hidden, inner);
    let groups: Vec<ExpertGroup<'_>> = (0..gate.len())
        .map(|g| ExpertGroup {
            gate: &gate[g],
            up: &up[g],
            down: &down[g],
            rows: &slots.rows[slots.offsets[g] as usize..slots.offsets[g + 1] as usize],
            out_offset: slots.offsets[g] as usize,
        })
        .collect();
    let mut out = vec![0.0; slots.rows.len() * hidden];
    Oracle
        .expert_ffn(ExpertFfn {
            x: &widened(x),
            hidden,
            groups: &groups,
            out: &mut out,
        })
        .unwrap();
    out
}

/// Norm of the difference by norm of what is wanted.
fn apart(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    (difference / want.iter().map(|w| square(*w)).sum::<f64>()).sqrt()
}

fn lists(random: &mut Random, counts: &[usize], rows: usize) -> Vec<Vec<u32>> {
    let list = |count: &usize| (0..*count).map(|_| random.below(rows) as u32).collect();
    counts.iter().map(list).collect()
}

#[test]
fn close_to_the_oracle_for_all_tiles_and_grids() {
    let mut random = Random(61);
    for (hidden, inner, counts, rows) in [
        (64, 32, vec![1], 1),
        (72, 40, vec![3, 0, 18, 1], 5),    // an empty expert
        (200, 33, vec![0, 0, 130, 0], 70), // all on one, of odd width
        (36, 70, vec![9, 8, 7], 11),       // rows of no whole run of 8
    ] {
        let experts = Experts::random(&mut random, counts.len(), hidden, inner);
        let x = random.halves(rows * hidden);
        let slots = Slots::of(&lists(&mut random, &counts, rows));
        let middle = gate_up(&experts, &x, &slots, 8, 3);
        let got = down(&experts, &middle, &slots, 8, 3);
        let want = oracle(&experts, &x, &slots);
        // Two roundings to bfloat16 meet, each at most 2⁻⁹ of a value; sums of float32 are far below.
        assert!(apart(&got, &want) < 2e-3, "{}", apart(&got, &want));
        let most = want.iter().fold(0.0_f32, |m, w| m.max(w.abs()));
        assert_close(&got, &want, |_| f64::from(most) / 64.0);
        for tile in TILES {
            let other = gate_up(&experts, &x, &slots, tile, 1 + tile as u32 / 16);
            assert_eq!(other, middle, "tile {tile}");
            let other = down(&experts, &middle, &slots, tile, 1 + tile as u32 / 16);
            assert_eq!(bits(&other), bits(&got), "tile {tile}");
        }
    }
}

#[test]
fn the_down_product_is_close_by_itself() {
    let mut random = Random(62);
    let experts = Experts::random(&mut random, 3, 70, 136);
    let slots = Slots::of(&[vec![0; 5], vec![], vec![0; 12]]);
    let x = random.halves(17 * 136);
    let got = down(&experts, &x, &slots, 16, 2);
    for slot in 0..17 {
        let w = widened(&experts.down[if slot < 5 { 0 } else { 2 }]);
        for n in 0..70 {
            let pairs = || {
                widened(&x[slot * 136..(slot + 1) * 136])
                    .into_iter()
                    .zip(w[n * 136..].to_vec())
            };
            let want: f64 = pairs().map(|(x, w)| f64::from(x) * f64::from(w)).sum();
            let sum: f64 = pairs().map(|(x, w)| f64::from((x * w).abs())).sum();
            let apart = (f64::from(got[slot * 70 + n]) - want).abs();
            assert!(apart <= sum * 140.0 * crate::numbers::EPS);
        }
    }
}

#[test]
fn a_slot_does_not_know_its_neighbours() {
    let mut random = Random(63);
    let experts = Experts::random(&mut random, 2, 80, 24);
    let x = random.halves(20 * 80);
    let all: Vec<u32> = (0..20).collect();
    let together = Slots::of(&[all.clone(), all]);
    let middle = gate_up(&experts, &x, &together, 32, 2);
    let out = down(&experts, &middle, &together, 32, 2);
    for row in [0, 7, 8, 19] {
        let alone = Slots::of(&[vec![], vec![row as u32]]);
        let one = gate_up(&experts, &x, &alone, 8, 1);
        assert_eq!(one, middle[(20 + row) * 24..(21 + row) * 24]);
        let one = down(&experts, &one, &alone, 8, 1);
        assert_eq!(bits(&one), bits(&out[(20 + row) * 80..(21 + row) * 80]));
    }
}

#[test]
fn slots_may_be_rows() {
    let mut random = Random(64);
    let experts = Experts::random(&mut random, 1, 64, 16);
    let x = random.halves(9 * 64);
    let slots = Slots::of(&[(0..9).collect()]);
    let want = gate_up(&experts, &x, &slots, 16, 1);
    let mut call = Call::new("fg_moe_gate_up_bf16_m16");
    call.memory(&x);
    call.null();
    call.addresses(&as_bytes(&experts.gate));
    call.addresses(&as_bytes(&experts.up));
    slots.give(&mut call, 16);
    let out = call.output::<u16>(9 * 16);
    call.value(16_u32).value(64_u32).run([1, 1, 1]);
    assert_eq!(call.read::<u16>(out), want);
}
