//! What is seen → the status of a cluster. Pure; writing it is `apply.rs`'s.
//!
//! Every condition says something that was observed: of pods, of the store's view, of a token that came. A condition that
//! nothing is known of is `Unknown`, never the last that was known.

use std::collections::BTreeSet;

use foregate_api::ids::Rank;
use foregate_api::member::Phase;
use foregate_api::placement::{Cover, Placement};
use foregate_crd::cluster::{InspectedModel, MemoryPlan, Parallelism};
use foregate_crd::{ConditionType, MoeClusterStatus, Reason};
use foregate_store::ClusterState;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::fleet::Doing;

/// Longest message of a condition that is written.
const MESSAGE: usize = 1024;

/// How far a cluster has come, as far as it is not a matter of pods and store.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Stage {
    /// The manifest is wrong in itself.
    Invalid(String),
    /// A pod looks at the model.
    Reading(Option<String>),
    /// It cannot.
    Unreadable(String),
    /// Model and manifest do not go together.
    Unfit(String),
    /// The API server refused an object.
    Refused(String),
    /// The objects were applied.
    Applied,
}

/// What the last canary said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// None has been sent yet.
    Pending,
    /// Its token came.
    Answered,
    /// It did not.
    Failed(String),
}

/// Everything that a status is made from.
#[derive(Debug, Clone)]
pub(crate) struct Facts<'a> {
    pub(crate) generation: Option<i64>,
    pub(crate) stage: &'a Stage,
    /// Workers that are wanted.
    pub(crate) workers: u32,
    /// Pods of workers that are there, and that serve.
    pub(crate) pods: usize,
    pub(crate) ready: usize,
    /// What keeps pods from starting, in words, with its reason.
    pub(crate) trouble: Option<(Reason, String)>,
    pub(crate) doing: Doing,
    pub(crate) selector: String,
    /// Gateways that are wanted and available.
    pub(crate) gateways_wanted: i32,
    pub(crate) gateways: i32,
    /// What a change of the gateways waits for.
    pub(crate) gateways_change: Option<String>,
    /// The Secret with the API's keys, if it has none.
    pub(crate) keyless: Option<String>,
    pub(crate) url: Option<String>,
    pub(crate) state: Option<&'a ClusterState>,
    pub(crate) threshold: f64,
    /// What copies were asked to span.
    pub(crate) cover: Cover,
    pub(crate) verdict: Verdict,
    pub(crate) model: Option<InspectedModel>,
    pub(crate) memory: Option<MemoryPlan>,
    /// Notes of the launch plan: what a person should know though nothing is wrong.
    pub(crate) notes: Vec<String>,
}

/// What one condition says.
struct Said(Option<bool>, Reason, String);

fn yes(reason: Reason, message: impl Into<String>) -> Said {
    Said(Some(true), reason, message.into())
}

fn no(reason: Reason, message: impl Into<String>) -> Said {
    Said(Some(false), reason, message.into())
}

fn unknown(reason: Reason, message: impl Into<String>) -> Said {
    Said(None, reason, message.into())
}

/// The status; `before` gives the times of conditions that stay as they were.
pub(crate) fn status(
    facts: &Facts<'_>,
    before: Option<&MoeClusterStatus>,
    now: &Time,
) -> MoeClusterStatus {
    let said = conditions(facts);
    let conditions = said
        .into_iter()
        .map(|(about, said)| condition(about, said, facts.generation, before, now))
        .collect();
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let active = facts.state.and_then(active);
    MoeClusterStatus {
        observed_generation: facts.generation,
        conditions,
        replicas: count(facts.pods),
        ready_replicas: count(facts.ready),
        selector: facts.selector.clone(),
        gateways: facts.gateways,
        epoch: active.map_or(0, |plan| i64::try_from(plan.epoch.0).unwrap_or(i64::MAX)),
        url: facts.url.clone(),
        parallelism: facts.state.and_then(parallelism),
        model: facts.model.clone(),
        memory: facts.memory,
    }
}

