//! From a root disk to a snapshot: boot, warm, write, publish.
//!
//! ```text
//! boot ──► await agent ──► run steps ──► warm steps ──► sync ──► write ──► publish
//!   │            │             │              │           │        │          │
//!   └────────────┴─────────────┴──────────────┴───────────┴────────┴──────────┴──► failed: machine
//!                                     ended, staged files removed, nothing published
//! ```
//!
//! The machine and the staged directory belong to the bake's own future; dropping it, as when the
//! client goes away, is the same as failing.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forkd_proto::agent::{Eval, Exec, Pong};
use forkd_proto::monitor::{BootConfig, Contents, Launch, LaunchAction, Role, SnapshotFacts};
use forkd_store::{Blob, Boot, SnapshotMeta, StagedSnapshot};
use forkd_types::rest::{BakeEvent, BakeRequest, EventKind};
use forkd_types::{Digest, StageTimings, Tag};
use tokio::sync::mpsc;

use crate::claims::{Claim, Claims};
use crate::console::{self, Follower};
use crate::control::{Control, expect_event};
use crate::error::{NodeError, NodeResult, with_causes};
use crate::events::News;
use crate::guest::Guest;
use crate::host::{Host, Traces, blocking, unix_now};
use crate::launch::{self, Launched, Owned};
use crate::networks::Network;
use crate::process::ProcessKey;
use crate::publication;
use crate::snapshot_writer::SnapshotWriter;
use crate::volumes::{self, Image};
use crate::zygotes::Zygotes;

/// Lines of the guest's console that a failure quotes.
const QUOTED_LINES: usize = 40;

/// How long one run or warm step may take.
const STEP_LIMIT: Duration = Duration::from_secs(3600);

/// Output of a run step that is collected for its failure text.
const STEP_OUTPUT_LIMIT: usize = 64 << 20;

/// The vsock context id of every guest; guests are told apart by their monitor, not by it.
const GUEST_CID: u32 = 3;

/// A bake whose request was checked and whose blobs are there.
pub(crate) struct Bake {
    host: Arc<Host>,
    zygotes: Arc<Zygotes>,
    _claim: Claim,
    request: BakeRequest,
    tag: Tag,
    kernel: (Digest, Blob),
    initramfs: (Digest, Blob),
    disk: (Digest, Blob),
    volumes: Vec<Image>,
}

/// The machine while it is being baked; dropping it ends it and removes its files.
struct Machine {
    host: Arc<Host>,
    key: ProcessKey,
    control: Arc<Control>,
    _process: Owned,
    _network: Option<Network>,
    guest: Guest,
    traces: Traces,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.host.database.forget_helper(self.key);
    }
}

/// Why a step failed, before the bake says which step it was.
type Reason = String;

