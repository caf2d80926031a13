//! The one place that reads the environment. Roles never do: they read their `NodeConfig`.

/// The value of a variable; `None` if it is unset, empty or not UTF-8.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the place the rule names: only the composition root reads the environment"
)]
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether a variable is set to something that means yes.
pub(crate) fn flag(name: &str) -> bool {
    variable(name).is_some_and(|value| {
        matches!(
            value.to_ascii_lowercase().as_str(),
            "1" | "true" | "yes" | "on"
        )
    })
}
