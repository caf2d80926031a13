//! `foregate trace replay`: a trace's windows through the operator's demand and planner, decision by decision.

use std::collections::BTreeSet;
use std::path::PathBuf;

use foregate_api::ids::{Epoch, Rank};
use foregate_api::load::{EngineLoad, LoadWindow};
use foregate_api::placement::Placement;
use foregate_explain::record::rounded;
use foregate_planner::demand::Demand;
use foregate_planner::redundancy::slots_to_link;
use foregate_planner::{History, Problem, RankSlots, Settings, plan};
use foregate_trace::{Event, Header};
use serde::Serialize;

use crate::error::{CliError, print};

/// Arguments of `foregate trace replay`.
#[derive(Debug, clap::Args)]
pub(super) struct ReplayArgs {
    /// The trace.
    file: PathBuf,
    /// Workers with expert slots; default: as many as the trace has ranks.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    workers: Option<u32>,
    /// Expert slots of each per layer; default: as many as link all ranks.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    slots: Option<u32>,
    /// Balance below which copies may move.
    #[arg(long, default_value_t = Settings::default().threshold)]
    threshold: f64,
    /// Most copies to move per layer and window.
    #[arg(long, default_value_t = Settings::default().max_moves_per_layer)]
    max_moves: usize,
    /// Rows of a layer below which a window says too little.
    #[arg(long, default_value_t = 128)]
    min_rows: u64,
    /// Write the decisions as JSON.
    #[arg(long)]
    json: bool,
}

/// A decision.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Decided {
    at_ms: u64,
    rows: u64,
    epoch: Epoch,
    verdict: foregate_planner::Verdict,
    balance_before: f64,
    balance_after: f64,
    copies: usize,
    told: String,
}

/// Replays and prints.
///
/// # Errors
/// A trace that cannot be read, or that no placement is possible for.
pub(super) async fn run(args: &ReplayArgs) -> Result<(), CliError> {
    let (header, events, _) = super::read(&args.file)?;
    let replay = Replay::new(&header, &events, args);
    let decided = tokio::task::spawn_blocking(move || replay.run(&events));
    let decided = decided
        .await
        .map_err(|error| CliError::runtime("the replay broke off", &error))?
        .map_err(|error| CliError::Usage(error.to_string()))?;
    let text = if args.json {
        serde_json::to_string_pretty(&decided)
            .map_err(|error| CliError::runtime("the decisions have no JSON form", &error))?
    } else {
        let lines = decided
            .iter()
            .map(|it| format!("{:>9.1} s  {}", it.at_ms as f64 / 1000.0, it.told));
        lines.collect::<Vec<_>>().join("\n")
    };
    print(&text);
    Ok(())
}

struct Replay {
    problem: Problem,
    settings: Settings,
    demand: Demand,
    ranks: BTreeSet<Rank>,
    min_rows: u64,
    experts: usize,
}

impl Replay {
    fn new(header: &Header, events: &[Event], args: &ReplayArgs) -> Self {
        let ranks: BTreeSet<Rank> = events
            .iter()
            .filter_map(|event| match event {
                Event::Window { rank, .. } => Some(*rank),
                Event::Request { .. } | Event::Tokens { .. } | Event::Gap { .. } => None,
            })
            .collect();
        let workers = args
            .workers
            .map_or(ranks.len().max(1), |workers| workers as usize);
        let slots = args.slots.map_or_else(
            || slots_to_link(header.experts, workers),
            |slots| slots as usize,
        );
        let rooms = (0..workers).map(|rank| RankSlots {
            rank: Rank(rank as u32),
            slots,
            domain: String::new(),
        });
        Self {
            problem: Problem::uniform(rooms.collect(), header.layers, header.experts),
            settings: Settings {
                threshold: args.threshold,
                max_moves_per_layer: args.max_moves,
            },
            demand: Demand::new(header.layers, header.experts),
            ranks,
            min_rows: args.min_rows,
            experts: header.experts,
        }
    }

    /// A window is over when every rank has told of it, or one of them tells of the next.
    fn run(mut self, events: &[Event]) -> Result<Vec<Decided>, foregate_planner::PlanError> {
        let mut active: Option<Placement> = None;
        let mut history = History::default();
        let mut decided = vec![self.decide(0, 0, &mut active, &mut history)?];
        let mut told = BTreeSet::new();
        for (number, event) in events.iter().enumerate() {
            let Event::Window {
                at_ms,
                rank,
                epoch,
                span_ms,
                counts,
                ..
            } = event
            else {
                continue;
            };
            if told.contains(rank) {
                self.close(*at_ms, &mut active, &mut history, &mut decided)?;
                told.clear();
            }
            told.insert(*rank);
            let window = LoadWindow {
                rank: *rank,
                epoch: *epoch,
                sequence: number as u64 + 1,
                span_ms: *span_ms,
                gate: counts.chunks(self.experts).map(<[u64]>::to_vec).collect(),
                served: vec![0; self.problem.layers],
                engine: EngineLoad::default(),
            };
            // The trace's header has bound the shape of its events.
            let _counted = self.demand.observe(&window);
            if told == self.ranks {
                self.close(*at_ms, &mut active, &mut history, &mut decided)?;
                told.clear();
            }
        }
        Ok(decided)
    }

    fn close(
        &mut self,
        at_ms: u64,
        active: &mut Option<Placement>,
        history: &mut History,
        decided: &mut Vec<Decided>,
    ) -> Result<(), foregate_planner::PlanError> {
        if let Some(closed) = self.demand.close(self.min_rows) {
            self.problem.demand = rounded(self.demand.prediction());
            self.problem.evidence = self.demand.evidence();
            decided.push(self.decide(at_ms, closed.rows, active, history)?);
        }
        Ok(())
    }

    fn decide(
        &self,
        at_ms: u64,
        rows: u64,
        active: &mut Option<Placement>,
        history: &mut History,
    ) -> Result<Decided, foregate_planner::PlanError> {
        let decision = plan(&self.problem, active.as_ref(), &self.settings, history)?;
        let report = decision.report();
        let said = Decided {
            at_ms,
            rows,
            epoch: report.epoch,
            verdict: report.verdict,
            balance_before: report.balance_before,
            balance_after: report.balance_after,
            copies: report.copies_moved,
            told: report.to_string(),
        };
        if let Some(plan) = decision.placement() {
            *active = Some(plan.clone());
        }
        Ok(said)
    }
}
