//! Exchanges between ranks whose rows are in memory of the host: staged through a [`Lane`], carried by NCCL.
//!
//! ```text
//!  send ─► page-locked ─► device ── NCCL ──► device ─► page-locked ─► recv      one stream, one mark at its end
//! ```
//!
//! Invariants:
//! - A call has been taken up ([`Communicator::settle`]) before its copy back is handed over: until then a communicator that
//!   does not block may not have put anything on the stream.
//! - Nobody waits without a deadline: the stream is asked, never synchronised with, and an error of another rank ends the wait.
//! - Memory goes back only after the stream has passed. Where even an abort does not bring that about, it is leaked.

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foregate_kernels::{Comm, CommFault, Comms, Seat};

use super::{
    Buffers, CommError, Communicator, Element, ID_BYTES, Join, Library, RawStream, UniqueId,
};
use crate::driver::{ALIGN, DriverError};
use crate::lane::Lane;
use crate::real::{CardLane, NoDevice};

/// Longest wait for an abort, and then for the device to be done with what was aborted.
const ABORT: Duration = Duration::from_secs(5);
/// Times that a wait asks the stream before it asks for errors and lets other threads run.
const SPINS: u32 = 200;
/// First pause between two questions; it doubles up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_micros(20);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_micros(500);

type OpenLane = dyn Fn() -> Result<Box<dyn Lane>, NoDevice> + Send + Sync;

/// Groups over NCCL whose ranks stage their rows.
pub struct StagedComms {
    library: Arc<Library>,
    open: Arc<OpenLane>,
}

impl fmt::Debug for StagedComms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StagedComms")
            .field("library", &self.library.path())
            .finish_non_exhaustive()
    }
}

impl StagedComms {
    /// Of a library, with a lane of its own for each group that is joined.
    pub fn new(
        library: Arc<Library>,
        open: impl Fn() -> Result<Box<dyn Lane>, NoDevice> + Send + Sync + 'static,
    ) -> Self {
        Self {
            library,
            open: Arc::new(open),
        }
    }

    /// The same on the card with this number.
    #[must_use]
    pub fn on_card(library: Arc<Library>, ordinal: u32) -> Self {
        Self::new(library, move || Ok(Box::new(CardLane::open(ordinal)?)))
    }
}

impl Comms for StagedComms {
    fn new_id(&self) -> Result<Vec<u8>, CommFault> {
        Ok(self.library.unique_id()?.0.to_vec())
    }

    fn join(&self, seat: Seat<'_>) -> Result<Box<dyn Comm>, CommFault> {
        const CALL: &str = "ncclCommInitRankConfig";
        let refused = |why: String| CommFault { call: CALL, why };
        let id: [u8; ID_BYTES] = seat.id.try_into().map_err(|_| {
            let bytes = seat.id.len();
            refused(format!("its id has {bytes} bytes, NCCL's have {ID_BYTES}"))
        })?;
        let (Ok(ranks), Ok(rank)) = (u32::try_from(seat.ranks), u32::try_from(seat.rank))
        else {
            return Err(refused("more ranks than there are numbers".to_owned()));
        };
        let mut lane = (self.open)().map_err(|error| refused(error.to_string()))?;
        lane.enter()?;
        let join = Join {
            id: UniqueId(id),
            ranks,
            rank,
            epoch: seat.epoch,
            deadline: left(seat.deadline),
            abort: ABORT,
        };
        let communicator = Communicator::join_while(&self.library, join, seat.wanted)?;
        Ok(Box::new(Staged {
            communicator: Some(communicator),
            lane: ManuallyDrop::new(lane),
            busy: false,
            ranks: seat.ranks,
            rank: seat.rank,
            failed: None,
        }))
    }
}

/// One rank's place in a group.
struct Staged {
    /// `None` after the end.
    communicator: Option<Communicator>,
    /// Taken once, when this is dropped.
    lane: ManuallyDrop<Box<dyn Lane>>,
    /// Whether something may be under way on the lane.
    busy: bool,
    ranks: usize,
    rank: usize,
    /// Why nothing more is taken.
    failed: Option<String>,
}

impl fmt::Debug for Staged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Staged")
            .field("communicator", &self.communicator)
            .field("lane", &self.lane)
            .finish_non_exhaustive()
    }
}

