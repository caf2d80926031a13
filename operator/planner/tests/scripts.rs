//! Golden scripts: a script of a cluster's life goes in, a transcript of the planner's answers comes out.
//!
//! `scripts/NAME.in` is replayed and compared with `scripts/NAME.out`; `UPDATE_GOLDEN=1` rewrites the latter.
//! One command a line, `#` starts a comment:
//!
//! ```text
//! model LAYERS EXPERTS            the model's shape; first of all
//! ranks RANK:SLOTS[:DOMAIN] …     the ranks from now on
//! settings THRESHOLD MOVES        threshold of balance, most moves per layer
//! window ROWS SHIFT               every rank counts ROWS rows a layer, expert (SHIFT + i) mod N falling as 1/(1+i)
//! plan                            one call of the planner; its answer becomes the placement in force
//! show LAYER                      experts per rank, with shares, and the linter's findings
//! ```

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use foregate_api::ids::{Epoch, Rank};
use foregate_api::load::{EngineLoad, LoadWindow};
use foregate_api::placement::Placement;
use foregate_planner::check::check;
use foregate_planner::demand::Demand;
use foregate_planner::report::Step;
use foregate_planner::{Decision, History, Problem, RankSlots, Settings, Verdict, plan};

struct Script {
    problem: Problem,
    settings: Settings,
    demand: Demand,
    history: History,
    placement: Option<Placement>,
    before: Option<Placement>,
    sequence: BTreeMap<Rank, u64>,
    out: String,
}

impl Script {
    fn new() -> Self {
        Self {
            problem: Problem::uniform(Vec::new(), 0, 0),
            settings: Settings::default(),
            demand: Demand::new(0, 0),
            history: History::default(),
            placement: None,
            before: None,
            sequence: BTreeMap::new(),
            out: String::new(),
        }
    }

