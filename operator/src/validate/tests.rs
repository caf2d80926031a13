use foregate_api::manifest::{ClusterSpec, Metadata};
use foregate_api::security::{ApiKeysSpec, CertManagerSpec};
use foregate_api::traffic::TenantSpec;
use proptest::prelude::*;

use super::*;
use crate::quantity::parse_bytes;

fn manifest() -> Manifest {
    Manifest {
        api_version: API_VERSION.to_owned(),
        kind: KIND.to_owned(),
        metadata: Metadata {
            name: "tiny".to_owned(),
            namespace: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
        },
        spec: ClusterSpec {
            model: ModelSource {
                uri: "./models/demo/".to_owned(),
                ..ModelSource::default()
            },
            ..ClusterSpec::default()
        },
    }
}

#[test]
fn what_is_left_open_gets_the_documented_defaults() {
    let cluster = validate(manifest()).unwrap();
    assert_eq!(
        cluster,
        ValidatedCluster {
            name: "tiny".to_owned(),
            model: ValidatedModel {
                uri: "./models/demo/".to_owned(),
                served_names: vec!["demo".to_owned()],
                length: ModelLength::AsPossible,
                weights: WeightSettings::default(),
                cache_claim: None,
                token_secret: "hf-token".to_owned(),
            },
            workers: ValidatedWorkers {
                count: 2,
                device: DeviceClass::Cpu,
                attention_only: 0,
                expert_only: 0,
                redundancy: Redundancy::Linked,
                threads: Threads::Shared,
                cpu_path: CpuPath::Auto,
                pinning: None,
                max_num_seqs: 64,
                max_num_batched_tokens: 512,
                max_waiting: 256,
                overtake_ms: 0,
                page_tokens: 16,
                kv_bytes: 512 << 20,
                exchange_deadline_ms: 2000,
                domains: vec![String::new(); 2],
                domain_label: "kubernetes.io/hostname".to_owned(),
                image: None,
                resources: Resources::default(),
            },
            gateway: ValidatedGateway {
                routing: RoutingPolicy::Signature,
                max_in_flight: 256,
                max_queued: 1024,
                queue_timeout_ms: 30_000,
                request_timeout_ms: 600_000,
                traffic: Traffic::default(),
                replicas: Replicas::Fixed(1),
                resources: Resources::default(),
            },
            balancing: ValidatedBalancing {
                enabled: true,
                window_ms: 2000,
                threshold: 0.98,
                max_moves_per_layer: 4,
                min_rows: 256,
                forecast: true,
                cover: Cover::Spread,
                max_move_bytes: None,
                economy: None,
                strict: false,
            },
            security: ValidatedSecurity {
                certificates: Certificates::Operator,
                api_keys: None,
            },
            pods: PodsSpec::default(),
        }
    );
}

fn tenant(name: &str) -> TenantSpec {
    TenantSpec {
        name: name.to_owned(),
        ..TenantSpec::default()
    }
}

