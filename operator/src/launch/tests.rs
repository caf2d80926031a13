use foregate_api::manifest::{EconomySpec, Manifest, Quantity};
use foregate_api::weights::{PlainFormat, Quantization, WeightSettings};

use super::*;
use crate::{parse_manifest, validate};

const DEMO: ModelFacts = ModelFacts {
    experts: 32,
    max_positions: 1024,
    kv_bytes_per_token: 4096,
    slot_bytes: 1 << 20,
    dense_bytes: 1 << 20,
};

fn cluster(change: impl FnOnce(&mut Manifest)) -> ValidatedCluster {
    let text = include_str!("../../../charts/examples/tiny.yaml");
    let mut manifest = parse_manifest(text).unwrap();
    change(&mut manifest);
    validate(manifest).unwrap()
}

fn place(form: Form) -> Place {
    Place {
        form,
        model_dir: "/models/demo".to_owned(),
        gateway_listen: "127.0.0.1:8000".to_owned(),
        keys: None,
        api_keys: None,
        machine: Machine::Shared {
            cores: 8,
            memory: Some(16 << 30),
        },
    }
}

#[test]
fn a_plan_beyond_the_machine_is_refused_with_the_sum() {
    let wanted = |quantity: &str| cluster(|m| m.spec.workers.kv_memory = Some(quantity.into()));
    let form = || place(Form::InProcess);
    assert!(launch(&wanted("7Gi"), &DEMO, &form()).is_ok());
    let error = launch(&wanted("8Gi"), &DEMO, &form()).unwrap_err();
    assert!(matches!(
        error,
        LaunchError::MachineMemory {
            attending: 2,
            holding: 2,
            ..
        }
    ));
    assert!(
        error.to_string().contains("spec.workers.kvMemory"),
        "{error}"
    );
    let unknown = Place {
        machine: Machine::Shared {
            cores: 8,
            memory: None,
        },
        ..form()
    };
    assert!(launch(&wanted("8Gi"), &DEMO, &unknown).is_ok());
}

fn workers(plan: &LaunchPlan) -> Vec<&WorkerConfig> {
    let roles = plan.instances.iter().map(|instance| &instance.node.role);
    roles
        .filter_map(|role| match role {
            RoleConfig::Worker(worker) => Some(worker),
            RoleConfig::Operator(_) | RoleConfig::Gateway(_) => None,
        })
        .collect()
}

#[test]
fn one_operator_all_workers_one_gateway() {
    let cluster = cluster(|m| m.spec.workers.domains = vec!["a".into(), "b".into()]);
    let plan = launch(&cluster, &DEMO, &place(Form::InProcess)).unwrap();
    let names: Vec<&str> = plan.instances.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["operator", "worker-0", "worker-1", "gateway"]);
    assert!(plan.instances.iter().all(|i| i.node.cluster == "tiny"));
    assert!(
        plan.instances
            .iter()
            .all(|i| i.node.store == StoreConfig::InProcess)
    );
    let workers = workers(&plan);
    assert_eq!(workers[1].rank, Rank(1));
    assert_eq!(workers[1].domain, "b");
    assert_eq!(workers[0].fabric, FabricKind::Local);
    assert_eq!((workers[0].threads, workers[0].slots), (4, 18));
    assert_eq!(workers[0].max_model_len, 1024);
    assert_eq!(workers[0].served_name, cluster.model.served_names[0]);
    assert!(plan.notes.is_empty(), "{:?}", plan.notes);
}

#[test]
fn processes_meet_in_etcd_over_tcp() {
    let etcd = vec!["http://127.0.0.1:2379".to_owned()];
    let form = Form::Processes { etcd: etcd.clone() };
    let plan = launch(&cluster(|_| ()), &DEMO, &place(form)).unwrap();
    let store = StoreConfig::Etcd {
        endpoints: etcd,
        tls: None,
    };
    assert!(plan.instances.iter().all(|i| i.node.store == store));
    assert!(workers(&plan).iter().all(|w| w.fabric == FabricKind::Tcp));
}

#[test]
fn slots_by_the_rule_or_by_wish() {
    let slots = |count, redundant, experts| {
        let cluster = cluster(|m| {
            m.spec.workers.count = Some(count);
            m.spec.workers.redundant_slots = redundant;
        });
        let model = ModelFacts { experts, ..DEMO };
        let plan = launch(&cluster, &model, &place(Form::InProcess)).unwrap();
        (workers(&plan)[0].slots, plan.notes.len())
    };
    // 1 + ⌈31/4⌉ = 9; the rule's smallest.
    assert_eq!(slots(4, None, 32), (9, 0));
    assert_eq!(slots(1, None, 32), (32, 0));
    assert_eq!(slots(8, None, 4), (2, 0));
    assert_eq!(
        slots(4, Some(0), 32),
        (8, 1),
        "told that the workers are not linked"
    );
    assert_eq!(slots(4, Some(100), 32), (32, 0));
    assert_eq!(
        slots(5, Some(0), 32),
        (7, 1),
        "7 × 5 = 35 hold 32, but 1 + ⌈31/5⌉ = 8 link"
    );
}

