//! The command line and its environment.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use forkd_api::auth::Scope;
use forkd_api::limits::Rate;
use forkd_net::Cidr;
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
    Serve(Box<ServeArgs>),
    /// Make, list, rotate and revoke named tokens; a daemon that runs takes changes up by itself.
    Token(TokenArgs),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum LogFormat {
    /// One line for people.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Limits {
    /// As requests ask for them.
    Enforced,
    /// Not at all.
    Off,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum NetworkArg {
    /// One if this host can make it; the log says so if not.
    Auto,
    /// One, and a host that cannot make it does not serve.
    Required,
    /// None.
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// TCP address to listen on. Anything but loopback needs --token-file or --tokens.
    #[arg(long, env = "FORKD_BIND", default_value = "127.0.0.1:8889", value_name = "ADDRESS")]
    pub(crate) bind: String,

    /// Do not listen on TCP at all.
    #[arg(long)]
    pub(crate) no_tcp: bool,

    /// Unix socket to listen on; only root and its owner may connect, without a token [default: forkd.sock in
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

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    /// Answer requests to PORT-SANDBOX.DOMAIN by the servers in guests.
    #[arg(long, env = "FORKD_DOMAIN", value_name = "DOMAIN")]
    pub(crate) domain: Option<String>,

    /// The agent program of guests that are booted from a kernel and a root disk of this host [default: forkd-agent
    /// beside this program].
    #[arg(long, env = "FORKD_AGENT", value_name = "PATH")]
    pub(crate) agent: Option<PathBuf>,

    /// File to which one JSON line per request is appended; SIGHUP opens it anew [default: audit.log in the state
    /// directory].
    #[arg(long, env = "FORKD_AUDIT_LOG", value_name = "PATH")]
    pub(crate) audit_log: Option<PathBuf>,

    /// How large the audit log may grow, as in 64M, before it is set aside as audit.log.1; 0 for no limit.
    #[arg(long, env = "FORKD_AUDIT_MAX_SIZE", default_value = "256M", value_name = "SIZE")]
    pub(crate) audit_max_size: ByteSize,

    /// How many audit logs that were set aside are kept.
    #[arg(long, env = "FORKD_AUDIT_KEEP", default_value = "4", value_parser = at_least_one, value_name = "N")]
    pub(crate) audit_keep: usize,

    /// How long a child may take from its fork until its agent has answered, in seconds.
    #[arg(long, default_value = "60", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) child_deadline: Duration,

    /// How long a snapshot stays mapped after it was last forked, in seconds.
    #[arg(long, default_value = "600", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) zygote_idle: Duration,

    /// Suspend a workspace, unless it was made with a limit of its own, when nothing was run in it for this long, in
    /// seconds [default: never].
    #[arg(long, env = "FORKD_WORKSPACE_IDLE", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) workspace_idle: Option<Duration>,

    /// Whether sandboxes have a network: required, or auto for one if this host can make it, or off.
    #[arg(long, env = "FORKD_NETWORK", value_enum, default_value_t = NetworkArg::Auto, value_name = "WHEN")]
    pub(crate) network: NetworkArg,

    /// How many networks are made ahead of their use; further ones are made when they are needed.
    #[arg(long, env = "FORKD_NETWORK_POOL", default_value = "8", value_name = "N")]
    pub(crate) network_pool: usize,

    /// Addresses for the links between this host and the networks of sandboxes, two a network, as in 100.127.0.0/16
    /// [default: a usual range that no route of this host overlaps].
    #[arg(long, env = "FORKD_NETWORK_RANGE", value_name = "CIDR")]
    pub(crate) network_range: Option<Cidr>,

    /// How many children of one request come up at the same time [default: 4 per processor].
    #[arg(long, value_parser = at_least_one, value_name = "N")]
    pub(crate) spawn_concurrency: Option<usize>,

    /// How many branches may be under way at a time; further ones are answered 503.
    #[arg(long, env = "FORKD_BRANCH_CONCURRENCY", default_value = "4", value_parser = at_least_one, value_name = "N")]
    pub(crate) branch_concurrency: usize,

    /// How much memory checkpoints may take together, as in 512M, before the oldest go to disk [default: a
    /// quarter of the host's].
    #[arg(long, env = "FORKD_CHECKPOINT_MEMORY", value_name = "SIZE")]
    pub(crate) checkpoint_memory: Option<ByteSize>,

    /// Whether sandboxes are limited, by cgroup v2. A host that cannot refuses requests that ask for limits; with off
    /// they go on without.
    #[arg(long, env = "FORKD_LIMITS", value_enum, default_value_t = Limits::Enforced, value_name = "WHETHER")]
    pub(crate) limits: Limits,

    /// The daemon's own directory in the cgroup v2 hierarchy, made if it is not there; each daemon needs another.
    #[arg(long, env = "FORKD_CGROUP", default_value = "/sys/fs/cgroup/forkd", value_name = "DIR")]
    pub(crate) cgroup: PathBuf,

    /// How much of the host's memory no sandbox is to have, as in 2G; a spawn that would take of it is answered 503
    /// [default: a twentieth, and at least 256M].
    #[arg(long, env = "FORKD_MEMORY_RESERVE", value_name = "SIZE")]
    pub(crate) memory_reserve: Option<ByteSize>,

    /// How many times the rest of the host's memory the memory limits of all sandboxes may make together.
    #[arg(long, env = "FORKD_MEMORY_OVERCOMMIT", default_value = "1", value_parser = factor, value_name = "FACTOR")]
    pub(crate) memory_overcommit: f64,

    /// End all sandboxes when the daemon stops; otherwise they run on and the next daemon finds them.
    #[arg(long)]
    pub(crate) kill_on_exit: bool,

    /// How log lines on standard error look. RUST_LOG chooses which there are.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
}

/// Who may connect, and how much they may ask for.
#[derive(Debug, Args)]
pub(crate) struct AccessArgs {
    /// File with one bearer token, for everything, that TCP clients may present.
    #[arg(long, env = "FORKD_TOKEN_FILE", value_name = "PATH")]
    pub(crate) token_file: Option<PathBuf>,

    /// File of named tokens with scopes, as `forkd-controller token` makes it; changes are taken up at once.
    #[arg(long, env = "FORKD_TOKENS", value_name = "FILE")]
    pub(crate) tokens: Option<PathBuf>,

    /// Serve TCP over TLS with the certificates in this file, in PEM, the server's own first; new ones are taken up
    /// when the file changes.
    #[arg(long, env = "FORKD_TLS_CERT", requires = "tls_key", value_name = "PATH")]
    pub(crate) tls_cert: Option<PathBuf>,

    /// The certificate's private key, in PEM.
    #[arg(long, env = "FORKD_TLS_KEY", requires = "tls_cert", value_name = "PATH")]
    pub(crate) tls_key: Option<PathBuf>,

    /// Group, by name or number, whose members may use the unix socket too.
    #[arg(long, env = "FORKD_SOCKET_GROUP", value_name = "GROUP")]
    pub(crate) socket_group: Option<String>,

    /// How many requests each token may make in a time, as in 50/s or 600/m; further ones are answered 429 [default:
    /// no limit].
    #[arg(long, env = "FORKD_RATE_LIMIT", value_name = "RATE")]
    pub(crate) rate_limit: Option<Rate>,

    /// How many requests each token may have under way; further ones are answered 429 [default: no limit].
    #[arg(long, env = "FORKD_MAX_IN_FLIGHT", value_parser = at_least_one, value_name = "N")]
    pub(crate) max_in_flight: Option<usize>,

    /// How many connections each listener holds open. When there are more, the one that has been silent longest is
    /// closed; while none is silent, new ones wait.
    #[arg(long, env = "FORKD_MAX_CONNECTIONS", default_value = "8192", value_parser = at_least_one, value_name = "N")]
    pub(crate) max_connections: usize,

    /// How long a request's header, and a handshake before it, may take to arrive, in seconds.
    #[arg(long, default_value = "10", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) header_timeout: Duration,

    /// How long a connection may be silent between requests, in seconds.
    #[arg(long, default_value = "75", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) idle_timeout: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    /// The file of named tokens.
    #[arg(long, env = "FORKD_TOKENS", global = true, value_name = "FILE")]
    pub(crate) tokens: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: TokenCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token and print it; it cannot be shown again.
    Create {
        /// What to call it, in the audit log too.
        name: String,
        /// What it may do: read (look), spawn (make, use and end sandboxes), admin (everything).
        #[arg(long)]
        scope: Scope,
    },
    /// Show names, scopes and ages.
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Give a token a new text and print it.
    Rotate {
        /// Its name.
        name: String,
        /// How long the old text stays good, in seconds.
        #[arg(long, default_value_t = 0, value_name = "SECONDS")]
        overlap: u64,
    },
    /// Remove a token.
    Revoke {
        /// Its name.
        name: String,
    },
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds)),
        _ => Err("a whole number of seconds, at least 1".to_owned()),
    }
}

