//! Weights out of a seed and a tensor's name, the same on every machine.

use foregate_api::weights::WeightFormat;

use crate::names::Expected;

/// Draws a tensor in the given format, little-endian.
pub(super) fn tensor(seed: u64, want: &Expected, format: WeightFormat) -> Vec<u8> {
    let elements: usize = want.shape.iter().product();
    let law = Law::of(want);
    let mut draws = Draws::new(seed, &want.name);
    let mut bytes = Vec::with_capacity(format.matrix_bytes(1, elements));
    for _ in 0..elements {
        let value = law.centre + law.spread * draws.next();
        match format {
            WeightFormat::Bfloat16 => {
                bytes.extend_from_slice(&half::bf16::from_f32(value).to_le_bytes());
            }
            WeightFormat::Float16 => {
                bytes.extend_from_slice(&half::f16::from_f32(value).to_le_bytes());
            }
            _ => bytes.extend_from_slice(&value.to_le_bytes()),
        }
    }
    bytes
}

/// Mean and standard deviation of a tensor's weights.
struct Law {
    centre: f32,
    spread: f32,
}

impl Law {
    fn of(want: &Expected) -> Self {
        let name = want.name.as_str();
        #[expect(clippy::cast_precision_loss, reason = "a width, far below 2^24")]
        let fan_in = want.shape.last().copied().unwrap_or(1) as f32;
        let (centre, spread) = if name.ends_with("norm.weight") {
            (1.0, 0.1)
        } else if name.ends_with(".bias") {
            (0.0, 0.2)
        } else if name.ends_with("embed_tokens.weight") {
            (0.0, 1.0)
        } else if name.ends_with("gate.weight") {
            (0.0, 3.0 / fan_in.sqrt())
        } else {
            (0.0, 1.2 / fan_in.sqrt())
        };
        Self { centre, spread }
    }
}

/// Numbers of mean 0 and variance 1, near enough to normal: four uniform ones added (Irwin-Hall).
/// No transcendental function, so every machine has the same bits.
struct Draws {
    state: u64,
}

impl Draws {
    fn new(seed: u64, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
        let hash = hasher.finalize();
        let (start, _) = hash.as_bytes().split_at(8);
        let mut state = [0; 8];
        state.copy_from_slice(start);
        Self {
            state: u64::from_le_bytes(state),
        }
    }

    /// splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    fn next(&mut self) -> f32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        // The sum of four 16-bit fields has mean 2 · 65535 and standard deviation 65536 / sqrt(3).
        let mut sum = -131_070_i32;
        for field in 0..4 {
            sum += i32::from(((z >> (16 * field)) & 0xffff) as u16);
        }
        #[expect(clippy::cast_precision_loss, reason = "below 2^18, exact")]
        let sum = sum as f32;
        sum * (1.732_050_8 / 65_536.0)
    }
}
