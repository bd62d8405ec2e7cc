// Runs source text for the agent in one persistent global scope.
//
// Messages are a little-endian u32 length and that many bytes of JSON. On the work socket comes
// {"code", "expression"}; the answer is {"result"} or {"error"}. On the control socket comes
// {"seed", "sandbox_id"}, answered {}. Standard output and error belong to the code: the agent reads
// them. "expression" asks for the code to be the body of an async function.
"use strict";
(() => {
  const fs = require("fs");
  const net = require("net");
  const util = require("util");
  const crypto = require("crypto");
  const inspector = require("inspector");

  const LIMIT = 16 << 20;
  const [workFd, controlFd] = process.env.FORKD_RUNTIME_FDS.split(",").map(Number);
  delete process.env.FORKD_RUNTIME_FDS;

  // V8's Math.random cannot be reseeded from here, so a generator that can takes its place:
  // xoshiro128** (Blackman and Vigna), two outputs for the 53 bits of a double.
  const state = new Uint32Array(4);
  const seedMathRandom = (bytes) => {
    for (let i = 0; i < 4; i++) state[i] = bytes.readUInt32LE(4 * i);
    if (!(state[0] | state[1] | state[2] | state[3])) state[0] = 1;
  };
  const rotate = (x, k) => (x << k) | (x >>> (32 - k));
  const next = () => {
    const result = Math.imul(rotate(Math.imul(state[1], 5), 7), 9) >>> 0;
    const t = state[1] << 9;
    state[2] ^= state[0];
    state[3] ^= state[1];
    state[1] ^= state[2];
    state[0] ^= state[3];
    state[2] ^= t;
    state[3] = rotate(state[3], 11);
    return result;
  };
  seedMathRandom(crypto.randomBytes(16));
  const random = { random() { return ((next() >>> 5) * 67108864 + (next() >>> 6)) / 9007199254740992; } }.random;
  Object.defineProperty(Math, "random", { value: random, writable: true, configurable: true, enumerable: false });

  // OpenSSL's generator lives in this process and would go on alike in every copy of the machine.
  // What JavaScript can ask for therefore comes from the kernel, which copies do not share.
  const kernelRandom = fs.openSync("/dev/urandom", "r");
  const fill = (view) => {
    const bytes = Buffer.from(view.buffer ?? view, view.byteOffset ?? 0, view.byteLength);
    for (let at = 0; at < bytes.length; ) at += fs.readSync(kernelRandom, bytes, at, bytes.length - at, null);
    return view;
  };
  const original = { randomBytes: crypto.randomBytes, randomFillSync: crypto.randomFillSync, randomInt: crypto.randomInt };
  const later = (callback, value) => process.nextTick(callback, null, value);
  const replacement = {
    randomBytes(size, callback) {
      if (!Number.isInteger(size) || size < 0 || size > 0x7fffffff) return original.randomBytes(size, callback);
      const bytes = fill(Buffer.allocUnsafeSlow(size));
      return callback === undefined ? bytes : void later(callback, bytes);
    },
    randomFillSync(view, offset = 0, size) {
      const unit = view.BYTES_PER_ELEMENT ?? 1;
      const start = (view.byteOffset ?? 0) + offset * unit;
      const length = size === undefined ? view.byteLength - offset * unit : size * unit;
      if (!(offset >= 0) || length < 0 || offset * unit + length > view.byteLength) {
        return original.randomFillSync(view, offset, size);
      }
      fill(new Uint8Array(view.buffer ?? view, start, length));
      return view;
    },
    randomFill(view, offset, size, callback) {
      if (typeof offset === "function") [offset, size, callback] = [0, undefined, offset];
      else if (typeof size === "function") [size, callback] = [undefined, size];
      later(callback, replacement.randomFillSync(view, offset, size));
    },
    randomInt(low, high, callback) {
      if (high === undefined || typeof high === "function") [low, high, callback] = [0, low, high];
      const range = high - low;
      if (!Number.isSafeInteger(low) || !Number.isSafeInteger(high) || range <= 0 || range > 0xffffffffffff) {
        return original.randomInt(low, high, callback);
      }
      const limit = 0x1000000000000 - (0x1000000000000 % range);
      let value;
      do value = fill(Buffer.allocUnsafe(6)).readUIntLE(0, 6);
      while (value >= limit);
      value = low + (value % range);
      return callback === undefined ? value : void later(callback, value);
    },
    randomUUID() {
      const bytes = fill(Buffer.allocUnsafe(16));
      bytes[6] = (bytes[6] & 0x0f) | 0x40;
      bytes[8] = (bytes[8] & 0x3f) | 0x80;
      const hex = bytes.toString("hex");
      return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
    },
  };
  Object.assign(crypto, replacement);
  require("module").syncBuiltinESMExports();
  if (crypto.webcrypto) {
    const shared = Object.getPrototypeOf(crypto.webcrypto);
    const originalValues = shared.getRandomValues;
    shared.getRandomValues = function getRandomValues(view) {
      const whole = ArrayBuffer.isView(view) && !/Float|DataView/.test(view.constructor.name) && view.byteLength <= 65536;
      return whole ? fill(view) : originalValues.call(this, view);
    };
    shared.randomUUID = replacement.randomUUID;
  }

  const serve = (fd, obey) => {
    const socket = new net.Socket({ fd, readable: true, writable: true });
    let waiting = Buffer.alloc(0);
    socket.on("data", (piece) => {
      waiting = Buffer.concat([waiting, piece]);
      while (waiting.length >= 4) {
        const end = 4 + waiting.readUInt32LE(0);
        if (waiting.length < end) return;
        const message = JSON.parse(waiting.toString("utf8", 4, end));
        waiting = waiting.subarray(end);
        obey(message, (answer) => {
          const data = Buffer.from(JSON.stringify(answer));
          const head = Buffer.alloc(4);
          head.writeUInt32LE(data.length);
          socket.write(Buffer.concat([head, data]));
        });
      }
    });
    socket.on("error", () => exit(0));
    socket.on("close", () => exit(0));
  };
  const exit = process.reallyExit.bind(process);

  serve(controlFd, (message, answer) => {
    seedMathRandom(Buffer.from(message.seed, "hex"));
    process.env.FORKD_SANDBOX_ID = message.sandbox_id;
    answer({});
  });

  // The inspector evaluates as a console does: top-level await, const and let that stay, values of
  // final expressions.
  const session = new inspector.Session();
  session.connect();
  const post = (method, parameters) =>
    new Promise((resolve, reject) => {
      session.post(method, parameters, (error, result) => (error ? reject(new Error(error.message)) : resolve(result)));
    });
  let holder;
  const receiver = Symbol("forkd.receive");
  Object.defineProperty(globalThis, receiver, { value: (value) => { holder = value; } });
  let receiverId;
  const valueOf = async (remote) => {
    if (remote.objectId === undefined) {
      if (remote.unserializableValue === undefined) return remote.value;
      const text = remote.unserializableValue;
      return text.endsWith("n") ? BigInt(text.slice(0, -1)) : Number(text);
    }
    holder = undefined;
    await post("Runtime.callFunctionOn", {
      objectId: receiverId,
      functionDeclaration: "function (value) { this(value); }",
      arguments: [{ objectId: remote.objectId }],
    });
    const value = holder;
    holder = undefined;
    await post("Runtime.releaseObject", { objectId: remote.objectId });
    return value;
  };
  const asJson = (value) => {
    if (value === undefined) return undefined;
    if (typeof value === "number" && !Number.isFinite(value)) return JSON.stringify(String(value));
    let text;
    try {
      text = JSON.stringify(value);
    } catch {
      text = undefined;
    }
    text ??= JSON.stringify(util.inspect(value));
    return text.length > LIMIT ? `${text.slice(0, LIMIT)}... [${text.length - LIMIT} more characters dropped]` : text;
  };
  const describe = (error) => (error instanceof Error ? error.stack ?? String(error) : `Uncaught ${util.inspect(error)}`);

  // Code that the inspector evaluates has no module of its own, so Node refuses its import(...). The
  // calls are made to go through this runner, which has one. Text in strings, templates and comments
  // is skipped; regular expressions are not told from divisions, so one that holds a quote may keep
  // a later import( from being found.
  const importer = "__forkd_import";
  Object.defineProperty(globalThis, importer, { value: (specifier, options) => import(specifier, options) });
  const redirectImports = (code) => {
    if (!/\bimport\s*\(/.test(code)) return code;
    const token = /\/\/[^\n]*|\/\*[^]*?\*\/|'(?:\\[^]|[^'\\\n])*'|"(?:\\[^]|[^"\\\n])*"|[`{}]|(?<![\w$.])import(?=\s*\()/g;
    const braces = [];
    let redirected = "";
    let at = 0;
    for (let match; (match = token.exec(code)); ) {
      const [text] = match;
      if (text === "import") {
        redirected += code.slice(at, match.index) + importer;
        at = token.lastIndex;
      } else if (text === "{") {
        braces.push("block");
      } else if (text === "`" || (text === "}" && braces.pop() === "template")) {
        // The text of a template, up to its end or to code within it.
        const rest = /(?:\\[^]|\$(?!\{)|[^`\\$])*(`|\$\{)?/y;
        rest.lastIndex = token.lastIndex;
        if (rest.exec(code)[1] === "${") braces.push("template");
        token.lastIndex = rest.lastIndex || code.length;
      }
    }
    return redirected + code.slice(at);
  };

  let count = 0;
  const evaluate = async (message) => {
    if (receiverId === undefined) {
      const found = await post("Runtime.evaluate", {
        expression: `globalThis[Object.getOwnPropertySymbols(globalThis).find((s) => s.description === "forkd.receive")]`,
      });
      receiverId = found.result.objectId;
    }
    const source = redirectImports(message.code);
    const code = message.expression ? `(async () => {${source}\n})()` : source;
    count += 1;
    const outcome = await post("Runtime.evaluate", {
      expression: `${code}\n//# sourceURL=eval-${count}`,
      replMode: !message.expression,
      awaitPromise: true,
      includeCommandLineAPI: false,
    });
    if (outcome.exceptionDetails) {
      const details = outcome.exceptionDetails;
      const error = details.exception ? await valueOf(details.exception) : new Error(details.text);
      return { error: describe(error) };
    }
    const result = asJson(await valueOf(outcome.result));
    return result === undefined ? {} : { result };
  };
  serve(workFd, (message, answer) => {
    evaluate(message).then(answer, (error) => answer({ error: describe(error) }));
  });

  // A mistake in a callback of the code must not end the runtime and its state.
  process.on("uncaughtException", (error) => process.stderr.write(`${describe(error)}\n`));
  process.on("unhandledRejection", (error) => process.stderr.write(`${describe(error)}\n`));
  process.on("SIGINT", () => {});
})();
