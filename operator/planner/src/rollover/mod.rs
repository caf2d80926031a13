//! The epoch protocol: how a cluster goes from one placement to the next without an expert ever missing.
//!
//! Two pure machines: the operator's half ([`coordinator`]) and a worker's half ([`member`]). Both are
//! *level-triggered*: they are asked "given what you see now, what now?" as often as one likes, and the same view
//! gets the same answer. Nothing is remembered but the placements whose release is still open.
//!
//! ```text
//!  operator   propose N+1 ── wait: all its ranks prepared ── activate N+1 ── wait: N drained ── settled
//!  worker             fetch, verify, ack prepared             switch at a step boundary, ack serving,
//!                                                              finish steps of N, ack drained, release
//! ```
//!
//! Invariants (`tests/rollover_sim.rs` asserts them after every step of a random run):
//!
//! 1. **Prepared before active.** N+1 is activated only when every rank of it is alive and has acknowledged
//!    exactly N+1 as prepared.
//! 2. **Served until nobody calls.** An expert of N leaves a rank only when every live worker acknowledges
//!    `serving >= active` *and* `drained >= N`. So a step that runs under an epoch finds each copy of it on each
//!    holder that has not crashed since, and in a planned rollover every expert is resident at every moment.
//! 3. **Older epochs are refused.** A worker accepts calls of epochs whose experts it holds in full: the one it
//!    serves, those not yet drained everywhere, and the prepared target. An active placement with a lower number
//!    than one already seen is ignored.
//! 4. **Two in use at most.** N+2 is activated only when nobody who acknowledged is below N+1 any more. (A worker that
//!    returns with an old view may for a moment; its acknowledgement then holds back releases like any other.)
//! 5. **A returning worker prepares anew.** A new process has no state: it acknowledges nothing until it holds
//!    what the active placement gives it, and it calls nobody before.
//!
//! What the store must give: the acknowledgement of a rank is on its lease and vanishes with it; and activation
//! is one transaction that compares *both* the target (still this plan) and the active placement (still its
//! parent). Without the first comparison an operator that lost its lead could activate a plan that workers have
//! already dropped in favour of a newer target.

pub mod coordinator;
pub mod member;
