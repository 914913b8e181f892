// What is asked of the server. An error is an Error with a sentence.
import { TEXT } from "./text.js";

async function ask(path, options) {
  let response;
  try {
    response = await fetch(`/window/${path}`, options);
  } catch {
    throw new Error(TEXT.lost);
  }
  const body = await response.json();
  if (!response.ok) throw new Error(body.error?.message ?? response.statusText);
  return body;
}

export const get = (path) => ask(path);
export const post = (path, body = {}) => ask(path, { method: "POST", body: JSON.stringify(body) });
export const send = (path, text) => ask(path, { method: "POST", body: text });
export const remove = (path) => ask(path, { method: "DELETE" });

// The events of a running answer, up to its end; returns what closes it. Where the connection is lost the browser tries again by itself, and begins
// with all that there is.
export function listen(message, hear) {
  const source = new EventSource(`/window/messages/${message}/events`);
  source.onmessage = (e) => {
    const event = JSON.parse(e.data);
    hear(event);
    if (event.type === "end") source.close();
  };
  source.onerror = () => hear({ type: "lost" });
  return () => source.close();
}
