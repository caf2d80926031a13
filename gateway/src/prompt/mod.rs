//! Text to token ids and back: the tokenizer and the chat template of a model directory.

mod date;
mod python_json;
mod template;
mod token_bytes;
mod words;

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};
use tokenizers::Tokenizer;

pub use template::{ChatTemplate, Message, TemplateError};
pub use token_bytes::TokenBytes;

use crate::error::ApiError;
use crate::model_files::{ModelFileError, read};
use words::Words;

/// What a model directory says about text. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Prompter {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    text: Option<TextSide>,
    template: Option<ChatTemplate>,
}

#[derive(Debug)]
struct TextSide {
    tokenizer: Tokenizer,
    bytes: TokenBytes,
    longest: usize,
    /// Where words can be encoded one by one.
    words: Option<Words>,
}

impl Prompter {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and the chat template.
    /// A directory without `tokenizer.json` gives a gateway for token ids only.
    ///
    /// # Errors
    /// A file that is there and cannot be read or understood.
    pub fn load(dir: &Path) -> Result<Self, ModelFileError> {
        let text = match read(&dir.join("tokenizer.json"))? {
            None => None,
            Some(json) => Some(text_side(&dir.join("tokenizer.json"), &json)?),
        };
        let template = template::load(dir)?;
        Ok(Self {
            inner: Arc::new(Inner { text, template }),
        })
    }

    /// A prompter without tokenizer.
    #[must_use]
    pub fn token_ids_only() -> Self {
        Self {
            inner: Arc::new(Inner {
                text: None,
                template: None,
            }),
        }
    }

    /// The tokenizer, if the model has one.
    #[must_use]
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.inner.text.as_ref().map(|text| &text.tokenizer)
    }

    /// Bytes of single tokens, if the model has a tokenizer.
    #[must_use]
    pub fn token_bytes(&self) -> Option<&TokenBytes> {
        self.inner.text.as_ref().map(|text| &text.bytes)
    }

    /// Bytes of the longest token: a text of more than `n` times it has more than `n` tokens.
    #[must_use]
    pub fn longest_token(&self) -> Option<usize> {
        self.inner.text.as_ref().map(|text| text.longest)
    }

    /// Encodes a text. `param` names the field for errors.
    ///
    /// # Errors
    /// 400 if the model has no tokenizer or the text cannot be encoded.
    pub fn encode(&self, param: &str, text: &str, special: bool) -> Result<Vec<u32>, ApiError> {
        let side = self.inner.text.as_ref();
        let TextSide {
            tokenizer, words, ..
        } = side.ok_or_else(|| no_tokenizer(param))?;
        let ids = match words {
            Some(words) => words.encode(tokenizer, text, special),
            None => tokenizer
                .encode_fast(text, special)
                .map(|encoding| encoding.get_ids().to_vec()),
        };
        ids.map_err(|error| {
            ApiError::invalid(param, format!("the text cannot be encoded: {error}"))
        })
    }

    /// Decodes ids. `param` names the field for errors.
    ///
    /// # Errors
    /// 400 if the model has no tokenizer.
    pub fn decode(
        &self,
        param: &str,
        ids: &[u32],
        skip_special: bool,
    ) -> Result<String, ApiError> {
        let tokenizer = self.tokenizer().ok_or_else(|| no_tokenizer(param))?;
        tokenizer.decode(ids, skip_special).map_err(|error| {
            ApiError::invalid(param, format!("the tokens cannot be decoded: {error}"))
        })
    }

    /// Renders a conversation. `now` is seconds since 1970, for templates that print a date.
    ///
    /// # Errors
    /// 400 if the model has no tokenizer or template, or the template refuses the conversation.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &Map<String, Value>,
        now: u64,
    ) -> Result<String, ApiError> {
        if self.inner.text.is_none() {
            return Err(no_tokenizer("messages"));
        }
        let template = self.inner.template.as_ref().ok_or_else(|| {
            ApiError::unsupported(
                "messages",
                "this model has no chat template: use /v1/completions",
            )
        })?;
        template
            .render(messages, add_generation_prompt, variables, now)
            .map_err(|error| ApiError::invalid("messages", error.to_string()))
    }
}

fn no_tokenizer(param: &str) -> ApiError {
    ApiError::unsupported(
        param,
        "this model has no tokenizer: send prompts as lists of token ids to /v1/completions",
    )
}

fn text_side(path: &Path, json: &[u8]) -> Result<TextSide, ModelFileError> {
    let parse = |what: String| ModelFileError::parse(path, what);
    let mut tokenizer =
        Tokenizer::from_bytes(json).map_err(|error| parse(error.to_string()))?;
    // A tokenizer saved during training may cut or fill; serving must do neither in silence.
    tokenizer
        .with_truncation(None)
        .map_err(|error| parse(error.to_string()))?;
    tokenizer.with_padding(None);
    let document: Value =
        serde_json::from_slice(json).map_err(|error| parse(error.to_string()))?;
    let bytes = TokenBytes::new(&tokenizer, &document);
    let longest = bytes.longest().max(1);
    let words = Words::of(&tokenizer, &document);
    Ok(TextSide {
        tokenizer,
        bytes,
        longest,
        words,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demo() -> Prompter {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../e2e/models/demo");
        Prompter::load(Path::new(dir)).unwrap()
    }

    #[test]
    fn the_demo_encodes_renders_and_decodes() {
        let demo = demo();
        let text = "In the beginning — é 漢字 😀\n    fn main() {}";
        let ids = demo.encode("prompt", text, true).unwrap();
        assert_eq!(demo.decode("tokens", &ids, true).unwrap(), text);
        let messages = [Message {
            role: "user",
            content: "Hello".into(),
            name: None,
        }];
        let prompt = demo.render(&messages, true, &Map::new(), 0).unwrap();
        assert_eq!(prompt, "Hello\n");
    }

    #[test]
    fn bytes_of_tokens_add_up_to_the_text() {
        let demo = demo();
        let text = "naïve 😀\ttab";
        let ids = demo.encode("prompt", text, false).unwrap();
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|id| demo.token_bytes().unwrap().of(*id).to_vec())
            .collect();
        assert_eq!(bytes, text.as_bytes());
    }

    #[test]
    fn a_directory_without_tokenizer_serves_ids_only() {
        let dir = tempfile::tempdir().unwrap();
        let prompter = Prompter::load(dir.path()).unwrap();
        let error = prompter.encode("prompt", "x", true).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("prompt"));
        assert!(error.message.contains("no tokenizer"));
    }

    #[test]
    fn a_broken_tokenizer_names_its_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
        let error = Prompter::load(dir.path()).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"));
    }
}
