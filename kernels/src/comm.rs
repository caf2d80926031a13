//! Devices that exchange bytes: what a library such as NCCL does, as whoever uses it sees it.
//!
//! In: bytes of this process, and by when. Out: those of the other ranks, in memory of this process. How they get to a
//! device and back is the implementation's; so is the library. Ranks count from zero without gaps.

use std::fmt;
use std::time::Instant;

/// What failed between ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommFault {
    /// The call.
    pub call: &'static str,
    /// Why, in one line.
    pub why: String,
}

impl fmt::Display for CommFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call, self.why)
    }
}

impl std::error::Error for CommFault {}

/// Which group a rank joins, and as whom.
pub struct Seat<'a> {
    /// What its founder told.
    pub id: &'a [u8],
    /// Ranks of the group.
    pub ranks: usize,
    /// This one, below `ranks`.
    pub rank: usize,
    /// For whose epoch it is; for errors and logs.
    pub epoch: u64,
    /// By when all must have come.
    pub deadline: Instant,
    /// Whether the group is still the one to join; asked again and again while others are waited for.
    pub wanted: &'a dyn Fn() -> bool,
}

impl fmt::Debug for Seat<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat")
            .field("ranks", &self.ranks)
            .field("rank", &self.rank)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

/// Founds and joins groups.
pub trait Comms: fmt::Debug + Send + Sync {
    /// What a new group is found by: made by one rank, told to the others by other means.
    ///
    /// # Errors
    /// The library's.
    fn new_id(&self) -> Result<Vec<u8>, CommFault>;

    /// Joins, and waits until all ranks have.
    ///
    /// # Errors
    /// The library's or the device's; not all came by the deadline; or the group is not wanted any more.
    fn join(&self, seat: Seat<'_>) -> Result<Box<dyn Comm>, CommFault>;
}

/// One rank's place in a group. All ranks make the same calls in the same order; an error ends the group for this rank,
/// and every later call fails too. Dropping it aborts.
pub trait Comm: fmt::Debug + Send {
    /// Sends block `i` of `send` to rank `i`, and receives rank `i`'s into block `i` of `recv`. Both are `block` bytes for
    /// each rank.
    ///
    /// # Errors
    /// A rank is gone, not all came by `deadline`, or the device failed.
    fn all_to_all(
        &mut self,
        send: &[u8],
        recv: &mut [u8],
        block: usize,
        deadline: Instant,
    ) -> Result<(), CommFault>;

    /// Sends `send[i]` to rank `i`, and receives into `recv[i]` as many bytes as it is long, which are as many as rank `i`
    /// sends.
    ///
    /// # Errors
    /// As [`Self::all_to_all`]. Lengths that differ are an error where the library notices, by the deadline at the latest.
    fn counted(
        &mut self,
        send: &[Vec<u8>],
        recv: &mut [Vec<u8>],
        deadline: Instant,
    ) -> Result<(), CommFault>;

    /// Ends in order, after all ranks have done all that was called.
    ///
    /// # Errors
    /// As [`Self::all_to_all`]; it is over all the same.
    fn finish(&mut self, deadline: Instant) -> Result<(), CommFault>;

    /// Ends now. Ranks that wait for this one do so in vain, by their deadlines.
    fn abort(&mut self);
}
