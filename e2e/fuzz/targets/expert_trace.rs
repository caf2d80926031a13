//! Expert traces: any bytes give events or an error, and an event that was read is read again as it was.
#![no_main]

use foregate_trace::{FORMAT, Header, MAGIC, begin, read};
use libfuzzer_sys::fuzz_target;

/// Bytes before a payload: kind, length, checksum.
const FRAME: usize = 9;

fuzz_target!(|bytes: &[u8]| {
    events(bytes);
    // A checksum stops nearly every mutation at the door, so the same frames go in once more with their lengths and
    // checksums made right: after the header that they bring, and after one of a small model.
    let rest = bytes.strip_prefix(&MAGIC).unwrap_or(bytes);
    let frames = mended(rest.strip_prefix(&[FORMAT]).unwrap_or(rest));
    events(&[&MAGIC[..], &[FORMAT], &frames].concat());
    events(&[begin(&small()), frames].concat());
});

fn small() -> Header {
    Header {
        model: "small".into(),
        layers: 2,
        experts: 8,
        top_k: 2,
        started_ms: 0,
    }
}

/// Frames as long as they say, or as there are bytes for, with the checksums of what is in them.
fn mended(mut from: &[u8]) -> Vec<u8> {
    let mut frames = Vec::new();
    while let Some((head, rest)) = from.split_at_checked(FRAME) {
        let said = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
        let (payload, after) = rest.split_at(rest.len().min(said as usize));
        frames.push(head[0]);
        frames.extend((payload.len() as u32).to_le_bytes());
        frames.extend(crc32fast::hash(payload).to_le_bytes());
        frames.extend(payload);
        from = after;
    }
    frames
}

fn events(bytes: &[u8]) {
    let Ok((header, events)) = read(bytes) else {
        return;
    };
    for event in events.map_while(Result::ok).take(64) {
        // One at a time: those of a large model are large.
        let mut again = begin(&header);
        event.write(&mut again);
        let (head, mut events) = read(&again).expect("what was written can be read");
        assert_eq!(head, header);
        assert_eq!(events.next(), Some(Ok(event)), "one event, two readings");
        assert_eq!(events.next(), None);
    }
}
