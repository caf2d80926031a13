//! One rank's way through a step: the group that it is in, the agreement, and a layer's two all-to-alls.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use foregate_api::ids::{Epoch, LayerId, Rank};
use foregate_kernels::Ops;
use foregate_models::experts::ExpertBatch;

use super::LockStepParts;
use crate::exchange::flight::Results;
use crate::exchange::plan::{Planner, Shipment};
use crate::exchange::serve::Desk;
use crate::exchange::workbench::Own;
use crate::fabric::lockstep::{
    Agreement, Answers, Collective, Form, Incoming, Lost, PackError, Parcel, Requests, Sizes,
    Wish, agree,
};
use crate::metrics::{Collected, Where};
use crate::residency::Routing;

/// What a rank has of its group, and memory that is used again.
#[derive(Debug, Default)]
pub(super) struct Walk {
    group: Option<Group>,
    /// The last group that was lost.
    lost: Option<(Epoch, u32)>,
    planner: Planner,
    desk: Desk,
    incoming: Incoming,
    /// The rows of `incoming`, all of them.
    every: Shipment,
    send: Vec<u8>,
    recv: Vec<u8>,
}

#[derive(Debug)]
struct Group {
    collective: Box<dyn Collective>,
    generation: u32,
    /// The epoch that it was joined for.
    epoch: Epoch,
    ranks: Vec<Rank>,
}

/// What comes of an agreement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Round {
    /// A step, with blocks of this form.
    Step(Form),
    /// Nobody has rows.
    Idle,
    /// No step can be now: there is no group, or placements differ.
    Apart,
}

impl Drop for Group {
    fn drop(&mut self) {
        self.collective.abort();
    }
}

/// What one rank sends in one round.
#[derive(Debug, Clone, Default)]
struct Part {
    rows: Range<usize>,
    routes: Range<usize>,
}

impl Part {
    /// The `round`-th `capacity` rows of a shipment, with their routes, which are ascending by row.
    fn of(shipment: Option<&Shipment>, capacity: usize, round: usize) -> Self {
        let Some(shipment) = shipment else {
            return Self::default();
        };
        let end = shipment.rows.len();
        let rows = (round * capacity).min(end)..((round + 1) * capacity).min(end);
        let before = |row: usize| {
            shipment
                .routes
                .partition_point(|route| (route.row as usize) < row)
        };
        Self {
            routes: before(rows.start)..before(rows.end),
            rows,
        }
    }
}

impl Walk {
    /// Agrees with the others on the next step, after joining them if need be.
    pub(super) fn begin(
        &mut self,
        parts: &LockStepParts,
        routing: &Arc<Routing>,
        rows: u32,
    ) -> Round {
        let epoch = routing.epoch();
        if self.group.is_none() && !self.join(parts, routing) {
            return Round::Apart;
        }
        let Some(group) = &mut self.group else {
            return Round::Apart;
        };
        let wish = Wish { epoch, rows }.encode();
        let mut all = vec![0; wish.len() * group.collective.size()];
        let deadline = soon(parts);
        if let Err(lost) = group.collective.all_gather(&wish, &mut all, deadline) {
            self.lose(parts, &lost);
            return Round::Apart;
        }
        parts.metrics.collective(Collected::Gather, all.len());
        match agree(Wish::decode(&all)) {
            Agreement::Apart => Round::Apart,
            // All have come to a placement of other ranks: the group's time is over, and all of it know.
            Agreement::Idle { .. } | Agreement::Step { .. }
                if group.ranks != routing.placement().ranks =>
            {
                self.finish(parts);
                Round::Apart
            }
            Agreement::Idle { .. } => Round::Idle,
            Agreement::Step { rows, .. } => Round::Step(Form::of(rows)),
        }
    }

    fn join(&mut self, parts: &LockStepParts, routing: &Arc<Routing>) -> bool {
        let (epoch, ranks) = (routing.epoch(), &routing.placement().ranks);
        if !ranks.contains(&parts.rank) {
            return false;
        }
        let after = self
            .lost
            .filter(|(lost, _)| *lost == epoch)
            .map(|(_, generation)| generation);
        match parts.groups.join(epoch, ranks, after, soon(parts)) {
            Ok(joined) => {
                tracing::info!(%epoch, generation = joined.generation, ranks = ranks.len(), "group_joined");
                self.group = Some(Group {
                    collective: joined.collective,
                    generation: joined.generation,
                    epoch,
                    ranks: ranks.clone(),
                });
                true
            }
            Err(lost) => {
                tracing::debug!(%lost, "group_not_joined");
                false
            }
        }
    }

