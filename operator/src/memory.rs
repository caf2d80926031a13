//! What a model was asked for, remembered across restarts: its workloads, each a mix of experts, the newest first. Pure.
//!
//! A workload is remembered as parts of a million of each layer's rows. What resembles a known one is blended into it;
//! what does not is a new one, and the one that was not seen for longest is forgotten. A cluster that starts without a
//! placement plans on their blend, where the newest counts half, the next a quarter, and so on.

use foregate_api::model::ModelSpec;
use serde::{Deserialize, Serialize};

/// Workloads that are remembered of a model.
const WORKLOADS: usize = 4;
/// Cosine of two mixes from which they are of one workload.
const ALIKE: f64 = 0.95;
/// What a layer's rows sum up to.
const WHOLE: f64 = 1e6;

/// A mix of experts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Workload {
    /// When it was seen last, in milliseconds since 1970.
    at_ms: u64,
    /// Load windows that it was seen in.
    windows: u64,
    /// `[layer][expert]`, in parts of a million of the layer's rows.
    mix: Vec<Vec<u32>>,
}

/// The workloads of a model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Memory {
    /// The newest first.
    workloads: Vec<Workload>,
}

impl Memory {
    /// The name under which a model is remembered: equal shapes, equal names.
    pub(crate) fn name(model: &ModelSpec) -> String {
        let shape = serde_json::to_vec(model).unwrap_or_default();
        blake3::hash(&shape).to_hex().chars().take(16).collect()
    }

    /// Takes in a prediction; one without rows says nothing.
    pub(crate) fn learn(&mut self, demand: &[Vec<f64>], at_ms: u64) {
        if demand.iter().any(|row| row.iter().sum::<f64>() <= 0.0) {
            return;
        }
        let mix = parts(demand);
        let alike = self
            .workloads
            .iter()
            .map(|known| cosine(&known.mix, &mix))
            .enumerate()
            .filter(|(_, cosine)| *cosine >= ALIKE)
            .max_by(|a, b| a.1.total_cmp(&b.1));
        let mut newest = match alike {
            Some((at, _)) => blend(self.workloads.remove(at), &mix),
            None => Workload {
                at_ms,
                windows: 0,
                mix,
            },
        };
        newest.at_ms = at_ms;
        newest.windows = newest.windows.saturating_add(1);
        self.workloads.insert(0, newest);
        self.workloads.truncate(WORKLOADS);
    }

    /// What a start plans on, as rows of `layers × experts`; `None` if nothing of this shape is remembered.
    pub(crate) fn recall(&self, layers: usize, experts: usize) -> Option<Vec<Vec<f64>>> {
        let fits = |known: &&Workload| {
            known.mix.len() == layers && known.mix.iter().all(|row| row.len() == experts)
        };
        let mut sum = vec![vec![0.0; experts]; layers];
        let (mut weight, mut any) = (1.0, false);
        for known in self.workloads.iter().filter(fits) {
            (weight, any) = (0.5 * weight, true);
            for (sum, row) in sum.iter_mut().flatten().zip(known.mix.iter().flatten()) {
                *sum += weight * f64::from(*row);
            }
        }
        any.then_some(sum)
    }
}

fn parts(demand: &[Vec<f64>]) -> Vec<Vec<u32>> {
    let of = |row: &Vec<f64>| {
        let total: f64 = row.iter().sum();
        row.iter()
            .map(|rows| (rows / total * WHOLE).round() as u32)
            .collect()
    };
    demand.iter().map(of).collect()
}

fn blend(mut known: Workload, mix: &[Vec<u32>]) -> Workload {
    let both = known.mix.iter_mut().flatten().zip(mix.iter().flatten());
    both.for_each(|(known, new)| *known = known.midpoint(*new));
    known
}

/// 0 for mixes of different shapes.
fn cosine(a: &[Vec<u32>], b: &[Vec<u32>]) -> f64 {
    if a.len() != b.len() || a.iter().zip(b).any(|(a, b)| a.len() != b.len()) {
        return 0.0;
    }
    let product = |a: &[Vec<u32>], b: &[Vec<u32>]| {
        let pairs = a.iter().flatten().zip(b.iter().flatten());
        pairs
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum::<f64>()
    };
    product(a, b) / (product(a, a) * product(b, b)).sqrt().max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_told_apart_and_the_newest_counts_most() {
        let mut memory = Memory::default();
        assert_eq!(memory.recall(1, 2), None);
        memory.learn(&[vec![0.0, 0.0]], 1);
        assert_eq!(memory, Memory::default(), "no rows, nothing learnt");
        memory.learn(&[vec![90.0, 10.0]], 1);
        memory.learn(&[vec![1900.0, 100.0]], 2);
        assert_eq!(memory.workloads.len(), 1, "alike");
        assert_eq!(memory.workloads[0].mix, [[925_000, 75_000]]);
        memory.learn(&[vec![0.0, 5.0]], 3);
        assert_eq!(memory.workloads.len(), 2);
        let both = memory.recall(1, 2).unwrap();
        assert_eq!(both, [[0.25 * 925_000.0, 0.5 * 1e6 + 0.25 * 75_000.0]]);
        memory.learn(&[vec![92.0, 8.0]], 4);
        let back = memory.recall(1, 2).unwrap();
        assert!(back[0][0] > back[0][1], "seen again, it is the newest");
        assert_eq!(memory.recall(1, 3), None, "another model");
    }

    #[test]
    fn the_number_of_workloads_is_bounded() {
        let mut memory = Memory::default();
        for expert in 0..8 {
            let mut row = vec![0.0; 8];
            row[expert] = 1.0;
            memory.learn(&[row], expert as u64);
        }
        assert_eq!(memory.workloads.len(), WORKLOADS);
        assert_eq!(memory.workloads[0].at_ms, 7);
    }
}
