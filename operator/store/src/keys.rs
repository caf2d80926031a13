//! Every key of a cluster, once.

use foregate_api::ids::{Epoch, Rank};

/// Keys of one cluster: `/foregate/<cluster>/…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    root: String,
    past: String,
}

impl Keys {
    /// Keys of the cluster of this name.
    #[must_use]
    pub fn new(cluster: &str) -> Self {
        Self {
            root: format!("/foregate/{cluster}/"),
            past: format!("/foregate-past/{cluster}/"),
        }
    }

    /// Prefix of everything.
    #[must_use]
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Prefix of what is kept of the past. It is outside of [`Self::root`]: nobody who follows the cluster is sent it.
    #[must_use]
    pub fn past(&self) -> &str {
        &self.past
    }

    /// A worker's registration.
    #[must_use]
    pub fn member(&self, rank: Rank) -> String {
        format!("{}member/{rank}", self.root)
    }

    /// A worker's last load window.
    #[must_use]
    pub fn load(&self, rank: Rank) -> String {
        format!("{}load/{rank}", self.root)
    }

    /// A gateway's forecast; `gateway` is the number of its lease, which no other has.
    #[must_use]
    pub fn forecast(&self, gateway: i64) -> String {
        format!("{}forecast/{gateway}", self.root)
    }

    /// A worker's progress in a rollover.
    #[must_use]
    pub fn ack(&self, rank: Rank) -> String {
        format!("{}placement/ack/{rank}", self.root)
    }

    /// The placement that is wanted.
    #[must_use]
    pub fn target(&self) -> String {
        format!("{}placement/target", self.root)
    }

    /// The placement that new steps use.
    #[must_use]
    pub fn active(&self) -> String {
        format!("{}placement/active", self.root)
    }

    /// Prefix of the groups of all epochs.
    #[must_use]
    pub fn groups(&self) -> String {
        format!("{}group/", self.root)
    }

    /// What the ranks of an epoch that step together find each other by.
    #[must_use]
    pub fn group(&self, epoch: Epoch) -> String {
        format!("{}group/{epoch}", self.root)
    }

    /// The epoch of a key of [`Self::group`].
    #[must_use]
    pub fn group_epoch(&self, key: &str) -> Option<Epoch> {
        let number = key.strip_prefix(&self.groups())?;
        let epoch = Epoch(number.parse().ok()?);
        (self.group(epoch) == key).then_some(epoch)
    }

    /// The operator that leads.
    #[must_use]
    pub fn leader(&self) -> String {
        format!("{}operator/leader", self.root)
    }
}

/// What a key is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// A worker's registration.
    Member(Rank),
    /// A worker's last load window.
    Load(Rank),
    /// A gateway's forecast.
    Forecast(i64),
    /// A worker's progress.
    Ack(Rank),
    /// The placement that is wanted.
    Target,
    /// The placement that new steps use.
    Active,
    /// The operator that leads.
    Leader,
}

impl Keys {
    /// What `key` is about; `None` for a key of another cluster or one that this version does not know.
    #[must_use]
    pub fn subject(&self, key: &str) -> Option<Subject> {
        let path = key.strip_prefix(&self.root)?;
        match path {
            "placement/target" => return Some(Subject::Target),
            "placement/active" => return Some(Subject::Active),
            "operator/leader" => return Some(Subject::Leader),
            _ => {}
        }
        let (kind, rank) = path.rsplit_once('/')?;
        if kind == "forecast" {
            let gateway = rank.parse().ok().filter(|n: &i64| n.to_string() == rank);
            return gateway.map(Subject::Forecast);
        }
        // One spelling per rank: `+7` and `07` would be a second key of rank 7.
        let rank = Rank(rank.parse().ok().filter(|n: &u32| n.to_string() == rank)?);
        match kind {
            "member" => Some(Subject::Member(rank)),
            "load" => Some(Subject::Load(rank)),
            "placement/ack" => Some(Subject::Ack(rank)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_found_again_and_no_other() {
        let keys = Keys::new("a");
        let known = [
            (keys.member(Rank(3)), Subject::Member(Rank(3))),
            (keys.load(Rank(12)), Subject::Load(Rank(12))),
            (keys.ack(Rank(0)), Subject::Ack(Rank(0))),
            (keys.forecast(1 << 62), Subject::Forecast(1 << 62)),
            (keys.target(), Subject::Target),
            (keys.active(), Subject::Active),
            (keys.leader(), Subject::Leader),
        ];
        for (key, subject) in known {
            assert!(key.starts_with(keys.root()));
            assert_eq!(keys.subject(&key), Some(subject), "{key}");
        }
        // Not for those who follow the cluster: who waits for a group watches its key.
        let group = keys.group(Epoch(7));
        assert!(group.starts_with(keys.root()));
        assert_eq!(
            (keys.subject(&group), keys.group_epoch(&group)),
            (None, Some(Epoch(7)))
        );
        assert_eq!(keys.group_epoch("/foregate/a/group/07"), None);
        assert!(!keys.past().starts_with(keys.root()));
        for other in [
            "/foregate/b/member/3",
            "/foregate/a/member/x",
            "/foregate/a/member/07",
            "/foregate/a/load/+7",
            "/foregate/a/forecast/07",
            "/foregate/a/forecast/x",
            "/foregate/a/x/1",
            "",
        ] {
            assert_eq!(keys.subject(other), None, "{other}");
        }
    }
}
