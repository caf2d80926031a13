//! The keys of one instance of a cluster.

use std::sync::Arc;
use std::time::Duration;

use foregate_api::tls::{TlsConfig, TlsRole};
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::ServerName;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::callers::Callers;
use crate::error::{Files, TlsError};
use crate::fresh::Fresh;
use crate::pem::{Named, certified, is_for};

/// What is spoken on a connection; both sides name it, so that one is not taken for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// gRPC: generation, and experts as data.
    Grpc,
    /// Rows between workers.
    Exchange,
}

impl Protocol {
    /// Its name in the handshake.
    const fn alpn(self) -> &'static [u8] {
        match self {
            Self::Grpc => b"h2",
            Self::Exchange => b"foregate-exchange/1",
        }
    }

    /// Who may call. All servers are workers.
    const fn callers(self) -> &'static [TlsRole] {
        match self {
            Self::Grpc => &TlsRole::ALL,
            Self::Exchange => &[TlsRole::Worker],
        }
    }
}

/// The keys of one instance. Clones share them.
#[derive(Clone)]
pub struct Keys(Arc<Inner>);

struct Inner {
    config: TlsConfig,
    /// Names of who may call over gRPC, and over the exchange.
    callers: [Vec<String>; 2],
    /// Who is called.
    worker: [String; 1],
    server_name: ServerName<'static>,
    fresh: Fresh<Configs>,
}

/// What handshakes are made with.
struct Configs {
    grpc: Sides,
    exchange: Sides,
}

struct Sides {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Keys").field(&self.0.config).finish()
    }
}

impl Keys {
    /// Reads the files of an instance of role `me`.
    ///
    /// # Errors
    /// When a file cannot be read, holds something else, or the certificate is not for `me`.
    pub fn open(config: &TlsConfig, me: TlsRole) -> Result<Self, TlsError> {
        let names = |protocol: Protocol| -> Vec<String> {
            let callers = protocol.callers().iter();
            callers.map(|role| role.name(&config.domain)).collect()
        };
        let worker = TlsRole::Worker.name(&config.domain);
        let maker = Maker {
            ca: Named::new("ca_file", &config.ca_file),
            cert: Named::new("cert_file", &config.cert_file),
            key: Named::new("key_file", &config.key_file),
            me: name(&me.name(&config.domain))?,
            grpc: parsed(&names(Protocol::Grpc))?,
            exchange: parsed(&names(Protocol::Exchange))?,
            provider: provider(),
        };
        let files = vec![maker.ca.clone(), maker.cert.clone(), maker.key.clone()];
        Ok(Self(Arc::new(Inner {
            config: config.clone(),
            callers: [names(Protocol::Grpc), names(Protocol::Exchange)],
            server_name: name(&worker)?,
            worker: [worker],
            fresh: Fresh::open(files, move |bytes| maker.make(bytes))?,
        })))
    }

    /// Waits for the caller's proof.
    ///
    /// # Errors
    /// When the caller is none of this cluster's, or not in time.
    pub async fn accept(
        &self,
        protocol: Protocol,
        stream: TcpStream,
        within: Duration,
    ) -> Result<server::TlsStream<TcpStream>, TlsError> {
        let handshake = TlsAcceptor::from(self.server(protocol)).accept(stream);
        let done = tokio::time::timeout(within, handshake).await;
        done.map_err(|_| TlsError::Slow(within))?
            .map_err(|error| self.explain_caller(protocol, error))
    }

    /// Proves itself to a worker, and has it prove that it is one of this cluster's.
    ///
    /// A worker that refuses this side's certificate says so after this side's part of the handshake is done: the
    /// first read fails then, and [`Self::explain_read`] says why.
    ///
    /// # Errors
    /// When it is none, or not in time.
    pub async fn connect(
        &self,
        protocol: Protocol,
        stream: TcpStream,
        within: Duration,
    ) -> Result<client::TlsStream<TcpStream>, TlsError> {
        let connector = TlsConnector::from(self.client(protocol));
        let handshake = connector.connect(self.server_name(), stream);
        let done = tokio::time::timeout(within, handshake).await;
        done.map_err(|_| TlsError::Slow(within))?
            .map_err(|error| self.explain_read(error))
    }

