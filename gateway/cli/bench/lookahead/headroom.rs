//! How much there is to gain: by how much fewer experts a batch of one kind of text would use than a mixed one, after
//! the shares that the model's training record has of each kind.

use std::collections::BTreeMap;
use std::path::Path;

use foregate_checkpoint::Checkpoint;
use serde::Deserialize;

/// Share of each expert in its layer's choices, by kind and layer.
#[derive(Debug, Deserialize)]
pub(super) struct Kinds {
    expert_share: BTreeMap<String, Vec<Vec<f64>>>,
    #[serde(skip)]
    top_k: usize,
}

impl Kinds {
    /// Of a model whose folder has such a record.
    pub(super) fn read(model: &Path) -> Option<Self> {
        let text = std::fs::read(model.join("train.json")).ok()?;
        let kinds: Self = serde_json::from_slice(&text).ok()?;
        let top_k = Checkpoint::open(model).ok()?.spec().top_k;
        Some(Self { top_k, ..kinds })
    }

    /// `1 − D_kind / D_mixed` for batches of so many independent tokens, mean over layers.
    pub(super) fn headroom(&self, batch: f64) -> Option<f64> {
        let layers = self.expert_share.values().map(Vec::len).min()?;
        let likely = |share: f64| (share * self.top_k as f64).min(1.0);
        let distinct = |likely: &[f64]| -> f64 {
            likely.iter().map(|p| 1.0 - (1.0 - p).powf(batch)).sum()
        };
        let of_layer = |layer: usize| {
            let kinds: Vec<Vec<f64>> = self
                .expert_share
                .values()
                .map(|shares| shares[layer].iter().copied().map(likely).collect())
                .collect();
            let number = kinds.len() as f64;
            let mixed: Vec<f64> = (0..kinds[0].len())
                .map(|expert| kinds.iter().map(|own| own[expert]).sum::<f64>() / number)
                .collect();
            let apart = kinds.iter().map(|own| distinct(own)).sum::<f64>() / number;
            1.0 - apart / distinct(&mixed)
        };
        (layers > 0).then(|| (0..layers).map(of_layer).sum::<f64>() / layers as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_that_share_no_expert_leave_most_to_gain() {
        let of = |first: [f64; 4], second: [f64; 4]| Kinds {
            expert_share: [("a", first), ("b", second)]
                .map(|(name, shares)| (name.to_owned(), vec![shares.to_vec()]))
                .into(),
            top_k: 2,
        };
        let apart = of([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]);
        // A batch of one kind has its two experts; a mixed one of eight nearly all four.
        let wanted = 1.0 - 2.0 / (4.0 * (1.0 - 0.5_f64.powi(8)));
        assert!((apart.headroom(8.0).unwrap() - wanted).abs() < 1e-9);
        let same = of([0.25; 4], [0.25; 4]);
        assert!(same.headroom(8.0).unwrap().abs() < 1e-9);
    }
}
