//! The cluster of `KUBECONFIG`. It may be somebody's: look first, and say what is about to be used.

use std::path::Path;
use std::process::Command;

use super::{Image, succeeded};

/// The oldest minor whose CRDs may have CEL rules.
const OLDEST_MINOR: u32 = 29;

/// Says which cluster it is and refuses one that should not be touched.
///
/// # Panics
/// If it does not answer, is too old, or already has Foregate's resources and `FOREGATE_E2E_REUSE` is not 1.
pub(super) fn check() {
    let context = kubectl(&["config", "current-context"]);
    let server = kubectl(&[
        "config",
        "view",
        "--minify",
        "-o",
        "jsonpath={.clusters[0].cluster.server}",
    ]);
    println!(
        "cluster of KUBECONFIG: context {}, {server}",
        context.trim()
    );
    let version: serde_json::Value =
        serde_json::from_str(&kubectl(&["get", "--raw", "/version"])).expect("JSON");
    let minor = version["minor"].as_str().and_then(parse_minor);
    assert!(
        minor.is_some_and(|minor| minor >= OLDEST_MINOR),
        "Kubernetes 1.{OLDEST_MINOR} or newer is needed, this is {version}"
    );
    let resources = kubectl(&["get", "crd", "-o", "name"]);
    assert!(
        reuse() || !resources.contains(".foregate.dev"),
        "the cluster of KUBECONFIG already has Foregate's resources, so somebody may use it; \
         set FOREGATE_E2E_REUSE=1 to test there all the same; those of an earlier run go with \
         `helm uninstall foregate-crds -n default`"
    );
}

/// Whether a cluster with Foregate's resources may be tested on.
pub(super) fn reuse() -> bool {
    std::env::var("FOREGATE_E2E_REUSE").is_ok_and(|value| value == "1")
}

/// Some providers write "29+".
fn parse_minor(text: &str) -> Option<u32> {
    text.trim_end_matches('+').parse().ok()
}

/// Runs `$FOREGATE_E2E_IMAGE_LOAD TAR NAME`. Without it images are assumed to be there.
pub(super) fn load(tar: &Path, name: &str) -> Image {
    let Some(hook) = std::env::var_os("FOREGATE_E2E_IMAGE_LOAD") else {
        return named(name, "");
    };
    // The hook is a command line of the person's own shell.
    let output = Command::new("sh")
        .arg("-c")
        .arg(format!("{} \"$@\"", hook.to_string_lossy()))
        .arg("hook")
        .arg(tar)
        .arg(name)
        .output()
        .expect("sh starts");
    named(name, &succeeded("FOREGATE_E2E_IMAGE_LOAD", output))
}

/// A line `image=REF` of the hook says under which name nodes find the image.
fn named(name: &str, printed: &str) -> Image {
    let given = printed.lines().find_map(|line| line.strip_prefix("image="));
    Image {
        reference: given.unwrap_or(name).to_owned(),
        pull_policy: if given.is_some() {
            "IfNotPresent"
        } else {
            "Never"
        },
    }
}

fn kubectl(arguments: &[&str]) -> String {
    let output = Command::new("kubectl").args(arguments).output();
    let output =
        output.unwrap_or_else(|error| panic!("KUBECONFIG is set, but kubectl: {error}"));
    succeeded(&format!("kubectl {arguments:?}"), output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_may_rename_the_image() {
        let renamed = named("localhost/a:1", "pushed\nimage=registry/a:1\n");
        assert_eq!(
            (renamed.reference.as_str(), renamed.pull_policy),
            ("registry/a:1", "IfNotPresent")
        );
        let kept = named("localhost/a:1", "loaded\n");
        assert_eq!(
            (kept.reference.as_str(), kept.pull_policy),
            ("localhost/a:1", "Never")
        );
    }

    #[test]
    fn minors_of_providers_are_read() {
        assert_eq!(parse_minor("36"), Some(36));
        assert_eq!(parse_minor("29+"), Some(29));
        assert_eq!(parse_minor("x"), None);
    }
}
