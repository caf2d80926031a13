//! Every op by its readable definition, with float64 sums: what the fast paths are judged by.
#![expect(
    clippy::cast_possible_truncation,
    reason = "results are rounded to float32 once"
)]

use crate::error::OpError;
use crate::kv::{KEYS, KvCache, KvDtype, PageMap};
use crate::matrix::Matrix;
use crate::ops::{
    Add, Attention, Combine, Embed, ExpertFfn, Gate, KvWrite, LogSoftmax, MatMul, Ops, RmsNorm,
    Rope, SigmoidScale, SiluMul,
};

/// Runs ops slowly and exactly. Not bit-equal to [`crate::Cpu`]: equal within rounding.
#[derive(Debug, Clone, Copy, Default)]
pub struct Oracle;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn product(x: &[f32], w: &Matrix, n: usize) -> f64 {
    let input = |x: f32| {
        if w.dtype().rounds_inputs() {
            half::bf16::from_f32(x).to_f32()
        } else {
            x
        }
    };
    x.iter()
        .enumerate()
        .map(|(k, x)| {
            let weight = w.parts(n, k);
            f64::from(input(*x)) * f64::from(weight.value) * f64::from(weight.scale)
        })
        .sum()
}

/// `exp(x - max)` of every element, and their sum.
fn exponentials(x: &[f64]) -> (Vec<f64>, f64) {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum = e.iter().sum();
    (e, sum)
}

/// Where the key and the value of a position are.
struct Place {
    dtype: KvDtype,
    slot: usize,
    /// First word of the head's keys in the page.
    key: usize,
    /// First word of the head's values in the page.
    value: usize,
    dim: usize,
}

impl Place {
    fn of(
        kv: &KvCache,
        pages: PageMap<'_>,
        row: usize,
        position: usize,
        layer: usize,
        head: usize,
    ) -> Self {
        let s = kv.shape();
        let table = pages.tables[pages.sequence_of_row[row] as usize];
        let page = table[position / s.page_tokens] as usize;
        Self {
            dtype: s.dtype,
            slot: position % s.page_tokens,
            key: kv.key_start(layer, page, head),
            value: kv.value_start(layer, page, head),
            dim: s.head_dim,
        }
    }

    /// Word of dimension `d` of the key, and its half.
    fn key(&self, d: usize) -> (usize, usize) {
        let per_word = self.dtype.per_word();
        let group = self.slot / KEYS * KEYS * self.dim.div_ceil(per_word);
        (
            self.key + group + d / per_word * KEYS + self.slot % KEYS,
            d % per_word,
        )
    }

    /// Word of dimension `d` of the value, and its half.
    fn value(&self, d: usize) -> (usize, usize) {
        let per_word = self.dtype.per_word();
        (
            self.value + self.slot / per_word * self.dim + d,
            self.slot % per_word,
        )
    }

    fn read(&self, words: &[u32], (word, half): (usize, usize)) -> f64 {
        match self.dtype {
            KvDtype::F32 => f64::from(f32::from_bits(words[word])),
            KvDtype::Bf16 => {
                let bits = (words[word] >> (16 * half)) as u16;
                f64::from(half::bf16::from_bits(bits))
            }
        }
    }

    fn write(&self, words: &mut [u32], (word, half): (usize, usize), value: f32) {
        match self.dtype {
            KvDtype::F32 => words[word] = value.to_bits(),
            KvDtype::Bf16 => {
                let bits = u32::from(half::bf16::from_f32(value).to_bits());
                words[word] &= !(0xffff << (16 * half));
                words[word] |= bits << (16 * half);
            }
        }
    }
}

/// A norm in double precision.
fn normalised<'a>(x: &'a [f32], weight: &'a [f32], eps: f32) -> impl Iterator<Item = f64> + 'a {
    let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    let root = (squares / x.len() as f64 + f64::from(eps)).sqrt();
    let weights = weight.iter().map(|w| f64::from(*w));
    x.iter()
        .zip(weights)
        .map(move |(x, w)| f64::from(*x) / root * w)
}

