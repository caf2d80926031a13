//! Routes, bodies and answers.

mod chat_request;
mod completions_request;
mod fields;
mod sampling;
mod tokenize_request;

pub use chat_request::{ChatRequest, Message, parse_chat};
pub use completions_request::{CompletionsRequest, PromptInput, parse_completions};
pub use sampling::Generation;
pub use tokenize_request::{
    DetokenizeRequest, TokenizeInput, TokenizeRequest, parse_detokenize, parse_tokenize,
};
