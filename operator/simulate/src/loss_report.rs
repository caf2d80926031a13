//! What a loss came to: the document and the table.

use serde::Serialize;

use crate::header::{Balance, Header, Load, rounded};
use crate::loss::{After, Lose, LossOutcome, Lost};
use crate::run::Case;
use crate::sums::{mean, percentile};

/// All seeds and cases of a loss; figures are means over both.
#[derive(Debug, Clone, Serialize)]
pub struct LossDocument {
    /// Model, cluster and load.
    #[serde(flatten)]
    pub header: Header,
    /// How the load was made.
    pub generator: Load,
    /// What was lost.
    pub lose: String,
    /// Cases of one seed.
    pub cases: usize,
    /// The best split before, under decode batches.
    pub before: Balance,
    /// Experts without a copy at once, mean over layers.
    pub orphans_per_layer: f64,
    /// Share of the rows of those experts.
    pub orphaned_traffic: Orphaned,
    /// The best split of the rows that still have a copy.
    pub at_once: Balance,
    /// The repair (step 0), then window by window.
    pub after: Vec<Step>,
    /// EPLB afresh on the ranks that are left.
    pub eplb: Step,
    /// The same with ranks renamed so that the most copies stay.
    pub eplb_renamed: Step,
}

/// Traffic without a copy.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Orphaned {
    /// Mean over layers and cases.
    pub mean: f64,
    /// The worst layer and case.
    pub worst: f64,
}

/// How far things are.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Step {
    /// Windows since the repair.
    pub step: usize,
    /// Copies loaded since the loss.
    pub copies: f64,
    /// The same per layer.
    pub copies_per_layer: f64,
    /// The best split.
    pub split: Balance,
}

/// The document of a loss.
#[must_use]
pub fn loss_document(case: &Case, lose: Lose, outcomes: &[LossOutcome]) -> LossDocument {
    let seeds: Vec<u64> = outcomes.iter().map(|outcome| outcome.seed).collect();
    let lost: Vec<&Lost> = outcomes.iter().flat_map(|outcome| &outcome.cases).collect();
    let before: Vec<&[f64]> = outcomes.iter().map(|o| o.before.as_slice()).collect();
    let at_once: Vec<&[f64]> = lost.iter().map(|l| l.at_once.as_slice()).collect();
    let orphaned: Vec<f64> = lost.iter().flat_map(|l| &l.orphaned).copied().collect();
    let orphans: Vec<f64> = lost.iter().map(|l| l.orphans).collect();
    let step = |step: usize, of: &dyn Fn(&Lost) -> After| {
        let after: Vec<After> = lost.iter().map(|l| of(l)).collect();
        let copies = mean(&after.iter().map(|a| a.copies as f64).collect::<Vec<_>>());
        let splits: Vec<&[f64]> = after.iter().map(|a| a.split.as_slice()).collect();
        Step {
            step,
            copies: rounded(copies, 1),
            copies_per_layer: rounded(copies / case.shape.layers as f64, 2),
            split: balance(&splits),
        }
    };
    LossDocument {
        header: Header::of(case),
        generator: Load::of(case, &seeds),
        lose: lose.to_string(),
        cases: lost.len() / outcomes.len().max(1),
        before: balance(&before),
        orphans_per_layer: rounded(mean(&orphans), 2),
        orphaned_traffic: Orphaned {
            mean: rounded(mean(&orphaned), 4),
            worst: rounded(orphaned.iter().copied().fold(0.0, f64::max), 4),
        },
        at_once: balance(&at_once),
        after: (0..=case.steps)
            .map(|at| step(at, &|l| l.after[at].clone()))
            .collect(),
        eplb: step(0, &|l| l.afresh[0].clone()),
        eplb_renamed: step(0, &|l| l.afresh[1].clone()),
    }
}

/// Means of the cases' means and 5th percentiles.
fn balance(cases: &[&[f64]]) -> Balance {
    let over =
        |of: &dyn Fn(&[f64]) -> f64| mean(&cases.iter().map(|c| of(c)).collect::<Vec<_>>());
    Balance {
        mean: rounded(over(&mean), 4),
        p5: rounded(over(&|of| percentile(of, 5.0)), 4),
    }
}

impl LossDocument {
    /// A table in Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        let mut lines = vec![
            format!(
                "{}, {}; lost {} ({} cases): {:.1} experts per layer without a copy, {:.1} % of the traffic (worst {:.1} %)",
                self.header.words(),
                self.generator.words(),
                self.lose,
                self.cases,
                self.orphans_per_layer,
                100.0 * self.orphaned_traffic.mean,
                100.0 * self.orphaned_traffic.worst,
            ),
            String::new(),
            "| | copies loaded | per layer | split | p5 |".to_owned(),
            "|---|---|---|---|---|".to_owned(),
        ];
        let plain = |what: &str, split: Balance| {
            format!("| {what} | 0 | 0 | {:.3} | {:.3} |", split.mean, split.p5)
        };
        lines.push(plain("before", self.before));
        lines.push(plain("at once, of the rest", self.at_once));
        let row = |what: &str, step: &Step| {
            format!(
                "| {what} | {:.0} | {:.1} | {:.3} | {:.3} |",
                step.copies, step.copies_per_layer, step.split.mean, step.split.p5
            )
        };
        for step in &self.after {
            lines.push(match step.step {
                0 => row("repaired", step),
                n => row(&format!("{n} windows later"), step),
            });
        }
        lines.push(row("EPLB afresh", &self.eplb));
        lines.push(row("EPLB afresh, ranks renamed", &self.eplb_renamed));
        lines.join("\n")
    }
}
