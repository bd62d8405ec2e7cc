/**
 * Unpacks a tar stream that is not to be trusted: a guest's. Regular files, directories and symbolic links are made, all
 * of them below one folder; anything else ends it with an error.
 *
 * No entry is written through a symbolic link, so that each link lies in the directory its name says. Its target may lead
 * up only at its beginning, and not out of the folder; hence no chain of links does.
 */

import type { FileHandle } from "node:fs/promises";
import { chmod, lstat, mkdir, open, rm, symlink, utimes } from "node:fs/promises";
import { join } from "node:path";

const BLOCK = 512;

/** What an extended header, of names that are too long for a header, may have at most. */
const LONGEST_EXTENSION = 1 << 20;

/** A tar stream that cannot be unpacked, or had better not be. */
export class ArchiveError extends Error {
  constructor(message: string) {
    super(message);
    this.name = "ArchiveError";
  }
}

interface Header {
  name: string;
  type: string;
  size: number;
  mode: number;
  modified: number;
  target: string;
}

/** Unpacks `stream` into the folder `root`, which is made if need be. */
export async function untar(stream: AsyncIterable<Uint8Array>, root: string): Promise<void> {
  const pieces = new Pieces(stream);
  const directories: [string, Header][] = [];
  await mkdir(root, { recursive: true });
  let extension: Partial<Header> = {};
  for (;;) {
    const block = await pieces.exactly(BLOCK, "a header");
    if (block.every((byte) => byte === 0)) break;
    const header = { ...parseHeader(block), ...extension };
    if ("LKxg".includes(header.type)) {
      if (header.size > LONGEST_EXTENSION) throw new ArchiveError(`an extended header of ${header.size} bytes; at most ${LONGEST_EXTENSION} are read`);
      const content = await pieces.exactly(header.size, "an extended header");
      await pieces.skip(padding(header.size));
      extension = { ...extension, ...parseExtension(header.type, content) };
      continue;
    }
    extension = {};
    const names = inside(header.name);
    const path = join(root, ...names);
    await realParents(root, names.slice(0, -1));
    if (header.type === "5") {
      if (names.length > 0 && !(await isDirectory(path))) await mkdir(path);
      directories.push([path, header]);
    } else if (header.type === "2") {
      checkTarget(header, names.length - 1);
      await rm(path, { force: true });
      await symlink(header.target, path);
    } else if (header.type === "0" || header.type === "\0" || header.type === "7") {
      if (names.length === 0) throw new ArchiveError("a file without a name");
      await rm(path, { force: true });
      await writeFile(path, header, pieces);
      await pieces.skip(padding(header.size));
    } else {
      throw new ArchiveError(`${header.name} is neither a file nor a directory nor a symbolic link (tar type ${header.type})`);
    }
  }
  // In the end and from below, so that a directory nobody may write to can be filled, and its time stays.
  for (const [path, header] of directories.reverse()) {
    await chmod(path, (header.mode & 0o755) | 0o700);
    await utimes(path, header.modified, header.modified);
  }
  await pieces.rest();
}

async function writeFile(path: string, header: Header, pieces: Pieces): Promise<void> {
  const file: FileHandle = await open(path, "wx", 0o600);
  try {
    for (let left = header.size; left > 0; ) {
      const piece = await pieces.some(left);
      if (piece === undefined) throw new ArchiveError(`the stream ended ${left} bytes before the end of ${header.name}`);
      await file.write(piece);
      left -= piece.length;
    }
    // Nobody else may change it, whatever the guest's mode; setuid and the like are the guest's own business.
    await file.chmod((header.mode & 0o755) | 0o600);
    await file.utimes(header.modified, header.modified);
  } finally {
    await file.close();
  }
}

/** The segments of an entry's name, which must not lead out of the folder. */
function inside(name: string): string[] {
  const names = name.split("/").filter((segment) => segment !== "" && segment !== ".");
  if (name.startsWith("/") || names.includes("..") || name.includes("\0")) {
    throw new ArchiveError(`the entry ${JSON.stringify(name)} leads out of the folder it is unpacked into`);
  }
  return names;
}

function checkTarget({ name, target }: Header, depth: number): void {
  const steps = target.split("/").filter((segment) => segment !== "" && segment !== ".");
  const down = steps.findIndex((step) => step !== "..");
  const up = down === -1 ? steps.length : down;
  if (target === "" || target.startsWith("/") || up > depth || steps.slice(up).includes("..")) {
    throw new ArchiveError(`the link ${name} to ${target} may lead out of the folder it is unpacked into`);
  }
}

/** Makes what is missing above an entry. What is there must be directories and not links to them. */
async function realParents(root: string, names: string[]): Promise<void> {
  let path = root;
  for (const name of names) {
    path = join(path, name);
    if (!(await isDirectory(path))) await mkdir(path);
  }
}

