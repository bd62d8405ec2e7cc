/** Files and folders of this host as tar streams, by the program `tar`. */

import { spawn } from "node:child_process";
import { basename, dirname, resolve } from "node:path";
import { Readable } from "node:stream";

/** A file or folder as a tar stream whose entries start with its name; `ended` throws what went wrong. */
export function packed(source: string): { stream: ReadableStream<Uint8Array>; ended: Promise<void> } {
  const path = resolve(source);
  const tar = spawn("tar", ["-cf", "-", "-C", dirname(path), "--", basename(path)], {
    stdio: ["ignore", "pipe", "pipe"],
  });
  let said = "";
  tar.stderr.on("data", (piece: Buffer) => (said += piece.toString()));
  const ended = new Promise<void>((done, failed) => {
    const fail = (why: string, cause?: Error) => failed(new Error(`cannot pack ${path}: ${why}`, { cause }));
    tar.on("error", (cause) => fail("the program tar cannot be run", cause));
    tar.on("close", (code) => (code === 0 ? done() : fail(said.trim() || `tar ended with ${code}`)));
  });
  return { stream: Readable.toWeb(tar.stdout) as unknown as ReadableStream<Uint8Array>, ended };
}