impl Ops for Oracle {
    fn matmul(&self, op: MatMul<'_>) -> Result<(), OpError> {
        op.check()?;
        let (n, k) = (op.w.n(), op.w.k());
        for row in 0..op.rows {
            for output in 0..n {
                let bias = op.bias.map_or(0.0, |b| f64::from(b[output]));
                let sum = product(&op.x[row * k..(row + 1) * k], op.w, output) + bias;
                op.out[row * n + output] = sum as f32;
            }
        }
        Ok(())
    }

    fn embed(&self, op: Embed<'_>) -> Result<(), OpError> {
        op.check()?;
        Ok(op.table.rows(op.ids, op.out)?)
    }

    fn rms_norm(&self, op: RmsNorm<'_>) -> Result<(), OpError> {
        op.check()?;
        let width = op.width.max(1);
        for (x, add) in op.x.iter_mut().zip(op.add.unwrap_or_default()) {
            *x += add;
        }
        for (x, out) in op.x.chunks_exact(width).zip(op.out.chunks_exact_mut(width)) {
            for (value, out) in normalised(x, op.weight, op.eps).zip(out) {
                *out = value as f32;
            }
        }
        Ok(())
    }

    fn rope(&self, op: Rope<'_>) -> Result<(), OpError> {
        op.check()?;
        let half = op.table.half;
        let row = (op.heads * op.head_dim).max(1);
        for (r, x) in op.x.chunks_exact_mut(row).enumerate() {
            if let Some(norm) = op.norm {
                for part in x.chunks_exact_mut(norm.weight.len()) {
                    let values: Vec<f64> = normalised(part, norm.weight, norm.eps).collect();
                    for (x, value) in part.iter_mut().zip(values) {
                        *x = value as f32;
                    }
                }
            }
            if let Some(clip) = op.clip {
                for x in x.iter_mut() {
                    *x = x.clamp(-clip, clip);
                }
            }
            for head in x.chunks_exact_mut(op.head_dim) {
                for i in 0..half {
                    let cos = f64::from(op.table.cos[r * half + i]);
                    let sin = f64::from(op.table.sin[r * half + i]);
                    let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
                    head[i] = (a * cos - b * sin) as f32;
                    head[i + half] = (b * cos + a * sin) as f32;
                }
            }
        }
        Ok(())
    }

    fn kv_write(&self, op: KvWrite<'_>) -> Result<(), OpError> {
        op.check()?;
        let s = op.kv.shape();
        for (row, position) in op.positions.iter().enumerate() {
            for head in 0..s.kv_heads {
                let from = (row * s.kv_heads + head) * s.head_dim;
                let position = *position as usize;
                let place = Place::of(op.kv, op.pages, row, position, op.layer, head);
                let words = op.kv.words_mut();
                for d in 0..s.head_dim {
                    place.write(words, place.key(d), op.k[from + d]);
                    place.write(words, place.value(d), op.v[from + d]);
                }
            }
        }
        Ok(())
    }

    fn attention(&self, op: Attention<'_>) -> Result<(), OpError> {
        op.check()?;
        let s = op.kv.shape();
        let (dim, words) = (s.head_dim, op.kv.words());
        for (row, position) in op.positions.iter().enumerate() {
            for head in 0..op.heads {
                let from = (row * op.heads + head) * dim;
                let q = &op.q[from..from + dim];
                let places: Vec<Place> = (0..=*position as usize)
                    .map(|p| {
                        let kv_head = head / (op.heads / s.kv_heads);
                        Place::of(op.kv, op.pages, row, p, op.layer, kv_head)
                    })
                    .collect();
                // Queries that meet bfloat16 keys are rounded; probabilities are not here.
                let query = |d: usize| match s.dtype {
                    KvDtype::F32 => f64::from(q[d]),
                    KvDtype::Bf16 => f64::from(half::bf16::from_f32(q[d])),
                };
                let score = |place: &Place| -> f64 {
                    (0..dim)
                        .map(|d| query(d) * place.read(words, place.key(d)))
                        .sum()
                };
                let scores: Vec<f64> = places
                    .iter()
                    .map(|place| score(place) * f64::from(op.scale))
                    .collect();
                let (e, sum) = exponentials(&scores);
                for d in 0..dim {
                    let total: f64 = places
                        .iter()
                        .zip(&e)
                        .map(|(place, e)| e * place.read(words, place.value(d)))
                        .sum();
                    op.out[from + d] = (total / sum) as f32;
                }
            }
        }
        Ok(())
    }

