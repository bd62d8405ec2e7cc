//! `from-image` and `snapshot`: two ways to name a root disk, one way to bake it.

use std::mem::take;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use forkd_image::KernelChoice;
use forkd_types::rest::{SnapshotStatus, WarmStep};
use forkd_types::{ByteSize, SandboxId, Tag};

use super::Context;
use super::branch::FromSandboxOptions;
use crate::bake::{Parts, Recipe, bake};
use crate::blob::Blob;
use crate::client::Client;
use crate::failure::advised;
use crate::ingredients::{self, DEFAULT_KERNEL, Plan};
use crate::interrupt::Interrupts;
use crate::volume::{self, VolumeArg};
use crate::{environment, output};

/// How the machine is shaped and warmed.
#[derive(Args, Debug)]
struct RecipeArgs {
    /// Replace a snapshot of that name
    #[arg(long)]
    replace: bool,
    /// Run a command before the snapshot: a line for /bin/sh, or a JSON array of words
    #[arg(long, value_name = "COMMAND", value_parser = command)]
    run: Vec<Words>,
    /// Run source in an interpreter that stays warm: 'python:import numpy', 'node:…'; python when
    /// no language is named
    #[arg(long, value_name = "LANGUAGE:SOURCE", value_parser = warm_step)]
    warm: Vec<WarmStep>,
    /// Guest memory, 128M to 16G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = memory)]
    memory: ByteSize,
    /// Guest memory in MiB, for existing scripts
    #[arg(long, value_name = "MIB", hide = true, conflicts_with = "memory",
          value_parser = clap::value_parser!(u64).range(128..=16384))]
    mem_size_mib: Option<u64>,
    /// vCPUs, 1 to 8
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    cpus: u32,
    /// A further disk: an image of an ext4 file system on this host, and where the guest has it. Every
    /// copy writes to a private one (rw), or all read the same (ro). Up to 24
    #[arg(long, value_name = "HOST:GUEST[:ro|rw]")]
    volume: Vec<VolumeArg>,
    /// How long the guest may take until its agent answers
    #[arg(long, value_name = "SECONDS", default_value_t = 180, value_parser = clap::value_parser!(u64).range(1..=3600))]
    boot_timeout_secs: u64,
    /// Accepted for existing scripts: the agent says when the guest is ready
    #[arg(long, hide = true)]
    boot_wait_secs: Option<u64>,
}

/// A command as words.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Words(Vec<String>);

impl RecipeArgs {
    fn recipe(self, tag: Tag) -> Recipe {
        Recipe {
            tag,
            vcpus: self.cpus,
            memory: self.mem_size_mib.map_or(self.memory, ByteSize::mib),
            run: self.run.into_iter().map(|Words(words)| words).collect(),
            warm: self.warm,
            boot_timeout: Duration::from_secs(self.boot_timeout_secs),
            replace: self.replace,
        }
    }
}

/// Arguments of `forkd from-image`.
#[derive(Args, Debug)]
pub(crate) struct FromImageArgs {
    /// debian:SUITE?include=PACKAGE,…, dir:PATH or tar:PATH
    source: String,
    /// Name of the snapshot
    #[arg(long)]
    tag: Tag,
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Further Debian packages
    #[arg(long, value_name = "PACKAGE")]
    extra: Vec<String>,
    /// Size of the root disk; the content and half a GiB of room when absent
    #[arg(long)]
    size: Option<ByteSize>,
    /// Build the root disk again although it is cached, to take in the suite's updates
    #[arg(long)]
    refresh: bool,
    /// The Debian mirror to build from
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    /// Size of the root disk in MiB, for existing scripts
    #[arg(long, value_name = "MIB", hide = true, conflicts_with = "size")]
    size_mib: Option<u64>,
    /// Guest kernel: debian-6.12-cloud, debian-6.1-generic, apt:PACKAGE, or the path of a .deb,
    /// bzImage or vmlinux
    #[arg(long, default_value = DEFAULT_KERNEL, env = environment::FORKD_KERNEL)]
    kernel: KernelChoice,
}

impl FromImageArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        interrupts.guard(self.bake(context)).await
    }

    async fn bake(mut self, context: &Context) -> anyhow::Result<u8> {
        let volumes = volume::read(&take(&mut self.recipe.volume), &context.data, &context.progress).await?;
        let recipe = self.recipe.recipe(self.tag);
        let size = self.size.or(self.size_mib.map(ByteSize::mib));
        let plan = Plan::new(&self.source, &self.extra, size)?.with_mirror(self.mirror, self.refresh);
        let client = context.client().await?;
        refuse_existing(&client, &recipe).await?;
        let parts = plan.make(self.kernel, &context.data, &context.progress).await?;
        let parts = Parts { volumes, ..parts };
        let snapshot = bake(&client, &parts, &recipe, &context.progress).await?;
        output::line(snapshot.tag)?;
        context.progress.say(format_args!("next: forkd spawn --tag {} -n 10", recipe.tag));
        Ok(0)
    }
}

