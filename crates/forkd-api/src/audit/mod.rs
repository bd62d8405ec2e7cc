//! One JSON line per request: who asked for what, and how it ended.

mod file;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use serde::Serialize;

use crate::auth::Principal;
use crate::server::Remote;
use crate::utc::utc;

pub use file::Rotation;

use file::LogFile;

/// The audit log. Clones share it.
#[derive(Clone, Debug)]
pub struct AuditLog(Arc<Mutex<LogFile>>);

/// A line. Keys are only ever added, at the end.
#[derive(Serialize)]
struct Line<'a> {
    latency_us: u64,
    method: &'a str,
    path: &'a str,
    status: u16,
    ts: String,
    ua: &'a str,
    /// The name of the token, where one was presented that has a name.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<&'a str>,
    /// Where the request came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    remote: Option<String>,
}

impl AuditLog {
    /// Appends to the file at `path`, which is made, with its directory, when missing, and never set aside.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::rotating(path, Rotation::NEVER)
    }

    /// Appends to the file at `path`, setting it aside when it has grown too large.
    pub fn rotating(path: &Path, rotation: Rotation) -> io::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(LogFile::open(path, rotation)?))))
    }

    /// Opens the file anew: another program has moved it away. When that fails the one it had goes on.
    pub fn reopen(&self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).reopen()
    }

    fn write(&self, line: &Line<'_>) {
        let written = serde_json::to_vec(line).map_err(io::Error::from).and_then(|mut bytes| {
            bytes.push(b'\n');
            self.0.lock().unwrap_or_else(PoisonError::into_inner).append(&bytes)
        });
        if let Err(error) = written {
            tracing::error!(%error, "cannot write to the audit log");
        }
    }
}

/// Writes a line about the request when its answer is known. A streamed body may still follow.
pub(crate) async fn record(State(log): State<AuditLog>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let method = request.method().to_string();
    let path = request.uri().path().to_owned();
    let agent = request.headers().get(header::USER_AGENT);
    let ua = agent.and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let remote = request.extensions().get::<Remote>().map(ToString::to_string);
    let response = next.run(request).await;
    let principal = response.extensions().get::<Principal>();
    log.write(&Line {
        latency_us: began.elapsed().as_micros() as u64,
        method: &method,
        path: &path,
        status: response.status().as_u16(),
        ts: utc(SystemTime::now()),
        ua: &ua,
        token: principal.and_then(|principal| principal.token.as_deref()),
        remote,
    });
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    #[test]
    fn lines_have_the_known_keys_in_order_and_new_ones_after_them() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("log/audit.log");
        let log = AuditLog::open(&path).expect("open");
        let line = |token, remote: Option<&str>| Line {
            latency_us: 7,
            method: "GET",
            path: "/x",
            status: 404,
            ts: utc(UNIX_EPOCH),
            ua: "",
            token,
            remote: remote.map(str::to_owned),
        };
        log.write(&line(None, None));
        log.write(&line(Some("ci"), Some("127.0.0.1:9")));
        let known = r#""latency_us":7,"method":"GET","path":"/x","status":404,"ts":"1970-01-01T00:00:00Z","ua":"""#;
        assert_eq!(
            std::fs::read_to_string(path).expect("read"),
            format!("{{{known}}}\n{{{known},\"token\":\"ci\",\"remote\":\"127.0.0.1:9\"}}\n")
        );
    }
}
