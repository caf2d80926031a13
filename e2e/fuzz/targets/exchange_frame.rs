//! Frames of a peer: any bytes give a frame or an error, and a frame has exactly one encoding.
#![no_main]

use foregate_wire::frame::{HEADER, MAGIC, VERSION, decode, encode, prefix};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = prefix(bytes);
    let _ = decode(bytes);
    // A checksum stops nearly every mutation at the door, so the same bytes go in once more with magic, length
    // and checksum made right.
    if bytes.len() < HEADER {
        return;
    }
    let mut frame = bytes.to_vec();
    frame[..4].copy_from_slice(&MAGIC);
    frame[4] = VERSION;
    let payload = u32::try_from(frame.len() - HEADER).expect("inputs are short");
    frame[8..12].copy_from_slice(&payload.to_le_bytes());
    frame[12..16].fill(0);
    let crc = crc32fast::hash(&frame);
    frame[12..16].copy_from_slice(&crc.to_le_bytes());
    if let Ok(decoded) = decode(&frame) {
        let mut again = Vec::new();
        encode(&decoded, &mut again).expect("what was decoded can be encoded");
        assert_eq!(again, frame, "one value, two encodings");
    }
});
