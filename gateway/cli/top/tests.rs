use std::collections::BTreeMap;

use foregate_api::ids::{Epoch, ExpertId, Rank};
use foregate_api::load::{EngineLoad, LoadWindow};
use foregate_api::member::{Ack, Phase};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyModifiers};
use serde_json::json;

use super::figures::Figures;
use super::snapshot::Snapshot;
use super::state::{Next, State};
use super::{Shown, screen};

/// Layers × experts, ranks that hold every third expert and the next.
fn snapshot(layers: usize, experts: usize, ranks: u32, sequence: u64) -> Snapshot {
    let all: Vec<Rank> = (0..ranks).map(Rank).collect();
    let held = |rank: &Rank| {
        let of = |e: &usize| {
            e % ranks as usize == rank.index() || (e + 1) % ranks as usize == rank.index()
        };
        (0..experts)
            .filter(of)
            .map(|e| ExpertId(e as u32))
            .collect()
    };
    let layer = LayerPlacement::from_slots(&all, all.iter().map(held).collect(), experts);
    let plan = |epoch| Placement {
        epoch: Epoch(epoch),
        parent: Epoch(epoch - 1),
        reason: Reason::Move,
        ranks: all.clone(),
        layers: vec![layer.clone(); layers],
        balance_before: 0.8,
        balance_after: 0.97,
    };
    let mut target = plan(5);
    target.layers[0].slots[0].push(ExpertId(1));
    let load: Vec<Vec<u64>> = (0..layers)
        .map(|l| {
            (0..experts)
                .map(|e| ((e * 7 + l) % 13 * 10) as u64)
                .collect()
        })
        .collect();
    let workers: BTreeMap<String, _> = all
        .iter()
        .map(|rank| {
            let window = LoadWindow {
                rank: *rank,
                epoch: Epoch(4),
                sequence,
                span_ms: 2000,
                gate: load.clone(),
                served: vec![100; layers],
                engine: EngineLoad {
                    running: 3,
                    kv_pages_used: 5,
                    kv_pages: 10,
                    generation_tokens: 100 * sequence,
                    ..EngineLoad::default()
                },
            };
            let ack = Ack { prepared: Epoch(4), serving: Epoch(4), drained: Epoch(3) };
            let worker = json!({
                "phase": Phase::Ready, "rpc": "127.0.0.1:1", "domain": "", "slots": 8, "cpu_path": "avx2",
                "ack": ack, "window": window,
            });
            (rank.to_string(), worker)
        })
        .collect();
    let rank_rows: BTreeMap<String, Vec<u64>> = all
        .iter()
        .map(|rank| {
            (
                rank.to_string(),
                vec![100 + 40 * u64::from(rank.0 % 2); layers],
            )
        })
        .collect();
    let document = json!({
        "connected": true, "leader": "operator", "layers": layers, "experts": experts,
        "active": plan(4), "target": target, "load": load, "rank_rows": rank_rows,
        "imbalance": [], "workers": workers,
    });
    Snapshot::read(&document).unwrap()
}

fn screen(shown: &Shown, state: &mut State, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal
        .draw(|frame| screen::draw(frame, shown, state))
        .unwrap();
    let buffer = terminal.backend().buffer();
    let rows = buffer.content.chunks(usize::from(width));
    let text = |row: &[ratatui::buffer::Cell]| {
        row.iter().map(|cell| cell.symbol()).collect::<String>()
    };
    rows.map(|row| text(row).trim_end().to_owned() + "\n")
        .collect()
}

fn shown(layers: usize, experts: usize, ranks: u32) -> Shown {
    let before = Figures::of(snapshot(layers, experts, ranks, 1), None);
    Shown {
        figures: Some(Figures::of(
            snapshot(layers, experts, ranks, 2),
            Some(&before),
        )),
        ..Shown::default()
    }
}

fn press(state: &mut State, code: KeyCode) -> Next {
    state.on(&Event::Key(KeyEvent::new(code, KeyModifiers::NONE)))
}

#[test]
fn a_small_cluster_fits_a_small_terminal() {
    let text = screen(&shown(8, 32, 4), &mut State::default(), 80, 24);
    // Four ranks, 100 tokens in two seconds each.
    for part in [
        "epoch 4 -> 5  4 ranks  8 x 32 experts  200 tokens/s",
        "after 1.167",
        "+1 due",
        "kv  50%",
        ">  0",
        "hottest experts of layer 0",
        "no change is recorded yet",
        "q quit",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 80));
}

#[test]
fn a_large_cluster_is_scrolled() {
    let shown = shown(61, 256, 64);
    let mut state = State::default();
    let text = screen(&shown, &mut state, 80, 24);
    assert!(text.contains("hottest 6 of 64 ranks"), "{text}");
    assert!(text.contains("rows per expert 0-59 of 256"), "{text}");
    assert!(!text.contains(" 60 "), "{text}");
    press(&mut state, KeyCode::End);
    press(&mut state, KeyCode::Right);
    let text = screen(&shown, &mut state, 80, 24);
    assert_eq!((state.layer, state.first), (60, 8));
    assert!(
        text.contains("> 60") && text.contains("8-67 of 256"),
        "{text}"
    );
    for _ in 0..100 {
        press(&mut state, KeyCode::Right);
    }
    screen(&shown, &mut state, 80, 24);
    assert_eq!(state.first, 196, "not beyond the end");
    let wide = screen(&shown, &mut state, 300, 100);
    assert!(wide.contains(" rows per expert over the mean "), "{wide}");
    assert_eq!(state.first, 0);
}

#[test]
fn no_size_breaks_it() {
    for (layers, experts, ranks) in [(1, 1, 1), (8, 32, 4), (61, 256, 64)] {
        let shown = shown(layers, experts, ranks);
        for (width, height) in [(1, 1), (10, 3), (80, 24), (200, 60)] {
            screen(
                &shown,
                &mut State {
                    layer: usize::MAX,
                    first: usize::MAX,
                },
                width,
                height,
            );
        }
    }
    screen(&Shown::default(), &mut State::default(), 80, 24);
}

#[test]
fn a_split_levels_what_even_shares_do_not() {
    let figures = shown(2, 8, 2).figures.unwrap();
    assert!(figures.before_split.iter().all(|most| *most >= 1.0));
    assert!(
        figures
            .after_split
            .iter()
            .all(|most| (most - 140.0 / 120.0).abs() < 1e-9)
    );
    // A worker that started anew has made no tokens backwards.
    let anew = Figures::of(snapshot(2, 8, 2, 1), Some(&figures));
    assert!(anew.tokens.abs() < 1e-9);
    let same = Figures::of(snapshot(2, 8, 2, 2), Some(&figures));
    assert!(
        (same.tokens - 100.0).abs() < 1e-9,
        "between two windows it stays"
    );
}

#[test]
fn keys_do_what_the_last_line_says() {
    let mut state = State::default();
    for quit in [KeyCode::Char('q'), KeyCode::Esc] {
        assert_eq!(press(&mut state, quit), Next::Quit);
    }
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(state.on(&Event::Key(control_c)), Next::Quit);
    assert_eq!(press(&mut state, KeyCode::Up), Next::Go);
    assert_eq!(press(&mut state, KeyCode::Down), Next::Go);
    assert_eq!(state.layer, 1);
    assert_eq!(state.on(&Event::Resize(10, 10)), Next::Go);
}
