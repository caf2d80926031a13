//! The exchange frame, format 1: what two workers say to each other about expert rows.
//!
//! In: bytes of a peer, or a [`Frame`]. Out: the other. Little endian throughout.
//!
//! ```text
//!  0  magic "FGXF"            40  rows      u32   rows of f32 that follow
//!  4  version u8 = 1          44  routes    u32   (row, expert) pairs that follow
//!  5  kind    u8              48  hidden    u32   width of a row
//!  6  flags   u16 (bit 0:     52  word      u32   refuse: reason; reply: rows queued at the sender;
//!     a trace context)                            hello: bytes of the cluster's name
//!  8  payload u32 bytes       56  trace id  16 bytes
//! 12  crc-32  u32             72  span id   8 bytes
//! 16  epoch   u64             80  trace flags u8, then 7 bytes of zero
//! 24  call    u64 (hello:     88  payload: rows × hidden f32, then routes × (u32, u32),
//!     the incarnation)            or the cluster's name
//! 32  layer   u32 (hello: the rank)
//! 36  remaining deadline in microseconds u32
//! ```
//!
//! The checksum covers header (its own field taken as zero) and payload. Decoding is a pure function that
//! never panics; a field that a kind does not use must be zero, so each value has exactly one encoding.

mod pieces;

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};

pub use self::pieces::{Payload, Pieces, as_bytes_mut, join, payload, pieces};

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"FGXF";
/// The format this build writes and the only one it reads.
pub const VERSION: u8 = 1;
/// Bytes of the header.
pub const HEADER: usize = 88;
/// Most bytes of a whole frame. A sender cuts larger batches into several calls.
pub const MAX_FRAME: usize = 64 << 20;
/// Most bytes of a cluster's name in a hello.
pub const MAX_CLUSTER: usize = 253;
/// Most bytes of a frame before the hello was accepted.
pub const MAX_HELLO: usize = HEADER + MAX_CLUSTER;

const FLAG_TRACE: u16 = 1;
const CRC_AT: usize = 12;

/// A W3C trace context as it travels between workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace_id: [u8; 16],
    /// The span that is the parent of what the receiver does.
    pub span_id: [u8; 8],
    /// W3C trace flags; bit 0 means sampled.
    pub flags: u8,
}

impl TraceContext {
    /// Whether spans of this trace are recorded.
    #[must_use]
    pub const fn is_sampled(&self) -> bool {
        self.flags & 1 == 1
    }
}

/// One row of a call for one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Index of a row of the call.
    pub row: u32,
    /// The expert that shall run it.
    pub expert: ExpertId,
}

/// Says who is at the other end of a connection. First frame in both directions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Name of the cluster.
    pub cluster: String,
    /// The sender.
    pub rank: Rank,
    /// The sender's incarnation, so that a restart is told from a reconnect.
    pub incarnation: u64,
}

/// Rows on their way to experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The placement the caller routed with.
    pub epoch: Epoch,
    /// The caller's number of this call, unique on its connection.
    pub call: u64,
    /// The MoE layer.
    pub layer: LayerId,
    /// Microseconds the caller will still wait.
    pub deadline_us: u32,
    /// The caller's trace, if it has one.
    pub trace: Option<TraceContext>,
    /// Width of a row.
    pub hidden: u32,
    /// `rows × hidden` activations, row-major.
    pub rows: Vec<f32>,
    /// What to run; the reply has one row per route in this order.
    pub routes: Vec<Route>,
}

/// Rows on their way back.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// Epoch of the call.
    pub epoch: Epoch,
    /// Number of the call.
    pub call: u64,
    /// Layer of the call.
    pub layer: LayerId,
    /// Width of a row.
    pub hidden: u32,
    /// Rows still queued at the replier: the base load for the caller's next split.
    pub queued: u32,
    /// `routes × hidden`, in the order of the call's routes.
    pub rows: Vec<f32>,
}

/// Why a call was not run. All but `BadRequest` are worth another try, elsewhere or later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RefuseReason {
    /// The epoch is neither prepared, active nor draining there.
    WrongEpoch,
    /// The queue is full.
    Busy,
    /// An expert of the call is not resident there.
    NotResident,
    /// The call makes no sense to the receiver (layer, width or expert out of range).
    BadRequest,
    /// The caller's deadline passed before the call was run.
    Deadline,
}

impl RefuseReason {
    /// Every reason, for tables of metrics.
    pub const ALL: [Self; 5] = [
        Self::WrongEpoch,
        Self::Busy,
        Self::NotResident,
        Self::BadRequest,
        Self::Deadline,
    ];

