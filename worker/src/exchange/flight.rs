//! One layer's calls, from the first send to the last answer or the deadline.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use foregate_api::ids::{Epoch, LayerId, Rank};
use foregate_kernels::OpError;
use foregate_models::experts::{ExpertBatch, LateRows};
use foregate_planner::split::SplitTable;
use foregate_wire::frame::{Call, Reply, Route, TraceContext};

use super::ExchangeParts;
use super::loads::PeerLoads;
use super::plan::{Shipment, replan};
use super::serve::Desk;
use super::workbench::Own;
use crate::fabric::{Completion, Outcome};
use crate::metrics::Where;

/// What a flight works with.
pub(super) struct FlightParts<'a> {
    pub(super) exchange: &'a ExchangeParts,
    pub(super) loads: &'a mut PeerLoads,
    pub(super) next_call: &'a mut u64,
    pub(super) company: &'a mut Company,
    pub(super) desk: &'a mut Desk,
    pub(super) epoch: Epoch,
    pub(super) trace: Option<TraceContext>,
    pub(super) table: &'a SplitTable,
    pub(super) batch: &'a ExpertBatch<'a>,
    pub(super) most: usize,
}

/// Peers that step with this worker: they called in this layer or in the one before.
///
/// The call of one that is behind is about to come. Run together with own rows it costs little more than own rows
/// alone; run after them it costs about as much again. So it pays to wait for it as long as own rows take, and who
/// has waited once is in step from then on. One that is ahead is not waited for: it waits itself.
#[derive(Debug, Default)]
pub(super) struct Company {
    /// For each peer the layer that it called for last, and in which flight.
    seen: BTreeMap<Rank, (LayerId, u64)>,
    flight: u64,
    /// How long the last own rows took.
    product: Duration,
    /// Peers to wait for; kept for its memory.
    awaited: Vec<Rank>,
}

impl Company {
    /// Longest wait for it.
    fn patience(&self) -> Duration {
        self.product.min(MOST_PATIENCE)
    }

    fn note(&mut self, callers: &mut Vec<(Rank, LayerId)>) {
        for (rank, layer) in callers.drain(..) {
            self.seen.insert(rank, (layer, self.flight));
        }
    }

    /// Peers of which a call for `layer` is to come soon: the last one was for a layer before it. Layers are
    /// counted in a circle of `layers`, since a step follows the other.
    fn await_at(&mut self, layer: LayerId, layers: usize) {
        let flight = self.flight;
        let behind = |last: &LayerId| {
            let by = (layer.index() + layers - last.index()) % layers.max(1);
            (1..=layers.div_ceil(2)).contains(&by)
        };
        let soon = self
            .seen
            .iter()
            .filter(|(_, (last, when))| flight.saturating_sub(*when) <= 1 && behind(last));
        self.awaited.clear();
        self.awaited.extend(soon.map(|(rank, _)| *rank));
    }
}

/// Longest wait for calls of company.
const MOST_PATIENCE: Duration = Duration::from_millis(20);

/// A call that was sent.
#[derive(Debug)]
struct Outstanding {
    shipment: Shipment,
    /// Ranks that must not get these pairs again.
    tried: BTreeSet<Rank>,
    /// Whether another copy was asked because this one is slow.
    hedged: bool,
}

/// A shipment that waits to be sent or run, with the ranks that failed it.
type Waiting = (Shipment, BTreeSet<Rank>);

pub(super) struct Flight<'a> {
    parts: FlightParts<'a>,
    outstanding: BTreeMap<u64, Outstanding>,
    results: Results,
    soft: Instant,
    hard: Instant,
    /// Whether calls of company have been waited for.
    waited: bool,
}

/// Rows that came back, by pair.
#[derive(Debug)]
pub(super) struct Results {
    hidden: usize,
    /// Answers, each with one row per pair of its shipment.
    rows: Vec<Vec<f32>>,
    /// For each pair the answer and its row, or [`NOWHERE`].
    place: Vec<(u32, u32)>,
    missing: usize,
}

const NOWHERE: (u32, u32) = (u32::MAX, u32::MAX);

