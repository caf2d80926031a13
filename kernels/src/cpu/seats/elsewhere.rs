//! Systems on which threads cannot be bound.

use std::io;

use super::Processor;

fn none<T>() -> io::Result<T> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "threads can be bound on Linux only",
    ))
}

pub(super) fn processors() -> io::Result<Vec<Processor>> {
    none()
}

pub(super) fn bind(_ids: &[usize]) -> io::Result<Vec<usize>> {
    none()
}
