//! The table of kernels in `README.md` names the kernels that there are.

use std::collections::BTreeMap;

use foregate_cuda_emulate::kernels;

/// Names between backquotes; `_m16` continues the name before it.
fn symbols(cell: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in cell.split('`').skip(1).step_by(2) {
        match (name.strip_prefix("_m"), names.last()) {
            (Some(tile), Some(last)) => {
                let stem = last.rsplit_once("_m").unwrap().0;
                names.push(format!("{stem}_m{tile}"));
            }
            _ => names.push(name.to_owned()),
        }
    }
    names
}

/// Bytes of each parameter that a cell spells out: every piece of code that begins with a type.
fn parameters(cell: &str) -> Vec<u8> {
    let pieces = cell.split('`').skip(1).step_by(2);
    pieces
        .filter_map(|piece| match piece.split(' ').next()? {
            "u64" => Some(8),
            "u32" | "f32" => Some(4),
            t if t.starts_with('*') => Some(8),
            _ => None,
        })
        .collect()
}

#[test]
fn the_table_is_that_of_the_sources() {
    let readme = include_str!("../../README.md");
    let mut told: BTreeMap<String, (u32, Option<Vec<u8>>)> = BTreeMap::new();
    let mut last: Vec<u8> = Vec::new();
    for line in readme.lines().filter(|l| l.starts_with("| `fg_")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let threads = cells[3].parse().unwrap();
        let spelt = match cells[1] {
            cell if cell.starts_with("the same") => Some(last.clone()),
            cell if cell.starts_with("see below") => None,
            cell => Some(parameters(cell)),
        };
        last = spelt.clone().unwrap_or_default();
        for name in symbols(cells[0]) {
            told.insert(name, (threads, spelt.clone()));
        }
    }
    let mut there = BTreeMap::new();
    for kernel in kernels().into_iter().filter(|k| k.name.starts_with("fg_")) {
        there.insert(kernel.name.clone(), kernel);
    }
    assert_eq!(
        told.keys().collect::<Vec<_>>(),
        there.keys().collect::<Vec<_>>()
    );
    for (name, (threads, sizes)) in told {
        assert_eq!(there[&name].threads, threads, "{name}");
        if let Some(sizes) = sizes.filter(|s| !s.is_empty()) {
            assert_eq!(there[&name].arguments, sizes, "{name}");
        }
    }
}
