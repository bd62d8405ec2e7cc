//! From settings to a running daemon, and its orderly end.

use std::path::PathBuf;

use anyhow::{Context, bail};
use forkd_api::audit::{AuditLog, Rotation};
use forkd_api::{Api, router, server};
use forkd_node::{LimitsMode, NetworkMode, NetworkSettings, Node, NodeConfig};
use forkd_types::ByteSize;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::access::Access;
use crate::args::{Limits, NetworkArg, ServeArgs};
use crate::claim::{Claim, Whereabouts};

/// Everything resolved that the arguments leave to defaults.
struct Settings {
    node: NodeConfig,
    address: Option<String>,
    socket: PathBuf,
    access: Access,
    domain: Option<String>,
    audit_log: PathBuf,
    audit_rotation: Rotation,
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
    let address = (!args.no_tcp).then_some(args.bind);
    let access = Access::resolve(args.access, address.as_deref())?;
    let mut node = NodeConfig::new(&args.state_dir, &vmm)?;
    if let Some(root) = args.snapshot_root {
        node.store_root = std::path::absolute(&root).with_context(|| format!("cannot resolve {}", root.display()))?;
    }
    node.child_deadline = args.child_deadline;
    node.limits = match args.limits {
        Limits::Enforced => LimitsMode::Enforced,
        Limits::Off => LimitsMode::Off,
    };
    node.cgroup_root = args.cgroup;
    node.memory_reserve = args.memory_reserve.unwrap_or(node.memory_reserve);
    node.memory_overcommit = args.memory_overcommit;
    node.zygote_idle = args.zygote_idle;
    node.workspace_idle = args.workspace_idle;
    node.agent = beside_this_program("forkd-agent")?;
    node.branch_concurrency = args.branch_concurrency;
    node.network = NetworkSettings {
        mode: match args.network {
            NetworkArg::Auto => NetworkMode::Auto,
            NetworkArg::Required => NetworkMode::Required,
            NetworkArg::Off => NetworkMode::Off,
        },
        ready: args.network_pool,
        range: args.network_range,
    };
    if let Some(agent) = args.agent {
        node.agent = std::path::absolute(&agent).with_context(|| format!("cannot resolve {}", agent.display()))?;
    }
    if let Some(ByteSize(bytes)) = args.checkpoint_memory {
        node.checkpoint_memory_bytes = bytes;
    }
    if let Some(n) = args.spawn_concurrency {
        node.spawn_concurrency = n;
    }
    Ok(Settings {
        address,
        socket: args.socket.unwrap_or_else(|| node.state_dir.join("forkd.sock")),
        access,
        domain: args.domain,
        audit_rotation: Rotation {
            max_bytes: Some(args.audit_max_size.bytes()).filter(|bytes| *bytes > 0),
            keep: args.audit_keep,
        },
        audit_log: args.audit_log.unwrap_or_else(|| node.state_dir.join("audit.log")),
        kill_on_exit: args.kill_on_exit,
        node,
    })
}

fn beside_this_program(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find out where this program is; name the monitor with --vmm")?;
    Ok(own.with_file_name(name))
}

async fn serve(settings: Settings) -> anyhow::Result<()> {
    let mut claim = Claim::stake(&settings.node.state_dir)?;
    // Before anything is changed: an address that is taken must not end with sandboxes adopted.
    let tcp = match &settings.address {
        Some(address) => Some(server::listen_tcp(address).await?),
        None => None,
    };
    let unix = server::listen_unix(&settings.socket, settings.access.group).await?;
    let audit = AuditLog::rotating(&settings.audit_log, settings.audit_rotation)
        .with_context(|| format!("cannot open the audit log {}", settings.audit_log.display()))?;
    let hangup = signal(SignalKind::hangup()).context("cannot watch for SIGHUP")?;
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
    let asked = reread_on(hangup);
    settings.access.follow(&asked);
    tokio::spawn(reopen_on(asked, audit.clone()));
    let api = match &settings.domain {
        Some(domain) => Api::new(node.clone()).with_domain(domain),
        None => Api::new(node.clone()),
    };
    let mut serving = start_servers(api, tcp, unix, &settings.access, audit, stopping);
    tokio::select! {
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
        Some(ended) = serving.join_next() => {
            let _ = stop.send(true);
            return ended.context("a server panicked")?.context("a server failed");
        }
    }
    // Streams of events would otherwise go on until they are cut off.
    node.end_listening();
    let _ = stop.send(true);
    while let Some(ended) = serving.join_next().await {
        ended.context("a server panicked")?.context("a server failed")?;
    }
    if settings.kill_on_exit {
        node.kill_all().await;
    }
    node.close_networks().await;
    node.settle().await.map_err(|error| anyhow::anyhow!(error.message()))?;
    let _ = std::fs::remove_file(&settings.socket);
    tracing::info!("stopped");
    Ok(())
}

fn start_servers(
    api: Api,
    tcp: Option<TcpListener>,
    unix: UnixListener,
    access: &Access,
    audit: AuditLog,
    stopping: watch::Receiver<bool>,
) -> JoinSet<std::io::Result<()>> {
    let (mut serving, limits) = (JoinSet::new(), access.connections());
    if let Some(tcp) = tcp {
        let guarded = router(api.clone(), Some(access.tcp()), Some(audit.clone()));
        serving.spawn(server::serve_tcp(tcp, guarded, access.tls.clone(), limits, stopping.clone()));
    }
    let guarded = router(api, Some(access.unix()), Some(audit));
    serving.spawn(server::serve_unix(unix, guarded, limits, stopping));
    serving
}

/// Says at each SIGHUP that files are to be read again.
fn reread_on(mut hangup: Signal) -> watch::Receiver<()> {
    let (ask, asked) = watch::channel(());
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            tracing::info!("SIGHUP: reading tokens and certificate anew, opening the audit log anew");
            let _ = ask.send(());
        }
    });
    asked
}

async fn reopen_on(mut asked: watch::Receiver<()>, audit: AuditLog) {
    while asked.changed().await.is_ok() {
        if let Err(error) = audit.reopen() {
            tracing::error!(%error, "cannot open the audit log anew; it goes on where it was");
        }
    }
}
