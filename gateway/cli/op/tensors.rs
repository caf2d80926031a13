//! Tensors in files of the safetensors format, as far as operations have them: plain numbers, unsigned
//! integers, and codes with scales as bytes.

use std::collections::BTreeMap;
use std::path::Path;

use foregate_checkpoint::header::{Dtype, parse_header};
use serde::Deserialize;
use serde_json::json;

/// Values of a tensor.
#[derive(Debug, Clone)]
pub(super) enum Values {
    F32(Vec<f32>),
    U32(Vec<u32>),
    /// As they stand in the file.
    Bf16(Vec<u8>),
    /// As they stand in the file.
    F16(Vec<u8>),
    /// Canonical bytes of matrices, whose format and sizes are in the metadata.
    Codes(Vec<u8>),
}

/// Tensors by name, and numbers.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    tensors: BTreeMap<String, (Vec<usize>, Values)>,
    numbers: BTreeMap<String, String>,
}

/// The part of a header that is no tensor.
#[derive(Debug, Default, Deserialize)]
struct Metadata {
    #[serde(default, rename = "__metadata__")]
    numbers: BTreeMap<String, String>,
}

impl Tensors {
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        let of = |why: String| format!("{}: {why}", path.display());
        let file = std::fs::read(path).map_err(|error| of(error.to_string()))?;
        let header = parse_header(&file).map_err(|error| of(error.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, entry) in header {
            let bytes = file.get(entry.range).unwrap_or_default();
            let (words, _) = bytes.as_chunks::<4>();
            let values = match entry.dtype {
                Dtype::F32 => {
                    Values::F32(words.iter().map(|w| f32::from_le_bytes(*w)).collect())
                }
                Dtype::U32 => {
                    Values::U32(words.iter().map(|w| u32::from_le_bytes(*w)).collect())
                }
                Dtype::BF16 => Values::Bf16(bytes.to_vec()),
                Dtype::F16 => Values::F16(bytes.to_vec()),
                Dtype::U8 => Values::Codes(bytes.to_vec()),
                other => {
                    return Err(of(format!(
                        "tensor `{name}` is {other:?}: F32, U32, BF16, F16 or U8"
                    )));
                }
            };
            tensors.insert(name, (entry.shape, values));
        }
        // The header was parsed: its length is right.
        let length = file
            .first_chunk::<8>()
            .map_or(0, |length| u64::from_le_bytes(*length));
        let text = file.get(8..8 + usize::try_from(length).unwrap_or_default());
        let metadata: Metadata = text
            .map(serde_json::from_slice)
            .transpose()
            .map_err(|error| of(format!("__metadata__: {error}")))?
            .unwrap_or_default();
        Ok(Self {
            tensors,
            numbers: metadata.numbers,
        })
    }

    /// Writes all tensors one after the other.
    pub(super) fn write(&self, path: &Path) -> Result<(), String> {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, (shape, values)) in &self.tensors {
            let begin = data.len();
            let dtype = match values {
                Values::F32(values) => {
                    data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                    "F32"
                }
                Values::U32(values) => {
                    data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                    "U32"
                }
                Values::Bf16(bytes) => {
                    data.extend_from_slice(bytes);
                    "BF16"
                }
                Values::F16(bytes) => {
                    data.extend_from_slice(bytes);
                    "F16"
                }
                Values::Codes(bytes) => {
                    data.extend_from_slice(bytes);
                    "U8"
                }
            };
            let entry =
                json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]});
            header.insert(name.clone(), entry);
        }
        let mut text = serde_json::Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut file = (text.len() as u64).to_le_bytes().to_vec();
        file.append(&mut text);
        file.append(&mut data);
        std::fs::write(path, file).map_err(|error| format!("{}: {error}", path.display()))
    }

    pub(super) fn with(mut self, name: &str, shape: &[usize], values: Values) -> Self {
        self.tensors
            .insert(name.to_owned(), (shape.to_vec(), values));
        self
    }

    /// A tensor's shape and values.
    pub(super) fn get(&self, name: &str) -> Result<(&[usize], &Values), String> {
        let found = self
            .tensors
            .get(name)
            .map(|(shape, values)| (shape.as_slice(), values));
        found.ok_or_else(|| format!("no tensor `{name}`"))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Outer size (1 for a vector) and width of a float32 tensor, with its values.
    pub(super) fn rows(&self, name: &str) -> Result<(usize, usize, Vec<f32>), String> {
        match self.get(name)? {
            (shape, Values::F32(values)) => {
                let width = shape.last().copied().unwrap_or(1);
                Ok((values.len() / width.max(1), width, values.clone()))
            }
            _ => Err(format!("tensor `{name}` is not F32")),
        }
    }

    pub(super) fn floats(&self, name: &str) -> Result<Vec<f32>, String> {
        self.rows(name).map(|(_, _, values)| values)
    }

    pub(super) fn integers(&self, name: &str) -> Result<&[u32], String> {
        match self.get(name)? {
            (_, Values::U32(values)) => Ok(values),
            _ => Err(format!("tensor `{name}` is not U32")),
        }
    }

    /// A number of the metadata.
    pub(super) fn number<T: std::str::FromStr>(&self, name: &str) -> Result<T, String> {
        let text = self
            .numbers
            .get(name)
            .ok_or_else(|| format!("no number `{name}`"))?;
        text.parse().map_err(|_| format!("`{name}` is {text}"))
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.numbers.get(name).map(String::as_str)
    }
}
