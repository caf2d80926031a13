//! The images, built without Docker: what is in them, that the program runs in them as nobody in particular, and that the
//! Dockerfile says the same of its own.
//!
//! `FOREGATE_CUDA_PROGRAM` names a program that was built with `--features cuda`; without it the image for cards is tested with
//! the plain one, which differs only in the code for cards that it carries.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]
#![expect(
    clippy::disallowed_methods,
    reason = "the environment says which program the image for cards is tested with"
)]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use foregate_harness::{repository, skip};
use serde_json::Value;
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_foregate");
/// Inside an image.
const PROGRAM: &str = "/usr/local/bin/foregate";

/// An image that was built and unpacked.
struct Image {
    _folder: TempDir,
    root: PathBuf,
    config: Value,
    bytes: u64,
}

impl Image {
    /// With the demonstration model, as the Dockerfile has it.
    fn build(program: &str, cuda: bool) -> Self {
        let folder = TempDir::new().unwrap();
        let tar = folder.path().join("image.tar");
        let mut command = Command::new(repository(".ci/image/build"));
        if cuda {
            command.arg("--cuda");
        }
        command.args([program, "localhost/foregate:test"]).arg(&tar);
        let model = repository("e2e/models/demo");
        command.arg(format!("{}=/e2e/models/demo", model.display()));
        done(&mut command);
        let bytes = std::fs::metadata(&tar).unwrap().len();
        let open =
            |name: &str| done(Command::new("tar").arg("-xOf").arg(&tar).arg(name)).stdout;
        let manifest: Value = serde_json::from_slice(&open("manifest.json")).unwrap();
        assert_eq!(manifest[0]["RepoTags"][0], "localhost/foregate:test");
        let config =
            serde_json::from_slice(&open(manifest[0]["Config"].as_str().unwrap())).unwrap();
        let layer = folder.path().join("layer.tar");
        std::fs::write(&layer, open(manifest[0]["Layers"][0].as_str().unwrap())).unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        done(
            Command::new("tar")
                .arg("-xpf")
                .arg(&layer)
                .arg("-C")
                .arg(&root),
        );
        std::fs::remove_file(&layer).unwrap();
        std::fs::remove_file(&tar).unwrap();
        Self {
            _folder: folder,
            root,
            config,
            bytes,
        }
    }

    /// Runs the program inside, as the image's user and with its environment. `None`: only root can change the root.
    fn run(&self, arguments: &[&str]) -> Option<Output> {
        let root_user = done(Command::new("id").arg("-u")).stdout == b"0\n";
        if !root_user {
            skip("running a program inside an image needs root");
            return None;
        }
        let mut command = Command::new("chroot");
        command.arg(format!(
            "--userspec={}",
            self.config["config"]["User"].as_str().unwrap()
        ));
        command.arg(&self.root).arg(PROGRAM).args(arguments);
        command.env_clear().envs(self.environment());
        // `chroot` itself is found by ours.
        let output = command
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .output()
            .unwrap();
        Some(output)
    }

    fn environment(&self) -> BTreeMap<String, String> {
        let all = self.config["config"]["Env"].as_array().unwrap();
        let pair = |text: &Value| {
            let (name, value) = text.as_str().unwrap().split_once('=').unwrap();
            (name.to_owned(), value.to_owned())
        };
        all.iter().map(pair).collect()
    }

    /// What holds for every image.
    fn is_sound(&self) {
        let config = &self.config["config"];
        assert_eq!(config["User"], "65532:65532");
        assert_eq!(config["Entrypoint"], serde_json::json!([PROGRAM]));
        for wanted in [
            PROGRAM,
            "/etc/ssl/certs/ca-certificates.crt",
            "/etc/passwd",
            "/e2e/models/demo/config.json",
        ] {
            let path = self.root.join(wanted.trim_start_matches('/'));
            assert!(path.exists(), "no {wanted} in the image");
        }
        for unwanted in [
            "bin/sh",
            "usr/bin/sh",
            "bin/bash",
            "usr/bin/apt-get",
            "root",
        ] {
            assert!(
                !self.root.join(unwanted).exists(),
                "{unwanted} in the image"
            );
        }
        each_file(&self.root, &|path, mode| {
            assert_eq!(mode & 0o6000, 0, "{} takes rights", path.display());
            let writable = mode & 0o002 != 0 && path != self.root.join("tmp");
            assert!(!writable, "{} can be written by anybody", path.display());
            assert_ne!(mode & 0o004, 0, "{} is not readable", path.display());
        });
        let Some(output) = self.run(&["--version"]) else {
            return;
        };
        let version = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(version.starts_with("foregate "), "{version}");
    }
}

