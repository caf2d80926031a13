//! The simulated workers: they step over the tokens that the model drew, and ask the policy when a slot is free.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use foregate_api::ids::Rank;
use foregate_gateway::route::window::{StepModel, Worker};
use foregate_gateway::signature::Profile;
use tokio::time::Instant;

use super::arm::Arm;
use super::traffic::{Traffic, WORKERS};

/// One step of one worker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// Distinct experts, mean over layers.
    pub(super) distinct: f64,
    pub(super) batch: f64,
    pub(super) ms: f64,
}

/// The life of one request, in ms.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Life {
    pub(super) arrived: f64,
    pub(super) started: f64,
    pub(super) ended: f64,
    pub(super) tokens: u32,
    /// Microseconds that the policy took.
    pub(super) decision_us: f64,
}

/// All that happened.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) steps: Vec<Step>,
    pub(super) lives: Vec<Life>,
    /// Picks of a younger request while the oldest had waited longer than its patience.
    pub(super) overtaken: u32,
    pub(super) control_share: f64,
    pub(super) switch_offs: u64,
    /// The gain that the guard saw last.
    pub(super) gain: Option<f64>,
    /// Share of the signatures' variance between kinds.
    pub(super) separation: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrival(usize),
    Step(usize),
}

/// Simulates `arm` on `traffic`; `profiles` is what it is told of the requests.
pub(super) fn run(
    traffic: &Traffic,
    profiles: &[Profile],
    slots: u32,
    arm: Arm,
    patience: f64,
) -> Run {
    let mut cluster = Cluster {
        traffic,
        profiles,
        slots,
        patience,
        arm,
        active: vec![Vec::new(); WORKERS],
        busy: [false; WORKERS],
        done: vec![0; traffic.requests.len()],
        waiting: vec![false; traffic.requests.len()],
        lives: vec![Life::default(); traffic.requests.len()],
        steps: Vec::new(),
        overtaken: 0,
        events: BinaryHeap::new(),
    };
    for (at, ms) in traffic.arrivals.iter().enumerate() {
        cluster
            .events
            .push(Reverse((nanos(*ms), Event::Arrival(at))));
    }
    while let Some(Reverse((at, event))) = cluster.events.pop() {
        match event {
            Event::Arrival(request) => cluster.arrive(at, request),
            Event::Step(worker) => cluster.step(at, worker),
        }
    }
    let window = cluster.arm.seen_ahead();
    let (decisions, controls) = window.map_or((0, 0), |window| window.counts());
    Run {
        steps: cluster.steps,
        lives: cluster.lives,
        overtaken: cluster.overtaken,
        control_share: controls as f64 / (decisions as f64).max(1.0),
        switch_offs: window.map_or(0, |window| window.guard().switch_offs()),
        gain: window.and_then(|window| window.guard().gain()),
        separation: window.and_then(|w| w.kinds().map(|kinds| kinds.separation)),
    }
}

struct Cluster<'a> {
    traffic: &'a Traffic,
    profiles: &'a [Profile],
    slots: u32,
    patience: f64,
    arm: Arm,
    active: Vec<Vec<usize>>,
    busy: [bool; WORKERS],
    /// Tokens made.
    done: Vec<usize>,
    waiting: Vec<bool>,
    lives: Vec<Life>,
    steps: Vec<Step>,
    overtaken: u32,
    events: BinaryHeap<Reverse<(u64, Event)>>,
}

impl Cluster<'_> {
    fn arrive(&mut self, at: u64, request: usize) {
        let now = millis(at);
        self.lives[request].arrived = now;
        self.waiting[request] = true;
        let began = Instant::now();
        let prompt = self.traffic.prompts[request];
        self.arm.push(request, now, prompt, &self.profiles[request]);
        self.lives[request].decision_us = began.elapsed().as_secs_f64() * 1e6;
        self.place(at);
    }

    /// Gives free slots to waiting requests.
    fn place(&mut self, at: u64) {
        let now = millis(at);
        loop {
            let worker = |(rank, active): (usize, &Vec<usize>)| Worker {
                rank: Rank(rank as u32),
                active: active.len() as u32,
                has_room: (active.len() as u32) < self.slots,
            };
            let workers: Vec<Worker> = self.active.iter().enumerate().map(worker).collect();
            let began = Instant::now();
            let Some((request, rank)) = self.arm.pick(now, &workers, self.profiles) else {
                return;
            };
            let took = began.elapsed().as_secs_f64() * 1e6;
            self.note_overtaking(now, request);
            self.waiting[request] = false;
            let life = &mut self.lives[request];
            life.started = now;
            life.decision_us += took;
            let worker = rank.0 as usize;
            self.active[worker].push(request);
            if !std::mem::replace(&mut self.busy[worker], true) {
                self.events.push(Reverse((at, Event::Step(worker))));
            }
        }
    }

    fn note_overtaking(&mut self, now: f64, request: usize) {
        let oldest = self.waiting.iter().position(|waits| *waits);
        let overdue = |at: usize| now - self.lives[at].arrived > self.patience;
        if oldest.is_some_and(|at| at < request && overdue(at)) {
            self.overtaken += 1;
        }
    }

    /// The step of a worker is over: what ended leaves, what waits joins, and the next step begins.
    fn step(&mut self, at: u64, worker: usize) {
        let over = |id: &usize| self.done[*id] >= self.traffic.requests[*id].tokens.len();
        let ids = std::mem::take(&mut self.active[worker]);
        let (ended, left): (Vec<usize>, Vec<usize>) = ids.into_iter().partition(over);
        self.active[worker] = left;
        for id in &ended {
            let tokens = &self.traffic.requests[*id].tokens;
            self.lives[*id].ended = millis(at);
            self.lives[*id].tokens = tokens.len() as u32;
            self.arm.ended(*id, &self.traffic.used[*id]);
        }
        if !ended.is_empty() {
            self.place(at);
        }
        self.busy[worker] = !self.active[worker].is_empty();
        if self.busy[worker] {
            self.begin(at, worker);
        }
    }

    fn begin(&mut self, at: u64, worker: usize) {
        let shape = self.traffic.shape;
        let mut used = vec![0_u128; shape.layers * shape.words()];
        for id in &self.active[worker] {
            let token = &self.traffic.requests[*id].tokens[self.done[*id]];
            used.iter_mut()
                .zip(token)
                .for_each(|(used, token)| *used |= token);
            self.done[*id] += 1;
        }
        let bits: u32 = used.iter().map(|bits| bits.count_ones()).sum();
        let (distinct, batch) = (
            f64::from(bits) / shape.layers as f64,
            self.active[worker].len() as f64,
        );
        let ms = StepModel::default().step(distinct, batch);
        self.steps.push(Step {
            distinct,
            batch,
            ms,
        });
        self.events
            .push(Reverse((at + nanos(ms), Event::Step(worker))));
    }
}

fn nanos(ms: f64) -> u64 {
    (ms * 1e6).round() as u64
}

fn millis(nanos: u64) -> f64 {
    nanos as f64 / 1e6
}
