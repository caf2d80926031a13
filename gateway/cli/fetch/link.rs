//! `foregate fetch`: brings a model of the hub into its cache, and links it to where the other containers of a pod look.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

use super::{FetchError, HubSettings, resolve};
use crate::error::{CliError, print};
use crate::progress::Progress;

/// Arguments of `foregate fetch`.
#[derive(Debug, clap::Args)]
pub(crate) struct FetchArgs {
    /// The model: hf://org/name[@revision], org/name, file://… or a directory.
    uri: String,
    /// Make this a symbolic link to the model's directory, in place of one that is there.
    #[arg(long, value_name = "PATH")]
    link: Option<PathBuf>,
}

/// Fetches, links, and prints the directory.
///
/// # Errors
/// What keeps the model from being had, or the link from being made.
pub(crate) async fn run(
    args: FetchArgs,
    progress: &Progress,
    drain: CancellationToken,
) -> Result<(), CliError> {
    let hub = HubSettings::from_environment();
    let fetched = tokio::select! {
        fetched = resolve(&args.uri, Path::new("."), &hub, progress) => fetched,
        () = drain.cancelled() => Err(FetchError::Stopped),
    };
    let directory = fetched.map_err(|error| CliError::Runtime(error.to_string()))?;
    if let Some(link) = &args.link {
        point(link, &directory)
            .map_err(|error| CliError::runtime(&format!("link {}", link.display()), &error))?;
    }
    print(&directory.to_string_lossy());
    Ok(())
}

/// A container that is started again finds the link of its predecessor.
fn point(link: &Path, to: &Path) -> std::io::Result<()> {
    match std::fs::symlink_metadata(link) {
        Ok(found) if found.is_symlink() => std::fs::remove_file(link)?,
        Ok(_) => return Err(ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    std::os::unix::fs::symlink(to, link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_replaced_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        std::fs::create_dir(&a).unwrap();
        std::fs::create_dir(&b).unwrap();
        let link = folder.path().join("link");
        for to in [&a, &b] {
            point(&link, to).unwrap();
            assert_eq!(&std::fs::read_link(&link).unwrap(), to);
        }
        assert!(point(&a, &b).is_err(), "a directory stays");
    }
}
