// What is sent again when a connection breaks, and how streams go on. Needs no daemon.

import assert from "node:assert/strict";
import { after, before, beforeEach, test } from "node:test";

import { Controller, ControllerError, DaemonUnreachableError } from "@forkd/sdk";

import { recorder } from "./recorder.mjs";

let server;
let controller;
before(async () => {
  server = await recorder();
  controller = new Controller({ baseUrl: server.url });
});
after(() => server.close());
beforeEach(() => {
  Object.assign(server, { status: 200, content: "{}", first: [] });
  server.requests.length = 0;
});

const keys = () => server.requests.map((request) => request.key);
const slowDown = { status: 429, content: "{}", headers: { "Retry-After": "0" } };

test("what makes something is sent again with its key", async () => {
  server.first = [null, slowDown];
  await controller.spawnSandboxes({ snapshotTag: "py" });
  assert.equal(keys().length, 3);
  assert.equal(new Set(keys()).size, 1);
  assert.match(keys()[0], /^[0-9a-f-]{36}$/);
});

test("a key that is given is the one that is sent", async () => {
  const idempotencyKey = "mine";
  const once = new Controller({ baseUrl: server.url, retries: 0 });
  await once.spawnSandboxes({ snapshotTag: "py", idempotencyKey });
  await once.forkSandbox("sb-1", { idempotencyKey });
  await once.branchSandbox("sb-1", { idempotencyKey });
  await once.checkpointSandbox("sb-1", { idempotencyKey });
  await once.suspendSandbox("sb-1", { idempotencyKey });
  await once.createSnapshot({ tag: "t", kernel: "k", rootfs: "r", idempotencyKey });
  await once.compactSnapshot("t", "u", { idempotencyKey });
  await once.createWorkspace({ name: "w", snapshotTag: "py", idempotencyKey });
  await once.suspendWorkspace("w", { idempotencyKey });
  await once.resumeWorkspace("w", { idempotencyKey });
  assert.deepEqual(keys(), Array(10).fill("mine"));
  await once.spawnSandboxes({ snapshotTag: "py" });
  assert.equal(keys().at(-1), undefined);
});

test("what does more when it is sent twice is not", async () => {
  const calls = [() => controller.execCommand("sb-1", ["true"]), () => controller.rewindSandbox("sb-1")];
  for (const call of calls) {
    server.first = [null];
    server.requests.length = 0;
    await assert.rejects(call());
    assert.deepEqual(keys(), [undefined]);
  }
});

test("a refusal for good is the answer", async () => {
  const headers = { "Retry-After": "3600" };
  for (const answer of [{ status: 409 }, { status: 503 }, { status: 503, headers }]) {
    server.first = [{ content: "{}", ...answer }];
    server.requests.length = 0;
    await assert.rejects(controller.listSandboxes(), ControllerError);
    assert.equal(server.requests.length, 1);
  }
  const begun = performance.now();
  await assert.rejects(new Controller({ baseUrl: "http://127.0.0.1:1" }).usage(), (error) => {
    // Some versions of fetch refuse that port themselves.
    return error instanceof DaemonUnreachableError || /fetch failed|bad port/.test(error.message);
  });
  assert.ok(performance.now() - begun < 150);
});

function eventLines(...ids) {
  const events = ids.map((id) => {
    const data = JSON.stringify({ id, at_unix: 1, event: "sandbox.created", sandbox: "sb-1-0000" });
    return `id: ${id}\nevent: sandbox.created\ndata: ${data}\n\n`;
  });
  return `: hello\nid: ${ids[0] - 1}\nretry: 10\n\n: still here\n\n${events.join("")}`;
}

test("a stream goes on after the last event", async () => {
  const refused = { status: 503, content: "{}" };
  server.first = [{ status: 200, content: eventLines(7, 8) }, refused, null, { status: 200, content: eventLines(9) }];
  [server.status, server.content] = [401, '{"error":"who are you"}'];
  const events = await controller.events({ sandboxId: "sb-1" });
  assert.equal(events.lastId, 6);
  const seen = [];
  for (let count = 0; count < 3; count++) seen.push((await events.next()).value.id);
  assert.deepEqual(seen, [7, 8, 9]);
  await assert.rejects(events.next(), /who are you/);
  assert.deepEqual(await events.next(), { done: true, value: undefined });
  const resumed = server.requests.map((request) => request.lastEvent);
  assert.deepEqual(resumed, [undefined, "8", "8", "8", "9"]);
  assert.equal(server.last().path, "/v1/events?sandbox=sb-1");
});

test("a daemon that stays away ends a stream, and its listener can", async () => {
  server.first = [{ status: 200, content: eventLines(7) }];
  server.status = 503;
  const events = await controller.events({ patienceMs: 50 });
  await assert.rejects(async () => {
    for await (const _ of events);
  }, ControllerError);
  server.first = [{ status: 200, content: eventLines(7, 8) }];
  for await (const event of await controller.events({ after: 5 })) {
    assert.equal(event.id, 7);
    break;
  }
  assert.equal(server.last().lastEvent, "5");
});
