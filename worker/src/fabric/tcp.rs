//! The fabric over TCP: length-prefixed frames, one connection per direction of calls.
//!
//! A caller connects to its peer, both say hello, then calls go one way and answers the other. Threads,
//! not tasks: the engine is a plain thread and an exchange is a few tens of microseconds, so each hand-over
//! is one wake-up and small frames are written by the thread that has them (`link.rs`).
//!
//! ```text
//!  outgoing.rs   one thread per peer: connect, hello, read answers, reconnect with backoff
//!  incoming.rs   one thread that accepts, one per connection that reads calls
//!  stream.rs     a connection's two halves, plain or proven
//!  link.rs       who writes when; reading one frame
//! ```
//!
//! A frame that cannot be decoded resets its connection: after it nothing on the stream can be trusted.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use foregate_api::ids::Rank;
use foregate_tls::Keys;
use foregate_wire::frame::{Call, Frame};

use self::outgoing::Outgoing;
use super::{CallHandler, Fabric, Identity, Inbox, PeerAddress, SendError};
use crate::metrics::WorkerMetrics;

mod incoming;
mod link;
mod outgoing;
mod stream;

/// Limits of the fabric.
#[derive(Debug, Clone, Copy)]
pub struct TcpSettings {
    /// Most calls in flight to one peer.
    pub in_flight: usize,
    /// Longest time to connect, for the proofs of both sides, or to wait for a hello.
    pub handshake: Duration,
    /// First wait before connecting again; doubles up to `backoff_most`.
    pub backoff_first: Duration,
    /// Longest wait before connecting again.
    pub backoff_most: Duration,
    /// Longest time a write may be stuck before the connection is given up.
    pub write_timeout: Duration,
    /// How long after its deadline a call may stay unanswered before the connection is given up.
    pub silence: Duration,
    /// Most connections of callers at a time.
    pub callers: usize,
}

impl Default for TcpSettings {
    fn default() -> Self {
        Self {
            in_flight: 32,
            handshake: Duration::from_secs(2),
            backoff_first: Duration::from_millis(20),
            backoff_most: Duration::from_secs(1),
            write_timeout: Duration::from_millis(500),
            silence: Duration::from_secs(5),
            callers: 1024,
        }
    }
}

/// What the fabric is opened with.
#[derive(Debug)]
pub struct TcpParts {
    /// Who this worker is.
    pub me: Identity,
    /// Bound and listening.
    pub listener: TcpListener,
    /// Takes calls of peers.
    pub handler: Arc<dyn CallHandler>,
    /// Receives answers to this worker's calls.
    pub inbox: Arc<Inbox>,
    /// Counts broken frames and connections.
    pub metrics: Arc<WorkerMetrics>,
    /// Limits.
    pub settings: TcpSettings,
    /// What both sides of a connection prove themselves with; without them connections are plain.
    pub keys: Option<Keys>,
}

/// What every thread of the fabric shares.
#[derive(Debug)]
struct Shared {
    me: Identity,
    handler: Arc<dyn CallHandler>,
    inbox: Arc<Inbox>,
    metrics: Arc<WorkerMetrics>,
    settings: TcpSettings,
    keys: Option<Keys>,
    closing: AtomicBool,
}

/// One worker's sockets.
#[derive(Debug)]
pub struct TcpFabric {
    shared: Arc<Shared>,
    address: SocketAddr,
    peers: ArcSwap<BTreeMap<Rank, Arc<Outgoing>>>,
    /// Serialises changes of `peers`.
    changing: Mutex<()>,
    callers: Arc<incoming::Callers>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl TcpFabric {
    /// Starts to accept callers. Peers are connected to once [`Fabric::set_peers`] names them.
    ///
    /// # Errors
    /// When the listener has no address or a thread cannot be started.
    pub fn open(parts: TcpParts) -> io::Result<Self> {
        let TcpParts {
            me,
            listener,
            handler,
            inbox,
            metrics,
            settings,
            keys,
        } = parts;
        listener.set_nonblocking(false)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            me,
            handler,
            inbox,
            metrics,
            settings,
            keys,
            closing: AtomicBool::new(false),
        });
        let callers = Arc::new(incoming::Callers::default());
        let acceptor = incoming::accept(listener, Arc::clone(&shared), Arc::clone(&callers))?;
        Ok(Self {
            shared,
            address,
            peers: ArcSwap::default(),
            changing: Mutex::default(),
            callers,
            acceptor: Mutex::new(Some(acceptor)),
        })
    }
}

impl Fabric for TcpFabric {
    fn send(&self, peer: Rank, call: Call, deadline: Instant) -> Result<(), SendError> {
        let peers = self.peers.load();
        let link = peers
            .get(&peer)
            .and_then(|outgoing| outgoing.link())
            .ok_or(SendError::Down(peer))?;
        let number = call.call;
        link.pending.enter(number, deadline)?;
        let sent = link.writer.write(Frame::Call(call));
        match sent {
            Ok(()) => Ok(()),
            Err(error) => {
                link.pending.withdraw(number);
                tracing::debug!(rank = %peer, %error, "exchange_call_not_written");
                Err(match error {
                    link::WriteError::Full => SendError::Busy(peer),
                    link::WriteError::Closed => SendError::Down(peer),
                    link::WriteError::Frame(_) => SendError::Malformed(peer),
                })
            }
        }
    }

    fn set_peers(&self, peers: &BTreeMap<Rank, PeerAddress>) {
        let _changing = lock(&self.changing);
        if self.shared.closing.load(Ordering::Acquire) {
            return;
        }
        let old = self.peers.load_full();
        let mut new = BTreeMap::new();
        for (rank, address) in peers {
            if *rank == self.shared.me.rank {
                continue;
            }
            let kept = old.get(rank).filter(|peer| peer.address() == address);
            let peer = match kept {
                Some(peer) => Some(Arc::clone(peer)),
                None => Outgoing::start(*rank, address.clone(), &self.shared),
            };
            new.extend(peer.map(|peer| (*rank, peer)));
        }
        self.peers.store(Arc::new(new.clone()));
        for (rank, peer) in old.iter() {
            if !new.get(rank).is_some_and(|kept| Arc::ptr_eq(kept, peer)) {
                peer.close();
            }
        }
    }

    fn is_up(&self, peer: Rank) -> bool {
        self.peers
            .load()
            .get(&peer)
            .is_some_and(|outgoing| outgoing.link().is_some())
    }

    fn address(&self) -> String {
        self.address.to_string()
    }

    fn close(&self) {
        if self.shared.closing.swap(true, Ordering::AcqRel) {
            return;
        }
        let _changing = lock(&self.changing);
        for peer in self.peers.swap(Arc::default()).values() {
            peer.close();
        }
        // Wakes the acceptor, which sees `closing` and ends.
        drop(TcpStream::connect_timeout(
            &reachable(self.address),
            self.shared.settings.handshake,
        ));
        if let Some(acceptor) = lock(&self.acceptor).take()
            && acceptor.join().is_err()
        {
            tracing::error!("exchange_acceptor_panicked");
        }
        self.callers.close();
    }
}

impl Drop for TcpFabric {
    fn drop(&mut self) {
        self.close();
    }
}

/// The address to connect to for a listener that may be bound to every interface.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
