//! What all pods have in common, and the ConfigMaps with their node files.

use std::collections::BTreeMap;

use foregate_api::manifest::{PodsSpec, TaintEffect, TolerationSpec};
use foregate_api::node::NodeConfig;
use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMap, ConfigMapVolumeSource, Container, EmptyDirVolumeSource, EnvVar,
    EnvVarSource, HTTPGetAction, LocalObjectReference, ObjectFieldSelector, PodSecurityContext,
    PodSpec, Probe, ResourceRequirements, SeccompProfile, SecurityContext, Toleration, Volume,
    VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Component, Defaults, Owner};
use crate::source::Source;
use crate::validate::Resources;

/// Where the node file is mounted.
const FOLDER: &str = "/etc/foregate";
/// Its name.
const FILE: &str = "node.json";
/// The path of the node file.
pub(super) const NODE_FILE: &str = "/etc/foregate/node.json";
/// Seconds that a pod stays with a node that nobody hears of. Kubernetes' own 300 are for pods that would lose more than
/// they gain by a start elsewhere; here others wait for the experts of a rank.
const PATIENCE: i64 = 10;
/// Taints of such a node.
const SILENT: [&str; 2] = [
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
];
/// Who runs in the containers: nobody in particular, and not root.
const USER: i64 = 65532;

/// The ConfigMap with one instance's node file.
pub(super) fn config_map(
    owner: &Owner,
    name: &str,
    component: Component,
    node: &NodeConfig,
) -> Result<ConfigMap, serde_json::Error> {
    let text = serde_json::to_string_pretty(node)?;
    Ok(ConfigMap {
        metadata: owner.meta(name.to_owned(), component),
        data: Some(BTreeMap::from([(FILE.to_owned(), text)])),
        ..ConfigMap::default()
    })
}

/// The image of pods that have none of their own.
pub(super) fn image<'a>(pods: &'a PodsSpec, defaults: &'a Defaults) -> &'a str {
    pods.image.as_deref().unwrap_or(&defaults.image)
}

/// A pod of one container, whose image also fetches the model, as restricted as it can be: not root, nothing to write to but volumes, no rights, no token of
/// the API.
pub(super) fn pod(pods: &PodsSpec, source: &Source, container: Container) -> PodSpec {
    let init = source.fetch().map(|(arguments, env)| {
        let image = container.image.clone().unwrap_or_default();
        let mut init = self::container("fetch", arguments, pods, &image);
        init.env.get_or_insert_default().extend(env);
        let mounts = init.volume_mounts.get_or_insert_default();
        mounts.extend(source.mounts(true));
        vec![init]
    });
    let mut volumes = vec![Volume {
        name: "tmp".to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Volume::default()
    }];
    volumes.extend(source.volumes());
    let mut container = container;
    let mounts = container.volume_mounts.get_or_insert_default();
    mounts.extend(source.mounts(false));
    let secret = |name: &String| LocalObjectReference { name: name.clone() };
    PodSpec {
        init_containers: init,
        containers: vec![container],
        volumes: Some(volumes),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                ..SeccompProfile::default()
            }),
            ..PodSecurityContext::default()
        }),
        image_pull_secrets: some(pods.image_pull_secrets.iter().map(secret).collect()),
        node_selector: (!pods.node_selector.is_empty()).then(|| pods.node_selector.clone()),
        tolerations: some(tolerations(&pods.tolerations)),
        priority_class_name: pods.priority_class_name.clone(),
        ..PodSpec::default()
    }
}

/// A container of one of our images.
pub(super) fn container(
    name: &str,
    arguments: Vec<String>,
    pods: &PodsSpec,
    image: &str,
) -> Container {
    let own = pods.env.iter().map(|(name, value)| EnvVar {
        name: name.clone(),
        value: Some(value.clone()),
        ..EnvVar::default()
    });
    Container {
        name: name.to_owned(),
        image: Some(image.to_owned()),
        image_pull_policy: pods
            .image_pull_policy
            .map(|policy| policy.name().to_owned()),
        args: Some(arguments),
        env: some(own.collect()),
        volume_mounts: Some(vec![mount("tmp", "/tmp", false)]),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities {
                drop: Some(vec!["ALL".to_owned()]),
                ..Capabilities::default()
            }),
            ..SecurityContext::default()
        }),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        ..Container::default()
    }
}

/// Mounts the node file of a ConfigMap.
pub(super) fn with_node_file(spec: &mut PodSpec, config_map: &str) {
    spec.volumes.get_or_insert_default().push(Volume {
        name: "config".to_owned(),
        config_map: Some(ConfigMapVolumeSource {
            name: config_map.to_owned(),
            ..ConfigMapVolumeSource::default()
        }),
        ..Volume::default()
    });
    for container in &mut spec.containers {
        let mounts = container.volume_mounts.get_or_insert_default();
        mounts.push(mount("config", FOLDER, true));
    }
}

/// Shared memory, which libraries between devices expect to be larger than the runtime makes it.
pub(super) fn with_shared_memory(spec: &mut PodSpec) {
    spec.volumes.get_or_insert_default().push(Volume {
        name: "dshm".to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium: Some("Memory".to_owned()),
            ..EmptyDirVolumeSource::default()
        }),
        ..Volume::default()
    });
    for container in &mut spec.containers {
        let mounts = container.volume_mounts.get_or_insert_default();
        mounts.push(mount("dshm", "/dev/shm", false));
    }
}

pub(super) fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

/// A variable that the pod learns of itself.
pub(super) fn of_pod(name: &str, field: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                field_path: field.to_owned(),
                ..ObjectFieldSelector::default()
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    }
}

/// Asks a path of a named port.
pub(super) fn probe(path: &str, port: &str, period: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(port.to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(5),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}

pub(super) fn requirements(resources: &Resources) -> Option<ResourceRequirements> {
    let amounts = |of: &BTreeMap<String, String>| {
        let pairs = of
            .iter()
            .map(|(name, text)| (name.clone(), Quantity(text.clone())));
        (!of.is_empty()).then(|| pairs.collect())
    };
    let requirements = ResourceRequirements {
        requests: amounts(&resources.requests),
        limits: amounts(&resources.limits),
        ..ResourceRequirements::default()
    };
    (requirements != ResourceRequirements::default()).then_some(requirements)
}

/// The manifest's, and how long a silent node is waited for where it does not say so.
fn tolerations(given: &[TolerationSpec]) -> Vec<Toleration> {
    let said = |taint: &str| {
        let of = |key: &Option<String>| key.as_deref().is_none_or(|key| key == taint);
        let always = |effect: TaintEffect| effect == TaintEffect::NoExecute;
        given
            .iter()
            .any(|one| of(&one.key) && one.effect.is_none_or(always))
    };
    let waited = SILENT.iter().filter(|taint| !said(taint));
    let waited = waited.map(|taint| Toleration {
        key: Some((*taint).to_owned()),
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        toleration_seconds: Some(PATIENCE),
        value: None,
    });
    given.iter().map(toleration).chain(waited).collect()
}

fn toleration(spec: &TolerationSpec) -> Toleration {
    let TolerationSpec {
        key,
        operator,
        value,
        effect,
        toleration_seconds,
    } = spec;
    Toleration {
        key: key.clone(),
        operator: operator.map(|operator| operator.name().to_owned()),
        value: value.clone(),
        effect: effect.map(|effect| effect.name().to_owned()),
        toleration_seconds: *toleration_seconds,
    }
}

/// A list, or nothing instead of an empty one.
fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}
