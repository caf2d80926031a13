//! Does it earn its cost? A slice of the requests is placed at random, and what they cost is compared.
//!
//! When a request ends, the experts that it really used are known. The *added* experts of a request are those of a
//! token of its that no other sequence of its worker is expected to use. A request that was placed at random adds
//! more than one that joined its like: by half the difference per sequence the batch shrinks, because the last that
//! joins gains all of it and the first none. Where that is worth less than [`LEAST_GAIN`] of a step's time for
//! [`PATIENCE`] intervals in a row, the policy is off; it is tried again after a pause that doubles.

/// Share of requests placed at random.
pub const CONTROL: f64 = 0.05;
/// Control requests that end in an interval.
const INTERVAL: u32 = 5;
/// What older intervals still weigh, per interval.
const MEMORY: f64 = 0.7;
/// Gain that pays for the trouble, as a share of a step's time.
const LEAST_GAIN: f64 = 0.03;
/// Intervals in a row below it after which the policy is off.
const PATIENCE: u32 = 3;
/// Requests of the first pause, and of the longest.
const PAUSE: (u64, u64) = (400, 100_000);

/// Mean of added experts, the old ones fading.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    fn add(&mut self, x: f64) {
        self.sum += x;
        self.weight += 1.0;
    }

    fn fade(&mut self) {
        self.sum *= MEMORY;
        self.weight *= MEMORY;
    }

    fn value(self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}

/// Whether the policy is on, and why.
#[derive(Debug, Clone)]
pub struct Guard {
    control: Mean,
    grouped: Mean,
    /// Control requests that ended in this interval.
    ended: u32,
    /// Intervals in a row without gain.
    low: u32,
    /// Intervals closed since the policy was last turned on.
    intervals: u32,
    /// Requests left of a pause; 0: on.
    pause: u64,
    next_pause: u64,
    switch_offs: u64,
    gain: Option<f64>,
}

impl Default for Guard {
    fn default() -> Self {
        Self {
            control: Mean::default(),
            grouped: Mean::default(),
            ended: 0,
            low: 0,
            intervals: 0,
            pause: 0,
            next_pause: PAUSE.0,
            switch_offs: 0,
            gain: None,
        }
    }
}

impl Guard {
    /// Whether requests may be grouped.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.pause == 0
    }

    /// How often it was switched off.
    #[must_use]
    pub const fn switch_offs(&self) -> u64 {
        self.switch_offs
    }

    /// The gain of the last interval, as a share of a step's time.
    #[must_use]
    pub const fn gain(&self) -> Option<f64> {
        self.gain
    }

    /// Counts a request that was placed; a pause is measured in them.
    pub const fn placed(&mut self) {
        self.pause = self.pause.saturating_sub(1);
    }

    /// A request ended that added so many experts. `value` turns fewer experts added per sequence into a share of
    /// a step's time.
    pub fn ended(&mut self, control: bool, added: f64, value: impl Fn(f64) -> f64) {
        if !self.is_on() {
            return;
        }
        if !control {
            return self.grouped.add(added);
        }
        self.control.add(added);
        self.ended += 1;
        if self.ended < INTERVAL {
            return;
        }
        self.ended = 0;
        let (Some(random), Some(grouped)) = (self.control.value(), self.grouped.value()) else {
            return;
        };
        let gain = value(random - grouped);
        self.gain = Some(gain);
        self.control.fade();
        self.grouped.fade();
        self.judge(gain);
    }

    fn judge(&mut self, gain: f64) {
        self.intervals += 1;
        if gain >= LEAST_GAIN {
            self.low = 0;
            if self.intervals >= PATIENCE {
                self.next_pause = PAUSE.0;
            }
            return;
        }
        self.low += 1;
        if self.low >= PATIENCE {
            *self = Self {
                pause: self.next_pause,
                next_pause: (self.next_pause * 2).min(PAUSE.1),
                switch_offs: self.switch_offs + 1,
                gain: self.gain,
                ..Self::default()
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ends intervals in which control requests add `control` and others `grouped`.
    fn run(guard: &mut Guard, intervals: u32, control: f64, grouped: f64) {
        for _ in 0..intervals * INTERVAL {
            for _ in 0..19 {
                guard.ended(false, grouped, |less| less / 10.0);
            }
            guard.ended(true, control, |less| less / 10.0);
        }
    }

    #[test]
    fn no_gain_switches_off_after_three_intervals_and_gain_does_not() {
        let mut guard = Guard::default();
        run(&mut guard, 20, 3.0, 2.0);
        assert!(guard.is_on() && guard.switch_offs() == 0);
        let mut guard = Guard::default();
        run(&mut guard, 2, 3.0, 3.0);
        assert!(guard.is_on());
        run(&mut guard, 1, 3.0, 3.0);
        assert!(!guard.is_on() && guard.switch_offs() == 1);
    }

    #[test]
    fn a_change_for_the_worse_is_seen_within_ten_intervals() {
        let mut guard = Guard::default();
        run(&mut guard, 30, 3.0, 2.0);
        run(&mut guard, 10, 3.0, 3.0);
        assert_eq!(guard.switch_offs(), 1);
    }

    #[test]
    fn pauses_double_until_it_gains_again() {
        let mut guard = Guard::default();
        let mut pauses = Vec::new();
        for _ in 0..4 {
            run(&mut guard, 3, 2.0, 2.0);
            let mut pause = 0;
            while !guard.is_on() {
                guard.placed();
                pause += 1;
            }
            pauses.push(pause);
        }
        assert_eq!(pauses, [400, 800, 1600, 3200]);
        run(&mut guard, 3, 3.0, 2.0);
        run(&mut guard, 6, 2.0, 2.0);
        while guard.is_on() {
            run(&mut guard, 1, 2.0, 2.0);
        }
        assert_eq!(guard.pause, 400);
    }
}
