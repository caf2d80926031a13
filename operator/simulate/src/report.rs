//! The results: one document for machines, a table for people.

use serde::Serialize;

use crate::header::{Balance, Header, Load, Time, rounded};
use crate::judge::Judged;
use crate::run::{ArmOutcome, Case, Outcome};
use crate::sums::{mean, percentile};

/// All seeds of a case.
#[derive(Debug, Clone, Serialize)]
pub struct Document {
    /// Model, cluster and load.
    #[serde(flatten)]
    pub header: Header,
    /// How the load was made; none of a recording.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generator: Option<Load>,
    /// The recording, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replayed>,
    /// What our planner is told of the step to come.
    pub forecast: &'static str,
    load: LoadFigures,
    device: &'static str,
    /// Anchors first.
    pub policies: Vec<OfPolicy>,
}

/// A recording.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Replayed {
    /// Windows, the ten of the warm-up included.
    pub windows: usize,
}

#[derive(Debug, Clone, Serialize)]
struct LoadFigures {
    max_over_mean: f64,
    cv: f64,
    bound: f64,
}

/// One policy: means over the seeds, and the figures of each seed.
#[derive(Debug, Clone, Serialize)]
pub struct OfPolicy {
    /// Its name.
    pub name: &'static str,
    /// Means over the seeds; times are over all.
    #[serde(flatten)]
    pub figures: Figures,
    /// Seed by seed.
    pub by_seed: Vec<OfSeed>,
}

/// One policy and seed.
#[derive(Debug, Clone, Serialize)]
pub struct OfSeed {
    /// The seed.
    pub seed: u64,
    /// See [`Figures`].
    pub even: Balance,
    /// See [`Figures`].
    pub fixed: Balance,
    /// See [`Figures`].
    pub split: Balance,
    /// See [`Figures`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill: Option<Balance>,
    /// See [`Figures`].
    pub copies_share: f64,
}

/// The figures of a policy.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Figures {
    /// Groups of linked ranks at the end, mean over layers.
    pub components: f64,
    /// Copies at the end that share a rank with a copy of the same expert.
    pub doubled_copies: f64,
    /// Decode batches, all copies of an expert alike.
    pub even: Balance,
    /// Decode batches, published shares (for anchors: shares solved for the demand).
    pub fixed: Balance,
    /// Decode batches, shares solved for the batch.
    pub split: Balance,
    /// Decode batches as workers split them: whole rows, eight sweeps from the published shares.
    pub split_rows: Balance,
    /// Decode batches: what no split of the placement can pass.
    pub split_bound: Balance,
    /// Prefill batches, shares solved for the batch; none in a recording.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill: Option<Balance>,
    /// The expected load of the step, even split.
    pub expected: Balance,
    /// Slots with rows on a rank, largest over mean.
    pub activated_max_over_mean: f64,
    /// Balance of the ranks' modelled times; none if the sizes of experts are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modelled_time_balance: Option<f64>,
    /// Copies loaded in ten steps.
    pub copies_per_10_steps: f64,
    /// The same as a share of all copies.
    pub copies_share: f64,
    /// The same in bytes (FP8); none if the sizes of experts are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_10_steps: Option<f64>,
    /// Most copies that one rank loaded in one step.
    pub most_copies_to_one_rank_in_a_step: f64,
    /// Largest part of the expected rows whose experts have all their copies on one node: what its loss would leave
    /// without a copy. Mean over layers and steps.
    pub orphaned_by_a_node: f64,
    /// Share of the loaded copies of which the node had one.
    pub copies_from_same_node: f64,
    /// Time of a plan of all layers, where one was made.
    pub plan_ms: Time,
    /// Time of the solved split of a layer.
    pub split_us_per_layer: Time,
    /// Time of a worker's split of a layer.
    pub split_rows_us_per_layer: Time,
}

/// The document of a case with its seeds.
#[must_use]
pub fn document(case: &Case, outcomes: &[Outcome]) -> Document {
    let seeds: Vec<u64> = outcomes.iter().map(|outcome| outcome.seed).collect();
    Document {
        generator: Some(Load::of(case, &seeds)),
        ..without_source(case, outcomes)
    }
}

/// The document of a recording.
#[must_use]
pub fn replay_document(case: &Case, outcome: Outcome, windows: usize) -> Document {
    Document {
        replay: Some(Replayed { windows }),
        ..without_source(case, &[outcome])
    }
}

fn without_source(case: &Case, outcomes: &[Outcome]) -> Document {
    let over = |of: fn(&Outcome) -> f64| {
        rounded(mean(&outcomes.iter().map(of).collect::<Vec<_>>()), 4)
    };
    let policies = (0..case.policies.len())
        .map(|at| {
            let runs: Vec<(u64, &ArmOutcome)> =
                outcomes.iter().map(|o| (o.seed, &o.arms[at])).collect();
            policy(case, &runs)
        })
        .collect();
    Document {
        header: Header::of(case),
        generator: None,
        replay: None,
        forecast: case.forecast.name(),
        load: LoadFigures {
            max_over_mean: over(|o| o.max_over_mean),
            cv: over(|o| o.cv),
            bound: over(|o| o.bound),
        },
        device: case.device.name,
        policies,
    }
}

