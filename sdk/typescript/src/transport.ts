/** Sends requests; over TCP by `fetch`, over a unix socket by `node:http`. */

import { randomUUID } from "node:crypto";
import { request as httpRequest } from "node:http";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { setTimeout as pause } from "node:timers/promises";

import { type Address, resolveAddress, resolveToken } from "./address.js";
import { ControllerError, DaemonUnreachableError } from "./errors.js";
import { pauseMs } from "./retries.js";

/** How a daemon is reached. */
export interface ConnectionOptions {
  /** `http://HOST:PORT` or `unix:///PATH`; `FORKD_URL`, else `http://127.0.0.1:8889`. */
  baseUrl?: string;
  /** Bearer token; `FORKD_TOKEN` when absent. */
  token?: string;
  /** How long an answer may take; 60000 unless said. */
  timeoutMs?: number;
  /**
   * How often a request whose connection breaks, or that the daemon asks to send again, is sent again; 3 unless said.
   * Only requests that read are, and those that make something, which carry an idempotency key for it.
   */
  retries?: number;
  /** Used instead of the global `fetch`. */
  fetch?: typeof fetch;
}

/** One request. */
export interface Outgoing {
  method: string;
  path: string;
  /** Sent as JSON. */
  json?: unknown;
  /** Sent as it is. */
  content?: Uint8Array | string | ReadableStream<Uint8Array>;
  /** It makes something: the daemon does it once for each key, and it gets one where none is given. */
  makes?: { idempotencyKey?: string | undefined };
  /** The event of a stream that was seen last. */
  lastEventId?: number | undefined;
  /** The answer may take at least this long. */
  leastTimeoutMs?: number;
  /** Ends the request early. */
  signal?: AbortSignal;
}

export class Transport {
  readonly address: Address;
  readonly timeoutMs: number;
  readonly retries: number;
  readonly token: string | undefined;
  private readonly fetch: typeof fetch;

  constructor(options: ConnectionOptions = {}) {
    this.address = resolveAddress(options.baseUrl);
    this.token = resolveToken(options.token);
    this.timeoutMs = options.timeoutMs ?? 60_000;
    this.retries = options.retries ?? 3;
    const socket = this.address.socket;
    this.fetch = options.fetch ?? (socket === undefined ? (...args) => fetch(...args) : unixFetch(socket));
  }

  /** Headers that every request carries. */
  headers(): Record<string, string> {
    return this.token === undefined ? {} : { Authorization: `Bearer ${this.token}` };
  }

  /** Sends a request, more than once if need be, and parses its answer; null when it is empty. */
  call<T>(outgoing: Outgoing): Promise<T> {
    return this.whole(outgoing, async (response, url) => (await body(response, url)) as T);
  }

  /** Sends a request, more than once if need be, and reads all of its answer with `read`. */
  async whole<T>(outgoing: Outgoing, read: (response: Response, url: string) => Promise<T>): Promise<T> {
    const { makes } = outgoing;
    const keyed =
      makes !== undefined && makes.idempotencyKey === undefined && this.retries > 0
        ? { ...outgoing, makes: { idempotencyKey: randomUUID() } }
        : outgoing;
    const repeatable = keyed.method === "GET" || keyed.makes?.idempotencyKey !== undefined;
    for (let attempt = 0; ; attempt++) {
      try {
        const [response, url] = await this.open(keyed);
        return await read(response, url);
      } catch (error) {
        const wait = repeatable && attempt < this.retries ? pauseMs(error, attempt) : undefined;
        if (wait === undefined) throw error;
        await pause(wait);
      }
    }
  }

