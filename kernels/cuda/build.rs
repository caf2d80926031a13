//! With feature `cuda`: one fatbin per file `cu/*.cu`, made by nvcc, and a list of them for `src/fatbins.rs`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

/// Code for these cards, and for what comes after them the portable form.
const TARGETS: [&str; 3] = [
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100a,code=sm_100a",
    "arch=compute_80,code=[sm_80,compute_80]",
];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    match fatbins() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("cargo::error={why}");
            ExitCode::FAILURE
        }
    }
}

fn fatbins() -> Result<(), String> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("no manifest folder")?);
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no output folder")?);
    for name in ["NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=cu");
    let nvcc = nvcc().ok_or(
        "feature `cuda` needs nvcc 13.0: set NVCC, or CUDA_HOME, or put it on PATH \
         (`make cuda` fetches one)",
    )?;
    let mut list = String::from("&[\n");
    for family in families(&root.join("cu"))? {
        let name = family
            .file_stem()
            .and_then(|s| s.to_str())
            .ok_or("odd file name")?;
        let fatbin = out.join(name).with_extension("fatbin");
        compile(&nvcc, &family, &fatbin)?;
        writeln!(
            list,
            "Fatbin {{ family: {name:?}, bytes: include_bytes!({fatbin:?}) }},"
        )
        .map_err(|e| e.to_string())?;
    }
    list.push(']');
    fs::write(out.join("fatbins.rs"), list).map_err(|e| format!("list of fatbins: {e}"))
}

/// `NVCC`, then that of `CUDA_HOME`, then that of `PATH`.
fn nvcc() -> Option<PathBuf> {
    if let Some(named) = env::var_os("NVCC") {
        return Some(named.into());
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    home.into_iter()
        .chain(env::split_paths(&path))
        .map(|folder| folder.join("nvcc"))
        .find(|file| file.is_file())
}

fn families(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    files.sort();
    Ok(files)
}

fn compile(nvcc: &Path, family: &Path, fatbin: &Path) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    // No fused multiply-add but those that are written: a kernel's arithmetic is what its source says.
    command.args(["-std=c++17", "-O3", "-fmad=false", "-fatbin"]);
    command.args(["-Werror", "all-warnings"]);
    for target in TARGETS {
        command.args(["-gencode", target]);
    }
    command.arg("-o").arg(fatbin).arg(family);
    let output = command
        .output()
        .map_err(|e| format!("{}: {e}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).replace('\n', " | ");
    Err(format!(
        "{} of {}: {text}",
        nvcc.display(),
        family.display()
    ))
}
