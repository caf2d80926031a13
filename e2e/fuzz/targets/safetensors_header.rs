//! safetensors files and config.json: any bytes give tensors inside the file, or an error.
#![no_main]

use foregate_checkpoint::header::parse_header;
use foregate_checkpoint::spec;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    if let Ok(tensors) = parse_header(file) {
        for (name, entry) in tensors {
            assert!(file.get(entry.range).is_some(), "{name} lies outside the file");
        }
    }
    drop(spec::parse(file, None));
    drop(spec::parse(b"{}", Some(file)));
});
