/** Fork warmed Linux microVMs, run things in them, branch and rewind them. */

export { Forkd, Forkd as Client, type CreateOptions, Sandboxes, Snapshots, Workspaces } from "./client.js";
export { type Command, Commands, type RunOptions } from "./commands.js";
export { Controller, type ControllerOptions } from "./controller.js";
export { ControllerError, DaemonUnreachableError, EvalError, StreamError } from "./errors.js";
export { type EventOptions, EventStream } from "./events.js";
export { ArchiveError } from "./untar.js";
export { type FileInfo, Files } from "./files.js";
export { Process, type StartOptions } from "./process.js";
export { Sandbox, type SandboxOptions } from "./sandbox.js";
export type { ExecEvent, FileChange } from "./streams.js";
export type {
  BranchMode,
  BranchOptions,
  CheckpointInfo,
  CreateSnapshotOptions,
  DaemonEvent,
  EvalOptions,
  EvalResult,
  EventKind,
  ExecOptions,
  ExecResult,
  Family,
  FamilyMember,
  ForkOptions,
  Lifetime,
  MakingOptions,
  PingResult,
  SandboxInfo,
  SandboxUsage,
  SnapshotInfo,
  SpawnOptions,
  WorkspaceInfo,
  WorkspaceOptions,
} from "./types.js";
