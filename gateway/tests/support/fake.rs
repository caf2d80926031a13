//! Fake workers that speak the real gRPC protocol, each on a runtime of its own.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use foregate_wire::generation::generate_event::Event;
use foregate_wire::generation::generation_server::{Generation, GenerationServer};
use foregate_wire::generation::{
    FinishReason, Finished, GenerateEvent, GenerateRequest, Prefilled, PrefixEvent,
    PrefixesRequest, RoutedExperts, Token, TokenInfo, TokenLogprob,
};
use foregate_wire::tonic::{Request, Response, Status};
use futures::Stream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{EXPERTS, LAYERS, TOP_K};

/// What a fake worker does and saw.
#[derive(Debug, Default)]
pub struct Behaviour {
    /// The tokens of every answer, from index 0.
    pub answer: Mutex<Vec<u32>>,
    /// Tokens after which a stream breaks; 0: never. Counted over one stream.
    pub break_after: AtomicU32,
    /// Break by ending the stream instead of an error.
    pub end_quietly: AtomicBool,
    /// Tell at the end which experts prompt and answer used, not only the prompt's.
    pub tells_whole: AtomicBool,
    /// Answer RESOURCE_EXHAUSTED.
    pub busy: AtomicBool,
    /// Answer INVALID_ARGUMENT.
    pub refuse: AtomicBool,
    /// Tokens after which a stream waits, as long as this stays so; 0: never. Counted over one stream.
    pub hold_after: watch::Sender<u32>,
    /// Requests, in order.
    pub seen: Mutex<Vec<GenerateRequest>>,
    /// Metadata of requests, in order.
    pub metadata: Mutex<Vec<BTreeMap<String, String>>>,
    /// Streams that are open.
    pub open: AtomicU32,
    /// What the KV cache holds, if the worker tells.
    pub holds: Mutex<Option<Vec<u64>>>,
    /// Changes of that, to all that follow; `None` ends their streams.
    pub changes: Changes,
    /// Streams of prefixes that were opened.
    pub followed: AtomicU32,
}

/// Of prefixes.
#[derive(Debug)]
pub struct Changes(pub tokio::sync::broadcast::Sender<Option<PrefixEvent>>);

impl Default for Changes {
    fn default() -> Self {
        Self(tokio::sync::broadcast::Sender::new(64))
    }
}

impl Behaviour {
    /// Changes what the KV cache holds and tells it.
    pub fn hold(&self, added: &[u64], removed: &[u64]) {
        let mut holds = self.holds.lock().unwrap();
        let held = holds.get_or_insert_default();
        held.extend(added);
        held.retain(|name| !removed.contains(name));
        let event = PrefixEvent {
            reset: false,
            added: added.to_vec(),
            removed: removed.to_vec(),
        };
        self.changes.0.send(Some(event)).ok();
    }
}

/// The last byte of the next worker's address. Each has its own, so that nobody listens where one was killed.
static NEXT: AtomicU8 = AtomicU8::new(1);

