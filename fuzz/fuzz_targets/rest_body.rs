//! Bodies of REST requests: any bytes are read without panic, and what is read reads the same when written again.
//! The first byte chooses the request.
#![no_main]

use std::fmt::Debug;

use forkd_types::rest::{
    BakeRequest, BranchRequest, CheckpointRequest, CompactRequest, CreateSnapshotRequest, CreateWorkspaceRequest,
    EvalRequest, ExecRequest, ExecStreamControl, ExecStreamRequest, ForkRequest, MakeDirectoryRequest,
    MoveFileRequest, RewindRequest, SpawnRequest, SuspendWorkspaceRequest, TimeoutRequest,
};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fn there_and_back<T: DeserializeOwned + Serialize + PartialEq + Debug>(body: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<T>(body) {
        let written = serde_json::to_vec(&request).expect("a request can be written");
        let again: T = serde_json::from_slice(&written).expect("what was written can be read");
        assert_eq!(again, request);
    }
}

const REQUESTS: [fn(&[u8]); 17] = [
    there_and_back::<BakeRequest>,
    there_and_back::<BranchRequest>,
    there_and_back::<CheckpointRequest>,
    there_and_back::<CompactRequest>,
    there_and_back::<CreateSnapshotRequest>,
    there_and_back::<CreateWorkspaceRequest>,
    there_and_back::<EvalRequest>,
    there_and_back::<ExecRequest>,
    there_and_back::<ExecStreamControl>,
    there_and_back::<ExecStreamRequest>,
    there_and_back::<ForkRequest>,
    there_and_back::<MakeDirectoryRequest>,
    there_and_back::<MoveFileRequest>,
    there_and_back::<RewindRequest>,
    there_and_back::<SpawnRequest>,
    there_and_back::<SuspendWorkspaceRequest>,
    there_and_back::<TimeoutRequest>,
];

fuzz_target!(|bytes: &[u8]| {
    if let Some((&which, body)) = bytes.split_first() {
        REQUESTS[usize::from(which) % REQUESTS.len()](body);
    }
});
