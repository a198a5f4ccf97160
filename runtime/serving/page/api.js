/* How the page speaks with its server. Knows HTTP and server-sent events, not the page. */

const KEY = "personalq-key";

export const storedKey = () => sessionStorage.getItem(KEY) ?? "";
export const storeKey = (key) => sessionStorage.setItem(KEY, key);

function headers() {
  const key = storedKey();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/* A refusal of the server: its status and the `error` object of the answer. */
export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.error = error ?? {};
  }
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Refused(response.status, body.error);
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

export async function post(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  return (await checked(response)).json();
}

/* Draw with progress: yields every event; ends after the picture. */
export async function* draw(body, signal) {
  const asked = { ...body, stream: true, progress: true, partial_images: 8 };
  const options = { method: "POST", headers: headers(), body: JSON.stringify(asked), signal };
  const response = await checked(await fetch("/v1/images/generations", options));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      const event = JSON.parse(data.slice(6));
      if (event.error) throw new Refused(500, event.error);
      yield event;
    }
  }
}

export const source = (event) => `data:image/png;base64,${event.b64_json}`;
