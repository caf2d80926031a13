//! Whether every expert of the placement in force is held by somebody who is alive, at every state of the store.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::thread::JoinHandle;

use foregate_harness::cluster::{Cluster, ROLLOUT, awaited};
use foregate_store::{ClusterState, Coord, EtcdStore};
use tokio_util::sync::CancellationToken;

use crate::site::Site;

/// What has been seen so far.
#[derive(Debug, Default, Clone)]
pub(crate) struct Seen {
    /// Numbers of the placements that were in force.
    pub(crate) epochs: BTreeSet<u64>,
    /// States in which an expert had nobody.
    pub(crate) bare: Vec<String>,
    /// States in all.
    pub(crate) states: usize,
}

/// Somebody who watches the store beside the test.
#[derive(Debug)]
pub(crate) struct Watcher {
    stop: CancellationToken,
    seen: Arc<Mutex<Seen>>,
    thread: JoinHandle<()>,
}

impl Watcher {
    /// Watches a cluster that serves.
    pub(crate) fn start(site: &Site) -> Self {
        let (stop, seen) = (CancellationToken::new(), Arc::<Mutex<Seen>>::default());
        let cluster: &'static Cluster = site.cluster;
        let (url, name) = (site.store(), site.store_name());
        let (stopped, told) = (stop.clone(), Arc::clone(&seen));
        let thread = std::thread::spawn(move || {
            cluster.in_network(|| {
                let mut builder = tokio::runtime::Builder::new_current_thread();
                let runtime = builder.enable_all().build().unwrap();
                runtime.block_on(follow(&url, &name, &told, stopped));
            });
        });
        let watcher = Self { stop, seen, thread };
        awaited("the placement in the store", ROLLOUT, || {
            let seen = watcher.seen.lock().unwrap();
            (!seen.epochs.is_empty())
                .then_some(())
                .ok_or_else(|| format!("{seen:?}"))
        });
        watcher
    }

    /// Stops and returns what was seen.
    pub(crate) fn stop(self) -> Seen {
        self.stop.cancel();
        self.thread.join().unwrap();
        let seen = self.seen.lock().unwrap();
        seen.clone()
    }
}

async fn follow(url: &str, name: &str, told: &Mutex<Seen>, stop: CancellationToken) {
    let store = EtcdStore::connect(&[url]).await.unwrap();
    let mut states = Coord::new(Arc::new(store), name).watch_cluster(stop.clone());
    loop {
        {
            let state = states.borrow_and_update();
            look(&state, &mut told.lock().unwrap());
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = states.changed() => changed.unwrap(),
        }
    }
}

fn look(state: &ClusterState, seen: &mut Seen) {
    let Some((plan, _)) = &state.active else {
        return;
    };
    seen.states += 1;
    let _new = seen.epochs.insert(plan.epoch.0);
    for (number, layer) in plan.layers.iter().enumerate() {
        for (expert, copies) in layer.copies.iter().enumerate() {
            let held = copies.iter().any(|copy| {
                let ack = state.acks.get(&copy.rank);
                state.members.contains_key(&copy.rank)
                    && ack.is_some_and(|ack| ack.prepared >= plan.epoch)
            });
            if !held {
                let members: Vec<_> = state.members.keys().collect();
                seen.bare.push(format!(
                    "epoch {}, layer {number}: expert {expert} on {copies:?}, alive {members:?}, acks {:?}",
                    plan.epoch, state.acks
                ));
            }
        }
    }
}
