//! `foregate bench perplexity`: how well a model predicts a text, so what a format of its weights costs.
//!
//! Each file is a text of its own. Its tokens are cut into windows of `--context` tokens that overlap by one, so
//! that every token but a text's first is predicted exactly once, from what its window has before it. The
//! model is the one that serves, and the probabilities are those that requests for `logprobs` get.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use foregate_gateway::prompt::Prompter;
use foregate_kernels::{Cpu, KvCache, LogSoftmax, Ops};
use foregate_models::{LocalExperts, Model, StepBatch, StepOutput};
use serde::Serialize;

use super::engine;
use super::serve::write_json;
use crate::error::{CliError, print};
use crate::progress::{Progress, Task};
use crate::weights::WeightArgs;

/// Tokens of a window, if the model holds so many.
const CONTEXT: u32 = 1024;
/// Tokens of a step: their logits are in memory together.
const STEP: usize = 128;
const PAGE_TOKENS: usize = 16;

/// Arguments of `foregate bench perplexity`.
#[derive(Debug, clap::Args)]
pub(crate) struct PerplexityArgs {
    /// Model directory, with its tokenizer.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    weights: WeightArgs,
    /// UTF-8 texts to predict.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Tokens of a window; default: 1024, or as many as the model holds.
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    context: Option<u32>,
    /// Compute threads; default: all cores.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Give the figures as JSON: to this file, or to stdout in place of the text.
    #[arg(long, value_name = "FILE")]
    json: Option<Option<PathBuf>>,
}

/// How well texts were predicted.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Score {
    /// The file, or `all`.
    text: String,
    /// Tokens that were predicted: all but the first of each text.
    tokens: u64,
    /// Their bytes.
    bytes: u64,
    /// Mean negative logarithm of their probability.
    nats_per_token: f64,
    nats_per_byte: f64,
    /// `exp(nats_per_token)`.
    perplexity: f64,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Figures {
    model: String,
    path: String,
    context: u32,
    /// Formats of routed experts, attention and output projection in memory.
    experts: String,
    attention: String,
    output: String,
    /// Bytes of all weights in memory.
    weight_bytes: u64,
    texts: Vec<Score>,
    all: Score,
}

/// Sums over tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Sum {
    tokens: u64,
    bytes: u64,
    nats: f64,
}

impl Sum {
    fn score(self, text: String) -> Score {
        let (tokens, bytes) = (self.tokens.max(1) as f64, self.bytes.max(1) as f64);
        let nats_per_token = self.nats / tokens;
        Score {
            text,
            tokens: self.tokens,
            bytes: self.bytes,
            nats_per_token,
            nats_per_byte: self.nats / bytes,
            perplexity: nats_per_token.exp(),
        }
    }

    const fn and(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            bytes: self.bytes + other.bytes,
            nats: self.nats + other.nats,
        }
    }
}

/// Measures and prints.
///
/// # Errors
/// A model or a text that cannot be used.
pub(super) async fn run(args: PerplexityArgs, progress: &Progress) -> Result<(), CliError> {
    let task = progress.steps("windows", 1);
    let json = args.json.clone();
    let work = move || measure(&args, &task);
    let figures = tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| CliError::runtime("bench perplexity", &error))??;
    match json {
        Some(None) => {
            let text = serde_json::to_string_pretty(&figures)
                .map_err(|error| CliError::runtime("--json", &error))?;
            print(&text);
            Ok(())
        }
        to => {
            print(&figures.text());
            to.flatten()
                .map_or(Ok(()), |path| write_json(&path, &figures))
        }
    }
}

fn measure(args: &PerplexityArgs, task: &Task) -> Result<Figures, CliError> {
    let checkpoint = engine::open(&args.model, args.weights.settings())?;
    let spec = checkpoint.spec().clone();
    let longest = u32::try_from(spec.max_positions).unwrap_or(u32::MAX);
    let context = args.context.unwrap_or_else(|| CONTEXT.min(longest));
    if context > longest {
        return Err(CliError::Usage(format!(
            "--context {context}: this model holds {longest} tokens; give at most as many"
        )));
    }
    let prompter = Prompter::load(&args.model)
        .map_err(|error| CliError::runtime(&args.model.display().to_string(), &error))?;
    let texts: Vec<Text> = args
        .text
        .iter()
        .map(|path| Text::read(path, &prompter, spec.vocab))
        .collect::<Result<_, _>>()?;
    let failed = |error: &dyn std::error::Error| CliError::runtime("model", error);
    let threads = args.threads.map_or_else(
        || std::thread::available_parallelism().map_or(1, usize::from),
        |threads| threads as usize,
    );
    let cpu = Arc::new(Cpu::new(threads));
    let model =
        Model::load(&checkpoint, Arc::clone(&cpu), |_, _| {}).map_err(|e| failed(&e))?;
    let experts = LocalExperts::load(&checkpoint, Arc::clone(&cpu)).map_err(|e| failed(&e))?;
    drop(checkpoint);
    let mut reader = Reader::new(Arc::clone(&cpu), model, experts, context as usize)?;
    let windows = |text: &Text| text.tokens.len().saturating_sub(1).div_ceil(reader.span());
    task.set_total(texts.iter().map(windows).sum::<usize>() as u64);
    let mut scores = Vec::new();
    let mut all = Sum::default();
    for text in texts {
        let sum = reader.read(&text, task)?;
        all = all.and(sum);
        scores.push(sum.score(text.name));
    }
    task.finish("done");
    let expert_bytes = spec.moe_layers() * spec.experts * spec.expert_bytes();
    Ok(Figures {
        model: args.model.display().to_string(),
        path: cpu.path().to_string(),
        context,
        experts: spec.formats.expert.to_string(),
        attention: spec.formats.attention.to_string(),
        output: spec.formats.output.to_string(),
        weight_bytes: (expert_bytes + spec.dense_bytes()) as u64,
        texts: scores,
        all: all.score("all".to_owned()),
    })
}

