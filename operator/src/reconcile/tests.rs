use std::cell::Cell;

use foregate_api::ids::Epoch;
use foregate_api::member::{Ack, Member, Phase};
use foregate_store::{Coord, Lease, MemoryStore, Store};
use futures::future::BoxFuture;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::events::Reporter;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::*;
use crate::clusters::Canary;
use crate::testing::api::{Api, Call};

/// A gateway that answers as long as anybody says it is available.
#[derive(Debug)]
struct Answers;

impl Canary for Answers {
    fn token<'a>(
        &'a self,
        _: &'a str,
        _: &'a str,
        _: Option<&'a str>,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// A worker's process: registered as long as it is held.
struct Worker {
    lease: Arc<dyn Lease>,
    incarnation: u64,
    slots: u32,
}

/// An API server, a store, and what a kubelet and workers do; the operator is made anew whenever it is killed.
struct World {
    api: Api,
    store: Arc<dyn Store>,
    coord: Coord,
    workers: BTreeMap<Rank, Worker>,
    context: Arc<Context>,
    born: u64,
}

const UID: &str = "0123456789";
const DAY: i64 = 24 * 60 * 60;

thread_local! {
    /// The time of the test, in seconds since 1970; each has a thread of its own.
    static NOW: Cell<i64> = const { Cell::new(1000) };
}

impl World {
    fn new(count: u32) -> Self {
        let api = Api::default();
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let context = context(&api, &store);
        let world = Self {
            coord: Coord::new(Arc::clone(&store), "default.tiny.01234567"),
            api,
            store,
            workers: BTreeMap::new(),
            context,
            born: 0,
        };
        world.want(count);
        world
    }

    /// Somebody applies the manifest.
    fn want(&self, count: u32) {
        let path = "/apis/foregate.dev/v1alpha1/namespaces/default/moeclusters/tiny";
        let body = json!({
            "apiVersion": "foregate.dev/v1alpha1",
            "kind": "MoeCluster",
            "metadata": { "name": "tiny", "namespace": "default", "generation": 1 },
            "spec": {
                "model": { "uri": "/models/demo", "servedNames": ["demo"] },
                "workers": { "count": count, "kvMemory": "1Mi", "threads": 1 },
                "balancing": { "windowMs": 50 },
            },
        });
        self.api.insert(path, body, UID);
    }

    /// Writes into the manifest.
    fn security(&self, spec: Value) {
        self.api
            .with("moeclusters", "tiny", |o| o["spec"]["security"] = spec);
    }

    /// Time passes, and the operator looks at Secrets again.
    async fn pass(&self, seconds: i64) {
        NOW.set(NOW.get() + seconds);
        tokio::time::sleep(SECRETS).await;
        self.look().await.unwrap();
    }

    fn secret(&self, name: &str) -> Value {
        self.api
            .with("secrets", name, |secret| secret["data"].clone())
    }

    fn kill(&mut self) {
        self.context.clusters.retain(&|_| false);
        self.context = context(&self.api, &self.store);
    }

    async fn look(&self) -> Result<Action, ReconcileError> {
        let object = self
            .api
            .with("moeclusters", "tiny", |object| object.clone());
        let cluster: MoeCluster = serde_json::from_value(object).unwrap();
        reconcile(Arc::new(cluster), Arc::clone(&self.context)).await
    }

