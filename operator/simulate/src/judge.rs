//! How well a placement carries batches that came after it was made.

use foregate_api::ids::LayerId;
use foregate_api::placement::Placement;
use foregate_planner::split::{SOLVE_GAP, SOLVE_SWEEPS, SplitTable, Splitter, balance, solve};

use crate::generator::{Counts, Rows};
use crate::homes::{even_loads, fixed_loads};
use crate::run::{SimulateError, Watch};
use crate::shape::{Device, Shape};
use crate::sums::mean;

/// Figures by layer and batch. A balance is mean over maximum load of the ranks, in (0, 1].
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Judged {
    /// Decode batches, all copies of an expert alike.
    pub(crate) even: Vec<f64>,
    /// Decode batches, published shares.
    pub(crate) fixed: Vec<f64>,
    /// Decode batches, shares solved for the batch.
    pub(crate) split: Vec<f64>,
    /// Decode batches, as workers split them: whole rows, a fixed number of sweeps from the published shares.
    pub(crate) rows: Vec<f64>,
    /// Prefill batches, shares solved for the batch.
    pub(crate) prefill: Vec<f64>,
    /// Decode batches: the best that any split of this placement could give, by the certificate.
    pub(crate) best: Vec<f64>,
    /// The expected load of the step, even split.
    pub(crate) expected: Vec<f64>,
    /// Slots with rows on a rank, largest over mean, as workers split.
    pub(crate) activated: Vec<f64>,
    /// Balance of the modelled times of the ranks, as workers split.
    pub(crate) time: Vec<f64>,
    /// Microseconds of a solved split, by layer.
    pub(crate) solve_us: Vec<f64>,
    /// Microseconds of a worker's split, by layer.
    pub(crate) rows_us: Vec<f64>,
}

/// Judges placements; keeps the split's workspace.
#[derive(Debug)]
pub(crate) struct Judge {
    shape: Shape,
    device: Device,
    splitter: Splitter,
}

impl Judge {
    pub(crate) fn new(shape: &Shape, device: Device) -> Self {
        Self {
            shape: *shape,
            device,
            splitter: Splitter::new(),
        }
    }

    /// Judges a decode batch.
    pub(crate) fn decode(
        &mut self,
        placement: &Placement,
        batch: &Counts,
        watch: &dyn Watch,
        into: &mut Judged,
    ) -> Result<(), SimulateError> {
        for (l, counts) in batch.iter().enumerate() {
            let layer = &placement.layers[l];
            let (table, rows) = (table(placement, l)?, real(counts));
            into.even.push(balance(&even_loads(layer, &rows)));
            let fixed = fixed_loads(layer, &placement.ranks, &rows);
            into.fixed.push(balance(&fixed));
            let began = watch.micros();
            let solved = solve(&table, &rows, SOLVE_SWEEPS, SOLVE_GAP);
            into.solve_us.push(watch.micros() - began);
            into.split.push(solved.balance());
            into.best.push(mean(&solved.loads) / solved.certificate);
            self.whole_rows(&table, counts, watch, into)?;
        }
        Ok(())
    }

    /// What workers make of a batch.
    fn whole_rows(
        &mut self,
        table: &SplitTable,
        counts: &[u64],
        watch: &dyn Watch,
        into: &mut Judged,
    ) -> Result<(), SimulateError> {
        let counts: Vec<u32> = counts
            .iter()
            .map(|n| u32::try_from(*n).unwrap_or(u32::MAX))
            .collect();
        let idle = vec![0.0; table.ranks().len()];
        let began = watch.micros();
        let split = self.splitter.split(table, &counts, &idle)?;
        into.rows_us.push(watch.micros() - began);
        let (mut loads, mut activated) = (idle.clone(), idle);
        for (copy, rows) in split.iter().enumerate().filter(|(_, rows)| **rows > 0) {
            if let Some(rank) = table.host(copy) {
                loads[rank] += f64::from(*rows);
                activated[rank] += 1.0;
            }
        }
        let times: Vec<f64> = loads
            .iter()
            .zip(&activated)
            .map(|(rows, slots)| self.device.seconds(&self.shape, *slots, *rows))
            .collect();
        into.rows.push(balance(&loads));
        into.activated.push(1.0 / balance(&activated));
        into.time.push(balance(&times));
        Ok(())
    }
}

/// Balance of the expected load of a step under even split, layer by layer.
pub(crate) fn expected(placement: &Placement, expected: &Rows, into: &mut Vec<f64>) {
    for (layer, rows) in placement.layers.iter().zip(expected) {
        into.push(balance(&even_loads(layer, rows)));
    }
}

/// The best split of a batch, layer by layer; rows of experts without a copy are left out.
pub(crate) fn solved(
    placement: &Placement,
    batch: &Counts,
    into: &mut Vec<f64>,
) -> Result<(), SimulateError> {
    for (l, counts) in batch.iter().enumerate() {
        into.push(solved_rows(placement, l, &real(counts))?);
    }
    Ok(())
}

/// The best split of one layer's rows.
pub(crate) fn solved_rows(
    placement: &Placement,
    layer: usize,
    rows: &[f64],
) -> Result<f64, SimulateError> {
    let table = table(placement, layer)?;
    Ok(solve(&table, rows, SOLVE_SWEEPS, SOLVE_GAP).balance())
}

fn table(placement: &Placement, layer: usize) -> Result<SplitTable, SimulateError> {
    SplitTable::new(placement, LayerId(layer as u32)).ok_or(SimulateError::Homeless { layer })
}

fn real(counts: &[u64]) -> Vec<f64> {
    counts.iter().map(|n| *n as f64).collect()
}

/// A clock that stands.
#[cfg(test)]
pub(crate) struct Still;

#[cfg(test)]
impl Watch for Still {
    fn micros(&self) -> f64 {
        0.0
    }
    fn step(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::homes::{placement, ranks};

    #[test]
    fn a_batch_by_hand() {
        // Expert 0 on both ranks, 1 and 2 alone: 40 + 30 + 10 rows.
        let p = placement(ranks(2), &vec![vec![vec![0, 1], vec![0, 2]]], 3);
        let shape = Shape::named("dsv3-64g").unwrap();
        let mut judge = Judge::new(&shape, Device::named("h200").unwrap());
        let mut into = Judged::default();
        let batch = vec![vec![40, 30, 10]];
        judge.decode(&p, &batch, &Still, &mut into).unwrap();
        // Even: 50 and 30. Solved: 40 and 40. Two slots each are read, and the bytes set the time.
        assert!((into.even[0] - 0.8).abs() < 1e-9);
        assert!((into.fixed[0] - 0.8).abs() < 1e-9);
        assert!((into.split[0] - 1.0).abs() < 1e-3);
        assert!((into.rows[0] - 1.0).abs() < 1e-9);
        assert!((into.best[0] - 1.0).abs() < 1e-3);
        assert!((into.activated[0] - 1.0).abs() < 1e-9);
        assert!((into.time[0] - 1.0).abs() < 1e-9);
        solved(&p, &batch, &mut into.prefill).unwrap();
        assert!((into.prefill[0] - into.split[0]).abs() < 1e-12);
    }
}
