// Folders as tar streams, on this host. Needs no daemon.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readdirSync,
  readlinkSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { ArchiveError, Controller, Sandbox } from "@forkd/sdk";

import { recorder } from "./recorder.mjs";

let server;
let sandbox;
let scratch;
before(async () => {
  server = await recorder();
  sandbox = new Sandbox(new Controller({ baseUrl: server.url }), { id: "sb-1-0000" });
  scratch = mkdtempSync(join(tmpdir(), "forkd-sdk-"));
});
after(async () => {
  await server.close();
  rmSync(scratch, { recursive: true });
});

/** One entry of a tar stream, made by hand. */
function entry(name, { type = "0", content = "", target = "", mode = "0000644" } = {}) {
  const block = Buffer.alloc(512);
  block.write(name, 0);
  block.write(mode, 100);
  block.write(content.length.toString(8).padStart(11, "0"), 124);
  block.write("00000000001", 136);
  block.write("        ", 148);
  block.write(type, 156);
  block.write(target, 157);
  block.write("ustar\x0000", 257);
  const sum = block.reduce((total, byte) => total + byte, 0);
  block.write(`${sum.toString(8).padStart(6, "0")}\0 `, 148);
  return Buffer.concat([block, Buffer.from(content), Buffer.alloc((512 - (content.length % 512)) % 512)]);
}

function gives(...entries) {
  server.status = 200;
  server.content = Buffer.concat([...entries, Buffer.alloc(1024)]);
}

test("a folder comes back as it went", async () => {
  const project = join(scratch, "project");
  const long = `${"deep/".repeat(30)}${"x".repeat(120)}-é`;
  mkdirSync(join(project, "deep/".repeat(30)), { recursive: true });
  writeFileSync(join(project, long), Buffer.alloc(1500, 7));
  writeFileSync(join(project, "program"), "#!/bin/sh");
  chmodSync(join(project, "program"), 0o4777);
  writeFileSync(join(project, "empty"), "");
  symlinkSync("program", join(project, "link"));
  mkdirSync(join(project, "locked"));
  writeFileSync(join(project, "locked/inside"), "1");
  chmodSync(join(project, "locked"), 0o500);
  server.status = 204;
  await sandbox.files.upload(project, "/srv");
  assert.deepEqual(server.requests.slice(-2).map(({ method, path }) => `${method} ${path}`), [
    "POST /v1/sandboxes/sb-1-0000/files/mkdir",
    "PUT /v1/sandboxes/sb-1-0000/files/archive?path=%2Fsrv",
  ]);
  // In each of the forms that long names have.
  const forms = [server.last().bytes];
  for (const format of ["gnu", "posix"]) {
    const made = spawnSync("tar", [`--format=${format}`, "-cf", "-", "-C", scratch, "project"], { maxBuffer: 1 << 24 });
    if (made.status === 0) forms.push(made.stdout);
  }
  for (const [index, form] of forms.entries()) {
    [server.status, server.content] = [200, form];
    const back = join(scratch, `back-${index}`, "new");
    // Twice: what is there is replaced.
    await sandbox.files.download("/srv/project", back);
    await sandbox.files.download("/srv/project", back);
    assert.deepEqual(readFileSync(join(back, "project", long)), Buffer.alloc(1500, 7));
    assert.equal(statSync(join(back, "project/program")).mode & 0o7777, 0o755);
    assert.equal(readlinkSync(join(back, "project/link")), "program");
    assert.deepEqual(readdirSync(join(back, "project/locked")), ["inside"]);
    assert.equal(statSync(join(back, "project/empty")).size, 0);
  }
  chmodSync(join(project, "locked"), 0o700);
  server.content = "";
  await assert.rejects(sandbox.files.upload(join(scratch, "none"), "/srv"), /cannot pack .*none/s);
});

test("what comes back stays in its folder", async () => {
  const link = (name, target) => entry(name, { type: "2", target });
  const file = (name) => entry(name, { content: "x" });
  const attacks = [
    [file("../outside")],
    [file("/tmp/forkd-outside")],
    [file("a/../../outside")],
    [link("up", ".."), file("up/outside")],
    [link("root", "/etc"), file("root/passwd")],
    // Each harmless by its words, and outside together.
    [link("here", "."), link("a/b", "../here/../..")],
    [entry("a", { type: "5" }), link("a/same", "."), link("a/out", "same/../../outside")],
    [link("in", "a"), file("in/file")],
    [entry("hard", { type: "1", target: "/etc/passwd" })],
    [entry("device", { type: "3" })],
    [entry("pipe", { type: "6" })],
  ];
  for (const [index, attack] of attacks.entries()) {
    gives(...attack);
    const target = join(scratch, "attacked", String(index), "target");
    await assert.rejects(sandbox.files.download("/x", target), ArchiveError, `attack ${index}`);
    assert.deepEqual(readdirSync(join(target, "..")), ["target"], `attack ${index}`);
  }
  assert.equal(existsSync("/tmp/forkd-outside"), false);
});

test("a damaged stream says so", async () => {
  const whole = Buffer.concat([entry("a", { content: "content" }), Buffer.alloc(1024)]);
  const target = join(scratch, "damaged");
  for (let length = 0; length < whole.length - 512; length += 100) {
    [server.status, server.content] = [200, whole.subarray(0, length)];
    await assert.rejects(sandbox.files.download("/a", target), ArchiveError, `${length} bytes`);
  }
  for (let index = 0; index < 512; index += 7) {
    const flipped = Buffer.from(whole);
    flipped[index] ^= 0x55;
    [server.status, server.content] = [200, flipped];
    await assert.rejects(sandbox.files.download("/a", target), ArchiveError, `byte ${index}`);
  }
});