    fn line(&mut self, line: &str) {
        writeln!(self.out, "> {line}").unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["model", layers, experts] => {
                let (layers, experts) = (layers.parse().unwrap(), experts.parse().unwrap());
                self.problem = Problem::uniform(Vec::new(), layers, experts);
                self.demand = Demand::new(layers, experts);
            }
            ["ranks", ranks @ ..] => {
                self.problem.ranks = ranks.iter().map(|r| rank(r)).collect()
            }
            ["settings", threshold, moves] => {
                self.settings = Settings {
                    threshold: threshold.parse().unwrap(),
                    max_moves_per_layer: moves.parse().unwrap(),
                    ..Settings::default()
                };
            }
            ["window", rows, shift] => {
                self.window(rows.parse().unwrap(), shift.parse().unwrap())
            }
            ["plan"] => self.plan(),
            ["show", layer] => self.show(layer.parse().unwrap()),
            _ => panic!("unknown command: {line}"),
        }
    }

    fn window(&mut self, rows: f64, shift: usize) {
        let experts = self.problem.experts;
        let total: f64 = (1..=experts).map(|i| 1.0 / i as f64).sum();
        let gate: Vec<Vec<u64>> = (0..self.problem.layers)
            .map(|l| {
                let weight = |e: usize| {
                    1.0 / (1 + (e + experts - (shift + l) % experts) % experts) as f64
                };
                (0..experts)
                    .map(|e| (rows * weight(e) / total) as u64)
                    .collect()
            })
            .collect();
        for rank in self.problem.ranks.iter().map(|r| r.rank) {
            let sequence = self.sequence.entry(rank).or_default();
            *sequence += 1;
            let window = LoadWindow {
                rank,
                epoch: self.placement.as_ref().map_or(Epoch(0), |p| p.epoch),
                sequence: *sequence,
                span_ms: 2000,
                gate: gate.clone(),
                served: vec![0; self.problem.layers],
                engine: EngineLoad::default(),
            };
            self.demand.observe(&window).unwrap();
        }
        let closed = self.demand.close(1).unwrap();
        writeln!(
            self.out,
            "{} rows a layer from {} ranks",
            closed.rows,
            closed.ranks.len()
        )
        .unwrap();
    }

    fn plan(&mut self) {
        self.problem.demand = self.demand.prediction();
        self.problem.evidence = self.demand.evidence();
        let answer = plan(
            &self.problem,
            self.placement.as_ref(),
            &self.settings,
            &mut self.history,
        );
        match answer {
            Err(error) => writeln!(self.out, "error: {error}").unwrap(),
            Ok(decision) => self.tell(&decision),
        }
    }

    fn tell(&mut self, decision: &Decision) {
        let report = decision.report();
        let out = &mut self.out;
        writeln!(out, "{report}").unwrap();
        for layer in &report.layers {
            let word = match layer.verdict {
                Verdict::Keep => "keep",
                Verdict::Reweigh => "reweigh",
                Verdict::Move => "move",
            };
            writeln!(
                out,
                "  layer {}: {word} ({:?}), {:.3} (best {:.3}) -> {:.3} of {:.3}, doubt {:.3}, {} copies, {} orphans with {:.3} of \
                 the rows, components {} (least {}), heaviest rank {} at {:.3}",
                layer.layer,
                layer.because,
                layer.before,
                layer.best,
                layer.after,
                layer.bound,
                layer.doubt,
                layer.copies_moved,
                layer.orphans,
                layer.orphaned_rows,
                layer.components,
                layer.components_least,
                layer.heaviest.rank,
                layer.heaviest.over_mean,
            )
            .unwrap();
            for step in layer
                .steps
                .iter()
                .filter(|s| !matches!(s, Step::Split { .. }))
            {
                writeln!(out, "    {step:?}").unwrap();
            }
        }
        for risk in &report.at_risk {
            writeln!(
                out,
                "  at risk with {}: {:.3} of the rows",
                risk.domain, risk.rows
            )
            .unwrap();
        }
        for finding in &report.findings {
            writeln!(out, "  finding: {finding}").unwrap();
        }
        if let Some(next) = decision.placement() {
            self.before = self.placement.replace(next.clone());
        }
    }

    fn show(&mut self, layer: usize) {
        let placement = self.placement.as_ref().expect("plan before show");
        let shown = &placement.layers[layer];
        for (rank, experts) in placement.ranks.iter().zip(&shown.slots) {
            write!(self.out, "  rank {rank}:").unwrap();
            for expert in experts {
                let copies = &shown.copies[expert.index()];
                let share = copies.iter().find(|c| c.rank == *rank).unwrap().share;
                if copies.len() > 1 {
                    write!(self.out, " {expert}({share:.2})").unwrap();
                } else {
                    write!(self.out, " {expert}").unwrap();
                }
            }
            writeln!(self.out).unwrap();
        }
        for finding in check(placement, &self.problem, self.before.as_ref()) {
            writeln!(self.out, "  finding: {finding}").unwrap();
        }
    }
}

fn rank(text: &str) -> RankSlots {
    let mut parts = text.split(':');
    RankSlots {
        rank: Rank(parts.next().unwrap().parse().unwrap()),
        slots: parts.next().expect("RANK:SLOTS").parse().unwrap(),
        domain: parts.next().unwrap_or_default().to_owned(),
    }
}

fn replay(input: &str) -> String {
    let mut script = Script::new();
    for line in input
        .lines()
        .map(|l| l.split('#').next().unwrap_or_default().trim())
    {
        if !line.is_empty() {
            script.line(line);
        }
    }
    script.out
}

fn scripts() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "in"))
        .collect();
    found.sort();
    found
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test asks how it was called")]
fn transcripts_are_as_recorded() {
    let update = std::env::var("UPDATE_GOLDEN").is_ok_and(|value| value == "1");
    let scripts = scripts();
    assert!(scripts.len() >= 4, "the scripts are gone");
    for path in scripts {
        let got = replay(&std::fs::read_to_string(&path).unwrap());
        let golden = path.with_extension("out");
        if update {
            std::fs::write(&golden, &got).unwrap();
            continue;
        }
        let expected = std::fs::read_to_string(&golden).unwrap_or_default();
        assert!(
            got == expected,
            "{} differs; UPDATE_GOLDEN=1 rewrites it. Now:\n{got}",
            golden.display()
        );
    }
}