fn condition(
    about: ConditionType,
    Said(is, reason, mut message): Said,
    generation: Option<i64>,
    before: Option<&MoeClusterStatus>,
    now: &Time,
) -> Condition {
    let status = match is {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    };
    if let Some((at, _)) = message.char_indices().nth(MESSAGE) {
        message.truncate(at);
    }
    let same = before
        .into_iter()
        .flat_map(|before| &before.conditions)
        .find(|old| old.type_ == about.name() && old.status == status);
    Condition {
        type_: about.name().to_owned(),
        status: status.to_owned(),
        reason: reason.name().to_owned(),
        message,
        observed_generation: generation,
        last_transition_time: same
            .map_or_else(|| now.clone(), |old| old.last_transition_time.clone()),
    }
}

fn conditions(facts: &Facts<'_>) -> Vec<(ConditionType, Said)> {
    let causes = [
        (ConditionType::WeightsLoaded, weights_loaded(facts)),
        (ConditionType::ExpertsCovered, experts_covered(facts)),
        (ConditionType::Balanced, balanced(facts)),
        (ConditionType::FabricReady, fabric_ready(facts)),
        (ConditionType::RouterReady, router_ready(facts)),
    ];
    let available = available(facts);
    let progressing = progressing(facts);
    let degraded = degraded(facts, &causes);
    let ready = ready(facts, &available, &progressing, &degraded, &causes);
    let mut all = vec![
        (ConditionType::Ready, ready),
        (ConditionType::Available, available),
        (ConditionType::Progressing, progressing),
        (ConditionType::Degraded, degraded),
    ];
    all.extend(causes);
    all
}

fn active(state: &ClusterState) -> Option<&Placement> {
    state.active.as_ref().map(|(plan, _)| plan.as_ref())
}

/// The store's view, or what to say without.
fn view<'a>(facts: &Facts<'a>) -> Result<&'a ClusterState, Said> {
    facts
        .state
        .filter(|state| state.connected)
        .ok_or_else(|| unknown(Reason::StoreUnreachable, "the store has not answered yet"))
}

fn weights_loaded(facts: &Facts<'_>) -> Said {
    let state = match view(facts) {
        Ok(state) => state,
        Err(said) => return said,
    };
    let missing: Vec<String> = (0..facts.workers)
        .filter(|rank| !state.members.keys().any(|member| member.0 == *rank))
        .map(|rank| rank.to_string())
        .collect();
    if missing.is_empty() {
        let message = format!("{} ranks have registered", facts.workers);
        return yes(Reason::RanksRegistered, message);
    }
    let message = format!("ranks {} have not registered", missing.join(", "));
    no(Reason::RanksMissing, message)
}

fn experts_covered(facts: &Facts<'_>) -> Said {
    let state = match view(facts) {
        Ok(state) => state,
        Err(said) => return said,
    };
    let Some(plan) = active(state) else {
        return no(Reason::NoPlacement, "no placement is active yet");
    };
    let holds = |rank: &Rank| {
        let ack = state.acks.get(rank);
        state.members.contains_key(rank) && ack.is_some_and(|ack| ack.prepared >= plan.epoch)
    };
    let holders: BTreeSet<_> = plan.ranks.iter().filter(|rank| holds(rank)).collect();
    for (l, layer) in plan.layers.iter().enumerate() {
        let bare = |copies: &Vec<foregate_api::placement::Copy>| {
            !copies.iter().any(|copy| holders.contains(&copy.rank))
        };
        if let Some(expert) = layer.copies.iter().position(bare) {
            let message =
                format!("layer {l}: expert {expert} has no copy on a rank that is alive");
            return no(Reason::ExpertsMissing, message);
        }
    }
    let message = format!("epoch {}: every expert has a verified copy", plan.epoch);
    yes(Reason::AllCovered, message)
}

fn balanced(facts: &Facts<'_>) -> Said {
    let state = match view(facts) {
        Ok(state) => state,
        Err(said) => return said,
    };
    let Some(plan) = active(state) else {
        return unknown(Reason::NoPlacement, "no placement is active yet");
    };
    let (balance, threshold) = (plan.balance_after, facts.threshold);
    let message = format!("predicted balance {balance:.3}, threshold {threshold}");
    if balance >= threshold {
        yes(Reason::WithinThreshold, message)
    } else {
        no(Reason::BelowThreshold, message)
    }
}

