//! A pod without a certificate of the cluster cannot reach a worker, neither over gRPC nor over the exchange.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use foregate_api::ids::Rank;
use foregate_api::tls::{TlsConfig, TlsRole};
use foregate_tls::Keys;
use foregate_wire::connect::channel;
use foregate_wire::frame::{Frame, Hello, encode};
use foregate_wire::generation::GenerateRequest;
use foregate_wire::generation::generation_client::GenerationClient;
use foregate_wire::tonic::Code;
use serde_json::json;
use tempfile::TempDir;

use crate::site::Site;
use crate::stage;

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn who_has_no_certificate_of_the_cluster_reaches_no_worker() {
    let Some((cluster, made, _turn)) = stage::made() else {
        return;
    };
    let site = Site::with_operator(cluster, "strangers", &json!({}));
    site.apply_tiny(|_| {});
    site.await_settled(2);
    let pod = site.namespace.get("pod", "tiny-worker-0");
    let address = pod["status"]["podIP"].as_str().unwrap().to_owned();
    let files = TempDir::new().unwrap();
    let keys = gateway(&site, &files);
    let cluster_name = site.store_name();
    made.in_network(|| {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build().unwrap();
        let rpc = format!("{address}:7070");
        let refused = runtime.block_on(generate(&rpc, None));
        // The connection fails, in one of the words for that; which one depends on who closes first.
        let failed = [
            Code::Unavailable,
            Code::Unknown,
            Code::Internal,
            Code::Cancelled,
        ];
        assert!(failed.contains(&refused), "{refused:?}");
        // The same with the gateway's certificate: the worker looks at the request, and finds it wanting.
        let heard = runtime.block_on(generate(&rpc, Some(&keys)));
        assert_eq!(heard, Code::InvalidArgument);
        hello(&format!("{address}:7071"), &cluster_name);
    });
}

/// The gateway's keys, out of its Secret.
fn gateway(site: &Site, files: &TempDir) -> Keys {
    let file = |entry: &str| {
        let path = files.path().join(entry);
        let template = format!("go-template={{{{index .data \"{entry}\" | base64decode}}}}");
        let text =
            site.namespace
                .kubectl(&["get", "secret", "tiny-gateway-tls", "-o", &template]);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let config = TlsConfig {
        ca_file: file("ca.crt"),
        cert_file: file("tls.crt"),
        key_file: file("tls.key"),
        domain: format!("tiny.{}.foregate.internal", site.namespace.name),
    };
    Keys::open(&config, TlsRole::Gateway).unwrap()
}

/// How a worker answers a request without a prompt.
async fn generate(address: &str, keys: Option<&Keys>) -> Code {
    let mut client = GenerationClient::new(channel(address, keys).unwrap());
    let asked = client.generate(GenerateRequest::default());
    let answer = tokio::time::timeout(PATIENCE, asked).await.unwrap();
    answer.unwrap_err().code()
}

/// Says hello without a proof: no hello comes back.
fn hello(address: &str, cluster: &str) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let hello = Frame::Hello(Hello {
        cluster: cluster.to_owned(),
        rank: Rank(1),
        incarnation: 1,
    });
    let mut bytes = Vec::new();
    encode(&hello, &mut bytes).unwrap();
    stream.write_all(&bytes).unwrap();
    let mut answer = Vec::new();
    // An alert at most, then the end, or a reset.
    let _ended = stream.read_to_end(&mut answer);
    assert!(answer.len() < 16, "{answer:?}");
}
