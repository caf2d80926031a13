//! The balancer: what the leader does with what it sees.
//!
//! Level-triggered: at every change of the store and at every tick it looks at the whole state and asks the
//! planner's coordinator for the next thing to do. Nothing it does is lost with it, so its successor goes on.
//!
//! ```text
//!  states ─┐                       ┌─ Plan, Replan ───────────── plan ─ propose (compare-and-put on the target)
//!  tick ───┴─ observe ─ coordinator┼─ Settled ─ window over? ─── plan ─ propose, or keep
//!                                  ├─ Activate ───────────────── activate (compares target and active)
//!                                  └─ Wait ───────────────────── until somebody acknowledges, or patience ends
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::{Epoch, Rank};
use foregate_api::member::{Ack, Member};
use foregate_api::model::ModelSpec;
use foregate_api::node::OperatorConfig;
use foregate_api::placement::Placement;
use foregate_explain::record::{Trigger, rounded};
use foregate_planner::demand::Demand;
use foregate_planner::rollover::coordinator::{
    Action, ClusterView, Until, anew, highest_epoch, next,
};
use foregate_planner::{Decision, Economy, History, PlanError, Report, Settings};
use foregate_store::{ClusterState, Coord, StoreError};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use crate::forecast::Foretold;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::problem::{eligible, model, name_reason, problem};
use crate::record::{Inputs, Recorder};
use crate::roster::Roster;

/// How often the state is looked at without a change: the resolution of graces and windows.
const TICK: Duration = Duration::from_millis(100);
/// How often a wait is logged again.
const REMIND: Duration = Duration::from_secs(10);
/// How often what is remembered of the load is kept.
const REMEMBER: Duration = Duration::from_secs(20);

/// The leader's actor.
#[derive(Debug)]
pub(crate) struct Balancer {
    coord: Coord,
    settings: watch::Receiver<OperatorConfig>,
    /// The newest of `settings`, taken at every look.
    config: OperatorConfig,
    states: watch::Receiver<Arc<ClusterState>>,
    metrics: Arc<Metrics>,
    recorder: Recorder,
    roster: Roster,
    /// The demand of the model it was made for.
    demand: Option<(ModelSpec, Demand)>,
    foretold: Foretold,
    /// What the model was asked for before; `None` until the archive was asked.
    memory: Option<Memory>,
    remembered_at: Instant,
    history: History,
    window_ends: Instant,
    /// Rows of a layer that were seen since the last decision.
    window_closed: Option<u64>,
    /// Revisions of target and active placement that a write of ours has replaced: a state that still shows them
    /// is old.
    outdated: BTreeSet<(Key, Option<u64>)>,
    /// Revisions of target and active placement under which somebody else's write came first: nothing is written
    /// until the state shows it.
    overtaken: Option<[Option<u64>; 2]>,
    proposed_at: Option<(Epoch, Instant)>,
    said: Said,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Target,
    Active,
}

/// The last thing that was logged about waiting, so that a wait is not a flood.
#[derive(Debug, Default)]
struct Said {
    what: String,
    at: Option<Instant>,
}

impl Said {
    /// Whether `what` is worth a line now.
    fn say(&mut self, what: &str, now: Instant) -> bool {
        if self.what == what && self.at.is_some_and(|at| now < at + REMIND) {
            return false;
        }
        what.clone_into(&mut self.what);
        self.at = Some(now);
        true
    }
}

/// Everything one look at the cluster needs.
struct Look {
    state: Arc<ClusterState>,
    alive: BTreeSet<Rank>,
    acks: BTreeMap<Rank, Ack>,
    now: Instant,
}

impl Look {
    fn view(&self) -> ClusterView<'_> {
        ClusterView {
            alive: &self.alive,
            acks: &self.acks,
            target: self.target(),
            active: self.active(),
        }
    }

    fn target(&self) -> Option<&Placement> {
        self.state.target.as_ref().map(|(plan, _)| plan.as_ref())
    }

    fn active(&self) -> Option<&Placement> {
        self.state.active.as_ref().map(|(plan, _)| plan.as_ref())
    }

    /// Revision of what is under the key, readable or not.
    fn revision(&self, key: Key) -> Option<u64> {
        let (known, unreadable) = match key {
            Key::Target => (&self.state.target, self.state.target_unreadable),
            Key::Active => (&self.state.active, self.state.active_unreadable),
        };
        unreadable.or(known.as_ref().map(|(_, at)| *at))
    }

    fn revisions(&self) -> [Option<u64>; 2] {
        [self.revision(Key::Target), self.revision(Key::Active)]
    }
}

