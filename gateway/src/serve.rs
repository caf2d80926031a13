//! Connections: how many there are, and how long one may keep the gateway waiting.
//!
//! A connection that does nothing costs a socket, and one whose client reads nothing holds the permit of its
//! request. Both end by a clock here, so that no client can hold what it does not use.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::http::HeaderValue;
use axum::http::header::CONNECTION;
use axum::middleware::map_response;
use axum::response::Response;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

/// Longest time from the opening of a connection, or from its last answer, to the end of a request's
/// headers. Load balancers keep idle connections for 60 s and send the next request on them: an end before
/// theirs would meet that request on its way.
const HEADERS: Duration = Duration::from_secs(75);
/// Longest time in which a client takes no byte of what waits for it.
const STALL: Duration = Duration::from_secs(60);
/// Connections beyond those that all admitted requests need: idle ones, probes, scrapes.
const SPARE: usize = 1024;
/// Pause after the system refused a connection, most likely because the process has no file to spare.
const REFUSED: Duration = Duration::from_secs(1);

/// What connections may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at a time; further ones wait in the system's queue.
    connections: usize,
    /// See [`HEADERS`].
    headers: Duration,
    /// See [`STALL`].
    stall: Duration,
}

impl Limits {
    /// For so many requests at a time, at work and waiting.
    #[must_use]
    pub const fn for_requests(requests: usize) -> Self {
        Self {
            connections: requests.saturating_add(SPARE),
            headers: HEADERS,
            stall: STALL,
        }
    }
}

/// The two steps of an end.
#[derive(Debug, Clone)]
pub struct End {
    /// No new connection is taken, and every answer ends its connection. A request that comes on a connection that is
    /// already there is still served: its client could not know.
    pub leaving: CancellationToken,
    /// Connections are closed after the answer that is under way; those without one at once.
    pub closing: CancellationToken,
}

impl End {
    /// Both steps in one: for servers whose clients can ask again.
    #[must_use]
    pub fn at_once(told: CancellationToken) -> Self {
        Self {
            leaving: told.clone(),
            closing: told,
        }
    }
}

/// Serves until the end, and returns when the last answer is written. Dropping it cuts every connection.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, end: End) {
    let leaving = end.leaving.clone();
    let router = router.layer(map_response(move |mut answer: Response| {
        if leaving.is_cancelled() {
            let close = HeaderValue::from_static("close");
            answer.headers_mut().insert(CONNECTION, close);
        }
        std::future::ready(answer)
    }));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = end.leaving.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < limits.connections => {
                match accepted {
                    Ok((stream, _)) => {
                        let router = router.clone();
                        connections.spawn(connection(stream, router, limits, end.closing.clone()));
                    }
                    Err(error) if of_the_client(&error) => {}
                    Err(error) => {
                        tracing::error!(%error, "a connection could not be taken");
                        // The next one would fail the same way at once.
                        tokio::select! {
                            () = end.leaving.cancelled() => break,
                            () = sleep(REFUSED) => {}
                        }
                    }
                }
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// The client left before it was taken; the next one is not affected.
fn of_the_client(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}

async fn connection(
    stream: TcpStream,
    router: Router,
    limits: Limits,
    closing: CancellationToken,
) {
    // A token's event is smaller than a segment: it must not wait for the next one.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "events may come late on this connection");
    }
    let io = TokioIo::new(Socket::new(stream, limits.stall));
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.headers);
    let mut served = pin!(builder.serve_connection(io, TowerToHyperService::new(router)));
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = closing.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection was cut");
    }
}

/// A socket that fails when its peer takes nothing for too long. The system alone would wait for ever: a
/// peer that is alive and reads nothing is no broken connection to it.
struct Socket {
    stream: TcpStream,
    patience: Duration,
    /// When the writing that waits will have failed.
    gives_up: Option<Pin<Box<Sleep>>>,
}

impl Socket {
    const fn new(stream: TcpStream, patience: Duration) -> Self {
        Self {
            stream,
            patience,
            gives_up: None,
        }
    }

