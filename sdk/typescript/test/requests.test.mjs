// What is sent for each call, and what becomes of each answer. Needs no daemon.

import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { Controller, ControllerError, DaemonUnreachableError, EvalError, Forkd, Sandbox } from "@forkd/sdk";

import { recorder } from "./recorder.mjs";

const INFO = {
  id: "sb-1-0000",
  snapshot_tag: "py",
  netns: null,
  guest_addr: "10.42.0.2:8888",
  created_at_unix: 1,
  pid: 2,
  memory_limit_mib: null,
  has_branched: false,
  last_branch_memory_path: null,
  branch_count: 0,
};

let server;
let controller;
before(async () => {
  server = await recorder();
  controller = new Controller({ baseUrl: `${server.url}/`, token: " secret token " });
});
after(() => server.close());

function answers(status, value) {
  server.status = status;
  server.content = typeof value === "string" ? value : JSON.stringify(value);
}

function sent(method, path, body = "") {
  const last = server.last();
  assert.deepEqual([last.method, last.path, last.body], [method, path, body]);
  assert.equal(last.token, "Bearer secret token");
  assert.equal(last.type, body === "" ? undefined : "application/json");
}

test("the ten calls send what daemons have always got", async () => {
  answers(200, []);
  await controller.listSnapshots();
  sent("GET", "/v1/snapshots");
  await controller.spawnSandboxes({ snapshotTag: "py" });
  sent("POST", "/v1/sandboxes", { snapshot_tag: "py", n: 1, per_child_netns: false });
  await controller.spawnSandboxes({
    snapshotTag: "py",
    n: 2,
    perChildNetns: true,
    memoryLimitMib: 256,
    prewarm: false,
    liveFork: true,
    hugepages: true,
  });
  sent("POST", "/v1/sandboxes", {
    snapshot_tag: "py",
    n: 2,
    per_child_netns: true,
    memory_limit_mib: 256,
    prewarm: false,
    live_fork: true,
    hugepages: true,
  });
  await controller.listSandboxes();
  sent("GET", "/v1/sandboxes");
  await controller.getSandbox("a/../b");
  sent("GET", "/v1/sandboxes/a%2F..%2Fb");
  await controller.branchSandbox("sb-1");
  sent("POST", "/v1/sandboxes/sb-1/branch", {});
  await controller.branchSandbox("sb-1", { tag: "t", diff: true, measure_diff: true });
  sent("POST", "/v1/sandboxes/sb-1/branch", { tag: "t", diff: true, measure_diff: true });
  await controller.branchSandbox("sb-1", { mode: "live", diff: true, wait: false });
  sent("POST", "/v1/sandboxes/sb-1/branch", { mode: "live", wait: false });
  await controller.execCommand("sb-1", ["true"]);
  sent("POST", "/v1/sandboxes/sb-1/exec", { args: ["true"], timeout_secs: 30 });
  await controller.evalCode("sb-1", "1");
  sent("POST", "/v1/sandboxes/sb-1/eval", { code: "1" });
  await controller.pingSandbox("sb-1");
  sent("POST", "/v1/sandboxes/sb-1/ping");
  answers(200, "");
  assert.equal(await controller.killSandbox("sb-1"), undefined);
  sent("DELETE", "/v1/sandboxes/sb-1");
  await controller.deleteSnapshot("py", { cascade: true, force: false });
  sent("DELETE", "/v1/snapshots/py?cascade=true");
});

test("lifetimes, workspaces and the whole send what the API has", async () => {
  answers(200, []);
  const options = { timeoutSecs: 0.5, onTimeout: "suspend", autoCheckpoint: "exec" };
  await controller.spawnSandboxes({ snapshotTag: "py", ...options });
  const lifetime = { timeout_secs: 1, on_timeout: "suspend", auto_checkpoint: "exec" };
  sent("POST", "/v1/sandboxes", { snapshot_tag: "py", n: 1, per_child_netns: false, ...lifetime });
  await controller.forkSandbox("sb-1", { n: 2, timeoutSecs: 60 });
  sent("POST", "/v1/sandboxes/sb-1/fork", { n: 2, timeout_secs: 60 });
  await controller.setTimeout("sb-1", 7, "kill");
  sent("POST", "/v1/sandboxes/sb-1/timeout", { timeout_secs: 7, on_timeout: "kill" });
  await controller.setTimeout("sb-1", null);
  sent("POST", "/v1/sandboxes/sb-1/timeout", { timeout_secs: null });
  await controller.suspendSandbox("sb-1");
  sent("POST", "/v1/sandboxes/sb-1/suspend");
  await controller.createSnapshot({ tag: "t", kernel: "/k", rootfs: "/r", bootWaitSecs: 20 });
  sent("POST", "/v1/snapshots", { tag: "t", kernel: "/k", rootfs: "/r", boot_wait_secs: 20 });
  await controller.createWorkspace({ name: "w", snapshotTag: "py", idleSuspendSecs: 0 });
  sent("POST", "/v1/workspaces", { name: "w", snapshot_tag: "py", idle_suspend_secs: 0 });
  await controller.listWorkspaces();
  sent("GET", "/v1/workspaces");
  await controller.getWorkspace("w/x");
  sent("GET", "/v1/workspaces/w%2Fx");
  await controller.suspendWorkspace("w");
  sent("POST", "/v1/workspaces/w/suspend", {});
  await controller.resumeWorkspace("w");
  sent("POST", "/v1/workspaces/w/resume");
  await controller.deleteWorkspace("w");
  sent("DELETE", "/v1/workspaces/w");
  await controller.usage();
  sent("GET", "/v1/usage");
  await controller.tree();
  sent("GET", "/v1/tree");
});

