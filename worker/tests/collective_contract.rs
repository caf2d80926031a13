//! One suite for every [`Collective`]: threads that hand each other bytes, and NCCL's host side over a library that does,
//! with and without word of a rank that is gone. Each rank is a thread.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test says what it expects by failing; its threads run on the wall clock, every wait bounded"
)]

#[path = "../../kernels/cuda/tests/peers/mod.rs"]
mod peers;
mod random;
mod ranks;
mod threads;

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use foregate_api::ids::{Epoch, Rank};
use foregate_kernels::Comms;
use foregate_store::rendezvous::Group;
use foregate_worker::fabric::lockstep::{Collective, Groups, Joined};
use foregate_worker::fabric::nccl::trial;

use peers::Gone;
use random::Random;
use ranks::{Hall, Nccl, NewHall};

/// Longer than anything that ends well.
const LONG: Duration = Duration::from_secs(60);
/// For those that are waited for in vain.
const SHORT: Duration = Duration::from_millis(400);

const EPOCH: Epoch = Epoch(7);

fn within(time: Duration) -> Instant {
    Instant::now() + time
}

/// Ranks with gaps, as after losses: places count without.
fn ranks(size: u32) -> Vec<Rank> {
    (0..size).map(|place| Rank(2 * place + 1)).collect()
}

/// One rank of a test.
struct Member<'a> {
    place: usize,
    ranks: &'a [Rank],
    groups: Arc<dyn Groups>,
}

impl Member<'_> {
    fn join(&self, after: Option<u32>) -> Joined {
        let joined = self.groups.join(EPOCH, self.ranks, after, within(LONG));
        joined.unwrap()
    }
}

