import { Controller, type ControllerOptions } from "./controller.js";
import { Sandbox } from "./sandbox.js";
import type {
  CreateSnapshotOptions,
  MakingOptions,
  SandboxInfo,
  SnapshotInfo,
  SpawnOptions,
  WorkspaceInfo,
  WorkspaceOptions,
} from "./types.js";

/** What `sandboxes.create` takes: `tag` is another name for `snapshotTag`. */
export type CreateOptions = Omit<SpawnOptions, "n" | "snapshotTag"> & ({ snapshotTag: string } | { tag: string });

/** A daemon as collections of objects. */
export class Forkd {
  readonly controller: Controller;
  readonly sandboxes: Sandboxes;
  readonly snapshots: Snapshots;
  readonly workspaces: Workspaces;

  constructor(options: ControllerOptions = {}) {
    this.controller = new Controller(options);
    this.sandboxes = new Sandboxes(this.controller);
    this.snapshots = new Snapshots(this.controller);
    this.workspaces = new Workspaces(this.controller);
  }
}

/** `client.sandboxes` */
export class Sandboxes {
  constructor(private readonly controller: Controller) {}

  /** Forks one child of a snapshot. */
  create(options: CreateOptions): Promise<Sandbox> {
    return Sandbox.on(this.controller, spawnOptions(options));
  }

  /** Forks `n` children of a snapshot in one request. */
  async createMany(n: number, options: CreateOptions): Promise<Sandbox[]> {
    const made = await this.controller.spawnSandboxes({ ...spawnOptions(options), n });
    return made.map((info) => new Sandbox(this.controller, info));
  }

  /** All sandboxes, by id. */
  list(): Promise<SandboxInfo[]> {
    return this.controller.listSandboxes();
  }

  /** A sandbox that runs. */
  async get(id: string): Promise<Sandbox> {
    return new Sandbox(this.controller, await this.controller.getSandbox(id));
  }

  /** Ends a sandbox at once. */
  kill(id: string): Promise<void> {
    return this.controller.killSandbox(id);
  }
}

/** `client.snapshots` */
export class Snapshots {
  constructor(private readonly controller: Controller) {}

  /** All snapshots, by tag. */
  list(): Promise<SnapshotInfo[]> {
    return this.controller.listSnapshots();
  }

  /** Boots a kernel and a root disk, and takes a snapshot when the agent answers. */
  create(options: CreateSnapshotOptions): Promise<SnapshotInfo> {
    return this.controller.createSnapshot(options);
  }

  /** Deletes a snapshot. */
  delete(tag: string, options: { cascade?: boolean; force?: boolean } = {}): Promise<void> {
    return this.controller.deleteSnapshot(tag, options);
  }
}

/** `client.workspaces` */
export class Workspaces {
  constructor(private readonly controller: Controller) {}

  /** Makes a workspace, which runs. */
  create(options: WorkspaceOptions): Promise<WorkspaceInfo> {
    return this.controller.createWorkspace(options);
  }

  /** All workspaces, by name. */
  list(): Promise<WorkspaceInfo[]> {
    return this.controller.listWorkspaces();
  }

  /** One workspace. */
  get(name: string): Promise<WorkspaceInfo> {
    return this.controller.getWorkspace(name);
  }

  /** Its sandbox, which it has while it runs. */
  async sandbox(name: string): Promise<Sandbox> {
    const { live_sandbox_id: id, status } = await this.get(name);
    if (id === undefined) throw new Error(`workspace ${name} is ${status} and has no sandbox; resume it first`);
    return new Sandbox(this.controller, await this.controller.getSandbox(id));
  }

  /** Puts a workspace on disk. */
  suspend(name: string, options: MakingOptions = {}): Promise<WorkspaceInfo> {
    return this.controller.suspendWorkspace(name, options);
  }

  /** Brings a workspace back. */
  resume(name: string, options: MakingOptions = {}): Promise<WorkspaceInfo> {
    return this.controller.resumeWorkspace(name, options);
  }

  /** Ends a workspace and forgets its state. */
  delete(name: string): Promise<void> {
    return this.controller.deleteWorkspace(name);
  }
}

function spawnOptions(options: CreateOptions): Omit<SpawnOptions, "n"> {
  if ("snapshotTag" in options) return options;
  const { tag, ...rest } = options;
  return { ...rest, snapshotTag: tag };
}
