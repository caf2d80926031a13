//! Incremental decoding: send what is new and whole.
//!
//! Where a text is the bytes of its tokens one after the other, only the beginning of a character is held back. Where
//! the tokenizer's decoder does more, a short window of tokens is decoded with each of them.

use super::utf8::Utf8;
use crate::prompt::Prompter;

/// Prompt tokens that give the first tokens of the answer their context.
const CONTEXT: usize = 6;
/// Window length at which decoded tokens are dropped from it.
const WINDOW: usize = 16;
/// Tokens held back after which all but the last U+FFFD are taken as real: no character is that long.
const PATIENCE: usize = 32;

/// State of one answer.
#[derive(Debug)]
pub struct Detokenizer {
    prompter: Prompter,
    skip_special: bool,
    way: Way,
}

#[derive(Debug)]
enum Way {
    Bytes(Utf8),
    Window(Window),
}

impl Detokenizer {
    /// An answer after `prompt`.
    #[must_use]
    pub fn new(prompter: Prompter, prompt: &[u32], skip_special: bool) -> Self {
        let context = &prompt[prompt.len().saturating_sub(CONTEXT)..];
        let way = match prompter.token_bytes().filter(|bytes| bytes.are_text()) {
            None => Way::Window(Window::new(&prompter, context, skip_special)),
            Some(bytes) => {
                let mut text = Utf8::default();
                for id in context {
                    // What is whole belongs to the prompt.
                    let _prompt = text.push(bytes.in_text(*id, skip_special));
                }
                Way::Bytes(text)
            }
        };
        Self {
            prompter,
            skip_special,
            way,
        }
    }

    /// Takes a token, gives the text that is new and certain.
    pub fn push(&mut self, id: u32) -> String {
        let (prompter, skip_special) = (&self.prompter, self.skip_special);
        match &mut self.way {
            Way::Window(window) => window.push(prompter, id, skip_special),
            Way::Bytes(text) => {
                let bytes = prompter.token_bytes();
                text.push(bytes.map_or(&[], |bytes| bytes.in_text(id, skip_special)))
            }
        }
    }

    /// The end of the answer: what was held back, as it is.
    pub fn finish(&mut self) -> String {
        match &mut self.way {
            Way::Window(window) => window.finish(&self.prompter, self.skip_special),
            Way::Bytes(text) => text.finish(),
        }
    }
}

/// The method is the prefix-offset one of text-generation-inference and vLLM: tokens are decoded with a few before them,
/// because decoders treat the first token of a text differently; a tail of U+FFFD is held back, because it may be the
/// first bytes of a character whose other bytes come with the next token.
#[derive(Debug)]
struct Window {
    /// The last tokens; everything before them is sent.
    tokens: Vec<u32>,
    /// Bytes of the window's text that are sent (or belong to the prompt).
    sent: usize,
    /// Tokens at the end of the window since its text last ended in a whole character.
    held: usize,
}

impl Window {
    fn new(prompter: &Prompter, context: &[u32], skip_special: bool) -> Self {
        Self {
            tokens: context.to_vec(),
            sent: whole(&decoded(prompter, context, skip_special)).len(),
            held: 0,
        }
    }

    fn push(&mut self, prompter: &Prompter, id: u32, skip_special: bool) -> String {
        self.tokens.push(id);
        let text = decoded(prompter, &self.tokens, skip_special);
        let certain = if self.held < PATIENCE {
            whole(&text)
        } else {
            text.strip_suffix('\u{fffd}').unwrap_or(&text)
        };
        let new = certain.get(self.sent..).unwrap_or_default().to_owned();
        self.sent = self.sent.max(certain.len());
        if certain.len() == text.len() {
            self.held = 0;
            self.shorten(prompter, skip_special);
        } else {
            self.held += 1;
        }
        new
    }

    /// Drops old tokens where the text is whole on both sides of the cut, so that a step stays cheap.
    fn shorten(&mut self, prompter: &Prompter, skip_special: bool) {
        if self.tokens.len() < WINDOW {
            return;
        }
        for keep in CONTEXT..WINDOW {
            let from = self.tokens.len() - keep;
            let (before, after) = self.tokens.split_at(from);
            let before = decoded(prompter, before, skip_special);
            let after = decoded(prompter, after, skip_special);
            let clean = !before.ends_with('\u{fffd}') && !after.starts_with('\u{fffd}');
            if clean {
                self.tokens.drain(..from);
                self.sent = after.len();
                return;
            }
        }
    }

    fn finish(&mut self, prompter: &Prompter, skip_special: bool) -> String {
        let text = decoded(prompter, &self.tokens, skip_special);
        let rest = text.get(self.sent..).unwrap_or_default().to_owned();
        self.sent = text.len();
        rest
    }
}

fn decoded(prompter: &Prompter, tokens: &[u32], skip_special: bool) -> String {
    prompter
        .decode("tokens", tokens, skip_special)
        .unwrap_or_default()
}

