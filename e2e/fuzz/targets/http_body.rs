//! Bodies of every POST of the gateway: any bytes give a request or an error that names a field.
#![no_main]

use foregate_gateway::http::{
    Defaults, parse_chat, parse_completions, parse_detokenize, parse_tokenize,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    drop(parse_chat(body, &Defaults::default()));
    drop(parse_completions(body, &Defaults::default()));
    drop(parse_tokenize(body));
    drop(parse_detokenize(body));
});
