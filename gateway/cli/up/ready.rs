//! Waits until the cluster serves, and shows how far it is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::member::Phase;
use foregate_store::coord::{ClusterState, Coord};
use foregate_store::kv::Store;
use foregate_worker::{Progress, ProgressSink};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::error::{CliError, print};
use crate::progress::{self as show, Task};

/// Loading a large model from a slow disk takes a while; longer than this it is stuck.
const LIMIT: Duration = Duration::from_secs(1800);
const POLL: Duration = Duration::from_millis(100);

/// What is waited for.
#[derive(Debug, Clone)]
pub(super) struct Awaited {
    /// Name of the cluster.
    pub(super) cluster: String,
    /// Name of the model.
    pub(super) served_name: String,
    /// Number of workers.
    pub(super) workers: usize,
    /// URL of the gateway.
    pub(super) url: String,
}

/// What the bar counts.
enum Count {
    /// Bytes of weights, when the workers run in this process.
    Bytes(Loads),
    /// Steps of the cluster, as the store shows them.
    Steps,
}

/// How far the workers of this process have loaded.
#[derive(Debug, Clone, Default)]
pub(super) struct Loads(Arc<Mutex<BTreeMap<Rank, Progress>>>);

impl Loads {
    /// Where one worker tells.
    pub(super) fn sink(&self, rank: Rank) -> ProgressSink {
        let loads = self.clone();
        Arc::new(move |now| {
            loads.lock().insert(rank, now);
        })
    }

    /// Over all workers. A worker that has not told yet counts as much as the others on average, so that the
    /// total does not jump when it does.
    fn sum(&self, workers: usize) -> Progress {
        let told = self.lock();
        let sum = told
            .values()
            .fold(Progress::default(), |sum, one| Progress {
                done: sum.done + one.done,
                total: sum.total + one.total,
            });
        let known = told.len().max(1) as u64;
        Progress {
            total: sum.total * known.max(workers as u64) / known,
            ..sum
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Rank, Progress>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bar with its count.
struct Bar {
    task: Task,
    count: Count,
    workers: usize,
}

impl Bar {
    fn new(progress: &show::Progress, count: Count, workers: usize) -> Self {
        let task = match count {
            Count::Bytes(_) => progress.bytes("loading", 0),
            Count::Steps => progress.steps("loading", steps_in_all(workers) as u64),
        };
        Self {
            task,
            count,
            workers,
        }
    }

    fn update(&self, steps: usize) {
        match &self.count {
            Count::Bytes(loads) => {
                let sum = loads.sum(self.workers);
                self.task.set_total(sum.total);
                self.task.set(sum.done);
            }
            Count::Steps => self.task.set(steps as u64),
        }
    }
}

/// Resolves when the gateway says it is ready, and prints the ready line. The workers are elsewhere: the bar
/// counts what they tell the store.
///
/// # Errors
/// When that takes unreasonably long.
pub(super) async fn ready(
    awaited: &Awaited,
    store: Arc<dyn Store>,
    progress: &show::Progress,
) -> Result<(), CliError> {
    wait(awaited, store, progress, Count::Steps).await
}

/// As [`ready`], with workers in this process: the bar counts the bytes they load.
///
/// # Errors
/// As [`ready`].
pub(super) async fn ready_here(
    awaited: &Awaited,
    store: Arc<dyn Store>,
    progress: &show::Progress,
    loads: Loads,
) -> Result<(), CliError> {
    wait(awaited, store, progress, Count::Bytes(loads)).await
}

async fn wait(
    awaited: &Awaited,
    store: Arc<dyn Store>,
    progress: &show::Progress,
    count: Count,
) -> Result<(), CliError> {
    let end = CancellationToken::new();
    let _end_with_us = end.clone().drop_guard();
    let state = Coord::new(store, &awaited.cluster).watch_cluster(end);
    let bar = Bar::new(progress, count, awaited.workers);
    let http = reqwest::Client::builder()
        .timeout(Duration::from_secs(2))
        .build()
        .map_err(|error| CliError::runtime("HTTP client", &error))?;
    let since = Instant::now();
    loop {
        let done = steps(&state.borrow());
        bar.update(done);
        let answer = http.get(format!("{}/ready", awaited.url)).send().await;
        if answer.is_ok_and(|answer| answer.status().is_success()) {
            break;
        }
        if since.elapsed() > LIMIT {
            return Err(CliError::Runtime(format!(
                "not ready after {} s: {done} of {} steps done (every worker registers, then has its experts; then a plan is active)",
                LIMIT.as_secs(),
                steps_in_all(awaited.workers)
            )));
        }
        sleep(POLL).await;
    }
    bar.task
        .finish(&format!("done in {:.1} s", since.elapsed().as_secs_f64()));
    let workers = match awaited.workers {
        1 => "1 worker".to_owned(),
        n => format!("{n} workers"),
    };
    print(&format!(
        "Ready: {} serves {} on {workers}",
        awaited.url, awaited.served_name
    ));
    Ok(())
}

/// Every worker counts when it has registered and again when it is ready; the active plan counts one.
fn steps(state: &ClusterState) -> usize {
    let ready = state.members.values().filter(|m| m.phase == Phase::Ready);
    state.members.len() + ready.count() + usize::from(state.active.is_some())
}

const fn steps_in_all(workers: usize) -> usize {
    workers * 2 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_all_workers() {
        let loads = Loads::default();
        assert_eq!(loads.sum(2), Progress::default());
        let (first, second) = (loads.sink(Rank(0)), loads.sink(Rank(1)));
        first(Progress {
            done: 30,
            total: 100,
        });
        // The second has not told yet: as much again.
        assert_eq!(
            loads.sum(2),
            Progress {
                done: 30,
                total: 200
            }
        );
        second(Progress {
            done: 50,
            total: 81,
        });
        first(Progress {
            done: 100,
            total: 100,
        });
        assert_eq!(
            loads.sum(2),
            Progress {
                done: 150,
                total: 181
            }
        );
    }
}
