//! What a worker computes on, opened once by the class that its configuration names. The rest of the worker asks it for an
//! executor, for ops over rows of this process, and for room; it does not ask which class it is.

mod plan;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use foregate_api::cpu::Arithmetic;
use foregate_api::node::{Device as Class, WorkerConfig};
use foregate_checkpoint::Checkpoint;
use foregate_kernels::{Comms, Cpu, Executor, KvCache, KvShape, OnHost, OpError, Ops};
use foregate_models::{Model, ModelError};

use crate::dense::DenseWeights;

use plan::CardPlan;

/// A card that is open.
#[derive(Clone)]
pub struct Card {
    /// As its driver calls it.
    pub name: String,
    /// What a model walks on.
    pub executor: Arc<dyn Executor>,
    /// Ops of it over rows of this process, for the engine's thread.
    pub ops: Arc<dyn Ops>,
    /// The same for the thread that computes for peers, with memory of its own.
    pub callee_ops: Arc<dyn Ops>,
}

impl fmt::Debug for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Card").field(&self.name).finish()
    }
}

/// Opens cards by their numbers, and what carries rows between them. A worker knows no driver: who composes it does.
#[derive(Clone)]
pub struct Cards {
    open: Arc<OpenCard>,
    comms: Arc<OpenComms>,
}

type OpenCard = dyn Fn(u32, &Cpu) -> Result<Card, String> + Send + Sync;
type OpenComms = dyn Fn(u32) -> Result<Arc<dyn Comms>, String> + Send + Sync;

impl Cards {
    /// Those that `open` gives, which gets a processor to sum results with that are here; its error says what helps.
    pub fn new(
        open: impl Fn(u32, &Cpu) -> Result<Card, String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            open: Arc::new(open),
            comms: Arc::new(|card| Err(format!("card {card} reaches no other"))),
        }
    }

    /// The same, with what carries rows between a card and others; its error says what is missing.
    #[must_use]
    pub fn with_comms(
        self,
        comms: impl Fn(u32) -> Result<Arc<dyn Comms>, String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            comms: Arc::new(comms),
            ..self
        }
    }

    /// The card of this number.
    ///
    /// # Errors
    /// Why there is none, with what helps.
    pub fn open(&self, card: u32, cpu: &Cpu) -> Result<Card, String> {
        (self.open)(card, cpu)
    }

    /// What carries rows between the card of this number and others.
    ///
    /// # Errors
    /// Why there is nothing.
    pub fn comms(&self, card: u32) -> Result<Arc<dyn Comms>, String> {
        (self.comms)(card)
    }

    /// For who has processors only.
    #[must_use]
    pub fn none() -> Self {
        Self::new(|card, _| {
            Err(format!(
                "there is no card {card} here; spec.workers.device: cpu"
            ))
        })
    }
}

impl fmt::Debug for Cards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cards")
    }
}

/// What a worker computes on.
#[derive(Debug, Clone)]
pub(crate) enum Device {
    /// The processor.
    Processor(Arc<Cpu>),
    /// A card; the processor converts weights and sums what came from peers.
    Card(Card, Arc<Cpu>),
}

impl Device {
    /// Opens it.
    ///
    /// # Errors
    /// Why there is none, with what helps.
    pub(crate) fn open(class: Class, cpu: Arc<Cpu>, cards: &Cards) -> Result<Self, String> {
        match class {
            Class::Cpu => Ok(Self::Processor(cpu)),
            Class::Cuda { card } => Ok(Self::Card(cards.open(card, &cpu)?, cpu)),
        }
    }

    /// What members tell each other of how it sums: the path of a processor's instructions, or [`Arithmetic::CARD`].
    pub(crate) fn path(&self) -> String {
        match self {
            Self::Processor(cpu) => cpu.path().to_string(),
            Self::Card(..) => Arithmetic::CARD.to_owned(),
        }
    }

    /// The processor.
    pub(crate) const fn cpu(&self) -> &Arc<Cpu> {
        match self {
            Self::Processor(cpu) | Self::Card(_, cpu) => cpu,
        }
    }

    /// What puts weights where they are computed with, packed on the calling thread.
    pub(crate) fn executor(&self) -> Arc<dyn Executor> {
        match self {
            Self::Processor(cpu) => Arc::new(OnHost::new(Arc::<Cpu>::clone(cpu))),
            Self::Card(card, _) => Arc::clone(&card.executor),
        }
    }

    /// Ops over rows of this process, for the engine's thread.
    pub(crate) fn ops(&self) -> Arc<dyn Ops> {
        match self {
            Self::Processor(cpu) => Arc::<Cpu>::clone(cpu),
            Self::Card(card, _) => Arc::clone(&card.ops),
        }
    }

    /// The same for the thread that computes for peers.
    pub(crate) fn callee_ops(&self) -> Arc<dyn Ops> {
        match self {
            Self::Processor(cpu) => Arc::<Cpu>::clone(cpu),
            Self::Card(card, _) => Arc::clone(&card.callee_ops),
        }
    }

    /// Whether it has room for all that a worker will put there, before any of it is: how much is told once.
    ///
    /// # Errors
    /// A sum that is more than what is free, with what would do.
    pub(crate) fn plan(
        &self,
        checkpoint: &Checkpoint,
        config: &WorkerConfig,
        kv: Option<KvShape>,
    ) -> Result<(), String> {
        let Self::Card(card, _) = self else {
            // A processor's memory is the machine's: who launched the workers has judged it.
            return Ok(());
        };
        let plan = CardPlan::of(checkpoint.spec(), config, kv);
        let free = card
            .executor
            .free_memory()
            .map_err(|error| error.to_string())?;
        let free = free.unwrap_or(u64::MAX);
        tracing::info!(
            card = card.name,
            dense = plan.dense,
            experts = plan.experts,
            moving = plan.moving,
            kv = plan.kv,
            activations = plan.activations,
            reserve = plan::RESERVE,
            free,
            "card_memory_planned"
        );
        plan.fits(free)
    }

    /// The dense weights, shared with other workers of this process where they compute on its processor.
    ///
    /// # Errors
    /// When a tensor cannot be read, packed, or put on a card.
    pub(crate) fn model(
        &self,
        dense: &DenseWeights,
        dir: &Path,
        checkpoint: &Checkpoint,
        progress: impl FnMut(u64, u64),
    ) -> Result<Model, ModelError> {
        match self {
            Self::Processor(cpu) => dense.model(dir, checkpoint, Arc::clone(cpu), progress),
            Self::Card(_, cpu) => {
                Model::load_on(checkpoint, self.executor(), cpu.threads(), progress)
            }
        }
    }

    /// Room for keys and values.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn kv_cache(&self, shape: KvShape) -> Result<KvCache, OpError> {
        self.executor().kv_cache(shape)
    }
}
