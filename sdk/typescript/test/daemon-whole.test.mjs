// What concerns more than one sandbox, against a daemon at FORKD_URL with the snapshot "quickstart".

import assert from "node:assert/strict";
import { randomBytes, randomUUID } from "node:crypto";
import { mkdirSync, mkdtempSync, readFileSync, readlinkSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";

import { ArchiveError, ControllerError, Forkd, Sandbox } from "@forkd/sdk";

const TAG = process.env.FORKD_TEST_TAG ?? "quickstart";

describe("the whole", { skip: process.env.FORKD_URL ? false : "FORKD_URL names no daemon" }, () => {
  const client = process.env.FORKD_URL ? new Forkd() : undefined;

  test("a key makes one sandbox whose life is told", async () => {
    const { controller } = client;
    const idempotencyKey = randomUUID();
    const events = await controller.events();
    const start = events.lastId;
    const [first] = await controller.spawnSandboxes({ snapshotTag: TAG, idempotencyKey });
    const [again] = await controller.spawnSandboxes({ snapshotTag: TAG, idempotencyKey });
    assert.equal(first.id, again.id);
    await assert.rejects(
      controller.spawnSandboxes({ snapshotTag: TAG, n: 2, idempotencyKey }),
      (error) => error instanceof ControllerError && error.code === "idempotency_key_reused",
    );

    const sandbox = await client.sandboxes.get(first.id);
    await sandbox.setTimeout(3600, "suspend");
    assert.ok(sandbox.info.expires_at_unix > Date.now() / 1000 + 3000);
    await sandbox.setTimeout(null);
    assert.equal(sandbox.info.expires_at_unix, undefined);
    const used = (await controller.usage()).find((usage) => usage.id === first.id);
    assert.ok(used.private_bytes > 0);
    const source = (await controller.tree()).roots.find((root) => root.name === TAG);
    assert.ok(source.children.some((child) => child.name === first.id));
    await sandbox.setTimeout(1, "kill");
    let ended;
    for await (const event of await controller.events({ sandboxId: first.id, after: start })) {
      if (event.event === "sandbox.ended") {
        ended = event;
        break;
      }
    }
    const told = [];
    for await (const event of events) {
      if (event.sandbox === first.id) told.push(event.event);
      if (event.id === ended.id) break;
    }
    assert.deepEqual([told.at(0), told.at(-1)], ["sandbox.created", "sandbox.ended"]);
    assert.equal(told.filter((kind) => kind === "sandbox.created").length, 1);
  });

  test("a workspace comes back as it was", async () => {
    const { workspaces } = client;
    const name = `node-${randomUUID().slice(0, 8)}`;
    const made = await workspaces.create({ name, snapshotTag: TAG, idleSuspendSecs: 900 });
    try {
      assert.deepEqual([made.status, made.idle_suspend_secs], ["running", 900]);
      await (await workspaces.sandbox(name)).eval("kept = 6 * 7");
      assert.equal((await workspaces.suspend(name)).status, "suspended");
      await assert.rejects(workspaces.sandbox(name), /suspended and has no sandbox/);
      await workspaces.resume(name);
      assert.equal(await (await workspaces.sandbox(name)).eval("kept"), "42");
      assert.ok((await workspaces.list()).some((workspace) => workspace.name === name));
    } finally {
      await workspaces.delete(name);
    }
    const never = { tag: "never", kernel: "/nonexistent/vmlinux", rootfs: "/nonexistent/rootfs.ext4" };
    await assert.rejects(client.snapshots.create(never), /\/nonexistent\/vmlinux/);
  });

  test("folders go there and back", async () => {
    const scratch = mkdtempSync(join(tmpdir(), "forkd-sdk-"));
    const content = randomBytes(1 << 20);
    mkdirSync(join(scratch, "project/bin"), { recursive: true });
    writeFileSync(join(scratch, "project/bin/run"), content, { mode: 0o750 });
    symlinkSync("bin/run", join(scratch, "project/link"));
    await Sandbox.with({ snapshotTag: TAG }, async ({ files, commands }) => {
      await files.upload(join(scratch, "project"), "/root/new/place");
      assert.equal((await files.stat("/root/new/place/project/bin/run")).mode, "0750");
      await files.download("/root/new/place/project", join(scratch, "back"));
      assert.deepEqual(readFileSync(join(scratch, "back/project/bin/run")), content);
      assert.equal(readlinkSync(join(scratch, "back/project/link")), "bin/run");
      const long = "y".repeat(180);
      await commands.run(`mkdir /root/evil; touch /root/evil/${long}; ln -s /etc/passwd /root/evil/z`);
      await assert.rejects(files.download("/root/evil", join(scratch, "evil")), ArchiveError);
      assert.equal(readFileSync(join(scratch, "evil/evil", long)).length, 0);
      await assert.rejects(files.download("/root/none", join(scratch, "none")), ControllerError);
    });
    rmSync(scratch, { recursive: true });
  });
});
