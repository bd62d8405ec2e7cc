//! The servers on real sockets, under clients that mean no good.

// What was measured is worth seeing.
#![allow(clippy::print_stdout)]

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use forkd_api::auth::{Guard, Peers};
use forkd_api::server::tls::Tls;
use forkd_api::server::{ServerLimits, listen_tcp, listen_unix, serve_tcp, serve_unix};
use forkd_api::{Api, router};
use forkd_node::{Node, NodeConfig};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How long an honest client's request may take while others attack; the usual time is a millisecond or two.
const USUAL: Duration = Duration::from_millis(500);

struct Server {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Server {
    async fn start(router: Router, tls: Option<Tls>, limits: ServerLimits) -> Self {
        let listener = listen_tcp("127.0.0.1:0").await.expect("listen");
        let address = listener.local_addr().expect("address");
        let (stop, stopping) = watch::channel(false);
        let serving = tokio::spawn(serve_tcp(listener, router, tls, limits, stopping));
        Self { address, stop, serving }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("connect")
    }

    /// An honest client: connects, asks, and is answered within the usual time.
    async fn answers(&self) -> Duration {
        let began = Instant::now();
        let answer = ask(&mut self.connect().await, "/version").await;
        let took = began.elapsed();
        assert_eq!(answer.expect("an answer").0, 200);
        assert!(took < USUAL, "an honest client waited {took:?}");
        took
    }
}

/// The daemon's own routes over an empty node.
async fn real_router() -> (tempfile::TempDir, Router) {
    let dir = tempfile::tempdir().expect("tempdir");
    let config = NodeConfig::new(dir.path(), Path::new("/nonexistent/forkd-vmm")).expect("short path");
    let node = Node::start(config).await.expect("an empty node starts");
    let router = router(Api::new(node), None, None);
    (dir, router)
}

fn limits(header_ms: u64, idle_ms: u64) -> ServerLimits {
    let (header, idle) = (Duration::from_millis(header_ms), Duration::from_millis(idle_ms));
    ServerLimits { header, idle, ..ServerLimits::default() }
}

/// Asks on a connection that stays open. None when the other side ended it instead of answering.
async fn ask(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), path: &str) -> Option<(u16, String)> {
    let text = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    stream.write_all(text.as_bytes()).await.ok()?;
    answer(stream).await
}

async fn answer(stream: &mut (impl AsyncRead + Unpin)) -> Option<(u16, String)> {
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let status = head.split(' ').nth(1)?.parse().ok()?;
            let length =
                head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return Some((status, body.to_owned()));
            }
        }
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(n) => bytes.extend_from_slice(&buffer[..n]),
        }
    }
}

