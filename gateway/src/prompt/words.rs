//! Text to token ids word by word, for tokenizers in which words do not depend on each other.
//!
//! Words repeat, and what the tokenizer makes of one is always the same, so it is asked once and remembered.
//!
//! ```text
//!  "In the beginning" ── cut before spaces ── "In" " the" " beginning" ── remembered ids, else the tokenizer's
//! ```
//!
//! A cut is before a space that follows a visible ASCII character. Why it changes nothing, in the tokenizers of
//! [`Words::of`]: their patterns tile a text from left to right, no match of theirs goes on over such a space, and none but
//! that of white space looks at what follows it. NFC has nothing to compose there, no added token lies across it, and
//! byte-pair merges stay within a match.

use serde_json::Value;
use tokenizers::{Result, Tokenizer};

/// Words remembered; when there are more, all are forgotten. With their ids, that is some megabytes.
const CAPACITY: usize = 1 << 15;
/// Bytes of the longest word that is remembered.
const LONGEST: usize = 48;
/// Patterns of which the above holds beside GPT-2's, which is built into the tokenizer: that of Qwen 2 and 3, and that of
/// Llama 3 and GLM 4.
const PATTERNS: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// Ids by word.
#[expect(
    clippy::disallowed_types,
    reason = "looked up and never gone through, so no order leaks; read by all requests at once, and a snapshot would be copied for every new word"
)]
type Known = std::sync::RwLock<std::collections::HashMap<Box<str>, Box<[u32]>>>;

/// Remembered words of one tokenizer.
#[derive(Debug)]
pub(super) struct Words {
    known: Known,
    /// What special tokens stand before and after a text that is encoded with them.
    around: (Vec<u32>, Vec<u32>),
}

impl Words {
    /// For a tokenizer and the `tokenizer.json` it came from; `None` if it is not known that its words are independent.
    pub(super) fn of(tokenizer: &Tokenizer, document: &Value) -> Option<Self> {
        let bytes =
            document["model"]["type"] == "BPE" && document["model"]["dropout"].is_null();
        let local = bytes
            && is_local(&document["normalizer"])
            && splits(&document["pre_tokenizer"])
            && document["added_tokens"]
                .as_array()
                .is_none_or(|tokens| tokens.iter().all(is_within));
        if !local {
            return None;
        }
        Some(Self {
            known: Known::default(),
            around: around(tokenizer)?,
        })
    }

    /// Encodes a text as [`Tokenizer::encode_fast`] does.
    pub(super) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        special: bool,
    ) -> Result<Vec<u32>> {
        // English has a token per four bytes.
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if special {
            ids.extend_from_slice(&self.around.0);
        }
        let mut rest = text;
        while !rest.is_empty() {
            rest = self.encode_known(rest, &mut ids);
            let word = first_word(rest);
            if !word.is_empty() {
                let new = tokenizer.encode_fast(word, false)?;
                self.remember(word, new.get_ids());
                ids.extend_from_slice(new.get_ids());
            }
            rest = &rest[word.len()..];
        }
        if special {
            ids.extend_from_slice(&self.around.1);
        }
        Ok(ids)
    }

    /// Encodes words until one that is not known, and gives the rest.
    fn encode_known<'a>(&self, mut text: &'a str, ids: &mut Vec<u32>) -> &'a str {
        let Ok(known) = self.known.read() else {
            return text;
        };
        while !text.is_empty() {
            let word = first_word(text);
            let Some(found) = known.get(word) else { break };
            ids.extend_from_slice(found);
            text = &text[word.len()..];
        }
        text
    }

    fn remember(&self, word: &str, ids: &[u32]) {
        if word.len() > LONGEST {
            return;
        }
        // Whoever reads a long text now is not waited for: the word will come again.
        if let Ok(mut known) = self.known.try_write() {
            if known.len() >= CAPACITY {
                known.clear();
            }
            known.insert(word.into(), ids.into());
        }
    }
}

/// A text up to its first cut.
fn first_word(text: &str) -> &str {
    let bytes = text.as_bytes();
    let cut = bytes
        .windows(2)
        .position(|pair| pair[0].is_ascii_graphic() && pair[1] == b' ');
    cut.map_or(text, |before| &text[..=before])
}

/// Whether a normalizer sees no further than to the next cut.
fn is_local(normalizer: &Value) -> bool {
    normalizer.is_null() || normalizer["type"] == "NFC"
}

/// Whether a pre-tokenizer splits at every cut, whatever is on its other side.
fn splits(pre_tokenizer: &Value) -> bool {
    let byte_level = |step: &Value, pattern: bool| {
        step["type"] == "ByteLevel"
            && step["add_prefix_space"] == false
            && step["use_regex"].as_bool().unwrap_or(true) == pattern
    };
    let split = |step: &Value| {
        step["type"] == "Split"
            && step["behavior"] == "Isolated"
            && step["invert"] == false
            && step["pattern"]["Regex"]
                .as_str()
                .is_some_and(|pattern| PATTERNS.contains(&pattern))
    };
    match pre_tokenizer["pretokenizers"].as_array().map(Vec::as_slice) {
        Some([first, second]) => split(first) && byte_level(second, false),
        Some(_) => false,
        None => byte_level(pre_tokenizer, true),
    }
}

