import { packed } from "./archive.js";
import { type Controller, sandbox } from "./controller.js";
import { ControllerError } from "./errors.js";
import { type FileChange, chunks, fileChange, lines } from "./streams.js";
import { untar } from "./untar.js";

/** One file of a guest. */
export interface FileInfo {
  name: string;
  path: string;
  type: "file" | "directory" | "symlink" | "other";
  size: number;
  /** Permission bits in octal. */
  mode: string;
  uid: number;
  gid: number;
  modified_unix: number;
  /** Target of a symbolic link. */
  target?: string;
}

/** `sandbox.files`. Paths are absolute paths in the guest. */
export class Files {
  constructor(
    private readonly controller: Controller,
    private readonly id: string,
  ) {}

  /** A file's content. */
  async read(path: string): Promise<Uint8Array> {
    const request = { method: "GET", path: this.path("", { path }) };
    return this.controller.transport.whole(request, async (response) => new Uint8Array(await response.arrayBuffer()));
  }

  /** A file's content as text. */
  async readText(path: string): Promise<string> {
    return new TextDecoder().decode(await this.read(path));
  }

  /** Creates or replaces a file, with the directories it needs; `mode` is its permissions. */
  async write(path: string, content: string | Uint8Array, options: { mode?: number } = {}): Promise<void> {
    const query = { path, mode: options.mode?.toString(8), parents: "true" };
    await this.controller.transport.call({ method: "PUT", path: this.path("", query), content });
  }

  /** What is in a directory, by name. */
  list(path: string): Promise<FileInfo[]> {
    return this.controller.transport.call({ method: "GET", path: this.path("/list", { path }) });
  }

  /** One file, a final symbolic link not followed. */
  stat(path: string): Promise<FileInfo> {
    return this.controller.transport.call({ method: "GET", path: this.path("/stat", { path }) });
  }

  /** Whether there is anything at `path`. */
  async exists(path: string): Promise<boolean> {
    try {
      await this.stat(path);
      return true;
    } catch (error) {
      if (error instanceof ControllerError && error.status === 404) return false;
      throw error;
    }
  }

  /** Makes a directory and those above it. */
  async mkdir(path: string): Promise<void> {
    await this.controller.transport.call({ method: "POST", path: this.path("/mkdir"), json: { path } });
  }

  /** Gives a file or directory another name. */
  async move(from: string, to: string): Promise<void> {
    await this.controller.transport.call({ method: "POST", path: this.path("/move"), json: { from, to } });
  }

  /** Removes a file, or with `recursive` a directory with all that is in it. */
  async remove(path: string, options: { recursive?: boolean } = {}): Promise<void> {
    const query = { path, recursive: options.recursive ? "true" : undefined };
    await this.controller.transport.call({ method: "DELETE", path: this.path("", query) });
  }

  /**
   * Copies a file or folder of this host into a directory of the guest, which is made if need be: `site` into `/srv` is
   * `/srv/site` there. Permissions and times stay, owners do not. Needs the program `tar`.
   */
  async upload(source: string, directory: string): Promise<void> {
    await this.mkdir(directory);
    const tar = packed(source);
    const sent = this.putArchive(directory, tar.stream);
    // Where tar failed, what it said is the cause.
    const [program, request] = await Promise.allSettled([tar.ended, sent]);
    if (program.status === "rejected") throw program.reason;
    if (request.status === "rejected") throw request.reason;
  }

  /**
   * Copies a file or folder of the guest into a directory of this host, which is made if need be. Links that lead outside
   * of that and special files throw `ArchiveError`.
   */
  async download(path: string, directory: string): Promise<void> {
    await untar(chunks(await this.readArchive(path)), directory);
  }

  /** A file or folder as a tar stream, whose entries start with its name. */
  async readArchive(path: string): Promise<ReadableStream<Uint8Array>> {
    const request = { method: "GET", path: this.path("/archive", { path }) };
    const [response] = await this.controller.transport.open(request, true);
    return response.body as ReadableStream<Uint8Array>;
  }

  /**
   * Unpacks a tar stream into a directory, which is made if need be; `owners` gives files the owners that the stream
   * names.
   */
  async writeArchive(
    directory: string,
    tar: Uint8Array | ReadableStream<Uint8Array>,
    options: { owners?: boolean } = {},
  ): Promise<void> {
    await this.mkdir(directory);
    await this.putArchive(directory, tar, options);
  }

  private async putArchive(
    directory: string,
    tar: Uint8Array | ReadableStream<Uint8Array>,
    options: { owners?: boolean } = {},
  ): Promise<void> {
    const query = { path: directory, owners: options.owners ? "true" : undefined };
    const [response] = await this.controller.transport.open(
      { method: "PUT", path: this.path("/archive", query), content: tar },
      true,
    );
    await response.text();
  }

  /** Changes as they happen, until the iteration is given up or `signal` aborts. */
  async *watch(
    path: string,
    options: { recursive?: boolean; signal?: AbortSignal } = {},
  ): AsyncGenerator<FileChange> {
    const query = { path, recursive: options.recursive ? "true" : undefined };
    const request = { method: "GET", path: this.path("/watch", query), ...(options.signal && { signal: options.signal }) };
    const [response] = await this.controller.transport.open(request, true);
    for await (const line of lines(response)) {
      const change = fileChange(line);
      if (change !== undefined) yield change;
    }
  }

  private path(tail: string, query: Record<string, string | undefined> = {}): string {
    const words = Object.entries(query).filter((pair): pair is [string, string] => pair[1] !== undefined);
    const text = words.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
    return sandbox(this.id, `/files${tail}${text === "" ? "" : `?${text}`}`);
  }
}
