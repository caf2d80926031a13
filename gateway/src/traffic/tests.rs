use foregate_api::traffic::{RateLimits, TenantRule};
use proptest::prelude::*;

use super::*;

const S: fn(u64) -> Duration = Duration::from_secs;
const MS: fn(u64) -> Duration = Duration::from_millis;

fn traffic(slots: u32, capacity: u32, rules: Rules) -> Traffic {
    Traffic::new(Settings {
        slots,
        capacity,
        patience: S(40),
        rules,
    })
}

fn ask(traffic: &mut Traffic, name: &str, priority: i64, now: Duration) -> Ask {
    Ask {
        tenant: traffic.tenant(name, now),
        priority,
        sequences: 1,
        choices: 1,
        prompt: 100,
        answer: (50, 50),
        arrived: now,
        wishes: Wishes::default(),
    }
}

fn put(
    traffic: &mut Traffic,
    name: &str,
    priority: i64,
    now: Duration,
) -> Result<Ticket, Refusal> {
    let ask = ask(traffic, name, priority, now);
    traffic.arrive(&ask, now)
}

fn go(traffic: &mut Traffic, now: Duration) -> Option<Grant> {
    match traffic.next(now) {
        Some(Next::Go(grant)) => Some(grant),
        Some(Next::Late(..)) => go(traffic, now),
        None => None,
    }
}

const USED: Tokens = Tokens {
    input: 100,
    output: 50,
};

/// Who goes, in order, with one place, each after the one before.
fn order(traffic: &mut Traffic, held: Grant, now: Duration) -> Vec<String> {
    let mut order = Vec::new();
    let mut held = held;
    loop {
        traffic.done(&held, USED, None, now);
        let Some(next) = go(traffic, now) else {
            return order;
        };
        order.push(next.tenant.to_string());
        held = next;
    }
}

fn urgent() -> Rules {
    Rules {
        most_urgent: -10,
        ..Rules::default()
    }
}

#[test]
fn lower_priorities_go_first_and_tenants_take_turns() {
    let mut traffic = traffic(1, 100, urgent());
    put(&mut traffic, "x", 0, S(0)).unwrap();
    let held = go(&mut traffic, S(0)).unwrap();
    for _ in 0..3 {
        put(&mut traffic, "noisy", 0, S(0)).unwrap();
    }
    put(&mut traffic, "batch", 5, S(0)).unwrap();
    put(&mut traffic, "quiet", 0, S(0)).unwrap();
    put(&mut traffic, "urgent", -1, S(0)).unwrap();
    assert_eq!(
        put(&mut traffic, "y", -11, S(0)),
        Err(Refusal::TooUrgent { allowed: -10 })
    );
    let order = order(&mut traffic, held, S(0));
    assert_eq!(
        order,
        ["urgent", "noisy", "quiet", "noisy", "noisy", "batch"]
    );
}

#[test]
fn a_weight_is_a_share() {
    let rule = |name: &str, weight| TenantRule {
        name: name.to_owned(),
        weight,
        limits: RateLimits::default(),
        most_urgent: 0,
        speaks_for_others: false,
    };
    let rules = Rules {
        tenants: vec![rule("a", 3), rule("b", 1)],
        ..Rules::default()
    };
    let mut traffic = traffic(1, 100, rules);
    put(&mut traffic, "x", 0, S(0)).unwrap();
    let held = go(&mut traffic, S(0)).unwrap();
    for _ in 0..16 {
        put(&mut traffic, "a", 0, S(0)).unwrap();
        put(&mut traffic, "b", 0, S(0)).unwrap();
    }
    let order = order(&mut traffic, held, S(0));
    let a = order[..16].iter().filter(|tenant| *tenant == "a").count();
    assert_eq!(a, 12);
}

#[test]
fn who_was_away_saves_nothing_up() {
    let mut traffic = traffic(1, 1000, Rules::default());
    put(&mut traffic, "busy", 0, S(0)).unwrap();
    let mut held = go(&mut traffic, S(0)).unwrap();
    for _ in 0..50 {
        put(&mut traffic, "busy", 0, S(0)).unwrap();
        traffic.done(&held, USED, None, S(0));
        held = go(&mut traffic, S(0)).unwrap();
    }
    for _ in 0..4 {
        put(&mut traffic, "busy", 0, S(0)).unwrap();
        put(&mut traffic, "back", 0, S(0)).unwrap();
    }
    let order = order(&mut traffic, held, S(0));
    let back = order[..4].iter().filter(|tenant| *tenant == "back").count();
    assert!((2..=3).contains(&back), "{order:?}");
}