/// Runs to a good end.
fn done(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stderr}",
        output.status
    );
    output
}

fn each_file(folder: &Path, look: &dyn Fn(&Path, u32)) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.symlink_metadata().unwrap();
        look(&path, metadata.permissions().mode());
        if metadata.is_dir() {
            each_file(&path, look);
        }
    }
}

#[test]
fn the_image_for_processors_runs_and_has_no_more_than_it_needs() {
    let image = Image::build(BINARY, false);
    image.is_sound();
    assert!(!image.root.join("usr/local/lib/libnccl.so.2").exists());
    println!(
        "the image for processors: {} MiB (of a debug build)",
        image.bytes >> 20
    );
}

#[test]
fn the_image_for_cards_has_nccl_and_says_in_a_line_that_there_is_no_driver() {
    let nccl = Command::new(repository(".ci/nccl")).output().unwrap();
    if !nccl.status.success() {
        let why = String::from_utf8_lossy(&nccl.stderr);
        skip(&format!(
            "the image for cards: {}",
            why.lines().last().unwrap_or_default()
        ));
        return;
    }
    let built = std::env::var("FOREGATE_CUDA_PROGRAM").ok();
    let image = Image::build(built.as_deref().unwrap_or(BINARY), true);
    image.is_sound();
    let library = image.root.join("usr/local/lib/libnccl.so.2");
    let nccl = std::fs::metadata(&library).unwrap().len();
    println!(
        "the image for cards: {} MiB, {} MiB of them NCCL",
        image.bytes >> 20,
        nccl >> 20
    );
    if Path::new("/proc/driver/nvidia").exists() {
        // A chroot shows neither the node's driver nor that there is none.
        return;
    }
    let Some(output) = image.run(&["doctor", "--port", "0"]) else {
        return;
    };
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    let lines: Vec<&str> = report
        .lines()
        .filter(|line| line.contains("libcuda"))
        .collect();
    assert_eq!(lines.len(), 1, "one line about the driver:\n{report}");
    let nccl: Vec<&str> = report
        .lines()
        .filter(|line| line.contains("NCCL 2."))
        .collect();
    assert_eq!(nccl.len(), 1, "one line about NCCL:\n{report}");
    if built.is_some() {
        assert!(report.contains("sm_90a"), "code for cards:\n{report}");
    }
}

/// Instructions that stages have.
const KNOWN: [&str; 6] = ["COPY", "RUN", "ENV", "WORKDIR", "USER", "ENTRYPOINT"];

/// A stage of the Dockerfile.
struct Stage {
    name: String,
    from: String,
    instructions: Vec<(String, String)>,
}

/// The Dockerfile's stages in their order, and the ARGs before the first one with their defaults.
fn dockerfile() -> (BTreeMap<String, String>, Vec<Stage>) {
    let text = std::fs::read_to_string(repository("Dockerfile")).unwrap();
    // Comments first: they may stand between continued lines.
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .collect();
    let text = lines.join("\n").replace("\\\n", " ");
    let mut arguments = BTreeMap::new();
    let mut stages: Vec<Stage> = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let (word, rest) = line.split_once(' ').unwrap();
        let rest = rest.split_whitespace().collect::<Vec<_>>().join(" ");
        match (word, stages.last_mut()) {
            ("FROM", _) => {
                let (from, name) = rest.split_once(" AS ").unwrap();
                stages.push(Stage {
                    name: name.to_owned(),
                    from: from.to_owned(),
                    instructions: Vec::new(),
                });
            }
            ("ARG", None) => {
                let (name, default) = rest.split_once('=').unwrap();
                arguments.insert(format!("${{{name}}}"), default.to_owned());
            }
            (_, stage) => {
                assert!(
                    KNOWN.contains(&word),
                    "not an instruction that this file needs: {line}"
                );
                stage.unwrap().instructions.push((word.to_owned(), rest));
            }
        }
    }
    (arguments, stages)
}