impl<'a> Flight<'a> {
    #[expect(
        clippy::disallowed_methods,
        reason = "the engine thread waits on the wall clock"
    )]
    pub(super) fn new(parts: FlightParts<'a>) -> Self {
        let now = Instant::now();
        let deadline = parts.exchange.deadline;
        let results = Results::new(parts.batch);
        parts.company.flight += 1;
        Self {
            parts,
            outstanding: BTreeMap::new(),
            results,
            soft: now + deadline / 2,
            hard: now + deadline,
            waited: false,
        }
    }

    /// Sends, computes and collects. Afterwards every pair has its row or is late.
    pub(super) fn fly(&mut self, shipments: Vec<Shipment>) -> Result<(), OpError> {
        let own = self.parts.exchange.rank;
        let mut waiting: Vec<Waiting> = shipments
            .into_iter()
            .map(|s| (s, BTreeSet::new()))
            .collect();
        // Remote first: the peers work while the local rows are computed.
        waiting.sort_by_key(|(shipment, _)| shipment.rank == own);
        self.launch(waiting)?;
        self.collect()?;
        // Peers that are still in this layer wait for these.
        self.serve_peers()?;
        self.parts.company.note(&mut self.parts.desk.callers);
        Ok(())
    }

    /// Waits for answers, and runs calls of peers meanwhile: a peer waits for its answer as this worker does.
    fn collect(&mut self) -> Result<(), OpError> {
        let exchange = self.parts.exchange;
        while !self.outstanding.is_empty() && self.results.missing > 0 {
            let seen = exchange.inbox.events();
            self.serve_peers()?;
            if let Some(completion) = exchange.inbox.take() {
                self.land(completion)?;
                continue;
            }
            let until = if self.can_hedge() {
                self.soft
            } else {
                self.hard
            };
            if !exchange.inbox.wait_past(seen, until) {
                match until == self.soft {
                    true => self.hedge()?,
                    false => break,
                }
            }
        }
        Ok(())
    }

    fn serve_peers(&mut self) -> Result<(), OpError> {
        let exchange = self.parts.exchange;
        let ops = exchange.ops.as_ref();
        exchange.server.serve(ops, None, self.parts.desk).map(drop)
    }

    /// Waits a little for the calls of peers that step with this worker. What they still call for of layers before
    /// is run meanwhile, or they would never come here.
    #[expect(
        clippy::disallowed_methods,
        reason = "the engine thread waits on the wall clock"
    )]
    fn wait_for_company(&mut self) -> Result<(), OpError> {
        if std::mem::replace(&mut self.waited, true) || self.outstanding.is_empty() {
            return Ok(());
        }
        let FlightParts {
            exchange,
            company,
            desk,
            batch,
            ..
        } = &mut self.parts;
        let (server, ops) = (&exchange.server, exchange.ops.as_ref());
        let until = Instant::now() + company.patience();
        loop {
            let seen = exchange.inbox.events();
            company.await_at(batch.layer, exchange.spec.moe_layers());
            if company.awaited.is_empty() || server.has_calls(&company.awaited, batch.layer) {
                return Ok(());
            }
            server.serve_but(ops, batch.layer, desk)?;
            company.note(&mut desk.callers);
            if !exchange.inbox.wait_past(seen, until) {
                return Ok(());
            }
        }
    }

    /// Rows with a pair that came from nobody, ascending; dead rows are not among them.
    pub(super) fn late_rows(&self) -> LateRows {
        self.results.late_rows(self.parts.batch)
    }

    pub(super) fn into_results(self) -> Results {
        self.results
    }

    /// Sends or runs shipments; one that is not accepted goes to other copies, as long as there are any.
    fn launch(&mut self, mut waiting: Vec<Waiting>) -> Result<(), OpError> {
        waiting.reverse();
        while let Some((shipment, mut tried)) = waiting.pop() {
            tried.insert(shipment.rank);
            let failed = if shipment.rank == self.parts.exchange.rank {
                self.run_here(shipment)?
            } else {
                self.send(shipment, &tried)
            };
            if let Some(shipment) = failed {
                let again = self.other_copies(&shipment.pairs, &tried);
                waiting.extend(again.into_iter().map(|s| (s, tried.clone())));
            }
        }
        Ok(())
    }

    /// Sends a shipment; gives it back if it was not accepted.
    #[expect(
        clippy::disallowed_methods,
        reason = "the engine thread waits on the wall clock"
    )]
    fn send(&mut self, shipment: Shipment, tried: &BTreeSet<Rank>) -> Option<Shipment> {
        let left = self.hard.saturating_duration_since(Instant::now());
        let number = *self.parts.next_call;
        *self.parts.next_call += 1;
        let call = Call {
            epoch: self.parts.epoch,
            call: number,
            layer: self.parts.batch.layer,
            deadline_us: u32::try_from(left.as_micros()).unwrap_or(u32::MAX),
            trace: self.parts.trace,
            hidden: count(self.parts.batch.hidden),
            rows: gather(self.parts.batch, &shipment.rows),
            routes: shipment.routes.clone(),
        };
        let exchange = self.parts.exchange;
        match exchange.fabric.send(shipment.rank, call, self.hard) {
            Ok(()) => {
                exchange.metrics.rows(Where::Remote, shipment.routes.len());
                self.outstanding.insert(
                    number,
                    Outstanding {
                        shipment,
                        tried: tried.clone(),
                        hedged: false,
                    },
                );
                None
            }
            Err(error) => {
                tracing::debug!(%error, "exchange_send_refused");
                Some(shipment)
            }
        }
    }

    /// Runs a shipment on this worker's experts, together with calls of peers that are there; gives it back if
    /// an expert is not resident.
    #[expect(
        clippy::disallowed_methods,
        reason = "the engine thread measures on the wall clock"
    )]
    fn run_here(&mut self, shipment: Shipment) -> Result<Option<Shipment>, OpError> {
        let exchange = self.parts.exchange;
        let batch = self.parts.batch;
        let table = exchange.residency.snapshot();
        let missing = |route: &&Route| table.get(batch.layer, route.expert).is_none();
        if let Some(route) = shipment.routes.iter().find(missing) {
            tracing::warn!(layer = %batch.layer, expert = %route.expert, "expert_not_resident");
            return Ok(Some(shipment));
        }
        self.wait_for_company()?;
        let own = Own {
            layer: batch.layer,
            input: batch.input,
            shipment: &shipment,
        };
        let (ops, desk) = (exchange.ops.as_ref(), &mut *self.parts.desk);
        let begun = Instant::now();
        let results = exchange.server.serve(ops, Some(own), desk)?;
        self.parts.company.product = begun.elapsed();
        exchange.server.ran_here(batch.layer, shipment.routes.len());
        let rows = desk.place.iter().copied();
        self.results
            .add(results, shipment.pairs.iter().copied().zip(rows));
        Ok(None)
    }

    /// Takes the end of a call. One that is not outstanding belongs to an earlier layer.
    fn land(&mut self, completion: Completion) -> Result<(), OpError> {
        let Some(call) = self.outstanding.remove(&completion.call) else {
            return Ok(());
        };
        let exchange = self.parts.exchange;
        match completion.outcome {
            Outcome::Reply(reply) if self.fits(&reply, &call.shipment) => {
                self.parts.loads.report(completion.peer, reply.queued);
                self.results
                    .add(reply.rows, call.shipment.pairs.iter().copied().zip(0..));
                return Ok(());
            }
            Outcome::Reply(_) => {
                tracing::error!(peer = %completion.peer, "exchange_answer_of_wrong_size");
            }
            Outcome::Refused(reason) => exchange.metrics.refused_by_peer(reason),
            Outcome::Lost => exchange.metrics.call_lost(),
        }
        if call.hedged {
            return Ok(());
        }
        self.elsewhere(&call.shipment.pairs, &call.tried)
    }

    fn fits(&self, reply: &Reply, shipment: &Shipment) -> bool {
        let hidden = self.parts.batch.hidden;
        reply.hidden as usize == hidden && reply.rows.len() == shipment.routes.len() * hidden
    }

    fn can_hedge(&self) -> bool {
        self.outstanding.values().any(|call| !call.hedged)
    }

    /// The soft deadline has passed: asks other copies for what is missing. The slow calls stay
    /// outstanding; whichever answer comes first counts, both have the same bits.
    fn hedge(&mut self) -> Result<(), OpError> {
        let mut slow = Vec::new();
        for call in self.outstanding.values_mut().filter(|call| !call.hedged) {
            call.hedged = true;
            slow.push((call.shipment.pairs.clone(), call.tried.clone()));
        }
        for (pairs, tried) in slow {
            self.elsewhere(&pairs, &tried)?;
        }
        // What was sent just now has until the deadline.
        for call in self.outstanding.values_mut() {
            call.hedged = true;
        }
        Ok(())
    }

    fn elsewhere(&mut self, pairs: &[u32], tried: &BTreeSet<Rank>) -> Result<(), OpError> {
        let again = self.other_copies(pairs, tried);
        self.launch(again.into_iter().map(|s| (s, tried.clone())).collect())
    }

    fn other_copies(&self, pairs: &[u32], tried: &BTreeSet<Rank>) -> Vec<Shipment> {
        let exchange = self.parts.exchange;
        let missing: Vec<u32> = pairs
            .iter()
            .copied()
            .filter(|pair| self.results.is_missing(*pair))
            .collect();
        let unusable = |rank: Rank| {
            tried.contains(&rank) || (rank != exchange.rank && !exchange.fabric.is_up(rank))
        };
        let (table, batch) = (self.parts.table, self.parts.batch);
        let again = replan(table, batch, &missing, &unusable, self.parts.most);
        exchange
            .metrics
            .retried(again.iter().map(|s| s.routes.len()).sum());
        again
    }
}

