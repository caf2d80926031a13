//! Ranks that take requests, ranks that hold experts, and the same tokens; the plugin of kubectl says why experts are where
//! they are.

use foregate_harness::repository;
use serde_json::json;

use crate::load;
use crate::site::{Site, record};
use crate::stage;

#[test]
fn ranks_of_one_duty_serve_together() {
    let Some((cluster, _turn)) = stage::cluster() else {
        return;
    };
    let site = Site::with_operator(cluster, "duties", &json!({}));
    site.apply_tiny(|_| {});
    site.await_settled(2);
    let reference = load::reference(cluster, &site.url());

    // Rank 0 takes requests only, rank 1 holds experts only, rank 2 does both.
    let divided =
        json!({"spec": {"workers": {"count": 3, "attentionOnly": 1, "expertOnly": 1}}});
    let _printed = site.namespace.kubectl(&[
        "patch",
        "moe/tiny",
        "--type=merge",
        "-p",
        &divided.to_string(),
    ]);
    site.await_settled(3);
    let parallelism = site.moe()["status"]["parallelism"].clone();
    assert_eq!(parallelism["attentionRanks"], 2, "{parallelism}");
    assert_eq!(parallelism["expertRanks"], 2, "{parallelism}");
    let homes = site.namespace.get("moep", "tiny")["status"]["homes"].clone();
    let holders: Vec<_> = homes
        .as_array()
        .unwrap()
        .iter()
        .map(|home| &home["rank"])
        .collect();
    assert_eq!(holders, [&json!(1), &json!(2)], "{homes}");
    assert_eq!(load::reference(cluster, &site.url()), reference);

    for question in ["last", "next"] {
        let plugin = repository("charts/kubectl-foregate");
        let mut command = cluster.command(plugin.to_str().unwrap());
        let output = command
            .args(["-n", &site.namespace.name, "tiny", "explain", question])
            .output()
            .unwrap();
        let (said, failed) = (
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        );
        assert!(
            output.status.success(),
            "{question}: {}\n{failed}",
            output.status
        );
        assert!(said.to_lowercase().contains("epoch "), "{question}: {said}");
        record(&format!("plugin-{question}.txt"), &said);
    }
}
