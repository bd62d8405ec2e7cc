//! One JSON line per request: who asked for what, and how it ended.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use serde::Serialize;

/// The audit log. Clones share it.
#[derive(Clone, Debug)]
pub struct AuditLog(Arc<Mutex<File>>);

#[derive(Serialize)]
struct Line<'a> {
    latency_us: u64,
    method: &'a str,
    path: &'a str,
    status: u16,
    ts: String,
    ua: &'a str,
}

impl AuditLog {
    /// Appends to the file at `path`, which is made, with its directory, when missing.
    pub fn open(path: &Path) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        Ok(Self(Arc::new(Mutex::new(file))))
    }

    fn write(&self, line: &Line<'_>) {
        let written = serde_json::to_vec(line).map_err(io::Error::from).and_then(|mut bytes| {
            bytes.push(b'\n');
            // One write per line: lines of concurrent requests never mix.
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(&bytes)
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
    let response = next.run(request).await;
    log.write(&Line {
        latency_us: began.elapsed().as_micros() as u64,
        method: &method,
        path: &path,
        status: response.status().as_u16(),
        ts: utc(SystemTime::now()),
        ua: &ua,
    });
    response
}

/// `YYYY-MM-DDTHH:MM:SSZ`.
fn utc(at: SystemTime) -> String {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, second) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Year, month and day of the `days`-th day after 1970-01-01, in the proleptic Gregorian calendar.
/// Years are counted from March, so that the leap day is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    const DAYS_PER_ERA: u64 = 146_097;
    let since_0000_03_01 = days + 719_468;
    let era = since_0000_03_01 / DAYS_PER_ERA;
    let day_of_era = since_0000_03_01 % DAYS_PER_ERA;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_civil_at_the_edges_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_795_344_404, "2026-11-22T10:46:44Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn lines_have_the_known_keys_in_order() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("log/audit.log");
        let log = AuditLog::open(&path).expect("open");
        let ts = utc(UNIX_EPOCH);
        log.write(&Line { latency_us: 7, method: "GET", path: "/x", status: 404, ts, ua: "" });
        assert_eq!(
            std::fs::read_to_string(path).expect("read"),
            "{\"latency_us\":7,\"method\":\"GET\",\"path\":\"/x\",\"status\":404,\"ts\":\"1970-01-01T00:00:00Z\",\"ua\":\"\"}\n"
        );
    }
}
