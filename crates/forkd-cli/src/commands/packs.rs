//! `pack`, `unpack`: a snapshot with all that it derives from, as one file.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use forkd_store::pack::{DEFAULT_LEVEL, LEVELS, SigningKey, VerifyingKey};
use forkd_types::rest::{UnpackFate, UnpackReport};
use forkd_types::{ByteSize, Tag};
use serde::Serialize;
use tempfile::TempPath;

use super::Context;
use crate::client::{Client, ClientError, PackQuery, UnpackQuery};
use crate::failure::{Advise, UsageError, advised};
use crate::interrupt::Interrupts;
use crate::output;
use crate::pack_file::{self, PackFacts};
use crate::progress::Progress;

/// How often a bar is moved.
const REDRAW: Duration = Duration::from_millis(100);

/// What is said about a snapshot in its pack.
#[derive(Args, Debug)]
pub(crate) struct PackRecipe {
    /// What to say about the snapshot
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// What to say it was baked from
    #[arg(long, value_name = "IMAGE")]
    base_image: Option<String>,
    /// Compression level, 1 to 19
    #[arg(long, default_value_t = DEFAULT_LEVEL, value_parser = clap::value_parser!(i32).range(*LEVELS.start() as i64..=*LEVELS.end() as i64))]
    level: i32,
    /// Sign with an ed25519 key: openssl genpkey -algorithm ed25519 -out KEYFILE
    #[arg(long, value_name = "KEYFILE")]
    sign: Option<PathBuf>,
}

impl PackRecipe {
    /// The request, and the key if there is one to sign with.
    pub(crate) fn resolve(self) -> anyhow::Result<(PackQuery, Option<SigningKey>)> {
        let Self { description, base_image, level, sign } = self;
        let key = sign.as_deref().map(SigningKey::read).transpose()?;
        Ok((PackQuery { description, base_image, level: Some(level) }, key))
    }
}

/// Arguments of `forkd pack`.
#[derive(Args, Debug)]
pub(crate) struct PackArgs {
    /// The snapshot
    #[arg(long)]
    tag: Tag,
    /// Where to write it, - for standard output; ./TAG.forkd-snapshot.tar.zst when absent
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    recipe: PackRecipe,
    /// Print what was packed as JSON
    #[arg(long)]
    json: bool,
}

/// What `pack --json` prints.
#[derive(Serialize)]
struct Packed<'a> {
    path: &'a Path,
    #[serde(flatten)]
    facts: &'a PackFacts,
}

impl PackArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        interrupts.guard(self.pack(context)).await
    }

    async fn pack(self, context: &Context) -> anyhow::Result<u8> {
        let Self { tag, out, recipe, json } = self;
        let (query, key) = recipe.resolve()?;
        let path = out.unwrap_or_else(|| PathBuf::from(format!("{tag}.forkd-snapshot.tar.zst")));
        if path == Path::new("-") {
            if json {
                return Err(UsageError("--json and --out - both want standard output; give a file".into()).into());
            }
            if io::stdout().is_terminal() {
                let error = UsageError("standard output is a terminal, and a pack is not for reading".into());
                return Err(advised(error, format!("forkd pack --tag {tag} --out FILE")));
            }
            let client = context.client().await?;
            pack_file::fetch(&client, &tag, &query, key, io::stdout(), &context.progress).await?;
            return Ok(0);
        }
        let client = context.client().await?;
        let (file, growing) = beside(&path)?;
        let facts = pack_file::fetch(&client, &tag, &query, key, file, &context.progress).await?;
        publish(growing, &path).await?;
        if json {
            output::json(&Packed { path: &path, facts: &facts })?;
        } else {
            output::line(path.display())?;
        }
        Ok(0)
    }
}