fn fabric_ready(facts: &Facts<'_>) -> Said {
    let state = match view(facts) {
        Ok(state) => state,
        Err(said) => return said,
    };
    let Some(plan) = active(state) else {
        return no(Reason::NoPlacement, "no placement is active yet");
    };
    let steps = |rank: &&Rank| {
        state
            .acks
            .get(rank)
            .is_some_and(|ack| ack.serving == plan.epoch)
    };
    let others: Vec<String> = plan
        .ranks
        .iter()
        .filter(|rank| !steps(rank))
        .map(ToString::to_string)
        .collect();
    if others.is_empty() {
        let message = format!(
            "all {} ranks step with epoch {}",
            plan.ranks.len(),
            plan.epoch
        );
        return yes(Reason::OneEpoch, message);
    }
    let message = format!(
        "ranks {} do not step with epoch {}",
        others.join(", "),
        plan.epoch
    );
    no(Reason::SeveralEpochs, message)
}

fn router_ready(facts: &Facts<'_>) -> Said {
    let message = format!(
        "{} of {} gateways available",
        facts.gateways, facts.gateways_wanted
    );
    if facts.gateways > 0 {
        yes(Reason::GatewayAvailable, message)
    } else {
        no(Reason::NoGateway, message)
    }
}

fn available(facts: &Facts<'_>) -> Said {
    match &facts.verdict {
        Verdict::Pending => no(Reason::CanaryPending, "no canary has been sent yet"),
        Verdict::Answered => yes(
            Reason::CanaryAnswered,
            "the last canary's token came through the gateway",
        ),
        Verdict::Failed(why) => no(
            Reason::CanaryFailed,
            format!("the last canary's token did not come: {why}"),
        ),
    }
}

fn progressing(facts: &Facts<'_>) -> Said {
    match facts.stage {
        Stage::Invalid(_) | Stage::Unreadable(_) | Stage::Unfit(_) => {
            return no(
                Reason::AsWanted,
                "nothing is done until the manifest or the model changes",
            );
        }
        Stage::Refused(_) => return yes(Reason::ApplyFailed, "it is tried again"),
        Stage::Reading(why) => {
            let why = why.as_deref().unwrap_or("a pod looks at the model");
            return yes(Reason::ReadingModel, why);
        }
        Stage::Applied => {}
    }
    if let Some((reason @ (Reason::PodsUnschedulable | Reason::PodsStarting), why)) =
        &facts.trouble
    {
        return yes(*reason, why.clone());
    }
    match facts.doing {
        Doing::Restarting(rank) => {
            return yes(
                Reason::RollingOut,
                format!("rank {rank} is emptied and started anew"),
            );
        }
        Doing::Shrinking => {
            return yes(
                Reason::ScalingDown,
                "experts move away from the ranks that are to go",
            );
        }
        Doing::Starting if facts.state.is_some_and(|state| active(state).is_some()) => {
            let message = format!("{} of {} workers serve", facts.ready, facts.workers);
            return yes(Reason::ScalingUp, message);
        }
        Doing::Starting => {
            let message = format!("{} of {} workers serve", facts.ready, facts.workers);
            return yes(Reason::PodsStarting, message);
        }
        Doing::Settled => {}
    }
    let changing = facts
        .state
        .is_some_and(|state| match (&state.target, &state.active) {
            (Some((target, _)), Some((active, _))) => target.epoch != active.epoch,
            (target, active) => target.is_some() != active.is_some(),
        });
    if changing {
        return yes(Reason::EpochChanging, "a placement is being prepared");
    }
    if facts.gateways < facts.gateways_wanted {
        let message = format!(
            "{} of {} gateways available",
            facts.gateways, facts.gateways_wanted
        );
        return yes(Reason::PodsStarting, message);
    }
    if let Some(why) = &facts.gateways_change {
        return yes(Reason::RollingOut, why.clone());
    }
    let mut message = "everything is as wanted".to_owned();
    for note in &facts.notes {
        message.push_str("; note: ");
        message.push_str(note);
    }
    no(Reason::AsWanted, message)
}

