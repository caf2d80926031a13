//! What handlers share, and the steps that chat and completions share.

use std::sync::Arc;
use std::time::Duration;

use foregate_api::node::GatewayConfig;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::body::Bodies;
use super::defaults::Defaults;
use super::traffic::Wanted;
use crate::admission::Admission;
use crate::api_keys::ApiKeys;
use crate::clock::Clock;
use crate::error::ApiError;
use crate::forecast::Work;
use crate::generate::{Answer, Generation, Job, Runner};
use crate::metrics::{Known, Metrics, top_experts};
use crate::past::Past;
use crate::prompt::Prompter;
use crate::random::Random;
use crate::trace::Identity;
use crate::view::Views;

/// Bodies longer than this are digested off the runtime's threads.
const LONG_BODY: usize = 16 << 10;

/// Shared by all handlers.
#[derive(Debug)]
pub struct Gateway {
    /// Settings.
    pub config: GatewayConfig,
    /// Keys that clients show; without them everybody may call.
    pub api_keys: Option<ApiKeys>,
    /// Text and ids.
    pub prompter: Prompter,
    /// What a request does not say about sampling.
    pub defaults: Defaults,
    /// Room for what requests bring.
    pub bodies: Bodies,
    /// The cluster.
    pub views: Arc<Views>,
    /// What is kept of its past.
    pub past: Past,
    /// Cancelled when the gateway is told to end.
    pub leaving: CancellationToken,
    /// Who may work.
    pub admission: Admission,
    /// Runs requests.
    pub runner: Runner,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Wall time.
    pub clock: Clock,
    /// Ids and seeds.
    pub random: Random,
}

/// A request whose prompts are encoded.
#[derive(Debug)]
pub(super) struct Encoded {
    pub(super) prompts: Vec<Arc<[u32]>>,
    pub(super) generation: Generation,
    /// The field that prompts came from, for errors.
    pub(super) param: &'static str,
    /// Whether the prompt is part of the answer.
    pub(super) echo: bool,
    pub(super) began: Instant,
    /// What its body takes of the room for bodies.
    pub(super) room: Option<OwnedSemaphorePermit>,
}