/// A file that is being written beside `path`; it goes when the second part is dropped.
pub(crate) fn beside(path: &Path) -> anyhow::Result<(File, TempPath)> {
    use std::os::unix::fs::PermissionsExt;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().with_context(|| format!("{} is no file", path.display()))?;
    let growing = tempfile::Builder::new()
        .prefix(&format!(".{}.", name.to_string_lossy()))
        .permissions(std::fs::Permissions::from_mode(0o666))
        .tempfile_in(directory)
        .with_context(|| format!("could not create a file in {}", directory.display()))
        .advise("another place with --out FILE")?;
    Ok(growing.into_parts())
}

/// Gives a written file its name, in place of what may have it.
async fn publish(growing: TempPath, path: &Path) -> anyhow::Result<()> {
    let target = path.to_owned();
    let publishing = tokio::task::spawn_blocking(move || {
        File::open(&growing).and_then(|file| file.sync_all())?;
        growing.persist(&target).map_err(|error| error.error)
    });
    publishing.await?.with_context(|| format!("could not write {}", path.display()))
}

/// How a pack is taken in.
#[derive(Args, Debug)]
pub(crate) struct UnpackRecipe {
    /// Another name for the snapshot; what it builds on keeps its names
    #[arg(long, value_name = "NEW")]
    tag: Option<Tag>,
    /// Replace other snapshots of the same names, unless something else builds on them
    #[arg(long)]
    force: bool,
    /// Take only what this ed25519 key has signed: openssl pkey -in KEYFILE -pubout -out PUBFILE
    #[arg(long, value_name = "PUBFILE")]
    verify_key: Option<PathBuf>,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl UnpackRecipe {
    /// The request that `recipe` stands for.
    pub(crate) fn resolve(&self) -> anyhow::Result<UnpackQuery> {
        let key = self.verify_key.as_deref().map(VerifyingKey::read).transpose()?;
        Ok(UnpackQuery { tag: self.tag.clone(), force: self.force, verify_key: key.map(|key| key.to_hex()) })
    }

    /// Sends a pack of `bytes` bytes, if that is known.
    pub(crate) async fn send(
        &self,
        client: &Client,
        query: &UnpackQuery,
        pack: impl Read + Send + 'static,
        bytes: Option<u64>,
        name: &str,
        progress: &Progress,
    ) -> Result<UnpackReport, ClientError> {
        let step = progress.step(format!("Unpacking {name}"));
        if let Some(bytes) = bytes {
            step.set_bytes(bytes);
        }
        let sent = Arc::new(AtomicU64::new(0));
        let unpack = client.unpack(query, pack, Arc::clone(&sent));
        tokio::pin!(unpack);
        let mut redraw = tokio::time::interval(REDRAW);
        let mut whole = false;
        loop {
            tokio::select! {
                done = &mut unpack => return done,
                _ = redraw.tick(), if !whole => {
                    let read = sent.load(Ordering::Relaxed);
                    step.set_position(read);
                    whole = bytes == Some(read);
                    if whole {
                        step.wait_for("the daemon flushes what it got");
                    } else if bytes.is_none() {
                        step.detail(ByteSize(read).to_string());
                    }
                }
            }
        }
    }
}

/// Says what came of a pack.
pub(crate) fn report(report: &UnpackReport, json: bool, progress: &Progress) -> anyhow::Result<()> {
    for line in describe(report) {
        progress.say(line);
    }
    if json { output::json(report) } else { output::line(&report.tag) }
}

/// Arguments of `forkd unpack`.
#[derive(Args, Debug)]
pub(crate) struct UnpackArgs {
    /// The pack, - for standard input
    path: PathBuf,
    #[command(flatten)]
    recipe: UnpackRecipe,
}

impl UnpackArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        interrupts.guard(self.unpack(context)).await
    }

    async fn unpack(self, context: &Context) -> anyhow::Result<u8> {
        let query = self.recipe.resolve()?;
        if self.path == Path::new("-") {
            if io::stdin().is_terminal() {
                let error = UsageError("standard input is a terminal, not a pack".into());
                return Err(advised(error, "forkd unpack FILE"));
            }
            let client = context.client().await?;
            let sent = self.recipe.send(&client, &query, io::stdin(), None, "standard input", &context.progress).await;
            let answer = sent.map_err(|error| explain(error, "forkd unpack -"))?;
            report(&answer, self.recipe.json, &context.progress)?;
            return Ok(0);
        }
        let shown = self.path.display().to_string();
        let file = File::open(&self.path).with_context(|| format!("could not read {shown}"))?;
        let metadata = file.metadata().with_context(|| format!("could not read {shown}"))?;
        let bytes = metadata.is_file().then_some(metadata.len());
        let client = context.client().await?;
        let sent = self.recipe.send(&client, &query, file, bytes, &shown, &context.progress).await;
        let answer = sent.map_err(|error| explain(error, &format!("forkd unpack {shown}")))?;
        report(&answer, self.recipe.json, &context.progress)?;
        Ok(0)
    }
}

