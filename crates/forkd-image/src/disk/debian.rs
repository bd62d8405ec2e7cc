//! A minimal Debian with packages, by mmdebstrap.

use std::fs;
use std::path::Path;

use super::correction::Corrections;
use crate::progress::Progress;
use crate::tool::{Ended, Tool};
use crate::{ImageError, Result};

/// Free space without which a bootstrap is not begun: a minimal suite with the package lists.
const LEAST_SPACE: u64 = 400 << 20;

/// One bootstrap.
#[derive(Clone, Copy)]
pub(crate) struct Bootstrap<'a> {
    pub(crate) suite: &'a str,
    pub(crate) include: &'a [String],
    pub(crate) mirror: Option<&'a str>,
}

/// Whether `text` can be the name of a suite: no path, no option.
pub(crate) fn is_suite_name(text: &str) -> bool {
    let legal = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    (1..=40).contains(&text.len()) && text.as_bytes()[0].is_ascii_lowercase() && text.bytes().all(legal)
}

/// Whether `text` can be the name of a package (Debian policy 5.6.1): no option, no path, no pattern.
pub(crate) fn is_package_name(text: &str) -> bool {
    let first = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let legal = |c: u8| first(c) || matches!(c, b'+' | b'-' | b'.');
    (2..=128).contains(&text.len()) && first(text.as_bytes()[0]) && text.bytes().all(legal)
}

