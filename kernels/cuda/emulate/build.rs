//! Compiles `../cu/*.cu` for the CPU, with `cpp/emulate.hpp` for CUDA's words.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let (kernels, engine) = (here.join("../cu"), here.join("cpp"));
    println!("cargo::rerun-if-changed={}", kernels.display());
    println!("cargo::rerun-if-changed={}", engine.display());
    let mut sources = files(&kernels, "cu");
    for name in ["words.cpp", "fibers.cpp", "table.cpp", "faults.cu"] {
        sources.push(engine.join(name));
    }
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .include(&engine)
        .include(&kernels)
        .define("FOREGATE_EMULATE", None)
        // What is fused is what the source says, as for the card.
        .flag("-ffp-contract=off")
        // A `.cu` file is C++ here; `#pragma unroll` means nothing.
        .flag("-xc++")
        .flag("-Wno-unknown-pragmas")
        // Whole models run on it, also in a build for debugging.
        .opt_level(2)
        .debug(false)
        .warnings(true)
        .extra_warnings(true)
        .files(sources)
        .compile("foregate_cuda_emulate");
}

fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == ending))
        .collect();
    files.sort();
    files
}
