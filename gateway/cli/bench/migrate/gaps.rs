//! Gaps between tokens, sorted by what went on meanwhile.

use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::super::report::Spread;

/// From one token of a stream to the next.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gap {
    pub(super) begin: Instant,
    pub(super) end: Instant,
}

/// One rollover.
#[derive(Debug, Clone, Copy)]
pub(super) struct Migration {
    /// From here on experts are fetched.
    pub(super) proposed: Instant,
    /// From here on steps switch.
    pub(super) activated: Instant,
    /// No step uses the placement before; its experts have been or are being released.
    pub(super) settled: Instant,
}

/// A time with migrations or without.
#[derive(Debug, Clone)]
pub(super) struct Block {
    pub(super) begin: Instant,
    pub(super) end: Instant,
    pub(super) migrations: Vec<Migration>,
}

impl Gap {
    fn milliseconds(self) -> f64 {
        let length: Duration = self.end.duration_since(self.begin);
        length.as_secs_f64() * 1000.0
    }

    fn overlaps(self, begin: Instant, end: Instant) -> bool {
        self.begin < end && begin < self.end
    }
}

/// Longest gaps of two neighbouring blocks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Round {
    quiet_ms: f64,
    migrating_ms: f64,
}

/// What workers counted: each late row is a token computed twice.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Troubles {
    pub(super) late_rows: u64,
    pub(super) retried_rows: u64,
    pub(super) refused_calls: u64,
}

/// What was measured. Times in milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    migrations: usize,
    copies_moved_each: usize,
    troubles: Troubles,
    /// Of the quiet blocks; its median is the decode step that the others are measured in.
    quiet: Spread,
    /// Gaps with experts on their way.
    fetching: Spread,
    /// Gaps from the activation of a placement to the end of the one before.
    switching: Spread,
    /// Gaps of the quiet block before, at the same times since its begin. A moment falls into a long gap more
    /// often than into a short one, so these are what `fetching` and `switching` are to be compared with.
    quiet_for_fetching: Spread,
    quiet_for_switching: Spread,
    migration_ms: Spread,
    rounds: Vec<Round>,
    /// Per round: how much longer the longest gap with migrations is, in steps.
    extra_steps: Spread,
    /// The same of the longest gaps of all rounds.
    extra_steps_of_longest: f64,
}

impl Figures {
    pub(super) fn of(
        blocks: &[Block],
        gaps: &[Gap],
        copies_moved_each: usize,
        troubles: Troubles,
    ) -> Self {
        let inside = |begin: Instant, end: Instant| {
            let gaps = gaps.iter().filter(move |gap| gap.overlaps(begin, end));
            gaps.map(|gap| gap.milliseconds())
        };
        let longest = |block: &Block| inside(block.begin, block.end).fold(0.0, f64::max);
        let pairs = || blocks.chunks_exact(2).map(|pair| (&pair[0], &pair[1]));
        let in_quiet = |pair: (&Block, &Block), begin: Instant, end: Instant| {
            let shifted = |at: Instant| pair.0.begin + at.duration_since(pair.1.begin);
            inside(shifted(begin), shifted(end))
        };
        let rounds: Vec<Round> = pairs()
            .map(|pair| Round {
                quiet_ms: longest(pair.0),
                migrating_ms: longest(pair.1),
            })
            .collect();
        let all: Vec<Migration> = blocks
            .iter()
            .flat_map(|block| block.migrations.iter().copied())
            .collect();
        let quiet = blocks.iter().filter(|block| block.migrations.is_empty());
        let quiet = Spread::of(quiet.flat_map(|b| inside(b.begin, b.end)).collect());
        let step = if quiet.p50 > 0.0 { quiet.p50 } else { f64::NAN };
        let extra = |round: &Round| (round.migrating_ms - round.quiet_ms) / step;
        let most = |of: fn(&Round) -> f64| rounds.iter().map(of).fold(0.0, f64::max);
        let worst = Round {
            quiet_ms: most(|round| round.quiet_ms),
            migrating_ms: most(|round| round.migrating_ms),
        };
        let lengths = all.iter().map(|one| {
            let length = one.settled.duration_since(one.proposed);
            length.as_secs_f64() * 1000.0
        });
        Self {
            migrations: all.len(),
            copies_moved_each,
            troubles,
            fetching: Spread::of(
                all.iter()
                    .flat_map(|one| inside(one.proposed, one.activated))
                    .collect(),
            ),
            switching: Spread::of(
                all.iter()
                    .flat_map(|one| inside(one.activated, one.settled))
                    .collect(),
            ),
            quiet_for_fetching: Spread::of(
                pairs()
                    .flat_map(|pair| {
                        let all = pair.1.migrations.iter();
                        all.flat_map(move |one| in_quiet(pair, one.proposed, one.activated))
                    })
                    .collect(),
            ),
            quiet_for_switching: Spread::of(
                pairs()
                    .flat_map(|pair| {
                        let all = pair.1.migrations.iter();
                        all.flat_map(move |one| in_quiet(pair, one.activated, one.settled))
                    })
                    .collect(),
            ),
            migration_ms: Spread::of(lengths.collect()),
            extra_steps: Spread::of(rounds.iter().map(extra).collect()),
            extra_steps_of_longest: extra(&worst),
            quiet,
            rounds,
        }
    }