impl Staged {
    /// One exchange of `bytes` in the outbox, of which `received` come back.
    fn carry(
        &mut self,
        call: &'static str,
        (bytes, received): (usize, usize),
        deadline: Instant,
        hand_over: impl FnOnce(&mut Communicator, Rooms) -> Result<(), CommError>,
    ) -> Result<(), CommFault> {
        let communicator = self.communicator.as_mut().ok_or_else(|| ended(call))?;
        self.busy = true;
        if bytes > 0 {
            self.lane.upload(bytes)?;
        }
        let (send, recv) = self.lane.rooms();
        let rooms = Rooms {
            send,
            recv,
            stream: self.lane.stream(),
        };
        hand_over(communicator, rooms)?;
        communicator.settle(left(deadline))?;
        self.lane.download(received)?;
        wait(call, &mut **self.lane, Some(communicator), deadline)?;
        self.busy = false;
        Ok(())
    }

    /// Makes ready for an exchange of so many bytes; gives the outbox.
    fn outbox(&mut self, call: &'static str, bytes: usize) -> Result<&mut [u8], CommFault> {
        if let Some(why) = &self.failed {
            return Err(CommFault {
                call,
                why: format!("it failed before: {why}"),
            });
        }
        if self.communicator.is_none() {
            return Err(ended(call));
        }
        // The engine's thread and the one that stands in for it take turns.
        self.lane.enter()?;
        self.lane.reserve(bytes)?;
        Ok(self.lane.outbox())
    }

    /// Keeps the first failure.
    fn told<T>(&mut self, result: Result<T, CommFault>) -> Result<T, CommFault> {
        if let Err(fault) = &result {
            self.failed.get_or_insert_with(|| fault.to_string());
        }
        result
    }

    fn equal(
        &mut self,
        send: &[u8],
        recv: &mut [u8],
        block: usize,
        deadline: Instant,
    ) -> Result<(), CommFault> {
        const CALL: &str = "ncclAlltoAll";
        let bytes = block * self.ranks;
        if send.len() != bytes || recv.len() != bytes {
            let (sent, got) = (send.len(), recv.len());
            let why = format!("{sent} and {got} bytes, not {bytes}");
            return Err(CommFault { call: CALL, why });
        }
        let outbox = self.outbox(CALL, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        outbox[..bytes].copy_from_slice(send);
        self.carry(CALL, (bytes, bytes), deadline, |communicator, rooms| {
            let buffers = Buffers {
                send: pointer(rooms.send).cast_const(),
                recv: pointer(rooms.recv),
                count: block,
                element: Element::U8,
            };
            // SAFETY: both rooms are of this communicator's device and have a block for each rank; the lane keeps them until
            // its stream has passed.
            unsafe { communicator.all_to_all(buffers, rooms.stream) }
        })?;
        recv.copy_from_slice(&self.lane.inbox()[..bytes]);
        Ok(())
    }

    fn by_count(
        &mut self,
        send: &[Vec<u8>],
        recv: &mut [Vec<u8>],
        deadline: Instant,
    ) -> Result<(), CommFault> {
        const CALL: &str = "ncclSend/ncclRecv";
        let (ranks, rank) = (self.ranks, self.rank);
        let own = (send.len() == ranks && recv.len() == ranks)
            .then(|| (send[rank].len(), recv[rank].len()));
        if own.is_none_or(|(sent, got)| sent != got) {
            let why = "not one vector for each rank, or other bytes to itself than from itself";
            return Err(CommFault {
                call: CALL,
                why: why.to_owned(),
            });
        }
        // What stays here goes nowhere.
        recv[rank].copy_from_slice(&send[rank]);
        let (out, sent) = parts(send, rank);
        let (back, got) = parts(recv, rank);
        let outbox = self.outbox(CALL, sent.max(got))?;
        for part in &out {
            outbox[part.at..part.at + part.bytes].copy_from_slice(&send[part.peer]);
        }
        if out.is_empty() && back.is_empty() {
            return Ok(());
        }
        self.carry(CALL, (sent, got), deadline, |communicator, rooms| {
            communicator.group(|communicator| {
                for Part { peer, at, bytes } in &out {
                    let from = pointer(rooms.send + *at as u64).cast_const();
                    // SAFETY: the part lies in the lane's room, which stays until its stream has passed.
                    unsafe {
                        communicator.send(
                            from,
                            *bytes,
                            Element::U8,
                            *peer as u32,
                            rooms.stream,
                        )?;
                    }
                }
                for Part { peer, at, bytes } in &back {
                    let into = pointer(rooms.recv + *at as u64);
                    // SAFETY: as above.
                    unsafe {
                        communicator.recv(
                            into,
                            *bytes,
                            Element::U8,
                            *peer as u32,
                            rooms.stream,
                        )?;
                    }
                }
                Ok(())
            })
        })?;
        let inbox = self.lane.inbox();
        for part in &back {
            recv[part.peer].copy_from_slice(&inbox[part.at..part.at + part.bytes]);
        }
        Ok(())
    }

    /// Aborts, and waits for the device to be done with it. True if it is.
    fn end(&mut self) -> bool {
        if let Some(communicator) = self.communicator.take()
            && let Err(error) = communicator.abort()
        {
            tracing::error!(%error, "nccl_not_aborted");
        }
        if !self.busy {
            return true;
        }
        // Without a copy there is only the mark to pass.
        let lane = &mut **self.lane;
        let ready = lane.enter().and_then(|()| lane.download(0));
        let done = match ready {
            Ok(()) => wait("abort", lane, None, soon()),
            Err(error) => Err(error.into()),
        };
        match done {
            Ok(()) => self.busy = false,
            Err(fault) => tracing::error!(%fault, "device_not_done_with_nccl"),
        }
        !self.busy
    }
}

impl Comm for Staged {
    fn all_to_all(
        &mut self,
        send: &[u8],
        recv: &mut [u8],
        block: usize,
        deadline: Instant,
    ) -> Result<(), CommFault> {
        let done = self.equal(send, recv, block, deadline);
        self.told(done)
    }