#[test]
fn the_dockerfile_names_no_registry_and_only_what_is_there() {
    let (arguments, stages) = dockerfile();
    for (at, stage) in stages.iter().enumerate() {
        let earlier = |name: &str| stages.iter().take(at).any(|stage| stage.name == name);
        let from = arguments.get(&stage.from).unwrap_or(&stage.from);
        assert!(!from.contains('$'), "{from} has no default");
        let host = from.split_once('/').map_or("", |(host, _)| host);
        assert!(
            !host.contains(['.', ':']) && host != "localhost",
            "{from} names a registry"
        );
        assert!(
            earlier(from) || from == "scratch" || arguments.contains_key(&stage.from),
            "{from} is no earlier stage"
        );
        for (word, rest) in &stage.instructions {
            if let Some(from) = rest.strip_prefix("--from=") {
                let from = from.split(' ').next().unwrap();
                assert!(word == "COPY" && earlier(from), "{word} {rest}");
            }
            for script in rest
                .split(['"', '(', ')', ' ', '='])
                .filter(|text| text.starts_with(".ci/") || text.starts_with("kernels/"))
            {
                let mode = std::fs::metadata(repository(script))
                    .unwrap()
                    .permissions()
                    .mode();
                assert_ne!(mode & 0o111, 0, "{script} cannot be run");
            }
        }
    }
    let last = stages.last().unwrap();
    assert_eq!(last.name, "cpu", "what a build makes that is told nothing");
}

/// Both ways fill an image by the same rule; user, environment and entrypoint are said twice, and here held together.
#[test]
fn the_dockerfile_and_the_script_agree() {
    agree("cpu", false);
    agree("cuda", true);
}

fn agree(name: &str, cuda: bool) {
    let (_, stages) = dockerfile();
    let stage = stages.iter().find(|stage| stage.name == name).unwrap();
    assert_eq!(stage.from, "scratch");
    let of = |word: &str| -> Vec<&str> {
        let all = stage.instructions.iter().filter(|(found, _)| found == word);
        all.map(|(_, rest)| rest.as_str()).collect()
    };
    assert_eq!(of("COPY"), [format!("--from=build-{name} /image /")]);
    assert!(
        of("RUN").is_empty(),
        "nothing can run in a stage from scratch"
    );
    let folder = TempDir::new().unwrap();
    let tar = folder.path().join("image.tar");
    let mut build = Command::new(repository(".ci/image/build"));
    // Any file does for a library here.
    build.env("FOREGATE_NCCL_LIBRARY", "/etc/hosts");
    if cuda {
        build.arg("--cuda");
    }
    done(build.args(["/bin/true", "localhost/true:1"]).arg(&tar));
    let open = |name: &str| done(Command::new("tar").arg("-xOf").arg(&tar).arg(name)).stdout;
    let manifest: Value = serde_json::from_slice(&open("manifest.json")).unwrap();
    let config = open(manifest[0]["Config"].as_str().unwrap());
    let config: Value = serde_json::from_slice(&config).unwrap();
    let config = &config["config"];
    assert_eq!(config["Env"], serde_json::json!(of("ENV")), "{name}");
    assert_eq!(config["User"], serde_json::json!(of("USER")[0]), "{name}");
    assert_eq!(
        config["WorkingDir"],
        serde_json::json!(of("WORKDIR")[0]),
        "{name}"
    );
    let entrypoint: Value = serde_json::from_str(of("ENTRYPOINT")[0]).unwrap();
    assert_eq!(entrypoint, serde_json::json!([PROGRAM]));
}