    /// Leaves the group, as all others do now.
    fn finish(&mut self, parts: &LockStepParts) {
        if let Some(mut group) = self.group.take()
            && let Err(lost) = group.collective.finish(soon(parts))
        {
            tracing::debug!(%lost, "group_not_finished");
        }
    }

    /// Gives up the group. Who is still in it learns of it at once.
    fn lose(&mut self, parts: &LockStepParts, lost: &Lost) {
        let Some(group) = self.group.take() else {
            return;
        };
        tracing::warn!(%lost, generation = group.generation, "group_lost");
        parts.metrics.group_lost();
        self.lost = Some((group.epoch, group.generation));
    }

    /// Walks layers without rows of its own, from `first` on.
    pub(super) fn walk_idle(
        &mut self,
        parts: &LockStepParts,
        ops: &dyn Ops,
        routing: &Arc<Routing>,
        form: Form,
        first: LayerId,
    ) {
        let layers = u32::try_from(parts.spec.moe_layers()).unwrap_or(u32::MAX);
        for layer in first.0..layers {
            // Without a batch there is nothing to plan, so only a loss ends the walk.
            if !matches!(
                self.layer(parts, ops, routing, (form, LayerId(layer)), None),
                Ok(Some(_))
            ) {
                return;
            }
        }
    }

    /// One layer: rows out, experts, rows back. `None`: the group is lost. Without a batch only others have rows.
    ///
    /// # Errors
    /// When a batch does not fit the placement; no rank was told anything of this layer then.
    pub(super) fn layer(
        &mut self,
        parts: &LockStepParts,
        ops: &dyn Ops,
        routing: &Routing,
        (form, layer): (Form, LayerId),
        batch: Option<&ExpertBatch<'_>>,
    ) -> Result<Option<Results>, String> {
        let table = routing
            .layer(layer)
            .ok_or_else(|| format!("placement {} has no such layer", routing.epoch()))?;
        let mut results = batch.map_or_else(Results::none, Results::new);
        let shipments = match batch {
            None => Vec::new(),
            Some(batch) => {
                let base = vec![0.0; table.ranks().len()];
                let plan = self.planner.plan(table, batch, &base, usize::MAX);
                plan.map_err(|error| error.to_string())?.shipments
            }
        };
        let Some(mut group) = self.group.take() else {
            return Ok(None);
        };
        let mut out = Layer {
            walk: self,
            parts,
            ops,
            layer,
            batch,
            shipments: group
                .ranks
                .iter()
                .map(|rank| shipments.iter().find(|shipment| shipment.rank == *rank))
                .collect(),
            sizes: Sizes {
                hidden: parts.spec.hidden,
                top_k: parts.spec.top_k,
            },
            deadline: soon(parts),
        };
        let went = match form {
            Form::Fixed { capacity, rounds } => (0..rounds as usize).try_for_each(|round| {
                out.fixed(
                    &mut *group.collective,
                    capacity as usize,
                    round,
                    &mut results,
                )
            }),
            Form::Counted { most } => out.counted(&mut *group.collective, most, &mut results),
        };
        let lost = match went {
            Ok(()) => {
                self.group = Some(group);
                return Ok(Some(results));
            }
            Err(failure) => failure.lost(routing.epoch()),
        };
        self.group = Some(group);
        self.lose(parts, &lost);
        Ok(None)
    }
}

/// Why a layer came to nothing. All of it loses the group: the others are in the middle of this layer, and cannot be told
/// otherwise.
enum Failure {
    /// Another rank is gone, or too slow.
    Lost(Lost),
    /// A block that a peer cannot have sent in its right mind: as good as a lost peer.
    Pack(PackError),
    /// The experts do not fit the rows.
    Experts(String),
}

impl Failure {
    fn lost(self, epoch: Epoch) -> Lost {
        let (call, why) = match self {
            Self::Lost(lost) => return lost,
            Self::Pack(error) => ("unpack", error.to_string()),
            Self::Experts(what) => ("experts", what),
        };
        Lost { epoch, call, why }
    }
}