/// Of five workers one runs attention only, two hold experts only: memory and slots are counted for those that need them.
#[test]
fn divided_duties_share_experts_among_those_that_hold_them() {
    let divided = |kv: &str| {
        cluster(|m| {
            m.spec.workers.count = Some(5);
            m.spec.workers.attention_only = Some(1);
            m.spec.workers.expert_only = Some(2);
            m.spec.workers.redundant_slots = Some(0);
            m.spec.workers.kv_memory = Some(kv.to_owned());
        })
    };
    let plan = launch(&divided("5Gi"), &DEMO, &place(Form::InProcess)).unwrap();
    let told: Vec<(Duty, u32)> = workers(&plan).iter().map(|w| (w.duty, w.slots)).collect();
    let each = DEMO.experts / 4;
    assert_eq!(
        told,
        [
            (Duty::Attention, 0),
            (Duty::Experts, each),
            (Duty::Experts, each),
            (Duty::Both, each),
            (Duty::Both, each),
        ]
    );
    // Three of five have keys and values: 15 of 16 GiB, and not 18.
    let error = launch(&divided("6Gi"), &DEMO, &place(Form::InProcess)).unwrap_err();
    assert!(
        matches!(
            error,
            LaunchError::MachineMemory {
                attending: 3,
                holding: 4,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_cover_of_all_takes_slots_for_two_copies_in_two_domains() {
    let with = |cover, domains: &[&str], redundant, strict| {
        let cluster = cluster(|m| {
            m.spec.workers.count = Some(4);
            m.spec.workers.domains = domains.iter().map(|d| (*d).to_owned()).collect();
            m.spec.workers.redundant_slots = redundant;
            m.spec.balancing.cover = Some(cover);
            m.spec.balancing.strict = Some(strict);
        });
        launch(&cluster, &DEMO, &place(Form::InProcess))
    };
    let slots = |cover, domains, redundant, strict| {
        let plan = with(cover, domains, redundant, strict).unwrap();
        (workers(&plan)[0].slots, plan.notes.len())
    };
    assert_eq!(slots(Cover::Spread, &[], None, false), (9, 0));
    // ⌈2·32/4⌉ where all domains are alike; the one worker of b must hold all of 32.
    assert_eq!(slots(Cover::All, &[], None, true), (16, 0));
    assert_eq!(
        slots(Cover::All, &["a", "a", "a", "b"], None, true),
        (32, 0)
    );
    assert_eq!(slots(Cover::All, &[], Some(8), true), (16, 0));
    assert_eq!(slots(Cover::All, &[], Some(7), false), (15, 1));
    let error = with(Cover::All, &[], Some(7), true).unwrap_err();
    let text = error.to_string();
    for part in [
        "spec.balancing.strict: 15 expert slots",
        "linking 4 workers that hold experts takes 1 + ⌈(32 − 1)/4⌉ = 9",
        "two failure domains take 16",
        "redundantSlots to 8 (1048576 bytes more",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(with(Cover::Spread, &[], Some(0), true).is_err());
    assert_eq!(slots(Cover::Spread, &[], Some(1), true), (9, 0));
}

#[test]
fn the_operator_is_told_what_balancing_says() {
    let cluster = cluster(|m| {
        m.spec.balancing.cover = Some(Cover::None);
        m.spec.balancing.max_move_bytes = Some("3Mi".to_owned());
        m.spec.balancing.economy = Some(EconomySpec::default());
    });
    let plan = launch(&cluster, &DEMO, &place(Form::InProcess)).unwrap();
    let RoleConfig::Operator(told) = &plan.instances[0].node.role else {
        panic!("the operator comes first");
    };
    assert_eq!(told.cover, Cover::None);
    assert_eq!(told.max_move_bytes, Some(3 << 20));
    assert_eq!(told.economy, cluster.balancing.economy);
    assert!(told.economy.is_some_and(|e| e.horizon_seconds == 300));
}

#[test]
fn all_workers_are_told_the_same_of_weights() {
    let cluster = cluster(|m| {
        m.spec.model.dtype = Some(PlainFormat::Float32);
        m.spec.model.quantization = Some(Quantization::Int4);
        m.spec.workers.count = Some(4);
    });
    let plan = launch(&cluster, &DEMO, &place(Form::InProcess)).unwrap();
    let told = WeightSettings {
        dtype: PlainFormat::Float32,
        quantization: Quantization::Int4,
    };
    assert_eq!(workers(&plan).len(), 4);
    assert!(workers(&plan).iter().all(|worker| worker.weights == told));
}

#[test]
fn weights_that_every_worker_holds_count_for_each() {
    let with = |dense_bytes| {
        let model = ModelFacts {
            dense_bytes,
            ..DEMO
        };
        launch(&cluster(|_| ()), &model, &place(Form::InProcess))
    };
    assert!(with(7 << 30).is_ok());
    let error = with(8 << 30).unwrap_err().to_string();
    assert!(error.contains("other weights 8589934592 bytes"), "{error}");
    assert!(error.contains("spec.model.quantization"), "{error}");
}

#[test]
fn threads_are_never_none() {
    let cluster = cluster(|m| m.spec.workers.count = Some(16));
    let plan = launch(&cluster, &DEMO, &place(Form::InProcess)).unwrap();
    assert_eq!(workers(&plan)[0].threads, 1);
}

#[test]
fn lengths_that_do_not_fit_show_the_sum() {
    let with = |length, memory: &str| {
        let cluster = cluster(|m| {
            m.spec.model.max_model_len = length;
            m.spec.workers.kv_memory = Some(memory.to_owned());
        });
        launch(&cluster, &DEMO, &place(Form::InProcess))
    };
    let error = with(Some(2000), "128Mi").unwrap_err().to_string();
    assert!(
        error.contains("maxModelLen is 2000") && error.contains("1024"),
        "{error}"
    );
    // 1 MiB holds 256 tokens of 4 KiB.
    let error = with(Some(500), "1Mi").unwrap_err().to_string();
    assert!(
        error.contains("32 pages of 16 tokens × 65536 bytes = 2097152 bytes"),
        "{error}"
    );
    let plan = with(None, "1Mi").unwrap();
    assert_eq!(workers(&plan)[0].max_model_len, 256);
    assert!(
        plan.notes[0].contains("256 of the model's 1024"),
        "{:?}",
        plan.notes
    );
    // A gateway promises what the workers can do.
    let RoleConfig::Gateway(gateway) = &plan.instances.last().unwrap().node.role else {
        panic!("the gateway comes last");
    };
    assert_eq!(gateway.max_model_len, 256);
    let huge = ModelFacts {
        kv_bytes_per_token: 1 << 40,
        ..DEMO
    };
    let one = launch(&cluster(|_| ()), &huge, &place(Form::InProcess));
    assert!(
        matches!(one, Err(LaunchError::KvMemory { tokens: 1, .. })),
        "{one:?}"
    );
}

#[test]
fn pages_shorter_than_a_block_of_keys_are_counted_as_large_as_they_are() {
    let with = |page_tokens| {
        let cluster = cluster(|m| {
            m.spec.workers.page_tokens = Some(page_tokens);
            m.spec.workers.kv_memory = Some("1280Ki".to_owned());
        });
        let plan = launch(&cluster, &DEMO, &place(Form::InProcess)).unwrap();
        workers(&plan)[0].max_model_len
    };
    // A page of 4 tokens takes 16 tokens' keys and 4 tokens' values: 40 KiB, of which 32 fit.
    assert_eq!(with(4), 128);
    // From a whole block on nothing is lost: 20 pages of 64 KiB, 10 of 128 KiB.
    assert_eq!(with(16), 320);
    assert_eq!(with(32), 320);
}

#[test]
fn pods_have_known_ports_and_live_on_their_resources() {
    let form = Form::Pods {
        etcd: vec!["http://etcd:2379".to_owned()],
        etcd_tls: None,
        cluster: "default.tiny.1".to_owned(),
    };
    let pods = Place {
        machine: Machine::Pods,
        ..place(form)
    };
    let wanted = |cpu: &str, memory: &str| {
        cluster(|m| {
            let limits = &mut m.spec.workers.resources.limits;
            limits.insert("cpu".to_owned(), Quantity(cpu.to_owned()));
            limits.insert("memory".to_owned(), Quantity(memory.to_owned()));
        })
    };
    let plan = launch(&wanted("3500m", "1Gi"), &DEMO, &pods).unwrap();
    assert_eq!(plan.instances[1].node.cluster, "default.tiny.1");
    assert_eq!(plan.instances[1].node.status_listen, "0.0.0.0:9090");
    let workers = workers(&plan);
    assert_eq!(workers[0].threads, 3);
    assert_eq!(workers[0].rpc_listen, "0.0.0.0:7070");
    assert_eq!(workers[0].fabric, FabricKind::Tcp);
    // 128 Mi of keys and values, 18 slots of 1 Mi, 1 Mi of other weights.
    let error = launch(&wanted("1", "140Mi"), &DEMO, &pods).unwrap_err();
    assert!(error.to_string().contains("= 154140672 bytes"), "{error}");
    let plan = launch(&cluster(|_| {}), &DEMO, &pods).unwrap();
    assert!(
        plan.notes.iter().any(|note| note.contains("one thread")),
        "{:?}",
        plan.notes
    );
}
