//! Events: what the operator did, and what became of it, for `kubectl describe`. Best effort: an event that is not taken is
//! logged.

use foregate_api::ids::Rank;
use foregate_api::placement::{Placement, Reason};
use foregate_crd::{ConditionType, MoeCluster, MoeClusterStatus};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Resource as _, ResourceExt as _};

use crate::build::worker_name;

/// Longest note that the API takes.
const NOTE: usize = 1000;

/// What was done with a rank's pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// It was made.
    Made,
    /// It was told to end.
    Ended,
    /// What was left of it was removed.
    Removed,
}

/// Tells what was done with a rank's pod.
pub(crate) async fn rank(recorder: &Recorder, cluster: &MoeCluster, rank: Rank, what: Told) {
    let (reason, note) = match what {
        Told::Made => ("RankStarted", format!("the pod of rank {rank} was made")),
        Told::Ended => (
            "RankEnded",
            format!("the pod of rank {rank} was told to end"),
        ),
        Told::Removed => (
            "RankRemoved",
            format!("what was left of rank {rank}'s pod was removed"),
        ),
    };
    tracing::info!(cluster = %cluster.manifest().metadata.name, %rank, reason, "{note}");
    // Events that differ in their words only are counted as one, so each names its pod.
    let pod = ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: Some(worker_name(&cluster.name_any(), rank)),
        namespace: cluster.namespace(),
        ..ObjectReference::default()
    };
    publish(
        recorder,
        cluster,
        EventType::Normal,
        reason,
        note,
        Some(pod),
    )
    .await;
}

/// Tells of a placement that came into force, and of the copies that it moved, if that is known.
pub(crate) async fn placement(
    recorder: &Recorder,
    cluster: &MoeCluster,
    plan: &Placement,
    moved: Option<usize>,
) {
    let (reason, note) = placement_note(plan, moved);
    publish(recorder, cluster, EventType::Normal, reason, note, None).await;
}

fn placement_note(plan: &Placement, moved: Option<usize>) -> (&'static str, String) {
    let reason = match plan.reason {
        Reason::Initial => "ExpertsPlaced",
        Reason::Reweigh => "SharesChanged",
        Reason::Move => "ExpertsMoved",
        Reason::Repair => "ExpertsRepaired",
        Reason::Resize => "RanksChanged",
    };
    let copies = moved.map_or_else(String::new, |copies| format!(", {copies} copies loaded"));
    let note = format!(
        "epoch {} follows {}: predicted balance {:.3} -> {:.3}{copies}; `kubectl foregate explain last` tells more",
        plan.epoch, plan.parent, plan.balance_before, plan.balance_after
    );
    (reason, note)
}

/// Tells of conditions that matter to a person and are not as they were.
pub(crate) async fn conditions(
    recorder: &Recorder,
    cluster: &MoeCluster,
    before: Option<&MoeClusterStatus>,
    after: &MoeClusterStatus,
) {
    for (kind, condition) in news(before, after) {
        let note = condition.message.clone();
        publish(recorder, cluster, kind, &condition.reason, note, None).await;
    }
}

/// Ready and Degraded, when status or reason changed.
fn news<'a>(
    before: Option<&MoeClusterStatus>,
    after: &'a MoeClusterStatus,
) -> Vec<(EventType, &'a Condition)> {
    let was = |about: &str| {
        let before = before.into_iter().flat_map(|status| &status.conditions);
        before
            .into_iter()
            .find(|condition| condition.type_ == about)
    };
    let changed = |condition: &&Condition| {
        let old = was(&condition.type_);
        old.is_none_or(|old| {
            (&old.status, &old.reason) != (&condition.status, &condition.reason)
        })
    };
    let told = after
        .conditions
        .iter()
        .filter(changed)
        .filter_map(|condition| {
            let is = condition.status == "True";
            let (ready, degraded) =
                (ConditionType::Ready.name(), ConditionType::Degraded.name());
            match condition.type_.as_str() {
                about if about == ready && is => Some((EventType::Normal, condition)),
                about if about == degraded && is => Some((EventType::Warning, condition)),
                about
                    if about == ready && was(ready).is_some_and(|old| old.status == "True") =>
                {
                    Some((EventType::Warning, condition))
                }
                _ => None,
            }
        });
    told.collect()
}

async fn publish(
    recorder: &Recorder,
    cluster: &MoeCluster,
    type_: EventType,
    reason: &str,
    mut note: String,
    secondary: Option<ObjectReference>,
) {
    if let Some((at, _)) = note.char_indices().nth(NOTE) {
        note.truncate(at);
    }
    let event = Event {
        type_,
        reason: reason.to_owned(),
        note: Some(note),
        action: "Reconcile".to_owned(),
        secondary,
    };
    if let Err(error) = recorder.publish(&event, &cluster.object_ref(&())).await {
        tracing::debug!(%error, reason, "an event was not taken");
    }
}

#[cfg(test)]
mod tests {
    use foregate_api::ids::Epoch;

    use super::*;

    #[test]
    fn a_placement_is_told_with_what_it_moved() {
        let plan = Placement {
            epoch: Epoch(8),
            parent: Epoch(7),
            reason: Reason::Move,
            ranks: Vec::new(),
            layers: Vec::new(),
            balance_before: 0.9123,
            balance_after: 0.98,
        };
        let (reason, note) = placement_note(&plan, Some(4));
        assert_eq!(reason, "ExpertsMoved");
        assert!(
            note.contains(
                "epoch 8 follows 7: predicted balance 0.912 -> 0.980, 4 copies loaded"
            ),
            "{note}"
        );
        assert!(!placement_note(&plan, None).1.contains("copies"));
    }
}
