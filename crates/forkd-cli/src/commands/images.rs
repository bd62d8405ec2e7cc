//! `images`, `rmi`, `snapshot-info`.

use clap::Args;
use forkd_types::rest::{SnapshotInfo, SnapshotStatus};
use forkd_types::{ByteSize, Tag};
use serde_json::Value;

use super::{Context, snapshot_error};
use crate::failure::advised;
use crate::{output, units};

/// Arguments of `forkd images`.
#[derive(Args, Debug)]
pub(crate) struct ImagesArgs {
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

impl ImagesArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut snapshots = context.client().await?.snapshots().await?;
        if self.json {
            output::json(&snapshots)?;
            return Ok(0);
        }
        if snapshots.is_empty() {
            context.progress.say(
                "no snapshots\nmake one: forkd quickstart, or forkd from-image debian:bookworm?include=python3 --tag NAME",
            );
            return Ok(0);
        }
        snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.created_at_unix));
        let mut table = output::table(&["TAG", "SIZE", "MEMORY", "CREATED", "STATUS"]);
        for snapshot in &snapshots {
            table.add_row([
                snapshot.tag.to_string(),
                size(snapshot.stored_bytes),
                size(snapshot.memory_bytes),
                units::age(snapshot.created_at_unix),
                status(snapshot),
            ]);
        }
        output::print_table(&mut table)?;
        let total = snapshots.iter().filter_map(|snapshot| snapshot.stored_bytes).sum();
        output::line(format_args!("{}, {}", units::count(snapshots.len(), "snapshot"), ByteSize(total)))?;
        Ok(0)
    }
}

fn size(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "—".to_owned(), |bytes| ByteSize(bytes).to_string())
}

fn status(snapshot: &SnapshotInfo) -> String {
    let status = match snapshot.status {
        SnapshotStatus::Ready => "ready",
        SnapshotStatus::Writing => "writing",
        SnapshotStatus::Failed => "failed",
    };
    match &snapshot.warning {
        Some(warning) => format!("{status}: {warning}"),
        None => status.to_owned(),
    }
}

/// Arguments of `forkd rmi`.
#[derive(Args, Debug)]
pub(crate) struct RmiArgs {
    /// The snapshots
    #[arg(value_name = "TAG", required = true)]
    tags: Vec<Tag>,
    /// Remove the snapshots that build on it too
    #[arg(long, conflicts_with = "force")]
    cascade: bool,
    /// Remove it although others build on it; those cannot be used any more
    #[arg(long)]
    force: bool,
}

impl RmiArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let mut failed = 0;
        for tag in &self.tags {
            match client.delete_snapshot(tag, self.cascade, self.force).await {
                Ok(()) => output::line(format_args!("✓ {tag}"))?,
                Err(error) => {
                    failed += 1;
                    output::line(format_args!("✗ {tag}  ({error})"))?;
                }
            }
        }
        if failed == 0 {
            return Ok(0);
        }
        Err(advised(anyhow::anyhow!("{failed} could not be removed"), "forkd images"))
    }
}

/// Arguments of `forkd snapshot-info`.
#[derive(Args, Debug)]
pub(crate) struct SnapshotInfoArgs {
    /// The snapshot
    tag: Tag,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

impl SnapshotInfoArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let detail = context.client().await?.snapshot_detail(&self.tag).await.map_err(snapshot_error)?;
        match detail {
            Value::Object(fields) if !self.json => {
                for (name, value) in &fields {
                    output::line(format_args!("{:<24}{}", label(name), plain(name, value)))?;
                }
            }
            detail => output::json(&detail)?,
        }
        Ok(0)
    }
}

/// A field's name for a person: its unit is seen at the value.
fn label(name: &str) -> String {
    let bare = name.strip_suffix("_bytes").or_else(|| name.strip_suffix("_unix")).unwrap_or(name);
    bare.replace('_', " ")
}

/// A field's value for a person: sizes with their unit, lists on one line.
fn plain(name: &str, value: &Value) -> String {
    match value {
        Value::Null => "—".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) if name.ends_with("_bytes") => {
            number.as_u64().map_or_else(|| number.to_string(), |bytes| ByteSize(bytes).to_string())
        }
        Value::Number(number) if name.ends_with("_unix") => {
            number.as_u64().map_or_else(|| number.to_string(), units::age)
        }
        Value::Array(items) if items.is_empty() => "—".to_owned(),
        Value::Array(items) => items.iter().map(|item| plain("", item)).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}
