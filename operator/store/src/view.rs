//! Events of a watch folded into one [`ClusterState`]. Pure: the time is an argument.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::load::LoadWindow;
use foregate_api::member::Member;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::codec;
use crate::keys::{Keys, Subject};
use crate::kv::{Entry, StoreError, WatchEvent};
use crate::state::{ClusterState, GATEWAYS};

/// How long a member that is missing after a gap is believed to be on its way back.
pub(crate) const GRACE: Duration = Duration::from_secs(5);

/// The value under the leader's key: the lease tells two processes of one name apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Leader {
    pub(crate) name: String,
    pub(crate) lease: i64,
}

/// The fold's state.
#[derive(Debug)]
pub(crate) struct View {
    keys: Keys,
    state: ClusterState,
    /// Members that a snapshot after a gap did not have, with the moment they are given up.
    missing: BTreeMap<Rank, Instant>,
    /// A snapshot was seen, so the next one follows a gap.
    begun: bool,
}

impl View {
    pub(crate) fn new(keys: Keys) -> Self {
        Self {
            keys,
            state: ClusterState::default(),
            missing: BTreeMap::new(),
            begun: false,
        }
    }

    pub(crate) const fn state(&self) -> &ClusterState {
        &self.state
    }

    /// When [`Self::give_up`] has something to do next.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.missing.values().min().copied()
    }

    /// Takes in one event.
    pub(crate) fn apply(&mut self, event: WatchEvent, now: Instant) {
        match event {
            WatchEvent::Disconnected => self.state.connected = false,
            WatchEvent::Snapshot(entries) => self.replace(&entries, now),
            WatchEvent::Put(key, entry) => self.put(&key, &entry),
            WatchEvent::Delete(key) => self.delete(&key),
        }
    }

    /// Gives up the members that did not come back in time. True if any.
    pub(crate) fn give_up(&mut self, now: Instant) -> bool {
        let over: Vec<Rank> = self
            .missing
            .iter()
            .filter(|(_, until)| **until <= now)
            .map(|(rank, _)| *rank)
            .collect();
        for rank in &over {
            tracing::warn!(
                rank = rank.0,
                "worker did not come back after the store's gap"
            );
            self.forget(*rank);
        }
        !over.is_empty()
    }

    fn replace(&mut self, entries: &BTreeMap<String, Entry>, now: Instant) {
        let old = std::mem::replace(
            &mut self.state,
            ClusterState {
                connected: true,
                ..ClusterState::default()
            },
        );
        let waiting = std::mem::take(&mut self.missing);
        for (key, entry) in entries {
            self.put(key, entry);
        }
        // A placement that cannot be read any more does not undo the one that is known.
        if self.state.target.is_none() && entries.contains_key(&self.keys.target()) {
            self.state.target.clone_from(&old.target);
        }
        if self.state.active.is_none() && entries.contains_key(&self.keys.active()) {
            self.state.active.clone_from(&old.active);
        }
        if std::mem::replace(&mut self.begun, true) {
            self.keep_missing(&old, &waiting, now);
        }
    }

    /// A gap says nothing about who is there: who was there stays for the grace period.
    fn keep_missing(
        &mut self,
        old: &ClusterState,
        waiting: &BTreeMap<Rank, Instant>,
        now: Instant,
    ) {
        for (rank, member) in &old.members {
            if self.state.members.contains_key(rank) {
                continue;
            }
            self.missing
                .insert(*rank, waiting.get(rank).copied().unwrap_or(now + GRACE));
            self.state.members.insert(*rank, Arc::clone(member));
            if let Some(load) = old.loads.get(rank) {
                self.state
                    .loads
                    .entry(*rank)
                    .or_insert_with(|| Arc::clone(load));
            }
            if let Some(ack) = old.acks.get(rank) {
                self.state.acks.entry(*rank).or_insert(*ack);
            }
        }
    }

    fn put(&mut self, key: &str, entry: &Entry) {
        let Some(subject) = self.keys.subject(key) else {
            return;
        };
        if let Err(error) = self.try_put(subject, key, entry) {
            tracing::warn!(%error, "value skipped");
            let replaceable = !codec::is_of_another_format(&entry.value);
            self.set_unreadable(subject, replaceable.then_some(entry.revision));
        } else {
            self.set_unreadable(subject, None);
        }
    }

    const fn set_unreadable(&mut self, subject: Subject, revision: Option<u64>) {
        match subject {
            Subject::Target => self.state.target_unreadable = revision,
            Subject::Active => self.state.active_unreadable = revision,
            Subject::Member(_)
            | Subject::Load(_)
            | Subject::Forecast(_)
            | Subject::Ack(_)
            | Subject::Leader => {}
        }
    }

    fn try_put(
        &mut self,
        subject: Subject,
        key: &str,
        entry: &Entry,
    ) -> Result<(), StoreError> {
        let bytes = entry.value.as_ref();
        match subject {
            Subject::Member(rank) => {
                let member = codec::decode_member(key, bytes)?;
                same_rank(key, rank, member.rank)?;
                self.put_member(rank, member);
            }
            Subject::Load(rank) => {
                let load: LoadWindow = codec::decode(key, bytes)?;
                same_rank(key, rank, load.rank)?;
                self.state.loads.insert(rank, Arc::new(load));
            }
            Subject::Forecast(gateway) => {
                let forecast = codec::decode_forecast(key, bytes)?;
                let forecasts = &mut self.state.forecasts;
                if forecasts.len() < GATEWAYS || forecasts.contains_key(&gateway) {
                    forecasts.insert(gateway, Arc::new(forecast));
                }
            }
            Subject::Ack(rank) => {
                let ack = codec::decode_ack(key, bytes)?;
                self.state.acks.insert(rank, ack);
            }
            Subject::Target => {
                let plan = codec::decode_placement(key, bytes)?;
                self.state.target = Some((Arc::new(plan), entry.revision));
            }
            Subject::Active => {
                let plan = codec::decode_placement(key, bytes)?;
                self.state.active = Some((Arc::new(plan), entry.revision));
            }
            Subject::Leader => {
                let leader: Leader = codec::decode(key, bytes)?;
                self.state.leader = Some(leader.name);
            }
        }
        Ok(())
    }

    fn put_member(&mut self, rank: Rank, member: Member) {
        if self.missing.remove(&rank).is_some() {
            let same = self
                .state
                .members
                .get(&rank)
                .is_some_and(|old| old.incarnation == member.incarnation);
            if !same {
                // What the process before it had prepared died with it.
                self.forget(rank);
            }
        }
        self.state.members.insert(rank, Arc::new(member));
    }

    fn delete(&mut self, key: &str) {
        let subject = self.keys.subject(key);
        if let Some(subject) = subject {
            self.set_unreadable(subject, None);
        }
        match subject {
            None => {}
            Some(Subject::Member(rank)) => {
                self.missing.remove(&rank);
                self.state.members.remove(&rank);
            }
            Some(Subject::Load(rank)) => {
                self.state.loads.remove(&rank);
            }
            Some(Subject::Forecast(gateway)) => {
                self.state.forecasts.remove(&gateway);
            }
            Some(Subject::Ack(rank)) => {
                self.state.acks.remove(&rank);
            }
            Some(Subject::Target) => self.state.target = None,
            Some(Subject::Active) => self.state.active = None,
            Some(Subject::Leader) => self.state.leader = None,
        }
    }

    fn forget(&mut self, rank: Rank) {
        self.missing.remove(&rank);
        self.state.members.remove(&rank);
        self.state.loads.remove(&rank);
        self.state.acks.remove(&rank);
    }
}

fn same_rank(key: &str, of_key: Rank, of_value: Rank) -> Result<(), StoreError> {
    if of_key == of_value {
        return Ok(());
    }
    Err(StoreError::Corrupt {
        key: key.to_owned(),
        what: format!("the value is rank {of_value}'s"),
    })
}
