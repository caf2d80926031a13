use proptest::prelude::*;

use super::*;

fn header() -> Header {
    Header {
        model: "demo".to_owned(),
        layers: 2,
        experts: 4,
        top_k: 2,
        started_ms: 1_700_000_000_000,
    }
}

fn events() -> Vec<Event> {
    vec![
        Event::Window {
            at_ms: 500,
            rank: Rank(3),
            epoch: Epoch(7),
            span_ms: 2000,
            steps: 12,
            counts: vec![0, 0, 5, 300, 0, 1, 0, 0],
        },
        Event::Request {
            at_ms: 900,
            number: 1,
            prompt_tokens: 40,
            answer_tokens: 2,
            prompt: vec![1, 0, 0, 0, 0, 0, 0, 9],
            total: vec![0; 8],
        },
        Event::Tokens {
            number: 1,
            first: 40,
            choices: vec![0, 3, 1, 2],
        },
        Event::Gap {
            at_ms: 1000,
            lost: 4,
        },
    ]
}

fn trace() -> Vec<u8> {
    let mut bytes = begin(&header());
    for event in events() {
        event.write(&mut bytes);
    }
    bytes
}

#[test]
fn events_come_back_as_written() {
    let bytes = trace();
    let (found, read) = read(&bytes).unwrap();
    assert_eq!(found, header());
    assert_eq!(read.collect::<Result<Vec<_>, _>>(), Ok(events()));
}

/// The bytes of format 1 stay readable: a change of these is a new format.
#[test]
fn golden_bytes_of_format_one() {
    let mut bytes = Vec::new();
    events()[0].write(&mut bytes);
    let golden = [
        1, 15, 0, 0, 0, 68, 155, 123, 98, 244, 3, 3, 7, 208, 15, 12, 2, 5, 0, 172, 2, 1, 1, 2,
    ];
    assert_eq!(bytes[9..], golden[9..], "payload");
    assert_eq!(bytes[..5], golden[..5], "kind and length");
    assert_eq!(bytes[5..9], crc32fast::hash(&golden[9..]).to_le_bytes());
    assert_eq!(begin(&header())[..9], *b"FGTRACE\0\x01");
}

#[test]
fn a_trace_that_breaks_off_gives_what_came_before() {
    let bytes = trace();
    let (_, read) = read(&bytes[..bytes.len() - 1]).unwrap();
    let read: Vec<_> = read.collect();
    assert_eq!(read.len(), 4);
    assert!(read[..3].iter().all(Result::is_ok));
    assert!(matches!(read[3], Err(TraceError::BreaksOff(_))));
}

#[test]
fn what_a_later_version_adds_is_passed_over() {
    let mut bytes = begin(&header());
    frame(&mut bytes, 200, b"anything");
    events()[3].write(&mut bytes);
    let (_, read) = read(&bytes).unwrap();
    assert_eq!(
        read.collect::<Result<Vec<_>, _>>(),
        Ok(vec![events()[3].clone()])
    );
}

#[test]
fn what_is_wrong_is_told() {
    assert_eq!(read(b"GIF89a").unwrap_err(), TraceError::NoTrace);
    assert_eq!(read(b"FGTRACE\0\x02").unwrap_err(), TraceError::Format(2));
    let huge = Header {
        layers: 1 << 40,
        ..header()
    };
    assert!(matches!(read(&begin(&huge)), Err(TraceError::Frame { .. })));
    let mut bytes = trace();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let (_, events) = read(&bytes).unwrap();
    let text = events.last().unwrap().unwrap_err().to_string();
    assert!(text.contains("checksum"), "{text}");
    let mut bytes = begin(&header());
    Event::Tokens {
        number: 0,
        first: 0,
        choices: vec![9; 4],
    }
    .write(&mut bytes);
    let (_, mut events) = read(&bytes).unwrap();
    assert!(
        events
            .next()
            .unwrap()
            .unwrap_err()
            .to_string()
            .contains("no expert")
    );
}

proptest! {
    /// Outside bytes end in events or in an error.
    #[test]
    fn no_bytes_break_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok((_, events)) = read(&bytes) {
            prop_assert!(events.count() <= 200);
        }
    }

    /// The same behind a sound header, with sound frames around any payload.
    #[test]
    fn no_payload_breaks_the_reader(
        frames in prop::collection::vec((0_u8..6, prop::collection::vec(any::<u8>(), 0..40)), 0..6),
    ) {
        let mut bytes = begin(&header());
        for (kind, payload) in &frames {
            frame(&mut bytes, *kind, payload);
        }
        let (_, events) = read(&bytes).unwrap();
        prop_assert!(events.count() <= frames.len());
    }

    #[test]
    fn counts_come_back(counts in prop::collection::vec(prop_oneof![Just(0), any::<u64>()], 8)) {
        let event = Event::Window {
            at_ms: 0, rank: Rank(0), epoch: Epoch(0), span_ms: 0, steps: 0, counts,
        };
        let mut bytes = begin(&header());
        event.write(&mut bytes);
        let (_, mut events) = read(&bytes).unwrap();
        prop_assert_eq!(events.next(), Some(Ok(event)));
    }
}