/// A fake worker on a runtime of its own, so that dropping it cuts its sockets as a kill would.
pub struct Worker {
    pub behaviour: Arc<Behaviour>,
    pub address: String,
    kill: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Worker {
    pub fn start() -> Self {
        let behaviour = Arc::new(Behaviour::default());
        let kill = CancellationToken::new();
        let (send, receive) = std::sync::mpsc::channel();
        let service = GenerationServer::new(Fake(Arc::clone(&behaviour)));
        let killed = kill.clone();
        let host = Ipv4Addr::new(127, 0, 1, NEXT.fetch_add(1, Ordering::SeqCst));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind((host, 0)).await.unwrap();
                send.send(listener.local_addr().unwrap().to_string())
                    .unwrap();
                let router = foregate_wire::serve::server().add_service(service);
                let serving = foregate_wire::serve::serve(
                    router,
                    listener,
                    None,
                    CancellationToken::new(),
                );
                tokio::select! {
                    _ = serving => {}
                    () = killed.cancelled() => {}
                }
            });
            runtime.shutdown_background();
        });
        Self {
            behaviour,
            address: receive.recv().unwrap(),
            kill,
            thread: Some(thread),
        }
    }

    /// Cuts every connection at once.
    pub fn kill(&mut self) {
        self.kill.cancel();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    pub fn requests(&self) -> Vec<GenerateRequest> {
        self.behaviour.seen.lock().unwrap().clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Fake(Arc<Behaviour>);

/// Counts open streams.
struct OpenStream(Arc<Behaviour>);

impl OpenStream {
    fn new(behaviour: &Arc<Behaviour>) -> Self {
        behaviour.open.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(behaviour))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Experts of a position: a function of position and token, so that a resumed report can be compared.
pub fn experts_of(position: usize, token: u32) -> Vec<u32> {
    (0..LAYERS as u32)
        .flat_map(|layer| {
            let first = (token + layer) % 4;
            [first, 4 + (position as u32 + layer) % 4]
        })
        .collect()
}

fn routed(ids: &[u32], from: usize) -> RoutedExperts {
    RoutedExperts {
        tokens: ids.len() as u32,
        layers: LAYERS as u32,
        top_k: TOP_K as u32,
        experts: ids
            .iter()
            .enumerate()
            .flat_map(|(at, id)| experts_of(from + at, *id))
            .collect(),
    }
}

/// The logprob that the fake gives a token.
pub fn logprob_of(id: u32) -> f32 {
    -0.25 - (id % 16) as f32 / 8.0
}

fn info(id: u32, top: u32) -> TokenInfo {
    TokenInfo {
        chosen: Some(TokenLogprob {
            id,
            logprob: logprob_of(id),
            rank: 1,
        }),
        top: (0..top)
            .map(|rank| TokenLogprob {
                id: id + rank,
                logprob: logprob_of(id) - rank as f32,
                rank: rank + 1,
            })
            .collect(),
    }
}

/// The histogram that the fake reports: every token goes to the expert `id / 100 % EXPERTS` of each layer.
fn signature(ids: &[u32]) -> Vec<u32> {
    let mut counts = vec![0; LAYERS * EXPERTS];
    for id in ids {
        for layer in 0..LAYERS {
            counts[layer * EXPERTS + (*id as usize / 100) % EXPERTS] += 1;
        }
    }
    counts
}

fn event(event: Event) -> GenerateEvent {
    GenerateEvent { event: Some(event) }
}

#[foregate_wire::tonic::async_trait]
impl Generation for Fake {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateEvent, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let behaviour = Arc::clone(&self.0);
        let metadata = request
            .metadata()
            .iter()
            .filter_map(|pair| match pair {
                foregate_wire::tonic::metadata::KeyAndValueRef::Ascii(key, value) => {
                    Some((key.to_string(), value.to_str().ok()?.to_owned()))
                }
                foregate_wire::tonic::metadata::KeyAndValueRef::Binary(..) => None,
            })
            .collect();
        behaviour.metadata.lock().unwrap().push(metadata);
        let request = request.into_inner();
        behaviour.seen.lock().unwrap().push(request.clone());
        if behaviour.busy.load(Ordering::SeqCst) {
            return Err(Status::resource_exhausted("full"));
        }
        if behaviour.refuse.load(Ordering::SeqCst) {
            return Err(Status::invalid_argument("too odd for me"));
        }
        let open = OpenStream::new(&behaviour);
        let (send, receive) = tokio::sync::mpsc::channel(4);
        // The task ends with its stream, which ends with the runtime.
        #[expect(clippy::disallowed_methods, reason = "dies with the worker's runtime")]
        tokio::spawn(async move {
            let _open = open;
            let _gone = answer(&behaviour, request, &send).await;
        });
        Ok(Response::new(Box::pin(
            tokio_stream::wrappers::ReceiverStream::new(receive),
        )))
    }

    type PrefixesStream = Pin<Box<dyn Stream<Item = Result<PrefixEvent, Status>> + Send>>;

    async fn prefixes(
        &self,
        _request: Request<PrefixesRequest>,
    ) -> Result<Response<Self::PrefixesStream>, Status> {
        let holds = self.0.holds.lock().unwrap();
        let Some(held) = holds.clone() else {
            return Err(Status::unimplemented("of an older version"));
        };
        self.0.followed.fetch_add(1, Ordering::SeqCst);
        let first = PrefixEvent {
            reset: true,
            added: held,
            removed: Vec::new(),
        };
        let changes = self.0.changes.0.subscribe();
        let later = futures::stream::unfold(changes, async |mut changes| {
            let event = changes.recv().await.ok()??;
            Some((Ok(event), changes))
        });
        let all = futures::StreamExt::chain(futures::stream::iter([Ok(first)]), later);
        Ok(Response::new(Box::pin(all)))
    }
}

type Sender = tokio::sync::mpsc::Sender<Result<GenerateEvent, Status>>;

async fn answer(
    behaviour: &Behaviour,
    request: GenerateRequest,
    send: &Sender,
) -> Result<(), tokio::sync::mpsc::error::SendError<Result<GenerateEvent, Status>>> {
    let script = behaviour.answer.lock().unwrap().clone();
    let prompt = request.prompt_len as usize;
    let have = request.token_ids.len() - prompt;
    let mut prefilled = Prefilled {
        cached_tokens: 0,
        prompt_logprobs: Vec::new(),
        routed: None,
        signature: signature(&request.token_ids),
    };
    if let Some(top) = request.prompt_logprobs {
        let later = &request.token_ids[1..];
        prefilled.prompt_logprobs = later.iter().map(|id| info(*id, top)).collect();
    }
    if request.return_routed_experts {
        prefilled.routed = Some(routed(&request.token_ids, 0));
    }
    send.send(Ok(event(Event::Prefilled(prefilled)))).await?;
    let mut last = None;
    let mut whole = request.token_ids.clone();
    let tells_whole = behaviour.tells_whole.load(Ordering::SeqCst);
    let told = |ids: &[u32]| {
        if tells_whole {
            signature(ids)
        } else {
            Vec::new()
        }
    };
    let break_after = behaviour.break_after.load(Ordering::SeqCst);
    let mut hold_after = behaviour.hold_after.subscribe();
    for index in have..=request.max_tokens as usize {
        let sent = (index - have) as u32;
        tokio::select! {
            () = send.closed() => return Ok(()),
            _ = hold_after.wait_for(|tokens| *tokens == 0 || sent < *tokens) => {}
        }
        if break_after > 0 && sent >= break_after {
            if !behaviour.end_quietly.load(Ordering::SeqCst) {
                send.send(Err(Status::unavailable("going away"))).await?;
            }
            return Ok(());
        }
        if index == request.max_tokens as usize {
            break;
        }
        let Some(id) = script
            .get(index)
            .copied()
            .or(request.ignore_eos.then_some(5))
        else {
            return finish(
                send,
                FinishReason::Stop,
                prompt,
                index,
                Some(0),
                told(&whole),
            )
            .await;
        };
        if request.stop_token_ids.contains(&id) {
            return finish(
                send,
                FinishReason::Stop,
                prompt,
                index,
                Some(id),
                told(&whole),
            )
            .await;
        }
        let seed = request
            .sampling
            .as_ref()
            .map_or(0, |sampling| sampling.seed);
        let hot = request
            .sampling
            .as_ref()
            .is_some_and(|sampling| sampling.temperature > 0.0);
        // A "sampler": with a temperature, the seed shifts the token.
        let id = if hot {
            300 + (u64::from(id).wrapping_add(seed) % 64) as u32
        } else {
            id
        };
        let token = Token {
            index: index as u32,
            id,
            info: request.logprobs.map(|top| info(id, top)),
            routed: last
                .filter(|_| request.return_routed_experts)
                .map(|last| routed(&[last], prompt + index - 1)),
        };
        last = Some(id);
        whole.push(id);
        send.send(Ok(event(Event::Token(token)))).await?;
    }
    finish(
        send,
        FinishReason::Length,
        prompt,
        request.max_tokens as usize,
        None,
        told(&whole),
    )
    .await
}

async fn finish(
    send: &Sender,
    reason: FinishReason,
    prompt: usize,
    generated: usize,
    stop_token: Option<u32>,
    signature: Vec<u32>,
) -> Result<(), tokio::sync::mpsc::error::SendError<Result<GenerateEvent, Status>>> {
    send.send(Ok(event(Event::Finished(Finished {
        reason: reason.into(),
        stop_token,
        prompt_tokens: prompt as u32,
        generated_tokens: generated as u32,
        signature,
        preemptions: 0,
        steps: None,
    }))))
    .await
}