impl Results {
    /// Of no batch.
    pub(super) const fn none() -> Self {
        Self {
            hidden: 0,
            rows: Vec::new(),
            place: Vec::new(),
            missing: 0,
        }
    }

    pub(super) fn new(batch: &ExpertBatch<'_>) -> Self {
        let top_k = batch.top_k.max(1);
        let dead = batch.dead.iter().filter(|dead| **dead).count();
        Self {
            hidden: batch.hidden,
            rows: Vec::new(),
            place: vec![NOWHERE; batch.experts.len()],
            missing: batch.experts.len().saturating_sub(dead * top_k),
        }
    }

    /// Takes an answer with a row for each of `pairs`, given with it. A pair that has its row already keeps it.
    pub(super) fn add(&mut self, rows: Vec<f32>, pairs: impl Iterator<Item = (u32, u32)>) {
        let answer = count(self.rows.len());
        for (pair, row) in pairs {
            if let Some(place) = self.place.get_mut(pair as usize)
                && *place == NOWHERE
            {
                *place = (answer, row);
                self.missing = self.missing.saturating_sub(1);
            }
        }
        self.rows.push(rows);
    }

    /// The largest of the answers' memory, to be used again.
    pub(super) fn into_largest(self) -> Vec<f32> {
        let rows = self.rows.into_iter();
        rows.max_by_key(Vec::capacity).unwrap_or_default()
    }

