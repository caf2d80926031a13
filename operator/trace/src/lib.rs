//! `foregate-trace`: expert traces, that is which experts live traffic asked for, as a file. Format 1, described in docs/TRACES.md.
//!
//! In: a [`Header`] and [`Event`]s; out: bytes, and back. A trace has counts and, if asked for, the choices of single
//! tokens; no text and no token ids. Invariants: whatever the bytes are, reading ends in events or in an error, and
//! takes memory in proportion to the model's size and the bytes; what was written before a break is still read.

#![forbid(unsafe_code)]

mod bits;

use foregate_api::ids::{Epoch, Rank};
use foregate_api::load::LoadWindow;
use serde::{Deserialize, Serialize};

use bits::{Cursor, counts, put_counts, put_varint};

/// First bytes of a trace.
pub const MAGIC: [u8; 8] = *b"FGTRACE\0";
/// The format that this version writes and reads.
pub const FORMAT: u8 = 1;
/// Longest payload of a frame.
pub const LONGEST: usize = 64 << 20;
/// Most (layer, expert) pairs of a model that is believed.
const MAX_PAIRS: usize = 1 << 20;
/// Bytes before a payload: kind, length, checksum.
const FRAME: usize = 9;

/// What a trace is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// Name of the model.
    pub model: String,
    /// MoE layers.
    pub layers: usize,
    /// Routed experts per layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// When it begins, in milliseconds since 1970.
    pub started_ms: u64,
}

impl Header {
    /// Counts of an event: `layers × experts`.
    #[must_use]
    pub const fn pairs(&self) -> usize {
        self.layers.saturating_mul(self.experts)
    }
}

/// What happened. Times are milliseconds since the header's; counts are layer-major, `layers × experts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A rank's gate counts over the steps of a window.
    Window {
        /// When it was seen.
        at_ms: u64,
        /// Whose.
        rank: Rank,
        /// The placement in force.
        epoch: Epoch,
        /// Its length in milliseconds.
        span_ms: u64,
        /// Engine steps in it, 0 if unknown.
        steps: u64,
        /// Rows per layer and expert.
        counts: Vec<u64>,
    },
    /// A request that has ended, with its signature.
    Request {
        /// When it ended.
        at_ms: u64,
        /// Number of the request in this trace.
        number: u64,
        /// Tokens of its prompt.
        prompt_tokens: u64,
        /// Tokens of its answer.
        answer_tokens: u64,
        /// Rows of the prompt per layer and expert.
        prompt: Vec<u64>,
        /// Rows of prompt and answer per layer and expert.
        total: Vec<u64>,
    },
    /// Choices of tokens that follow each other, if they were asked for.
    Tokens {
        /// The request they belong to.
        number: u64,
        /// Position of the first.
        first: u64,
        /// `tokens × layers × top_k` experts.
        choices: Vec<u32>,
    },
    /// Events that were lost because the recorder was too slow.
    Gap {
        /// When that was seen.
        at_ms: u64,
        /// How many.
        lost: u64,
    },
}

/// Why bytes are no trace, or no more of one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// The first bytes are others.
    #[error("this is no expert trace")]
    NoTrace,
    /// Another format.
    #[error("this is a trace of format {0}, this version reads format {FORMAT}")]
    Format(u8),
    /// The bytes end in the middle of a frame: the recorder was stopped. What came before is sound.
    #[error("the trace breaks off at byte {0}")]
    BreaksOff(usize),
    /// A frame is not what it should be.
    #[error("the frame at byte {at}: {what}")]
    Frame {
        /// Where it begins.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
}

/// The bytes before the first event.
#[must_use]
pub fn begin(header: &Header) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.push(FORMAT);
    let payload = serde_json::to_vec(header).unwrap_or_default();
    frame(&mut bytes, 0, &payload);
    bytes
}

impl Event {
    /// The event of a load window; `None` if it is of another model.
    #[must_use]
    pub fn window(
        window: &LoadWindow,
        header: &Header,
        at_ms: u64,
        steps: u64,
    ) -> Option<Self> {
        let fits = window.gate.len() == header.layers
            && window.gate.iter().all(|row| row.len() == header.experts);
        fits.then(|| Self::Window {
            at_ms,
            rank: window.rank,
            epoch: window.epoch,
            span_ms: window.span_ms,
            steps,
            counts: window.gate.concat(),
        })
    }

    /// Appends the event.
    pub fn write(&self, bytes: &mut Vec<u8>) {
        let mut payload = Vec::new();
        let out = &mut payload;
        let kind = match self {
            Self::Window {
                at_ms,
                rank,
                epoch,
                span_ms,
                steps,
                counts,
            } => {
                for number in [*at_ms, u64::from(rank.0), epoch.0, *span_ms, *steps] {
                    put_varint(out, number);
                }
                put_counts(out, counts);
                1
            }
            Self::Request {
                at_ms,
                number,
                prompt_tokens,
                answer_tokens,
                prompt,
                total,
            } => {
                for number in [*at_ms, *number, *prompt_tokens, *answer_tokens] {
                    put_varint(out, number);
                }
                put_counts(out, prompt);
                put_counts(out, total);
                2
            }
            Self::Tokens {
                number,
                first,
                choices,
            } => {
                put_varint(out, *number);
                put_varint(out, *first);
                put_varint(out, choices.len() as u64);
                for expert in choices {
                    put_varint(out, u64::from(*expert));
                }
                3
            }
            Self::Gap { at_ms, lost } => {
                put_varint(out, *at_ms);
                put_varint(out, *lost);
                4
            }
        };
        frame(bytes, kind, &payload);
    }
}