impl Bake {
    /// Checks `request` and finds what it names.
    pub(crate) async fn prepare(
        host: &Arc<Host>,
        zygotes: &Arc<Zygotes>,
        claims: &Claims,
        request: BakeRequest,
    ) -> NodeResult<Self> {
        let tag: Tag = request.tag.parse()?;
        check_machine(&request)?;
        let claim = claims.claim(&tag)?;
        let find = |what: &'static str, text: &str| {
            let digest = parse_digest(what, text)?;
            Ok::<_, NodeError>((what, digest))
        };
        let wanted =
            [find("kernel", &request.kernel)?, find("initramfs", &request.initramfs)?, find("disk", &request.disk)?];
        let volumes = volumes::check(&request.volumes)?;
        let (store, own_tag, replace) = (host.store.clone(), tag.clone(), request.replace);
        let found = blocking("looking for blobs", move || -> NodeResult<_> {
            // Now, rather than after minutes of work.
            match (replace, store.get(&own_tag)) {
                (false, Ok(_)) => return Err(forkd_store::StoreError::AlreadyExists { tag: own_tag }.into()),
                (true, Ok(_)) => store.refuse_children(&own_tag)?,
                (_, Err(_)) => {}
            }
            let [kernel, initramfs, disk] = wanted.map(|(what, digest)| {
                let blob = store.blob(&digest)?.ok_or(NodeError::BlobMissing { what, digest })?;
                Ok::<_, NodeError>((digest, blob))
            });
            Ok(([kernel?, initramfs?, disk?], volumes::find(&store, volumes)?))
        });
        let ([kernel, initramfs, disk], volumes) = found.await??;
        let (host, zygotes) = (Arc::clone(host), Arc::clone(zygotes));
        Ok(Self { host, zygotes, _claim: claim, request, tag, kernel, initramfs, disk, volumes })
    }

    /// Does it. The last event is `Done` or `Failed`; when the receiver goes away the bake is
    /// abandoned.
    pub(crate) async fn run(self, events: mpsc::Sender<BakeEvent>) {
        let abandoned = events.clone();
        let (host, tag) = (Arc::clone(&self.host), self.tag.clone());
        let failed =
            |reason: &str| host.events.tell(News::of(EventKind::SnapshotFailed).snapshot(&tag).because(reason));
        let finished = tokio::select! {
            outcome = self.outcome(&events) => match outcome {
                Ok(event) => event,
                Err(error) => {
                    tracing::warn!(%error, "bake failed");
                    let error = with_causes(&error);
                    failed(&error);
                    BakeEvent::Failed { error }
                }
            },
            () = abandoned.closed() => {
                tracing::warn!("a bake was abandoned by its client");
                failed("it was abandoned by its client");
                return;
            }
        };
        let _ = events.send(finished).await;
    }

    /// Does it, telling `events` of its progress; the value is `Done`.
    pub(crate) async fn outcome(self, events: &mpsc::Sender<BakeEvent>) -> NodeResult<BakeEvent> {
        let mut steps = Steps {
            tag: self.tag.clone(),
            events,
            current: String::new(),
            since: None,
            timings: StageTimings::default(),
        };
        steps.begin("boot", "booting the guest").await;
        self.host.events.tell(News::of(EventKind::SnapshotWriting).snapshot(&self.tag));
        let network = self.network().await?;
        let (machine, launched) = self.boot(network)?;
        let console = machine.host.files.console(machine.traces.name());
        let mut follower = Follower::new(console.clone());
        let result = {
            let working = self.work(&machine, launched, &mut steps);
            tokio::pin!(working);
            loop {
                tokio::select! {
                    result = &mut working => break result,
                    piece = follower.next() => match piece {
                        Ok(text) => drop(events.send(BakeEvent::Console { text }).await),
                        Err(error) => break Err(format!("its console cannot be read: {error}")),
                    },
                }
            }
        };
        // What the guest said last is the most telling part when it failed.
        while let Some(text) = follower.take().ok().filter(|text| !text.is_empty()) {
            let _ = events.send(BakeEvent::Console { text }).await;
        }
        let snapshot = result.map_err(|reason| {
            let reason = self.explain(&machine, &console, steps.stage(), reason);
            NodeError::Bake { tag: self.tag.clone(), step: steps.current.clone(), reason }
        })?;
        steps.end();
        Ok(BakeEvent::Done { snapshot, stages: steps.timings })
    }

    /// Adds the machine's own account to the reason of a failure, unless the machine is well and it
    /// was a program in it or the host's disk that failed.
    fn explain(&self, machine: &Machine, console: &std::path::Path, stage: &str, reason: Reason) -> Reason {
        let mut text = reason;
        if matches!(stage, "run" | "warm" | "write" | "publish") && machine.control.ending().is_none() {
            return text;
        }
        let log = launch::log_tail(&self.host.files.log(machine.traces.name()), 10);
        if !log.is_empty() {
            text.push_str(&format!("\nits monitor's log ends:\n{log}"));
        }
        let said = console::read(console).unwrap_or_default();
        let said = console::last_lines(&String::from_utf8_lossy(&said), QUOTED_LINES);
        if !said.is_empty() {
            text.push_str(&format!("\nits console ends:\n{said}"));
        }
        text
    }

    /// A network, if there are any; a machine that boots with one has an interface in every copy.
    async fn network(&self) -> NodeResult<Option<Network>> {
        let Some(networks) = &self.host.networks else { return Ok(None) };
        let leased = Network::lease(networks, &format!("bake of {}", self.tag), false).await;
        let failed = |reason| NodeError::Bake { tag: self.tag.clone(), step: "leasing a network".to_owned(), reason };
        leased.map(Some).map_err(failed)
    }

    fn boot(&self, network: Option<Network>) -> NodeResult<(Machine, crate::control::Answer)> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let name = format!("bake-{:04x}", SERIAL.fetch_add(1, Ordering::Relaxed));
        let traces = Traces::of(&self.host, name.clone());
        let files = &self.host.files;
        let vsock = files.vsock(&name);
        let console = files.console(&name);
        let mut request = Fds::default();
        request.add(Role::Kvm, self.host.open_kvm()?);
        request.add(Role::Kernel, clone_file(&self.kernel.1)?);
        request.add(Role::Initramfs, clone_file(&self.initramfs.1)?);
        request.add(Role::DiskBase, clone_file(&self.disk.1)?);
        for image in &self.volumes {
            let role = if image.volume.policy.is_writable() { Role::DiskBase } else { Role::DiskShared };
            request.add(role, clone_file(&image.blob)?);
        }
        for _ in 0..self.writable_disks() {
            request.add(Role::DiskOverlay, self.overlay()?);
        }
        let opened = console::create(&console).map_err(NodeError::io(format!("create {}", console.display())))?;
        request.add(Role::Console, opened.into());
        request.add(
            Role::VsockListener,
            files.listen(&vsock).map_err(NodeError::io(format!("listen on {}", vsock.display())))?,
        );
        if let Some(network) = &network {
            request.add(Role::Tap, network.tap().map_err(NodeError::io("plug in a network"))?);
        }
        let action = LaunchAction::Boot(BootConfig {
            vcpus: self.request.vcpus as u8,
            memory_bytes: self.request.memory_mib << 20,
            kernel_args: volumes::kernel_args(self.request.kernel_args.as_deref(), &self.volumes),
            mac: network.as_ref().map(|_| forkd_net::GUEST_MAC),
            disks: self.disks().map(|(_, bytes)| bytes).collect(),
            guest_cid: GUEST_CID,
        });
        let message = Launch { fds: request.roles, name: name.clone(), action };
        let log = files.log(&name);
        let place = |pid| self.host.groups.place_helper(pid);
        let Launched { control, process, answer } =
            launch::launch(&self.host.config.vmm, &log, &message, request.fds, place)?;
        if let Some(network) = &network {
            network.used_by(&process.0);
        }
        let key = process.0.key();
        self.host.database.note_helper(key, name);
        let (host, guest) = (Arc::clone(&self.host), Guest::behind(vsock));
        Ok((Machine { host, key, control, _process: process, _network: network, guest, traces }, answer))
    }

    /// Image and size of each disk.
    fn disks(&self) -> impl Iterator<Item = (Digest, u64)> {
        let volumes = self.volumes.iter().map(|image| (image.digest, image.blob.size));
        std::iter::once((self.disk.0, self.disk.1.size)).chain(volumes)
    }

    /// How many of them the guest can write to.
    fn writable_disks(&self) -> usize {
        1 + self.volumes.iter().filter(|image| image.volume.policy.is_writable()).count()
    }

    fn overlay(&self) -> NodeResult<OwnedFd> {
        self.host.files.overlay().map_err(NodeError::io("create a scratch file for the disk"))
    }

    /// Everything from the boot on, watching that the machine does not stop meanwhile.
    async fn work(
        &self,
        machine: &Machine,
        launched: crate::control::Answer,
        steps: &mut Steps<'_>,
    ) -> Result<Box<forkd_types::rest::SnapshotInfo>, Reason> {
        let making = self.warm_and_write(machine, launched, steps);
        let (pong, staged, facts) = machine.control.while_running(making).await?;
        steps.begin("publish", "publishing the snapshot").await;
        self.publish(pong, staged, facts).await.map(Box::new)
    }

    async fn warm_and_write(
        &self,
        machine: &Machine,
        launched: crate::control::Answer,
        steps: &mut Steps<'_>,
    ) -> Result<(Pong, StagedSnapshot, SnapshotFacts), Reason> {
        let running = launched.wait().await.map_err(|error| error.to_string())?;
        expect_event!(machine.traces.name(), running, Running { stages }).map_err(|error| error.to_string())?;
        steps.begin("agent", "waiting for the guest's agent").await;
        let limit = Duration::from_secs(self.request.boot_timeout_secs);
        match tokio::time::timeout(limit, machine.guest.await_agent()).await {
            Ok(pong) => pong.map_err(|error| error.to_string())?,
            Err(_) => return Err(format!("no answer within {} s", limit.as_secs())),
        };
        for (index, args) in self.request.run.iter().enumerate() {
            steps.begin("run", format!("step {} of {}: {}", index + 1, self.request.run.len(), args.join(" "))).await;
            run_step(&machine.guest, args).await?;
        }
        for step in &self.request.warm {
            steps.begin("warm", format!("warming {}: {}", step.language, step.code)).await;
            let eval = Eval { language: Some(step.language.clone()), code: step.code.clone(), timeout_ms: None };
            let evaluated = machine.guest.eval(eval, STEP_LIMIT).await.map_err(|error| error.to_string())?;
            if let Some(error) = evaluated.error {
                return Err(error);
            }
        }
        steps.begin("sync", "flushing the guest's disk").await;
        machine.guest.sync(Duration::from_secs(600)).await.map_err(|error| error.to_string())?;
        // Asked again: warm steps have started runtimes.
        let pong = machine.guest.ping(Duration::from_secs(60)).await.map_err(|error| error.to_string())?;
        steps.begin("write", "writing the snapshot").await;
        let (staged, facts) = self.write(machine, steps).await?;
        Ok((pong, staged, facts))
    }

    async fn write(&self, machine: &Machine, steps: &mut Steps<'_>) -> Result<(StagedSnapshot, SnapshotFacts), Reason> {
        let (store, tag) = (self.host.store.clone(), self.tag.clone());
        let staged =
            blocking("staging a snapshot", move || store.stage(&tag)).await.map_err(|error| error.to_string())?;
        let staged = staged.map_err(|error| with_causes(&error))?;
        let (control, disks) = (&machine.control, self.writable_disks());
        let writer = SnapshotWriter::fork(&self.host, control, disks, &staged, Contents::Whole).await;
        let written = writer.map_err(|error| error.to_string())?.finish(&self.host).await;
        let (facts, stages) = written.map_err(|reason| format!("{reason}, in {}", staged.path().display()))?;
        for stage in stages.0 {
            steps.timings.record(&format!("write.{}", stage.name), Duration::from_micros(stage.us));
        }
        Ok((staged, facts))
    }

    async fn publish(
        &self,
        pong: Pong,
        staged: StagedSnapshot,
        facts: SnapshotFacts,
    ) -> Result<forkd_types::rest::SnapshotInfo, Reason> {
        let boot = Boot {
            kernel: self.kernel.0,
            initramfs: Some(self.initramfs.0),
            kernel_release: pong.kernel,
            agent_version: pong.agent,
            guest_cid: GUEST_CID,
            cpu: self.host.cpu.clone(),
        };
        let disks: Vec<_> = self.disks().collect();
        let volumes: Vec<_> = self.volumes.iter().map(|image| image.volume.clone()).collect();
        let describe = move |staged: &mut StagedSnapshot| {
            let tag = staged.tag().clone();
            let mut meta = SnapshotMeta::new(tag, unix_now(), &facts, staged.vmstate_bytes()?, &disks, boot);
            meta.set_volumes(volumes);
            meta.warm = pong.warm;
            Ok(meta)
        };
        let published = publication::publish(&self.host.store, staged, self.request.replace, describe).await;
        // Children of the tag come from the new snapshot from now on.
        self.zygotes.discard(&self.tag);
        if published.is_ok() {
            self.host.events.tell(News::of(EventKind::SnapshotReady).snapshot(&self.tag));
        }
        published.map_err(|error| with_causes(&error))
    }
}

