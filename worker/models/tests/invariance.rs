//! A row's bits depend on its own past only: not on the batch, the chunking, the pages or the threads;
//! and never on its future.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use foregate_api::model::Family;
use foregate_api::weights::WeightFormat;
use foregate_checkpoint::Checkpoint;
use foregate_checkpoint::tiny::Tiny;
use foregate_kernels::{Cpu, KvCache};
use foregate_models::experts::{ExpertBatch, Experts, ExpertsError, LateRows};
use foregate_models::{LocalExperts, Model, ModelError, StepBatch, StepOutput};

use support::{Rig, Walk, bits, table};

const FAMILIES: [Family; 4] = [
    Family::Qwen3Moe,
    Family::Qwen2Moe,
    Family::Mixtral,
    Family::Olmoe,
];

/// Every form of block and tensor that the families have: a dense block, tied embeddings, clamped
/// projections, wide heads, weights in bfloat16.
fn variants() -> Vec<Tiny> {
    let mut all = Vec::new();
    for family in FAMILIES {
        for format in [WeightFormat::Float32, WeightFormat::Bfloat16] {
            let mut tiny = Tiny::new(family);
            tiny.format = format;
            let mut set = |name: &str, value: serde_json::Value| {
                tiny.set.insert(name.to_owned(), value);
            };
            match family {
                Family::Qwen3Moe => {
                    set("mlp_only_layers", [1].into());
                    set("tie_word_embeddings", true.into());
                    tiny.head_dim = Some(20);
                    tiny.top_k = 3;
                }
                Family::Qwen2Moe => set("qkv_bias", (format == WeightFormat::Float32).into()),
                Family::Olmoe => set("clip_qkv", 0.5.into()),
                Family::Mixtral => {}
            }
            all.push(tiny);
        }
    }
    all
}

fn open(tiny: &Tiny) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    tiny.write(dir.path()).unwrap();
    Rig::open(dir.path())
}

fn prompt(seed: u32, length: usize) -> Vec<u32> {
    let mut state = seed;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % 64
        })
        .collect()
}

