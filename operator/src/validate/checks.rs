//! The single checks, and the list of what they found.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use foregate_api::limits::{
    KV_MEMORY, Limit, MAX_DOMAIN, MAX_NAME, MAX_SERVED_NAME, MAX_SERVED_NAMES, MAX_TENANT_NAME,
    MAX_URI, PAGE_TOKENS, PRIORITY, QuantityLimit,
};
use foregate_api::placement::Cover;

use crate::quantity::{parse_bytes, parse_milli};
use crate::validate::{
    Finding, Findings, Quantity, Resources, ResourcesSpec, ValidatedCluster,
};

/// Most resources that a container may ask for.
const MAX_RESOURCES: usize = 32;

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

    /// An issuer where no certificates are wanted.
    pub(super) fn certificates_of_nobody(&mut self) {
        self.add(
            "spec.security",
            "certManager has nothing to issue, since mtls is false".to_owned(),
            "set mtls to true or leave certManager out",
        );
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

    /// A number or its default, within limits. A wrong one is answered by a right one, for the checks after it.
    pub(super) fn range<T: PartialOrd + Display + Copy>(
        &mut self,
        limit: &Limit<T>,
        value: Option<T>,
    ) -> T {
        let Limit {
            field,
            default,
            low,
            high,
        } = *limit;
        let right = default.unwrap_or(low);
        let value = value.unwrap_or(right);
        if (low..=high).contains(&value) {
            return value;
        }
        self.add(
            field,
            format!("is {value}"),
            format!("give {low} to {high}"),
        );
        right
    }

    /// Somebody must take requests, somebody must hold experts, and nobody can do without both.
    pub(super) fn duties(&mut self, count: u32, attention_only: u32, expert_only: u32) {
        let both = u64::from(attention_only) + u64::from(expert_only);
        let what = if attention_only >= count {
            "no worker holds experts"
        } else if expert_only >= count {
            "no worker takes requests"
        } else if both > u64::from(count) {
            "there are not as many workers"
        } else {
            return;
        };
        self.add(
            "spec.workers",
            format!(
                "count is {count}, attentionOnly {attention_only} and expertOnly {expert_only}: {what}"
            ),
            "give a larger count, or less of the others",
        );
    }

    /// A number that may be absent.
    pub(super) fn maybe<T: PartialOrd + Display + Copy>(
        &mut self,
        limit: &Limit<T>,
        value: Option<T>,
    ) -> Option<T> {
        self.maybe_at(limit.field.to_owned(), limit, value)
    }

    /// The same of an entry of a list.
    pub(super) fn maybe_at<T: PartialOrd + Display + Copy>(
        &mut self,
        field: String,
        limit: &Limit<T>,
        value: Option<T>,
    ) -> Option<T> {
        let (low, high) = (limit.low, limit.high);
        let value = value?;
        if !(low..=high).contains(&value) {
            self.add(
                field,
                format!("is {value}"),
                format!("give {low} to {high}"),
            );
        }
        Some(value)
    }

    pub(super) fn priority(&mut self, field: String, value: i64) {
        let (low, high) = PRIORITY;
        if !(low..=high).contains(&value) {
            self.add(
                field,
                format!("is {value}"),
                format!("give {low} to {high}"),
            );
        }
    }

    pub(super) fn at_most(&mut self, field: &str, count: usize, most: usize) {
        if count > most {
            self.add(
                field,
                format!("has {count} entries"),
                format!("give at most {most}"),
            );
        }
    }

    pub(super) fn tenant_name(&mut self, field: String, name: &str, first: bool) {
        let fits = (1..=MAX_TENANT_NAME).contains(&name.len());
        if !fits || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            self.add(
                field,
                format!("is {name:?}"),
                format!("give 1 to {MAX_TENANT_NAME} visible ASCII characters"),
            );
        } else if !first {
            self.add(
                field,
                format!("`{name}` is given twice"),
                "remove one of them",
            );
        }
    }

    pub(super) fn page_tokens(&mut self, value: Option<u32>) -> u32 {
        let right = PAGE_TOKENS.default.unwrap_or(PAGE_TOKENS.low);
        let value = value.unwrap_or(right);
        if (PAGE_TOKENS.low..=PAGE_TOKENS.high).contains(&value) && value.is_power_of_two() {
            return value;
        }
        self.add(
            PAGE_TOKENS.field,
            format!("is {value}"),
            format!(
                "give a power of two from {} to {}",
                PAGE_TOKENS.low, PAGE_TOKENS.high
            ),
        );
        right
    }

    /// Bytes or their default, within limits. Wrong ones are answered by the least, for the checks after it.
    pub(super) fn bytes(&mut self, limit: &QuantityLimit, text: Option<&str>) -> u64 {
        let QuantityLimit {
            field,
            default,
            low,
            high,
        } = *limit;
        let text = text.unwrap_or(default.unwrap_or(low));
        let least = parse_bytes(low).unwrap_or(0);
        match parse_bytes(text) {
            Ok(bytes)
                if bytes >= least && parse_bytes(high).is_ok_and(|most| bytes <= most) =>
            {
                bytes
            }
            Ok(_) => {
                let range = format!("give {low} to {high}");
                self.add(field, format!("is {text}"), range);
                least
            }
            Err(error) => {
                self.add(field, error.to_string(), "give bytes, such as 512Mi");
                least
            }
        }
    }

    /// Copies in two failure domains, where there is one: workers without a name are domains of their own.
    pub(super) fn coverable(&mut self, cover: Cover, domains: &[String]) {
        let one =
            domains.len() < 2 || domains.iter().all(|d| !d.is_empty() && d == &domains[0]);
        if cover == Cover::All && one {
            self.add(
                "spec.balancing.cover",
                "is all, and there is one failure domain".to_owned(),
                "give two workers or more, in two spec.workers.domains, or cover spread",
            );
        }
    }

    pub(super) fn threshold(&mut self, value: f64) -> f64 {
        if value > 0.0 && value <= 1.0 {
            return value;
        }
        self.add(
            "spec.balancing.threshold",
            format!("is {value}"),
            "give a balance above 0 and up to 1, such as 0.98",
        );
        1.0
    }

    pub(super) fn served_names(&mut self, names: &[String]) {
        if names.len() > MAX_SERVED_NAMES {
            self.add(
                "spec.model.servedNames",
                format!("has {} names", names.len()),
                format!("give at most {MAX_SERVED_NAMES}"),
            );
        }
        let mut seen = BTreeSet::new();
        for (i, name) in names.iter().enumerate() {
            let field = format!("spec.model.servedNames[{i}]");
            let odd = |c: char| c.is_whitespace() || c.is_control();
            if name.is_empty() || name.len() > MAX_SERVED_NAME || name.contains(odd) {
                self.add(
                    field,
                    format!("is {name:?}"),
                    format!("give 1 to {MAX_SERVED_NAME} characters without spaces"),
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
        let odd =
            |d: &String| d.is_empty() || d.len() > MAX_DOMAIN || !d.chars().all(domain_char);
        if let Some(i) = domains.iter().position(odd) {
            self.add(
                format!("{FIELD}[{i}]"),
                format!("is {:?}", domains[i]),
                format!("give letters, digits, `-`, `_`, `.` or `/`, at most {MAX_DOMAIN}"),
            );
        }
        domains
    }

    /// Amounts that are none, and requests above their limits.
    pub(super) fn resources(&mut self, field: &str, spec: ResourcesSpec) -> Resources {
        let ResourcesSpec { requests, limits } = spec;
        for (map, amounts) in [("requests", &requests), ("limits", &limits)] {
            if amounts.len() > MAX_RESOURCES {
                let what = format!("has {} resources", amounts.len());
                let remedy = format!("give at most {MAX_RESOURCES}");
                self.add(format!("{field}.{map}"), what, remedy);
            }
            for (name, Quantity(amount)) in amounts {
                if let Err(error) = parse_milli(amount) {
                    let field = format!("{field}.{map}[{name}]");
                    self.add(
                        field,
                        error.to_string(),
                        "give an amount, such as 500m or 2Gi",
                    );
                }
            }
        }
        for (name, Quantity(request)) in &requests {
            let limit = limits.get(name).map(|Quantity(limit)| limit);
            let amounts = limit.map(|limit| (parse_milli(request), parse_milli(limit)));
            if let Some((Ok(wanted), Ok(most))) = amounts
                && wanted > most
            {
                self.add(
                    field,
                    format!("the request of {name} is more than its limit"),
                    "raise the limit or lower the request",
                );
            }
        }
        let of = |name| limits.get(name).or_else(|| requests.get(name));
        let cpu = of("cpu").and_then(|Quantity(text)| parse_milli(text).ok());
        let memory = of("memory").and_then(|Quantity(text)| parse_bytes(text).ok());
        let texts = |amounts: &BTreeMap<String, Quantity>| {
            let pairs = amounts.iter();
            pairs
                .map(|(name, Quantity(text))| (name.clone(), text.clone()))
                .collect()
        };
        Resources {
            requests: texts(&requests),
            limits: texts(&limits),
            cpu_milli: cpu.and_then(|milli| u64::try_from(milli).ok()),
            memory,
        }
    }

    /// Weights take memory beside keys and values; how much is known once the model has been looked at.
    pub(super) fn room_for_weights(&mut self, kv_bytes: u64, memory: u64) {
        if kv_bytes >= memory {
            self.add(
                KV_MEMORY.field,
                format!("{kv_bytes} bytes leave nothing of resources.limits.memory {memory} for weights"),
                "give more memory or less kvMemory",
            );
        }
    }

    pub(super) fn autoscaling(&mut self, min: u32, max: u32, resources: &Resources) {
        const FIELD: &str = "spec.gateway.autoscaling";
        if min > max {
            let what = format!("minReplicas {min} is more than maxReplicas {max}");
            self.add(FIELD, what, "raise maxReplicas");
        }
        if !resources.requests.contains_key("cpu") {
            self.add(
                "spec.gateway.resources.requests.cpu",
                "is not given, and autoscaling goes by a share of it".to_owned(),
                "give it",
            );
        }
    }

    /// Keys of labels or annotations that are not the operator's.
    pub(super) fn foreign_keys(&mut self, field: &str, keys: &BTreeMap<String, String>) {
        let own = |key: &&String| {
            key.starts_with("foregate.dev/") || key.starts_with("app.kubernetes.io/")
        };
        if let Some(key) = keys.keys().find(own) {
            let field = format!("{field}[{key}]");
            self.add(
                field,
                "is the operator's".to_owned(),
                "choose another prefix",
            );
        }
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

/// A DNS label that leaves room for the names of the cluster's objects, and begins as the name of a Service has to (RFC 1035: older
/// API servers take no other).
pub(super) fn cluster_name(name: &str) -> Result<(), (String, &'static str)> {
    dns_label(name)?;
    if name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err((
            format!("{name:?} begins with a digit"),
            "begin with a letter: Services are named after it",
        ));
    }
    if name.len() > MAX_NAME {
        return Err((
            format!("{name:?} has {} characters", name.len()),
            "give at most 48: other objects are named after it",
        ));
    }
    Ok(())
}

/// RFC 1123 subdomain: the name of a Secret or a claim.
pub(super) fn object_name(name: &str) -> Result<(), (String, &'static str)> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    let end = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let ends = end(name.bytes().next()) && end(name.bytes().last());
    if name.len() > MAX_DOMAIN || !ends || !name.bytes().all(inner) {
        return Err((
            format!("{name:?} is no name of an object"),
            "give 1 to 253 of a-z, 0-9, `-` and `.`, a letter or digit at either end",
        ));
    }
    Ok(())
}

/// The key of a label, such as `topology.kubernetes.io/zone`.
pub(super) fn label_key(key: &str) -> Result<(), (String, &'static str)> {
    if key.is_empty() || key.len() > 317 || !key.chars().all(domain_char) {
        return Err((
            format!("{key:?} is no key of a label"),
            "give one such as topology.kubernetes.io/zone",
        ));
    }
    Ok(())
}

/// A directory, `file://…`, `hf://org/name[@revision]`, `org/name`, `pvc://claim/path` or `oci://image`.
pub(super) fn model_uri(uri: &str) -> Result<(), (String, &'static str)> {
    const FORMS: &str = "give hf://org/name[@revision], org/name, pvc://claim/path, oci://image, file://PATH or a directory";
    if uri.trim().is_empty() {
        return Err(("is empty".to_owned(), FORMS));
    }
    if uri.len() > MAX_URI || uri.contains(char::is_control) {
        return Err(("is too long or has control characters".to_owned(), FORMS));
    }
    match uri.split_once("://") {
        None => Ok(()),
        Some(("pvc", rest)) => {
            let claim = rest.split('/').next().unwrap_or_default();
            object_name(claim).map_err(|(what, _)| (what, FORMS))
        }
        Some(("file" | "hf" | "oci", rest)) if !rest.is_empty() => Ok(()),
        Some(("file" | "hf" | "oci", _)) => Err((format!("`{uri}` names nothing"), FORMS)),
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
