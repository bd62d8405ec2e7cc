//! Baking a snapshot through the daemon: upload what it is made of, then follow the bake.

use std::time::Duration;

use forkd_types::Tag;
use forkd_types::rest::{BakeEvent, BakeRequest, SnapshotInfo, WarmStep};
use forkd_types::{ByteSize, StageTimings};

use crate::blob::Blob;
use crate::client::{Client, ClientError};
use crate::failure::advised;
use crate::progress::Progress;
use crate::units;
use crate::volume::Volume;

/// Lines of the guest's console that are quoted when a bake fails without a reason.
const CONSOLE_LINES: usize = 20;

/// What a machine is booted from.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    /// Guest kernel.
    pub(crate) kernel: Blob,
    /// Initramfs with the agent and the modules that fit the kernel.
    pub(crate) initramfs: Blob,
    /// Root disk.
    pub(crate) disk: Blob,
    /// Further disks.
    pub(crate) volumes: Vec<Volume>,
}

/// How the machine is shaped and warmed.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    /// Name of the snapshot.
    pub(crate) tag: Tag,
    /// vCPUs.
    pub(crate) vcpus: u32,
    /// Guest memory.
    pub(crate) memory: ByteSize,
    /// Commands run before the snapshot.
    pub(crate) run: Vec<Vec<String>>,
    /// Source run in warm interpreters before the snapshot.
    pub(crate) warm: Vec<WarmStep>,
    /// How long the guest may take until its agent answers.
    pub(crate) boot_timeout: Duration,
    /// Replace a snapshot of that name.
    pub(crate) replace: bool,
}

/// Uploads what the daemon lacks, then boots, warms and snapshots. Dropping the future cancels it.
pub(crate) async fn bake(
    client: &Client,
    parts: &Parts,
    recipe: &Recipe,
    progress: &Progress,
) -> anyhow::Result<SnapshotInfo> {
    parts.kernel.upload(client, "kernel", progress).await?;
    parts.initramfs.upload(client, "initramfs", progress).await?;
    parts.disk.upload(client, "root disk", progress).await?;
    for volume in &parts.volumes {
        volume.upload(client, progress).await?;
    }
    let request = BakeRequest {
        tag: recipe.tag.to_string(),
        disk: parts.disk.digest().to_string(),
        kernel: parts.kernel.digest().to_string(),
        initramfs: parts.initramfs.digest().to_string(),
        vcpus: recipe.vcpus,
        memory_mib: recipe.memory.as_mib(),
        run: recipe.run.clone(),
        warm: recipe.warm.clone(),
        boot_timeout_secs: recipe.boot_timeout.as_secs(),
        kernel_args: None,
        volumes: parts.volumes.iter().map(Volume::wanted).collect(),
        replace: recipe.replace,
    };
    let mut follower = Follower::new(recipe, progress);
    let outcome = client.bake(&request, |event| follower.follow(event)).await;
    follower.finish(outcome, recipe)
}

/// Turns the events of a bake into progress, and remembers how it ended.
struct Follower<'a> {
    progress: &'a Progress,
    step: Option<(crate::progress::Step, String)>,
    title: String,
    console: Console,
    done: Option<(SnapshotInfo, StageTimings)>,
}

impl<'a> Follower<'a> {
    fn new(recipe: &Recipe, progress: &'a Progress) -> Self {
        let title = format!("Baking {}", recipe.tag);
        Self { progress, step: None, title, console: Console::default(), done: None }
    }

    fn follow(&mut self, event: BakeEvent) -> Result<(), ClientError> {
        match event {
            BakeEvent::Step { message } => {
                self.end_step();
                let step = self.progress.step(format!("{}: {message}", self.title));
                self.step = Some((step, message));
            }
            BakeEvent::Console { text } => {
                if let Some(line) = self.console.add(&text)
                    && let Some((step, _)) = &self.step
                {
                    step.detail(line);
                }
            }
            BakeEvent::Done { snapshot, stages } => {
                self.end_step();
                self.done = Some((*snapshot, stages));
            }
            BakeEvent::Failed { error } => return Err(ClientError::Failed(error)),
        }
        Ok(())
    }

