//! Certificates of cert-manager: its own controllers issue them, by an authority of the namespace.

use std::path::Path;
use std::process::{Child, Command};

use foregate_harness::cluster::{Hermetic, ROLLOUT, awaited};
use serde_json::json;

use crate::load::{self, Load};
use crate::resources::{Resources, built};
use crate::site::{Site, is};
use crate::stage;

/// An authority that signs itself, and an issuer that issues by it.
const ISSUERS: &str = "
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {name: itself}
spec: {selfSigned: {}}
---
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {name: authority}
spec:
  isCA: true
  commonName: authority
  secretName: authority
  privateKey: {algorithm: ECDSA, size: 256}
  issuerRef: {name: itself}
---
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {name: ours}
spec: {ca: {secretName: authority}}
";

/// cert-manager at work in a namespace.
struct Issuing(Child);

impl Issuing {
    fn start(made: &Hermetic, program: &Path, namespace: &str) -> Self {
        let mut command = Command::new(program);
        command.arg(namespace).env("KUBECONFIG", made.kubeconfig());
        Self(made.in_network(|| command.spawn().unwrap()))
    }
}

impl Drop for Issuing {
    fn drop(&mut self) {
        if self.0.kill().and_then(|()| self.0.wait()).is_err() {
            println!("cert-manager was not ended");
        }
    }
}

/// Roles show each other what cert-manager issued, the operator keeps no authority beside it, and a certificate that is
/// issued anew under load costs no request.
#[test]
fn cert_manager_issues_what_roles_show_each_other() {
    let Some((cluster, made, _turn)) = stage::made() else {
        return;
    };
    let part = built("cert-manager");
    let _resources = Resources::install(cluster, &part.join("resources"));
    let site = Site::with_operator(
        cluster,
        "certificates",
        &json!({"certManager": {"enabled": true}}),
    );
    let _issuing = Issuing::start(made, &part.join("cert-manager"), &site.namespace.name);
    site.namespace.apply(ISSUERS);
    site.apply_tiny(|tiny| {
        tiny["spec"]["security"] = json!({"certManager": {"issuer": "ours"}})
    });
    site.await_settled(2);
    for role in ["worker", "gateway"] {
        let certificate = site
            .namespace
            .get("certificate.cert-manager.io", &format!("tiny-{role}-tls"));
        assert!(is(&certificate, "Ready"), "{certificate}");
        assert_eq!(issued(&site, role).0, authority(&site), "{role}");
    }
    let secrets = site.namespace.kubectl(&["get", "secrets", "-o", "name"]);
    assert!(!secrets.contains("tiny-authority"), "{secrets}");

    let url = site.url();
    let reference = load::reference(cluster, &url);
    let load = Load::start(cluster, &url);
    let before = issued(&site, "worker");
    let _printed = site
        .namespace
        .kubectl(&["delete", "secret", "tiny-worker-tls"]);
    awaited("another certificate of the workers", ROLLOUT, || {
        let secrets = site.namespace.kubectl(&["get", "secrets", "-o", "name"]);
        let there = secrets.contains("tiny-worker-tls") && issued(&site, "worker") != before;
        there.then_some(()).ok_or(secrets)
    });
    load.await_more(6);
    load.stop().assert_as(&reference);
    assert!(is(&site.moe(), "Ready"));
}

/// The authority that vouches for a role's certificate, and the certificate.
fn issued(site: &Site, role: &str) -> (String, String) {
    let secret = site.namespace.get("secret", &format!("tiny-{role}-tls"));
    let of = |key: &str| secret["data"][key].as_str().unwrap_or_default().to_owned();
    (of("ca.crt"), of("tls.crt"))
}

fn authority(site: &Site) -> String {
    let secret = site.namespace.get("secret", "authority");
    secret["data"]["tls.crt"].as_str().unwrap().to_owned()
}
