//! Connections to etcd over TLS.
//!
//! One connection at a time, to whichever endpoint answers, dialled anew when it is lost. The client of etcd has TLS of
//! its own, which reads keys once; here they are read again at each handshake when their files have changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use etcd_client::Channel;
use foregate_tls::{StoreKeys, StoreStream, TlsError};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::transport::{Endpoint, Uri};
use tower::service_fn;

use super::{CONNECT_ATTEMPT, Member, PING_INTERVAL, PING_TIMEOUT};
use crate::kv::StoreError;

/// A channel to the members of an etcd.
pub(super) fn channel(members: Vec<Member>, keys: StoreKeys) -> Result<Channel, StoreError> {
    let first = members.first().map(Member::authority).unwrap_or_default();
    // The connector does the TLS, so the scheme is that of what is inside.
    let endpoint = Endpoint::from_shared(format!("http://{first}"))
        .map_err(|error| StoreError::Refused(format!("etcd endpoint {first}: {error}")))?
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(false);
    let (members, turn): (Arc<[Member]>, _) = (members.into(), Arc::new(AtomicUsize::new(0)));
    let connect = move |_: Uri| {
        let (members, turn, keys) = (Arc::clone(&members), Arc::clone(&turn), keys.clone());
        async move { dial(&members, &turn, &keys).await.map(TokioIo::new) }
    };
    let channel = endpoint.connect_with_connector_lazy(service_fn(connect));
    Ok(Channel::Tonic(channel))
}

/// Tries the members one after the other, first the one after the last that was lost.
async fn dial(
    members: &[Member],
    turn: &AtomicUsize,
    keys: &StoreKeys,
) -> Result<StoreStream, TlsError> {
    let first = turn.fetch_add(1, Ordering::Relaxed);
    let mut last = TlsError::Slow(CONNECT_ATTEMPT);
    for at in 0..members.len() {
        let Some(member) = members.get((first + at) % members.len()) else {
            break;
        };
        let attempt = async {
            let stream = TcpStream::connect((member.host.as_str(), member.port)).await?;
            stream.set_nodelay(true)?;
            keys.connect(&member.host, stream, CONNECT_ATTEMPT).await
        };
        match timeout(CONNECT_ATTEMPT, attempt).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => {
                tracing::warn!(member = %member.authority(), %error, "etcd_not_reached");
                last = error;
            }
            Err(_) => last = TlsError::Slow(CONNECT_ATTEMPT),
        }
    }
    Err(last)
}
