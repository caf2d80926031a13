//! The OpenAI client for Python, unmodified, against the demonstration model.
#![expect(clippy::expect_used, reason = "a failure here is the test's failure")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use foregate_harness::binary::Start;
use foregate_harness::{on_path, repository, skip};

const BINARY: &str = env!("CARGO_BIN_EXE_foregate");
/// Pinned, so that the test changes only when we do.
const CLIENT: &str = "openai==1.109.1";

fn run(program: &Path, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .output()
        .expect("the program starts")
}

/// Python of a virtual environment that has the client; made once per version of it.
fn python() -> Result<PathBuf, String> {
    if on_path("python3").is_none() {
        return Err("no python3 on PATH".to_owned());
    }
    let home = std::env::var_os("HOME").unwrap_or_default();
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .filter(|value| !value.is_empty())
        .map_or_else(|| Path::new(&home).join(".cache"), PathBuf::from);
    let venv = cache.join("foregate").join(CLIENT.replace("==", "-"));
    let python = venv.join("bin/python");
    if run_ok(&python, &["-c", "import openai"]) {
        return Ok(python);
    }
    let venv = venv.to_string_lossy();
    // Debian's own interpreter first: another one on PATH may lack the module.
    let made = ["/usr/bin/python3", "python3"]
        .iter()
        .any(|interpreter| run_ok(Path::new(interpreter), &["-m", "venv", "--clear", &venv]));
    if !made {
        return Err("python3 -m venv fails: install python3-venv".to_owned());
    }
    let install = run(&python, &["-m", "pip", "install", "--quiet", CLIENT]);
    if install.status.success() {
        return Ok(python);
    }
    Err(format!(
        "pip install {CLIENT}: {}",
        String::from_utf8_lossy(&install.stderr)
    ))
}

fn run_ok(program: &Path, arguments: &[&str]) -> bool {
    Command::new(program)
        .args(arguments)
        .output()
        .is_ok_and(|output| output.status.success())
}

#[tokio::test]
async fn the_openai_client_works_unmodified() {
    let python = match python() {
        Ok(python) => python,
        Err(reason) => return skip(&reason),
    };
    let cluster = Start::up(BINARY, &[]).ready().await;
    let script = repository("e2e/python_client.py");
    let url = format!("{}/v1", cluster.url);
    let output =
        tokio::task::spawn_blocking(move || run(&python, &[&script.to_string_lossy(), &url]))
            .await
            .expect("the script runs");
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
}
