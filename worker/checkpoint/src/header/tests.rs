use proptest::prelude::*;

use super::*;

/// A file with the given header text and `data` bytes behind it.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 7);
    bytes
}

const GOOD: &str = r#"{"__metadata__":{"format":"pt"},
    "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[16,28]},
    "a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},
    "empty":{"dtype":"F32","shape":[0],"data_offsets":[16,16]}}"#;

#[test]
fn a_good_header_gives_ranges_of_the_file() {
    let bytes = file(GOOD, 28);
    let entries = parse_header(&bytes).unwrap();
    let start = 8 + GOOD.len();
    assert_eq!(entries["a"].range, start..start + 16);
    assert_eq!(entries["b"].range, start + 16..start + 28);
    assert_eq!(entries["b"].shape, [2, 3]);
    assert_eq!(entries["b"].dtype, Dtype::BF16);
    assert!(entries["empty"].range.is_empty());
}

#[test]
fn a_header_of_any_order_and_none_is_read() {
    assert!(parse_header(&file("{}", 0)).unwrap().is_empty());
    assert!(parse_header(&file("{}     ", 0)).unwrap().is_empty());
}

#[test]
fn damage_is_named() {
    let one = |entry: &str, data| file(&format!(r#"{{"t":{entry}}}"#), data);
    let cases = [
        (vec![1, 2, 3], "needs 8"),
        (u64::MAX.to_le_bytes().to_vec(), "too long"),
        (1000_u64.to_le_bytes().to_vec(), "needs 1008"),
        (file("[1]", 0), "malformed"),
        (file(r#"{"t":3}"#, 0), "malformed"),
        (file(GOOD, 27), "`b`"),
        (file(GOOD, 29), "1 bytes at its end"),
        (
            one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,7]}"#, 7),
            "`t`",
        ),
        (
            one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#, 8),
            "`t`",
        ),
        (
            one(r#"{"dtype":"F32","shape":[2],"data_offsets":[4,12]}"#, 12),
            "gap",
        ),
        (
            one(r#"{"dtype":"F4","shape":[1],"data_offsets":[0,0]}"#, 0),
            "`t`",
        ),
        (
            one(r#"{"dtype":"F99","shape":[1],"data_offsets":[0,4]}"#, 4),
            "malformed",
        ),
        (
            one(
                r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}"#,
                4,
            ),
            "no size",
        ),
        (
            file(
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
                    "b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
                6,
            ),
            "overlap",
        ),
        (
            file(
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                    "a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
                1,
            ),
            "stands twice",
        ),
        (
            file(
                r#"{"a":{"dtype":"U8","shape":[9223372036854775807],
                    "data_offsets":[0,9223372036854775807]}}"#,
                1,
            ),
            "`a`",
        ),
    ];
    for (bytes, wanted) in cases {
        let error = parse_header(&bytes).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error} (wanted {wanted})");
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _parsed = parse_header(&bytes);
    }

    #[test]
    fn no_header_text_panics(header in any::<String>(), data in 0_usize..64) {
        let _parsed = parse_header(&file(&header, data));
    }

    /// A good file with bytes changed or cut off is refused, or its ranges lie in the file.
    #[test]
    fn damaged_files_never_reach_outside(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = file(GOOD, 28);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(cut.index(bytes.len() + 1));
        if let Ok(entries) = parse_header(&bytes) {
            for entry in entries.values() {
                prop_assert!(bytes.get(entry.range.clone()).is_some());
            }
        }
    }
}
