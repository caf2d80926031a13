//! Which files of a repository serving needs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::fetch::FetchError;

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const OPTIONAL: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

#[derive(Deserialize)]
struct Index {
    weight_map: std::collections::BTreeMap<String, String>,
}

/// The small files to fetch, `config.json` always (its absence is told by the download).
pub(super) fn small(names: &[String]) -> Vec<&'static str> {
    let mut wanted = vec![CONFIG];
    wanted.extend(
        OPTIONAL
            .iter()
            .filter(|file| names.iter().any(|name| name == *file)),
    );
    wanted
}

/// The files with weights: the shards of the index, else the one file.
pub(super) fn weights(
    repo: &str,
    names: &[String],
    get: impl Fn(&str) -> Result<PathBuf, FetchError>,
) -> Result<Vec<String>, FetchError> {
    let has = |file: &str| names.iter().any(|name| name == file);
    let lacks = |what: String| FetchError::NotServable {
        repo: repo.to_owned(),
        what,
    };
    if !has(CONFIG) {
        return Err(lacks(CONFIG.to_owned()));
    }
    if has(INDEX) {
        let index = get(INDEX)?;
        let shards =
            shards(&index).map_err(|what| lacks(format!("readable {INDEX}: {what}")))?;
        if let Some(missing) = shards.iter().find(|shard| !has(shard)) {
            return Err(lacks(format!("{missing}, which {INDEX} names")));
        }
        return Ok(shards.into_iter().collect());
    }
    if has(SINGLE) {
        return Ok(vec![SINGLE.to_owned()]);
    }
    Err(lacks(format!("{SINGLE} and no {INDEX}")))
}

/// Whether a directory has what serving needs.
pub(super) fn complete(directory: &Path) -> bool {
    let has = |file: &str| directory.join(file).is_file();
    if !has(CONFIG) {
        return false;
    }
    match shards(&directory.join(INDEX)) {
        Ok(shards) => shards.iter().all(|shard| has(shard)),
        Err(_) => has(SINGLE),
    }
}

/// Shard names of an index. They become paths, so only plain file names are taken.
fn shards(index: &Path) -> Result<BTreeSet<String>, String> {
    let text = std::fs::read(index).map_err(|error| error.to_string())?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let shards: BTreeSet<_> = index.weight_map.into_values().collect();
    match shards
        .iter()
        .find(|name| name.contains(['/', '\\']) || !name.ends_with(".safetensors"))
    {
        Some(odd) => Err(format!("shard name {odd:?}")),
        None => Ok(shards),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn shards_come_from_the_index_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let index = directory.path().join(INDEX);
        std::fs::write(
            &index,
            r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#,
        )
        .unwrap();
        let all = names(&[
            CONFIG,
            INDEX,
            "model-1.safetensors",
            "model-2.safetensors",
            "consolidated.safetensors",
        ]);
        let found = weights("o/n", &all, |_| Ok(index.clone())).unwrap();
        assert_eq!(found, ["model-1.safetensors", "model-2.safetensors"]);
        let without = names(&[CONFIG, INDEX, "model-1.safetensors"]);
        let error = weights("o/n", &without, |_| Ok(index.clone())).unwrap_err();
        assert!(error.to_string().contains("model-2.safetensors"), "{error}");
    }

    #[test]
    fn an_index_cannot_name_a_path() {
        let directory = tempfile::tempdir().unwrap();
        let index = directory.path().join(INDEX);
        std::fs::write(&index, r#"{"weight_map": {"a": "../../x.safetensors"}}"#).unwrap();
        let all = names(&[CONFIG, INDEX, "../../x.safetensors"]);
        assert!(weights("o/n", &all, |_| Ok(index.clone())).is_err());
    }

    #[test]
    fn a_repository_without_weights_is_refused() {
        let error = weights("o/n", &names(&[CONFIG, "pytorch_model.bin"]), |_| {
            panic!("there is no index")
        })
        .unwrap_err();
        assert!(error.to_string().contains("safetensors"), "{error}");
    }
}