    fn is_missing(&self, pair: u32) -> bool {
        self.place.get(pair as usize) == Some(&NOWHERE)
    }

    pub(super) fn late_rows(&self, batch: &ExpertBatch<'_>) -> LateRows {
        if self.missing == 0 {
            return LateRows::new();
        }
        let rows = self.place.chunks(batch.top_k.max(1)).zip(batch.dead);
        (0_u32..)
            .zip(rows)
            .filter(|(_, (pairs, dead))| !**dead && pairs.contains(&NOWHERE))
            .map(|(row, _)| row)
            .collect()
    }

    /// One slice per pair, in the order of the batch; empty for a pair without a row.
    pub(super) fn of_pairs(&self) -> Vec<&[f32]> {
        self.place
            .iter()
            .map(|(answer, row)| {
                let at = *row as usize * self.hidden;
                self.rows
                    .get(*answer as usize)
                    .and_then(|rows| rows.get(at..at + self.hidden))
                    .unwrap_or_default()
            })
            .collect()
    }
}

fn gather(batch: &ExpertBatch<'_>, rows: &[u32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len() * batch.hidden);
    for row in rows {
        let at = *row as usize * batch.hidden;
        out.extend_from_slice(batch.input.get(at..at + batch.hidden).unwrap_or_default());
    }
    out
}

/// Counts of a step fit 32 bits: a batch that large has no memory to stand in.
const fn count(number: usize) -> u32 {
    number as u32
}
