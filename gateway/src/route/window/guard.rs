//! Does it earn its cost? A slice of the requests is placed at random, and what placement saves is compared.
//!
//! When a request ends, the experts that it really used are known. What its placement *saved* is the number of
//! experts that its tokens would have added on the average worker, less what they added on its own. A request that was
//! placed at random saves nothing on average; one that joined its like should. The difference of both is the gain.
//! Where it is worth less than [`LEAST_GAIN`] of a step's time for [`PATIENCE`] intervals in a row, the policy is off;
//! it is tried again after a pause that doubles.

/// Share of requests placed at random until the gain is proven.
pub const CONTROL: f64 = 0.05;
/// What is left of that share afterwards: a stranger costs a grouped batch more than it costs a mixed one.
const PROVEN: f64 = 0.2;
/// Requests that end in an interval.
const INTERVAL: u32 = 100;
/// What older intervals still weigh, per interval.
const MEMORY: f64 = 0.8;
/// Gain that pays for the trouble, as a share of a step's time.
const LEAST_GAIN: f64 = 0.02;
/// Intervals in a row below it after which the policy is off.
const PATIENCE: u32 = 3;
/// Requests of the first pause, and of the longest.
const PAUSE: (u64, u64) = (400, 100_000);

/// Mean of saved experts, the old ones fading.
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
    /// Requests that ended in this interval.
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

    /// Of the settings' control slice, the part that is needed now.
    #[must_use]
    pub const fn slice(&self) -> f64 {
        if self.low == 0 && self.intervals >= PATIENCE {
            PROVEN
        } else {
            1.0
        }
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

    /// A request ended whose placement saved so many experts. `value` turns experts saved per sequence into a share of
    /// a step's time.
    pub fn ended(&mut self, control: bool, saved: f64, value: impl Fn(f64) -> f64) {
        if !self.is_on() {
            return;
        }
        if control {
            self.control.add(saved)
        } else {
            self.grouped.add(saved)
        }
        self.ended += 1;
        if self.ended < INTERVAL {
            return;
        }
        let (Some(random), Some(grouped)) = (self.control.value(), self.grouped.value()) else {
            // Without anything to compare with the interval goes on.
            return;
        };
        self.ended = 0;
        let gain = value(grouped - random);
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

    /// Ends intervals in which a request in twenty saves nothing and the others save `grouped`.
    fn run(guard: &mut Guard, intervals: u32, grouped: f64) {
        for at in 0..intervals * INTERVAL {
            let control = at % 20 == 7;
            let saved = if control { 0.0 } else { grouped };
            guard.ended(control, saved, |saved| saved / 10.0);
        }
    }

    #[test]
    fn no_gain_switches_off_after_three_intervals_and_gain_does_not() {
        let mut guard = Guard::default();
        assert!((guard.slice() - 1.0).abs() < 1e-9);
        run(&mut guard, 20, 1.0);
        assert!(guard.is_on() && guard.switch_offs() == 0 && guard.slice() < 0.5);
        let mut guard = Guard::default();
        run(&mut guard, 2, 0.0);
        assert!(guard.is_on());
        run(&mut guard, 1, 0.0);
        assert!(!guard.is_on() && guard.switch_offs() == 1);
    }

    #[test]
    fn a_change_for_the_worse_is_seen_within_ten_intervals() {
        let mut guard = Guard::default();
        run(&mut guard, 30, 1.0);
        run(&mut guard, 10, 0.0);
        assert_eq!(guard.switch_offs(), 1);
    }

    #[test]
    fn pauses_double_until_it_gains_again() {
        let mut guard = Guard::default();
        let mut pauses = Vec::new();
        for _ in 0..4 {
            run(&mut guard, 3, 0.0);
            let mut pause = 0;
            while !guard.is_on() {
                guard.placed();
                pause += 1;
            }
            pauses.push(pause);
        }
        assert_eq!(pauses, [400, 800, 1600, 3200]);
        run(&mut guard, 3, 1.0);
        run(&mut guard, 6, 0.0);
        while guard.is_on() {
            run(&mut guard, 1, 0.0);
        }
        assert_eq!(guard.pause, 400);
    }
}