fn factor(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|factor| (0.01..=1000.0).contains(factor))
        .ok_or_else(|| "a number, 0.01 to 1000".to_owned())
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
        for bad in [
            ["--child-deadline", "0"],
            ["--spawn-concurrency", "0"],
            ["--branch-concurrency", "0"],
            ["--max-in-flight", "0"],
            ["--max-connections", "0"],
            ["--header-timeout", "0"],
            ["--audit-keep", "0"],
            ["--memory-overcommit", "0"],
            ["--memory-overcommit", "NaN"],
            ["--limits", "on"],
            ["--rate-limit", "0/s"],
            ["--rate-limit", "50"],
            ["--zygote-idle", "-1"],
        ] {
            let line = ["forkd-controller", "serve"].into_iter().chain(bad);
            assert!(Cli::try_parse_from(line).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn certificate_and_key_come_together() {
        let parse = |more: &[&str]| {
            let line = ["forkd-controller", "serve"].into_iter().chain(more.iter().copied());
            Cli::try_parse_from(line).map(drop)
        };
        assert!(parse(&["--tls-cert", "c", "--tls-key", "k"]).is_ok());
        for one in [["--tls-cert", "c"], ["--tls-key", "k"]] {
            let error = parse(&one).expect_err("half of it").to_string();
            assert!(error.contains("--tls-key") && error.contains("--tls-cert"), "{error}");
        }
    }

    #[test]
    fn the_tokens_file_may_be_named_before_and_after_the_verb() {
        for line in ["token --tokens f create ci --scope spawn", "token create ci --scope spawn --tokens f"] {
            let words = ["forkd-controller"].into_iter().chain(line.split(' '));
            let Ok(Cli { command: Command::Token(args) }) = Cli::try_parse_from(words) else { panic!("{line}") };
            assert_eq!(args.tokens, Some("f".into()), "{line}");
        }
        assert!(Cli::try_parse_from(["forkd-controller", "token", "create", "ci", "--scope", "root"]).is_err());
    }
}
