//! Conditions of a cluster, and why each is as it is. Messages are for people, reasons are for programs.

use std::fmt;

macro_rules! names {
    ($(#[$top:meta])* $type:ident { $($(#[$doc:meta])* $name:ident,)* }) => {
        $(#[$top])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $type {
            $($(#[$doc])* $name,)*
        }

        impl $type {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// As it stands in the object.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

names! {
    /// What a condition is about.
    ConditionType {
        /// The cluster is as its manifest wants it, and answers: all that follows, in one word.
        Ready,
        /// Tokens come through a gateway, whatever else is wrong.
        Available,
        /// The cluster is on its way to what the manifest wants.
        Progressing,
        /// Something is wrong that does not go away by waiting for what is under way.
        Degraded,
        /// All ranks have registered with their dense weights loaded.
        WeightsLoaded,
        /// Every expert has a verified copy on a rank that is alive.
        ExpertsCovered,
        /// The active placement's predicted balance is at or above the threshold.
        Balanced,
        /// All ranks of the active placement step with it, so rows go between all of them.
        FabricReady,
        /// A gateway is available.
        RouterReady,
    }
}

names! {
    /// Why a condition is as it is.
    Reason {
        /// The last canary's token came.
        CanaryAnswered,
        /// The last canary's token did not come.
        CanaryFailed,
        /// No canary has been sent yet.
        CanaryPending,
        /// Everything is as wanted.
        AsWanted,
        /// Nothing is wrong.
        Healthy,
        /// The manifest is wrong in itself.
        InvalidManifest,
        /// A pod looks at the model, to know its sizes.
        ReadingModel,
        /// The model cannot be had or read.
        ModelUnreadable,
        /// Model and manifest do not go together; the message has the sum.
        DoesNotFit,
        /// Pods have no node; the message says what is missing.
        PodsUnschedulable,
        /// Pods are being made or are starting.
        PodsStarting,
        /// A pod's container ends again and again, or its image cannot be had.
        PodFailing,
        /// The Secret with the keys of the API's clients is not there, or has none.
        KeysMissing,
        /// Ranks are still to register.
        RanksMissing,
        /// A rank that was there is gone.
        RankLost,
        /// All ranks have registered.
        RanksRegistered,
        /// Ranks are added.
        ScalingUp,
        /// Experts leave ranks that are to go.
        ScalingDown,
        /// Ranks or gateways are replaced by ones of another configuration, a few at a time.
        RollingOut,
        /// A new placement is being prepared or its parent drained.
        EpochChanging,
        /// There is no placement yet.
        NoPlacement,
        /// Every expert has a copy.
        AllCovered,
        /// An expert has no copy.
        ExpertsMissing,
        /// The loss of one failure domain would take every copy of some experts, though `cover: all` was asked for.
        CoverReduced,
        /// Balance is at or above the threshold.
        WithinThreshold,
        /// Balance is below the threshold.
        BelowThreshold,
        /// All ranks use the active epoch.
        OneEpoch,
        /// Ranks use several epochs.
        SeveralEpochs,
        /// At least one gateway is available.
        GatewayAvailable,
        /// No gateway is available.
        NoGateway,
        /// The store does not answer, so nothing is known of ranks and placement.
        StoreUnreachable,
        /// The API server refused an object; the message has its answer.
        ApplyFailed,
        /// The cluster is not wanted any more.
        Deleting,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The API server accepts reasons of this form only.
    #[test]
    fn names_are_what_the_api_takes() {
        for name in ConditionType::ALL
            .iter()
            .map(|t| t.name())
            .chain(Reason::ALL.iter().map(|r| r.name()))
        {
            assert!(
                name.len() <= 316 && name.chars().all(|c| c.is_ascii_alphabetic()),
                "{name}"
            );
            assert!(name.starts_with(|c: char| c.is_ascii_uppercase()), "{name}");
        }
    }
}
