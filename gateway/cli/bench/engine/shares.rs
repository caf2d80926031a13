//! A load spread over the workers of a cluster.

use serde::{Deserialize, Serialize};

use super::rig::Load;

/// One worker's sequences of a load: every `workers`-th, from its rank on.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Share {
    /// Of all workers together.
    pub(super) whole: Load,
    /// Number of workers.
    pub(super) workers: u32,
    /// Whose share it is.
    pub(super) rank: u32,
}

impl Share {
    /// Numbers of the sequences, as the whole load counts them.
    pub(super) fn numbers(self) -> impl Iterator<Item = u32> {
        (self.rank..self.whole.sequences).step_by(self.workers.max(1) as usize)
    }

    /// The load that one worker has: as many tokens in a step of each worker as in a step of one process.
    pub(super) fn load(self) -> Load {
        Load {
            sequences: u32::try_from(self.numbers().count()).unwrap_or(0),
            ..self.whole
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sequence_has_one_worker() {
        let share = |rank| Share {
            whole: Load::decode(7, 16, 8, 512),
            workers: 3,
            rank,
        };
        let numbers: Vec<Vec<u32>> =
            (0..3).map(|rank| share(rank).numbers().collect()).collect();
        assert_eq!(numbers, [vec![0, 3, 6], vec![1, 4], vec![2, 5]]);
        assert_eq!(share(0).load().sequences, 3);
        assert_eq!(share(2).load().answer, share(2).whole.answer);
    }
}
