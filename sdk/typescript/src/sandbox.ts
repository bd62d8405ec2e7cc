import { Commands, type Command, argv } from "./commands.js";
import { Controller, type ControllerOptions, sandbox } from "./controller.js";
import { ControllerError, EvalError } from "./errors.js";
import { Files } from "./files.js";
import type { Process, StartOptions } from "./process.js";
import type {
  BranchOptions,
  CheckpointInfo,
  EvalOptions,
  ExecOptions,
  ExecResult,
  ForkOptions,
  Lifetime,
  MakingOptions,
  PingResult,
  SandboxInfo,
  SnapshotInfo,
  SpawnOptions,
} from "./types.js";

/** How a sandbox is made: what to copy, and where the daemon is. */
export type SandboxOptions = Omit<SpawnOptions, "n"> & ControllerOptions;

/** A running copy of a snapshot. */
export class Sandbox {
  readonly commands: Commands;
  readonly files: Files;

  /** The sandbox that `info` is about. */
  constructor(
    readonly controller: Controller,
    /** What the daemon last said about it. */
    public info: SandboxInfo,
  ) {
    this.commands = new Commands(controller, info.id);
    this.files = new Files(controller, info.id);
  }

  /** Forks one child of a snapshot. */
  static async create(options: SandboxOptions): Promise<Sandbox> {
    const { baseUrl, token, timeoutMs, retries, fetch, ...spawn } = options;
    const connection = { baseUrl, token, timeoutMs, retries, fetch };
    const given = Object.entries(connection).filter(([, value]) => value !== undefined);
    return Sandbox.on(new Controller(Object.fromEntries(given) as ControllerOptions), spawn);
  }

  /** Forks one child of a snapshot by its tag. */
  static spawn(tag: string, options: Omit<SandboxOptions, "snapshotTag"> = {}): Promise<Sandbox> {
    return Sandbox.create({ ...options, snapshotTag: tag });
  }

  /** Forks one child on a daemon that is known. */
  static async on(controller: Controller, options: Omit<SpawnOptions, "n">): Promise<Sandbox> {
    const [info] = await controller.spawnSandboxes({ ...options, n: 1 });
    if (info === undefined) throw new Error(`the daemon made no copy of ${options.snapshotTag}`);
    return new Sandbox(controller, info);
  }

  /** A sandbox that runs, by its id. */
  static async connect(id: string, options: ControllerOptions = {}): Promise<Sandbox> {
    const controller = new Controller(options);
    return new Sandbox(controller, await controller.getSandbox(id));
  }

  /** Forks a child, hands it to `use`, and kills it whatever happens. */
  static async with<T>(options: SandboxOptions, use: (sandbox: Sandbox) => Promise<T> | T): Promise<T> {
    const sandbox = await Sandbox.create(options);
    try {
      return await use(sandbox);
    } finally {
      await sandbox.kill();
    }
  }

  get id(): string {
    return this.info.id;
  }

  /** Runs a program to its end: its arguments, or a shell's command line. */
  exec(command: Command, options: ExecOptions = {}): Promise<ExecResult> {
    return this.controller.execCommand(this.id, argv(command), options);
  }

  /**
   * Evaluates source text in the sandbox's warm interpreter: the `repr` of a Python value, or with
   * `language: "node"` the value itself. An exception in the guest throws `EvalError`.
   */
  async eval(code: string, options?: EvalOptions & { language?: "python" }): Promise<string | null>;
  async eval(code: string, options: EvalOptions & { language: "node" }): Promise<unknown>;
  async eval(code: string, options: EvalOptions = {}): Promise<unknown> {
    const { result, error } = await this.controller.evalCode(this.id, code, options);
    if (error !== null) throw new EvalError(error);
    return options.language === "node" && result !== null ? JSON.parse(result) : result;
  }

  /** Asks its agent whether it is there. */
  ping(): Promise<PingResult> {
    return this.controller.pingSandbox(this.id);
  }

  /** A program on a terminal, a shell unless another is given. Needs the package `ws`. */
  pty(options: StartOptions & { command?: Command; rows?: number; columns?: number } = {}): Promise<Process> {
    const { command = ["/bin/sh"], rows = 24, columns = 80, ...rest } = options;
    return this.commands.start(command, { ...rest, terminal: { rows, columns } });
  }

  /** Where a TCP port of the guest is served. Requests need the daemon's token, as all do. */
  portUrl(port: number, path = "/"): string {
    if (!Number.isInteger(port) || port < 1 || port > 65535) {
      throw new RangeError(`${port} is not a TCP port; they are 1 to 65535`);
    }
    const { base, socket } = this.controller.address;
    const start = socket === undefined ? base : `unix:${socket}:`;
    return start + sandbox(this.id, `/ports/${port}/${path.replace(/^\/+/, "")}`);
  }

  /** A running copy of it as it is now. */
  async fork(options: ForkOptions = {}): Promise<Sandbox> {
    const [copy] = await this.forkMany(1, options);
    if (copy === undefined) throw new Error(`the daemon made no copy of ${this.id}`);
    return copy;
  }

  /** `n` running copies, all of one instant. */
  async forkMany(n: number, options: ForkOptions = {}): Promise<Sandbox[]> {
    const copies = await this.controller.forkSandbox(this.id, { ...options, n });
    return copies.map((info) => new Sandbox(this.controller, info));
  }

  /** Takes a snapshot of it, to spawn from. */
  branch(options: BranchOptions = {}): Promise<SnapshotInfo> {
    return this.controller.branchSandbox(this.id, options);
  }

  /** Freezes it as it is now, to come back to. */
  checkpoint(name?: string, options: MakingOptions & { disk?: boolean } = {}): Promise<CheckpointInfo> {
    return this.controller.checkpointSandbox(this.id, { ...options, ...(name !== undefined && { name }) });
  }

  /** Its checkpoints, oldest first. */
  checkpoints(): Promise<CheckpointInfo[]> {
    return this.controller.listCheckpoints(this.id);
  }

  /** Brings it back to a checkpoint: by name, or that many back; the newest without either. */
  rewind(to: string | { name?: string; back?: number } = {}): Promise<CheckpointInfo> {
    return this.controller.rewindSandbox(this.id, typeof to === "string" ? { name: to } : to);
  }

  /** Lets it end this long after now; with null it lives until it is ended. */
  async setTimeout(timeoutSecs: number | null, onTimeout?: Lifetime["onTimeout"]): Promise<void> {
    this.info = await this.controller.setTimeout(this.id, timeoutSecs, onTimeout);
  }

  /** Puts it on disk as a snapshot, and ends it. */
  suspend(options: MakingOptions = {}): Promise<SnapshotInfo> {
    return this.controller.suspendSandbox(this.id, options);
  }

  /** Ends it. Ending one that has ended already is no error. */
  async kill(): Promise<void> {
    try {
      await this.controller.killSandbox(this.id);
    } catch (error) {
      if (!(error instanceof ControllerError && error.status === 404)) throw error;
    }
  }
}
