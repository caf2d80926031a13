//! One suite for every free fabric: an idle callee answers, a dead peer is noticed at once, refusals reach the
//! caller, queues are bounded. What only a socket has (a cut, a flipped bit, a stranger) stands at the end.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test says what it expects by failing; its threads run on the wall clock, every wait bounded"
)]

#[path = "../../operator/tls/tests/desk/mod.rs"]
mod desk;
mod exchange_rig;
mod proxy;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::tls::TlsRole;
use foregate_tls::Keys;
use foregate_wire::frame::{Call, Frame, Hello, RefuseReason, Route, encode};
use foregate_worker::exchange::serve::ServerLimits;
use foregate_worker::fabric::local::LocalHub;
use foregate_worker::fabric::tcp::{TcpFabric, TcpParts, TcpSettings};
use foregate_worker::fabric::{
    CallHandler, Completion, Fabric, Identity, Inbox, Outcome, PeerAddress, Responder,
    SendError,
};
use foregate_worker::metrics::WorkerMetrics;

use desk::Desk;
use exchange_rig::{MISSING, PATIENCE, answer, call, callee, metrics, soon, wait_for};
use proxy::Proxy;

const CALLER: Rank = Rank(0);
const CALLEE: Rank = Rank(1);
const IN_FLIGHT: usize = 4;

/// Keeps what it is asked, for tests that decide when to answer.
#[derive(Debug, Default)]
struct Holding(Mutex<Vec<(Rank, Responder)>>);

impl CallHandler for Holding {
    fn call(&self, from: Rank, _call: Call, responder: Responder) {
        self.0.lock().unwrap().push((from, responder));
    }
}

