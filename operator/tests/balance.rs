//! The operator over a store in memory with scripted workers, in simulated time.

#![expect(clippy::unwrap_used, reason = "part of a test")]

mod rig;

use std::sync::Arc;
use std::time::Duration;

use foregate_api::forecast::Forecast;
use foregate_api::ids::{Epoch, Rank};
use foregate_api::node::{EconomyConfig, OperatorConfig};
use foregate_api::placement::{Cover, Placement, Reason};
use foregate_explain::Past;
use foregate_store::{Archive, Store};

use rig::{Habit, Mix, Rig, balance, config, is_complete};

/// Slots per rank: three ranks have 12 for 8 experts, enough to link them.
const SLOTS: u32 = 4;
const EVEN: Mix = [100; 8];
/// No rank holds half of everything, so no placement for even load suits it.
const HEAVY_LOW: Mix = [400, 380, 20, 20, 20, 20, 20, 20];
const HEAVY_HIGH: Mix = [20, 20, 20, 20, 20, 20, 390, 410];

fn ranks(of: &[u32]) -> Vec<Rank> {
    of.iter().copied().map(Rank).collect()
}

/// A rig with an operator and three workers, settled on its first placement.
async fn started() -> (Rig, rig::Operator) {
    let mut rig = Rig::new();
    let operator = rig.operator(config(3));
    for rank in 0..3 {
        rig.join(rank, SLOTS).await;
    }
    rig.until_settled("the first placement", |plan| plan.epoch == Epoch(1))
        .await;
    (rig, operator)
}

#[tokio::test(start_paused = true)]
async fn the_first_placement_waits_for_every_rank_and_is_complete() {
    let mut rig = Rig::new();
    let operator = rig.operator(config(3));
    rig.join(0, SLOTS).await;
    rig.join(2, SLOTS).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(rig.state().target.is_none(), "rank 1 is missing");
    assert!(operator.leads());
    rig.join(1, SLOTS).await;
    let plan = rig.until_settled("the first placement", |_| true).await;
    assert_eq!(
        (plan.epoch, plan.parent, plan.reason),
        (Epoch(1), Epoch(0), Reason::Initial)
    );
    assert_eq!(plan.ranks, ranks(&[0, 1, 2]));
    assert!(is_complete(&plan));
    assert!((operator.metric("foregate_operator_plans_total", "initial") - 1.0).abs() < 1e-9);
}

#[tokio::test(start_paused = true)]
async fn a_shifting_load_raises_the_epoch_and_the_balance() {
    let (rig, operator) = started().await;
    for mix in [HEAVY_LOW, HEAVY_HIGH, EVEN] {
        let before = rig.active();
        let was = balance(&before, &mix);
        rig.mix.send_replace(mix);
        tokio::time::sleep(Duration::from_secs(30)).await;
        let plan = rig.until_settled("a settled placement", |_| true).await;
        let is = balance(&plan, &mix);
        assert!(is_complete(&plan));
        assert!(is > 0.95, "{mix:?}: {was} -> {is}");
        if was < 0.9 {
            assert!(plan.epoch > before.epoch, "{mix:?}");
            assert!(plan.balance_after > plan.balance_before);
        }
    }
    assert!(rig.active().epoch > Epoch(2));
    let planned = operator.metric("foregate_operator_plans_total", "");
    assert!(planned >= 3.0);
    // A load that stays is followed by nothing.
    let epoch = rig.active().epoch;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(rig.active().epoch, epoch);
    assert!(operator.metric("foregate_operator_layers_kept_total", "balanced") > 0.0);
    assert!(operator.metric("foregate_operator_copies_moved_total", "") > 0.0);
}

