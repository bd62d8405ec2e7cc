//! The daemon's API as typed calls.
//!
//! One connection serves one call: connecting costs some tens of microseconds on a unix socket, and
//! a connection that a daemon restart cut in two cannot be reused by mistake.

mod address;
mod agent;
mod error;
mod exchange;
mod lifecycle;
mod packs;
mod raw;
mod upload;

use std::time::Duration;

use forkd_types::rest::{
    BakeEvent, BakeRequest, BranchRequest, CheckpointInfo, CheckpointRequest, CompactRequest, EvalRequest,
    EvalResponse, ExecRequest, ExecResponse, FileEntry, ForkRequest, MakeDirectoryRequest, MoveFileRequest,
    RewindRequest, SandboxInfo, SandboxMemory, SnapshotInfo, SpawnReport, SpawnRequest, Version,
};
use forkd_types::{SandboxId, Tag};
use http::{Method, StatusCode};

pub(crate) use address::{Address, AddressError};
pub(crate) use agent::{ANSWER_LIMIT, AgentConnection, FrameReader, FrameWriter, GRACE, out_of_turn, within};
pub(crate) use error::ClientError;
pub(crate) use packs::{PackQuery, UnpackQuery};
pub(crate) use raw::RawBody;
pub(crate) use upload::{Encoding, copy_sparse};

use exchange::{Body, empty, json};

/// How long a connection to an agent may take, a checkpoint before it included.
const AGENT_LIMIT: Duration = Duration::from_secs(120);

/// How long a daemon may take to show that it is there.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// A daemon at a known address.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    address: Address,
    token: Option<String>,
}

impl Client {
    /// A client of the daemon at `address`; an empty token is none.
    pub(crate) fn new(address: Address, token: Option<String>) -> Self {
        Self { address, token: token.filter(|token| !token.trim().is_empty()) }
    }

    /// Where the daemon is.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// The token that is presented, if any.
    pub(crate) fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Asks for the daemon's version within a few seconds: is it there, and are we let in?
    pub(crate) async fn probe(&self) -> Result<Version, ClientError> {
        let asked = self.get("/version");
        tokio::time::timeout(PROBE_TIMEOUT, asked).await.unwrap_or_else(|_| {
            Err(ClientError::Silent { address: self.address.to_string(), seconds: PROBE_TIMEOUT.as_secs() })
        })
    }

    /// Forks children; failed ones are in the report.
    pub(crate) async fn spawn(&self, request: &SpawnRequest) -> Result<SpawnReport, ClientError> {
        self.post("/v1/sandboxes?detail=true", request).await
    }

    /// Copies a running sandbox; failed copies are in the report.
    pub(crate) async fn fork(&self, id: &SandboxId, request: &ForkRequest) -> Result<SpawnReport, ClientError> {
        self.post(&format!("/v1/sandboxes/{id}/fork?detail=true"), request).await
    }

    /// Takes a snapshot of a running sandbox.
    pub(crate) async fn branch(&self, id: &SandboxId, request: &BranchRequest) -> Result<SnapshotInfo, ClientError> {
        self.post(&format!("/v1/sandboxes/{id}/branch"), request).await
    }

    /// Freezes a sandbox as it is now.
    pub(crate) async fn checkpoint(
        &self,
        id: &SandboxId,
        request: &CheckpointRequest,
    ) -> Result<CheckpointInfo, ClientError> {
        self.post(&format!("/v1/sandboxes/{id}/checkpoints"), request).await
    }

    /// A sandbox's checkpoints, oldest first.
    pub(crate) async fn checkpoints(&self, id: &SandboxId) -> Result<Vec<CheckpointInfo>, ClientError> {
        self.get(&format!("/v1/sandboxes/{id}/checkpoints")).await
    }

    /// Removes a checkpoint.
    pub(crate) async fn remove_checkpoint(&self, id: &SandboxId, name: &str) -> Result<(), ClientError> {
        self.call(Method::DELETE, &format!("/v1/sandboxes/{id}/checkpoints/{name}"), empty()).await.map(drop)
    }

    /// Brings a sandbox back to a checkpoint.
    pub(crate) async fn rewind(&self, id: &SandboxId, request: &RewindRequest) -> Result<CheckpointInfo, ClientError> {
        self.post(&format!("/v1/sandboxes/{id}/rewind"), request).await
    }

