//! Whether the worker lives and whether it can take requests, for `/healthz` and `/readyz`.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use foregate_api::member::Phase;
use tokio::sync::watch;

use crate::engine::{EngineHandle, EngineState};
use crate::exchange::serve::Server;
use crate::membership::Wanted;

/// A handle that the composition root makes before the worker runs, and asks at any time.
#[derive(Debug, Clone, Default)]
pub struct Health {
    parts: Arc<ArcSwapOption<Parts>>,
}

/// What a running worker is judged by.
#[derive(Debug)]
pub(crate) struct Parts {
    /// None in a worker that holds experts only.
    pub(crate) engine: Option<EngineHandle>,
    pub(crate) server: Arc<Server>,
    pub(crate) wanted: watch::Receiver<Wanted>,
}

impl Health {
    /// A worker that has not started.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn started(&self, parts: Parts) {
        self.parts.store(Some(Arc::new(parts)));
    }

    /// Whether the process should go on. A worker that loads is alive.
    ///
    /// # Errors
    /// The reason why it should be replaced.
    pub fn alive(&self) -> Result<(), String> {
        let parts = self.parts.load();
        let Some(parts) = parts.as_ref() else {
            return Ok(());
        };
        let state = parts.engine.as_ref().map(EngineHandle::state);
        if let Some(EngineState::Failed(what)) = state {
            return Err(format!("the engine died: {what}"));
        }
        let leaving = parts.wanted.borrow().member.phase == Phase::Draining;
        if !leaving && !parts.server.is_alive() {
            return Err("the experts' thread died".to_owned());
        }
        Ok(())
    }

    /// Whether requests may be sent here.
    ///
    /// # Errors
    /// The reason why not.
    pub fn ready(&self) -> Result<(), String> {
        self.alive()?;
        let parts = self.parts.load();
        let Some(parts) = parts.as_ref() else {
            return Err("loading the model".to_owned());
        };
        match parts.wanted.borrow().member.phase {
            Phase::Joining => Err("waiting for a placement and its experts".to_owned()),
            Phase::Ready => Ok(()),
            Phase::Draining => Err("draining".to_owned()),
        }
    }
}
