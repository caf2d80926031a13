//! Work beside serving. Packing an expert keeps a core busy for as long as its weights are large; on a thread
//! of low priority it takes what serving leaves, and a decode step waits for it no longer than a time slice.

use std::thread;

use tokio::sync::oneshot;

/// Niceness of such a thread. Against a busy thread of serving it gets a tenth of a core: enough for a
/// migration to end on a machine that is never idle.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// The work panicked, or the system has no thread for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the work was interrupted")]
pub(super) struct Interrupted;

/// Does the work on a thread of its own: a priority, once lowered, may not be raised again. The caller bounds
/// how many there are. Dropping the future does not end the work.
pub(super) async fn run<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Interrupted> {
    let (done, result) = oneshot::channel();
    let body = move || {
        yield_to_serving();
        // Nobody waits any more: the result is not needed.
        drop(done.send(work()));
    };
    thread::Builder::new()
        .name("background".to_owned())
        .spawn(body)
        .map_err(|error| {
            tracing::error!(%error, "background_thread_refused");
            Interrupted
        })?;
    result.await.map_err(|_| Interrupted)
}

/// Linux keeps a niceness per thread; where it belongs to the process it is left alone.
fn yield_to_serving() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{getpriority_process, setpriority_process};
        // A process that is nicer already stays so.
        let lower = getpriority_process(None).is_ok_and(|now| now < NICE);
        if lower && let Err(error) = setpriority_process(None, NICE) {
            tracing::debug!(%error, "background_priority_refused");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_told_and_a_result_comes_back() {
        assert_eq!(run(|| 7).await, Ok(7));
        assert_eq!(
            run(|| panic!("on purpose")).await,
            Err::<(), _>(Interrupted)
        );
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn only_its_own_thread_is_nice() {
        let nice = || rustix::process::getpriority_process(None);
        let before = nice().unwrap();
        assert_eq!(run(nice).await.unwrap(), Ok(NICE.max(before)));
        assert_eq!(nice(), Ok(before));
    }
}
