//! `up --processes` over a real etcd, with parts of it killed: streams go on and their tokens do not change.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failure here is the test's failure"
)]

use std::sync::Arc;
use std::time::Duration;

use foregate_api::forecast::Forecast;
use foregate_harness::binary::{Foregate, Start};
use foregate_harness::client::Client;
use foregate_harness::faults::{alive, signal};
use foregate_harness::manifest::ManifestFile;
use foregate_harness::{on_path, skip};
use foregate_store::own_etcd::OwnEtcd;
use foregate_store::{Coord, EtcdStore};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

const BINARY: &str = env!("CARGO_BIN_EXE_foregate");
const PROMPTS: [&str; 6] = [
    "And the LORD spake unto",
    "def read(self, size):\n    ",
    "impl Iterator for ",
    "# Usage\n\nTo install ",
    "In the beginning",
    "import os\n",
];

/// Three workers of which any two can hold all experts.
fn manifest() -> ManifestFile {
    ManifestFile::demo(
        "  workers:\n    count: 3\n    redundantSlots: 6\n    kvMemory: 64Mi\n  balancing:\n    windowMs: 500\n",
    )
}

fn missing() -> bool {
    if on_path("etcd").is_some() {
        return false;
    }
    skip("no etcd on PATH");
    true
}

/// A ready cluster and a client of it.
async fn processes(manifest: &ManifestFile, more: &[&str]) -> (Foregate, Client) {
    let mut arguments = vec!["--processes", "-f", manifest.argument()];
    arguments.extend(more);
    let cluster = Start::up(BINARY, &arguments).ready().await;
    let client = Client::new(&cluster.url);
    (cluster, client)
}

/// The tokens of one stream: greedy for even prompts, drawn from a seed for odd ones. `running` gets a permit when
/// the first token has come.
async fn tokens(client: &Client, at: usize, length: usize, running: &Semaphore) -> Vec<u32> {
    let body = json!({
        "prompt": PROMPTS[at], "max_tokens": length, "temperature": if at.is_multiple_of(2) { 0.0 } else { 0.9 },
        "seed": 7 + at, "ignore_eos": true, "stream": true, "return_token_ids": true,
    });
    let started = || running.add_permits(1);
    let events = client
        .watched_stream("/v1/completions", &body, started)
        .await;
    events
        .iter()
        .filter_map(|event| event.data["choices"][0]["token_ids"].as_array())
        .flatten()
        .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
        .collect()
}

async fn all(client: &Client, length: usize) -> Vec<Vec<u32>> {
    all_watched(client, length, &Arc::new(Semaphore::new(0))).await
}

async fn all_watched(
    client: &Client,
    length: usize,
    running: &Arc<Semaphore>,
) -> Vec<Vec<u32>> {
    let mut streams = JoinSet::new();
    for at in 0..PROMPTS.len() {
        let (client, running) = (client.clone(), Arc::clone(running));
        streams.spawn(async move { (at, tokens(&client, at, length, &running).await) });
    }
    let mut results = vec![Vec::new(); PROMPTS.len()];
    while let Some(stream) = streams.join_next().await {
        let (at, tokens) = stream.expect("no stream fails");
        assert_eq!(tokens.len(), length, "{}", PROMPTS[at]);
        results[at] = tokens;
    }
    results
}

async fn experts(client: &Client) -> Value {
    client.json("/debug/experts").await
}

fn epoch(experts: &Value) -> u64 {
    experts["active"]["epoch"].as_u64().unwrap_or(0)
}

/// Kills these instances while all streams run and waits until others run in their place. The streams' tokens must
/// be the expected ones. Then waits until all `workers` are ready. Returns the processes, dead and new.
///
/// On a fast machine short streams may be over before the signal is out, so it goes on until one had to be resumed.
async fn killed_in_mid_stream(
    cluster: &Foregate,
    client: &Client,
    names: &[&str],
    workers: usize,
    expected: &[Vec<u32>],
) -> Vec<u32> {
    let mut processes = Vec::new();
    for round in 0.. {
        assert!(round < 10, "no stream ran when {names:?} were killed");
        let mut killed = Vec::new();
        for name in names {
            killed.push((*name, cluster.instance(name).await));
        }
        let running = Arc::new(Semaphore::new(0));
        let streams = all_watched(client, expected[0].len(), &running);
        let kill = async {
            let all = running.acquire_many(PROMPTS.len() as u32).await;
            drop(all.unwrap());
            for (_, pid) in &killed {
                signal(*pid, "KILL");
            }
        };
        let (got, ()) = tokio::join!(streams, kill);
        assert_eq!(got, expected);
        for (name, pid) in killed {
            processes.extend([pid, cluster.restarted(name, pid).await]);
        }
        all_ready(client, workers).await;
        let resumed = client.metric("foregate_gateway_resumes_total", "").await;
        if resumed >= Some(1.0) {
            break;
        }
    }
    processes
}

