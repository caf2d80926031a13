//! One layer's exchange between two workers of one machine, by fabric and rows: what a decode step pays per
//! layer beyond the arithmetic.

#[path = "../../operator/tls/tests/desk/mod.rs"]
mod desk;

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::model::{Family, ModelSpec};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_api::tls::TlsRole;
use foregate_checkpoint::tiny::Tiny;
use foregate_kernels::Cpu;
use foregate_models::ExpertWeights;
use foregate_models::experts::{ExpertBatch, Experts};
use foregate_tls::Keys;
use foregate_worker::engine::StepExperts;
use foregate_worker::exchange::{Endpoint, EndpointParts, Exchange, Way};
use foregate_worker::fabric::local::LocalHub;
use foregate_worker::fabric::tcp::TcpSettings;
use foregate_worker::fabric::{Identity, PeerAddress};
use foregate_worker::load::LoadCounters;
use foregate_worker::metrics::WorkerMetrics;
use foregate_worker::residency::Routing;
use prometheus::Registry;

use desk::Desk;

type Failure = Box<dyn std::error::Error>;

/// The demonstration model's widths.
fn spec() -> Result<Arc<ModelSpec>, Failure> {
    let mut tiny = Tiny::new(Family::Qwen3Moe);
    (tiny.hidden, tiny.expert_inner, tiny.experts, tiny.top_k) = (192, 96, 32, 4);
    Ok(Arc::new(tiny.spec()?))
}

/// Even experts on rank 0, odd ones on rank 1.
fn placement(spec: &ModelSpec) -> Placement {
    let ranks = vec![Rank(0), Rank(1)];
    let experts = 0..u32::try_from(spec.experts).unwrap_or(0);
    let slots = [0, 1].map(|rank| {
        let held = experts.clone().filter(|expert| expert % 2 == rank);
        held.map(ExpertId).collect()
    });
    let layer = LayerPlacement::from_slots(&ranks, slots.to_vec(), spec.experts);
    Placement {
        epoch: Epoch(1),
        parent: Epoch(0),
        reason: Reason::Initial,
        ranks,
        layers: vec![layer; spec.moe_layers()],
        balance_before: 1.0,
        balance_after: 1.0,
    }
}

fn endpoint(spec: &Arc<ModelSpec>, rank: Rank, way: Way) -> Result<Endpoint, Failure> {
    let cpu = Arc::new(Cpu::new(1));
    let endpoint = Endpoint::open(EndpointParts {
        me: Identity {
            cluster: "bench".into(),
            rank,
            incarnation: 1,
        },
        spec: Arc::clone(spec),
        ops: Arc::<Cpu>::clone(&cpu),
        callee_ops: cpu,
        way,
        load: Arc::new(LoadCounters::new(spec.moe_layers(), spec.experts)),
        metrics: Arc::new(WorkerMetrics::register(&Registry::new(), "bench")?),
        deadline: Duration::from_secs(5),
    })?;
    let plan = Arc::new(placement(spec));
    let bytes = vec![0_u8; spec.expert_bytes()];
    for item in plan.held_by(rank) {
        let weights = Arc::new(ExpertWeights::from_canonical(spec, &bytes)?);
        endpoint.residency().insert([(item, weights)]);
    }
    endpoint.gate().set_accept(BTreeSet::from([Epoch(1)]));
    endpoint.gate().switch(Arc::new(Routing::new(plan)?));
    Ok(endpoint)
}

struct Pair {
    exchange: Exchange,
    _endpoints: [Endpoint; 2],
}

fn pair(spec: &Arc<ModelSpec>, ways: [Way; 2]) -> Result<Pair, Failure> {
    let [home, peer] = ways;
    let home = endpoint(spec, Rank(0), home)?;
    let peer = endpoint(spec, Rank(1), peer)?;
    let address = PeerAddress {
        exchange: peer.fabric().address(),
        incarnation: 1,
    };
    home.set_peers(&BTreeMap::from([(Rank(1), address)]));
    while !home.fabric().is_up(Rank(1)) {
        std::thread::yield_now();
    }
    let mut exchange = home.exchange();
    exchange.begin_step(None);
    Ok(Pair {
        exchange,
        _endpoints: [home, peer],
    })
}

fn tcp(keys: Option<&Keys>) -> Result<Way, Failure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok(Way::Tcp(listener, TcpSettings::default(), keys.cloned()))
}

fn layer(c: &mut Criterion) {
    if let Err(error) = run(c) {
        tracing::error!(%error, "bench_failed");
    }
}

fn run(c: &mut Criterion) -> Result<(), Failure> {
    let spec = spec()?;
    let hub = LocalHub::new();
    let local = [Way::Local(Arc::clone(&hub)), Way::Local(hub)];
    let desk = Desk::new();
    let keys = desk.keys(TlsRole::Worker);
    let mut fabrics = [
        ("local", pair(&spec, local)?),
        ("tcp", pair(&spec, [tcp(None)?, tcp(None)?])?),
        ("tls", pair(&spec, [tcp(Some(&keys))?, tcp(Some(&keys))?])?),
    ];
    let mut group = c.benchmark_group("exchange_layer");
    for (name, pair) in &mut fabrics {
        for rows in [1_usize, 8, 64] {
            let input = vec![0.5_f32; rows * spec.hidden];
            let experts: Vec<u32> = (0..rows).flat_map(|_| [2_u32, 5, 16, 31]).collect();
            let weights = vec![0.25_f32; experts.len()];
            let dead = vec![false; rows];
            let mut out = vec![0.0; input.len()];
            let batch: ExpertBatch<'_> = ExpertBatch {
                layer: LayerId(0),
                input: &input,
                hidden: spec.hidden,
                experts: &experts,
                weights: &weights,
                top_k: spec.top_k,
                dead: &dead,
            };
            group.bench_function(BenchmarkId::new(*name, rows), |b| {
                b.iter(|| black_box(pair.exchange.run(&batch, &mut out)));
            });
        }
    }
    group.finish();
    Ok(())
}

criterion_group!(benches, layer);
criterion_main!(benches);
