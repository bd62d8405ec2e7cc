//! `quickstart`: from nothing to forked children that answer.
//!
//! Check the host, get a kernel, build a root disk, bake the snapshot `quickstart`, fork, run code in
//! every child, show what it cost, kill them. What exists already is reused.

mod report;

use std::time::{Duration, Instant};

use clap::Args;
use forkd_types::rest::{SPAWN_LIMIT, SnapshotStatus, WarmStep};
use forkd_types::{ByteSize, Tag};

use super::spawn::ChildOptions;
use super::{Context, spawn_error};
use crate::bake::{Recipe, bake};
use crate::children::Children;
use crate::client::{Client, ClientError};
use crate::doctor::{Package, missing_packages};
use crate::endpoint::Endpoint;
use crate::failure::advised;
use crate::ingredients;
use crate::interrupt::Interrupts;
use crate::measurement::{CHILD_LIMIT, Manner, evaluate, measure};
use crate::{endpoint, machine, output, programs};

/// The snapshot that the quick start makes and reuses.
const TAG: &str = "quickstart";

/// What every child computes first.
const FIRST: &str = "numpy.zeros(5).tolist()";

/// What the first evaluation must give.
const FIRST_RESULT: &str = "[0.0, 0.0, 0.0, 0.0, 0.0]";

/// What must differ between children: the host name, the kernel's generator, numpy's generator.
const DIFFERING: &str = "\
import os, json, socket
print(json.dumps([socket.gethostname(), os.urandom(8).hex(), numpy.random.rand()]))";

/// The daemon's code for a snapshot that was made on a processor with more features.
const LACKS_FEATURES: &str = "processor_lacks_features";

/// How long the guest may take until its agent answers; translated guests are slow.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// Arguments of `forkd quickstart`.
#[derive(Args, Debug)]
pub(crate) struct QuickstartArgs {
    /// How many children
    #[arg(short, long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=i64::from(SPAWN_LIMIT)))]
    n: u32,
    /// The root disk to build
    #[arg(long, value_name = "SOURCE", default_value = "debian:bookworm?include=python3-numpy")]
    image: String,
    /// Do not ask before downloading and building
    #[arg(short, long)]
    yes: bool,
    /// Print the measurements as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    options: ChildOptions,
}

impl QuickstartArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let began = Instant::now();
        let mut interrupts = Interrupts::catch()?;
        let tag: Tag = TAG.parse().expect("the constant is a legal tag");
        let Endpoint { client, place } = interrupts.guard(self.prepare(&tag, context)).await?;
        let children = match self.fork(&client, &tag, &mut interrupts, context).await {
            Err(error) if is_of_another_processor(&error) => {
                context.progress.say(format_args!("{error}"));
                context.progress.say(format_args!("baking {tag} again, on this host"));
                interrupts.guard(self.bake_again(&client, &tag, context)).await?;
                self.fork(&client, &tag, &mut interrupts, context).await
            }
            outcome => outcome,
        };
        let children = children.map_err(spawn_error)?;
        let spawn = children.report().clone();
        let measured = {
            let (client, children_ref) = (&client, &children);
            let manner = Manner::of(place, CHILD_LIMIT);
            let work = async {
                let (measured, evaluated_us) = measure(client, children_ref, FIRST, manner, &context.progress).await;
                let ids: Vec<_> = measured.iter().map(|child| child.id.clone()).collect();
                let differing =
                    evaluate(client, &ids, DIFFERING, manner, "What differs between children", &context.progress).await;
                Ok((measured, evaluated_us, differing))
            };
            interrupts.guard(work).await
        };
        children.kill().await;
        let (measured, evaluated_us, differing) = measured?;
        let report = report::Report::new(spawn, measured, differing, evaluated_us, began.elapsed());
        if self.json {
            output::json(&report)?;
        } else {
            report.print()?;
        }
        report.verdict(self.n, FIRST_RESULT)?;
        context.progress.say("next: forkd spawn --tag quickstart -n 3; forkd ls; forkd exec SANDBOX -- uname -a");
        Ok(0)
    }

    /// Everything up to a daemon that has the snapshot.
    async fn prepare(&self, tag: &Tag, context: &Context) -> anyhow::Result<Endpoint> {
        // A daemon that has it needs no tools and no images on this host.
        let running = endpoint::find(&context.daemon, &context.data).await?;
        if let Some(endpoint) = &running
            && status(&endpoint.client, tag).await? == Some(SnapshotStatus::Ready)
        {
            return Ok(reuse(endpoint.clone(), tag, context));
        }
        self.announce_work(running.is_none(), context).await?;
        let endpoint = context.endpoint().await?;
        let existing = status(&endpoint.client, tag).await?;
        if existing == Some(SnapshotStatus::Ready) {
            return Ok(reuse(endpoint, tag, context));
        }
        self.bake(&endpoint.client, tag, existing.is_some(), context).await?;
        Ok(endpoint)
    }

    /// Forks the children and waits until all agents have answered.
    async fn fork(
        &self,
        client: &Client,
        tag: &Tag,
        interrupts: &mut Interrupts,
        context: &Context,
    ) -> anyhow::Result<Children> {
        let step = context.progress.step(format!("Forking n={}", self.n));
        let request = self.options.request(tag, self.n);
        let children = Children::spawn(client, &request, interrupts, &context.progress).await?;
        step.done(format_args!("Forked {} of {}; every agent answered", children.report().sandboxes.len(), self.n));
        Ok(children)
    }

    /// Replaces a snapshot that this host cannot run.
    async fn bake_again(&self, client: &Client, tag: &Tag, context: &Context) -> anyhow::Result<()> {
        self.announce_work(false, context).await?;
        self.bake(client, tag, true, context).await
    }

    /// Builds what the snapshot is made of, where it is not cached, and makes it.
    async fn bake(&self, client: &Client, tag: &Tag, replace: bool, context: &Context) -> anyhow::Result<()> {
        let plan = ingredients::Plan::new(&self.image, &[], None)?;
        let parts = plan.make(ingredients::default_kernel(), &context.data, &context.progress).await?;
        let recipe = Recipe {
            tag: tag.clone(),
            vcpus: 1,
            memory: ByteSize::mib(512),
            run: Vec::new(),
            warm: vec![WarmStep { language: "python".into(), code: "import numpy".into() }],
            boot_timeout: BOOT_TIMEOUT,
            replace,
        };
        bake(client, &parts, &recipe, &context.progress).await.map(drop)
    }

    /// Says what will be installed, downloaded and built; asks unless told not to; installs.
    async fn announce_work(&self, starts_daemon: bool, context: &Context) -> anyhow::Result<()> {
        let step = context.progress.quick_step("Looking at this host");
        let needs_machine = starts_daemon && !machine::probe().await.is_usable();
        step.vanish();
        let missing = missing_packages(needs_machine);
        let mut work = Vec::new();
        if !missing.is_empty() {
            work.push(format!("install {} with apt-get", packages(&missing)));
        }
        work.extend(ingredients::work_ahead(&self.image, &context.data));
        if !work.is_empty() && !self.yes {
            confirm(&work)?;
        }
        if missing.is_empty() { Ok(()) } else { install(&missing, context).await }
    }
}

