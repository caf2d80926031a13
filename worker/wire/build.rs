//! Compiles the `.proto` files with protox (no `protoc` needed) into tonic stubs.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(
        ["generation.proto", "experts.proto", "sglang.proto"],
        ["proto"],
    )?;
    tonic_prost_build::configure()
        .bytes(".foregate.experts.v1.Chunk.data")
        .compile_fds(files)?;
    Ok(())
}
