//! A few threads that work off the items of one job at a time.
//!
//! A job is a function of an item number; items are handed out by a counter, so which thread computes an
//! item is left to chance and no result may depend on it. The calling thread takes part. A thread that
//! wakes too late for a job misses it: nobody waits for it. Between jobs threads spin for some
//! microseconds, then sleep. When two callers share a pool, the second does its job alone.

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;

use super::seats::Seats;

/// Rounds of `spin_loop` before a waiting thread sleeps: some tens of microseconds.
const SPINS: u32 = 1500;

/// The state word: job number in the upper half, then these flags, then the threads now inside the job.
const OPEN: u64 = 1 << 31;
const SHUTDOWN: u64 = 1 << 30;
const INSIDE: u64 = (1 << 30) - 1;
const JOB: u64 = 1 << 32;

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    state: AtomicU64,
    next: AtomicUsize,
    items: AtomicUsize,
    /// Written by the caller while no thread is inside and the job is not open; read only from inside.
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    gate: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is the only part that is not Sync by itself; the protocol of the state word orders its
// write before every read, and the function it points to is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is only followed while its job runs.
unsafe impl Send for Shared {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Takes items until none is left.
    fn work(&self, job: &(dyn Fn(usize) + Sync)) {
        let items = self.items.load(Ordering::Relaxed);
        loop {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                return;
            }
            job(item);
        }
    }

    fn helper(&self) {
        let mut seen = 0;
        let mut spins = 0;
        loop {
            let state = self.state.load(Ordering::SeqCst);
            if state & SHUTDOWN != 0 {
                return;
            }
            if state & OPEN == 0 || state / JOB == seen {
                self.wait(&mut spins, seen);
                continue;
            }
            let inside = self.state.compare_exchange(
                state,
                state + 1,
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
            if inside.is_err() {
                continue;
            }
            (seen, spins) = (state / JOB, 0);
            // SAFETY: this thread is counted inside an open job: the caller wrote `job` before it
            // opened, and neither changes it nor returns until this thread has left.
            if let Some(job) = unsafe { *self.job.get() } {
                // SAFETY: as above, the function outlives the job.
                let done = catch_unwind(AssertUnwindSafe(|| self.work(unsafe { &*job })));
                if let Err(panic) = done {
                    lock(&self.panic).get_or_insert(panic);
                }
            }
            self.state.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Spins a little; then sleeps until there is a job other than `seen`, or the end.
    fn wait(&self, spins: &mut u32, seen: u64) {
        if *spins < SPINS {
            *spins += 1;
            std::hint::spin_loop();
            return;
        }
        let mut guard = lock(&self.gate);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        loop {
            let state = self.state.load(Ordering::SeqCst);
            if state & SHUTDOWN != 0 || (state & OPEN != 0 && state / JOB != seen) {
                break;
            }
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        *spins = 0;
    }

    /// Either a sleeper saw the new state before it slept, or it is counted here and is woken.
    fn wake_sleepers(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.gate));
            self.wake.notify_all();
        }
    }
}

/// Closes the job and waits until every thread has left it, also when the caller's own share panics.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.next.store(usize::MAX / 2, Ordering::Relaxed);
        self.0.state.fetch_and(!OPEN, Ordering::SeqCst);
        let mut spins = 0_u32;
        while self.0.state.load(Ordering::SeqCst) & INSIDE != 0 {
            spins += 1;
            if spins.is_multiple_of(SPINS) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }
}

/// Threads that live as long as this value.
pub(super) struct Threads {
    shared: Arc<Shared>,
    /// Held by the caller whose job runs.
    caller: Mutex<()>,
    helpers: Vec<JoinHandle<()>>,
}

