import type { Address } from "./address.js";
import { type ConnectionOptions, Transport } from "./transport.js";
import type {
  BranchOptions,
  CheckpointInfo,
  EvalOptions,
  EvalResult,
  ExecOptions,
  ExecResult,
  PingResult,
  SandboxInfo,
  SnapshotInfo,
  SpawnOptions,
} from "./types.js";

export type ControllerOptions = ConnectionOptions;

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

  /** Writes a layered snapshot anew as `to`, which depends on no other. */
  compactSnapshot(tag: string, to: string): Promise<SnapshotInfo> {
    return this.post(`/v1/snapshots/${segment(tag)}/compact`, { to });
  }

  /** Forks children of a snapshot. */
  spawnSandboxes(options: SpawnOptions): Promise<SandboxInfo[]> {
    return this.post("/v1/sandboxes", {
      snapshot_tag: options.snapshotTag,
      n: options.n ?? 1,
      per_child_netns: options.perChildNetns ?? false,
      memory_limit_mib: options.memoryLimitMib,
      prewarm: options.prewarm,
      live_fork: options.liveFork,
      hugepages: options.hugepages,
      timeout_secs: options.timeoutSecs,
      on_timeout: options.onTimeout,
    });
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
  forkSandbox(id: string, options: { n?: number; memoryLimitMib?: number } = {}): Promise<SandboxInfo[]> {
    return this.post(sandbox(id, "/fork"), { n: options.n ?? 1, memory_limit_mib: options.memoryLimitMib });
  }

  /** Takes a snapshot of a running sandbox. */
  branchSandbox(id: string, options: BranchOptions = {}): Promise<SnapshotInfo> {
    const { tag, mode, diff, measure_diff, wait, parentTag } = options;
    return this.post(sandbox(id, "/branch"), {
      tag,
      mode,
      diff: mode === undefined && diff ? true : undefined,
      measure_diff: measure_diff ? true : undefined,
      wait: wait === false ? false : undefined,
      parent_tag: parentTag,
    });
  }

  /** Freezes a sandbox as it is now, to come back to. */
  checkpointSandbox(id: string, options: { name?: string; disk?: boolean } = {}): Promise<CheckpointInfo> {
    return this.post(sandbox(id, "/checkpoints"), options);
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