    /// Name for metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::WrongEpoch => "wrong_epoch",
            Self::Busy => "busy",
            Self::NotResident => "not_resident",
            Self::BadRequest => "bad_request",
            Self::Deadline => "deadline",
        }
    }

    const fn code(self) -> u32 {
        match self {
            Self::WrongEpoch => 1,
            Self::Busy => 2,
            Self::NotResident => 3,
            Self::BadRequest => 4,
            Self::Deadline => 5,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.code() == code)
    }
}

/// A call that was not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refuse {
    /// The epoch the refuser has active.
    pub epoch: Epoch,
    /// Number of the call.
    pub call: u64,
    /// Why.
    pub reason: RefuseReason,
}

/// One frame.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// Who is there.
    Hello(Hello),
    /// Rows for experts.
    Call(Call),
    /// Rows from experts.
    Reply(Reply),
    /// No rows from experts.
    Refuse(Refuse),
}

/// Why bytes are not a frame. All of them mean that the connection cannot be trusted any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than the frame says it has.
    #[error("the frame ends after {have} of {need} bytes")]
    Short {
        /// Bytes there are.
        have: usize,
        /// Bytes the frame needs.
        need: usize,
    },
    /// Bytes after the frame's end.
    #[error("{0} bytes after the end of the frame")]
    Trailing(usize),
    /// The first four bytes are something else.
    #[error("not an exchange frame")]
    Magic,
    /// Another format.
    #[error("format {0} of the exchange frame is not known here, only {VERSION}")]
    Version(u8),
    /// An unknown kind.
    #[error("unknown kind of frame {0}")]
    Kind(u8),
    /// More bytes than any frame may have.
    #[error("a frame of {0} bytes is larger than any may be")]
    TooLarge(usize),
    /// The checksum differs.
    #[error("the checksum differs: {found:08x} in the frame, {computed:08x} over its bytes")]
    Checksum {
        /// What the frame says.
        found: u32,
        /// What its bytes give.
        computed: u32,
    },
    /// A field has a value it cannot have.
    #[error("field {0} of the frame has a value it cannot have")]
    Field(&'static str),
}

/// The part of a header a reader needs before it has the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// Bytes of the whole frame, header included; at most [`MAX_FRAME`].
    pub frame_bytes: usize,
}

/// Reads the fixed start of a frame: is it one, and how long is it?
///
/// # Errors
/// When the bytes are no frame of this format, or it is too large.
pub fn prefix(bytes: &[u8]) -> Result<Prefix, FrameError> {
    let Some(header) = bytes.first_chunk::<HEADER>() else {
        return Err(FrameError::Short {
            have: bytes.len(),
            need: HEADER,
        });
    };
    if header[..4] != MAGIC {
        return Err(FrameError::Magic);
    }
    if header[4] != VERSION {
        return Err(FrameError::Version(header[4]));
    }
    let payload = read_u32(header, 8) as usize;
    let frame_bytes = payload.saturating_add(HEADER);
    if frame_bytes > MAX_FRAME {
        return Err(FrameError::TooLarge(frame_bytes));
    }
    Ok(Prefix { frame_bytes })
}

/// Decodes one whole frame. Never panics, whatever the bytes.
///
/// # Errors
/// When the bytes are not exactly one valid frame.
pub fn decode(bytes: &[u8]) -> Result<Frame, FrameError> {
    let need = prefix(bytes)?.frame_bytes;
    if bytes.len() < need {
        return Err(FrameError::Short {
            have: bytes.len(),
            need,
        });
    }
    if bytes.len() > need {
        return Err(FrameError::Trailing(bytes.len() - need));
    }
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(FrameError::Short {
            have: bytes.len(),
            need,
        });
    };
    let mut rows = vec![0.0; payload(header)?.values];
    let (front, tail) = rest.split_at(size_of_val(rows.as_slice()));
    as_bytes_mut(&mut rows).copy_from_slice(front);
    join(header, rows, tail)
}

/// Appends the encoding of `frame` to `out`.
///
/// # Errors
/// When the frame is larger than [`MAX_FRAME`] or one of its fields cannot be encoded. `out` is unchanged then.
pub fn encode(frame: &Frame, out: &mut Vec<u8>) -> Result<(), FrameError> {
    for piece in pieces(frame)?.slices() {
        out.extend_from_slice(piece);
    }
    Ok(())
}

/// Whether `frame` can be encoded.
///
/// # Errors
/// As [`encode`].
pub fn check(frame: &Frame) -> Result<(), FrameError> {
    payload_bytes(frame, &Fields::of(frame)?).map(drop)
}

/// Header fields behind magic, version, length and checksum.
#[derive(Debug, Default)]
struct Fields {
    kind: u8,
    epoch: u64,
    call: u64,
    layer: u32,
    deadline_us: u32,
    rows: u32,
    routes: u32,
    hidden: u32,
    word: u32,
    trace: Option<TraceContext>,
}

