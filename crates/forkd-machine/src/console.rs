//! The machine's console log: its last lines, and the signs of a dying kernel in it.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// How much of the log's end is looked at.
const TAIL_BYTES: u64 = 64 << 10;

/// Lines shown to a user.
const TAIL_LINES: usize = 25;

/// What a Linux kernel prints when it cannot be trusted to go on, and what that means in words.
const SIGNS: [(&str, &str); 6] = [
    ("Kernel panic", "its kernel panicked"),
    ("Oops:", "its kernel hit a fault"),
    ("soft lockup", "one of its processors is stuck"),
    ("hard LOCKUP", "one of its processors is stuck with interrupts off"),
    ("rcu_preempt kthread timer wakeup didn't happen", "its timers stopped"),
    ("kernel BUG at", "its kernel hit an assertion"),
];

/// What a console log says that matters, for a message: from just before the first sign of death, else
/// its last lines.
pub(crate) fn tail(log: &Path) -> String {
    let text = read_end(log);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return "(the console is empty)".into();
    }
    let death = lines.iter().position(|line| find_sign(line).is_some());
    let start = death.map_or(lines.len(), |at| at.saturating_sub(2)).min(lines.len().saturating_sub(TAIL_LINES));
    lines[start..].iter().take(TAIL_LINES).copied().collect::<Vec<_>>().join("\n")
}

/// The first sign of death in a console log, in words.
pub(crate) fn sign_of_death(log: &Path) -> Option<&'static str> {
    find_sign(&read_end(log))
}

fn find_sign(text: &str) -> Option<&'static str> {
    let position = |(sign, meaning): &(&str, &'static str)| text.find(sign).map(|at| (at, *meaning));
    SIGNS.iter().filter_map(position).min().map(|(_, meaning)| meaning)
}

/// The end of the log as text; control characters other than line ends are dropped, since the log
/// may be shown on a terminal.
fn read_end(log: &Path) -> String {
    let read = || {
        let mut file = std::fs::File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        std::io::Result::Ok(bytes)
    };
    // No log is an empty log: it exists only once QEMU has started.
    let bytes = read().unwrap_or_default();
    String::from_utf8_lossy(&bytes).chars().filter(|c| *c == '\n' || *c == '\t' || !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_short_and_safe_to_print() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let log = directory.path().join("console.log");
        assert_eq!(tail(&log), "(the console is empty)");
        let text: String = (0..20_000).map(|n| format!("line {n}\x1b[31m\r\n\n")).collect();
        std::fs::write(&log, text).expect("written");
        let tail = tail(&log);
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.ends_with("line 19999[31m"), "{tail}");
        let trace = "call trace\n".repeat(100);
        std::fs::write(&log, format!("boot\na\nb\nOops: int3\n{trace}Kernel panic\n")).expect("written");
        let words = super::tail(&log);
        assert!(words.starts_with("a\nb\nOops: int3\n") && words.lines().count() == TAIL_LINES, "{words}");
    }

    #[test]
    fn the_first_sign_names_the_cause() {
        let text = "[1] watchdog: BUG: soft lockup - CPU#1 stuck\n[2] Kernel panic - not syncing: softlockup";
        assert_eq!(find_sign(text), Some("one of its processors is stuck"));
        assert_eq!(find_sign("[1] Oops: int3: 0000 [#1]\n[2] Kernel panic"), Some("its kernel hit a fault"));
        assert_eq!(find_sign("all is well"), None);
    }
}
