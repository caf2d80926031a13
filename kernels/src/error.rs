//! Why an operation was not done.

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

/// Why an executor did not do an op. On the processor it is always the shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// Arguments that do not fit each other; nothing was written.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The processor was asked to compute on values that a device has.
    #[error("{op}: {what} is in a device's memory, where the processor cannot compute")]
    OnDevice {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
    },
    /// A device was asked to compute on values that it does not have.
    #[error("{op}: {what} is not in the memory of the device that computes")]
    OnHost {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
    },
    /// This executor has no such op, or not for these formats or sizes.
    #[error("{op}: {what}")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// What it cannot do, and what helps.
        what: String,
    },
    /// The device has too little memory.
    #[error("no memory on the device for {what}: {wanted} bytes wanted, {free} free")]
    NoMemory {
        /// What it was for.
        what: &'static str,
        /// Bytes.
        wanted: usize,
        /// Bytes.
        free: usize,
    },
    /// The device or its driver failed; what it computed since the last read has no meaning.
    #[error("{op}: {call} failed with {code}: {text}")]
    Device {
        /// The operation that noticed it.
        op: &'static str,
        /// The call of the driver.
        call: &'static str,
        /// What the driver returned.
        code: i32,
        /// The driver's words for it.
        text: String,
    },
}
