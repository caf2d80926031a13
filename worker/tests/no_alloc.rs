//! Steps in steady decode ask the system for no memory: an allocator that counts says so.
//!
//! Counted is what the engine's thread does from the begin of one step to the begin of the next, the forward
//! pass, sampling and events included. Not counted is memory that ops ask for themselves: the ops here stop the
//! count while they run.
#![expect(
    unsafe_code,
    reason = "an allocator can be written no other way; it is part of this test alone"
)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what it expects by failing"
)]

mod rig;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::{Arc, Mutex};

use foregate_api::ids::Epoch;
use foregate_api::model::Family;
use foregate_kernels::{
    Add, Attention, Combine, Embed, ExpertFfn, Gate, KvWrite, LogSoftmax, MatMul, OpError, Ops,
    RmsNorm, Rope, SigmoidScale, SiluMul,
};
use foregate_models::experts::{ExpertBatch, Experts, ExpertsError, LateRows};
use foregate_wire::frame::TraceContext;
use foregate_worker::engine::{Alone, StepExperts};

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static PAUSED: Cell<bool> = const { Cell::new(false) };
}

/// The system's allocator, with a count of each thread's requests.
struct Counting;

fn note() {
    // A thread that ends has no counter any more.
    let paused = PAUSED.try_with(Cell::get).unwrap_or(true);
    if !paused {
        COUNT.try_with(|count| count.set(count.get() + 1)).ok();
    }
}

// SAFETY: every method hands its arguments on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Ops whose own requests are not counted.
struct Uncounted(Arc<dyn Ops>);

impl Uncounted {
    fn run(&self, op: impl FnOnce(&dyn Ops) -> Result<(), OpError>) -> Result<(), OpError> {
        PAUSED.set(true);
        let done = op(self.0.as_ref());
        PAUSED.set(false);
        done
    }
}

macro_rules! uncounted {
    ($($name:ident($op:ident)),* $(,)?) => {
        impl Ops for Uncounted {
            $(fn $name(&self, op: $op<'_>) -> Result<(), OpError> {
                self.run(|ops| ops.$name(op))
            })*
        }
    };
}

uncounted! {
    matmul(MatMul), embed(Embed), rms_norm(RmsNorm), rope(Rope), kv_write(KvWrite), attention(Attention),
    gate(Gate), expert_ffn(ExpertFfn), combine(Combine), add(Add), silu_mul(SiluMul),
    sigmoid_scale(SigmoidScale), log_softmax(LogSoftmax),
}

/// Rows and requests for memory of each step, from its begin to that of the next.
type Steps = Arc<Mutex<Vec<(usize, u64)>>>;

/// Experts that write down what the thread's count was when a step began.
struct Noted<E> {
    inner: E,
    steps: Steps,
    began: u64,
    rows: usize,
}

impl<E: Experts> Experts for Noted<E> {
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        self.rows = batch.dead.len();
        self.inner.run(batch, out)
    }
}

impl<E: StepExperts> StepExperts for Noted<E> {
    fn begin_step(&mut self, trace: Option<TraceContext>) -> Epoch {
        let now = COUNT.get();
        self.steps
            .lock()
            .unwrap()
            .push((self.rows, now - self.began));
        self.began = COUNT.get();
        self.inner.begin_step(trace)
    }

    fn end_step(&mut self) {
        self.inner.end_step();
    }
}

const SEQUENCES: u32 = 4;
const PROMPT: usize = 3;
const ANSWER: usize = 40;
/// More than prompt and answer: a page that is full is made known under its name, which takes memory.
const PAGE_TOKENS: usize = 64;

#[tokio::test]
async fn steady_decode_asks_for_no_memory() {
    let mut rig = rig::Rig::tiny(Family::Qwen3Moe);
    let ops: Arc<dyn Ops> = Arc::new(Uncounted(rig.cpu.clone()));
    rig.compute_with(&ops);
    let steps = Steps::default();
    let experts = Noted {
        inner: Alone(rig.local().with_ops(ops)),
        steps: Arc::clone(&steps),
        began: 0,
        rows: 0,
    };
    let sizes = rig::Sizes {
        page_tokens: PAGE_TOKENS,
        ..rig::Sizes::default()
    };
    let engine = rig.engine(sizes, Box::new(experts));
    let streams: Vec<_> = (0..SEQUENCES)
        .map(|number| {
            let prompt = [3 + number; PROMPT];
            rig::submit(&engine, rig::request(&prompt, ANSWER))
        })
        .collect();
    for stream in streams {
        rig::collect(stream).await.unwrap();
    }
    engine.stop().await;
    let steps = steps.lock().unwrap();
    // The first decode steps grow what is kept; the last ones free sequences.
    let steady: Vec<u64> = steps
        .iter()
        .filter(|(rows, _)| *rows == SEQUENCES as usize)
        .map(|(_, count)| *count)
        .skip(8)
        .take(ANSWER / 2)
        .collect();
    assert_eq!(steady.len(), ANSWER / 2, "{steps:?}");
    // That memory is counted at all shows while sequences are taken in.
    let most = steps.iter().map(|(_, count)| *count).max();
    assert!(most > Some(0), "{steps:?}");
    assert!(steady.iter().all(|count| *count == 0), "{steady:?}");
}
