//! `foregate bench model`: a random model of a known shape, with a tokenizer, to measure Foregate and others with.

use std::collections::BTreeMap;
use std::path::PathBuf;

use foregate_checkpoint::tiny::Tiny;
use serde_json::{Value, json};

use super::serve::write_json;
use crate::error::{CliError, print};
use crate::progress::Progress;

/// Arguments of `foregate bench model`.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// Shape of the model.
    #[arg(long, value_enum, default_value_t)]
    preset: Preset,
    /// Another seed gives other weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Longest sequence it takes, in tokens; default: that of the shape.
    #[arg(long, value_parser = clap::value_parser!(u32).range(16..=1_048_576))]
    positions: Option<u32>,
    /// Directory to make; must not exist.
    dir: PathBuf,
}

/// A known shape.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum Preset {
    /// Qwen3-MoE of 0.9 billion weights, 0.2 billion of them active, bfloat16: 1.8 GB.
    #[default]
    Bench09,
}

/// Writes it.
pub(super) fn run(args: &ModelArgs, progress: &Progress) -> Result<(), CliError> {
    let name = args.dir.display().to_string();
    if args.dir.exists() {
        return Err(CliError::Usage(format!(
            "{name} exists; name a directory that does not"
        )));
    }
    let Preset::Bench09 = args.preset;
    let mut model = Tiny::bench09();
    model.seed = args.seed;
    if let Some(positions) = args.positions {
        model.max_positions = positions as usize;
    }
    let task = progress.steps("model", 1);
    model
        .write(&args.dir)
        .map_err(|error| CliError::runtime(&name, &error))?;
    write_json(&args.dir.join("tokenizer.json"), &tokenizer(model.vocab))?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "model_max_length": model.max_positions,
    });
    write_json(&args.dir.join("tokenizer_config.json"), &config)?;
    task.finish("done");
    print(&format!("{name}: {} tokens of vocabulary", model.vocab));
    Ok(())
}

/// Tokens 0, 1 and 2; the model's configuration names the last two as begin and end.
const SPECIAL: [&str; 3] = ["<|pad|>", "<|begin|>", "<|end|>"];

/// A byte-level BPE of `size` tokens: the special ones, all bytes, then pairs of printable ASCII characters, then
/// threes. So every text can be written and nearly every token is text.
fn tokenizer(size: usize) -> Value {
    let printable: Vec<char> = (b' '..=b'~').map(byte_character).collect();
    let mut tokens: Vec<String> = SPECIAL.map(str::to_owned).to_vec();
    tokens.extend((0..=255).map(|byte| byte_character(byte).to_string()));
    let room = size.saturating_sub(tokens.len());
    let singles = printable.iter().map(char::to_string);
    let pairs: Vec<String> = singles
        .flat_map(|first| {
            printable
                .iter()
                .map(move |second| format!("{first}{second}"))
        })
        .collect();
    let ones: Vec<String> = printable.iter().map(char::to_string).collect();
    let merges: Vec<[&str; 2]> = ones
        .iter()
        .chain(&pairs)
        .flat_map(|first| {
            ones.iter()
                .map(move |second| [first.as_str(), second.as_str()])
        })
        .take(room)
        .collect();
    tokens.extend(merges.iter().map(|merge| merge.concat()));
    let vocab: BTreeMap<&str, usize> = tokens.iter().map(String::as_str).zip(0..).collect();
    let special = |(id, content): (usize, &&str)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": SPECIAL.iter().enumerate().map(special).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": bytes,
        "post_processor": null,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": merges,
        },
    })
}

/// The character that stands for a byte in a byte-level vocabulary: itself if it is visible, else one of those from
/// 256 on, in order (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019).
fn byte_character(byte: u8) -> char {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if visible(byte) {
        return char::from(byte);
    }
    let hidden = (0..byte).filter(|before| !visible(*before)).count();
    u32::try_from(256 + hidden)
        .ok()
        .and_then(char::from_u32)
        .unwrap_or('\u{fffd}')
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_id_has_one_token_and_merges_make_tokens_of_tokens() {
        let tokenizer = tokenizer(32_000);
        let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
        let ids: BTreeSet<u64> = vocab.values().map(|id| id.as_u64().unwrap()).collect();
        assert_eq!(ids, (0..32_000).collect());
        for merge in tokenizer["model"]["merges"].as_array().unwrap() {
            let [first, second] = [0, 1].map(|at| merge[at].as_str().unwrap());
            for token in [first, second, &format!("{first}{second}")] {
                assert!(vocab.contains_key(token), "{token}");
            }
        }
    }

    #[test]
    fn bytes_have_the_characters_of_byte_level_vocabularies() {
        // Space and line end, as every such vocabulary shows them.
        assert_eq!((byte_character(b' '), byte_character(b'\n')), ('Ġ', 'Ċ'));
        assert_eq!((byte_character(b'a'), byte_character(0xad)), ('a', 'Ń'));
        let all: BTreeSet<char> = (0..=255).map(byte_character).collect();
        assert_eq!(all.len(), 256);
    }
}
