//! `run`: one program in a child of an image, and nothing left of either but the snapshot.

use std::time::Duration;

use clap::Args;
use forkd_image::KernelChoice;
use forkd_proto::agent::Exec;
use forkd_types::rest::{SnapshotStatus, SpawnRequest};
use forkd_types::{ByteSize, Tag};

use super::exec::{session, variable};
use super::{Context, lost, sandbox_error, spawn_error};
use crate::bake::{Recipe, bake};
use crate::children::Children;
use crate::client::Client;
use crate::ingredients::{DEFAULT_KERNEL, Plan};
use crate::interrupt::Interrupts;
use crate::{environment, terminal};

/// The longest tag.
const TAG_LEN: usize = 64;

/// Arguments of `forkd run`.
#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// debian:SUITE?include=PACKAGE,…, dir:PATH or tar:PATH
    #[arg(long, value_name = "SOURCE")]
    image: String,
    /// Further Debian packages
    #[arg(long, value_name = "PACKAGE")]
    extra: Vec<String>,
    /// Name of the snapshot that is made of the image and kept for the next run; run-IMAGE when absent
    #[arg(long)]
    tag: Option<Tag>,
    /// Make the snapshot again although there is one
    #[arg(long)]
    refresh: bool,
    /// Guest kernel: debian-6.12-cloud, debian-6.1-generic, apt:PACKAGE, or the path of a .deb,
    /// bzImage or vmlinux
    #[arg(long, default_value = DEFAULT_KERNEL, env = environment::FORKD_KERNEL)]
    kernel: KernelChoice,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Run it on a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set a variable
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Kill the program and all it started after this long
    #[arg(long, value_name = "SECONDS")]
    timeout_secs: Option<u64>,
    /// Accepted for existing scripts: disks are cached in the data directory
    #[arg(long, hide = true)]
    cache: Option<String>,
    /// Accepted for existing scripts: guests need no host interface
    #[arg(long, hide = true)]
    tap: Option<String>,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl RunArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        let tag = self.tag.clone().unwrap_or_else(|| tag_of(&self.image, &self.extra));
        let client = context.client().await?;
        interrupts.guard(self.prepare(&client, &tag, context)).await?;
        let request = SpawnRequest::of(&tag, 1);
        let children = Children::spawn(&client, &request, &mut interrupts, &context.progress).await;
        let children = children.map_err(spawn_error)?;
        // Signals from here on are the program's.
        let outcome = self.execute(&client, &children).await;
        children.kill().await;
        outcome
    }

    /// Makes the snapshot, unless there is one.
    async fn prepare(&self, client: &Client, tag: &Tag, context: &Context) -> anyhow::Result<()> {
        let is_ready = client
            .snapshots()
            .await?
            .iter()
            .any(|snapshot| snapshot.tag == *tag && snapshot.status == SnapshotStatus::Ready);
        if is_ready && !self.refresh {
            return Ok(());
        }
        let plan = Plan::new(&self.image, &self.extra, None)?.with_mirror(None, self.refresh);
        let parts = plan.make(self.kernel.clone(), &context.data, &context.progress).await?;
        let recipe = Recipe {
            tag: tag.clone(),
            vcpus: 1,
            memory: ByteSize::mib(512),
            run: Vec::new(),
            warm: Vec::new(),
            boot_timeout: Duration::from_secs(300),
            replace: true,
        };
        bake(client, &parts, &recipe, &context.progress).await.map(drop)
    }

    async fn execute(&self, client: &Client, children: &Children) -> anyhow::Result<u8> {
        let sandbox = match (&children.report().sandboxes[..], &children.report().failures[..]) {
            ([sandbox, ..], _) => &sandbox.id,
            ([], [failure, ..]) => anyhow::bail!("the child did not come up: {}", failure.error),
            ([], []) => anyhow::bail!("the daemon forked no child and gave no reason"),
        };
        let connection = client.agent(sandbox).await.map_err(sandbox_error)?;
        let exec = Exec {
            args: self.command.clone(),
            env: if self.tty { terminal::with_kind(self.env.clone()) } else { self.env.clone() },
            timeout_ms: self.timeout_secs.map(|seconds| seconds.saturating_mul(1000)),
            stdin: self.interactive,
            terminal: self.tty.then(terminal::size),
            ..Exec::default()
        };
        match session::run(connection, &exec).await {
            Err(error) => Err(lost(client, error, sandbox).await),
            done => done,
        }
    }
}

/// The tag of what is made of an image: readable, and another for another image.
fn tag_of(image: &str, extra: &[String]) -> Tag {
    let whole = [image].into_iter().chain(extra.iter().map(String::as_str)).collect::<Vec<_>>().join(" ");
    let slug: String = whole.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let digest = blake3::hash(whole.as_bytes()).to_hex();
    let room = TAG_LEN - "run--".len() - 8;
    format!("run-{}-{}", &slug[..slug.len().min(room)], &digest[..8]).parse().expect("made of legal characters")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_have_tags_of_their_own() {
        let plain = tag_of("debian:bookworm", &[]);
        assert!(plain.to_string().starts_with("run-debian-bookworm-"), "{plain}");
        assert_ne!(plain, tag_of("debian-bookworm", &[]));
        assert_ne!(plain, tag_of("debian:bookworm", &["git".to_owned()]));
        assert!(tag_of(&"ü/".repeat(300), &[]).to_string().len() <= TAG_LEN);
    }
}
