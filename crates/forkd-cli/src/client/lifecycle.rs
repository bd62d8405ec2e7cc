//! Workspaces, lifetimes, events, and what there is in all.

use bytes::BytesMut;
use forkd_types::SandboxId;
use forkd_types::rest::{
    CreateWorkspaceRequest, Event, Family, SandboxInfo, SandboxUsage, SnapshotInfo, SuspendWorkspaceRequest,
    TimeoutRequest, WorkspaceInfo,
};
use http::Method;
use http_body_util::BodyExt;

use super::exchange::{broken, empty};
use super::{Client, ClientError};

/// The longest line of an event.
const LINE_LIMIT: usize = 1 << 20;

impl Client {
    /// Makes a workspace of a snapshot.
    pub(crate) async fn create_workspace(
        &self,
        request: &CreateWorkspaceRequest,
    ) -> Result<WorkspaceInfo, ClientError> {
        self.post("/v1/workspaces", request).await
    }

    /// All workspaces, by name.
    pub(crate) async fn workspaces(&self) -> Result<Vec<WorkspaceInfo>, ClientError> {
        self.get("/v1/workspaces").await
    }

    /// Puts a workspace on disk.
    pub(crate) async fn suspend_workspace(&self, name: &str, diff: bool) -> Result<WorkspaceInfo, ClientError> {
        self.post(&format!("/v1/workspaces/{name}/suspend"), &SuspendWorkspaceRequest { diff }).await
    }

    /// Brings a workspace back.
    pub(crate) async fn resume_workspace(&self, name: &str) -> Result<WorkspaceInfo, ClientError> {
        let path = format!("/v1/workspaces/{name}/resume");
        self.parse(&path, self.call(Method::POST, &path, empty()).await?).await
    }

    /// Removes a workspace.
    pub(crate) async fn delete_workspace(&self, name: &str) -> Result<(), ClientError> {
        self.call(Method::DELETE, &format!("/v1/workspaces/{name}"), empty()).await.map(drop)
    }

    /// Changes when a sandbox ends by itself.
    pub(crate) async fn change_timeout(
        &self,
        id: &SandboxId,
        request: &TimeoutRequest,
    ) -> Result<SandboxInfo, ClientError> {
        self.post(&format!("/v1/sandboxes/{id}/timeout"), request).await
    }

    /// Puts a sandbox on disk and ends it.
    pub(crate) async fn suspend(&self, id: &SandboxId) -> Result<SnapshotInfo, ClientError> {
        let path = format!("/v1/sandboxes/{id}/suspend");
        self.parse(&path, self.call(Method::POST, &path, empty()).await?).await
    }

    /// Everything there is, each under what it came from.
    pub(crate) async fn tree(&self) -> Result<Family, ClientError> {
        self.get("/v1/tree").await
    }

    /// What every sandbox costs.
    pub(crate) async fn usage(&self) -> Result<Vec<SandboxUsage>, ClientError> {
        self.get("/v1/usage").await
    }

    /// Follows what happens, from the event after `after` on; `each` sees every event. Ends when the daemon stops.
    pub(crate) async fn events(
        &self,
        sandbox: Option<&SandboxId>,
        after: Option<u64>,
        mut each: impl FnMut(Event) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let sandbox = sandbox.map(|id| format!("sandbox={id}"));
        let after = after.map(|id| format!("after={id}"));
        let query: Vec<String> = sandbox.into_iter().chain(after).collect();
        let path = format!("/v1/events?{}", query.join("&"));
        let mut body = self.call(Method::GET, &path, empty()).await?.into_body();
        let mut lines = Lines::default();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|source| broken(&path, source))?.into_data() else { continue };
            for data in lines.add(&data) {
                let malformed = |source| ClientError::Malformed { path: path.clone(), source };
                each(serde_json::from_str(&data).map_err(malformed)?)?;
            }
            if lines.pending.len() > LINE_LIMIT {
                let error = format!("the daemon's answer to {path} has a line of more than {LINE_LIMIT} bytes");
                return Err(ClientError::Failed(error).into());
            }
        }
        Ok(())
    }
}

/// Server-sent events as they come in: of each, the data. The daemon writes that in one line, and repeats in it what
/// the other lines say.
#[derive(Default)]
struct Lines {
    pending: BytesMut,
}

impl Lines {
    /// Adds a piece; gives the data of the events that it completes.
    fn add(&mut self, piece: &[u8]) -> Vec<String> {
        self.pending.extend_from_slice(piece);
        let mut found = Vec::new();
        while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
            let line = self.pending.split_to(end + 1);
            let line = String::from_utf8_lossy(&line);
            if let Some(data) = line.trim_end_matches(['\r', '\n']).strip_prefix("data:") {
                found.push(data.strip_prefix(' ').unwrap_or(data).to_owned());
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: &str = ": forkd events\nretry: 1000\n\nid: 7\nevent: sandbox.created\ndata: {\"id\":7}\n\n: still here\n\ndata:{\"id\":8}\r\n\n";

    proptest! {
        #[test]
        fn events_are_found_however_the_stream_is_cut(cuts in prop::collection::vec(0usize..STREAM.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.extend([0, STREAM.len()]);
            cuts.sort_unstable();
            let mut lines = Lines::default();
            let found: Vec<String> =
                cuts.windows(2).flat_map(|cut| lines.add(&STREAM.as_bytes()[cut[0]..cut[1]])).collect();
            prop_assert_eq!(found, vec!["{\"id\":7}".to_owned(), "{\"id\":8}".to_owned()]);
        }
    }
}
