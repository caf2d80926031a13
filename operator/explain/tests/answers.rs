//! Answers from a past that the planner made: what they say is computed again here, in another way.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::collections::BTreeMap;

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::placement::{LayerPlacement, Placement};
use foregate_explain::record::{Measured, ReplayError, Trigger, rounded};
use foregate_explain::{
    Kind, Machine, Missing, Past, Record, Wish, WishError, change, coming, expert, last, next,
    rank, what_if,
};
use foregate_planner::split::{SplitTable, solve};
use foregate_planner::{History, Problem, RankSlots, Settings, plan};
use foregate_store::codec;
use foregate_store::past::Item;

const EXPERTS: usize = 8;
const RANKS: u32 = 3;
const NOW: u64 = 100_000;

fn problem(rows: [f64; EXPERTS]) -> Problem {
    let ranks = (0..RANKS).map(|rank| RankSlots {
        rank: Rank(rank),
        slots: 4,
        domain: format!("host-{rank}"),
    });
    let mut problem = Problem::uniform(ranks.collect(), 2, EXPERTS);
    problem.demand = rounded(vec![rows.to_vec(), rows.iter().rev().copied().collect()]);
    problem.evidence = 1e6;
    problem
}

/// Decides, and notes it as the operator does.
fn decide(past: &mut Past, problem: Problem, at_ms: u64, trigger: Trigger) {
    let settings = Settings::default();
    let previous = past.placements.values().next_back().cloned();
    let decision = plan(
        &problem,
        previous.as_ref(),
        &settings,
        &mut History::default(),
    )
    .unwrap();
    let report = decision.report();
    let record = Record {
        at_ms,
        trigger,
        verdict: report.verdict,
        reason: report.reason,
        parent: report.parent,
        epoch: report.epoch,
        problem,
        settings,
        history: History::default(),
        window_ms: 2000,
        expert_bytes: 1000,
        dense_bytes: 500,
        predicted: Record::predict(report, 1000),
        measured: Measured {
            seconds: Some(0.5),
            ..Measured::default()
        },
    };
    past.latest = Some(record.clone());
    if let Some(plan) = decision.placement() {
        past.placements.insert(plan.epoch, plan.clone());
        past.records.insert(plan.epoch, record);
    }
}

fn past() -> Past {
    let mut past = Past::default();
    let even = problem([100.0; EXPERTS]);
    decide(&mut past, even, 1_000, Trigger::First { remembered: false });
    let skewed = problem([400.0, 380.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0]);
    decide(&mut past, skewed, 50_000, Trigger::Window { rows: 900 });
    past
}

/// Balance of the best split of a layer whose homes are these.
fn balance(ranks: &[Rank], slots: &[Vec<ExpertId>], rows: &[f64], of: &Placement) -> f64 {
    let layer = LayerPlacement::from_slots(ranks, slots.to_vec(), EXPERTS);
    let alone = Placement {
        layers: vec![layer],
        ..of.clone()
    };
    let table = SplitTable::new(&alone, LayerId(0)).unwrap();
    let rows: Vec<f64> = rows.iter().map(|rows| rows + 1e-3).collect();
    solve(&table, &rows, 10_000, 1e-9).balance()
}

#[test]
fn a_record_and_its_placements_survive_the_store() {
    let past = past();
    let mut stored = BTreeMap::new();
    for (epoch, record) in &past.records {
        let value = codec::encode(record).unwrap();
        stored.insert(Item::Decision(*epoch).name(), value);
    }
    for plan in past.placements.values() {
        let value = codec::encode_placement(plan).unwrap();
        stored.insert(Item::Placement(plan.epoch).name(), value);
    }
    stored.insert(Item::Latest.name(), codec::encode(&past.latest).unwrap());
    let read = |stored: &BTreeMap<String, bytes::Bytes>| {
        Past::read(
            stored
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_ref())),
        )
    };
    assert_eq!(read(&stored), past);
    stored.insert("decision/99".to_owned(), "{}".into());
    stored.insert("whatever".to_owned(), "{}".into());
    let damaged = read(&stored);
    assert_eq!((damaged.unreadable.len(), damaged.records.len()), (1, 2));
}