impl Threads {
    /// A thread per seat, the first of which is the caller's: starts one less. When the system refuses a thread, the
    /// pool is smaller.
    pub(super) fn new(seats: &Seats) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            items: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            gate: Mutex::new(()),
            wake: Condvar::new(),
        });
        let start = |i| {
            let shared = Arc::clone(&shared);
            let seat = seats.seat(i);
            std::thread::Builder::new()
                .name(format!("kernels-{i}"))
                .spawn(move || {
                    let _seated = seat.take();
                    shared.helper();
                })
                .inspect_err(|e| tracing::warn!(error = %e, "kernel thread not started"))
                .ok()
        };
        let helpers = (1..seats.len()).map_while(start).collect();
        Self {
            shared,
            caller: Mutex::new(()),
            helpers,
        }
    }

    /// Threads that may take part in a job.
    pub(super) fn count(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `job` for every item once, in any order, on any thread, and returns when all are done.
    pub(super) fn run(&self, items: usize, job: &(dyn Fn(usize) + Sync)) {
        let guard = match self.caller.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if guard.is_none() || self.helpers.is_empty() || items < 2 {
            (0..items).for_each(job);
            return;
        }
        self.run_shared(items, job);
        drop(guard);
    }

    fn run_shared(&self, items: usize, job: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `Close` keeps this frame alive until nobody uses it.
        let unbound = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(job) };
        // SAFETY: the job is closed and nobody is inside, so nobody reads the cell; the caller's lock
        // keeps other writers out.
        unsafe { *shared.job.get() = Some(unbound) };
        shared.next.store(0, Ordering::Relaxed);
        shared.items.store(items, Ordering::Relaxed);
        // The job number goes up by one and the job opens; INSIDE is zero here.
        let state = shared.state.load(Ordering::SeqCst);
        let number = (state / JOB).wrapping_add(1) & (u64::MAX / JOB);
        shared.state.store((number * JOB) | OPEN, Ordering::SeqCst);
        shared.wake_sleepers();
        {
            let _close = Close(shared);
            shared.work(job);
        }
        let panic = lock(&shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.state.fetch_or(SHUTDOWN, Ordering::SeqCst);
        drop(lock(&self.shared.gate));
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            if helper.join().is_err() {
                tracing::error!("kernel thread panicked");
            }
        }
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threads")
            .field("count", &self.count())
            .finish_non_exhaustive()
    }
}

/// A slice that several threads write, each its own part.
#[derive(Clone, Copy)]
pub(super) struct Parts<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: a pointer and a length; `slice` states what its callers promise.
unsafe impl<T: Send + Sync> Send for Parts<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Parts<T> {}

impl<T> Parts<T> {
    pub(super) fn of(slice: &mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
        }
    }

    /// Part `from..from + len`, cut at the end of the whole.
    ///
    /// # Safety
    /// The whole slice is still borrowed, and no two live parts overlap.
    pub(super) unsafe fn slice<'a>(self, from: usize, len: usize) -> &'a mut [T] {
        let from = from.min(self.len);
        // SAFETY: in range by the two minima; exclusive by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(from), len.min(self.len - from))
        }
    }

    /// Part `from..from + len` as a whole of its own, cut at the end.
    pub(super) fn part(self, from: usize, len: usize) -> Self {
        let from = from.min(self.len);
        // SAFETY: in range by the minimum; nothing is read or written.
        let start = unsafe { self.start.add(from) };
        Self {
            start,
            len: len.min(self.len - from),
        }
    }

    /// The whole, to write.
    ///
    /// # Safety
    /// As for [`Parts::slice`].
    pub(super) unsafe fn whole<'a>(self) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }

    /// The whole, to read.
    ///
    /// # Safety
    /// The whole slice is still borrowed, and nobody writes it meanwhile.
    pub(super) unsafe fn read<'a>(self) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once() {
        for threads in 1..=4 {
            let pool = Threads::new(&threads.into());
            for items in [0, 1, 2, 3, 100, 1000] {
                let counts: Vec<AtomicUsize> =
                    (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run(items, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_short_jobs_from_several_callers() {
        let pool = Threads::new(&3.into());
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for items in 0..2000 {
                        let sum = AtomicUsize::new(0);
                        pool.run(items % 7, &|i| {
                            sum.fetch_add(i + 1, Ordering::Relaxed);
                        });
                        let n = items % 7;
                        assert_eq!(sum.load(Ordering::Relaxed), n * (n + 1) / 2);
                        total.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 6000);
    }

    #[test]
    fn threads_that_sleep_are_woken_or_not_needed() {
        let pool = Threads::new(&2.into());
        for _ in 0..20 {
            let gate = Mutex::new(());
            let nap = std::time::Duration::from_millis(2);
            drop(
                Condvar::new()
                    .wait_timeout(gate.lock().unwrap(), nap)
                    .unwrap(),
            );
            let sum = AtomicUsize::new(0);
            pool.run(10, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Threads::new(&2.into());
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(64, &|i| assert!(i != 40, "item 40"));
        }));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
