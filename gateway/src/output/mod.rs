//! Token ids to text as they come: whole characters only, stop strings, logprobs.

mod detokenize;
mod stop;
mod utf8;

pub use detokenize::Detokenizer;
pub use stop::{Found, StopScanner};

use crate::prompt::Prompter;

/// How an answer's tokens become text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TextOptions {
    /// Stop strings.
    pub stop: Vec<String>,
    /// Whether the stop string stays in the text.
    pub include_stop: bool,
    /// Whether special tokens leave no text.
    pub skip_special_tokens: bool,
    /// Tokens before which stop strings do not count.
    pub min_tokens: u32,
}

/// What one token added.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Piece {
    /// Text that is certain now; may be empty.
    pub text: String,
    /// Characters of the answer before this token's own text.
    pub offset: usize,
    /// The stop string that ended the answer, if one did.
    pub stopped_by: Option<String>,
}

/// The text of one answer.
#[derive(Debug)]
pub struct TextStream {
    detokenizer: Option<Detokenizer>,
    scanner: StopScanner,
    min_tokens: u32,
    tokens: u32,
    characters: usize,
}

impl TextStream {
    /// An answer that follows `prompt`. Without tokenizer the text stays empty.
    #[must_use]
    pub fn new(prompter: &Prompter, prompt: &[u32], options: &TextOptions) -> Self {
        Self {
            detokenizer: prompter.tokenizer().map(|_| {
                Detokenizer::new(prompter.clone(), prompt, options.skip_special_tokens)
            }),
            scanner: StopScanner::new(&options.stop, options.include_stop),
            min_tokens: options.min_tokens,
            tokens: 0,
            characters: 0,
        }
    }

    /// Takes the next token.
    pub fn push(&mut self, id: u32) -> Piece {
        self.tokens += 1;
        let offset = self.characters;
        let Some(detokenizer) = &mut self.detokenizer else {
            return Piece::default();
        };
        let text = detokenizer.push(id);
        self.characters += text.chars().count();
        self.scan(text, offset)
    }

    fn scan(&mut self, text: String, offset: usize) -> Piece {
        if self.tokens < self.min_tokens {
            return Piece {
                text,
                offset,
                stopped_by: None,
            };
        }
        let Found { text, stopped_by } = self.scanner.push(&text);
        Piece {
            text,
            offset,
            stopped_by,
        }
    }

    /// The end: whatever was held back, unless a stop string is in it.
    pub fn finish(&mut self) -> Piece {
        let offset = self.characters;
        let tail = self
            .detokenizer
            .as_mut()
            .map(Detokenizer::finish)
            .unwrap_or_default();
        let mut piece = self.scan(tail, offset);
        if piece.stopped_by.is_none() {
            piece.text.push_str(&self.scanner.finish());
        }
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn demo() -> Prompter {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../e2e/models/demo");
        Prompter::load(Path::new(dir)).unwrap()
    }

    #[test]
    fn a_stop_string_over_token_borders_ends_the_text() {
        let demo = demo();
        let ids = demo.encode("prompt", "one two three four", false).unwrap();
        let options = TextOptions {
            stop: vec!["o thr".into()],
            skip_special_tokens: true,
            ..TextOptions::default()
        };
        let mut stream = TextStream::new(&demo, &[], &options);
        let mut text = String::new();
        let mut stopped = None;
        for id in ids {
            let piece = stream.push(id);
            text.push_str(&piece.text);
            stopped = piece.stopped_by;
            if stopped.is_some() {
                break;
            }
        }
        assert_eq!(stopped.as_deref(), Some("o thr"));
        assert_eq!(text, "one tw");
    }

    #[test]
    fn min_tokens_keeps_stop_strings_quiet() {
        let demo = demo();
        let ids = demo.encode("prompt", "a b a b", false).unwrap();
        let options = TextOptions {
            stop: vec!["b".into()],
            min_tokens: 3,
            ..TextOptions::default()
        };
        let mut stream = TextStream::new(&demo, &[], &options);
        let mut text = String::new();
        for id in ids {
            let piece = stream.push(id);
            text.push_str(&piece.text);
            if piece.stopped_by.is_some() {
                break;
            }
        }
        assert_eq!(text, "a b a ");
    }

    #[test]
    fn offsets_count_characters() {
        let demo = demo();
        let ids = demo.encode("prompt", "é漢字 words", false).unwrap();
        let mut stream = TextStream::new(&demo, &[], &TextOptions::default());
        let mut so_far = String::new();
        for id in ids {
            let piece = stream.push(id);
            assert_eq!(piece.offset, so_far.chars().count());
            so_far.push_str(&piece.text);
        }
        so_far.push_str(&stream.finish().text);
        assert_eq!(so_far, "é漢字 words");
    }
}
