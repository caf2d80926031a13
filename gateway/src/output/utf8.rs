//! Bytes to text as they come: a character whose bytes have not all come yet is held back.

/// The bytes of a text that are not sent.
#[derive(Debug, Default)]
pub(super) struct Utf8 {
    /// The beginning of a character, 3 bytes at most.
    begun: Vec<u8>,
}

impl Utf8 {
    /// Takes bytes, gives the text that is certain now. All texts together are [`String::from_utf8_lossy`] of all bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        self.begun.extend_from_slice(bytes);
        let certain = self.begun.len() - begun(&self.begun);
        let text = String::from_utf8_lossy(&self.begun[..certain]).into_owned();
        self.begun.drain(..certain);
        text
    }

    /// The end: no more bytes come.
    pub(super) fn finish(&mut self) -> String {
        let bytes = std::mem::take(&mut self.begun);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Bytes at the end that may become a character.
fn begun(bytes: &[u8]) -> usize {
    let last = bytes
        .utf8_chunks()
        .last()
        .map_or(&[][..], |chunk| chunk.invalid());
    match std::str::from_utf8(last) {
        Err(error) if error.error_len().is_none() => last.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_character_comes_whole_or_not_at_all() {
        let mut text = Utf8::default();
        let pieces: Vec<String> = "é€😀".bytes().map(|byte| text.push(&[byte])).collect();
        assert_eq!(pieces, ["", "é", "", "", "€", "", "", "", "😀"]);
        assert_eq!(text.push(b"\xe2\x82"), "");
        assert_eq!(text.push(b"a"), "\u{fffd}a");
        assert_eq!(text.push(b"\xff"), "\u{fffd}");
        assert_eq!(text.push(b"\xf0\x9f"), "");
        assert_eq!(text.finish(), "\u{fffd}");
        assert_eq!(text.finish(), "");
    }

    proptest! {
        #[test]
        fn pieces_add_up_to_the_text_of_all_bytes(
            pieces in prop::collection::vec(
                prop::collection::vec(
                    prop::sample::select(&b"a\x80\xbf\xc3\xa9\xe2\x82\xac\xed\xa0\xf0\x9f\x98\xf4\x90\xff"[..]),
                    0..4,
                ),
                0..40,
            ),
        ) {
            let mut text = Utf8::default();
            let mut sent: String = pieces.iter().map(|piece| text.push(piece)).collect();
            sent.push_str(&text.finish());
            let all = pieces.concat();
            prop_assert_eq!(sent, String::from_utf8_lossy(&all));
        }
    }
}
