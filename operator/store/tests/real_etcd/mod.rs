//! A real etcd, where there is one.

use foregate_store::OwnEtcd;
use foregate_store::own_etcd::OwnEtcdError;

/// What was started. `None`: there is no etcd binary and none is required.
pub(crate) fn found(started: Result<OwnEtcd, OwnEtcdError>) -> Option<OwnEtcd> {
    match started {
        Ok(etcd) => Some(etcd),
        Err(OwnEtcdError::Missing) if std::env::var("FOREGATE_E2E_REQUIRE").is_err() => {
            println!("skipped: no etcd binary");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
