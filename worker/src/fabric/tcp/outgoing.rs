//! The way to one peer: connect, say hello, read answers, connect again.

use std::io::{self, BufReader};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use foregate_api::ids::Rank;
use foregate_tls::TlsError;
use foregate_wire::frame::{Frame, Hello, MAX_FRAME, MAX_HELLO};

use super::link::{ReadError, Writer, read_frame};
use super::stream::{Halves, ReadHalf};
use super::{Shared, lock};
use crate::fabric::PeerAddress;
use crate::fabric::pending::Pending;

/// How often a reader looks whether answers are overdue.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes read ahead: a decode step's answer arrives in one call to the system.
const READ_AHEAD: usize = 64 << 10;

/// A peer this worker may call.
#[derive(Debug)]
pub(super) struct Outgoing {
    rank: Rank,
    address: PeerAddress,
    link: ArcSwapOption<Link>,
    closed: AtomicBool,
    /// For waking the thread out of its backoff.
    gate: Mutex<()>,
    wake: Condvar,
}

/// An established connection.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) writer: Writer,
    pub(super) pending: Pending,
}

/// Why a connection did not come about or ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The peer did not prove to be a worker of this cluster, or does not believe that this one is.
    #[error(transparent)]
    Unproven(TlsError),
    #[error("{0} does not resolve to an address")]
    Address(String),
    #[error("the peer says it is {found:?}")]
    Stranger { found: Hello },
    #[error("the peer sent a frame that is not an answer")]
    Protocol,
    #[error("the peer has not answered for too long")]
    Silent,
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Read(ReadError::Io(error))
    }
}

impl Outgoing {
    /// Starts the peer's thread; `None` (logged) when the system has no thread left.
    pub(super) fn start(
        rank: Rank,
        address: PeerAddress,
        shared: &Arc<Shared>,
    ) -> Option<Arc<Self>> {
        let outgoing = Arc::new(Self {
            rank,
            address,
            link: ArcSwapOption::empty(),
            closed: AtomicBool::new(false),
            gate: Mutex::default(),
            wake: Condvar::new(),
        });
        let (peer, shared) = (Arc::clone(&outgoing), Arc::clone(shared));
        // Ends soon after `close`, which shuts the socket and wakes the backoff.
        let spawned = thread::Builder::new()
            .name(format!("exchange-to-{rank}"))
            .spawn(move || peer.run(&shared));
        match spawned {
            Ok(_) => Some(outgoing),
            Err(error) => {
                tracing::error!(%rank, %error, "exchange_thread_failed");
                None
            }
        }
    }

    pub(super) fn address(&self) -> &PeerAddress {
        &self.address
    }

    /// The connection, if there is one.
    pub(super) fn link(&self) -> Option<Arc<Link>> {
        self.link.load_full()
    }

