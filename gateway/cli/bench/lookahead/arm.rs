//! What is compared.

use std::fmt;
use std::str::FromStr;

use foregate_api::manifest::RoutingPolicy;
use foregate_gateway::Trial;

/// A policy by its name, the names of `foregate simulate lookahead`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arm {
    /// `least_loaded`.
    Least,
    /// `signature`.
    Signature,
    /// `prefix_aware`.
    Prefix,
    /// `window` over so many requests.
    Window(u32),
    /// The same with what is known of requests exchanged among them.
    Placebo(u32),
    /// `least_loaded`, and workers are told what is expected of a sequence's experts.
    Hints,
}

impl Arm {
    /// Whether its gateway tells workers what it expects.
    pub(super) fn hints(self) -> bool {
        self == Self::Hints
    }

    /// What its gateway is told.
    pub(super) fn policy(self) -> (RoutingPolicy, Trial) {
        let window = |width, exchanged| (RoutingPolicy::Window, Trial { width, exchanged });
        match self {
            Self::Least | Self::Hints => (RoutingPolicy::LeastLoaded, Trial::default()),
            Self::Signature => (RoutingPolicy::Signature, Trial::default()),
            Self::Prefix => (RoutingPolicy::PrefixAware, Trial::default()),
            Self::Window(width) => window(width, false),
            Self::Placebo(width) => window(width, true),
        }
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Least => f.write_str("least"),
            Self::Signature => f.write_str("signature"),
            Self::Prefix => f.write_str("prefix"),
            Self::Window(width) => write!(f, "ms:{width}"),
            Self::Hints => f.write_str("hints"),
            Self::Placebo(width) => write!(f, "placebo:{width}"),
        }
    }
}

impl FromStr for Arm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || {
            format!(
                "no arm `{text}`: use least, signature, prefix, hints, ms:W or placebo:W with a window W from 1 to 4096"
            )
        };
        let width = |width: &str| {
            let width = width.parse().ok();
            width.filter(|w| (1..=4096).contains(w)).ok_or_else(wrong)
        };
        match text.split_once(':') {
            None if text == "least" => Ok(Self::Least),
            None if text == "signature" => Ok(Self::Signature),
            None if text == "prefix" => Ok(Self::Prefix),
            None if text == "hints" => Ok(Self::Hints),
            Some(("ms", w)) => width(w).map(Self::Window),
            Some(("placebo", w)) => width(w).map(Self::Placebo),
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arms_are_read_as_they_are_written() {
        for text in [
            "least",
            "signature",
            "prefix",
            "hints",
            "ms:1",
            "placebo:64",
        ] {
            assert_eq!(text.parse::<Arm>().unwrap().to_string(), text);
        }
        for text in ["", "ms", "ms:0", "placebo:x", "least:3", "band"] {
            assert!(
                text.parse::<Arm>().unwrap_err().contains("no arm"),
                "{text}"
            );
        }
    }
}