    /// What the rest of the cluster does in a moment: pods run, workers register and follow the placement, gateways are there.
    async fn live(&mut self) {
        if self.api.names("pods").contains("tiny-inspect") {
            self.api.with("pods", "tiny-inspect", |pod| {
                let facts = json!({
                    "experts": 8, "maxPositions": 64, "kvBytesPerToken": 64, "slotBytes": 1000, "denseBytes": 1000,
                });
                let ended = json!({ "terminated": { "exitCode": 0, "message": facts.to_string() } });
                pod["status"]["containerStatuses"] = json!([{
                    "name": "inspect", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": ended,
                }]);
            });
        }
        if self.api.names("deployments").contains("tiny-gateway") {
            self.api.with("deployments", "tiny-gateway", |gateways| {
                gateways["status"] =
                    json!({ "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1 });
            });
        }
        self.run_pods().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        self.acknowledge().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }

    async fn run_pods(&mut self) {
        let prefix = "tiny-worker-";
        let names = self.api.names("pods");
        let ranks: BTreeSet<Rank> = names
            .iter()
            .filter_map(|name| name.strip_prefix(prefix)?.parse().ok().map(Rank))
            .collect();
        let gone: Vec<Rank> = self
            .workers
            .keys()
            .filter(|rank| !ranks.contains(rank))
            .copied()
            .collect();
        for rank in gone {
            let worker = self.workers.remove(&rank).unwrap();
            worker.lease.revoke().await.unwrap();
        }
        for rank in ranks {
            let slots = self.api.with("pods", &format!("{prefix}{rank}"), |pod| {
                pod["status"] = json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] });
                pod["metadata"]["annotations"]["foregate.dev/slots"].as_str().unwrap().parse().unwrap()
            });
            if self.workers.contains_key(&rank) {
                continue;
            }
            self.born += 1;
            let worker = Worker {
                lease: self.store.lease(Duration::from_secs(3600)).await.unwrap(),
                incarnation: self.born,
                slots,
            };
            let member = member(rank, &worker);
            self.coord
                .register(&member, worker.lease.as_ref())
                .await
                .unwrap();
            self.workers.insert(rank, worker);
        }
    }

    /// Workers have what they are to have at once.
    async fn acknowledge(&self) {
        let state = self.state().await;
        let epoch = |plan: &Option<(Arc<foregate_api::placement::Placement>, u64)>| {
            plan.as_ref().map_or(Epoch(0), |(plan, _)| plan.epoch)
        };
        let (target, active) = (epoch(&state.target), epoch(&state.active));
        let ack = Ack {
            prepared: target,
            serving: active,
            drained: Epoch(active.0.saturating_sub(1)),
        };
        for (rank, worker) in &self.workers {
            self.coord
                .acknowledge(*rank, ack, worker.lease.as_ref())
                .await
                .unwrap();
        }
    }

    async fn state(&self) -> Arc<ClusterState> {
        let end = tokio_util::sync::CancellationToken::new();
        let mut states = self.coord.watch_cluster(end.clone());
        let _end = end.drop_guard();
        states
            .wait_for(|state| state.connected)
            .await
            .unwrap()
            .clone()
    }

    /// Looks until the cluster is ready with so many workers. Every expert that was placed stays covered.
    async fn settle(&mut self, count: usize) {
        for _ in 0..60 {
            self.look().await.unwrap();
            self.live().await;
            self.covered().await;
            let ready = self.condition("Ready");
            if ready["status"] == "True" && self.workers.len() == count && self.done() {
                return;
            }
        }
        panic!(
            "not {count} workers: {:#?}",
            self.api
                .with("moeclusters", "tiny", |o| o["status"].clone())
        );
    }

    fn done(&self) -> bool {
        self.condition("Progressing")["status"] == "False"
    }

