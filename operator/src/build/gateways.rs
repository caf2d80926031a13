//! Gateways: a Deployment, its autoscaler, and the Service that clients call.

use foregate_api::node::RoleConfig;
use foregate_api::tls::TlsRole;
use k8s_openapi::api::apps::v1::{
    Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment,
};
use k8s_openapi::api::autoscaling::v2::{
    CrossVersionObjectReference, HorizontalPodAutoscaler, HorizontalPodAutoscalerSpec,
    MetricSpec, MetricTarget, ResourceMetricSource,
};
use k8s_openapi::api::core::v1::{
    ContainerPort, Lifecycle, LifecycleHandler, PodSpec, PodTemplateSpec, Service, ServicePort,
    ServiceSpec, SleepAction,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{CONFIG, Component, Inputs, Object, Prepared, certificates, config, hash};
use crate::launch::ports;
use crate::source::Source;
use crate::validate::Replicas;

/// Seconds between a pod's end and the first refused connection: load balancers learn of it in the meantime.
const LINGER: i64 = 5;
/// Longest life of requests of a gateway that ends.
const GRACE: i64 = 120;

/// Name of the Deployment and of what belongs to it.
pub(super) fn name(inputs: &Inputs<'_>) -> String {
    format!("{}-gateway", inputs.owner.name)
}

pub(super) fn build(
    inputs: &Inputs<'_>,
    source: &Source,
    prepared: &mut Prepared,
) -> Result<(), serde_json::Error> {
    let gateway = inputs
        .plan
        .instances
        .iter()
        .find(|instance| matches!(instance.node.role, RoleConfig::Gateway(_)));
    let Some(gateway) = gateway else {
        return Ok(());
    };
    let map = config::config_map(
        inputs.owner,
        &name(inputs),
        Component::Gateway,
        &gateway.node,
    )?;
    let node = hash(&serde_json::to_vec(&gateway.node)?);
    prepared.objects.extend([
        Object::of(&map)?,
        Object::of(&service(inputs))?,
        Object::of(&deployment(inputs, source, &node))?,
    ]);
    if let Some(autoscaler) = autoscaler(inputs) {
        prepared.objects.push(Object::of(&autoscaler)?);
    }
    Ok(())
}

fn deployment(inputs: &Inputs<'_>, source: &Source, node: &str) -> Deployment {
    let pods = &inputs.cluster.pods;
    let metadata = inputs.owner.meta(name(inputs), Component::Gateway);
    let mut labels = metadata.labels.clone().unwrap_or_default();
    labels.extend(pods.labels.clone());
    let mut annotations = pods.annotations.clone();
    annotations.insert(CONFIG.to_owned(), node.to_owned());
    Deployment {
        metadata,
        spec: Some(DeploymentSpec {
            // Left to the autoscaler, where there is one.
            replicas: match inputs.cluster.gateway.replicas {
                Replicas::Fixed(count) => i32::try_from(count).ok(),
                Replicas::Autoscaled { .. } => None,
            },
            selector: LabelSelector {
                match_labels: Some(inputs.owner.selector(Component::Gateway)),
                ..LabelSelector::default()
            },
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".to_owned()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(IntOrString::Int(1)),
                    max_unavailable: Some(IntOrString::Int(0)),
                }),
            }),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(labels),
                    annotations: Some(annotations),
                    ..ObjectMeta::default()
                }),
                spec: Some(spec(inputs, source)),
            },
            ..DeploymentSpec::default()
        }),
        ..Deployment::default()
    }
}

fn spec(inputs: &Inputs<'_>, source: &Source) -> PodSpec {
    let pods = &inputs.cluster.pods;
    let arguments = ["gateway", "--config", config::NODE_FILE];
    let mut container = config::container(
        "gateway",
        arguments.map(str::to_owned).to_vec(),
        pods,
        config::image(pods, inputs.defaults),
    );
    container.ports = Some(vec![ContainerPort {
        name: Some("http".to_owned()),
        container_port: i32::from(ports::HTTP),
        ..ContainerPort::default()
    }]);
    container.resources = config::requirements(&inputs.cluster.gateway.resources);
    container.liveness_probe = Some(config::probe("/health", "http", 10, 3));
    container.readiness_probe = Some(config::probe("/ready", "http", 2, 1));
    container.lifecycle = Some(Lifecycle {
        pre_stop: Some(LifecycleHandler {
            sleep: Some(SleepAction { seconds: LINGER }),
            ..LifecycleHandler::default()
        }),
        ..Lifecycle::default()
    });
    let mut spec = config::pod(pods, source, container);
    config::with_node_file(&mut spec, &name(inputs));
    certificates::with_keys(inputs, TlsRole::Gateway, &mut spec);
    certificates::with_etcd_keys(inputs, &mut spec);
    certificates::with_api_keys(inputs, &mut spec);
    spec.termination_grace_period_seconds = Some(GRACE);
    spec
}

/// The Service that clients call; it has the cluster's own name.
fn service(inputs: &Inputs<'_>) -> Service {
    let metadata = inputs
        .owner
        .meta(inputs.owner.name.clone(), Component::Gateway);
    Service {
        metadata,
        spec: Some(ServiceSpec {
            selector: Some(inputs.owner.selector(Component::Gateway)),
            ports: Some(vec![ServicePort {
                name: Some("http".to_owned()),
                port: i32::from(ports::HTTP),
                target_port: Some(IntOrString::String("http".to_owned())),
                app_protocol: Some("http".to_owned()),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

fn autoscaler(inputs: &Inputs<'_>) -> Option<HorizontalPodAutoscaler> {
    let Replicas::Autoscaled {
        min,
        max,
        cpu_percent,
    } = inputs.cluster.gateway.replicas
    else {
        return None;
    };
    let count = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    Some(HorizontalPodAutoscaler {
        metadata: inputs.owner.meta(name(inputs), Component::Gateway),
        spec: Some(HorizontalPodAutoscalerSpec {
            scale_target_ref: CrossVersionObjectReference {
                api_version: Some("apps/v1".to_owned()),
                kind: "Deployment".to_owned(),
                name: name(inputs),
            },
            min_replicas: Some(count(min)),
            max_replicas: count(max),
            metrics: Some(vec![MetricSpec {
                type_: "Resource".to_owned(),
                resource: Some(ResourceMetricSource {
                    name: "cpu".to_owned(),
                    target: MetricTarget {
                        type_: "Utilization".to_owned(),
                        average_utilization: Some(count(cpu_percent)),
                        ..MetricTarget::default()
                    },
                }),
                ..MetricSpec::default()
            }]),
            ..HorizontalPodAutoscalerSpec::default()
        }),
        ..HorizontalPodAutoscaler::default()
    })
}