/// What came of a pack, for people.
fn describe(report: &UnpackReport) -> Vec<String> {
    let of = |fate| report.snapshots.iter().filter(move |one| one.fate == fate).map(|one| one.tag.as_str());
    let names = |fate| of(fate).collect::<Vec<_>>().join(", ");
    let count = |fate| of(fate).count();
    let mut lines = Vec::new();
    if count(UnpackFate::Reused) == report.snapshots.len() {
        lines.push(format!("✓ Snapshot {} is there already, the same", report.tag));
        return lines;
    }
    let written = ByteSize(report.written_bytes);
    lines.push(format!("✓ Snapshot {} is ready: {written} written", report.tag));
    if report.snapshots.len() > 1 && count(UnpackFate::Published) > 0 {
        lines.push(format!("  new: {}", names(UnpackFate::Published)));
    }
    if count(UnpackFate::Reused) > 0 {
        lines.push(format!("  there already: {}", names(UnpackFate::Reused)));
    }
    if count(UnpackFate::Replaced) > 0 {
        lines.push(format!("  replaced: {}", names(UnpackFate::Replaced)));
    }
    if report.verified {
        lines.push("  its signature is good".to_owned());
    }
    lines
}

/// Adds to a refusal of `command` what to type next.
pub(crate) fn explain(error: ClientError, command: &str) -> anyhow::Error {
    let next = match error.code() {
        Some("snapshot_exists") => Some(format!("{command} --tag NEW   (or --force to replace it)")),
        Some("snapshot_has_children") => Some("forkd tree".to_owned()),
        Some("no_space") => Some("forkd images   (forkd rmi TAG makes room)".to_owned()),
        _ => None,
    };
    let error = anyhow::Error::from(error);
    match next {
        Some(next) => advised(error, next),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use forkd_types::rest::UnpackedSnapshot;

    fn described(fates: &[(&str, UnpackFate)]) -> String {
        let snapshots: Vec<_> =
            fates.iter().map(|&(tag, fate)| UnpackedSnapshot { tag: tag.parse().expect("legal"), fate }).collect();
        let tag = snapshots.last().expect("one").tag.clone();
        let report =
            UnpackReport { tag, snapshots, new_blobs: 1, reused_blobs: 2, written_bytes: 3 << 20, verified: false };
        describe(&report).join("\n")
    }

    #[test]
    fn what_came_of_a_pack_is_said() {
        use UnpackFate::{Published, Replaced, Reused};
        assert_eq!(described(&[("a", Published)]), "✓ Snapshot a is ready: 3 MiB written");
        assert_eq!(described(&[("a", Reused), ("b", Reused)]), "✓ Snapshot b is there already, the same");
        assert_eq!(
            described(&[("a", Reused), ("b", Replaced), ("c", Published)]),
            "✓ Snapshot c is ready: 3 MiB written\n  new: c\n  there already: a\n  replaced: b"
        );
    }

    #[test]
    fn a_file_that_is_not_finished_goes() {
        let directory = tempfile::tempdir().expect("scratch directory");
        let (mut file, growing) = beside(&directory.path().join("x")).expect("a file");
        file.write_all(b"half").expect("write");
        assert_eq!(directory.path().read_dir().expect("list").count(), 1);
        drop(growing);
        assert_eq!(directory.path().read_dir().expect("list").count(), 0);
    }
}