impl Balancer {
    pub(crate) fn new(
        coord: Coord,
        settings: watch::Receiver<OperatorConfig>,
        states: watch::Receiver<Arc<ClusterState>>,
        metrics: Arc<Metrics>,
        recorder: Recorder,
    ) -> Self {
        let config = settings.borrow().clone();
        let window_ends = Instant::now() + Duration::from_millis(config.window_ms);
        Self {
            coord,
            settings,
            config,
            states,
            metrics,
            recorder,
            roster: Roster::default(),
            demand: None,
            foretold: Foretold::default(),
            memory: None,
            remembered_at: Instant::now(),
            history: History::default(),
            window_ends,
            window_closed: None,
            outdated: BTreeSet::new(),
            overtaken: None,
            proposed_at: None,
            said: Said::default(),
        }
    }

    /// Runs until it is dropped, or until the watch ends.
    pub(crate) async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = self.states.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                _ = tick.tick() => {}
            }
            if let Err(error) = self.step().await {
                let text = error.to_string();
                if self.said.say(&text, Instant::now()) {
                    tracing::warn!(%error, "the store did not take a write; it is tried again");
                }
            }
        }
    }

    /// One look, at most one action.
    async fn step(&mut self) -> Result<(), StoreError> {
        let state = Arc::clone(&self.states.borrow_and_update());
        self.config.clone_from(&self.settings.borrow());
        self.metrics.connected.set(i64::from(state.connected));
        if !state.connected {
            return Ok(()); // What is not fresh is not acted on.
        }
        let look = self.look(state);
        self.show(&look);
        self.observe(&look);
        self.recall().await;
        if self.is_outdated(&look) || self.restore(&look).await? {
            return Ok(());
        }
        match next(&look.view()) {
            Action::Plan => self.first(&look).await,
            Action::Replan { without } => {
                tracing::debug!(?without, "the placement counts on ranks that are gone");
                self.decide(&look, look.active(), None).await
            }
            Action::Settled => self.settled(&look).await,
            Action::Wait { on, until } => {
                self.wait(&look, &on, until);
                Ok(())
            }
            Action::Activate(epoch) => self.activate(&look, epoch).await,
        }
    }

    fn look(&mut self, state: Arc<ClusterState>) -> Look {
        let now = Instant::now();
        let placements = [&state.target, &state.active];
        let wanted: BTreeSet<Rank> = placements
            .into_iter()
            .flatten()
            .flat_map(|(plan, _)| plan.ranks.iter().copied())
            .collect();
        let alive = self.roster.alive(&state, &wanted, now);
        let acks = state
            .acks
            .iter()
            .filter(|(rank, _)| alive.contains(rank))
            .map(|(rank, ack)| (*rank, *ack))
            .collect();
        Look {
            state,
            alive,
            acks,
            now,
        }
    }

    fn show(&self, look: &Look) {
        let epoch = |plan: Option<&Placement>| plan.map_or(Epoch(0), |plan| plan.epoch);
        self.metrics
            .epochs(epoch(look.target()), epoch(look.active()));
        let members = &look.state.members;
        self.metrics.ranks("registered", members.len());
        let ranks = look.active().map_or(&[][..], |plan| plan.ranks.as_slice());
        let lost = ranks.iter().filter(|rank| !members.contains_key(rank));
        self.metrics.ranks("lost", lost.count());
        self.metrics.ranks("expected", self.config.workers as usize);
    }

    /// Feeds every load window that is new, and closes the cluster's window when its time is over.
    fn observe(&mut self, look: &Look) {
        let Some(model) = model(&look.state) else {
            return;
        };
        if self.demand.as_ref().is_none_or(|(known, _)| known != model) {
            let demand = Demand::new(model.moe_layers(), model.experts);
            self.demand = Some((model.clone(), demand));
            self.memory = None;
            self.history = History::default();
        }
        let Some((_, demand)) = &mut self.demand else {
            return;
        };
        for (rank, window) in &look.state.loads {
            if !look.alive.contains(rank) {
                continue;
            }
            self.recorder.window(window);
            if let Err(error) = demand.observe(window)
                && self.said.say(&error.to_string(), look.now)
            {
                tracing::error!(%error, "load window left out");
            }
        }
        if look.now < self.window_ends {
            return;
        }
        self.window_ends = look.now + Duration::from_millis(self.config.window_ms);
        if let Some(closed) = demand.close(self.config.min_rows) {
            tracing::debug!(
                rows = closed.rows,
                ranks = closed.ranks.len(),
                "window closed"
            );
            self.window_closed = Some(closed.rows);
            self.remember(look.now);
            self.foresee(look);
        }
    }

    /// Hands what gateways expect of the window that begins to the demand, which trusts it as far as it was right.
    fn foresee(&mut self, look: &Look) {
        let Some((_, demand)) = self.demand.as_mut().filter(|_| self.config.forecast) else {
            self.metrics.foreseen(None);
            return;
        };
        let base = demand.prediction();
        let (layers, experts) = (base.len(), base.first().map_or(0, Vec::len));
        let combined = self
            .foretold
            .combine(&look.state.forecasts, layers, experts);
        if let Some(combined) = &combined
            && let Err(error) = demand.expect(combined.over(&base))
        {
            tracing::error!(%error, "forecast left out");
        }
        let weight = demand.forecast_weight();
        self.metrics
            .foreseen(combined.as_ref().map(|combined| (combined, weight)));
    }

    /// What is remembered of the model, asked once. A store that does not answer is no reason to wait.
    async fn recall(&mut self) {
        let Some((model, _)) = self.demand.as_ref().filter(|_| self.memory.is_none()) else {
            return;
        };
        let found = self.recorder.recall(&Memory::name(model)).await;
        self.memory = Some(found);
    }

    /// Learns from the demand, and now and then keeps what was learnt.
    fn remember(&mut self, now: Instant) {
        let (Some((model, demand)), Some(memory)) = (&self.demand, &mut self.memory) else {
            return;
        };
        memory.learn(&demand.prediction(), self.recorder.now_ms());
        if now >= self.remembered_at + REMEMBER {
            self.remembered_at = now;
            self.recorder.remember(Memory::name(model), memory);
        }
    }

    /// Whether the state is from before a write of ours.
    fn is_outdated(&mut self, look: &Look) -> bool {
        self.outdated
            .retain(|(key, replaced)| look.revision(*key) == *replaced);
        if self.overtaken.is_some_and(|seen| seen != look.revisions()) {
            self.overtaken = None;
        }
        !self.outdated.is_empty() || self.overtaken.is_some()
    }

    /// Writes a placement that is known again over a value that cannot be read: whoever starts now finds neither.
    async fn restore(&mut self, look: &Look) -> Result<bool, StoreError> {
        let (key, seen, written) = if let (Some(seen), Some(plan)) =
            (look.state.active_unreadable, look.active())
        {
            (Key::Active, seen, self.coord.reinstate(plan, seen).await?)
        } else if let (Some(seen), Some(plan)) = (look.state.target_unreadable, look.target()) {
            (
                Key::Target,
                seen,
                self.coord.propose(plan, Some(seen)).await?,
            )
        } else {
            return Ok(false);
        };
        if written {
            tracing::warn!(?key, "a placement that could not be read was written again");
            self.outdated.insert((key, Some(seen)));
        } else {
            self.stale("restoration", look);
        }
        Ok(true)
    }

    /// The first placement waits for all ranks it was ordered for.
    async fn first(&mut self, look: &Look) -> Result<(), StoreError> {
        let missing: Vec<u32> = (0..self.config.workers)
            .filter(|rank| !look.state.members.contains_key(&Rank(*rank)))
            .collect();
        if missing.is_empty() {
            return self.decide(look, None, None).await;
        }
        if self.said.say(&format!("missing {missing:?}"), look.now) {
            tracing::info!(
                registered = look.state.members.len(),
                expected = self.config.workers,
                ?missing,
                "waiting for workers"
            );
        }
        Ok(())
    }

    /// Nothing is under way: take in ranks that came or leave, and once a window follow the load.
    async fn settled(&mut self, look: &Look) -> Result<(), StoreError> {
        if let Some((epoch, since)) = self.proposed_at.take() {
            tracing::debug!(
                epoch = epoch.0,
                seconds = since.elapsed().as_secs_f64(),
                "settled"
            );
        }
        let Some(active) = look.active() else {
            return Ok(());
        };
        if active
            .ranks
            .iter()
            .any(|rank| !look.state.members.contains_key(rank))
        {
            return Ok(()); // Within its grace: either it comes back or a repair follows.
        }
        let able: BTreeSet<Rank> = self
            .eligible(look)
            .iter()
            .map(|member| member.rank)
            .collect();
        let other_ranks = !able.is_empty() && active.ranks.iter().copied().ne(able);
        let rows = self.window_closed.take().filter(|_| self.config.enabled);
        if other_ranks || rows.is_some() {
            return self.decide(look, Some(active), rows).await;
        }
        Ok(())
    }

    fn wait(&mut self, look: &Look, on: &BTreeSet<Rank>, until: Until) {
        let epoch = look.target().map_or(Epoch(0), |plan| plan.epoch);
        let ranks: Vec<u32> = on.iter().map(|rank| rank.0).collect();
        if self
            .said
            .say(&format!("{epoch} {until:?} {ranks:?}"), look.now)
        {
            tracing::debug!(
                epoch = epoch.0,
                ?until,
                ?ranks,
                "waiting for acknowledgements"
            );
        }
        if until == Until::Prepared
            && self.roster.lose_patience(&look.state, epoch, on, look.now)
        {
            tracing::error!(
                epoch = epoch.0,
                ?ranks,
                "workers do not prepare; going on without"
            );
        }
    }

    async fn activate(&mut self, look: &Look, epoch: Epoch) -> Result<(), StoreError> {
        let Some(target) = look.target() else {
            return Ok(());
        };
        let seen = look.revision(Key::Active);
        if !self.coord.activate(target, seen).await? {
            self.stale("activation", look);
            return Ok(());
        }
        self.outdated.insert((Key::Active, seen));
        let seconds = self
            .proposed_at
            .filter(|(proposed, _)| *proposed == epoch)
            .map(|(_, since)| since.elapsed().as_secs_f64());
        if let Some(seconds) = seconds {
            self.metrics.rollover_seconds.observe(seconds);
        }
        self.recorder.activated(epoch, seconds);
        tracing::info!(epoch = epoch.0, seconds, "placement active");
        Ok(())
    }

    fn stale(&mut self, what: &'static str, look: &Look) {
        self.metrics.stale.inc();
        self.overtaken = Some(look.revisions());
        tracing::info!(
            what,
            "somebody else wrote first; starting over from the new state"
        );
    }

    /// Asks the planner, and proposes what it says. `rows`: those of a layer in the window that closed.
    async fn decide(
        &mut self,
        look: &Look,
        parent: Option<&Placement>,
        rows: Option<u64>,
    ) -> Result<(), StoreError> {
        let Some(mut inputs) = self.inputs(look) else {
            return Ok(()); // There is nobody to plan for yet.
        };
        let decision = match self.plan(inputs.clone(), parent).await {
            Ok(Some(decision)) => decision,
            Ok(None) => return Ok(()),
            Err(error) => {
                if self.said.say(&error.to_string(), look.now) {
                    self.metrics.failures.inc();
                    tracing::error!(%error, "no placement; the one in force stands");
                }
                return Ok(());
            }
        };
        let report = decision.report();
        self.metrics.decided(report);
        if report.parent != Epoch(0) {
            inputs.trigger = trigger(report, rows);
        }
        let Some(mut plan) = decision.placement().cloned() else {
            tracing::debug!(epoch = report.parent.0, "{report}");
            self.recorder.kept(inputs, report, parent, look.now);
            return self.replace(look).await;
        };
        name_reason(&mut plan, &look.state, &report.lost, &self.config.leaving);
        let seen = look.revision(Key::Target);
        if !self.coord.propose(&plan, seen).await? {
            self.stale("proposal", look);
            return Ok(());
        }
        self.outdated.insert((Key::Target, seen));
        self.proposed_at = Some((plan.epoch, look.now));
        self.metrics.proposed(plan.reason, report.copies_moved);
        self.recorder.proposed(inputs, report, &plan, parent);
        tracing::info!(
            epoch = plan.epoch.0,
            reason = plan.reason.name(),
            balance_before = report.balance_before,
            balance_after = report.balance_after,
            copies = report.copies_moved,
            "placement proposed: {report}"
        );
        Ok(())
    }

    /// Puts the placement in force, under a new number, in the place of a target that can never be activated.
    async fn replace(&mut self, look: &Look) -> Result<(), StoreError> {
        let Some(plan) = anew(&look.view()) else {
            return Ok(());
        };
        let seen = look.revision(Key::Target);
        if !self.coord.propose(&plan, seen).await? {
            self.stale("replacement", look);
            return Ok(());
        }
        self.outdated.insert((Key::Target, seen));
        self.proposed_at = Some((plan.epoch, look.now));
        self.metrics.proposed(plan.reason, 0);
        tracing::info!(
            epoch = plan.epoch.0,
            "the target can never be activated; the placement in force is proposed anew"
        );
        Ok(())
    }

    /// What the planner is given now; `None`: there is nobody to plan for.
    fn inputs(&self, look: &Look) -> Option<Inputs> {
        let (model, demand) = self.demand.as_ref()?;
        let above = highest_epoch(&look.view());
        let (expert_bytes, dense_bytes) = Inputs::sizes(model);
        let cover = self.config.cover;
        let mut problem = problem(&self.eligible(look), model, demand, cover, above);
        let memory = self.memory.as_ref().filter(|_| demand.rows() == 0);
        let remembered =
            memory.and_then(|memory| memory.recall(problem.layers, problem.experts));
        let is_remembered = remembered.is_some();
        if let Some(remembered) = remembered {
            problem.demand = rounded(remembered);
        }
        Some(Inputs {
            problem,
            settings: self.limits(expert_bytes),
            history: self.history.clone(),
            trigger: Trigger::First {
                remembered: is_remembered,
            },
            window_ms: self.config.window_ms,
            expert_bytes,
            dense_bytes,
        })
    }

    /// One call of the planner, off the runtime's threads. `None`: it broke off.
    async fn plan(
        &mut self,
        inputs: Inputs,
        parent: Option<&Placement>,
    ) -> Result<Option<Decision>, PlanError> {
        let parent = parent.cloned();
        let Inputs {
            problem,
            settings,
            mut history,
            ..
        } = inputs;
        let begun = Instant::now();
        let planned = tokio::task::spawn_blocking(move || {
            let decision =
                foregate_planner::plan(&problem, parent.as_ref(), &settings, &mut history);
            (decision, history)
        });
        let Ok((decision, history)) = planned.await else {
            self.metrics.failures.inc();
            tracing::error!("the planner panicked; the placement in force stands");
            return Ok(None);
        };
        self.metrics
            .plan_seconds
            .observe(begun.elapsed().as_secs_f64());
        self.history = history;
        decision.map(Some)
    }

    fn eligible<'a>(&self, look: &'a Look) -> Vec<&'a Arc<Member>> {
        eligible(&look.state, &look.alive, &self.config.leaving)
    }

    fn limits(&self, expert_bytes: u64) -> Settings {
        Settings {
            threshold: self.config.threshold,
            max_moves_per_layer: self.config.max_moves_per_layer as usize,
            max_bytes: self.config.max_move_bytes,
            economy: self.economy(expert_bytes),
            threads: threads(),
        }
    }

    /// What decides whether a move pays; `None` also while nobody knows how fast a worker loads experts.
    fn economy(&self, expert_bytes: u64) -> Option<Economy> {
        let economy = self.config.economy.as_ref()?;
        let given = economy.bandwidth.map(|bytes| bytes as f64);
        let measured = || {
            self.recorder
                .copies_per_second()
                .map(|n| n * expert_bytes as f64)
        };
        Some(Economy {
            busy: f64::from(economy.experts_percent) / 100.0,
            horizon_s: f64::from(economy.horizon_seconds),
            link_bytes_per_s: given.or_else(measured)?,
            slowdown: f64::from(economy.slowdown_percent) / 100.0,
        })
    }
}

/// What made the balancer ask for a placement after another.
fn trigger(report: &Report, rows: Option<u64>) -> Trigger {
    match rows {
        Some(rows) if report.lost.is_empty() && report.joined.is_empty() => {
            Trigger::Window { rows }
        }
        _ => Trigger::Ranks {
            lost: report.lost.clone(),
            joined: report.joined.clone(),
        },
    }
}

/// Threads of the planner: what the machine has, within reason. Plans do not depend on it.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(8))
}
