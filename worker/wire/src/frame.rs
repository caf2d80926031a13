//! The exchange frame.