impl Holding {
    fn held(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// A worker's end of a fabric, without engine.
struct Station {
    fabric: Arc<dyn Fabric>,
    inbox: Arc<Inbox>,
    metrics: Arc<WorkerMetrics>,
    incarnation: u64,
}

impl Station {
    fn address(&self) -> PeerAddress {
        PeerAddress {
            exchange: self.fabric.address(),
            incarnation: self.incarnation,
        }
    }

    fn meet(&self, rank: Rank, address: PeerAddress) {
        self.fabric.set_peers(&BTreeMap::from([(rank, address)]));
        wait_for("a connection", || self.fabric.is_up(rank));
    }

    fn send(&self, call: Call) -> Result<(), SendError> {
        self.fabric.send(CALLEE, call, soon())
    }

    fn outcome(&self) -> Completion {
        self.inbox.take_until(soon()).expect("a completion in time")
    }

    fn ask(&self, call: Call) -> Outcome {
        let number = call.call;
        self.send(call).unwrap();
        let completion = self.outcome();
        assert_eq!((completion.call, completion.peer), (number, CALLEE));
        completion.outcome
    }
}

fn test_name() -> String {
    std::thread::current().name().unwrap_or("test").to_owned()
}

/// How the suite opens a fabric.
trait Kind {
    fn open_as(
        &self,
        cluster: &str,
        rank: Rank,
        incarnation: u64,
        handler: Arc<dyn CallHandler>,
    ) -> Station;

    /// In a cluster named after the test: the port that one test gave back may be the next one of
    /// another, and who still connects to it must be a stranger there.
    fn open(&self, rank: Rank, incarnation: u64, handler: Arc<dyn CallHandler>) -> Station {
        self.open_as(&test_name(), rank, incarnation, handler)
    }

    /// A caller that knows a callee.
    fn pair(&self, handler: Arc<dyn CallHandler>) -> (Station, Station) {
        let callee = self.open(CALLEE, 7, handler);
        let caller = self.open(CALLER, 1, Arc::new(Holding::default()));
        caller.meet(CALLEE, callee.address());
        (caller, callee)
    }
}

#[derive(Default)]
struct Local(Arc<LocalHub>);

impl Kind for Local {
    fn open_as(
        &self,
        cluster: &str,
        rank: Rank,
        incarnation: u64,
        handler: Arc<dyn CallHandler>,
    ) -> Station {
        let inbox = Arc::new(Inbox::default());
        let me = Identity {
            cluster: cluster.into(),
            rank,
            incarnation,
        };
        let fabric = self.0.open(me, handler, Arc::clone(&inbox), IN_FLIGHT);
        Station {
            fabric: Arc::new(fabric),
            inbox,
            metrics: metrics(),
            incarnation,
        }
    }
}

/// Plain, or with keys that both sides prove themselves with.
#[derive(Default)]
struct Tcp(Option<Keys>);

impl Kind for Tcp {
    fn open_as(
        &self,
        cluster: &str,
        rank: Rank,
        incarnation: u64,
        handler: Arc<dyn CallHandler>,
    ) -> Station {
        let (inbox, metrics) = (Arc::new(Inbox::default()), metrics());
        let fabric = TcpFabric::open(TcpParts {
            me: Identity {
                cluster: cluster.into(),
                rank,
                incarnation,
            },
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            handler,
            inbox: Arc::clone(&inbox),
            metrics: Arc::clone(&metrics),
            settings: TcpSettings {
                in_flight: IN_FLIGHT,
                backoff_first: Duration::from_millis(2),
                backoff_most: Duration::from_millis(20),
                // No test waits for these; a slow machine shall not meet them.
                handshake: PATIENCE,
                write_timeout: PATIENCE,
                silence: PATIENCE,
                ..TcpSettings::default()
            },
            keys: self.0.clone(),
        })
        .unwrap();
        Station {
            fabric: Arc::new(fabric),
            inbox,
            metrics,
            incarnation,
        }
    }
}

macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod local {
            $(#[test] fn $name() { super::$name(&super::Local::default()); })*
        }
        mod tcp {
            $(#[test] fn $name() { super::$name(&super::Tcp::default()); })*
        }
        mod proven {
            $(#[test] fn $name() {
                let desk = super::Desk::new();
                super::$name(&super::Tcp(Some(desk.keys(super::TlsRole::Worker))));
            })*
        }
    };
}

contract!(
    an_idle_callee_answers,
    large_calls_arrive_whole,
    refusals_reach_the_caller,
    a_full_callee_is_busy,
    calls_in_flight_are_bounded,
    nobody_waits_past_the_deadline,
    a_dead_peer_loses_its_calls_at_once,
    a_dropped_call_is_refused,
    a_peer_comes_back_in_a_new_life,
    another_life_is_not_the_peer,
    an_unknown_peer_is_down,
    a_closed_fabric_takes_nothing,
);

fn an_idle_callee_answers(kind: &dyn Kind) {
    let (caller, _callee) = kind.pair(callee(ServerLimits::default()));
    for number in 1..20 {
        let call = call(number);
        let expected = answer(&call);
        let Outcome::Reply(reply) = caller.ask(call) else {
            panic!("no reply")
        };
        assert_eq!(reply.rows, expected);
        assert_eq!((reply.epoch, reply.layer), (Epoch(1), LayerId(1)));
    }
}

fn large_calls_arrive_whole(kind: &dyn Kind) {
    let (caller, _callee) = kind.pair(callee(ServerLimits::default()));
    let mut large = call(1);
    let rows = 4000_u32;
    large.rows = exchange_rig::drawn(3, rows as usize * large.hidden as usize);
    large.routes = (0..rows)
        .map(|row| Route {
            row: rows - 1 - row,
            expert: ExpertId(row % 5),
        })
        .collect();
    let expected = answer(&large);
    let Outcome::Reply(reply) = caller.ask(large) else {
        panic!("no reply")
    };
    assert!(reply.rows == expected, "rows differ");
}

fn refusals_reach_the_caller(kind: &dyn Kind) {
    let (caller, _callee) = kind.pair(callee(ServerLimits::default()));
    let cases: [(RefuseReason, fn(&mut Call)); 6] = [
        (RefuseReason::WrongEpoch, |call| call.epoch = Epoch(2)),
        (RefuseReason::NotResident, |call| {
            call.routes[1].expert = MISSING
        }),
        (RefuseReason::Deadline, |call| call.deadline_us = 0),
        (RefuseReason::BadRequest, |call| call.layer = LayerId(99)),
        (RefuseReason::BadRequest, |call| {
            call.routes[0].expert = ExpertId(99)
        }),
        (RefuseReason::BadRequest, |call| call.hidden /= 2),
    ];
    for (number, (reason, change)) in (1..).zip(cases) {
        let mut call = call(number);
        change(&mut call);
        assert_eq!(caller.ask(call), Outcome::Refused(reason));
    }
    assert!(matches!(caller.ask(call(99)), Outcome::Reply(_)));
}

fn a_full_callee_is_busy(kind: &dyn Kind) {
    let full = ServerLimits { calls: 0, bytes: 0 };
    let (caller, _callee) = kind.pair(callee(full));
    assert_eq!(caller.ask(call(1)), Outcome::Refused(RefuseReason::Busy));
}

fn calls_in_flight_are_bounded(kind: &dyn Kind) {
    let holding = Arc::new(Holding::default());
    let (caller, _callee) = kind.pair(holding.clone());
    for number in 0..IN_FLIGHT as u64 {
        caller.send(call(number)).unwrap();
    }
    assert_eq!(caller.send(call(9)), Err(SendError::Busy(CALLEE)));
    wait_for("all calls", || holding.held() == IN_FLIGHT);
    // An answer makes room for the next call.
    let (from, responder) = holding.0.lock().unwrap().remove(0);
    assert_eq!(from, CALLER);
    responder.reply(vec![0.0; exchange_rig::spec().hidden], 3);
    assert!(matches!(caller.outcome().outcome, Outcome::Reply(reply) if reply.queued == 3));
    caller.send(call(10)).unwrap();
}

fn nobody_waits_past_the_deadline(kind: &dyn Kind) {
    let (caller, _callee) = kind.pair(Arc::new(Holding::default()));
    let deadline = Instant::now() + Duration::from_millis(5);
    caller.fabric.send(CALLEE, call(1), deadline).unwrap();
    assert_eq!(caller.inbox.take_until(deadline), None);
}

fn a_dead_peer_loses_its_calls_at_once(kind: &dyn Kind) {
    let holding = Arc::new(Holding::default());
    let (caller, callee) = kind.pair(holding.clone());
    caller.send(call(1)).unwrap();
    caller.send(call(2)).unwrap();
    wait_for("both calls", || holding.held() == 2);
    callee.fabric.close();
    let mut lost: Vec<u64> = (0..2)
        .map(|_| {
            let completion = caller.outcome();
            assert_eq!(completion.outcome, Outcome::Lost);
            completion.call
        })
        .collect();
    lost.sort_unstable();
    assert_eq!(lost, [1, 2]);
    wait_for("the loss", || !caller.fabric.is_up(CALLEE));
    assert_eq!(caller.send(call(3)), Err(SendError::Down(CALLEE)));
}

fn a_dropped_call_is_refused(kind: &dyn Kind) {
    let holding = Arc::new(Holding::default());
    let (caller, _callee) = kind.pair(holding.clone());
    caller.send(call(1)).unwrap();
    wait_for("the call", || holding.held() == 1);
    holding.0.lock().unwrap().clear();
    assert_eq!(
        caller.outcome().outcome,
        Outcome::Refused(RefuseReason::Busy)
    );
}

fn a_peer_comes_back_in_a_new_life(kind: &dyn Kind) {
    let (caller, old) = kind.pair(callee(ServerLimits::default()));
    old.fabric.close();
    let new = kind.open(CALLEE, 8, callee(ServerLimits::default()));
    caller.meet(CALLEE, new.address());
    assert!(matches!(caller.ask(call(1)), Outcome::Reply(_)));
}

fn another_life_is_not_the_peer(kind: &dyn Kind) {
    let callee = kind.open(CALLEE, 7, callee(ServerLimits::default()));
    let caller = kind.open(CALLER, 1, Arc::new(Holding::default()));
    let mut address = callee.address();
    address.incarnation = 6;
    caller
        .fabric
        .set_peers(&BTreeMap::from([(CALLEE, address)]));
    std::thread::park_timeout(Duration::from_millis(50));
    assert_eq!(caller.send(call(1)), Err(SendError::Down(CALLEE)));
    caller.meet(CALLEE, callee.address());
    assert!(matches!(caller.ask(call(2)), Outcome::Reply(_)));
}

fn an_unknown_peer_is_down(kind: &dyn Kind) {
    let caller = kind.open(CALLER, 1, Arc::new(Holding::default()));
    assert_eq!(caller.send(call(1)), Err(SendError::Down(CALLEE)));
}

fn a_closed_fabric_takes_nothing(kind: &dyn Kind) {
    let (caller, _callee) = kind.pair(Arc::new(Holding::default()));
    caller.send(call(1)).unwrap();
    caller.fabric.close();
    assert_eq!(caller.outcome().outcome, Outcome::Lost);
    assert_eq!(caller.send(call(2)), Err(SendError::Down(CALLEE)));
}

/// A caller that reaches its callee through a proxy.
fn through_proxy(handler: Arc<dyn CallHandler>) -> (Station, Station, Proxy) {
    through_proxy_with(&Tcp::default(), handler)
}

fn through_proxy_with(tcp: &Tcp, handler: Arc<dyn CallHandler>) -> (Station, Station, Proxy) {
    let callee = tcp.open(CALLEE, 7, handler);
    let proxy = Proxy::to(&callee.fabric.address());
    let caller = tcp.open(CALLER, 1, Arc::new(Holding::default()));
    let address = PeerAddress {
        exchange: proxy.address(),
        incarnation: 7,
    };
    caller.meet(CALLEE, address);
    (caller, callee, proxy)
}

#[test]
fn a_cut_connection_is_opened_again() {
    let holding = Arc::new(Holding::default());
    let (caller, _callee, proxy) = through_proxy(holding.clone());
    caller.send(call(1)).unwrap();
    wait_for("the call", || holding.held() == 1);
    proxy.cut();
    assert_eq!(caller.outcome().outcome, Outcome::Lost);
    wait_for("a new connection", || caller.fabric.is_up(CALLEE));
    caller.send(call(2)).unwrap();
    wait_for("the second call", || holding.held() == 2);
}

#[test]
fn a_corrupt_call_resets_the_connection_and_is_counted() {
    let (caller, callee, proxy) = through_proxy(callee(ServerLimits::default()));
    assert!(matches!(caller.ask(call(1)), Outcome::Reply(_)));
    proxy.corrupt_next_request();
    assert_eq!(caller.ask(call(2)), Outcome::Lost);
    wait_for("the count", || callee.metrics.corrupt_frames_total() == 1);
    wait_for("a new connection", || caller.fabric.is_up(CALLEE));
    let good = call(3);
    let expected = answer(&good);
    assert!(matches!(caller.ask(good), Outcome::Reply(reply) if reply.rows == expected));
}

#[test]
fn a_corrupt_answer_resets_the_connection_and_is_counted() {
    let (caller, _callee, proxy) = through_proxy(callee(ServerLimits::default()));
    proxy.corrupt_next_answer();
    assert_eq!(caller.ask(call(1)), Outcome::Lost);
    wait_for("the count", || caller.metrics.corrupt_frames_total() == 1);
    wait_for("a new connection", || caller.fabric.is_up(CALLEE));
    assert!(matches!(caller.ask(call(2)), Outcome::Reply(_)));
}

/// A caller's first connection may be served after its second: the one in use stays.
#[test]
fn a_late_hello_ends_no_newer_connection() {
    let holding = Arc::new(Holding::default());
    let callee = Tcp::default().open(CALLEE, 7, holding.clone());
    let mut first = std::net::TcpStream::connect(callee.fabric.address()).unwrap();
    let caller = Tcp::default().open(CALLER, 1, Arc::new(Holding::default()));
    caller.meet(CALLEE, callee.address());
    let hello = Frame::Hello(Hello {
        cluster: test_name(),
        rank: CALLER,
        incarnation: 1,
    });
    for frame in [hello, Frame::Call(call(1))] {
        let mut bytes = Vec::new();
        encode(&frame, &mut bytes).unwrap();
        first.write_all(&bytes).unwrap();
    }
    wait_for("the first one's call", || holding.held() == 1);
    caller.send(call(2)).unwrap();
    wait_for("the second one's call", || holding.held() == 2);
}

#[test]
fn another_cluster_is_not_served() {
    let holding = Arc::new(Holding::default());
    let callee = Tcp::default().open_as("other", CALLEE, 7, holding.clone());
    let caller = Tcp::default().open_as("test", CALLER, 1, Arc::new(Holding::default()));
    is_not_served(&caller, &callee, &holding);
}

#[test]
fn bytes_that_are_no_frame_end_their_connection_only() {
    let (caller, callee) = Tcp::default().pair(callee(ServerLimits::default()));
    let mut stranger = std::net::TcpStream::connect(callee.fabric.address()).unwrap();
    stranger.write_all(&[b'x'; 200]).unwrap();
    stranger.set_read_timeout(Some(PATIENCE)).unwrap();
    // Closed without an answer: an end of file, or a reset because of unread bytes.
    let mut answer = [0_u8; 16];
    assert!(!matches!(stranger.read(&mut answer), Ok(1..)));
    wait_for("the count", || callee.metrics.corrupt_frames_total() == 1);
    assert!(matches!(caller.ask(call(1)), Outcome::Reply(_)));
}

/// A caller with these keys never gets a call through.
fn is_refused(callee: &Station, holding: &Holding, caller: Option<Keys>) {
    let caller = Tcp(caller).open(CALLER, 1, Arc::new(Holding::default()));
    is_not_served(&caller, callee, holding);
}

/// None of the caller's calls gets through.
fn is_not_served(caller: &Station, callee: &Station, holding: &Holding) {
    caller
        .fabric
        .set_peers(&BTreeMap::from([(CALLEE, callee.address())]));
    std::thread::park_timeout(Duration::from_millis(50));
    assert_eq!(caller.send(call(1)), Err(SendError::Down(CALLEE)));
    assert_eq!(holding.held(), 0);
}

#[test]
fn only_workers_of_the_cluster_exchange_rows() {
    let desk = Desk::new();
    let holding = Arc::new(Holding::default());
    let callee = Tcp(Some(desk.keys(TlsRole::Worker))).open(CALLEE, 7, holding.clone());
    is_refused(&callee, &holding, None);
    is_refused(&callee, &holding, Some(Desk::new().keys(TlsRole::Worker)));
    is_refused(&callee, &holding, Some(desk.keys(TlsRole::Gateway)));
    let other = desk.of_cluster("other.default.foregate.internal");
    is_refused(&callee, &holding, Some(other.keys(TlsRole::Worker)));
    // Neither does a worker with keys speak to one without.
    let plain = Tcp::default().open(CALLEE, 7, holding.clone());
    is_refused(&plain, &holding, Some(desk.keys(TlsRole::Worker)));
    // Frames that are not even asked for.
    let mut stranger = std::net::TcpStream::connect(callee.fabric.address()).unwrap();
    let hello = Frame::Hello(Hello {
        cluster: test_name(),
        rank: CALLER,
        incarnation: 1,
    });
    for frame in [hello, Frame::Call(call(1))] {
        let mut bytes = Vec::new();
        encode(&frame, &mut bytes).unwrap();
        // The callee may have hung up already.
        drop(stranger.write_all(&bytes));
    }
    stranger.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    drop(stranger.read_to_end(&mut answer));
    assert!(answer.len() < 16, "more than an alert: {answer:?}");
    assert_eq!(holding.held(), 0);
    let caller = Tcp(Some(desk.keys(TlsRole::Worker))).open(CALLER, 1, holding);
    caller.meet(CALLEE, callee.address());
}

#[test]
fn keys_change_under_a_connection_in_use() {
    let desk = Desk::new();
    let tcp = Tcp(Some(desk.keys(TlsRole::Worker)));
    let (caller, _callee, proxy) = through_proxy_with(&tcp, callee(ServerLimits::default()));
    assert!(matches!(caller.ask(call(1)), Outcome::Reply(_)));
    let next = Desk::successor();
    desk.trust(&[&next]);
    desk.write(TlsRole::Worker, &next.issued(TlsRole::Worker));
    // The connection goes on; the next one is proven with the new keys.
    assert!(matches!(caller.ask(call(2)), Outcome::Reply(_)));
    proxy.cut();
    wait_for("the end", || !caller.fabric.is_up(CALLEE));
    wait_for("a new connection", || caller.fabric.is_up(CALLEE));
    assert!(matches!(caller.ask(call(3)), Outcome::Reply(_)));
}