    fn end_step(&mut self) {
        if let Some((step, message)) = self.step.take() {
            step.done(format_args!("{}: {message}", self.title));
        }
    }

    fn finish(mut self, outcome: Result<(), ClientError>, recipe: &Recipe) -> anyhow::Result<SnapshotInfo> {
        let step = self.step.take();
        drop(step);
        match (outcome, self.done) {
            (Ok(()), Some((snapshot, stages))) => {
                self.progress.say(format_args!(
                    "✓ Snapshot {} is ready: {} ({})",
                    snapshot.tag,
                    snapshot
                        .stored_bytes
                        .map_or_else(|| "size unknown".to_owned(), |bytes| ByteSize(bytes).to_string()),
                    units::duration(stages.total())
                ));
                Ok(snapshot)
            }
            (Ok(()), None) => {
                let error = format!(
                    "the daemon ended the bake of {} without saying how; the guest's console ended with:\n{}",
                    recipe.tag,
                    self.console.tail()
                );
                Err(advised(anyhow::anyhow!(error), "forkd doctor"))
            }
            (Err(error), _) if error.status() == Some(http::StatusCode::CONFLICT) => {
                Err(advised(error, format!("the same with --replace, or: forkd rmi {}", recipe.tag)))
            }
            (Err(error), _) => {
                let error = anyhow::Error::from(error).context(format!("could not bake {}", recipe.tag));
                Err(advised(error, "forkd doctor"))
            }
        }
    }
}

/// The end of the guest's console, by lines.
#[derive(Default)]
struct Console {
    lines: std::collections::VecDeque<String>,
    partial: String,
}

impl Console {
    /// Adds a piece; gives the last whole line of it that says anything.
    fn add(&mut self, text: &str) -> Option<String> {
        self.partial.push_str(text);
        let mut said = None;
        while let Some(end) = self.partial.find('\n') {
            let line: String = self.partial.drain(..=end).filter(|c| !c.is_control()).collect();
            if line.trim().is_empty() {
                continue;
            }
            if self.lines.len() == CONSOLE_LINES {
                self.lines.pop_front();
            }
            self.lines.push_back(line.clone());
            said = Some(line);
        }
        said
    }

    fn tail(&self) -> String {
        self.lines.iter().map(String::as_str).chain([self.partial.as_str()]).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_pieces_become_lines_and_only_the_end_is_kept() {
        let mut console = Console::default();
        assert_eq!(console.add("one\r\ntw"), Some("one".to_owned()));
        assert_eq!(console.add("o\r\n\r\n"), Some("two".to_owned()));
        assert_eq!(console.add("half"), None);
        assert_eq!(console.tail(), "one\ntwo\nhalf");
        for number in 0..100 {
            console.add(&format!("{number}\n"));
        }
        assert_eq!(console.lines.len(), CONSOLE_LINES);
        assert!(console.tail().ends_with("99\n"));
    }

    fn recipe() -> Recipe {
        Recipe {
            tag: "t".parse().expect("legal"),
            vcpus: 1,
            memory: ByteSize::mib(512),
            run: Vec::new(),
            warm: Vec::new(),
            boot_timeout: Duration::from_secs(1),
            replace: false,
        }
    }

    #[test]
    fn a_bake_that_ends_without_a_word_is_an_error() {
        let mut follower = Follower::new(&recipe(), &Progress::Quiet);
        follower.follow(BakeEvent::Console { text: "Oops\n".into() }).expect("only progress");
        let error = follower.finish(Ok(()), &recipe()).expect_err("no snapshot came");
        assert!(error.to_string().contains("Oops"), "{error}");
    }

    #[test]
    fn a_failed_bake_says_why() {
        let mut follower = Follower::new(&recipe(), &Progress::Quiet);
        let outcome = follower.follow(BakeEvent::Failed { error: "guest kernel panicked".into() });
        let error = follower.finish(outcome, &recipe()).expect_err("it failed");
        assert!(crate::failure::render(&error).contains("guest kernel panicked"));
    }
}
