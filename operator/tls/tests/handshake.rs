//! Who is let in, who is not and what is said then; files that change under way.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test says what it expects by failing; its certificates are valid on the wall clock"
)]

mod desk;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use foregate_api::tls::TlsRole::{Gateway, Worker};
use foregate_tls::authority::Issued;
use foregate_tls::{Keys, Protocol, TlsError};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use desk::{DOMAIN, Desk};

/// Longest any single wait may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the callee and the caller of one connection say. The caller reads a byte that the callee wrote: a callee that
/// refuses says so after the caller's part of the handshake.
async fn meet(callee: &Keys, caller: &Keys, protocol: Protocol) -> [Result<(), TlsError>; 2] {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = callee.accept(protocol, stream, PATIENCE).await?;
        stream.write_all(b"x").await?;
        stream.shutdown().await?;
        Ok(())
    };
    let connect = async {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut stream = caller.connect(protocol, stream, PATIENCE).await?;
        let mut byte = [0];
        let read = stream.read_exact(&mut byte).await;
        read.map(drop).map_err(|error| caller.explain_read(error))
    };
    let (accepted, connected) = tokio::join!(accept, connect);
    [accepted, connected]
}

/// What the callee says of a caller that has no scruples about its own certificate.
async fn intruder(desk: &Desk, shown: Option<&Issued>, callee: &Keys) -> String {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(desk.authority().as_bytes()).unwrap())
        .unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match shown {
        None => builder.with_no_client_auth(),
        Some(shown) => {
            let cert = CertificateDer::from_pem_slice(shown.cert.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(shown.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(vec![cert], key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let name = ServerName::try_from(Worker.name(DOMAIN)).unwrap();
    let connect = async {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let mut stream = connector.connect(name, stream).await?;
        stream.read_u8().await
    };
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        callee
            .accept(Protocol::Grpc, stream, PATIENCE)
            .await
            .map(drop)
    };
    let (accepted, connected) = tokio::join!(accept, connect);
    assert!(connected.is_err());
    accepted.unwrap_err().to_string()
}

/// What the callee says of a caller that it refuses.
async fn refused(callee: &Keys, caller: &Keys, protocol: Protocol) -> String {
    let [accepted, connected] = meet(callee, caller, protocol).await;
    assert!(connected.is_err());
    accepted.unwrap_err().to_string()
}

#[tokio::test]
async fn those_of_one_cluster_meet_in_their_roles() {
    let desk = Desk::new();
    let (worker, gateway) = (desk.keys(Worker), desk.keys(Gateway));
    for (caller, protocol) in [
        (&gateway, Protocol::Grpc),
        (&worker, Protocol::Grpc),
        (&worker, Protocol::Exchange),
    ] {
        let [accepted, connected] = meet(&worker, caller, protocol).await;
        accepted.unwrap();
        connected.unwrap();
    }
    // A gateway has no rows to exchange.
    let said = refused(&worker, &gateway, Protocol::Exchange).await;
    assert!(said.contains(&format!("not for worker.{DOMAIN}")), "{said}");
    // Nobody calls a gateway.
    let [_, connected] = meet(&gateway, &worker, Protocol::Grpc).await;
    let said = connected.unwrap_err().to_string();
    assert!(said.contains("cluster or role"), "{said}");
}

#[tokio::test]
async fn strangers_are_refused_and_told_which_file_says_so() {
    let desk = Desk::new();
    let worker = desk.keys(Worker);

    // Another authority that issues the same names. The caller does not believe the worker either, and says so first.
    let elsewhere = Desk::new();
    let said = refused(&worker, &elsewhere.keys(Gateway), Protocol::Grpc).await;
    assert!(said.contains("refuses the certificate in"), "{said}");

    // Callers that believe any worker of this authority.
    for (shown, what) in [
        (None, "shows no certificate"),
        (
            Some(elsewhere.issued(Gateway)),
            "from none of the authorities in",
        ),
        // The same authority, another cluster.
        (
            Some(
                desk.of_cluster("other.default.foregate.internal")
                    .issued(Gateway),
            ),
            "not for gateway.tiny",
        ),
    ] {
        let said = intruder(&desk, shown.as_ref(), &worker).await;
        assert!(said.contains(what), "{said}");
    }
}

#[tokio::test]
async fn a_certificate_that_has_ended_is_refused() {
    let desk = Desk::new();
    let worker = desk.keys(Worker);
    let ended = desk.keys_until(Gateway, desk::now() - 60);
    let said = refused(&worker, &ended, Protocol::Grpc).await;
    assert!(said.contains("not valid at this time"), "{said}");
}

#[tokio::test]
async fn one_protocol_is_not_taken_for_the_other() {
    let desk = Desk::new();
    let worker = desk.keys(Worker);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        worker
            .accept(Protocol::Exchange, stream, PATIENCE)
            .await
            .map(drop)
    };
    let connect = async {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        worker
            .connect(Protocol::Grpc, stream, PATIENCE)
            .await
            .map(drop)
    };
    let (accepted, connected) = tokio::join!(accept, connect);
    assert!(accepted.is_err() && connected.is_err());
}

#[tokio::test]
async fn a_caller_without_tls_and_a_silent_one_are_refused() {
    let desk = Desk::new();
    let worker = desk.keys(Worker);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut plain = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    plain
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    let said = worker
        .accept(Protocol::Grpc, stream, PATIENCE)
        .await
        .unwrap_err();
    assert!(said.to_string().contains("does not speak TLS"), "{said}");

    let _silent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    let short = Duration::from_millis(20);
    let said = worker
        .accept(Protocol::Grpc, stream, short)
        .await
        .unwrap_err();
    assert!(matches!(said, TlsError::Slow(_)), "{said}");
    // The same on threads; one byte does not prolong it.
    let mut slow = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    slow.write_all(&[22]).unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    let stream = stream.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    let said = worker
        .accept_blocking(Protocol::Exchange, stream, short)
        .unwrap_err();
    assert!(matches!(said, TlsError::Slow(_)), "{said}");
}

#[tokio::test]
async fn files_are_read_again_when_they_have_changed() {
    let desk = Desk::new();
    let (worker, gateway) = (desk.keys(Worker), desk.keys(Gateway));
    let [accepted, _] = meet(&worker, &gateway, Protocol::Grpc).await;
    accepted.unwrap();

    // A new authority; first everybody trusts both, then has a certificate of the new one, then trusts only that.
    let next = Desk::successor();
    desk.trust(&[&desk, &next]);
    let [accepted, connected] = meet(&worker, &gateway, Protocol::Grpc).await;
    accepted.unwrap();
    connected.unwrap();
    desk.write(Gateway, &next.issued(Gateway));
    let [accepted, connected] = meet(&worker, &gateway, Protocol::Grpc).await;
    accepted.unwrap();
    connected.unwrap();
    desk.write(Worker, &next.issued(Worker));
    desk.trust(&[&next]);
    let [accepted, connected] = meet(&worker, &gateway, Protocol::Grpc).await;
    accepted.unwrap();
    connected.unwrap();
    // Who still has one of the old authority is out.
    let late = desk.keys_of(Gateway, &desk.issued(Gateway));
    let said = refused(&worker, &late, Protocol::Grpc).await;
    assert!(said.contains("from none of the authorities"), "{said}");
}

#[tokio::test]
async fn half_a_change_leaves_the_last_usable_keys_in_use() {
    let desk = Desk::new();
    let (worker, gateway) = (desk.keys(Worker), desk.keys(Gateway));
    // The certificate is new, the key is still the old one.
    desk.write_file(Gateway, "tls.crt", &desk.issued(Gateway).cert);
    for _ in 0..2 {
        let [accepted, connected] = meet(&worker, &gateway, Protocol::Grpc).await;
        accepted.unwrap();
        connected.unwrap();
    }
}

#[test]
fn files_that_cannot_be_used_are_named_with_what_helps() {
    let desk = Desk::new();
    let open = |change: fn(&Desk)| {
        let config = desk.config(Worker);
        desk.write(Worker, &desk.issued(Worker));
        desk.trust(&[&desk]);
        change(&desk);
        Keys::open(&config, Worker).unwrap_err().to_string()
    };
    type Change = fn(&Desk);
    let cases: [(&str, &str, Change); 6] = [
        ("cert_file", "is not for worker.tiny", |desk| {
            desk.write(Worker, &desk.issued(Gateway));
        }),
        ("key_file", "is not the key of the certificate", |desk| {
            desk.write_file(Worker, "tls.key", &desk.issued(Worker).key);
        }),
        ("key_file", "holds no private key", |desk| {
            desk.write_file(Worker, "tls.key", &desk.issued(Worker).cert);
        }),
        ("cert_file", "holds no certificate", |desk| {
            desk.write_file(Worker, "tls.crt", "hello");
        }),
        ("ca_file", "holds no certificate", |desk| desk.trust(&[])),
        ("ca_file", "cannot be read", |desk| {
            desk.forget_authorities()
        }),
    ];
    for (field, what, change) in cases {
        let said = open(change);
        assert!(said.starts_with(&format!("tls.{field}: ")), "{said}");
        assert!(said.contains(what), "{said}");
        assert!(!said.contains("PRIVATE KEY-----\nM"), "a key is told");
    }
}

/// Both directions at once, more than the sockets hold, in pieces of all sizes.
#[test]
fn halves_carry_both_directions_at_once() {
    const BYTES: usize = 8 << 20;
    let desk = Desk::new();
    let keys = desk.keys(Worker);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let pattern = |seed: usize| -> Vec<u8> {
        (0..BYTES)
            .map(|at| ((at * 31 + at / 255 + seed) % 251) as u8)
            .collect()
    };
    thread::scope(|scope| {
        let one = scope.spawn(|| {
            let stream = TcpStream::connect(address).unwrap();
            keys.connect_blocking(Protocol::Exchange, stream, PATIENCE)
                .unwrap()
        });
        let (stream, _) = listener.accept().unwrap();
        let two = keys
            .accept_blocking(Protocol::Exchange, stream, PATIENCE)
            .unwrap();
        for (seed, (mut reading, mut writing)) in
            [one.join().unwrap(), two].into_iter().enumerate()
        {
            reading.set_read_timeout(Some(PATIENCE)).unwrap();
            writing.set_write_timeout(Some(PATIENCE)).unwrap();
            scope.spawn(move || {
                let bytes = pattern(seed);
                let (mut at, mut piece) = (0, 1);
                while at < BYTES {
                    let end = BYTES.min(at + piece);
                    writing.write_all(&bytes[at..end]).unwrap();
                    (at, piece) = (end, piece * 3 % 1_000_003);
                }
            });
            scope.spawn(move || {
                let mut bytes = vec![0; BYTES];
                reading.read_exact(&mut bytes).unwrap();
                assert!(bytes == pattern(1 - seed), "bytes differ");
            });
        }
    });
}
