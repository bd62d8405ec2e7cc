// Against a daemon at FORKD_URL with the snapshot "quickstart".

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { after, before, describe, test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";

import { Controller, ControllerError, Forkd, Sandbox } from "@forkd/sdk";

const TAG = process.env.FORKD_TEST_TAG ?? "quickstart";

describe("a daemon", { skip: process.env.FORKD_URL ? false : "FORKD_URL names no daemon" }, () => {
  let sandbox;
  before(async () => {
    sandbox = await Sandbox.spawn(TAG);
  });
  after(() => sandbox.kill());

  test("output comes while the program runs", async () => {
    const came = [];
    const ended = await sandbox.commands.run("echo first; sleep 2; echo second; exit 7", {
      timeoutSecs: 60,
      onStdout: (text) => came.push([performance.now(), text]),
    });
    assert.deepEqual([ended.stdout, ended.exit_code], ["first\nsecond\n", 7]);
    assert.ok(came.at(-1)[0] - came[0][0] > 1000, JSON.stringify(came));
  });

  test("a program gets what it was given", async () => {
    const options = { env: { GREETING: "hi" }, cwd: "/usr", user: "nobody" };
    const ran = await sandbox.commands.run("echo $GREETING; pwd; id -u", options);
    assert.equal(ran.stdout, "hi\n/usr\n65534\n");
    const told = await sandbox.commands.run(["wc", "-c"], { stdin: "12345", onStdout: () => undefined });
    assert.equal(told.stdout.trim(), "5");
    await assert.rejects(sandbox.commands.run(["no-such-program"], { onStdout: () => undefined }), /no-such-program/);
  });

  test("programs are talked to", async () => {
    const trap = await sandbox.commands.start("trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done");
    await trap.readUntil("ready\n");
    trap.signal("TERM");
    await trap.readUntil("caught\n");
    assert.equal(await trap.wait(), 5);

    const sum = await sandbox.commands.start(["sha256sum"]);
    const content = Buffer.alloc(3 << 20, "forkd");
    sum.write(content);
    sum.closeStdin();
    let said = "";
    for await (const { data } of sum.output()) said += Buffer.from(data).toString();
    assert.match(said, new RegExp(createHash("sha256").update(content).digest("hex")));
    assert.equal(sum.exitCode, 0);

    const shell = await sandbox.pty({ rows: 30, columns: 90 });
    shell.write("stty size\n");
    await shell.readUntil("30 90");
    shell.resize(31, 91);
    shell.write("stty size\n");
    await shell.readUntil("31 91");
    shell.write("exit 3\n");
    assert.equal(await shell.wait(), 3);
    await assert.rejects(new Sandbox(sandbox.controller, { ...sandbox.info, id: "sb-0-0000" }).pty(), ControllerError);
  });

  test("changes of files are told", async () => {
    await sandbox.files.mkdir("/root/watched");
    const writing = pause(1000).then(() => sandbox.files.write("/root/watched/new", "content"));
    const seen = [];
    for await (const change of sandbox.files.watch("/root/watched")) {
      seen.push(change);
      if (change.path === "/root/watched/new") break;
    }
    await writing;
    assert.ok(seen.length > 0);
    await assert.rejects(sandbox.files.read("/root/none"), /\/root\/none/);
  });

  test("a server in the guest is reached", async () => {
    await sandbox.files.write("/srv/www/index.html", "served from the guest");
    const server = await sandbox.commands.start(["python3", "-m", "http.server", "--bind", "127.0.0.1", "8000"], {
      cwd: "/srv/www",
    });
    const headers = sandbox.controller.transport.headers();
    let text;
    for (let attempt = 0; attempt < 100 && text === undefined; attempt++) {
      const answer = await fetch(sandbox.portUrl(8000), { headers });
      if (answer.ok) text = await answer.text();
      else await pause(300);
    }
    server.close();
    assert.equal(text, "served from the guest");
  });

  test("copies go their own ways, and back", async () => {
    await sandbox.eval("way = 'source'");
    const copies = await sandbox.forkMany(2);
    for (const [index, copy] of copies.entries()) await copy.eval(`way += ' ${index}'`);
    const ways = await Promise.all(copies.map((copy) => copy.eval("way")));
    assert.deepEqual(ways, ["'source 0'", "'source 1'"]);
    const [first] = copies;
    await first.checkpoint("here");
    await first.eval("way = 'elsewhere'");
    await first.rewind({ back: 1 });
    assert.equal(await first.eval("way"), "'source 0'");
    assert.deepEqual((await first.checkpoints()).map((checkpoint) => checkpoint.name), ["here"]);
    for (const copy of copies) {
      await copy.kill();
      await copy.kill();
    }
  });

  test("the daemon's collections", async () => {
    const client = new Forkd();
    const found = await client.sandboxes.get(sandbox.id);
    assert.equal((await found.ping()).pong, true);
    assert.ok((await client.snapshots.list()).some((snapshot) => snapshot.tag === TAG));
    assert.equal((await new Controller().snapshotInfo(TAG)).tag, TAG);
    const many = await client.sandboxes.createMany(2, { snapshotTag: TAG });
    assert.equal(new Set(many.map((one) => one.id)).size, 2);
    for (const one of many) await client.sandboxes.kill(one.id);
  });
});
