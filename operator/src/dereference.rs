//! First step: everything of a cluster that is there, read once, so that the other steps look at one picture.

use std::collections::BTreeMap;

use foregate_api::ids::Rank;
use foregate_api::model::ModelFacts;
use foregate_crd::{ExpertPlacement, Reason};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::SignedDuration;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};

use crate::build::{CONFIG, Component, Owner, RANK, SLOTS, SOURCE, selector_text};
use crate::fleet::{Life, Seen};

/// How long after its end a pod is waited for. Its kubelet would have said so by then.
const OVERDUE: SignedDuration = SignedDuration::from_secs(10);

/// What is there.
#[derive(Debug, Clone, Default)]
pub(crate) struct Found {
    /// Pods of workers by rank.
    pub(crate) workers: BTreeMap<Rank, Pod>,
    /// Pods of gateways, old and new.
    pub(crate) gateway_pods: Vec<Pod>,
    /// The pod that looks at the model.
    pub(crate) inspector: Option<Pod>,
    /// The gateways.
    pub(crate) gateways: Option<Deployment>,
    /// The placement's resource.
    pub(crate) placement: Option<ExpertPlacement>,
}

/// Reads everything.
///
/// # Errors
/// The API server's.
pub(crate) async fn dereference(client: &Client, owner: &Owner) -> Result<Found, kube::Error> {
    let namespace = &owner.namespace;
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let placements: Api<ExpertPlacement> = Api::namespaced(client.clone(), namespace);
    let ours = ListParams::default().labels(&selector_text(&owner.all()));
    let gateway = format!("{}-gateway", owner.name);
    let (pods, gateways, placement) = tokio::try_join!(
        pods.list(&ours),
        deployments.get_opt(&gateway),
        placements.get_opt(&owner.name),
    )?;
    let mut found = Found {
        gateways,
        placement,
        ..Found::default()
    };
    for pod in pods.items {
        found.take(owner, pod);
    }
    Ok(found)
}

impl Found {
    /// Takes in a pod, if it is of this cluster and not of an earlier one of its name.
    pub(crate) fn take(&mut self, owner: &Owner, pod: Pod) {
        let component = pod
            .labels()
            .get("app.kubernetes.io/component")
            .map(String::as_str);
        if component == Some(Component::Gateway.name()) {
            // A ReplicaSet owns it, so only its end tells that it is of an earlier cluster.
            if pod.metadata.deletion_timestamp.is_none() {
                self.gateway_pods.push(pod);
            }
            return;
        }
        if !owner.owns(&pod) {
            return;
        }
        if component == Some(Component::Worker.name()) {
            let rank = pod.labels().get(RANK).and_then(|rank| rank.parse().ok());
            if let Some(rank) = rank {
                self.workers.insert(Rank(rank), pod);
            }
        } else if component == Some(Component::Inspector.name()) {
            self.inspector = Some(pod);
        }
    }

    /// The workers' pods as the fleet sees them.
    pub(crate) fn seen(&self, now: &Time) -> BTreeMap<Rank, Seen> {
        let pods = self.workers.iter();
        pods.map(|(rank, pod)| (*rank, seen(pod, now))).collect()
    }

    /// Gateways that are available.
    pub(crate) fn available(&self) -> i32 {
        let status = self.gateways.as_ref().and_then(|d| d.status.as_ref());
        status
            .and_then(|status| status.available_replicas)
            .unwrap_or_default()
    }

    /// Gateways that are wanted, also where an autoscaler wants them.
    pub(crate) fn gateways_wanted(&self) -> i32 {
        let spec = self.gateways.as_ref().and_then(|d| d.spec.as_ref());
        spec.and_then(|spec| spec.replicas).unwrap_or(1)
    }

    /// What a change of the gateways still waits for, in words. Until it is through, those of before serve.
    pub(crate) fn gateways_change(&self) -> Option<String> {
        let gateways = self.gateways.as_ref()?;
        let status = gateways.status.clone().unwrap_or_default();
        if status.observed_generation < gateways.metadata.generation {
            return Some("the gateways' Deployment has not been looked at yet".to_owned());
        }
        let (all, new) = (
            status.replicas.unwrap_or_default(),
            status.updated_replicas.unwrap_or_default(),
        );
        let wanted = self.gateways_wanted();
        let left = all - new;
        (new < wanted || left > 0).then(|| {
            format!(
                "{new} of {wanted} gateways are as wanted now, {left} are as they were before"
            )
        })
    }

    /// What keeps pods from serving, if it is more than time: workers first.
    pub(crate) fn trouble(&self) -> Option<(Reason, String)> {
        let (workers, gateways) = (|| self.workers.values(), || self.gateway_pods.iter());
        if let Some(what) = workers().chain(gateways()).find_map(failure) {
            return Some((Reason::PodFailing, what));
        }
        let waiting = homeless("worker", workers()).or_else(|| homeless("gateway", gateways()));
        Some((Reason::PodsUnschedulable, waiting?))
    }