    /// Ends the connection and the thread. Pending calls complete as lost.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        if let Some(link) = self.link.swap(None) {
            link.end();
        }
        drop(lock(&self.gate));
        self.wake.notify_all();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn run(&self, shared: &Shared) {
        let mut backoff = shared.settings.backoff_first;
        let mut complained = false;
        while !self.is_closed() {
            match self.connect(shared) {
                Ok((link, reader)) => {
                    backoff = shared.settings.backoff_first;
                    complained = false;
                    tracing::info!(rank = %self.rank, "exchange_connected");
                    let broken = read_answers(&link, reader, shared);
                    self.link.store(None);
                    link.end();
                    self.report(&broken, shared);
                }
                // Does not go away by itself, so once is enough.
                Err(Broken::Unproven(error)) if error.is_refusal() && !complained => {
                    tracing::warn!(rank = %self.rank, %error, "exchange_peer_refused");
                    complained = true;
                }
                Err(error) => {
                    tracing::debug!(rank = %self.rank, %error, "exchange_connect_failed");
                    self.count(&error, shared);
                }
            }
            self.pause(backoff);
            backoff = (backoff * 2).min(shared.settings.backoff_most);
        }
    }

    fn connect(&self, shared: &Shared) -> Result<(Arc<Link>, BufReader<ReadHalf>), Broken> {
        let settings = &shared.settings;
        let address = self
            .address
            .exchange
            .to_socket_addrs()?
            .next()
            .ok_or_else(|| Broken::Address(self.address.exchange.clone()))?;
        let stream = TcpStream::connect_timeout(&address, settings.handshake)?;
        stream.set_nodelay(true)?;
        let keys = shared.keys.as_ref();
        let halves =
            Halves::of_caller(stream, keys, settings.handshake).map_err(Broken::Unproven)?;
        halves.read.set_read_timeout(Some(settings.handshake))?;
        let writer = Writer::start(halves.write, halves.control, settings.write_timeout)?;
        let hello = Frame::Hello(shared.hello());
        writer
            .write(hello)
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        let mut reader = BufReader::with_capacity(READ_AHEAD, halves.read);
        let found = match (read_frame(&mut reader, MAX_HELLO), keys) {
            (Ok(Frame::Hello(found)), _) => found,
            (Ok(_), _) => return Err(Broken::Protocol),
            // Where a peer that does not believe this worker's proof says so.
            (Err(ReadError::Io(error)), Some(keys)) => {
                return Err(Broken::Unproven(keys.explain_read(error)));
            }
            (Err(error), _) => return Err(error.into()),
        };
        let expected = Hello {
            cluster: shared.me.cluster.clone(),
            rank: self.rank,
            incarnation: self.address.incarnation,
        };
        if found != expected {
            return Err(Broken::Stranger { found });
        }
        let link = Arc::new(Link {
            writer,
            pending: Pending::new(self.rank, settings.in_flight, Arc::clone(&shared.inbox)),
        });
        self.link.store(Some(Arc::clone(&link)));
        if self.is_closed() {
            // `close` may have looked before the link was there.
            self.link.store(None);
            link.end();
        }
        Ok((link, reader))
    }

    fn report(&self, broken: &Broken, shared: &Shared) {
        if self.is_closed() {
            return;
        }
        tracing::warn!(rank = %self.rank, error = %broken, "exchange_connection_lost");
        shared.metrics.connection_lost();
        self.count(broken, shared);
    }

    fn count(&self, broken: &Broken, shared: &Shared) {
        if let Broken::Read(ReadError::Frame(_)) = broken {
            tracing::warn!(rank = %self.rank, error = %broken, "exchange_frame_corrupt");
            shared.metrics.frame_corrupt();
        }
    }

    fn pause(&self, backoff: Duration) {
        let gate = lock(&self.gate);
        if !self.is_closed() {
            let waited = self.wake.wait_timeout(gate, backoff);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Link {
    fn end(&self) {
        self.writer.shut();
        self.pending.close();
    }
}

/// Reads answers until the connection ends, and says why it did.
fn read_answers(link: &Link, mut reader: BufReader<ReadHalf>, shared: &Shared) -> Broken {
    if let Err(error) = reader.get_ref().set_read_timeout(Some(LOOK)) {
        return error.into();
    }
    loop {
        if let Err(broken) = wait_readable(&mut reader, link, shared) {
            return broken;
        }
        match read_frame(&mut reader, MAX_FRAME) {
            Ok(Frame::Reply(reply)) => link.pending.complete(Ok(reply)),
            Ok(Frame::Refuse(refuse)) => link.pending.complete(Err(refuse)),
            Ok(Frame::Hello(_) | Frame::Call(_)) => return Broken::Protocol,
            Err(error) => return error.into(),
        }
    }
}

/// Waits for the first byte of a frame, as long as nothing is overdue. Within a frame the read timeout
/// then means a stalled sender.
#[expect(
    clippy::disallowed_methods,
    reason = "a thread of its own, on the wall clock"
)]
fn wait_readable(
    reader: &mut BufReader<ReadHalf>,
    link: &Link,
    shared: &Shared,
) -> Result<(), Broken> {
    use std::io::BufRead;
    loop {
        match reader.fill_buf() {
            Ok([]) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(_) => return Ok(()),
            Err(error) if is_timeout(&error) => {
                if link
                    .pending
                    .is_overdue(Instant::now(), shared.settings.silence)
                {
                    return Err(Broken::Silent);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