impl Bootstrap<'_> {
    /// What decides the outcome, but for the suite's own updates.
    pub(crate) fn recipe(&self) -> Result<String> {
        let version = Tool::new("mmdebstrap", "mmdebstrap").arg("--version").output()?;
        let mirror = self.mirror.unwrap_or("default");
        Ok(format!(
            "debian {} amd64 mirror {mirror}\n{}\ninclude {}",
            self.suite,
            version.trim(),
            self.include.join(" ")
        ))
    }

    /// Makes the tree in `root`, which does not exist yet.
    ///
    /// Root gets it directly. For another user mmdebstrap works in a user namespace (which needs a
    /// range of subordinate ids) and hands over an archive, since nobody outside could give the
    /// files their owners.
    pub(super) fn run(&self, root: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Corrections> {
        let parent = root.parent().expect("a tree is made inside a scratch directory");
        crate::error::require_space(parent, LEAST_SPACE)?;
        let corrections = if rustix::process::geteuid().is_root() {
            self.bootstrap("--mode=root", root, parent, progress)?;
            Corrections::default()
        } else {
            let archive = parent.join("root.tar");
            self.bootstrap("--mode=unshare", &archive, parent, progress)?;
            let corrections = super::archive::unpack(&archive, root, &mut |_| {})?;
            fs::remove_file(&archive).map_err(ImageError::io("remove", &archive))?;
            corrections
        };
        make_neutral(root)?;
        Ok(corrections.of_what_is_in(root))
    }

    fn bootstrap(&self, mode: &str, out: &Path, parent: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<()> {
        let mut tool = Tool::new("mmdebstrap", "mmdebstrap").arg(mode).args([
            // Not quiet: what it prints is where the progress is read from.
            "--verbose",
            "--variant=minbase",
            "--architectures=amd64",
            "--skip=output/dev",
            // A guest has little use for these, and every copy would carry them.
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--dpkgopt=path-include=/usr/share/locale/locale.alias",
            // What is cut short is thrown away, here as in a guest: no need to sync every file.
            "--dpkgopt=force-unsafe-io",
            "--aptopt=Acquire::Retries 3",
        ]);
        if !self.include.is_empty() {
            tool = tool.arg(format!("--include={}", self.include.join(",")));
        }
        tool = tool.arg(self.suite).arg(out).args(self.mirror);

        let mut steps = Steps::default();
        progress(Progress::part("fetching the package lists", 0, 100));
        let ended = tool.run_lines(|line| {
            if let Some((step, done)) = steps.next(line) {
                progress(Progress { step: &step, fraction: Some(done) });
            }
        })?;
        if !ended.status.success() {
            let action = format!("installing Debian {}", self.suite);
            // Packages, their archives and their lists are there at once.
            let needed = (steps.installed_bytes > 0).then_some(steps.installed_bytes * 3 / 2 + LEAST_SPACE / 2);
            return Err(explain(&ended, self.suite, parent, &action, needed));
        }
        Ok(())
    }
}

/// Removes what belongs to the host or to this installation, not to a guest.
fn make_neutral(root: &Path) -> Result<()> {
    for dir in ["dev", "run", "tmp", "var/tmp", "var/cache/apt", "var/lib/apt/lists", "var/log/apt"] {
        let dir = root.join(dir);
        let Ok(entries) = dir.read_dir() else { continue };
        for entry in entries {
            let path = entry.map_err(ImageError::io("list", &dir))?.path();
            let is_dir = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
            let removed = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(ImageError::io("remove", &path))?;
        }
    }
    for (name, content) in [
        ("hostname", "forkd\n"),
        ("hosts", "127.0.0.1 localhost\n127.0.1.1 forkd\n::1 localhost ip6-localhost ip6-loopback\n"),
        // The agent fills these in.
        ("resolv.conf", ""),
        ("machine-id", ""),
    ] {
        let path = root.join("etc").join(name);
        // It may be a link to somewhere on the host.
        let _ = fs::remove_file(&path);
        fs::write(&path, content).map_err(ImageError::io("write", &path))?;
    }
    Ok(())
}

/// Follows the output of mmdebstrap. Essential packages come in one apt run, all others in a second.
#[derive(Default)]
struct Steps {
    stage: Stage,
    packages: u64,
    unpacked: u64,
    configured: u64,
    fetched: u64,
    installed_bytes: u64,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Stage {
    #[default]
    Lists,
    Essential,
    Rest,
    Done,
}

impl Steps {
    /// The step that `line` begins and how much of all is done, or `None` when it says nothing new.
    fn next(&mut self, line: &str) -> Option<(String, f64)> {
        let first_word = |text: &str| text.split([' ', ':']).next().unwrap_or_default().to_owned();
        let step = if let Some(step) = line.strip_prefix("I: ") {
            match step {
                step if step.starts_with("downloading packages") => self.enter(Stage::Essential),
                step if step.starts_with("installing remaining") => self.enter(Stage::Rest),
                step if step.starts_with("cleaning") => self.enter(Stage::Done),
                _ => return None,
            };
            match self.stage {
                Stage::Done => "cleaning up".to_owned(),
                _ => "choosing packages".to_owned(),
            }
        } else if let Some((_, rest)) = line.split_once(" upgraded, ") {
            self.packages = first_word(rest).parse().unwrap_or(0);
            return None;
        } else if let Some(rest) = line.strip_prefix("After this operation, ") {
            self.installed_bytes += parse_apt_size(rest).unwrap_or(0);
            return None;
        } else if let Some(rest) = line.strip_prefix("Get:") {
            self.fetched += 1;
            let package = rest.split_whitespace().nth(4).unwrap_or_default();
            if self.stage == Stage::Lists {
                "fetching the package lists".to_owned()
            } else {
                format!("downloading {package}")
            }
        } else if let Some(rest) = line.strip_prefix("Unpacking ") {
            self.unpacked += 1;
            format!("unpacking {}", first_word(rest))
        } else if let Some(rest) = line.strip_prefix("Setting up ") {
            self.configured += 1;
            format!("configuring {}", first_word(rest))
        } else {
            return None;
        };
        Some((step, self.done()))
    }

    fn enter(&mut self, stage: Stage) {
        *self = Self { stage, installed_bytes: self.installed_bytes, ..Self::default() };
    }

    fn done(&self) -> f64 {
        let work = (self.fetched + self.unpacked + self.configured) as f64;
        let of_stage = (work / (3 * self.packages.max(1)) as f64).min(1.0);
        let of_stage = if self.packages == 0 { 0.0 } else { of_stage };
        match self.stage {
            Stage::Lists => 0.02,
            Stage::Essential => 0.1 + 0.45 * of_stage,
            Stage::Rest => 0.55 + 0.4 * of_stage,
            Stage::Done => 0.97,
        }
    }
}

/// `139 MB of additional …` is apt's way of writing 139 000 000.
fn parse_apt_size(text: &str) -> Option<u64> {
    let mut words = text.split_whitespace();
    let number: f64 = words.next()?.replace(',', "").parse().ok()?;
    let unit = match words.next()? {
        "B" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        _ => return None,
    };
    Some((number * unit) as u64)
}

/// Turns the last words of apt or mmdebstrap into an error that says what to do.
pub(crate) fn explain(ended: &Ended, suite: &str, dir: &Path, action: &str, needed: Option<u64>) -> ImageError {
    for line in &ended.tail {
        let between = |before: &str, after: &str| {
            let (_, rest) = line.split_once(before)?;
            Some(rest.split(after).next().unwrap_or(rest).trim_matches(['\'', '"', ' ']).to_owned())
        };
        if let Some(package) = between("Unable to locate package ", " ")
            .or_else(|| between("Package '", "' has no installation candidate"))
        {
            return ImageError::MissingPackage { package, suite: suite.to_owned() };
        }
        if line.contains("No space left on device") || line.contains("don't have enough free space") {
            return ImageError::no_space(dir, needed);
        }
    }
    let says = |words: &[&str]| ended.tail.iter().find(|line| words.iter().any(|word| line.contains(word)));
    // A missing suite before a missing network: both make apt speak of files it failed to fetch.
    if says(&["does not have a Release file", "404  Not Found", "no longer has a Release file"]).is_some() {
        return ImageError::UnknownSuite { suite: suite.to_owned() };
    }
    const UNREACHABLE: [&str; 8] = [
        "Temporary failure resolving",
        "Could not resolve",
        "Could not connect",
        "Cannot initiate the connection",
        "Connection failed",
        "Connection timed out",
        "Network is unreachable",
        "Unable to connect",
    ];
    if let Some(line) = says(&UNREACHABLE) {
        let detail = line.trim_start_matches(['E', 'W', 'I', ':', ' ']).to_owned();
        return ImageError::NoNetwork { action: action.to_owned(), detail };
    }
    ended.error()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    fn explained(lines: &[&str]) -> ImageError {
        let tail = lines.iter().map(|&line| line.to_owned()).collect();
        let ended = Ended { tool: "mmdebstrap", status: ExitStatus::from_raw(0x100), tail };
        explain(&ended, "bookworm", Path::new("/"), "installing Debian bookworm", Some(1 << 30))
    }

    #[test]
    fn failures_are_told_in_words_that_help() {
        let missing =
            explained(&["Reading package lists...", "E: Unable to locate package python3-nunpy", "E: apt-get failed"]);
        assert!(
            matches!(&missing, ImageError::MissingPackage { package, .. } if package == "python3-nunpy"),
            "{missing}"
        );
        let none = explained(&["E: Package 'foo' has no installation candidate"]);
        assert!(matches!(&none, ImageError::MissingPackage { package, .. } if package == "foo"), "{none}");
        let full = explained(&["dpkg: error: failed to write: No space left on device"]);
        assert!(full.to_string().contains("1 GiB needed"), "{full}");
        let offline =
            explained(&["W: Failed to fetch …  Temporary failure resolving 'mirror'", "E: apt-get update failed"]);
        assert!(matches!(offline, ImageError::NoNetwork { .. }), "{offline}");
        let suite = explained(&["E: The repository '… bookwurm Release' does not have a Release file."]);
        assert!(matches!(suite, ImageError::UnknownSuite { .. }), "{suite}");
        let other = explained(&["E: something else"]).to_string();
        assert!(other.contains("something else") && other.contains("mmdebstrap"), "{other}");
    }

    #[test]
    fn progress_goes_forward_through_a_real_bootstrap() {
        let mut steps = Steps::default();
        let mut last = 0.0;
        let mut seen = Vec::new();
        for line in [
            "I: running apt-get update...",
            "Get:1 http://mirror bookworm InRelease [151 kB]",
            "I: downloading packages with apt...",
            "0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.",
            "After this operation, 139 MB of additional disk space will be used.",
            "Get:1 http://mirror bookworm/main amd64 gcc-12-base amd64 12.2.0-14 [37.5 kB]",
            "Get:2 http://mirror bookworm/main amd64 libc6 amd64 2.36-9 [2758 kB]",
            "I: extracting archives...",
            "I: installing essential packages...",
            "Unpacking gcc-12-base:amd64 (12.2.0-14) ...",
            "Setting up gcc-12-base:amd64 (12.2.0-14) ...",
            "Unpacking libc6:amd64 (2.36-9) ...",
            "Setting up libc6:amd64 (2.36-9) ...",
            "I: installing remaining packages inside the chroot...",
            "0 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.",
            "After this operation, 1,024 kB of additional disk space will be used.",
            "Setting up python3-numpy (1:1.24.2-1) ...",
            "I: cleaning package lists and apt cache...",
        ] {
            if let Some((step, done)) = steps.next(line) {
                assert!((last..=1.0).contains(&done), "{line}: {done} after {last}");
                last = done;
                seen.push(step);
            }
        }
        assert_eq!(steps.installed_bytes, 140_024_000);
        assert!(seen.contains(&"downloading gcc-12-base".to_owned()), "{seen:?}");
        assert!(seen.contains(&"configuring python3-numpy".to_owned()), "{seen:?}");
    }
}
