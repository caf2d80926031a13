//! What runs in this process for each cluster: its balancer, its view of the store, its canary.
//!
//! The controller tells what a cluster is to be like ([`Clusters::ensure`]) and looks at what is seen of it. When
//! something changes that a status shows, the controller is woken.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foregate_api::ids::{Epoch, Rank};
use foregate_api::member::{Ack, Phase};
use foregate_api::node::OperatorConfig;
use foregate_api::placement::Placement;
use foregate_store::{Archive, ClusterState, Coord, Store};
use futures::future::BoxFuture;
use prometheus::Registry;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::build::Owner;
use crate::secrets::ApiKey;
use crate::status::Verdict;

/// How often a token is asked for.
const CANARY: Duration = Duration::from_secs(15);
/// How long it may take.
const CANARY_DEADLINE: Duration = Duration::from_secs(10);
/// Wake-ups that may wait: each is for all clusters, so one is enough.
pub(crate) const WAKE_UPS: usize = 1;

/// Asks a gateway for one token.
pub trait Canary: Send + Sync + std::fmt::Debug {
    /// Whether a token of `model` came from the API at `url`, which may want a key.
    ///
    /// # Errors
    /// Why none came, in words.
    fn token<'a>(
        &'a self,
        url: &'a str,
        model: &'a str,
        api_key: Option<&'a str>,
    ) -> BoxFuture<'a, Result<(), String>>;
}

/// Where a canary is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    /// URL of the gateways' Service.
    pub(crate) url: String,
    /// Name of the model.
    pub(crate) model: String,
    /// What the gateway is shown.
    pub(crate) api_key: Option<ApiKey>,
}

/// What is seen of a cluster.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) state: Arc<ClusterState>,
    pub(crate) verdict: Verdict,
    /// Whether this process has seen the store and, where there is a gateway, had an answer; or has waited long enough.
    pub(crate) informed: bool,
    moved: Option<(Epoch, usize)>,
}

impl View {
    /// Copies that were loaded to come to a placement, if its parent was seen too.
    pub(crate) fn moved(&self, epoch: Epoch) -> Option<usize> {
        self.moved
            .filter(|(of, _)| *of == epoch)
            .map(|(_, copies)| copies)
    }
}

#[derive(Debug)]
struct Running {
    name: String,
    settings: watch::Sender<OperatorConfig>,
    address: watch::Sender<Option<Address>>,
    states: watch::Receiver<Arc<ClusterState>>,
    verdicts: watch::Receiver<Verdict>,
    moves: watch::Receiver<Option<(Epoch, usize)>>,
    shutdown: CancellationToken,
    registry: Registry,
    begun: Instant,
}

impl Running {
    fn view(&self) -> View {
        let state = Arc::clone(&self.states.borrow());
        let verdict = self.verdicts.borrow().clone();
        let asking = self.address.borrow().is_some() && verdict == Verdict::Pending;
        View {
            informed: state.connected && !asking || self.begun.elapsed() > CANARY,
            state,
            verdict,
            moved: *self.moves.borrow(),
        }
    }
}

/// All clusters of this process.
#[derive(Debug, Clone)]
pub(crate) struct Clusters {
    store: Arc<dyn Store>,
    canary: Arc<dyn Canary>,
    wake: mpsc::Sender<()>,
    tasks: TaskTracker,
    running: Arc<Mutex<BTreeMap<String, Running>>>,
}

