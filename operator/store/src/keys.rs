//! Every key of a cluster, once.

use foregate_api::ids::Rank;

/// Keys of one cluster: `/foregate/<cluster>/…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    root: String,
}

impl Keys {
    /// Keys of the cluster of this name.
    #[must_use]
    pub fn new(cluster: &str) -> Self {
        Self {
            root: format!("/foregate/{cluster}/"),
        }
    }

    /// Prefix of everything.
    #[must_use]
    pub fn root(&self) -> &str {
        &self.root
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

    /// The operator that leads.
    #[must_use]
    pub fn leader(&self) -> String {
        format!("{}operator/leader", self.root)
    }
}