/** Whether there is a directory; throws when there is something else. */
async function isDirectory(path: string): Promise<boolean> {
  const found = await lstat(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") return undefined;
    throw error;
  });
  if (found !== undefined && !found.isDirectory()) throw new ArchiveError(`${path} is no directory, and entries lie below it`);
  return found !== undefined;
}

function parseHeader(block: Uint8Array): Header {
  const checksum = block.reduce((sum, byte, at) => sum + (at >= 148 && at < 156 ? 0x20 : byte), 0);
  if (octal(block.subarray(148, 156)) !== checksum) throw new ArchiveError("this is no tar stream: a header's checksum is wrong");
  const prefix = text(block.subarray(257, 263)) === "ustar" ? text(block.subarray(345, 500)) : "";
  const name = text(block.subarray(0, 100));
  return {
    name: prefix === "" ? name : `${prefix}/${name}`,
    mode: octal(block.subarray(100, 108)),
    size: number(block.subarray(124, 136)),
    modified: number(block.subarray(136, 148)),
    type: String.fromCharCode(block[156] ?? 0),
    target: text(block.subarray(157, 257)),
  };
}

/** What an extended header says of the next entry: GNU's long names, or POSIX's records. */
function parseExtension(type: string, content: Uint8Array): Partial<Header> {
  if (type === "L") return { name: text(content) };
  if (type === "K") return { target: text(content) };
  if (type === "g") return {};
  const found: Partial<Header> = {};
  for (let at = 0; at < content.length; ) {
    const space = content.indexOf(0x20, at);
    const length = Number(text(content.subarray(at, Math.max(space, at))));
    if (space < 0 || !Number.isInteger(length) || length <= space + 1 - at || at + length > content.length) {
      throw new ArchiveError("an extended header is damaged");
    }
    const record = Buffer.from(content.subarray(space + 1, at + length - 1)).toString();
    const equals = record.indexOf("=");
    const value = record.slice(equals + 1);
    if (record.startsWith("path=")) found.name = value;
    if (record.startsWith("linkpath=")) found.target = value;
    if (record.startsWith("size=")) found.size = whole(Number(value));
    at += length;
  }
  return found;
}

/** Text up to the first NUL. */
function text(field: Uint8Array): string {
  const end = field.indexOf(0);
  return Buffer.from(end < 0 ? field : field.subarray(0, end)).toString();
}

function octal(field: Uint8Array): number {
  const digits = text(field).trim();
  if (!/^[0-7]*$/.test(digits)) throw new ArchiveError(`a header has ${JSON.stringify(digits)} where an octal number is due`);
  return digits === "" ? 0 : parseInt(digits, 8);
}

/** An octal number, or in GNU's form a binary one for what octal has no room for. */
function number(field: Uint8Array): number {
  if (((field[0] ?? 0) & 0x80) === 0) return octal(field);
  return whole(field.subarray(1).reduce((value, byte) => value * 256 + byte, (field[0] ?? 0) & 0x7f));
}

function whole(value: number): number {
  if (!Number.isSafeInteger(value) || value < 0) throw new ArchiveError(`a header has the size or time ${value}`);
  return value;
}

function padding(size: number): number {
  return (BLOCK - (size % BLOCK)) % BLOCK;
}

/** A stream of bytes, of which as many are taken as are wanted. */
class Pieces {
  private readonly source: AsyncIterator<Uint8Array>;
  private piece: Uint8Array = new Uint8Array(0);

  constructor(source: AsyncIterable<Uint8Array>) {
    this.source = source[Symbol.asyncIterator]();
  }

  /** Some bytes, at most `limit`; nothing when there are no more. */
  async some(limit: number): Promise<Uint8Array | undefined> {
    while (this.piece.length === 0) {
      const next = await this.source.next();
      if (next.done === true) return undefined;
      this.piece = next.value;
    }
    const taken = this.piece.subarray(0, limit);
    this.piece = this.piece.subarray(taken.length);
    return taken;
  }

  async exactly(size: number, what: string): Promise<Uint8Array> {
    const whole = new Uint8Array(size);
    for (let filled = 0; filled < size; ) {
      const piece = await this.some(size - filled);
      if (piece === undefined) throw new ArchiveError(`the tar stream ended in ${what}`);
      whole.set(piece, filled);
      filled += piece.length;
    }
    return whole;
  }

  async skip(size: number): Promise<void> {
    await this.exactly(size, "an entry");
  }

  /** What follows the end mark says nothing. */
  async rest(): Promise<void> {
    while ((await this.some(Infinity)) !== undefined);
  }
}
