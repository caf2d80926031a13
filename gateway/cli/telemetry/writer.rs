//! Log lines and progress bars share one terminal without writing over each other.

use std::io::{self, Write};

use tracing_subscriber::fmt::MakeWriter;

use crate::progress::Progress;

/// Writes log lines to stderr, above the bars if there are any.
#[derive(Debug, Clone)]
pub(super) struct Writer(pub(super) Progress);

impl<'a> MakeWriter<'a> for Writer {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Write for Writer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Progress::Bars(bars) => bars.suspend(|| io::stderr().write_all(line))?,
            Progress::Lines => io::stderr().write_all(line)?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