async fn all_ready(client: &Client, count: usize) {
    client
        .until("all workers are ready", Duration::from_secs(60), || async {
            let experts = experts(client).await;
            let workers = experts["workers"].as_object().unwrap();
            workers.len() == count && workers.values().all(|worker| worker["phase"] == "ready")
        })
        .await;
}

async fn end(cluster: Foregate, children: &[u32]) {
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
    for pid in children {
        assert!(!alive(*pid), "process {pid} outlived its parent");
    }
}

#[tokio::test]
async fn without_an_operator_only_rebalancing_stops() {
    if missing() {
        return;
    }
    let manifest = manifest();
    let (cluster, client) = processes(&manifest, &[]).await;
    let expected = all(&client, 24).await;
    let operator = cluster.instance("operator").await;
    // A stopped process holds its lease for a while and then loses it; a killed one is started again.
    signal(operator, "STOP");
    assert_eq!(all(&client, 24).await, expected);
    signal(operator, "KILL");
    assert_eq!(all(&client, 24).await, expected);
    let next = cluster.restarted("operator", operator).await;
    client
        .until(
            "an operator leads again",
            Duration::from_secs(60),
            || async { experts(&client).await["leader"].is_string() },
        )
        .await;
    assert_eq!(all(&client, 24).await, expected);
    end(cluster, &[operator, next]).await;
}

#[tokio::test]
async fn ten_seconds_without_etcd_are_survived() {
    if missing() {
        return;
    }
    let mut etcd = OwnEtcd::start().await.unwrap();
    let manifest = manifest();
    let url = etcd.endpoints().join(",");
    let (cluster, client) = processes(&manifest, &["--etcd", &url]).await;
    let expected = all(&client, 24).await;
    let before = epoch(&experts(&client).await);
    etcd.stop_keeping_data().await.unwrap();
    let since = Instant::now();
    let mut rounds = 0;
    while since.elapsed() < Duration::from_secs(10) {
        assert_eq!(
            all(&client, 24).await,
            expected,
            "round {rounds} without etcd"
        );
        rounds += 1;
        sleep(Duration::from_millis(200)).await;
    }
    assert!(rounds > 0);
    etcd.restart().await.unwrap();
    client
        .until("the store is back", Duration::from_secs(60), || async {
            let experts = experts(&client).await;
            experts["connected"] == true && experts["leader"].is_string()
        })
        .await;
    assert_eq!(all(&client, 24).await, expected);
    assert!(epoch(&experts(&client).await) >= before);
    end(cluster, &[]).await;
}

#[tokio::test]
async fn streams_of_a_killed_worker_go_on_with_the_same_tokens() {
    if missing() {
        return;
    }
    let manifest = manifest();
    let (cluster, client) = processes(&manifest, &[]).await;
    let expected = all(&client, 150).await;
    let children = killed_in_mid_stream(&cluster, &client, &["worker-1"], 3, &expected).await;
    assert_eq!(
        all(&client, 24).await,
        expected
            .iter()
            .map(|t| t[..24].to_vec())
            .collect::<Vec<_>>()
    );
    end(cluster, &children).await;
}

/// Nobody is left who has a copy or could take a sequence: streams wait until the workers are back.
#[tokio::test]
async fn streams_outlive_the_death_of_all_workers() {
    if missing() {
        return;
    }
    let manifest = ManifestFile::demo("  workers:\n    count: 2\n    kvMemory: 64Mi\n");
    let (cluster, client) = processes(&manifest, &[]).await;
    let expected = all(&client, 150).await;
    let workers = ["worker-0", "worker-1"];
    let children = killed_in_mid_stream(&cluster, &client, &workers, 2, &expected).await;
    end(cluster, &children).await;
}

/// The port stays bound while its gateway is started again: a client waits, nobody is refused.
#[tokio::test]
async fn a_killed_gateway_keeps_its_port() {
    if missing() {
        return;
    }
    let manifest = manifest();
    let (cluster, client) = processes(&manifest, &[]).await;
    let expected = all(&client, 24).await;
    let gateway = cluster.instance("gateway").await;
    signal(gateway, "KILL");
    client
        .until("the gateway is dead", Duration::from_secs(10), || async {
            !alive(gateway)
        })
        .await;
    // A new client: the old one's idle connections died with the gateway.
    let client = Client::new(&cluster.url);
    let (models, next) = tokio::join!(
        client.json("/v1/models"),
        cluster.restarted("gateway", gateway)
    );
    assert_eq!(models["data"][0]["object"], "model");
    client
        .until("the gateway is ready", Duration::from_secs(30), || async {
            client.get("/ready").await.0.is_success()
        })
        .await;
    assert_eq!(all(&client, 24).await, expected);
    end(cluster, &[gateway, next]).await;
}

