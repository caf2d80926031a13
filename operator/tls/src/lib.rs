//! `foregate-tls`: who may speak with whom. Keys from files, connections that are proven on both sides.
//!
//! In: a [`TlsConfig`](foregate_api::tls::TlsConfig) or a [`StoreTls`](foregate_api::tls::StoreTls). Out: streams, for
//! tasks ([`Keys::accept`], [`Keys::connect`], [`StoreKeys::connect`]) and for threads ([`blocking`]). And who issues
//! certificates, for whoever keeps an authority ([`authority`]).
//!
//! Invariants:
//! - TLS 1.3 only, and no resumption: every connection is judged by the files as they are at its handshake. Files that
//!   have changed are read again then; unusable ones are complained about, and the last usable ones stay in use.
//! - A caller is let in if its certificate comes from a trusted authority *and* is for a role of this cluster that has
//!   business here ([`Protocol`]). A server is believed on the same terms.
//! - Every handshake has a deadline.
//! - Keys are never logged.
#![forbid(unsafe_code)]

pub mod authority;
pub mod blocking;
mod callers;
mod error;
mod fresh;
mod keys;
mod pem;
mod store;

pub use error::TlsError;
pub use keys::{Keys, Protocol};
pub use store::{StoreKeys, StoreStream};