/// The balance that a mix meets which turns every two windows, and the weight of the forecast at the end. `foretell`: what
/// a gateway says just before the mix is this one.
async fn turning(operator: OperatorConfig, foretell: fn(&Mix) -> Option<Mix>) -> (f64, f64) {
    const LEAD: Duration = Duration::from_millis(50);
    let mut rig = Rig::new();
    let operator = rig.operator(operator);
    for rank in 0..3 {
        rig.join(rank, SLOTS).await;
    }
    rig.until_settled("the first placement", |plan| plan.epoch == Epoch(1))
        .await;
    let gateway = rig.store.lease(Duration::from_secs(5)).await.unwrap();
    let (mut sum, mut number) = (0.0, 0.0);
    for t in 0..60_u64 {
        let mix = if t % 4 < 2 { HEAVY_LOW } else { HEAVY_HIGH };
        if let Some(next) = foretell(&mix) {
            let counts = vec![next.map(|rows| rows as f64).to_vec(); rig::LAYERS];
            let mut forecast = Forecast::of(1000, 600.0, 1.0, &counts);
            forecast.sequence = t + 1;
            rig.coord
                .publish_forecast(&forecast, gateway.as_ref())
                .await
                .unwrap();
        }
        tokio::time::sleep(LEAD).await;
        rig.mix.send_replace(mix);
        tokio::time::sleep(rig::WINDOW - LEAD).await;
        if t >= 20 {
            sum += balance(&rig.active(), &mix);
            number += 1.0;
        }
    }
    let weight = operator.metric("foregate_operator_forecast_weight", "");
    (sum / number, weight)
}