/// Descriptors of one message with what they are.
#[derive(Default)]
struct Fds {
    roles: Vec<Role>,
    fds: Vec<OwnedFd>,
}

impl Fds {
    fn add(&mut self, role: Role, fd: OwnedFd) {
        self.roles.push(role);
        self.fds.push(fd);
    }
}

fn clone_file(blob: &Blob) -> NodeResult<OwnedFd> {
    Ok(blob.file.try_clone().map_err(NodeError::io(format!("open {}", blob.path.display())))?.into())
}

async fn run_step(guest: &Guest, args: &[String]) -> Result<(), Reason> {
    let exec = Exec { args: args.to_vec(), ..Exec::default() };
    let done = guest.exec(exec, None, STEP_OUTPUT_LIMIT, STEP_LIMIT).await.map_err(|error| error.to_string())?;
    if done.exited.code == 0 {
        return Ok(());
    }
    let output = [done.stdout, done.stderr].concat();
    let said = console::last_lines(&String::from_utf8_lossy(&output), QUOTED_LINES);
    Err(format!("it exited with {}\n{said}", done.exited.code))
}

/// Tells which step is under way and how long each took.
struct Steps<'a> {
    tag: Tag,
    events: &'a mpsc::Sender<BakeEvent>,
    current: String,
    since: Option<(&'static str, Instant)>,
    timings: StageTimings,
}