/// How the daemon's snapshot `tag` is; none when there is none.
async fn status(client: &Client, tag: &Tag) -> anyhow::Result<Option<SnapshotStatus>> {
    let snapshots = client.snapshots().await?;
    Ok(snapshots.into_iter().find(|snapshot| snapshot.tag == *tag).map(|snapshot| snapshot.status))
}

/// Whether the daemon refused the snapshot because its guest has seen processor features that this
/// host lacks, as when a data directory moved to another host.
fn is_of_another_processor(error: &anyhow::Error) -> bool {
    let refusal = error.downcast_ref::<ClientError>();
    refusal.and_then(ClientError::code) == Some(LACKS_FEATURES)
}

fn reuse(endpoint: Endpoint, tag: &Tag, context: &Context) -> Endpoint {
    context.progress.say(format_args!("✓ Snapshot {tag} is there (`forkd rmi {tag}` to have it made anew)"));
    endpoint
}

fn packages(missing: &[Package]) -> String {
    missing.iter().map(|package| package.package).collect::<Vec<_>>().join(" ")
}

/// Installs distribution packages; only root can.
async fn install(missing: &[Package], context: &Context) -> anyhow::Result<()> {
    let names = packages(missing);
    let by_hand = format!("sudo apt-get install {names}");
    let apt = programs::in_path("apt-get").filter(|_| rustix::process::geteuid().is_root());
    let Some(apt) = apt else {
        return Err(advised(
            anyhow::anyhow!("these packages are missing and cannot be installed from here: {names}"),
            by_hand,
        ));
    };
    let step = context.progress.step(format!("Installing {names}"));
    let mut command = tokio::process::Command::new(apt);
    command.args(["install", "--yes", "--no-install-recommends"]).args(missing.iter().map(|package| package.package));
    command.env("DEBIAN_FRONTEND", "noninteractive").stdin(std::process::Stdio::null()).kill_on_drop(true);
    let output = command.output().await?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let error = anyhow::anyhow!("apt-get could not install {names}:\n{}", said.trim());
        return Err(advised(error, format!("sudo apt-get update && {by_hand}")));
    }
    step.done(format_args!("Installed {names}"));
    Ok(())
}

/// Asks whether to go on; without a terminal nobody can answer, so that is a no.
fn confirm(work: &[String]) -> anyhow::Result<()> {
    output::remark("The quick start will now:");
    for item in work {
        output::remark(format_args!("  - {item}"));
    }
    if output::confirm("proceed? [y/N] ")? {
        return Ok(());
    }
    Err(advised(anyhow::anyhow!("nothing was done"), "forkd quickstart --yes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::StatusCode;

    fn refusal(status: StatusCode, body: &str) -> anyhow::Error {
        ClientError::refused(status, body.as_bytes()).into()
    }

    #[test]
    fn only_a_snapshot_of_another_processor_is_baked_again() {
        let lacking = r#"{"error":"snapshot quickstart needs avx2","code":"processor_lacks_features"}"#;
        assert!(is_of_another_processor(&refusal(StatusCode::CONFLICT, lacking)));
        let unready = r#"{"error":"snapshot quickstart is not ready","code":"snapshot_not_ready"}"#;
        assert!(!is_of_another_processor(&refusal(StatusCode::CONFLICT, unready)));
        assert!(!is_of_another_processor(&refusal(StatusCode::NOT_FOUND, "processor_lacks_features")));
        assert!(!is_of_another_processor(&anyhow::anyhow!("processor_lacks_features")));
    }
}
