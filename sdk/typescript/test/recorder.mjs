// An HTTP server that records what it is asked and answers what it is told.

import { createServer } from "node:http";

export async function recorder(socketPath) {
  const requests = [];
  const state = { requests, status: 200, content: "[]" };
  const server = createServer(async (request, response) => {
    const pieces = [];
    for await (const piece of request) pieces.push(piece);
    const text = Buffer.concat(pieces).toString();
    const json = request.headers["content-type"] === "application/json";
    requests.push({
      method: request.method,
      path: request.url,
      type: request.headers["content-type"],
      token: request.headers.authorization,
      body: json ? JSON.parse(text) : text,
    });
    response.writeHead(state.status).end(state.content);
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