fn frame(bytes: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    bytes.push(kind);
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(crc32fast::hash(payload).to_le_bytes());
    bytes.extend(payload);
}

/// The events of a trace, in order. After an error there are no more.
#[derive(Debug, Clone)]
pub struct Events<'a> {
    bytes: &'a [u8],
    at: usize,
    layers: usize,
    experts: usize,
    top_k: usize,
    over: bool,
}

/// Reads a trace.
///
/// # Errors
/// If these are not the bytes of a trace of this format.
pub fn read(bytes: &[u8]) -> Result<(Header, Events<'_>), TraceError> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(TraceError::NoTrace)?;
    match rest.first() {
        Some(&FORMAT) => {}
        Some(other) => return Err(TraceError::Format(*other)),
        None => return Err(TraceError::BreaksOff(bytes.len())),
    }
    let at = MAGIC.len() + 1;
    let (kind, payload, next) = frame_at(bytes, at)?;
    let wrong = |what| TraceError::Frame { at, what };
    if kind != 0 {
        return Err(wrong("the first frame is no header"));
    }
    let header: Header = serde_json::from_slice(payload)
        .map_err(|_| wrong("the header is not what it should be"))?;
    let sound = header.layers > 0
        && header.experts > 0
        && (1..=header.experts).contains(&header.top_k)
        && header.pairs() <= MAX_PAIRS;
    if !sound {
        return Err(wrong("the header's model does not exist"));
    }
    let events = Events {
        bytes,
        at: next,
        layers: header.layers,
        experts: header.experts,
        top_k: header.top_k,
        over: false,
    };
    Ok((header, events))
}

/// Kind and payload of the frame at `at`, and where the next begins.
fn frame_at(bytes: &[u8], at: usize) -> Result<(u8, &[u8], usize), TraceError> {
    let broken = TraceError::BreaksOff(at);
    let head = bytes.get(at..at + FRAME).ok_or(broken.clone())?;
    let number = |from: usize| {
        let four: [u8; 4] = head.get(from..from + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(four))
    };
    let (Some(length), Some(checksum)) = (number(1), number(5)) else {
        return Err(broken);
    };
    let length = length as usize;
    if length > LONGEST {
        return Err(TraceError::Frame {
            at,
            what: "its length is beyond any frame's",
        });
    }
    let next = at + FRAME + length;
    let payload = bytes.get(at + FRAME..next).ok_or(broken)?;
    if crc32fast::hash(payload) != checksum {
        return Err(TraceError::Frame {
            at,
            what: "its checksum is wrong",
        });
    }
    Ok((head[0], payload, next))
}

impl Events<'_> {
    fn event(&self, kind: u8, payload: &[u8]) -> Result<Option<Event>, &'static str> {
        let mut from = Cursor::new(payload);
        let pairs = self.layers * self.experts;
        let event = match kind {
            1 => Event::Window {
                at_ms: from.varint()?,
                rank: Rank(u32::try_from(from.varint()?).map_err(|_| "its rank is too large")?),
                epoch: Epoch(from.varint()?),
                span_ms: from.varint()?,
                steps: from.varint()?,
                counts: counts(&mut from, pairs)?,
            },
            2 => Event::Request {
                at_ms: from.varint()?,
                number: from.varint()?,
                prompt_tokens: from.varint()?,
                answer_tokens: from.varint()?,
                prompt: counts(&mut from, pairs)?,
                total: counts(&mut from, pairs)?,
            },
            3 => self.tokens(&mut from)?,
            4 => Event::Gap {
                at_ms: from.varint()?,
                lost: from.varint()?,
            },
            // A later version may tell more.
            _ => return Ok(None),
        };
        if from.is_empty() {
            Ok(Some(event))
        } else {
            Err("it has more bytes than it says")
        }
    }

    fn tokens(&self, from: &mut Cursor<'_>) -> Result<Event, &'static str> {
        let (number, first, length) = (from.varint()?, from.varint()?, from.varint()?);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        // A choice takes a byte at least, so this bounds what is made room for.
        if length > from.len() || !length.is_multiple_of(self.layers * self.top_k) {
            return Err("its choices are not those of whole tokens");
        }
        let mut choices = Vec::with_capacity(length);
        for _ in 0..length {
            let expert = from.varint()?;
            if expert >= self.experts as u64 {
                return Err("a choice is no expert");
            }
            choices.push(expert as u32);
        }
        Ok(Event::Tokens {
            number,
            first,
            choices,
        })
    }
}

impl Iterator for Events<'_> {
    type Item = Result<Event, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.over && self.at < self.bytes.len() {
            let at = self.at;
            let found = frame_at(self.bytes, at).and_then(|(kind, payload, next)| {
                self.at = next;
                self.event(kind, payload)
                    .map_err(|what| TraceError::Frame { at, what })
            });
            match found {
                Ok(Some(event)) => return Some(Ok(event)),
                Ok(None) => {}
                Err(error) => {
                    self.over = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
