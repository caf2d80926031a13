//! A connection's two halves, plain or proven.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use foregate_tls::blocking::{Reading, Writing};
use foregate_tls::{Keys, Protocol, TlsError};

/// A connection before its hellos. Its time limits are set anew by who uses the halves.
#[derive(Debug)]
pub(super) struct Halves {
    pub(super) read: ReadHalf,
    pub(super) write: WriteHalf,
    /// For shutting down without a lock.
    pub(super) control: TcpStream,
}

/// The half that reads.
#[derive(Debug)]
pub(super) enum ReadHalf {
    Plain(TcpStream),
    Proven(Reading),
}

/// The half that writes.
#[derive(Debug)]
pub(super) enum WriteHalf {
    Plain(TcpStream),
    Proven(Writing),
}

impl Halves {
    /// Of a connection that this worker made; with `keys` both sides prove themselves first.
    pub(super) fn of_caller(
        stream: TcpStream,
        keys: Option<&Keys>,
        within: Duration,
    ) -> Result<Self, TlsError> {
        Self::new(stream, keys, |keys, stream| {
            keys.connect_blocking(Protocol::Exchange, stream, within)
        })
    }

    /// Of a connection that a peer made; with `keys` both sides prove themselves first.
    pub(super) fn of_callee(
        stream: TcpStream,
        keys: Option<&Keys>,
        within: Duration,
    ) -> Result<Self, TlsError> {
        Self::new(stream, keys, |keys, stream| {
            keys.accept_blocking(Protocol::Exchange, stream, within)
        })
    }

    fn new(
        stream: TcpStream,
        keys: Option<&Keys>,
        prove: impl FnOnce(&Keys, TcpStream) -> Result<(Reading, Writing), TlsError>,
    ) -> Result<Self, TlsError> {
        let control = stream.try_clone()?;
        let (read, write) = match keys {
            None => (
                ReadHalf::Plain(stream.try_clone()?),
                WriteHalf::Plain(stream),
            ),
            Some(keys) => {
                let (reading, writing) = prove(keys, stream)?;
                (ReadHalf::Proven(reading), WriteHalf::Proven(writing))
            }
        };
        Ok(Self {
            read,
            write,
            control,
        })
    }
}

impl ReadHalf {
    /// Longest wait for a byte; without one: for ever.
    pub(super) fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.set_read_timeout(timeout),
            Self::Proven(reading) => reading.set_read_timeout(timeout),
        }
    }
}

impl Read for ReadHalf {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(into),
            Self::Proven(reading) => reading.read(into),
        }
    }
}

impl WriteHalf {
    /// Longest time a write may be stuck.
    pub(super) fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.set_write_timeout(timeout),
            Self::Proven(writing) => writing.set_write_timeout(timeout),
        }
    }
}

impl Write for WriteHalf {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(from),
            Self::Proven(writing) => writing.write(from),
        }
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write_vectored(from),
            Self::Proven(writing) => writing.write_vectored(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
