//! ctrl-c and SIGTERM: the first asks for a drain, the second ends at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The process's signals.
#[derive(Debug)]
pub(crate) struct Signals {
    drain: CancellationToken,
    now: CancellationToken,
    _listener: JoinSet<()>,
}

impl Signals {
    /// Starts to listen.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn listen() -> io::Result<Self> {
        let interrupt = signal(SignalKind::interrupt())?;
        let terminate = signal(SignalKind::terminate())?;
        let (drain, now) = (CancellationToken::new(), CancellationToken::new());
        let mut listener = JoinSet::new();
        listener.spawn(pass_on(interrupt, terminate, drain.clone(), now.clone()));
        Ok(Self {
            drain,
            now,
            _listener: listener,
        })
    }

    /// Cancelled by the first signal.
    pub(crate) fn drain(&self) -> CancellationToken {
        self.drain.clone()
    }

    /// Resolves at the second signal.
    pub(crate) async fn at_once(&self) {
        self.now.cancelled().await;
    }
}

async fn pass_on(
    mut interrupt: Signal,
    mut terminate: Signal,
    drain: CancellationToken,
    now: CancellationToken,
) {
    for token in [drain, now] {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        token.cancel();
    }
}
