//! Routing by expert signature, seen from outside: headers and which worker was asked.

mod support;

use std::sync::atomic::Ordering;

use foregate_api::load::EngineLoad;
use foregate_api::manifest::RoutingPolicy;
use foregate_wire::prefix;
use serde_json::{Value, json};
use support::{Cluster, config, header, window, with};

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

/// Answers prompts of two kinds until the window knows their experts.
async fn taught(cluster: &Cluster) {
    for worker in &cluster.workers {
        worker.behaviour.tells_whole.store(true, Ordering::SeqCst);
    }
    for at in 0..40 {
        let ids = vec![(1 + at % 2) * 100 + 1; 64];
        let body = json!({"prompt": ids, "max_tokens": 2, "ignore_eos": true});
        cluster.json("/v1/completions", &body).await;
    }
    cluster
        .eventually("a fit of kinds", async || {
            let metrics = cluster.get("/metrics").await.1;
            let line = "foregate_gateway_window_separation_ratio ";
            let value = metrics.lines().find_map(|text| text.strip_prefix(line));
            value.is_some_and(|value| value.parse::<f64>().is_ok_and(|value| value > 0.5))
        })
        .await;
}

#[tokio::test]
async fn the_window_gives_each_kind_its_worker() {
    let cluster = Cluster::start(2, "x", routed_by(RoutingPolicy::Window)).await;
    taught(&cluster).await;
    cluster.hold_after(1);
    let mut running = Vec::new();
    let mut workers =
        std::collections::BTreeMap::<u32, std::collections::BTreeSet<String>>::new();
    let mut fits = 0;
    for at in 0..14 {
        let expert = 1 + at % 2;
        let response = cluster.post("/v1/completions", &prompt(expert, at)).await;
        let route = header(&response, "x-foregate-route");
        assert!(route.starts_with("window; outcome="), "{route}");
        assert!(route.ends_with("; known=64"), "{route}");
        // Until batches are large enough to gain, the order stays; a control request goes anywhere.
        if route.contains("outcome=fit") {
            fits += 1;
            let worker = header(&response, "x-foregate-worker");
            workers.entry(expert).or_default().insert(worker);
        }
        running.push(response);
    }
    assert!(fits >= 4, "{fits} of 14");
    assert!(workers.values().all(|own| own.len() == 1), "{workers:?}");
    assert_eq!(workers.len(), 2);
    assert_ne!(workers[&1], workers[&2]);
    cluster
        .shows("foregate_gateway_window_regime{regime=\"group\"} 1")
        .await;
    cluster.shows("foregate_gateway_window_grouping 1").await;
    for when in ["predicted", "measured"] {
        let count = format!("foregate_gateway_window_added_experts_count{{when=\"{when}\"}}");
        cluster.shows(&count).await;
    }
}

#[tokio::test]
async fn a_prefix_that_a_worker_has_outweighs_a_little_load() {
    let cluster = Cluster::start(2, "x", routed_by(RoutingPolicy::Window)).await;
    let long: Vec<u32> = (0..640).map(|at| 100 + at % 90).collect();
    let body = json!({"prompt": long, "max_tokens": 1, "ignore_eos": true});
    let first = cluster.post("/v1/completions", &body).await;
    assert_eq!(header(&first, "x-foregate-worker"), "0");
    assert!(first.text().await.unwrap().contains("choices"));
    let body = with(body, &json!({"max_tokens": 200, "stream": true}));
    cluster.hold_after(1);
    let other = cluster.post("/v1/completions", &prompt(3, 0)).await;
    assert_eq!(header(&other, "x-foregate-worker"), "0");
    // Worker 0 is busier now, and still has the prefix.
    let again = cluster.post("/v1/completions", &body).await;
    assert_eq!(header(&again, "x-foregate-worker"), "0");
    let strange = cluster.post("/v1/completions", &prompt(4, 0)).await;
    assert_eq!(header(&strange, "x-foregate-worker"), "1");
}

