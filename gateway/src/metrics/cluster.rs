//! What workers reported last, as gauges and counters; copied from the view when somebody looks.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use foregate_api::ids::Rank;
use foregate_api::load::{LoadWindow, sum_gate};
use foregate_store::coord::ClusterState;
use prometheus::{GaugeVec, IntCounterVec};

use super::Make;

/// Experts listed by `foregate_gateway_top_expert_*`.
const TOP: usize = 10;

/// Metrics of the cluster.
#[derive(Debug)]
pub(crate) struct Cluster {
    model: String,
    running: GaugeVec,
    waiting: GaugeVec,
    kv_usage: GaugeVec,
    prefix_queries: IntCounterVec,
    prefix_hits: IntCounterVec,
    preemptions: IntCounterVec,
    late_rows: IntCounterVec,
    experts_loaded: IntCounterVec,
    cache_config: GaugeVec,
    lora: GaugeVec,
    workers: GaugeVec,
    epoch: GaugeVec,
    connected: GaugeVec,
    imbalance: GaugeVec,
    rank_rows: GaugeVec,
    switch_stall: GaugeVec,
    top_share: GaugeVec,
    top_layer: GaugeVec,
    top_expert: GaugeVec,
    /// Totals as last reported, by counter and rank, so that a restarted worker does not make a counter fall.
    reported: Mutex<BTreeMap<(&'static str, Rank), u64>>,
}

impl Cluster {
    pub(super) fn new(make: &Make<'_>, model: &str) -> Result<Self, prometheus::Error> {
        let engine = &["model_name", "engine"];
        Ok(Self {
            model: model.to_owned(),
            running: make.gauges("vllm:num_requests_running", "Sequences in the engine's batch.", engine)?,
            waiting: make.gauges("vllm:num_requests_waiting", "Sequences waiting in the engine.", engine)?,
            kv_usage: make.gauges("vllm:kv_cache_usage_perc", "Pages of the KV cache in use, from 0 to 1.", engine)?,
            prefix_queries: make.counters("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", engine)?,
            prefix_hits: make.counters("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", engine)?,
            preemptions: make.counters("vllm:num_preemptions_total", "Sequences preempted.", engine)?,
            late_rows: make.counters("foregate_gateway_late_rows_total", "Rows that came late or were refused by a peer.", &["engine"])?,
            experts_loaded: make.counters("foregate_gateway_experts_loaded_total", "Experts that migrations loaded.", &["engine"])?,
            cache_config: make.gauges("vllm:cache_config_info", "Shape of the KV cache; always 1.", &["model_name", "engine", "block_size", "num_blocks"])?,
            lora: make.gauges("vllm:lora_requests_info", "LoRA adapters in use: none are served. The value is the time of the look.", &["max_lora", "running_lora_adapters", "waiting_lora_adapters"])?,
            workers: make.gauges("foregate_gateway_workers", "Registered workers by phase.", &["phase"])?,
            epoch: make.gauges("foregate_gateway_epoch", "Number of the active and of the wanted placement.", &["placement"])?,
            connected: make.gauges("foregate_gateway_store_connected", "1 while the view of the store is fresh.", &[])?,
            imbalance: make.gauges("foregate_gateway_expert_imbalance", "Most rows of a rank over the mean of all, by MoE layer, in the last load windows.", &["layer"])?,
            rank_rows: make.gauges("foregate_gateway_rank_rows", "Rows that a rank's experts computed in its last load window.", &["engine"])?,
            switch_stall: make.gauges("foregate_gateway_switch_stall_seconds", "Time by which the last switch of placement delayed a step.", &["engine"])?,
            top_share: make.gauges("foregate_gateway_top_expert_share", "Share of its layer's rows of the n-th most used expert.", &["place"])?,
            top_layer: make.gauges("foregate_gateway_top_expert_layer", "MoE layer of the n-th most used expert.", &["place"])?,
            top_expert: make.gauges("foregate_gateway_top_expert_id", "Number of the n-th most used expert.", &["place"])?,
            reported: Mutex::default(),
        })
    }

