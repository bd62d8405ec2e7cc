/** What streams carry: programs' output, and changes of files. */

import { StreamError } from "./errors.js";

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

/** The lines of an answer as they come, empty ones left out. */
export async function* lines(response: Response): AsyncGenerator<string> {
  if (response.body === null) return;
  const reader = response.body.getReader() as ReadableStreamDefaultReader<Uint8Array>;
  const decoder = new TextDecoder();
  let pending = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      pending += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const complete = pending.split("\n");
      pending = done ? "" : (complete.pop() ?? "");
      for (const line of complete) if (line.trim() !== "") yield line;
      if (done) return;
    }
  } finally {
    // Given up early, the answer is not wanted any more.
    await reader.cancel().catch(() => undefined);
  }
}
