//! A loaded model, and engines over it that run one load to its end.

use std::collections::BTreeSet;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::cpu::{CpuPath, Pinning, Seat};
use foregate_api::ids::Rank;
use foregate_api::model::ModelSpec;
use foregate_api::node::{FabricKind, WorkerConfig};
use foregate_api::weights::WeightSettings;
use foregate_checkpoint::Checkpoint;
use foregate_kernels::{Cpu, KvCache, KvShape};
use foregate_models::{LocalExperts, Model};
use foregate_wire::generation::generate_event::Event;
use foregate_worker::engine::{self, EngineHandle, EngineParts, StepExperts};
use foregate_worker::load::LoadCounters;
use foregate_worker::sampler::Sampling;
use foregate_worker::sequence::Request;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::before::Before;
use super::hold::Hold;
use super::steps::{Ledger, Step};
use crate::bench::workload::Draw;
use crate::error::CliError;

const PAGE_TOKENS: usize = 16;

/// Sequences that begin together.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Load {
    /// How many.
    pub(super) sequences: u32,
    /// Tokens of each prompt.
    pub(super) prompt: u32,
    /// Tokens of each answer.
    pub(super) answer: u32,
    /// Most tokens in a step.
    pub(super) step_tokens: u32,
}

impl Load {
    /// Sequences that decode `tokens` each as one batch, in steps of at most `step_tokens`, or more if the
    /// batch would leave no room for prompts. The first sequence decodes until the last prompt is read, so
    /// answers are longer than `tokens` by the steps that this may take.
    pub(super) fn decode(sequences: u32, prompt: u32, tokens: u32, step_tokens: u32) -> Self {
        let step_tokens = step_tokens.max(sequences * 2);
        let reading = (sequences * prompt).div_ceil(step_tokens - sequences);
        Self {
            sequences,
            prompt,
            answer: tokens + reading - 1,
            step_tokens,
        }
    }

    /// Steps that decoded all sequences at once: after the prompts, and before the first sequence's end.
    pub(super) fn decode_steps(&self, ledger: &Ledger) -> Vec<Step> {
        ledger.decode(self.sequences as usize, self.answer as usize - 1)
    }

    /// Tokens of a sequence at its end.
    pub(super) const fn length(&self) -> usize {
        self.prompt as usize + self.answer as usize
    }

    /// Pages with room for all sequences.
    const fn pages(&self) -> usize {
        (self.length().div_ceil(PAGE_TOKENS) + 1) * self.sequences as usize
    }

    fn config(&self) -> WorkerConfig {
        WorkerConfig {
            rank: Rank(0),
            model_dir: String::new(),
            weights: WeightSettings::default(),
            served_name: String::new(),
            rpc_listen: String::new(),
            exchange_listen: String::new(),
            fabric: FabricKind::Local,
            duty: foregate_api::member::Duty::Attention,
            slots: 0,
            device: foregate_api::node::Device::Cpu,
            threads: 1,
            cpu_path: CpuPath::Auto,
            pinning: Pinning::None,
            seat: Seat::ALONE,
            max_num_seqs: self.sequences,
            max_num_batched_tokens: self.step_tokens,
            max_waiting: self.sequences,
            overtake_ms: 0,
            max_model_len: u32::try_from(self.length()).unwrap_or(u32::MAX),
            page_tokens: PAGE_TOKENS as u32,
            kv_bytes: 0,
            exchange_deadline_ms: 1000,
            domain: String::new(),
            window_ms: 1000,
        }
    }

    /// All requests of a turn; each turn has prompts of its own, so that none is in the prefix cache.
    pub(super) fn requests(&self, turn: u32, vocab: usize) -> Vec<Request> {
        (0..self.sequences)
            .map(|number| self.request(turn, number, vocab))
            .collect()
    }

    /// Random tokens, others for each number and turn, the same in each run.
    pub(super) fn request(&self, turn: u32, number: u32, vocab: usize) -> Request {
        let seed = u64::from(turn) * u64::from(self.sequences) + u64::from(number);
        let mut draw = Draw::new(seed);
        let mut token = || u32::try_from(draw.below(vocab)).unwrap_or(0);
        let tokens: Vec<u32> = (0..self.prompt).map(|_| token()).collect();
        Request {
            id: format!("bench-{number}"),
            prompt_len: tokens.len(),
            tokens,
            max_tokens: self.answer as usize,
            min_tokens: 0,
            stop_tokens: BTreeSet::new(),
            sampling: Sampling::greedy(),
            logprobs: None,
            prompt_logprobs: None,
            routed_experts: false,
            hint: None,
        }
    }
}

/// A model and all its experts in this process.
#[derive(Debug)]
pub(super) struct Rig {
    pub(super) cpu: Arc<Cpu>,
    pub(super) model: Model,
    pub(super) experts: LocalExperts,
    /// From the opened files until the model could step.
    pub(super) load_time: Duration,
    /// Bytes of all weights in memory, in the formats they are kept in.
    pub(super) weight_bytes: u64,
}