impl Gateway {
    /// Does what a body asks of the processor. For a long one that is where it cannot hold up the tokens of
    /// others, when its turn has come.
    pub(super) async fn digest<T: Send + 'static>(
        self: &Arc<Self>,
        bytes: Vec<u8>,
        work: impl FnOnce(&Self, &[u8]) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if bytes.len() <= LONG_BODY {
            return work(self, &bytes);
        }
        let limit = self.config.request_timeout_ms;
        let turn = self
            .bodies
            .turn(bytes.len(), Duration::from_millis(limit))
            .await
            .ok_or_else(|| ApiError::deadline(limit))?;
        let gateway = Arc::clone(self);
        // It goes on when the client leaves, and so does its turn.
        let work = move || {
            let _turn = turn;
            work(&gateway, &bytes)
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|_| ApiError::internal("reading the request failed"))?
    }

    /// Writes what only the gateway as a whole knows into its metrics.
    pub(crate) fn show(&self) {
        let view = self.views.load();
        let upstream = &self.runner.upstream;
        let heated = top_experts(&view.state).into_iter();
        self.metrics.show(&Known {
            predictors: upstream.predictors(),
            heat: upstream.heat(0),
            heated: heated
                .map(|(_, layer, expert)| upstream.heated_by(layer, expert))
                .collect(),
            state: &view.state,
            now: self.clock.unix_seconds(),
            in_flight: self.admission.running(),
            waiting: self.admission.queued(),
            prefixes: upstream.known_prefixes(),
            window: upstream.window(),
            tenants: self.admission.tallies(),
        });
    }

    /// The name under which the model answers.
    pub(super) fn model_name(&self, asked: Option<&str>) -> Result<String, ApiError> {
        let served = &self.config.served_names;
        match asked {
            None => Ok(self.main_name().to_owned()),
            Some(name) if served.iter().any(|served| served == name) => Ok(name.to_owned()),
            Some(name) => Err(ApiError::no_such_model(name, served)),
        }
    }

    /// The first served name.
    #[must_use]
    pub fn main_name(&self) -> &str {
        self.config
            .served_names
            .first()
            .map_or("default", String::as_str)
    }

    /// Encodes a text. One that cannot fit is refused before the work is done.
    pub(super) fn encode(
        &self,
        param: &str,
        text: &str,
        special: bool,
    ) -> Result<Vec<u32>, ApiError> {
        let limit = self.config.max_model_len as usize;
        if let Some(longest) = self.prompter.longest_token()
            && text.len() > longest.saturating_mul(limit + 1)
        {
            return Err(ApiError::too_long(
                param,
                format!(
                    "this model's maximum context length is {limit} tokens; a text of {} bytes has more",
                    text.len()
                ),
            ));
        }
        self.prompter.encode(param, text, special)
    }

    /// Token ids must be the model's.
    pub(super) fn check_ids(&self, param: &str, ids: &[u32]) -> Result<(), ApiError> {
        let vocab = self.vocab();
        match ids.iter().find(|id| **id as usize >= vocab) {
            None => Ok(()),
            Some(id) => Err(ApiError::invalid(
                param,
                format!(
                    "token id {id} in `{param}` is outside the vocabulary of {vocab} tokens"
                ),
            )),
        }
    }

    fn vocab(&self) -> usize {
        match (self.views.load().model(), self.prompter.tokenizer()) {
            (Some(model), _) => model.vocab,
            (None, Some(tokenizer)) => tokenizer.get_vocab_size(true),
            (None, None) => usize::MAX,
        }
    }

    /// Longest sequence, by the settings and by the model.
    pub(super) fn max_model_len(&self) -> usize {
        let own = self.config.max_model_len as usize;
        let view = self.views.load();
        view.model()
            .map_or(own, |model| own.min(model.max_positions))
    }

    /// Waits for a permit, starts the sequences.
    pub(super) async fn start(
        &self,
        mut job: Job,
        wanted: &Wanted,
        identity: &Identity,
    ) -> Result<Answer, ApiError> {
        if let Some(reason) = self.views.load().not_ready() {
            return Err(ApiError::unavailable("not_ready", reason));
        }
        wanted.limit(&mut job);
        let tenant = wanted.tenant(self)?;
        let ask = wanted.ask(self, Arc::clone(&tenant), &job)?;
        self.note(&job, identity);
        let (began, deadline) = (job.began, job.deadline);
        let waits = self.foresee(&job);
        let permit = tokio::select! {
            biased;
            permit = self.admission.admit(&ask) => permit?,
            () = tokio::time::sleep_until(deadline) => {
                let whole = deadline.saturating_duration_since(began).as_millis();
                return Err(ApiError::deadline(u64::try_from(whole).unwrap_or(u64::MAX)));
            }
        };
        // Its sequences count themselves from here on.
        drop(waits);
        let identity = &identity.of_tenant(tenant);
        let waited = permit.waited;
        self.metrics.queued(waited);
        let answer = self.runner.start(job, permit, identity).await?;
        let overhead = began.elapsed().saturating_sub(waited);
        self.metrics
            .request_overhead
            .observe(overhead.as_secs_f64());
        Ok(answer)
    }

    /// Counts a request that will have to wait as work to come.
    fn foresee(&self, job: &Job) -> Vec<Work> {
        let admission = &self.admission;
        if admission.queued() == 0 && admission.running() < self.config.max_in_flight {
            return Vec::new();
        }
        let each = u32::try_from(job.choices() / job.prompts.len().max(1)).unwrap_or(1);
        let upstream = &self.runner.upstream;
        let of = |prompt: &Arc<[u32]>| upstream.foresee(prompt, job.max_tokens, each);
        job.prompts.iter().filter_map(of).collect()
    }

    fn note(&self, job: &Job, identity: &Identity) {
        let span = &identity.span;
        let input: usize = job.prompts.iter().map(|prompt| prompt.len()).sum();
        span.record("gen_ai.request.model", self.main_name());
        span.record("gen_ai.request.max_tokens", job.max_tokens);
        span.record(
            "gen_ai.request.temperature",
            f64::from(job.generation.temperature),
        );
        span.record("gen_ai.request.top_p", f64::from(job.generation.top_p));
        span.record("gen_ai.usage.input_tokens", input);
    }

    /// Checks lengths and ids.
    pub(super) fn job(&self, encoded: Encoded) -> Result<Job, ApiError> {
        let Encoded {
            prompts,
            generation,
            param,
            echo,
            began,
            room,
        } = encoded;
        for prompt in &prompts {
            if prompt.is_empty() {
                return Err(ApiError::invalid(
                    param,
                    format!("`{param}` must have at least one token"),
                ));
            }
            self.check_ids(param, prompt)?;
        }
        self.check_ids("stop_token_ids", &generation.stop_token_ids)?;
        let biased: Vec<u32> = generation.logit_bias.keys().copied().collect();
        self.check_ids("logit_bias", &biased)?;
        if self.prompter.tokenizer().is_none() && !generation.stop.is_empty() {
            return Err(ApiError::unsupported(
                "stop",
                "this model has no tokenizer, so stop strings cannot be found: use `stop_token_ids`",
            ));
        }
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        let max_tokens = self.max_tokens(&generation, longest, param)?;
        if generation.min_tokens > max_tokens {
            return Err(ApiError::invalid(
                "min_tokens",
                format!(
                    "`min_tokens` ({}) is more than the {max_tokens} tokens allowed",
                    generation.min_tokens
                ),
            ));
        }
        let of_echo = generation.logprobs.filter(|_| echo);
        Ok(Job {
            prompt_logprobs: generation.prompt_logprobs.max(of_echo),
            seed: generation.seed.unwrap_or_else(|| self.random.next()),
            deadline: began + Duration::from_millis(self.config.request_timeout_ms),
            prompts,
            max_tokens,
            generation,
            began,
            room,
        })
    }

    fn max_tokens(
        &self,
        generation: &Generation,
        prompt: usize,
        param: &'static str,
    ) -> Result<u32, ApiError> {
        let limit = self.max_model_len();
        let left = limit.saturating_sub(prompt);
        // A worker always makes a token, so one must have room even if none was asked for.
        let wanted = generation.max_tokens.map_or(1, |wanted| wanted.max(1)) as usize;
        if wanted > left {
            return Err(ApiError::too_long(
                if prompt >= limit { param } else { "max_tokens" },
                format!(
                    "this model's maximum context length is {limit} tokens; requested were {} ({prompt} in the prompt, {wanted} in the answer): shorten one of them",
                    prompt + wanted
                ),
            ));
        }
        let unsaid = || {
            let most = self.defaults.max_tokens.map_or(left, |most| most as usize);
            most.min(left)
        };
        let resolved = generation
            .max_tokens
            .map_or_else(unsaid, |wanted| wanted as usize);
        Ok(u32::try_from(resolved).unwrap_or(u32::MAX))
    }
}