/// A change that makes the good manifest wrong, with the field that must be named.
type Wrong = (&'static str, fn(&mut Manifest));

const WRONG: &[Wrong] = &[
    ("spec.security", |m| {
        m.spec.security.mtls = Some(false);
        m.spec.security.cert_manager = Some(CertManagerSpec {
            issuer: "ca".to_owned(),
            kind: None,
        });
    }),
    ("spec.security.certManager.issuer", |m| {
        m.spec.security.cert_manager = Some(CertManagerSpec::default());
    }),
    ("spec.security.apiKeys.secretRef.name", |m| {
        m.spec.security.api_keys = Some(ApiKeysSpec::default());
    }),
    ("apiVersion", |m| m.api_version = "v1".into()),
    ("kind", |m| m.kind = "Pod".into()),
    ("metadata.name", |m| m.metadata.name = "Tiny".into()),
    ("metadata.name", |m| m.metadata.name = "a".repeat(49)),
    ("metadata.name", |m| m.metadata.name = "-a".into()),
    ("metadata.name", |m| m.metadata.name = "1a".into()),
    ("metadata.name", |m| m.metadata.name = String::new()),
    ("metadata.namespace", |m| {
        m.metadata.namespace = Some("a/b".into())
    }),
    ("spec.model.uri", |m| m.spec.model.uri = " ".into()),
    ("spec.model.uri", |m| {
        m.spec.model.uri = "s3://bucket/x".into()
    }),
    ("spec.model.uri", |m| m.spec.model.uri = "hf://".into()),
    ("spec.model.uri", |m| m.spec.model.uri = "a\0b".into()),
    ("spec.model.servedNames[1]", |m| {
        m.spec.model.served_names = vec!["a".into(), "a".into()];
    }),
    ("spec.model.servedNames[0]", |m| {
        m.spec.model.served_names = vec!["a b".into()]
    }),
    ("spec.model.maxModelLen", |m| {
        m.spec.model.max_model_len = Some(1)
    }),
    ("spec.workers.count", |m| m.spec.workers.count = Some(0)),
    ("spec.workers.count", |m| m.spec.workers.count = Some(1025)),
    ("spec.workers.redundantSlots", |m| {
        m.spec.workers.redundant_slots = Some(5000)
    }),
    ("spec.workers.threads", |m| m.spec.workers.threads = Some(0)),
    ("spec.workers.maxNumSeqs", |m| {
        m.spec.workers.max_num_seqs = Some(0)
    }),
    ("spec.workers.maxNumBatchedTokens", |m| {
        m.spec.workers.max_num_batched_tokens = Some(0);
    }),
    ("spec.workers.overtakeMs", |m| {
        m.spec.workers.overtake_ms = Some(60_001)
    }),
    ("spec.workers.maxWaiting", |m| {
        m.spec.workers.max_waiting = Some(0)
    }),
    ("spec.workers.pageTokens", |m| {
        m.spec.workers.page_tokens = Some(24)
    }),
    ("spec.workers.pageTokens", |m| {
        m.spec.workers.page_tokens = Some(512)
    }),
    ("spec.workers.kvMemory", |m| {
        m.spec.workers.kv_memory = Some("512MiB".into())
    }),
    ("spec.workers.kvMemory", |m| {
        m.spec.workers.kv_memory = Some("1".into())
    }),
    ("spec.workers.exchangeDeadlineMs", |m| {
        m.spec.workers.exchange_deadline_ms = Some(0);
    }),
    ("spec.workers.domains", |m| {
        m.spec.workers.domains = vec!["a".into()]
    }),
    ("spec.workers.domains[1]", |m| {
        m.spec.workers.domains = vec!["a".into(), String::new()];
    }),
    ("spec.gateway.maxInFlight", |m| {
        m.spec.gateway.max_in_flight = Some(0)
    }),
    ("spec.gateway.maxQueued", |m| {
        m.spec.gateway.max_queued = Some(2_000_000)
    }),
    ("spec.gateway.queueTimeoutMs", |m| {
        m.spec.gateway.queue_timeout_ms = Some(0)
    }),
    ("spec.gateway.requestTimeoutMs", |m| {
        m.spec.gateway.request_timeout_ms = Some(0)
    }),
    ("spec.gateway.traffic.requestsPerMinute", |m| {
        m.spec.gateway.traffic.requests_per_minute = Some(0);
    }),
    ("spec.gateway.traffic.tokensPerMinute", |m| {
        m.spec.gateway.traffic.tokens_per_minute = Some(0);
    }),
    ("spec.gateway.traffic.mostUrgentPriority", |m| {
        m.spec.gateway.traffic.most_urgent_priority = Some(i64::MIN);
    }),
    ("spec.gateway.traffic.objectives[chat]", |m| {
        m.spec.gateway.traffic.objectives = [("chat".to_owned(), i64::MAX)].into();
    }),
    ("spec.gateway.traffic.objectives", |m| {
        m.spec.gateway.traffic.objectives = (0..65).map(|i| (i.to_string(), i)).collect();
    }),
    ("spec.gateway.traffic.tenants", |m| {
        m.spec.gateway.traffic.tenants = (0..65).map(|i| tenant(&i.to_string())).collect();
    }),
    ("spec.gateway.traffic.tenants[0].name", |m| {
        m.spec.gateway.traffic.tenants = vec![tenant("two words")];
    }),
    ("spec.gateway.traffic.tenants[1].name", |m| {
        m.spec.gateway.traffic.tenants = vec![tenant("a"), tenant("a")];
    }),
    ("spec.gateway.traffic.tenants[0].weight", |m| {
        m.spec.gateway.traffic.tenants = vec![TenantSpec {
            weight: Some(0),
            ..tenant("a")
        }];
    }),
    ("spec.gateway.traffic.tenants[1].tokensPerMinute", |m| {
        let wrong = TenantSpec {
            tokens_per_minute: Some(0),
            ..tenant("b")
        };
        m.spec.gateway.traffic.tenants = vec![tenant("a"), wrong];
    }),
    ("spec.gateway.traffic.tenants[0].mostUrgentPriority", |m| {
        m.spec.gateway.traffic.tenants = vec![TenantSpec {
            most_urgent_priority: Some(i64::MAX),
            ..tenant("a")
        }];
    }),
    ("spec.balancing.windowMs", |m| {
        m.spec.balancing.window_ms = Some(1)
    }),
    ("spec.balancing.threshold", |m| {
        m.spec.balancing.threshold = Some(1.01)
    }),
    ("spec.balancing.threshold", |m| {
        m.spec.balancing.threshold = Some(0.0)
    }),
    ("spec.balancing.threshold", |m| {
        m.spec.balancing.threshold = Some(f64::NAN)
    }),
    ("spec.balancing.maxMovesPerLayer", |m| {
        m.spec.balancing.max_moves_per_layer = Some(9999);
    }),
    ("spec.balancing.minRows", |m| {
        m.spec.balancing.min_rows = Some(u64::MAX)
    }),
    ("spec.balancing.cover", |m| {
        m.spec.balancing.cover = Some(Cover::All);
        m.spec.workers.count = Some(1);
    }),
    ("spec.balancing.cover", |m| {
        m.spec.balancing.cover = Some(Cover::All);
        m.spec.workers.domains = vec!["a".into(), "a".into()];
    }),
    ("spec.balancing.maxMoveBytes", |m| {
        m.spec.balancing.max_move_bytes = Some("2GiB".into())
    }),
    ("spec.balancing.maxMoveBytes", |m| {
        m.spec.balancing.max_move_bytes = Some("0".into())
    }),
    ("spec.balancing.economy.horizonSeconds", |m| {
        m.spec.balancing.economy = Some(EconomySpec {
            horizon_seconds: Some(0),
            ..EconomySpec::default()
        });
    }),
    ("spec.balancing.economy.bandwidth", |m| {
        m.spec.balancing.economy = Some(EconomySpec {
            bandwidth: Some("fast".into()),
            ..EconomySpec::default()
        });
    }),
    ("spec.balancing.economy.expertsPercent", |m| {
        m.spec.balancing.economy = Some(EconomySpec {
            experts_percent: Some(101),
            ..EconomySpec::default()
        });
    }),
    ("spec.balancing.economy.slowdownPercent", |m| {
        m.spec.balancing.economy = Some(EconomySpec {
            slowdown_percent: Some(101),
            ..EconomySpec::default()
        });
    }),
    ("spec.model.uri", |m| m.spec.model.uri = "pvc:///x".into()),
    ("spec.model.cacheClaim", |m| {
        m.spec.model.cache_claim = Some("A".into())
    }),
    ("spec.model.tokenSecret", |m| {
        m.spec.model.token_secret = Some(String::new())
    }),
    ("spec.workers.domainLabel", |m| {
        m.spec.workers.domain_label = Some("a b".into())
    }),
    ("spec.workers.resources.limits[cpu]", |m| {
        m.spec.workers.resources.limits = amounts(&[("cpu", "many")])
    }),
    ("spec.workers.resources", |m| {
        m.spec.workers.resources.requests = amounts(&[("cpu", "2")]);
        m.spec.workers.resources.limits = amounts(&[("cpu", "1500m")]);
    }),
    ("spec.workers.kvMemory", |m| {
        m.spec.workers.resources.limits = amounts(&[("memory", "512Mi")])
    }),
    ("spec.gateway.replicas", |m| {
        m.spec.gateway.replicas = Some(0)
    }),
    ("spec.gateway.resources.requests.cpu", |m| {
        m.spec.gateway.autoscaling = Some(AutoscalingSpec::default())
    }),
    ("spec.gateway.autoscaling", |m| {
        m.spec.gateway.resources.requests = amounts(&[("cpu", "1")]);
        m.spec.gateway.autoscaling = Some(AutoscalingSpec {
            min_replicas: Some(5),
            ..AutoscalingSpec::default()
        });
    }),
    ("spec.gateway.autoscaling.cpuPercent", |m| {
        m.spec.gateway.resources.requests = amounts(&[("cpu", "1")]);
        m.spec.gateway.autoscaling = Some(AutoscalingSpec {
            cpu_percent: Some(0),
            ..AutoscalingSpec::default()
        });
    }),
    ("spec.pods.labels[foregate.dev/x]", |m| {
        m.spec
            .pods
            .labels
            .insert("foregate.dev/x".into(), "y".into());
    }),
];

fn amounts(pairs: &[(&str, &str)]) -> BTreeMap<String, Quantity> {
    let pairs = pairs.iter();
    pairs
        .map(|(name, text)| ((*name).to_owned(), Quantity((*text).to_owned())))
        .collect()
}

#[test]
fn limits_of_memory_are_those_of_the_vocabulary() {
    for limit in [limits::KV_MEMORY, limits::MAX_MOVE_BYTES, limits::BANDWIDTH] {
        let [low, high] = [limit.low, limit.high].map(|text| parse_bytes(text).unwrap());
        let default = parse_bytes(limit.default.unwrap_or(limit.low)).unwrap();
        assert!(low <= default && default < high, "{}", limit.field);
    }
}

#[test]
fn what_balancing_says_is_heard() {
    let mut manifest = manifest();
    manifest.spec.balancing = BalancingSpec {
        cover: Some(Cover::All),
        max_move_bytes: Some("2Gi".into()),
        economy: Some(EconomySpec {
            bandwidth: Some("125M".into()),
            ..EconomySpec::default()
        }),
        strict: Some(true),
        ..BalancingSpec::default()
    };
    let balancing = validate(manifest).unwrap().balancing;
    assert_eq!(balancing.cover, Cover::All);
    assert_eq!(balancing.max_move_bytes, Some(2 << 30));
    assert!(balancing.strict);
    let wanted = EconomyConfig {
        horizon_seconds: 300,
        bandwidth: Some(125_000_000),
        experts_percent: 50,
        slowdown_percent: 10,
    };
    assert_eq!(balancing.economy, Some(wanted));
}

#[test]
fn each_wrong_value_is_found_alone_with_a_remedy() {
    for (field, change) in WRONG {
        let mut manifest = manifest();
        change(&mut manifest);
        let Findings(findings) = validate(manifest).unwrap_err();
        let fields: Vec<&str> = findings.iter().map(|f| f.field.as_str()).collect();
        assert_eq!(fields, [*field], "{findings:?}");
        assert!(!findings[0].remedy.is_empty() && !findings[0].what.is_empty());
    }
}

#[test]
fn all_findings_come_at_once_one_per_line() {
    let mut manifest = manifest();
    manifest.metadata.name = "Tiny".into();
    manifest.spec.workers.count = Some(0);
    manifest.spec.balancing.threshold = Some(7.0);
    let text = validate(manifest).unwrap_err().to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(
        lines[1].starts_with("spec.workers.count: is 0; give 1 to 1024"),
        "{text}"
    );
}

#[test]
fn served_name_of_uris() {
    for (uri, name) in [
        ("hf://Qwen/Qwen3-30B-A3B@main", "Qwen3-30B-A3B"),
        ("Qwen/Qwen3-30B-A3B", "Qwen3-30B-A3B"),
        ("file:///models/my model/", "my-model"),
        ("/", "model"),
        ("..", "model"),
        ("./a@b", "a@b"),
    ] {
        let mut manifest = manifest();
        manifest.spec.model.uri = uri.into();
        assert_eq!(
            validate(manifest).unwrap().model.served_names,
            [name],
            "{uri}"
        );
    }
}

proptest! {
    #[test]
    fn no_strings_panic(name in "\\PC{0,70}", uri in "\\PC{0,40}", kv in "\\PC{0,10}", threshold: f64) {
        let mut manifest = manifest();
        manifest.metadata.name = name;
        manifest.spec.model.uri = uri;
        manifest.spec.workers.kv_memory = Some(kv);
        manifest.spec.balancing.threshold = Some(threshold);
        if let Ok(cluster) = validate(manifest) {
            prop_assert!(!cluster.model.served_names.is_empty());
            prop_assert!(cluster.balancing.threshold > 0.0 && cluster.balancing.threshold <= 1.0);
        }
    }
}