impl Clusters {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        canary: Arc<dyn Canary>,
        wake: mpsc::Sender<()>,
    ) -> Self {
        Self {
            store,
            canary,
            wake,
            tasks: TaskTracker::new(),
            running: Arc::default(),
        }
    }

    /// Starts what is not running for a cluster, and tells it its settings. `address` is `None` while there is no gateway.
    pub(crate) fn ensure(
        &self,
        owner: &Owner,
        settings: OperatorConfig,
        address: Option<Address>,
    ) -> View {
        let mut running = self.lock();
        let cluster = running
            .entry(owner.uid.clone())
            .or_insert_with(|| self.start(owner, settings.clone()));
        changed(&cluster.settings, settings);
        changed(&cluster.address, address);
        cluster.view()
    }

    /// What is kept of a cluster's past.
    pub(crate) fn archive(&self, owner: &Owner) -> Archive {
        Archive::new(Arc::clone(&self.store), &owner.store_name())
    }

    /// What is seen of a cluster, if anything runs for it.
    pub(crate) fn look(&self, owner: &Owner) -> Option<View> {
        self.lock().get(&owner.uid).map(Running::view)
    }

    /// Stops what runs for clusters that are not in `known` by their uid; gives their names in the store.
    pub(crate) fn retain(&self, known: &dyn Fn(&str) -> bool) -> Vec<String> {
        let mut stopped = Vec::new();
        self.lock().retain(|uid, cluster| {
            let stays = known(uid);
            if !stays {
                cluster.shutdown.cancel();
                stopped.push(cluster.name.clone());
            }
            stays
        });
        stopped
    }

    /// Stops everything and waits for it.
    pub(crate) async fn stop(&self) {
        self.retain(&|_| false);
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn start(&self, owner: &Owner, settings: OperatorConfig) -> Running {
        let name = owner.store_name();
        let shutdown = CancellationToken::new();
        let (settings, settings_there) = watch::channel(settings);
        let (address, address_there) = watch::channel(None);
        let (verdict, verdicts) = watch::channel(Verdict::Pending);
        let labels = [("namespace", &owner.namespace), ("cluster", &owner.name)];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.clone()));
        let registry = Registry::new_custom(None, Some(labels.into_iter().collect()))
            .unwrap_or_else(|_| Registry::new());
        let deps = crate::Deps {
            cluster: name.clone(),
            config: settings_there,
            store: Arc::clone(&self.store),
            registry: registry.clone(),
            shutdown: shutdown.clone(),
        };
        let cluster = name.clone();
        self.tasks.spawn(async move {
            if let Err(error) = crate::run(deps).await {
                tracing::error!(%cluster, %error, "the balancer ended");
            }
        });
        let coord = Coord::new(Arc::clone(&self.store), &name);
        let states = coord.watch_cluster(shutdown.clone());
        let (moved, moves) = watch::channel(None);
        let follower = Follower {
            states: states.clone(),
            verdicts: verdicts.clone(),
            moved,
            wake: self.wake.clone(),
        };
        self.tasks.spawn(follower.run(shutdown.clone()));
        let canary = Arc::clone(&self.canary);
        self.tasks
            .spawn(ask(canary, address_there, verdict, shutdown.clone()));
        Running {
            name,
            settings,
            address,
            states,
            verdicts,
            moves,
            shutdown,
            registry,
            begun: Instant::now(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn changed<T: PartialEq>(sender: &watch::Sender<T>, value: T) {
    sender.send_if_modified(|now| {
        let differs = *now != value;
        if differs {
            *now = value;
        }
        differs
    });
}

/// Metrics of all balancers, each with the labels of its cluster.
impl Collector for Clusters {
    fn desc(&self) -> Vec<&Desc> {
        Vec::new()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.lock()
            .values()
            .flat_map(|cluster| cluster.registry.gather())
            .collect()
    }
}

/// What of a state a status shows: all but loads.
type Shape = (
    bool,
    Vec<(Rank, Phase)>,
    BTreeMap<Rank, Ack>,
    [Option<Epoch>; 2],
);

fn shape(state: &ClusterState) -> Shape {
    let members = state
        .members
        .iter()
        .map(|(rank, member)| (*rank, member.phase));
    let epochs = [&state.target, &state.active].map(|plan| plan.as_ref().map(|(p, _)| p.epoch));
    (
        state.connected,
        members.collect(),
        state.acks.clone(),
        epochs,
    )
}

/// Wakes the controller when something changes that its status shows.
struct Follower {
    states: watch::Receiver<Arc<ClusterState>>,
    verdicts: watch::Receiver<Verdict>,
    moved: watch::Sender<Option<(Epoch, usize)>>,
    wake: mpsc::Sender<()>,
}

impl Follower {
    async fn run(mut self, shutdown: CancellationToken) {
        let mut last = None;
        let mut active: Option<Arc<Placement>> = None;
        loop {
            let state = Arc::clone(&self.states.borrow_and_update());
            self.count(&state, &mut active);
            let now = (shape(&state), self.verdicts.borrow_and_update().clone());
            if last.as_ref() != Some(&now) {
                if last.is_some() {
                    // A full queue: somebody has just asked for the same.
                    let _asked = self.wake.try_send(());
                }
                last = Some(now);
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = self.states.changed() => if changed.is_err() { return },
                changed = self.verdicts.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Counts what a new placement moved, if the one before is its parent.
    fn count(&self, state: &ClusterState, before: &mut Option<Arc<Placement>>) {
        let Some((plan, _)) = &state.active else {
            return;
        };
        if before
            .as_ref()
            .is_some_and(|before| before.epoch == plan.epoch)
        {
            return;
        }
        let parent = before
            .as_deref()
            .filter(|before| before.epoch == plan.parent);
        let first = plan.parent == Epoch(0);
        self.moved.send_replace(
            (first || parent.is_some()).then(|| (plan.epoch, plan.copies_moved(parent))),
        );
        *before = Some(Arc::clone(plan));
    }
}

/// Asks for a token again and again, as long as there is somebody to ask.
async fn ask(
    canary: Arc<dyn Canary>,
    mut address: watch::Receiver<Option<Address>>,
    verdict: watch::Sender<Verdict>,
    shutdown: CancellationToken,
) {
    let mut ticks = interval(CANARY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
            changed = address.changed() => if changed.is_err() { return },
        }
        let to = address.borrow_and_update().clone();
        let said = match &to {
            None => Verdict::Pending,
            Some(Address {
                url,
                model,
                api_key,
            }) => {
                let api_key = api_key.as_ref().map(|key| key.0.as_str());
                let asked = timeout(CANARY_DEADLINE, canary.token(url, model, api_key));
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    answer = asked => match answer {
                        Ok(Ok(())) => Verdict::Answered,
                        Ok(Err(why)) => Verdict::Failed(why),
                        Err(_) => Verdict::Failed(format!("no token within {} s", CANARY_DEADLINE.as_secs())),
                    }
                }
            }
        };
        changed(&verdict, said);
        if !matches!(*verdict.borrow(), Verdict::Answered) && to.is_some() {
            // What does not answer yet is asked again soon.
            ticks.reset_after(CANARY / 5);
        }
    }
}
