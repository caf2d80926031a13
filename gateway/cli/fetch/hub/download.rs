//! One file: download, resume, check its length; and the watch that notices when nothing moves.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiError, ApiRepo};
use tokio::task::JoinHandle;

use super::{Wanted, status};
use crate::fetch::FetchError;
use crate::progress::{Progress, Task};

/// Tries per file. Each goes on where the last one ended.
const TRIES: u32 = 5;
/// A download that moves no byte for this long has failed.
const STALL: Duration = Duration::from_secs(60);

/// Counts what arrives, so that the waiting side sees a stall, and carries its wish to stop back.
#[derive(Debug, Clone, Default)]
pub(super) struct Watch(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    moved: AtomicU64,
    stop: AtomicBool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.0.stop.store(true, Ordering::Relaxed);
    }
}

/// Tells the download to stop when the waiting side goes away.
struct Guard<'a>(&'a Watch);

impl Watch {
    /// Waits for the download; gives up when nothing moves for [`STALL`].
    pub(super) async fn guard(
        &self,
        mut work: JoinHandle<Result<PathBuf, FetchError>>,
    ) -> Result<PathBuf, FetchError> {
        let _stop_when_gone = Guard(self);
        let mut last = self.0.moved.load(Ordering::Relaxed);
        loop {
            match tokio::time::timeout(STALL, &mut work).await {
                Ok(Ok(done)) => return done,
                Ok(Err(error)) => {
                    return Err(FetchError::Download {
                        repo: "the hub".to_owned(),
                        file: "the model".to_owned(),
                        what: format!("the hub client failed: {error}"),
                    });
                }
                Err(_) => {
                    let now = self.0.moved.load(Ordering::Relaxed);
                    if now == last {
                        return Err(FetchError::Download {
                            repo: "the hub".to_owned(),
                            file: "the model".to_owned(),
                            what: format!("no byte in {} s", STALL.as_secs()),
                        });
                    }
                    last = now;
                }
            }
        }
    }

    fn stopped(&self) -> bool {
        self.0.stop.load(Ordering::Relaxed)
    }
}

/// hf-hub's progress, passed on to ours.
struct Meter<'a> {
    name: &'a str,
    watch: &'a Watch,
    progress: &'a Progress,
    task: &'a mut Option<Task>,
    total: &'a mut u64,
}

impl hf_hub::api::Progress for Meter<'_> {
    fn init(&mut self, size: usize, _filename: &str) {
        *self.total = size as u64;
        // Called twice per try: once for the file, once for its (rest of the) body.
        self.task
            .get_or_insert_with(|| self.progress.bytes(self.name, size as u64))
            .set(0);
    }

    fn update(&mut self, size: usize) {
        self.watch.0.moved.fetch_add(1, Ordering::Relaxed);
        if let Some(task) = &self.task {
            task.add(size as u64);
        }
    }

    fn finish(&mut self) {}
}

/// Downloads one file of the pinned commit, in several tries if need be.
pub(super) fn file(
    wanted: &Wanted,
    api: &Api,
    pinned: &ApiRepo,
    name: &str,
    watch: &Watch,
    progress: &Progress,
) -> Result<PathBuf, FetchError> {
    let mut task = None;
    let mut tried = 0;
    loop {
        if watch.stopped() {
            return Err(FetchError::Stopped);
        }
        tried += 1;
        let mut total = 0;
        let meter = Meter {
            name,
            watch,
            progress,
            task: &mut task,
            total: &mut total,
        };
        let error = match pinned.download_with_progress(name, meter) {
            Ok(path) => {
                check_length(wanted, name, &path, total)?;
                if let Some(task) = task {
                    task.finish("done");
                }
                return Ok(path);
            }
            Err(error) => error,
        };
        let spoiled = matches!(error, ApiError::InvalidResume) || status(&error) == Some(416);
        if spoiled {
            forget_part(wanted, api, pinned, name);
        }
        if tried == TRIES || !(spoiled || worth_a_retry(&error)) {
            return Err(wanted.explain(name, &error));
        }
        tracing::warn!(file = name, %error, "download interrupted, going on");
        pause(Duration::from_millis(250) * 2_u32.pow(tried));
    }
}

fn worth_a_retry(error: &ApiError) -> bool {
    match status(error) {
        Some(code) => code == 429 || code >= 500,
        None => matches!(
            error,
            ApiError::RequestError(_) | ApiError::IoError(_) | ApiError::LockAcquisition(_)
        ),
    }
}

/// A body that ended early without an error, or a server that ignored the range, must not pass for the file.
fn check_length(
    wanted: &Wanted,
    name: &str,
    path: &PathBuf,
    total: u64,
) -> Result<(), FetchError> {
    let length = std::fs::metadata(path).map_or(0, |meta| meta.len());
    if length == total {
        return Ok(());
    }
    // The pointer and the blob behind it: the next run starts this file anew.
    for file in [path.canonicalize().unwrap_or_default(), path.clone()] {
        if let Err(error) = std::fs::remove_file(&file) {
            tracing::debug!(file = %file.display(), %error, "not removed");
        }
    }
    Err(wanted.failed(name, &format!("{length} bytes arrived instead of {total}")))
}

/// Removes a partial file that cannot be resumed.
fn forget_part(wanted: &Wanted, api: &Api, pinned: &ApiRepo, name: &str) {
    let Ok(metadata) = api.metadata(&pinned.url(name)) else {
        return;
    };
    let part = wanted
        .cache()
        .repo(wanted.at("main"))
        .blob_path(metadata.etag())
        .with_extension("part");
    if let Err(error) = std::fs::remove_file(&part) {
        tracing::debug!(file = %part.display(), %error, "not removed");
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "this runs on a thread of its own for blocking work, not on the runtime"
)]
fn pause(time: Duration) {
    std::thread::sleep(time);
}
