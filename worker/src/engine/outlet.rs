//! One sequence's way out: its events, its deadline and its spans.

use std::time::Instant;

use foregate_wire::frame::TraceContext;
use foregate_wire::generation::generate_event::Event;
use foregate_wire::generation::{
    FinishReason, Finished, Prefilled, RoutedExperts, Steps, Token, TokenInfo, TokenLogprob,
};
use opentelemetry::trace::TraceContextExt;
use tokio::sync::mpsc;
use tracing::{Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::handle::{Item, StreamError, Submission};
use crate::sampler::logprobs::{Ranked, Report};
use crate::sequence::{Finish, Request, Sequence};

/// What a sequence is doing, as its trace shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Queue,
    Prefill,
    Decode,
}

/// Shape of one position's routes.
#[derive(Debug, Clone, Copy)]
pub(super) struct RouteShape {
    pub(super) layers: usize,
    pub(super) top_k: usize,
}

#[derive(Debug)]
pub(super) struct Outlet {
    events: mpsc::Sender<Item>,
    deadline: Option<Instant>,
    request: Span,
    /// Span of the current stage; it ends when it is replaced.
    stage: Span,
    /// Context of `stage`, if its trace is recorded.
    context: Option<TraceContext>,
}

impl Outlet {
    pub(super) fn open(submission: Submission) -> (Request, Self) {
        let mut outlet = Self {
            events: submission.events,
            deadline: submission.deadline,
            request: submission.span,
            stage: Span::none(),
            context: None,
        };
        outlet.enter(Stage::Queue);
        (submission.request, outlet)
    }

    /// Ends the span of the last stage and starts the next.
    pub(super) fn enter(&mut self, stage: Stage) {
        let parent = &self.request;
        self.stage = match stage {
            Stage::Queue => info_span!(parent: parent, "queue"),
            Stage::Prefill => info_span!(parent: parent, "prefill"),
            Stage::Decode => info_span!(parent: parent, "decode"),
        };
        self.context = trace_context(&self.stage);
    }

    /// Context of the current stage, if its trace is recorded.
    pub(super) fn context(&self) -> Option<TraceContext> {
        self.context
    }

    /// Whether the sequence must end now.
    pub(super) fn overdue(&self, now: Instant) -> Option<Finish> {
        if self.events.is_closed() {
            return Some(Finish::Cancelled);
        }
        let late = self.deadline.is_some_and(|deadline| deadline <= now);
        late.then_some(Finish::Deadline)
    }

    /// The channel has room for all events of its sequence; a closed one is noticed before the next step.
    fn send(&mut self, item: Item) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.events.try_send(item) {
            tracing::error!("an event stream had no room for its events");
        }
    }

    pub(super) fn fail(&mut self, why: StreamError) {
        self.send(Err(why));
    }

    pub(super) fn prefilled(&mut self, sequence: &mut Sequence, shape: RouteShape) {
        let reports = std::mem::take(&mut sequence.trace.prompt_logprobs);
        let routes = std::mem::take(&mut sequence.trace.prompt_routes);
        let event = Prefilled {
            cached_tokens: sequence.cached.unwrap_or(0) as u32,
            prompt_logprobs: reports.iter().map(info).collect(),
            routed: sequence
                .request
                .routed_experts
                .then(|| routed(shape, routes)),
            signature: sequence.trace.signature.clone(),
        };
        self.send(Ok(Event::Prefilled(event)));
        self.enter(Stage::Decode);
    }

    /// The newest token of a sequence. `report`: its log-probabilities; `routes`: the experts of the
    /// position before it.
    pub(super) fn token(
        &mut self,
        sequence: &Sequence,
        report: Option<&Report>,
        routes: Option<RoutedExperts>,
    ) {
        let event = Token {
            index: sequence.generated().saturating_sub(1) as u32,
            id: sequence.tokens.last().copied().unwrap_or(0),
            info: report.map(info),
            routed: routes,
        };
        self.send(Ok(Event::Token(event)));
    }

    /// `steps`: what decode steps have taken so far.
    pub(super) fn finished(&mut self, sequence: &Sequence, why: Finish, steps: Option<Steps>) {
        let (reason, stop_token) = match why {
            Finish::Stop(token) => (FinishReason::Stop, Some(token)),
            Finish::Length => (FinishReason::Length, None),
            Finish::Cancelled => (FinishReason::Cancelled, None),
            Finish::Deadline => (FinishReason::Deadline, None),
        };
        let event = Finished {
            reason: reason.into(),
            stop_token,
            prompt_tokens: sequence.request.prompt_len as u32,
            generated_tokens: sequence.generated() as u32,
            signature: sequence.trace.signature.clone(),
            preemptions: sequence.preemptions,
            steps,
        };
        self.send(Ok(Event::Finished(event)));
    }
}

/// Routes of whole positions in wire form.
pub(super) fn routed(shape: RouteShape, experts: Vec<u32>) -> RoutedExperts {
    let width = (shape.layers * shape.top_k).max(1);
    RoutedExperts {
        tokens: (experts.len() / width) as u32,
        layers: shape.layers as u32,
        top_k: shape.top_k as u32,
        experts,
    }
}

fn info(report: &Report) -> TokenInfo {
    TokenInfo {
        chosen: Some(ranked(&report.chosen)),
        top: report.top.iter().map(ranked).collect(),
    }
}

fn ranked(token: &Ranked) -> TokenLogprob {
    TokenLogprob {
        id: token.id,
        logprob: token.logprob,
        rank: token.rank,
    }
}

fn trace_context(span: &Span) -> Option<TraceContext> {
    let context = span.context();
    let span = context.span();
    let at = span.span_context();
    (at.is_valid() && at.is_sampled()).then(|| TraceContext {
        trace_id: at.trace_id().to_bytes(),
        span_id: at.span_id().to_bytes(),
        flags: at.trace_flags().to_u8(),
    })
}
