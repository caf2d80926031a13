//! A JSON object that remembers which of its fields were read.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::SpecError;

/// The error for a field that cannot be used.
pub(super) fn refuse(
    field: impl Into<String>,
    problem: impl Into<String>,
    remedy: impl Into<String>,
) -> SpecError {
    SpecError::Field {
        field: field.into(),
        problem: problem.into(),
        remedy: remedy.into(),
    }
}

/// Typed access to an object's fields; a JSON `null` counts as absent.
pub(super) struct Fields<'a> {
    map: Option<&'a Map<String, Value>>,
    path: &'static str,
    seen: BTreeSet<&'static str>,
}

impl<'a> Fields<'a> {
    /// The top level of a file. A value that is no object has no fields.
    pub(super) fn new(value: &'a Value) -> Self {
        Self::nested(value, "")
    }

    /// An object inside the file; `path` ends in a dot and stands before names in errors.
    pub(super) fn nested(value: &'a Value, path: &'static str) -> Self {
        Self {
            map: value.as_object(),
            path,
            seen: BTreeSet::new(),
        }
    }

    /// The raw value, if there is one and it is not `null`.
    pub(super) fn value(&mut self, name: &'static str) -> Option<&'a Value> {
        self.seen.insert(name);
        self.map?.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn name(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    fn wrong(&self, name: &str, value: &Value, wanted: &str) -> SpecError {
        refuse(
            self.name(name),
            format!("expected {wanted}, found {}", shorten(value)),
            "restore the value of the model's repository",
        )
    }

    /// Text.
    pub(super) fn text(&mut self, name: &'static str) -> Result<Option<&'a str>, SpecError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, other, "text")),
        }
    }

    /// Text that must be there.
    pub(super) fn required_text(&mut self, name: &'static str) -> Result<&'a str, SpecError> {
        self.text(name)?.ok_or_else(|| self.missing(name))
    }

    /// The error for a field that must be there.
    pub(super) fn missing(&self, name: &str) -> SpecError {
        refuse(
            self.name(name),
            "missing",
            "restore config.json from the model's repository",
        )
    }

    /// True or false.
    pub(super) fn flag(
        &mut self,
        name: &'static str,
        default: bool,
    ) -> Result<bool, SpecError> {
        match self.value(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.wrong(name, other, "true or false")),
        }
    }

    /// A whole number in `1..=most`.
    pub(super) fn size(
        &mut self,
        name: &'static str,
        most: usize,
    ) -> Result<Option<usize>, SpecError> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .filter(|number| (1..=most).contains(number))
            .map(Some)
            .ok_or_else(|| self.wrong(name, value, &format!("a whole number from 1 to {most}")))
    }

    /// A whole number in `1..=most` that must be there.
    pub(super) fn required_size(
        &mut self,
        name: &'static str,
        most: usize,
    ) -> Result<usize, SpecError> {
        self.size(name, most)?.ok_or_else(|| self.missing(name))
    }

    /// A finite number above zero.
    pub(super) fn positive(&mut self, name: &'static str) -> Result<Option<f64>, SpecError> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        value
            .as_f64()
            .filter(|number| number.is_finite() && *number > 0.0)
            .map(Some)
            .ok_or_else(|| self.wrong(name, value, "a number above zero"))
    }

    /// A list of block indices, empty if absent.
    pub(super) fn indices(&mut self, name: &'static str) -> Result<Vec<u64>, SpecError> {
        let Some(value) = self.value(name) else {
            return Ok(Vec::new());
        };
        value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_u64).collect())
            .ok_or_else(|| self.wrong(name, value, "a list of layer numbers"))
    }

    /// Refuses every field that was neither read nor is on `harmless`.
    pub(super) fn finish(self, harmless: &[&str]) -> Result<(), SpecError> {
        for (name, value) in self.map.into_iter().flatten() {
            if value.is_null()
                || self.seen.contains(name.as_str())
                || harmless.contains(&name.as_str())
            {
                continue;
            }
            return Err(refuse(
                self.name(name),
                format!("{} is not known to be safe to ignore", shorten(value)),
                "remove it if the model's own code does not use it for inference, \
                 otherwise this model is not supported",
            ));
        }
        Ok(())
    }
}

/// A value for an error message: whole when short, its beginning otherwise.
pub(super) fn shorten(value: &Value) -> String {
    const MOST: usize = 60;
    let text = value.to_string();
    if text.chars().count() <= MOST {
        text
    } else {
        let mut cut: String = text.chars().take(MOST).collect();
        cut.push('…');
        cut
    }
}
