//! Follows what the workers' KV caches hold: one stream per ready worker.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::member::Member;
use foregate_wire::generation::PrefixesRequest;
use foregate_wire::generation::generation_client::GenerationClient;
use foregate_wire::tonic::{Code, Status};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::Upstream;
use crate::prefixes::Prefixes;

/// How often it is looked who is there.
const LOOK: Duration = Duration::from_millis(200);
/// Longest wait for the headers of a stream.
const ANSWER: Duration = Duration::from_secs(10);
/// Pause after a stream that ended, and after a worker that has none.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Bytes of a message: a part of a snapshot has half a mebibyte.
const MESSAGE: usize = 4 << 20;

/// A worker that is followed, or will be again.
struct Followed {
    incarnation: u64,
    task: Option<AbortHandle>,
    /// Not before this.
    again: Instant,
}

/// What a worker has told is forgotten when its stream ends, however it does.
struct Telling<'a>(&'a Prefixes, &'a Member);

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        self.0.forget(self.1.rank, self.1.incarnation);
    }
}

impl Upstream {
    /// Follows every ready worker until `shutdown`.
    pub async fn follow_prefixes(self: Arc<Self>, shutdown: CancellationToken) {
        let mut followed: BTreeMap<Rank, Followed> = BTreeMap::new();
        let mut streams: JoinSet<(Rank, u64, Duration)> = JoinSet::new();
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = looks.tick() => {}
                // One that was aborted is not followed any more.
                Some(ended) = streams.join_next() => if let Ok((rank, incarnation, pause)) = ended
                    && let Some(entry) = followed.get_mut(&rank)
                    && entry.incarnation == incarnation
                {
                    (entry.task, entry.again) = (None, Instant::now() + pause);
                },
            }
            self.follow_who_is_there(&mut followed, &mut streams);
        }
    }

    fn follow_who_is_there(
        self: &Arc<Self>,
        followed: &mut BTreeMap<Rank, Followed>,
        streams: &mut JoinSet<(Rank, u64, Duration)>,
    ) {
        let view = self.views.load();
        let there: BTreeMap<Rank, &Arc<Member>> =
            view.ready().map(|member| (member.rank, member)).collect();
        followed.retain(|rank, entry| {
            let stays = there
                .get(rank)
                .is_some_and(|m| m.incarnation == entry.incarnation);
            if let Some(task) = entry.task.as_ref().filter(|_| !stays) {
                task.abort();
            }
            stays
        });
        self.cached
            .keep_only(|rank| view.state.members.contains_key(&rank));
        for (rank, member) in there {
            let now = Instant::now();
            let entry = followed.entry(rank).or_insert_with(|| Followed {
                incarnation: member.incarnation,
                task: None,
                again: now,
            });
            if entry.task.is_none() && now >= entry.again {
                let (upstream, member) = (Arc::clone(self), Arc::clone(member));
                let task = async move {
                    let pause = upstream.follow_one(&member).await;
                    (member.rank, member.incarnation, pause)
                };
                entry.task = Some(streams.spawn(task));
            }
        }
    }

    /// Takes in what one worker tells until its stream ends. Returns the pause before the next try.
    async fn follow_one(&self, member: &Member) -> Duration {
        match self.listen(member).await {
            Ok(()) => PAUSE.0,
            // A worker of an older version: what it has read is remembered instead.
            Err(status) if status.code() == Code::Unimplemented => PAUSE.1,
            Err(status) => {
                tracing::debug!(worker = member.rank.0, %status, "prefixes_not_followed");
                PAUSE.0
            }
        }
    }

    async fn listen(&self, member: &Member) -> Result<(), Status> {
        let channel = self.channel(member);
        let channel = channel.map_err(|error| Status::unavailable(error.message))?;
        let mut client = GenerationClient::new(channel).max_decoding_message_size(MESSAGE);
        let called = timeout(ANSWER, client.prefixes(PrefixesRequest {})).await;
        let called = called.map_err(|_| Status::deadline_exceeded("no answer"))?;
        let mut stream = called?.into_inner();
        let _telling = Telling(&self.prefixes, member);
        // Quiet caches have nothing to say for hours; a lost connection ends by its keep-alive.
        while let Some(event) = stream.message().await? {
            if event.reset {
                self.prefixes.begin(member);
            }
            self.prefixes
                .tell(member.rank, &event.added, &event.removed);
        }
        Ok(())
    }
}
