// The README's examples, run literally as one module. Needs a daemon and the snapshot "quickstart".

import assert from "node:assert/strict";
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { test } from "node:test";
import { fileURLToPath } from "node:url";

const folder = new URL("..", import.meta.url);

test("the examples do what they say", { skip: process.env.FORKD_URL ? false : "FORKD_URL names no daemon" }, async () => {
  const text = readFileSync(new URL("README.md", folder), "utf8");
  const examples = [...text.matchAll(/^```js\n(.*?)^```/gms)].map((match) => match[1]);
  assert.ok(examples.length > 8, `${examples.length} examples`);
  // Inside the package, so that its own name is found.
  const module = new URL("readme-examples.mjs", folder);
  writeFileSync(module, examples.join("\n"));
  try {
    await import(module);
  } finally {
    rmSync(fileURLToPath(module));
  }
});
