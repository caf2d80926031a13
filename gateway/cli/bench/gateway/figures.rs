//! From times to what a way adds.

use std::path::Path;

use serde::Serialize;

use super::GatewayArgs;
use super::arms::{DIRECT, FOREGATE, SMG_GRPC, SMG_HTTP};
use super::cpu::{Busy, load_average};
use super::load::{Closed, Open};
use super::picture;
use crate::bench::report::Spread;
use crate::bench::write_json;
use crate::error::CliError;

/// Requests of a hundred that may fail before a block says nothing.
const FAILURES: usize = 1;

/// What a gateway may add at p99, in milliseconds.
const MOST_ADDED_MS: f64 = 1.0;

/// One way in one round. Times in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Block {
    pub(super) way: &'static str,
    pub(super) round: u32,
    /// First token of streams.
    pub(super) first: Spread,
    /// Each later token against its moment in the schedule.
    pub(super) late: Spread,
    /// Streams to their end.
    pub(super) stream: Spread,
    /// Answers that are not streamed, without any delay of the back end.
    pub(super) whole: Spread,
    /// Streams answered per second with as many at a time as asked for.
    pub(super) per_second: f64,
    /// First token of those.
    pub(super) first_loaded: Spread,
    /// Processor milliseconds of the gateway per stream of those.
    pub(super) cpu_ms: Option<f64>,
    /// Processors that what is not the bench's used meanwhile.
    pub(super) others: f64,
    /// The machine's load average at its end.
    pub(super) load_average: Option<f64>,
    pub(super) failed: usize,
}

impl Block {
    /// From what the three loads gave.
    ///
    /// # Errors
    /// When more than one request in a hundred failed.
    pub(super) fn of(
        way: &'static str,
        round: u32,
        streams: Open,
        whole: Open,
        closed: Closed,
        busy: Busy,
    ) -> Result<Self, CliError> {
        let failures = [&streams.failures, &whole.failures, &closed.failures];
        let failed: usize = failures.iter().map(|some| some.len()).sum();
        let all = streams.total.len() + whole.total.len() + closed.answered as usize + failed;
        if failed * 100 > all * FAILURES || closed.answered == 0 {
            let first = failures.into_iter().flatten().next();
            return Err(CliError::Runtime(format!(
                "{way}: {failed} of {all} requests failed; one of them: {}",
                first.map_or("no answer in time", String::as_str)
            )));
        }
        let answered = closed.answered as f64;
        let per_stream = busy.gateway * 1000.0 / answered;
        Ok(Self {
            way,
            round,
            first: Spread::of(streams.first),
            late: Spread::of(streams.late),
            stream: Spread::of(streams.total),
            whole: Spread::of(whole.total),
            per_second: answered / closed.seconds,
            first_loaded: Spread::of(closed.first),
            cpu_ms: (way != DIRECT).then_some(per_stream),
            others: ((busy.machine - busy.bench) / closed.seconds).max(0.0),
            load_average: load_average(),
            failed,
        })
    }
}

/// A figure over rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Middle {
    pub(super) median: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Middle {
    /// The median (of an even number the mean of the two in the middle), least and most; `None` of nothing.
    pub(super) fn of(mut figures: Vec<f64>) -> Option<Self> {
        figures.sort_by(f64::total_cmp);
        let (low, high) = (*figures.first()?, *figures.last()?);
        let half = figures.len() / 2;
        let median = match figures.len() % 2 {
            0 => f64::midpoint(figures[half - 1], figures[half]),
            _ => figures[half],
        };
        Some(Self { median, low, high })
    }
}

/// What a way adds to the direct one: its percentile less that of the direct way in the same round.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Added {
    pub(super) p50: Middle,
    pub(super) p99: Middle,
}

/// A way over all rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) way: &'static str,
    pub(super) first: Option<Added>,
    pub(super) late: Option<Added>,
    pub(super) stream: Option<Added>,
    pub(super) whole: Option<Added>,
    pub(super) per_second: Middle,
    /// Rounds' requests per second over those of [`SMG_GRPC`] in the same round.
    pub(super) against_smg: Option<Middle>,
    pub(super) cpu_ms: Option<Middle>,
}

/// All of it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    settings: GatewayArgs,
    /// Whether this is a release build, as SMG's is.
    pub(super) optimised: bool,
    processors: usize,
    pub(super) ways: Vec<Summary>,
    /// Processors that other work used during the closed loads.
    others: Middle,
    blocks: Vec<Block>,
}

