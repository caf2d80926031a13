//! The exchange when peers fail: rows go to another copy if there is one, else exactly they are late, and what
//! did come back keeps its bits.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test says what it expects by failing; its threads run on the wall clock, every wait bounded"
)]

mod exchange_rig;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_models::experts::{ExpertBatch, Experts, LateRows};
use foregate_models::{ExpertRows, combine, run_expert_rows};
use foregate_wire::frame::{Call, RefuseReason};
use foregate_worker::engine::StepExperts;
use foregate_worker::exchange::serve::ServerLimits;
use foregate_worker::exchange::{Endpoint, EndpointParts, Exchange, Way};
use foregate_worker::fabric::local::{LocalFabric, LocalHub};
use foregate_worker::fabric::{CallHandler, Fabric, Identity, Inbox, PeerAddress, Responder};
use foregate_worker::load::LoadCounters;
use foregate_worker::metrics::WorkerMetrics;
use foregate_worker::residency::Routing;

use exchange_rig::{PATIENCE, callee, drawn, expert, fill, metrics, ops, placement, spec};

/// A deadline that a test waits for. Half of it is left for what is asked of another copy.
const WAITED_FOR: Duration = Duration::from_secs(10);
/// Rank 0 is the caller; experts 0 and 1 live on rank 1 alone, 2 and 3 on ranks 1 and 2, 4 and 5 on rank 2
/// alone, 6 and 7 at home.
const SLOTS: [&[u32]; 3] = [&[6, 7], &[0, 1, 2, 3], &[2, 3, 4, 5]];

/// A peer that answers as it is told.
#[derive(Debug)]
enum Peer {
    Silent(Mutex<Vec<Responder>>),
    Refusing(RefuseReason),
    /// Answers with one value too few.
    Garbled,
}

impl CallHandler for Peer {
    fn call(&self, _from: Rank, call: Call, responder: Responder) {
        match self {
            Self::Silent(held) => held.lock().unwrap().push(responder),
            Self::Refusing(reason) => responder.refuse(Epoch(9), *reason),
            Self::Garbled => {
                responder.reply(vec![0.0; call.routes.len() * call.hidden as usize - 1], 0);
            }
        }
    }
}

struct Cluster {
    hub: Arc<LocalHub>,
    peers: BTreeMap<Rank, PeerAddress>,
    endpoints: BTreeMap<Rank, Endpoint>,
    odd: Vec<LocalFabric>,
    metrics: Arc<WorkerMetrics>,
    deadline: Duration,
}

impl Cluster {
    /// The caller alone.
    fn new() -> Self {
        Self::with_deadline(PATIENCE)
    }

    fn with_deadline(deadline: Duration) -> Self {
        let mut cluster = Self {
            hub: LocalHub::new(),
            peers: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            odd: Vec::new(),
            metrics: metrics(),
            deadline,
        };
        cluster.metrics = cluster.good(Rank(0));
        cluster
    }

    /// Adds a worker that holds what [`SLOTS`] says.
    fn good(&mut self, rank: Rank) -> Arc<WorkerMetrics> {
        let (spec, metrics) = (spec(), metrics());
        let endpoint = Endpoint::open(EndpointParts {
            me: identity(rank),
            spec: spec.clone(),
            ops: ops(),
            callee_ops: ops(),
            way: Way::Local(self.hub.clone()),
            load: Arc::new(LoadCounters::new(spec.moe_layers(), spec.experts)),
            metrics: metrics.clone(),
            deadline: self.deadline,
        })
        .unwrap();
        let plan = Arc::new(placement(1, 0, &SLOTS));
        fill(endpoint.residency(), &spec, &plan.held_by(rank));
        endpoint.gate().set_accept(BTreeSet::from([Epoch(1)]));
        endpoint
            .gate()
            .switch(Arc::new(Routing::new(plan).unwrap()));
        self.endpoints.insert(rank, endpoint);
        self.know(rank);
        metrics
    }

    fn odd(&mut self, rank: Rank, peer: Peer) {
        let inbox = Arc::new(Inbox::default());
        self.odd
            .push(self.hub.open(identity(rank), Arc::new(peer), inbox, 8));
        self.know(rank);
    }

    fn know(&mut self, rank: Rank) {
        self.peers.insert(
            rank,
            PeerAddress {
                exchange: format!("local:{rank}"),
                incarnation: 1,
            },
        );
    }

    fn exchange(&self) -> Exchange {
        let caller = &self.endpoints[&Rank(0)];
        caller.set_peers(&self.peers);
        let mut exchange = caller.exchange();
        assert_eq!(exchange.begin_step(None), Epoch(1));
        exchange
    }
}

fn identity(rank: Rank) -> Identity {
    Identity {
        cluster: "test".into(),
        rank,
        incarnation: 1,
    }
}

/// Runs one batch of rows with these experts; compares every row that is not late with the oracle.
fn run(exchange: &mut Exchange, chosen: &[[u32; 2]]) -> LateRows {
    let spec = spec();
    let input = drawn(5, chosen.len() * spec.hidden);
    let weights = drawn(6, chosen.len() * 2);
    let dead = vec![false; chosen.len()];
    let batch: ExpertBatch<'_> = ExpertBatch {
        layer: LayerId(2),
        input: &input,
        hidden: spec.hidden,
        experts: chosen.as_flattened(),
        weights: &weights,
        top_k: 2,
        dead: &dead,
    };
    let mut out = vec![f32::NAN; input.len()];
    let late = exchange.run(&batch, &mut out).unwrap();
    let expected = oracle(&batch);
    for row in (0..chosen.len()).filter(|row| !late.contains(&(*row as u32))) {
        let at = row * spec.hidden..(row + 1) * spec.hidden;
        assert!(out[at.clone()] == expected[at], "row {row} differs");
    }
    late
}