    pub(super) fn text(&self) -> String {
        [
            format!(
                "{} migrations of {} copies in {} rounds; decode step {:.2} ms",
                self.migrations,
                self.copies_moved_each,
                self.rounds.len(),
                self.quiet.p50
            ),
            format!(
                "{} late rows, {} retried, {} refused calls",
                self.troubles.late_rows, self.troubles.retried_rows, self.troubles.refused_calls
            ),
            self.migration_ms.line("one migration"),
            self.quiet.line("gap, quiet"),
            self.fetching.line("gap, fetching"),
            self.quiet_for_fetching.line("  quiet, same times"),
            self.switching.line("gap, switching"),
            self.quiet_for_switching.line("  quiet, same times"),
            format!(
                "a round's longest gap grows by {:.2} steps with migrations (median; {:.2} to the longest of all rounds)",
                self.extra_steps.p50, self.extra_steps_of_longest
            ),
        ]
        .join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_count_where_they_overlap() {
        let zero = Instant::now();
        let at = |ms: u64| zero + Duration::from_millis(ms);
        let gap = |begin, end| Gap {
            begin: at(begin),
            end: at(end),
        };
        let blocks = [
            Block {
                begin: at(0),
                end: at(100),
                migrations: Vec::new(),
            },
            Block {
                begin: at(100),
                end: at(200),
                migrations: vec![Migration {
                    proposed: at(110),
                    activated: at(150),
                    settled: at(160),
                }],
            },
        ];
        let gaps = [
            gap(10, 12),
            gap(12, 14),
            gap(14, 17),
            gap(105, 107),
            gap(120, 123),
            gap(145, 152),
        ];
        let figures = Figures::of(&blocks, &gaps, 8, Troubles::default());
        assert_eq!(
            figures.rounds,
            [Round {
                quiet_ms: 3.0,
                migrating_ms: 7.0
            }]
        );
        assert_eq!((figures.quiet.count, figures.quiet.p50), (3, 2.0));
        assert_eq!((figures.fetching.count, figures.fetching.max), (2, 7.0));
        assert_eq!((figures.switching.count, figures.switching.max), (1, 7.0));
        // The block before has nothing at its 10th to 50th and 50th to 60th millisecond but the first three.
        let quiet = figures.quiet_for_fetching;
        assert_eq!((quiet.count, quiet.max), (3, 3.0));
        assert_eq!(figures.quiet_for_switching.count, 0);
        assert_eq!((figures.migrations, figures.extra_steps.max), (1, 2.0));
    }
}
