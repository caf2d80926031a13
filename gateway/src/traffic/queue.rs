//! The queue itself: places, order, and who goes when there are too many.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::{Needs, Refusal, Tenant, Tokens};

/// One grant in so many goes to the oldest request, if it is old.
pub const AGED_TURN: u32 = 8;

/// A request that waits.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    pub(super) tenant: Tenant,
    pub(super) priority: i64,
    pub(super) sequences: u32,
    pub(super) expected: Tokens,
    pub(super) arrived: Duration,
    /// When it must run at the latest, and what it hears after that.
    pub(super) latest: Duration,
    pub(super) over: Refusal,
    pub(super) needs: Needs,
}

/// Requests of one priority, by tenant, in the order of their latest start.
type Band = BTreeMap<Tenant, BTreeSet<(Duration, u64)>>;

#[derive(Debug)]
pub(super) struct Queue {
    slots: u32,
    free: u32,
    capacity: usize,
    age: Duration,
    next: u64,
    /// By number, which is the order of arrival.
    waiting: BTreeMap<u64, Waiting>,
    bands: BTreeMap<i64, Band>,
    /// Grants since an old request had its turn.
    since_aged: u32,
}

impl Queue {
    pub(super) fn new(slots: u32, capacity: u32, age: Duration) -> Self {
        let slots = slots.max(1);
        Self {
            slots,
            free: slots,
            capacity: capacity as usize,
            age,
            next: 0,
            waiting: BTreeMap::new(),
            bands: BTreeMap::new(),
            since_aged: 0,
        }
    }

    pub(super) const fn slots(&self) -> u32 {
        self.slots
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether anything runs.
    pub(super) const fn busy(&self) -> bool {
        self.free < self.slots
    }

    /// Places for a request that wants so many.
    pub(super) fn fitting(&self, sequences: u32) -> u32 {
        sequences.clamp(1, self.slots)
    }

    pub(super) fn get(&self, id: u64) -> Option<&Waiting> {
        self.waiting.get(&id)
    }

    /// Takes a request in, and says who must go for it: nobody, the last one of the worst, or itself.
    /// The caller removes whom it names.
    pub(super) fn push(
        &mut self,
        waiting: Waiting,
        weight: impl Fn(&Tenant) -> u32,
    ) -> (u64, Option<u64>) {
        let id = self.next;
        self.next += 1;
        let at_once = self.waiting.is_empty() && self.free >= waiting.sequences;
        let full = !at_once && self.waiting.len() >= self.capacity;
        self.bands
            .entry(waiting.priority)
            .or_default()
            .entry(Arc::clone(&waiting.tenant))
            .or_default()
            .insert((waiting.latest, id));
        self.waiting.insert(id, waiting);
        (id, if full { self.worst(weight) } else { None })
    }

    /// Of the highest priority number the tenant with most waiting for its weight, and of that who may wait longest.
    fn worst(&self, weight: impl Fn(&Tenant) -> u32) -> Option<u64> {
        let (_, band) = self.bands.last_key_value()?;
        let length = |tenant: &Tenant, queue: &BTreeSet<_>| {
            (queue.len() as u64 * 1_000_000) / u64::from(weight(tenant).max(1))
        };
        let (_, queue) = band
            .iter()
            .max_by_key(|(tenant, queue)| length(tenant, queue))?;
        queue.last().map(|(_, id)| *id)
    }

    /// Who goes next; `None` if nobody waits or there is no room for the one whose turn it is.
    pub(super) fn pick(&self, now: Duration, tag: impl Fn(&Tenant) -> u64) -> Option<u64> {
        let (oldest, waiting) = self.waiting.first_key_value()?;
        let id = if self.aged_turn(waiting, now) {
            *oldest
        } else {
            let (_, band) = self.bands.first_key_value()?;
            let (_, queue) = band.iter().min_by_key(|(tenant, _)| tag(tenant))?;
            queue.first()?.1
        };
        // Nobody overtakes one that needs more places than are free: it would wait for ever.
        (self.waiting.get(&id)?.sequences <= self.free).then_some(id)
    }

    fn aged_turn(&self, oldest: &Waiting, now: Duration) -> bool {
        self.since_aged + 1 >= AGED_TURN && now.saturating_sub(oldest.arrived) >= self.age
    }

    /// Takes out a request that runs from now on.
    pub(super) fn grant(&mut self, id: u64, now: Duration) -> Option<Waiting> {
        let aged = self
            .waiting
            .first_key_value()
            .is_some_and(|(oldest, waiting)| *oldest == id && self.aged_turn(waiting, now));
        let waiting = self.remove(id)?;
        self.since_aged = if aged {
            0
        } else {
            self.since_aged.saturating_add(1)
        };
        self.free = self.free.saturating_sub(waiting.sequences);
        Some(waiting)
    }

    pub(super) fn remove(&mut self, id: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&id)?;
        if let Some(band) = self.bands.get_mut(&waiting.priority) {
            if let Some(queue) = band.get_mut(&waiting.tenant) {
                queue.remove(&(waiting.latest, id));
                if queue.is_empty() {
                    band.remove(&waiting.tenant);
                }
            }
            if band.is_empty() {
                self.bands.remove(&waiting.priority);
            }
        }
        Some(waiting)
    }

    pub(super) fn free(&mut self, sequences: u32) {
        self.free = self.free.saturating_add(sequences).min(self.slots);
    }

    /// Requests that go before such a one whatever comes later: more urgent ones, and its own tenant's earlier ones.
    pub(super) fn ahead(&self, tenant: &Tenant, priority: i64, latest: Duration) -> usize {
        let urgent = self.bands.range(..priority);
        let urgent: usize = urgent
            .flat_map(|(_, band)| band.values())
            .map(BTreeSet::len)
            .sum();
        let own = self.bands.get(&priority).and_then(|band| band.get(tenant));
        urgent + own.map_or(0, |queue| queue.range(..(latest, 0)).count())
    }
}
