//! All experts in one process: the oracle that every distributed implementation is compared with.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use foregate_api::ids::{ExpertId, LayerId};
use foregate_checkpoint::Checkpoint;
use foregate_kernels::{
    Anywhere, Cpu, Executor, ExpertParts, ExpertTable, OpError, Ops, View, ViewMut,
};

use crate::error::ModelError;
use crate::expert::{ExpertWeights, GroupMemory, combine, run_experts};
use crate::experts::{ExpertBatch, Experts, ExpertsError, LateRows, through_host};
use crate::reuse::emptied;

/// A batch's (row, choice) pairs, sorted by expert.
///
/// Results of [`run_expert_rows`] called with the groups in order stand in *places* `0..places`;
/// `place[row · top_k + choice]` says which place is whose.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Experts with at least one row, ascending, each with its range of `rows`.
    pub groups: Vec<(ExpertId, std::ops::Range<usize>)>,
    /// Rows in order of expert, then of row.
    pub rows: Vec<u32>,
    /// For each row and choice its place, or [`ExpertGroups::NOWHERE`] for a dead row.
    pub place: Vec<u32>,
    /// While sorting, the next place of each expert.
    next: Vec<usize>,
}

impl ExpertGroups {
    /// Stands in `place` for a pair that is not computed.
    pub const NOWHERE: u32 = u32::MAX;

    /// Sorts a batch's pairs by counting. Dead rows, and experts from `experts` on, get no place.
    pub fn sort(&mut self, batch: &ExpertBatch<'_>, experts: usize) {
        let alive = |pair: usize| {
            let row = pair / batch.top_k.max(1);
            let dead = batch.dead.get(row).copied().unwrap_or(false);
            !dead && (batch.experts[pair] as usize) < experts
        };
        let next = &mut self.next;
        next.clear();
        next.resize(experts + 1, 0);
        for (pair, expert) in batch.experts.iter().enumerate() {
            if alive(pair) {
                next[*expert as usize + 1] += 1;
            }
        }
        self.groups.clear();
        for expert in 0..experts {
            next[expert + 1] += next[expert];
            if next[expert + 1] > next[expert] {
                let range = next[expert]..next[expert + 1];
                self.groups.push((ExpertId(id(expert)), range));
            }
        }
        self.rows.clear();
        self.rows.resize(next[experts], 0);
        self.place.clear();
        for (pair, expert) in batch.experts.iter().enumerate() {
            if alive(pair) {
                let place = &mut next[*expert as usize];
                self.rows[*place] = id(pair / batch.top_k.max(1));
                self.place.push(id(*place));
                *place += 1;
            } else {
                self.place.push(Self::NOWHERE);
            }
        }
    }

    /// Places that results need.
    #[must_use]
    pub const fn places(&self) -> usize {
        self.rows.len()
    }
}

/// Counts of rows and experts fit 32 bits: a batch that large has no memory to stand in.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
const fn id(number: usize) -> u32 {
    number as u32
}

/// Every expert of a model, in this process or on its device.
///
/// A clone shares the weights and has memory of its own.
pub struct LocalExperts {
    ops: Arc<dyn Ops>,
    layers: Vec<Vec<Arc<ExpertWeights>>>,
    /// Where a device finds the experts of each layer; none on the processor.
    tables: Arc<[ExpertTable]>,
    memory: Memory,
}

/// What a step keeps for the next.
#[derive(Debug, Default)]
struct Memory {
    groups: ExpertGroups,
    calls: GroupMemory,
    results: Vec<f32>,
    parts: Vec<&'static [f32]>,
}

impl Clone for LocalExperts {
    fn clone(&self) -> Self {
        Self {
            ops: Arc::clone(&self.ops),
            layers: self.layers.clone(),
            tables: Arc::clone(&self.tables),
            memory: Memory::default(),
        }
    }
}

impl fmt::Debug for LocalExperts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalExperts")
            .field("layers", &self.layers.len())
            .finish_non_exhaustive()
    }
}

impl LocalExperts {
    /// Loads all experts of a checkpoint, as many at a time as `cpu` has threads.
    ///
    /// # Errors
    /// When an expert cannot be read.
    pub fn load(checkpoint: &Checkpoint, cpu: Arc<Cpu>) -> Result<Self, ModelError> {
        let layers = load_layers(checkpoint, cpu.threads(), &|layer, expert| {
            ExpertWeights::load(checkpoint, layer, expert)
        })?;
        Ok(Self {
            ops: cpu,
            layers,
            tables: Arc::default(),
            memory: Memory::default(),
        })
    }

