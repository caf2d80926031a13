//! The exact bytes of single tokens, which text alone cannot give: a token may be half a character.

use std::collections::BTreeSet;

use serde_json::Value;
use tokenizers::Tokenizer;

/// How a vocabulary writes bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// Every byte is one character (GPT-2's table).
    ByteLevel,
    /// `<0x0A>` is a byte, `▁` a space (SentencePiece with byte fallback).
    Fallback,
    /// The token's string is its text.
    Plain,
}

/// Bytes by token id.
#[derive(Debug)]
pub struct TokenBytes {
    bytes: Vec<Box<[u8]>>,
    /// Ids of special tokens.
    special: BTreeSet<u32>,
    /// See [`TokenBytes::are_text`].
    are_text: bool,
}

impl TokenBytes {
    /// Reads the vocabulary; `document` is the tokenizer.json it came from.
    pub(super) fn new(tokenizer: &Tokenizer, document: &Value) -> Self {
        let spelling = spelling(&document["decoder"]);
        let added = tokenizer.get_added_tokens_decoder();
        let highest = added.keys().copied().max().unwrap_or(0);
        let size = tokenizer.get_vocab_size(true).max(highest as usize + 1);
        let vocab = tokenizer.get_vocab(true);
        let dense = vocab.values().all(|id| (*id as usize) < size);
        // The decoder spells all tokens alike.
        let alike = added.values().all(|token| {
            spell(&token.content, Spelling::ByteLevel) == token.content.as_bytes()
        });
        let special = added.iter().filter(|(_, token)| token.special);
        let special = special.map(|(id, _)| *id).collect();
        let bytes = (0..size as u32)
            .map(|id| {
                let Some(token) = tokenizer.id_to_token(id) else {
                    return Box::default();
                };
                let spelling = if added.contains_key(&id) {
                    Spelling::Plain
                } else {
                    spelling
                };
                spell(&token, spelling).into_boxed_slice()
            })
            .collect();
        Self {
            bytes,
            special,
            are_text: document["decoder"]["type"] == "ByteLevel" && dense && alike,
        }
    }

    /// Whether a text is the bytes of its tokens one after the other, read as UTF-8 with U+FFFD for what is none. Then it
    /// can be decoded token by token.
    #[must_use]
    pub const fn are_text(&self) -> bool {
        self.are_text
    }

    /// The bytes of a token in a text; none for a special token that is skipped.
    #[must_use]
    pub fn in_text(&self, id: u32, skip_special: bool) -> &[u8] {
        match skip_special && self.special.contains(&id) {
            true => &[],
            false => self.of(id),
        }
    }

    /// The bytes of a token; empty for an id outside the vocabulary.
    #[must_use]
    pub fn of(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |bytes| bytes)
    }

    /// Number of the longest token's bytes.
    pub(super) fn longest(&self) -> usize {
        self.bytes
            .iter()
            .map(|bytes| bytes.len())
            .max()
            .unwrap_or(0)
    }

    /// The token as logprobs write it: its text, or `bytes:\xe2\x82` if it is no whole text.
    #[must_use]
    pub fn label(&self, id: u32) -> String {
        let bytes = self.of(id);
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                let mut label = String::from("bytes:");
                for byte in bytes {
                    label.push_str(&format!("\\x{byte:02x}"));
                }
                label
            }
        }
    }
}

/// Looks through a decoder (and the sequence it may be) for how bytes are written.
fn spelling(decoder: &Value) -> Spelling {
    match decoder["type"].as_str() {
        Some("ByteLevel") => Spelling::ByteLevel,
        Some("ByteFallback" | "Metaspace") => Spelling::Fallback,
        Some("Sequence") => decoder["decoders"]
            .as_array()
            .into_iter()
            .flatten()
            .map(spelling)
            .find(|found| *found != Spelling::Plain)
            .unwrap_or(Spelling::Plain),
        _ => Spelling::Plain,
    }
}

fn spell(token: &str, spelling: Spelling) -> Vec<u8> {
    match spelling {
        Spelling::Plain => token.as_bytes().to_vec(),
        Spelling::Fallback => match fallback_byte(token) {
            Some(byte) => vec![byte],
            None => token.replace('▁', " ").into_bytes(),
        },
        Spelling::ByteLevel => token
            .chars()
            .map(byte_of)
            .collect::<Option<Vec<u8>>>()
            .unwrap_or_else(|| token.as_bytes().to_vec()),
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// Inverse of GPT-2's `bytes_to_unicode`: printable Latin-1 stands for itself, the other 68 bytes
/// are the characters from U+0100 in ascending order.
fn byte_of(character: char) -> Option<u8> {
    let printable = |code: u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = u32::from(character);
    if code < 0x100 {
        return u8::try_from(code).ok().filter(|_| printable(code));
    }
    let at = usize::try_from(code - 0x100).ok()?;
    (0..=255_u8)
        .filter(|byte| !printable(u32::from(*byte)))
        .nth(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_table_is_a_bijection() {
        let mut seen: Vec<u8> = (0..0x200_u32)
            .filter_map(char::from_u32)
            .filter_map(byte_of)
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }

    #[test]
    fn fallback_bytes_and_spaces() {
        assert_eq!(spell("<0xE2>", Spelling::Fallback), [0xe2]);
        assert_eq!(spell("▁a", Spelling::Fallback), b" a");
        assert_eq!(spell("<0x>", Spelling::Fallback), b"<0x>");
    }
}
