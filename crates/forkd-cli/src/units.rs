//! Durations, ages and counts as people read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// `1.2 ms`, `340 µs`, `12.3 s`, `2 min 5 s`: three figures, one unit.
pub(crate) fn duration(duration: Duration) -> String {
    let us = duration.as_micros();
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..100_000 => format!("{:.1} ms", us as f64 / 1e3),
        100_000..1_000_000 => format!("{:.0} ms", us as f64 / 1e3),
        1_000_000..60_000_000 => format!("{:.1} s", us as f64 / 1e6),
        _ => format!("{} min {} s", duration.as_secs() / 60, duration.as_secs() % 60),
    }
}

/// Microseconds as [`duration`] writes them.
pub(crate) fn microseconds(us: u64) -> String {
    duration(Duration::from_micros(us))
}

/// Milliseconds with two decimals, for columns that are compared.
pub(crate) fn milliseconds(us: u64) -> String {
    format!("{:.2}", us as f64 / 1e3)
}

/// MiB with two decimals, for columns that are compared.
pub(crate) fn mebibytes(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / (1u64 << 20) as f64)
}

/// How long ago `unix_seconds` was: `just now`, `5 minutes ago`, `3 days ago`.
pub(crate) fn age(unix_seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let seconds = now.saturating_sub(unix_seconds);
    let (count, unit) = match seconds {
        0..60 => return "just now".to_owned(),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{} ago", self::count(count as usize, unit))
}

/// `1 snapshot`, `2 snapshots`.
pub(crate) fn count(count: usize, thing: &str) -> String {
    format!("{count} {thing}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_keep_three_figures() {
        for (us, text) in
            [(7, "7 µs"), (1_234, "1.2 ms"), (123_400, "123 ms"), (1_234_000, "1.2 s"), (125_000_000, "2 min 5 s")]
        {
            assert_eq!(microseconds(us), text);
        }
    }
}
