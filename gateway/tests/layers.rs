//! Modules import downwards only, so that each can be read and tested with what is below it.

#![expect(clippy::unwrap_used, reason = "a test may end in a panic")]

use std::path::{Path, PathBuf};

/// From the bottom up.
const ORDER: [&str; 27] = [
    "clock",
    "random",
    "traffic",
    "error",
    "past",
    "api_keys",
    "model_files",
    "trace",
    "prompt",
    "output",
    "signature",
    "calibration",
    "heat",
    "feed",
    "cached",
    "prefixes",
    "loads",
    "route",
    "metrics",
    "view",
    "forecast",
    "upstream",
    "admission",
    "generate",
    "http",
    "serve",
    "lib",
];

fn place(module: &str) -> usize {
    let place = ORDER.iter().position(|known| *known == module);
    assert!(place.is_some(), "`{module}` has no place in the order");
    place.unwrap()
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else {
            found.push(path);
        }
    }
}

#[test]
fn modules_import_downwards() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
    let mut files = Vec::new();
    sources(root, &mut files);
    let mut edges = 0;
    for file in files {
        let inside = file.strip_prefix(root).unwrap();
        let own = inside.iter().next().unwrap().to_str().unwrap();
        let own = own.trim_end_matches(".rs");
        let text = std::fs::read_to_string(&file).unwrap();
        for part in text.split("crate::").skip(1) {
            let other: String = part
                .chars()
                .take_while(|character| character.is_ascii_lowercase() || *character == '_')
                .collect();
            edges += 1;
            assert!(
                other == own || place(&other) < place(own),
                "{}: `{own}` imports `{other}`, which is not below it",
                inside.display()
            );
        }
    }
    assert!(edges > 50, "only {edges} imports found");
}
