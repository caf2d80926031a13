//! The thin NCCL layer: `libnccl.so.2` opened at run time, communicators that never block, and errors that say everything.
//!
//! In: the path of a library or none, the unique id of an epoch, ranks. Out: a [`Communicator`] whose every operation ends
//! by a deadline. Nothing here needs a card to load: [`Library::open`], its version and [`Library::unique_id`] work without one.
//!
//! Invariants:
//! - Every communicator is non-blocking (`blocking = 0`): a call may answer "in progress", and [`Communicator::settle`] asks
//!   for the end of it until a deadline. An operation that may block cannot be aborted safely.
//! - After the first failure a communicator takes nothing more. *Every* survivor must abort; none goes on without the lost.
//! - Dropping one aborts it. An abort that does not end in time is left to its thread and logged: it leaks, it does not hang,
//!   and it never panics.
//! - A function that the library at hand lacks is `None` ([`Optional`]), or the library is refused by name.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

pub use error::CommError;
pub use library::{FLOOR, Library, NAMES, Optional, Version};
pub use staged::StagedComms;

use library::{Config, RawComm};

mod error;
mod library;
mod staged;
pub mod trial;

/// Bytes of a unique id.
pub const ID_BYTES: usize = 128;

/// Names a communicator before it exists: made by one rank, told to the others by other means.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId(pub [u8; ID_BYTES]);

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "UniqueId({a:02x}{b:02x}{c:02x}{d:02x}…)")
    }
}

/// Element types of NCCL, with its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Element {
    /// Bytes.
    U8 = 1,
    /// 32-bit integers without sign.
    U32 = 3,
    /// 64-bit integers without sign.
    U64 = 5,
    /// IEEE half.
    F16 = 6,
    /// IEEE single.
    F32 = 7,
    /// bfloat16.
    Bf16 = 9,
}

/// Reductions of NCCL, with its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Reduction {
    /// Sums.
    Sum = 0,
    /// Maxima.
    Max = 2,
    /// Minima.
    Min = 3,
}

/// A stream of the driver, as a raw handle; null is the default stream.
pub type RawStream = *mut c_void;

/// Which communicator a rank joins, and as whom.
#[derive(Debug, Clone, Copy)]
pub struct Join {
    /// The id, the same for all ranks.
    pub id: UniqueId,
    /// Number of ranks.
    pub ranks: u32,
    /// This one, below `ranks`.
    pub rank: u32,
    /// The epoch whose communicator it is; for errors and logs.
    pub epoch: u64,
    /// Longest wait for all ranks to come.
    pub deadline: Duration,
    /// Longest wait for an abort to end before it is left alone.
    pub abort: Duration,
}

/// One rank's end of a communicator, on the device that is current for the calling thread.
pub struct Communicator {
    library: Arc<Library>,
    /// `None` after the end.
    raw: Option<RawComm>,
    join: Join,
    /// Why nothing more is taken.
    failed: Option<String>,
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("rank", &self.join.rank)
            .field("ranks", &self.join.ranks)
            .field("epoch", &self.join.epoch)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

/// Addresses and sizes of an all-to-all or a reduction.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    /// Device memory to read.
    pub send: *const c_void,
    /// Device memory to write.
    pub recv: *mut c_void,
    /// Elements: per peer in an all-to-all, in all in a reduction.
    pub count: usize,
    /// Their type.
    pub element: Element,
}

impl Communicator {
    /// Joins, and waits until all ranks have.
    ///
    /// # Errors
    /// What NCCL says, which without a driver or a card is a CUDA failure; or the deadline, when not all ranks came.
    pub fn join(library: &Arc<Library>, join: Join) -> Result<Self, CommError> {
        Self::join_while(library, join, &|| true)
    }