test("a refusal carries what was said", async () => {
  answers(404, { error: "sandbox sb-1 not found", code: "sandbox_not_found" });
  await assert.rejects(controller.getSandbox("sb-1"), (error) => {
    assert.ok(error instanceof ControllerError);
    assert.deepEqual([error.status, error.code], [404, "sandbox_not_found"]);
    assert.match(error.message, /HTTP 404: sandbox sb-1 not found/);
    return true;
  });
  answers(502, "Bad Gateway");
  await assert.rejects(controller.listSandboxes(), /HTTP 502: Bad Gateway/);
  const gone = await recorder();
  await gone.close();
  await assert.rejects(new Controller({ baseUrl: gone.url }).listSandboxes(), DaemonUnreachableError);
});

test("an answer that does not come is given up", async () => {
  const stuck = () => new Promise((_, reject) => setTimeout(() => reject(new Error("never")), 10_000).unref());
  const impatient = new Controller({
    baseUrl: server.url,
    timeoutMs: 20,
    fetch: (_, { signal }) => Promise.race([stuck(), new Promise((_, no) => signal.addEventListener("abort", () => no(signal.reason)))]),
  });
  // The timer of a signal does not keep the process alive; this one does.
  const alive = setInterval(() => undefined, 1000);
  await assert.rejects(impatient.listSandboxes(), { name: "TimeoutError" });
  clearInterval(alive);
});

test("the environment says where the daemon is", () => {
  const { FORKD_URL, FORKD_TOKEN } = process.env;
  Object.assign(process.env, { FORKD_URL: "http://h:2/", FORKD_TOKEN: "" });
  const found = new Controller();
  assert.deepEqual([found.baseUrl, found.transport.token], ["http://h:2", undefined]);
  for (const [name, value] of Object.entries({ FORKD_URL, FORKD_TOKEN })) {
    if (value === undefined) delete process.env[name];
    else process.env[name] = value;
  }
  assert.throws(() => new Controller({ baseUrl: "h:1" }), /not a daemon's address/);
});

test("a unix socket is an address", async () => {
  const directory = mkdtempSync(join(tmpdir(), "forkd-sdk-"));
  const local = await recorder(join(directory, "s"));
  assert.deepEqual(await new Controller({ baseUrl: local.url }).listSandboxes(), []);
  local.status = 204;
  await new Controller({ baseUrl: local.url }).killSandbox("sb-1");
  assert.equal(local.last().path, "/v1/sandboxes/sb-1");
  await local.close();
  rmSync(directory, { recursive: true });
  await assert.rejects(new Controller({ baseUrl: local.url }).listSandboxes(), DaemonUnreachableError);
});

test("a sandbox is made, asked and ended", async () => {
  answers(201, [INFO]);
  const client = new Forkd({ baseUrl: server.url, token: "secret token" });
  const sandbox = await client.sandboxes.create({ tag: "py", hugepages: true });
  sent("POST", "/v1/sandboxes", { snapshot_tag: "py", n: 1, per_child_netns: false, hugepages: true });
  assert.equal(sandbox.id, "sb-1-0000");
  answers(200, { result: "0.0", error: null, exit_code: 0 });
  assert.equal(await sandbox.eval("numpy.zeros(5).sum()"), "0.0");
  answers(200, { result: "[1]", error: null, exit_code: 0 });
  assert.deepEqual(await sandbox.eval("[1]", { language: "node" }), [1]);
  answers(200, { result: null, error: "ZeroDivisionError", exit_code: 1 });
  await assert.rejects(sandbox.eval("1 / 0"), EvalError);
  answers(404, { error: "gone" });
  await sandbox.kill();
  assert.equal(sandbox.portUrl(80, "/x"), `${server.url}/v1/sandboxes/sb-1-0000/ports/80/x`);
});

test("streamed output is put together across cut characters", async () => {
  const sandbox = new Sandbox(controller, INFO);
  const lines = [
    { type: "started", pid: 7 },
    { type: "stdout", data: "YcM=" },
    { type: "stderr", data: "ZQ==" },
    { type: "stdout", data: "qWI=" },
    { type: "exit", code: 3, timed_out: false },
  ].map((line) => JSON.stringify(line));
  answers(200, lines.join("\n"));
  const pieces = [];
  const result = await sandbox.commands.run("x", { onStdout: (text) => pieces.push(text) });
  assert.deepEqual(result, { stdout: "aéb", stderr: "e", exit_code: 3 });
  assert.deepEqual(pieces, ["a", "éb"]);
  answers(200, lines[0]);
  await assert.rejects(sandbox.commands.run("x", { onStdout: () => undefined }), /before the program had ended/);
  answers(200, { type: "error", error: "no such program: x", code: "not_found" });
  await assert.rejects(sandbox.commands.run("x", { onStdout: () => undefined }), /no such program/);
});
