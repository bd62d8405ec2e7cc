//! A machine's life.
//!
//! ```text
//!   Absent ──start──► Running ──stop──► Stopped ──start──► Running
//!      ▲                 │ QEMU ends, panics or hangs          │
//!      │                 ▼                                     │
//!      └──remove──── Dead ──start / ensure_running─────────────┘
//! ```
//!
//! The state is not stored: `machine.json` says which QEMU was started, and the process table and the
//! machine's agent say whether it lives. So a host that lost power or a QEMU that was killed leaves nothing
//! to clean up by hand.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use forkd_proto::agent::{Exec, Exited, Pong, Request};

use crate::agent::{self, AgentConnection};
use crate::assets::{self, Assets};
use crate::boot;
use crate::console;
use crate::data_disk;
use crate::directory::MachineDirectory;
use crate::error::MachineError;
use crate::exec::{self, Streams};
use crate::health::{CauseOfDeath, Patience, Patient};
use crate::options::{Resolved, StartOptions};
use crate::progress::{Report, step};
use crate::qemu::{Launch, LaunchFailure, QMP_SOCKET};
use crate::qmp::Qmp;
use crate::ready;
use crate::record::{Record, RunningRecord};

/// How often ports are chosen anew when somebody else took them first.
const PORT_ATTEMPTS: usize = 5;

/// How long the machine may take to stop its programs and write back its disk.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);

/// How long QEMU may take to end when told to, and after SIGKILL.
const QUIT_LIMIT: Duration = Duration::from_secs(5);

/// A machine of one data directory, by name; it need not exist yet.
#[derive(Clone, Debug)]
pub struct Machine {
    name: String,
    directory: MachineDirectory,
    patience: Patience,
}

/// A machine that is up, and how to reach it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Running {
    /// Where the API of the daemon in the machine is forwarded to.
    pub api: SocketAddr,
    /// The bearer token of that API.
    pub api_token: String,
    /// Where the machine's agent is forwarded to.
    pub agent: SocketAddr,
    /// QEMU's process.
    pub qemu_pid: u32,
    /// When it was started, seconds since the Unix epoch.
    pub started_unix: u64,
    /// From the start of QEMU to readiness.
    pub boot: Duration,
    /// How this call found it.
    pub outcome: StartOutcome,
}

/// What a start had to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StartOutcome {
    /// It was running and well. What differs from the options asked for, in words; those take effect
    /// at the next start.
    AlreadyRunning {
        /// Empty when nothing differs.
        differences: Vec<String>,
    },
    /// It was stopped, or new.
    Started,
    /// It had died; it was started again.
    Healed {
        /// Why it had died.
        cause: String,
    },
}

/// What stopping came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopOutcome {
    /// It was not running.
    NotRunning,
    /// It shut down by itself; everything is on its disk.
    Clean,
    /// It did not answer and was ended. Its disk's journal makes good at the next start.
    Forced,
}

/// What a machine is doing.
// One is made per query, so what the small variants waste does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Status {
    /// There is none of this name.
    Absent,
    /// It is not running.
    Stopped,
    /// It is being started: QEMU runs, and the machine is not ready yet.
    Starting {
        /// QEMU's process.
        qemu_pid: u32,
        /// When it was started, seconds since the Unix epoch.
        started_unix: u64,
    },
    /// QEMU runs, and the machine's agent does not answer. It may be busy; the next use of the machine waits for longer,
    /// and starts it again if there is still no answer.
    NotAnswering {
        /// How it would be reached.
        running: Running,
        /// How long it was waited for.
        waited: Duration,
        /// Last lines of its console.
        console_tail: String,
    },
    /// It is up, and its agent answers.
    Running {
        /// How to reach it.
        running: Running,
        /// What its agent said.
        pong: Pong,
        /// `translation` or `hardware`.
        processor: &'static str,
        /// Number of vCPUs.
        vcpus: u8,
        /// Memory.
        memory: forkd_types::ByteSize,
        /// Whether it reaches the network.
        network: bool,
    },
    /// It was running and died; the next start heals it.
    Dead {
        /// Why.
        cause: String,
        /// Last lines of its console.
        console_tail: String,
    },
}