    /// The outcome of a write, or the end of the patience with it.
    fn judge(
        &mut self,
        written: Poll<io::Result<usize>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.gives_up = None;
            return written;
        }
        let patience = self.patience;
        let gives_up = self
            .gives_up
            .get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + patience)));
        ready!(gives_up.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client does not read",
        )))
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.judge(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.judge(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::body::{Body, Bytes};
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::Barrier;
    use tokio::time::timeout;

    use super::*;

    const SHORT: Duration = Duration::from_millis(100);
    const LONG: Duration = Duration::from_secs(240);
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

    const LIMITS: Limits = Limits {
        connections: 8,
        headers: LONG,
        stall: LONG,
    };

    /// A server that ends with the returned tasks.
    async fn start(router: Router, limits: Limits) -> (SocketAddr, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, router, limits, end()));
        (address, tasks)
    }

    fn end() -> End {
        End {
            leaving: CancellationToken::new(),
            closing: CancellationToken::new(),
        }
    }

    /// In one go: the server, on the same thread, finds the connection with all its bytes.
    fn send(address: SocketAddr, bytes: &[u8]) -> TcpStream {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        io::Write::write_all(&mut stream, bytes).unwrap();
        stream.set_nonblocking(true).unwrap();
        TcpStream::from_std(stream).unwrap()
    }

    async fn rest(stream: &mut TcpStream) -> String {
        let mut text = String::new();
        let read = stream.read_to_string(&mut text);
        timeout(LONG / 2, read).await.unwrap().unwrap();
        text
    }

    #[tokio::test]
    async fn half_a_head_and_an_idle_connection_are_cut() {
        let router = Router::new().route("/", get(async || "here"));
        let limits = Limits {
            headers: SHORT,
            ..LIMITS
        };
        let (address, _server) = start(router, limits).await;
        let mut half = send(address, b"GET / HTTP/1.1\r\nhost");
        assert_eq!(rest(&mut half).await, "");
        let mut idle = send(address, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n");
        assert!(rest(&mut idle).await.ends_with("here"));
    }

    #[tokio::test]
    async fn connections_beyond_the_bound_wait_for_their_turn() {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let both = Arc::new(Barrier::new(2));
        let handler = {
            let most = Arc::clone(&most);
            async move || {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                both.wait().await;
                sleep(SHORT / 4).await;
                now.fetch_sub(1, Ordering::SeqCst);
                "here"
            }
        };
        let limits = Limits {
            connections: 2,
            ..LIMITS
        };
        let (address, _server) = start(Router::new().route("/", get(handler)), limits).await;
        let mut clients = Vec::new();
        for _ in 0..6 {
            clients.push(send(address, REQUEST));
        }
        for client in &mut clients {
            assert!(rest(client).await.ends_with("here"));
        }
        assert_eq!(most.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_client_that_reads_nothing_loses_its_answer() {
        let gone = CancellationToken::new();
        let handler = {
            let gone = gone.clone();
            async move || {
                let guard = gone.drop_guard();
                let chunk = Bytes::from(vec![b'x'; 1 << 16]);
                Body::from_stream(futures::stream::repeat_with(move || {
                    let _held = &guard;
                    Ok::<_, io::Error>(chunk.clone())
                }))
            }
        };
        let limits = Limits {
            stall: SHORT,
            ..LIMITS
        };
        let (address, _server) = start(Router::new().route("/", get(handler)), limits).await;
        let _silent = send(address, REQUEST);
        timeout(LONG, gone.cancelled()).await.unwrap();
    }

    #[tokio::test]
    async fn shutdown_lets_answers_end_and_refuses_new_connections() {
        let (asked, asks) = tokio::sync::watch::channel(false);
        let go_on = CancellationToken::new();
        let handler = {
            let go_on = go_on.clone();
            async move || {
                asked.send_replace(true);
                go_on.cancelled().await;
                "late"
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let end = end();
        let mut server = JoinSet::new();
        let router = Router::new().route("/", get(handler));
        server.spawn(serve(listener, router, LIMITS, end.clone()));
        let mut client = send(address, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n");
        let mut asks = asks;
        asks.wait_for(|asked| *asked).await.unwrap();
        end.leaving.cancel();
        timeout(LONG, async {
            while TcpStream::connect(address).await.is_ok() {
                sleep(SHORT / 10).await;
            }
        })
        .await
        .unwrap();
        go_on.cancel();
        assert!(rest(&mut client).await.ends_with("late"));
        timeout(LONG, server.join_next()).await.unwrap();
    }

    /// A client that keeps its connection may send its next request at any time, and cannot send it twice.
    #[tokio::test]
    async fn who_keeps_a_connection_is_answered_once_more_and_told_that_it_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let end = end();
        let mut server = JoinSet::new();
        let router = Router::new().route("/", get(async || "here"));
        server.spawn(serve(listener, router, LIMITS, end.clone()));
        let request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";
        let mut kept = send(address, request);
        let mut first = [0; 1024];
        let read = timeout(LONG, kept.read(&mut first)).await.unwrap().unwrap();
        let first = String::from_utf8_lossy(&first[..read]);
        assert!(first.ends_with("here") && !first.contains("connection: close"));
        let mut idle = send(address, request);
        let mut byte = [0; 1];
        timeout(LONG, idle.read_exact(&mut byte))
            .await
            .unwrap()
            .unwrap();
        end.leaving.cancel();
        kept.write_all(request).await.unwrap();
        let second = rest(&mut kept).await;
        assert!(second.ends_with("here") && second.contains("connection: close"));
        assert!(!server.is_empty() && server.try_join_next().is_none());
        end.closing.cancel();
        let _answer = rest(&mut idle).await;
        timeout(LONG, server.join_next()).await.unwrap();
    }
}
