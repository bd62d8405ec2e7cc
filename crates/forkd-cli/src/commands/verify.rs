//! `verify`: recompute every digest of a snapshot.

use clap::Args;
use forkd_types::{ByteSize, Tag};
use serde::{Deserialize, Serialize};

use super::{Context, snapshot_error};
use crate::client::ClientError;
use crate::failure::advised;
use crate::output;
use crate::progress::Step;

/// Arguments of `forkd verify`.
#[derive(Args, Debug)]
pub(crate) struct VerifyArgs {
    /// The snapshot
    tag: Tag,
    /// Print the daemon's answer as JSON, one object a line
    #[arg(long)]
    json: bool,
}

/// One line of the daemon's answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    /// A file is being looked at.
    Checking { what: String, done_bytes: u64, total_bytes: u64 },
    /// A file is not what was written.
    Bad { what: String, path: String, reason: String },
    /// Everything was looked at.
    Done { good: bool, files: usize, total_bytes: u64 },
    /// It could not be done.
    Failed { error: String },
}

/// What the lines so far come to.
#[derive(Debug, Default)]
struct Findings {
    damage: Vec<String>,
    whole: Option<(usize, u64)>,
}

impl VerifyArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let step = context.progress.step(format!("Verifying {}", self.tag));
        let mut findings = Findings::default();
        let outcome = client.verify(&self.tag, |line| {
            if self.json {
                output::line(&line).map_err(|error| ClientError::Failed(error.to_string()))?;
            }
            // A line of a later daemon that is not known here is no finding.
            if let Ok(event) = serde_json::from_value(line) {
                findings.take_in(event, &step);
            }
            Ok(())
        });
        outcome.await.map_err(snapshot_error)?;
        let (files, bytes) = findings.verdict(&self.tag)?;
        step.done(format_args!("{} is whole: {files} files, {}", self.tag, ByteSize(bytes)));
        Ok(0)
    }
}

impl Findings {
    fn take_in(&mut self, event: Event, step: &Step) {
        match event {
            Event::Checking { what, done_bytes, total_bytes } => {
                step.set_bytes(total_bytes);
                step.set_position(done_bytes);
                step.detail(what);
            }
            Event::Bad { what, path, reason } => self.damage.push(format!("{what} ({path}): {reason}")),
            Event::Done { good: true, files, total_bytes } => self.whole = Some((files, total_bytes)),
            Event::Done { good: false, .. } => {}
            Event::Failed { error } => self.damage.push(error),
        }
    }

    /// How many files and bytes are whole, or what is not. An answer that broke off is no success.
    fn verdict(&self, tag: &Tag) -> anyhow::Result<(usize, u64)> {
        match (self.damage.as_slice(), self.whole) {
            ([], Some(whole)) => Ok(whole),
            ([], None) => Err(advised(
                anyhow::anyhow!("the daemon did not say how the verification of {tag} ended"),
                format!("forkd verify {tag}"),
            )),
            (damage, _) => Err(advised(
                anyhow::anyhow!("snapshot {tag} is damaged:\n  {}", damage.join("\n  ")),
                format!("forkd rmi {tag}   (then bake it again)"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;

    fn verdict(lines: &[&str]) -> Result<(usize, u64), String> {
        let step = Progress::Quiet.step("verifying");
        let mut findings = Findings::default();
        for line in lines {
            findings.take_in(serde_json::from_str(line).expect("a known event"), &step);
        }
        findings.verdict(&"t".parse().expect("legal")).map_err(|error| error.to_string())
    }

    #[test]
    fn only_a_good_end_is_a_success() {
        let checking = r#"{"event":"checking","what":"memory","done_bytes":1,"total_bytes":2}"#;
        let good = r#"{"event":"done","good":true,"files":3,"total_bytes":9}"#;
        assert_eq!(verdict(&[checking, good]), Ok((3, 9)));
        assert!(verdict(&[checking]).expect_err("broken off").contains("did not say"));
        let bad = r#"{"event":"bad","what":"memory","path":"/s","reason":"differs"}"#;
        let end = r#"{"event":"done","good":false,"files":3,"total_bytes":9}"#;
        assert!(verdict(&[checking, bad, end]).expect_err("damaged").contains("memory (/s): differs"));
        assert!(verdict(&[r#"{"event":"failed","error":"no meta"}"#]).expect_err("failed").contains("no meta"));
    }
}