    /// As [`Self::join`], as long as `wanted` says that this is the communicator to wait for: its others may have gone on to
    /// another one.
    ///
    /// # Errors
    /// As [`Self::join`]; or it is not wanted any more.
    pub fn join_while(
        library: &Arc<Library>,
        join: Join,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Self, CommError> {
        let mut made = Self {
            library: Arc::clone(library),
            raw: None,
            join,
            failed: None,
        };
        let (Ok(ranks), Ok(rank)) = (c_int::try_from(join.ranks), c_int::try_from(join.rank))
        else {
            return Err(made.refused("ncclCommInitRankConfig", "more ranks than an int counts"));
        };
        if rank >= ranks {
            return Err(
                made.refused("ncclCommInitRankConfig", "the rank is not below the ranks")
            );
        }
        let mut config = Config::non_blocking();
        let mut raw = std::ptr::null_mut();
        // SAFETY: both pointers are to live values of the layout that nccl.h gives for `config.version`; NCCL copies them.
        let code = unsafe {
            (library.calls.comm_init_rank_config)(
                &raw mut raw,
                ranks,
                join.id,
                rank,
                &raw mut config,
            )
        };
        made.raw = NonNull::new(raw).map(RawComm);
        made.took("ncclCommInitRankConfig", code)?;
        if made.raw.is_none() {
            return Err(made.refused("ncclCommInitRankConfig", "NCCL gave no communicator"));
        }
        made.settle_while("ncclCommInitRankConfig", join.deadline, wanted)?;
        Ok(made)
    }

    /// This rank.
    #[must_use]
    pub const fn rank(&self) -> u32 {
        self.join.rank
    }

    /// Number of ranks.
    #[must_use]
    pub const fn ranks(&self) -> u32 {
        self.join.ranks
    }

    /// Sends `buffers.count` elements to each rank and receives as many from each; rank i's lie at `i * count`.
    ///
    /// # Safety
    /// `send` and `recv` are memory of this communicator's device for `count * ranks` elements each, which stay valid and
    /// untouched until `stream` has passed this operation; `stream` is one of that device.
    ///
    /// # Errors
    /// What NCCL says; nothing was sent then, and the communicator takes nothing more.
    pub unsafe fn all_to_all(
        &mut self,
        buffers: Buffers,
        stream: RawStream,
    ) -> Result<(), CommError> {
        let raw = self.usable("ncclAlltoAll")?;
        // SAFETY: the caller's promise; the handle is live.
        let code = unsafe {
            (self.library.calls.all_to_all)(
                buffers.send,
                buffers.recv,
                buffers.count,
                buffers.element as c_int,
                raw,
                stream,
            )
        };
        self.took("ncclAlltoAll", code)
    }

    /// Reduces over all ranks; every rank has the result.
    ///
    /// # Safety
    /// As for [`Self::all_to_all`], with `count` elements in all.
    ///
    /// # Errors
    /// As for [`Self::all_to_all`].
    pub unsafe fn all_reduce(
        &mut self,
        buffers: Buffers,
        reduction: Reduction,
        stream: RawStream,
    ) -> Result<(), CommError> {
        let raw = self.usable("ncclAllReduce")?;
        // SAFETY: the caller's promise; the handle is live.
        let code = unsafe {
            (self.library.calls.all_reduce)(
                buffers.send,
                buffers.recv,
                buffers.count,
                buffers.element as c_int,
                reduction as c_int,
                raw,
                stream,
            )
        };
        self.took("ncclAllReduce", code)
    }

    /// Sends `count` elements to one rank. Pairs of sends and receives belong into one [`Self::group`].
    ///
    /// # Safety
    /// `from` is memory of this communicator's device for `count` elements, as for [`Self::all_to_all`].
    ///
    /// # Errors
    /// As for [`Self::all_to_all`].
    pub unsafe fn send(
        &mut self,
        from: *const c_void,
        count: usize,
        element: Element,
        to: u32,
        stream: RawStream,
    ) -> Result<(), CommError> {
        let raw = self.usable("ncclSend")?;
        let peer = self.peer("ncclSend", to)?;
        // SAFETY: the caller's promise; the handle is live.
        let code = unsafe {
            (self.library.calls.send)(from, count, element as c_int, peer, raw, stream)
        };
        self.took("ncclSend", code)
    }

    /// Receives `count` elements of one rank.
    ///
    /// # Safety
    /// `into` is memory of this communicator's device for `count` elements, as for [`Self::all_to_all`].
    ///
    /// # Errors
    /// As for [`Self::all_to_all`].
    pub unsafe fn recv(
        &mut self,
        into: *mut c_void,
        count: usize,
        element: Element,
        from: u32,
        stream: RawStream,
    ) -> Result<(), CommError> {
        let raw = self.usable("ncclRecv")?;
        let peer = self.peer("ncclRecv", from)?;
        // SAFETY: the caller's promise; the handle is live.
        let code = unsafe {
            (self.library.calls.recv)(into, count, element as c_int, peer, raw, stream)
        };
        self.took("ncclRecv", code)
    }

    /// Runs `calls` as one group: its sends and receives start together, so their order cannot deadlock.
    ///
    /// # Errors
    /// The first error of `calls`, or of the group's begin or end.
    pub fn group(
        &mut self,
        calls: impl FnOnce(&mut Self) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let _handle = self.usable("ncclGroupStart")?;
        // SAFETY: takes nothing; opens a group of this thread, which the end below closes on every way out.
        let code = unsafe { (self.library.calls.group_start)() };
        self.took("ncclGroupStart", code)?;
        let inside = calls(self);
        // SAFETY: as above.
        let code = unsafe { (self.library.calls.group_end)() };
        inside.and(self.took("ncclGroupEnd", code))
    }

    /// Waits until everything handed over has been taken up: enqueued, not finished; the stream says when that is.
    ///
    /// # Errors
    /// An asynchronous error, of this rank or of another one; or `deadline` passed.
    pub fn settle(&mut self, deadline: Duration) -> Result<(), CommError> {
        self.settle_within("ncclCommGetAsyncError", deadline)
    }

    /// The error that came up since, if there is one; does not wait.
    ///
    /// # Errors
    /// That error.
    pub fn check(&mut self) -> Result<(), CommError> {
        let state = self.state("ncclCommGetAsyncError")?;
        self.took("ncclCommGetAsyncError", state)
    }

    /// Ends in order, after all ranks have done all that was handed over: finalize, then destroy.
    ///
    /// # Errors
    /// What NCCL says, or the deadline; the communicator is aborted then.
    pub fn finalize(mut self, deadline: Duration) -> Result<(), CommError> {
        let raw = self.usable("ncclCommFinalize")?;
        // SAFETY: the handle is live, and nothing more is handed over.
        let code = unsafe { (self.library.calls.comm_finalize)(raw) };
        self.took("ncclCommFinalize", code)?;
        self.settle_within("ncclCommFinalize", deadline)?;
        let Some(raw) = self.raw.take() else {
            return Ok(());
        };
        // SAFETY: finalized, and the handle is given up here.
        let code = unsafe { (self.library.calls.comm_destroy)(raw.as_ptr()) };
        self.took("ncclCommDestroy", code)
    }

    /// Ends at once. Operations in flight may or may not have happened; every other rank must abort as well.
    ///
    /// # Errors
    /// What NCCL says, or that it did not end in time: the communicator is leaked then.
    pub fn abort(mut self) -> Result<(), CommError> {
        self.end()
    }

    /// The abort. Runs on a thread of its own, which a library that hangs may keep.
    fn end(&mut self) -> Result<(), CommError> {
        let Some(raw) = self.raw.take() else {
            return Ok(());
        };
        let (tell, told) = mpsc::sync_channel(1);
        let library = Arc::clone(&self.library);
        let thread = std::thread::Builder::new()
            .name("nccl-abort".to_owned())
            .spawn(move || {
                // SAFETY: the handle was taken out of its owner, so this is its last use. NCCL allows aborts from any thread.
                let code = unsafe { (library.calls.comm_abort)(raw.into_ptr()) };
                // Whoever waited may have gone.
                tell.try_send(code).ok();
            });
        if let Err(error) = thread {
            return Err(
                self.refused("ncclCommAbort", &format!("no thread to abort on: {error}"))
            );
        }
        match told.recv_timeout(self.join.abort) {
            Ok(code) => self.took("ncclCommAbort", code),
            Err(_) => Err(self.late("ncclCommAbort", self.join.abort)),
        }
    }

    fn settle_within(
        &mut self,
        call: &'static str,
        deadline: Duration,
    ) -> Result<(), CommError> {
        self.settle_while(call, deadline, &|| true)
    }

    fn settle_while(
        &mut self,
        call: &'static str,
        deadline: Duration,
        wanted: &dyn Fn() -> bool,
    ) -> Result<(), CommError> {
        let clock = Clock::start();
        let mut pause = Duration::from_micros(20);
        loop {
            let state = self.state(call)?;
            if state != library::IN_PROGRESS {
                return self.took(call, state);
            }
            if clock.passed() >= deadline {
                return Err(self.late(call, deadline));
            }
            if !wanted() {
                let why = "it is not wanted any more";
                self.failed = Some(why.to_owned());
                return Err(self.refused(call, why));
            }
            std::thread::park_timeout(pause);
            pause = (pause * 2).min(Duration::from_millis(2));
        }
    }

    fn state(&mut self, call: &'static str) -> Result<c_int, CommError> {
        let raw = self.usable(call)?;
        let mut state = library::SUCCESS;
        // SAFETY: the handle is live, and `state` outlives the call.
        let code = unsafe { (self.library.calls.comm_get_async_error)(raw, &raw mut state) };
        self.took("ncclCommGetAsyncError", code)?;
        Ok(state)
    }

    /// The handle, unless this communicator has failed.
    fn usable(&self, call: &'static str) -> Result<*mut c_void, CommError> {
        if let Some(why) = &self.failed {
            return Err(self.refused(call, why));
        }
        let raw = self.raw.as_ref().map(RawComm::as_ptr);
        raw.ok_or_else(|| self.refused(call, "the communicator has ended"))
    }

    fn peer(&self, call: &'static str, rank: u32) -> Result<c_int, CommError> {
        let there = rank < self.join.ranks;
        let peer = c_int::try_from(rank).ok().filter(|_| there);
        peer.ok_or_else(|| self.refused(call, &format!("there is no rank {rank}")))
    }

    /// Success and "in progress" are good; anything else is an error, and the last one that is taken.
    fn took(&mut self, call: &'static str, code: c_int) -> Result<(), CommError> {
        if code == library::SUCCESS || code == library::IN_PROGRESS {
            return Ok(());
        }
        let raw = self
            .raw
            .as_ref()
            .map_or(std::ptr::null_mut(), RawComm::as_ptr);
        let error = CommError::Call {
            call,
            code,
            text: self.library.text(code, raw),
            rank: self.join.rank,
            epoch: self.join.epoch,
        };
        self.failed = Some(format!("it failed before, in {call} with code {code}"));
        Err(error)
    }

    fn late(&mut self, call: &'static str, waited: Duration) -> CommError {
        self.failed = Some(format!(
            "it failed before, in {call}, which did not end in time"
        ));
        CommError::Deadline {
            call,
            waited,
            rank: self.join.rank,
            epoch: self.join.epoch,
        }
    }

    fn refused(&self, call: &'static str, why: &str) -> CommError {
        CommError::Refused {
            call,
            why: why.to_owned(),
            rank: self.join.rank,
            epoch: self.join.epoch,
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "nccl communicator leaked");
        }
    }
}

/// The wall clock: whoever waits for NCCL waits outside any runtime.
struct Clock(std::time::Instant);

impl Clock {
    #[expect(
        clippy::disallowed_methods,
        reason = "a thread that waits for NCCL waits on the wall clock"
    )]
    fn start() -> Self {
        Self(std::time::Instant::now())
    }

    fn passed(&self) -> Duration {
        self.0.elapsed()
    }
}

/// A text of NCCL's own.
///
/// # Safety
/// `text` is null or a text that ends with a zero and stays.
unsafe fn text_at(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text) };
    let text = text.to_string_lossy().trim().to_owned();
    (!text.is_empty()).then_some(text)
}
