//! One worker's end of the exchange, put together: callee, fabric and the way to make its [`Exchange`].
//!
//! `run()` uses it, and so does whoever wants several workers in one process.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::model::ModelSpec;
use foregate_kernels::Ops;
use foregate_tls::Keys;

use super::lockstep::{LockStep, LockStepParts};
use super::serve::{Server, ServerLimits, ServerParts};
use super::{Exchange, ExchangeParts};
use crate::fabric::local::LocalHub;
use crate::fabric::lockstep::Groups;
use crate::fabric::tcp::{TcpFabric, TcpParts, TcpSettings};
use crate::fabric::uncalled::Uncalled;
use crate::fabric::{CallHandler, Fabric, Identity, Inbox, PeerAddress};
use crate::load::LoadCounters;
use crate::metrics::WorkerMetrics;
use crate::residency::{EpochGate, Residency};

/// Calls in flight to one peer of the local fabric.
const LOCAL_IN_FLIGHT: usize = 32;

/// Which fabric, and what it needs.
#[derive(Debug)]
pub enum Way {
    /// Channels of this process.
    Local(Arc<LocalHub>),
    /// Frames over TCP; the listener is bound. With keys both sides of a connection prove themselves.
    Tcp(TcpListener, TcpSettings, Option<Keys>),
    /// None: rows travel in lock-step only ([`Endpoint::lock_step`]).
    LockStep,
}

/// What an endpoint is opened with.
pub struct EndpointParts {
    /// Who this worker is.
    pub me: Identity,
    /// The model's shape.
    pub spec: Arc<ModelSpec>,
    /// Numbers for the engine's thread.
    pub ops: Arc<dyn Ops>,
    /// Numbers for the callee's thread; may be the same.
    pub callee_ops: Arc<dyn Ops>,
    /// Which fabric.
    pub way: Way,
    /// Counts served rows.
    pub load: Arc<LoadCounters>,
    /// Counters.
    pub metrics: Arc<WorkerMetrics>,
    /// Time after which rows are late.
    pub deadline: Duration,
}

impl fmt::Debug for EndpointParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndpointParts")
            .field("me", &self.me)
            .finish_non_exhaustive()
    }
}

/// One worker's end of the exchange. It answers peers from the moment it is open.
pub struct Endpoint {
    parts: Shared,
    residency: Arc<Residency>,
    gate: Arc<EpochGate>,
    server: Arc<Server>,
    fabric: Arc<dyn Fabric>,
    inbox: Arc<Inbox>,
}

/// What exchanges of this endpoint share.
struct Shared {
    rank: Rank,
    spec: Arc<ModelSpec>,
    ops: Arc<dyn Ops>,
    metrics: Arc<WorkerMetrics>,
    deadline: Duration,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("rank", &self.parts.rank)
            .field("fabric", &self.fabric)
            .finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Opens the fabric and starts the callee. Nothing is resident and no epoch is served yet.
    ///
    /// # Errors
    /// When the listener cannot be used or a thread cannot be started.
    pub fn open(parts: EndpointParts) -> io::Result<Self> {
        let residency = Arc::new(Residency::new(&parts.spec));
        let gate = Arc::new(EpochGate::new());
        let inbox = Arc::new(Inbox::default());
        let server = Server::start(ServerParts {
            spec: Arc::clone(&parts.spec),
            ops: parts.callee_ops,
            residency: Arc::clone(&residency),
            gate: Arc::clone(&gate),
            load: parts.load,
            metrics: Arc::clone(&parts.metrics),
            limits: ServerLimits::default(),
        })?;
        let rank = parts.me.rank;
        let handler: Arc<dyn CallHandler> = Arc::<Server>::clone(&server);
        let inbox_of_fabric = Arc::clone(&inbox);
        let fabric: Arc<dyn Fabric> = match parts.way {
            Way::Local(hub) => {
                Arc::new(hub.open(parts.me, handler, inbox_of_fabric, LOCAL_IN_FLIGHT))
            }
            Way::Tcp(listener, settings, keys) => Arc::new(TcpFabric::open(TcpParts {
                me: parts.me,
                listener,
                handler,
                inbox: inbox_of_fabric,
                metrics: Arc::clone(&parts.metrics),
                settings,
                keys,
            })?),
            Way::LockStep => Arc::new(Uncalled { rank }),
        };
        Ok(Self {
            parts: Shared {
                rank,
                spec: parts.spec,
                ops: parts.ops,
                metrics: parts.metrics,
                deadline: parts.deadline,
            },
            residency,
            gate,
            server,
            fabric,
            inbox,
        })
    }

    /// The exchange for this worker's engine. Make one only: it reads the endpoint's inbox.
    #[must_use]
    pub fn exchange(&self) -> Exchange {
        Exchange::new(ExchangeParts {
            rank: self.parts.rank,
            spec: Arc::clone(&self.parts.spec),
            ops: Arc::clone(&self.parts.ops),
            residency: Arc::clone(&self.residency),
            gate: Arc::clone(&self.gate),
            fabric: Arc::clone(&self.fabric),
            inbox: Arc::clone(&self.inbox),
            server: Arc::clone(&self.server),
            metrics: Arc::clone(&self.parts.metrics),
            deadline: self.parts.deadline,
        })
    }

    /// The lock-step exchange for this worker's engine, in place of [`Self::exchange`]. `idle_ops` are numbers for the thread
    /// that steps with the others while the engine has nothing; they may be the same.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn lock_step(
        &self,
        groups: Arc<dyn Groups>,
        idle_ops: Arc<dyn Ops>,
    ) -> io::Result<LockStep> {
        LockStep::start(LockStepParts {
            rank: self.parts.rank,
            spec: Arc::clone(&self.parts.spec),
            ops: Arc::clone(&self.parts.ops),
            idle_ops,
            residency: Arc::clone(&self.residency),
            gate: Arc::clone(&self.gate),
            server: Arc::clone(&self.server),
            groups,
            metrics: Arc::clone(&self.parts.metrics),
            deadline: self.parts.deadline,
        })
    }

    /// The experts in memory here.
    #[must_use]
    pub const fn residency(&self) -> &Arc<Residency> {
        &self.residency
    }

    /// The placement of new steps and the epochs that are served.
    #[must_use]
    pub const fn gate(&self) -> &Arc<EpochGate> {
        &self.gate
    }

    /// The callee.
    #[must_use]
    pub const fn server(&self) -> &Arc<Server> {
        &self.server
    }

    /// The fabric.
    #[must_use]
    pub const fn fabric(&self) -> &Arc<dyn Fabric> {
        &self.fabric
    }

    /// Tells the fabric who the peers are.
    pub fn set_peers(&self, peers: &BTreeMap<Rank, PeerAddress>) {
        self.fabric.set_peers(peers);
    }

    /// Closes the fabric and ends the callee's thread.
    pub fn close(&self) {
        self.fabric.close();
        self.server.close();
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.close();
    }
}
