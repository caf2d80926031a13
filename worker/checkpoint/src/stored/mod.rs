//! How matrices stand in the files, and their canonical bytes out of that.

mod fp8;
mod int4;
pub(crate) mod mxfp4;

use std::borrow::Cow;

use foregate_api::weights::{Part, WeightFormat, WeightFormats};

use crate::convert;
use crate::header::Dtype;
use crate::index::{Index, Tensor};
use crate::spec::Scheme;

/// How the matrices of a part stand in the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One tensor, one number per weight.
    Plain(WeightFormat),
    /// Several tensors.
    Quantized(Scheme),
}

/// How the matrices of every part stand in the files.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layouts([Layout; Part::ALL.len()]);

impl Layouts {
    /// No part is quantised.
    pub(crate) fn new(plain: &WeightFormats) -> Self {
        Self(Part::ALL.map(|part| Layout::Plain(plain.of(part))))
    }

    pub(crate) const fn of(&self, part: Part) -> Layout {
        self.0[part as usize]
    }

    pub(crate) const fn set(&mut self, part: Part, layout: Layout) {
        self.0[part as usize] = layout;
    }

    pub(crate) fn experts_are_fused(&self) -> bool {
        self.of(Part::Expert) == Layout::Quantized(Scheme::Mxfp4)
    }

    /// The formats that the parts have once they are read.
    pub(crate) fn formats(&self) -> WeightFormats {
        let mut formats = WeightFormats::all(self.of(Part::Embedding).format());
        for part in Part::ALL {
            *formats.of_mut(part) = self.of(part).format();
        }
        formats
    }
}

/// A tensor that a matrix is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// Formats it may have.
    pub(crate) dtypes: &'static [Dtype],
    /// Whether the matrix is complete without it.
    pub(crate) optional: bool,
}

/// Formats of scales, all of which widen to float32 without loss.
pub(crate) const SCALES: &[Dtype] = &[Dtype::F16, Dtype::BF16, Dtype::F32];
/// Formats of norms and biases.
pub(crate) const VECTORS: &[Dtype] = &[Dtype::F32, Dtype::BF16, Dtype::F16];

/// What is wrong with the contents of a tensor: its name and what to say.
pub(crate) type Wrong = (String, String);

impl Source {
    fn new(name: String, dtypes: &'static [Dtype], shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name,
            shape: shape.into(),
            dtypes,
            optional: false,
        }
    }

    pub(crate) fn fits(&self, tensor: &Tensor<'_>) -> bool {
        tensor.shape == self.shape && self.dtypes.contains(&tensor.dtype)
    }

    pub(crate) fn describe(&self) -> String {
        let names: Vec<String> = self.dtypes.iter().map(|d| format!("{d:?}")).collect();
        format!("shape {:?} of {}", self.shape, names.join(" or "))
    }
}

impl Layout {
    /// The format that a matrix has once it is read.
    pub(crate) const fn format(self) -> WeightFormat {
        match self {
            Self::Plain(format) => format,
            Self::Quantized(scheme) => scheme.format(),
        }
    }

    /// How the matrix `name` (`….weight`) stands in the files, if it is there at all.
    pub(crate) fn detect(
        index: &Index,
        scheme: Option<Scheme>,
        plain: WeightFormat,
        name: &str,
    ) -> Self {
        let quantized = match scheme {
            Some(Scheme::Gptq { .. } | Scheme::Awq { .. }) => {
                index.get(&beside(name, "qweight")).is_some()
            }
            Some(Scheme::Fp8 { .. }) => index
                .get(name)
                .is_some_and(|tensor| tensor.dtype == Dtype::F8_E4M3),
            // Experts of a block stand together, under another name: see `mxfp4`.
            Some(Scheme::Mxfp4) | None => false,
        };
        match scheme {
            Some(scheme) if quantized => Self::Quantized(scheme),
            _ => Self::Plain(plain),
        }
    }

    /// The tensors of the matrix `name` of `n` outputs and `k` inputs.
    pub(crate) fn sources(self, name: &str, n: usize, k: usize) -> Vec<Source> {
        match self {
            Self::Plain(format) => {
                let dtypes: &[Dtype] = match format {
                    WeightFormat::Float32 => &[Dtype::F32],
                    WeightFormat::Bfloat16 => &[Dtype::BF16],
                    WeightFormat::Float16 => &[Dtype::F16],
                    _ => &[],
                };
                vec![Source::new(name.to_owned(), dtypes, [n, k])]
            }
            Self::Quantized(Scheme::Gptq {
                group, reordered, ..
            }) => int4::gptq_sources(name, n, k, group, reordered),
            Self::Quantized(Scheme::Awq { group }) => int4::awq_sources(name, n, k, group),
            Self::Quantized(Scheme::Fp8 { rows, columns }) => {
                fp8::sources(name, n, k, rows as usize, columns as usize)
            }
            Self::Quantized(Scheme::Mxfp4) => Vec::new(),
        }
    }

    /// Canonical bytes of the matrix `name`, in the format it is stored in.
    pub(crate) fn read<'a>(
        self,
        index: &'a Index,
        name: &str,
        n: usize,
        k: usize,
    ) -> Result<Cow<'a, [u8]>, Wrong> {
        match self {
            Self::Plain(_) => Ok(Cow::Borrowed(tensor(index, name)?.bytes)),
            Self::Quantized(Scheme::Gptq {
                group,
                zero_less_one,
                ..
            }) => int4::gptq(index, name, n, k, group, zero_less_one).map(Cow::Owned),
            Self::Quantized(Scheme::Awq { group }) => {
                int4::awq(index, name, n, k, group).map(Cow::Owned)
            }
            Self::Quantized(Scheme::Fp8 { .. }) => fp8::read(index, name).map(Cow::Owned),
            Self::Quantized(Scheme::Mxfp4) => Err((
                name.to_owned(),
                "only routed experts can be in MXFP4".to_owned(),
            )),
        }
    }
}

/// `….weight` → `….suffix`.
fn beside(name: &str, suffix: &str) -> String {
    let base = name.strip_suffix("weight").unwrap_or(name);
    format!("{base}{suffix}")
}

fn tensor<'a>(index: &'a Index, name: &str) -> Result<Tensor<'a>, Wrong> {
    index
        .get(name)
        .ok_or_else(|| (name.to_owned(), "is missing".to_owned()))
}

/// All values of a plain tensor as float32; empty for other formats.
pub(crate) fn widen(tensor: &Tensor<'_>) -> Vec<f32> {
    let format = match tensor.dtype {
        Dtype::F32 => WeightFormat::Float32,
        Dtype::BF16 => WeightFormat::Bfloat16,
        Dtype::F16 => WeightFormat::Float16,
        _ => return Vec::new(),
    };
    convert::widen(format, tensor.bytes)
}

#[cfg(test)]
mod tests;
