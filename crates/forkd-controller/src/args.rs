//! The command line and its environment.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use forkd_types::ByteSize;

/// forkd's daemon: holds snapshots, forks them into running sandboxes, and serves the REST API.
#[derive(Debug, Parser)]
#[command(name = "forkd-controller", version, about)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve the REST API until SIGTERM or SIGINT.
    Serve(ServeArgs),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum LogFormat {
    /// One line for people.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// TCP address to listen on. Anything but loopback needs --token-file.
    #[arg(long, env = "FORKD_BIND", default_value = "127.0.0.1:8889", value_name = "ADDRESS")]
    pub(crate) bind: String,

    /// Do not listen on TCP at all.
    #[arg(long)]
    pub(crate) no_tcp: bool,

    /// Unix socket to listen on; only its owner may connect, without a token [default: forkd.sock in
    /// the state directory].
    #[arg(long, env = "FORKD_SOCKET", value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// Directory of the state database, run files and, unless --snapshot-root says otherwise, of
    /// snapshots and blobs.
    #[arg(long, env = "FORKD_STATE_DIR", default_value = "/var/lib/forkd", value_name = "DIR")]
    pub(crate) state_dir: PathBuf,

    /// Directory of snapshots and blobs [default: the state directory].
    #[arg(long, env = "FORKD_SNAPSHOT_ROOT", value_name = "DIR")]
    pub(crate) snapshot_root: Option<PathBuf>,

    /// The monitor program [default: forkd-vmm beside this program].
    #[arg(long, env = "FORKD_VMM", value_name = "PATH")]
    pub(crate) vmm: Option<PathBuf>,

    /// File with the bearer token that TCP clients must present.
    #[arg(long, env = "FORKD_TOKEN_FILE", value_name = "PATH")]
    pub(crate) token_file: Option<PathBuf>,

    /// File to which one JSON line per request is appended [default: audit.log in the state
    /// directory].
    #[arg(long, env = "FORKD_AUDIT_LOG", value_name = "PATH")]
    pub(crate) audit_log: Option<PathBuf>,

    /// How long a child may take from its fork until its agent has answered, in seconds.
    #[arg(long, default_value = "60", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) child_deadline: Duration,

    /// How long a snapshot stays mapped after it was last forked, in seconds.
    #[arg(long, default_value = "600", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) zygote_idle: Duration,

    /// How many children of one request come up at the same time [default: 4 per processor].
    #[arg(long, value_parser = at_least_one, value_name = "N")]
    pub(crate) spawn_concurrency: Option<usize>,

    /// How much memory checkpoints may take together, as in 512M, before the oldest go to disk [default: a
    /// quarter of the host's].
    #[arg(long, env = "FORKD_CHECKPOINT_MEMORY", value_name = "SIZE")]
    pub(crate) checkpoint_memory: Option<ByteSize>,

    /// End all sandboxes when the daemon stops; otherwise they run on and the next daemon finds them.
    #[arg(long)]
    pub(crate) kill_on_exit: bool,

    /// How log lines on standard error look. RUST_LOG chooses which there are.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds)),
        _ => Err("a whole number of seconds, at least 1".to_owned()),
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "a whole number, at least 1".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn limits_must_be_positive() {
        for bad in [["--child-deadline", "0"], ["--spawn-concurrency", "0"], ["--zygote-idle", "-1"]] {
            let line = ["forkd-controller", "serve"].into_iter().chain(bad);
            assert!(Cli::try_parse_from(line).is_err(), "{bad:?}");
        }
    }
}
