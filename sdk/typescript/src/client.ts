import { Controller, type ControllerOptions } from "./controller.js";
import { Sandbox } from "./sandbox.js";
import type { SandboxInfo, SnapshotInfo, SpawnOptions } from "./types.js";

/** What `sandboxes.create` takes: `tag` is another name for `snapshotTag`. */
export type CreateOptions = Omit<SpawnOptions, "n" | "snapshotTag"> & ({ snapshotTag: string } | { tag: string });

/** A daemon as collections of objects. */
export class Forkd {
  readonly controller: Controller;
  readonly sandboxes: Sandboxes;
  readonly snapshots: Snapshots;

  constructor(options: ControllerOptions = {}) {
    this.controller = new Controller(options);
    this.sandboxes = new Sandboxes(this.controller);
    this.snapshots = new Snapshots(this.controller);
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

  /** Deletes a snapshot. */
  delete(tag: string, options: { cascade?: boolean; force?: boolean } = {}): Promise<void> {
    return this.controller.deleteSnapshot(tag, options);
  }
}

function spawnOptions(options: CreateOptions): Omit<SpawnOptions, "n"> {
  if ("snapshotTag" in options) return options;
  const { tag, ...rest } = options;
  return { ...rest, snapshotTag: tag };
}
