//! Starts the binary, waits for its ready line, stops it.

use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::faults;

/// Longest wait for the ready line. Debug builds on two busy cores are slow.
const START: Duration = Duration::from_secs(120);
/// Longest wait for a clean end.
const STOP: Duration = Duration::from_secs(60);

/// How to start the binary.
#[derive(Debug, Clone)]
pub struct Start {
    binary: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Start {
    /// This binary with these arguments.
    #[must_use]
    pub fn new(binary: &str, arguments: &[&str]) -> Self {
        Self {
            binary: binary.to_owned(),
            arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
            environment: Vec::new(),
        }
    }

    /// `foregate up` on a free port, with these arguments.
    #[must_use]
    pub fn up(binary: &str, arguments: &[&str]) -> Self {
        let mut all = vec!["up", "--port", "0"];
        all.extend(arguments);
        Self::new(binary, &all)
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// One more variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    fn spawn(&self) -> Child {
        Command::new(&self.binary)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", self.binary))
    }

    /// Runs to the end and returns exit code, stdout and stderr.
    ///
    /// # Panics
    /// If it runs longer than a start may take.
    pub async fn run(&self) -> (Option<i32>, String, String) {
        let child = self.spawn();
        let output = timeout(START, child.wait_with_output())
            .await
            .unwrap_or_else(|_| panic!("{:?} did not end", self.arguments))
            .expect("the output can be read");
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    /// Starts and waits until it says that it is ready.
    ///
    /// # Panics
    /// If it ends or says nothing for too long; the message has its stderr.
    pub async fn ready(&self) -> Foregate {
        let mut child = self.spawn();
        let (stdout, stderr) = (Lines::default(), Lines::default());
        let mut readers = JoinSet::new();
        readers.spawn(collect(
            child.stdout.take().expect("stdout is piped"),
            stdout.clone(),
        ));
        readers.spawn(collect(
            child.stderr.take().expect("stderr is piped"),
            stderr.clone(),
        ));
        let since = Instant::now();
        loop {
            if let Some(url) = stdout.find(ready_url) {
                return Foregate {
                    child,
                    url,
                    stdout,
                    stderr,
                    readers,
                };
            }
            let ended = child.try_wait().expect("the child can be waited for");
            assert!(
                ended.is_none() && since.elapsed() < START,
                "{:?}: {ended:?} after {:?}\n{}\n{}",
                self.arguments,
                since.elapsed(),
                stdout.text(),
                stderr.text()
            );
            sleep(Duration::from_millis(20)).await;
        }
    }
}

fn ready_url(line: &str) -> Option<String> {
    let rest = line.strip_prefix("Ready: ")?;
    rest.split_whitespace().next().map(str::to_owned)
}

/// Lines as they come.
#[derive(Debug, Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    fn push(&self, line: String) {
        self.0.lock().expect("no reader panicked").push(line);
    }

    fn find<T>(&self, pick: impl Fn(&str) -> Option<T>) -> Option<T> {
        let lines = self.0.lock().expect("no reader panicked");
        lines.iter().rev().find_map(|line| pick(line))
    }

    fn text(&self) -> String {
        self.0.lock().expect("no reader panicked").join("\n")
    }
}

async fn collect(from: impl AsyncRead + Unpin, lines: Lines) {
    let mut reader = BufReader::new(from).lines();
    while let Ok(Some(line)) = reader.next_line().await {
        lines.push(line);
    }
}

/// A running binary. Dropping it kills it.
#[derive(Debug)]
pub struct Foregate {
    child: Child,
    /// Base URL of its HTTP API.
    pub url: String,
    stdout: Lines,
    stderr: Lines,
    readers: JoinSet<()>,
}

impl Foregate {
    /// Everything it wrote to stdout so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Everything it wrote to stderr so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id().expect("it still runs")
    }

    /// Waits until its stderr shows something: what was written before the ready line may be read after it.
    ///
    /// # Panics
    /// If that takes too long.
    pub async fn logged<T>(&self, what: &str, pick: impl Fn(&str) -> Option<T>) -> T {
        let since = Instant::now();
        loop {
            if let Some(found) = pick(&self.stderr.text()) {
                return found;
            }
            assert!(
                since.elapsed() < START,
                "not logged: {what}\n{}",
                self.stderr()
            );
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// The process of one instance of `up --processes`, as last reported.
    ///
    /// # Panics
    /// If no such instance is reported in time.
    pub async fn instance(&self, name: &str) -> u32 {
        self.logged(name, |log| process(log, name)).await
    }

    /// Waits until an instance runs as another process than `old`.
    ///
    /// # Panics
    /// If that takes too long.
    pub async fn restarted(&self, name: &str, old: u32) -> u32 {
        let what = format!("{name} as another process than {old}");
        self.logged(&what, |log| process(log, name).filter(|pid| *pid != old))
            .await
    }

    /// Presses ctrl-c and waits for a clean end.
    ///
    /// # Panics
    /// If it does not end in time.
    pub async fn stop(mut self) -> (ExitStatus, String) {
        faults::signal(self.pid(), "INT");
        let status = timeout(STOP, self.child.wait())
            .await
            .unwrap_or_else(|_| panic!("no end after ctrl-c\n{}", self.stderr()))
            .expect("the child can be waited for");
        // The pipes may hold lines that nobody has read yet.
        let readers = std::mem::take(&mut self.readers);
        timeout(STOP, readers.join_all())
            .await
            .unwrap_or_else(|_| panic!("a process keeps the output open\n{}", self.stderr()));
        (status, self.stderr())
    }
}

/// The newest process of an instance that a log reports.
fn process(log: &str, name: &str) -> Option<u32> {
    let start = format!("{name} runs as process ");
    log.lines()
        .rev()
        .find_map(|line| line.strip_prefix(&start)?.trim().parse().ok())
}
