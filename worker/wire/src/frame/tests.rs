use proptest::prelude::*;

use super::*;

fn trace() -> TraceContext {
    TraceContext {
        trace_id: *b"0123456789abcdef",
        span_id: *b"ABCDEFGH",
        flags: 1,
    }
}

fn call() -> Call {
    Call {
        epoch: Epoch(7),
        call: 42,
        layer: LayerId(3),
        deadline_us: 1500,
        trace: Some(trace()),
        hidden: 2,
        rows: vec![1.0, -2.5, 0.0, f32::INFINITY],
        routes: vec![
            Route {
                row: 0,
                expert: ExpertId(5),
            },
            Route {
                row: 1,
                expert: ExpertId(9),
            },
            Route {
                row: 0,
                expert: ExpertId(9),
            },
        ],
    }
}

fn bytes_of(frame: &Frame) -> Vec<u8> {
    let mut out = Vec::new();
    encode(frame, &mut out).unwrap();
    out
}

/// Puts the right checksum on a frame that was tampered with on purpose.
fn sign(bytes: &mut [u8]) {
    let (header, payload) = bytes.split_first_chunk().unwrap();
    let crc = pieces::checksum(header, payload, &[]).to_le_bytes();
    bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn format_1_keeps_its_bytes() {
    let hello = Frame::Hello(Hello {
        cluster: "demo".into(),
        rank: Rank(2),
        incarnation: 0x0102_0304_0506_0708,
    });
    let refuse = Frame::Refuse(Refuse {
        epoch: Epoch(9),
        call: 42,
        reason: RefuseReason::Busy,
    });
    let reply = Frame::Reply(Reply {
        epoch: Epoch(7),
        call: 42,
        layer: LayerId(3),
        hidden: 2,
        queued: 6,
        rows: vec![0.5, -1.0],
    });
    let golden = include_str!("format1.hex");
    let found: String = [hello, Frame::Call(call()), reply, refuse]
        .iter()
        .map(|frame| hex(&bytes_of(frame)) + "\n")
        .collect();
    assert_eq!(found, golden);
}

#[test]
fn every_single_bit_flip_is_noticed() {
    let good = bytes_of(&Frame::Call(call()));
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            assert!(decode(&bad).is_err(), "byte {at} bit {bit}");
        }
    }
}

#[test]
fn bounds_are_checked_before_anything_is_allocated() {
    let mut bytes = bytes_of(&Frame::Call(call()));
    bytes[40..44].copy_from_slice(&u32::MAX.to_le_bytes());
    bytes[48..52].copy_from_slice(&u32::MAX.to_le_bytes());
    sign(&mut bytes);
    assert_eq!(decode(&bytes), Err(FrameError::Field("rows")));

    let mut bytes = bytes_of(&Frame::Call(call()));
    bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(prefix(&bytes), Err(FrameError::TooLarge(_))));
}

#[test]
fn a_route_to_a_row_that_is_not_there_is_refused() {
    let mut bytes = bytes_of(&Frame::Call(call()));
    let routes = HEADER + 4 * 4;
    bytes[routes..routes + 4].copy_from_slice(&2_u32.to_le_bytes());
    sign(&mut bytes);
    assert_eq!(decode(&bytes), Err(FrameError::Field("routes")));

    let mut bad = call();
    bad.routes[0].row = 2;
    assert_eq!(
        encode(&Frame::Call(bad), &mut Vec::new()),
        Err(FrameError::Field("routes"))
    );
}

#[test]
fn unused_fields_must_be_zero() {
    let refuse = bytes_of(&Frame::Refuse(Refuse {
        epoch: Epoch(1),
        call: 1,
        reason: RefuseReason::Deadline,
    }));
    for at in [6, 32, 36, 40, 44, 48, 56, 87] {
        let mut bad = refuse.clone();
        bad[at] = if at == 6 { 2 } else { 1 };
        sign(&mut bad);
        assert!(
            matches!(decode(&bad), Err(FrameError::Field(_))),
            "byte {at}"
        );
    }
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let trace =
        proptest::option::of((any::<[u8; 16]>(), any::<[u8; 8]>(), any::<u8>()).prop_map(
            |(trace_id, span_id, flags)| TraceContext {
                trace_id,
                span_id,
                flags,
            },
        ));
    let rows = (1_u32..5, 0_usize..6).prop_flat_map(|(hidden, rows)| {
        let values = proptest::collection::vec(-1e30_f32..1e30, rows * hidden as usize);
        let top = u32::try_from(rows).unwrap().max(1);
        let routes = if rows == 0 { 0..1 } else { 0..9_usize };
        let routes = proptest::collection::vec((0..top, any::<u32>()), routes);
        (Just(hidden), values, routes)
    });
    prop_oneof![
        ("[a-z0-9-]{0,40}", any::<u32>(), any::<u64>()).prop_map(
            |(cluster, rank, incarnation)| {
                Frame::Hello(Hello {
                    cluster,
                    rank: Rank(rank),
                    incarnation,
                })
            }
        ),
        (any::<[u64; 2]>(), any::<[u32; 2]>(), trace, rows.clone()).prop_map(
            |(wide, narrow, trace, (hidden, rows, routes))| {
                Frame::Call(Call {
                    epoch: Epoch(wide[0]),
                    call: wide[1],
                    layer: LayerId(narrow[0]),
                    deadline_us: narrow[1],
                    trace,
                    hidden,
                    rows,
                    routes: routes
                        .into_iter()
                        .map(|(row, expert)| Route {
                            row,
                            expert: ExpertId(expert),
                        })
                        .collect(),
                })
            }
        ),
        (any::<[u64; 2]>(), any::<[u32; 2]>(), rows).prop_map(
            |(wide, narrow, (hidden, rows, _))| {
                Frame::Reply(Reply {
                    epoch: Epoch(wide[0]),
                    call: wide[1],
                    layer: LayerId(narrow[0]),
                    hidden,
                    queued: narrow[1],
                    rows,
                })
            }
        ),
        (any::<[u64; 2]>(), 0_usize..5).prop_map(|(wide, reason)| {
            Frame::Refuse(Refuse {
                epoch: Epoch(wide[0]),
                call: wide[1],
                reason: RefuseReason::ALL[reason],
            })
        }),
    ]
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(frame in any_frame()) {
        let bytes = bytes_of(&frame);
        prop_assert_eq!(prefix(&bytes).unwrap().frame_bytes, bytes.len());
        prop_assert_eq!(decode(&bytes).unwrap(), frame);
    }

    #[test]
    fn a_cut_frame_is_short(frame in any_frame(), keep in 0.0_f64..1.0) {
        let bytes = bytes_of(&frame);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss,
            reason = "a random cut")]
        let keep = (bytes.len() as f64 * keep) as usize;
        let short = matches!(decode(&bytes[..keep]), Err(FrameError::Short { .. }));
        prop_assert!(short);
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        drop(decode(&bytes));
        let mut framed = bytes;
        if framed.len() >= HEADER {
            framed[..4].copy_from_slice(&MAGIC);
            framed[4] = VERSION;
            let payload = u32::try_from(framed.len() - HEADER).unwrap();
            framed[8..12].copy_from_slice(&payload.to_le_bytes());
            framed[5] %= 5;
            sign(&mut framed);
            if let Ok(frame) = decode(&framed) {
                // One encoding per value: what decodes encodes to the same bytes.
                prop_assert_eq!(bytes_of(&frame), framed);
            }
        }
    }
}