/// Names of a prompt's pages, of the fake's sixteen tokens.
fn names(prompt: &[u32]) -> Vec<u64> {
    let mut parent = prefix::ROOT;
    let pages = prompt.chunks_exact(16);
    pages
        .map(|tokens| {
            parent = prefix::name(&parent, tokens);
            prefix::short(&parent)
        })
        .collect()
}

/// The worker that a prompt of one token's answer goes to, and why.
async fn routed(cluster: &Cluster, prompt: &[u32]) -> (String, String) {
    let body = json!({"prompt": prompt, "max_tokens": 1, "ignore_eos": true});
    let response = cluster.post("/v1/completions", &body).await;
    let (worker, route) = (
        header(&response, "x-foregate-worker"),
        header(&response, "x-foregate-route"),
    );
    let body = response.text().await.unwrap_or_default();
    assert!(body.contains("choices"), "{body}");
    (worker, route)
}

#[tokio::test]
async fn the_worker_that_says_it_has_the_longest_prefix_is_asked() {
    let prompt: Vec<u32> = (0..100).collect();
    let pages = names(&prompt);
    let config = routed_by(RoutingPolicy::PrefixAware);
    let cluster = Cluster::bare(3, "x", config).await;
    cluster.workers[0].behaviour.hold(&[], &[]);
    cluster.workers[1].behaviour.hold(&pages[..2], &[]);
    cluster.workers[2].behaviour.hold(&pages[..4], &[]);
    cluster.enter().await;
    let goes = async |what: &str, worker: &str, route: &str| {
        cluster
            .eventually(what, async || {
                routed(&cluster, &prompt).await == (worker.to_owned(), route.to_owned())
            })
            .await;
    };
    goes("the longest", "2", "prefix_aware; cached=64").await;
    cluster.workers[2].behaviour.hold(&[], &pages[1..2]);
    goes("an eviction", "1", "prefix_aware; cached=32").await;
    cluster.workers[0].behaviour.hold(&pages, &[]);
    goes("what came", "0", "prefix_aware; cached=96").await;
    // A stream that broke is opened again, and what was missed meanwhile is in its beginning.
    let first = &cluster.workers[0].behaviour;
    first.changes.0.send(None).unwrap();
    first.holds.lock().unwrap().as_mut().unwrap().clear();
    goes("a loss", "1", "prefix_aware; cached=32").await;
    assert!(first.followed.load(Ordering::SeqCst) >= 1);
    cluster
        .eventually("another stream", async || {
            first.followed.load(Ordering::SeqCst) > 1
        })
        .await;
    first.hold(&pages[..3], &[]);
    goes("what came after the loss", "0", "prefix_aware; cached=48").await;
    let metrics = cluster.get("/metrics").await.1;
    let decided =
        "foregate_gateway_route_decisions_total{outcome=\"prefix\",policy=\"prefix_aware\"}";
    assert!(metrics.contains(decided), "{metrics}");
}

#[tokio::test]
async fn a_prefix_does_not_drown_its_worker() {
    let prompt: Vec<u32> = (0..100).collect();
    let mut config = routed_by(RoutingPolicy::PrefixAware);
    config.max_in_flight = 64;
    let cluster = Cluster::bare(2, "x", config).await;
    cluster.workers[0].behaviour.hold(&[], &[]);
    cluster.workers[1].behaviour.hold(&names(&prompt), &[]);
    cluster.enter().await;
    cluster
        .eventually("the prefix is known", async || {
            routed(&cluster, &prompt).await.0 == "1"
        })
        .await;
    cluster.shows("foregate_gateway_requests_in_flight 0").await;
    cluster.hold_after(1);
    let body = json!({"prompt": prompt, "max_tokens": 200, "ignore_eos": true, "stream": true});
    let mut running = Vec::new();
    let mut workers = Vec::new();
    for _ in 0..11 {
        let response = cluster.post("/v1/completions", &body).await;
        workers.push(header(&response, "x-foregate-worker"));
        running.push(response);
    }
    let (near, far) = workers.split_at(9);
    assert!(near.iter().all(|worker| worker == "1"), "{workers:?}");
    assert_eq!(
        far[0], "0",
        "nine more than on the idle worker are too many"
    );
}

