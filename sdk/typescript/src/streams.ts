/** What streams carry: programs' output, and changes of files. */

import { StreamError } from "./errors.js";
import type { DaemonEvent } from "./types.js";

/** One event of a program. */
export type ExecEvent =
  | { type: "started"; pid: number }
  | { type: "stdout" | "stderr"; data: Uint8Array }
  | { type: "exit"; code: number; timedOut: boolean };

type Json = Record<string, unknown>;

/** A program's event from its JSON; one that tells of a failure throws, one that is not known is none. */
export function execEvent(event: Json): ExecEvent | undefined {
  switch (event["type"]) {
    case "stdout":
    case "stderr":
      return { type: event["type"], data: Buffer.from(String(event["data"]), "base64") };
    case "started":
      return { type: "started", pid: Number(event["pid"]) };
    case "exit":
      return { type: "exit", code: Number(event["code"]), timedOut: event["timed_out"] === true };
    case "error":
      throw new StreamError(String(event["error"]), event["code"] as string | undefined);
    default:
      return undefined;
  }
}

/** What happened to a file. */
export interface FileChange {
  type: "created" | "modified" | "written" | "attributes" | "removed" | "moved" | "missed" | "other";
  path: string;
  /** Where one that was moved had been before. */
  from?: string;
  directory: boolean;
}

/** The change that a line of a stream of server-sent events tells of, if it is one that does. */
export function fileChange(line: string): FileChange | undefined {
  if (!line.startsWith("data:")) return undefined;
  const data = JSON.parse(line.slice("data:".length)) as Json;
  if (!("type" in data)) throw new StreamError(String(data["error"]), data["code"] as string | undefined);
  return data as unknown as FileChange;
}

/** What one line of the daemon's events says. Each event is one line of data. */
export interface ServerLine {
  /** The id to come again with. */
  lastId?: number;
  /** When to come again. */
  retryMs?: number;
  event?: DaemonEvent;
}

/** Reads a line of the daemon's events; what is not known says nothing. */
export function serverLine(line: string): ServerLine {
  const [, field, value] = /^(\w*):? ?(.*?)\r?$/.exec(line) ?? [];
  if (field === "data") return { event: JSON.parse(value ?? "") as DaemonEvent };
  if (!/^\d+$/.test(value ?? "")) return {};
  if (field === "id") return { lastId: Number(value) };
  return field === "retry" ? { retryMs: Number(value) } : {};
}

/** The lines of an answer as they come, empty ones left out. */
export async function* lines(response: Response): AsyncGenerator<string> {
  if (response.body === null) return;
  const decoder = new TextDecoder();
  let pending = "";
  for await (const piece of chunks(response.body as ReadableStream<Uint8Array>)) {
    const complete = (pending + decoder.decode(piece, { stream: true })).split("\n");
    pending = complete.pop() ?? "";
    for (const line of complete) if (line.trim() !== "") yield line;
  }
  const last = pending + decoder.decode();
  if (last.trim() !== "") yield last;
}

/** The pieces of a body as they come. Node 18 has no `for await` for the streams that browsers have. */
export async function* chunks(body: ReadableStream<Uint8Array>): AsyncGenerator<Uint8Array> {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    // Given up early, the answer is not wanted any more.
    await reader.cancel().catch(() => undefined);
  }
}
