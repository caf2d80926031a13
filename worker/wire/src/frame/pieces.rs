//! A frame in three pieces, so that rows travel between a socket and their own memory without a copy.
//!
//! A step's rows are megabytes; laid into one buffer with their header they would be copied once more at
//! either end, by threads that could multiply instead.

use std::borrow::Cow;

use super::{
    CRC_AT, Fields, Frame, FrameError, HEADER, Prefix, payload_bytes, prefix, read_u32,
};

/// Bytes of a row's value.
const VALUE: usize = size_of::<f32>();

/// What a sender writes: header, rows, and what follows them, in this order.
#[derive(Debug)]
pub struct Pieces<'a> {
    header: [u8; HEADER],
    rows: Cow<'a, [u8]>,
    tail: Cow<'a, [u8]>,
}

impl Pieces<'_> {
    /// The bytes of the frame, to be written one slice after the other.
    #[must_use]
    pub fn slices(&self) -> [&[u8]; 3] {
        [&self.header, &self.rows, &self.tail]
    }
}

/// Cuts a frame into the bytes that make it up.
///
/// # Errors
/// As [`super::encode`].
pub fn pieces(frame: &Frame) -> Result<Pieces<'_>, FrameError> {
    let fields = Fields::of(frame)?;
    let payload = payload_bytes(frame, &fields)?;
    let (rows, tail) = match frame {
        Frame::Hello(hello) => (Cow::default(), Cow::Borrowed(hello.cluster.as_bytes())),
        Frame::Call(call) => {
            let mut routes = Vec::with_capacity(call.routes.len() * 8);
            for route in &call.routes {
                routes.extend_from_slice(&route.row.to_le_bytes());
                routes.extend_from_slice(&route.expert.0.to_le_bytes());
            }
            (to_bytes(&call.rows), Cow::Owned(routes))
        }
        Frame::Reply(reply) => (to_bytes(&reply.rows), Cow::default()),
        Frame::Refuse(_) => Default::default(),
    };
    let mut header = fields.header(payload);
    let crc = checksum(&header, &rows, &tail).to_le_bytes();
    header[CRC_AT..CRC_AT + 4].copy_from_slice(&crc);
    Ok(Pieces { header, rows, tail })
}

/// How much a reader has to read behind a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload {
    /// Values of rows, four bytes each.
    pub values: usize,
    /// Bytes after them.
    pub tail: usize,
}

/// What follows a header. One that contradicts itself has all its payload behind the rows, and
/// [`join`] refuses it when its checksum is known.
///
/// # Errors
/// As [`prefix`].
pub fn payload(header: &[u8; HEADER]) -> Result<Payload, FrameError> {
    let Prefix { frame_bytes } = prefix(header)?;
    let all = frame_bytes - HEADER;
    let values = u64::from(read_u32(header, 40)) * u64::from(read_u32(header, 48));
    let fits = usize::try_from(values)
        .ok()
        .filter(|values| *values <= all / VALUE);
    let values = fits.unwrap_or(0);
    Ok(Payload {
        values,
        tail: all - values * VALUE,
    })
}

/// Memory of rows as a reader fills it: little-endian values, as they come.
pub fn as_bytes_mut(rows: &mut [f32]) -> &mut [u8] {
    bytemuck::cast_slice_mut(rows)
}

/// Puts a frame together from what was read as [`payload`] says; `rows` filled through [`as_bytes_mut`].
/// Never panics, whatever the bytes.
///
/// # Errors
/// When they are not a valid frame.
pub fn join(
    header: &[u8; HEADER],
    mut rows: Vec<f32>,
    tail: &[u8],
) -> Result<Frame, FrameError> {
    let Payload { values, tail: rest } = payload(header)?;
    if rows.len() != values || tail.len() != rest {
        return Err(FrameError::Short {
            have: HEADER + rows.len() * VALUE + tail.len(),
            need: HEADER + values * VALUE + rest,
        });
    }
    let found = read_u32(header, CRC_AT);
    let computed = checksum(header, bytemuck::cast_slice(&rows), tail);
    if found != computed {
        return Err(FrameError::Checksum { found, computed });
    }
    if cfg!(target_endian = "big") {
        for value in &mut rows {
            *value = f32::from_bits(value.to_bits().swap_bytes());
        }
    }
    let fields = Fields::read(header)?;
    match header[5] {
        1 => fields.hello(&rows, tail).map(Frame::Hello),
        2 => fields.call(rows, tail).map(Frame::Call),
        3 => fields.reply(rows, tail).map(Frame::Reply),
        4 => fields.refuse(&rows, tail).map(Frame::Refuse),
        other => Err(FrameError::Kind(other)),
    }
}

/// The bytes of values, little-endian: their own memory where the processor agrees.
fn to_bytes(rows: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(rows))
    } else {
        Cow::Owned(rows.iter().flat_map(|value| value.to_le_bytes()).collect())
    }
}

/// CRC-32 over a frame, its own field taken as zero.
pub(super) fn checksum(header: &[u8; HEADER], rows: &[u8], tail: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..CRC_AT]);
    hasher.update(&[0; 4]);
    hasher.update(&header[CRC_AT + 4..]);
    hasher.update(rows);
    hasher.update(tail);
    hasher.finalize()
}
