//! A client of etcd.

use std::sync::Arc;
use std::time::Duration;

use foregate_api::tls::StoreTls;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::error::{Files, TlsError};
use crate::fresh::Fresh;
use crate::keys::{name, provider, unusable};
use crate::pem::{Named, certified};

/// A connection to a server that is believed.
pub type StoreStream = TlsStream<TcpStream>;

/// What etcd's servers are judged by, and what they are shown. Clones share it.
#[derive(Clone)]
pub struct StoreKeys(Arc<Inner>);

struct Inner {
    config: StoreTls,
    fresh: Fresh<ClientConfig>,
}

impl std::fmt::Debug for StoreKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("StoreKeys").field(&self.0.config).finish()
    }
}

impl StoreKeys {
    /// Reads the files.
    ///
    /// # Errors
    /// When one cannot be read or holds something else.
    pub fn open(config: &StoreTls) -> Result<Self, TlsError> {
        let ca = Named::new("ca_file", &config.ca_file);
        let client = config.client.as_ref().map(|client| {
            (
                Named::new("cert_file", &client.cert_file),
                Named::new("key_file", &client.key_file),
            )
        });
        let mut files = vec![ca.clone()];
        files.extend(
            client
                .iter()
                .flat_map(|(cert, key)| [cert.clone(), key.clone()]),
        );
        let make = move |bytes: &[Vec<u8>]| make(&ca, client.as_ref(), bytes);
        Ok(Self(Arc::new(Inner {
            config: config.clone(),
            fresh: Fresh::open(files, make)?,
        })))
    }

    /// Has the server at `host` prove that it is certified for that name.
    ///
    /// # Errors
    /// When it is not, or not in time.
    pub async fn connect(
        &self,
        host: &str,
        stream: TcpStream,
        within: Duration,
    ) -> Result<StoreStream, TlsError> {
        let connector = TlsConnector::from(self.0.fresh.get());
        let handshake = connector.connect(name(host)?, stream);
        let done = tokio::time::timeout(within, handshake).await;
        let done = done.map_err(|_| TlsError::Slow(within))?;
        done.map_err(|error| {
            let files = Files {
                ca_file: &self.0.config.ca_file,
                cert_file: self
                    .0
                    .config
                    .client
                    .as_ref()
                    .map(|client| client.cert_file.as_str()),
                names: &[host.to_owned()],
            };
            TlsError::handshake(error, &files)
        })
    }
}

fn make(
    ca: &Named,
    client: Option<&(Named, Named)>,
    bytes: &[Vec<u8>],
) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let lacking = || TlsError::from(std::io::Error::from(std::io::ErrorKind::InvalidInput));
    let roots = ca.authorities(bytes.first().ok_or_else(lacking)?)?;
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_root_certificates(roots);
    let mut config = match (client, bytes) {
        (None, _) => builder.with_no_client_auth(),
        (Some((cert, key)), [_, cert_bytes, key_bytes]) => {
            let mine = certified((cert, cert_bytes), (key, key_bytes), &provider)?;
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(mine)))
        }
        (Some(_), _) => return Err(lacking()),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}