#[tokio::test]
async fn workers_that_do_not_tell_are_known_by_what_they_read() {
    let cluster = Cluster::start(2, "x", routed_by(RoutingPolicy::PrefixAware)).await;
    let prompt: Vec<u32> = (0..100).collect();
    assert_eq!(routed(&cluster, &prompt).await.1, "prefix_aware; cached=0");
    cluster.hold_after(1);
    let busy = cluster
        .post(
            "/v1/completions",
            &with(
                json!({"prompt": vec![5; 40]}),
                &json!({"max_tokens": 50, "stream": true}),
            ),
        )
        .await;
    assert_eq!(header(&busy, "x-foregate-worker"), "0");
    cluster.hold_after(0);
    let again = routed(&cluster, &prompt).await;
    assert_eq!(
        again,
        ("0".to_owned(), "prefix_aware; cached=96".to_owned())
    );
}

#[tokio::test]
async fn who_waits_in_the_window_too_long_is_told_so() {
    let mut config = routed_by(RoutingPolicy::Window);
    (config.max_in_flight, config.queue_timeout_ms) = (1, 300);
    let cluster = Cluster::start(1, "x", config).await;
    cluster.hold_after(1);
    let held = cluster.post("/v1/completions", &prompt(1, 0)).await;
    let refused = cluster.post("/v1/completions", &prompt(1, 1)).await;
    assert_eq!(refused.status(), 429);
    assert!(
        refused
            .text()
            .await
            .unwrap()
            .contains("no free place within 300 ms")
    );
    cluster.shows("foregate_gateway_window_waiting 0").await;
    drop(held);
    cluster.idle().await;
    cluster.hold_after(0);
    cluster
        .json("/v1/completions", &json!({"prompt": "hi"}))
        .await;
}

#[tokio::test]
async fn places_come_back_from_clients_that_leave_and_workers_that_are_lost() {
    let mut config = routed_by(RoutingPolicy::Window);
    config.max_in_flight = 2;
    let mut cluster = Cluster::start(2, "x", config).await;
    cluster.hold_after(1);
    let first = cluster.post("/v1/completions", &prompt(1, 0)).await;
    let second = cluster.post("/v1/completions", &prompt(1, 1)).await;
    let waits = {
        let body = prompt(2, 2);
        let (client, url) = (
            cluster.client.clone(),
            format!("{}/v1/completions", cluster.url),
        );
        tokio::time::timeout(
            std::time::Duration::from_millis(300),
            client.post(url).json(&body).send(),
        )
        .await
    };
    assert!(waits.is_err(), "the third had no place and its client left");
    cluster.shows("foregate_gateway_window_waiting 0").await;
    drop(first);
    let third = cluster.post("/v1/completions", &prompt(2, 3)).await;
    assert_eq!(third.status(), 200);
    cluster.workers[0].kill();
    cluster.hold_after(0);
    for response in [second, third] {
        let text = response.text().await.unwrap();
        assert!(text.contains("[DONE]") && !text.contains("error"), "{text}");
    }
    for _ in 0..3 {
        cluster
            .json("/v1/completions", &json!({"prompt": "hi"}))
            .await;
    }
}

#[tokio::test]
async fn requests_of_several_sequences_never_wait_for_each_other() {
    let mut config = routed_by(RoutingPolicy::Window);
    config.max_in_flight = 2;
    let cluster = Cluster::start(2, "x", config).await;
    let body = |n: u32| json!({"prompt": "hi", "n": n, "temperature": 1.0, "seed": 1, "max_tokens": 4, "ignore_eos": true});
    let (two, three, one) = (body(2), body(3), body(1));
    let (a, b, c, d) = tokio::join!(
        cluster.json("/v1/completions", &two),
        cluster.json("/v1/completions", &three),
        cluster.json("/v1/completions", &two),
        cluster.json("/v1/completions", &one),
    );
    let choices = [a, b, c, d].map(|answer| answer["choices"].as_array().unwrap().len());
    assert_eq!(choices, [2, 3, 2, 1]);
}