#[test]
fn a_decision_is_given_again_and_a_changed_one_is_told() {
    let past = past();
    for record in past.records.values() {
        let parent = past.parent(record).unwrap();
        let decision = record.replay(parent).unwrap();
        assert_eq!(decision.placement(), past.placements.get(&record.epoch));
    }
    let mut other = past.records[&Epoch(2)].clone();
    other.problem.demand[0][5] += 300.0;
    let replayed = other.replay(past.placements.get(&Epoch(1)));
    assert!(matches!(replayed, Err(ReplayError::Otherwise)));
    let about = last(&past, NOW).unwrap();
    assert!(about.recomputed);
    assert_eq!((about.epoch, about.parent), (Epoch(2), Epoch(1)));
    assert_eq!(about.predicted, past.records[&Epoch(2)].predicted);
    let text = about.to_string();
    assert!(
        text.contains("900 rows a layer") && text.contains("50 s ago"),
        "{text}"
    );
    assert!(
        change(&past, Epoch(1), NOW)
            .unwrap()
            .to_string()
            .contains("there was no placement")
    );
    assert_eq!(
        change(&past, Epoch(7), NOW),
        Err(Missing::Decision(Epoch(7)))
    );
}

#[test]
fn alternatives_are_what_a_solver_gives_for_them() {
    let past = past();
    let newest = past.newest().unwrap();
    let plan = past.placement(newest.epoch).unwrap();
    for (layer, e) in [(0, 0), (0, 5), (1, 7)] {
        let about = expert(&past, LayerId(layer), ExpertId(e), NOW).unwrap();
        let slots = &plan.layers[layer as usize].slots;
        let rows = &newest.problem.demand[layer as usize];
        let holders = plan.layers[layer as usize].copies[e as usize]
            .iter()
            .map(|c| c.rank);
        assert!(about.copies.iter().map(|copy| copy.rank).eq(holders));
        assert!((about.balance - balance(&plan.ranks, slots, rows, plan)).abs() < 1e-3);
        assert!(!about.alternatives.is_empty());
        for other in &about.alternatives {
            let mut slots = slots.clone();
            let mut exchange = |at: Rank, out: ExpertId, new: Option<ExpertId>| {
                let held = &mut slots[at.index()];
                held.retain(|expert| *expert != out);
                held.extend(new);
            };
            let own = ExpertId(e);
            let copies = match other.kind {
                Kind::Without { rank } => {
                    exchange(rank, own, None);
                    0
                }
                Kind::Added { rank, instead_of } => {
                    exchange(rank, instead_of, Some(own));
                    1
                }
                Kind::Moved {
                    from,
                    to,
                    exchanged_for,
                } => {
                    exchange(from, own, Some(exchanged_for));
                    exchange(to, exchanged_for, Some(own));
                    2
                }
            };
            assert_eq!((other.copies, other.bytes), (copies, 1000 * copies as u64));
            let expected = balance(&plan.ranks, &slots, rows, plan);
            assert!(
                (other.balance - expected).abs() < 1e-3,
                "{other:?}: {expected}"
            );
        }
    }
    let hot = expert(&past, LayerId(0), ExpertId(0), NOW).unwrap();
    assert_eq!(
        (hot.place, hot.least_copies),
        (1, 2),
        "400 of 900 rows over three ranks"
    );
    assert!(hot.to_string().contains("2 copies are the least"), "{hot}");
    assert_eq!(
        expert(&past, LayerId(2), ExpertId(0), NOW),
        Err(Missing::Layer {
            layer: 2,
            layers: 2
        })
    );
    assert!(matches!(
        expert(&past, LayerId(0), ExpertId(8), NOW),
        Err(Missing::Expert { .. })
    ));
}

#[test]
fn a_rank_is_told_with_what_only_it_holds() {
    let past = past();
    let newest = past.newest().unwrap();
    let plan = past.placement(newest.epoch).unwrap();
    let about = rank(&past, Rank(1), NOW).unwrap();
    assert_eq!(
        (about.domain.as_str(), about.slots, about.bytes),
        ("host-1", 4, 8000)
    );
    for (layer, told) in plan.layers.iter().zip(&about.layers) {
        assert_eq!(told.holds, layer.slots[1]);
        let alone = |expert: &&ExpertId| layer.copies[expert.index()].len() == 1;
        assert!(layer.slots[1].iter().filter(alone).eq(&told.alone));
    }
    let loads: f64 = (0..RANKS)
        .map(|r| rank(&past, Rank(r), NOW).unwrap().over_mean)
        .sum();
    assert!(
        (loads - f64::from(RANKS)).abs() < 1e-3,
        "over the mean, so they sum up: {loads}"
    );
    assert!(matches!(
        rank(&past, Rank(9), NOW),
        Err(Missing::Rank { .. })
    ));
}