fn oracle(batch: &ExpertBatch<'_>) -> Vec<f32> {
    let (spec, ops) = (spec(), ops());
    let results: Vec<Vec<f32>> = (0_u32..)
        .zip(batch.experts)
        .map(|(pair, chosen)| {
            let mut out = vec![0.0; spec.hidden];
            let call = [ExpertRows {
                expert: expert(&spec, batch.layer, ExpertId(*chosen)),
                rows: &[pair / 2],
            }];
            run_expert_rows(ops.as_ref(), batch.input, spec.hidden, &call, &mut out).unwrap();
            out
        })
        .collect();
    let parts: Vec<&[f32]> = results.iter().map(Vec::as_slice).collect();
    let mut out = vec![0.0; batch.input.len()];
    combine(
        ops.as_ref(),
        &parts,
        batch.weights,
        2,
        spec.hidden,
        &mut out,
    )
    .unwrap();
    out
}

const EVERYTHING: [[u32; 2]; 6] = [[0, 6], [2, 3], [2, 7], [4, 6], [3, 5], [6, 7]];
/// Rows of [`EVERYTHING`] that need an expert of rank 1 alone.
const NEED_RANK_1: [u32; 1] = [0];

#[test]
fn all_peers_there_nothing_is_late() {
    let mut cluster = Cluster::new();
    cluster.good(Rank(1));
    let served = cluster.good(Rank(2));
    let mut exchange = cluster.exchange();
    for _ in 0..10 {
        assert_eq!(run(&mut exchange, &EVERYTHING), [0_u32; 0]);
    }
    assert_eq!(served.late_rows_total(), 0);
}

#[test]
fn only_what_lives_nowhere_else_is_late_without_a_peer() {
    let mut cluster = Cluster::new();
    cluster.good(Rank(2));
    assert_eq!(run(&mut cluster.exchange(), &EVERYTHING), NEED_RANK_1);
    assert_eq!(cluster.metrics.late_rows_total(), 1);
}

#[test]
fn refused_rows_go_to_the_other_copy() {
    for reason in RefuseReason::ALL {
        let mut cluster = Cluster::new();
        cluster.good(Rank(2));
        cluster.odd(Rank(1), Peer::Refusing(reason));
        assert_eq!(run(&mut cluster.exchange(), &EVERYTHING), NEED_RANK_1);
    }
}

#[test]
fn an_answer_of_the_wrong_size_is_no_answer() {
    let mut cluster = Cluster::new();
    cluster.good(Rank(2));
    cluster.odd(Rank(1), Peer::Garbled);
    assert_eq!(run(&mut cluster.exchange(), &EVERYTHING), NEED_RANK_1);
}

#[test]
fn a_silent_peer_costs_the_deadline_and_no_other_rows() {
    let mut cluster = Cluster::with_deadline(WAITED_FOR);
    cluster.good(Rank(2));
    cluster.odd(Rank(1), Peer::Silent(Mutex::default()));
    let mut exchange = cluster.exchange();
    assert_eq!(run(&mut exchange, &EVERYTHING), NEED_RANK_1);
    // The next layer is not disturbed by what may still come.
    assert_eq!(run(&mut exchange, &[[4, 6], [6, 7]]), [0_u32; 0]);
}

#[test]
fn before_a_placement_every_row_is_late() {
    let spec = spec();
    let endpoint = Endpoint::open(EndpointParts {
        me: identity(Rank(0)),
        spec: spec.clone(),
        ops: ops(),
        callee_ops: ops(),
        way: Way::Local(LocalHub::new()),
        load: Arc::new(LoadCounters::new(spec.moe_layers(), spec.experts)),
        metrics: metrics(),
        deadline: PATIENCE,
    })
    .unwrap();
    let mut exchange = endpoint.exchange();
    assert_eq!(exchange.begin_step(None), Epoch(0));
    assert_eq!(run(&mut exchange, &[[0, 1], [2, 3]]), [0, 1]);
}

#[test]
fn a_step_keeps_its_placement_until_it_ends() {
    let mut cluster = Cluster::new();
    cluster.good(Rank(1));
    cluster.good(Rank(2));
    let mut exchange = cluster.exchange();
    let gate = cluster.endpoints[&Rank(0)].gate();
    let next = Arc::new(placement(2, 1, &SLOTS));
    gate.switch(Arc::new(Routing::new(next).unwrap()));
    assert_eq!(gate.view().in_use, BTreeSet::from([Epoch(1)]));
    // Peers accept epoch 1 only, so this step still uses it.
    assert_eq!(run(&mut exchange, &EVERYTHING), [0_u32; 0]);
    exchange.end_step();
    assert!(gate.view().in_use.is_empty());
    assert_eq!(exchange.begin_step(None), Epoch(2));
    // Epoch 2 is served nowhere yet: what is not at home is late.
    assert_eq!(run(&mut exchange, &EVERYTHING), [0, 1, 2, 3, 4]);
    for fabric in &cluster.odd {
        fabric.close();
    }
}

/// Who runs a worker learns that its callee is gone, so that the worker can be replaced.
#[tokio::test]
async fn the_end_of_the_experts_thread_is_told() {
    let server = callee(ServerLimits::default());
    let brief = Duration::from_millis(50);
    assert!(tokio::time::timeout(brief, server.ended()).await.is_err());
    assert!(server.is_alive());
    server.close();
    assert!(tokio::time::timeout(PATIENCE, server.ended()).await.is_ok());
    assert!(!server.is_alive());
}
