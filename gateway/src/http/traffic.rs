//! What headers say about whose a request is, how urgent, and by when it is wanted.
//!
//! Names of llm-d and of the Gateway API inference extension are taken as aliases. One that is given twice, with
//! different values, is refused: nobody could say which holds.

use std::time::Duration;

use axum::http::{Extensions, HeaderMap};

use super::authorize::Caller;
use super::state::Gateway;
use crate::error::{ApiError, clip};
use crate::generate::Job;
use crate::traffic::{Ask, Tenant, Wishes};

/// Whose a request is.
const TENANT: [&str; 3] = [
    "x-foregate-tenant",
    "x-gateway-inference-fairness-id",
    "x-llm-d-inference-fairness-id",
];
/// Its priority, by a name.
const OBJECTIVE: [&str; 2] = [
    "x-gateway-inference-objective",
    "x-llm-d-inference-objective",
];
/// The whole answer within so many milliseconds.
const WHOLE: [&str; 1] = ["x-foregate-deadline-ms"];
/// The first token within so many milliseconds.
const FIRST: [&str; 3] = ["x-foregate-ttft-ms", "x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"];
/// Each further token within so many milliseconds, on average.
const PER_TOKEN: [&str; 3] = ["x-foregate-tpot-ms", "x-llm-d-slo-tpot-ms", "x-slo-tpot-ms"];
/// Longest name of a tenant or an objective.
const LONGEST: usize = foregate_api::limits::MAX_TENANT_NAME;
/// Longest time, a day.
const LONGEST_MS: f64 = 86_400_000.0;
/// Who neither shows a key nor says a name.
const ANONYMOUS: &str = "anonymous";

/// A header with its value.
type Named = (&'static str, String);

/// What a request's head says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Name of the API key that was shown.
    caller: Option<String>,
    tenant: Option<Named>,
    objective: Option<Named>,
    wishes: Wishes,
}

impl Wanted {
    /// Reads the head of a request.
    pub(super) fn of(headers: &HeaderMap, extensions: &Extensions) -> Result<Self, ApiError> {
        let caller = extensions.get::<Caller>();
        Ok(Self {
            caller: caller.map(|Caller(client)| client.to_string()),
            tenant: name(headers, &TENANT)?,
            objective: name(headers, &OBJECTIVE)?,
            wishes: Wishes {
                whole: time(headers, &WHOLE)?,
                first: time(headers, &FIRST)?,
                per_token: time(headers, &PER_TOKEN)?,
            },
        })
    }

    /// Whose the request is. Who shows a key is who it is, unless the key may speak for others.
    pub(super) fn tenant(&self, gateway: &Gateway) -> Result<Tenant, ApiError> {
        let name = match (&self.caller, &self.tenant) {
            (None, None) => ANONYMOUS,
            (None, Some((_, name))) => name,
            (Some(caller), None) => caller,
            (Some(caller), Some((_, name)))
                if name == caller || gateway.admission.speaks_for_others(caller) =>
            {
                name
            }
            (Some(caller), Some((header, _))) => {
                return Err(ApiError::invalid(
                    *header,
                    format!(
                        "this API key is of `{caller}` and may not speak for others: leave `{header}` out, or set \
                         speaksForOthers of its entry in spec.gateway.traffic.tenants"
                    ),
                ));
            }
        };
        Ok(gateway.admission.tenant(name))
    }

    /// The priority: that of the objective if one is named, else the field's.
    fn priority(&self, gateway: &Gateway, field: Option<i64>) -> Result<i64, ApiError> {
        let Some((header, name)) = &self.objective else {
            return Ok(field.unwrap_or(0));
        };
        let priority = gateway.admission.objective(name).map_err(|known| {
            let known = match known.is_empty() {
                true => "there are none".to_owned(),
                false => format!("there are {}", known.join(", ")),
            };
            ApiError::invalid(
                *header,
                format!(
                    "the objective `{}` is not known: {known}; name it in spec.gateway.traffic.objectives, or send `priority`",
                    clip(name, 100)
                ),
            )
        })?;
        match field {
            Some(other) if other != priority => Err(ApiError::invalid(
                "priority",
                format!(
                    "`priority` is {other}, and `{header}` says {priority}: send one of them"
                ),
            )),
            _ => Ok(priority),
        }
    }

