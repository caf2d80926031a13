//! A listener whose callers prove themselves before a call of theirs is looked at.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use foregate_tls::{Keys, Protocol};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Connected, Router};

/// How long a caller may take to prove itself.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Most handshakes at a time. Further callers wait in the listener's backlog, each at most [`HANDSHAKE`] a turn.
const HANDSHAKES: usize = 128;
/// Proven connections that the server has not taken over yet; it takes them at once.
const PROVEN: usize = 16;
/// Pause after a failed accept (no descriptors left), so that the task does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub(super) async fn serve(
    router: Router,
    listener: TcpListener,
    keys: Keys,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let (proven, incoming) = mpsc::channel(PROVEN);
    let accepting = accept(listener, keys, proven, shutdown.clone());
    let serving = router.serve_with_incoming_shutdown(
        ReceiverStream::new(incoming),
        shutdown.cancelled_owned(),
    );
    let ((), served) = tokio::join!(accepting, serving);
    served
}

/// Accepts until `shutdown`, or until nobody takes connections over any more.
async fn accept(
    listener: TcpListener,
    keys: Keys,
    proven: mpsc::Sender<io::Result<Proven>>,
    shutdown: CancellationToken,
) {
    let mut handshakes = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            () = proven.closed() => return,
            Some(_) = handshakes.join_next() => continue,
            accepted = listener.accept(), if handshakes.len() < HANDSHAKES => accepted,
        };
        match accepted {
            Ok((stream, from)) => {
                let (keys, proven) = (keys.clone(), proven.clone());
                handshakes.spawn(async move {
                    match prove(&keys, stream).await {
                        // A server that is gone needs no callers.
                        Ok(stream) => drop(proven.send(Ok(stream)).await),
                        Err(error) => tracing::warn!(%from, %error, "grpc_caller_refused"),
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "grpc_accept_failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn prove(keys: &Keys, stream: TcpStream) -> Result<Proven, foregate_tls::TlsError> {
    stream.set_nodelay(true)?;
    let stream = keys.accept(Protocol::Grpc, stream, HANDSHAKE).await?;
    Ok(Proven(Box::new(stream)))
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection whose caller is one of the cluster's.
struct Proven(Box<dyn Stream>);

impl Connected for Proven {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Proven {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Proven {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}
