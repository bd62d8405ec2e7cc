/** The daemon's JSON objects, as they come. */

export type BranchMode = "full" | "diff" | "live";

/** One sandbox. The optional keys are there only when they have something to say. */
export interface SandboxInfo {
  id: string;
  snapshot_tag: string;
  netns: string | null;
  guest_addr: string;
  created_at_unix: number;
  pid: number | null;
  memory_limit_mib: number | null;
  has_branched: boolean;
  last_branch_memory_path: string | null;
  branch_count: number;
  stopped?: string;
  forked_from?: string;
  expires_at_unix?: number;
}

/** One snapshot. */
export interface SnapshotInfo {
  tag: string;
  dir: string;
  created_at_unix: number;
  status: "ready" | "writing" | "failed";
  bootable: boolean;
  branched_from?: string;
  pause_ms?: number;
  diff_ms?: number;
  diff_physical_bytes?: number;
  diff_logical_bytes?: number;
  parent_tag?: string;
  warning?: string;
  memory_bytes?: number;
  stored_bytes?: number;
}

/** One checkpoint of a sandbox. */
export interface CheckpointInfo {
  name: string;
  created_at_unix: number;
  pause_us: number;
  place: "memory" | "disk";
  automatic: boolean;
  private_bytes?: number;
  stored_bytes?: number;
}

/** What a program said and how it ended; a negative code is the signal that killed it. */
export interface ExecResult {
  stdout: string;
  stderr: string;
  exit_code: number;
  timed_out?: boolean;
}

/** What source text evaluated to: its `repr` (Python) or its JSON text (Node). */
export interface EvalResult {
  result: string | null;
  error: string | null;
  exit_code: number;
  stdout?: string;
}

/** What an agent says of itself. */
export interface PingResult {
  pong: boolean;
  numpy_version: string;
  pid: number;
  agent_lang: string;
  warmup_ready: boolean;
  [more: string]: unknown;
}

/** What is the same in every request that makes something. */
export interface MakingOptions {
  /** The daemon does what is asked under one key once, and answers alike for a day. */
  idempotencyKey?: string;
}

/** When a sandbox ends by itself, and how: at once, or put on disk as the snapshot `suspended-ID`. */
export interface Lifetime {
  timeoutSecs?: number;
  onTimeout?: "kill" | "suspend";
}

/** What is asked for when sandboxes are made. */
export interface SpawnOptions extends MakingOptions, Lifetime {
  snapshotTag: string;
  /** How many, 1 unless said. */
  n?: number;
  /** Give each a network namespace of its own. */
  perChildNetns?: boolean;
  memoryLimitMib?: number;
  prewarm?: boolean;
  liveFork?: boolean;
  /** Back the snapshot's memory with huge pages. */
  hugepages?: boolean;
  /** Take a checkpoint before each program that is run. */
  autoCheckpoint?: "exec";
}

/** How running copies of a sandbox are made. */
export interface ForkOptions extends MakingOptions, Lifetime {
  memoryLimitMib?: number;
}

/** How a branch is taken. */
export interface BranchOptions extends MakingOptions {
  /** Name of the snapshot; the daemon makes one up when absent. */
  tag?: string;
  mode?: BranchMode;
  diff?: boolean;
  measure_diff?: boolean;
  /** False, with `mode: "live"`, answers as soon as the source runs again. */
  wait?: boolean;
  /** Keep it as a layer over the sandbox's own snapshot; needs `mode: "diff"`. */
  parentTag?: string;
}

/** How a program is run. */
export interface ExecOptions {
  /** It is killed after this long; 30 unless said. */
  timeoutSecs?: number;
  env?: Record<string, string>;
  cwd?: string;
  user?: string;
  /** Text for its standard input. */
  stdin?: string;
}

/** How source text is evaluated. */
export interface EvalOptions {
  language?: "python" | "node";
  timeoutSecs?: number;
}

/** A snapshot of a kernel and a root disk, files of the daemon's host. */
export interface CreateSnapshotOptions extends MakingOptions {
  tag: string;
  kernel: string;
  rootfs: string;
  bootWaitSecs?: number;
}

/** A sandbox with a name, to be made. */
export interface WorkspaceOptions extends MakingOptions {
  name: string;
  snapshotTag: string;
  perChildNetns?: boolean;
  memoryLimitMib?: number;
  hugepages?: boolean;
  /** Put it on disk when nothing was run in it for this long; the daemon's default when absent, 0 for never. */
  idleSuspendSecs?: number;
}

/** One workspace. The optional keys are there only when they have something to say. */
export interface WorkspaceInfo {
  id: string;
  name: string;
  source_snapshot_tag: string;
  current_state_tag?: string;
  status: "running" | "suspended" | "stale";
  /** Its sandbox, while it has one. */
  live_sandbox_id?: string;
  created_at_unix: number;
  last_active_unix: number;
  last_branch_memory_path?: string;
  idle_suspend_secs?: number;
}

/** What one sandbox uses now. The optional keys are left out where they do not apply. */
export interface SandboxUsage {
  id: string;
  snapshot_tag: string;
  created_at_unix: number;
  stopped?: string;
  expires_at_unix?: number;
  private_bytes?: number;
  cpu_ms?: number;
  uptime_secs?: number;
}

/** Everything, each under what it came from. */
export interface Family {
  roots: FamilyMember[];
}

/** A snapshot, sandbox or checkpoint, and what came from it. What it is has the key that `kind` names. */
export interface FamilyMember {
  kind: "snapshot" | "sandbox" | "checkpoint";
  name: string;
  /** On a root that is one only because its tree would be too deep: what it came from. */
  from?: string;
  snapshot?: SnapshotInfo;
  sandbox?: SandboxInfo;
  private_bytes?: number;
  checkpoint?: CheckpointInfo;
  children: FamilyMember[];
}

/** What happened. After `events.lost`, what is known from earlier events may be wrong. */
export type EventKind =
  | "sandbox.created"
  | "sandbox.stopped"
  | "sandbox.ended"
  | "sandbox.rewound"
  | "sandbox.suspended"
  | "sandbox.suspend_failed"
  | "sandbox.timeout_changed"
  | "snapshot.writing"
  | "snapshot.ready"
  | "snapshot.failed"
  | "snapshot.removed"
  | "checkpoint.created"
  | "checkpoint.moved"
  | "checkpoint.removed"
  | "workspace.created"
  | "workspace.suspended"
  | "workspace.resumed"
  | "workspace.stale"
  | "workspace.deleted"
  | "events.lost";

/** One thing that happened, and to what. */
export interface DaemonEvent {
  id: number;
  at_unix: number;
  event: EventKind;
  sandbox?: string;
  snapshot?: string;
  checkpoint?: string;
  workspace?: string;
  reason?: string;
  /** How a machine ended, for programs. */
  code?: string;
}
