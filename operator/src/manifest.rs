//! Text → [`Manifest`]: errors name line and field; no bytes make it panic.

use foregate_api::manifest::{API_VERSION, KIND, Manifest};
use serde_yaml_ng::Value;

/// Largest manifest: etcd's limit of one object, which Kubernetes has too.
pub const MAX_BYTES: usize = 1 << 20;
/// Most of the characters that open a flow sequence, a flow mapping or a directive. The parser's time grows with the
/// square of their number, and it looks at the depth only at the end: a few hundred kilobytes of them take it more than a
/// minute. No manifest needs more than a handful, wherever they stand, so they are counted, not parsed.
const MAX_OPENINGS: usize = 1000;
/// Longest part of the parser's answer that is passed on: it repeats whole keys.
const MAX_ANSWER: usize = 400;

/// Why a text is no manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Longer than [`MAX_BYTES`].
    #[error("the manifest has {0} bytes, more than {MAX_BYTES}: is it the right file?")]
    TooLarge(usize),
    /// More `[`, `{` and `%` than any manifest needs.
    #[error(
        "the manifest has {0} of the characters `[`, `{{` and `%`, more than {MAX_OPENINGS}: is it the right file?"
    )]
    TooManyOpenings(usize),
    /// Nothing but space and comments.
    #[error("the manifest is empty: it needs apiVersion, kind, metadata and spec")]
    Empty,
    /// More than one YAML document.
    #[error("the file has several documents (`---`): give one {KIND} per file")]
    Several,
    /// No YAML, or a field is unknown, missing or of another type.
    #[error("{what}{}", .line.map_or_else(String::new, |line| format!(" (line {line})")))]
    Malformed {
        /// Path of the field, and what is wrong with it.
        what: String,
        /// Line in the text, from 1.
        line: Option<usize>,
    },
    /// Another API.
    #[error("apiVersion is {0}: write `apiVersion: {API_VERSION}`")]
    ApiVersion(String),
    /// Another kind of object.
    #[error("kind is {0}: write `kind: {KIND}`")]
    Kind(String),
}

/// Reads a manifest. It may still be wrong in its values: see [`validate`](fn@crate::validate).
///
/// # Errors
/// See [`ManifestError`].
pub fn parse_manifest(text: &str) -> Result<Manifest, ManifestError> {
    if text.len() > MAX_BYTES {
        return Err(ManifestError::TooLarge(text.len()));
    }
    let openings = text
        .bytes()
        .filter(|b| matches!(b, b'[' | b'{' | b'%'))
        .count();
    if openings > MAX_OPENINGS {
        return Err(ManifestError::TooManyOpenings(openings));
    }
    // First what it claims to be, so that another kind of object is not told about its unknown fields.
    match serde_yaml_ng::from_str::<Value>(text) {
        Ok(Value::Null) => return Err(ManifestError::Empty),
        Ok(value) => claims(&value)?,
        Err(error) if only_comments(text) => {
            tracing::debug!(%error, "no document");
            return Err(ManifestError::Empty);
        }
        Err(error) => return Err(malformed(&error)),
    }
    serde_yaml_ng::from_str(text).map_err(|error| malformed(&error))
}

fn only_comments(text: &str) -> bool {
    text.lines()
        .map(str::trim)
        .all(|line| line.is_empty() || line.starts_with('#'))
}

/// Checks apiVersion and kind, where they are given.
fn claims(value: &Value) -> Result<(), ManifestError> {
    let shown = |value: &Value| match value {
        Value::String(text) => format!("`{text}`"),
        other => format!("{other:?}"),
    };
    match value.get("apiVersion") {
        Some(Value::String(text)) if text == API_VERSION => {}
        Some(other) => return Err(ManifestError::ApiVersion(shown(other))),
        None => {}
    }
    match value.get("kind") {
        Some(Value::String(text)) if text == KIND => {}
        Some(other) => return Err(ManifestError::Kind(shown(other))),
        None => {}
    }
    Ok(())
}

fn malformed(error: &serde_yaml_ng::Error) -> ManifestError {
    let text = error.to_string();
    if text.contains("more than one document") {
        return ManifestError::Several;
    }
    let line = error.location().map(|at| at.line());
    // The position is told once, by `line`.
    let what = match (line, text.rsplit_once(" at line ")) {
        (Some(_), Some((what, _))) => what.to_owned(),
        _ => text,
    };
    let what = excerpt(what);
    ManifestError::Malformed { what, line }
}