    fn condition(&self, about: &str) -> Value {
        self.api.with("moeclusters", "tiny", |object| {
            let conditions = object["status"]["conditions"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            conditions
                .into_iter()
                .find(|c| c["type"] == about)
                .unwrap_or_default()
        })
    }

    async fn covered(&self) {
        let state = self.state().await;
        let Some((plan, _)) = &state.active else {
            return;
        };
        for copies in plan.layers.iter().flat_map(|layer| &layer.copies) {
            assert!(
                copies
                    .iter()
                    .any(|copy| self.workers.contains_key(&copy.rank)),
                "an expert is nowhere: epoch {} over {:?}, workers {:?}",
                plan.epoch,
                plan.ranks,
                self.workers.keys()
            );
        }
    }
}

fn context(api: &Api, store: &Arc<dyn Store>) -> Arc<Context> {
    let (wake, _) = mpsc::channel(1);
    let client = api.client();
    let reporter = Reporter {
        controller: "test".to_owned(),
        instance: None,
    };
    Arc::new(Context {
        recorder: Recorder::new(client.clone(), reporter),
        client,
        defaults: Defaults {
            image: "foregate:test".to_owned(),
            cuda_image: "foregate:test-cuda".to_owned(),
            etcd: vec!["http://etcd:2379".to_owned()],
            etcd_tls: None,
        },
        clusters: Clusters::new(Arc::clone(store), Arc::new(Answers), wake),
        now: || Time(Timestamp::from_second(NOW.get()).unwrap()),
        applied: Mutex::default(),
        secured: Mutex::default(),
        failures: Mutex::default(),
    })
}

fn member(rank: Rank, worker: &Worker) -> Member {
    Member {
        rank,
        incarnation: worker.incarnation,
        rpc: "127.0.0.1:1".to_owned(),
        exchange: "127.0.0.1:1".to_owned(),
        domain: String::new(),
        slots: worker.slots,
        phase: Phase::Ready,
        model: crate::testing::model(8),
        cpu_path: "portable".to_owned(),
        kv_pages: 1,
        page_tokens: 16,
    }
}

/// Calls that change something.
fn writes(calls: &[Call]) -> Vec<&Call> {
    calls
        .iter()
        .filter(|(_, _, verb)| verb != "get" && verb != "list")
        .collect()
}

#[tokio::test(start_paused = true)]
async fn a_manifest_becomes_a_cluster_that_serves() {
    let mut world = World::new(3);
    world.look().await.unwrap();
    assert_eq!(
        world.api.names("pods"),
        BTreeSet::from(["tiny-inspect".to_owned()])
    );
    assert_eq!(world.condition("Ready")["reason"], "ReadingModel");
    world.settle(3).await;
    assert!(
        !world.api.names("pods").contains("tiny-inspect"),
        "it has done its work"
    );
    for (resource, names) in [
        (
            "configmaps",
            &[
                "tiny-gateway",
                "tiny-worker-0",
                "tiny-worker-1",
                "tiny-worker-2",
            ][..],
        ),
        ("services", &["tiny", "tiny-workers"]),
        ("deployments", &["tiny-gateway"]),
        ("poddisruptionbudgets", &["tiny-gateway", "tiny-workers"]),
        ("networkpolicies", &["tiny-gateway", "tiny-workers"]),
        ("horizontalpodautoscalers", &[]),
    ] {
        let wanted: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(world.api.names(resource), wanted, "{resource}");
    }
    let status = world
        .api
        .with("moeclusters", "tiny", |object| object["status"].clone());
    assert_eq!(status["readyReplicas"], 3);
    assert_eq!(status["parallelism"]["expertRanks"], 3);
    assert_eq!(status["memory"]["kvBytes"], 1 << 20);
    let placement = world.api.with("expertplacements", "tiny", |object| {
        object["status"].clone()
    });
    assert_eq!(placement["epoch"], status["epoch"]);
    assert_eq!(placement["reason"], "initial");
    assert_eq!(placement["homes"].as_array().unwrap().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn to_look_twice_is_to_look_once() {
    let mut world = World::new(2);
    world.settle(2).await;
    world.look().await.unwrap();
    world.api.calls();
    let action = world.look().await.unwrap();
    let calls = world.api.calls();
    assert_eq!(writes(&calls), Vec::<&Call>::new());
    assert_eq!(action, Action::requeue(LATER));
    // What somebody else changed is put right after a while.
    world.api.remove("services", "tiny");
    tokio::time::sleep(REAPPLY).await;
    world.look().await.unwrap();
    assert!(world.api.names("services").contains("tiny"));
}

/// Names of objects are made from the cluster's; what has such a name already is somebody's.
#[tokio::test(start_paused = true)]
async fn nothing_of_others_is_taken_over() {
    let nobodys = Value::Null;
    // Of `tiny-workers`, whose Service has the name of `tiny`'s for workers.
    let clusters = json!([{"kind": "MoeCluster", "name": "tiny-workers", "uid": "4711", "controller": true}]);
    for (group, resource, name, kind, owners) in [
        ("/api/v1", "services", "tiny", "Service", &nobodys),
        ("/api/v1", "services", "tiny-workers", "Service", &clusters),
        (
            "/api/v1",
            "configmaps",
            "tiny-gateway",
            "ConfigMap",
            &nobodys,
        ),
        (
            "/apis/apps/v1",
            "deployments",
            "tiny-gateway",
            "Deployment",
            &nobodys,
        ),
        ("/api/v1", "pods", "tiny-worker-1", "Pod", &nobodys),
        ("/api/v1", "pods", "tiny-inspect", "Pod", &nobodys),
    ] {
        let mut world = World::new(2);
        let path = format!("{group}/namespaces/default/{resource}/{name}");
        let metadata = json!({
            "name": name, "namespace": "default", "ownerReferences": owners,
            // A kubelet would run such a pod too.
            "annotations": {"foregate.dev/slots": "4"},
        });
        // A ConfigMap has no such field, and so none that ours would write otherwise.
        let field = if kind == "ConfigMap" {
            "binaryData"
        } else {
            "spec"
        };
        let body = json!({"metadata": metadata, field: {"a": 1}});
        world.api.insert(&path, body, "other");
        let mut refused = None;
        for _ in 0..8 {
            refused = world.look().await.err().or(refused);
            world.api.with(resource, name, |object| {
                assert_eq!(
                    object[field],
                    json!({"a": 1}),
                    "{kind} {name} was taken over"
                );
                object.as_object_mut().unwrap().remove("status");
            });
            if refused.is_some() {
                break;
            }
            world.live().await;
        }
        let why = refused.expect("a refusal").to_string();
        assert!(
            why.starts_with(&format!("{kind} {name} is there already")),
            "{why}"
        );
        assert_eq!(world.condition("Degraded")["message"], why);
        world.api.remove(resource, name);
        world.settle(2).await;
    }
}

#[tokio::test(start_paused = true)]
async fn workers_are_added_and_leave_through_the_plan() {
    let mut world = World::new(2);
    world.settle(2).await;
    world.want(4);
    world.settle(4).await;
    let first = world.workers[&Rank(0)].incarnation;
    assert_eq!(first, 1, "who was there was not started anew");
    world.want(3);
    world.settle(3).await;
    world.look().await.unwrap();
    assert!(!world.api.names("configmaps").contains("tiny-worker-3"));
}

#[tokio::test(start_paused = true)]
async fn an_operator_that_is_killed_anywhere_goes_on() {
    for kill in 0..12 {
        let mut world = World::new(2);
        world.settle(2).await;
        world.want(4);
        for round in 0..12 {
            if round == kill {
                world.kill();
            }
            if round == 5 {
                world.want(2);
            }
            world.look().await.unwrap();
            world.live().await;
            world.covered().await;
        }
        world.settle(2).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_rank_comes_back_and_nobody_else_is_touched() {
    let mut world = World::new(3);
    world.settle(3).await;
    world.api.remove("pods", "tiny-worker-1");
    world.look().await.unwrap();
    assert!(world.api.names("pods").contains("tiny-worker-1"));
    world.settle(3).await;
    assert_eq!(
        (
            world.workers[&Rank(0)].incarnation,
            world.workers[&Rank(2)].incarnation
        ),
        (1, 3)
    );
}

#[tokio::test(start_paused = true)]
async fn a_wrong_manifest_is_answered_in_its_status_and_nothing_is_made() {
    let world = World::new(2);
    world.api.with("moeclusters", "tiny", |o| {
        o["spec"]["workers"]["kvMemory"] = json!("much")
    });
    world.look().await.unwrap();
    let degraded = world.condition("Degraded");
    assert_eq!(
        (&degraded["status"], &degraded["reason"]),
        (&json!("True"), &json!("InvalidManifest"))
    );
    assert!(
        degraded["message"]
            .as_str()
            .unwrap()
            .contains("spec.workers.kvMemory")
    );
    assert!(world.api.names("pods").is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_does_not_fit_is_answered_with_the_sum() {
    let mut world = World::new(2);
    world.api.with("moeclusters", "tiny", |object| {
        object["spec"]["workers"]["resources"] = json!({ "limits": { "memory": "1050000" } });
    });
    for _ in 0..3 {
        world.look().await.unwrap();
        world.live().await;
    }
    let degraded = world.condition("Degraded");
    assert_eq!(degraded["reason"], "DoesNotFit");
    // 1 Mi of keys and values, 5 slots of 1000, 1000 of other weights.
    assert!(
        degraded["message"]
            .as_str()
            .unwrap()
            .contains("= 1054576 bytes"),
        "{degraded}"
    );
    assert!(world.workers.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_the_api_server_refuses_is_told_and_tried_again() {
    let mut world = World::new(2);
    world.look().await.unwrap();
    world.live().await;
    world.api.refuse(Some("networkpolicies"));
    let error = world.look().await.unwrap_err();
    assert_eq!(error.category(), "apply");
    assert_eq!(world.condition("Degraded")["reason"], "ApplyFailed");
    assert!([1, 2, 3, 40].map(pause).is_sorted() && pause(40) == LONGEST_PAUSE);
    world.api.refuse(None);
    world.settle(2).await;
}

/// The chart grants what the operator asks for, and nothing else. Watches are the controller's, which is not here.
#[tokio::test(start_paused = true)]
async fn the_charts_rules_are_what_the_operator_needs() {
    let mut world = World::new(2);
    world.settle(2).await;
    world.want(3);
    world.settle(3).await;
    world.want(2);
    world.settle(2).await;
    // Keys are renewed.
    world.pass(61 * DAY).await;
    // An autoscaler, which goes again.
    for autoscaling in [json!({}), Value::Null] {
        world.api.with("moeclusters", "tiny", |object| {
            object["spec"]["gateway"] = json!({ "resources": { "requests": { "cpu": "1" } } });
            if !autoscaling.is_null() {
                object["spec"]["gateway"]["autoscaling"] = autoscaling;
            }
        });
        world.look().await.unwrap();
    }
    let mut needed: BTreeSet<Call> = world.api.calls().into_iter().collect();
    let call = |group: &str, resource: &str, verb: &str| {
        (group.to_owned(), resource.to_owned(), verb.to_owned())
    };
    // The controller's watches, and events that repeat.
    for verb in ["list", "watch"] {
        needed.insert(call("foregate.dev", "moeclusters", verb));
        needed.insert(call("", "pods", verb));
        needed.insert(call("apps", "deployments", verb));
    }
    needed.insert(call("events.k8s.io", "events", "patch"));
    // An apply makes what is not there; a prune removes whatever of its kinds is not wanted any more.
    let made: Vec<Call> = needed
        .iter()
        .filter(|(_, _, verb)| verb == "patch")
        .cloned()
        .collect();
    for (group, resource, _) in made {
        if resource.contains('/') || resource == "events" {
            continue;
        }
        needed.insert(call(&group, &resource, "create"));
        if resource != "expertplacements" {
            needed.insert(call(&group, &resource, "delete"));
        }
    }
    assert_eq!(granted("foregate.rules"), needed);
}

fn granted(rules: &str) -> BTreeSet<Call> {
    let chart = include_str!("../../../charts/foregate/templates/_helpers.tpl");
    let (_, rest) = chart
        .split_once(&format!("{{{{- define \"{rules}\" -}}}}"))
        .unwrap();
    let (rules, _) = rest.split_once("{{- end }}").unwrap();
    let rules: Vec<BTreeMap<String, Vec<String>>> = serde_yaml_ng::from_str(rules).unwrap();
    let mut granted = BTreeSet::new();
    for rule in rules {
        for group in &rule["apiGroups"] {
            for resource in &rule["resources"] {
                for verb in &rule["verbs"] {
                    granted.insert((group.clone(), resource.clone(), verb.clone()));
                }
            }
        }
    }
    granted
}

#[tokio::test(start_paused = true)]
async fn secrets_are_made_once_renewed_in_time_and_put_right() {
    let mut world = World::new(2);
    world.settle(2).await;
    let names = ["tiny-authority", "tiny-gateway-tls", "tiny-worker-tls"];
    let made: BTreeSet<String> = names.map(str::to_owned).into();
    assert_eq!(world.api.names("secrets"), made);
    let owner = world.api.with("secrets", "tiny-authority", |secret| {
        secret["metadata"]["ownerReferences"][0]["uid"].clone()
    });
    assert_eq!(owner, UID);
    let first = names.map(|name| world.secret(name));
    assert_eq!(first[1]["ca.crt"], first[0]["tls.crt"]);

    world.api.calls();
    world.pass(DAY).await;
    world.kill();
    world.pass(1).await;
    let calls = world.api.calls();
    let writes = writes(&calls);
    assert!(writes.iter().all(|call| call.1 != "secrets"), "{writes:?}");
    assert_eq!(names.map(|name| world.secret(name)), first);

    // Two thirds of a certificate's life: roles have new ones, of the same authority.
    world.pass(61 * DAY).await;
    let second = names.map(|name| world.secret(name));
    assert_eq!(second[0], first[0]);
    for at in 1..3 {
        assert_ne!(second[at]["tls.crt"], first[at]["tls.crt"]);
        assert_eq!(second[at]["ca.crt"], first[at]["ca.crt"]);
    }
    // Two thirds of the authority's: another is trusted beside it, and nobody has one of it yet.
    world.pass(190 * DAY).await;
    let third = names.map(|name| world.secret(name));
    assert_eq!(third[0]["tls.crt"], first[0]["tls.crt"]);
    assert!(third[0]["next.crt"].is_string() && third[1]["ca.crt"] == third[0]["ca.crt"]);
    assert_ne!(third[1]["ca.crt"], first[1]["ca.crt"]);
    world.pass(2 * DAY).await;
    let fourth = names.map(|name| world.secret(name));
    assert_eq!(fourth[0]["tls.crt"], third[0]["next.crt"]);
    assert_eq!(fourth[0]["before.crt"], first[0]["tls.crt"]);

    world.api.remove("secrets", "tiny-worker-tls");
    world.pass(1).await;
    assert_eq!(world.api.names("secrets"), made);
    // None of it starts a pod anew.
    assert_eq!(world.workers[&Rank(0)].incarnation, 1);
}

#[tokio::test(start_paused = true)]
async fn an_authority_of_somebody_elses_is_used_and_not_written() {
    use foregate_tls::authority::{Authority, Validity, vouches};

    let validity = Validity {
        from: 0,
        until: 40_000_000,
    };
    let theirs = Authority::create("theirs", validity).unwrap();
    let mut world = World::new(2);
    let path = "/api/v1/namespaces/default/secrets/tiny-authority";
    let body = |cert: &str, key: &str| {
        let bytes = |text: &str| k8s_openapi::ByteString(text.as_bytes().to_vec());
        json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": { "name": "tiny-authority", "namespace": "default" },
            "data": { "tls.crt": bytes(cert), "tls.key": bytes(key) },
        })
    };
    let put = |cert: &str, key: &str| world.api.insert(path, body(cert, key), "theirs");
    put("-----BEGIN", "");
    world.look().await.unwrap();
    world.live().await;
    let world = &mut world;
    let error = world.look().await.unwrap_err();
    assert_eq!(error.category(), "secrets");
    let degraded = world.condition("Degraded");
    let message = degraded["message"].as_str().unwrap();
    assert!(message.contains("tiny-authority"), "{message}");

    world
        .api
        .insert(path, body(&theirs.cert, &theirs.key), "theirs");
    world.settle(2).await;
    world.pass(330 * DAY).await;
    let data = world.secret("tiny-authority");
    assert_eq!(data, body(&theirs.cert, &theirs.key)["data"]);
    let worker = world.secret("tiny-worker-tls");
    let text = |entry: &str| {
        let bytes: k8s_openapi::ByteString =
            serde_json::from_value(worker[entry].clone()).unwrap();
        String::from_utf8(bytes.0).unwrap()
    };
    let issued = foregate_tls::authority::Issued {
        cert: text("tls.crt"),
        key: text("tls.key"),
    };
    let now = u64::try_from(NOW.get()).unwrap();
    let name = "worker.tiny.default.foregate.internal";
    assert!(vouches(&theirs.cert, &issued, name, now));
    // Once it has ended, that is said, and what runs goes on.
    NOW.set(50_000_000);
    tokio::time::sleep(SECRETS).await;
    let error = world.look().await.unwrap_err();
    assert!(error.to_string().contains("has ended"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn cert_manager_is_asked_where_it_is_wanted() {
    let mut world = World::new(2);
    world.security(json!({ "certManager": { "issuer": "ca", "kind": "ClusterIssuer" } }));
    world.settle(2).await;
    assert_eq!(world.api.names("secrets"), BTreeSet::new());
    let names = ["tiny-gateway-tls", "tiny-worker-tls"].map(str::to_owned);
    assert_eq!(world.api.names("certificates"), names.into());
    let spec = world
        .api
        .with("certificates", "tiny-worker-tls", |c| c["spec"].clone());
    assert_eq!(
        spec["dnsNames"],
        json!(["worker.tiny.default.foregate.internal"])
    );
    assert_eq!(spec["issuerRef"]["kind"], "ClusterIssuer");
    let asked = world.api.calls().into_iter();
    let mut needed: BTreeSet<Call> = asked.filter(|call| call.0 == "cert-manager.io").collect();
    let call = |verb: &str| {
        (
            "cert-manager.io".to_owned(),
            "certificates".to_owned(),
            verb.to_owned(),
        )
    };
    assert_eq!(needed, BTreeSet::from([call("patch")]));
    // An apply makes what is not there.
    needed.insert(call("create"));
    assert_eq!(granted("foregate.rules.certManager"), needed);
}

#[tokio::test(start_paused = true)]
async fn plain_connections_and_keys_of_clients_are_as_the_manifest_says() {
    let mut world = World::new(2);
    world.security(json!({ "mtls": false, "apiKeys": { "secretRef": { "name": "clients" } } }));
    let path = "/api/v1/namespaces/default/secrets/clients";
    let key = k8s_openapi::ByteString(b"sk-1\n".to_vec());
    world.look().await.unwrap();
    world.live().await;
    world.look().await.unwrap();
    let degraded = world.condition("Degraded");
    assert_eq!(degraded["reason"], "KeysMissing", "{degraded}");
    assert!(degraded["message"].as_str().unwrap().contains("clients"));
    world
        .api
        .insert(path, json!({ "data": { "alice": key } }), "theirs");
    tokio::time::sleep(SECRETS).await;
    world.settle(2).await;
    assert_eq!(
        world.api.names("secrets"),
        BTreeSet::from(["clients".to_owned()])
    );
    let known = lock(&world.context.secured)[UID].1.clone().unwrap();
    assert_eq!(known.0, "sk-1");
    assert!(!format!("{known:?}").contains("sk-1"));
    let gateway = world.api.with("configmaps", "tiny-gateway", |map| {
        serde_json::from_str::<Value>(map["data"]["node.json"].as_str().unwrap()).unwrap()
    });
    assert_eq!(gateway["tls"], Value::Null);
    assert_eq!(
        gateway["role"]["gateway"]["api_keys"],
        "/etc/foregate-api-keys"
    );
}

/// An operator that has just begun has seen neither store nor token. That is no news of the cluster.
#[tokio::test(start_paused = true)]
async fn a_new_operator_does_not_take_ready_back() {
    let mut world = World::new(2);
    world.settle(2).await;
    let before = world
        .api
        .with("moeclusters", "tiny", |o| o["status"].clone());
    world.kill();
    world.look().await.unwrap();
    let after = world
        .api
        .with("moeclusters", "tiny", |o| o["status"].clone());
    assert_eq!(after, before);
    world.settle(2).await;
}