fn policy(case: &Case, runs: &[(u64, &ArmOutcome)]) -> OfPolicy {
    let (shape, n) = (&case.shape, runs.len().max(1) as f64);
    let over =
        |of: &dyn Fn(&ArmOutcome) -> f64| runs.iter().map(|(_, run)| of(run)).sum::<f64>() / n;
    let balance = |of: fn(&Judged) -> &Vec<f64>| Balance {
        mean: rounded(over(&|run| mean(of(&run.judged))), 4),
        p5: rounded(over(&|run| percentile(of(&run.judged), 5.0)), 4),
    };
    let time = |of: fn(&ArmOutcome) -> &Vec<f64>| {
        let all: Vec<f64> = runs.iter().flat_map(|(_, run)| of(run)).copied().collect();
        Time {
            p50: rounded(percentile(&all, 50.0), 2),
            p99: rounded(percentile(&all, 99.0), 2),
        }
    };
    let copies = over(&|run| loaded(run) as f64) * 10.0 / case.steps as f64;
    let near = over(&|run| {
        run.arm
            .moves
            .iter()
            .map(|m| m.from_same_node)
            .sum::<usize>() as f64
    });
    let most = over(&|run| {
        let to_one = run.arm.moves.iter().map(|m| m.most_to_one_rank);
        to_one.max().unwrap_or(0) as f64
    });
    let known = shape.inner > 0;
    let prefills = runs.iter().all(|(_, run)| !run.judged.prefill.is_empty());
    let figures = Figures {
        components: rounded(over(&|run| run.components), 2),
        doubled_copies: rounded(over(&|run| run.doubled as f64), 1),
        even: balance(|j| &j.even),
        fixed: balance(|j| &j.fixed),
        split: balance(|j| &j.split),
        split_rows: balance(|j| &j.rows),
        split_bound: balance(|j| &j.best),
        prefill: prefills.then(|| balance(|j| &j.prefill)),
        expected: balance(|j| &j.expected),
        activated_max_over_mean: rounded(over(&|run| mean(&run.judged.activated)), 4),
        modelled_time_balance: known.then(|| rounded(over(&|run| mean(&run.judged.time)), 4)),
        copies_per_10_steps: rounded(copies, 1),
        copies_share: rounded(copies / (shape.layers * shape.copies) as f64, 5),
        bytes_per_10_steps: known.then(|| (copies * shape.expert_bytes()).round()),
        most_copies_to_one_rank_in_a_step: rounded(most, 1),
        orphaned_by_a_node: rounded(over(&|run| run.orphaned_by_a_node), 4),
        copies_from_same_node: rounded(near / over(&|run| loaded(run) as f64).max(1.0), 4),
        plan_ms: time(|run| &run.arm.plan_ms),
        split_us_per_layer: time(|run| &run.judged.solve_us),
        split_rows_us_per_layer: time(|run| &run.judged.rows_us),
    };
    OfPolicy {
        name: runs.first().map_or("", |(_, run)| run.policy.name()),
        figures,
        by_seed: runs
            .iter()
            .map(|(seed, run)| of_seed(case, *seed, run))
            .collect(),
    }
}

fn of_seed(case: &Case, seed: u64, run: &ArmOutcome) -> OfSeed {
    let copies = loaded(run) as f64 * 10.0 / case.steps as f64;
    OfSeed {
        seed,
        even: Balance::of(&run.judged.even),
        fixed: Balance::of(&run.judged.fixed),
        split: Balance::of(&run.judged.split),
        prefill: (!run.judged.prefill.is_empty()).then(|| Balance::of(&run.judged.prefill)),
        copies_share: rounded(copies / (case.shape.layers * case.shape.copies) as f64, 5),
    }
}

fn loaded(run: &ArmOutcome) -> usize {
    run.arm.moves.iter().map(|moved| moved.copies).sum()
}

impl Document {
    /// Where the load came from, in a few words.
    #[must_use]
    pub fn source(&self) -> String {
        match (&self.generator, self.replay) {
            (Some(load), _) => load.words(),
            (None, Some(replay)) => format!("recorded, {} windows", replay.windows),
            (None, None) => String::new(),
        }
    }

    /// A table in Markdown; in brackets the lowest and the highest seed.
    #[must_use]
    pub fn table(&self) -> String {
        let mut lines = vec![
            format!(
                "{}, {}, forecast {}: expert max/mean {:.2}, bound {:.3}",
                self.header.words(),
                self.source(),
                self.forecast,
                self.load.max_over_mean,
                self.load.bound,
            ),
            String::new(),
            "| policy | even | fixed | split | p5 | whole rows | prefill | expected | copies per 10 steps | modelled time | components | plan ms p50 / p99 |".to_owned(),
            "|---|---|---|---|---|---|---|---|---|---|---|---|".to_owned(),
        ];
        lines.extend(self.policies.iter().map(row));
        lines.join("\n")
    }
}

fn row(own: &OfPolicy) -> String {
    let f = &own.figures;
    let spread = |of: fn(&OfSeed) -> f64| {
        let all = || own.by_seed.iter().map(of);
        (
            all().fold(f64::MAX, f64::min),
            all().fold(f64::MIN, f64::max),
        )
    };
    let (low, high) = spread(|s| s.split.mean);
    let (least, most) = spread(|s| s.copies_share);
    format!(
        "| {} | {:.3} | {:.3} | {:.3} ({low:.3}–{high:.3}) | {:.3} | {:.3} | {} | {:.3} | {:.1} % ({:.1}–{:.1}) | {} | {:.1} | {:.1} / {:.1} |",
        own.name,
        f.even.mean,
        f.fixed.mean,
        f.split.mean,
        f.split.p5,
        f.split_rows.mean,
        maybe(f.prefill.map(|b| b.mean)),
        f.expected.mean,
        100.0 * f.copies_share,
        100.0 * least,
        100.0 * most,
        maybe(f.modelled_time_balance),
        f.components,
        f.plan_ms.p50,
        f.plan_ms.p99,
    )
}

fn maybe(figure: Option<f64>) -> String {
    figure.map_or_else(|| "–".to_owned(), |x| format!("{x:.3}"))
}
