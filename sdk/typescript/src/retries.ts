/**
 * When a request is sent again: only one that does no more when it is sent twice, and only when the connection broke
 * or the daemon said when to come again. A daemon that is not there at the first attempt is no reason to wait; one that
 * went away afterwards may come back.
 */

import { ControllerError, DaemonUnreachableError } from "./errors.js";

/** How long to wait before the second attempt; each further pause is twice as long. */
const FIRST_PAUSE_MS = 200;

/** A daemon that wants to be left alone for longer is not asked again. */
const LONGEST_PAUSE_MS = 30_000;

/** How long to wait before the next attempt, after attempt number `attempt`, counted from 0, ended in `error`. */
export function pauseMs(error: unknown, attempt: number): number | undefined {
  // Clients that one daemon has cut off do not come back at the same instant.
  const usual = FIRST_PAUSE_MS * 2 ** attempt * (0.75 + Math.random() / 2);
  if (error instanceof ControllerError) {
    const wanted = error.retryAfterSecs === undefined ? Infinity : error.retryAfterSecs * 1000;
    return wanted > LONGEST_PAUSE_MS ? undefined : Math.max(usual, wanted);
  }
  if (error instanceof DaemonUnreachableError) return attempt > 0 ? usual : undefined;
  return broke(error) ? usual : undefined;
}

/** Whether the connection ended before the answer did. */
export function broke(error: unknown): boolean {
  for (let cause = error; cause instanceof Error; cause = cause.cause) {
    const code = (cause as { code?: unknown }).code;
    if (code === "ECONNRESET" || code === "EPIPE" || code === "UND_ERR_SOCKET") return true;
  }
  return false;
}