    /// The error of a read from a worker, in terms of the files.
    #[must_use]
    pub fn explain_read(&self, error: std::io::Error) -> TlsError {
        self.explain(error, &self.0.worker)
    }

    pub(crate) fn server(&self, protocol: Protocol) -> Arc<ServerConfig> {
        Arc::clone(&self.0.fresh.get().of(protocol).server)
    }

    pub(crate) fn client(&self, protocol: Protocol) -> Arc<ClientConfig> {
        Arc::clone(&self.0.fresh.get().of(protocol).client)
    }

    pub(crate) fn server_name(&self) -> ServerName<'static> {
        self.0.server_name.clone()
    }

    pub(crate) fn explain_caller(&self, protocol: Protocol, error: std::io::Error) -> TlsError {
        let [grpc, exchange] = &self.0.callers;
        self.explain(
            error,
            match protocol {
                Protocol::Grpc => grpc,
                Protocol::Exchange => exchange,
            },
        )
    }

    fn explain(&self, error: std::io::Error, names: &[String]) -> TlsError {
        let files = Files {
            ca_file: &self.0.config.ca_file,
            cert_file: Some(&self.0.config.cert_file),
            names,
        };
        TlsError::handshake(error, &files)
    }
}

impl Configs {
    const fn of(&self, protocol: Protocol) -> &Sides {
        match protocol {
            Protocol::Grpc => &self.grpc,
            Protocol::Exchange => &self.exchange,
        }
    }
}

/// Makes configurations of the files' bytes.
struct Maker {
    ca: Named,
    cert: Named,
    key: Named,
    me: ServerName<'static>,
    grpc: Vec<ServerName<'static>>,
    exchange: Vec<ServerName<'static>>,
    provider: Arc<CryptoProvider>,
}

impl Maker {
    fn make(&self, bytes: &[Vec<u8>]) -> Result<Configs, TlsError> {
        let [ca, cert, key] = bytes else {
            return Err(std::io::Error::from(std::io::ErrorKind::InvalidInput).into());
        };
        let roots = self.ca.authorities(ca)?;
        let mine = certified((&self.cert, cert), (&self.key, key), &self.provider)?;
        is_for(&self.cert, &mine, &self.me)?;
        let sides = |protocol: Protocol, callers: &[ServerName<'static>]| {
            Ok::<_, TlsError>(Sides {
                client: self.client(protocol, &roots, &mine)?,
                server: self.server(protocol, &roots, &mine, callers)?,
            })
        };
        Ok(Configs {
            grpc: sides(Protocol::Grpc, &self.grpc)?,
            exchange: sides(Protocol::Exchange, &self.exchange)?,
        })
    }

    fn client(
        &self,
        protocol: Protocol,
        roots: &Arc<RootCertStore>,
        mine: &Arc<CertifiedKey>,
    ) -> Result<Arc<ClientConfig>, TlsError> {
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_root_certificates(Arc::clone(roots))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(mine))));
        config.alpn_protocols = vec![protocol.alpn().to_vec()];
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    fn server(
        &self,
        protocol: Protocol,
        roots: &Arc<RootCertStore>,
        mine: &Arc<CertifiedKey>,
        callers: &[ServerName<'static>],
    ) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = Arc::clone(&self.provider);
        let authority = WebPkiClientVerifier::builder_with_provider(
            Arc::clone(roots),
            Arc::clone(&provider),
        )
        .build()
        .map_err(|error| TlsError::Peer {
            why: format!(
                "the authorities in {} cannot be used: {error}",
                self.ca.path
            ),
            source: rustls::Error::General(error.to_string()),
        })?;
        let callers = Callers {
            authority,
            names: callers.to_vec(),
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(Arc::new(callers))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(mine))));
        config.alpn_protocols = vec![protocol.alpn().to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

/// The cryptography, named here: a process with several has no default one.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

pub(crate) fn unusable(source: rustls::Error) -> TlsError {
    TlsError::Peer {
        why: "this build has no TLS 1.3".to_owned(),
        source,
    }
}

pub(crate) fn name(text: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(text.to_owned()).map_err(|_| TlsError::Name {
        name: text.to_owned(),
    })
}

fn parsed(names: &[String]) -> Result<Vec<ServerName<'static>>, TlsError> {
    names.iter().map(|text| name(text)).collect()
}