/// A text without the U+FFFD at its end.
fn whole(text: &str) -> &str {
    text.trim_end_matches('\u{fffd}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;
    use std::sync::OnceLock;

    fn demo() -> Prompter {
        static DEMO: OnceLock<Prompter> = OnceLock::new();
        DEMO.get_or_init(|| {
            let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../e2e/models/demo");
            Prompter::load(Path::new(dir)).unwrap()
        })
        .clone()
    }

    fn all(mut detokenizer: Detokenizer, ids: &[u32]) -> Vec<String> {
        let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
        pieces.push(detokenizer.finish());
        pieces
    }

    fn pieces(ids: &[u32]) -> Vec<String> {
        let detokenizer = Detokenizer::new(demo(), &[], true);
        assert!(matches!(detokenizer.way, Way::Bytes(_)));
        all(detokenizer, ids)
    }

    /// The same the other way.
    fn windowed(ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(demo(), &[], true);
        detokenizer.way = Way::Window(Window::new(&demo(), &[], true));
        all(detokenizer, ids)
    }

    /// As SentencePiece models are written: letters, `▁` for a space, all else in bytes.
    fn fallback() -> Prompter {
        static FALLBACK: OnceLock<Prompter> = OnceLock::new();
        FALLBACK
            .get_or_init(|| {
                let letters = ('a'..='z').map(String::from);
                let bytes = (0..=255_u8).map(|byte| format!("<0x{byte:02X}>"));
                let tokens = ["▁".to_owned()].into_iter().chain(letters).chain(bytes);
                let vocab: serde_json::Map<String, serde_json::Value> = tokens
                    .enumerate()
                    .map(|(id, token)| (token, id.into()))
                    .collect();
                let replace = |pattern: &str, content: &str| {
                    serde_json::json!({"type": "Replace", "pattern": {"String": pattern}, "content": content})
                };
                let document = serde_json::json!({
                    "version": "1.0", "added_tokens": [],
                    "normalizer": replace(" ", "▁"),
                    "pre_tokenizer": null, "post_processor": null,
                    "decoder": {"type": "Sequence", "decoders": [
                        replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                    ]},
                    "model": {"type": "BPE", "byte_fallback": true, "vocab": vocab, "merges": []},
                });
                let dir = tempfile::tempdir().unwrap();
                let file = dir.path().join("tokenizer.json");
                std::fs::write(file, document.to_string()).unwrap();
                Prompter::load(dir.path()).unwrap()
            })
            .clone()
    }

    #[test]
    fn no_half_character_is_sent() {
        let text = "😀é漢字🏳️‍🌈 ok";
        let ids = demo().encode("prompt", text, false).unwrap();
        assert!(
            ids.len() > text.chars().count(),
            "the demo splits these into bytes"
        );
        for pieces in [pieces(&ids), windowed(&ids)] {
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
            assert_eq!(pieces.concat(), text);
        }
    }

    #[test]
    fn a_prompt_that_ends_in_half_a_character_is_continued() {
        let ids = demo().encode("prompt", "a😀", false).unwrap();
        let (prompt, answer) = ids.split_at(ids.len() - 1);
        let mut detokenizer = Detokenizer::new(demo(), prompt, true);
        let mut text: String = answer.iter().map(|id| detokenizer.push(*id)).collect();
        text.push_str(&detokenizer.finish());
        assert_eq!(text, "😀");
    }

    #[test]
    fn an_endless_run_of_bad_bytes_is_not_held_for_ever() {
        let lone = demo().encode("prompt", "é", false).unwrap();
        let bad = vec![lone[lone.len() - 1]; 200];
        for pieces in [pieces(&bad), windowed(&bad)] {
            assert!(pieces[..100].iter().any(|piece| !piece.is_empty()));
            assert_eq!(
                pieces.concat(),
                demo().decode("tokens", &bad, true).unwrap()
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn pieces_add_up_to_the_text_of_all_ids(ids in prop::collection::vec(0_u32..4096, 0..120)) {
            let text = demo().decode("tokens", &ids, true).unwrap();
            prop_assert_eq!(pieces(&ids).concat(), &*text);
            prop_assert_eq!(windowed(&ids).concat(), text);
        }

        #[test]
        fn pieces_of_bytes_add_up_too(ids in prop::collection::vec(3_u32..260, 0..120)) {
            let text = demo().decode("tokens", &ids, true).unwrap();
            prop_assert_eq!(pieces(&ids).concat(), &*text);
            prop_assert_eq!(windowed(&ids).concat(), text);
        }

        #[test]
        fn text_round_trips(text in "\\PC{0,60}") {
            let ids = demo().encode("prompt", &text, false).unwrap();
            let sent = pieces(&ids);
            let split = sent.iter().any(|piece| piece.contains('\u{fffd}'));
            let genuine = text.contains('\u{fffd}');
            prop_assert!(!split || genuine);
            prop_assert_eq!(sent.concat(), text);
        }

        #[test]
        fn special_tokens_are_text_if_they_are_asked_for(ids in prop::collection::vec(0_u32..8, 0..20)) {
            let sent = all(Detokenizer::new(demo(), &[], false), &ids);
            prop_assert_eq!(sent.concat(), demo().decode("tokens", &ids, false).unwrap());
        }

        #[test]
        fn a_decoder_that_does_more_goes_by_the_window(text in "[a-z ]{0,20}\\PC{0,20}[a-z ]{0,20}") {
            let ids = fallback().encode("prompt", &text, false).unwrap();
            let detokenizer = Detokenizer::new(fallback(), &[], true);
            prop_assert!(matches!(detokenizer.way, Way::Window(_)));
            let sent = all(detokenizer, &ids);
            let split = sent.iter().any(|piece| piece.contains('\u{fffd}'));
            let genuine = text.contains('\u{fffd}');
            prop_assert!(!split || genuine);
            prop_assert_eq!(sent.concat(), fallback().decode("tokens", &ids, true).unwrap());
        }
    }
}
