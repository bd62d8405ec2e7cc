//! A small HTTP server on the loopback interface that misbehaves as it is told.

#![allow(dead_code, unreachable_pub)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a client asked for.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Where the asked-for range begins.
    pub fn range_start(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What it gets.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    cut: Option<usize>,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub fn cut_after(mut self, bytes: usize) -> Self {
        self.cut = Some(bytes);
        self
    }
}

/// A server; its thread ends with the test's process.
pub struct Server {
    pub url: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Serves what `answer` says of each request and how many came before.
    pub fn start(answer: impl Fn(&Request, usize) -> Reply + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&seen);
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let connection = connection.expect("accepted");
                let Some(request) = read(&connection) else { continue };
                let before = lock(&noted).len();
                lock(&noted).push(request.clone());
                // A client that has gone away is part of some tests.
                let _ = write(&connection, &answer(&request, before));
            }
        });
        Self { url, seen }
    }

    /// A server of one file, which knows ranges.
    pub fn of_file(content: Vec<u8>, etag: &'static str) -> Self {
        Self::start(move |request, _| ranged(request, &content, etag))
    }

    /// What was asked for so far.
    pub fn seen(&self) -> Vec<Request> {
        lock(&self.seen).clone()
    }
}

/// The part of `content` that is asked for, if it is still the same file, else all of it.
pub fn ranged(request: &Request, content: &[u8], etag: &str) -> Reply {
    let same = request.header("if-range").is_none_or(|asked| asked == etag);
    match request.range_start().filter(|_| same) {
        Some(start) if start >= content.len() => Reply::new(416, "no such range"),
        Some(start) => Reply::new(206, &content[start..])
            .with("etag", etag)
            .with("content-range", format!("bytes {start}-{}/{}", content.len() - 1, content.len())),
        None => Reply::new(200, content).with("etag", etag),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(connection: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(connection);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut request = Request { method, path, headers, body: Vec::new() };
    let len = request.header("content-length").map_or(0, |len| len.parse().expect("a length"));
    request.body.resize(len, 0);
    reader.read_exact(&mut request.body).ok()?;
    Some(request)
}

fn write(mut connection: &TcpStream, reply: &Reply) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} Word\r\nconnection: close\r\n", reply.status);
    if !reply.headers.iter().any(|(name, _)| name == "transfer-encoding") {
        head.push_str(&format!("content-length: {}\r\n", reply.body.len()));
    }
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    connection.write_all(format!("{head}\r\n").as_bytes())?;
    connection.write_all(&reply.body[..reply.cut.unwrap_or(reply.body.len())])?;
    connection.flush()
}
