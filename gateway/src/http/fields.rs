//! A JSON object read field by field; what nobody read is refused by its name.

use serde_json::{Map, Value};

use crate::error::{ApiError, clip};

/// The fields of a JSON object that were not read yet. `null` counts as absent.
#[derive(Debug)]
pub(super) struct Fields {
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The body of a request. Never panics: depth is limited by the JSON reader (128).
    pub(super) fn body(bytes: &[u8]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| {
            ApiError::malformed(format!("the body is not valid JSON: {error}"))
        })?;
        match value {
            Value::Object(map) => Ok(Self {
                path: String::new(),
                map,
            }),
            other => Err(ApiError::malformed(format!(
                "the body must be a JSON object, not {}",
                kind(&other)
            ))),
        }
    }

    /// An object inside the body, `path` naming where.
    pub(super) fn nested(path: impl Into<String>, value: Value) -> Result<Self, ApiError> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Self { path, map }),
            other => Err(wrong(&path, "an object", &other)),
        }
    }

    /// The fields of a document that is no request, named as they stand.
    pub(super) fn document(value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self {
                path: String::new(),
                map,
            }),
            other => Err(ApiError::malformed(format!(
                "the file must be a JSON object, not {}",
                kind(&other)
            ))),
        }
    }

    /// The full name of a field, as errors name it.
    pub(super) fn name(&self, field: &str) -> String {
        let field = clip(field, 100);
        if self.path.is_empty() {
            field.to_owned()
        } else {
            format!("{}.{field}", self.path)
        }
    }

    /// Takes a field as it is.
    pub(super) fn take(&mut self, field: &str) -> Option<Value> {
        self.map.remove(field).filter(|value| !value.is_null())
    }

    /// Takes a boolean.
    pub(super) fn boolean(&mut self, field: &str) -> Result<Option<bool>, ApiError> {
        self.take(field)
            .map(|value| {
                value
                    .as_bool()
                    .ok_or_else(|| wrong(&self.name(field), "a boolean", &value))
            })
            .transpose()
    }

    /// Takes a string.
    pub(super) fn string(&mut self, field: &str) -> Result<Option<String>, ApiError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.name(field), "a string", &other)),
        }
    }

    /// Takes an integer in `low..=high`.
    pub(super) fn integer(
        &mut self,
        field: &str,
        low: i64,
        high: i64,
    ) -> Result<Option<i64>, ApiError> {
        let name = self.name(field);
        self.take(field)
            .map(|value| integer(&name, &value, low, high))
            .transpose()
    }

    /// Takes a 32-bit count in `low..=high`.
    pub(super) fn count(
        &mut self,
        field: &str,
        low: u32,
        high: u32,
    ) -> Result<Option<u32>, ApiError> {
        Ok(self
            .integer(field, i64::from(low), i64::from(high))?
            .and_then(|value| u32::try_from(value).ok()))
    }

    /// Takes a number in `low..=high`.
    pub(super) fn number(
        &mut self,
        field: &str,
        low: f64,
        high: f64,
    ) -> Result<Option<f32>, ApiError> {
        let name = self.name(field);
        self.take(field)
            .map(|value| number(&name, &value, low, high))
            .transpose()
    }

    /// Takes a list of token ids.
    pub(super) fn token_ids(&mut self, field: &str) -> Result<Option<Vec<u32>>, ApiError> {
        let name = self.name(field);
        self.take(field)
            .map(|value| match value {
                Value::Array(list) => token_ids(&name, &list),
                other => Err(wrong(&name, "a list of token ids", &other)),
            })
            .transpose()
    }

    /// Takes a field that is served only with the values that change nothing.
    pub(super) fn only(
        &mut self,
        field: &str,
        harmless: impl Fn(&Value) -> bool,
        remedy: &str,
    ) -> Result<(), ApiError> {
        match self.take(field) {
            Some(value) if !harmless(&value) => Err(ApiError::unsupported(
                self.name(field),
                format!("`{}` is not supported: {remedy}", self.name(field)),
            )),
            _ => Ok(()),
        }
    }

    /// Refuses whatever is left.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        let left = self
            .map
            .iter()
            .find(|(_, value)| !value.is_null())
            .map(|(field, _)| self.name(field));
        match left {
            None => Ok(()),
            Some(name) => Err(ApiError::unsupported(
                name.clone(),
                format!("unsupported field `{name}`: remove it from the request"),
            )),
        }
    }
}

/// What a value is, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// "`x` must be a string, not a number".
pub(super) fn wrong(name: &str, expected: &str, found: &Value) -> ApiError {
    ApiError::invalid(
        name,
        format!("`{name}` must be {expected}, not {}", kind(found)),
    )
}

/// An integer in a range. `3.0` counts as one, as several clients write it.
pub(super) fn integer(name: &str, value: &Value, low: i64, high: i64) -> Result<i64, ApiError> {
    let whole = value.as_i64().or_else(|| {
        value
            .as_f64()
            .filter(|number| number.fract() == 0.0 && number.abs() < 9e15)
            .map(|number| number as i64)
    });
    match whole {
        Some(whole) if (low..=high).contains(&whole) => Ok(whole),
        _ if value.is_number() => Err(ApiError::invalid(
            name,
            format!("`{name}` must be an integer from {low} to {high}, not {value}"),
        )),
        _ => Err(wrong(name, "an integer", value)),
    }
}

/// A number in a range.
pub(super) fn number(name: &str, value: &Value, low: f64, high: f64) -> Result<f32, ApiError> {
    match value.as_f64() {
        Some(number) if (low..=high).contains(&number) => Ok(number as f32),
        Some(_) => Err(ApiError::invalid(
            name,
            format!("`{name}` must be from {low} to {high}, not {value}"),
        )),
        None => Err(wrong(name, "a number", value)),
    }
}

/// A list of token ids; whether the model has them is checked later, against the model.
pub(super) fn token_ids(name: &str, list: &[Value]) -> Result<Vec<u32>, ApiError> {
    list.iter()
        .enumerate()
        .map(|(at, value)| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| {
                    ApiError::invalid(
                        name,
                        format!(
                            "`{name}[{at}]` must be a token id (an integer from 0), not {}",
                            clip(&value.to_string(), 80)
                        ),
                    )
                })
        })
        .collect()
}
