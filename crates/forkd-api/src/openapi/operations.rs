//! Every route, in the order of the router.

use axum::http::StatusCode;
use forkd_types::rest::{
    BakeEvent, BakeRequest, BlobInfo, BranchRequest, CheckpointInfo, CheckpointRequest, CompactRequest,
    CreateSnapshotRequest, CreateWorkspaceRequest, ErrorBody, EvalRequest, EvalResponse, Event, ExecRequest,
    ExecResponse, ExecStreamEvent, ExecStreamRequest, Family, FileEntry, FileEvent, ForkRequest, Health,
    MakeDirectoryRequest, MoveFileRequest, PingAnswer, RewindRequest, SandboxInfo, SandboxMemory, SandboxUsage,
    SnapshotDetail, SnapshotInfo, SpawnReport, SpawnRequest, SuspendWorkspaceRequest, TimeoutRequest, UnpackReport,
    VerifyProgress, Version, WorkspaceInfo, WrittenFile,
};

use super::operation::{Body, Operation, Query};

const OK: StatusCode = StatusCode::OK;
const CREATED: StatusCode = StatusCode::CREATED;
const ACCEPTED: StatusCode = StatusCode::ACCEPTED;
const NO_CONTENT: StatusCode = StatusCode::NO_CONTENT;
const SWITCHING: StatusCode = StatusCode::SWITCHING_PROTOCOLS;

const BYTES: &str = "application/octet-stream";
const TAR: &str = "application/x-tar";
const PACK: &str = "application/zstd";

pub(super) fn all() -> Vec<Operation> {
    let mut all = daemon();
    all.extend(sandboxes());
    all.extend(guests());
    all.extend(branching());
    all.extend(workspaces());
    all.extend(snapshots());
    all
}

fn daemon() -> Vec<Operation> {
    vec![
        Operation::get("/healthz", "Whether the daemon answers at all").answers::<Health>(OK),
        Operation::get("/readyz", "Whether the daemon can do its work")
            .answers::<Health>(OK)
            .answers::<ErrorBody>(StatusCode::SERVICE_UNAVAILABLE),
        Operation::get("/version", "The daemon's version").answers::<Version>(OK),
        Operation::get("/metrics", "Metrics, as Prometheus reads them").answers_raw(OK, Body::Raw("text/plain")),
        events(),
        Operation::get("/v1/tree", "The family of snapshots, sandboxes and checkpoints").answers::<Family>(OK),
        Operation::get("/v1/usage", "What each sandbox uses now").answers_all::<SandboxUsage>(OK),
    ]
}

fn events() -> Operation {
    let mut operation = Operation::get("/v1/events", "What happens, as it happens")
        .about("A client that comes again sends the header `Last-Event-ID` and misses nothing that is still kept.")
        .query("sandbox", Query::OptionalText, "Only what is about this sandbox.")
        .query("after", Query::OptionalNumber, "Only what came after the event of this id.");
    let event = operation.object::<Event>();
    operation.answers_raw(OK, Body::Events(event))
}

fn sandboxes() -> Vec<Operation> {
    vec![
        Operation::get("/v1/sandboxes", "All sandboxes, by id").answers_all::<SandboxInfo>(OK),
        {
            let mut spawn = Operation::post("/v1/sandboxes", "Fork a snapshot into running children");
            // An array of those that are up, as existing clients know it; the report only when asked for.
            spawn.object::<SpawnReport>();
            spawn
                .about("Answers an array of the children that are up; with `detail=true` a `SpawnReport`. The header `forkd-failed` counts those that are not.")
                .query("detail", Query::Flag, "Answer a report on all children, with timings.")
                .takes::<SpawnRequest>()
                .answers_all::<SandboxInfo>(CREATED)
        },
        Operation::get("/v1/sandboxes/{id}", "One sandbox").answers::<SandboxInfo>(OK),
        Operation::delete("/v1/sandboxes/{id}", "End a sandbox at once").answers_nothing(NO_CONTENT),
        Operation::get("/v1/sandboxes/{id}/memory", "What a sandbox costs the host").answers::<SandboxMemory>(OK),
        Operation::get("/v1/sandboxes/{id}/console", "What the guest wrote to its console")
            .query("follow", Query::Flag, "Go on with what it writes from now on.")
            .answers_raw(OK, Body::Raw("text/plain")),
        Operation::post("/v1/sandboxes/{id}/timeout", "Change when a sandbox ends by itself")
            .takes::<TimeoutRequest>()
            .answers::<SandboxInfo>(OK),
        Operation::post("/v1/sandboxes/{id}/suspend", "Put a sandbox on disk as a snapshot and end it")
            .answers::<SnapshotInfo>(OK),
    ]
}

