//! `forkd machine` as the rest of this program sees it: its calls block, so they run on a thread.

use anyhow::Context as _;
use forkd_machine::probe::{self, KvmVerdict};
use forkd_machine::{Machine, MachineError, Progress as News, Running, StartOptions, StartOutcome, Status, Streams};
use forkd_proto::agent::Exec;

use crate::client::Address;
use crate::data_dir::DataDir;
use crate::failure::{Advise, advised};
use crate::progress::{Progress, Step};

/// The machine's name; one is enough.
const NAME: &str = "default";

/// What helps a machine that does not do what it is told.
pub(crate) const RESTART: &str = "forkd machine stop && forkd machine start";

/// What this host's KVM is good for, decided by timing guest code.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict(KvmVerdict);

/// How to reach the daemon in a machine that runs.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    /// Where its API is forwarded to.
    pub(crate) api: Address,
    /// The API's bearer token.
    pub(crate) token: String,
}

impl Verdict {
    /// Whether Linux guests can run on this host directly.
    pub(crate) fn is_usable(&self) -> bool {
        self.0.is_hardware()
    }

    /// Why, as half a sentence.
    pub(crate) fn reason(&self) -> String {
        let millions = |ips: &f64| format!("{:.1} million instructions/s", ips / 1e6);
        match &self.0 {
            KvmVerdict::Hardware { ips } => format!("/dev/kvm runs guest code in hardware ({})", millions(ips)),
            KvmVerdict::Emulated { ips } => {
                format!("/dev/kvm opens but interprets guest code ({}), too slow for Linux", millions(ips))
            }
            KvmVerdict::Missing { reason } => reason.clone(),
        }
    }
}

/// Times guest code on this host; up to half a second.
pub(crate) async fn probe() -> Verdict {
    Verdict(tokio::task::spawn_blocking(probe::kvm).await.expect("the probe does not panic"))
}

/// The machine of this data directory.
pub(crate) fn open(data: &DataDir) -> anyhow::Result<Machine> {
    Ok(Machine::open(data.root(), NAME)?)
}

/// Runs a blocking call on the machine.
pub(crate) async fn call<T: Send + 'static>(
    data: &DataDir,
    call: impl FnOnce(&Machine) -> Result<T, MachineError> + Send + 'static,
) -> anyhow::Result<T> {
    let machine = open(data)?;
    let outcome = tokio::task::spawn_blocking(move || call(&machine)).await;
    Ok(outcome.context("the background task was cancelled")??)
}

/// The daemon in the machine, if the machine runs and is well.
pub(crate) async fn running(data: &DataDir) -> Option<Access> {
    match call(data, Machine::status).await {
        Ok(Status::Running { running, .. }) => Some(access(&running)),
        _ => None,
    }
}

/// What the machine is doing; asked in the machine, for a few seconds.
pub(crate) async fn status(data: &DataDir) -> anyhow::Result<Status> {
    call(data, Machine::status).await
}

/// What the machine is doing, in words; none when there is no machine that runs.
pub(crate) fn describe(status: &Status) -> Option<String> {
    match status {
        Status::Absent | Status::Stopped => None,
        Status::Starting { .. } => Some("starting".to_owned()),
        Status::NotAnswering { running, waited, .. } => Some(format!(
            "not answering: QEMU runs (process {}), and the machine has said nothing for {} s",
            running.qemu_pid,
            waited.as_secs()
        )),
        Status::Running { running, pong: _, processor, vcpus, memory, network } => Some(format!(
            "running, {vcpus} vCPUs by {processor}, {memory}, network {}, API at {}",
            if *network { "open" } else { "restricted" },
            running.api,
        )),
        Status::Dead { cause, .. } => Some(format!("died: {cause}; the next use starts it again")),
    }
}

/// Starts the machine unless it runs and is well.
pub(crate) async fn start(data: &DataDir, options: StartOptions, progress: &Progress) -> anyhow::Result<Running> {
    let mut news = Reporter::new(progress);
    let running = call(data, move |machine| {
        let running = machine.start(&options, &mut |event| news.tell(event));
        news.end();
        running
    })
    .await
    .advise("forkd doctor")?;
    if let StartOutcome::Healed { cause } = &running.outcome {
        progress.warn(format_args!("the machine had died ({cause}); it was started again"));
    }
    Ok(running)
}

/// The daemon in the machine, which is started if need be.
pub(crate) async fn ensure_running(data: &DataDir, progress: &Progress) -> anyhow::Result<Access> {
    let running = start(data, StartOptions::default(), progress).await?;
    Ok(access(&running))
}

/// The contents of a small file in the machine.
pub(crate) async fn read_file(data: &DataDir, path: &'static str) -> anyhow::Result<String> {
    let text = call(data, move |machine| {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exec = Exec { args: vec!["cat".into(), path.into()], timeout_ms: Some(10_000), ..Exec::default() };
        let streams = Streams { stdin: None, stdout: &mut stdout, stderr: &mut stderr, control: None };
        machine.exec(exec, streams).map(|_| stdout)
    });
    Ok(String::from_utf8_lossy(&text.await?).into_owned())
}

/// Adds to an error what to type when the machine is at fault.
pub(crate) fn explain(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref::<MachineError>() {
        Some(error_kind) if error_kind.is_machine_death() => {
            advised(error, "forkd machine start   (starts it again; then repeat the command)")
        }
        Some(error_kind) if error_kind.is_machine_stuck() => advised(error, RESTART),
        Some(MachineError::NotRunning { .. }) => advised(error, "forkd machine start"),
        _ => error,
    }
}

fn access(running: &Running) -> Access {
    Access { api: Address::loopback(running.api.port()), token: running.api_token.clone() }
}

/// Shows the news of a long operation as steps.
pub(crate) struct Reporter {
    progress: Progress,
    step: Option<(Step, String)>,
    fraction: bool,
}

/// Parts into which a fraction is divided for a bar.
const BAR_PARTS: u64 = 1000;

impl Reporter {
    /// Shows on `progress`.
    pub(crate) fn new(progress: &Progress) -> Self {
        Self { progress: progress.clone(), step: None, fraction: false }
    }

    /// Shows one piece of news.
    pub(crate) fn tell(&mut self, event: News) {
        match event {
            News::Step(text) => {
                self.end();
                self.step = Some((self.progress.step(capitalised(&text)), text));
            }
            News::Detail(text) => {
                if let Some((step, _)) = &self.step {
                    step.detail(text);
                }
            }
            News::Fraction(part) => {
                if let Some((step, _)) = &self.step {
                    if !self.fraction {
                        step.set_parts(BAR_PARTS);
                        self.fraction = true;
                    }
                    step.set_position((part.clamp(0.0, 1.0) * BAR_PARTS as f32) as u64);
                }
            }
        }
    }

    /// Ends the last step.
    pub(crate) fn end(&mut self) {
        self.fraction = false;
        if let Some((step, title)) = self.step.take() {
            step.done(capitalised(&title));
        }
    }
}

fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| first.to_uppercase().chain(characters).collect())
}
