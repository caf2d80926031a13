//! The one error of this crate's operations.

use std::fmt;

/// A slice or an index that does not fit the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShapeError {
    /// The operation.
    pub op: &'static str,
    /// The argument.
    pub what: &'static str,
    /// The size it must have, or the bound it must stay below.
    pub want: usize,
    /// The size or value it has.
    pub got: usize,
}

impl ShapeError {
    pub(crate) const fn new(
        op: &'static str,
        what: &'static str,
        want: usize,
        got: usize,
    ) -> Self {
        Self {
            op,
            what,
            want,
            got,
        }
    }

    pub(crate) fn check(
        op: &'static str,
        what: &'static str,
        want: usize,
        got: usize,
    ) -> Result<(), Self> {
        if want == got {
            Ok(())
        } else {
            Err(Self::new(op, what, want, got))
        }
    }

    /// `want` is a product of sizes.
    pub(crate) fn check_area(
        op: &'static str,
        what: &'static str,
        want: (usize, usize),
        got: usize,
    ) -> Result<(), Self> {
        Self::check(op, what, want.0.saturating_mul(want.1), got)
    }
}

impl fmt::Display for ShapeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}: want {}, got {}",
            self.op, self.what, self.want, self.got
        )
    }
}

impl std::error::Error for ShapeError {}