/// Runs `work` for each rank on a thread of its own.
fn on_each(hall: &Arc<dyn Hall>, size: u32, work: impl Fn(&Member<'_>) + Sync) {
    let ranks = ranks(size);
    let (work, ranks) = (&work, &ranks);
    std::thread::scope(|scope| {
        for (place, rank) in ranks.iter().enumerate() {
            let groups = hall.groups(*rank);
            scope.spawn(move || {
                work(&Member {
                    place,
                    ranks,
                    groups,
                });
            });
        }
    });
}

/// What `from` sends to `to` in a round: both sides know it.
fn bytes(round: u64, from: usize, to: usize, count: usize) -> Vec<u8> {
    let random = &mut Random::new(1 + round * 1000 + from as u64 * 30 + to as u64);
    (0..count).map(|_| random.within(0, 255) as u8).collect()
}

/// As many as a pair of ranks exchange in a round; some nothing.
fn count(round: u64, from: usize, to: usize) -> usize {
    let random = &mut Random::new(77 + round * 1000 + from as u64 * 30 + to as u64);
    match random.within(0, 3) {
        0 => 0,
        _ => random.within(1, 5000) as usize,
    }
}

fn equal(collective: &mut dyn Collective, round: u64, block: usize) {
    let (size, own) = (collective.size(), collective.place());
    let send: Vec<u8> = (0..size)
        .flat_map(|to| bytes(round, own, to, block))
        .collect();
    let mut recv = vec![0xAA; size * block];
    let done = collective.all_to_all(&send, &mut recv, block, within(LONG));
    done.unwrap();
    let wanted: Vec<u8> = (0..size)
        .flat_map(|from| bytes(round, from, own, block))
        .collect();
    assert!(recv == wanted, "round {round}, rank {own}");
}

fn by_count(collective: &mut dyn Collective, round: u64) {
    let (size, own) = (collective.size(), collective.place());
    let send: Vec<Vec<u8>> = (0..size)
        .map(|to| bytes(round, own, to, count(round, own, to)))
        .collect();
    let mut recv: Vec<Vec<u8>> = (0..size)
        .map(|from| vec![0xAA; count(round, from, own)])
        .collect();
    collective.counted(&send, &mut recv, within(LONG)).unwrap();
    for (from, got) in recv.iter().enumerate() {
        let wanted = bytes(round, from, own, got.len());
        assert!(*got == wanted, "round {round}, {from} to {own}");
    }
}

fn gather(collective: &mut dyn Collective, round: u64) {
    let (size, own) = (collective.size(), collective.place());
    let mut all = vec![0xAA; size * 12];
    let done = collective.all_gather(&bytes(round, own, 99, 12), &mut all, within(LONG));
    done.unwrap();
    let wanted: Vec<u8> = (0..size)
        .flat_map(|from| bytes(round, from, 99, 12))
        .collect();
    assert!(all == wanted, "round {round}, rank {own}");
}

/// Blocks that grow and shrink, counts with gaps, gathers between them, all in one order; then all leave.
fn bytes_come_where_they_belong(new_hall: NewHall) {
    for size in 1..=4 {
        on_each(&new_hall(), size, |member| {
            let Joined { mut collective, .. } = member.join(None);
            assert_eq!(
                (collective.size(), collective.place()),
                (size as usize, member.place)
            );
            for (round, block) in (0..).zip([1, 3000, 17, 70_000, 64]) {
                gather(&mut *collective, round);
                equal(&mut *collective, round, block);
                by_count(&mut *collective, round);
            }
            collective.finish(within(LONG)).unwrap();
        });
    }
}

/// All lose the group by the deadline, whether a rank says so or is only missed, and every later call fails at once. Then
/// those that live meet again.
fn one_lost_is_lost_for_all(new_hall: NewHall) {
    for says_so in [true, false] {
        let hall = new_hall();
        let together = Barrier::new(3);
        on_each(&hall, 3, |member| {
            let Joined {
                mut collective,
                generation,
            } = member.join(None);
            equal(&mut *collective, 0, 100);
            // Who leaves takes nobody's last bytes with it.
            together.wait();
            if member.place == 1 {
                match says_so {
                    true => collective.abort(),
                    // Until the others have given it up.
                    false => {
                        together.wait();
                    }
                }
            } else {
                let begun = Instant::now();
                let mut recv = [0; 300];
                let lost = collective.all_to_all(&[1; 300], &mut recv, 100, within(SHORT));
                let lost = lost.unwrap_err();
                assert_eq!(lost.epoch, EPOCH);
                assert!(!lost.why.is_empty() && !lost.call.is_empty(), "{lost}");
                assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
                let begun = Instant::now();
                let again = collective.all_gather(&[1], &mut [0; 3], within(LONG));
                assert!(again.is_err(), "a group that is lost is lost");
                assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
                collective.abort();
            }
            if says_so || member.place != 1 {
                together.wait();
            }
            drop(collective);
            let mut anew = member.join(Some(generation));
            assert!(anew.generation > generation);
            equal(&mut *anew.collective, 1, 50);
            anew.collective.finish(within(LONG)).unwrap();
        });
    }
}

/// A rank that dies in the middle of what it calls, with all that it had.
fn a_rank_that_dies_costs_the_others_a_deadline(new_hall: NewHall) {
    let gathered = Barrier::new(3);
    on_each(&new_hall(), 3, |member| {
        let Joined { mut collective, .. } = member.join(None);
        gather(&mut *collective, 0);
        gathered.wait();
        if member.place == 0 {
            return;
        }
        let begun = Instant::now();
        let sent = vec![vec![1; 10]; 3];
        let mut recv = vec![vec![0; 10]; 3];
        let lost = collective.counted(&sent, &mut recv, within(SHORT));
        assert!(lost.is_err());
        assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
    });
}

/// Who waits for others in vain stops by the deadline, and at once when it is told to.
fn who_is_alone_waits_as_long_as_it_wants(new_hall: NewHall) {
    for place in [0, 1] {
        let hall = new_hall();
        let ranks = ranks(2);
        let groups = hall.groups(ranks[place]);
        let begun = Instant::now();
        let lost = groups.join(EPOCH, &ranks, None, within(SHORT)).unwrap_err();
        assert_eq!(lost.epoch, EPOCH);
        assert!(begun.elapsed() >= SHORT && begun.elapsed() < LONG, "{lost}");

        let hall = new_hall();
        let groups = hall.groups(ranks[place]);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| groups.join(EPOCH, &ranks, None, within(LONG)));
            std::thread::park_timeout(SHORT / 8);
            groups.close();
            assert!(waits.join().unwrap().is_err());
        });
        assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
        assert!(groups.join(EPOCH, &ranks, None, within(LONG)).is_err());
    }
}

