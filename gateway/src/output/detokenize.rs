//! Incremental decoding: decode a short window of tokens, send what is new and whole.
//!
//! The method is the prefix-offset one of text-generation-inference and vLLM: tokens are decoded with a few
//! before them, because decoders treat the first token of a text differently; a tail of U+FFFD is held
//! back, because it may be the first bytes of a character whose other bytes come with the next token.

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
    /// The last tokens; everything before them is sent.
    window: Vec<u32>,
    /// Bytes of the window's text that are sent (or belong to the prompt).
    sent: usize,
    /// Tokens at the end of the window since its text last ended in a whole character.
    held: usize,
}

impl Detokenizer {
    /// An answer after `prompt`.
    #[must_use]
    pub fn new(prompter: Prompter, prompt: &[u32], skip_special: bool) -> Self {
        let mut state = Self {
            prompter,
            skip_special,
            window: prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec(),
            sent: 0,
            held: 0,
        };
        state.sent = whole(&state.text(0)).len();
        state
    }

    fn text(&self, from: usize) -> String {
        self.prompter
            .decode("tokens", &self.window[from..], self.skip_special)
            .unwrap_or_default()
    }

    /// Takes a token, gives the text that is new and certain.
    pub fn push(&mut self, id: u32) -> String {
        self.window.push(id);
        let text = self.text(0);
        let certain = if self.held < PATIENCE {
            whole(&text)
        } else {
            text.strip_suffix('\u{fffd}').unwrap_or(&text)
        };
        let new = certain.get(self.sent..).unwrap_or_default().to_owned();
        self.sent = self.sent.max(certain.len());
        if certain.len() == text.len() {
            self.held = 0;
            self.shorten();
        } else {
            self.held += 1;
        }
        new
    }

    /// Drops old tokens where the text is whole on both sides of the cut, so that a step stays cheap.
    fn shorten(&mut self) {
        if self.window.len() < WINDOW {
            return;
        }
        for keep in CONTEXT..WINDOW {
            let from = self.window.len() - keep;
            let (before, after) = (self.text_before(from), self.text(from));
            let clean = !before.ends_with('\u{fffd}') && !after.starts_with('\u{fffd}');
            if clean {
                self.window.drain(..from);
                self.sent = after.len();
                return;
            }
        }
    }

    fn text_before(&self, to: usize) -> String {
        self.prompter
            .decode("tokens", &self.window[..to], self.skip_special)
            .unwrap_or_default()
    }

    /// The end of the answer: what was held back, as it is.
    pub fn finish(&mut self) -> String {
        let text = self.text(0);
        let rest = text.get(self.sent..).unwrap_or_default().to_owned();
        self.sent = text.len();
        rest
    }
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

    fn pieces(ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(demo(), &[], true);
        let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
        pieces.push(detokenizer.finish());
        pieces
    }

    #[test]
    fn no_half_character_is_sent() {
        let text = "😀é漢字🏳️‍🌈 ok";
        let ids = demo().encode("prompt", text, false).unwrap();
        assert!(
            ids.len() > text.chars().count(),
            "the demo splits these into bytes"
        );
        let pieces = pieces(&ids);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
        assert_eq!(pieces.concat(), text);
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
        let pieces = pieces(&bad);
        assert!(pieces[..100].iter().any(|piece| !piece.is_empty()));
        assert_eq!(
            pieces.concat(),
            demo().decode("tokens", &bad, true).unwrap()
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn pieces_add_up_to_the_text_of_all_ids(ids in prop::collection::vec(0_u32..4096, 0..120)) {
            prop_assert_eq!(pieces(&ids).concat(), demo().decode("tokens", &ids, true).unwrap());
        }

        #[test]
        fn pieces_of_bytes_add_up_too(ids in prop::collection::vec(3_u32..260, 0..120)) {
            prop_assert_eq!(pieces(&ids).concat(), demo().decode("tokens", &ids, true).unwrap());
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
    }
}
