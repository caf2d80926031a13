//! Foregate on a real cluster: API server, scheduler, kubelets, containers. See e2e/cluster/README.md.
//!
//! Start reading at `site.rs`: a namespace with the charts and a `MoeCluster` in it. Figures and outputs that the docs
//! show go to the folder that `FOREGATE_E2E_RECORD` names, if it names one.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a failure here is the test's failure, which prints what it saw; its clock is the real one"
)]

mod autoscaling;
mod canary;
mod certificates;
mod coverage;
mod devices;
mod duties;
mod install;
mod load;
mod losses;
mod names;
mod nodes;
mod refusals;
mod resources;
mod rights;
mod routes;
mod scaling;
mod site;
mod stage;
mod stores;
mod strangers;
