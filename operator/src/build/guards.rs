//! What keeps others from harming the cluster: disruption budgets and network policies; and the placement's resource.

use std::collections::BTreeMap;

use foregate_api::manifest::{BalancingSpec, EconomySpec};
use foregate_api::node::EconomyConfig;
use foregate_crd::{ExpertPlacement, ExpertPlacementSpec};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Component, Inputs, Object, Prepared};
use crate::launch::ports;

pub(super) fn build(
    inputs: &Inputs<'_>,
    prepared: &mut Prepared,
) -> Result<(), serde_json::Error> {
    prepared.objects.extend([
        Object::of(&budget(inputs, Component::Worker, "workers"))?,
        Object::of(&budget(inputs, Component::Gateway, "gateway"))?,
        Object::of(&workers_policy(inputs))?,
        Object::of(&gateways_policy(inputs))?,
        Object::of(&placement(inputs))?,
    ]);
    Ok(())
}

/// One pod at a time may be evicted: the others hold its experts or wait for it.
fn budget(inputs: &Inputs<'_>, component: Component, what: &str) -> PodDisruptionBudget {
    let name = format!("{}-{what}", inputs.owner.name);
    PodDisruptionBudget {
        metadata: inputs.owner.meta(name, component),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(selector(inputs.owner.selector(component))),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}

/// Only the cluster's own pods call workers; anybody may read their metrics.
fn workers_policy(inputs: &Inputs<'_>) -> NetworkPolicy {
    let own = NetworkPolicyPeer {
        pod_selector: Some(selector(inputs.owner.all())),
        ..NetworkPolicyPeer::default()
    };
    policy(
        inputs,
        Component::Worker,
        "workers",
        vec![
            NetworkPolicyIngressRule {
                from: Some(vec![own]),
                ports: Some(vec![port(ports::RPC), port(ports::EXCHANGE)]),
            },
            NetworkPolicyIngressRule {
                from: None,
                ports: Some(vec![port(ports::STATUS)]),
            },
        ],
    )
}

/// Anybody may call the API of a gateway, and nothing else of it.
fn gateways_policy(inputs: &Inputs<'_>) -> NetworkPolicy {
    let api = NetworkPolicyIngressRule {
        from: None,
        ports: Some(vec![port(ports::HTTP)]),
    };
    policy(inputs, Component::Gateway, "gateway", vec![api])
}

fn policy(
    inputs: &Inputs<'_>,
    component: Component,
    what: &str,
    ingress: Vec<NetworkPolicyIngressRule>,
) -> NetworkPolicy {
    let name = format!("{}-{what}", inputs.owner.name);
    NetworkPolicy {
        metadata: inputs.owner.meta(name, component),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(selector(inputs.owner.selector(component))),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(ingress),
            egress: None,
        }),
    }
}

fn port(number: u16) -> NetworkPolicyPort {
    NetworkPolicyPort {
        port: Some(IntOrString::Int(i32::from(number))),
        protocol: Some("TCP".to_owned()),
        end_port: None,
    }
}

fn selector(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector {
        match_labels: Some(labels),
        ..LabelSelector::default()
    }
}

/// The policy of the placement; its status follows the store.
fn placement(inputs: &Inputs<'_>) -> ExpertPlacement {
    let balancing = &inputs.cluster.balancing;
    ExpertPlacement {
        types: Some(ExpertPlacement::types()),
        metadata: inputs
            .owner
            .meta(inputs.owner.name.clone(), Component::Cluster),
        spec: ExpertPlacementSpec {
            cluster: inputs.owner.name.clone(),
            balancing: BalancingSpec {
                enabled: Some(balancing.enabled),
                window_ms: Some(balancing.window_ms),
                threshold: Some(balancing.threshold),
                max_moves_per_layer: Some(balancing.max_moves_per_layer),
                min_rows: Some(balancing.min_rows),
                forecast: Some(balancing.forecast),
                cover: Some(balancing.cover),
                max_move_bytes: balancing.max_move_bytes.map(|bytes| bytes.to_string()),
                economy: balancing.economy.map(economy),
                strict: Some(balancing.strict),
            },
        },
        status: None,
    }
}

fn economy(config: EconomyConfig) -> EconomySpec {
    let EconomyConfig {
        horizon_seconds,
        bandwidth,
        experts_percent,
        slowdown_percent,
    } = config;
    EconomySpec {
        horizon_seconds: Some(horizon_seconds),
        bandwidth: bandwidth.map(|bytes| bytes.to_string()),
        experts_percent: Some(experts_percent),
        slowdown_percent: Some(slowdown_percent),
    }
}