impl Machine {
    /// The machine `name` of the data directory `data`. Nothing is created yet.
    pub fn open(data: &Path, name: &str) -> Result<Self, MachineError> {
        let directory = MachineDirectory::new(data, name)?;
        Ok(Self { name: name.to_owned(), directory, patience: Patience::default() })
    }

    /// The same, waited for as `patience` says.
    #[cfg(test)]
    pub(crate) fn with_patience(self, patience: Patience) -> Self {
        Self { patience, ..self }
    }

    /// Starts the machine, creating it if need be. One that runs is left alone if it is well, and
    /// started again if it is not.
    pub fn start(&self, options: &StartOptions, report: Report<'_>) -> Result<Running, MachineError> {
        let wanted = options.resolve()?;
        let _lock = self.directory.lock(report)?;
        let mut record = Record::load(&self.directory.record())?.unwrap_or_else(Record::new);
        let outcome = match &record.running {
            None => StartOutcome::Started,
            Some(running) => match self.check_running(&record, running, options.start_limit) {
                Ok(()) => {
                    let differences = running.options.differences(&wanted);
                    return Ok(self.describe(&record, running, StartOutcome::AlreadyRunning { differences }));
                }
                Err(cause) => {
                    step(report, format!("the machine died ({cause}); starting it again"));
                    self.end_qemu(running)?;
                    StartOutcome::Healed { cause }
                }
            },
        };
        let assets = assets::prepare(&wanted, self.directory.cache(), report)?;
        data_disk::ensure(&self.directory.disk(), wanted.disk, report)?;
        self.boot(&mut record, &wanted, &assets, options.start_limit, report)?;
        let running = record.running.as_ref().expect("just started");
        Ok(self.describe(&record, running, outcome))
    }

    /// Makes sure that the machine is up and well before it is used: the same as [`Self::start`], by the
    /// name that callers mean.
    pub fn ensure_running(&self, options: &StartOptions, report: Report<'_>) -> Result<Running, MachineError> {
        self.start(options, report)
    }

    /// Shuts the machine down: cleanly if it answers, else by force.
    pub fn stop(&self, report: Report<'_>) -> Result<StopOutcome, MachineError> {
        if !self.directory.exists() {
            return Ok(StopOutcome::NotRunning);
        }
        let _lock = self.directory.lock(report)?;
        self.stop_locked(report)
    }

    /// Stops the machine and removes it with its disk. One that does not exist is no error.
    pub fn remove(&self, report: Report<'_>) -> Result<(), MachineError> {
        if !self.directory.path().exists() {
            return Ok(());
        }
        let lock = self.directory.lock(report)?;
        self.stop_locked(report)?;
        self.directory.remove(&lock)
    }

    /// What the machine is doing: asked in the machine itself, for a few seconds. Never waits for a start or stop under
    /// way.
    pub fn status(&self) -> Result<Status, MachineError> {
        let Some(record) = Record::load(&self.directory.record())? else { return Ok(Status::Absent) };
        let Some(running) = &record.running else { return Ok(Status::Stopped) };
        let patient = self.patient(&record, running);
        if let Err(cause) = patient.check_qemu() {
            return Ok(Status::Dead { cause, console_tail: console::tail(&patient.console()) });
        }
        let described = self.describe(&record, running, StartOutcome::AlreadyRunning { differences: Vec::new() });
        if running.boot_ms.is_none() {
            return Ok(Status::Starting { qemu_pid: described.qemu_pid, started_unix: described.started_unix });
        }
        let Ok(pong) = agent::ping(patient.agent, &patient.token, self.patience.status) else {
            let console_tail = console::tail(&patient.console());
            return Ok(Status::NotAnswering { running: described, waited: self.patience.status, console_tail });
        };
        let options = &running.options;
        Ok(Status::Running {
            pong,
            running: described,
            processor: if options.hardware { "hardware" } else { "translation" },
            vcpus: options.vcpus,
            memory: options.memory,
            network: options.network,
        })
    }

