//! Where the load of a run comes from, step by step.

use crate::generator::{Counts, Generator, Rows};
use crate::policy::Forecast;

/// Decode batches that a placement is judged on in a step.
const DECODE_BATCHES: usize = 2;

/// Batches of a generated window: its tokens are those of so many decode batches.
const WINDOW_BATCHES: u64 = 50;

/// A window of the load statistic, over all ranks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Window {
    pub(crate) rows: Counts,
    /// Steps that engines made in it; 0 if that is not known.
    pub(crate) steps: u64,
}

impl Window {
    /// The window of a generator's step.
    pub(crate) fn of(load: &mut Generator) -> Self {
        Self {
            rows: load.window(),
            steps: WINDOW_BATCHES,
        }
    }
}

/// Generated, or recorded.
#[derive(Debug)]
pub(crate) enum Source<'a> {
    /// Every second step is judged, on batches of its own.
    Generated {
        load: Box<Generator>,
        forecast: Forecast,
        steps: usize,
    },
    /// Every step is judged, on its window: single batches are not recorded.
    Recorded(std::slice::Iter<'a, Window>),
}

/// One step.
#[derive(Debug)]
pub(crate) struct Step {
    /// What gateways foretell of it.
    pub(crate) forecast: Option<Rows>,
    /// What placements are judged on; none in a step that is not judged.
    pub(crate) decode: Vec<Counts>,
    pub(crate) prefill: Option<Counts>,
    /// What its window is a draw of.
    pub(crate) expected: Rows,
    pub(crate) window: Window,
}

impl Source<'_> {
    /// A window of the warm-up; none at the end of a recording.
    pub(crate) fn warm_up(&mut self) -> Option<Window> {
        match self {
            Self::Generated { load, .. } => {
                load.advance();
                Some(Window::of(load))
            }
            Self::Recorded(windows) => windows.next().cloned(),
        }
    }

    /// Step `t`; none at the end.
    pub(crate) fn step(&mut self, t: usize) -> Option<Step> {
        match self {
            Self::Generated {
                load,
                forecast,
                steps,
            } => (t < *steps).then(|| generated(load, *forecast, t)),
            Self::Recorded(windows) => windows.next().map(|window| Step {
                forecast: None,
                decode: vec![window.rows.clone()],
                prefill: None,
                expected: window.rows.iter().map(|row| real(row)).collect(),
                window: window.clone(),
            }),
        }
    }
}

fn generated(load: &mut Generator, forecast: Forecast, t: usize) -> Step {
    load.advance();
    let judged = t % 2 == 1;
    let batches = if judged { DECODE_BATCHES } else { 0 };
    Step {
        forecast: match forecast {
            Forecast::Off => None,
            Forecast::Topics => Some(load.forecast_topics()),
            Forecast::Noisy => Some(load.forecast_noisy()),
            Forecast::Exact => Some(load.expected()),
        },
        decode: (0..batches).map(|_| load.decode()).collect(),
        prefill: judged.then(|| load.prefill()),
        expected: load.expected(),
        window: Window::of(load),
    }
}

fn real(row: &[u64]) -> Vec<f64> {
    row.iter().map(|n| *n as f64).collect()
}
