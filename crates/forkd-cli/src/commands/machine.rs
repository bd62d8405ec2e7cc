//! `machine`: start, stop, status, exec, rm, and the hidden keep-alive that runs inside.

use std::io::{self, Read};
use std::sync::mpsc;

use clap::{Args, Subcommand, ValueEnum};
use forkd_machine::{Accel, Machine, StartOptions, StartOutcome, Status, StopOutcome, Streams};
use forkd_proto::agent::{Exec, ExecControl};
use forkd_types::ByteSize;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::Context;
use crate::machine::{RESTART, Reporter, call, explain, start};
use crate::terminal::{self, RawMode};
use crate::{failure::advised, output, units};

/// Arguments of `forkd machine`.
#[derive(Args, Debug)]
pub(crate) struct MachineArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Start the machine, making it first if there is none
    Start(StartArgs),
    /// Shut the machine down; its snapshots stay
    Stop,
    /// Say what the machine is doing
    Status {
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Run a program in the machine
    Exec(ExecArgs),
    /// Stop the machine and remove it with its snapshots
    Rm {
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
    /// Hold what must be held open inside the machine
    #[command(hide = true)]
    KeepAlive,
}

#[derive(Args, Debug)]
struct StartArgs {
    /// vCPUs; the host's processors, at most 4, when absent
    #[arg(long)]
    cpus: Option<u8>,
    /// Memory; half of the host's, at most 16G, when absent
    #[arg(long)]
    memory: Option<ByteSize>,
    /// Size of the data disk of a new machine; it takes space as it fills
    #[arg(long, default_value = "64G")]
    disk: ByteSize,
    /// How the machine's processor is made
    #[arg(long, value_enum, default_value_t = Processor::Auto)]
    accel: Processor,
    /// Let the machine reach the network
    #[arg(long)]
    network: bool,
    /// Directory of forkd's programs; that of this program when absent
    #[arg(long, value_name = "DIR")]
    programs: Option<std::path::PathBuf>,
}

/// How the machine's processor is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Processor {
    /// Nested hardware KVM where there is any, else translation
    Auto,
    /// Translation by QEMU
    Tcg,
    /// The host's KVM
    Kvm,
}

#[derive(Args, Debug)]
struct ExecArgs {
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Run it on a terminal
    #[arg(short, long)]
    tty: bool,
    /// Working directory
    #[arg(short = 'w', long, value_name = "DIR")]
    cwd: Option<String>,
    /// Kill the program and all it started after this long
    #[arg(long, visible_alias = "timeout", value_name = "SECONDS")]
    timeout_secs: Option<u64>,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl MachineArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        match self.verb {
            Verb::Start(args) => args.run(context).await,
            Verb::Stop => stop(context).await,
            Verb::Status { json } => status(json, context).await,
            Verb::Exec(args) => args.run(context).await.map_err(explain),
            Verb::Rm { force } => remove(force, context).await,
            Verb::KeepAlive => {
                let error = tokio::task::spawn_blocking(forkd_machine::keep_alive::run).await?;
                Err(anyhow::anyhow!("keep-alive ended: {error:?}"))
            }
        }
    }
}

impl StartArgs {
    async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let options = StartOptions {
            vcpus: self.cpus,
            memory: self.memory,
            disk: self.disk,
            network: self.network,
            programs: self.programs,
            accel: match self.accel {
                Processor::Auto => Accel::Auto,
                Processor::Tcg => Accel::Tcg,
                Processor::Kvm => Accel::Kvm,
            },
            ..StartOptions::default()
        };
        let running = start(&context.data, options, &context.progress).await?;
        if let StartOutcome::AlreadyRunning { differences } = &running.outcome {
            context.progress.say("✓ The machine is up already");
            for difference in differences {
                context.progress.warn(format_args!("{difference}; `forkd machine stop` first to change it"));
            }
        }
        output::line(format_args!("http://{}", running.api))?;
        Ok(0)
    }
}

async fn stop(context: &Context) -> anyhow::Result<u8> {
    let mut news = Reporter::new(&context.progress);
    let stopped = call(&context.data, move |machine| {
        let outcome = machine.stop(&mut |event| news.tell(event));
        news.end();
        outcome
    });
    let text = match stopped.await? {
        StopOutcome::NotRunning => "the machine was not running",
        StopOutcome::Clean => "the machine is shut down",
        StopOutcome::Forced => "the machine did not shut down by itself and was ended",
    };
    context.progress.say(text);
    Ok(0)
}