#[test]
fn the_next_decision_is_judged_by_the_newest_record() {
    let past = past();
    let about = next(&past, NOW).unwrap();
    assert_eq!(about.layers.len(), 2);
    assert!(
        about
            .layers
            .windows(2)
            .all(|pair| pair[0].best <= pair[1].best)
    );
    let threshold = past.newest().unwrap().settings.threshold;
    assert!(about.to_string().contains(&format!("below {threshold:.3}")));
    assert_eq!(next(&Past::default(), NOW), Err(Missing::Nothing));
}

/// One move a window is allowed where several are needed: the record tells of the next, and the planner makes it.
#[test]
fn the_move_that_comes_is_the_one_that_is_made() {
    let mut past = past();
    let mut record = past.newest().unwrap().clone();
    record.settings.max_moves_per_layer = 1;
    let parent = past.parent(&record).unwrap().cloned();
    let mut history = record.history.clone();
    let settings = record.settings;
    let decision = plan(&record.problem, parent.as_ref(), &settings, &mut history).unwrap();
    let report = decision.report();
    (record.verdict, record.epoch) = (report.verdict, report.epoch);
    record.predicted = Record::predict(report, 1000);
    let told = coming(&record, parent.as_ref()).unwrap();
    let told = told.expect("one move is not enough");

    let placement = decision.placement().unwrap();
    let mut windows = 0;
    let made = loop {
        windows += 1;
        let mut problem = record.problem.clone();
        problem.above = placement.epoch;
        let next = plan(&problem, Some(placement), &settings, &mut history).unwrap();
        if next.placement().is_some() {
            break next;
        }
    };
    let report = made.report();
    assert_eq!((told.windows, told.verdict), (windows, report.verdict));
    assert_eq!(told.copies, report.copies_moved);
    assert!(told.balance_after > told.balance_before);
    record.at_ms += 1;
    past.latest = Some(record);
    let text = next(&past, NOW).unwrap().to_string();
    assert!(text.contains(&told.to_string()), "{text}");
}

#[test]
fn other_workers_are_answered_with_memory_rule_and_cost() {
    let past = past();
    let machine = Machine::of(&past).unwrap();
    let same = what_if(&machine, Wish::default()).unwrap();
    assert_eq!((same.copies, same.now.as_ref().unwrap()), (0, &same.then));
    let wish: Wish = "workers=4, slots=3".parse().unwrap();
    let answer = what_if(&machine, wish).unwrap();
    let then = &answer.then;
    assert_eq!((then.workers, then.slots, then.copies), (4, 3, 12));
    assert_eq!(
        (then.redundant, then.redundant_needed, then.slots_needed),
        (4, 3, 3)
    );
    assert_eq!(
        (then.expert_bytes, then.weight_bytes),
        (3 * 2 * 1000, 3 * 2 * 1000 + 500)
    );
    assert!(
        then.balance > 0.9 && then.balance >= then.balance_even,
        "{then:?}"
    );
    assert!(
        answer.copies >= 6,
        "the new rank has three slots in each of two layers"
    );
    assert_eq!(answer.bytes, 1000 * answer.copies as u64);
    // Rank 0 loaded most at the last change, 1000 bytes a copy in half a second.
    let rates = past
        .records
        .values()
        .map(|r| r.predicted.cost.most_to_one_rank as f64 * 2000.0);
    let mut rates: Vec<f64> = rates.collect();
    rates.sort_by(f64::total_cmp);
    let seconds = answer.most_to_one_rank as f64 / rates[1];
    assert!((answer.seconds.unwrap() - seconds).abs() < 1e-9);
    let few = what_if(&machine, "slots=2".parse().unwrap());
    let text = few.unwrap_err().to_string();
    assert!(text.contains("2 are missing"), "{text}");
    for wrong in [
        "",
        "workers",
        "workers=0",
        "workers=9999",
        "ranks=3",
        "slots=2,slots=3",
        "slots=x",
    ] {
        assert!(
            matches!(wrong.parse::<Wish>(), Err(WishError::Form(_))),
            "{wrong}"
        );
    }
}