    fn gate(&self, op: Gate<'_>) -> Result<(), OpError> {
        op.check()?;
        for row in 0..op.rows {
            let logits: Vec<f64> = op.logits[row * op.experts..(row + 1) * op.experts]
                .iter()
                .map(|l| f64::from(*l))
                .collect();
            let (e, sum) = exponentials(&logits);
            let mut order: Vec<usize> = (0..op.experts).collect();
            order.sort_by(|a, b| e[*b].total_cmp(&e[*a]).then(a.cmp(b)));
            order.truncate(op.top_k);
            order.sort_unstable();
            let chosen: f64 = order.iter().map(|i| e[*i]).sum();
            for (slot, expert) in order.into_iter().enumerate() {
                let weight = e[expert] / if op.normalise { chosen } else { sum };
                op.out_experts[row * op.top_k + slot] = expert as u32;
                op.out_weights[row * op.top_k + slot] = weight as f32;
            }
        }
        Ok(())
    }

    fn expert_ffn(&self, op: ExpertFfn<'_>) -> Result<(), OpError> {
        op.check()?;
        for group in op.groups {
            for (i, row) in group.rows.iter().enumerate() {
                let x = &op.x[*row as usize * op.hidden..(*row as usize + 1) * op.hidden];
                let inner: Vec<f32> = (0..group.gate.n())
                    .map(|n| {
                        let gate = product(x, group.gate, n);
                        (gate * sigmoid(gate) * product(x, group.up, n)) as f32
                    })
                    .collect();
                for n in 0..op.hidden {
                    let at = (group.out_offset + i) * op.hidden + n;
                    op.out[at] = product(&inner, group.down, n) as f32;
                }
            }
        }
        Ok(())
    }

    fn combine(&self, op: Combine<'_>) -> Result<(), OpError> {
        op.check()?;
        for (row, out) in op.out.chunks_exact_mut(op.width).enumerate() {
            let chosen = row * op.top_k..(row + 1) * op.top_k;
            for (i, out) in out.iter_mut().enumerate() {
                let term = |(part, weight): (&&[f32], &f32)| {
                    part.get(i)
                        .map_or(0.0, |p| f64::from(*p) * f64::from(*weight))
                };
                let parts = op.parts[chosen.clone()]
                    .iter()
                    .zip(&op.weights[chosen.clone()]);
                *out = parts.map(term).sum::<f64>() as f32;
            }
        }
        Ok(())
    }

    fn add(&self, op: Add<'_>) -> Result<(), OpError> {
        op.check()?;
        for (x, y) in op.x.iter_mut().zip(op.y) {
            *x += y;
        }
        Ok(())
    }

    fn silu_mul(&self, op: SiluMul<'_>) -> Result<(), OpError> {
        op.check()?;
        for (gate, up) in op.gate.iter_mut().zip(op.up) {
            let g = f64::from(*gate);
            *gate = (g * sigmoid(g) * f64::from(*up)) as f32;
        }
        Ok(())
    }

    fn sigmoid_scale(&self, op: SigmoidScale<'_>) -> Result<(), OpError> {
        op.check()?;
        for (x, logit) in op.x.chunks_exact_mut(op.width.max(1)).zip(op.logits) {
            for x in x {
                *x = (f64::from(*x) * sigmoid(f64::from(*logit))) as f32;
            }
        }
        Ok(())
    }

    fn log_softmax(&self, op: LogSoftmax<'_>) -> Result<(), OpError> {
        op.check()?;
        for (x, out) in op
            .logits
            .chunks_exact(op.width)
            .zip(op.out.chunks_exact_mut(op.width))
        {
            let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let max = wide.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = exponentials(&wide).1.ln();
            for (x, out) in wide.iter().zip(out) {
                *out = (x - max - log_sum) as f32;
            }
        }
        Ok(())
    }
}
