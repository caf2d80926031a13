//! `foregate top`: a running cluster in a terminal, live.
//!
//! ```text
//!  gateway ── snapshot.rs (what it says) ── figures.rs (what follows) ── screen.rs (drawn)
//!  keys ───── state.rs (what is looked at)──────────────────────────────┘
//! ```

mod figures;
mod screen;
mod snapshot;
mod state;
#[cfg(test)]
mod tests;

use std::io::IsTerminal;
use std::time::Duration;

use foregate_explain::Record;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::error::CliError;
use crate::explain;
use figures::Figures;
use snapshot::Snapshot;
use state::{Next, State};

/// How long a key is waited for before it is looked whether somebody still listens.
const KEYS: Duration = Duration::from_millis(100);
/// Keys that may wait; more are lost, and pressed again.
const QUEUE: usize = 16;
/// Snapshots between two looks at the recorded decisions.
const DECISIONS_EVERY: u64 = 3;

/// Arguments of `foregate top`.
#[derive(Debug, clap::Args)]
pub(crate) struct TopArgs {
    /// URL of the gateway.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Milliseconds between two looks.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
    every_ms: u64,
}

/// What is shown.
#[derive(Debug, Default)]
struct Shown {
    figures: Option<Figures>,
    /// The last change of epoch, and the time at the gateway.
    last: Option<(Record, u64)>,
    /// Why the newest look gave nothing.
    trouble: Option<String>,
}

/// Draws until it is told to stop.
///
/// # Errors
/// Without a terminal; a gateway that does not answer the first question.
pub(crate) async fn run(args: &TopArgs, drain: CancellationToken) -> Result<(), CliError> {
    if !std::io::stdout().is_terminal() {
        return Err(CliError::Usage(
            "top draws on a terminal and stdout is none; `foregate explain --json` is for pipes".to_owned(),
        ));
    }
    let first = look(&args.url, None).await?;
    let mut shown = Shown {
        figures: Some(first),
        ..Shown::default()
    };
    decisions(args, &mut shown).await;
    let (keys, pressed) = mpsc::channel(QUEUE);
    std::thread::Builder::new()
        .name("keys".to_owned())
        .spawn(move || read_keys(&keys))
        .map_err(|error| CliError::runtime("a thread cannot start", &error))?;
    let mut terminal = ratatui::try_init()
        .map_err(|error| CliError::runtime("the terminal cannot be drawn on", &error))?;
    let end = draw(args, &mut terminal, shown, pressed, drain).await;
    ratatui::restore();
    end
}

async fn draw(
    args: &TopArgs,
    terminal: &mut DefaultTerminal,
    mut shown: Shown,
    mut pressed: mpsc::Receiver<Event>,
    drain: CancellationToken,
) -> Result<(), CliError> {
    let failed = |error: std::io::Error| CliError::runtime("the terminal", &error);
    let mut state = State::default();
    let mut ticks = interval(Duration::from_millis(args.every_ms));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looks = 0_u64;
    loop {
        terminal
            .draw(|frame| screen::draw(frame, &shown, &mut state))
            .map_err(failed)?;
        tokio::select! {
            () = drain.cancelled() => return Ok(()),
            _ = ticks.tick() => {
                looks += 1;
                match look(&args.url, shown.figures.as_ref()).await {
                    Ok(figures) => {
                        shown.figures = Some(figures);
                        shown.trouble = None;
                    }
                    Err(error) => shown.trouble = Some(error.to_string()),
                }
                if looks.is_multiple_of(DECISIONS_EVERY) {
                    decisions(args, &mut shown).await;
                }
            }
            key = pressed.recv() => match key {
                // Nobody reads the terminal any more: it is gone.
                None => return Ok(()),
                Some(event) => if state.on(&event) == Next::Quit {
                    return Ok(());
                },
            }
        }
    }
}

async fn look(url: &str, before: Option<&Figures>) -> Result<Figures, CliError> {
    let document = explain::get(url, "/debug/experts").await?;
    let snapshot = Snapshot::read(&document)
        .map_err(|error| CliError::runtime(&format!("{url}/debug/experts"), &error))?;
    Ok(Figures::of(snapshot, before))
}

/// Best effort: what is not recorded is not shown.
async fn decisions(args: &TopArgs, shown: &mut Shown) {
    if let Ok(told) = explain::ask(&args.url).await {
        let last = told.past.records.into_values().next_back();
        shown.last = last.map(|record| (record, told.now_ms));
    }
}

fn read_keys(to: &mpsc::Sender<Event>) {
    while !to.is_closed() {
        match event::poll(KEYS) {
            Ok(false) => {}
            Ok(true) => {
                let Ok(event) = event::read() else { return };
                // A full queue: the key is pressed again.
                let _sent = to.try_send(event);
            }
            Err(_) => return,
        }
    }
}
