//! Loads one expert: from a peer that holds it, else from the checkpoint; verified either way.
//!
//! A fetch streams canonical bytes under a deadline and is compared with the hash that the holder computed
//! when it loaded the expert. Anything wrong with a peer is logged and the next source is tried: the
//! checkpoint is the last.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use foregate_api::ids::{ExpertId, LayerId};
use foregate_api::model::ModelSpec;
use foregate_checkpoint::{Checkpoint, ExpertHash};
use foregate_kernels::{Cpu, Executor, OpError, Ops};
use foregate_models::{ExpertWeights, ModelError};
use foregate_tls::Keys;
use foregate_wire::connect::{BadAddress, channel};
use foregate_wire::experts::experts_client::ExpertsClient;
use foregate_wire::experts::{Chunk, FetchRequest};
use foregate_wire::tonic::transport::Channel;
use foregate_wire::tonic::{Status, Streaming};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use super::background;
use super::table::Item;
use crate::metrics::{Source, WorkerMetrics};

/// Longest time one fetch may take.
const FETCH_DEADLINE: Duration = Duration::from_secs(20);
/// Holders to which a connection is kept.
const MOST_CONNECTIONS: usize = 256;

/// Why an expert did not come from a source.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The holder's address is unusable.
    #[error(transparent)]
    Address(#[from] BadAddress),
    /// The holder refused or the connection broke.
    #[error("the holder answers: {0}")]
    Holder(#[source] Box<Status>),
    /// The deadline passed.
    #[error("no complete answer within {} s", FETCH_DEADLINE.as_secs())]
    Deadline,
    /// The stream does not have the bytes it should have.
    #[error("{found} bytes instead of {expected}")]
    Size {
        /// Bytes of an expert of this model.
        expected: usize,
        /// Bytes announced or sent.
        found: u64,
    },
    /// The hash differs.
    #[error("the hash differs: {expected} announced, {found} received")]
    Hash {
        /// What the holder announced.
        expected: String,
        /// What its bytes give.
        found: String,
    },
    /// The bytes cannot be packed, or a card has no memory for them.
    #[error(transparent)]
    Pack(#[from] OpError),
    /// The checkpoint does not give the expert.
    #[error(transparent)]
    Checkpoint(#[from] ModelError),
    /// The work was interrupted.
    #[error("loading was interrupted")]
    Interrupted,
}

impl From<Status> for LoadError {
    fn from(status: Status) -> Self {
        Self::Holder(Box::new(status))
    }
}

/// Loads experts of one model.
#[derive(Debug)]
pub struct Loader {
    spec: Arc<ModelSpec>,
    checkpoint: Arc<Checkpoint>,
    metrics: Arc<WorkerMetrics>,
    packing: Arc<Semaphore>,
    cpu: Arc<Cpu>,
    executor: Arc<dyn Executor>,
    keys: Option<Keys>,
    connections: Mutex<BTreeMap<String, Channel>>,
}

impl Loader {
    /// A loader over the local files. Packing takes a core: at most as many experts are packed at a time as
    /// `cpu` has threads, each where its threads are, so that the weights lie near them; `executor` puts them where they are
    /// computed with.
    /// Holders are asked over connections that `keys` prove, if there are any.
    #[must_use]
    pub fn new(
        spec: Arc<ModelSpec>,
        checkpoint: Arc<Checkpoint>,
        metrics: Arc<WorkerMetrics>,
        cpu: Arc<Cpu>,
        executor: Arc<dyn Executor>,
        keys: Option<Keys>,
    ) -> Self {
        Self {
            spec,
            checkpoint,
            metrics,
            packing: Arc::new(Semaphore::new(cpu.threads())),
            cpu,
            executor,
            keys,
            connections: Mutex::default(),
        }
    }

    /// Loads that may be in flight: all cores before the worker serves, a fraction of them afterwards, so
    /// that a migration does not take the processor from serving.
    #[must_use]
    pub fn at_once(&self, serving: bool) -> usize {
        if serving {
            (self.cpu.threads() / 4).clamp(1, 4)
        } else {
            self.cpu.threads() * 2
        }
    }

    /// Loads an expert from the first of `holders` (`host:port` of their gRPC) that gives it, else from the
    /// checkpoint; beside `serving`, with low priority.
    ///
    /// # Errors
    /// The checkpoint's.
    pub async fn load(
        &self,
        item: Item,
        holders: &[String],
        serving: bool,
    ) -> Result<Arc<ExpertWeights>, LoadError> {
        for holder in holders {
            let begun = Instant::now();
            match self.load_from_peer(item, holder, serving).await {
                Ok(weights) => {
                    self.done(Source::Peer, begun);
                    return Ok(weights);
                }
                Err(error) => tracing::warn!(
                    layer = %item.0, expert = %item.1, %holder, %error, "expert_fetch_failed"
                ),
            }
        }
        let begun = Instant::now();
        let weights = self.load_from_checkpoint(item, serving).await?;
        self.done(Source::Checkpoint, begun);
        Ok(weights)
    }

    async fn load_from_peer(
        &self,
        item: Item,
        holder: &str,
        serving: bool,
    ) -> Result<Arc<ExpertWeights>, LoadError> {
        let deadline = Instant::now() + FETCH_DEADLINE;
        let (bytes, announced) = timeout_at(deadline, self.fetch(item, holder))
            .await
            .map_err(|_| LoadError::Deadline)??;
        let (spec, executor) = (Arc::clone(&self.spec), Arc::clone(&self.executor));
        self.pack(serving, move || {
            let weights = ExpertWeights::from_canonical_on(&*executor, &spec, &bytes)?;
            verify(announced, weights.hash())?;
            Ok(weights)
        })
        .await
    }

    async fn fetch(
        &self,
        (layer, expert): Item,
        holder: &str,
    ) -> Result<(Bytes, ExpertHash), LoadError> {
        let mut client = ExpertsClient::new(self.connection(holder)?);
        let request = FetchRequest {
            layer: layer.0,
            expert: expert.0,
        };
        let stream = client.fetch(request).await?.into_inner();
        collect(stream, self.spec.expert_bytes()).await
    }

    /// The connection to a holder: one for all its experts, since setting one up takes longer than a small expert.
    fn connection(&self, holder: &str) -> Result<Channel, LoadError> {
        let mut open = self
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = open.get(holder) {
            return Ok(channel.clone());
        }
        let channel = channel(holder, self.keys.as_ref())?;
        // A peer that was started again has another address, so the old ones are let go now and then.
        if open.len() >= MOST_CONNECTIONS {
            open.clear();
        }
        open.insert(holder.to_owned(), channel.clone());
        Ok(channel)
    }

    async fn load_from_checkpoint(
        &self,
        item: Item,
        serving: bool,
    ) -> Result<Arc<ExpertWeights>, LoadError> {
        let (checkpoint, executor) = (Arc::clone(&self.checkpoint), Arc::clone(&self.executor));
        self.pack(serving, move || {
            Ok(ExpertWeights::load_on(
                &*executor,
                &checkpoint,
                item.0,
                item.1,
            )?)
        })
        .await
    }

    /// Packs on a thread that may block.
    async fn pack(
        &self,
        serving: bool,
        work: impl FnOnce() -> Result<ExpertWeights, LoadError> + Send + 'static,
    ) -> Result<Arc<ExpertWeights>, LoadError> {
        let place = Arc::clone(&self.packing)
            .acquire_owned()
            .await
            .map_err(|_| LoadError::Interrupted)?;
        // The place goes with the work, which goes on when nobody waits for it any more.
        let cpu = Arc::clone(&self.cpu);
        let work = move || {
            let _seated = cpu.enter();
            let packed = work();
            drop(place);
            packed
        };
        let packed = if serving {
            background::run(work).await.ok()
        } else {
            tokio::task::spawn_blocking(work).await.ok()
        };
        Ok(Arc::new(packed.ok_or(LoadError::Interrupted)??))
    }

    fn done(&self, source: Source, begun: Instant) {
        self.metrics.loaded(
            source,
            self.spec.expert_bytes(),
            begun.elapsed().as_secs_f64(),
        );
    }
}

fn verify(announced: ExpertHash, found: ExpertHash) -> Result<(), LoadError> {
    if announced == found {
        return Ok(());
    }
    Err(LoadError::Hash {
        expected: announced.to_string(),
        found: found.to_string(),
    })
}

/// Collects a stream of exactly `expected` bytes; the first chunk announces total and hash.
async fn collect(
    mut stream: Streaming<Chunk>,
    expected: usize,
) -> Result<(Bytes, ExpertHash), LoadError> {
    let size = |found: u64| LoadError::Size { expected, found };
    let mut first = stream.message().await?.ok_or_else(|| size(0))?;
    if first.total != expected as u64 {
        return Err(size(first.total));
    }
    let hash: [u8; 32] =
        std::mem::take(&mut first.blake3)
            .try_into()
            .map_err(|_| LoadError::Hash {
                expected: "32 bytes".to_owned(),
                found: "another length".to_owned(),
            })?;
    let mut bytes = BytesMut::with_capacity(expected);
    let mut next = Some(first);
    while let Some(chunk) = next {
        if bytes.len() + chunk.data.len() > expected {
            return Err(size((bytes.len() + chunk.data.len()) as u64));
        }
        bytes.extend_from_slice(&chunk.data);
        next = stream.message().await?;
    }
    if bytes.len() != expected {
        return Err(size(bytes.len() as u64));
    }
    Ok((bytes.freeze(), ExpertHash(hash)))
}

/// Where to ask first for an item: spreads a migration over the holders.
#[must_use]
pub fn rotate(mut holders: Vec<String>, (layer, expert): (LayerId, ExpertId)) -> Vec<String> {
    if !holders.is_empty() {
        let by = (layer.index() + expert.index()) % holders.len();
        holders.rotate_left(by);
    }
    holders
}
