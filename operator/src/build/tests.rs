use std::path::Path;

use foregate_api::manifest::{DeviceClass, Manifest};
use foregate_api::model::ModelFacts;

use super::*;
use crate::launch::{Form, Machine, Place, folders, launch, ports};
use crate::{parse_manifest, validate};

const FACTS: ModelFacts = ModelFacts {
    experts: 32,
    max_positions: 1024,
    kv_bytes_per_token: 4096,
    slot_bytes: 1 << 20,
    dense_bytes: 1 << 20,
};

const IMAGE: &str = "ghcr.io/foregate/foregate:0.1.0";
const CUDA_IMAGE: &str = "ghcr.io/foregate/foregate:0.1.0-cuda";

fn owner(name: &str) -> Owner {
    Owner {
        name: name.to_owned(),
        namespace: "default".to_owned(),
        uid: "0c7e5a7e-1111-2222-3333-444455556666".to_owned(),
    }
}

fn prepared(manifest: Manifest, slots: &BTreeMap<Rank, u32>) -> Prepared {
    let owner = owner(&manifest.metadata.name);
    let cluster = validate(manifest).unwrap();
    let defaults = Defaults {
        image: IMAGE.to_owned(),
        cuda_image: CUDA_IMAGE.to_owned(),
        etcd: vec!["http://foregate-etcd.foregate.svc:2379".to_owned()],
        etcd_tls: None,
    };
    let place = Place {
        form: Form::Pods {
            etcd: defaults.etcd.clone(),
            etcd_tls: etcd_keys(defaults.etcd_tls.as_ref()),
            cluster: owner.store_name(),
        },
        keys: keys(&owner, &cluster),
        api_keys: cluster
            .security
            .api_keys
            .as_ref()
            .map(|_| folders::API_KEYS.to_owned()),
        model_dir: Source::of(&cluster.model).directory(),
        gateway_listen: format!("0.0.0.0:{}", ports::HTTP),
        machine: Machine::Pods,
    };
    let plan = launch(&cluster, &FACTS, &place).unwrap();
    let inputs = Inputs {
        owner: &owner,
        cluster: &cluster,
        plan: &plan,
        defaults: &defaults,
        slots,
    };
    let prepared = build(&inputs).unwrap();
    assert_eq!(
        prepared,
        build(&inputs).unwrap(),
        "the same input, the same objects"
    );
    prepared
}

fn example(name: &str) -> Manifest {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/examples");
    let text = std::fs::read_to_string(format!("{folder}/{name}.yaml")).unwrap();
    assert!(text.lines().count() <= 40, "an example is short");
    parse_manifest(&text).unwrap()
}

const EXAMPLES: [&str; 4] = ["tiny", "int8", "single-gpu", "hopper-8"];

/// Every object of every example, as it is applied; of the ranks' pods the first. `UPDATE_GOLDEN=1` writes them.
#[test]
fn objects_of_the_examples_are_as_recorded() {
    for name in EXAMPLES {
        let manifest = example(name);
        let inspector = {
            let cluster = validate(manifest.clone()).unwrap();
            let defaults = Defaults {
                image: IMAGE.to_owned(),
                cuda_image: CUDA_IMAGE.to_owned(),
                etcd: Vec::new(),
                etcd_tls: None,
            };
            inspector(&owner(name), &cluster, &defaults)
        };
        let prepared = prepared(manifest, &BTreeMap::new());
        let mut text = String::new();
        for object in &prepared.objects {
            let other_rank = object.name.contains("-worker-") && !object.name.ends_with("-0");
            if !other_rank {
                text += &format!("---\n{}", serde_yaml_ng::to_string(&object.body).unwrap());
            }
        }
        let pod = &prepared.pods[&Rank(0)].pod;
        for pod in [pod, &inspector] {
            text += &format!("---\n{}", serde_yaml_ng::to_string(pod).unwrap());
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/build/golden");
        let path = folder.join(format!("{name}.yaml"));
        #[expect(
            clippy::disallowed_methods,
            reason = "golden files are rewritten on demand"
        )]
        if std::env::var("UPDATE_GOLDEN").is_ok() {
            std::fs::write(&path, &text).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            golden == text,
            "{} differs: run with UPDATE_GOLDEN=1 and read the difference",
            path.display()
        );
    }
}

