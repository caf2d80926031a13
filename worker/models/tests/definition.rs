//! The forward pass against its definition: each family written down once more in float64, plainly, straight
//! from the tensors' names, one token after the other without a cache. It covers what the golden fixtures do
//! not have: dense blocks, tied embeddings, clamped projections, heads wider than their share, no bias.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use foregate_api::model::{Family, KvFormat, ModelSpec};
use foregate_api::weights::WeightFormat;
use foregate_checkpoint::tiny::Tiny;
use foregate_checkpoint::{Checkpoint, header::Dtype};

use support::{Rig, bits, table};

/// A matrix or vector in float64, row-major.
struct Weights<'a>(&'a Checkpoint);

impl Weights<'_> {
    fn get(&self, name: &str) -> Vec<f64> {
        let tensor = self.0.tensor(name).unwrap();
        match tensor.dtype {
            Dtype::F32 => {
                let (chunks, _) = tensor.bytes.as_chunks::<4>();
                chunks
                    .iter()
                    .map(|c| f32::from_le_bytes(*c).into())
                    .collect()
            }
            Dtype::BF16 => {
                let (chunks, _) = tensor.bytes.as_chunks::<2>();
                chunks
                    .iter()
                    .map(|c| half::bf16::from_le_bytes(*c).to_f64())
                    .collect()
            }
            other => panic!("{other:?}"),
        }
    }

    /// `W x (+ bias)`; inputs that meet bfloat16 weights are rounded to bfloat16.
    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let stored = format!("{name}.weight");
        let weight = self.get(&stored);
        let x: Vec<f64> = match self.0.tensor(&stored).unwrap().dtype {
            Dtype::BF16 => x.iter().map(|x| rounded(*x)).collect(),
            _ => x.to_vec(),
        };
        let bias = format!("{name}.bias");
        let bias = self.0.tensor(&bias).is_ok().then(|| self.get(&bias));
        weight
            .chunks(x.len())
            .enumerate()
            .map(|(n, row)| dot(row, &x) + bias.as_ref().map_or(0.0, |bias| bias[n]))
            .collect()
    }

    fn norm(&self, name: &str, x: &[f64], eps: f64) -> Vec<f64> {
        let weight = self.get(name);
        let scale = 1.0 / (dot(x, x) / x.len() as f64 + eps).sqrt();
        x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
    }

    fn ffn(&self, gate: &str, up: &str, down: &str, x: &[f64]) -> Vec<f64> {
        let up = self.linear(up, x);
        let inner: Vec<f64> = self
            .linear(gate, x)
            .into_iter()
            .zip(up)
            .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
            .collect();
        self.linear(down, &inner)
    }
}

fn rounded(x: f64) -> f64 {
    half::bf16::from_f64(x).to_f64()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - most).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.into_iter().map(|e| e / sum).collect()
}

/// What values are weighed by: probabilities, whose numerators are rounded where they meet rounded values. That is
/// exact for sequences of one block of keys only: later blocks round relative to a greater maximum.
fn weights(scores: &[f64], kv: KvFormat) -> Vec<f64> {
    let p = softmax(scores);
    match kv {
        KvFormat::Float32 => p,
        KvFormat::Bfloat16 => {
            let most = p.iter().copied().fold(0.0, f64::max);
            p.iter().map(|p| rounded(p / most) * most).collect()
        }
    }
}

fn rotate(head: &mut [f64], position: usize, theta: f64) {
    let half = head.len() / 2;
    for i in 0..half {
        let angle = position as f64 * theta.powf(-(2.0 * i as f64) / head.len() as f64);
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * angle.cos() - b * angle.sin();
        head[i + half] = b * angle.cos() + a * angle.sin();
    }
}

