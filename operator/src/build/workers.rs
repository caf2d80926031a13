//! Workers: a pod and a ConfigMap per rank, and the headless Service that names them.

use foregate_api::ids::Rank;
use foregate_api::manifest::DeviceClass;
use foregate_api::node::{NodeConfig, RoleConfig, WorkerConfig};
use foregate_api::tls::TlsRole;
use k8s_openapi::api::core::v1::{
    Affinity, ContainerPort, NodeAffinity, NodeSelector, NodeSelectorRequirement,
    NodeSelectorTerm, Pod, PodSpec, Service, ServicePort, ServiceSpec,
    TopologySpreadConstraint,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{
    CONFIG, Component, Inputs, Object, Prepared, RANK, RankPod, SLOTS, certificates, config,
    hash,
};
use crate::launch::ports;
use crate::source::Source;

/// A worker takes up to 20 s to finish its sequences, and a few more to leave; then it is killed.
const GRACE: i64 = 45;

/// Name of a rank's pod, and of its ConfigMap.
pub(crate) fn name(cluster: &str, rank: Rank) -> String {
    format!("{cluster}-worker-{rank}")
}

/// The headless Service.
fn service_name(inputs: &Inputs<'_>) -> String {
    format!("{}-workers", inputs.owner.name)
}

pub(super) fn build(
    inputs: &Inputs<'_>,
    source: &Source,
    prepared: &mut Prepared,
) -> Result<(), serde_json::Error> {
    prepared.objects.push(Object::of(&service(inputs))?);
    for instance in &inputs.plan.instances {
        let RoleConfig::Worker(worker) = &instance.node.role else {
            continue;
        };
        let rank = worker.rank;
        let mut worker = worker.clone();
        let there = inputs.slots.get(&rank).copied().unwrap_or_default();
        if worker.duty.holds_experts() {
            worker.slots = worker.slots.max(there);
        }
        let node = NodeConfig {
            role: RoleConfig::Worker(worker.clone()),
            ..instance.node.clone()
        };
        let name = name(&inputs.owner.name, rank);
        let map = config::config_map(inputs.owner, &name, Component::Worker, &node)?;
        prepared.objects.push(Object::of(&map)?);
        let spec = spec(inputs, source, &worker, &name);
        let config = hash(&serde_json::to_vec(&(&node, &spec, &inputs.cluster.pods))?);
        let pod = pod(inputs, &worker, name, spec, &config);
        prepared.pods.insert(rank, RankPod { pod, config });
    }
    Ok(())
}

fn pod(
    inputs: &Inputs<'_>,
    worker: &WorkerConfig,
    name: String,
    spec: PodSpec,
    config: &str,
) -> Pod {
    let mut metadata = inputs.owner.meta(name, Component::Worker);
    let labels = metadata.labels.get_or_insert_default();
    labels.extend(inputs.cluster.pods.labels.clone());
    labels.insert(RANK.to_owned(), worker.rank.to_string());
    let mut annotations = inputs.cluster.pods.annotations.clone();
    annotations.insert(CONFIG.to_owned(), config.to_owned());
    annotations.insert(SLOTS.to_owned(), worker.slots.to_string());
    annotations.insert("foregate.dev/model".to_owned(), worker.served_name.clone());
    metadata.annotations = Some(annotations);
    Pod {
        metadata,
        spec: Some(spec),
        ..Pod::default()
    }
}

fn spec(inputs: &Inputs<'_>, source: &Source, worker: &WorkerConfig, name: &str) -> PodSpec {
    let pods = &inputs.cluster.pods;
    let arguments = [
        "worker",
        "--config",
        config::NODE_FILE,
        "--host",
        "$(POD_IP)",
        "--domain",
        "$(NODE_NAME)",
    ];
    let mut container = config::container(
        "worker",
        arguments.map(str::to_owned).to_vec(),
        pods,
        image(inputs),
    );
    container.env.get_or_insert_default().extend([
        config::of_pod("POD_IP", "status.podIP"),
        config::of_pod("NODE_NAME", "spec.nodeName"),
        config::of_pod("RANK", &format!("metadata.labels['{RANK}']")),
    ]);
    container.ports = Some(vec![
        port("rpc", ports::RPC),
        port("exchange", ports::EXCHANGE),
        port("metrics", ports::STATUS),
    ]);
    container.resources = config::requirements(&inputs.cluster.workers.resources);
    container.liveness_probe = Some(config::probe("/healthz", "metrics", 10, 3));
    container.readiness_probe = Some(config::probe("/readyz", "metrics", 2, 1));
    let mut spec = config::pod(pods, source, container);
    config::with_node_file(&mut spec, name);
    certificates::with_keys(inputs, TlsRole::Worker, &mut spec);
    certificates::with_etcd_keys(inputs, &mut spec);
    config::with_shared_memory(&mut spec);
    spec.hostname = Some(name.to_owned());
    spec.subdomain = Some(service_name(inputs));
    spec.restart_policy = Some("Always".to_owned());
    spec.runtime_class_name.clone_from(&pods.runtime_class_name);
    spec.termination_grace_period_seconds = Some(GRACE);
    place(inputs, &worker.domain, &mut spec);
    spec
}

/// The image of workers: the manifest's for them or for all, or the operator's for what they compute on.
fn image<'a>(inputs: &Inputs<'a>) -> &'a str {
    let (workers, pods, defaults) = (
        &inputs.cluster.workers,
        &inputs.cluster.pods,
        inputs.defaults,
    );
    let default = match workers.device {
        DeviceClass::Cpu => &defaults.image,
        DeviceClass::Cuda => &defaults.cuda_image,
    };
    let own = workers.image.as_deref().or(pods.image.as_deref());
    own.unwrap_or(default)
}