impl From<Lost> for Failure {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

impl From<PackError> for Failure {
    fn from(error: PackError) -> Self {
        Self::Pack(error)
    }
}

/// One layer on its way.
struct Layer<'a, 'b> {
    walk: &'a mut Walk,
    parts: &'a LockStepParts,
    ops: &'a dyn Ops,
    layer: LayerId,
    batch: Option<&'a ExpertBatch<'b>>,
    /// By place in the group.
    shipments: Vec<Option<&'a Shipment>>,
    sizes: Sizes,
    deadline: Instant,
}

impl Layer<'_, '_> {
    /// One round with blocks of a fixed size.
    fn fixed(
        &mut self,
        group: &mut dyn Collective,
        capacity: usize,
        round: usize,
        results: &mut Results,
    ) -> Result<(), Failure> {
        let sent: Vec<Part> = self
            .shipments
            .iter()
            .map(|shipment| Part::of(*shipment, capacity, round))
            .collect();
        let block = self.sizes.full_request(capacity);
        let (mut send, mut recv) = self.buffers(block * sent.len());
        for (place, to) in send.chunks_exact_mut(block).enumerate() {
            self.request(place, &sent[place], to)?;
        }
        group.all_to_all(&send, &mut recv, block, self.deadline)?;
        self.count(Collected::Rows, &sent, send.len());
        self.walk.incoming.clear();
        for from in recv.chunks_exact(block) {
            self.walk.incoming.read(self.sizes, from)?;
        }
        let computed = self.compute()?;
        let block = self.sizes.full_answer(capacity);
        send.resize(block * sent.len(), 0);
        recv.resize(block * sent.len(), 0);
        let mut first = 0;
        for (place, to) in send.chunks_exact_mut(block).enumerate() {
            let routes = self.walk.incoming.of_rank[place];
            self.answer(&computed, first..first + routes, to)?;
            first += routes;
        }
        group.all_to_all(&send, &mut recv, block, self.deadline)?;
        self.parts
            .metrics
            .collective(Collected::Answers, send.len());
        for (place, from) in recv.chunks_exact(block).enumerate() {
            self.take(place, &sent[place], from, results)?;
        }
        (self.walk.send, self.walk.recv) = (send, recv);
        Ok(())
    }

    /// The whole layer with blocks as large as what is in them.
    fn counted(
        &mut self,
        group: &mut dyn Collective,
        most: u32,
        results: &mut Results,
    ) -> Result<(), Failure> {
        let sent: Vec<Part> = self
            .shipments
            .iter()
            .map(|shipment| Part::of(*shipment, usize::MAX / 2, 0))
            .collect();
        let own: Vec<u8> = sent
            .iter()
            .flat_map(|part| [part.rows.len(), part.routes.len()])
            .flat_map(|number| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes())
            .collect();
        let mut all = vec![0; own.len() * group.size()];
        group.all_gather(&own, &mut all, self.deadline)?;
        self.parts.metrics.collective(Collected::Gather, all.len());
        let mut send = Vec::with_capacity(sent.len());
        for (place, part) in sent.iter().enumerate() {
            let mut block = vec![0; self.sizes.request(part.rows.len(), part.routes.len())];
            self.request(place, part, &mut block)?;
            send.push(block);
        }
        let mut recv: Vec<Vec<u8>> = all
            .chunks_exact(own.len())
            .map(|of_rank| Ok(vec![0; self.request_bytes(of_rank, group.place(), most)?]))
            .collect::<Result<_, PackError>>()?;
        group.counted(&send, &mut recv, self.deadline)?;
        self.count(Collected::Rows, &sent, send.iter().map(Vec::len).sum());
        self.walk.incoming.clear();
        for from in &recv {
            self.walk.incoming.read(self.sizes, from)?;
        }
        let computed = self.compute()?;
        let mut first = 0;
        for (place, to) in send.iter_mut().enumerate() {
            let routes = self.walk.incoming.of_rank[place];
            to.clear();
            to.resize(self.sizes.answer(routes), 0);
            self.answer(&computed, first..first + routes, to)?;
            first += routes;
        }
        for (part, from) in sent.iter().zip(&mut recv) {
            from.clear();
            from.resize(self.sizes.answer(part.routes.len()), 0);
        }
        group.counted(&send, &mut recv, self.deadline)?;
        self.parts
            .metrics
            .collective(Collected::Answers, send.iter().map(Vec::len).sum());
        for (place, from) in recv.iter().enumerate() {
            self.take(place, &sent[place], from, results)?;
        }
        Ok(())
    }

    /// Bytes of a rank's request to this one, from what it told of all its requests.
    fn request_bytes(&self, told: &[u8], place: usize, most: u32) -> Result<usize, PackError> {
        let number = |at: usize| {
            let bytes = told
                .get(at..at + 4)
                .and_then(|bytes| bytes.first_chunk::<4>());
            bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize)
        };
        let (rows, routes) = (number(place * 8), number(place * 8 + 4));
        let bytes = self.sizes.full_request(most as usize);
        if rows > most as usize || routes > rows * self.sizes.top_k {
            return Err(PackError::Room {
                rows,
                routes,
                bytes,
            });
        }
        Ok(self.sizes.request(rows, routes))
    }