    /// What the queue is asked for.
    pub(super) fn ask(
        &self,
        gateway: &Gateway,
        tenant: Tenant,
        job: &Job,
    ) -> Result<Ask, ApiError> {
        let choices = u32::try_from(job.choices()).unwrap_or(u32::MAX);
        let least = u64::from(job.generation.min_tokens.max(1));
        Ok(Ask {
            tenant,
            priority: self.priority(gateway, job.generation.priority)?,
            sequences: choices.clamp(1, gateway.config.max_in_flight),
            choices,
            prompt: job.prompts.iter().map(|prompt| prompt.len() as u64).sum(),
            answer: (least, u64::from(job.max_tokens).max(least)),
            arrived: gateway.admission.time(job.began),
            wishes: self.wishes,
        })
    }

    /// The end of a request's time, which is its client's if that is sooner.
    pub(super) fn limit(&self, job: &mut Job) {
        if let Some(end) = self
            .wishes
            .whole
            .and_then(|whole| job.began.checked_add(whole))
        {
            job.deadline = job.deadline.min(end);
        }
    }
}

/// The value of a header under any of its names.
fn one(headers: &HeaderMap, names: &[&'static str]) -> Result<Option<Named>, ApiError> {
    let mut found: Option<Named> = None;
    for &name in names {
        for value in headers.get_all(name) {
            let value = value.to_str().map(str::trim).map_err(|_| {
                ApiError::invalid(name, format!("`{name}` must be visible ASCII characters"))
            })?;
            match &found {
                Some((other, known)) if known != value => {
                    return Err(ApiError::invalid(
                        name,
                        format!(
                            "`{other}` and `{name}` say different things: send one of them"
                        ),
                    ));
                }
                _ => found = Some((name, value.to_owned())),
            }
        }
    }
    Ok(found)
}

fn name(headers: &HeaderMap, names: &[&'static str]) -> Result<Option<Named>, ApiError> {
    let found = one(headers, names)?;
    if let Some((header, value)) = &found {
        let fits = (1..=LONGEST).contains(&value.len());
        if !fits || !value.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ApiError::invalid(
                *header,
                format!("`{header}` must be 1 to {LONGEST} visible ASCII characters"),
            ));
        }
    }
    Ok(found)
}

fn time(headers: &HeaderMap, names: &[&'static str]) -> Result<Option<Duration>, ApiError> {
    let Some((header, value)) = one(headers, names)? else {
        return Ok(None);
    };
    match value.parse::<f64>() {
        Ok(ms) if ms > 0.0 && ms <= LONGEST_MS => {
            Ok(Some(Duration::from_secs_f64(ms / 1000.0)))
        }
        _ => Err(ApiError::invalid(
            header,
            format!(
                "`{header}` must be milliseconds above 0 and up to {LONGEST_MS}, not `{}`",
                clip(&value, 40)
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn of(pairs: &[(&'static str, &'static str)]) -> Result<Wanted, ApiError> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        Wanted::of(&headers, &Extensions::new())
    }

    #[test]
    fn aliases_say_the_same() {
        let ours = of(&[
            ("x-foregate-ttft-ms", "250"),
            ("x-foregate-tpot-ms", "12.5"),
        ])
        .unwrap();
        let theirs = of(&[("x-llm-d-slo-ttft-ms", "250"), ("x-slo-tpot-ms", "12.5")]).unwrap();
        assert_eq!(ours, theirs);
        assert_eq!(ours.wishes.first, Some(Duration::from_millis(250)));
        assert_eq!(ours.wishes.per_token, Some(Duration::from_micros(12_500)));
        let both = of(&[
            ("x-gateway-inference-fairness-id", "a"),
            ("x-llm-d-inference-fairness-id", "a"),
        ]);
        assert_eq!(both.unwrap().tenant.unwrap().1, "a");
        assert_eq!(of(&[]).unwrap(), Wanted::default());
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (pairs, param) in [
            (&[("x-foregate-tenant", "")][..], "x-foregate-tenant"),
            (&[("x-foregate-tenant", "two words")], "x-foregate-tenant"),
            (
                &[
                    ("x-foregate-tenant", "a"),
                    ("x-llm-d-inference-fairness-id", "b"),
                ],
                "x-llm-d-inference-fairness-id",
            ),
            (
                &[("x-foregate-tenant", "a"), ("x-foregate-tenant", "b")],
                "x-foregate-tenant",
            ),
            (
                &[("x-foregate-deadline-ms", "soon")],
                "x-foregate-deadline-ms",
            ),
            (&[("x-foregate-deadline-ms", "0")], "x-foregate-deadline-ms"),
            (
                &[("x-foregate-deadline-ms", "NaN")],
                "x-foregate-deadline-ms",
            ),
            (
                &[("x-foregate-deadline-ms", "1e99")],
                "x-foregate-deadline-ms",
            ),
            (&[("x-slo-ttft-ms", "-1")], "x-slo-ttft-ms"),
        ] {
            let error = of(pairs).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, Some(param))
            );
        }
    }
}
