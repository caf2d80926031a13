//! The single checks, and the list of what they found.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;

use crate::quantity::QuantityError;
use crate::validate::{Finding, Findings, ValidatedCluster};

/// Smallest and largest KV cache of a worker.
const KV_BYTES: RangeInclusive<u64> = (64 << 10)..=(16 << 40);
/// Longest name of a model and longest URI.
const MAX_NAME: usize = 256;
const MAX_URI: usize = 2048;

/// What was found so far.
#[derive(Debug, Default)]
pub(super) struct Checks {
    findings: Vec<Finding>,
}

impl Checks {
    pub(super) fn end(self, cluster: ValidatedCluster) -> Result<ValidatedCluster, Findings> {
        if self.findings.is_empty() {
            Ok(cluster)
        } else {
            Err(Findings(self.findings))
        }
    }

    fn add(&mut self, field: impl Into<String>, what: String, remedy: impl Into<String>) {
        self.findings.push(Finding {
            field: field.into(),
            what,
            remedy: remedy.into(),
        });
    }

    pub(super) fn must_be(&mut self, field: &str, found: &str, wanted: &str) {
        if found != wanted {
            self.add(field, format!("is `{found}`"), format!("write `{wanted}`"));
        }
    }

    /// A check that knows both what is wrong and the remedy. True if all is well.
    pub(super) fn must(
        &mut self,
        field: &str,
        value: &str,
        check: fn(&str) -> Result<(), (String, &'static str)>,
    ) -> bool {
        match check(value) {
            Ok(()) => true,
            Err((what, remedy)) => {
                self.add(field, what, remedy);
                false
            }
        }
    }

    /// A number or its default, within limits. A wrong one is answered by the default, for the checks after it.
    pub(super) fn range<T: PartialOrd + Display + Copy>(
        &mut self,
        field: &str,
        value: Option<T>,
        default: T,
        range: RangeInclusive<T>,
    ) -> T {
        let value = value.unwrap_or(default);
        if range.contains(&value) {
            return value;
        }
        let (low, high) = (range.start(), range.end());
        self.add(
            field,
            format!("is {value}"),
            format!("give {low} to {high}"),
        );
        default
    }

    pub(super) fn page_tokens(&mut self, value: Option<u32>) -> u32 {
        let value = value.unwrap_or(16);
        if (1..=256).contains(&value) && value.is_power_of_two() {
            return value;
        }
        self.add(
            "spec.workers.pageTokens",
            format!("is {value}"),
            "give a power of two from 1 to 256",
        );
        16
    }

    pub(super) fn kv_memory(&mut self, text: &str, parsed: Result<u64, QuantityError>) -> u64 {
        const FIELD: &str = "spec.workers.kvMemory";
        match parsed {
            Ok(bytes) if KV_BYTES.contains(&bytes) => bytes,
            Ok(_) => {
                self.add(FIELD, format!("is {text}"), "give 64Ki to 16Ti");
                *KV_BYTES.start()
            }
            Err(error) => {
                self.add(FIELD, error.to_string(), "give bytes, such as 512Mi");
                *KV_BYTES.start()
            }
        }
    }

    pub(super) fn threshold(&mut self, value: f64) -> f64 {
        if value > 0.0 && value <= 1.0 {
            return value;
        }
        self.add(
            "spec.balancing.threshold",
            format!("is {value}"),
            "give a balance above 0 and up to 1, such as 0.97",
        );
        1.0
    }

    pub(super) fn served_names(&mut self, names: &[String]) {
        let mut seen = BTreeSet::new();
        for (i, name) in names.iter().enumerate() {
            let field = format!("spec.model.servedNames[{i}]");
            let odd = |c: char| c.is_whitespace() || c.is_control();
            if name.is_empty() || name.len() > MAX_NAME || name.contains(odd) {
                self.add(
                    field,
                    format!("is {name:?}"),
                    format!("give 1 to {MAX_NAME} characters without spaces"),
                );
            } else if !seen.insert(name) {
                self.add(
                    field,
                    format!("`{name}` is given twice"),
                    "remove one of them",
                );
            }
        }
    }

    /// One domain per worker, or none at all.
    pub(super) fn domains(&mut self, domains: Vec<String>, count: u32) -> Vec<String> {
        const FIELD: &str = "spec.workers.domains";
        let unknown = || vec![String::new(); count as usize];
        if domains.is_empty() {
            return unknown();
        }
        if domains.len() != count as usize {
            self.add(
                FIELD,
                format!("has {} entries for {count} workers", domains.len()),
                "give one per worker, in the order of ranks, or none",
            );
            return unknown();
        }
        let odd = |d: &String| d.is_empty() || d.len() > 253 || !d.chars().all(domain_char);
        if let Some(i) = domains.iter().position(odd) {
            self.add(
                format!("{FIELD}[{i}]"),
                format!("is {:?}", domains[i]),
                "give letters, digits, `-`, `_`, `.` or `/`, at most 253",
            );
        }
        domains
    }
}

const fn domain_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/')
}

/// RFC 1123: lower case letters, digits and inner hyphens, at most 63.
pub(super) fn dns_label(name: &str) -> Result<(), (String, &'static str)> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let ends = name.starts_with('-') || name.ends_with('-');
    if name.is_empty() || name.len() > 63 || ends || !name.bytes().all(inner) {
        return Err((
            format!("{name:?} is no DNS label"),
            "give 1 to 63 of a-z, 0-9 and `-`, not at either end",
        ));
    }
    Ok(())
}

/// A directory, `file://…`, `hf://org/name[@revision]` or `org/name`.
pub(super) fn model_uri(uri: &str) -> Result<(), (String, &'static str)> {
    const FORMS: &str = "give a directory, file://PATH, hf://org/name[@revision] or org/name";
    if uri.trim().is_empty() {
        return Err(("is empty".to_owned(), FORMS));
    }
    if uri.len() > MAX_URI || uri.contains(char::is_control) {
        return Err(("is too long or has control characters".to_owned(), FORMS));
    }
    match uri.split_once("://") {
        None => Ok(()),
        Some(("file" | "hf", rest)) if !rest.is_empty() => Ok(()),
        Some(("file" | "hf", _)) => Err((format!("`{uri}` names nothing"), FORMS)),
        Some((scheme, _)) => Err((format!("scheme `{scheme}` is not supported"), FORMS)),
    }
}

/// The last part of a URI, without a revision: the name a model is served under unless it is given one.
pub(super) fn short_name(uri: &str) -> String {
    let path = uri.split_once("://").map_or(uri, |(_, rest)| rest);
    let last = path
        .trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or_default();
    let name = if uri.starts_with("hf://") {
        last.split_once('@').map_or(last, |(name, _)| name)
    } else {
        last
    };
    match name {
        "" | "." | ".." => "model".to_owned(),
        name => name.split_whitespace().collect::<Vec<_>>().join("-"),
    }
}