#[tokio::test(start_paused = true)]
async fn a_forecast_that_is_right_leads_the_plan_and_one_that_is_wrong_does_not() {
    let (blind, weight) = turning(config(3), |_| None).await;
    assert!(weight.abs() < 1e-9, "nobody said anything");
    let (told, weight) = turning(config(3), |next| Some(*next)).await;
    assert!(weight > 0.5, "{weight}");
    assert!(told > blind + 0.02, "{blind} without, {told} with");
    let (_, weight) = turning(config(3), |_| Some([0, 0, 0, 900, 0, 0, 0, 0])).await;
    assert!(weight.abs() < 1e-9, "{weight}");
    let mut deaf = config(3);
    deaf.forecast = false;
    let (unheard, weight) = turning(deaf, |next| Some(*next)).await;
    assert!(
        weight.abs() < 1e-9 && (unheard - blind).abs() < 1e-9,
        "{unheard}, {blind}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_balancer_that_is_switched_off_repairs_and_nothing_more() {
    let mut rig = Rig::new();
    let mut off = config(3);
    off.enabled = false;
    let _operator = rig.operator(off);
    for rank in 0..3 {
        rig.join(rank, 8).await;
    }
    rig.until_settled("the first placement", |_| true).await;
    rig.mix.send_replace(HEAVY_LOW);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(rig.active().epoch, Epoch(1));
    rig.kill(1);
    let plan = rig
        .until_settled("a repair", |plan| plan.epoch > Epoch(1))
        .await;
    assert_eq!(
        (plan.reason, &plan.ranks),
        (Reason::Repair, &ranks(&[0, 2]))
    );
}

/// Experts of a layer whose copies are all in one domain, where ranks 0 and 1 are in one and 2 and 3 in another.
fn in_one_domain(plan: &Placement) -> usize {
    let of = |copies: &Vec<foregate_api::placement::Copy>| {
        let first = copies.iter().filter(|copy| copy.rank.0 < 2).count();
        first == 0 || first == copies.len()
    };
    let layers = plan.layers.iter();
    layers
        .map(|layer| layer.copies.iter().filter(|copies| of(copies)).count())
        .sum()
}

#[tokio::test(start_paused = true)]
async fn cover_is_followed_as_soon_as_it_is_asked_for() {
    let mut rig = Rig::new();
    let mut settings = config(4);
    settings.cover = Cover::None;
    let operator = rig.operator(settings);
    // 20 slots: enough for two copies of all eight, and four more.
    for rank in 0..4 {
        let domain = if rank < 2 { "a" } else { "b" };
        rig.join_in(rank, 5, Habit::Sound, domain).await;
    }
    rig.mix.send_replace(HEAVY_LOW);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let plan = rig.until_settled("without cover", |_| true).await;
    assert!(in_one_domain(&plan) > 0, "{plan:?}");
    operator
        .config
        .send_modify(|config| config.cover = Cover::All);
    let plan = rig
        .until_settled("all covered", |plan| in_one_domain(plan) == 0)
        .await;
    assert!(is_complete(&plan));
    rig.mix.send_replace(HEAVY_HIGH);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let plan = rig.until_settled("another mix", |_| true).await;
    assert_eq!(in_one_domain(&plan), 0);
    assert!(balance(&plan, &HEAVY_HIGH) > 0.9);
}

/// Nothing moves after the first placement while it holds, and it does once it is lifted.
async fn holds_back(hold: fn(&mut OperatorConfig), because: &str) {
    let mut rig = Rig::new();
    let mut settings = config(3);
    hold(&mut settings);
    let operator = rig.operator(settings);
    for rank in 0..3 {
        rig.join(rank, SLOTS).await;
    }
    rig.until_settled("the first placement", |_| true).await;
    let moved = || operator.metric("foregate_operator_copies_moved_total", "");
    let first = moved();
    rig.mix.send_replace(HEAVY_LOW);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!((moved() - first).abs() < 0.5, "{} copies", moved() - first);
    assert!(operator.metric("foregate_operator_layers_kept_total", because) > 0.5);
    operator.config.send_modify(|config| {
        (config.max_move_bytes, config.economy) = (None, None);
    });
    let plan = rig
        .until_settled("it moves", |plan| balance(plan, &HEAVY_LOW) > 0.95)
        .await;
    assert!(moved() > first + 0.5 && is_complete(&plan));
}

/// An expert of the rig has 3 matrices of 8 × 8 numbers of 4 bytes.
const EXPERT_BYTES: u64 = 768;

#[tokio::test(start_paused = true)]
async fn bytes_to_move_are_kept_to() {
    holds_back(
        |config| config.max_move_bytes = Some(EXPERT_BYTES - 1),
        "budget",
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_move_that_does_not_pay_is_not_made() {
    holds_back(
        |config| {
            config.economy = Some(EconomyConfig {
                horizon_seconds: 1,
                bandwidth: Some(1),
                experts_percent: 50,
                slowdown_percent: 10,
            });
        },
        "not_worth",
    )
    .await;
}

/// The first move tells how fast a worker loads experts; a copy takes 30 ms, so the moves after it pay easily.
#[tokio::test(start_paused = true)]
async fn a_bandwidth_that_nobody_gave_is_measured() {
    let mut rig = Rig::new();
    let mut settings = config(3);
    settings.economy = Some(EconomyConfig {
        horizon_seconds: 300,
        bandwidth: None,
        experts_percent: 50,
        slowdown_percent: 10,
    });
    let _operator = rig.operator(settings);
    for rank in 0..3 {
        rig.join(rank, SLOTS).await;
    }
    let archive = Archive::new(Arc::new(rig.store.clone()), "test");
    for mix in [HEAVY_LOW, HEAVY_HIGH] {
        rig.mix.send_replace(mix);
        tokio::time::sleep(Duration::from_secs(60)).await;
        let plan = rig.until_settled("a placement", |_| true).await;
        assert!(balance(&plan, &mix) > 0.95);
    }
    let past = past(&archive.all().await.unwrap());
    let told = past.records.values().map(|record| record.settings.economy);
    let rates: Vec<f64> = told.flatten().map(|e| e.link_bytes_per_s).collect();
    assert!(!rates.is_empty() && past.records.len() > rates.len());
    for rate in rates {
        let per_copy = EXPERT_BYTES as f64 / rate;
        // Several arrive side by side.
        assert!((0.001..1.0).contains(&per_copy), "{per_copy} s a copy");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_worker_is_repaired_and_taken_in_again() {
    let (mut rig, operator) = started().await;
    rig.kill(2);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(
        rig.state().target.as_ref().unwrap().0.epoch,
        Epoch(1),
        "within its grace"
    );
    let plan = rig
        .until_settled("a repair", |plan| plan.ranks == ranks(&[0, 1]))
        .await;
    assert_eq!(plan.reason, Reason::Repair);
    assert!(
        is_complete(&plan),
        "both ranks together have 8 slots for 8 experts"
    );
    rig.join(2, SLOTS).await;
    let plan = rig
        .until_settled("rank 2 again", |plan| plan.ranks == ranks(&[0, 1, 2]))
        .await;
    assert_eq!(plan.reason, Reason::Resize);
    assert!(is_complete(&plan));
    assert!(operator.metric("foregate_operator_plans_total", "repair") > 0.5);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_is_back_within_its_grace_keeps_its_experts() {
    let (mut rig, _operator) = started().await;
    rig.kill(1);
    tokio::time::sleep(Duration::from_millis(500)).await;
    rig.join(1, SLOTS).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    let plan = rig.until_settled("rank 1 serves again", |_| true).await;
    assert_eq!(plan.epoch, Epoch(1));
}

#[tokio::test(start_paused = true)]
async fn too_few_slots_after_a_loss_are_waited_out() {
    let mut rig = Rig::new();
    let operator = rig.operator(config(2));
    rig.join(0, SLOTS).await;
    rig.join(1, SLOTS).await;
    rig.until_settled("the first placement", |_| true).await;
    rig.kill(1);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(
        rig.active().epoch,
        Epoch(1),
        "4 slots do not hold 8 experts"
    );
    assert!(operator.metric("foregate_operator_plan_failures_total", "") > 0.5);
    rig.join(1, SLOTS).await;
    rig.until_settled("rank 1 serves again", |plan| plan.ranks == ranks(&[0, 1]))
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_leaves_by_intent_is_a_resize() {
    let (rig, _operator) = started().await;
    rig.drain(0);
    let plan = rig
        .until_settled("a plan without rank 0", |p| p.ranks == ranks(&[1, 2]))
        .await;
    assert_eq!(plan.reason, Reason::Resize);
    assert!(is_complete(&plan));
}

#[tokio::test(start_paused = true)]
async fn a_rank_that_is_to_leave_is_emptied_first_and_taken_in_when_it_may_stay() {
    let (rig, operator) = started().await;
    operator
        .config
        .send_modify(|config| config.leaving = ranks(&[1]));
    let plan = rig
        .until_settled("a placement without rank 1", |plan| {
            !plan.ranks.contains(&Rank(1))
        })
        .await;
    assert_eq!(plan.reason, Reason::Resize);
    assert!(is_complete(&plan), "every expert has moved");
    assert!(
        rig.state().members.contains_key(&Rank(1)),
        "it is still there"
    );
    operator.config.send_modify(|config| config.leaving.clear());
    let plan = rig
        .until_settled("rank 1 again", |plan| plan.ranks.len() == 3)
        .await;
    assert_eq!(
        (plan.reason, plan.ranks.clone()),
        (Reason::Resize, ranks(&[0, 1, 2]))
    );
}

#[tokio::test(start_paused = true)]
async fn a_rank_that_nobody_can_stand_in_for_stays_in_the_placement() {
    let mut rig = Rig::new();
    let operator = rig.operator(config(2));
    rig.join(0, 4).await;
    rig.join(1, 4).await;
    rig.until_settled("the first placement", |_| true).await;
    operator
        .config
        .send_modify(|config| config.leaving = ranks(&[1]));
    tokio::time::sleep(Duration::from_secs(60)).await;
    let plan = rig.active();
    assert_eq!(
        plan.ranks,
        ranks(&[0, 1]),
        "four slots hold no eight experts"
    );
    assert!(is_complete(&plan));
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_never_prepares_is_done_without() {
    let mut rig = Rig::new();
    let _operator = rig.operator(config(3));
    rig.join(0, SLOTS).await;
    rig.join(1, SLOTS).await;
    rig.join_as(2, SLOTS, Habit::Stuck).await;
    rig.until("a first proposal", |state| state.target.is_some())
        .await;
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert!(rig.state().active.is_none());
    let plan = rig
        .until_settled("a plan without it", |plan| plan.ranks == ranks(&[0, 1]))
        .await;
    assert!(is_complete(&plan));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(
        rig.active().ranks,
        ranks(&[0, 1]),
        "the same process is not asked again"
    );
    rig.kill(2);
    rig.join(2, SLOTS).await;
    rig.until_settled("a new process", |plan| plan.ranks == ranks(&[0, 1, 2]))
        .await;
}

/// The placement that counts on it can never be activated, and without it there is nothing to change.
#[tokio::test(start_paused = true)]
async fn a_worker_that_goes_before_it_is_ready_leaves_nothing_pending() {
    let (mut rig, _operator) = started().await;
    rig.join_as(3, SLOTS, Habit::Stuck).await;
    rig.until("a placement that counts on it", |state| {
        let target = state.target.as_ref();
        target.is_some_and(|(plan, _)| plan.ranks.contains(&Rank(3)))
    })
    .await;
    rig.kill(3);
    let plan = rig
        .until_settled("all is as before, under a new number", |plan| {
            plan.epoch > Epoch(2)
        })
        .await;
    assert_eq!(plan.ranks, ranks(&[0, 1, 2]));
    rig.mix.send_replace(HEAVY_LOW);
    rig.until_settled("it balances on", |plan| balance(plan, &HEAVY_LOW) > 0.95)
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_sums_otherwise_gets_no_experts() {
    let (mut rig, _operator) = started().await;
    rig.join_as(3, SLOTS, Habit::SumsOtherwise).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(rig.active().ranks, ranks(&[0, 1, 2]));
    rig.kill(3);
    rig.join(3, SLOTS).await;
    rig.until_settled("one that sums alike", |plan| {
        plan.ranks == ranks(&[0, 1, 2, 3])
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_killed_operator_resumes_without_a_new_placement() {
    let (mut rig, operator) = started().await;
    rig.mix.send_replace(HEAVY_LOW);
    tokio::time::sleep(Duration::from_secs(30)).await;
    let before = rig
        .until_settled("a settled placement", |plan| plan.epoch > Epoch(1))
        .await;
    operator.task.abort();
    rig.mix.send_replace(HEAVY_HIGH);
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(
        rig.active().epoch,
        before.epoch,
        "nobody re-balances, everybody serves"
    );
    assert_eq!(rig.state().leader, None);

    rig.mix.send_replace(HEAVY_LOW);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let next = rig.operator(config(3));
    rig.until("a new leader", |state| state.leader.is_some())
        .await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(next.leads());
    let plan = rig.active();
    assert!(
        plan.epoch == before.epoch || plan.reason == Reason::Reweigh,
        "the load is as before: {:?}",
        plan.reason
    );
    rig.mix.send_replace(HEAVY_HIGH);
    let plan = rig
        .until_settled("it balances", |p| p.epoch > plan.epoch)
        .await;
    assert!(is_complete(&plan));
}

#[tokio::test(start_paused = true)]
async fn an_operator_killed_in_mid_rollover_is_finished_by_the_next() {
    let mut rig = Rig::new();
    let operator = rig.operator(config(2));
    rig.join(0, 8).await;
    rig.join_as(1, 8, Habit::Stuck).await;
    rig.until("a proposal", |state| state.target.is_some())
        .await;
    operator.task.abort();
    rig.kill(1);
    rig.join(1, 8).await;
    rig.until("rank 1 prepares", |s| {
        s.acks.len() == 2 && s.acks.values().all(|a| a.prepared == Epoch(1))
    })
    .await;
    assert!(rig.state().active.is_none());
    let _next = rig.operator(config(2));
    let plan = rig.until_settled("the same placement", |_| true).await;
    assert_eq!(plan.epoch, Epoch(1));
}

#[tokio::test(start_paused = true)]
async fn of_two_operators_one_leads_and_the_other_takes_over() {
    let (mut rig, first) = started().await;
    let second = rig.operator(config(3));
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!((first.leads(), second.leads()), (true, false));
    first.task.abort();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(second.leads());
    rig.mix.send_replace(HEAVY_LOW);
    rig.until_settled("the second one balances", |plan| plan.epoch > Epoch(1))
        .await;
    // One that stops in order gives the lead back at once.
    let third = rig.operator(config(3));
    tokio::time::sleep(Duration::from_secs(3)).await;
    second.shutdown.cancel();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(third.leads());
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_the_store_stops_re_balancing_only() {
    let (rig, operator) = started().await;
    let before = rig.active();
    rig.store.interrupt();
    rig.mix.send_replace(HEAVY_LOW);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let state = rig.state();
    assert!(!state.connected);
    assert_eq!(state.members.len(), 3, "what was known stays known");
    assert_eq!(state.active.as_ref().unwrap().0, before);
    rig.store.resume();
    let plan = rig
        .until_settled("it goes on", |plan| plan.epoch > before.epoch)
        .await;
    assert!(
        matches!(plan.reason, Reason::Move | Reason::Reweigh),
        "{:?}",
        plan.reason
    );
    assert!(operator.leads());
}

#[tokio::test(start_paused = true)]
async fn a_lead_that_is_lost_is_won_again() {
    let (rig, operator) = started().await;
    let name = rig.state().leader.clone().unwrap();
    let lease = name.strip_prefix("operator-").unwrap();
    rig.store.expire(i64::from_str_radix(lease, 16).unwrap());
    rig.until("it leads again, on another lease", |state| {
        state.leader.as_ref().is_some_and(|leader| *leader != name)
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(operator.leads());
    assert_eq!(rig.active().epoch, Epoch(1));
}

#[tokio::test(start_paused = true)]
async fn a_target_that_somebody_else_wrote_is_respected() {
    let (rig, _operator) = started().await;
    let active = rig.active();
    let seen = rig.state().target.as_ref().unwrap().1;
    let mut other = (*active).clone();
    (other.epoch, other.parent, other.reason) = (Epoch(9), active.epoch, Reason::Move);
    assert!(rig.coord.propose(&other, Some(seen)).await.unwrap());
    assert!(
        !rig.coord.propose(&other, Some(seen)).await.unwrap(),
        "it is not that one any more"
    );
    let plan = rig
        .until_settled("it is rolled out", |plan| plan.epoch >= Epoch(9))
        .await;
    assert_eq!(plan.epoch, Epoch(9));
    rig.mix.send_replace(HEAVY_LOW);
    rig.until_settled("the next number is above", |plan| plan.epoch > Epoch(9))
        .await;
}

const KEYS: [&str; 8] = [
    "member/0",
    "load/1",
    "placement/ack/1",
    "placement/target",
    "placement/active",
    "operator/leader",
    "member/77",
    "unknown/1",
];

/// Values of foreign and of broken writers, some of which look like ours.
const GARBAGE: [&[u8]; 7] = [
    b"\xffnot json",
    b"",
    b"{\"format\":1,\"value\":null}",
    b"{\"format\":1,\"value\":{\"prepared\":18446744073709551615,\"serving\":18446744073709551615,\"drained\":0}}",
    b"{\"format\":1,\"value\":{\"epoch\":18446744073709551615,\"parent\":0,\"reason\":\"move\",\"ranks\":[],\"experts\":0,\
      \"layers\":[],\"balance_before\":0,\"balance_after\":0}}",
    b"{\"format\":1,\"value\":{\"name\":1}}",
    b"[[[[[[[[[[[[[[[[",
];

#[tokio::test(start_paused = true)]
async fn garbage_under_any_key_stops_nobody() {
    for garbage in GARBAGE {
        for key in KEYS {
            let told = format!("{key} {}", String::from_utf8_lossy(garbage));
            let (mut rig, operator) = started().await;
            rig.spoil(key, garbage).await;
            rig.mix.send_replace(HEAVY_LOW);
            rig.until_settled(&told, |plan| plan.epoch > Epoch(1)).await;
            // Whoever starts now has seen none of what was there before.
            operator.task.abort();
            rig.spoil(key, garbage).await;
            tokio::time::sleep(Duration::from_secs(6)).await;
            let _next = rig.operator(config(3));
            rig.join(3, SLOTS).await;
            let plan = rig
                .until_settled(&told, |plan| plan.ranks.contains(&Rank(3)))
                .await;
            assert!(is_complete(&plan), "{told}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn placements_that_cannot_be_read_are_written_again() {
    let (rig, operator) = started().await;
    for key in ["placement/active", "placement/target"] {
        let plan = rig.until_settled("all is quiet", |_| true).await;
        let epoch = format!("\"epoch\":{},", plan.epoch);
        rig.spoil(key, GARBAGE[0]).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(rig.found(key).await.contains(&epoch), "{key}");
        // What a newer version wrote is its own affair: it is neither read nor replaced.
        rig.spoil(key, b"{\"format\":3,\"value\":7}").await;
        rig.mix.send_replace(HEAVY_LOW);
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(rig.found(key).await.contains("\"format\":3"), "{key}");
        assert_eq!(rig.active().epoch, plan.epoch);
        rig.spoil(key, GARBAGE[0]).await;
        rig.until("it goes on", |state| {
            state
                .active
                .as_ref()
                .is_some_and(|(next, _)| next.epoch > plan.epoch)
        })
        .await;
        rig.mix.send_replace(EVEN);
        tokio::time::sleep(Duration::from_secs(20)).await;
    }
    // Not one attempt a tick while it could not write.
    assert!(operator.metric("foregate_operator_stale_writes_total", "") < 5.0);
}

#[tokio::test(start_paused = true)]
async fn outages_at_any_moment_are_survived() {
    for seed in 0..12_u64 {
        let mut rig = Rig::new();
        // The first outage begins before, during or after the election and the first placement.
        let moment = |n: u64| Duration::from_millis((seed * 7 + n * 13) * 37 % 1900);
        let operator = rig.operator(config(3));
        for rank in 0..3 {
            rig.join(rank, SLOTS).await;
        }
        for (n, mix) in [HEAVY_LOW, HEAVY_HIGH, EVEN, HEAVY_LOW]
            .into_iter()
            .enumerate()
        {
            tokio::time::sleep(moment(n as u64)).await;
            rig.store.interrupt();
            rig.mix.send_replace(mix);
            tokio::time::sleep(moment(n as u64 + 4) * 4).await;
            rig.store.resume();
        }
        if seed % 3 == 0 {
            // The outage was longer than the lead's time to live.
            let name = rig.state().leader.clone().unwrap_or_default();
            if let Some(lease) = name.strip_prefix("operator-") {
                rig.store.expire(i64::from_str_radix(lease, 16).unwrap());
            }
        }
        rig.until("a leader", |state| state.leader.is_some()).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        let plan = rig.until_settled("a settled placement", |_| true).await;
        assert!(is_complete(&plan), "{seed}");
        assert!(
            balance(&plan, &HEAVY_LOW) > 0.9,
            "{seed}: {}",
            balance(&plan, &HEAVY_LOW)
        );
        assert!(operator.leads(), "{seed}");
    }
}

fn past(all: &std::collections::BTreeMap<String, bytes::Bytes>) -> Past {
    let past = Past::read(
        all.iter()
            .map(|(name, value)| (name.as_str(), value.as_ref())),
    );
    assert!(past.unreadable.is_empty(), "{:?}", past.unreadable);
    past
}

#[tokio::test(start_paused = true)]
async fn decisions_are_kept_within_bounds_and_give_themselves_again() {
    let (rig, operator) = started().await;
    let archive = Archive::new(Arc::new(rig.store.clone()), "test");
    let mut mixes = [HEAVY_LOW, HEAVY_HIGH].into_iter().cycle();
    while rig.active().epoch < Epoch(19) {
        rig.mix.send_replace(mixes.next().unwrap());
        tokio::time::sleep(Duration::from_secs(12)).await;
    }
    rig.until_settled("a settled placement", |_| true).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    let past = past(&archive.all().await.unwrap());
    assert_eq!(past.records.len(), 16, "the newest");
    assert!(past.placements.len() <= 17, "{}", past.placements.len());
    assert_eq!(past.records.keys().next_back(), Some(&rig.active().epoch));
    for (epoch, record) in &past.records {
        let decision = record.replay(past.parent(record).unwrap()).unwrap();
        assert_eq!(decision.placement(), Some(past.placement(*epoch).unwrap()));
    }
    // The cluster is at rest, so the last change was measured to its end.
    let last = past.records.values().next_back().unwrap();
    let measured = last.measured;
    assert!(measured.closed && measured.windows >= 3, "{measured:?}");
    assert!(
        measured.balance_after.unwrap() > 0.9 && measured.seconds.is_some(),
        "{measured:?}"
    );
    let latest = past.latest.unwrap();
    assert_eq!(
        (latest.epoch, latest.reason),
        (rig.active().epoch, None),
        "kept since"
    );
    let shown = |label| operator.metric("foregate_operator_change_balance", label);
    assert!(shown("measured") > 0.0 && shown("predicted") > 0.0);
    assert!(operator.metric("foregate_operator_records_dropped_total", "") < 0.5);
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_starts_anew_plans_on_what_it_remembers() {
    let (mut rig, operator) = started().await;
    let without = balance(&rig.active(), &HEAVY_LOW);
    rig.mix.send_replace(HEAVY_LOW);
    tokio::time::sleep(Duration::from_secs(60)).await;
    operator.shutdown.cancel();
    for rank in 0..3 {
        rig.kill(rank);
    }
    tokio::time::sleep(Duration::from_secs(10)).await;
    for key in ["target", "active"] {
        let key = format!("/foregate/test/placement/{key}");
        rig.store.delete(&key).await.unwrap();
    }
    // Nobody asks for anything, so all that is known is what was.
    rig.mix.send_replace([0; 8]);
    let _operator = rig.operator(config(3));
    for rank in 0..3 {
        rig.join(rank, SLOTS).await;
    }
    let plan = rig
        .until_settled("a first placement", |plan| plan.reason == Reason::Initial)
        .await;
    let with = balance(&plan, &HEAVY_LOW);
    assert!(with > 0.95 && without < 0.9, "{without} -> {with}");
}