    /// Runs a program in the machine until it exits.
    ///
    /// [`MachineError::MachineDied`] means that the machine ended, panicked or hung meanwhile; after
    /// [`Self::ensure_running`] the work can be repeated.
    pub fn exec(&self, request: Exec, streams: Streams<'_>) -> Result<Exited, MachineError> {
        exec::run(&self.running_patient()?, request, streams)
    }

    /// A connection to the machine's agent, for requests other than [`Self::exec`].
    pub fn connect_agent(&self) -> Result<AgentConnection, MachineError> {
        exec::open(&self.running_patient()?)
    }

    /// The last lines of the machine's console.
    pub fn console_tail(&self) -> String {
        console::tail(&self.directory.console())
    }

    fn running_patient(&self) -> Result<Patient, MachineError> {
        let record = Record::load(&self.directory.record())?;
        match record.as_ref().and_then(|record| Some((record, record.running.as_ref()?))) {
            Some((record, running)) => Ok(self.patient(record, running)),
            None => Err(MachineError::NotRunning { name: self.name.clone() }),
        }
    }

    fn patient(&self, record: &Record, running: &RunningRecord) -> Patient {
        Patient {
            qemu: running.qemu,
            directory: self.directory.path().to_owned(),
            agent: loopback(running.agent_port),
            token: record.agent_token.clone(),
            patience: self.patience,
        }
    }

    /// Whether the machine of `running` is well. One whose start was interrupted is given the time that a
    /// start may take.
    fn check_running(
        &self,
        record: &Record,
        running: &RunningRecord,
        start_limit: Duration,
    ) -> Result<(), CauseOfDeath> {
        let patient = self.patient(record, running);
        if running.boot_ms.is_some() {
            return patient.examine();
        }
        patient.check_qemu()?;
        ready::wait(&patient, &ready::Expectation::of(running), start_limit).map_err(|error| error.to_string())
    }

    /// Starts QEMU and waits until the machine is ready. One that dies while it boots gets a second chance.
    fn boot(
        &self,
        record: &mut Record,
        options: &Resolved,
        assets: &Assets,
        limit: Duration,
        report: Report<'_>,
    ) -> Result<(), MachineError> {
        self.launch(record, options, assets, report)?;
        match self.await_ready(record, limit) {
            Err(MachineError::MachineDied { cause, .. }) => {
                step(report, format!("the machine died while it booted ({cause}); starting it again"));
                self.launch(record, options, assets, report)?;
                self.await_ready(record, limit)
            }
            outcome => outcome,
        }
    }

    /// Starts QEMU and remembers it at once, so that nothing is lost track of if this program ends here.
    fn launch(
        &self,
        record: &mut Record,
        options: &Resolved,
        assets: &Assets,
        report: Report<'_>,
    ) -> Result<(), MachineError> {
        let exports = boot::exports(options);
        boot::write_config(&self.directory.config(), options, record, &exports)?;
        let console = self.directory.console();
        // Best kept, but nothing depends on it: there is none before the first start.
        let _ = std::fs::rename(&console, self.directory.previous_console());
        std::fs::write(&console, "").map_err(MachineError::file("empty", &console))?;
        step(report, "starting the machine");
        for _ in 0..PORT_ATTEMPTS {
            let (agent_port, api_port) = free_ports()?;
            let launch = Launch {
                program: &options.qemu,
                name: &self.name,
                hardware: options.hardware,
                vcpus: options.vcpus,
                memory: options.memory,
                network: options.network,
                kernel: &assets.kernel,
                initramfs: &assets.initramfs,
                root: &assets.root,
                data: &self.directory.disk(),
                config: &self.directory.config(),
                exports: &exports,
                agent_port,
                api_port,
                directory: self.directory.path(),
            };
            match launch.start() {
                Ok(qemu) => {
                    let started_unix = unix_now();
                    record.running = Some(RunningRecord {
                        qemu,
                        agent_port,
                        api_port,
                        started_unix,
                        boot_ms: None,
                        options: options.clone(),
                    });
                    return record.save(&self.directory.record());
                }
                Err(LaunchFailure::PortTaken) => {}
                Err(LaunchFailure::Other(error)) => return Err(error),
            }
        }
        Err(MachineError::Launch { reason: format!("no free pair of ports in {PORT_ATTEMPTS} attempts") })
    }