    /// What the inspector of this source has to say; `None` if there is none.
    pub(crate) fn inspection(&self, source: &str) -> Option<Inspection> {
        let pod = self.inspector.as_ref()?;
        if pod.annotations().get(SOURCE).map(String::as_str) != Some(source) {
            return Some(Inspection::Outdated);
        }
        Some(inspection(pod))
    }
}

/// What an inspector has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Inspection {
    /// It looks at something else.
    Outdated,
    /// Nothing yet, with what it waits for if that is known.
    Working(Option<String>),
    /// The model's sizes.
    Done(ModelFacts),
    /// It could not; it tries again.
    Failed(String),
}

fn inspection(pod: &Pod) -> Inspection {
    let Some(status) = &pod.status else {
        return Inspection::Working(None);
    };
    let main = status.container_statuses.iter().flatten();
    for container in main.clone() {
        let ended = container
            .state
            .as_ref()
            .and_then(|state| state.terminated.as_ref());
        if let Some(ended) = ended.filter(|ended| ended.exit_code == 0) {
            let text = ended.message.as_deref().unwrap_or_default();
            return match serde_json::from_str(text.trim()) {
                Ok(facts) => Inspection::Done(facts),
                Err(error) => {
                    Inspection::Failed(format!("the inspector said {text:?}: {error}"))
                }
            };
        }
    }
    let init = status.init_container_statuses.iter().flatten();
    if let Some(what) = init.chain(main).find_map(container_failure) {
        return Inspection::Failed(what);
    }
    Inspection::Working(unschedulable(pod))
}

fn seen(pod: &Pod, now: &Time) -> Seen {
    let annotation = |key: &str| pod.annotations().get(key).cloned().unwrap_or_default();
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref());
    let ready = status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let life = match &pod.metadata.deletion_timestamp {
        Some(end) if now.0.duration_since(end.0) > OVERDUE => Life::Overdue,
        Some(_) if cut(pod) => Life::Cut,
        Some(_) => Life::Ending,
        None if matches!(phase, Some("Failed" | "Succeeded")) => Life::Ended,
        None => Life::Lives,
    };
    Seen {
        config: annotation(CONFIG),
        slots: annotation(SLOTS).parse().unwrap_or_default(),
        ready,
        life,
    }
}

/// Whether Kubernetes gave the pod up with its node, which will not say when it has ended.
fn cut(pod: &Pod) -> bool {
    let status = pod.status.iter();
    let mut conditions = status.flat_map(|status| status.conditions.iter().flatten());
    conditions.any(|condition| {
        condition.type_ == "DisruptionTarget"
            && condition.reason.as_deref() == Some("DeletionByTaintManager")
    })
}

/// How many pods have no node, with the scheduler's sentence about the first; `None` if all have one.
fn homeless<'a>(role: &str, pods: impl Iterator<Item = &'a Pod> + Clone) -> Option<String> {
    let waiting: Vec<String> = pods.clone().filter_map(unschedulable).collect();
    let first = waiting.first()?;
    let (few, all) = (waiting.len(), pods.count());
    Some(format!("{few} of {all} {role} pods have no node: {first}"))
}

/// The scheduler's sentence about a pod that has no node.
fn unschedulable(pod: &Pod) -> Option<String> {
    let conditions = pod.status.as_ref()?.conditions.iter().flatten();
    let scheduled = conditions
        .filter(|condition| condition.type_ == "PodScheduled" && condition.status == "False")
        .find_map(|condition| condition.message.clone())?;
    Some(format!("{}: {scheduled}", pod.name_any()))
}

/// What is wrong with a pod's containers.
fn failure(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let init = status.init_container_statuses.iter().flatten();
    let main = status.container_statuses.iter().flatten();
    let what = init.chain(main).find_map(container_failure)?;
    Some(format!("{}: {what}", pod.name_any()))
}

/// A container that waits for something that does not come by itself, with its last words.
fn container_failure(container: &ContainerStatus) -> Option<String> {
    const PATIENT: [&str; 2] = ["ContainerCreating", "PodInitializing"];
    let last = container
        .last_state
        .as_ref()
        .and_then(|state| state.terminated.as_ref());
    let words = last.and_then(|last| last.message.as_deref()).map(str::trim);
    let waiting = container
        .state
        .as_ref()
        .and_then(|state| state.waiting.as_ref());
    let reason = waiting.and_then(|waiting| waiting.reason.as_deref());
    if let Some(reason) = reason.filter(|reason| !PATIENT.contains(reason)) {
        let message = waiting.and_then(|waiting| waiting.message.as_deref());
        let what = words.or(message).unwrap_or_default();
        return Some(format!("container {}: {reason}: {what}", container.name));
    }
    let ended = container
        .state
        .as_ref()
        .and_then(|state| state.terminated.as_ref());
    let ended = ended.filter(|ended| ended.exit_code != 0)?;
    let what = ended.message.as_deref().unwrap_or_default().trim();
    Some(format!(
        "container {} ended with code {}: {what}",
        container.name, ended.exit_code
    ))
}

#[cfg(test)]
mod tests;