fn excerpt(mut text: String) -> String {
    if let Some((at, _)) = text.char_indices().nth(MAX_ANSWER) {
        text.truncate(at);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use foregate_api::weights::{PlainFormat, Quantization};
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "apiVersion: foregate.dev/v1alpha1\nkind: MoeCluster\nmetadata:\n  name: tiny\nspec:\n  \
                        model:\n    uri: ./demo\n  workers:\n    count: 2\n";

    fn error(text: &str) -> String {
        parse_manifest(text).unwrap_err().to_string()
    }

    #[test]
    fn the_example_is_read() {
        let text = include_str!("../../charts/examples/tiny.yaml");
        let manifest = parse_manifest(text).unwrap();
        assert_eq!(manifest.metadata.name, "tiny");
        assert!(parse_manifest(GOOD).is_ok());
    }

    #[test]
    fn formats_of_weights_are_read() {
        let text = include_str!("../../charts/examples/int8.yaml");
        let model = parse_manifest(text).unwrap().spec.model;
        assert_eq!(model.quantization, Some(Quantization::Int8));
        assert_eq!(model.dtype, Some(PlainFormat::Auto));
        let model = parse_manifest(GOOD).unwrap().spec.model;
        assert_eq!((model.dtype, model.quantization), (None, None));
    }

    #[test]
    fn errors_name_line_and_field() {
        for (from, to, says) in [
            ("count: 2", "cuont: 2", "cuont"),
            ("count: 2", "cuont: 2", "line 9"),
            ("count: 2", "count: many", "spec.workers.count"),
            ("count: 2", "count: -1", "spec.workers.count"),
            ("uri: ./demo", "servedNames: [a]", "uri"),
            (
                "uri: ./demo",
                "uri: ./demo\n    quantization: int3",
                "spec.model.quantization: unknown variant `int3`",
            ),
            (
                "uri: ./demo",
                "uri: ./demo\n    dtype: half",
                "spec.model.dtype: unknown variant `half`, expected one of `auto`, `float32`",
            ),
            ("kind: MoeCluster\n", "", "kind"),
            (
                "kind: MoeCluster",
                "kind: Pod",
                "kind is `Pod`: write `kind: MoeCluster`",
            ),
            ("v1alpha1", "v2", "apiVersion is `foregate.dev/v2`"),
            ("kind: MoeCluster", "kind: [1]", "kind is"),
            ("metadata:", "\tmetadata:", "line"),
            ("spec:", "spec: &a\n  <<: *b", "line"),
            (
                "kind: MoeCluster",
                "kind: MoeCluster\nkind: MoeCluster",
                "kind",
            ),
        ] {
            let text = GOOD.replace(from, to);
            assert_ne!(text, GOOD, "{from}");
            let error = error(&text);
            assert!(error.contains(says), "{to}: {error}");
        }
    }

    #[test]
    fn several_none_and_too_much() {
        assert_eq!(
            parse_manifest(&format!("{GOOD}---\n{GOOD}")),
            Err(ManifestError::Several)
        );
        for empty in ["", "  \n", "# nothing\n", "---\n", "null"] {
            assert_eq!(
                parse_manifest(empty),
                Err(ManifestError::Empty),
                "{empty:?}"
            );
        }
        let long = "#".repeat(MAX_BYTES + 1);
        assert!(matches!(
            parse_manifest(&long),
            Err(ManifestError::TooLarge(_))
        ));
        assert!(error("just text").contains("expected struct"));
        assert_eq!(
            parse_manifest(&"{a: ".repeat(100_000)),
            Err(ManifestError::TooManyOpenings(100_000)),
            "more than a minute of parsing"
        );
        let directives = "%TAG !a! b\n".repeat(1001);
        assert!(error(&directives).contains("1001 of the characters"));
        let most = "[".repeat(MAX_OPENINGS);
        assert!(error(&most).contains("recursion limit"));
        assert!(error(&"- ".repeat(100_000)).contains("recursion limit"));
        let key = error(&format!("{}: 1", "x".repeat(1000)));
        assert!(key.len() < 600 && key.contains("xx…"), "{key}");
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\n\
                    d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]\n";
        assert!(parse_manifest(bomb).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            let _answer = parse_manifest(&text);
        }

        #[test]
        fn no_cut_or_changed_manifest_panics(at in 0_usize..GOOD.len(), with in "[\\x00-\\x7f]{0,4}", cut: bool) {
            let mut text = GOOD.to_owned();
            if cut {
                text.truncate(at);
                text.push_str(&with);
            } else {
                text.insert_str(at, &with);
            }
            let _answer = parse_manifest(&text);
        }
    }
}
