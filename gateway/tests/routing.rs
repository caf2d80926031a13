//! Routing by expert signature, seen from outside: headers and which worker was asked.

mod support;

use foregate_api::load::EngineLoad;
use foregate_api::manifest::RoutingPolicy;
use serde_json::{Value, json};
use support::{Cluster, config, header, window};

fn routed_by(policy: RoutingPolicy) -> foregate_api::node::GatewayConfig {
    let mut config = config();
    config.routing = policy;
    config
}

/// A prompt of 64 tokens that all go to one expert of the fake's model, and a tail that tells prompts apart.
fn prompt(expert: u32, tail: u32) -> Value {
    let mut ids = vec![expert * 100 + 1; 64];
    ids.push(expert * 100 + tail);
    json!({"prompt": ids, "max_tokens": 200, "ignore_eos": true, "stream": true})
}

#[tokio::test]
async fn prompts_join_their_like() {
    let cluster = Cluster::start(2, "x", routed_by(RoutingPolicy::Signature)).await;
    cluster.hold_after(1);
    // Unknown prompts go by load: one kind to each worker.
    let mut running = Vec::new();
    for expert in [1, 2] {
        let response = cluster.post("/v1/completions", &prompt(expert, 0)).await;
        assert_eq!(
            header(&response, "x-foregate-route"),
            "signature; fit=none; known=0"
        );
        assert_eq!(
            header(&response, "x-foregate-worker"),
            (expert - 1).to_string()
        );
        running.push(response);
    }
    cluster.shows("foregate_gateway_known_prefixes 4").await;
    // Then each kind goes where its kind runs, whichever worker is less loaded.
    for (expert, tail) in [(2, 5), (1, 6), (2, 7)] {
        let response = cluster.post("/v1/completions", &prompt(expert, tail)).await;
        assert_eq!(
            header(&response, "x-foregate-worker"),
            (expert - 1).to_string()
        );
        assert_eq!(
            header(&response, "x-foregate-route"),
            "signature; fit=1.00; known=64"
        );
        running.push(response);
    }
    let metrics = cluster.get("/metrics").await.1;
    assert!(
        metrics.contains(
            "foregate_gateway_route_decisions_total{outcome=\"fit\",policy=\"signature\"} 3"
        ),
        "{metrics}"
    );
}

#[tokio::test]
async fn the_band_limits_what_a_fit_may_cost() {
    let cluster = Cluster::start(2, "x", routed_by(RoutingPolicy::Signature)).await;
    cluster.hold_after(1);
    let mut running = Vec::new();
    let mut workers = Vec::new();
    for tail in 0..6 {
        let response = cluster.post("/v1/completions", &prompt(1, tail)).await;
        workers.push(header(&response, "x-foregate-worker"));
        running.push(response);
        cluster.shows("foregate_gateway_known_prefixes 2").await;
    }
    // The band is two: the fourth request would make it three more than on the idle worker.
    assert_eq!(workers[..3], ["0", "0", "0"]);
    assert_eq!(workers[3], "1");
    let on_idle = workers.iter().filter(|rank| *rank == "1").count();
    assert!((1..=3).contains(&on_idle), "{workers:?}");
}

#[tokio::test]
async fn round_robin_takes_turns() {
    let cluster = Cluster::start(3, "x", routed_by(RoutingPolicy::RoundRobin)).await;
    let mut workers = Vec::new();
    for _ in 0..6 {
        let response = cluster
            .post("/v1/completions", &json!({"prompt": "hi"}))
            .await;
        assert_eq!(header(&response, "x-foregate-route"), "round_robin");
        workers.push(header(&response, "x-foregate-worker"));
    }
    assert_eq!(workers, ["0", "1", "2", "0", "1", "2"]);
}

#[tokio::test]
async fn load_that_others_brought_counts() {
    let cluster = Cluster::start(2, "x", routed_by(RoutingPolicy::LeastLoaded)).await;
    let busy = EngineLoad {
        running: 3,
        waiting: 2,
        kv_pages: 1,
        ..EngineLoad::default()
    };
    cluster
        .coord
        .publish_load(&window(0, 1, busy), cluster.lease.as_ref())
        .await
        .unwrap();
    cluster
        .shows("vllm:num_requests_running{engine=\"0\",model_name=\"demo\"} 3")
        .await;
    let response = cluster
        .post("/v1/completions", &json!({"prompt": "hi"}))
        .await;
    assert_eq!(header(&response, "x-foregate-worker"), "1");
    let idle = EngineLoad::default();
    cluster
        .coord
        .publish_load(&window(0, 2, idle), cluster.lease.as_ref())
        .await
        .unwrap();
    cluster
        .eventually("the idle worker's turn", async || {
            let response = cluster
                .post("/v1/completions", &json!({"prompt": "hi"}))
                .await;
            header(&response, "x-foregate-worker") == "0"
        })
        .await;
}