/// Waits until the other side ends the connection.
async fn ended(stream: &mut (impl AsyncRead + Unpin), within: Duration) -> Duration {
    let began = Instant::now();
    let reading = async {
        let mut buffer = [0; 4096];
        while !matches!(stream.read(&mut buffer).await, Ok(0) | Err(_)) {}
    };
    tokio::time::timeout(within, reading).await.expect("the connection was left open");
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_drip_are_cut_off_and_nobody_waits_for_them() {
    let (_dir, router) = real_router().await;
    let server = Server::start(router, None, limits(1000, 60_000)).await;
    let mut dripping = tokio::task::JoinSet::new();
    for number in 0..200 {
        let mut stream = server.connect().await;
        // Half of them have been good before.
        if number % 2 == 0 {
            assert_eq!(ask(&mut stream, "/version").await.expect("an answer").0, 200);
        }
        dripping.spawn(async move {
            let began = Instant::now();
            let (mut reader, mut writer) = stream.into_split();
            let drip = async {
                let text = b"GET /version HTTP/1.1\r\nx-slow: ".iter().chain(std::iter::repeat(&b'a'));
                for byte in text {
                    if writer.write_all(&[*byte]).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            tokio::select! {
                () = drip => {}
                _ = ended(&mut reader, Duration::from_secs(20)) => {}
            }
            began.elapsed()
        });
    }
    for _ in 0..20 {
        server.answers().await;
    }
    while let Some(took) = dripping.join_next().await {
        let took = took.expect("no panic");
        assert!(took >= Duration::from_millis(900) && took < Duration::from_secs(4), "cut off after {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_end_and_used_ones_do_not() {
    let (_dir, router) = real_router().await;
    let server = Server::start(router, None, limits(500, 1000)).await;
    let mut silent = server.connect().await;
    let took = ended(&mut silent, Duration::from_secs(5)).await;
    assert!(took >= Duration::from_millis(400), "{took:?}");
    let mut used = server.connect().await;
    for _ in 0..6 {
        assert_eq!(ask(&mut used, "/version").await.expect("still open").0, 200);
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    let took = ended(&mut used, Duration::from_secs(5)).await;
    assert!(took <= Duration::from_secs(2), "idle after its last answer: {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_are_too_large_are_refused() {
    let (_dir, router) = real_router().await;
    let server = Server::start(router, None, ServerLimits::default()).await;
    let huge = format!("GET /version HTTP/1.1\r\nhost: x\r\nx-huge: {}\r\n\r\n", "a".repeat(1 << 20));
    let many = format!("GET /version HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(5000));
    let long = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(1 << 20));
    for text in [huge, many, long] {
        for _ in 0..20 {
            let stream = server.connect().await;
            let (mut reader, mut writer) = stream.into_split();
            let text = text.clone();
            // The server stops reading before the end, so that this may fail.
            let writing = tokio::spawn(async move {
                let _ = writer.write_all(text.as_bytes()).await;
                writer
            });
            if let Some((status, _)) = answer(&mut reader).await {
                assert!([414, 431].contains(&status), "{status}");
            }
            drop(writing.await.expect("no panic"));
            ended(&mut reader, Duration::from_secs(5)).await;
        }
    }
    let nonsense: [&[u8]; 4] =
        [b"\0\0\0\0\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET"];
    for text in nonsense {
        let mut stream = server.connect().await;
        stream.write_all(text).await.expect("written");
        stream.shutdown().await.expect("half-closed");
        ended(&mut stream, Duration::from_secs(15)).await;
    }
    server.answers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_end_halfway_are_let_go() {
    let (_dir, router) = real_router().await;
    let server = Server::start(router, None, limits(2000, 2000)).await;
    let halves = [
        "GET /version HTTP/1.1\r\nhost: x\r\n",
        "POST /v1/sandboxes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"snap",
        "POST /v1/sandboxes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n50\r\n{",
        "PUT /v1/blobs/blake3:00 HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\nabc",
        "",
    ];
    for text in halves {
        for _ in 0..50 {
            let mut stream = server.connect().await;
            stream.write_all(text.as_bytes()).await.expect("written");
            stream.shutdown().await.expect("half-closed");
            ended(&mut stream, Duration::from_secs(10)).await;
        }
        server.answers().await;
    }
    // Gone without a word.
    for text in halves.iter().cycle().take(500) {
        let mut stream = server.connect().await;
        stream.write_all(text.as_bytes()).await.expect("written");
        stream.set_zero_linger().expect("set");
    }
    server.answers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_idle_connections_stop_nobody() {
    const WANTED: u64 = 10_000;
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let most = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most });
    // Both ends are in this process: the server holds as many as its limit, the client all of them.
    let limits = ServerLimits { connections: 4096, ..ServerLimits::default() };
    let affordable = most.unwrap_or(u64::MAX).saturating_sub(limits.connections as u64 + 1000);
    let count = WANTED.min(affordable);
    if count < WANTED {
        println!("ONLY {count} CONNECTIONS INSTEAD OF {WANTED}: this process may not open more files");
    }
    let (_dir, router) = real_router().await;
    let server = Server::start(router, None, limits).await;
    let mut usual: Vec<_> = Vec::new();
    for _ in 0..50 {
        usual.push(server.answers().await);
    }
    let mut idle = Vec::with_capacity(count as usize);
    let mut meanwhile: Vec<_> = Vec::new();
    for number in 0..count {
        idle.push(server.connect().await);
        if number % 500 == 499 {
            meanwhile.push(server.answers().await);
        }
    }
    for _ in 0..50 {
        meanwhile.push(server.answers().await);
    }
    usual.sort();
    meanwhile.sort();
    println!(
        "{count} idle connections: an answer takes {:?} (p50), {:?} (most); before them {:?} and {:?}",
        meanwhile[meanwhile.len() / 2],
        meanwhile[meanwhile.len() - 1],
        usual[25],
        usual[49]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_do_not_push_clients_out() {
    let (dir, _) = real_router().await;
    drop(dir);
    let dir = tempfile::tempdir().expect("tempdir");
    let config = NodeConfig::new(dir.path(), Path::new("/nonexistent/forkd-vmm")).expect("short path");
    let api = Api::new(Node::start(config).await.expect("an empty node starts"));
    let open = Guard::open(forkd_api::limits::RequestLimits::default());
    let few = ServerLimits { connections: 50, ..ServerLimits::default() };
    let server = Server::start(router(api, Some(open), None), None, few).await;
    let mut clients = Vec::new();
    for _ in 0..10 {
        let mut client = server.connect().await;
        assert_eq!(ask(&mut client, "/version").await.expect("an answer").0, 200);
        clients.push(client);
    }
    let mut strangers = Vec::new();
    for _ in 0..300 {
        strangers.push(server.connect().await);
    }
    server.answers().await;
    for client in &mut clients {
        assert_eq!(ask(client, "/version").await.expect("its connection is still there").0, 200);
    }
    let mut open = 0;
    for stranger in &mut strangers {
        let silent = tokio::time::timeout(Duration::from_millis(5), stranger.read_u8()).await;
        open += usize::from(silent.is_err());
    }
    assert!(open <= 40, "{open} strangers are still connected");
}

/// Changes to a protocol that sends back what it gets.
async fn echo(mut request: Request) -> Response {
    let upgrading = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let stream = TokioIo::new(upgrading.await.expect("followed"));
        let (mut reader, mut writer) = tokio::io::split(stream);
        let _ = tokio::io::copy(&mut reader, &mut writer).await;
        let _ = writer.write_all(b"end").await;
        let _ = writer.shutdown().await;
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, "echo")];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

fn own_router() -> Router {
    let slow = || async {
        tokio::time::sleep(Duration::from_millis(800)).await;
        "done"
    };
    Router::new()
        .route("/echo", get(echo))
        .route("/slow", get(slow))
        .route("/version", get(|| async { "1" }))
        .route("/swallow", post(|body: axum::body::Bytes| async move { body.len().to_string() }))
}

async fn upgraded(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    stream
        .write_all(b"GET /echo HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        .await
        .expect("asked");
    assert_eq!(answer(&mut stream).await.expect("an answer").0, 101);
    // Longer than every limit of requests and silence.
    for text in ["one", "two"] {
        stream.write_all(text.as_bytes()).await.expect("sent");
        let mut back = [0; 3];
        stream.read_exact(&mut back).await.expect("sent back");
        assert_eq!(back, text.as_bytes());
        tokio::time::sleep(Duration::from_millis(1200)).await;
    }
    // A half-closed connection still carries the rest.
    stream.write_all(b"three").await.expect("sent");
    stream.shutdown().await.expect("half-closed");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.expect("the rest");
    assert_eq!(rest, "threeend");
}

#[tokio::test(flavor = "multi_thread")]
async fn upgraded_connections_live_on_over_tcp_tls_and_unix() {
    let short = limits(300, 500);
    let plain = Server::start(own_router(), None, short).await;
    let (certificate, tls, _dir) = certificate();
    let encrypted = Server::start(own_router(), Some(tls), short).await;
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("socket");
    let listener = listen_unix(&path, None).await.expect("listen");
    let (_stop, stopping) = watch::channel(false);
    tokio::spawn(serve_unix(listener, own_router(), short, stopping));
    tokio::join!(
        async { upgraded(plain.connect().await).await },
        async { upgraded(secure(&encrypted, &certificate).await.expect("TLS")).await },
        async { upgraded(UnixStream::connect(&path).await.expect("connect")).await },
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_unix_socket_tells_who_is_there() {
    let (dir, _) = real_router().await;
    drop(dir);
    let dir = tempfile::tempdir().expect("tempdir");
    let config = NodeConfig::new(dir.path(), Path::new("/nonexistent/forkd-vmm")).expect("short path");
    let api = Api::new(Node::start(config).await.expect("an empty node starts"));
    let path = dir.path().join("socket");
    let own_group = rustix::process::getegid().as_raw();
    let listener = listen_unix(&path, Some(own_group)).await.expect("listen");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o660);
    let (_stop, stopping) = watch::channel(false);
    let guarded = router(api, Some(Guard::socket(Peers::new(None))), None);
    tokio::spawn(serve_unix(listener, guarded, ServerLimits::default(), stopping));
    let mut stream = UnixStream::connect(&path).await.expect("connect");
    assert_eq!(ask(&mut stream, "/version").await.expect("an answer").0, 200, "this is the daemon's own user");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_lets_requests_finish_and_closes_all_else() {
    let server = Server::start(own_router(), None, ServerLimits::default()).await;
    let (mut silent, mut used, mut busy) = (server.connect().await, server.connect().await, server.connect().await);
    assert_eq!(ask(&mut used, "/version").await.expect("an answer").0, 200);
    let asking = tokio::spawn(async move { (ask(&mut busy, "/slow").await, busy) });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let began = Instant::now();
    server.stop.send(true).expect("it runs");
    ended(&mut silent, Duration::from_millis(400)).await;
    ended(&mut used, Duration::from_millis(400)).await;
    let (answered, mut busy) = asking.await.expect("no panic");
    assert_eq!(answered, Some((200, "done".to_owned())));
    ended(&mut busy, Duration::from_secs(1)).await;
    server.serving.await.expect("no panic").expect("no error");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(TcpStream::connect(server.address).await.is_err(), "nobody is let wait in vain");
}

#[tokio::test(flavor = "multi_thread")]
async fn new_connections_wait_while_all_are_at_work() {
    let server = Server::start(own_router(), None, ServerLimits { connections: 2, ..ServerLimits::default() }).await;
    let mut asking = tokio::task::JoinSet::new();
    let began = Instant::now();
    for _ in 0..6 {
        let mut stream = server.connect().await;
        asking.spawn(async move { ask(&mut stream, "/slow").await });
    }
    while let Some(answered) = asking.join_next().await {
        assert_eq!(answered.expect("no panic"), Some((200, "done".to_owned())), "late, but answered");
    }
    assert!(began.elapsed() >= Duration::from_millis(2300), "two at a time: {:?}", began.elapsed());
}

/// A fresh certificate for `localhost`, the server's side of it, and where it is kept.
fn certificate() -> (CertificateDer<'static>, Tls, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("tempdir");
    let certificate = write_certificate(dir.path());
    let tls = Tls::open(&dir.path().join("tls.crt"), &dir.path().join("tls.key")).expect("good");
    (certificate, tls, dir)
}

fn write_certificate(dir: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    std::fs::write(dir.join("tls.crt"), made.cert.pem()).expect("write");
    std::fs::write(dir.join("tls.key"), made.signing_key.serialize_pem()).expect("write");
    CertificateDer::from_pem_slice(made.cert.pem().as_bytes()).expect("a certificate")
}

async fn secure(
    server: &Server,
    trusted: &CertificateDer<'static>,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).expect("a root");
    let provider = rustls::crypto::ring::default_provider();
    let config = rustls::ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    connector.connect(ServerName::try_from("localhost").expect("a name"), server.connect().await).await
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_served_and_its_certificate_replaced_while_connections_go_on() {
    let (first, tls, dir) = certificate();
    let server = Server::start(own_router(), Some(tls.clone()), ServerLimits::default()).await;
    let mut before = secure(&server, &first).await.expect("TLS");
    assert_eq!(ask(&mut before, "/version").await, Some((200, "1".to_owned())));
    let second = write_certificate(dir.path());
    assert!(secure(&server, &second).await.is_err(), "not before it is read");
    tls.reload().expect("good");
    let mut after = secure(&server, &second).await.expect("TLS with the new one");
    assert_eq!(ask(&mut after, "/version").await, Some((200, "1".to_owned())));
    assert!(secure(&server, &first).await.is_err());
    assert_eq!(ask(&mut before, "/version").await, Some((200, "1".to_owned())), "the old connection goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_that_stall_or_are_none_hold_nobody_up() {
    let (certificate, tls, _dir) = certificate();
    let server = Server::start(own_router(), Some(tls), limits(1000, 60_000)).await;
    let mut stalled = Vec::new();
    for number in 0..100 {
        let mut stream = server.connect().await;
        if number % 2 == 0 {
            // The beginning of a handshake.
            stream.write_all(b"\x16\x03\x01\x02\x00\x01\x00").await.expect("written");
        }
        stalled.push(stream);
    }
    let began = Instant::now();
    let mut honest = secure(&server, &certificate).await.expect("TLS");
    assert_eq!(ask(&mut honest, "/version").await, Some((200, "1".to_owned())));
    assert!(began.elapsed() < USUAL, "{:?}", began.elapsed());
    for stream in &mut stalled {
        ended(stream, Duration::from_secs(4)).await;
    }
    let mut plain = server.connect().await;
    assert_eq!(ask(&mut plain, "/version").await, None, "this is no place for plain HTTP");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_pass_through_small_buffers() {
    let server =
        Server::start(own_router().layer(axum::extract::DefaultBodyLimit::disable()), None, ServerLimits::default())
            .await;
    let mut stream = server.connect().await;
    let length = 32 << 20;
    let head = format!("POST /swallow HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("sent");
    stream.write_all(&vec![7; length]).await.expect("sent");
    assert_eq!(answer(&mut stream).await, Some((200, length.to_string())));
}
