//! The reference's answers beside a fixture. The file is read here by hand: its header is JSON, and the
//! crate that reads safetensors belongs to another one.

#![expect(unreachable_pub, reason = "a module of a test target")]

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

pub struct Golden {
    pub ids: Vec<u32>,
    pub greedy: Vec<u32>,
    logits: Vec<f32>,
    /// MoE layer → `tokens × top_k`.
    routers: BTreeMap<usize, Vec<u32>>,
}

impl Golden {
    pub fn load(dir: &Path) -> Self {
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let header: BTreeMap<String, Value> = serde_json::from_slice(header).unwrap();
        let tensor = |name: &str| {
            let offsets = &header[name]["data_offsets"];
            let at = |i: usize| offsets[i].as_u64().unwrap() as usize;
            &data[at(0)..at(1)]
        };
        let ints = |name: &str| -> Vec<u32> {
            let (words, _) = tensor(name).as_chunks::<8>();
            words
                .iter()
                .map(|word| i64::from_le_bytes(*word) as u32)
                .collect()
        };
        let layer = |name: &String| name.strip_prefix("router.")?.parse::<usize>().ok();
        Self {
            ids: ints("input_ids"),
            greedy: ints("greedy"),
            logits: tensor("logits")
                .as_chunks::<4>()
                .0
                .iter()
                .map(|word| f32::from_le_bytes(*word))
                .collect(),
            routers: header
                .keys()
                .filter_map(|name| Some((layer(name)?, ints(name))))
                .collect(),
        }
    }

    /// Log-probabilities after a position.
    pub fn log_softmax(&self, position: usize) -> Vec<f64> {
        let vocab = self.logits.len() / self.ids.len();
        let row = &self.logits[position * vocab..(position + 1) * vocab];
        let largest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = row.iter().map(|l| (f64::from(*l) - largest).exp()).sum();
        row.iter()
            .map(|l| f64::from(*l) - largest - sum.ln())
            .collect()
    }

    /// Token-major, then MoE layer, then choice ascending.
    pub fn routes(&self) -> Vec<u32> {
        let tokens = self.ids.len();
        let mut all = Vec::new();
        for token in 0..tokens {
            for layer in self.routers.values() {
                let top_k = layer.len() / tokens;
                all.extend_from_slice(&layer[token * top_k..(token + 1) * top_k]);
            }
        }
        all
    }
}
