// An HTTP server that records what it is asked and answers what it is told.

import { createServer } from "node:http";

export async function recorder(socketPath) {
  const requests = [];
  // `first` are answers that come before the usual one; null cuts the connection instead.
  const state = { requests, status: 200, content: "[]", first: [] };
  const server = createServer(async (request, response) => {
    const pieces = [];
    for await (const piece of request) pieces.push(piece);
    const bytes = Buffer.concat(pieces);
    const text = bytes.toString();
    const json = request.headers["content-type"] === "application/json";
    requests.push({
      method: request.method,
      path: request.url,
      type: request.headers["content-type"],
      token: request.headers.authorization,
      body: json ? JSON.parse(text) : text,
      bytes,
      key: request.headers["idempotency-key"],
      lastEvent: request.headers["last-event-id"],
    });
    const usual = { status: state.status, content: state.content };
    const answer = state.first.length > 0 ? state.first.shift() : usual;
    if (answer === null) request.socket.destroy();
    else response.writeHead(answer.status, answer.headers).end(answer.content);
  });
  await new Promise((resolve) => (socketPath ? server.listen(socketPath, resolve) : server.listen(0, "127.0.0.1", resolve)));
  state.url = socketPath ? `unix://${socketPath}` : `http://127.0.0.1:${server.address().port}`;
  state.last = () => requests.at(-1);
  state.close = () => {
    server.closeAllConnections();
    return new Promise((resolve) => server.close(resolve));
  };
  return state;
}
