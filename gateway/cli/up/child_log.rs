//! What children write: passed on to the terminal under their names, the last line kept.

use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

use crate::progress::Progress;

/// The last line a child wrote, for the message when it is given up.
#[derive(Debug, Default)]
pub(super) struct LastWords(std::sync::Mutex<String>);

impl LastWords {
    fn set(&self, line: &str) {
        if let Ok(mut last) = self.0.lock() {
            line.clone_into(&mut last);
        }
    }

    /// The line, without its end.
    pub(super) fn get(&self) -> String {
        self.0.lock().map(|last| last.clone()).unwrap_or_default()
    }
}

/// A child's log lines under its name.
pub(super) async fn pass_on(
    from: impl AsyncRead + Unpin,
    name: String,
    progress: Progress,
    words: Arc<LastWords>,
) {
    let mut lines = BufReader::new(from).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        progress.say(&format!("[{name}] {line}"));
        words.set(&line);
    }
}
