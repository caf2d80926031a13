use std::collections::BTreeSet;
use std::time::Duration;

use foregate_api::model::{Family, ModelSpec};
use foregate_checkpoint::Checkpoint;
use foregate_checkpoint::tiny::Tiny;
use foregate_kernels::{Cpu, KvCache, PANEL};
use foregate_models::{Model, StepBatch, StepOutput};
use foregate_worker::engine::{Alone, StepExperts};

use super::super::rig::Rig;
use super::super::steps::{Kept, Parts};
use super::*;

const PAGE_TOKENS: usize = 4;
/// Tokens of two sequences that a step continues.
const CONTEXT: [u32; 2] = [5, 9];

/// A model with an audit.
struct Probe {
    model: Model,
    experts: Kept<Alone<foregate_models::LocalExperts>>,
    kv: KvCache,
    ledger: Ledger,
}

impl Probe {
    fn new(family: Family) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Tiny::new(family).write(dir.path()).unwrap();
        let rig = Rig::load(&Checkpoint::open(dir.path()).unwrap(), Cpu::new(2)).unwrap();
        let ledger = Ledger::default();
        let ops: Arc<dyn Ops> = Arc::new(Audited::new(rig.cpu.clone(), &ledger));
        let model = rig.model.with_ops(Arc::clone(&ops));
        Self {
            kv: KvCache::new(model.kv_shape(8, PAGE_TOKENS)).unwrap(),
            model,
            experts: Kept::new(Alone(rig.experts.with_ops(ops)), &ledger),
            ledger,
        }
    }

    /// One step with `rows` of (sequence, position); logits of the last row of each sequence.
    fn step(&mut self, rows: &[(u32, u32)]) -> StepOutput {
        self.experts.begin_step(None);
        let last = |sequence| rows.iter().rposition(|row| row.0 == sequence).unwrap() as u32;
        let mut out = StepOutput::default();
        let batch = StepBatch {
            tokens: &rows
                .iter()
                .map(|row| 7 + 11 * row.0 + row.1)
                .collect::<Vec<_>>(),
            positions: &rows.iter().map(|row| row.1).collect::<Vec<_>>(),
            sequence_of_row: &rows.iter().map(|row| row.0).collect::<Vec<_>>(),
            page_tables: &[&[0, 1, 2], &[3, 4, 5]],
            logit_rows: &[last(0), last(1)],
        };
        let (model, kv) = (&mut self.model, &mut self.kv);
        model
            .forward(&batch, kv, &mut self.experts, &mut out)
            .unwrap();
        self.experts.end_step();
        out
    }

    fn prompts(&mut self) {
        let rows = |sequence| (0..CONTEXT[sequence]).map(move |at| (sequence as u32, at));
        self.step(&rows(0).chain(rows(1)).collect::<Vec<_>>());
    }
}

/// Bytes of a packed float32 matrix.
fn matrix(n: usize, k: usize) -> usize {
    n.next_multiple_of(PANEL) * k * 4
}

fn feed_forward(spec: &ModelSpec, inner: usize) -> usize {
    2 * matrix(inner, spec.hidden) + matrix(spec.hidden, inner)
}

/// What a step of one row per sequence reads, from the model's shape and the routes it took.
fn expected(spec: &ModelSpec, routes: &[u32]) -> usize {
    let (hidden, queries) = (spec.hidden, spec.heads * spec.head_dim);
    let keys = spec.kv_heads * spec.head_dim;
    let mut block =
        matrix(queries, hidden) + 2 * matrix(keys, hidden) + matrix(hidden, queries);
    block += 2 * hidden * 4 + matrix(spec.experts, hidden);
    if spec.qkv_bias {
        block += (queries + 2 * keys) * 4;
    }
    if spec.family == Family::Qwen3Moe {
        block += 2 * spec.head_dim * 4;
    }
    if let Some(inner) = spec.shared_inner {
        block += feed_forward(spec, inner) + matrix(1, hidden);
    }
    let tokens: u32 = CONTEXT.iter().map(|before| before + 1).sum();
    block += tokens as usize * 2 * keys * 4;
    let per_row = spec.layers * spec.top_k;
    let chosen: BTreeSet<(usize, u32)> = routes
        .iter()
        .enumerate()
        .map(|(at, expert)| (at % per_row / spec.top_k, *expert))
        .collect();
    let ends = 2 * hidden * 4 + hidden * 4 + matrix(spec.vocab, hidden);
    ends + spec.layers * block + chosen.len() * feed_forward(spec, spec.expert_inner)
}

#[test]
fn a_step_reads_its_experts_the_dense_weights_and_its_context() {
    for family in [Family::Qwen3Moe, Family::Qwen2Moe, Family::Mixtral] {
        let mut probe = Probe::new(family);
        probe.prompts();
        let out = probe.step(&[(0, CONTEXT[0]), (1, CONTEXT[1])]);
        let steps = probe.ledger.decode(2, 1);
        let want = expected(probe.model.spec(), &out.routes);
        assert_eq!(steps[0].bytes, want as u64, "{family:?}");
        assert_eq!(steps[0].rows, 2);
    }
}

#[test]
fn all_parts_of_a_step_have_a_time_and_results_stay_the_same() {
    let mut probe = Probe::new(Family::Qwen2Moe);
    probe.prompts();
    let out = probe.step(&[(0, CONTEXT[0]), (1, CONTEXT[1])]);
    let parts = probe.ledger.decode(2, 1)[0].parts;
    for part in [parts.gate, parts.exchange, parts.experts, parts.attention] {
        assert!(part > Duration::ZERO, "{parts:?}");
    }
    let mut plain = Probe::new(Family::Qwen2Moe);
    plain.model = plain.model.with_ops(Arc::new(Cpu::new(1)));
    plain.prompts();
    assert_eq!(out, plain.step(&[(0, CONTEXT[0]), (1, CONTEXT[1])]));
}

#[test]
fn time_goes_to_what_it_was_spent_for() {
    let ms = Duration::from_millis;
    let mut step = Step::default();
    let mut undecided = ms(50);
    let mut spend = |purpose, time| {
        if let Purpose::Next = purpose {
            undecided += ms(time);
        }
        spend(&mut step, purpose, ms(time), &mut undecided);
    };
    // One block, after the output projection of the step before: norm, projections, attention, projection.
    spend(Purpose::Rest, 1);
    spend(Purpose::Next, 2);
    spend(Purpose::Attention, 3);
    spend(Purpose::Next, 4);
    spend(Purpose::Residual, 5);
    // Norm, router, choice, experts, the shared expert's gate.
    spend(Purpose::Next, 10);
    spend(Purpose::Gate, 20);
    spend(Purpose::Experts, 30);
    spend(Purpose::Next, 40);
    spend(Purpose::Experts, 50);
    spend(Purpose::Residual, 60);
    let want = Parts {
        gate: ms(30),
        exchange: ms(0),
        experts: ms(120),
        attention: ms(9),
    };
    assert_eq!(step.parts, want);
}
