import type { Address } from "./address.js";
import { type EventOptions, EventStream } from "./events.js";
import { type ConnectionOptions, type Outgoing, Transport } from "./transport.js";
import type {
  BranchOptions,
  CheckpointInfo,
  CreateSnapshotOptions,
  EvalOptions,
  EvalResult,
  ExecOptions,
  ExecResult,
  Family,
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

export type ControllerOptions = ConnectionOptions;

/** How long the answer to a request that boots a machine may take at least. */
const BOOT_MS = 300_000;

/** How much longer than a program's own time limit its answer may take. */
const GRACE_MS = 10_000;

/** A forkd daemon: its REST API as calls. A refused request throws `ControllerError`. */
export class Controller {
  /** How requests are sent. */
  readonly transport: Transport;

  constructor(options: ControllerOptions = {}) {
    this.transport = new Transport(options);
  }

  get baseUrl(): string {
    return this.address.text;
  }

  get address(): Address {
    return this.transport.address;
  }

  /** All snapshots, by tag. */
  listSnapshots(): Promise<SnapshotInfo[]> {
    return this.get("/v1/snapshots");
  }

  /** Deletes a snapshot. One that others are layers over needs `cascade` (they go too) or `force`. */
  async deleteSnapshot(tag: string, options: { cascade?: boolean; force?: boolean } = {}): Promise<void> {
    const wanted = Object.entries(options).filter(([, on]) => on);
    const query = wanted.length === 0 ? "" : `?${wanted.map(([name]) => `${name}=true`).join("&")}`;
    await this.transport.call({ method: "DELETE", path: `/v1/snapshots/${segment(tag)}${query}` });
  }

  /** Everything the daemon tells about one snapshot. */
  snapshotInfo(tag: string): Promise<Record<string, unknown>> {
    return this.get(`/v1/snapshots/${segment(tag)}/info`);
  }

  /** Boots a kernel and a root disk, and takes a snapshot when the agent answers. */
  createSnapshot(options: CreateSnapshotOptions): Promise<SnapshotInfo> {
    const { tag, kernel, rootfs, bootWaitSecs } = options;
    return this.make("/v1/snapshots", { tag, kernel, rootfs, boot_wait_secs: bootWaitSecs }, options, BOOT_MS);
  }

  /** Writes a layered snapshot anew as `to`, which depends on no other. */
  compactSnapshot(tag: string, to: string, options: MakingOptions = {}): Promise<SnapshotInfo> {
    return this.make(`/v1/snapshots/${segment(tag)}/compact`, { to }, options);
  }

  /** Forks children of a snapshot. */
  spawnSandboxes(options: SpawnOptions): Promise<SandboxInfo[]> {
    const json = {
      snapshot_tag: options.snapshotTag,
      n: options.n ?? 1,
      per_child_netns: options.perChildNetns ?? false,
      memory_limit_mib: options.memoryLimitMib,
      prewarm: options.prewarm,
      live_fork: options.liveFork,
      hugepages: options.hugepages,
      auto_checkpoint: options.autoCheckpoint,
      ...lifetime(options),
    };
    return this.make("/v1/sandboxes", json, options);
  }

  /** All sandboxes, by id. */
  listSandboxes(): Promise<SandboxInfo[]> {
    return this.get("/v1/sandboxes");
  }

  /** One sandbox. */
  getSandbox(id: string): Promise<SandboxInfo> {
    return this.get(sandbox(id));
  }

  /** Ends a sandbox at once. */
  async killSandbox(id: string): Promise<void> {
    await this.transport.call({ method: "DELETE", path: sandbox(id) });
  }

  /** Makes `n` running copies of a running sandbox, all of one instant. */
  forkSandbox(id: string, options: ForkOptions & { n?: number } = {}): Promise<SandboxInfo[]> {
    const json = { n: options.n ?? 1, memory_limit_mib: options.memoryLimitMib, ...lifetime(options) };
    return this.make(sandbox(id, "/fork"), json, options);
  }

  /** Lets a sandbox end this long after now, whatever was said before; with null it lives until it is ended. */
  setTimeout(id: string, timeoutSecs: number | null, onTimeout?: Lifetime["onTimeout"]): Promise<SandboxInfo> {
    const timeout_secs = timeoutSecs === null ? null : Math.ceil(timeoutSecs);
    return this.post(sandbox(id, "/timeout"), { timeout_secs, on_timeout: onTimeout });
  }

  /** Puts a sandbox on disk as a snapshot, and ends it. */
  suspendSandbox(id: string, options: MakingOptions = {}): Promise<SnapshotInfo> {
    return this.make(sandbox(id, "/suspend"), undefined, options);
  }

  /** Takes a snapshot of a running sandbox. */
  branchSandbox(id: string, options: BranchOptions = {}): Promise<SnapshotInfo> {
    const { tag, mode, diff, measure_diff, wait, parentTag } = options;
    const json = {
      tag,
      mode,
      diff: mode === undefined && diff ? true : undefined,
      measure_diff: measure_diff ? true : undefined,
      wait: wait === false ? false : undefined,
      parent_tag: parentTag,
    };
    return this.make(sandbox(id, "/branch"), json, options);
  }

  /** Freezes a sandbox as it is now, to come back to. */
  checkpointSandbox(
    id: string,
    options: MakingOptions & { name?: string; disk?: boolean } = {},
  ): Promise<CheckpointInfo> {
    return this.make(sandbox(id, "/checkpoints"), { name: options.name, disk: options.disk }, options);
  }

  /** A sandbox's checkpoints, oldest first. */
  listCheckpoints(id: string): Promise<CheckpointInfo[]> {
    return this.get(sandbox(id, "/checkpoints"));
  }

  /** Removes a checkpoint. */
  async deleteCheckpoint(id: string, name: string): Promise<void> {
    await this.transport.call({ method: "DELETE", path: sandbox(id, `/checkpoints/${segment(name)}`) });
  }

  /** Brings a sandbox back to a checkpoint, by name or that many back; without either to the newest. */
  rewindSandbox(id: string, to: { name?: string; back?: number } = {}): Promise<CheckpointInfo> {
    return this.post(sandbox(id, "/rewind"), to);
  }

  /** All workspaces, by name. */
  listWorkspaces(): Promise<WorkspaceInfo[]> {
    return this.get("/v1/workspaces");
  }

  /** Makes a sandbox with a name, that can be put on disk and brought back. */
  createWorkspace(options: WorkspaceOptions): Promise<WorkspaceInfo> {
    const json = {
      name: options.name,
      snapshot_tag: options.snapshotTag,
      per_child_netns: options.perChildNetns,
      memory_limit_mib: options.memoryLimitMib,
      hugepages: options.hugepages,
      idle_suspend_secs: whole(options.idleSuspendSecs),
    };
    return this.make("/v1/workspaces", json, options);
  }

  /** One workspace. */
  getWorkspace(name: string): Promise<WorkspaceInfo> {
    return this.get(workspace(name));
  }

  /** Puts a workspace on disk. */
  suspendWorkspace(name: string, options: MakingOptions = {}): Promise<WorkspaceInfo> {
    return this.make(workspace(name, "/suspend"), {}, options);
  }

  /** Brings a workspace back; its sandbox is `live_sandbox_id`. */
  resumeWorkspace(name: string, options: MakingOptions = {}): Promise<WorkspaceInfo> {
    return this.make(workspace(name, "/resume"), undefined, options);
  }

  /** Ends a workspace and forgets its state. */
  async deleteWorkspace(name: string): Promise<void> {
    await this.transport.call({ method: "DELETE", path: workspace(name) });
  }

  /** What each sandbox uses now. */
  usage(): Promise<SandboxUsage[]> {
    return this.get("/v1/usage");
  }

  /** Snapshots, sandboxes and checkpoints, each under what it came from. */
  tree(): Promise<Family> {
    return this.get("/v1/tree");
  }

  /**
   * What happens from now on, or since the event with the id `after`. The stream comes again by itself when its
   * connection breaks and misses nothing that the daemon still keeps; where that is not all, it gives `events.lost`.
   */
  events(options: EventOptions = {}): Promise<EventStream> {
    return EventStream.open(this.transport, options);
  }

  /** Runs a program to its end. */
  execCommand(id: string, args: string[], options: ExecOptions = {}): Promise<ExecResult> {
    const json = programBody(args, options);
    return this.post(sandbox(id, "/exec"), json, json.timeout_secs * 1000 + GRACE_MS);
  }

  /** Evaluates source text in a warm interpreter. */
  evalCode(id: string, code: string, options: EvalOptions = {}): Promise<EvalResult> {
    const json = { code, language: options.language, timeout_secs: options.timeoutSecs };
    return this.post(sandbox(id, "/eval"), json, (options.timeoutSecs ?? 0) * 1000 + GRACE_MS);
  }

  /** Asks a sandbox's agent whether it is there. */
  pingSandbox(id: string): Promise<PingResult> {
    return this.transport.call({ method: "POST", path: sandbox(id, "/ping") });
  }

  private get<T>(path: string): Promise<T> {
    return this.transport.call({ method: "GET", path });
  }

  private post<T>(path: string, json: object, leastTimeoutMs = 0): Promise<T> {
    return this.transport.call({ method: "POST", path, json, leastTimeoutMs });
  }

  private make<T>(path: string, json: object | undefined, options: MakingOptions, leastTimeoutMs = 0): Promise<T> {
    const outgoing: Outgoing = { method: "POST", path, json, leastTimeoutMs };
    return this.transport.call({ ...outgoing, makes: { idempotencyKey: options.idempotencyKey } });
  }
}

/** The fields that say when a sandbox ends by itself, and how. */
function lifetime(options: Lifetime) {
  return { timeout_secs: whole(options.timeoutSecs), on_timeout: options.onTimeout };
}

/** The daemon counts in whole seconds. */
function whole(seconds: number | undefined): number | undefined {
  return seconds === undefined ? undefined : Math.ceil(seconds);
}

/** The body of every request that runs a program. */
export function programBody(args: string[], options: ExecOptions) {
  const { env, cwd, user, stdin } = options;
  const pairs = env === undefined ? undefined : Object.entries(env);
  return { args, timeout_secs: Math.ceil(options.timeoutSecs ?? 30), env: pairs, cwd, user, stdin };
}

/** `text` as one segment of a path. */
export function segment(text: string): string {
  return encodeURIComponent(text);
}

/** The path of a sandbox, or below it. */
export function sandbox(id: string, tail = ""): string {
  return `/v1/sandboxes/${segment(id)}${tail}`;
}

/** The path of a workspace, or below it. */
function workspace(name: string, tail = ""): string {
  return `/v1/workspaces/${segment(name)}${tail}`;
}
