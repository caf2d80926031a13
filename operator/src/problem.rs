//! Cluster state → planning problem. Pure.

use std::collections::BTreeSet;
use std::sync::Arc;

use foregate_api::ids::{Epoch, Rank};
use foregate_api::member::{Member, Phase};
use foregate_api::model::ModelSpec;
use foregate_api::placement::{Placement, Reason};
use foregate_explain::record::rounded;
use foregate_planner::demand::Demand;
use foregate_planner::{Cover, Problem, RankSlots};
use foregate_store::ClusterState;

/// The model of the cluster. Members with another one take no part.
pub(crate) fn model(state: &ClusterState) -> Option<&ModelSpec> {
    state.exemplar().map(|member| &member.model)
}

/// Members that may hold experts: alive, not draining or `leaving`, with slots, of the cluster's model and arithmetic.
pub(crate) fn eligible<'a>(
    state: &'a ClusterState,
    alive: &BTreeSet<Rank>,
    leaving: &[Rank],
) -> Vec<&'a Arc<Member>> {
    let kin = |member: &&Arc<Member>| state.exemplar().is_some_and(|e| e.is_kin(member));
    state
        .members
        .values()
        .filter(|member| alive.contains(&member.rank) && !leaving.contains(&member.rank))
        .filter(|member| member.phase != Phase::Draining && member.slots > 0)
        .filter(kin)
        .collect()
}

/// The problem over `members`.
pub(crate) fn problem(
    members: &[&Arc<Member>],
    model: &ModelSpec,
    demand: &Demand,
    cover: Cover,
    above: Epoch,
) -> Problem {
    Problem {
        ranks: members
            .iter()
            .map(|member| RankSlots {
                rank: member.rank,
                slots: member.slots as usize,
                domain: member.domain.clone(),
            })
            .collect(),
        layers: model.moe_layers(),
        experts: model.experts,
        // What is recorded is what was planned on.
        demand: rounded(demand.prediction()),
        evidence: demand.evidence(),
        batch_rows: demand.batch_rows(),
        expert_bytes: model.expert_bytes() as u64,
        cover,
        above,
    }
}

/// Ranks that leave by intent are a resize, not a repair: nothing of theirs is lost.
pub(crate) fn name_reason(
    plan: &mut Placement,
    state: &ClusterState,
    lost: &[Rank],
    leaving: &[Rank],
) {
    let leaves = |rank: &Rank| {
        let member = state.members.get(rank);
        leaving.contains(rank) || member.is_some_and(|member| member.phase == Phase::Draining)
    };
    if plan.reason == Reason::Repair && lost.iter().all(leaves) {
        plan.reason = Reason::Resize;
    }
}