impl Fields {
    fn of(frame: &Frame) -> Result<Self, FrameError> {
        Ok(match frame {
            Frame::Hello(hello) => Self {
                kind: 1,
                call: hello.incarnation,
                layer: hello.rank.0,
                word: count(hello.cluster.len(), "cluster")?,
                ..Self::default()
            },
            Frame::Call(call) => Self {
                kind: 2,
                epoch: call.epoch.0,
                call: call.call,
                layer: call.layer.0,
                deadline_us: call.deadline_us,
                rows: row_count(&call.rows, call.hidden)?,
                routes: count(call.routes.len(), "routes")?,
                hidden: call.hidden,
                word: 0,
                trace: call.trace,
            },
            Frame::Reply(reply) => Self {
                kind: 3,
                epoch: reply.epoch.0,
                call: reply.call,
                layer: reply.layer.0,
                rows: row_count(&reply.rows, reply.hidden)?,
                hidden: reply.hidden,
                word: reply.queued,
                ..Self::default()
            },
            Frame::Refuse(refuse) => Self {
                kind: 4,
                epoch: refuse.epoch.0,
                call: refuse.call,
                word: refuse.reason.code(),
                ..Self::default()
            },
        })
    }

    /// The header of a frame, with a checksum of zero.
    fn header(&self, payload: usize) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            header[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        put(&[VERSION, self.kind]);
        let flags = if self.trace.is_some() { FLAG_TRACE } else { 0 };
        put(&flags.to_le_bytes());
        // Fits: `payload_bytes` checked it against MAX_FRAME.
        put(&u32::try_from(payload).unwrap_or(u32::MAX).to_le_bytes());
        put(&[0; 4]);
        put(&self.epoch.to_le_bytes());
        put(&self.call.to_le_bytes());
        for field in [
            self.layer,
            self.deadline_us,
            self.rows,
            self.routes,
            self.hidden,
            self.word,
        ] {
            put(&field.to_le_bytes());
        }
        if let Some(context) = &self.trace {
            put(&context.trace_id);
            put(&context.span_id);
            put(&[context.flags]);
        }
        header
    }

    fn read(header: &[u8]) -> Result<Self, FrameError> {
        let flags = u16::from_le_bytes([header[6], header[7]]);
        if flags & !FLAG_TRACE != 0 {
            return Err(FrameError::Field("flags"));
        }
        let trace = read_trace(&header[56..HEADER], flags & FLAG_TRACE != 0)?;
        Ok(Self {
            kind: header[5],
            epoch: read_u64(header, 16),
            call: read_u64(header, 24),
            layer: read_u32(header, 32),
            deadline_us: read_u32(header, 36),
            rows: read_u32(header, 40),
            routes: read_u32(header, 44),
            hidden: read_u32(header, 48),
            word: read_u32(header, 52),
            trace,
        })
    }

    fn hello(self, rows: &[f32], payload: &[u8]) -> Result<Hello, FrameError> {
        zero(self.epoch, "epoch")?;
        zero(u64::from(self.deadline_us), "deadline")?;
        self.no_rows(rows)?;
        self.no_trace()?;
        if payload.len() > MAX_CLUSTER || payload.len() != self.word as usize {
            return Err(FrameError::Field("cluster"));
        }
        let cluster = std::str::from_utf8(payload).map_err(|_| FrameError::Field("cluster"))?;
        Ok(Hello {
            cluster: cluster.to_owned(),
            rank: Rank(self.layer),
            incarnation: self.call,
        })
    }

    fn call(self, rows: Vec<f32>, tail: &[u8]) -> Result<Call, FrameError> {
        zero(u64::from(self.word), "word")?;
        self.has_rows(&rows)?;
        let routes = read_routes(tail, self.routes, self.rows)?;
        Ok(Call {
            epoch: Epoch(self.epoch),
            call: self.call,
            layer: LayerId(self.layer),
            deadline_us: self.deadline_us,
            trace: self.trace,
            hidden: self.hidden,
            rows,
            routes,
        })
    }

    fn reply(self, rows: Vec<f32>, tail: &[u8]) -> Result<Reply, FrameError> {
        zero(u64::from(self.deadline_us), "deadline")?;
        zero(u64::from(self.routes), "routes")?;
        self.no_trace()?;
        self.has_rows(&rows)?;
        if !tail.is_empty() {
            return Err(FrameError::Field("payload"));
        }
        Ok(Reply {
            epoch: Epoch(self.epoch),
            call: self.call,
            layer: LayerId(self.layer),
            hidden: self.hidden,
            queued: self.word,
            rows,
        })
    }