/// Every case, by every way that ranks meet.
macro_rules! by {
    ($way:ident) => {
        mod $way {
            use crate::ranks::$way as hall;

            #[test]
            fn bytes_come_where_they_belong() {
                super::bytes_come_where_they_belong(hall);
            }

            #[test]
            fn one_lost_is_lost_for_all() {
                super::one_lost_is_lost_for_all(hall);
            }

            #[test]
            fn a_rank_that_dies_costs_the_others_a_deadline() {
                super::a_rank_that_dies_costs_the_others_a_deadline(hall);
            }

            #[test]
            fn who_is_alone_waits_as_long_as_it_wants() {
                super::who_is_alone_waits_as_long_as_it_wants(hall);
            }
        }
    };
}

by!(by_threads);
by!(by_nccl);
by!(by_silent_nccl);

/// A group whose founder is gone is still written. Who read it does not wait there while the founder's successor waits in
/// the next one.
#[test]
fn nobody_waits_in_a_group_that_was_replaced() {
    let hall = Arc::new(Nccl::new(Gone::Silent));
    let ranks = ranks(2);
    let stale = Group {
        epoch: EPOCH,
        generation: 0,
        ranks: ranks.clone(),
        id: peers::library(Gone::Silent).unique_id().unwrap().0.to_vec(),
    };
    let lease = hall.runtime().block_on(async {
        let lease = hall.coord.store().lease(LONG).await.unwrap();
        hall.coord
            .found_group(&stale, lease.as_ref())
            .await
            .unwrap();
        lease
    });
    let begun = Instant::now();
    let of_rank = |rank: Rank, pause: Duration| {
        let groups = hall.groups(rank);
        let ranks = &ranks;
        move || {
            std::thread::park_timeout(pause);
            let joined = groups.join(EPOCH, ranks, None, within(LONG)).unwrap();
            let Joined {
                mut collective,
                generation,
            } = joined;
            equal(&mut *collective, 3, 40);
            collective.finish(within(LONG)).unwrap();
            generation
        }
    };
    let generations = std::thread::scope(|scope| {
        let second = scope.spawn(of_rank(ranks[1], Duration::ZERO));
        let first = scope.spawn(of_rank(ranks[0], SHORT / 2));
        [first.join().unwrap(), second.join().unwrap()]
    });
    assert_eq!(generations, [1, 1]);
    assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
    drop(lease);
}

/// What is no id of NCCL's, or a rank that is none of the group's, is an error and no wait.
#[test]
fn what_cannot_be_a_group_is_refused() {
    let hall = Arc::new(Nccl::new(Gone::Silent));
    let ranks = ranks(2);
    let stranger = hall.groups(Rank(0));
    let begun = Instant::now();
    hall.runtime().block_on(async {
        let lease = hall.coord.store().lease(LONG).await.unwrap();
        let short = Group {
            epoch: EPOCH,
            generation: 0,
            ranks: ranks.clone(),
            id: vec![1, 2, 3],
        };
        hall.coord
            .found_group(&short, lease.as_ref())
            .await
            .unwrap();
    });
    let second = hall.groups(ranks[1]);
    let lost = second
        .join(EPOCH, &ranks, None, within(LONG))
        .unwrap_err()
        .to_string();
    assert!(lost.contains("3 bytes"), "{lost}");
    let lost = stranger
        .join(EPOCH, &ranks, None, within(LONG))
        .unwrap_err()
        .to_string();
    assert!(lost.contains("rank 0 is none of"), "{lost}");
    assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
}

/// What a card will be asked for.
#[test]
fn the_trial_of_a_card_passes_over_threads() {
    let hall = Nccl::new(Gone::Silent);
    let comms: Arc<dyn Comms> = Arc::new(peers::comms(Gone::Silent));
    for ranks in [1, 2, 3] {
        let told = trial::run(&comms, ranks, hall.runtime().handle()).unwrap();
        assert!(told.starts_with(&format!("{ranks} ranks: 4 KiB")), "{told}");
    }
}
