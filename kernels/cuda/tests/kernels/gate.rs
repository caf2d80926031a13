//! The gate and what is made of its choices: slots, tiles, and the sum.

use foregate_kernels::{Combine, Gate, Ops, Oracle};

use crate::call::Call;
use crate::numbers::{EPS, Random, assert_close, bits};

struct Chosen {
    experts: Vec<u32>,
    weights: Vec<f32>,
    counts: Vec<u32>,
}

fn choose(logits: &[f32], experts: usize, top_k: usize, normalise: bool) -> Chosen {
    let rows = logits.len() / experts;
    let mut call = Call::new("fg_gate");
    call.memory(logits);
    call.value(rows as u32)
        .value(experts as u32)
        .value(top_k as u32);
    call.value(u32::from(normalise));
    let (ids, weights) = (
        call.output::<u32>(rows * top_k),
        call.output::<f32>(rows * top_k),
    );
    let counts = call.memory(&vec![0_u32; experts]);
    call.run([rows.div_ceil(4) as u32, 1, 1]);
    Chosen {
        experts: call.read(ids),
        weights: call.read(weights),
        counts: call.read(counts),
    }
}

#[test]
fn chooses_what_the_oracle_chooses() {
    let mut random = Random(41);
    for (rows, experts, top_k, normalise) in [
        (1, 1, 1, true),
        (5, 8, 2, true),
        (9, 60, 4, false),
        (4, 128, 8, true),
        (3, 1000, 33, true),
        (2, 40, 40, false),
    ] {
        let mut logits = random.floats(rows * experts);
        if rows == 9 {
            // Ties, and a row that prefers one.
            logits[..experts].fill(0.25);
            logits[experts..2 * experts].fill(-3.0);
            logits[experts + 59] = 50.0;
        }
        let got = choose(&logits, experts, top_k, normalise);
        let (mut ids, mut weights) = (vec![0; rows * top_k], vec![0.0; rows * top_k]);
        Oracle
            .gate(Gate {
                logits: &logits,
                rows,
                experts,
                top_k,
                normalise,
                out_experts: &mut ids,
                out_weights: &mut weights,
            })
            .unwrap();
        assert_eq!(got.experts, ids);
        assert_close(&got.weights, &weights, |i| {
            32.0 * EPS * f64::from(weights[i]) + 1e-37
        });
        let mut counts = vec![0; experts];
        ids.iter().for_each(|id| counts[*id as usize] += 1);
        assert_eq!(got.counts, counts);
        for row in 0..rows {
            let alone = choose(
                &logits[row * experts..(row + 1) * experts],
                experts,
                top_k,
                normalise,
            );
            let range = row * top_k..(row + 1) * top_k;
            assert_eq!(alone.experts, got.experts[range.clone()]);
            assert_eq!(bits(&alone.weights), bits(&got.weights[range]));
        }
    }
}

#[test]
fn a_row_that_is_not_a_number_names_experts_that_exist() {
    let mut logits = vec![0.5; 3 * 40];
    logits[41] = f32::NAN;
    let got = choose(&logits, 40, 3, true);
    assert_eq!(got.experts[..3], [0, 1, 2]);
    assert_eq!(got.experts[3..6], [0, 1, 2]);
    assert!(got.weights[3..6].iter().all(|w| w.is_nan()));
    assert!(got.weights[..3].iter().all(|w| !w.is_nan()));
}

/// Offsets, rows of slots, slots of choices.
fn permute(experts: &[u32], top_k: usize, groups: usize) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let mut counts = vec![0_u32; groups];
    for expert in experts.iter().filter(|e| (**e as usize) < groups) {
        counts[*expert as usize] += 1;
    }
    let mut call = Call::new("fg_expert_offsets");
    call.memory(&counts);
    call.value(groups as u32);
    let out = call.output::<u32>(groups + 1);
    call.run([1, 1, 1]);
    let offsets: Vec<u32> = call.read(out);

    let mut call = Call::new("fg_permute");
    call.memory(experts);
    call.value(experts.len() as u32).value(top_k as u32);
    call.memory(&offsets);
    let (rows, slots) = (
        call.output::<u32>(experts.len()),
        call.output::<u32>(experts.len()),
    );
    call.run([groups as u32, 1, 1]);
    (offsets, call.read(rows), call.read(slots))
}

