//! The measurements themselves.

use std::error::Error;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use serde_json::{Value, json};

/// Tokens that llama.cpp takes in one physical batch; its own default.
const UBATCH: u32 = 512;
/// Steps before decode steps are counted.
const WARM_UP: usize = 4;

/// What to measure.
pub(crate) struct Plan {
    /// A GGUF file.
    pub(crate) file: PathBuf,
    pub(crate) threads: i32,
    /// Tokens of a prompt before it decodes.
    pub(crate) context: i32,
    /// Counted decode steps.
    pub(crate) decode: usize,
    /// Tokens of a prompt where prefill is measured.
    pub(crate) prefill: i32,
    /// Turns per figure; the best counts.
    pub(crate) turns: u64,
    /// Time after which prefill begins no further prompt.
    pub(crate) seconds: u64,
    /// Sequences that decode together.
    pub(crate) batches: Vec<i32>,
    /// Prompts that are read after one another.
    pub(crate) prompts: Vec<i32>,
}

type Failure = Box<dyn Error>;

/// Loads and measures.
pub(crate) fn run(plan: &Plan) -> Result<Value, String> {
    measure(plan).map_err(|error| error.to_string())
}

fn measure(plan: &Plan) -> Result<Value, Failure> {
    let mut backend = LlamaBackend::init()?;
    backend.void_logs();
    let since = Instant::now();
    let model = LlamaModel::load_from_file(&backend, &plan.file, &LlamaModelParams::default())?;
    let mut figures = json!({ "file": plan.file, "threads": plan.threads });
    let (mut decode, mut prefill) = (Vec::new(), Vec::new());
    for (at, prompts) in plan.prompts.iter().enumerate() {
        let mut peer = Peer::new(plan, &backend, &model, 1, plan.prefill)?;
        if at == 0 {
            // Ready is when a token can be computed: the first step also lays out what is mapped.
            peer.read(&peer.prompt(1, u64::MAX), 0)?;
            figures["load_seconds"] = json!(since.elapsed().as_secs_f64());
        }
        prefill.push(peer.prefill(plan, *prompts)?);
    }
    for batch in &plan.batches {
        let length = plan.context + i32::try_from(plan.decode + WARM_UP)? + 1;
        decode.push(Peer::new(plan, &backend, &model, *batch, length)?.decode(plan, *batch)?);
    }
    figures["decode"] = decode.into();
    figures["prefill"] = prefill.into();
    figures["peak_rss_bytes"] = json!(peak_rss());
    Ok(figures)
}

/// One context: room for some sequences.
struct Peer<'a> {
    context: LlamaContext<'a>,
    batch: LlamaBatch<'a>,
    vocab: u64,
}

impl<'a> Peer<'a> {
    /// Room for `sequences` of at most `length` tokens.
    fn new(
        plan: &Plan,
        backend: &LlamaBackend,
        model: &'a LlamaModel,
        sequences: i32,
        length: i32,
    ) -> Result<Self, Failure> {
        // llama.cpp gives each sequence its part of the context, in multiples of 256 tokens.
        let each = u32::try_from(length)?.next_multiple_of(256);
        let sequences = u32::try_from(sequences)?;
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(each * sequences))
            .with_n_batch(UBATCH.max(u32::try_from(plan.prefill)?))
            .with_n_ubatch(UBATCH)
            .with_n_seq_max(sequences)
            .with_n_threads(plan.threads)
            .with_n_threads_batch(plan.threads);
        let context = model.new_context(backend, params)?;
        let most = usize::try_from(context.n_batch())?;
        Ok(Self {
            context,
            batch: LlamaBatch::new(most, 1),
            vocab: u64::try_from(model.n_vocab())?,
        })
    }

    /// Random tokens, others for each number.
    fn prompt(&self, tokens: i32, number: u64) -> Vec<LlamaToken> {
        let mut draw = Draw(number);
        let one = |_| LlamaToken(i32::try_from(draw.next() % self.vocab).unwrap_or(0));
        (0..tokens).map(one).collect()
    }

    /// Reads a prompt as one sequence; gives the token that follows.
    fn read(&mut self, prompt: &[LlamaToken], sequence: i32) -> Result<LlamaToken, Failure> {
        self.batch.clear();
        let last = prompt.len() - 1;
        for (at, token) in prompt.iter().enumerate() {
            self.batch
                .add(*token, i32::try_from(at)?, &[sequence], at == last)?;
        }
        self.context.decode(&mut self.batch)?;
        Ok(greedy(self.context.get_logits_ith(i32::try_from(last)?)))
    }

    /// Prompts one after the other: llama.cpp's physical batch holds one of them.
    fn prefill(&mut self, plan: &Plan, prompts: i32) -> Result<Value, Failure> {
        let mut best = 0.0_f64;
        let mut read_most = 0;
        let limit = Duration::from_secs(plan.seconds);
        for turn in 0..plan.turns {
            let (since, mut read) = (Instant::now(), 0);
            while read < prompts && since.elapsed() < limit {
                self.context.clear_kv_cache();
                let number = (turn << 32) | u64::try_from(read)?;
                let prompt = self.prompt(plan.prefill, number);
                self.read(&prompt, 0)?;
                read += 1;
            }
            let tokens = f64::from(read) * f64::from(plan.prefill);
            best = best.max(tokens / since.elapsed().as_secs_f64());
            read_most = read_most.max(read);
        }
        Ok(json!({
            "prompts": prompts, "prompts_read": read_most, "tokens": plan.prefill,
            "tokens_per_second": best,
        }))
    }

    /// Sequences that decode as one batch.
    fn decode(&mut self, plan: &Plan, sequences: i32) -> Result<Value, Failure> {
        let mut best = 0.0_f64;
        for turn in 0..plan.turns {
            self.context.clear_kv_cache();
            let mut next = Vec::new();
            for sequence in 0..sequences {
                let number = (turn << 32) | (1 << 31) | u64::try_from(sequence)?;
                let prompt = self.prompt(plan.context, number);
                next.push(self.read(&prompt, sequence)?);
            }
            let mut position = plan.context;
            for _ in 0..WARM_UP {
                self.step(&mut next, position)?;
                position += 1;
            }
            let since = Instant::now();
            for _ in 0..plan.decode {
                self.step(&mut next, position)?;
                position += 1;
            }
            let tokens = plan.decode as f64 * f64::from(sequences);
            best = best.max(tokens / since.elapsed().as_secs_f64());
        }
        Ok(json!({ "batch": sequences, "context": plan.context, "tokens_per_second": best }))
    }

    /// One token of every sequence.
    fn step(&mut self, next: &mut [LlamaToken], position: i32) -> Result<(), Failure> {
        self.batch.clear();
        for (sequence, token) in (0..).zip(next.iter()) {
            self.batch.add(*token, position, &[sequence], true)?;
        }
        self.context.decode(&mut self.batch)?;
        for (at, token) in (0..).zip(next.iter_mut()) {
            *token = greedy(self.context.get_logits_ith(at));
        }
        Ok(())
    }
}

/// The most probable token.
fn greedy(logits: &[f32]) -> LlamaToken {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let at = logits.iter().position(|logit| *logit == most);
    LlamaToken(at.and_then(|at| i32::try_from(at).ok()).unwrap_or(0))
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// Most bytes of memory at once, mapped files included.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
