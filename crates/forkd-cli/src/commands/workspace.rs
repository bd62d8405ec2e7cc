//! `workspace`: sandboxes with a name, that can be put on disk and brought back. `timeout` and `suspend`: when and
//! how a sandbox ends.

use clap::{Args, Subcommand};
use forkd_types::rest::{CreateWorkspaceRequest, OnTimeout, TimeoutRequest, WorkspaceInfo, WorkspaceStatus};
use forkd_types::{SandboxId, Tag};

use super::{Context, sandbox_error, snapshot_error};
use crate::client::ClientError;
use crate::failure::{UsageError, advised};
use crate::{output, units};

/// Arguments of `forkd workspace`.
#[derive(Args, Debug)]
pub(crate) struct WorkspaceArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Make a workspace of a snapshot; it runs
    Create(CreateArgs),
    /// Put a workspace on disk and end its sandbox
    Suspend {
        /// The workspace
        #[arg(value_parser = name)]
        name: String,
        /// Accepted for existing scripts: no more than what changed is ever written
        #[arg(long)]
        diff: bool,
        /// Print the daemon's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Bring a workspace back
    Resume {
        /// The workspace
        #[arg(value_parser = name)]
        name: String,
        /// Print the daemon's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// List workspaces
    List {
        /// Print the daemon's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove a workspace with its sandbox and its state
    Delete {
        /// The workspace
        #[arg(value_parser = name)]
        name: String,
    },
}

#[derive(Args, Debug)]
struct CreateArgs {
    /// Its name
    #[arg(value_parser = name)]
    name: String,
    /// The snapshot it begins as
    #[arg(long, value_name = "TAG")]
    snapshot: Tag,
    /// Give its sandbox a network namespace of its own
    #[arg(long)]
    per_child_netns: bool,
    /// Memory limit of its sandbox
    #[arg(long, value_name = "MIB")]
    memory_limit_mib: Option<u64>,
    /// Back its memory with huge pages
    #[arg(long)]
    hugepages: bool,
    /// Suspend it by itself when nothing was run in it for this long; 0 for never [default: as the daemon says]
    #[arg(long, value_name = "SECONDS")]
    idle_suspend_secs: Option<u64>,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

impl WorkspaceArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let (info, json) = match self.verb {
            Verb::Create(CreateArgs {
                name,
                snapshot,
                per_child_netns,
                memory_limit_mib,
                hugepages,
                idle_suspend_secs,
                json,
            }) => {
                let snapshot_tag = snapshot.to_string();
                let request = CreateWorkspaceRequest {
                    name,
                    snapshot_tag,
                    per_child_netns,
                    memory_limit_mib,
                    hugepages,
                    idle_suspend_secs,
                };
                (client.create_workspace(&request).await.map_err(create_error)?, json)
            }
            Verb::Suspend { name, diff, json } => {
                let step = context.progress.quick_step(format!("Putting {name} on disk"));
                let info = client.suspend_workspace(&name, diff).await.map_err(workspace_error)?;
                step.vanish();
                (info, json)
            }
            Verb::Resume { name, json } => (client.resume_workspace(&name).await.map_err(workspace_error)?, json),
            Verb::List { json } => {
                let all = client.workspaces().await?;
                if json {
                    output::json(&all)?;
                } else if all.is_empty() {
                    output::line("(no workspaces)")?;
                }
                for info in all.iter().filter(|_| !json) {
                    output::line(row(info))?;
                }
                return Ok(0);
            }
            Verb::Delete { name } => {
                client.delete_workspace(&name).await.map_err(workspace_error)?;
                output::line(format_args!("✓ {name}  deleted"))?;
                return Ok(0);
            }
        };
        if json {
            output::json(&info)?
        } else {
            output::line(row(&info))?
        }
        Ok(0)
    }
}

/// A workspace as one row.
fn row(info: &WorkspaceInfo) -> String {
    let status = match info.status {
        WorkspaceStatus::Running => "running",
        WorkspaceStatus::Suspended => "suspended",
        WorkspaceStatus::Stale => "stale",
    };
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let state = or_none(info.current_state_tag.as_ref().map(Tag::to_string));
    let live = or_none(info.live_sandbox_id.as_ref().map(SandboxId::to_string));
    format!("{}  {status}  source={}  state={state}  live={live}", info.name, info.source_snapshot_tag)
}

/// A name that can stand in a path; whether it is one of a workspace, the daemon knows.
fn name(text: &str) -> Result<String, String> {
    text.parse::<Tag>().map(|tag| tag.to_string()).map_err(|_| {
        format!("{text:?} is no name of a workspace: that has A-Z a-z 0-9 _ - . and does not start with a dot")
    })
}

fn workspace_error(error: ClientError) -> anyhow::Error {
    match error.status() {
        Some(http::StatusCode::NOT_FOUND | http::StatusCode::BAD_REQUEST | http::StatusCode::CONFLICT) => {
            advised(error, "forkd workspace list")
        }
        _ => error.into(),
    }
}

fn create_error(error: ClientError) -> anyhow::Error {
    match error.status() {
        Some(http::StatusCode::NOT_FOUND) => snapshot_error(error),
        _ => workspace_error(error),
    }
}

/// How sandboxes end when their time is over; shared by the verbs that make some.
#[derive(Args, Debug, Clone, Copy)]
pub(crate) struct LifetimeOptions {
    /// End each by itself after this long
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout_secs: Option<u64>,
    /// How it ends then: kill, or suspend, which puts it on disk first
    #[arg(long, value_name = "HOW", requires = "timeout_secs", value_parser = on_timeout)]
    pub(crate) on_timeout: Option<OnTimeout>,
}

fn on_timeout(text: &str) -> Result<OnTimeout, String> {
    match text {
        "kill" => Ok(OnTimeout::Kill),
        "suspend" => Ok(OnTimeout::Suspend),
        _ => Err("there are kill and suspend".to_owned()),
    }
}

/// Arguments of `forkd timeout`.
#[derive(Args, Debug)]
pub(crate) struct TimeoutArgs {
    /// The sandbox
    sandbox: SandboxId,
    /// It ends by itself this long after now, whatever was said before
    #[arg(value_name = "SECONDS", required_unless_present = "never", conflicts_with = "never")]
    seconds: Option<u64>,
    /// It lives until it is killed
    #[arg(long)]
    never: bool,
    /// How it ends: kill, or suspend, which puts it on disk first; as before when absent
    #[arg(long, value_name = "HOW", conflicts_with = "never", value_parser = on_timeout)]
    on_timeout: Option<OnTimeout>,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

impl TimeoutArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let request = TimeoutRequest { timeout_secs: self.seconds, on_timeout: self.on_timeout };
        let info =
            context.client().await?.change_timeout(&self.sandbox, &request).await.map_err(|error| {
                match error.status() {
                    Some(http::StatusCode::BAD_REQUEST) => UsageError(error.to_string()).into(),
                    _ => sandbox_error(error),
                }
            })?;
        if self.json {
            output::json(&info)?;
            return Ok(0);
        }
        match self.seconds {
            Some(seconds) => {
                let left = units::duration(std::time::Duration::from_secs(seconds));
                output::line(format_args!("✓ {}  ends in {left}", info.id))?;
            }
            None => output::line(format_args!("✓ {}  lives until it is killed", info.id))?,
        }
        Ok(0)
    }
}

/// Arguments of `forkd suspend`.
#[derive(Args, Debug)]
pub(crate) struct SuspendArgs {
    /// The sandbox; it ends
    sandbox: SandboxId,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

impl SuspendArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let step = context.progress.quick_step(format!("Putting {} on disk", self.sandbox));
        let info = context.client().await?.suspend(&self.sandbox).await.map_err(sandbox_error)?;
        step.vanish();
        if self.json {
            output::json(&info)?;
            return Ok(0);
        }
        output::line(&info.tag)?;
        context.progress.say(format_args!("next: forkd spawn --tag {}", info.tag));
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspace_is_one_row() {
        let info: WorkspaceInfo = serde_json::from_value(serde_json::json!({
            "id": "ws-1", "name": "w", "source_snapshot_tag": "py", "status": "suspended", "created_at_unix": 1,
            "last_active_unix": 2, "current_state_tag": "ws-w-state",
        }))
        .expect("valid");
        assert_eq!(row(&info), "w  suspended  source=py  state=ws-w-state  live=-");
    }

    #[test]
    fn names_that_could_leave_a_path_are_refused() {
        assert_eq!(name("w.1"), Ok("w.1".to_owned()));
        for bad in ["", "..", "a/b", "a b", "a?x"] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }
}