fn guests() -> Vec<Operation> {
    let path = |operation: Operation| operation.query("path", Query::Text, "Absolute path in the guest.");
    let recursive = |operation: Operation| operation.query("recursive", Query::Flag, "Also what is below it.");
    vec![
        Operation::post("/v1/sandboxes/{id}/exec", "Run a program to its end")
            .takes::<ExecRequest>()
            .answers::<ExecResponse>(OK),
        Operation::get("/v1/sandboxes/{id}/exec/stream", "Run a program over a WebSocket")
            .about("The first message of the client is an `ExecStreamRequest`; input, output and control follow until the program has ended.")
            .answers_nothing(SWITCHING),
        {
            let mut stream = Operation::post("/v1/sandboxes/{id}/exec/stream", "Run a program and see its output as it comes");
            let event = stream.object::<ExecStreamEvent>();
            stream.takes::<ExecStreamRequest>().answers_raw(OK, Body::JsonLines(event))
        },
        Operation::post("/v1/sandboxes/{id}/eval", "Evaluate code in a warm interpreter")
            .takes::<EvalRequest>()
            .answers::<EvalResponse>(OK),
        Operation::post("/v1/sandboxes/{id}/ping", "Ask whether the agent is there").answers::<PingAnswer>(OK),
        Operation::get("/v1/sandboxes/{id}/agent", "Speak to the agent in its own protocol")
            .about("Needs `Upgrade: forkd-agent`.")
            .query("exec", Query::Flag, "To run something: an automatic checkpoint comes before it.")
            .answers_nothing(SWITCHING),
        path(Operation::get("/v1/sandboxes/{id}/files", "Read a file, or a range of it"))
            .answers_raw(OK, Body::Raw(BYTES))
            .answers_raw(StatusCode::PARTIAL_CONTENT, Body::Raw(BYTES)),
        path(Operation::put("/v1/sandboxes/{id}/files", "Write a file, whole or not at all"))
            .query("mode", Query::OptionalText, "Permission bits of a new file, in octal; 0644 when absent.")
            .query("parents", Query::Flag, "Make missing parent directories.")
            .takes_raw(Body::Raw(BYTES))
            .answers::<WrittenFile>(OK)
            .answers::<WrittenFile>(CREATED),
        recursive(path(Operation::delete("/v1/sandboxes/{id}/files", "Remove a file or a tree")))
            .answers_nothing(NO_CONTENT),
        path(Operation::get("/v1/sandboxes/{id}/files/archive", "A file or a tree as a tar stream"))
            .answers_raw(OK, Body::Raw(TAR)),
        path(Operation::put("/v1/sandboxes/{id}/files/archive", "Unpack a tar stream into a directory"))
            .query("owners", Query::Flag, "Give files the owners that the stream names.")
            .takes_raw(Body::Raw(BYTES))
            .answers_nothing(NO_CONTENT),
        path(Operation::get("/v1/sandboxes/{id}/files/list", "What is in a directory")).answers_all::<FileEntry>(OK),
        path(Operation::get("/v1/sandboxes/{id}/files/stat", "One file, not following a link")).answers::<FileEntry>(OK),
        Operation::post("/v1/sandboxes/{id}/files/mkdir", "Make a directory and its parents")
            .takes::<MakeDirectoryRequest>()
            .answers_nothing(NO_CONTENT),
        Operation::post("/v1/sandboxes/{id}/files/move", "Rename a file")
            .takes::<MoveFileRequest>()
            .answers_nothing(NO_CONTENT),
        {
            let mut watch =
                recursive(path(Operation::get("/v1/sandboxes/{id}/files/watch", "Changes of files, as they happen")));
            let event = watch.object::<FileEvent>();
            watch.answers_raw(OK, Body::Events(event))
        },
    ]
}

