//! What workers with `fabric: nccl` do with each other, by the same code, between threads of this process: they found and
//! join a group through a store, exchange, lose a rank, meet again, and part. It is how a card is tried.

use std::sync::Arc;
use std::time::{Duration, Instant};

use foregate_api::ids::{Epoch, Rank};
use foregate_kernels::Comms;
use foregate_store::coord::Coord;
use foregate_store::memory::MemoryStore;
use tokio::runtime::Handle;

use super::NcclGroups;
use crate::fabric::lockstep::{Collective, Groups, Joined, Lost};

/// Longest wait for anything that ends well.
const LONG: Duration = Duration::from_secs(60);
/// For what is waited for in vain.
const SHORT: Duration = Duration::from_secs(2);
/// Bytes to each rank and from each: one row and less, a decode step's, and what takes a few pieces. With several ranks on
/// one card all of it must fit the room that a rank begins with: taking more waits for the whole card, the other ranks'
/// operations included.
const BLOCKS: [usize; 3] = [52, 4 << 10, 64 << 10];
/// Exchanges that are timed.
const TIMED: usize = 200;

const EPOCH: Epoch = Epoch(1);

/// Runs it with so many ranks, waiting for the store on `runtime`, which the calling thread is none of the workers of. Gives
/// what the slowest rank took for an exchange, as a line.
///
/// # Errors
/// The first thing that went wrong, of whichever rank.
pub fn run(comms: &Arc<dyn Comms>, ranks: u32, runtime: &Handle) -> Result<String, String> {
    let ranks: Vec<Rank> = (0..ranks).map(Rank).collect();
    let coord = Coord::new(Arc::new(MemoryStore::new()), "trial");
    let of_rank = |rank: Rank| {
        let groups = NcclGroups::new(rank, coord.clone(), Arc::clone(comms), runtime.clone());
        let ranks = &ranks;
        move || one(&groups, rank, ranks).map_err(|lost| format!("rank {rank}: {lost}"))
    };
    let ended: Result<Vec<Duration>, String> = std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter()
            .map(|rank| scope.spawn(of_rank(*rank)))
            .collect();
        let ends = threads.into_iter().map(|thread| {
            let end = thread.join();
            end.unwrap_or_else(|_| Err("a rank panicked".to_owned()))
        });
        // All of them, so that none is left behind.
        let ends: Vec<_> = ends.collect();
        ends.into_iter().collect()
    });
    let slowest = ended?.into_iter().max().unwrap_or_default();
    Ok(format!(
        "{} ranks: {} KiB to each and back in {slowest:?}, through the host",
        ranks.len(),
        BLOCKS[1] >> 10
    ))
}

/// One rank's life. Gives the median time of an exchange.
fn one(groups: &NcclGroups, rank: Rank, ranks: &[Rank]) -> Result<Duration, Lost> {
    let Joined {
        mut collective,
        generation,
    } = groups.join(EPOCH, ranks, None, within(LONG))?;
    for block in BLOCKS {
        exchange(&mut *collective, block)?;
    }
    let mut times = Vec::with_capacity(TIMED);
    for _ in 0..TIMED {
        let begun = within(Duration::ZERO);
        exchange(&mut *collective, BLOCKS[1])?;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    // The last rank goes without a word. Who is alone loses nobody.
    if ranks.len() > 1 && ranks.last() != Some(&rank) {
        let wrong = match collective.all_gather(&[1], &mut vec![0; ranks.len()], within(SHORT))
        {
            Ok(()) => "a rank that is gone took part",
            Err(_) if exchange(&mut *collective, BLOCKS[0]).is_ok() => {
                "a group that was lost goes on"
            }
            Err(_) => "",
        };
        if !wrong.is_empty() {
            return Err(lost(wrong));
        }
    }
    if ranks.last() == Some(&rank) {
        // Not before the others have its last bytes.
        std::thread::park_timeout(SHORT / 4);
    }
    drop(collective);
    let mut again = groups.join(EPOCH, ranks, Some(generation), within(LONG))?;
    if again.generation <= generation {
        return Err(lost("the group that was lost is joined again"));
    }
    exchange(&mut *again.collective, BLOCKS[2])?;
    again.collective.finish(within(LONG))?;
    Ok(times[TIMED / 2])
}

/// A block to everybody, and as many bytes more to each as its place counts: equal ones first, then counted ones.
fn exchange(collective: &mut dyn Collective, block: usize) -> Result<(), Lost> {
    let (size, own) = (collective.size(), collective.place());
    let send: Vec<u8> = (0..size).flat_map(|to| bytes(own, to, block)).collect();
    let mut recv = vec![0; send.len()];
    collective.all_to_all(&send, &mut recv, block, within(LONG))?;
    let wanted: Vec<u8> = (0..size).flat_map(|from| bytes(from, own, block)).collect();
    if recv != wanted {
        return Err(lost("all_to_all brought other bytes than were sent"));
    }
    let send: Vec<Vec<u8>> = (0..size).map(|to| bytes(own, to, own + to)).collect();
    let mut recv: Vec<Vec<u8>> = (0..size).map(|from| vec![0; from + own]).collect();
    collective.counted(&send, &mut recv, within(LONG))?;
    let wanted: Vec<Vec<u8>> = (0..size).map(|from| bytes(from, own, from + own)).collect();
    if recv != wanted {
        return Err(lost("counted brought other bytes than were sent"));
    }
    Ok(())
}

/// What one rank sends to another: no two alike, no byte for long.
fn bytes(from: usize, to: usize, count: usize) -> Vec<u8> {
    let first = from * 31 + to * 7 + 1;
    (0..count)
        .map(|at| ((first + at * 13 + at / 251) % 255) as u8)
        .collect()
}

fn lost(why: &str) -> Lost {
    Lost {
        epoch: EPOCH,
        call: "trial",
        why: why.to_owned(),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "threads that wait for a card wait on the wall clock"
)]
fn within(time: Duration) -> Instant {
    Instant::now() + time
}
