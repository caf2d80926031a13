//! Reads recorded load windows.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use foregate_api::ids::Rank;
use foregate_api::load::{EngineLoad, LoadWindow};
use foregate_trace::Event;

use crate::error::CliError;

/// All windows of the files `*.jsonl` (a window a line) and `*.fgt` (expert traces) of a folder, file by file in the
/// order of names.
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
            .is_some_and(|extension| extension == "jsonl" || extension == "fgt")
    });
    files.sort();
    let mut windows = Vec::new();
    for file in &files {
        if file.extension().is_some_and(|extension| extension == "fgt") {
            trace(file, &mut windows)?;
        } else {
            lines(file, &mut windows)?;
        }
    }
    Ok(windows)
}

/// The windows of an expert trace, each rank's numbered from 1.
fn trace(file: &Path, into: &mut Vec<LoadWindow>) -> Result<(), CliError> {
    let wrong =
        |error: &dyn std::error::Error| CliError::Usage(format!("{}: {error}", file.display()));
    let bytes = std::fs::read(file).map_err(|error| wrong(&error))?;
    let (header, events) = foregate_trace::read(&bytes).map_err(|error| wrong(&error))?;
    let mut numbers: BTreeMap<Rank, u64> = BTreeMap::new();
    for event in events {
        let Event::Window {
            rank,
            epoch,
            span_ms,
            counts,
            ..
        } = event.map_err(|error| wrong(&error))?
        else {
            continue;
        };
        let number = numbers.entry(rank).or_default();
        *number += 1;
        into.push(LoadWindow {
            rank,
            epoch,
            sequence: *number,
            span_ms,
            gate: counts.chunks(header.experts).map(<[u64]>::to_vec).collect(),
            served: vec![0; header.layers],
            engine: EngineLoad::default(),
        });
    }
    Ok(())
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
