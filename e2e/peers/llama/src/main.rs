//! Speeds of llama.cpp on one GGUF file, as JSON on stdout, by the rules of `foregate bench engine`:
//! distinct random prompts, greedy answers, the best of some turns counts.
//!
//! `foregate-peer-llama FILE THREADS CONTEXT DECODE PREFILL TURNS SECONDS BATCH,… PROMPTS,…`

mod measure;

use std::process::ExitCode;
use std::str::FromStr;

use measure::Plan;

fn number<T: FromStr>(args: &[String], at: usize, name: &str) -> Result<T, String> {
    let text = args.get(at).ok_or(format!("{name} is missing"))?;
    text.parse()
        .map_err(|_| format!("{name} {text:?} is no number"))
}

fn list(args: &[String], at: usize, name: &str) -> Result<Vec<i32>, String> {
    let text = args.get(at).ok_or(format!("{name} is missing"))?;
    let one = |part: &str| {
        part.parse()
            .map_err(|_| format!("{name} {text:?} is no list"))
    };
    text.split(',').map(one).collect()
}

fn plan(args: &[String]) -> Result<Plan, String> {
    Ok(Plan {
        file: args.first().ok_or("FILE is missing")?.into(),
        threads: number(args, 1, "THREADS")?,
        context: number(args, 2, "CONTEXT")?,
        decode: number(args, 3, "DECODE")?,
        prefill: number(args, 4, "PREFILL")?,
        turns: number(args, 5, "TURNS")?,
        seconds: number(args, 6, "SECONDS")?,
        batches: list(args, 7, "BATCH")?,
        prompts: list(args, 8, "PROMPTS")?,
    })
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match plan(&args).and_then(|plan| measure::run(&plan)) {
        Ok(figures) => {
            println!("{figures:#}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