    /// Copies a state into the metrics; `now` is seconds since 1970.
    pub(crate) fn show(&self, state: &ClusterState, now: u64) {
        // Pickers that look for adapters read the newest of such lines, and take a missing one for a fault.
        self.lora.with_label_values(&["0", "", ""]).set(now as f64);
        self.show_engines(state);
        self.show_members(state);
        self.show_experts(state);
    }

    fn show_engines(&self, state: &ClusterState) {
        for gauge in [
            &self.running,
            &self.waiting,
            &self.kv_usage,
            &self.switch_stall,
        ] {
            gauge.reset();
        }
        for (rank, window) in &state.loads {
            let name = rank.to_string();
            let labels = [self.model.as_str(), name.as_str()];
            let own = [name.as_str()];
            let engine = &window.engine;
            self.running
                .with_label_values(&labels)
                .set(f64::from(engine.running));
            self.waiting
                .with_label_values(&labels)
                .set(f64::from(engine.waiting));
            let pages = f64::from(engine.kv_pages.max(1));
            self.kv_usage
                .with_label_values(&labels)
                .set(f64::from(engine.kv_pages_used) / pages);
            self.switch_stall
                .with_label_values(&own)
                .set(engine.switch_stall_us as f64 / 1e6);
            self.follow(
                "queries",
                *rank,
                engine.prefix_queries,
                &self.prefix_queries,
                &labels,
            );
            self.follow(
                "hits",
                *rank,
                engine.prefix_hits,
                &self.prefix_hits,
                &labels,
            );
            self.follow(
                "preemptions",
                *rank,
                engine.preemptions,
                &self.preemptions,
                &labels,
            );
            self.follow("late", *rank, engine.late_rows, &self.late_rows, &own);
            self.follow(
                "loaded",
                *rank,
                engine.experts_loaded,
                &self.experts_loaded,
                &own,
            );
        }
    }

    /// Adds what a total grew by; a total that fell was restarted from 0.
    fn follow(
        &self,
        what: &'static str,
        rank: Rank,
        total: u64,
        counter: &IntCounterVec,
        labels: &[&str],
    ) {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let last = reported.insert((what, rank), total).unwrap_or(0);
        let grown = if total >= last { total - last } else { total };
        counter.with_label_values(labels).inc_by(grown);
    }

    fn show_members(&self, state: &ClusterState) {
        self.cache_config.reset();
        let mut phases = BTreeMap::from([("joining", 0_u32), ("ready", 0), ("draining", 0)]);
        for (rank, member) in &state.members {
            let labels = [
                self.model.as_str(),
                &rank.to_string(),
                &member.page_tokens.to_string(),
                &member.kv_pages.to_string(),
            ];
            self.cache_config.with_label_values(&labels).set(1.0);
            let phase = serde_json::to_value(member.phase).unwrap_or_default();
            if let Some(count) = phase.as_str().and_then(|phase| phases.get_mut(phase)) {
                *count += 1;
            }
        }
        for (phase, count) in phases {
            self.workers
                .with_label_values(&[phase])
                .set(f64::from(count));
        }
        let epoch =
            |plan: &Option<(std::sync::Arc<foregate_api::placement::Placement>, u64)>| {
                plan.as_ref().map_or(0.0, |(plan, _)| plan.epoch.0 as f64)
            };
        self.epoch
            .with_label_values(&["active"])
            .set(epoch(&state.active));
        self.epoch
            .with_label_values(&["target"])
            .set(epoch(&state.target));
        let none: [&str; 0] = [];
        self.connected
            .with_label_values(&none)
            .set(f64::from(u8::from(state.connected)));
    }

