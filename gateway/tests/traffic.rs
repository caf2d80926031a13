//! Traffic management. First the rules alone, under ten times the load that fits, in simulated time and without a
//! socket; then the gateway over real sockets.

#![expect(clippy::unwrap_used, reason = "a test may end in a panic")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use foregate_api::traffic::{RateLimits, TenantRule, Traffic as Rules};
use foregate_gateway::traffic::{
    Ask, Grant, Next, Refusal, Sample, Settings, Tokens, Traffic, Wishes,
};
use serde_json::{Value, json};
use support::{Cluster, config, header, with};

/// Places of the simulated cluster; each makes a token every 20 ms.
const SLOTS: u32 = 64;
const PER_TOKEN: Duration = Duration::from_millis(20);
/// Requests of 300 prompt tokens and 100 made ones that fit in a second: 64 places, 2.15 s each.
const FITS: f64 = 64.0 / 2.15;

/// Who sends what.
#[derive(Debug, Clone)]
struct Source {
    tenant: &'static str,
    priority: i64,
    per_second: f64,
    answer: (u64, u64),
    wishes: Wishes,
}

impl Source {
    fn new(tenant: &'static str, load: f64) -> Self {
        Self {
            tenant,
            priority: 0,
            per_second: load * FITS,
            answer: (20, 180),
            wishes: Wishes::default(),
        }
    }
}

/// What became of a source's requests.
#[derive(Debug, Default)]
struct Seen {
    /// Seconds from arrival to the last token, of those that ran.
    latency: Vec<f64>,
    waited: Vec<f64>,
    refused: BTreeMap<&'static str, u64>,
    late: u64,
    tokens: Tokens,
    came: u64,
}

impl Seen {
    fn p95(&mut self) -> f64 {
        self.latency.sort_by(f64::total_cmp);
        self.latency[self.latency.len() * 95 / 100]
    }
}

enum Event {
    Comes(usize),
    Ends {
        source: usize,
        grant: Grant,
        used: Tokens,
        first: Duration,
        arrived: Duration,
        due: Option<Duration>,
    },
    TooLate {
        source: usize,
        id: u64,
    },
}

/// A cluster in simulated time, driven by the rules.
struct Simulation {
    traffic: Traffic,
    sources: Vec<Source>,
    seen: Vec<Seen>,
    events: BTreeMap<(Duration, u64), Event>,
    next: u64,
    seed: u64,
    /// Of those that wait: source, arrival, tokens of the answer.
    waiting: BTreeMap<u64, (usize, Duration, u64)>,
    now: Duration,
}

impl Simulation {
    fn run(sources: &[Source], capacity: u32, seconds: u64, rules: Rules) -> Vec<Seen> {
        let mut simulation = Self {
            traffic: Traffic::new(Settings {
                slots: SLOTS,
                capacity,
                patience: Duration::from_secs(30),
                rules,
            }),
            sources: sources.to_vec(),
            seen: sources.iter().map(|_| Seen::default()).collect(),
            events: BTreeMap::new(),
            next: 0,
            seed: 7,
            waiting: BTreeMap::new(),
            now: Duration::ZERO,
        };
        for source in 0..sources.len() {
            simulation.arrival(source);
        }
        while let Some((at, event)) = simulation.events.pop_first() {
            simulation.now = at.0;
            if at.0 < Duration::from_secs(seconds) || !matches!(event, Event::Comes(_)) {
                simulation.event(event);
            }
        }
        assert_eq!(simulation.traffic.waiting(), 0);
        simulation.tallies_agree();
        simulation.seen
    }

    /// Nobody pays for what was refused: the tokens on the rules' own account are those of answers that came.
    fn tallies_agree(&mut self) {
        let rows = self.traffic.tallies(self.now);
        let sum = |of: fn(Tokens) -> u64| -> u64 {
            rows.iter().map(|(_, tally, _)| of(tally.tokens)).sum()
        };
        let computed = |of: fn(Tokens) -> u64| -> u64 {
            self.seen.iter().map(|seen| of(seen.tokens)).sum()
        };
        assert_eq!(sum(Tokens::sum), computed(Tokens::sum));
    }

