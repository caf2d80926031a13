//! A way from the tests to a port in the cluster.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;

use serde_json::Value;

use super::{Cluster, POD};

/// An address that leads to a port, as long as this lives.
#[derive(Debug)]
pub struct Forward {
    /// `host:port`.
    pub address: String,
    kubectl: Option<Child>,
}

impl Forward {
    /// The object's own address, in the network of the box.
    pub(super) fn direct(cluster: &Cluster, namespace: &str, what: &str, port: u16) -> Self {
        let text = cluster.kubectl(&["-n", namespace, "get", what, "-o", "json"]);
        let object: Value = serde_json::from_str(&text).expect("kubectl prints JSON");
        let address = ["/spec/clusterIP", "/status/podIP"]
            .iter()
            .find_map(|path| object.pointer(path)?.as_str());
        let address = address.unwrap_or_else(|| panic!("{what} has no address: {object}"));
        Self {
            address: format!("{address}:{port}"),
            kubectl: None,
        }
    }

    /// A port of this machine that kubectl forwards.
    pub(super) fn through_kubectl(namespace: &str, what: &str, port: u16) -> Self {
        let mut kubectl = Command::new("kubectl")
            .args(["-n", namespace, "port-forward", what, &format!(":{port}")])
            .stdout(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        let printed = kubectl.stdout.take().expect("its output is piped");
        let (tell, told) = channel();
        // It prints a line for each connection as well, which somebody has to read.
        let _reader = std::thread::spawn(move || {
            for line in BufReader::new(printed).lines().map_while(Result::ok) {
                if let Some(address) = address(&line) {
                    let _heard = tell.send(address);
                }
            }
        });
        let address = told.recv_timeout(POD);
        let forward = Self {
            address: address.clone().unwrap_or_default(),
            kubectl: Some(kubectl),
        };
        assert!(address.is_ok(), "kubectl forwards nothing to {what}");
        forward
    }
}

/// The local end in `Forwarding from 127.0.0.1:41234 -> 8000`.
fn address(line: &str) -> Option<String> {
    let (local, _) = line.strip_prefix("Forwarding from ")?.split_once(" -> ")?;
    local.starts_with("127.").then(|| local.to_owned())
}

impl Drop for Forward {
    fn drop(&mut self) {
        if let Some(kubectl) = &mut self.kubectl {
            let _ended = kubectl.kill();
            let _reaped = kubectl.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_local_end_is_read_from_what_kubectl_prints() {
        let line = "Forwarding from 127.0.0.1:41234 -> 8000";
        assert_eq!(address(line).as_deref(), Some("127.0.0.1:41234"));
        assert_eq!(address("Forwarding from [::1]:41234 -> 8000"), None);
        assert_eq!(address("Handling connection for 41234"), None);
    }
}
