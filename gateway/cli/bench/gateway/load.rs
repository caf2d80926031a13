//! The two loads: requests that arrive at random, and as many at a time as there are places.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::client::{Asked, Came, Client};
use crate::bench::stub::Delays;
use crate::bench::workload::{Draw, Text};

/// Prompts, drawn one after the other.
#[derive(Debug)]
pub(super) struct Asks<'a> {
    pub(super) texts: &'a [Text],
    pub(super) characters: usize,
    pub(super) tokens: u32,
    pub(super) streamed: bool,
    pub(super) draw: Draw,
}

impl Asks<'_> {
    fn next(&mut self) -> Asked {
        let text = &self.texts[self.draw.below(self.texts.len())];
        let prompt = text.cut(self.characters, &mut self.draw);
        Asked::new(&prompt, self.tokens, self.streamed)
    }
}

/// Times of an open load, in milliseconds.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Open {
    /// To the first token of a stream.
    pub(super) first: Vec<f64>,
    /// By how much each later token came after its moment in the schedule.
    pub(super) late: Vec<f64>,
    /// To the end.
    pub(super) total: Vec<f64>,
    pub(super) failures: Vec<String>,
}

/// What a closed load did.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Closed {
    /// Answered in the time, and then.
    pub(super) answered: u64,
    pub(super) seconds: f64,
    /// To the first token, in milliseconds.
    pub(super) first: Vec<f64>,
    pub(super) failures: Vec<String>,
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

impl Open {
    fn take(&mut self, came: Result<Came, String>, delays: Delays) {
        let came = match came {
            Ok(came) => came,
            Err(failure) => {
                self.failures.push(failure);
                return;
            }
        };
        self.total.push(ms(came.total));
        self.first.extend(came.events.first().copied().map(ms));
        let later = (0_u32..).zip(&came.events).skip(1);
        self.late
            .extend(later.map(|(index, at)| ms(*at) - ms(delays.until(index))));
    }
}

/// So many requests that arrive as a Poisson process, whether or not earlier ones are done. Times count from when a request
/// is sent: the load is far too small for the client to be late, and its timer's grain is no gateway's doing.
pub(super) async fn open(
    client: &Client,
    mut asks: Asks<'_>,
    requests: u32,
    rate: f64,
    delays: Delays,
) -> Open {
    let mut arrivals = asks.draw.clone();
    let (mut running, mut open) = (JoinSet::new(), Open::default());
    let mut due = Instant::now();
    for _ in 0..requests {
        due += arrivals.gap(rate);
        let asked = asks.next();
        sleep_until(due).await;
        let client = client.clone();
        running.spawn(async move { client.ask(&asked).await });
        while let Some(done) = running.try_join_next() {
            open.take(done.unwrap_or_else(|e| Err(e.to_string())), delays);
        }
    }
    while let Some(done) = running.join_next().await {
        open.take(done.unwrap_or_else(|e| Err(e.to_string())), delays);
    }
    open
}

/// So many requests at a time for so long; each place asks anew when it is answered.
pub(super) async fn closed(
    client: &Client,
    mut asks: Asks<'_>,
    places: u32,
    time: Duration,
) -> Closed {
    /// Different prompts of a place.
    const OWN: usize = 16;
    let since = Instant::now();
    let mut running = JoinSet::new();
    for _ in 0..places {
        let own: Vec<Asked> = (0..OWN).map(|_| asks.next()).collect();
        running.spawn(place(client.clone(), own, since + time));
    }
    let mut all = Closed::default();
    while let Some(done) = running.join_next().await {
        match done {
            Ok(one) => {
                all.answered += one.answered;
                all.first.extend(one.first);
                all.failures.extend(one.failures);
            }
            Err(error) => all.failures.push(error.to_string()),
        }
    }
    all.seconds = since.elapsed().as_secs_f64();
    all
}

async fn place(client: Client, asks: Vec<Asked>, end: Instant) -> Closed {
    let mut closed = Closed::default();
    for asked in asks.iter().cycle() {
        if Instant::now() >= end {
            break;
        }
        match client.ask(asked).await {
            Ok(came) => {
                closed.answered += 1;
                closed.first.extend(came.events.first().copied().map(ms));
            }
            Err(failure) => {
                closed.failures.push(failure);
                // A way that fails at once must not be asked a million times.
                break;
            }
        }
    }
    closed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_late_by_its_own_moment() {
        let delays = Delays {
            first_us: 1000,
            between_us: 2000,
        };
        let at = |micros: &[u64]| micros.iter().copied().map(Duration::from_micros).collect();
        let mut open = Open::default();
        let came = Came {
            events: at(&[1500, 3000, 6500]),
            total: Duration::from_micros(7000),
        };
        open.take(Ok(came), delays);
        open.take(Err("refused".to_owned()), delays);
        assert_eq!(open.first, [1.5]);
        assert_eq!(open.late, [0.0, 1.5]);
        assert_eq!(open.total, [7.0]);
        assert_eq!(open.failures, ["refused"]);
    }
}
