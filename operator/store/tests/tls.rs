//! A real etcd that wants certificates.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "part of a test; the environment says whether a missing etcd is a failure"
)]

mod real_etcd;

use std::time::{Duration, SystemTime};

use foregate_api::tls::{ClientKeys, StoreTls};
use foregate_store::{EtcdStore, OwnEtcd, Store};
use foregate_tls::StoreKeys;
use foregate_tls::authority::{Authority, Issued, Validity};
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(60);

fn validity() -> Validity {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.unwrap().as_secs();
    Validity {
        from: now - 60,
        until: now + 3_600,
    }
}

/// An authority, and the files of a client that it certified.
struct Desk {
    stored: Issued,
    dir: TempDir,
}

impl Desk {
    fn new() -> Self {
        Self {
            stored: Authority::create("etcd", validity()).unwrap(),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn issue(&self, name: &str) -> Issued {
        let authority = Authority::open(&self.stored).unwrap();
        authority.issue(&[name.to_owned()], validity()).unwrap()
    }

    fn client(&self, trusts: &Self, shows: Option<Issued>) -> StoreTls {
        StoreTls {
            ca_file: self.file("ca.crt", &trusts.stored.cert),
            client: shows.map(|shows| ClientKeys {
                cert_file: self.file("tls.crt", &shows.cert),
                key_file: self.file("tls.key", &shows.key),
            }),
        }
    }
}

/// An etcd behind TLS, whose server is certified for 127.0.0.1; `None` if there is none and none is required.
async fn etcd(desk: &Desk) -> Option<OwnEtcd> {
    let server = desk.issue("127.0.0.1");
    let files = foregate_store::own_etcd::ServerFiles {
        ca: desk.file("server-ca.crt", &desk.stored.cert),
        cert: desk.file("server.crt", &server.cert),
        key: desk.file("server.key", &server.key),
        keys: StoreKeys::open(&desk.client(desk, Some(desk.issue("test")))).unwrap(),
    };
    real_etcd::found(OwnEtcd::start_proven(files).await)
}

#[tokio::test]
async fn only_who_proves_itself_uses_it_and_keys_change_under_way() {
    let (desk, elsewhere) = (Desk::new(), Desk::new());
    let Some(mut etcd) = etcd(&desk).await else {
        return;
    };
    let endpoints = etcd.endpoints();
    assert!(endpoints[0].starts_with("https://"));
    let client = Desk {
        stored: desk.stored.clone(),
        dir: tempfile::tempdir().unwrap(),
    };
    let keys = StoreKeys::open(&client.client(&desk, Some(client.issue("client")))).unwrap();
    let store = EtcdStore::connect_proven(&endpoints, Some(&keys), LONG)
        .await
        .unwrap();
    store.put("/t/a", "1".into(), None).await.unwrap();

    let short = Duration::from_secs(2);
    let strangers = Desk::new();
    for (who, tls) in [
        ("shows nothing", strangers.client(&desk, None)),
        (
            "is of another authority",
            strangers.client(&desk, Some(strangers.issue("client"))),
        ),
        (
            "does not believe the server",
            strangers.client(&elsewhere, Some(desk.issue("client"))),
        ),
    ] {
        let keys = StoreKeys::open(&tls).unwrap();
        let tried = EtcdStore::connect_proven(&endpoints, Some(&keys), short).await;
        assert!(tried.is_err(), "a client that {who} got in");
    }
    let plain = [endpoints[0].replace("https://", "http://")];
    assert!(EtcdStore::connect_within(&plain, short).await.is_err());

    // New keys for the client, then a lost connection: the next one is proven with them.
    client.client(&desk, Some(client.issue("client")));
    etcd.stop_keeping_data().await.unwrap();
    etcd.restart().await.unwrap();
    let found = tokio::time::timeout(LONG, async {
        loop {
            if let Ok(found) = store.get("/t/a").await {
                return found;
            }
        }
    });
    assert_eq!(found.await.unwrap().unwrap().value, "1");
}
