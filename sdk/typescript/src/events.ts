/** What happens on a daemon, as it happens. */

import { setTimeout as pause } from "node:timers/promises";

import { ControllerError } from "./errors.js";
import { lines, serverLine } from "./streams.js";
import type { Transport } from "./transport.js";
import type { DaemonEvent } from "./types.js";

/** Which events are wanted. */
export interface EventOptions {
  /** Only those about this sandbox. */
  sandboxId?: string;
  /** Also what happened since the event with this id. */
  after?: number;
  /** How long the daemon may be away before the stream ends with an error; 60000 unless said. */
  patienceMs?: number;
}

/** A stream that says nothing for this long is dead: the daemon says something every 15 seconds. */
const SILENCE_MS = 60_000;

/** Answers to the attempt to come again that say nothing for good. */
const COMES_BACK = new Set([429, 502, 503, 504]);

/**
 * Events since it was made, by `for await`; see `Controller.events`. It comes again by itself when its connection
 * breaks, and goes on after the last event it has given.
 */
export class EventStream implements AsyncIterableIterator<DaemonEvent> {
  /** Id of the last event, with which a later stream goes on: `events({ after })`. */
  lastId: number | undefined;

  private readonly patienceMs: number;
  private retryMs = 1000;
  private closed = false;
  private connection: AbortController | undefined;
  private lines: AsyncGenerator<string> | undefined;

  private constructor(
    private readonly transport: Transport,
    private readonly options: EventOptions,
  ) {
    this.lastId = options.after;
    this.patienceMs = options.patienceMs ?? 60_000;
  }

  /** Begins to listen. */
  static async open(transport: Transport, options: EventOptions): Promise<EventStream> {
    const stream = new EventStream(transport, options);
    await stream.connect();
    return stream;
  }

  async next(): Promise<IteratorResult<DaemonEvent, undefined>> {
    while (!this.closed) {
      const line = await this.line();
      if (this.closed) break;
      if (line === undefined) {
        await this.comeAgain();
        continue;
      }
      const said = serverLine(line);
      this.retryMs = said.retryMs ?? this.retryMs;
      this.lastId = said.event?.id ?? said.lastId ?? this.lastId;
      if (said.event !== undefined) return { done: false, value: said.event };
    }
    return { done: true, value: undefined };
  }

  /** Gives it up; also what the end of a `for await` does. */
  close(): void {
    this.closed = true;
    this.connection?.abort();
  }

  async return(): Promise<IteratorResult<DaemonEvent, undefined>> {
    this.close();
    return { done: true, value: undefined };
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  /** The next line, or nothing when the connection broke or fell silent. */
  private async line(): Promise<string | undefined> {
    const { connection, lines } = this;
    const silence = setTimeout(() => connection?.abort(), SILENCE_MS);
    try {
      const next = await lines?.next();
      return next?.done === false ? next.value : undefined;
    } catch {
      return undefined;
    } finally {
      clearTimeout(silence);
    }
  }

  private async connect(): Promise<void> {
    const { sandboxId } = this.options;
    const query = sandboxId === undefined ? "" : `?sandbox=${encodeURIComponent(sandboxId)}`;
    const connection = new AbortController();
    const silence = setTimeout(() => connection.abort(), SILENCE_MS);
    try {
      const [response] = await this.transport.open(
        { method: "GET", path: `/v1/events${query}`, lastEventId: this.lastId, signal: connection.signal },
        true,
      );
      [this.connection, this.lines] = [connection, lines(response)];
    } finally {
      clearTimeout(silence);
    }
    // The greeting says where it is in the order of events, so that nothing is missed from here on, and ends in when
    // to come again.
    for (let line; (line = await this.line()) !== undefined; ) {
      const said = serverLine(line);
      this.lastId = said.lastId ?? this.lastId;
      this.retryMs = said.retryMs ?? this.retryMs;
      if (said.retryMs !== undefined) return;
    }
  }

  private async comeAgain(): Promise<void> {
    this.connection?.abort();
    const deadline = performance.now() + this.patienceMs;
    while (!this.closed) {
      await pause(this.retryMs);
      try {
        await this.connect();
        return;
      } catch (error) {
        const forGood = error instanceof ControllerError && !COMES_BACK.has(error.status);
        if (forGood || performance.now() > deadline) {
          this.closed = true;
          throw error;
        }
      }
    }
  }
}