async fn status(as_json: bool, context: &Context) -> anyhow::Result<u8> {
    let status = call(&context.data, Machine::status).await?;
    let report = match &status {
        Status::Absent => json!({ "state": "absent" }),
        Status::Stopped => json!({ "state": "stopped" }),
        Status::Starting { qemu_pid, started_unix } => {
            json!({ "state": "starting", "pid": qemu_pid, "started_at_unix": started_unix })
        }
        Status::NotAnswering { running, waited, console_tail } => json!({
            "state": "not answering",
            "answers": false,
            "waited_secs": waited.as_secs(),
            "pid": running.qemu_pid,
            "started_at_unix": running.started_unix,
            "console_tail": console_tail,
        }),
        Status::Running { running, pong, processor, vcpus, memory, network } => json!({
            "state": "running",
            "answers": true,
            "kernel": pong.kernel,
            "processor": processor,
            "vcpus": vcpus,
            "memory_bytes": memory,
            "network": network,
            "api": format!("http://{}", running.api),
            "pid": running.qemu_pid,
            "started_at_unix": running.started_unix,
            "boot_ms": running.boot.as_millis() as u64,
        }),
        Status::Dead { cause, console_tail } => {
            json!({ "state": "dead", "cause": cause, "console_tail": console_tail })
        }
    };
    if as_json {
        output::json(&report)?;
    } else {
        match &status {
            Status::Absent => output::line("absent; `forkd machine start` makes one")?,
            Status::Stopped => output::line("stopped")?,
            Status::Starting { started_unix, .. } => {
                output::line(format_args!("starting, begun {}", units::age(*started_unix)))?;
            }
            Status::NotAnswering { running, console_tail, .. } => {
                let text = crate::machine::describe(&status).unwrap_or_default();
                output::line(format_args!(
                    "{text}, started {}. If it stays so: {RESTART}\nIts console ended with:\n{console_tail}",
                    units::age(running.started_unix)
                ))?;
            }
            Status::Running { running, .. } => {
                let text = crate::machine::describe(&status).unwrap_or_default();
                output::line(format_args!("{text}, started {}", units::age(running.started_unix)))?;
            }
            Status::Dead { cause, console_tail } => {
                output::line(format_args!("dead: {cause}; its console ended with:\n{console_tail}"))?;
            }
        }
    }
    Ok(u8::from(matches!(status, Status::Dead { .. } | Status::NotAnswering { .. })))
}

async fn remove(force: bool, context: &Context) -> anyhow::Result<u8> {
    let exists = !matches!(call(&context.data, Machine::status).await, Ok(Status::Absent));
    if exists && !force && !output::confirm("remove the machine with all snapshots in it? [y/N] ")? {
        return Err(advised(anyhow::anyhow!("nothing was removed"), "forkd machine rm --force"));
    }
    let mut news = Reporter::new(&context.progress);
    call(&context.data, move |machine| {
        let removed = machine.remove(&mut |event| news.tell(event));
        news.end();
        removed
    })
    .await?;
    context.progress.say("the machine is removed");
    Ok(0)
}

impl ExecArgs {
    async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let exec = Exec {
            args: self.command.clone(),
            cwd: self.cwd,
            timeout_ms: self.timeout_secs.map(|seconds| seconds.saturating_mul(1000)),
            terminal: self.tty.then(terminal::size),
            ..Exec::default()
        };
        let raw_mode = if self.tty && self.interactive { RawMode::enter()? } else { None };
        let control = forward_signals(self.tty)?;
        let stdin = self.interactive.then(|| Box::new(io::stdin()) as Box<dyn Read + Send>);
        let exited = call(&context.data, move |machine| {
            let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
            let streams = Streams { stdin, stdout: &mut stdout, stderr: &mut stderr, control: Some(control) };
            machine.exec(exec, streams)
        })
        .await;
        drop(raw_mode);
        let exited = exited?;
        if exited.timed_out {
            return Err(super::exec::timed_out(&self.command[0]));
        }
        Ok(super::exec::exit_code(exited.code.into()))
    }
}

/// Signals and changes of the terminal's size, as they come.
fn forward_signals(terminal: bool) -> io::Result<mpsc::Receiver<ExecControl>> {
    let (sender, receiver) = mpsc::channel();
    for number in super::exec::FORWARDED {
        forward(SignalKind::from_raw(number), sender.clone(), move || ExecControl::Signal { signal: number })?;
    }
    if terminal {
        forward(SignalKind::window_change(), sender, || ExecControl::Resize(terminal::size()))?;
    }
    Ok(receiver)
}

fn forward(
    kind: SignalKind,
    sender: mpsc::Sender<ExecControl>,
    control: impl Fn() -> ExecControl + Send + 'static,
) -> io::Result<()> {
    let mut signals = signal(kind)?;
    tokio::spawn(async move {
        while signals.recv().await.is_some() {
            if sender.send(control()).is_err() {
                return;
            }
        }
    });
    Ok(())
}
