//! What a person sees while something takes long: bars on a terminal, plain lines elsewhere.
//! Everything goes to stderr; stdout is for results.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Where progress is shown.
#[derive(Debug, Clone)]
pub(crate) enum Progress {
    /// Bars on a terminal.
    Bars(MultiProgress),
    /// One line at the start and one at the end of each task.
    Lines,
}

impl Progress {
    /// Bars if stderr is a terminal, else lines.
    pub(crate) fn detect() -> Self {
        if std::io::stderr().is_terminal() {
            Self::Bars(MultiProgress::new())
        } else {
            Self::Lines
        }
    }

    /// One sentence.
    pub(crate) fn say(&self, text: &str) {
        match self {
            Self::Bars(bars) => {
                // A closed terminal is no reason to stop serving.
                drop(bars.println(text));
            }
            Self::Lines => line(text),
        }
    }

    /// A task counted in bytes.
    pub(crate) fn bytes(&self, name: &str, total: u64) -> Task {
        self.task(
            name,
            total,
            "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}",
        )
    }

    /// A task counted in steps.
    pub(crate) fn steps(&self, name: &str, total: u64) -> Task {
        self.task(name, total, "{msg} {bar:30} {pos}/{len}")
    }

    fn task(&self, name: &str, total: u64, template: &str) -> Task {
        let bar = match self {
            Self::Bars(bars) => {
                let bar = bars.add(ProgressBar::new(total));
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style);
                }
                bar.set_message(name.to_owned());
                bar.enable_steady_tick(Duration::from_millis(200));
                Some(bar)
            }
            Self::Lines => {
                line(&format!("{name} …"));
                None
            }
        };
        Task(Arc::new(Inner {
            name: name.to_owned(),
            bar,
            done: AtomicU64::new(0),
        }))
    }
}

/// One task with its count. Clones count together.
#[derive(Debug, Clone)]
pub(crate) struct Task(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    bar: Option<ProgressBar>,
    done: AtomicU64,
}

impl Task {
    /// Sets the count.
    pub(crate) fn set(&self, done: u64) {
        self.0.done.store(done, Ordering::Relaxed);
        if let Some(bar) = &self.0.bar {
            bar.set_position(done);
        }
    }

    /// Sets what the count will end at, once that is known.
    pub(crate) fn set_total(&self, total: u64) {
        if let Some(bar) = &self.0.bar {
            bar.set_length(total);
        }
    }

    /// Adds to the count.
    pub(crate) fn add(&self, more: u64) {
        let before = self.0.done.fetch_add(more, Ordering::Relaxed);
        if let Some(bar) = &self.0.bar {
            bar.set_position(before + more);
        }
    }

    /// Ends the task with a word about how it went.
    pub(crate) fn finish(&self, word: &str) {
        match &self.0.bar {
            Some(bar) => bar.finish_and_clear(),
            None => line(&format!("{} … {word}", self.0.name)),
        }
    }
}

fn line(text: &str) {
    // A closed stderr is no reason to stop serving.
    drop(writeln!(std::io::stderr(), "{text}"));
}