impl Steps<'_> {
    async fn begin(&mut self, stage: &'static str, message: impl Into<String>) {
        self.end();
        self.current = message.into();
        tracing::info!(tag = %self.tag, "{}", self.current);
        self.since = Some((stage, Instant::now()));
        let _ = self.events.send(BakeEvent::Step { message: self.current.clone() }).await;
    }

    /// The short name of the step under way.
    fn stage(&self) -> &'static str {
        self.since.map_or("", |(stage, _)| stage)
    }

    fn end(&mut self) {
        if let Some((stage, since)) = self.since.take() {
            self.timings.record(stage, since.elapsed());
        }
    }
}

fn parse_digest(field: &'static str, text: &str) -> NodeResult<Digest> {
    let rule = "a blob is named by \"blake3:\" and 64 lower-case hex digits";
    text.parse().map_err(|_| NodeError::BadField { field, value: format!("{text:?}"), rule })
}

fn check_machine(request: &BakeRequest) -> NodeResult<()> {
    let bad = |field, value: u64, rule| Err(NodeError::BadField { field, value: value.to_string(), rule });
    if !(1..=8).contains(&request.vcpus) {
        return bad("vcpus", request.vcpus.into(), "a guest has 1 to 8");
    }
    if !(128..=16384).contains(&request.memory_mib) || !request.memory_mib.is_multiple_of(2) {
        return bad("memory_mib", request.memory_mib, "a guest has 128 to 16384 MiB, an even number");
    }
    if request.boot_timeout_secs == 0 {
        return bad("boot_timeout_secs", 0, "give the guest at least a second");
    }
    if let Some(empty) = request.run.iter().position(Vec::is_empty) {
        return bad("run", empty as u64, "this step names no program");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(change: serde_json::Value) -> BakeRequest {
        let mut body = serde_json::json!({ "tag": "py", "disk": "d", "kernel": "k", "initramfs": "i" });
        body.as_object_mut().expect("object").extend(change.as_object().expect("object").clone());
        serde_json::from_value(body).expect("valid")
    }

    #[test]
    fn machines_are_checked_at_their_edges() {
        use serde_json::json;
        for good in [json!({}), json!({"vcpus": 8, "memory_mib": 16384}), json!({"memory_mib": 128})] {
            check_machine(&request(good.clone())).unwrap_or_else(|error| panic!("{good}: {error}"));
        }
        for bad in [
            json!({"vcpus": 0}),
            json!({"vcpus": 9}),
            json!({"memory_mib": 127}),
            json!({"memory_mib": 129}),
            json!({"memory_mib": 16386}),
            json!({"boot_timeout_secs": 0}),
            json!({"run": [["true"], []]}),
        ] {
            assert!(matches!(check_machine(&request(bad.clone())), Err(NodeError::BadField { .. })), "{bad}");
        }
    }
}
