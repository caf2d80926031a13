use foregate_api::model::Family;
use foregate_api::weights::WeightSettings;
use foregate_checkpoint::tiny::Tiny;

use super::*;

fn reader(dir: &Path, context: usize) -> Reader {
    let checkpoint = engine::open(dir, WeightSettings::default()).unwrap();
    let cpu = Arc::new(Cpu::new(2));
    let model = Model::load(&checkpoint, Arc::clone(&cpu), |_, _| {}).unwrap();
    let experts = LocalExperts::load(&checkpoint, Arc::clone(&cpu)).unwrap();
    Reader::new(cpu, model, experts, context).unwrap()
}

fn text(tokens: &[u32]) -> Text {
    Text {
        name: "text".to_owned(),
        tokens: tokens.to_vec(),
        bytes: vec![3; tokens.len()],
    }
}

fn random(count: u32) -> Vec<u32> {
    (0..count).map(|i| (i * i * 7 + i * 13 + 5) % 64).collect()
}

fn task() -> Task {
    Progress::detect().steps("test", 1)
}

/// A text of one window in several steps is the sum over its tokens, each predicted from all before it.
#[test]
fn every_token_but_the_first_is_predicted_once() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::new(Family::Qwen3Moe).write(dir.path()).unwrap();
    let tokens = random(200);
    let whole = reader(dir.path(), 256)
        .read(&text(&tokens), &task())
        .unwrap();
    assert_eq!((whole.tokens, whole.bytes), (199, 597));
    let mut alone = reader(dir.path(), 256);
    let mut nats = 0.0;
    for at in 1..tokens.len() {
        nats += alone.step(&tokens[at - 1..=at], at - 1).unwrap();
    }
    assert!((whole.nats - nats).abs() < 1e-9, "{} {nats}", whole.nats);
}

#[test]
fn windows_overlap_by_one_token() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::new(Family::Mixtral).write(dir.path()).unwrap();
    let tokens = random(30);
    // Windows of 10 predict 9 each: 0..10, 9..19, 18..28, 27..30.
    let mut by_ten = reader(dir.path(), 10);
    let found = by_ten.read(&text(&tokens), &task()).unwrap();
    assert_eq!(found.tokens, 29);
    let mut sum = Sum::default();
    for (start, end) in [(0, 10), (9, 19), (18, 28), (27, 30)] {
        let part = text(&tokens[start..end]);
        sum = sum.and(by_ten.read(&part, &task()).unwrap());
    }
    assert_eq!(found, sum);
}

#[test]
fn a_sum_becomes_a_score() {
    let sum = Sum {
        tokens: 4,
        bytes: 8,
        nats: 4.0 * 64_f64.ln(),
    };
    let score = sum.score("x".to_owned());
    assert!((score.perplexity - 64.0).abs() < 1e-9);
    assert!((score.nats_per_byte - 64_f64.ln() / 2.0).abs() < 1e-12);
}
