//! A real etcd with a store over it.

use foregate_store::own_etcd::OwnEtcdError;
use foregate_store::{EtcdStore, OwnEtcd};

/// `None`: there is no etcd binary and none is required.
pub(crate) async fn start() -> Option<(OwnEtcd, EtcdStore)> {
    let etcd = match OwnEtcd::start().await {
        Ok(etcd) => etcd,
        Err(OwnEtcdError::Missing) if std::env::var("FOREGATE_E2E_REQUIRE").is_err() => {
            println!("skipped: no etcd binary");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    let store = EtcdStore::connect(&etcd.endpoints()).await.unwrap();
    Some((etcd, store))
}