    fn refuse(self, rows: &[f32], tail: &[u8]) -> Result<Refuse, FrameError> {
        zero(u64::from(self.layer), "layer")?;
        zero(u64::from(self.deadline_us), "deadline")?;
        self.no_rows(rows)?;
        self.no_trace()?;
        if !tail.is_empty() {
            return Err(FrameError::Field("payload"));
        }
        Ok(Refuse {
            epoch: Epoch(self.epoch),
            call: self.call,
            reason: RefuseReason::from_code(self.word).ok_or(FrameError::Field("reason"))?,
        })
    }

    /// Whether the rows that were read are those that the header names.
    fn has_rows(&self, rows: &[f32]) -> Result<(), FrameError> {
        if self.hidden == 0 {
            return Err(FrameError::Field("hidden"));
        }
        if rows.len() as u64 != u64::from(self.rows) * u64::from(self.hidden) {
            return Err(FrameError::Field("rows"));
        }
        Ok(())
    }

    fn no_rows(&self, rows: &[f32]) -> Result<(), FrameError> {
        zero(rows.len() as u64, "rows")?;
        zero(u64::from(self.rows), "rows")?;
        zero(u64::from(self.routes), "routes")?;
        zero(u64::from(self.hidden), "hidden")
    }

    fn no_trace(&self) -> Result<(), FrameError> {
        if self.trace.is_some() {
            return Err(FrameError::Field("trace"));
        }
        Ok(())
    }
}

fn zero(value: u64, field: &'static str) -> Result<(), FrameError> {
    if value == 0 {
        Ok(())
    } else {
        Err(FrameError::Field(field))
    }
}

fn count(value: usize, field: &'static str) -> Result<u32, FrameError> {
    u32::try_from(value).map_err(|_| FrameError::Field(field))
}

fn row_count(values: &[f32], hidden: u32) -> Result<u32, FrameError> {
    let width = hidden as usize;
    if width == 0 || !values.len().is_multiple_of(width) {
        return Err(FrameError::Field("hidden"));
    }
    count(values.len() / width, "rows")
}

fn payload_bytes(frame: &Frame, fields: &Fields) -> Result<usize, FrameError> {
    let payload = match frame {
        Frame::Hello(hello) if hello.cluster.len() > MAX_CLUSTER => {
            return Err(FrameError::Field("cluster"));
        }
        Frame::Hello(hello) => hello.cluster.len(),
        Frame::Call(call) => {
            if call.routes.iter().any(|route| route.row >= fields.rows) {
                return Err(FrameError::Field("routes"));
            }
            size_of_val(call.rows.as_slice()).saturating_add(call.routes.len() * 8)
        }
        Frame::Reply(reply) => size_of_val(reply.rows.as_slice()),
        Frame::Refuse(_) => 0,
    };
    let total = payload.saturating_add(HEADER);
    if total > MAX_FRAME {
        return Err(FrameError::TooLarge(total));
    }
    Ok(payload)
}

fn read_trace(bytes: &[u8], present: bool) -> Result<Option<TraceContext>, FrameError> {
    let (Some(trace_id), Some(span_id)) = (
        bytes.first_chunk::<16>(),
        bytes.get(16..24).and_then(<[u8]>::first_chunk::<8>),
    ) else {
        return Err(FrameError::Field("trace"));
    };
    let unused = if present { &bytes[25..] } else { bytes };
    if unused.iter().any(|byte| *byte != 0) {
        return Err(FrameError::Field("trace"));
    }
    Ok(present.then_some(TraceContext {
        trace_id: *trace_id,
        span_id: *span_id,
        flags: bytes[24],
    }))
}

fn read_routes(bytes: &[u8], routes: u32, rows: u32) -> Result<Vec<Route>, FrameError> {
    if bytes.len() as u64 != u64::from(routes) * 8 {
        return Err(FrameError::Field("routes"));
    }
    let (pairs, _) = bytes.as_chunks::<8>();
    pairs
        .iter()
        .map(|pair| {
            let route = Route {
                row: read_u32(pair, 0),
                expert: ExpertId(read_u32(pair, 4)),
            };
            if route.row < rows {
                Ok(route)
            } else {
                Err(FrameError::Field("routes"))
            }
        })
        .collect()
}

/// The word at `at`; zero if the slice ends before it (callers have checked the length).
fn read_u32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk::<4>)
        .map_or(0, |word| u32::from_le_bytes(*word))
}

/// As [`read_u32`], eight bytes.
fn read_u64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk::<8>)
        .map_or(0, |word| u64::from_le_bytes(*word))
}

#[cfg(test)]
mod tests;