#[test]
fn an_answer_that_was_longer_than_expected_is_paid_for() {
    let mut traffic = traffic(1, 100, Rules::default());
    let mut long = ask(&mut traffic, "long", 0, S(0));
    long.answer = (1, 10_000);
    traffic.arrive(&long, S(0)).unwrap();
    let held = go(&mut traffic, S(0)).unwrap();
    assert_eq!(held.expected.output, 120);
    for _ in 0..4 {
        put(&mut traffic, "long", 0, S(0)).unwrap();
        put(&mut traffic, "other", 0, S(0)).unwrap();
    }
    let used = Tokens {
        input: 100,
        output: 1000,
    };
    traffic.done(&held, used, None, S(0));
    let held = go(&mut traffic, S(0)).unwrap();
    let order = order(&mut traffic, held, S(0));
    assert_eq!(order[..3], ["other", "other", "other"]);
}

#[test]
fn a_full_queue_sheds_the_least_urgent_then_the_greediest() {
    let mut traffic = traffic(1, 4, urgent());
    put(&mut traffic, "x", 0, S(0)).unwrap();
    let _held = go(&mut traffic, S(0)).unwrap();
    for _ in 0..4 {
        put(&mut traffic, "noisy", 0, S(0)).unwrap();
    }
    // A noisy one that is one too many goes itself; a quiet one takes the place of the last noisy one.
    assert_eq!(put(&mut traffic, "noisy", 0, S(0)), Err(Refusal::Full));
    assert_eq!(put(&mut traffic, "quiet", 0, S(0)).unwrap().shed, Some(4));
    // Whatever is less urgent than all does not come in at all.
    assert_eq!(put(&mut traffic, "quiet", 1, S(0)), Err(Refusal::Full));
    assert_eq!(put(&mut traffic, "noisy", -1, S(0)).unwrap().shed, Some(3));
    assert_eq!(traffic.waiting(), 4);
    let rows = traffic.tallies(S(0));
    let (_, other, waiting) = rows.last().unwrap();
    assert_eq!((other.refused["queue_full"], *waiting), (4, 4));
    assert_eq!(other.tokens, Tokens::default());
}

#[test]
fn deadlines_order_and_refuse() {
    let mut traffic = traffic(1, 100, Rules::default());
    let sample = Sample {
        prompt: 100,
        first: MS(100),
        rest: MS(4900),
        answer: 50,
    };
    let within = |traffic: &mut Traffic, wishes: Wishes, now| {
        let mut ask = ask(traffic, "a", 0, now);
        ask.wishes = wishes;
        traffic.arrive(&ask, now)
    };
    let whole = |ms| Wishes {
        whole: Some(MS(ms)),
        ..Wishes::default()
    };
    let first = |ms| Wishes {
        first: Some(MS(ms)),
        ..Wishes::default()
    };
    // Nothing is known yet: everything may come.
    within(&mut traffic, whole(1), S(0)).unwrap();
    let grant = go(&mut traffic, S(0)).unwrap();
    traffic.done(&grant, USED, Some(sample), S(5));
    // 100 ms to the first token and 100 ms for each of 50, and nothing at work: it may come, to learn anew.
    within(&mut traffic, whole(4000), S(5)).unwrap();
    let grant = go(&mut traffic, S(5)).unwrap();
    let missed = |missed| Err(Refusal::Deadline(missed));
    assert_eq!(
        within(&mut traffic, whole(4000), S(5)),
        missed(Missed::Whole)
    );
    assert_eq!(within(&mut traffic, first(50), S(5)), missed(Missed::First));
    let fast = Wishes {
        per_token: Some(MS(99)),
        ..Wishes::default()
    };
    assert_eq!(within(&mut traffic, fast, S(5)), missed(Missed::PerToken));
    // The later one of the same tenant goes first, since it must start sooner.
    let patient = put(&mut traffic, "a", 0, S(5)).unwrap();
    let hasty = within(&mut traffic, whole(12_000), S(5)).unwrap();
    assert!(hasty.latest < patient.latest && hasty.latest <= S(12));
    // Five seconds go by for the one at work, and as many for the one before it: that is too long.
    assert_eq!(within(&mut traffic, first(200), S(5)), {
        let latest = S(5) + MS(100);
        assert!(latest < hasty.latest);
        Ok(Ticket {
            id: patient.id + 2,
            latest,
            standing: Standing::default(),
            shed: None,
        })
    });
    traffic.done(&grant, USED, Some(sample), S(10));
    // The hastiest of all is too late by now and hears it before anything was computed.
    assert_eq!(
        traffic.next(S(10)),
        Some(Next::Late(patient.id + 2, Refusal::Deadline(Missed::First)))
    );
    assert_eq!(go(&mut traffic, S(10)).unwrap().id, hasty.id);
    // What was learnt is out of date after a while.
    let mut other = ask(&mut traffic, "b", 0, S(100));
    other.wishes = first(50);
    assert!(traffic.arrive(&other, S(100)).is_ok());
}

