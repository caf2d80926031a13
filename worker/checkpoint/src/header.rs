//! The header of a safetensors file, read and checked.
//!
//! The format (<https://github.com/huggingface/safetensors>): 8 bytes little-endian length, a JSON
//! header of that length, then the data; each header entry has a format, a shape and a byte range.

use std::collections::BTreeMap;
use std::fmt;

use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};

pub use safetensors::Dtype;

/// Bytes of the length field.
const LENGTH_BYTES: usize = 8;
/// Longest header we parse; the reference implementation has the same limit.
const MOST_HEADER: usize = 100_000_000;

/// What is wrong with a safetensors header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The file ends inside the header.
    #[error("the file has {found} bytes, but its header needs {needed}")]
    Truncated {
        /// Bytes needed.
        needed: u64,
        /// Bytes present.
        found: u64,
    },
    /// The header claims a size that no model has.
    #[error("a header of {length} bytes is too long (most: {MOST_HEADER})")]
    TooLong {
        /// Its claimed length.
        length: u64,
    },
    /// The header is no JSON of the right form.
    #[error("its header is malformed: {what}")]
    Malformed {
        /// The parser's words.
        what: String,
    },
    /// One tensor's entry contradicts itself, its neighbours or the file.
    #[error("tensor `{name}`: {problem}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// Bytes that belong to no tensor.
    #[error("{count} bytes at its end belong to no tensor")]
    Trailing {
        /// How many.
        count: u64,
    },
}

/// Where one tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Format of its elements.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Byte range in the file.
    pub range: std::ops::Range<usize>,
}

/// Reads and checks the header of a whole safetensors file. Every range of the result lies in `file`,
/// has the size of its shape, and overlaps no other.
///
/// # Errors
/// Names the tensor and the contradiction. Never panics, whatever the bytes.
pub fn parse_header(file: &[u8]) -> Result<BTreeMap<String, Entry>, HeaderError> {
    let found = file.len() as u64;
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(HeaderError::Truncated {
            needed: LENGTH_BYTES as u64,
            found,
        });
    };
    let length = u64::from_le_bytes(*length);
    let header = match usize::try_from(length) {
        Ok(length) if length <= MOST_HEADER => length,
        _ => return Err(HeaderError::TooLong { length }),
    };
    let Some((json, data)) = rest.split_at_checked(header) else {
        return Err(HeaderError::Truncated {
            needed: length + LENGTH_BYTES as u64,
            found,
        });
    };
    let parsed: RawHeader =
        serde_json::from_slice(json).map_err(|error| HeaderError::Malformed {
            what: error.to_string(),
        })?;
    place(&parsed.0, LENGTH_BYTES + header, data.len())
}

/// Checks sizes and that tensors follow each other without gap or overlap to the end of the file.
fn place(
    tensors: &BTreeMap<String, TensorInfo>,
    data_start: usize,
    data_len: usize,
) -> Result<BTreeMap<String, Entry>, HeaderError> {
    let mut order: Vec<(&String, &TensorInfo)> = tensors.iter().collect();
    order.sort_by_key(|(_, info)| info.data_offsets);
    let mut reached = 0;
    let mut entries = BTreeMap::new();
    for (name, info) in order {
        let wrong = |problem: String| HeaderError::Tensor {
            name: name.clone(),
            problem,
        };
        let (start, end) = info.data_offsets;
        let size = byte_size(info)
            .ok_or_else(|| wrong(format!("shape {:?} has no size in bytes", info.shape)))?;
        if end.checked_sub(start) != Some(size) {
            return Err(wrong(format!(
                "bytes {start}..{end} do not hold shape {:?} of {:?} ({size} bytes)",
                info.shape, info.dtype
            )));
        }
        if start != reached {
            return Err(wrong(format!(
                "starts at byte {start} of the data where {reached} was expected (gap or overlap)"
            )));
        }
        if end > data_len {
            return Err(wrong(format!(
                "ends at byte {end} of the data, but the file has only {data_len}"
            )));
        }
        reached = end;
        entries.insert(
            name.clone(),
            Entry {
                dtype: info.dtype,
                shape: info.shape.clone(),
                range: data_start + start..data_start + end,
            },
        );
    }
    if reached == data_len {
        Ok(entries)
    } else {
        Err(HeaderError::Trailing {
            count: (data_len - reached) as u64,
        })
    }
}

/// Bytes of a tensor, if that is a whole number that fits.
fn byte_size(info: &TensorInfo) -> Option<usize> {
    let bits = info
        .shape
        .iter()
        .try_fold(info.dtype.bitsize(), |bits, dim| bits.checked_mul(*dim))?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// The JSON header: refuses a name that stands twice, which a plain map would hide.
struct RawHeader(BTreeMap<String, TensorInfo>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use std::collections::btree_map::Entry;

        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut tensors = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    match tensors.entry(name) {
                        Entry::Occupied(twice) => {
                            let name = twice.key();
                            return Err(A::Error::custom(format!(
                                "tensor `{name}` stands twice"
                            )));
                        }
                        Entry::Vacant(free) => {
                            free.insert(map.next_value()?);
                        }
                    }
                }
                Ok(RawHeader(tensors))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests;