    /// Writes a snapshot anew as one that depends on no other.
    pub(crate) async fn compact(&self, from: &Tag, to: &Tag) -> Result<SnapshotInfo, ClientError> {
        let request = CompactRequest { to: to.to_string() };
        self.post(&format!("/v1/snapshots/{from}/compact"), &request).await
    }

    /// All sandboxes, by id.
    pub(crate) async fn sandboxes(&self) -> Result<Vec<SandboxInfo>, ClientError> {
        self.get("/v1/sandboxes").await
    }

    /// One sandbox.
    pub(crate) async fn sandbox(&self, id: &SandboxId) -> Result<SandboxInfo, ClientError> {
        self.get(&format!("/v1/sandboxes/{id}")).await
    }

    /// Kills a sandbox.
    pub(crate) async fn kill(&self, id: &SandboxId) -> Result<(), ClientError> {
        self.call(Method::DELETE, &format!("/v1/sandboxes/{id}"), empty()).await.map(drop)
    }

    /// Runs a program in a sandbox to its end.
    pub(crate) async fn exec(&self, id: &SandboxId, request: &ExecRequest) -> Result<ExecResponse, ClientError> {
        self.post(&format!("/v1/sandboxes/{id}/exec"), request).await
    }

    /// Runs source text in a sandbox.
    pub(crate) async fn eval(&self, id: &SandboxId, request: &EvalRequest) -> Result<EvalResponse, ClientError> {
        self.post(&format!("/v1/sandboxes/{id}/eval"), request).await
    }

    /// Asks a sandbox's agent whether it is there; the answer as it came.
    pub(crate) async fn ping(&self, id: &SandboxId) -> Result<serde_json::Value, ClientError> {
        let path = format!("/v1/sandboxes/{id}/ping");
        self.parse(&path, self.call(Method::POST, &path, empty()).await?).await
    }

    /// What a sandbox costs.
    pub(crate) async fn memory(&self, id: &SandboxId) -> Result<SandboxMemory, ClientError> {
        self.get(&format!("/v1/sandboxes/{id}/memory")).await
    }

    /// A sandbox's console so far.
    pub(crate) async fn console(&self, id: &SandboxId) -> Result<Vec<u8>, ClientError> {
        let path = format!("/v1/sandboxes/{id}/console");
        exchange::collect(&path, self.call(Method::GET, &path, empty()).await?).await
    }

    /// A sandbox's console so far and from now on, until its machine ends; `piece` sees it as it comes.
    pub(crate) async fn follow_console(
        &self,
        id: &SandboxId,
        piece: impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let path = format!("/v1/sandboxes/{id}/console?follow=true");
        exchange::each_piece(&path, self.call(Method::GET, &path, empty()).await?, piece).await
    }

    /// A connection to a sandbox's agent, to run something.
    pub(crate) async fn agent(&self, id: &SandboxId) -> Result<AgentConnection, ClientError> {
        self.agent_by(&format!("/v1/sandboxes/{id}/agent?exec=true")).await
    }

    /// A connection to a sandbox's agent for anything but running something.
    pub(crate) async fn quiet_agent(&self, id: &SandboxId) -> Result<AgentConnection, ClientError> {
        self.agent_by(&format!("/v1/sandboxes/{id}/agent")).await
    }

    async fn agent_by(&self, path: &str) -> Result<AgentConnection, ClientError> {
        let upgrading = exchange::upgrade(&self.address, self.token.as_deref(), path, "forkd-agent");
        // The daemon gives up sooner, unless it takes a checkpoint first.
        let stream = agent::within(AGENT_LIMIT, "accept a connection", upgrading).await?;
        Ok(AgentConnection::new(stream))
    }

    /// What is in a directory of a sandbox's guest.
    pub(crate) async fn list_files(&self, id: &SandboxId, path: &str) -> Result<Vec<FileEntry>, ClientError> {
        self.get(&files_path(id, "/list", &[("path", path)])).await
    }

    /// One file of a sandbox's guest.
    pub(crate) async fn stat_file(&self, id: &SandboxId, path: &str) -> Result<FileEntry, ClientError> {
        self.get(&files_path(id, "/stat", &[("path", path)])).await
    }

