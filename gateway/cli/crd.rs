//! `foregate crd`: the custom resources, as they are installed. The chart `foregate-crds` carries the same text.

use crate::error::{CliError, print};

/// Prints all definitions as YAML documents.
///
/// # Errors
/// If a definition cannot be made or written.
pub(crate) fn run() -> Result<(), CliError> {
    let failed = |error: &dyn std::error::Error| CliError::runtime("custom resources", error);
    let definitions = foregate_crd::definitions().map_err(|error| failed(&error))?;
    for definition in definitions {
        let text = serde_yaml_ng::to_string(&definition).map_err(|error| failed(&error))?;
        print(&format!("---\n{}", text.trim_end()));
    }
    Ok(())
}