impl Rig {
    /// Loads all of a model.
    pub(super) fn load(checkpoint: &Checkpoint, cpu: Cpu) -> Result<Self, CliError> {
        let since = Instant::now();
        let failed = |error: &dyn Error| CliError::runtime("model", error);
        let cpu = Arc::new(cpu);
        let model = Model::load(checkpoint, Arc::clone(&cpu), |_, _| {})
            .map_err(|error| failed(&error))?;
        let experts =
            LocalExperts::load(checkpoint, Arc::clone(&cpu)).map_err(|error| failed(&error))?;
        let load_time = since.elapsed();
        let spec = checkpoint.spec();
        let expert_bytes = spec.moe_layers() * spec.experts * spec.expert_bytes();
        let weight_bytes = (expert_bytes + spec.dense_bytes()) as u64;
        Ok(Self {
            cpu,
            model,
            experts,
            load_time,
            weight_bytes,
        })
    }

    pub(super) fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    /// Bytes of keys and values that a load has room for.
    pub(super) fn kv_bytes(&self, load: &Load) -> u64 {
        let shape = kv_shape(&self.model, load);
        shape.page_bytes().unwrap_or(0) as u64 * shape.pages as u64
    }
}

fn kv_shape(model: &Model, load: &Load) -> KvShape {
    model.kv_shape(load.pages(), PAGE_TOKENS)
}

/// A fresh engine with room for a load's sequences.
pub(super) fn start_engine(
    load: &Load,
    telemetry: bool,
    model: &Model,
    experts: impl StepExperts + 'static,
) -> Result<Running, CliError> {
    let hold = Hold::default();
    let held = hold.clone();
    let experts = Before {
        inner: experts,
        wait: move || held.wait(),
    };
    let kv = KvCache::new(kv_shape(model, load))
        .map_err(|error| CliError::runtime("KV cache", &error))?;
    let spec = model.spec();
    // Counters without layers count nothing: that is the engine without telemetry.
    let counters = match telemetry {
        true => LoadCounters::new(spec.moe_layers(), spec.experts),
        false => LoadCounters::new(0, 0),
    };
    let engine = engine::start(EngineParts {
        model: model.clone(),
        kv,
        experts: Box::new(experts),
        config: load.config(),
        load: Arc::new(counters),
    })
    .map_err(|error| CliError::runtime("engine", &error))?;
    Ok(Running { engine, hold })
}

/// An engine that can be held back.
pub(super) struct Running {
    pub(super) engine: EngineHandle,
    hold: Hold,
}

impl Running {
    /// Ends it.
    pub(super) async fn stop(self) {
        self.engine.stop().await;
    }

    /// Rows that came late since it started.
    pub(super) fn late_rows(&self) -> u64 {
        self.engine.load().late_rows
    }
}

/// Runs requests to their end, all of them from the same step on. Gives the time until every sequence had
/// its first token.
pub(super) async fn drive(
    running: &Running,
    requests: Vec<Request>,
) -> Result<Duration, CliError> {
    let since = Instant::now();
    running.hold.set(true);
    let streams: Result<Vec<_>, _> = requests
        .into_iter()
        .map(|request| running.engine.submit(request, None, tracing::Span::none()))
        .collect();
    running.hold.set(false);
    let mut work = JoinSet::new();
    for mut stream in streams.map_err(|error| CliError::runtime("engine", &error))? {
        work.spawn(async move {
            let mut first = None;
            while let Some(event) = stream.next().await {
                let event = event.map_err(|error| error.to_string())?;
                if let (Event::Token(_), None) = (event, first) {
                    first = Some(since.elapsed());
                }
            }
            first.ok_or("a sequence gave no token".to_owned())
        });
    }
    let mut prefilled = Duration::ZERO;
    while let Some(done) = work.join_next().await {
        let first = done
            .map_err(|error| CliError::runtime("engine", &error))?
            .map_err(CliError::Runtime)?;
        prefilled = prefilled.max(first);
    }
    Ok(prefilled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_prompts_begin_alike() {
        let load = Load::decode(64, 16, 3, 512);
        let tokens = |turn, number| load.request(turn, number, 4096).tokens;
        let prompts: BTreeSet<Vec<u32>> = (0..3)
            .flat_map(|turn| (0..64).map(move |number| tokens(turn, number)[..4].to_vec()))
            .collect();
        assert_eq!(prompts.len(), 3 * 64);
    }

    #[test]
    fn answers_last_until_all_prompts_are_read() {
        let of = |sequences, prompt, step_tokens| {
            let load = Load::decode(sequences, prompt, 10, step_tokens);
            (load.step_tokens, load.answer)
        };
        assert_eq!(of(1, 64, 512), (512, 10));
        // Two chunks of 511 tokens and one of 2.
        assert_eq!(of(1, 1024, 512), (512, 12));
        // 480 rows of a step are free for 2048 tokens of prompts.
        assert_eq!(of(32, 64, 512), (512, 14));
        // 600 sequences in a step of 512 tokens would leave no room.
        assert_eq!(of(600, 2, 512), (1200, 11));
    }
}