    fn counted(
        &mut self,
        send: &[Vec<u8>],
        recv: &mut [Vec<u8>],
        deadline: Instant,
    ) -> Result<(), CommFault> {
        let done = self.by_count(send, recv, deadline);
        self.told(done)
    }

    fn finish(&mut self, deadline: Instant) -> Result<(), CommFault> {
        const CALL: &str = "ncclCommFinalize";
        let ready = self.outbox(CALL, 0).map(drop);
        self.told(ready)?;
        let communicator = self.communicator.take().ok_or_else(|| ended(CALL))?;
        let done = communicator.finalize(left(deadline));
        self.told(done.map_err(CommFault::from))
    }

    fn abort(&mut self) {
        self.failed.get_or_insert_with(|| "aborted".to_owned());
        self.end();
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.end() {
            // SAFETY: not used again: this is the drop of its owner.
            unsafe { ManuallyDrop::drop(&mut self.lane) };
        } else {
            tracing::error!("device_memory_leaked");
        }
    }
}

/// Where the device's rooms are, and the stream that may use them.
#[derive(Debug, Clone, Copy)]
struct Rooms {
    send: u64,
    recv: u64,
    stream: RawStream,
}

/// What goes to one rank, or comes from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    peer: usize,
    at: usize,
    bytes: usize,
}

/// Parts one behind the other, each at an address that copies like: of all ranks but `rank` that have any. And where they end.
fn parts(vectors: &[Vec<u8>], rank: usize) -> (Vec<Part>, usize) {
    let (mut parts, mut end) = (Vec::with_capacity(vectors.len()), 0_usize);
    for (peer, vector) in vectors.iter().enumerate() {
        if peer != rank && !vector.is_empty() {
            let (at, bytes) = (end.next_multiple_of(ALIGN as usize), vector.len());
            end = at + bytes;
            parts.push(Part { peer, at, bytes });
        }
    }
    (parts, end)
}

/// Waits for the lane, and as long as there is a communicator for its errors.
fn wait(
    call: &'static str,
    lane: &mut dyn Lane,
    mut communicator: Option<&mut Communicator>,
    deadline: Instant,
) -> Result<(), CommFault> {
    let mut pause = PAUSE;
    for turn in 0_u64.. {
        if lane.passed()? {
            return Ok(());
        }
        if turn < u64::from(SPINS) {
            std::hint::spin_loop();
            continue;
        }
        if let Some(communicator) = communicator.as_deref_mut() {
            communicator.check()?;
        }
        if left(deadline).is_zero() {
            break;
        }
        std::thread::park_timeout(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    Err(CommFault {
        call,
        why: "a rank did not come in time".to_owned(),
    })
}

fn ended(call: &'static str) -> CommFault {
    CommFault {
        call,
        why: "the group has ended".to_owned(),
    }
}

impl From<CommError> for CommFault {
    fn from(error: CommError) -> Self {
        Self {
            call: error.call(),
            why: error.to_string(),
        }
    }
}

impl From<DriverError> for CommFault {
    fn from(error: DriverError) -> Self {
        Self {
            call: error.call,
            why: error.to_string(),
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a thread that waits for other ranks waits on the wall clock"
)]
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

#[expect(clippy::disallowed_methods, reason = "as above")]
fn soon() -> Instant {
    Instant::now() + ABORT
}

/// Device addresses are numbers to the driver and pointers to NCCL.
fn pointer(address: u64) -> *mut std::ffi::c_void {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or_default())
}
