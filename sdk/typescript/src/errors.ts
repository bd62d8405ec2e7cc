/** The daemon refused a request. */
export class ControllerError extends Error {
  /** Status of the answer. */
  readonly status: number;
  /** Its body: parsed, or text when it was not JSON. */
  readonly body: unknown;
  /** What was asked. */
  readonly url: string;
  /** The daemon's stable code for the cause, for example `sandbox_not_found`. */
  readonly code: string | undefined;
  /** When to come again, if the daemon says so. */
  readonly retryAfterSecs: number | undefined;

  constructor(status: number, body: unknown, url: string, retryAfterSecs?: number) {
    const said = (typeof body === "object" && body !== null ? body : {}) as { error?: unknown; code?: unknown };
    const text = typeof said.error === "string" ? said.error : typeof body === "string" ? body : JSON.stringify(body);
    super(`controller ${url}: HTTP ${status}: ${text}`);
    this.name = "ControllerError";
    this.status = status;
    this.body = body;
    this.url = url;
    this.retryAfterSecs = retryAfterSecs;
    this.code = typeof said.code === "string" ? said.code : undefined;
  }
}

/** Nobody answers at the daemon's address. */
export class DaemonUnreachableError extends Error {
  constructor(address: string, cause: unknown) {
    super(
      `no forkd daemon answers at ${address}; ` +
        'eval "$(forkd env)" finds or starts one and sets FORKD_URL and FORKD_TOKEN',
      { cause },
    );
    this.name = "DaemonUnreachableError";
  }
}

/** The code threw. The message is what the guest said about it. */
export class EvalError extends Error {
  constructor(message: string) {
    super(message);
    this.name = "EvalError";
  }
}

/** A stream ended badly: a program was not started or its end is not known, a watched directory is gone. */
export class StreamError extends Error {
  /** The daemon's stable code for the cause. */
  readonly code: string | undefined;

  constructor(message: string, code?: string) {
    super(message);
    this.name = "StreamError";
    this.code = code;
  }
}