    /// Makes a directory in a sandbox's guest, with its parents.
    pub(crate) async fn make_directory(&self, id: &SandboxId, path: &str) -> Result<(), ClientError> {
        let route = files_path(id, "/mkdir", &[]);
        let request = MakeDirectoryRequest { path: path.to_owned() };
        self.call(Method::POST, &route, json(&route, &request)?).await.map(drop)
    }

    /// Renames a file in a sandbox's guest.
    pub(crate) async fn move_file(&self, id: &SandboxId, from: &str, to: &str) -> Result<(), ClientError> {
        let route = files_path(id, "/move", &[]);
        let request = MoveFileRequest { from: from.to_owned(), to: to.to_owned() };
        self.call(Method::POST, &route, json(&route, &request)?).await.map(drop)
    }

    /// Removes a file of a sandbox's guest, or a tree.
    pub(crate) async fn remove_file(&self, id: &SandboxId, path: &str, recursive: bool) -> Result<(), ClientError> {
        let recursive = if recursive { "true" } else { "false" };
        let route = files_path(id, "", &[("path", path), ("recursive", recursive)]);
        self.call(Method::DELETE, &route, empty()).await.map(drop)
    }

    /// All snapshots, by tag.
    pub(crate) async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, ClientError> {
        self.get("/v1/snapshots").await
    }

    /// Everything the daemon tells about one snapshot.
    pub(crate) async fn snapshot_detail(&self, tag: &Tag) -> Result<serde_json::Value, ClientError> {
        self.get(&format!("/v1/snapshots/{tag}/info")).await
    }

    /// Deletes a snapshot; one that others build on needs `cascade` or `force`.
    pub(crate) async fn delete_snapshot(&self, tag: &Tag, cascade: bool, force: bool) -> Result<(), ClientError> {
        let mut path = format!("/v1/snapshots/{tag}");
        if cascade || force {
            path.push_str(&format!("?cascade={cascade}&force={force}"));
        }
        self.call(Method::DELETE, &path, empty()).await.map(drop)
    }

    /// Recomputes every digest of a snapshot; `event` sees each line of progress.
    pub(crate) async fn verify(
        &self,
        tag: &Tag,
        event: impl FnMut(serde_json::Value) -> Result<(), ClientError>,
    ) -> Result<(), ClientError> {
        let path = format!("/v1/snapshots/{tag}/verify");
        exchange::each_line(&path, self.call(Method::POST, &path, empty()).await?, event).await
    }

    /// Boots, warms and snapshots; `event` sees every step. Dropping the future cancels the bake.
    pub(crate) async fn bake(
        &self,
        request: &BakeRequest,
        event: impl FnMut(BakeEvent) -> Result<(), ClientError>,
    ) -> Result<(), ClientError> {
        let path = "/v1/bakes";
        let response = self.call(Method::POST, path, json(path, request)?).await?;
        exchange::each_line(path, response, event).await
    }

    /// Whether the daemon has the blob.
    pub(crate) async fn has_blob(&self, digest: &forkd_types::Digest) -> Result<bool, ClientError> {
        match self.call(Method::HEAD, &format!("/v1/blobs/{digest}"), empty()).await {
            Ok(_) => Ok(true),
            Err(ClientError::Refused { status: StatusCode::NOT_FOUND, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.parse(path, self.call(Method::GET, path, empty()).await?).await
    }

    async fn post<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        body: &impl serde::Serialize,
    ) -> Result<T, ClientError> {
        self.parse(path, self.call(Method::POST, path, json(path, body)?).await?).await
    }

    async fn parse<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        response: exchange::Answer,
    ) -> Result<T, ClientError> {
        let body = exchange::collect(path, response).await?;
        serde_json::from_slice(&body).map_err(|source| ClientError::Malformed { path: path.to_owned(), source })
    }

    async fn call(&self, method: Method, path: &str, body: Body) -> Result<exchange::Answer, ClientError> {
        exchange::send(&self.address, self.token.as_deref(), method, path, body).await
    }
}

/// A path of the file routes with its query.
fn files_path(id: &SandboxId, route: &str, query: &[(&str, &str)]) -> String {
    let mut encoded = url::form_urlencoded::Serializer::new(String::new());
    encoded.extend_pairs(query);
    let query = encoded.finish();
    let mark = if query.is_empty() { "" } else { "?" };
    format!("/v1/sandboxes/{id}/files{route}{mark}{query}")
}
