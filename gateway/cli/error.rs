//! How the binary fails: a message a person can act on, and an exit code.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

/// A failure of a sub-command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The arguments, the environment or the manifest are wrong: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// Something did not work: exit code 1.
    #[error("{0}")]
    Runtime(String),
}

impl CliError {
    /// What did not work, and why: the error with its sources.
    pub(crate) fn runtime(what: &str, error: &dyn Error) -> Self {
        let mut text = what.to_owned();
        let mut next = Some(error);
        while let Some(cause) = next {
            let cause_text = cause.to_string();
            // Many errors repeat their source in their own text.
            if !text.contains(&cause_text) {
                text.push_str(&format!(": {cause_text}"));
            }
            next = cause.source();
        }
        Self::Runtime(text)
    }

    /// Writes the message to stderr and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        drop(writeln!(std::io::stderr(), "error: {self}"));
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Runtime(_) => ExitCode::FAILURE,
        }
    }
}

/// Writes a result to stdout. A closed pipe ends the output, not the process.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    drop(writeln!(out, "{text}").and_then(|()| out.flush()));
}
