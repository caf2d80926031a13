//! Collectives between threads of this process: what NCCL is between cards, as far as the lock-step discipline sees it. A
//! rank that ends, or does not come in time, loses the group for all.
#![allow(dead_code, reason = "each test target uses its part")]
#![allow(unreachable_pub, reason = "a module of a test target")]
#![allow(
    clippy::disallowed_methods,
    reason = "threads wait on the wall clock, every wait is bounded"
)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

use foregate_api::ids::{Epoch, Rank};
use foregate_worker::fabric::lockstep::{Collective, Groups, Joined, Lost};

/// Where ranks of this process meet.
#[derive(Debug, Default)]
pub struct Meeting {
    state: Mutex<Rooms>,
}

#[derive(Debug, Default)]
struct Rooms {
    /// By epoch: groups that stand or stood, the last one forming or formed.
    groups: BTreeMap<Epoch, Vec<Arc<Room>>>,
    closed: bool,
}

impl Meeting {
    /// No group forms any more, and who waits for one does not.
    pub fn close(&self) {
        let mut rooms = self.state.lock().unwrap();
        rooms.closed = true;
        for room in rooms.groups.values().flatten() {
            room.changed.notify_all();
            room.end("the meeting is closed");
        }
    }
}

/// One group.
#[derive(Debug)]
struct Room {
    epoch: Epoch,
    size: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    joined: usize,
    lost: Option<String>,
    /// What each rank sends in this call, by destination. A call ends when all have taken theirs.
    sent: BTreeMap<usize, (&'static str, Vec<Vec<u8>>)>,
    taken: usize,
}

/// One rank's way to the meeting.
#[derive(Debug)]
pub struct Seat {
    meeting: Arc<Meeting>,
    rank: Rank,
    closed: AtomicBool,
}

impl Seat {
    pub fn new(meeting: Arc<Meeting>, rank: Rank) -> Self {
        Self {
            meeting,
            rank,
            closed: AtomicBool::new(false),
        }
    }
}

#[derive(Debug)]
struct Member {
    room: Arc<Room>,
    place: usize,
}

impl Groups for Seat {
    fn join(
        &self,
        epoch: Epoch,
        ranks: &[Rank],
        after: Option<u32>,
        deadline: Instant,
    ) -> Result<Joined, Lost> {
        let place = ranks.binary_search(&self.rank).unwrap();
        let mut rooms = self.meeting.state.lock().unwrap();
        let closed = Lost {
            epoch,
            call: "join",
            why: "the meeting is closed".to_owned(),
        };
        if rooms.closed || self.closed.load(Ordering::SeqCst) {
            return Err(closed);
        }
        let groups = rooms.groups.entry(epoch).or_default();
        let full = |room: &Arc<Room>| {
            let state = room.state.lock().unwrap();
            state.joined >= room.size || state.lost.is_some()
        };
        if groups.last().is_none_or(full) {
            groups.push(Arc::new(Room {
                epoch,
                size: ranks.len(),
                state: Mutex::default(),
                changed: Condvar::new(),
            }));
        }
        let generation = groups.len() as u32 - 1;
        let room = Arc::clone(groups.last().unwrap());
        drop(rooms);
        assert_eq!(room.size, ranks.len(), "one epoch, one set of ranks");
        assert!(
            after.is_none_or(|after| after < generation),
            "a lost group again"
        );
        let mut state = room.state.lock().unwrap();
        state.joined += 1;
        room.changed.notify_all();
        while state.joined < room.size {
            if state.lost.is_some() {
                return Err(closed);
            }
            if self.closed.load(Ordering::SeqCst) {
                state.joined -= 1;
                return Err(closed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.joined -= 1;
                return Err(room.lost("join", "not all came"));
            }
            state = room.changed.wait_timeout(state, left).unwrap().0;
        }
        drop(state);
        Ok(Joined {
            collective: Box::new(Member { room, place }),
            generation,
        })
    }

    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let rooms = self.meeting.state.lock().unwrap();
        for room in rooms.groups.values().flatten() {
            // Who is about to wait has this lock, or sees the flag.
            drop(room.state.lock().unwrap());
            room.changed.notify_all();
        }
    }
}

impl Room {
    fn lost(&self, call: &'static str, why: &str) -> Lost {
        Lost {
            epoch: self.epoch,
            call,
            why: why.to_owned(),
        }
    }

