//! Prompts cut from texts, as token ids, with the lengths of their answers.

use std::path::{Path, PathBuf};

use foregate_gateway::prompt::Prompter;

use crate::bench::client::{Ask, Prompt};
use crate::bench::workload::{Draw, Length};
use crate::error::CliError;

/// Lengths in tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lengths {
    pub(super) prompt: Length,
    pub(super) output: Length,
}

/// Texts as token ids, one per kind.
#[derive(Debug)]
pub(super) struct Source {
    texts: Vec<Vec<u32>>,
    lengths: Lengths,
}

impl Source {
    /// Reads texts with the model's tokenizer.
    ///
    /// # Errors
    /// No tokenizer; a file that cannot be read, or is shorter than a prompt.
    pub(super) fn read(
        model: &Path,
        files: &[PathBuf],
        lengths: Lengths,
    ) -> Result<Self, CliError> {
        let what = model.display().to_string();
        let prompter =
            Prompter::load(model).map_err(|error| CliError::runtime(&what, &error))?;
        let texts = files
            .iter()
            .map(|file| {
                let wrong = |what: String| {
                    CliError::Usage(format!("prompts {}: {what}", file.display()))
                };
                let text =
                    std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
                let ids = prompter.encode("prompts", &text, false);
                let ids = ids.map_err(|error| wrong(error.message))?;
                match ids.len() > lengths.prompt.longest() as usize {
                    true => Ok(ids),
                    false => Err(wrong(format!(
                        "has {} tokens, not more than a prompt",
                        ids.len()
                    ))),
                }
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { texts, lengths })
    }

    /// So many requests, of all texts equally often and in a drawn order.
    pub(super) fn draw(&self, number: u32, draw: &mut Draw) -> Vec<Ask> {
        let mut turn: Vec<usize> = Vec::new();
        (0..number)
            .map(|_| {
                if turn.is_empty() {
                    turn = (0..self.texts.len()).collect();
                }
                let kind = turn.swap_remove(draw.below(turn.len()));
                self.ask(&self.texts[kind], draw)
            })
            .collect()
    }

    fn ask(&self, text: &[u32], draw: &mut Draw) -> Ask {
        let length = self.lengths.prompt.draw(draw) as usize;
        let start = draw.below(text.len() - length + 1);
        Ask {
            prompt: Prompt::Tokens(text[start..start + length].to_vec()),
            max_tokens: self.lengths.output.draw(draw),
            ignore_eos: true,
        }
    }
}