    fn buffers(&mut self, bytes: usize) -> (Vec<u8>, Vec<u8>) {
        let mut send = std::mem::take(&mut self.walk.send);
        let mut recv = std::mem::take(&mut self.walk.recv);
        send.resize(bytes, 0);
        recv.resize(bytes, 0);
        (send, recv)
    }

    /// Counts a call of rows: what goes to others, and what stays.
    fn count(&self, call: Collected, sent: &[Part], bytes: usize) {
        let remote: usize = self
            .shipments
            .iter()
            .zip(sent)
            .filter(|(shipment, _)| shipment.is_some_and(|s| s.rank != self.parts.rank))
            .map(|(_, part)| part.routes.len())
            .sum();
        self.parts.metrics.collective(call, bytes);
        self.parts.metrics.rows(Where::Remote, remote);
    }

    fn request(&self, place: usize, part: &Part, to: &mut [u8]) -> Result<(), PackError> {
        let shipment = self.shipments.get(place).copied().flatten();
        let parcel = match (shipment, self.batch) {
            (Some(shipment), Some(batch)) => Parcel {
                input: batch.input,
                rows: &shipment.rows[part.rows.clone()],
                routes: &shipment.routes[part.routes.clone()],
                first_row: u32::try_from(part.rows.start).unwrap_or(u32::MAX),
            },
            _ => Parcel {
                input: &[],
                rows: &[],
                routes: &[],
                first_row: 0,
            },
        };
        Requests(self.sizes).write(parcel, to)
    }

    /// Runs what came. One row per route that could be run.
    fn compute(&mut self) -> Result<Computed, Failure> {
        let Walk {
            incoming,
            every,
            desk,
            ..
        } = &mut *self.walk;
        let table = self.parts.residency.snapshot();
        let mut computed = Computed {
            hidden: self.sizes.hidden,
            rows: Vec::new(),
            place: vec![Computed::NOWHERE; incoming.routes.len()],
        };
        every.routes.clear();
        let mut run = Vec::with_capacity(incoming.routes.len());
        for (number, route) in incoming.routes.iter().enumerate() {
            if table.get(self.layer, route.expert).is_some() {
                every.routes.push(*route);
                run.push(number);
            } else {
                tracing::warn!(layer = %self.layer, expert = %route.expert, "expert_not_resident");
            }
        }
        if run.is_empty() {
            return Ok(computed);
        }
        self.parts.server.called();
        every.rows.clear();
        every
            .rows
            .extend(0..u32::try_from(incoming.rows(self.sizes)).unwrap_or(u32::MAX));
        let own = Own {
            layer: self.layer,
            input: &incoming.input,
            shipment: every,
        };
        let ran = self.parts.server.serve(self.ops, Some(own), desk);
        computed.rows = ran.map_err(|error| Failure::Experts(error.to_string()))?;
        for (number, row) in run.iter().zip(&desk.place) {
            computed.place[*number] = *row;
        }
        self.parts.server.ran_here(self.layer, run.len());
        Ok(computed)
    }

    fn answer(
        &self,
        computed: &Computed,
        routes: Range<usize>,
        to: &mut [u8],
    ) -> Result<(), PackError> {
        let places = &computed.place[routes];
        let all = places.iter().all(|place| *place != Computed::NOWHERE);
        let rows = places.iter().map(|place| computed.row(*place));
        Answers(self.sizes).write(all.then_some(rows), places.len(), to)
    }

    fn take(
        &self,
        place: usize,
        part: &Part,
        from: &[u8],
        results: &mut Results,
    ) -> Result<(), PackError> {
        let mut rows = Vec::new();
        let there = Answers(self.sizes).read(from, part.routes.len(), &mut rows)?;
        if let Some(shipment) = self.shipments.get(place).copied().flatten()
            && there
        {
            let pairs = &shipment.pairs[part.routes.clone()];
            results.add(rows, pairs.iter().copied().zip(0..));
        }
        Ok(())
    }
}

/// Results of everybody's routes.
struct Computed {
    hidden: usize,
    rows: Vec<f32>,
    /// For each route its row, or [`Computed::NOWHERE`].
    place: Vec<u32>,
}

impl Computed {
    const NOWHERE: u32 = u32::MAX;

    fn row(&self, place: u32) -> &[f32] {
        let at = place as usize * self.hidden;
        self.rows.get(at..at + self.hidden).unwrap_or_default()
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the engine thread waits on the wall clock"
)]
fn soon(parts: &LockStepParts) -> Instant {
    Instant::now() + parts.deadline
}
