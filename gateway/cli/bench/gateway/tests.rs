use clap::Parser;

use super::arms::{DIRECT, FOREGATE, SMG_GRPC};
use super::figures::Middle;
use super::load::{Closed, Open};
use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: GatewayArgs,
}

fn args() -> GatewayArgs {
    Line::parse_from(["bench", "--rounds", "2"]).args
}

fn block(way: &'static str, round: u32, first: f64, per_second: f64) -> Block {
    let open = || Open {
        first: vec![first, first * 2.0],
        late: vec![first / 10.0],
        total: vec![first * 3.0],
        failures: Vec::new(),
    };
    let closed = Closed {
        answered: per_second as u64 * 2,
        seconds: 2.0,
        first: vec![first],
        failures: Vec::new(),
    };
    let busy = Busy {
        gateway: 0.5,
        bench: 1.5,
        machine: 3.5,
    };
    Block::of(way, round, open(), open(), closed, busy).unwrap()
}

#[test]
fn every_round_has_every_way_and_begins_with_another() {
    let all: Vec<Vec<usize>> = (0..4).map(|round| order(4, round)).collect();
    assert_eq!(all[0], [0, 1, 2, 3]);
    assert_eq!(all[1], [0, 3, 2, 1]);
    assert_eq!(all[2], [2, 3, 0, 1]);
    assert_eq!(all[3], [2, 1, 0, 3]);
    assert_eq!(order(2, 1), [0, 1]);
    assert!(order(0, 3).is_empty());
}

#[test]
fn what_a_way_adds_is_taken_within_a_round() {
    // A slow second round is no gateway's doing.
    let blocks = vec![
        block(DIRECT, 0, 1.0, 400.0),
        block(FOREGATE, 0, 1.25, 300.0),
        block(SMG_GRPC, 0, 1.5, 200.0),
        block(DIRECT, 1, 10.0, 40.0),
        block(FOREGATE, 1, 10.75, 30.0),
        block(SMG_GRPC, 1, 11.0, 40.0),
    ];
    let mut report = Report::of(&args(), blocks).unwrap();
    report.optimised = false;
    let debug = report.table();
    assert!(
        debug.contains("without optimisation") && !debug.contains("Not slower"),
        "{debug}"
    );
    report.optimised = true;
    let names: Vec<&str> = report.ways.iter().map(|way| way.way).collect();
    assert_eq!(names, [DIRECT, FOREGATE, SMG_GRPC]);
    let ours = &report.ways[1];
    let middle = |median, low, high| Middle { median, low, high };
    let first = ours.first.unwrap();
    assert_eq!(first.p50, middle(0.5, 0.25, 0.75));
    assert_eq!(first.p99, middle(1.0, 0.5, 1.5));
    assert_eq!(ours.whole.unwrap().p50, middle(1.5, 0.75, 2.25));
    assert_eq!(ours.per_second, middle(165.0, 30.0, 300.0));
    assert_eq!(ours.against_smg, Some(middle(1.125, 0.75, 1.5)));
    assert_eq!(report.ways[0].first, None);
    assert_eq!(report.ways[0].cpu_ms, None);
    let table = report.table();
    assert!(
        table.contains("| foregate | 0.50 (0.25–0.75) / 1.00 (0.50–1.50) |"),
        "{table}"
    );
    for said in [
        "`foregate bench gateway --backends 2 --rounds 2 ",
        "first token yes (1.00 ms), answer in one piece no (1.50 ms).",
        "Not slower than smg-grpc: yes (1.1",
        "of which other work used 1.00 (1.00–1.00)",
    ] {
        assert!(table.contains(said), "{said} in {table}");
    }
    let svg = picture::draw(&report.ways);
    assert!(
        svg.contains("foregate") && svg.ends_with("</svg>\n"),
        "{svg}"
    );
}

#[test]
fn without_smg_nothing_is_compared_with_it() {
    let blocks = vec![block(DIRECT, 0, 1.0, 400.0), block(FOREGATE, 0, 1.5, 300.0)];
    let mut report = Report::of(&args(), blocks).unwrap();
    report.optimised = true;
    assert_eq!(report.ways.len(), 2);
    assert_eq!(report.ways[1].against_smg, None);
    assert!(!report.table().contains("Not slower"), "{}", report.table());
    assert!(Report::of(&args(), Vec::new()).is_err());
}

#[test]
fn processor_time_is_shared_out_over_what_was_answered() {
    let one = block(FOREGATE, 0, 1.0, 100.0);
    assert_eq!(one.cpu_ms, Some(2.5));
    assert_eq!(one.others, 1.0);
}

#[test]
fn a_block_of_failures_is_no_figure() {
    let failed = |failures: usize| {
        let open = Open {
            total: vec![1.0; 99],
            failures: vec!["refused".to_owned(); failures],
            ..Open::default()
        };
        let closed = Closed {
            answered: 1,
            seconds: 1.0,
            ..Closed::default()
        };
        Block::of(FOREGATE, 0, open, Open::default(), closed, Busy::default())
    };
    assert_eq!(failed(1).unwrap().failed, 1);
    let error = failed(2).unwrap_err().to_string();
    assert!(
        error.contains("2 of 102") && error.contains("refused"),
        "{error}"
    );
}

#[test]
fn a_median_of_an_even_number_is_between_two() {
    let of = |figures: &[f64]| Middle::of(figures.to_vec()).map(|middle| middle.median);
    assert_eq!(of(&[3.0, 1.0, 2.0]), Some(2.0));
    assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    assert_eq!(of(&[]), None);
}