    /// SplitMix64.
    fn draw(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn at(&mut self, at: Duration, event: Event) {
        self.next += 1;
        self.events.insert((at, self.next), event);
    }

    /// The next arrival of a Poisson process.
    fn arrival(&mut self, source: usize) {
        let unit = ((self.draw() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        let gap = -unit.ln() / self.sources[source].per_second;
        self.at(
            self.now + Duration::from_secs_f64(gap),
            Event::Comes(source),
        );
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Comes(source) => {
                self.arrival(source);
                self.comes(source);
            }
            Event::Ends {
                source,
                grant,
                used,
                first,
                arrived,
                due,
            } => {
                let sample = Sample {
                    prompt: used.input,
                    first,
                    rest: self.now - grant.at - first,
                    answer: used.output,
                };
                self.traffic.done(&grant, used, Some(sample), self.now);
                let seen = &mut self.seen[source];
                seen.latency.push((self.now - arrived).as_secs_f64());
                seen.tokens.input += used.input;
                seen.tokens.output += used.output;
                seen.late += u64::from(due.is_some_and(|due| self.now > due));
            }
            Event::TooLate { source, id } => {
                if self.waiting.remove(&id).is_some() {
                    let over = self.traffic.over(id).unwrap();
                    self.traffic.leave(id, Some(over), self.now);
                    *self.seen[source].refused.entry(over.word()).or_default() += 1;
                }
            }
        }
        self.grant();
    }

    fn comes(&mut self, source: usize) {
        let Source {
            tenant,
            priority,
            answer: (low, high),
            wishes,
            ..
        } = self.sources[source].clone();
        let answer = low + self.draw() % (high - low + 1);
        let ask = Ask {
            tenant: self.traffic.tenant(tenant, self.now),
            priority,
            sequences: 1,
            choices: 1,
            prompt: 300,
            answer: (1, high),
            arrived: self.now,
            wishes,
        };
        self.seen[source].came += 1;
        match self.traffic.arrive(&ask, self.now) {
            Ok(ticket) => {
                self.waiting.insert(ticket.id, (source, self.now, answer));
                self.at(
                    ticket.latest,
                    Event::TooLate {
                        source,
                        id: ticket.id,
                    },
                );
                if let Some(shed) = ticket.shed {
                    let (other, ..) = self.waiting.remove(&shed).unwrap();
                    *self.seen[other]
                        .refused
                        .entry(Refusal::Full.word())
                        .or_default() += 1;
                }
            }
            Err(refusal) => *self.seen[source].refused.entry(refusal.word()).or_default() += 1,
        }
    }

    fn grant(&mut self) {
        while let Some(next) = self.traffic.next(self.now) {
            match next {
                Next::Late(id, refusal) => {
                    let (source, ..) = self.waiting.remove(&id).unwrap();
                    *self.seen[source].refused.entry(refusal.word()).or_default() += 1;
                }
                Next::Go(grant) => {
                    let (source, arrived, answer) = self.waiting.remove(&grant.id).unwrap();
                    self.seen[source]
                        .waited
                        .push((self.now - arrived).as_secs_f64());
                    // Half a millisecond for a prompt token, then a token at a time.
                    let first = Duration::from_micros(500 * 300);
                    let rest = PER_TOKEN * u32::try_from(answer - 1).unwrap();
                    let used = Tokens {
                        input: 300,
                        output: answer,
                    };
                    let due = self.sources[source]
                        .wishes
                        .whole
                        .map(|whole| arrived + whole);
                    let event = Event::Ends {
                        source,
                        grant,
                        used,
                        first,
                        arrived,
                        due,
                    };
                    self.at(self.now + first + rest, event);
                }
            }
        }
    }
}

fn simulate(sources: &[Source]) -> Vec<Seen> {
    Simulation::run(sources, 1024, 120, Rules::default())
}

#[test]
fn a_noisy_tenant_does_not_move_a_quiet_one() {
    let quiet = Source::new("quiet", 0.2);
    let alone = simulate(std::slice::from_ref(&quiet))[0].p95();
    let mut both = simulate(&[quiet, Source::new("noisy", 10.0)]);
    let beside = both[0].p95();
    assert!(both[0].refused.is_empty(), "{:?}", both[0].refused);
    assert!(
        beside <= 1.10 * alone,
        "p95 {alone} s alone, {beside} s beside a noisy one"
    );
    assert!(both[1].refused.values().sum::<u64>() > both[1].came * 8 / 10);
    // With both under one name there is nothing to hold on to, and it shows.
    let mut one = simulate(&[Source::new("one", 0.2), Source::new("one", 10.0)]);
    let mixed = one[0].p95();
    assert!(
        mixed > 2.0 * alone,
        "p95 {mixed} s under one name, {alone} s alone"
    );
}

#[test]
fn who_is_busy_shares_by_weight_whatever_he_sends() {
    let rules = Rules {
        tenants: vec![TenantRule {
            name: "b".to_owned(),
            weight: 2,
            limits: RateLimits::default(),
            most_urgent: 0,
            speaks_for_others: false,
        }],
        ..Rules::default()
    };
    // Ten times too much in all, and very unevenly.
    let sources = [
        Source::new("a", 8.0),
        Source::new("b", 1.5),
        Source::new("c", 0.5),
    ];
    let seen = Simulation::run(&sources, 1024, 240, rules);
    let tokens: Vec<f64> = seen.iter().map(|seen| seen.tokens.cost() as f64).collect();
    // All ask for more than their share of a quarter, a half and a quarter.
    for (tenant, share) in [(0, 0.25), (1, 0.5), (2, 0.25)] {
        let got = tokens[tenant] / tokens.iter().sum::<f64>();
        assert!(
            (got - share).abs() < 0.04,
            "{tenant} got {got}, its share is {share}"
        );
    }
}

#[test]
fn urgent_ones_pass_and_others_do_not_starve() {
    let rules = Rules {
        most_urgent: -10,
        ..Rules::default()
    };
    let source = |priority, load| Source {
        priority,
        ..Source::new("all", load)
    };
    // Nobody is shed here, so that only the order of grants decides: 10 times what fits, for 20 s.
    let sources = [source(-1, 0.2), source(0, 9.6), source(7, 0.2)];
    let alone = Simulation::run(&sources[..1], 1_000_000, 20, rules.clone())[0].p95();
    let mut seen = Simulation::run(&sources, 1_000_000, 20, rules);
    let urgent = seen[0].p95();
    assert!(urgent <= 1.10 * alone, "{urgent} s, {alone} s alone");
    assert!(seen[0].refused.is_empty());
    // An eighth of the grants goes by age: also the least urgent ones get through.
    assert!(!seen[2].latency.is_empty());
    for seen in &seen {
        let answered = seen.latency.len() as u64 + seen.refused.values().sum::<u64>();
        assert_eq!(answered, seen.came, "everybody has an answer");
        assert!(seen.waited.iter().all(|waited| *waited <= 30.0));
    }
}

#[test]
fn the_least_urgent_are_shed_first_and_cost_nothing() {
    let batch = Source {
        priority: 5,
        ..Source::new("batch", 5.0)
    };
    let seen = simulate(&[Source::new("chat", 0.8), batch]);
    // Chat fits and is never sent away; of the others five sixths are, at once and before anything was computed.
    assert!(seen[0].refused.is_empty(), "{:?}", seen[0].refused);
    let [chat, batch] = seen.as_slice() else {
        panic!("two sources")
    };
    assert!(batch.refused["queue_full"] > 0);
    let mean = |seen: &Seen| seen.tokens.input / 300;
    assert_eq!(mean(chat), chat.latency.len() as u64);
    assert_eq!(mean(batch), batch.latency.len() as u64);
}

#[test]
fn who_runs_is_in_time_and_who_cannot_be_is_told_before() {
    let hasty = |load| Source {
        // 2.13 s of work, always the same, within 5 s.
        answer: (100, 100),
        wishes: Wishes {
            whole: Some(Duration::from_secs(5)),
            ..Wishes::default()
        },
        ..Source::new("hasty", load)
    };
    for load in [0.5, 10.0] {
        let seen = simulate(&[hasty(load)]);
        let ran = seen[0].latency.len() as u64;
        let refused: u64 = seen[0].refused.values().sum();
        assert_eq!(ran + refused, seen[0].came);
        assert_eq!(seen[0].late, 0, "of {ran} that ran");
        if load < 1.0 {
            assert_eq!(refused, 0);
        } else {
            // The places are never idle for it: 120 s of them, less one round.
            assert!(ran as f64 > 0.95 * FITS * 120.0, "{ran} ran");
        }
    }
}

const ANSWER: &str = "was the word";

fn complete(extra: &Value) -> Value {
    let body = json!({"prompt": "In the beginning", "max_tokens": 3, "temperature": 0});
    with(body, extra)
}

async fn send(cluster: &Cluster, headers: &[(&str, &str)], body: Value) -> reqwest::Response {
    let mut request = cluster
        .client
        .post(format!("{}/v1/completions", cluster.url));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.json(&body).send().await.unwrap()
}

async fn error(response: reqwest::Response) -> Value {
    response.json::<Value>().await.unwrap()["error"].clone()
}

fn seen(cluster: &Cluster) -> usize {
    cluster.workers[0].behaviour.seen.lock().unwrap().len()
}

#[tokio::test]
async fn a_minute_has_a_limit_of_requests_and_of_tokens() {
    let mut config = config();
    config.traffic.limits.requests_per_minute = Some(2);
    config.traffic.limits.tokens_per_minute = Some(1000);
    let cluster = Cluster::start(1, ANSWER, config).await;
    let prompt = support::ids("In the beginning").len() as u64;
    let me = [("x-llm-d-inference-fairness-id", "me")];
    let first = send(&cluster, &me, complete(&json!({}))).await;
    assert_eq!(first.status(), 200);
    assert_eq!(header(&first, "x-ratelimit-limit-requests"), "2");
    assert_eq!(header(&first, "x-ratelimit-remaining-requests"), "1");
    assert_eq!(header(&first, "x-ratelimit-limit-tokens"), "1000");
    let left: u64 = header(&first, "x-ratelimit-remaining-tokens")
        .parse()
        .unwrap();
    assert_eq!(left, 1000 - prompt - 3);
    assert!(header(&first, "x-ratelimit-reset-requests").ends_with('s'));
    drop(first);
    assert_eq!(
        send(&cluster, &me, complete(&json!({}))).await.status(),
        200
    );
    let over = send(&cluster, &me, complete(&json!({}))).await;
    assert_eq!(over.status(), 429);
    let wait: u64 = header(&over, "retry-after").parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    assert_eq!(header(&over, "x-ratelimit-remaining-requests"), "0");
    let error = error(over).await;
    assert_eq!(
        (&error["type"], &error["code"]),
        (&json!("rate_limit_error"), &json!("rate_limit_exceeded"))
    );
    // Others have a minute of their own, and what was refused reached no worker.
    let other = [("x-foregate-tenant", "other-one")];
    assert_eq!(
        send(&cluster, &other, complete(&json!({}))).await.status(),
        200
    );
    assert_eq!(seen(&cluster), 3);
    let long = json!({"prompt": vec![7; 1001], "max_tokens": 3});
    let never = send(&cluster, &[("x-foregate-tenant", "long")], complete(&long)).await;
    assert_eq!(never.status(), 429);
    assert!(!never.headers().contains_key("retry-after"));
    cluster
        .shows("foregate_gateway_tenant_requests_total{outcome=\"granted\",tenant=\"me\"}")
        .await;
    let metrics = cluster.get("/metrics").await.1;
    assert!(
        metrics.contains("foregate_gateway_rejected_total{reason=\"requests_per_minute\"} 1"),
        "{metrics}"
    );
    assert!(
        metrics.contains("foregate_gateway_rejected_total{reason=\"tokens_per_minute\"} 1"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_key_is_its_tenant_unless_it_speaks_for_others() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "alice: sk-a\nfront: sk-f\n").unwrap();
    let mut config = config();
    config.api_keys = Some(keys.to_str().unwrap().to_owned());
    config.traffic.objectives = [("batch".to_owned(), 10), ("now".to_owned(), -10)].into();
    config.traffic.tenants = vec![TenantRule {
        name: "front".to_owned(),
        weight: 1,
        limits: RateLimits::default(),
        most_urgent: -10,
        speaks_for_others: true,
    }];
    let cluster = Cluster::start(1, ANSWER, config).await;
    let alice = ("authorization", "Bearer sk-a");
    let front = ("authorization", "Bearer sk-f");
    let name = |name| ("x-gateway-inference-fairness-id", name);
    let objective = |name| ("x-gateway-inference-objective", name);
    for (headers, extra, status, param) in [
        (&[alice][..], json!({}), 200, ""),
        (&[alice, name("alice")], json!({}), 200, ""),
        (
            &[alice, name("bob")],
            json!({}),
            400,
            "x-gateway-inference-fairness-id",
        ),
        (&[front, name("bob")], json!({}), 200, ""),
        (&[alice, objective("batch")], json!({}), 200, ""),
        (
            &[alice, objective("batch")],
            json!({"priority": 10}),
            200,
            "",
        ),
        (
            &[alice, objective("batch")],
            json!({"priority": 9}),
            400,
            "priority",
        ),
        (&[alice, objective("now")], json!({}), 400, "priority"),
        (&[front, objective("now")], json!({}), 200, ""),
        (
            &[alice, objective("what")],
            json!({}),
            400,
            "x-gateway-inference-objective",
        ),
        (&[alice], json!({"priority": 3}), 200, ""),
        (&[alice], json!({"priority": -1}), 400, "priority"),
        (&[front], json!({"priority": -10}), 200, ""),
        (&[front], json!({"priority": "high"}), 400, "priority"),
    ] {
        let response = send(&cluster, headers, complete(&extra)).await;
        assert_eq!(response.status().as_u16(), status, "{headers:?} {extra}");
        if status != 200 {
            assert_eq!(error(response).await["param"], param, "{headers:?} {extra}");
        }
    }
}

#[tokio::test]
async fn the_more_urgent_go_first_and_a_hopeless_deadline_reaches_no_worker() {
    let mut config = config();
    config.max_in_flight = 1;
    let cluster = Arc::new(Cluster::start(1, ANSWER, config).await);
    cluster.hold_after(1);
    let held = send(&cluster, &[], complete(&json!({"stream": true}))).await;
    let mut waiting = tokio::task::JoinSet::new();
    for (place, (priority, prompt)) in [(5, 50), (0, 60), (1, 70)].into_iter().enumerate() {
        let cluster2 = Arc::clone(&cluster);
        waiting.spawn(async move {
            let body = complete(&json!({"prompt": [prompt], "priority": priority}));
            send(&cluster2, &[], body).await.status().as_u16()
        });
        let queued = format!("foregate_gateway_admission_queue {}", place + 1);
        cluster.shows(&queued).await;
    }
    // It cannot have its place within a millisecond, and says so at once or after that millisecond.
    let hopeless = [("x-foregate-deadline-ms", "1")];
    let refused = send(&cluster, &hopeless, complete(&json!({}))).await;
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(error(refused).await["code"], "deadline_unreachable");
    assert_eq!(seen(&cluster), 1);
    cluster.hold_after(0);
    assert_eq!(held.text().await.unwrap().matches("data: ").count(), 5);
    while let Some(status) = waiting.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
    let order: Vec<u32> = {
        let seen = cluster.workers[0].behaviour.seen.lock().unwrap();
        seen.iter()
            .skip(1)
            .map(|request| request.token_ids[0])
            .collect()
    };
    assert_eq!(order, [60, 70, 50]);
    assert_eq!(cluster.workers[0].behaviour.open.load(Ordering::SeqCst), 0);
}