    /// As [`LocalExperts::load`], on a device. `ops` are the device's for rows that come from this process.
    ///
    /// # Errors
    /// When an expert cannot be read, or the device has no memory for it.
    pub fn load_on(
        checkpoint: &Checkpoint,
        executor: &dyn Executor,
        ops: Arc<dyn Ops>,
    ) -> Result<Self, ModelError> {
        let layers = load_layers(checkpoint, 1, &|layer, expert| {
            ExpertWeights::load_on(executor, checkpoint, layer, expert)
        })?;
        let tables: Result<Vec<ExpertTable>, OpError> = layers
            .iter()
            .map(|experts| {
                let parts: Vec<ExpertParts<'_>> =
                    experts.iter().map(|expert| expert.parts()).collect();
                executor.expert_table(&parts)
            })
            .collect();
        Ok(Self {
            ops,
            layers,
            tables: tables?.into(),
            memory: Memory::default(),
        })
    }

    /// The same weights, computed with other ops that give the same results.
    #[must_use]
    pub fn with_ops(&self, ops: Arc<dyn Ops>) -> Self {
        Self {
            ops,
            ..self.clone()
        }
    }

    /// One expert.
    #[must_use]
    pub fn expert(&self, layer: LayerId, expert: ExpertId) -> Option<&Arc<ExpertWeights>> {
        self.layers.get(layer.index())?.get(expert.index())
    }
}

/// How one expert is loaded.
type LoadExpert<'a> =
    &'a (dyn Fn(LayerId, ExpertId) -> Result<ExpertWeights, ModelError> + Sync);

/// All experts of a checkpoint, by layer.
fn load_layers(
    checkpoint: &Checkpoint,
    threads: usize,
    load: LoadExpert<'_>,
) -> Result<Vec<Vec<Arc<ExpertWeights>>>, ModelError> {
    let spec = checkpoint.spec();
    let (layers, experts) = (spec.moe_layers(), spec.experts);
    let mut flat = load_all(layers * experts, experts.max(1), threads, load)?.into_iter();
    Ok((0..layers)
        .map(|_| flat.by_ref().take(experts).collect())
        .collect())
}

/// The first `count` experts, layer by layer. Each thread takes the next one that nobody took.
fn load_all(
    count: usize,
    per_layer: usize,
    threads: usize,
    load: LoadExpert<'_>,
) -> Result<Vec<Arc<ExpertWeights>>, ModelError> {
    let next = AtomicUsize::new(0);
    let places: Vec<OnceLock<Arc<ExpertWeights>>> =
        (0..count).map(|_| OnceLock::new()).collect();
    let work = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(place) = places.get(at) else {
                return Ok(());
            };
            let (layer, expert) = (LayerId(id(at / per_layer)), ExpertId(id(at % per_layer)));
            let loaded =
                load(layer, expert).inspect_err(|_| next.store(count, Ordering::Relaxed))?;
            place.get_or_init(|| Arc::new(loaded));
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mine = work();
        others.into_iter().fold(mine, |all, other| {
            all.and(other.join().unwrap_or(Err(ModelError::Interrupted)))
        })
    })?;
    let all: Option<Vec<_>> = places.into_iter().map(OnceLock::into_inner).collect();
    all.ok_or(ModelError::Interrupted)
}

impl Experts for LocalExperts {
    fn run(
        &mut self,
        batch: &ExpertBatch<'_>,
        out: &mut [f32],
    ) -> Result<LateRows, ExpertsError> {
        let failed = |what: String| ExpertsError {
            layer: batch.layer,
            what,
        };
        let experts = self
            .layers
            .get(batch.layer.index())
            .ok_or_else(|| failed("no such layer".to_owned()))?;
        let Memory {
            groups,
            calls,
            results,
            parts: kept,
        } = &mut self.memory;
        groups.sort(batch, experts.len());
        let rows = groups.groups.iter().map(|(expert, range)| {
            let weights = &*experts[expert.index()];
            (weights, &groups.rows[range.clone()])
        });
        let hidden = batch.hidden;
        results.resize(groups.places() * hidden, 0.0);
        let ops = self.ops.as_ref();
        run_experts(ops, (batch.input, hidden), rows, calls, results)
            .map_err(|error| failed(error.to_string()))?;
        let mut parts: Vec<&[f32]> = emptied(std::mem::take(kept));
        parts.extend(groups.place.iter().map(|place| match *place {
            ExpertGroups::NOWHERE => &[],
            place => &results[place as usize * hidden..(place as usize + 1) * hidden],
        }));
        let done = combine(ops, &parts, batch.weights, batch.top_k, hidden, out);
        *kept = emptied(parts);
        done.map_err(|error| failed(error.to_string()))?;
        Ok(LateRows::new())
    }

    /// On a device all of it stays there.
    fn run_on(
        &mut self,
        executor: &dyn Executor,
        batch: &ExpertBatch<'_, Anywhere>,
        out: ViewMut<'_, f32>,
    ) -> Result<LateRows, ExpertsError> {
        let (View::Device(_), Some(table)) =
            (batch.input, self.tables.get(batch.layer.index()))
        else {
            return through_host(batch, out, |batch, out| self.run(batch, out));
        };
        let op = batch.on_device(table, out);
        executor.expert_layer(op).map_err(|error| ExpertsError {
            layer: batch.layer,
            what: error.to_string(),
        })?;
        Ok(LateRows::new())
    }
}

#[cfg(test)]
mod tests;
