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

/** What is asked for when sandboxes are made. */
export interface SpawnOptions {
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
  /** End it by itself after this long. */
  timeoutSecs?: number;
  /** How it ends then. */
  onTimeout?: "kill" | "suspend";
}

/** How a branch is taken. */
export interface BranchOptions {
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
