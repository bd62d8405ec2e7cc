//! From settings to a running daemon, and its orderly end.

use std::net::ToSocketAddrs;
use std::path::PathBuf;

use anyhow::{Context, bail};
use forkd_api::audit::AuditLog;
use forkd_api::auth::Token;
use forkd_api::{Api, router, server};
use forkd_node::{Node, NodeConfig};
use forkd_types::ByteSize;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::args::ServeArgs;
use crate::claim::{Claim, Whereabouts};

/// Everything resolved that the arguments leave to defaults.
struct Settings {
    node: NodeConfig,
    address: Option<String>,
    socket: PathBuf,
    token: Option<Token>,
    audit_log: PathBuf,
    kill_on_exit: bool,
}

/// Serves until a signal says stop.
pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let settings = resolve(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    runtime.block_on(serve(settings))
}

fn resolve(args: ServeArgs) -> anyhow::Result<Settings> {
    let vmm = match args.vmm {
        Some(path) => path,
        None => beside_this_program("forkd-vmm")?,
    };
    if !vmm.is_file() {
        bail!("there is no monitor program at {}; build forkd-vmm, or name it with --vmm", vmm.display());
    }
    let token = args.token_file.as_deref().map(Token::read).transpose()?;
    let address = (!args.no_tcp).then_some(args.bind);
    if let (Some(address), None) = (&address, &token) {
        refuse_open_doors(address)?;
    }
    let mut node = NodeConfig::new(&args.state_dir, &vmm)?;
    if let Some(root) = args.snapshot_root {
        node.store_root = std::path::absolute(&root).with_context(|| format!("cannot resolve {}", root.display()))?;
    }
    node.child_deadline = args.child_deadline;
    node.zygote_idle = args.zygote_idle;
    if let Some(ByteSize(bytes)) = args.checkpoint_memory {
        node.checkpoint_memory_bytes = bytes;
    }
    if let Some(n) = args.spawn_concurrency {
        node.spawn_concurrency = n;
    }
    Ok(Settings {
        address,
        socket: args.socket.unwrap_or_else(|| node.state_dir.join("forkd.sock")),
        token,
        audit_log: args.audit_log.unwrap_or_else(|| node.state_dir.join("audit.log")),
        kill_on_exit: args.kill_on_exit,
        node,
    })
}

fn beside_this_program(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find out where this program is; name the monitor with --vmm")?;
    Ok(own.with_file_name(name))
}

/// Whoever can connect can run programs: without a token that must be this host's users only.
fn refuse_open_doors(address: &str) -> anyhow::Result<()> {
    let mut resolved = address.to_socket_addrs().with_context(|| format!("cannot resolve the address {address}"))?;
    if let Some(open) = resolved.find(|address| !address.ip().is_loopback()) {
        bail!("{open} can be reached from other hosts; give --token-file, or listen on 127.0.0.1");
    }
    Ok(())
}

async fn serve(settings: Settings) -> anyhow::Result<()> {
    let mut claim = Claim::stake(&settings.node.state_dir)?;
    // Before anything is changed: an address that is taken must not end with sandboxes adopted.
    let tcp = match &settings.address {
        Some(address) => Some(server::listen_tcp(address).await?),
        None => None,
    };
    let unix = server::listen_unix(&settings.socket).await?;
    let audit = AuditLog::open(&settings.audit_log)
        .with_context(|| format!("cannot open the audit log {}", settings.audit_log.display()))?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;

    let node = Node::start(settings.node).await.map_err(|error| anyhow::anyhow!(error.message()))?;
    let bound = tcp.as_ref().map(TcpListener::local_addr).transpose().context("cannot tell the TCP address")?;
    let address = bound.map(|address| address.to_string());
    claim.announce(&Whereabouts {
        pid: std::process::id(),
        address: address.clone(),
        socket: settings.socket.clone(),
    })?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        address = address.as_deref().unwrap_or("none"),
        socket = %settings.socket.display(),
        "serving"
    );

    let (stop, stopping) = watch::channel(false);
    let mut serving = start_servers(&node, tcp, unix, settings.token, audit, stopping);
    tokio::select! {
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
        Some(ended) = serving.join_next() => {
            let _ = stop.send(true);
            return ended.context("a server panicked")?.context("a server failed");
        }
    }
    let _ = stop.send(true);
    while let Some(ended) = serving.join_next().await {
        ended.context("a server panicked")?.context("a server failed")?;
    }
    if settings.kill_on_exit {
        node.kill_all().await;
    }
    node.settle().await.map_err(|error| anyhow::anyhow!(error.message()))?;
    let _ = std::fs::remove_file(&settings.socket);
    tracing::info!("stopped");
    Ok(())
}

fn start_servers(
    node: &Node,
    tcp: Option<TcpListener>,
    unix: UnixListener,
    token: Option<Token>,
    audit: AuditLog,
    stopping: watch::Receiver<bool>,
) -> JoinSet<std::io::Result<()>> {
    let api = Api::new(node.clone());
    let mut serving = JoinSet::new();
    if let Some(tcp) = tcp {
        let guarded = router(api.clone(), token, Some(audit.clone()));
        serving.spawn(server::serve_tcp(tcp, guarded, stopping.clone()));
    }
    serving.spawn(server::serve_unix(unix, router(api, None, Some(audit)), stopping));
    serving
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_may_go_without_a_token() {
        for closed in ["127.0.0.1:8889", "127.9.9.9:1", "[::1]:8889"] {
            refuse_open_doors(closed).expect(closed);
        }
        for open in ["0.0.0.0:8889", "[::]:8889", "192.0.2.1:1"] {
            assert!(refuse_open_doors(open).is_err(), "{open}");
        }
    }
}