  /** Sends a request; the answer's body is still to be read. A status outside 2xx throws. */
  async open(outgoing: Outgoing, unlimited = false): Promise<[Response, string]> {
    const url = this.address.base + outgoing.path;
    const headers = this.headers();
    if (outgoing.makes?.idempotencyKey !== undefined) headers["Idempotency-Key"] = outgoing.makes.idempotencyKey;
    if (outgoing.lastEventId !== undefined) headers["Last-Event-ID"] = String(outgoing.lastEventId);
    let content = outgoing.content;
    if (outgoing.json !== undefined) {
      content = JSON.stringify(outgoing.json);
      headers["Content-Type"] = "application/json";
    } else if (content !== undefined) {
      headers["Content-Type"] = "application/octet-stream";
    }
    const limits: AbortSignal[] = outgoing.signal ? [outgoing.signal] : [];
    if (!unlimited) limits.push(AbortSignal.timeout(Math.max(this.timeoutMs, outgoing.leastTimeoutMs ?? 0)));
    const init: RequestInit & { duplex?: "half" } = { method: outgoing.method, headers };
    if (content instanceof ReadableStream) init.duplex = "half";
    const signal = anyOf(limits);
    if (signal !== undefined) init.signal = signal;
    if (content !== undefined) init.body = content as NonNullable<RequestInit["body"]>;
    let response: Response;
    try {
      response = await this.fetch(url, init);
    } catch (error) {
      throw refused(error) ? new DaemonUnreachableError(this.address.text, error) : error;
    }
    if (!response.ok) await body(response, url);
    return [response, url];
  }
}

/** The value of an answer; throws on a status outside 2xx. */
async function body(response: Response, url: string): Promise<unknown> {
  const text = await response.text();
  if (response.ok) return text === "" ? null : JSON.parse(text);
  let parsed: unknown = text;
  try {
    parsed = text === "" ? {} : JSON.parse(text);
  } catch {
    // It stays text.
  }
  const retryAfter = response.headers.get("Retry-After");
  const seconds = retryAfter !== null && /^\d+$/.test(retryAfter) ? Number(retryAfter) : undefined;
  throw new ControllerError(response.status, parsed, url, seconds);
}

function refused(error: unknown): boolean {
  const cause = (error as { cause?: unknown })?.cause ?? error;
  const code = (cause as { code?: unknown })?.code;
  return code === "ECONNREFUSED" || code === "ENOENT";
}

/** Aborts when one of `signals` does. `AbortSignal.any` exists from Node 20 on. */
function anyOf(signals: AbortSignal[]): AbortSignal | undefined {
  if (signals.length < 2) return signals[0];
  const controller = new AbortController();
  for (const signal of signals) {
    if (signal.aborted) controller.abort(signal.reason);
    signal.addEventListener("abort", () => controller.abort(signal.reason), { once: true });
  }
  return controller.signal;
}

/** A `fetch` whose every connection is to one unix socket. */
function unixFetch(socketPath: string): typeof fetch {
  return (input, init = {}) =>
    new Promise((resolve, reject) => {
      const url = new URL(String(input));
      const request = httpRequest(
        {
          socketPath,
          // A connection each: one that a restarted daemon has cut cannot be reused by mistake.
          agent: false,
          path: url.pathname + url.search,
          method: init.method ?? "GET",
          headers: { Host: "localhost", ...(init.headers as Record<string, string>) },
          ...(init.signal ? { signal: init.signal } : {}),
        },
        (answer) => {
          const status = answer.statusCode ?? 500;
          const headers = new Headers();
          for (const [name, value] of Object.entries(answer.headers)) {
            if (value !== undefined) headers.set(name, Array.isArray(value) ? value.join(", ") : value);
          }
          const bare = status === 204 || status === 304;
          if (bare) answer.resume();
          const stream = bare ? null : (Readable.toWeb(answer) as unknown as ReadableStream<Uint8Array>);
          resolve(new Response(stream as unknown as ConstructorParameters<typeof Response>[0], { status, headers }));
        },
      );
      request.on("error", reject);
      const content = init.body as string | Uint8Array | ReadableStream | null | undefined;
      if (content instanceof ReadableStream) {
        // A request that has failed has said so itself.
        pipeline(Readable.fromWeb(content as Parameters<typeof Readable.fromWeb>[0]), request).catch(reject);
      } else {
        request.end(content ?? undefined);
      }
    });
}
