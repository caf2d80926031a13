//! What goes into a step and what comes out.

use foregate_kernels::PageMap;

use crate::error::ModelError;

/// The rows of one step: any mix of prompt chunks and single new tokens, of any sequences.
///
/// Rows of one sequence stand in ascending order of position, and every position before a sequence's
/// first row was written to the cache by earlier steps.
#[derive(Debug, Clone, Copy)]
pub struct StepBatch<'a> {
    /// Token of each row.
    pub tokens: &'a [u32],
    /// Position of each row in its sequence, from 0.
    pub positions: &'a [u32],
    /// For each row, the index of its sequence in `page_tables`.
    pub sequence_of_row: &'a [u32],
    /// For each sequence, its cache pages in order of position.
    pub page_tables: &'a [&'a [u32]],
    /// Rows whose logits are wanted, by row index, in the order wanted.
    pub logit_rows: &'a [u32],
}

impl<'a> StepBatch<'a> {
    /// Where each row's sequence lives.
    pub(crate) const fn pages(&self) -> PageMap<'a> {
        PageMap {
            sequence_of_row: self.sequence_of_row,
            tables: self.page_tables,
        }
    }

    /// Number of rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// What the ops would not find, or would not name well.
    pub(crate) fn check(&self, vocab: usize, max_positions: usize) -> Result<(), ModelError> {
        let rows = self.rows();
        let wrong = |what: String| Err(ModelError::Batch { what });
        if self.positions.len() != rows || self.sequence_of_row.len() != rows {
            return wrong(format!(
                "{rows} tokens, {} positions, {} sequence numbers",
                self.positions.len(),
                self.sequence_of_row.len()
            ));
        }
        if let Some(token) = self.tokens.iter().find(|token| **token as usize >= vocab) {
            return wrong(format!("token {token} is not in a vocabulary of {vocab}"));
        }
        if let Some(at) = self
            .positions
            .iter()
            .find(|at| **at as usize >= max_positions)
        {
            return wrong(format!("position {at} is not below {max_positions}"));
        }
        if let Some(row) = self.logit_rows.iter().find(|row| **row as usize >= rows) {
            return wrong(format!("logits of row {row} wanted, there are {rows} rows"));
        }
        Ok(())
    }
}

/// What a step computed. Kept by the caller and handed in again, so that its memory is reused.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// `logit_rows.len() × vocab`, in the order of [`StepBatch::logit_rows`].
    pub logits: Vec<f32>,
    /// `rows × moe_layers × top_k`: the experts each row chose, ascending by id within a layer.
    /// Those of a dead row have no meaning.
    pub routes: Vec<u32>,
    /// For each row, whether it was lost on the way: its logits have no meaning and its cache
    /// positions must be written again.
    pub dead: Vec<bool>,
}

impl StepOutput {
    /// Logits of the `index`-th wanted row.
    #[must_use]
    pub fn logits_of(&self, index: usize, vocab: usize) -> Option<&[f32]> {
        self.logits.get(index * vocab..(index + 1) * vocab)
    }

    /// The experts that `row` chose, `moe_layers × top_k`.
    #[must_use]
    pub fn routes_of(&self, row: usize) -> Option<&[u32]> {
        let width = self.routes.len().checked_div(self.dead.len())?;
        self.routes.get(row * width..(row + 1) * width)
    }
}