fn status_address(line: &str) -> Option<String> {
    let (_, address) = line
        .contains("status server listens")
        .then(|| line.split_once("address="))??;
    address.split_whitespace().next().map(str::to_owned)
}

/// Nobody who connects and then says nothing, or half of something, is waited for.
#[tokio::test]
async fn half_a_request_does_not_hold_up_a_drain() {
    if missing() {
        return;
    }
    let manifest = manifest();
    let (cluster, client) = processes(&manifest, &[]).await;
    // One operator and three workers.
    let mut addresses = cluster
        .logged("four status servers", |log| {
            let addresses: Vec<String> = log.lines().filter_map(status_address).collect();
            (addresses.len() == 4).then_some(addresses)
        })
        .await;
    addresses.push(client.address().to_owned());
    let mut open = Vec::new();
    for address in addresses {
        for said in ["", "GET /metrics HTTP/1.1\r\nho"] {
            let mut stream = TcpStream::connect(&address).await.unwrap();
            stream.write_all(said.as_bytes()).await.unwrap();
            open.push(stream);
        }
    }
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
    assert!(!stderr.contains("did not drain"), "{stderr}");
    drop(open);
}

/// The parent killed without warning takes its children with it.
#[tokio::test]
async fn children_end_with_their_parent() {
    if missing() {
        return;
    }
    let cluster = Start::up(BINARY, &["--processes"]).ready().await;
    let client = Client::new(&cluster.url);
    let mut children = Vec::new();
    for name in ["etcd", "operator", "worker-0", "worker-1", "gateway"] {
        children.push(cluster.instance(name).await);
    }
    assert!(children.iter().all(|pid| alive(*pid)));
    signal(cluster.pid(), "KILL");
    client
        .until("the children end", Duration::from_secs(60), || async {
            children.iter().all(|pid| !alive(*pid))
        })
        .await;
}

/// A gateway in one process tells the operator in another, and a second gateway's word is added.
#[tokio::test]
async fn forecasts_reach_the_planner_from_every_gateway() {
    if missing() {
        return;
    }
    let etcd = OwnEtcd::start().await.unwrap();
    let manifest = ManifestFile::demo(
        "  workers:\n    count: 3\n    redundantSlots: 1\n    kvMemory: 64Mi\n  balancing:\n    windowMs: 500\n    minRows: 16\n",
    );
    let url = etcd.endpoints().join(",");
    let (cluster, client) = processes(&manifest, &["--etcd", &url]).await;
    let operator = cluster
        .logged("the operator's status server", |log| {
            let line = log.lines().find(|line| {
                line.contains("status server listens") && line.contains("operator")
            })?;
            let address = line.split("127.0.0.1:").nth(1)?;
            let port: String = address.chars().take_while(char::is_ascii_digit).collect();
            Some(Client::new(&format!("http://127.0.0.1:{port}")))
        })
        .await;
    let operator = &operator;
    let shows =
        |name: &'static str| async move { operator.metric(name, "").await.unwrap_or(0.0) };
    let mut streams = JoinSet::new();
    let stop = CancellationToken::new();
    for at in 0..PROMPTS.len() {
        let (client, stop) = (client.clone(), stop.clone());
        let running = Semaphore::new(0);
        streams.spawn(async move {
            while !stop.is_cancelled() {
                tokens(&client, at, 64, &running).await;
            }
        });
    }
    client
        .until(
            "the gateway's forecast",
            Duration::from_secs(60),
            || async {
                shows("foregate_operator_forecast_gateways").await > 0.5
                    && shows("foregate_operator_forecast_confidence").await > 0.9
            },
        )
        .await;
    let shown = experts(&client).await["forecasts"].clone();
    assert_eq!(shown.as_array().map(Vec::len), Some(1), "{shown}");
    assert_eq!(shown[0]["horizon_ms"], 500, "{shown}");
    // Another gateway, which knows half of its work.
    let store = Arc::new(EtcdStore::connect(&etcd.endpoints()).await.unwrap());
    let coord = Coord::new(store, "e2e");
    let lease = coord.store().lease(Duration::from_secs(10)).await.unwrap();
    let mut forecast = Forecast::of(500, 1e6, 0.5, &vec![vec![1.0; 32]; 4]);
    client
        .until("both forecasts", Duration::from_secs(60), || {
            forecast.sequence += 1;
            let (coord, lease, forecast) =
                (coord.clone(), Arc::clone(&lease), forecast.clone());
            async move {
                coord
                    .publish_forecast(&forecast, lease.as_ref())
                    .await
                    .unwrap();
                shows("foregate_operator_forecast_gateways").await > 1.5
                    && shows("foregate_operator_forecast_confidence").await < 0.6
            }
        })
        .await;
    stop.cancel();
    while let Some(ended) = streams.join_next().await {
        ended.expect("no stream fails");
    }
    end(cluster, &[]).await;
}
