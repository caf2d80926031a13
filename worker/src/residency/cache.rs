//! Which experts stay in the spare slots of a worker whose experts do not all fit: one cache per layer.
//!
//! The placement's copies are *pinned* underneath every policy. On a miss with a full cache the policy names a victim;
//! a member of the current step is never evicted, and a step that alone is larger than the cache streams through.
//! Pure: the caller loads what [`Cache::step`] says.

use foregate_api::ids::ExpertId;

/// Which expert is evicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Policy {
    /// The one whose last use is longest ago (LRU).
    LeastRecent,
    /// The one with the least use, each use fading by `decay` per step: nothing is known but the past.
    Recent {
        /// What a use still weighs a step later.
        decay: f64,
    },
    /// The one of least value, `share·q + (1 − share)(1 − decay)·Σ decay^age`, with q the demand that the signatures
    /// of the active requests foretell.
    Signature {
        /// Weight of the demand, from 0 to 1.
        share: f64,
        /// What a use still weighs a step later.
        decay: f64,
    },
    /// One that no use is foreseen of within `steps`, of those the least recent; else the one used furthest ahead.
    /// With all of the future known that is Belady's (1966).
    Ahead {
        /// How far the outlook is believed.
        steps: u32,
    },
}

/// What is known of coming steps, per expert.
#[derive(Debug, Clone, Copy)]
pub enum Outlook<'a> {
    /// Nothing.
    Unknown,
    /// Expected uses per step.
    Demand(&'a [f64]),
    /// Steps until the next foreseen use.
    Next(&'a [Option<u32>]),
}

/// What a step did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Loaded {
    /// Uses of experts that were there.
    pub hits: u32,
    /// Experts to load, each with the one that leaves for it; `None`: a slot was free.
    pub stored: Vec<(ExpertId, Option<ExpertId>)>,
    /// Experts to load for this step only.
    pub streamed: Vec<ExpertId>,
}

/// The cache of one layer.
#[derive(Debug, Clone)]
pub struct Cache {
    policy: Policy,
    capacity: usize,
    experts: Vec<Entry>,
    size: usize,
    now: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    here: bool,
    pinned: bool,
    in_step: bool,
    last: u64,
    /// Faded uses as of `last`.
    uses: f64,
}

impl Cache {
    /// An empty cache of `capacity` slots over `experts` experts; `pinned` ones are there for good and take none.
    #[must_use]
    pub fn new(policy: Policy, experts: usize, capacity: usize, pinned: &[ExpertId]) -> Self {
        let mut entries = vec![Entry::default(); experts];
        for expert in pinned {
            if let Some(entry) = entries.get_mut(expert.index()) {
                *entry = Entry {
                    here: true,
                    pinned: true,
                    ..Entry::default()
                };
            }
        }
        Self {
            policy,
            capacity,
            experts: entries,
            size: 0,
            now: 0,
        }
    }

    /// Whether an expert is there.
    #[must_use]
    pub fn has(&self, expert: ExpertId) -> bool {
        self.experts
            .get(expert.index())
            .is_some_and(|entry| entry.here)
    }

    /// A step uses `used`, each expert once. Experts beyond the number of this cache are ignored.
    pub fn step(&mut self, used: &[ExpertId], outlook: Outlook<'_>) -> Loaded {
        self.now += 1;
        let mut done = Loaded::default();
        let members = || used.iter().map(|expert| expert.index());
        for at in members() {
            if let Some(entry) = self.experts.get_mut(at) {
                entry.in_step = true;
            }
        }
        for expert in used {
            self.touch(*expert, outlook, &mut done);
        }
        for at in members() {
            if let Some(entry) = self.experts.get_mut(at) {
                entry.in_step = false;
            }
        }
        done
    }

    fn touch(&mut self, expert: ExpertId, outlook: Outlook<'_>, done: &mut Loaded) {
        let (now, decay) = (self.now, self.decay());
        let Some(entry) = self.experts.get_mut(expert.index()) else {
            return;
        };
        entry.uses = entry.faded(now, decay) + 1.0;
        entry.last = now;
        if entry.here {
            done.hits += 1;
            return;
        }
        let victim = if self.size < self.capacity {
            None
        } else {
            self.victim(outlook)
        };
        if self.size >= self.capacity && victim.is_none() {
            done.streamed.push(expert);
            return;
        }
        if let Some(victim) = victim {
            self.experts[victim].here = false;
            self.size -= 1;
        }
        self.experts[expert.index()].here = true;
        self.size += 1;
        done.stored
            .push((expert, victim.map(|at| ExpertId(at as u32))));
    }

    const fn decay(&self) -> f64 {
        match self.policy {
            Policy::Recent { decay } | Policy::Signature { decay, .. } => decay,
            Policy::LeastRecent | Policy::Ahead { .. } => 1.0,
        }
    }

    /// The expert that is missed least; the lowest number among equals.
    fn victim(&self, outlook: Outlook<'_>) -> Option<usize> {
        let may_go = |entry: &Entry| entry.here && !entry.pinned && !entry.in_step;
        let open = self
            .experts
            .iter()
            .enumerate()
            .filter(|(_, entry)| may_go(entry));
        let valued = open.map(|(at, entry)| (self.value(at, entry, outlook), at));
        valued
            .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))
            .map(|(_, at)| at)
    }

    fn value(&self, at: usize, entry: &Entry, outlook: Outlook<'_>) -> f64 {
        let age = (self.now - entry.last) as f64;
        match (self.policy, outlook) {
            (Policy::Recent { decay }, _) => entry.faded(self.now, decay),
            (Policy::Signature { share, decay }, Outlook::Demand(demand)) => {
                let demand = demand.get(at).copied().unwrap_or(0.0);
                let recent = (1.0 - decay) * entry.faded(self.now, decay);
                share.mul_add(demand, (1.0 - share) * recent)
            }
            (Policy::Signature { decay, .. }, _) => entry.faded(self.now, decay),
            (Policy::Ahead { steps }, Outlook::Next(next)) => {
                let seen = next
                    .get(at)
                    .copied()
                    .flatten()
                    .filter(|next| *next <= steps);
                // Unseen ones go first, whatever their age.
                seen.map_or(-1e12 - age, |next| -f64::from(next))
            }
            (Policy::LeastRecent | Policy::Ahead { .. }, _) => -age,
        }
    }
}

impl Entry {
    fn faded(&self, now: u64, decay: f64) -> f64 {
        self.uses * decay.powf((now - self.last) as f64)
    }
}

#[cfg(test)]
mod tests;
