//! What a signature says about one token of its request: per sampled layer and expert, the share of tokens that
//! use the expert. Small enough to keep thousands of them, and of one size whatever the model's depth.

use std::sync::Arc;

use super::Signature;

/// Layers that are looked at. Neighbouring layers say much the same.
const LAYERS: usize = 8;
/// Largest profile in bytes, one per entry.
const MAX_BYTES: usize = 4096;

/// Share of tokens by (sampled layer, expert), on a square-root scale of 256 levels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    experts: usize,
    levels: Arc<[u8]>,
}

impl Profile {
    /// The profile of a histogram in which every row chose `top_k` experts per layer; `None` for an empty one or
    /// for a model of more than 4096 experts.
    #[must_use]
    pub fn of(signature: &Signature, top_k: usize) -> Option<Self> {
        let experts = signature.experts;
        let layers = signature.counts.len().checked_div(experts)?;
        let wanted = LAYERS.min(MAX_BYTES / experts);
        let mut levels = Vec::with_capacity(wanted * experts);
        for layer in sampled(layers, wanted) {
            let counts = &signature.counts[layer * experts..(layer + 1) * experts];
            let sum: f64 = counts.iter().copied().map(f64::from).sum();
            let rows = (sum / top_k.max(1) as f64).max(f64::MIN_POSITIVE);
            levels.extend(counts.iter().map(|count| level(f64::from(*count) / rows)));
        }
        (!levels.is_empty()).then(|| Self {
            experts,
            levels: levels.into(),
        })
    }

    /// The same for workers, with the MoE layers that it is of; `None` as in [`Profile::of`].
    #[must_use]
    pub fn hint(signature: &Signature, top_k: usize) -> Option<(Vec<u32>, Vec<u8>)> {
        let profile = Self::of(signature, top_k)?;
        let all = signature.counts.len() / signature.experts;
        let layers = sampled(all, profile.layers()).into_iter();
        let layers = layers.map(|layer| u32::try_from(layer).unwrap_or(u32::MAX));
        Some((layers.collect(), profile.levels.to_vec()))
    }

    /// A profile of given shares, layer-major; `None` if their number is no multiple of `experts`.
    #[must_use]
    pub fn from_shares(experts: usize, shares: &[f64]) -> Option<Self> {
        let fits = experts > 0 && !shares.is_empty() && shares.len().is_multiple_of(experts);
        (fits && shares.len() <= MAX_BYTES).then(|| Self {
            experts,
            levels: shares.iter().map(|share| level(*share)).collect(),
        })
    }

    /// A profile that uses no expert of one layer.
    #[must_use]
    pub fn nothing(experts: usize) -> Self {
        Self {
            experts,
            levels: vec![0; experts].into(),
        }
    }

    /// Experts per layer.
    #[must_use]
    pub const fn experts(&self) -> usize {
        self.experts
    }

    /// Sampled layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.levels.len() / self.experts.max(1)
    }

    /// Entries: sampled layers × experts, and bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.levels.len()
    }

    /// Whether it says nothing; never so for one that was made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.levels.is_empty()
    }

    /// Square roots of the shares: in this scale the distance of two profiles is the Hellinger distance, in which
    /// one hot expert does not decide alone.
    pub fn roots(&self) -> impl Iterator<Item = f32> {
        self.levels.iter().map(|level| f32::from(*level) / 255.0)
    }

    /// Probability that a token uses the expert: the share, kept away from the certainty that 128 tokens cannot give.
    pub fn probabilities(&self) -> impl Iterator<Item = f32> {
        self.roots().map(|root| probability(root * root))
    }

    /// Whether two profiles sample the same layers of the same model.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        self.experts == other.experts && self.levels.len() == other.levels.len()
    }
}

/// The probability that a share stands for.
#[must_use]
pub fn probability(share: f32) -> f32 {
    0.98f32.mul_add(share, 0.002).clamp(1e-4, 0.98)
}

fn level(share: f64) -> u8 {
    (share.clamp(0.0, 1.0).sqrt() * 255.0).round() as u8
}

/// The layers of a model that are looked at where all would take too long.
pub(crate) fn sampled_layers(layers: usize) -> Vec<usize> {
    sampled(layers, LAYERS)
}

/// Layers to sample: all of a shallow model; of a deep one an eighth from its first third, the others evenly from
/// the rest, because kinds of text separate with depth.
fn sampled(layers: usize, wanted: usize) -> Vec<usize> {
    if layers <= wanted {
        return (0..layers).collect();
    }
    let (early, late) = (wanted / 8, wanted - wanted / 8);
    let third = layers / 3;
    let first = (0..early).map(|at| third * (2 * at + 1) / (2 * early));
    let rest = (0..late).map(|at| third + (layers - third) * (2 * at + 1) / (2 * late));
    first.chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_tokens() {
        let signature = Signature::new(4, vec![50, 100, 50, 0, 200, 0, 0, 0]).unwrap();
        let profile = Profile::of(&signature, 2).unwrap();
        let shares: Vec<f32> = profile.roots().map(|root| root * root).collect();
        for (share, expected) in shares.iter().zip([0.5, 1.0, 0.5, 0.0, 1.0]) {
            assert!((share - expected).abs() < 0.005, "{shares:?}");
        }
        let likely: Vec<f32> = profile.probabilities().collect();
        assert!(likely[1] <= 0.98 && likely[3] >= 0.001);
    }

    #[test]
    fn a_deep_model_is_sampled_and_stays_small() {
        for (layers, experts) in [
            (94, 128),
            (61, 256),
            (61, 384),
            (3, 8),
            (8, 512),
            (40, 4096),
        ] {
            let signature = Signature::new(experts, vec![1; layers * experts]).unwrap();
            let profile = Profile::of(&signature, 8.min(experts)).unwrap();
            assert!(profile.len() <= MAX_BYTES, "{layers} × {experts}");
            let (told, roots) = Profile::hint(&signature, 8.min(experts)).unwrap();
            assert_eq!(roots.len(), told.len() * experts);
            assert!(told.iter().all(|layer| (*layer as usize) < layers));
            let chosen = sampled(layers, LAYERS.min(MAX_BYTES / experts));
            assert!(
                chosen.windows(2).all(|pair| pair[0] < pair[1]),
                "{chosen:?}"
            );
            assert!(chosen.iter().all(|layer| *layer < layers));
        }
        assert!(Profile::of(&Signature::new(5000, vec![1; 5000]).unwrap(), 1).is_none());
    }
}