/// Queries, keys and values of one position, rotated.
fn project(
    w: &Weights<'_>,
    spec: &ModelSpec,
    block: usize,
    at: usize,
    x: &[f64],
) -> [Vec<f64>; 3] {
    let name = |part: &str| format!("model.layers.{block}.self_attn.{part}");
    let mut all = ["q", "k", "v"].map(|part| w.linear(&name(&format!("{part}_proj")), x));
    let eps = f64::from(spec.norm_eps);
    for (part, x) in ["q", "k"].iter().zip(&mut all) {
        let norm = name(&format!("{part}_norm.weight"));
        let width = match spec.family {
            Family::Qwen3Moe => spec.head_dim,
            Family::Olmoe => x.len(),
            Family::Qwen2Moe | Family::Mixtral => continue,
        };
        *x = x
            .chunks(width)
            .flat_map(|x| w.norm(&norm, x, eps))
            .collect();
    }
    if let Some(limit) = spec.clip_qkv {
        let limit = f64::from(limit);
        all.iter_mut()
            .flatten()
            .for_each(|x| *x = x.clamp(-limit, limit));
    }
    for x in &mut all[..2] {
        x.chunks_mut(spec.head_dim)
            .for_each(|head| rotate(head, at, spec.rope_theta));
    }
    // Keys and values are kept rounded, and queries that meet them are rounded too.
    if spec.kv_format() == KvFormat::Bfloat16 {
        all.iter_mut().flatten().for_each(|x| *x = rounded(*x));
    }
    all
}

fn attention(
    w: &Weights<'_>,
    spec: &ModelSpec,
    block: usize,
    xs: &[Vec<f64>],
) -> Vec<Vec<f64>> {
    let projected: Vec<[Vec<f64>; 3]> = xs
        .iter()
        .enumerate()
        .map(|(at, x)| project(w, spec, block, at, x))
        .collect();
    let d = spec.head_dim;
    let one = |at: usize| {
        let mut out = vec![0.0; spec.heads * d];
        for head in 0..spec.heads {
            let shared = head / (spec.heads / spec.kv_heads) * d;
            let q = &projected[at][0][head * d..(head + 1) * d];
            let past = &projected[..=at];
            let scores: Vec<f64> = past
                .iter()
                .map(|p| dot(q, &p[1][shared..shared + d]) / (d as f64).sqrt())
                .collect();
            for (p, weight) in past.iter().zip(weights(&scores, spec.kv_format())) {
                for i in 0..d {
                    out[head * d + i] += weight * p[2][shared + i];
                }
            }
        }
        w.linear(&format!("model.layers.{block}.self_attn.o_proj"), &out)
    };
    (0..xs.len()).map(one).collect()
}

fn mlp(w: &Weights<'_>, spec: &ModelSpec, block: usize, x: &[f64]) -> Vec<f64> {
    let name = |part: String| format!("model.layers.{block}.{part}");
    let plain = |prefix: &str, x: &[f64]| {
        let [gate, up, down] =
            ["gate", "up", "down"].map(|p| name(format!("{prefix}.{p}_proj")));
        w.ffn(&gate, &up, &down, x)
    };
    if !spec.moe_blocks[block] {
        return plain("mlp", x);
    }
    let mixtral = spec.family == Family::Mixtral;
    let prefix = if mixtral { "block_sparse_moe" } else { "mlp" };
    let p = softmax(&w.linear(&name(format!("{prefix}.gate")), x));
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
    let chosen = &order[..spec.top_k];
    let sum: f64 = chosen.iter().map(|e| p[*e]).sum();
    let mut out = vec![0.0; x.len()];
    for e in chosen {
        let weight = if spec.norm_top_k { p[*e] / sum } else { p[*e] };
        let y = if mixtral {
            let [w1, w3, w2] =
                ["w1", "w3", "w2"].map(|m| name(format!("{prefix}.experts.{e}.{m}")));
            w.ffn(&w1, &w3, &w2, x)
        } else {
            plain(&format!("mlp.experts.{e}"), x)
        };
        out.iter_mut()
            .zip(y)
            .for_each(|(out, y)| *out += weight * y);
    }
    if spec.shared_inner.is_some() {
        let gate = w.linear(&name("mlp.shared_expert_gate".to_owned()), x)[0];
        let y = plain("mlp.shared_expert", x);
        out.iter_mut()
            .zip(y)
            .for_each(|(out, y)| *out += y / (1.0 + (-gate).exp()));
    }
    out
}

fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<Vec<f64>> {
    let (w, spec) = (Weights(checkpoint), checkpoint.spec());
    let eps = f64::from(spec.norm_eps);
    let embedding = w.get("model.embed_tokens.weight");
    let mut xs: Vec<Vec<f64>> = tokens
        .iter()
        .map(|t| embedding[*t as usize * spec.hidden..][..spec.hidden].to_vec())
        .collect();
    let add = |x: &mut Vec<f64>, y: &[f64]| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    for block in 0..spec.layers {
        let norm = |part: &str, x: &[f64]| {
            w.norm(&format!("model.layers.{block}.{part}.weight"), x, eps)
        };
        let normed: Vec<Vec<f64>> = xs.iter().map(|x| norm("input_layernorm", x)).collect();
        for (x, y) in xs.iter_mut().zip(attention(&w, spec, block, &normed)) {
            add(x, &y);
            let y = mlp(&w, spec, block, &norm("post_attention_layernorm", x));
            add(x, &y);
        }
    }
    let output = if spec.tied_embeddings {
        "model.embed_tokens"
    } else {
        "lm_head"
    };
    xs.iter()
        .map(|x| w.linear(output, &w.norm("model.norm.weight", x, eps)))
        .collect()
}

fn check(tiny: &Tiny) {
    let dir = tempfile::tempdir().unwrap();
    tiny.write(dir.path()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let tokens = [3, 60, 17, 3, 3, 41, 8, 22, 59];
    let wanted = logits(&checkpoint, &tokens);
    // Where float32 and float64 lie on either side of a tie, numbers come apart by one bfloat16, and with them all that
    // is computed from them.
    let bound = match tiny.format {
        WeightFormat::Float32 => 2e-5,
        _ => 1.5e-2,
    };
    let mut rig = Rig::open(dir.path());
    let found = rig.walk(&tokens, &[4, 2], &table(0, 9));
    let singly = rig.walk(&tokens, &[1], &table(9, 9));
    assert_eq!(bits(&found.logits), bits(&singly.logits), "{tiny:?}");
    for (row, (found, wanted)) in found.logits.chunks(tiny.vocab).zip(wanted).enumerate() {
        for (found, wanted) in found.iter().zip(wanted) {
            let apart = (f64::from(*found) - wanted).abs();
            assert!(
                apart < bound * (1.0 + wanted.abs()),
                "row {row} of {tiny:?}: {found} where {wanted}"
            );
        }
    }
}

#[test]
fn every_family_and_variant_is_what_it_is_defined_to_be() {
    for format in [WeightFormat::Float32, WeightFormat::Bfloat16] {
        for family in [
            Family::Qwen3Moe,
            Family::Qwen2Moe,
            Family::Mixtral,
            Family::Olmoe,
        ] {
            let mut tiny = Tiny::new(family);
            (tiny.format, tiny.layers, tiny.seed) = (format, 2, 4);
            check(&tiny);
            let mut set = |name: &str, value: serde_json::Value| {
                tiny.set.insert(name.to_owned(), value);
            };
            set("tie_word_embeddings", true.into());
            match family {
                Family::Qwen3Moe => {
                    set("mlp_only_layers", [0].into());
                    set("norm_topk_prob", false.into());
                    set("head_dim", 12.into());
                }
                Family::Qwen2Moe => {
                    set("decoder_sparse_step", 2.into());
                    set("qkv_bias", false.into());
                    set("norm_topk_prob", true.into());
                    set("shared_expert_intermediate_size", 20.into());
                }
                Family::Mixtral => set("num_key_value_heads", 1.into()),
                Family::Olmoe => {
                    set("clip_qkv", 0.4.into());
                    set("num_key_value_heads", 4.into());
                }
            }
            check(&tiny);
        }
    }
}