/// The restricted profile of Kubernetes' pod security standards, for every container of every pod.
#[test]
fn pods_are_restricted() {
    for name in EXAMPLES {
        let prepared = prepared(example(name), &BTreeMap::new());
        let templates = prepared
            .objects
            .iter()
            .filter_map(|object| object.body.pointer("/spec/template/spec"));
        let pods = prepared
            .pods
            .values()
            .map(|pod| serde_json::to_value(&pod.pod.spec).unwrap());
        let specs: Vec<Value> = templates.cloned().chain(pods).collect();
        assert!(specs.len() > 1);
        for spec in specs {
            assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
            assert_eq!(
                spec["securityContext"]["seccompProfile"]["type"],
                "RuntimeDefault"
            );
            assert_eq!(spec["automountServiceAccountToken"], false);
            for absent in ["hostNetwork", "hostPID", "hostIPC"] {
                assert!(spec.get(absent).is_none());
            }
            let containers = [&spec["containers"], &spec["initContainers"]];
            for container in containers.into_iter().filter_map(Value::as_array).flatten() {
                let context = &container["securityContext"];
                assert_eq!(context["allowPrivilegeEscalation"], false);
                assert_eq!(context["readOnlyRootFilesystem"], true);
                assert_eq!(context["capabilities"]["drop"][0], "ALL");
            }
            for volume in spec["volumes"].as_array().unwrap() {
                let kinds = [
                    "configMap",
                    "emptyDir",
                    "persistentVolumeClaim",
                    "image",
                    "secret",
                ];
                assert!(
                    kinds.iter().any(|kind| volume.get(kind).is_some()),
                    "{volume}"
                );
            }
        }
    }
}

#[test]
fn a_pod_keeps_the_slots_that_it_was_started_with() {
    let few = prepared(example("tiny"), &BTreeMap::new());
    let config = |prepared: &Prepared| prepared.pods[&Rank(0)].config.clone();
    // 16 + 2 slots are wanted.
    let more = prepared(example("tiny"), &BTreeMap::from([(Rank(0), 25)]));
    let fewer = prepared(example("tiny"), &BTreeMap::from([(Rank(0), 10)]));
    assert_ne!(config(&few), config(&more));
    assert_eq!(config(&few), config(&fewer));
    let slots = |prepared: &Prepared| prepared.pods[&Rank(0)].pod.annotations()[SLOTS].clone();
    assert_eq!(
        (slots(&few), slots(&more)),
        ("18".to_owned(), "25".to_owned())
    );
}

/// Images of a worker's containers, and of the gateway's.
fn images(prepared: &Prepared) -> (Vec<String>, String) {
    let spec = prepared.pods[&Rank(0)].pod.spec.as_ref().unwrap();
    let all = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten());
    let worker = all
        .map(|container| container.image.clone().unwrap())
        .collect();
    let gateway = prepared
        .objects
        .iter()
        .find_map(|object| {
            object
                .body
                .pointer("/spec/template/spec/containers/0/image")
        })
        .and_then(Value::as_str);
    (worker, gateway.unwrap().to_owned())
}

#[test]
fn workers_on_cards_have_an_image_of_their_own() {
    let cases = [
        (DeviceClass::Cpu, None, None, IMAGE, IMAGE),
        (DeviceClass::Cuda, None, None, CUDA_IMAGE, IMAGE),
        (DeviceClass::Cuda, Some("all"), None, "all", "all"),
        (
            DeviceClass::Cuda,
            Some("all"),
            Some("cards"),
            "cards",
            "all",
        ),
        (DeviceClass::Cpu, None, Some("own"), "own", IMAGE),
    ];
    for (device, all, workers, worker, gateway) in cases {
        // A model of the hub, so that there is a container that fetches it.
        let mut manifest = example("single-gpu");
        manifest.spec.workers.device = Some(device);
        manifest.spec.pods.image = all.map(str::to_owned);
        manifest.spec.workers.image = workers.map(str::to_owned);
        let prepared = prepared(manifest, &BTreeMap::new());
        let expected = (vec![worker.to_owned(); 2], gateway.to_owned());
        assert_eq!(
            images(&prepared),
            expected,
            "{device:?} {all:?} {workers:?}"
        );
    }
}

/// A change of one setting starts exactly what it is about anew.
#[test]
fn what_a_pod_is_made_from_is_in_its_hash() {
    let base = prepared(example("tiny"), &BTreeMap::new());
    type Change = fn(&mut Manifest);
    let changes: [(Change, bool); 5] = [
        (|m| m.spec.workers.max_num_seqs = Some(7), true),
        (|m| m.spec.pods.image = Some("other".to_owned()), true),
        (
            |m| drop(m.spec.pods.env.insert("A".to_owned(), "b".to_owned())),
            true,
        ),
        (|m| m.spec.gateway.max_queued = Some(7), false),
        (|m| m.spec.balancing.min_rows = Some(7), false),
    ];
    for (i, (change, anew)) in changes.into_iter().enumerate() {
        let mut manifest = example("tiny");
        change(&mut manifest);
        let other = prepared(manifest, &BTreeMap::new());
        let differs = base.pods[&Rank(1)].config != other.pods[&Rank(1)].config;
        assert_eq!(differs, anew, "change {i}");
    }
}
