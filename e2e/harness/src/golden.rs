//! The reference answers beside a fixture: `golden.safetensors`.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// What the reference says about one fixture.
#[derive(Debug, Clone)]
pub struct Golden {
    /// The fixture's directory.
    pub directory: PathBuf,
    /// The prompt.
    pub input: Vec<u32>,
    /// What greedy decoding appends to it.
    pub greedy: Vec<u32>,
    /// `logits[token][id]`.
    pub logits: Vec<Vec<f32>>,
    /// `routes[layer][token]`: chosen experts, ascending.
    pub routes: Vec<Vec<Vec<u32>>>,
}

impl Golden {
    /// Reads the answers of a fixture.
    ///
    /// # Panics
    /// If the file is not what the reference writes.
    #[must_use]
    pub fn read(directory: &Path) -> Self {
        let bytes =
            std::fs::read(directory.join("golden.safetensors")).expect("golden.safetensors");
        let file = SafeTensors::deserialize(&bytes).expect("golden.safetensors can be read");
        let (_, input) = integers(&file, "input_ids");
        let (_, greedy) = integers(&file, "greedy");
        let mut routes = Vec::new();
        while file.tensor(&format!("router.{}", routes.len())).is_ok() {
            let (shape, picks) = integers(&file, &format!("router.{}", routes.len()));
            routes.push(picks.chunks(shape[1]).map(<[u32]>::to_vec).collect());
        }
        assert!(!routes.is_empty(), "the reference shows routes");
        Self {
            directory: directory.to_owned(),
            greedy: greedy[input.len()..].to_vec(),
            input,
            logits: logits(&file),
            routes,
        }
    }

    /// log-softmax of the logits after token `at`, in double precision.
    #[must_use]
    pub fn logprobs(&self, at: usize) -> Vec<f64> {
        let row = &self.logits[at];
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
        row.iter()
            .map(|x| f64::from(x - largest) - sum.ln())
            .collect()
    }
}

fn integers(file: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<u32>) {
    let view = file.tensor(name).expect("the tensor exists");
    assert_eq!(view.dtype(), Dtype::I64, "{name}");
    let (numbers, _) = view.data().as_chunks::<8>();
    let numbers = numbers
        .iter()
        .map(|bytes| u32::try_from(i64::from_le_bytes(*bytes)).expect("a small number"))
        .collect();
    (view.shape().to_vec(), numbers)
}

fn logits(file: &SafeTensors<'_>) -> Vec<Vec<f32>> {
    let view = file.tensor("logits").expect("logits");
    assert_eq!(view.dtype(), Dtype::F32);
    let (numbers, _) = view.data().as_chunks::<4>();
    let flat: Vec<f32> = numbers.iter().map(|b| f32::from_le_bytes(*b)).collect();
    flat.chunks(view.shape()[1]).map(<[f32]>::to_vec).collect()
}