#[test]
fn chunks_batches_and_pages_do_not_change_a_bit() {
    for tiny in variants() {
        let mut rig = open(&tiny);
        let (one, two) = (prompt(1, 37), prompt(2, 23));
        let alone_one = rig.walk(&one, &[37], &table(0, 37));
        let alone_two = rig.walk(&two, &[23], &table(10, 23));
        assert!(alone_one.logits.iter().all(|v| v.is_finite()));
        for chunks in [&[1][..], &[5], &[16, 3]] {
            let cut = rig.walk(&one, chunks, &table(20, 37));
            assert_eq!(
                bits(&cut.logits),
                bits(&alone_one.logits),
                "{tiny:?} {chunks:?}"
            );
            assert_eq!(cut.routes, alone_one.routes);
        }
        // Both in one batch, cut at different places: a prompt's chunk beside single tokens.
        let (table_one, table_two) = (table(30, 37), table(45, 23));
        let (mut both_one, mut both_two) = (Walk::default(), Walk::default());
        let cuts_one = [0, 9, 10, 11, 37];
        let cuts_two = [0, 1, 8, 22, 23];
        let (vocab, moe) = (rig.model.spec().vocab, rig.model.spec().moe_layers());
        let per_row = moe * rig.model.spec().top_k;
        for step in 0..4 {
            let (a, b) = (
                cuts_one[step]..cuts_one[step + 1],
                cuts_two[step]..cuts_two[step + 1],
            );
            let out = rig.step(&[
                (&one[a.clone()], a.start, &table_one),
                (&two[b.clone()], b.start, &table_two),
            ]);
            let (first, second) = out.logits.split_at(a.len() * vocab);
            both_one.logits.extend_from_slice(first);
            both_two.logits.extend_from_slice(second);
            let (first, second) = out.routes.split_at(a.len() * per_row);
            both_one.routes.extend_from_slice(first);
            both_two.routes.extend_from_slice(second);
        }
        for (both, alone) in [(both_one, alone_one), (both_two, alone_two)] {
            assert_eq!(bits(&both.logits), bits(&alone.logits), "{tiny:?}");
            assert_eq!(both.routes, alone.routes);
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for tiny in variants() {
        let dir = tempfile::tempdir().unwrap();
        tiny.write(dir.path()).unwrap();
        let walk = |threads| {
            let mut rig = Rig::on(dir.path(), Cpu::new(threads));
            rig.walk(&prompt(3, 33), &[33], &table(0, 33))
        };
        let one = walk(1);
        for threads in [2, 3] {
            let more = walk(threads);
            assert_eq!(bits(&more.logits), bits(&one.logits));
            assert_eq!(more.routes, one.routes);
        }
    }
}

/// The sums of tiles are others, but their law is the same.
#[test]
fn threads_and_chunks_do_not_change_a_bit_of_tiles() {
    for tiny in variants() {
        let dir = tempfile::tempdir().unwrap();
        tiny.write(dir.path()).unwrap();
        let walk = |threads, chunks: &[usize]| {
            let mut rig = Rig::on(dir.path(), Cpu::with_tiles_in_software(threads));
            rig.walk(&prompt(3, 33), chunks, &table(0, 33))
        };
        let one = walk(1, &[33]);
        for (threads, chunks) in [(1, &[1][..]), (3, &[33]), (2, &[5, 17])] {
            let other = walk(threads, chunks);
            assert_eq!(bits(&other.logits), bits(&one.logits), "{tiny:?}");
            assert_eq!(other.routes, one.routes);
        }
    }
}

#[test]
fn a_token_changes_nothing_before_it_and_something_from_it_on() {
    for tiny in variants() {
        let mut rig = open(&tiny);
        let tokens = prompt(5, 24);
        let mut other = tokens.clone();
        other[13] = (other[13] + 1) % 64;
        let first = rig.walk(&tokens, &[24], &table(0, 24));
        let second = rig.walk(&other, &[24], &table(10, 24));
        let vocab = rig.model.spec().vocab;
        let (before, from) = first.logits.split_at(13 * vocab);
        let (other_before, other_from) = second.logits.split_at(13 * vocab);
        assert_eq!(bits(before), bits(other_before), "{tiny:?}");
        for (row, (a, b)) in from.chunks(vocab).zip(other_from.chunks(vocab)).enumerate() {
            assert_ne!(bits(a), bits(b), "row {} of {tiny:?}", row + 13);
        }
    }
}

#[test]
fn stale_pages_do_not_shine_through() {
    let mut rig = open(&Tiny::new(Family::Mixtral));
    let tokens = prompt(8, 15);
    let fresh = rig.walk(&tokens, &[15], &table(0, 15));
    rig.walk(&prompt(9, 15), &[15], &table(0, 15));
    let again = rig.walk(&tokens, &[4], &table(0, 15));
    assert_eq!(bits(&again.logits), bits(&fresh.logits));
}

/// Loses given rows at one layer, and fills them with something that is not a number.
struct Losing {
    inner: LocalExperts,
    layer: u32,
    lose: Vec<u32>,
    dead_seen: Vec<Vec<bool>>,
}

impl Experts for Losing {
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        self.dead_seen.push(batch.dead.to_vec());
        self.inner.run(batch, out)?;
        if batch.layer.0 != self.layer {
            return Ok(LateRows::new());
        }
        for row in &self.lose {
            let at = *row as usize * batch.hidden;
            out[at..at + batch.hidden].fill(f32::NAN);
        }
        Ok(self.lose.clone())
    }
}

#[test]
fn lost_rows_are_named_and_other_sequences_keep_their_bits() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::new(Family::Qwen2Moe).write(dir.path()).unwrap();
    let mut rig = Rig::open(dir.path());
    let (one, two) = (prompt(1, 6), prompt(2, 5));
    let (table_one, table_two) = (table(0, 6), table(4, 5));
    let whole = rig.step(&[(&one, 0, &table_one), (&two, 0, &table_two)]);
    let Rig {
        mut model,
        experts,
        mut kv,
    } = rig;
    let mut losing = Losing {
        inner: experts,
        layer: 1,
        lose: vec![2],
        dead_seen: Vec::new(),
    };
    let parts: [(&[u32], usize, &[u32]); 2] = [(&one, 0, &table_one), (&two, 0, &table_two)];
    let out = support::step_with(&mut model, &mut kv, &mut losing, &parts);
    let expected: Vec<bool> = (0..11).map(|row| row == 2).collect();
    assert_eq!(out.dead, expected);
    assert_eq!(
        losing.dead_seen,
        [vec![false; 11], vec![false; 11], expected]
    );
    let vocab = model.spec().vocab;
    assert_eq!(
        bits(&out.logits[..2 * vocab]),
        bits(&whole.logits[..2 * vocab])
    );
    assert_eq!(
        bits(&out.logits[6 * vocab..]),
        bits(&whole.logits[6 * vocab..])
    );
    // The lost sequence's positions are written again by the repeated step.
    losing.lose.clear();
    let again = support::step_with(&mut model, &mut kv, &mut losing, &parts);
    assert_eq!(bits(&again.logits), bits(&whole.logits));
    assert_eq!(again.dead, [false; 11]);
}