#[test]
fn tenants_are_bounded_and_a_limit_is_not_shaken_off() {
    let rules = Rules {
        limits: RateLimits {
            requests_per_minute: Some(1),
            tokens_per_minute: None,
        },
        ..Rules::default()
    };
    let mut traffic = traffic(1, 10, rules);
    let limited = put(&mut traffic, "t0", 0, S(0));
    assert_eq!(limited.unwrap().standing.requests.unwrap().remaining, 0);
    let grant = go(&mut traffic, S(0)).unwrap();
    traffic.done(&grant, USED, None, S(0));
    for i in 1..2 * MOST_TENANTS {
        traffic.tenant(&format!("t{i}"), S(1));
    }
    assert!(matches!(
        put(&mut traffic, "t0", 0, S(1)),
        Err(Refusal::Requests(_))
    ));
    // Tenants that wait cannot be forgotten, so the rest shares one name.
    let mut traffic = Traffic::new(Settings {
        slots: 1,
        capacity: 10_000,
        patience: S(40),
        rules: Rules::default(),
    });
    for i in 0..MOST_TENANTS {
        put(&mut traffic, &format!("t{i}"), 0, S(0)).unwrap();
    }
    assert_eq!(&*traffic.tenant("late", S(0)), OTHER);
}

/// A step of a random history.
#[derive(Debug, Clone)]
enum Step {
    Come {
        tenant: u8,
        priority: i64,
        sequences: u32,
        prompt: u64,
    },
    /// The n-th of those at work ends.
    End(usize),
    /// The n-th of those that wait leaves.
    Leave(usize),
    Pass(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..5_u8, -2..3_i64, 1..4_u32, 1..5000_u64).prop_map(
            |(tenant, priority, sequences, prompt)| Step::Come { tenant, priority, sequences, prompt }
        ),
        4 => (0..8_usize).prop_map(Step::End),
        1 => (0..8_usize).prop_map(Step::Leave),
        2 => (0..4000_u64).prop_map(Step::Pass),
    ];
    proptest::collection::vec(step, 1..400)
}

/// What a history left behind.
struct World {
    traffic: Traffic,
    now: Duration,
    /// Those that wait, in order of arrival.
    waiting: Vec<Seen>,
    running: Vec<Grant>,
    slots: u32,
}

/// One that waits.
struct Seen {
    id: u64,
    arrived: Duration,
    /// Grants of others since it is old, and how many there may be.
    passed: u32,
    bound: u32,
}

impl World {
    fn step(&mut self, step: &Step) {
        match *step {
            Step::Come {
                tenant,
                priority,
                sequences,
                prompt,
            } => {
                let mut ask = ask(&mut self.traffic, &format!("t{tenant}"), priority, self.now);
                (ask.sequences, ask.choices, ask.prompt) = (sequences, sequences, prompt);
                if let Ok(ticket) = self.traffic.arrive(&ask, self.now) {
                    self.waiting.push(Seen {
                        id: ticket.id,
                        arrived: self.now,
                        passed: 0,
                        bound: 0,
                    });
                    if let Some(shed) = ticket.shed {
                        self.waiting.retain(|seen| seen.id != shed);
                    }
                }
            }
            Step::End(n) if !self.running.is_empty() => {
                let grant = self.running.remove(n % self.running.len());
                self.traffic.done(&grant, USED, None, self.now);
            }
            Step::Leave(n) if !self.waiting.is_empty() => {
                let seen = self.waiting.remove(n % self.waiting.len());
                self.traffic.leave(seen.id, None, self.now);
            }
            Step::End(_) | Step::Leave(_) => {}
            Step::Pass(ms) => self.now += MS(ms),
        }
    }