/// Arguments of `forkd snapshot`.
#[derive(Args, Debug)]
pub(crate) struct SnapshotArgs {
    /// Name of the snapshot; made up when absent with --from-sandbox
    #[arg(long, required_unless_present = "from_sandbox")]
    tag: Option<Tag>,
    /// Take the snapshot of this running sandbox, instead of booting
    #[arg(long, value_name = "SANDBOX")]
    from_sandbox: Option<SandboxId>,
    #[command(flatten)]
    of_sandbox: FromSandboxOptions,
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Guest kernel: debian-6.12-cloud, debian-6.1-generic, apt:PACKAGE, or the path of a .deb,
    /// bzImage or vmlinux
    #[arg(long, env = environment::FORKD_KERNEL, required_unless_present = "from_sandbox")]
    kernel: Option<KernelChoice>,
    /// Root disk: a raw ext4 image; it is copied, never written
    #[arg(long, env = environment::FORKD_ROOTFS, required_unless_present = "from_sandbox")]
    rootfs: Option<PathBuf>,
    /// Accepted for existing scripts: every child writes to its own copy
    #[arg(long, hide = true)]
    rw: bool,
    /// Accepted for existing scripts: guests need no host interface
    #[arg(long, hide = true)]
    tap: Option<String>,
    /// Accepted for existing scripts: there is no work directory
    #[arg(long, hide = true)]
    keep_workdir: bool,
}

impl SnapshotArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        let Self { tag, from_sandbox, of_sandbox, recipe, kernel, rootfs, .. } = self;
        match (from_sandbox, tag, kernel, rootfs) {
            (Some(sandbox), tag, ..) => interrupts.guard(of_sandbox.run(&sandbox, tag, recipe.replace, context)).await,
            (None, Some(tag), Some(kernel), Some(rootfs)) => {
                interrupts.guard(Self::bake(recipe, tag, kernel, rootfs, context)).await
            }
            _ => unreachable!("clap requires them together"),
        }
    }

    async fn bake(
        mut recipe: RecipeArgs,
        tag: Tag,
        kernel: KernelChoice,
        rootfs: PathBuf,
        context: &Context,
    ) -> anyhow::Result<u8> {
        let volumes = volume::read(&take(&mut recipe.volume), &context.data, &context.progress).await?;
        let recipe = recipe.recipe(tag);
        let notes = context.data.digests();
        let disk = Blob::of(rootfs, "root disk", &notes, &context.progress).await?;
        let (kernel, initramfs) = ingredients::kernel_and_initramfs(kernel, &context.data, &context.progress).await?;
        let client = context.client().await?;
        refuse_existing(&client, &recipe).await?;
        let parts = Parts { kernel, initramfs, disk, volumes };
        bake(&client, &parts, &recipe, &context.progress).await?;
        context.progress.say(format_args!("next: forkd fork --tag {} -n 10", recipe.tag));
        Ok(0)
    }
}

/// Says so before minutes are spent on building, rather than after.
async fn refuse_existing(client: &Client, recipe: &Recipe) -> anyhow::Result<()> {
    if recipe.replace {
        return Ok(());
    }
    let taken = |snapshot: &forkd_types::rest::SnapshotInfo| {
        snapshot.tag == recipe.tag && snapshot.status != SnapshotStatus::Failed
    };
    if client.snapshots().await?.iter().any(taken) {
        let error = anyhow::anyhow!("there is a snapshot {} already", recipe.tag);
        return Err(advised(error, format!("the same with --replace, or: forkd rmi {}", recipe.tag)));
    }
    Ok(())
}

fn command(text: &str) -> Result<Words, String> {
    if text.trim_start().starts_with('[') {
        let words: Vec<String> =
            serde_json::from_str(text).map_err(|error| format!("not a JSON array of words: {error}"))?;
        return if words.is_empty() { Err("a command needs at least one word".into()) } else { Ok(Words(words)) };
    }
    Ok(Words(["/bin/sh", "-c", text].map(str::to_owned).to_vec()))
}

fn warm_step(text: &str) -> Result<WarmStep, String> {
    let (language, code) = match text.split_once(':') {
        Some((language @ ("python" | "node"), code)) => (language, code),
        _ => ("python", text),
    };
    if code.trim().is_empty() {
        return Err("there is no source to run".into());
    }
    Ok(WarmStep { language: language.to_owned(), code: code.to_owned() })
}

fn memory(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|error: forkd_types::ByteSizeError| error.to_string())?;
    if size < ByteSize::mib(128) || size > ByteSize::gib(16) {
        return Err(format!("{size} is not between 128 MiB and 16 GiB"));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_lines_or_words() {
        let words = |words: &[&str]| Ok(Words(words.iter().map(|&word| word.to_owned()).collect()));
        assert_eq!(command("a | b"), words(&["/bin/sh", "-c", "a | b"]));
        assert_eq!(command(r#"["/x","y z"]"#), words(&["/x", "y z"]));
        assert!(command("[]").is_err() && command("[1]").is_err());
    }

    #[test]
    fn warm_steps_may_name_their_language() {
        let step = |text| warm_step(text).map(|step| (step.language, step.code));
        assert_eq!(step("python:import numpy"), Ok(("python".into(), "import numpy".into())));
        assert_eq!(step("node:require('fs')"), Ok(("node".into(), "require('fs')".into())));
        assert_eq!(step("d = {1: 2}"), Ok(("python".into(), "d = {1: 2}".into())));
        assert!(step("python: ").is_err());
    }

    #[test]
    fn memory_has_limits() {
        assert_eq!(memory("1G"), Ok(ByteSize::gib(1)));
        assert!(memory("64M").is_err() && memory("17G").is_err() && memory("lots").is_err());
    }
}
