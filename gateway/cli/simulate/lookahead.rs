//! `foregate simulate lookahead`: the gateway's routing and the workers' expert caches on a token model, without a
//! cluster. The policies are the product's code; only workers and tokens are simulated.

mod arm;
mod cluster;
mod dice;
mod figures;
mod settings;
mod tokens;
mod traffic;

use std::path::PathBuf;

use arm::{Arm, PATIENCE, Policy};
use figures::Figures;
use settings::{Setting, Subject};
use traffic::Traffic;

/// Arguments of `foregate simulate lookahead`.
#[derive(Debug, clap::Args)]
pub(crate) struct LookaheadArgs {
    /// What is simulated.
    #[arg(long, value_enum)]
    setting: Setting,
    /// Policies, the first is the baseline.
    #[arg(long, value_delimiter = ',', default_value = "least,round-robin,prefix,band,ms:16,ms:64,label:64,placebo:64")]
    policies: Vec<Policy>,
    /// Seeds.
    #[arg(long, value_delimiter = ',', default_value = "0,1,2,3,4")]
    seeds: Vec<u64>,
    /// Write the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the plot as SVG to this file.
    #[arg(long)]
    svg: Option<PathBuf>,
}

pub(crate) fn try_run(args: &LookaheadArgs) {
    let Subject::Router(c) = args.setting.subject() else { return };
    let mut base: Vec<Figures> = Vec::new();
    let traffic: Vec<Traffic> = args.seeds.iter().map(|s| Traffic::new(c, *s)).collect();
    for t in &traffic { println!("corr {:.3} random {:.1}", t.correlation, t.random_batch); }
    for p in &args.policies {
        let runs: Vec<_> = traffic.iter().map(|t| {
            let profiles = match p { Policy::Label(_) => t.labels.clone(), Policy::Placebo(_) => { let n = t.profiles.len(); (0..n).map(|i| t.profiles[(i*337+11) % n].clone()).collect() }, _ => t.profiles.clone() };
            cluster::run(t, &profiles, c.slots, Arm::new(*p, t), PATIENCE)
        }).collect();
        let f: Vec<Figures> = runs.iter().map(Figures::of).collect();
        if base.is_empty() { base = f.clone(); }
        let m = Figures::mean(&f);
        print!("{:<12} b {:.1} D {:.1} per {:.2} tpot {:.2} wait {:.0} lat {:.0} old {:.0} |", p.to_string(), m.batch, m.distinct_experts, m.experts_per_token, m.time_per_token_ms_p50, m.wait_ms_p95, m.latency_ms_p95, m.oldest_wait_ms);
        for (n, of) in figures::COMPARED {
            let ch = figures::Change::of(base.iter().zip(&f).map(|(b, f)| (of(b), of(f))));
            if n.contains("p95") || n.contains("p50") || n.contains("dist") || n.contains("bytes") { print!(" {} {:+.1}[{:+.1},{:+.1}]", &n.replace("_ms",""), ch.mean, ch.lowest, ch.highest); }
        }
        println!(" ctl {:.3} off {:.1} dec {:.1}/{:.1} over {}", m.control_share, m.switch_offs, m.decision_us_p50, m.decision_us_p99, runs.iter().map(|r| r.overtaken).sum::<u32>());
        println!("   gain {:?} sep {:?} grouping {:?}", runs.iter().map(|r| r.gain.map(|g| (g*1000.0).round()/1000.0)).collect::<Vec<_>>(), runs.iter().map(|r| r.separation.map(|g| (g*1000.0).round()/1000.0)).collect::<Vec<_>>(), runs.iter().map(|r| r.grouping).collect::<Vec<_>>());
    }
}