    /// Grants what can be granted, and holds every grant to the promises.
    fn grant(&mut self, age: Duration) -> Result<(), TestCaseError> {
        while let Some(next) = self.traffic.next(self.now) {
            let id = match &next {
                Next::Go(grant) => grant.id,
                Next::Late(id, _) => *id,
            };
            let at = self.waiting.iter().position(|seen| seen.id == id);
            prop_assert!(at.is_some(), "{id} was not waiting");
            let seen = self.waiting.remove(at.unwrap_or_default());
            let in_time = self.now <= seen.arrived + S(40);
            let Next::Go(grant) = next else {
                prop_assert!(!in_time);
                continue;
            };
            prop_assert!(in_time);
            for (older, seen) in self.waiting.iter_mut().enumerate() {
                if self.now.saturating_sub(seen.arrived) < age {
                    continue;
                }
                if seen.passed == 0 {
                    seen.bound = AGED_TURN * (u32::try_from(older).unwrap() + 1);
                }
                seen.passed += 1;
                prop_assert!(seen.passed <= seen.bound, "{id} passed {}", seen.id);
            }
            self.running.push(grant);
            let busy: u32 = self.running.iter().map(|grant| grant.sequences).sum();
            prop_assert!(busy <= self.slots);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever comes, ends and leaves: places are never given twice, nobody vanishes, and who is older than the age
    /// bound is granted within eight grants for itself and for each older one, though requests of lower priority
    /// numbers and of other tenants keep coming. Only shedding takes one out before its turn.
    #[test]
    fn nothing_starves_and_nothing_is_lost(steps in steps(), slots in 3..6_u32, capacity in 0..40_u32) {
        let mut world = World {
            traffic: traffic(slots, capacity, urgent()),
            now: S(0),
            waiting: Vec::new(),
            running: Vec::new(),
            slots,
        };
        for step in &steps {
            world.step(step);
            world.grant(S(10))?;
            prop_assert_eq!(world.traffic.waiting(), world.waiting.len());
            prop_assert!(world.waiting.len() <= capacity.max(1) as usize);
            let busy: u32 = world.running.iter().map(|grant| grant.sequences).sum();
            // Places stay empty only where nobody waits, or the next one needs more of them.
            prop_assert!(world.waiting.is_empty() || slots - busy < 3);
        }
        for grant in std::mem::take(&mut world.running) {
            world.traffic.done(&grant, USED, None, world.now);
            world.grant(S(10))?;
        }
    }

    /// Two tenants that always have requests waiting get tokens by their weights, but for one request each.
    #[test]
    fn tokens_follow_weights(
        prompts in proptest::collection::vec((1..3000_u64, 1..3000_u64), 50..120),
        weight in 1..5_u32,
    ) {
        let rule = TenantRule {
            name: "a".to_owned(),
            weight,
            limits: RateLimits::default(),
            most_urgent: 0,
            speaks_for_others: false,
        };
        let rules = Rules { tenants: vec![rule], ..Rules::default() };
        let mut traffic = traffic(1, 1000, rules);
        let mut left = [0_usize; 2];
        for (a, b) in &prompts {
            for (name, prompt) in [("a", *a), ("b", *b)] {
                let mut ask = ask(&mut traffic, name, 0, S(0));
                (ask.prompt, ask.answer) = (prompt, (1, 1));
                traffic.arrive(&ask, S(0)).unwrap();
            }
            left = left.map(|left| left + 1);
        }
        let mut served = [0.0_f64; 2];
        while let Some(grant) = go(&mut traffic, S(0)) {
            let (at, weight) = if &*grant.tenant == "a" { (0, weight) } else { (1, 1) };
            served[at] += grant.expected.cost() as f64 / f64::from(weight);
            left[at] -= 1;
            traffic.done(&grant, grant.expected, None, S(0));
            if left.contains(&0) {
                break;
            }
            let apart = (served[0] - served[1]).abs();
            prop_assert!(apart <= 3002.0 + 2.0, "{served:?} after {} and {} left", left[0], left[1]);
        }
    }
}