#[test]
fn only_wanted_logits_are_computed_in_the_order_wanted() {
    let mut rig = open(&Tiny::new(Family::Olmoe));
    let tokens = prompt(4, 7);
    let pages = table(0, 7);
    let all = rig.walk(&tokens, &[7], &pages);
    let vocab = rig.model.spec().vocab;
    let positions: Vec<u32> = (0..7).collect();
    let mut out = StepOutput::default();
    for wanted in [&[6][..], &[], &[3, 0, 3]] {
        let batch = StepBatch {
            tokens: &tokens,
            positions: &positions,
            sequence_of_row: &[0; 7],
            page_tables: &[&pages],
            logit_rows: wanted,
        };
        rig.model
            .forward(&batch, &mut rig.kv, &mut rig.experts, &mut out)
            .unwrap();
        assert_eq!(out.logits.len(), wanted.len() * vocab);
        for (index, row) in wanted.iter().enumerate() {
            let row = *row as usize;
            let expected = &all.logits[row * vocab..(row + 1) * vocab];
            assert_eq!(bits(out.logits_of(index, vocab).unwrap()), bits(expected));
        }
        assert_eq!(out.routes_of(6).unwrap(), &all.routes[6 * 6..]);
    }
}

#[test]
fn batches_that_contradict_themselves_are_refused() {
    let mut rig = open(&Tiny::new(Family::Qwen3Moe));
    let good = StepBatch {
        tokens: &[1, 2],
        positions: &[0, 1],
        sequence_of_row: &[0, 0],
        page_tables: &[&[0]],
        logit_rows: &[1],
    };
    let bad = [
        (
            StepBatch {
                tokens: &[1, 64],
                ..good
            },
            "token 64",
        ),
        (
            StepBatch {
                tokens: &[1],
                ..good
            },
            "1 tokens, 2 positions",
        ),
        (
            StepBatch {
                positions: &[0, 256],
                ..good
            },
            "position 256",
        ),
        (
            StepBatch {
                sequence_of_row: &[0],
                ..good
            },
            "1 sequence",
        ),
        (
            StepBatch {
                logit_rows: &[2],
                ..good
            },
            "row 2",
        ),
        (
            StepBatch {
                sequence_of_row: &[0, 1],
                ..good
            },
            "",
        ),
        (
            StepBatch {
                page_tables: &[&[9999]],
                ..good
            },
            "",
        ),
        (
            StepBatch {
                page_tables: &[&[]],
                ..good
            },
            "",
        ),
    ];
    let mut out = StepOutput::default();
    for (batch, wanted) in bad {
        let result = rig
            .model
            .forward(&batch, &mut rig.kv, &mut rig.experts, &mut out);
        let error = result.unwrap_err();
        assert!(
            error.to_string().contains(wanted),
            "{error} (wanted {wanted})"
        );
    }
    let empty = StepBatch {
        tokens: &[],
        positions: &[],
        sequence_of_row: &[],
        page_tables: &[],
        logit_rows: &[],
    };
    rig.model
        .forward(&empty, &mut rig.kv, &mut rig.experts, &mut out)
        .unwrap();
    assert!(out.logits.is_empty() && out.routes.is_empty() && out.dead.is_empty());
    let ok = rig
        .model
        .forward(&good, &mut rig.kv, &mut rig.experts, &mut out);
    assert!(ok.is_ok(), "{ok:?}");
}

