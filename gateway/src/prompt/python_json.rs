//! JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it, which is what templates are
//! written against: `", "` and `": "` between parts, no HTML escapes.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Writes `value`; with `indent`, one entry per line.
pub(super) fn dumps(value: &Value, indent: Option<usize>) -> Result<String, Error> {
    let mut out = String::new();
    write(value, indent, 0, &mut out)?;
    Ok(out)
}

fn write(
    value: &Value,
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let parts = value.try_iter()?.map(|item| (None, item)).collect();
            group(parts, ['[', ']'], indent, depth, out)?;
        }
        ValueKind::Map => {
            let mut parts = Vec::new();
            for key in value.try_iter()? {
                let item = value.get_item(&key)?;
                parts.push((Some(key.to_string()), item));
            }
            group(parts, ['{', '}'], indent, depth, out)?;
        }
        other => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("{other} cannot be written as JSON"),
            ));
        }
    }
    Ok(())
}

fn group(
    parts: Vec<(Option<String>, Value)>,
    [open, close]: [char; 2],
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> Result<(), Error> {
    out.push(open);
    let many = !parts.is_empty();
    for (at, (key, item)) in parts.into_iter().enumerate() {
        if at > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        line(indent, depth + 1, out);
        if let Some(key) = key {
            quote(&key, out);
            out.push_str(": ");
        }
        write(&item, indent, depth + 1, out)?;
    }
    if many {
        line(indent, depth, out);
    }
    out.push(close);
    Ok(())
}

fn line(indent: Option<usize>, depth: usize, out: &mut String) {
    if let Some(width) = indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', width * depth));
    }
}

fn quote(text: &str, out: &mut String) {
    // serde_json and Python escape the same characters when ASCII is not asked for, save DEL: both leave it.
    out.push_str(&serde_json::Value::from(text).to_string());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_what_python_writes() {
        let list = Value::from_iter([Value::from(1), Value::from("a<é\n"), Value::from(())]);
        let map =
            Value::from_pairs([("k", list), ("e", Value::from_iter(Vec::<Value>::new()))]);
        assert_eq!(
            dumps(&map, None).unwrap(),
            r#"{"k": [1, "a<é\n", null], "e": []}"#
        );
        assert_eq!(
            dumps(&map, Some(2)).unwrap(),
            "{\n  \"k\": [\n    1,\n    \"a<é\\n\",\n    null\n  ],\n  \"e\": []\n}"
        );
    }
}
