//! Callers: accept, exchange hellos, read calls.

use std::collections::BTreeMap;
use std::io::{self, BufReader};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_tls::TlsError;
use foregate_wire::frame::{Frame, Hello, MAX_FRAME, MAX_HELLO, Refuse, Reply};

use super::link::{ReadError, Writer, read_frame, shut};
use super::stream::Halves;
use super::{Shared, lock};
use crate::fabric::{Answer, Responder};

/// Bytes read ahead: a decode step's call arrives in one call to the system.
const READ_AHEAD: usize = 64 << 10;
/// Wait after a failed accept (no descriptors left), so that the thread does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The connections of callers, so that they can be counted and closed.
#[derive(Debug, Default)]
pub(super) struct Callers {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    open: BTreeMap<u64, Caller>,
    closed: bool,
}

#[derive(Debug)]
struct Caller {
    stream: TcpStream,
    /// Known after the hello.
    rank: Option<Rank>,
}

impl Callers {
    /// Ends every connection and takes no more.
    pub(super) fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        for caller in state.open.values() {
            shut(&caller.stream);
        }
    }

    fn add(&self, stream: &TcpStream, most: usize) -> io::Result<u64> {
        let stream = stream.try_clone()?;
        let mut state = lock(&self.state);
        if state.closed || state.open.len() >= most {
            return Err(io::Error::other("too many exchange connections"));
        }
        let number = state.next;
        state.next += 1;
        state.open.insert(number, Caller { stream, rank: None });
        Ok(number)
    }

    /// Names a connection's caller. An older connection of the same rank is ended: its caller has
    /// connected anew, so nobody reads the old one. A newer one stays: its hello may be read first.
    fn name(&self, number: u64, rank: Rank) {
        let mut state = lock(&self.state);
        for caller in state.open.range(..number).map(|(_, caller)| caller) {
            if caller.rank == Some(rank) {
                shut(&caller.stream);
            }
        }
        if let Some(caller) = state.open.get_mut(&number) {
            caller.rank = Some(rank);
        }
    }

    fn remove(&self, number: u64) {
        lock(&self.state).open.remove(&number);
    }
}

/// Starts the thread that accepts.
pub(super) fn accept(
    listener: TcpListener,
    shared: Arc<Shared>,
    callers: Arc<Callers>,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name("exchange-accept".into())
        .spawn(move || accept_loop(&listener, &shared, &callers))
}

#[expect(
    clippy::disallowed_methods,
    reason = "a thread of its own that may sleep"
)]
fn accept_loop(listener: &TcpListener, shared: &Arc<Shared>, callers: &Arc<Callers>) {
    loop {
        let accepted = listener.accept();
        if shared.closing.load(Ordering::Acquire) {
            return;
        }
        match accepted {
            Ok((stream, from)) => {
                if let Err(error) = take(stream, shared, callers) {
                    tracing::warn!(%from, %error, "exchange_caller_refused");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "exchange_accept_failed");
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

fn take(stream: TcpStream, shared: &Arc<Shared>, callers: &Arc<Callers>) -> io::Result<()> {
    let number = callers.add(&stream, shared.settings.callers)?;
    let (for_thread, callers_of_thread) = (Arc::clone(shared), Arc::clone(callers));
    let spawned = thread::Builder::new()
        .name("exchange-from".into())
        .spawn(move || {
            let ended = serve(stream, number, &for_thread, &callers_of_thread);
            callers_of_thread.remove(number);
            if let Err(error) = ended {
                end(&error, &for_thread);
            }
        });
    if let Err(error) = spawned {
        callers.remove(number);
        return Err(error);
    }
    Ok(())
}

/// Why a caller's connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The caller did not prove to be a worker of this cluster.
    #[error(transparent)]
    Unproven(TlsError),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Read(error.into())
    }
}

fn end(error: &Ended, shared: &Shared) {
    match error {
        Ended::Read(ReadError::Frame(what)) => {
            shared.metrics.frame_corrupt();
            tracing::warn!(error = %what, "exchange_frame_corrupt");
        }
        Ended::Read(ReadError::Io(what)) => {
            tracing::debug!(error = %what, "exchange_caller_gone");
        }
        Ended::Unproven(what) => tracing::warn!(error = %what, "exchange_caller_refused"),
    }
}

fn serve(
    stream: TcpStream,
    number: u64,
    shared: &Shared,
    callers: &Callers,
) -> Result<(), Ended> {
    stream.set_nodelay(true)?;
    let settings = &shared.settings;
    let halves = Halves::of_callee(stream, shared.keys.as_ref(), settings.handshake)
        .map_err(Ended::Unproven)?;
    halves.read.set_read_timeout(Some(settings.handshake))?;
    let writer = Writer::start(halves.write, halves.control, settings.write_timeout)?;
    let writer = Arc::new(writer);
    let mut reader = BufReader::with_capacity(READ_AHEAD, halves.read);
    let Frame::Hello(hello) = read_frame(&mut reader, MAX_HELLO)? else {
        return Err(protocol("the first frame is not a hello").into());
    };
    // Answered in any case: the caller compares and sees whom it reached.
    send(&writer, Frame::Hello(shared.hello()))?;
    let rank = check(&hello, shared)?;
    callers.name(number, rank);
    // Idle callers are normal, so there is no limit between calls; a vanished one is replaced by rank.
    reader.get_ref().set_read_timeout(None)?;
    loop {
        let Frame::Call(call) = read_frame(&mut reader, MAX_FRAME)? else {
            return Err(protocol("a caller may only send calls").into());
        };
        let responder = Responder::new(&call, Box::new(TcpAnswer(Arc::clone(&writer))));
        shared.handler.call(rank, call, responder);
    }
}

fn check(hello: &Hello, shared: &Shared) -> Result<Rank, ReadError> {
    if hello.cluster != shared.me.cluster {
        return Err(protocol("the caller belongs to another cluster"));
    }
    if hello.rank == shared.me.rank {
        return Err(protocol("the caller claims this worker's own rank"));
    }
    Ok(hello.rank)
}

fn protocol(what: &'static str) -> ReadError {
    ReadError::Io(io::Error::new(io::ErrorKind::InvalidData, what))
}

fn send(writer: &Writer, frame: Frame) -> Result<(), ReadError> {
    writer
        .write(frame)
        .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe).into())
}

impl Shared {
    /// This worker's hello.
    pub(super) fn hello(&self) -> Hello {
        Hello {
            cluster: self.me.cluster.clone(),
            rank: self.me.rank,
            incarnation: self.me.incarnation,
        }
    }
}

struct TcpAnswer(Arc<Writer>);

impl Answer for TcpAnswer {
    fn answer(&self, answer: Result<Reply, Refuse>) {
        let frame = match answer {
            Ok(reply) => Frame::Reply(reply),
            Err(refuse) => Frame::Refuse(refuse),
        };
        // A caller whose queue is full or who is gone hears nothing and stops waiting at its deadline;
        // a broken stream is reset, so that it does not wait that long.
        if let Err(error) = self.0.write(frame) {
            tracing::debug!(%error, "exchange_answer_lost");
            self.0.shut();
        }
    }
}
