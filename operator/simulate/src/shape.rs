//! What is simulated: models on clusters, and devices with their published figures.

/// A model on a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Name of the setting.
    pub name: &'static str,
    /// MoE layers.
    pub layers: usize,
    /// Routed experts per layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Ranks with expert slots.
    pub ranks: usize,
    /// Hosts; each has the same number of ranks, side by side.
    pub nodes: usize,
    /// Copies per layer, over all ranks.
    pub copies: usize,
    /// Groups of experts that the gate chooses among, 1 without.
    pub groups: usize,
    /// Width of a token's activation.
    pub hidden: usize,
    /// Inner width of an expert.
    pub inner: usize,
}

/// Width, and inner width of an expert.
const MIXTRAL: (usize, usize) = (4096, 14336);
const QWEN3_235B: (usize, usize) = (4096, 1536);
const DEEPSEEK_V3: (usize, usize) = (7168, 2048);

/// All settings. `dsv3-64g` is the main one.
pub const SETTINGS: [Shape; 7] = [
    shape("mixtral-8g", [32, 8, 2, 8, 1, 16, 1], MIXTRAL),
    shape("qwen3-32g", [94, 128, 8, 32, 4, 160, 1], QWEN3_235B),
    shape("dsv3-32g", [58, 256, 8, 32, 4, 288, 8], DEEPSEEK_V3),
    shape("dsv3-64g", [58, 256, 8, 64, 8, 320, 8], DEEPSEEK_V3),
    shape("dsv3-72g", [58, 256, 8, 72, 9, 288, 8], DEEPSEEK_V3),
    shape(
        "inet-320g-1slot",
        [61, 256, 8, 320, 40, 320, 8],
        DEEPSEEK_V3,
    ),
    shape(
        "inet-320g-2slot",
        [61, 256, 8, 320, 40, 640, 8],
        DEEPSEEK_V3,
    ),
];

const fn shape(name: &'static str, of: [usize; 7], (hidden, inner): (usize, usize)) -> Shape {
    let [layers, experts, top_k, ranks, nodes, copies, groups] = of;
    Shape {
        name,
        layers,
        experts,
        top_k,
        ranks,
        nodes,
        copies,
        groups,
        hidden,
        inner,
    }
}

impl Shape {
    /// The setting of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        SETTINGS.into_iter().find(|shape| shape.name == name)
    }

    /// Slots of each rank, per layer.
    #[must_use]
    pub const fn slots(&self) -> usize {
        self.copies / self.ranks
    }

    /// The same with this many slots on each rank.
    #[must_use]
    pub const fn with_slots(self, slots: usize) -> Self {
        Self {
            copies: slots * self.ranks,
            ..self
        }
    }

    /// The host of a rank.
    #[must_use]
    pub const fn node(&self, rank: usize) -> usize {
        rank * self.nodes / self.ranks
    }

    /// Bytes of one expert of one layer in FP8: three matrices.
    #[must_use]
    pub const fn expert_bytes(&self) -> f64 {
        (3 * self.hidden * self.inner) as f64
    }

    /// Tokens of a window of the load statistic.
    #[must_use]
    pub const fn window_tokens(&self) -> f64 {
        (64 * self.ranks * 50) as f64
    }

    /// Tokens of a decode batch.
    #[must_use]
    pub const fn decode_tokens(&self) -> f64 {
        (64 * self.ranks) as f64
    }

    /// Tokens of a prefill batch.
    #[must_use]
    pub const fn prefill_tokens(&self) -> f64 {
        let most = if self.ranks / 4 > 4 {
            self.ranks / 4
        } else {
            4
        };
        (4096 * most) as f64
    }
}

/// What a device can do, as published by its maker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Device {
    /// Name.
    pub name: &'static str,
    /// Bytes per second from its memory.
    pub bandwidth: f64,
    /// FP8 operations per second, dense.
    pub peak: f64,
}

/// Known devices (SXM forms); the first is the default.
pub const DEVICES: [Device; 4] = [
    Device {
        name: "h200",
        bandwidth: 4.8e12,
        peak: 1979e12,
    },
    Device {
        name: "h100",
        bandwidth: 3.35e12,
        peak: 1979e12,
    },
    Device {
        name: "h20",
        bandwidth: 4.0e12,
        peak: 296e12,
    },
    Device {
        name: "b200",
        bandwidth: 8.0e12,
        peak: 4500e12,
    },
];

impl Device {
    /// The device of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        DEVICES.into_iter().find(|device| device.name == name)
    }

    /// Seconds for a rank's experts of one layer: the longer of reading the weights of `activated` copies and of
    /// computing `rows` rows.
    #[must_use]
    pub fn seconds(&self, shape: &Shape, activated: f64, rows: f64) -> f64 {
        let read = activated * shape.expert_bytes() / self.bandwidth;
        let computed = 6.0 * (shape.hidden * shape.inner) as f64 * rows / self.peak;
        read.max(computed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_the_same_slots_and_every_node_the_same_ranks() {
        for shape in SETTINGS {
            assert_eq!(shape.copies, shape.slots() * shape.ranks, "{}", shape.name);
            for node in 0..shape.nodes {
                let ranks = (0..shape.ranks).filter(|rank| shape.node(*rank) == node);
                assert_eq!(ranks.count() * shape.nodes, shape.ranks, "{}", shape.name);
            }
        }
    }

    #[test]
    fn an_expert_of_deepseek_has_44_megabytes_and_the_ridge_lies_at_206_to_295_rows() {
        let shape = Shape::named("dsv3-64g").unwrap();
        assert!((shape.expert_bytes() / 44.0e6 - 1.0).abs() < 0.01);
        for (name, ridge) in [("h200", 206.0), ("h100", 295.0)] {
            let device = Device::named(name).unwrap();
            let at = |rows| device.seconds(&shape, 1.0, rows);
            assert!((at(ridge - 5.0) - at(1.0)).abs() < 1e-12, "{name}");
            assert!(at(ridge + 5.0) > at(1.0), "{name}");
        }
    }
}
