//! Connections for threads: a handshake with a deadline, then a half that reads and a half that writes.
//!
//! One TLS connection has one state for both directions. It is locked to encrypt and to decrypt, never while waiting
//! for the socket: two peers that each write until the other reads would wait for each other otherwise.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::{ClientConnection, Connection, ServerConnection};

use crate::error::TlsError;
use crate::keys::{Keys, Protocol};

/// Bytes of ciphertext that are read at once.
const READ: usize = 64 << 10;
/// Most plaintext that is encrypted under one lock, so that the reading half does not wait long.
const WRITE: usize = 256 << 10;

/// The half that reads.
#[derive(Debug)]
pub struct Reading {
    socket: TcpStream,
    state: Arc<Mutex<Connection>>,
    /// Ciphertext that came and is not decrypted: `cipher[from..to]`.
    cipher: Box<[u8]>,
    from: usize,
    to: usize,
}

/// The half that writes.
#[derive(Debug)]
pub struct Writing {
    socket: TcpStream,
    state: Arc<Mutex<Connection>>,
    /// Ciphertext on its way to the socket; kept for its capacity.
    cipher: Vec<u8>,
}

impl Keys {
    /// Waits for the caller's proof. The socket must be a blocking one; its time limits are the caller's to set anew.
    ///
    /// # Errors
    /// When the caller is none of this cluster's, or not in time.
    pub fn accept_blocking(
        &self,
        protocol: Protocol,
        socket: TcpStream,
        within: Duration,
    ) -> Result<(Reading, Writing), TlsError> {
        let state = ServerConnection::new(self.server(protocol)).map_err(io::Error::other);
        let made = state.map_err(|error| self.explain_caller(protocol, error))?;
        shake(made.into(), socket, within)
            .map_err(|error| slow(error, within, |error| self.explain_caller(protocol, error)))
    }

    /// Proves itself to a worker, and has it prove that it is one of this cluster's. The socket must be a blocking
    /// one; its time limits are the caller's to set anew.
    ///
    /// As with [`Self::connect`], the first read may fail; see [`Self::explain_read`].
    ///
    /// # Errors
    /// When it is none, or not in time.
    pub fn connect_blocking(
        &self,
        protocol: Protocol,
        socket: TcpStream,
        within: Duration,
    ) -> Result<(Reading, Writing), TlsError> {
        let state = ClientConnection::new(self.client(protocol), self.server_name());
        let made = state.map_err(|error| self.explain_read(io::Error::other(error)))?;
        shake(made.into(), socket, within)
            .map_err(|error| slow(error, within, |error| self.explain_read(error)))
    }
}

fn slow(
    error: io::Error,
    within: Duration,
    explain: impl FnOnce(io::Error) -> TlsError,
) -> TlsError {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => TlsError::Slow(within),
        _ => explain(error),
    }
}

/// The handshake. Each wait has what is left of the whole, so that one byte now and then does not prolong it.
#[expect(clippy::disallowed_methods, reason = "on a thread, on the wall clock")]
fn shake(
    mut state: Connection,
    mut socket: TcpStream,
    within: Duration,
) -> io::Result<(Reading, Writing)> {
    let until = Instant::now() + within;
    while state.is_handshaking() || state.wants_write() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if state.wants_write() {
            socket.set_write_timeout(Some(left))?;
            state.write_tls(&mut socket)?;
            continue;
        }
        socket.set_read_timeout(Some(left))?;
        match state.read_tls(&mut socket) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        if let Err(error) = state.process_new_packets() {
            // The alert tells the other side why; that it may not get there is no second error.
            drop(state.write_tls(&mut socket));
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
    // All that is encrypted goes out at once, so nothing piles up.
    state.set_buffer_limit(None);
    let state = Arc::new(Mutex::new(state));
    let reading = Reading {
        socket: socket.try_clone()?,
        state: Arc::clone(&state),
        cipher: vec![0; READ].into_boxed_slice(),
        from: 0,
        to: 0,
    };
    let writing = Writing {
        socket,
        state,
        cipher: Vec::new(),
    };
    Ok((reading, writing))
}

fn lock(state: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reading {
    /// Longest wait for a byte; without one: for ever.
    ///
    /// # Errors
    /// The system's.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(timeout)
    }

    /// Takes out what is decrypted; `None` if that needs more ciphertext.
    fn decrypted(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let mut state = lock(&self.state);
        loop {
            match state.reader().read(into) {
                Ok(read) => return Ok(Some(read)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if self.from == self.to {
                return Ok(None);
            }
            self.from += state.read_tls(&mut &self.cipher[self.from..self.to])?;
            state
                .process_new_packets()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

impl Read for Reading {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(read) = self.decrypted(into)? {
                return Ok(read);
            }
            self.to = 0;
            self.from = 0;
            self.to = self.socket.read(&mut self.cipher)?;
            if self.to == 0 {
                // The end without a word may be somebody else's doing.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl Writing {
    /// Longest wait for room in the socket.
    ///
    /// # Errors
    /// The system's.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_write_timeout(timeout)
    }
}

impl Write for Writing {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(from)])
    }

    /// An error leaves the stream within a record: the connection is of no use then.
    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut taken = 0;
        self.cipher.clear();
        {
            let mut state = lock(&self.state);
            for piece in from {
                let piece = &piece[..piece.len().min(WRITE - taken)];
                state.writer().write_all(piece)?;
                taken += piece.len();
            }
            while state.wants_write() {
                state.write_tls(&mut self.cipher)?;
            }
        }
        self.socket.write_all(&self.cipher)?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