/// Whether an added token is found or not found by what is between two cuts.
fn is_within(token: &Value) -> bool {
    let plain = ["lstrip", "rstrip", "single_word"]
        .iter()
        .all(|way| token[*way].as_bool() != Some(true));
    let whole = token["content"]
        .as_str()
        .is_some_and(|text| first_word(text) == text);
    plain && whole
}

/// Special tokens before and after a text; `None` if that cannot be told.
fn around(tokenizer: &Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    let ids = |special| Some(tokenizer.encode_fast("a", special).ok()?.get_ids().to_vec());
    let (bare, all) = (ids(false)?, ids(true)?);
    if bare.is_empty() {
        return None;
    }
    let mut found = (0..all.len()).filter(|at| all[*at..].starts_with(&bare));
    match (found.next(), found.next()) {
        (Some(at), None) => Some((all[..at].to_vec(), all[at + bare.len()..].to_vec())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::OnceLock;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn document() -> Value {
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../e2e/models/demo/tokenizer.json"
        );
        serde_json::from_slice(&std::fs::read(Path::new(file)).unwrap()).unwrap()
    }

    fn pair(document: &Value) -> (Tokenizer, Option<Words>) {
        let tokenizer = Tokenizer::from_bytes(serde_json::to_vec(document).unwrap()).unwrap();
        let words = Words::of(&tokenizer, document);
        (tokenizer, words)
    }

    /// The demonstration's vocabulary under every pattern, with tokens around a text and added ones within.
    fn all() -> &'static [(Tokenizer, Words)] {
        static ALL: OnceLock<Vec<(Tokenizer, Words)>> = OnceLock::new();
        ALL.get_or_init(|| {
            let mut documents = vec![document()];
            for pattern in PATTERNS {
                let mut document = document();
                document["normalizer"] = json!({"type": "NFC"});
                document["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
                ]});
                document["post_processor"] = json!({
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
                    ],
                    "pair": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"Sequence": {"id": "B", "type_id": 0}},
                    ],
                    "special_tokens": {
                        "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]},
                        "<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]},
                    },
                });
                documents.push(document);
            }
            let known = |document: &Value| {
                let (tokenizer, words) = pair(document);
                (tokenizer, words.unwrap())
            };
            documents.iter().map(known).collect()
        })
    }

    fn check(text: &str) {
        for (tokenizer, words) in all() {
            for special in [false, true] {
                let whole = tokenizer.encode_fast(text, special).unwrap();
                // New words, then known ones.
                for _ in 0..2 {
                    let ids = words.encode(tokenizer, text, special).unwrap();
                    assert_eq!(ids, whole.get_ids(), "{text:?}");
                }
            }
        }
    }

    #[test]
    fn words_are_cut_before_spaces() {
        assert_eq!(first_word("in the"), "in");
        assert_eq!(first_word(" the end"), " the");
        assert_eq!(first_word("  the"), "  the");
        assert_eq!(first_word("é a b"), "é a");
        assert_eq!(first_word(""), "");
    }

    #[test]
    fn texts_are_encoded_as_by_the_tokenizer() {
        for text in [
            "",
            " ",
            "In the beginning, it's 12345 o'clock  -- \"so\" they SAY'S.\n\n  fn main() {\n\treturn 1; }\r\n",
            "a <|im_start|>user b<|im_end|> \n c <|endoftext|> ",
            "é  漢字 a\u{301} e \u{301} x\u{a0} y\u{3000} z 😀 ok",
        ] {
            check(text);
        }
    }

    #[test]
    fn tokenizers_whose_words_touch_are_left_alone() {
        let changes: [(&str, Value); 6] = [
            ("/normalizer", json!({"type": "NFKC"})),
            ("/pre_tokenizer/use_regex", json!(false)),
            ("/pre_tokenizer/add_prefix_space", json!(true)),
            ("/model/dropout", json!(0.1)),
            ("/added_tokens/1/rstrip", json!(true)),
            ("/added_tokens/1/content", json!("im start")),
        ];
        assert!(pair(&document()).1.is_some());
        for (at, value) in changes {
            let mut document = document();
            *document.pointer_mut(at).unwrap() = value;
            assert!(pair(&document).1.is_none(), "{at}");
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let words = Words {
            known: Known::default(),
            around: Default::default(),
        };
        for at in 0..=CAPACITY {
            words.remember(&format!(" {at}"), &[1]);
        }
        words.remember(&"x".repeat(LONGEST + 1), &[1]);
        assert_eq!(words.known.read().unwrap().len(), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn any_text_is(text in "\\PC{0,60}") {
            check(&text);
        }

        #[test]
        fn any_mix_of_what_patterns_look_at_is(
            text in "([a-zA-Z]{1,3}|[0-9]{1,4}|'s|'LL| |  |\t|\n|\r\n|[.,!?\"-]|\u{a0}|\u{3000}|é|\u{301}|漢|<\\|im_end\\|>){0,40}"
        ) {
            check(&text);
        }
    }
}