fn degraded(facts: &Facts<'_>, causes: &[(ConditionType, Said)]) -> Said {
    match facts.stage {
        Stage::Invalid(why) => return yes(Reason::InvalidManifest, why.clone()),
        Stage::Unreadable(why) => return yes(Reason::ModelUnreadable, why.clone()),
        Stage::Unfit(why) => return yes(Reason::DoesNotFit, why.clone()),
        Stage::Refused(why) => return yes(Reason::ApplyFailed, why.clone()),
        Stage::Reading(_) => return no(Reason::Healthy, "nothing runs yet"),
        Stage::Applied => {}
    }
    if let Some((Reason::PodFailing, why)) = &facts.trouble {
        return yes(Reason::PodFailing, why.clone());
    }
    if let Some(secret) = &facts.keyless {
        let why = format!(
            "spec.security.apiKeys: the Secret {secret} is not there or holds no key, so gateways that are new do not \
             start, and those that run stay as they are: make it, with one entry per client"
        );
        return yes(Reason::KeysMissing, why);
    }
    let lost = facts
        .state
        .filter(|state| state.connected)
        .and_then(|state| {
            let plan = active(state)?;
            let lost = plan
                .ranks
                .iter()
                .find(|rank| !state.members.contains_key(rank))?;
            Some(format!("rank {lost} of epoch {} is gone", plan.epoch))
        });
    if let Some(why) = lost {
        return yes(Reason::RankLost, why);
    }
    for (about, Said(is, reason, message)) in causes {
        let begun = *reason != Reason::NoPlacement;
        if *about == ConditionType::ExpertsCovered && *is == Some(false) && begun {
            return yes(*reason, message.clone());
        }
    }
    match reduced_cover(facts) {
        Some(why) => yes(Reason::CoverReduced, why),
        None => no(Reason::Healthy, "nothing is wrong"),
    }
}

/// How many experts the loss of one failure domain would leave without a copy, where there were to be none.
fn reduced_cover(facts: &Facts<'_>) -> Option<String> {
    if facts.cover != Cover::All {
        return None;
    }
    let state = facts.state.filter(|state| state.connected)?;
    let plan = active(state)?;
    // A rank without a name is a domain of its own, as it is to the planner.
    let domain = |rank: Rank| match state.members.get(&rank) {
        Some(member) if !member.domain.is_empty() => Ok(member.domain.as_str()),
        _ => Err(rank),
    };
    let in_one = |copies: &&Vec<foregate_api::placement::Copy>| {
        let mut domains = copies.iter().map(|copy| domain(copy.rank));
        let first = domains.next();
        domains.all(|other| Some(other) == first)
    };
    let copies = || plan.layers.iter().flat_map(|layer| &layer.copies);
    let exposed = copies().filter(in_one).count();
    (exposed > 0).then(|| {
        format!(
            "{exposed} of {} experts, counted in every layer, have copies in one failure domain only, and cover all was asked \
             for: raise spec.workers.redundantSlots, or ask for cover spread",
            copies().count()
        )
    })
}

fn ready(
    facts: &Facts<'_>,
    available: &Said,
    progressing: &Said,
    degraded: &Said,
    causes: &[(ConditionType, Said)],
) -> Said {
    // What would be lost with a failure domain is there as long as none is lost.
    if degraded.0 == Some(true) && degraded.1 != Reason::CoverReduced {
        return no(degraded.1, degraded.2.clone());
    }
    if available.0 != Some(true) {
        // What it waits for says more than that no token came.
        let cause = if progressing.0 == Some(true) {
            progressing
        } else {
            available
        };
        return no(cause.1, cause.2.clone());
    }
    if facts.ready < facts.workers as usize {
        return no(progressing.1, progressing.2.clone());
    }
    // A cluster that only follows its load (`Balanced`, an epoch under way) is ready all the same.
    let needed = [ConditionType::ExpertsCovered, ConditionType::RouterReady];
    for (about, Said(is, reason, message)) in causes {
        if needed.contains(about) && *is != Some(true) {
            return no(*reason, message.clone());
        }
    }
    yes(Reason::CanaryAnswered, available.2.clone())
}

/// How the model is divided, as the members say.
fn parallelism(state: &ClusterState) -> Option<Parallelism> {
    let serving = || {
        state
            .members
            .values()
            .filter(|member| member.phase == Phase::Ready)
    };
    let slots = serving().map(|member| member.slots);
    let fewest = slots.filter(|slots| *slots > 0).min()?;
    let attending = serving().filter(|member| member.runs_attention());
    let paths: BTreeSet<&str> = serving().map(|member| member.cpu_path.as_str()).collect();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Some(Parallelism {
        attention_ranks: count(attending.count()),
        expert_ranks: active(state).map_or(0, |plan| count(plan.ranks.len())),
        fewest_slots: fewest,
        cpu_paths: paths.into_iter().map(str::to_owned).collect(),
    })
}

#[cfg(test)]
mod tests;
