/** A program that runs: its streams, terminal and signals, over a WebSocket by the package `ws`. */

import type WebSocket from "ws";

import { type Controller, sandbox } from "./controller.js";
import { ControllerError, StreamError } from "./errors.js";
import { type ExecEvent, execEvent } from "./streams.js";

/** How a program is started. */
export interface StartOptions {
  /** It is killed after this long; no limit unless said. */
  timeoutSecs?: number;
  env?: Record<string, string>;
  cwd?: string;
  user?: string;
  /** Run it on a terminal of this size. */
  terminal?: { rows: number; columns: number };
}

const STDIN = 0;
const STREAMS: Record<number, "stdout" | "stderr"> = { 1: "stdout", 2: "stderr" };
/** What a message of standard input holds at most; the daemon takes four times as much. */
const PIECE = 1 << 20;

/** A program that was started with `commands.start` or `pty`. Closing it kills the program. */
export class Process {
  /** Its process id in the guest. */
  pid: number | undefined;
  /** How it ended, when it has: a negative code is the signal that killed it. */
  exitCode: number | undefined;
  timedOut = false;

  private readonly queue: (ExecEvent | Error)[] = [];
  private wake: (() => void) | undefined;
  private closed = false;

  private constructor(private readonly socket: WebSocket) {
    socket.on("message", (data: Buffer, binary: boolean) => {
      try {
        this.push(binary ? channel(data) : execEvent(JSON.parse(data.toString()) as Record<string, unknown>));
      } catch (error) {
        this.push(error as Error);
      }
    });
    socket.on("error", (error) => this.push(error));
    socket.on("close", () => {
      this.closed = true;
      this.wake?.();
    });
  }

  /** Starts a program. */
  static async start(controller: Controller, id: string, args: string[], options: StartOptions): Promise<Process> {
    const { WebSocket: Socket } = await import("ws").catch((cause: unknown) => {
      throw new Error("an interactive program needs the package ws: npm install ws", { cause });
    });
    const { base, socket: path } = controller.address;
    const target = sandbox(id, "/exec/stream");
    const url = path === undefined ? base.replace(/^http/, "ws") + target : `ws+unix://${path}:${target}`;
    const socket = new Socket(url, { headers: controller.transport.headers(), perMessageDeflate: false });
    const process = new Process(socket);
    await opened(socket, base + target);
    const { timeoutSecs, env, cwd, user, terminal } = options;
    socket.send(
      JSON.stringify({
        args,
        stdin: true,
        timeout_secs: timeoutSecs === undefined ? undefined : Math.ceil(timeoutSecs),
        env: env === undefined ? undefined : Object.entries(env),
        cwd,
        user,
        pty: terminal === undefined ? undefined : { rows: terminal.rows, cols: terminal.columns },
      }),
    );
    const first = await process.next();
    if (first?.type === "started") process.pid = first.pid;
    return process;
  }

  /** Writes to its standard input, or types on its terminal. */
  write(data: string | Uint8Array): void {
    const bytes = Buffer.from(data as Uint8Array);
    for (let start = 0; start < bytes.length; start += PIECE) {
      this.socket.send(Buffer.concat([Buffer.of(STDIN), bytes.subarray(start, start + PIECE)]));
    }
  }

  /** Ends its standard input. */
  closeStdin(): void {
    this.socket.send(Buffer.of(STDIN));
  }

  /** Gives its terminal another size. */
  resize(rows: number, columns: number): void {
    this.socket.send(JSON.stringify({ type: "resize", rows, cols: columns }));
  }

  /** Sends its process group a signal, by number or name. */
  signal(signal: number | string): void {
    this.socket.send(JSON.stringify({ type: "signal", signal }));
  }

  /** Kills its process group. */
  kill(): void {
    this.signal("KILL");
  }

  /** What it does from now on, up to its end. */
  async *events(): AsyncGenerator<ExecEvent> {
    for (;;) {
      const event = await this.next();
      if (event === undefined) return;
      yield event;
    }
  }

  /** What it writes from now on, up to its end. */
  async *output(): AsyncGenerator<{ stream: "stdout" | "stderr"; data: Uint8Array }> {
    for await (const event of this.events()) {
      if (event.type === "stdout" || event.type === "stderr") yield { stream: event.type, data: event.data };
    }
  }

  /** All that it writes until `marker` was in it. */
  async readUntil(marker: string): Promise<string> {
    const decoder = new TextDecoder();
    let seen = "";
    while (!seen.includes(marker)) {
      const event = await this.next();
      if (event === undefined) {
        throw new StreamError(`the program ended with ${this.exitCode} before it wrote ${JSON.stringify(marker)}`);
      }
      if (event.type === "stdout" || event.type === "stderr") seen += decoder.decode(event.data, { stream: true });
    }
    return seen;
  }

  /** Takes the rest of its output, and returns its exit code when it has ended. */
  async wait(): Promise<number> {
    while ((await this.next()) !== undefined);
    return this.exitCode as number;
  }

  /** Gives it up; it is killed if it runs. */
  close(): void {
    this.socket.close();
  }

  private push(event: ExecEvent | Error | undefined): void {
    if (event === undefined) return;
    this.queue.push(event);
    this.wake?.();
  }

  /** The next event; none after its end. */
  private async next(): Promise<ExecEvent | undefined> {
    while (this.queue.length === 0) {
      if (this.exitCode !== undefined) return undefined;
      if (this.closed) throw new StreamError("the daemon closed the connection before the program had ended");
      await new Promise<void>((resolve) => (this.wake = resolve));
    }
    const event = this.queue.shift() as ExecEvent | Error;
    if (event instanceof Error) throw event;
    if (event.type === "exit") {
      this.exitCode = event.code;
      this.timedOut = event.timedOut;
      this.close();
    }
    return event;
  }
}

function channel(data: Buffer): ExecEvent | undefined {
  const type = STREAMS[data[0] ?? -1];
  return type === undefined ? undefined : { type, data: data.subarray(1) };
}

/** Resolves when the socket is open; a refusal carries the daemon's words. */
function opened(socket: WebSocket, url: string): Promise<void> {
  return new Promise((resolve, reject) => {
    socket.once("open", resolve);
    socket.once("error", reject);
    socket.once("unexpected-response", (_, response) => {
      const pieces: Buffer[] = [];
      response.on("data", (piece: Buffer) => pieces.push(piece));
      response.on("end", () => {
        const text = Buffer.concat(pieces).toString();
        let body: unknown = text;
        try {
          body = JSON.parse(text);
        } catch {
          // It stays text.
        }
        reject(new ControllerError(response.statusCode ?? 0, body, url));
      });
    });
  });
}
