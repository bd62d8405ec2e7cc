//! Files of a sandbox's guest.

use serde::{Deserialize, Serialize};

/// What kind of file it is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Device, socket or FIFO.
    Other,
}

/// One file: the answer of `GET /v1/sandboxes/:id/files/stat`, and an entry of `…/files/list`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileEntry {
    /// Last part of the path.
    pub name: String,
    /// Absolute path.
    pub path: String,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: FileKind,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits in octal, such as `0644`.
    pub mode: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since the Unix epoch.
    pub modified_unix: i64,
    /// Target of a symbolic link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// Answer of `PUT /v1/sandboxes/:id/files`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WrittenFile {
    /// The path that was written to.
    pub path: String,
    /// How many bytes it has.
    pub size: u64,
}

/// `POST /v1/sandboxes/:id/files/mkdir`: makes a directory and its parents; one that is there is well.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MakeDirectoryRequest {
    /// Absolute path.
    pub path: String,
}

/// `POST /v1/sandboxes/:id/files/move`: renames within one file system, replacing what is at `to`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MoveFileRequest {
    /// Absolute path.
    pub from: String,
    /// Absolute path.
    pub to: String,
}

/// What happened to a file.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileEventKind {
    /// It came to be, or was moved in from elsewhere.
    Created,
    /// Its content changed; several changes in quick succession may be told as one.
    Modified,
    /// Whoever wrote it closed it.
    Written,
    /// Its mode, owner or times changed.
    Attributes,
    /// It was removed, or moved elsewhere.
    Removed,
    /// It has another name.
    Moved,
    /// More happened than could be told; look at everything anew.
    Missed,
    /// Something that this version does not know.
    Other,
}

/// The data of one server-sent event of `GET /v1/sandboxes/:id/files/watch`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileEvent {
    /// What happened; also the name of the server-sent event.
    #[serde(rename = "type")]
    pub kind: FileEventKind,
    /// The file.
    pub path: String,
    /// Where it was before, when it was moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Whether it is a directory.
    pub directory: bool,
}