    fn end(&self, why: &str) {
        let mut state = self.state.lock().unwrap();
        state.lost.get_or_insert_with(|| why.to_owned());
        self.changed.notify_all();
    }
}

impl Member {
    /// Gives one message to each rank and takes one of each. All make the same call, or the group is lost.
    fn call(
        &self,
        what: &'static str,
        to: Vec<Vec<u8>>,
        deadline: Instant,
    ) -> Result<Vec<Vec<u8>>, Lost> {
        let room = &self.room;
        let mut state = room.state.lock().unwrap();
        // The call before must have ended for everybody.
        state = self.wait(state, what, deadline, |state| {
            !state.sent.contains_key(&self.place)
        })?;
        if let Some((other, _)) = state.sent.values().find(|(other, _)| *other != what) {
            let why = format!("{what} meets {other}");
            state.lost.get_or_insert(why);
        }
        state.sent.insert(self.place, (what, to));
        room.changed.notify_all();
        state = self.wait(state, what, deadline, |state| state.sent.len() == room.size)?;
        let mine = state
            .sent
            .values()
            .map(|(_, to)| to[self.place].clone())
            .collect();
        state.taken += 1;
        if state.taken == room.size {
            state.taken = 0;
            state.sent.clear();
        }
        room.changed.notify_all();
        Ok(mine)
    }

    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        what: &'static str,
        deadline: Instant,
        until: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'a, State>, Lost> {
        loop {
            if let Some(why) = &state.lost {
                return Err(self.room.lost(what, why));
            }
            if until(&state) {
                return Ok(state);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let why = "a rank did not come in time";
                state.lost = Some(why.to_owned());
                self.room.changed.notify_all();
                return Err(self.room.lost(what, why));
            }
            state = self.room.changed.wait_timeout(state, left).unwrap().0;
        }
    }
}

impl Collective for Member {
    fn size(&self) -> usize {
        self.room.size
    }

    fn place(&self) -> usize {
        self.place
    }

    fn all_to_all(
        &mut self,
        send: &[u8],
        recv: &mut [u8],
        block: usize,
        deadline: Instant,
    ) -> Result<(), Lost> {
        assert_eq!(send.len(), block * self.size());
        let to = send.chunks_exact(block).map(<[u8]>::to_vec).collect();
        let got = self.call("all_to_all", to, deadline)?;
        for (into, from) in recv.chunks_exact_mut(block).zip(got) {
            assert_eq!(from.len(), block, "ranks differ in the size of a block");
            into.copy_from_slice(&from);
        }
        Ok(())
    }

    fn counted(
        &mut self,
        send: &[Vec<u8>],
        recv: &mut [Vec<u8>],
        deadline: Instant,
    ) -> Result<(), Lost> {
        let got = self.call("counted", send.to_vec(), deadline)?;
        for (into, from) in recv.iter_mut().zip(got) {
            assert_eq!(from.len(), into.len(), "what was told is not what came");
            into.copy_from_slice(&from);
        }
        Ok(())
    }

    fn all_gather(
        &mut self,
        own: &[u8],
        all: &mut [u8],
        deadline: Instant,
    ) -> Result<(), Lost> {
        let got = self.call("all_gather", vec![own.to_vec(); self.size()], deadline)?;
        for (into, from) in all.chunks_exact_mut(own.len()).zip(got) {
            into.copy_from_slice(&from);
        }
        Ok(())
    }

    fn finish(&mut self, deadline: Instant) -> Result<(), Lost> {
        let nothing = vec![Vec::new(); self.size()];
        self.call("finish", nothing, deadline).map(drop)
    }

    fn abort(&mut self) {
        self.room.end("a rank has aborted");
    }
}
