//! Which of several operators writes: a Lease of the API server.
//!
//! The clocks of two machines are never compared: a lease counts as run out when it has not changed for its own duration on
//! the clock of who looks, which is how Kubernetes' own components do it.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt as _};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::build::MANAGER;

/// How long a leader may be silent before another takes over.
const DURATION: Duration = Duration::from_secs(15);
/// How long a leader goes on without having renewed: less, so that it has stopped by then.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Pause between two attempts.
const RETRY: Duration = Duration::from_secs(2);

/// A Lease that is stood for.
#[derive(Debug, Clone)]
pub(crate) struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
    owner: Option<OwnerReference>,
    now: fn() -> MicroTime,
}

impl Election {
    /// `identity` tells this process from the others; a pod's name does. The lease goes with its `owner`.
    pub(crate) fn new(
        client: Client,
        namespace: &str,
        name: &str,
        identity: String,
        owner: Option<OwnerReference>,
        now: fn() -> MicroTime,
    ) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            name: name.to_owned(),
            identity,
            owner,
            now,
        }
    }

    /// Stands until elected; false at shutdown.
    pub(crate) async fn won(&self, shutdown: &CancellationToken) -> bool {
        let mut seen: Option<(Option<String>, Instant)> = None;
        loop {
            match self.attempt(&mut seen).await {
                Ok(true) => return true,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "election failed; it is tried again"),
            }
            tokio::select! {
                () = shutdown.cancelled() => return false,
                () = sleep(RETRY) => {}
            }
        }
    }

    /// Renews the lease; resolves when it is lost.
    pub(crate) async fn lost(&self) {
        let mut renewed = Instant::now();
        loop {
            sleep(RETRY).await;
            match timeout(RETRY, self.renew()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => return,
                Ok(Err(error)) => tracing::warn!(%error, "the lease was not renewed"),
                Err(_) => tracing::warn!("the lease was not renewed in time"),
            }
            if renewed.elapsed() > RENEW_DEADLINE {
                return;
            }
        }
    }

    /// Gives the lead back, so that a successor need not wait.
    pub(crate) async fn resign(&self) {
        let free = async {
            let mut lease = self.api.get(&self.name).await?;
            if self.holds(&lease) {
                let spec = lease.spec.get_or_insert_default();
                spec.holder_identity = Some(String::new());
                self.api.replace(&self.name, &params(), &lease).await?;
            }
            Ok::<(), kube::Error>(())
        };
        if !matches!(timeout(RETRY, free).await, Ok(Ok(()))) {
            tracing::debug!("resignation failed; the lease will run out");
        }
    }

    fn holds(&self, lease: &Lease) -> bool {
        holder(lease) == Some(self.identity.as_str())
    }

    /// One look: takes the lease if it is free, ours or run out.
    async fn attempt(
        &self,
        seen: &mut Option<(Option<String>, Instant)>,
    ) -> Result<bool, kube::Error> {
        let Some(lease) = self.api.get_opt(&self.name).await? else {
            let lease = self.lease(None);
            return taken(self.api.create(&params(), &lease).await);
        };
        let version = lease.resource_version();
        let since = match seen {
            Some((known, since)) if *known == version => *since,
            _ => {
                let now = Instant::now();
                *seen = Some((version, now));
                now
            }
        };
        let free = holder(&lease).is_none_or(str::is_empty);
        if !free && !self.holds(&lease) && since.elapsed() < duration(&lease) {
            return Ok(false);
        }
        let own = self.lease(Some(&lease));
        taken(self.api.replace(&self.name, &params(), &own).await)
    }

    async fn renew(&self) -> Result<bool, kube::Error> {
        let Some(lease) = self.api.get_opt(&self.name).await? else {
            return Ok(false);
        };
        if !self.holds(&lease) {
            return Ok(false);
        }
        let own = self.lease(Some(&lease));
        taken(self.api.replace(&self.name, &params(), &own).await)
    }

    /// The lease as ours, over the one that was read: the API server refuses it if somebody wrote since.
    fn lease(&self, over: Option<&Lease>) -> Lease {
        let before = over.and_then(|lease| lease.spec.as_ref());
        let held = over.is_some_and(|lease| self.holds(lease));
        let count = before
            .and_then(|spec| spec.lease_transitions)
            .unwrap_or_default();
        Lease {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                resource_version: over.and_then(kube::ResourceExt::resource_version),
                owner_references: self.owner.clone().map(|owner| vec![owner]),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
                acquire_time: match before.filter(|_| held) {
                    Some(spec) => spec.acquire_time.clone(),
                    None => Some((self.now)()),
                },
                renew_time: Some((self.now)()),
                lease_transitions: Some(if held { count } else { count.saturating_add(1) }),
                ..LeaseSpec::default()
            }),
        }
    }
}

fn params() -> PostParams {
    PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    }
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref()
}

fn duration(lease: &Lease) -> Duration {
    let seconds = lease
        .spec
        .as_ref()
        .and_then(|spec| spec.lease_duration_seconds);
    seconds
        .and_then(|s| u64::try_from(s).ok())
        .map_or(DURATION, Duration::from_secs)
}

/// Somebody who was faster is no error.
fn taken(written: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(error)) if error.is_conflict() || error.is_already_exists() => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}
