// Compiles src/ to dist/. `npm install FOLDER` links the folder and runs this without having installed what the
// folder's own development needs, so that is done here first.

import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));

function run(program, ...args) {
  const { status, error } = spawnSync(program, args, { cwd: here, stdio: ["ignore", 2, 2] });
  if (error) throw error;
  if (status !== 0) process.exit(status ?? 1);
}

const compiler = `${here}/node_modules/typescript/bin/tsc`;
if (!existsSync(compiler)) run("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-save");
run(process.execPath, compiler);