#[tokio::test]
async fn no_policy_changes_a_token() {
    let mut answers = Vec::new();
    for policy in [
        RoutingPolicy::LeastLoaded,
        RoutingPolicy::Signature,
        RoutingPolicy::Window,
        RoutingPolicy::PrefixAware,
        RoutingPolicy::RoundRobin,
    ] {
        let cluster = Cluster::start(3, "some text to say", routed_by(policy)).await;
        let mut texts = Vec::new();
        for at in 0..6 {
            let body = json!({"prompt": "hi", "temperature": 1.0, "seed": at, "max_tokens": 6, "ignore_eos": true});
            let answer = cluster.json("/v1/completions", &body).await;
            texts.push(answer["choices"][0]["text"].clone());
        }
        answers.push(texts);
    }
    assert!(
        answers.windows(2).all(|pair| pair[0] == pair[1]),
        "{answers:?}"
    );
    assert_ne!(answers[0][0], answers[0][1], "the seed matters");
}

/// Shares of two experts of the first layer in the forecast of the one gateway, if it knows all of its work.
fn foretold(
    state: &foregate_store::coord::ClusterState,
    experts: [usize; 2],
) -> Option<[f64; 2]> {
    let forecast = state.forecasts.values().next()?;
    let sure = forecast.rows > 0 && forecast.confidence > 0.99;
    let share = |expert: usize| f64::from(forecast.shares[0][expert]) / f64::from(u16::MAX);
    sure.then(|| experts.map(share))
}

#[tokio::test]
async fn the_planner_is_told_what_is_admitted_and_not_yet_computed() {
    let mut config = routed_by(RoutingPolicy::LeastLoaded);
    (config.max_in_flight, config.forecast_ms) = (2, Some(200));
    let cluster = Cluster::start(1, "x", config).await;
    let end = tokio_util::sync::CancellationToken::new();
    let states = cluster.coord.watch_cluster(end.clone());
    // Whoever waits is known by what was read before: its prefix, and the words of both kinds.
    for at in 0..40 {
        let body = with(
            prompt(1 + at % 2, at),
            &json!({"max_tokens": 1, "stream": false}),
        );
        cluster.json("/v1/completions", &body).await;
    }
    cluster.hold_after(1);
    let first = cluster.post("/v1/completions", &prompt(1, 0)).await;
    let second = cluster.post("/v1/completions", &prompt(1, 2)).await;
    cluster
        .eventually("a forecast of what runs", async || {
            foretold(&states.borrow(), [1, 2]).is_some_and(|[one, two]| one > 0.9 && two < 0.1)
        })
        .await;
    let mut waiting = tokio::task::JoinSet::new();
    for tail in 0..6 {
        let request = cluster
            .client
            .post(format!("{}/v1/completions", cluster.url))
            .json(&prompt(2, tail));
        waiting.spawn(async move { request.send().await.unwrap().text().await.unwrap() });
    }
    cluster.shows("foregate_gateway_admission_queue 6").await;
    cluster
        .eventually("a forecast of who waits", async || {
            foretold(&states.borrow(), [1, 2]).is_some_and(|[_, two]| two > 0.5)
        })
        .await;
    cluster
        .shows("foregate_gateway_forecast_rows{experts=\"known\"}")
        .await;
    cluster.hold_after(0);
    drop((first, second));
    while let Some(ended) = waiting.join_next().await {
        assert!(ended.unwrap().contains("[DONE]"));
    }
    cluster
        .eventually("nothing to say", async || {
            states
                .borrow()
                .forecasts
                .values()
                .all(|forecast| forecast.rows == 0)
        })
        .await;
    cluster.shutdown.cancel();
    cluster
        .eventually("its end", async || states.borrow().forecasts.is_empty())
        .await;
    end.cancel();
}