fn branching() -> Vec<Operation> {
    vec![
        {
            let mut fork =
                Operation::post("/v1/sandboxes/{id}/fork", "Copies of a sandbox as it runs, all of one instant");
            fork.object::<SpawnReport>();
            fork.about("Answers as a spawn does.")
                .query("detail", Query::Flag, "Answer a report on all copies, with timings.")
                .takes::<ForkRequest>()
                .answers_all::<SandboxInfo>(CREATED)
        },
        Operation::post("/v1/sandboxes/{id}/branch", "A snapshot of a sandbox, which runs on")
            .takes::<BranchRequest>()
            .answers::<SnapshotInfo>(CREATED)
            .answers::<SnapshotInfo>(ACCEPTED),
        Operation::get("/v1/sandboxes/{id}/checkpoints", "A sandbox's checkpoints, oldest first")
            .answers_all::<CheckpointInfo>(OK),
        Operation::post("/v1/sandboxes/{id}/checkpoints", "Freeze a copy to come back to")
            .takes::<CheckpointRequest>()
            .answers::<CheckpointInfo>(CREATED),
        Operation::delete("/v1/sandboxes/{id}/checkpoints/{name}", "Remove a checkpoint").answers_nothing(NO_CONTENT),
        Operation::post("/v1/sandboxes/{id}/rewind", "Back to a checkpoint, which stays; later ones go")
            .takes::<RewindRequest>()
            .answers::<CheckpointInfo>(OK),
    ]
}

fn workspaces() -> Vec<Operation> {
    vec![
        Operation::get("/v1/workspaces", "All workspaces, by name").answers_all::<WorkspaceInfo>(OK),
        Operation::post("/v1/workspaces", "Make a workspace and its sandbox")
            .takes::<CreateWorkspaceRequest>()
            .answers::<WorkspaceInfo>(CREATED),
        Operation::get("/v1/workspaces/{name}", "One workspace").answers::<WorkspaceInfo>(OK),
        Operation::delete("/v1/workspaces/{name}", "End a workspace and forget its state").answers_nothing(NO_CONTENT),
        Operation::post("/v1/workspaces/{name}/suspend", "Put a workspace on disk")
            .takes::<SuspendWorkspaceRequest>()
            .answers::<WorkspaceInfo>(OK),
        Operation::post("/v1/workspaces/{name}/resume", "Bring a workspace back").answers::<WorkspaceInfo>(OK),
    ]
}

fn snapshots() -> Vec<Operation> {
    vec![
        Operation::get("/v1/snapshots", "All snapshots, by tag").answers_all::<SnapshotInfo>(OK),
        Operation::post("/v1/snapshots", "Boot a kernel and a root disk of the daemon's host, and snapshot that")
            .takes::<CreateSnapshotRequest>()
            .answers::<SnapshotInfo>(CREATED),
        Operation::delete("/v1/snapshots/{tag}", "Remove a snapshot")
            .query("cascade", Query::Flag, "And those that build on it.")
            .query("force", Query::Flag, "Though others build on it, which can then not be used.")
            .answers_nothing(NO_CONTENT),
        Operation::get("/v1/snapshots/{tag}/info", "One snapshot, what it builds on and what builds on it")
            .answers::<SnapshotDetail>(OK),
        Operation::post("/v1/snapshots/{tag}/compact", "Write a snapshot anew as one that depends on no other")
            .takes::<CompactRequest>()
            .answers::<SnapshotInfo>(OK),
        {
            let mut verify = Operation::post("/v1/snapshots/{tag}/verify", "Recompute every digest");
            let line = verify.object::<VerifyProgress>();
            verify.answers_raw(OK, Body::JsonLines(line))
        },
        Operation::get("/v1/snapshots/{tag}/pack", "A snapshot with all it builds on, in one file")
            .query("level", Query::OptionalNumber, "Level of compression.")
            .query("description", Query::OptionalText, "Kept in the pack.")
            .query("base_image", Query::OptionalText, "Kept in the pack.")
            .answers_raw(OK, Body::Raw(PACK)),
        Operation::post("/v1/packs", "Unpack snapshots")
            .query("tag", Query::OptionalText, "Name of the one that was packed.")
            .query("force", Query::Flag, "Replace snapshots of the same names.")
            .query(
                "verify_key",
                Query::OptionalText,
                "An ed25519 public key in hex, whose signature the pack must have.",
            )
            .takes_raw(Body::Raw(BYTES))
            .answers::<UnpackReport>(OK)
            .answers::<UnpackReport>(CREATED),
        {
            let mut bake = Operation::post("/v1/bakes", "Boot, warm and snapshot a guest");
            let line = bake.object::<BakeEvent>();
            bake.takes::<BakeRequest>().answers_raw(OK, Body::JsonLines(line))
        },
        Operation::head("/v1/blobs/{digest}", "Whether a blob is there").answers_nothing(OK),
        Operation::put("/v1/blobs/{digest}", "Upload a kernel, an initramfs or a root disk")
            .takes_raw(Body::Raw(BYTES))
            .answers::<BlobInfo>(CREATED),
    ]
}
