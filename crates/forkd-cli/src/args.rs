//! The command line: verbs, and the options that all of them share.

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::bench::BenchArgs;
use crate::commands::bake::{FromImageArgs, SnapshotArgs};
use crate::commands::branch::BranchArgs;
use crate::commands::checkpoints::{CheckpointArgs, CheckpointsArgs, RewindArgs};
use crate::commands::cleanup::CleanupArgs;
use crate::commands::cp::CpArgs;
use crate::commands::env::EnvArgs;
use crate::commands::eval::EvalArgs;
use crate::commands::events::{EventsArgs, TopArgs};
use crate::commands::exec::ExecArgs;
use crate::commands::files::FilesArgs;
use crate::commands::fork::ForkArgs;
use crate::commands::hub::{PullArgs, PushArgs};
use crate::commands::images::{ImagesArgs, RmiArgs, SnapshotInfoArgs};
use crate::commands::kernel::KernelArgs;
use crate::commands::layers::{SnapshotCompactArgs, SnapshotDiffArgs};
use crate::commands::machine::MachineArgs;
use crate::commands::man::ManArgs;
use crate::commands::mcp::McpArgs;
use crate::commands::packs::{PackArgs, UnpackArgs};
use crate::commands::ping::PingArgs;
use crate::commands::port_forward::PortForwardArgs;
use crate::commands::quickstart::QuickstartArgs;
use crate::commands::run::RunArgs;
use crate::commands::sandboxes::{KillArgs, LogsArgs, LsArgs};
use crate::commands::shell::ShellArgs;
use crate::commands::spawn::SpawnArgs;
use crate::commands::tree::TreeArgs;
use crate::commands::verify::VerifyArgs;
use crate::commands::workspace::{SuspendArgs, TimeoutArgs, WorkspaceArgs};
use crate::commands::{Context, where_};
use crate::data_dir::DataDir;
use crate::doctor::DoctorArgs;
use crate::endpoint::DaemonChoice;
use crate::environment;
use crate::progress::Progress;

/// Fork a warmed Linux microVM into running children.
///
/// Boot and warm a machine once, snapshot it, and fork running copies of it in about the time that
/// fork(2) takes.
#[derive(Parser, Debug)]
#[command(name = "forkd", version, propagate_version = true, after_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    shared: SharedArgs,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 success; 1 failure; 2 wrong command line; 130 and 143 stopped by a signal;
exec and machine exec end with the command's own code.

Start here: forkd quickstart";

