//! Two objectives, one switch. Below about 3N/k tokens per step a batch reads only some of the experts, and requests
//! that use the same ones should meet. Above it every expert is read anyway, and grouping buys nothing.

/// Prize above which grouping begins, as a share of a step's time.
const GROUP: f64 = 0.02;
/// Prize below which it ends. In between the regime stays as it was.
const MIX: f64 = 0.01;

/// Part by which a batch must be past the mark for the shape to change the regime.
const STEADY: f64 = 0.1;

/// What the gateway aims at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Regime {
    /// Fewer distinct experts per step: requests join their like.
    Group,
    /// Every expert is read in any case: prefix and load decide.
    Mix,
}

impl Regime {
    /// The word in headers and metrics.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Group => "group",
            Self::Mix => "mix",
        }
    }

    /// While nothing is known but the model's shape: a batch of `ln 0.05 / ln(1 − k/N)`, which is about 3N/k, touches
    /// 95 % of the experts if all are used alike. A batch that stays near that changes nothing.
    #[must_use]
    pub fn by_shape(self, batch: f64, experts: usize, top_k: usize) -> Self {
        let saturated = 3.0 * experts as f64 / top_k.max(1) as f64;
        match self {
            Self::Group if batch >= saturated * (1.0 + STEADY) => Self::Mix,
            Self::Mix if batch < saturated * (1.0 - STEADY) => Self::Group,
            Self::Group | Self::Mix => self,
        }
    }

    /// The regime after a look at the prize: the share of a step's time that grouping would save.
    #[must_use]
    pub fn next(self, prize: f64) -> Self {
        match self {
            Self::Group if prize < MIX => Self::Mix,
            Self::Mix if prize > GROUP => Self::Group,
            Self::Group | Self::Mix => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_says_where_to_begin_and_does_not_flap() {
        let (group, mix) = (Regime::Group, Regime::Mix);
        assert_eq!(group.by_shape(52.0, 128, 8), group);
        assert_eq!(group.by_shape(53.0, 128, 8), mix);
        assert_eq!(mix.by_shape(44.0, 128, 8), mix);
        assert_eq!(mix.by_shape(43.0, 128, 8), group);
        assert_eq!(group.by_shape(64.0, 256, 8), group);
        assert_eq!(group.by_shape(64.0, 32, 4), mix);
    }

    #[test]
    fn a_prize_between_the_marks_changes_nothing() {
        for regime in [Regime::Group, Regime::Mix] {
            assert_eq!(regime.next(0.015), regime);
            assert_eq!(regime.next(0.03), Regime::Group);
            assert_eq!(regime.next(0.005), Regime::Mix);
        }
    }
}
