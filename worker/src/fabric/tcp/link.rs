//! One connection: the half that writes frames, and how one frame is read.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;

use foregate_wire::frame::{self, Frame, FrameError};

/// Frames up to this many bytes are written by the thread that has them: copying one into the socket's buffer
/// takes about as long as waking another thread. Larger ones go through the connection's own thread, so that
/// the engine computes its local rows meanwhile.
const DIRECT: usize = 512 << 10;
/// Frames waiting for the connection's thread.
const QUEUE: usize = 16;
/// Buffers larger than this are given back after use. The rows of a step of 512 tokens fit.
const KEEP: usize = 16 << 20;
/// A frame's length alone costs at most so much memory.
const TRUST: usize = 1 << 20;

/// Why a frame was not written.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    /// The connection's queue is full.
    #[error("the connection's queue is full")]
    Full,
    /// The connection has ended.
    #[error("the connection has ended")]
    Closed,
    /// The frame cannot be encoded.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Why no frame was read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// The socket's.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The bytes are no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// The writing half, shared by everybody who has frames for this connection.
#[derive(Debug)]
pub(super) struct Writer {
    socket: Arc<Socket>,
    queue: SyncSender<Vec<u8>>,
}

#[derive(Debug)]
struct Socket {
    /// For shutting down without the lock.
    control: TcpStream,
    writing: Mutex<Writing>,
    /// Memory of the last frame that the connection's thread wrote.
    spare: Mutex<Vec<u8>>,
}

#[derive(Debug)]
struct Writing {
    stream: TcpStream,
    scratch: Vec<u8>,
}

impl Writer {
    /// Takes the writing side of `stream` and starts the connection's thread.
    pub(super) fn start(stream: &TcpStream, timeout: Duration) -> io::Result<Self> {
        let writing = stream.try_clone()?;
        writing.set_write_timeout(Some(timeout))?;
        let socket = Arc::new(Socket {
            control: stream.try_clone()?,
            writing: Mutex::new(Writing {
                stream: writing,
                scratch: Vec::new(),
            }),
            spare: Mutex::default(),
        });
        let (queue, waiting) = sync_channel(QUEUE);
        let for_thread = Arc::clone(&socket);
        // Ends when the writer is dropped (the channel closes) or the socket breaks.
        thread::Builder::new()
            .name("exchange-write".into())
            .spawn(move || for_thread.drain(&waiting))?;
        Ok(Self { socket, queue })
    }

    /// Writes a frame, or leaves it with the connection's thread.
    pub(super) fn write(&self, frame: &Frame) -> Result<(), WriteError> {
        if size_hint(frame) <= DIRECT {
            match self.socket.writing.try_lock() {
                Ok(mut writing) => return writing.write_now(frame, &self.socket.control),
                Err(TryLockError::Poisoned(_)) => return Err(WriteError::Closed),
                Err(TryLockError::WouldBlock) => {}
            }
        }
        let mut bytes = std::mem::take(&mut *self.socket.spare());
        bytes.clear();
        frame::encode(frame, &mut bytes)?;
        self.queue.try_send(bytes).map_err(|error| match error {
            TrySendError::Full(_) => WriteError::Full,
            TrySendError::Disconnected(_) => WriteError::Closed,
        })
    }

    /// Ends the connection in both directions; its reader wakes with an end of file.
    pub(super) fn shut(&self) {
        shut(&self.socket.control);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shut();
    }
}

impl Socket {
    fn drain(&self, waiting: &Receiver<Vec<u8>>) {
        while let Ok(bytes) = waiting.recv() {
            let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            if writing.stream.write_all(&bytes).is_err() {
                shut(&self.control);
                return;
            }
            drop(writing);
            if bytes.capacity() <= KEEP {
                *self.spare() = bytes;
            }
        }
    }

    fn spare(&self) -> MutexGuard<'_, Vec<u8>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writing {
    fn write_now(&mut self, frame: &Frame, control: &TcpStream) -> Result<(), WriteError> {
        self.scratch.clear();
        frame::encode(frame, &mut self.scratch)?;
        // A write that ends half-way leaves the stream without a frame boundary: give it up.
        self.stream.write_all(&self.scratch).map_err(|_| {
            shut(control);
            WriteError::Closed
        })
    }
}

/// Ends a connection; one that has ended already is no error.
pub(super) fn shut(stream: &TcpStream) {
    if let Err(error) = stream.shutdown(Shutdown::Both) {
        tracing::trace!(%error, "exchange_shutdown");
    }
}

/// Reads one frame of at most `most` bytes. `buffer` is only scratch.
pub(super) fn read_frame(
    stream: &mut impl Read,
    buffer: &mut Vec<u8>,
    most: usize,
) -> Result<Frame, ReadError> {
    buffer.clear();
    buffer.resize(frame::HEADER, 0);
    stream.read_exact(buffer)?;
    let need = frame::prefix(buffer)?.frame_bytes;
    if need > most {
        return Err(FrameError::TooLarge(need).into());
    }
    // Grows with what arrives, so a length alone costs no memory.
    let payload = need - frame::HEADER;
    buffer.reserve(payload.min(TRUST));
    let read = stream.take(payload as u64).read_to_end(buffer)?;
    if read < payload {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    let decoded = frame::decode(buffer)?;
    if buffer.capacity() > KEEP {
        *buffer = Vec::new();
    }
    Ok(decoded)
}

fn size_hint(frame: &Frame) -> usize {
    match frame {
        Frame::Call(call) => size_of_val(call.rows.as_slice()) + call.routes.len() * 8,
        Frame::Reply(reply) => size_of_val(reply.rows.as_slice()),
        Frame::Hello(_) | Frame::Refuse(_) => 0,
    }
}
