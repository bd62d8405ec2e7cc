/** Where the daemon is: `http://HOST:PORT`, `https://…` or a unix socket, `unix:///PATH` or `unix:/PATH`. */

export const USUAL = "http://127.0.0.1:8889";

export interface Address {
  /** As it was given, trailing slashes cut. */
  text: string;
  /** What paths are put behind. */
  base: string;
  /** The unix socket, if it is one. */
  socket?: string;
}

export function parseAddress(given: string): Address {
  const text = given.replace(/\/+$/, "");
  if (!text.startsWith("unix:")) {
    if (!/^https?:\/\//.test(text)) {
      throw new TypeError(`"${text}" is not a daemon's address; write http://HOST:PORT or unix:///PATH`);
    }
    return { text, base: text };
  }
  const socket = "/" + text.slice("unix:".length).replace(/^\/+/, "");
  if (socket === "/") throw new TypeError(`"${text}" names no socket; write unix:///PATH`);
  return { text, base: "http://localhost", socket };
}

/** The given address, else `FORKD_URL`, else the usual one. */
export function resolveAddress(baseUrl?: string): Address {
  return parseAddress(baseUrl || process.env["FORKD_URL"] || USUAL);
}

/** The given token, else `FORKD_TOKEN`; an empty one is none. */
export function resolveToken(token?: string): string | undefined {
  return (token ?? process.env["FORKD_TOKEN"] ?? "").trim() || undefined;
}
