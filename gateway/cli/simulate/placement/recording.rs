//! Reads recorded load windows.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use foregate_api::load::LoadWindow;

use crate::error::CliError;

/// All windows of the files `*.jsonl` of a folder, file by file in the order of names.
pub(super) fn read(folder: &Path) -> Result<Vec<LoadWindow>, CliError> {
    let failed = |error: &dyn std::error::Error| {
        CliError::Usage(format!("--replay {}: {error}", folder.display()))
    };
    let entries = std::fs::read_dir(folder).map_err(|error| failed(&error))?;
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .map_err(|error| failed(&error))?;
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "jsonl")
    });
    files.sort();
    let mut windows = Vec::new();
    for file in &files {
        lines(file, &mut windows)?;
    }
    Ok(windows)
}

fn lines(file: &Path, into: &mut Vec<LoadWindow>) -> Result<(), CliError> {
    let wrong = |line: usize, error: &dyn std::error::Error| {
        CliError::Usage(format!("{}, line {}: {error}", file.display(), line + 1))
    };
    let open = std::fs::File::open(file).map_err(|error| wrong(0, &error))?;
    for (at, line) in BufReader::new(open).lines().enumerate() {
        let line = line.map_err(|error| wrong(at, &error))?;
        if !line.trim().is_empty() {
            into.push(serde_json::from_str(&line).map_err(|error| wrong(at, &error))?);
        }
    }
    Ok(())
}
