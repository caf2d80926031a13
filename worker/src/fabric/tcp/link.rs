//! One connection: the half that writes frames, and how one frame is read.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;

use foregate_wire::frame::{self, Frame, FrameError};

use super::stream::WriteHalf;

/// Frames with rows of up to this many bytes are written by the thread that has them: copying one into the socket's buffer
/// takes about as long as waking another thread. Larger ones go through the connection's own thread, so that
/// the engine computes its local rows meanwhile.
const DIRECT: usize = 512 << 10;
/// Frames waiting for the connection's thread.
const QUEUE: usize = 16;
/// Values or bytes: a frame's length alone costs at most so much memory.
const TRUST: usize = 1 << 18;

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
    queue: SyncSender<Frame>,
}

#[derive(Debug)]
struct Socket {
    /// For shutting down without the lock.
    control: TcpStream,
    writing: Mutex<WriteHalf>,
}

impl Writer {
    /// Takes the writing half of a connection and starts the connection's thread.
    pub(super) fn start(
        writing: WriteHalf,
        control: TcpStream,
        timeout: Duration,
    ) -> io::Result<Self> {
        writing.set_write_timeout(Some(timeout))?;
        let socket = Arc::new(Socket {
            control,
            writing: Mutex::new(writing),
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
    pub(super) fn write(&self, frame: Frame) -> Result<(), WriteError> {
        if size_hint(&frame) <= DIRECT {
            match self.socket.writing.try_lock() {
                Ok(mut writing) => return self.socket.write_now(&mut writing, &frame),
                Err(TryLockError::Poisoned(_)) => return Err(WriteError::Closed),
                Err(TryLockError::WouldBlock) => {}
            }
        }
        // Refused here, where somebody hears of it.
        frame::check(&frame)?;
        self.queue.try_send(frame).map_err(|error| match error {
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
    fn drain(&self, waiting: &Receiver<Frame>) {
        while let Ok(frame) = waiting.recv() {
            let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            if self.write_now(&mut writing, &frame).is_err() {
                shut(&self.control);
                return;
            }
        }
    }

    fn write_now(&self, stream: &mut WriteHalf, frame: &Frame) -> Result<(), WriteError> {
        let pieces = frame::pieces(frame)?;
        // A write that ends half-way leaves the stream without a frame boundary: give it up.
        write_all(stream, pieces.slices()).map_err(|_| {
            shut(&self.control);
            WriteError::Closed
        })
    }
}

/// Writes all pieces, with as few calls to the system as it allows.
fn write_all(stream: &mut WriteHalf, pieces: [&[u8]; 3]) -> io::Result<()> {
    let mut slices = pieces.map(IoSlice::new);
    let mut left = slices.as_mut_slice();
    // Empty ones at the front are left out, or a write of nothing would look like an end.
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match stream.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut left, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Ends a connection; one that has ended already is no error.
pub(super) fn shut(stream: &TcpStream) {
    if let Err(error) = stream.shutdown(Shutdown::Both) {
        tracing::trace!(%error, "exchange_shutdown");
    }
}

/// Reads one frame of at most `most` bytes.
pub(super) fn read_frame(stream: &mut impl Read, most: usize) -> Result<Frame, ReadError> {
    let mut header = [0; frame::HEADER];
    stream.read_exact(&mut header)?;
    let need = frame::prefix(&header)?.frame_bytes;
    if need > most {
        return Err(FrameError::TooLarge(need).into());
    }
    let payload = frame::payload(&header)?;
    let mut rows = Vec::new();
    read_growing(stream, payload.values, &mut rows, frame::as_bytes_mut)?;
    let mut tail = Vec::new();
    read_growing(stream, payload.tail, &mut tail, |bytes| bytes)?;
    Ok(frame::join(&header, rows, &tail)?)
}

/// Reads `count` values. Memory beyond [`TRUST`] is asked for when so many have come.
fn read_growing<T: Clone + Default>(
    stream: &mut impl Read,
    count: usize,
    values: &mut Vec<T>,
    bytes: impl Fn(&mut [T]) -> &mut [u8],
) -> io::Result<()> {
    while values.len() < count {
        let start = values.len();
        let end = count.min(start + TRUST);
        values.reserve_exact(if start == 0 { end } else { count - start });
        values.resize(end, T::default());
        stream.read_exact(bytes(&mut values[start..]))?;
    }
    Ok(())
}

fn size_hint(frame: &Frame) -> usize {
    match frame {
        Frame::Call(call) => size_of_val(call.rows.as_slice()) + call.routes.len() * 8,
        Frame::Reply(reply) => size_of_val(reply.rows.as_slice()),
        Frame::Hello(_) | Frame::Refuse(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::net::TcpListener;

    use foregate_api::ids::{Epoch, LayerId};
    use foregate_wire::frame::{MAX_FRAME, Reply};

    fn reply(call: u64, values: usize) -> Frame {
        Frame::Reply(Reply {
            epoch: Epoch(1),
            call,
            layer: LayerId(2),
            hidden: 1,
            queued: 3,
            rows: (0..values).map(|value| value as f32).collect(),
        })
    }

    /// Small frames are written at once, large ones by the connection's thread, both in pieces.
    #[test]
    fn frames_of_all_sizes_come_as_they_were() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut other, _) = listener.accept().unwrap();
        let control = stream.try_clone().unwrap();
        let writer =
            Writer::start(WriteHalf::Plain(stream), control, Duration::from_secs(20)).unwrap();
        other
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        for (call, values) in
            (0..).zip([0, 1, DIRECT / 4, DIRECT / 4 + 1, TRUST, 3 * TRUST + 1])
        {
            writer.write(reply(call, values)).unwrap();
            assert_eq!(
                read_frame(&mut other, MAX_FRAME).unwrap(),
                reply(call, values)
            );
        }
        // Too large: refused to its sender, and the connection goes on.
        let large = writer.write(reply(6, MAX_FRAME / 4));
        assert!(matches!(large, Err(WriteError::Frame(_))), "{large:?}");
        writer.write(reply(7, 2)).unwrap();
        assert_eq!(read_frame(&mut other, MAX_FRAME).unwrap(), reply(7, 2));
    }

    #[test]
    fn a_frame_that_ends_early_is_an_error() {
        let mut bytes = Vec::new();
        frame::encode(&reply(1, 2 * TRUST), &mut bytes).unwrap();
        for cut in [
            0,
            1,
            frame::HEADER,
            frame::HEADER + 1,
            5 * TRUST,
            bytes.len() - 1,
        ] {
            let read = read_frame(&mut &bytes[..cut], MAX_FRAME);
            assert!(matches!(read, Err(ReadError::Io(_))), "{cut}");
        }
        assert!(read_frame(&mut bytes.as_slice(), MAX_FRAME).is_ok());
        let small = read_frame(&mut bytes.as_slice(), 1000);
        assert!(matches!(
            small,
            Err(ReadError::Frame(FrameError::TooLarge(_)))
        ));
    }
}