impl Report {
    /// Of all blocks.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn of(args: &GatewayArgs, blocks: Vec<Block>) -> Result<Self, CliError> {
        let others = Middle::of(blocks.iter().map(|block| block.others).collect());
        let others =
            others.ok_or_else(|| CliError::Runtime("nothing was measured".to_owned()))?;
        let ways = [DIRECT, FOREGATE, SMG_HTTP, SMG_GRPC];
        Ok(Self {
            settings: args.clone(),
            optimised: !cfg!(debug_assertions),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            ways: ways
                .into_iter()
                .filter_map(|way| summary(way, &blocks))
                .collect(),
            others,
            blocks,
        })
    }

    /// As Markdown.
    pub(super) fn table(&self) -> String {
        let mut lines = vec![
            "| way | first token, added p50 / p99 ms | later tokens, added p50 / p99 ms | whole stream, added p50 / p99 ms \
             | answer in one piece, added p50 / p99 ms | streams/s | streams/s over smg-grpc | CPU ms per stream |"
                .to_owned(),
            "|---|---|---|---|---|---|---|---|".to_owned(),
        ];
        lines.extend(self.ways.iter().map(Summary::row));
        lines.push(self.settings.told());
        lines.push(self.noise());
        lines.push(match self.optimised {
            true => self.verdict().unwrap_or_default(),
            false => "A build without optimisation: nothing here says what the product does."
                .to_owned(),
        });
        lines.join("\n")
    }

    fn noise(&self) -> String {
        let loads = self.blocks.iter().filter_map(|block| block.load_average);
        let load = Middle::of(loads.collect()).map_or(String::new(), |load| {
            format!(
                "; load average {:.1} ({:.1}–{:.1})",
                load.median, load.low, load.high
            )
        });
        format!(
            "Medians of {} rounds, in brackets least and most. {} processors, of which other work used {:.2} ({:.2}–{:.2}){load}.",
            self.settings.rounds,
            self.processors,
            self.others.median,
            self.others.low,
            self.others.high,
        )
    }

    /// Whether Foregate keeps to what it is held to, by the medians.
    fn verdict(&self) -> Option<String> {
        let ours = self.ways.iter().find(|way| way.way == FOREGATE)?;
        let word = |kept: bool| if kept { "yes" } else { "no" };
        let within = |added: Option<Added>| {
            let p99 = added?.p99.median;
            Some(format!("{} ({p99:.2} ms)", word(p99 <= MOST_ADDED_MS)))
        };
        let mut text = format!(
            "At most {MOST_ADDED_MS} ms added at p99: first token {}, answer in one piece {}.",
            within(ours.first)?,
            within(ours.whole)?,
        );
        if let Some(against) = ours.against_smg {
            text += &format!(
                " Not slower than {SMG_GRPC}: {} ({:.2} of its streams/s).",
                word(against.median >= 1.0),
                against.median,
            );
        }
        Some(text)
    }

    /// Writes the files into a folder, which is made where it is missing.
    pub(super) fn write(&self, folder: Option<&Path>) -> Result<(), CliError> {
        let Some(folder) = folder else {
            return Ok(());
        };
        let what = folder.display().to_string();
        let failed = |error: std::io::Error| CliError::runtime(&what, &error);
        std::fs::create_dir_all(folder).map_err(failed)?;
        write_json(&folder.join("gateway.json"), self)?;
        std::fs::write(folder.join("gateway.svg"), picture::draw(&self.ways))
            .map_err(failed)?;
        std::fs::write(folder.join("table.md"), self.table() + "\n").map_err(failed)
    }
}

fn summary(way: &'static str, blocks: &[Block]) -> Option<Summary> {
    let own = || blocks.iter().filter(move |block| block.way == way);
    let added = |of: fn(&Block) -> Spread| {
        let over = |part: fn(&Spread) -> f64| {
            let rounds = own().filter_map(|block| {
                let direct = beside(DIRECT, block, blocks)?;
                Some(part(&of(block)) - part(&of(direct)))
            });
            Middle::of(rounds.collect())
        };
        (way != DIRECT).then_some(())?;
        Some(Added {
            p50: over(|spread| spread.p50)?,
            p99: over(|spread| spread.p99)?,
        })
    };
    let against = own().filter_map(|block| {
        let other = beside(SMG_GRPC, block, blocks)?;
        Some(block.per_second / other.per_second)
    });
    Some(Summary {
        way,
        first: added(|block| block.first),
        late: added(|block| block.late),
        stream: added(|block| block.stream),
        whole: added(|block| block.whole),
        per_second: Middle::of(own().map(|block| block.per_second).collect())?,
        against_smg: Middle::of(against.collect()),
        cpu_ms: Middle::of(own().filter_map(|block| block.cpu_ms).collect()),
    })
}

/// Another way's block of the same round.
fn beside<'a>(way: &str, block: &Block, blocks: &'a [Block]) -> Option<&'a Block> {
    blocks
        .iter()
        .find(|other| other.way == way && other.round == block.round)
}

impl Summary {
    fn row(&self) -> String {
        let middle = |of: Option<Middle>| {
            of.map_or("–".to_owned(), |of| {
                format!("{:.2} ({:.2}–{:.2})", of.median, of.low, of.high)
            })
        };
        let added = |of: Option<Added>| {
            of.map_or("–".to_owned(), |of| {
                format!("{} / {}", middle(Some(of.p50)), middle(Some(of.p99)))
            })
        };
        format!(
            "| {} | {} | {} | {} | {} | {:.0} ({:.0}–{:.0}) | {} | {} |",
            self.way,
            added(self.first),
            added(self.late),
            added(self.stream),
            added(self.whole),
            self.per_second.median,
            self.per_second.low,
            self.per_second.high,
            middle(self.against_smg),
            middle(self.cpu_ms),
        )
    }
}