#[test]
fn a_whole_layer_that_fails_ends_the_step() {
    struct Broken;
    impl Experts for Broken {
        fn run(
            &mut self,
            batch: &ExpertBatch<'_>,
            _: &mut [f32],
        ) -> Result<LateRows, ExpertsError> {
            Err(ExpertsError {
                layer: batch.layer,
                what: "shut down".to_owned(),
            })
        }
    }
    let mut rig = open(&Tiny::new(Family::Mixtral));
    let batch = StepBatch {
        tokens: &[1],
        positions: &[0],
        sequence_of_row: &[0],
        page_tables: &[&[0]],
        logit_rows: &[],
    };
    let mut out = StepOutput::default();
    let error = rig
        .model
        .forward(&batch, &mut rig.kv, &mut Broken, &mut out)
        .unwrap_err();
    assert!(matches!(error, ModelError::Experts(_)), "{error}");
}

#[test]
fn loading_reports_every_dense_byte_once() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::new(Family::Qwen2Moe).write(dir.path()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut seen = Vec::new();
    let cpu = Arc::new(Cpu::new(1));
    Model::load(&checkpoint, cpu, |done, total| seen.push((done, total))).unwrap();
    let total = seen[0].1;
    assert_eq!(seen[0].0, 0);
    assert_eq!(seen.last(), Some(&(total, total)));
    assert!(seen.is_sorted_by(|a, b| a.0 < b.0 && a.1 == b.1));
    let spec = checkpoint.spec();
    let experts = spec.moe_layers() * spec.experts * spec.expert_bytes();
    let file = std::fs::metadata(dir.path().join("model.safetensors"))
        .unwrap()
        .len();
    assert!(total + (experts as u64) < file);
    assert!(total + (experts as u64) > file - 40_000, "header only");
}

#[test]
fn a_clone_shares_weights_but_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::new(Family::Qwen3Moe).write(dir.path()).unwrap();
    let mut rig = Rig::open(dir.path());
    let tokens = prompt(6, 9);
    let first = rig.walk(&tokens, &[9], &table(0, 9));
    let kv = KvCache::new(rig.model.kv_shape(8, support::PAGE_TOKENS)).unwrap();
    let mut clone = Rig {
        model: rig.model.clone(),
        experts: rig.experts,
        kv,
    };
    let second = clone.walk(&tokens, &[2], &table(0, 9));
    assert_eq!(bits(&first.logits), bits(&second.logits));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any chunking of any prompt beside any companion.
    #[test]
    fn any_chunking_beside_any_companion(
        seed in any::<u32>(),
        length in 1_usize..40,
        chunks in prop::collection::vec(1_usize..20, 1..6),
        companion in 1_usize..12,
    ) {
        let mut rig = shared_rig();
        let tokens = prompt(seed, length);
        let alone = rig.walk(&tokens, &[length], &table(0, length));
        let (pages, other_pages) = (table(20, length), table(40, 64));
        let mut logits = Vec::new();
        let (mut start, mut at, mut sizes) = (0, 0, chunks.iter().cycle());
        let others = prompt(seed ^ 1, 64);
        while start < length {
            let end = (start + sizes.next().unwrap()).min(length);
            let next = (at + companion).min(others.len());
            let out = rig.step(&[
                (&others[at..next], at, &other_pages),
                (&tokens[start..end], start, &pages),
            ]);
            logits.extend_from_slice(&out.logits[(next - at) * 64..]);
            (start, at) = (end, next);
        }
        prop_assert_eq!(bits(&logits), bits(&alone.logits));
    }
}

/// The fixture with the most parts: bias, shared expert, no renormalisation.
fn shared_rig() -> Rig {
    thread_local! {
        static DIR: tempfile::TempDir = {
            let dir = tempfile::tempdir().unwrap();
            Tiny::new(Family::Qwen2Moe).write(dir.path()).unwrap();
            dir
        };
    }
    DIR.with(|dir| Rig::open(dir.path() as &Path))
}