    /// Waits until the machine is ready; one that is not in time is ended, so that the next start begins
    /// afresh.
    fn await_ready(&self, record: &mut Record, limit: Duration) -> Result<(), MachineError> {
        let started = Instant::now();
        let running = record.running.as_ref().expect("called after a launch");
        let patient = self.patient(record, running);
        let outcome = ready::wait(&patient, &ready::Expectation::of(running), limit);
        if let Err(error) = outcome {
            self.end_qemu(running)?;
            record.running = None;
            record.save(&self.directory.record())?;
            return Err(error);
        }
        let boot_ms = u64::try_from(started.elapsed().as_millis()).expect("shorter than the age of the universe");
        record.running.as_mut().expect("as above").boot_ms = Some(boot_ms);
        record.save(&self.directory.record())
    }

    fn stop_locked(&self, report: Report<'_>) -> Result<StopOutcome, MachineError> {
        let Some(mut record) = Record::load(&self.directory.record())? else { return Ok(StopOutcome::NotRunning) };
        let Some(running) = record.running.take() else { return Ok(StopOutcome::NotRunning) };
        let outcome = match running.qemu.open() {
            None => StopOutcome::NotRunning,
            Some(process) => {
                step(report, "shutting the machine down");
                // The answer may be cut off by the power-off itself, so only the process tells.
                let patient = self.patient(&record, &running);
                let asked = AgentConnection::open(patient.agent, &patient.token, self.patience.shutdown)
                    .and_then(|mut agent| agent.ask(&Request::Shutdown));
                let limit = if asked.is_ok() { SHUTDOWN_LIMIT } else { Duration::ZERO };
                if process.wait(limit) {
                    StopOutcome::Clean
                } else {
                    step(report, "the machine does not shut down; ending it");
                    self.end_qemu(&running)?;
                    StopOutcome::Forced
                }
            }
        };
        record.save(&self.directory.record())?;
        Ok(outcome)
    }

    /// Ends QEMU without the machine's help; none that runs is no error.
    fn end_qemu(&self, running: &RunningRecord) -> Result<(), MachineError> {
        let Some(process) = running.qemu.open() else { return Ok(()) };
        // QEMU's own way out lets it write back what it holds.
        if Qmp::connect(self.directory.path(), QMP_SOCKET).and_then(|mut qmp| qmp.quit()).is_ok()
            && process.wait(QUIT_LIMIT)
        {
            return Ok(());
        }
        process.kill();
        if process.wait(QUIT_LIMIT) { Ok(()) } else { Err(MachineError::Unkillable { pid: running.qemu.pid }) }
    }

    fn describe(&self, record: &Record, running: &RunningRecord, outcome: StartOutcome) -> Running {
        Running {
            api: loopback(running.api_port),
            api_token: record.api_token.clone(),
            agent: loopback(running.agent_port),
            qemu_pid: running.qemu.pid,
            started_unix: running.started_unix,
            boot: Duration::from_millis(running.boot_ms.unwrap_or(0)),
            outcome,
        }
    }
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Two ports that nobody uses now. QEMU takes them a moment later; see [`LaunchFailure::PortTaken`].
fn free_ports() -> Result<(u16, u16), MachineError> {
    let bind = || {
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| Ok((listener.local_addr()?.port(), listener)))
    };
    let failed = |error: std::io::Error| MachineError::Launch { reason: format!("no free port on 127.0.0.1: {error}") };
    // Both are held until both are known, so that they differ.
    let (agent, _held) = bind().map_err(failed)?;
    let (api, _held_too) = bind().map_err(failed)?;
    Ok((agent, api))
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
