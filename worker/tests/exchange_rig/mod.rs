//! Experts with drawn weights and callees over them, for the tests of fabric and exchange.
#![allow(dead_code, reason = "each test target uses its part")]
#![allow(unreachable_pub, reason = "shared by test targets")]
#![allow(
    clippy::disallowed_methods,
    reason = "tests of threads run on the wall clock, every wait is bounded"
)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::model::{Family, ModelSpec};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_checkpoint::tiny::Tiny;
use foregate_kernels::{Cpu, Ops};
use foregate_models::{ExpertRows, ExpertWeights, run_expert_rows};
use foregate_wire::frame::{Call, Route};
use foregate_worker::exchange::serve::{Server, ServerLimits, ServerParts};
use foregate_worker::load::LoadCounters;
use foregate_worker::metrics::WorkerMetrics;
use foregate_worker::residency::{EpochGate, Residency};
use prometheus::Registry;

/// Longest any single wait of a test may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn spec() -> Arc<ModelSpec> {
    Arc::new(Tiny::new(Family::Qwen3Moe).spec().unwrap())
}

pub fn ops() -> Arc<dyn Ops> {
    Arc::new(Cpu::new(1))
}

pub fn metrics() -> Arc<WorkerMetrics> {
    Arc::new(WorkerMetrics::register(&Registry::new(), "tiny").unwrap())
}

/// Numbers in [-0.5, 0.5) that look random and repeat.
pub fn drawn(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
        })
        .collect()
}

/// The weights of one expert, a function of its ids.
pub fn expert(spec: &ModelSpec, layer: LayerId, expert: ExpertId) -> Arc<ExpertWeights> {
    let seed = u64::from(layer.0) * 1000 + u64::from(expert.0) + 1;
    let bytes: Vec<u8> = drawn(seed, spec.expert_bytes() / 4)
        .into_iter()
        .flat_map(f32::to_le_bytes)
        .collect();
    Arc::new(ExpertWeights::from_canonical(spec, &bytes).unwrap())
}

/// Loads experts into a table.
pub fn fill(residency: &Residency, spec: &ModelSpec, items: &BTreeSet<(LayerId, ExpertId)>) {
    residency.insert(
        items
            .iter()
            .map(|item| (*item, expert(spec, item.0, item.1))),
    );
}

/// A callee over all experts of the model that serves epoch 1.
pub fn callee(limits: ServerLimits) -> Arc<Server> {
    let spec = spec();
    let residency = Arc::new(Residency::new(&spec));
    let all = (0..spec.moe_layers())
        .flat_map(|l| (0..spec.experts).map(move |e| (LayerId(l as u32), ExpertId(e as u32))))
        // One expert is missing, for the refusal.
        .filter(|item| item.1 != MISSING)
        .collect();
    fill(&residency, &spec, &all);
    let gate = Arc::new(EpochGate::new());
    gate.set_accept(BTreeSet::from([Epoch(1)]));
    Server::start(ServerParts {
        load: Arc::new(LoadCounters::new(spec.moe_layers(), spec.experts)),
        spec,
        ops: ops(),
        residency,
        gate,
        metrics: metrics(),
        limits,
    })
    .unwrap()
}

/// The expert that [`callee`] does not have.
pub const MISSING: ExpertId = ExpertId(7);

/// A call of two rows and three routes.
pub fn call(number: u64) -> Call {
    let spec = spec();
    Call {
        epoch: Epoch(1),
        call: number,
        layer: LayerId(1),
        deadline_us: PATIENCE.as_micros() as u32,
        trace: None,
        hidden: spec.hidden as u32,
        rows: drawn(number, 2 * spec.hidden),
        routes: [(1, 4), (0, 2), (1, 2)]
            .map(|(row, expert)| Route {
                row,
                expert: ExpertId(expert),
            })
            .to_vec(),
    }
}

/// What a callee must answer.
pub fn answer(call: &Call) -> Vec<f32> {
    let spec = spec();
    let ops = ops();
    call.routes
        .iter()
        .flat_map(|route| {
            let mut out = vec![0.0; spec.hidden];
            let rows = [ExpertRows {
                expert: expert(&spec, call.layer, route.expert),
                rows: &[route.row],
            }];
            run_expert_rows(ops.as_ref(), &call.rows, spec.hidden, &rows, &mut out).unwrap();
            out
        })
        .collect()
}

/// A placement where `slots[r]` are the experts of rank `r` in every layer.
pub fn placement(epoch: u64, parent: u64, slots: &[&[u32]]) -> Placement {
    let spec = spec();
    let ranks: Vec<Rank> = (0_u32..).zip(slots).map(|(rank, _)| Rank(rank)).collect();
    let slots: Vec<Vec<ExpertId>> = slots
        .iter()
        .map(|held| held.iter().map(|e| ExpertId(*e)).collect())
        .collect();
    let layer = LayerPlacement::from_slots(&ranks, slots, spec.experts);
    Placement {
        epoch: Epoch(epoch),
        parent: Epoch(parent),
        reason: Reason::Move,
        ranks,
        layers: vec![layer; spec.moe_layers()],
        balance_before: 1.0,
        balance_after: 1.0,
    }
}

pub fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Waits until something holds.
pub fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = soon();
    while !holds() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}