/// Options of every verb.
#[derive(Args, Debug)]
struct SharedArgs {
    /// Say nothing on standard error but warnings and errors
    #[arg(short, long, global = true)]
    quiet: bool,
    /// The daemon's address, http://HOST:PORT or unix:///PATH; found or started when absent
    #[arg(long, global = true, value_name = "URL", env = environment::FORKD_URL, help_heading = "Daemon")]
    daemon_url: Option<String>,
    /// The daemon's bearer token
    #[arg(long, global = true, value_name = "TOKEN", env = environment::FORKD_TOKEN, hide_env_values = true,
          help_heading = "Daemon")]
    daemon_token: Option<String>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// From nothing to ten forked children that answer
    Quickstart(QuickstartArgs),
    /// Check this host and say what is missing
    Doctor(DoctorArgs),
    /// Build a root disk, boot and warm it, and snapshot it
    FromImage(FromImageArgs),
    /// Snapshot a running sandbox, or a kernel and a root disk once booted
    Snapshot(SnapshotArgs),
    /// Fork children, hold them for a while, and kill them
    Fork(ForkArgs),
    /// Fork children that stay
    Spawn(SpawnArgs),
    /// Make running copies of a running sandbox
    Branch(BranchArgs),
    /// Freeze a sandbox as it is now, to come back to
    Checkpoint(CheckpointArgs),
    /// List a sandbox's checkpoints
    Checkpoints(CheckpointsArgs),
    /// Bring a sandbox back to a checkpoint
    Rewind(RewindArgs),
    /// Draw snapshots, sandboxes and checkpoints as the family they are
    Tree(TreeArgs),
    /// Show what happens, as it happens
    Events(EventsArgs),
    /// Show what sandboxes cost, now and again
    Top(TopArgs),
    /// Sandboxes with a name, that can be put on disk and brought back
    Workspace(WorkspaceArgs),
    /// Say when a sandbox ends by itself
    Timeout(TimeoutArgs),
    /// Put a sandbox on disk and end it
    Suspend(SuspendArgs),
    /// List sandboxes
    Ls(LsArgs),
    /// Run one program in a fresh sandbox of an image
    Run(RunArgs),
    /// Run a program in a sandbox
    Exec(ExecArgs),
    /// Open a terminal in a sandbox
    Shell(ShellArgs),
    /// Copy files between this host and a sandbox
    Cp(CpArgs),
    /// Look at and change files of a sandbox
    Files(FilesArgs),
    /// Evaluate source text in a sandbox's warm interpreter
    Eval(EvalArgs),
    /// Ask a sandbox's agent whether it is there
    Ping(PingArgs),
    /// Reach a TCP port of a sandbox's guest from this host
    PortForward(PortForwardArgs),
    /// Kill sandboxes
    Kill(KillArgs),
    /// Show a sandbox's console
    Logs(LogsArgs),
    /// List snapshots
    Images(ImagesArgs),
    /// Remove snapshots
    Rmi(RmiArgs),
    /// Show everything about one snapshot
    SnapshotInfo(SnapshotInfoArgs),
    /// Run a command in a child of a snapshot and keep what changed as a layer over it
    SnapshotDiff(SnapshotDiffArgs),
    /// Write a layered snapshot anew as one that depends on no other
    SnapshotCompact(SnapshotCompactArgs),
    /// Write a snapshot, with all that it builds on, to one file
    Pack(PackArgs),
    /// Take in a file that pack wrote
    Unpack(UnpackArgs),
    /// Download a pack, by URL or from an index, and take it in
    Pull(PullArgs),
    /// Pack a snapshot and put it on an HTTP server
    Push(PushArgs),
    /// Recompute every digest of a snapshot
    Verify(VerifyArgs),
    /// Measure, next to the floor of this host
    Bench(BenchArgs),
    /// Serve sandboxes to language models as tools, by the Model Context Protocol
    Mcp(McpArgs),
    /// Print the daemon's address and token as environment variables; found or started
    Env(EnvArgs),
    /// Remove what runs left behind that were cut off
    Cleanup(CleanupArgs),
    /// Print the data directory
    Where,
    /// Guest kernels
    Kernel(KernelArgs),
    /// The Linux machine that runs forkd where KVM is missing or emulated
    Machine(MachineArgs),
    /// Write man pages
    Man(ManArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

impl Cli {
    /// Resolves what all verbs share and runs the verb; the value is the exit code.
    pub(crate) async fn run(self) -> anyhow::Result<u8> {
        let context = Context {
            progress: Progress::new(self.shared.quiet),
            data: DataDir::resolve(|name| std::env::var_os(name)),
            daemon: DaemonChoice {
                url: self.shared.daemon_url.filter(|url| !url.is_empty()),
                token: self.shared.daemon_token.filter(|token| !token.is_empty()),
            },
        };
        match self.command {
            Command::Quickstart(args) => args.run(&context).await,
            Command::Doctor(args) => args.run(&context).await,
            Command::FromImage(args) => args.run(&context).await,
            Command::Snapshot(args) => args.run(&context).await,
            Command::Fork(args) => args.run(&context).await,
            Command::Spawn(args) => args.run(&context).await,
            Command::Branch(args) => args.run(&context).await,
            Command::Checkpoint(args) => args.run(&context).await,
            Command::Checkpoints(args) => args.run(&context).await,
            Command::Rewind(args) => args.run(&context).await,
            Command::Tree(args) => args.run(&context).await,
            Command::Events(args) => args.run(&context).await,
            Command::Top(args) => args.run(&context).await,
            Command::Workspace(args) => args.run(&context).await,
            Command::Timeout(args) => args.run(&context).await,
            Command::Suspend(args) => args.run(&context).await,
            Command::Ls(args) => args.run(&context).await,
            Command::Run(args) => args.run(&context).await,
            Command::Shell(args) => args.run(&context).await,
            Command::Cp(args) => args.run(&context).await,
            Command::Files(args) => args.run(&context).await,
            Command::Cleanup(args) => args.run(&context),
            Command::Man(args) => args.run(Cli::command()),
            Command::Exec(args) => args.run(&context).await,
            Command::Eval(args) => args.run(&context).await,
            Command::Ping(args) => args.run(&context).await,
            Command::PortForward(args) => args.run(&context).await,
            Command::Kill(args) => args.run(&context).await,
            Command::Logs(args) => args.run(&context).await,
            Command::Images(args) => args.run(&context).await,
            Command::Rmi(args) => args.run(&context).await,
            Command::SnapshotInfo(args) => args.run(&context).await,
            Command::SnapshotDiff(args) => args.run(&context).await,
            Command::SnapshotCompact(args) => args.run(&context).await,
            Command::Pack(args) => args.run(&context).await,
            Command::Unpack(args) => args.run(&context).await,
            Command::Pull(args) => args.run(&context).await,
            Command::Push(args) => args.run(&context).await,
            Command::Verify(args) => args.run(&context).await,
            Command::Bench(args) => args.run(&context).await,
            Command::Mcp(args) => args.run(&context).await,
            Command::Env(args) => args.run(&context).await,
            Command::Where => where_(&context),
            Command::Kernel(args) => args.run(&context).await,
            Command::Machine(args) => args.run(&context).await,
            Command::Completions { shell } => completions(shell),
        }
    }
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "forkd", &mut script);
    crate::output::bytes(&script)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