    fn show_experts(&self, state: &ClusterState) {
        for gauge in [
            &self.imbalance,
            &self.rank_rows,
            &self.top_share,
            &self.top_layer,
            &self.top_expert,
        ] {
            gauge.reset();
        }
        let rows = rank_rows(state);
        for (rank, rows) in &rows {
            let sum: u64 = rows.iter().sum();
            self.rank_rows
                .with_label_values(&[&rank.to_string()])
                .set(sum as f64);
        }
        for (layer, imbalance) in imbalance(&rows).into_iter().enumerate() {
            self.imbalance
                .with_label_values(&[&layer.to_string()])
                .set(imbalance);
        }
        for (place, (share, layer, expert)) in top_experts(state).into_iter().enumerate() {
            let place = (place + 1).to_string();
            self.top_share.with_label_values(&[&place]).set(share);
            self.top_layer
                .with_label_values(&[&place])
                .set(layer as f64);
            self.top_expert
                .with_label_values(&[&place])
                .set(expert as f64);
        }
    }
}

/// Rows computed per rank and MoE layer in the last windows, over the ranks of the active placement
/// (all that reported, if none is active).
pub(crate) fn rank_rows(state: &ClusterState) -> BTreeMap<Rank, Vec<u64>> {
    let served = |window: &LoadWindow| window.served.clone();
    match &state.active {
        None => state
            .loads
            .iter()
            .map(|(rank, window)| (*rank, served(window)))
            .collect(),
        Some((plan, _)) => plan
            .ranks
            .iter()
            .map(|rank| {
                let rows = state.loads.get(rank).map(|window| served(window));
                (*rank, rows.unwrap_or_else(|| vec![0; plan.layers.len()]))
            })
            .collect(),
    }
}

/// Most over mean, per layer; 1 where nothing was computed.
pub(crate) fn imbalance(rows: &BTreeMap<Rank, Vec<u64>>) -> Vec<f64> {
    let layers = rows.values().map(Vec::len).max().unwrap_or(0);
    (0..layers)
        .map(|layer| {
            let column = || {
                rows.values()
                    .map(|rows| rows.get(layer).copied().unwrap_or(0))
            };
            let sum: u64 = column().sum();
            let most = column().max().unwrap_or(0);
            if sum == 0 {
                1.0
            } else {
                most as f64 * rows.len() as f64 / sum as f64
            }
        })
        .collect()
}

/// The most used experts as (share of the layer's rows, layer, expert), at most ten.
pub(crate) fn top_experts(state: &ClusterState) -> Vec<(f64, usize, usize)> {
    let Some(first) = state.loads.values().next() else {
        return Vec::new();
    };
    let experts = first.gate.first().map_or(0, Vec::len);
    let windows = state.loads.values().map(AsRef::as_ref);
    let mut top = Vec::new();
    for (layer, counts) in sum_gate(windows, first.gate.len(), experts)
        .iter()
        .enumerate()
    {
        let sum: u64 = counts.iter().sum();
        if sum == 0 {
            continue;
        }
        for (expert, count) in counts.iter().enumerate() {
            top.push((*count as f64 / sum as f64, layer, expert));
        }
    }
    top.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    top.truncate(TOP);
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imbalance_is_most_over_mean() {
        let rows = BTreeMap::from([(Rank(0), vec![30, 0]), (Rank(1), vec![10, 0])]);
        assert_eq!(imbalance(&rows), [1.5, 1.0]);
        assert!(imbalance(&BTreeMap::new()).is_empty());
    }

    #[test]
    fn counters_survive_a_restart_of_a_worker() {
        let registry = prometheus::Registry::new();
        let cluster = Cluster::new(&Make(&registry), "m").unwrap();
        let labels = ["m", "0"];
        for total in [5, 9, 2] {
            cluster.follow("hits", Rank(0), total, &cluster.prefix_hits, &labels);
        }
        assert_eq!(cluster.prefix_hits.with_label_values(&labels).get(), 11);
    }
}
