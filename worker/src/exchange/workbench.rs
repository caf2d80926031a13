//! Rows of one layer through this worker's experts: those of peers' calls, and those of its own sequences beside
//! them. Rows of one expert are brought together whoever sent them, which does not change their bits.

use foregate_api::ids::{ExpertId, LayerId};
use foregate_kernels::{OpError, Ops};
use foregate_models::{GroupMemory, run_experts};

use super::plan::Shipment;
use super::queue::Job;
use crate::residency::Resident;

/// Rows of this worker's own sequences. Their experts are all here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Own<'a> {
    pub(super) layer: LayerId,
    /// The batch's rows, of which the shipment names some.
    pub(super) input: &'a [f32],
    pub(super) shipment: &'a Shipment,
}

/// Memory of a thread that runs experts, used again.
#[derive(Debug, Default)]
pub(super) struct Workbench {
    /// Rows of everybody, one after the other; unused for a single source.
    input: Vec<f32>,
    /// `(expert, row of the input, number of the route over all)`, by expert. Own routes come first.
    order: Vec<(ExpertId, u32, u32)>,
    rows: Vec<u32>,
    results: Vec<f32>,
    memory: GroupMemory,
    /// For each route over all, the row of `results` that is its.
    place: Vec<u32>,
}

impl Workbench {
    /// Runs calls of one layer, and own rows of the same. All of their experts are in `table`.
    pub(super) fn run(
        &mut self,
        ops: &dyn Ops,
        hidden: usize,
        (layer, table): (LayerId, &Resident),
        jobs: &[Job],
        own: Option<Own<'_>>,
    ) -> Result<(), OpError> {
        self.gather(hidden, jobs, own);
        let input = match (jobs, own) {
            ([one], None) => one.call.rows.as_slice(),
            ([], Some(own)) => own.input,
            _ => &self.input,
        };
        self.rows.clear();
        self.rows.extend(self.order.iter().map(|(_, row, _)| *row));
        let mut start = 0;
        let rows = &self.rows;
        let groups = self.order.chunk_by(|a, b| a.0 == b.0);
        let calls = groups.filter_map(|group| {
            let of_group = &rows[start..start + group.len()];
            start += group.len();
            let expert = table.get(layer, group[0].0)?;
            Some((&**expert, of_group))
        });
        self.results.resize(self.order.len() * hidden, 0.0);
        let memory = &mut self.memory;
        run_experts(ops, (input, hidden), calls, memory, &mut self.results)
    }

    /// Brings rows together if they come from several, and sorts all routes by expert.
    fn gather(&mut self, hidden: usize, jobs: &[Job], own: Option<Own<'_>>) {
        self.input.clear();
        self.order.clear();
        let (mut first_row, mut route) = (0_u32, 0_u32);
        if let Some(own) = own {
            let shipment = own.shipment;
            let alone = jobs.is_empty();
            for wanted in &shipment.routes {
                let row = match alone {
                    true => shipment.rows[wanted.row as usize],
                    false => wanted.row,
                };
                self.order.push((wanted.expert, row, route));
                route += 1;
            }
            if !alone {
                for row in &shipment.rows {
                    let at = *row as usize * hidden;
                    self.input.extend_from_slice(&own.input[at..at + hidden]);
                }
                first_row = count(shipment.rows.len());
            }
        }
        let several = jobs.len() > 1 || own.is_some();
        for job in jobs {
            for wanted in &job.call.routes {
                self.order
                    .push((wanted.expert, first_row + wanted.row, route));
                route += 1;
            }
            if several {
                self.input.extend_from_slice(&job.call.rows);
                first_row += count(job.call.rows.len() / hidden.max(1));
            }
        }
        self.order.sort_unstable();
        self.place.clear();
        self.place.resize(self.order.len(), 0);
        for ((_, _, route), place) in self.order.iter().zip(0_u32..) {
            self.place[*route as usize] = place;
        }
    }

    /// The results of some routes, in their order.
    pub(super) fn rows_of(&self, routes: std::ops::Range<usize>, hidden: usize) -> Vec<f32> {
        let mut rows = Vec::with_capacity(routes.len() * hidden);
        for place in &self.place[routes] {
            let at = *place as usize * hidden;
            rows.extend_from_slice(&self.results[at..at + hidden]);
        }
        rows
    }

    /// Takes the results of all out, with the place of each of the first `own` routes in them.
    pub(super) fn take_results(&mut self, own: usize, place: &mut Vec<u32>) -> Vec<f32> {
        place.clear();
        place.extend_from_slice(&self.place[..own]);
        std::mem::take(&mut self.results)
    }

    /// Gives memory back that was taken.
    pub(super) fn give_back(&mut self, results: Vec<f32>) {
        if results.capacity() > self.results.capacity() {
            self.results = results;
        }
    }
}

/// Rows of a queue and of a batch fit 32 bits: limits of the queue and memory bound them.
const fn count(number: usize) -> u32 {
    number as u32
}