#[test]
fn slots_are_ordered_by_expert_and_then_by_choice() {
    let mut random = Random(42);
    for (rows, top_k, groups, spread) in [
        (1, 1, 1, 1),
        (70, 4, 300, 300),
        (300, 8, 16, 1), // all on one expert
        (33, 2, 8, 20),  // most are not here
    ] {
        let experts: Vec<u32> = (0..rows * top_k)
            .map(|_| random.below(spread) as u32)
            .collect();
        let (offsets, rows_of, slots_of) = permute(&experts, top_k, groups);
        let mut order: Vec<usize> = (0..experts.len())
            .filter(|c| (experts[*c] as usize) < groups)
            .collect();
        order.sort_by_key(|c| experts[*c]);
        assert_eq!(offsets[groups] as usize, order.len());
        for (slot, choice) in order.iter().enumerate() {
            assert_eq!(rows_of[slot] as usize, choice / top_k);
            assert_eq!(slots_of[*choice] as usize, slot);
            let expert = experts[*choice] as usize;
            assert!((offsets[expert]..offsets[expert + 1]).contains(&(slot as u32)));
        }
        let untouched = slots_of.iter().filter(|s| **s == u32::MAX).count();
        assert_eq!(untouched, experts.len() - order.len());
    }
}

#[test]
fn tiles_cover_each_group_once() {
    let mut random = Random(43);
    for (groups, most, tile_rows) in [(1, 1, 8), (300, 40, 16), (5, 400, 64), (40, 2, 8)] {
        let mut offsets = vec![0_u32];
        for _ in 0..groups {
            offsets.push(offsets.last().unwrap() + random.below(most) as u32);
        }
        let slots = *offsets.last().unwrap() as usize;
        let room = slots / tile_rows + groups;
        let mut call = Call::new("fg_tiles");
        call.memory(&offsets);
        call.value(groups as u32).value(tile_rows as u32);
        let (group, first) = (call.output::<u32>(room), call.output::<u32>(room));
        let count = call.output::<u32>(1);
        call.run([1, 1, 1]);
        let mut want = Vec::new();
        for g in 0..groups {
            let range = offsets[g]..offsets[g + 1];
            want.extend(range.step_by(tile_rows).map(|first| (g as u32, first)));
        }
        assert_eq!(call.read::<u32>(count), [want.len() as u32]);
        let (group, first) = (call.read::<u32>(group), call.read::<u32>(first));
        let got: Vec<(u32, u32)> = group.into_iter().zip(first).take(want.len()).collect();
        assert_eq!(got, want);
    }
}

#[test]
fn combine_is_one_chain_and_leaves_out_what_is_missing() {
    let mut random = Random(44);
    let (rows, top_k, width, slots) = (5, 3, 300, 17);
    let parts = random.floats(slots * width);
    let weights = random.floats(rows * top_k);
    let mut slot_of: Vec<u32> = (0..rows * top_k)
        .map(|_| random.below(slots) as u32)
        .collect();
    (slot_of[4], slot_of[9], slot_of[10], slot_of[11]) =
        (u32::MAX, u32::MAX, u32::MAX, u32::MAX);
    let mut call = Call::new("fg_combine");
    call.memory(&parts);
    call.memory(&slot_of);
    call.memory(&weights);
    call.value(top_k as u32).value(width as u32);
    let out = call.output::<f32>(rows * width);
    call.run([rows as u32, 1, 1]);
    let got: Vec<f32> = call.read(out);
    let part = |slot: &u32| match *slot {
        u32::MAX => &[][..],
        slot => &parts[slot as usize * width..][..width],
    };
    let list: Vec<&[f32]> = slot_of.iter().map(part).collect();
    let mut want = vec![0.0; rows * width];
    Oracle
        .combine(Combine {
            parts: &list,
            weights: &weights,
            top_k,
            width,
            out: &mut want,
        })
        .unwrap();
    assert_close(&got, &want, |_| 8.0 * EPS);
    for row in 0..rows {
        for i in 0..width {
            let chain = (row * top_k..(row + 1) * top_k).fold(0.0, |sum, c| match list[c] {
                [] => sum,
                part => weights[c].mul_add(part[i], sum),
            });
            assert_eq!(got[row * width + i].to_bits(), f32::to_bits(chain));
        }
    }
}
