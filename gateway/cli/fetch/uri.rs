//! The forms of a model URI.

use std::path::{Path, PathBuf};

use super::FetchError;

/// A parsed model URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ModelUri {
    /// A local directory; not yet checked.
    Directory(PathBuf),
    /// A model of the hub.
    Hub {
        /// `org/name`.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
    },
}

impl ModelUri {
    /// Parses a URI; a relative directory is relative to `base`. Looks at the file system only to
    /// tell a bare `org/name` from a directory of that name.
    pub(crate) fn parse(uri: &str, base: &Path) -> Result<Self, FetchError> {
        let bad = |what: &str| FetchError::BadUri {
            uri: uri.to_owned(),
            what: what.to_owned(),
        };
        if uri.trim().is_empty() {
            return Err(bad(
                "is empty; give a directory, file://…, hf://org/name or org/name",
            ));
        }
        if let Some(rest) = uri.strip_prefix("hf://") {
            return hub(rest)
                .ok_or_else(|| bad("after hf:// there must be org/name or org/name@revision"));
        }
        if let Some(rest) = uri.strip_prefix("file://") {
            let path = rest.strip_prefix("localhost").unwrap_or(rest);
            if !path.starts_with('/') {
                return Err(bad(
                    "file:// wants an absolute path, as in file:///models/demo",
                ));
            }
            return Ok(Self::Directory(unescape(path).ok_or_else(|| {
                bad("has a % that does not begin an escape such as %20")
            })?));
        }
        if let Some((scheme, _)) = uri.split_once("://") {
            return Err(bad(&format!(
                "scheme {scheme}:// is not supported; use a directory, file:// or hf://"
            )));
        }
        let directory = base.join(uri);
        let explicit = uri.starts_with(['.', '/', '~']);
        if !explicit
            && !directory.exists()
            && let Some(found) = hub(uri)
        {
            return Ok(found);
        }
        Ok(Self::Directory(directory))
    }
}

fn hub(text: &str) -> Option<ModelUri> {
    let (repo, revision) = match text.split_once('@') {
        Some((repo, revision)) => (repo, revision),
        None => (text, "main"),
    };
    let (org, name) = repo.split_once('/')?;
    let part = |s: &str| {
        !s.is_empty()
            && s.len() <= 96
            && !s.starts_with(['.', '-'])
            && !s.contains("..")
            && s.chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let revision_is_fine = !revision.is_empty()
        && revision.len() <= 255
        && !revision.starts_with('/')
        && !revision.contains("..")
        && revision
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'));
    (part(org) && part(name) && revision_is_fine).then(|| ModelUri::Hub {
        repo: repo.to_owned(),
        revision: revision.to_owned(),
    })
}

/// Resolves `%XX`; `None` if an escape is broken or the result is not UTF-8.
fn unescape(path: &str) -> Option<PathBuf> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok().map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(uri: &str) -> Result<ModelUri, FetchError> {
        ModelUri::parse(uri, Path::new("/base"))
    }

    fn hub_of(repo: &str, revision: &str) -> ModelUri {
        ModelUri::Hub {
            repo: repo.into(),
            revision: revision.into(),
        }
    }

    #[test]
    fn every_form_is_told_apart() {
        let directory = |path: &str| ModelUri::Directory(PathBuf::from(path));
        for (uri, expected) in [
            ("models/a/b", directory("/base/models/a/b")),
            ("./org/name", directory("/base/./org/name")),
            ("/org/name", directory("/org/name")),
            ("demo", directory("/base/demo")),
            ("file:///m/with%20space", directory("/m/with space")),
            ("file://localhost/m", directory("/m")),
            ("hf://org/name", hub_of("org/name", "main")),
            ("hf://org/name@v1.0", hub_of("org/name", "v1.0")),
            ("org/name", hub_of("org/name", "main")),
            ("org/name@refs/pr/1", hub_of("org/name", "refs/pr/1")),
        ] {
            assert_eq!(parse(uri).unwrap(), expected, "{uri}");
        }
    }

    #[test]
    fn a_directory_wins_over_a_bare_hub_name() {
        let base = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(base.path().join("org/name")).unwrap();
        let found = ModelUri::parse("org/name", base.path()).unwrap();
        assert_eq!(found, ModelUri::Directory(base.path().join("org/name")));
    }

    #[test]
    fn wrong_uris_say_what_is_wrong() {
        for (uri, word) in [
            ("", "empty"),
            ("s3://bucket/model", "s3://"),
            ("hf://name", "org/name"),
            ("hf://org/../name", "org/name"),
            ("hf://org/name@", "org/name"),
            ("hf://org/name@../../x", "org/name"),
            ("file://relative/path", "absolute"),
            ("file:///bad%zz", "escape"),
        ] {
            let error = parse(uri).unwrap_err().to_string();
            assert!(error.contains(word), "{uri}: {error}");
        }
    }
}
