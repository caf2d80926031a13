//! Repeatable choices of a test, from the generator that the sampler uses.
#![allow(dead_code, reason = "each test target uses its part")]
#![allow(unreachable_pub, reason = "a module of a test target")]

use foregate_worker::sampler::draw::philox;

pub struct Random {
    seed: u64,
    drawn: u32,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self { seed, drawn: 0 }
    }

    pub fn next(&mut self) -> u32 {
        self.drawn += 1;
        philox(
            [self.drawn, 1, 0, 0],
            [self.seed as u32, (self.seed >> 32) as u32],
        )[0]
    }

    /// A number in `low..=high`.
    pub fn within(&mut self, low: u32, high: u32) -> u32 {
        low + self.next() % (high - low + 1)
    }

    pub fn chance(&mut self, percent: u32) -> bool {
        self.next() % 100 < percent
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.next() as usize % of.len()]
    }

    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for at in (1..list.len()).rev() {
            list.swap(at, self.next() as usize % (at + 1));
        }
    }
}