/// A text as tokens, each with its bytes.
struct Text {
    name: String,
    tokens: Vec<u32>,
    bytes: Vec<u64>,
}

impl Text {
    fn read(path: &Path, prompter: &Prompter, vocab: usize) -> Result<Self, CliError> {
        let name = path.display().to_string();
        let wrong = |what: &str| CliError::Usage(format!("--text {name}: {what}"));
        let text = std::fs::read_to_string(path).map_err(|error| wrong(&error.to_string()))?;
        let tokens = prompter
            .encode("--text", &text, false)
            .map_err(|error| wrong(&error.message))?;
        let known = prompter.token_bytes();
        let of = |id: &u32| known.map_or(0, |known| known.of(*id).len() as u64);
        if tokens.len() < 2 {
            return Err(wrong("it has fewer than two tokens: nothing is predicted"));
        }
        if let Some(odd) = tokens.iter().find(|id| **id as usize >= vocab) {
            return Err(wrong(&format!(
                "token {odd} of the tokenizer is not in the model's vocabulary of {vocab}"
            )));
        }
        Ok(Self {
            bytes: tokens.iter().map(of).collect(),
            tokens,
            name,
        })
    }
}

/// The model over one window of tokens after another.
struct Reader {
    cpu: Arc<Cpu>,
    model: Model,
    experts: LocalExperts,
    kv: KvCache,
    pages: Vec<u32>,
    context: usize,
    out: StepOutput,
    log_probabilities: Vec<f32>,
}

impl Reader {
    fn new(
        cpu: Arc<Cpu>,
        model: Model,
        experts: LocalExperts,
        context: usize,
    ) -> Result<Self, CliError> {
        let pages = context.div_ceil(PAGE_TOKENS);
        let kv = KvCache::new(model.kv_shape(pages, PAGE_TOKENS))
            .map_err(|error| CliError::runtime("KV cache", &error))?;
        Ok(Self {
            cpu,
            model,
            experts,
            kv,
            pages: (0_u32..).take(pages).collect(),
            context,
            out: StepOutput::default(),
            log_probabilities: Vec::new(),
        })
    }

    /// Tokens that a window predicts.
    const fn span(&self) -> usize {
        self.context - 1
    }

    fn read(&mut self, text: &Text, task: &Task) -> Result<Sum, CliError> {
        let mut sum = Sum::default();
        let last = text.tokens.len() - 1;
        for start in (0..last).step_by(self.span()) {
            let end = (start + self.span()).min(last);
            for from in (start..end).step_by(STEP) {
                let to = (from + STEP).min(end);
                sum.nats += self.step(&text.tokens[from..=to], from - start)?;
                sum.tokens += (to - from) as u64;
                sum.bytes += text.bytes[from + 1..=to].iter().sum::<u64>();
            }
            task.add(1);
        }
        Ok(sum)
    }

    /// Nats of all tokens but the first, which stands at position `at` of the window.
    fn step(&mut self, tokens: &[u32], at: usize) -> Result<f64, CliError> {
        let failed = |error: &dyn std::error::Error| CliError::runtime("model", error);
        let (Some((_, wanted)), Some((_, given))) = (tokens.split_first(), tokens.split_last())
        else {
            return Ok(0.0);
        };
        let rows = u32::try_from(given.len()).unwrap_or(u32::MAX);
        let first = u32::try_from(at).unwrap_or(u32::MAX);
        let positions: Vec<u32> = (first..).take(given.len()).collect();
        let logit_rows: Vec<u32> = (0..rows).collect();
        let batch = StepBatch {
            tokens: given,
            positions: &positions,
            sequence_of_row: &vec![0; given.len()],
            page_tables: &[&self.pages],
            logit_rows: &logit_rows,
        };
        let (kv, out) = (&mut self.kv, &mut self.out);
        self.model
            .forward(&batch, kv, &mut self.experts, out)
            .map_err(|error| failed(&error))?;
        let width = self.model.spec().vocab;
        self.log_probabilities.resize(out.logits.len(), 0.0);
        self.cpu
            .log_softmax(LogSoftmax {
                logits: &out.logits,
                width,
                out: &mut self.log_probabilities,
            })
            .map_err(|error| failed(&error))?;
        let rows = self.log_probabilities.chunks_exact(width);
        Ok(rows
            .zip(wanted)
            .map(|(row, id)| -f64::from(row[*id as usize]))
            .sum())
    }
}

impl Figures {
    fn text(&self) -> String {
        let mut lines = vec![format!(
            "{} on {}, windows of {}: experts {}, attention {}, output {}; {:.1} MiB of weights",
            self.model,
            self.path,
            self.context,
            self.experts,
            self.attention,
            self.output,
            self.weight_bytes as f64 / f64::from(1 << 20),
        )];
        let one = (self.texts.len() > 1).then_some(&self.all);
        for score in self.texts.iter().chain(one) {
            lines.push(format!(
                "{}: {:.4} nats per token, {:.4} per byte, perplexity {:.3} ({} tokens)",
                score.text,
                score.nats_per_token,
                score.nats_per_byte,
                score.perplexity,
                score.tokens,
            ));
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests;
