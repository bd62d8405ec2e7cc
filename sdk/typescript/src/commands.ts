import { type Controller, programBody, sandbox } from "./controller.js";
import { StreamError } from "./errors.js";
import { Process, type StartOptions } from "./process.js";
import { type ExecEvent, execEvent, lines } from "./streams.js";
import type { ExecOptions, ExecResult } from "./types.js";

/** A shell's command line, or a program and its arguments. */
export type Command = string | readonly string[];

/** How a program is run to its end. */
export interface RunOptions extends ExecOptions {
  /** Is given pieces of standard output as they come. */
  onStdout?: (text: string) => void;
  /** Is given pieces of standard error as they come. */
  onStderr?: (text: string) => void;
}

/** How much longer than a program's own time limit its answer may take. */
const GRACE_MS = 10_000;

export function argv(command: Command): string[] {
  return typeof command === "string" ? ["/bin/sh", "-c", command] : [...command];
}

/** `sandbox.commands` */
export class Commands {
  constructor(
    private readonly controller: Controller,
    private readonly id: string,
  ) {}

  /**
   * Runs a program to its end. With `onStdout` or `onStderr`, output is passed on as it comes; the result has all of
   * it all the same. Either together with `stdin` needs the package `ws`.
   */
  async run(command: Command, options: RunOptions = {}): Promise<ExecResult> {
    const { onStdout, onStderr, stdin, ...rest } = options;
    const args = argv(command);
    if (onStdout === undefined && onStderr === undefined) return this.controller.execCommand(this.id, args, options);
    const output = new Output(onStdout, onStderr);
    const events = stdin === undefined ? this.stream(args, rest) : this.converse(args, stdin, rest);
    for await (const event of events) output.take(event);
    return output.result();
  }

  /** Starts a program and returns at once, to talk to it. Needs the package `ws`. */
  start(command: Command, options: StartOptions = {}): Promise<Process> {
    return Process.start(this.controller, this.id, argv(command), options);
  }

  private async *stream(args: string[], options: ExecOptions): AsyncGenerator<ExecEvent> {
    const { stdin: _, ...json } = programBody(args, options);
    const limit = AbortSignal.timeout(json.timeout_secs * 1000 + GRACE_MS);
    const path = sandbox(this.id, "/exec/stream");
    const [response] = await this.controller.transport.open({ method: "POST", path, json, signal: limit }, true);
    for await (const line of lines(response)) {
      const event = execEvent(JSON.parse(line) as Record<string, unknown>);
      if (event !== undefined) yield event;
    }
  }

  private async *converse(args: string[], stdin: string, options: ExecOptions): AsyncGenerator<ExecEvent> {
    const process = await this.start(args, options);
    try {
      process.write(stdin);
      process.closeStdin();
      yield* process.events();
    } finally {
      process.close();
    }
  }
}

/** Collects output, and passes it on as it comes. Characters that pieces cut in two are kept whole. */
class Output {
  private readonly text = { stdout: "", stderr: "" };
  private readonly decoders = { stdout: new TextDecoder(), stderr: new TextDecoder() };
  private readonly receivers: Record<"stdout" | "stderr", ((text: string) => void) | undefined>;
  private end: { code: number; timedOut: boolean } | undefined;

  constructor(stdout?: (text: string) => void, stderr?: (text: string) => void) {
    this.receivers = { stdout, stderr };
  }

  take(event: ExecEvent): void {
    if (event.type === "stdout" || event.type === "stderr") {
      this.piece(event.type, this.decoders[event.type].decode(event.data, { stream: true }));
    } else if (event.type === "exit") {
      this.end = event;
      this.piece("stdout", this.decoders.stdout.decode());
      this.piece("stderr", this.decoders.stderr.decode());
    }
  }

  result(): ExecResult {
    if (this.end === undefined) {
      throw new StreamError("the daemon closed the connection before the program had ended");
    }
    return { ...this.text, exit_code: this.end.code, ...(this.end.timedOut ? { timed_out: true } : {}) };
  }

  private piece(stream: "stdout" | "stderr", text: string): void {
    if (text === "") return;
    this.text[stream] += text;
    this.receivers[stream]?.(text);
  }
}
