//! One watch: list, stream, and from the beginning again after every gap.

use std::time::Duration;

use etcd_client::{EventType, KvClient, WatchClient, WatchOptions};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::etcd::{bounded, entry_of, list_at, prefix_end};
use crate::kv::{StoreError, WatchEvent};

/// First pause after a failure; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A watch's task.
pub(super) struct Watching {
    pub(super) kv: KvClient,
    pub(super) watch: WatchClient,
    pub(super) prefix: String,
    pub(super) events: mpsc::Sender<WatchEvent>,
}

/// Why following ended.
enum End {
    /// Nobody reads any more.
    Closed,
    /// The reader's queue was full and events are lost.
    Behind,
    /// The stream ended; whether a snapshot had been delivered before.
    Broken(StoreError, bool),
}

impl Watching {
    /// Runs until the receiver is dropped.
    pub(super) async fn run(self) {
        let events = self.events.clone();
        tokio::select! {
            () = events.closed() => {}
            () = self.follow_forever() => {}
        }
    }

    async fn follow_forever(self) {
        let mut pause = FIRST_PAUSE;
        let mut connected = true;
        loop {
            match self.follow().await {
                End::Closed => return,
                End::Behind => {
                    tracing::debug!(prefix = %self.prefix, "slow reader of a watch");
                    connected = true;
                }
                End::Broken(error, delivered) => {
                    if delivered {
                        (pause, connected) = (FIRST_PAUSE, true);
                    }
                    if std::mem::replace(&mut connected, false) {
                        tracing::warn!(%error, prefix = %self.prefix, "watch lost");
                        if self.events.send(WatchEvent::Disconnected).await.is_err() {
                            return;
                        }
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// One life of the stream.
    async fn follow(&self) -> End {
        // The room comes first: a reader that fell behind gets what is true once it reads again, and not an old list
        // with everything after it, which could overrun it once more.
        let Ok(room) = self.events.reserve().await else {
            return End::Closed;
        };
        let (entries, revision) = match list_at(&self.kv, &self.prefix).await {
            Ok(found) => found,
            Err(error) => return End::Broken(error, false),
        };
        let options = WatchOptions::new()
            .with_range(prefix_end(&self.prefix))
            .with_start_revision(revision + 1);
        let mut watch = self.watch.clone();
        let opened = bounded("watch", watch.watch(self.prefix.as_str(), Some(options))).await;
        let mut stream = match opened {
            Ok(stream) => stream,
            Err(error) => return End::Broken(error, false),
        };
        room.send(WatchEvent::Snapshot(entries));
        loop {
            let answer = match stream.message().await {
                Ok(Some(answer)) => answer,
                Ok(None) => return broken("the stream ended"),
                Err(error) => return broken(&error.to_string()),
            };
            if answer.canceled() {
                return broken(&format!(
                    "cancelled: {} (compacted at {})",
                    answer.cancel_reason(),
                    answer.compact_revision()
                ));
            }
            for event in answer.events().iter().filter_map(translate) {
                match self.events.try_send(event) {
                    Ok(()) => {}
                    Err(TrySendError::Closed(_)) => return End::Closed,
                    Err(TrySendError::Full(_)) => return End::Behind,
                }
            }
        }
    }
}

fn broken(why: &str) -> End {
    End::Broken(StoreError::Unavailable(why.to_owned()), true)
}

fn translate(event: &etcd_client::Event) -> Option<WatchEvent> {
    let (key, entry) = entry_of(event.kv()?)?;
    Some(match event.event_type() {
        EventType::Put => WatchEvent::Put(key, entry),
        EventType::Delete => WatchEvent::Delete(key),
    })
}