/// To its failure domain, if the manifest says which; else spread over the domains that there are.
fn place(inputs: &Inputs<'_>, domain: &str, spec: &mut PodSpec) {
    let label = inputs.cluster.workers.domain_label.clone();
    if domain.is_empty() {
        spec.topology_spread_constraints = Some(vec![TopologySpreadConstraint {
            max_skew: 1,
            topology_key: label,
            when_unsatisfiable: "ScheduleAnyway".to_owned(),
            label_selector: Some(LabelSelector {
                match_labels: Some(inputs.owner.selector(Component::Worker)),
                ..LabelSelector::default()
            }),
            ..TopologySpreadConstraint::default()
        }]);
        return;
    }
    let there = NodeSelectorRequirement {
        key: label,
        operator: "In".to_owned(),
        values: Some(vec![domain.to_owned()]),
    };
    spec.affinity = Some(Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                node_selector_terms: vec![NodeSelectorTerm {
                    match_expressions: Some(vec![there]),
                    ..NodeSelectorTerm::default()
                }],
            }),
            ..NodeAffinity::default()
        }),
        ..Affinity::default()
    });
}

fn port(name: &str, number: u16) -> ContainerPort {
    ContainerPort {
        name: Some(name.to_owned()),
        container_port: i32::from(number),
        ..ContainerPort::default()
    }
}

/// Names of ranks also before they are ready: peers find each other through the store, people through the name.
fn service(inputs: &Inputs<'_>) -> Service {
    let port = |name: &str, number: u16| ServicePort {
        name: Some(name.to_owned()),
        port: i32::from(number),
        target_port: Some(IntOrString::String(name.to_owned())),
        ..ServicePort::default()
    };
    Service {
        metadata: inputs.owner.meta(service_name(inputs), Component::Worker),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            publish_not_ready_addresses: Some(true),
            selector: Some(inputs.owner.selector(Component::Worker)),
            ports: Some(vec![
                port("rpc", ports::RPC),
                port("exchange", ports::EXCHANGE),
                port("metrics", ports::STATUS),
            ]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}
