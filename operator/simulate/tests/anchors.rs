//! The loads and the judge against figures that an earlier simulator, written apart from this one in Python, gave on
//! loads of the same distribution (other random numbers): means over seeds must agree within the spread of seeds.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use foregate_planner::{Cover, Settings};
use foregate_simulate::{
    Case, Device, Document, Figures, Forecast, Policy, Regime, Shape, Watch, document, run,
};

/// No clock: times are not looked at.
struct Still;

impl Watch for Still {
    fn micros(&self) -> f64 {
        0.0
    }
    fn step(&self) {}
}

fn simulate(setting: &str, regime: Regime, policies: &[Policy], seeds: u64) -> Document {
    foretold(setting, regime, policies, seeds, Forecast::Off)
}

fn foretold(
    setting: &str,
    regime: Regime,
    policies: &[Policy],
    seeds: u64,
    forecast: Forecast,
) -> Document {
    let case = Case {
        shape: Shape::named(setting).unwrap(),
        regime,
        steps: 20,
        policies: policies.to_vec(),
        settings: Settings::default(),
        cover: Cover::default(),
        forecast,
        device: Device::named("h200").unwrap(),
    };
    let outcomes: Vec<_> = (0..seeds)
        .map(|seed| run(&case, seed, &Still).unwrap())
        .collect();
    document(&case, &outcomes)
}

fn of(document: &Document, policy: Policy) -> Figures {
    let found = document
        .policies
        .iter()
        .find(|own| own.name == policy.name());
    found.unwrap().figures
}

fn near(what: &str, found: f64, wanted: f64, by: f64) {
    assert!(
        (found - wanted).abs() <= by,
        "{what}: {found}, wanted {wanted} ± {by}"
    );
}

#[test]
fn the_main_setting_under_moderate_drift() {
    let policies = [Policy::InOrder, Policy::Eplb10];
    // A single seed is off by up to three hundredths, three by one; the bands are those of three.
    let document = simulate("dsv3-64g", Regime::Moderate, &policies, 10);
    let [order, eplb] = policies.map(|policy| of(&document, policy));
    near("eplb-10 even", eplb.even.mean, 0.868, 0.012);
    near("eplb-10 split", eplb.split.mean, 0.915, 0.012);
    near("eplb-10 copies", eplb.copies_share, 0.487, 0.01);
    near("in order", order.even.mean, 0.463, 0.02);
}

#[test]
fn renamed_ranks_keep_a_quarter_of_the_copies_and_the_balance() {
    let policies = [Policy::Eplb10, Policy::Eplb10Renamed];
    let document = simulate("dsv3-64g", Regime::Moderate, &policies, 1);
    let [plain, renamed] = policies.map(|policy| of(&document, policy));
    near("copies", renamed.copies_share, 0.376, 0.01);
    near("even", renamed.even.mean, plain.even.mean, 0.001);
    near("split", renamed.split.mean, plain.split.mean, 0.001);
}

#[test]
fn the_main_setting_under_strong_drift() {
    let document = simulate("dsv3-64g", Regime::Strong, &[Policy::Eplb10], 3);
    let eplb = of(&document, Policy::Eplb10);
    near("eplb-10 split", eplb.split.mean, 0.723, 0.03);
}

#[test]
fn coarse_experts_on_eight_ranks() {
    let policies = [Policy::Eplb10, Policy::ConnectedLazy];
    let document = simulate("mixtral-8g", Regime::Moderate, &policies, 3);
    let eplb = of(&document, Policy::Eplb10);
    near("eplb-10 even", eplb.even.mean, 0.937, 0.012);
    near("eplb-10 split", eplb.split.mean, 0.937, 0.012);
    near("eplb-10 copies", eplb.copies_share, 0.082, 0.06);
    // Two slots link eight ranks, and a split levels what hangs together.
    let ours = of(&document, Policy::ConnectedLazy);
    assert!(ours.split.mean > 0.998, "{ours:?}");
    near("components", ours.components, 1.0, 1e-9);
}

#[test]
fn homes_planned_afresh_in_each_step_follow_any_drift_at_any_price() {
    let policies = [Policy::ConnectedStep, Policy::ConnectedLazy];
    let document = simulate("qwen3-32g", Regime::Strong, &policies, 1);
    let [step, lazy] = policies.map(|policy| of(&document, policy));
    assert!(
        step.split.mean > lazy.split.mean + 0.01,
        "{step:?} {lazy:?}"
    );
    assert!(step.split.p5 > lazy.split.p5, "{step:?} {lazy:?}");
    // Each plan is made without the one before.
    assert!(
        step.copies_share > 1.0 && lazy.copies_share < 0.15,
        "{step:?} {lazy:?}"
    );
    near("components", step.components, 1.0, 1e-9);
}

#[test]
fn a_step_that_is_known_is_planned_for_and_the_others_hear_nothing_of_it() {
    let policies = [Policy::EplbStep, Policy::ConnectedLazy];
    let by = |forecast| {
        let document = foretold("qwen3-32g", Regime::Strong, &policies, 1, forecast);
        policies.map(|policy| of(&document, policy))
    };
    let [[eplb, off], [same, exact]] = [by(Forecast::Off), by(Forecast::Exact)];
    assert!(
        exact.fixed.mean > off.fixed.mean + 0.02,
        "{exact:?} {off:?}"
    );
    assert!(
        exact.split.mean > off.split.mean + 0.01,
        "{exact:?} {off:?}"
    );
    near(
        "split of who hears nothing",
        same.split.mean,
        eplb.split.mean,
        1e-12,
    );
}

#[test]
fn the_same_seed_gives_the_same_document_and_others_do_not() {
    let policies = [Policy::ConnectedLazy];
    let text = |regime| {
        let document = simulate("mixtral-8g", regime, &policies, 2);
        serde_json::to_string(&document).unwrap()
    };
    assert_eq!(text(Regime::Moderate), text(Regime::Moderate));
    assert_ne!(text(Regime::Moderate), text(Regime::Strong));
}
