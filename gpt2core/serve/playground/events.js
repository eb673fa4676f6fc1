// Server-sent events out of a fetch response, and errors out of its status.

export class RequestError extends Error {
  constructor(message, { param = null, status = 0, retryAfter = null } = {}) {
    super(message);
    this.param = param;
    this.status = status;
    this.retryAfter = retryAfter; // seconds
  }
}

// A seed has up to 63 bits, a number of JavaScript 53: so it stays a string of digits. A quote inside a JSON string
// is escaped, so that this pattern matches keys only.
export function parse(text) {
  return JSON.parse(text.replace(/"seed"\s*:\s*(\d+)/g, '"seed":"$1"'));
}

// The data of each event, as it arrives; an event may be cut anywhere between two chunks.
export async function* eventsOf(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines.map((one) => one.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // an aborted stream cannot be cancelled once more, and need not be
  }
}

const MEANING = {
  401: "The API key is missing or wrong.",
  408: "The request came too slowly.",
  413: "The prompt is too large for this server.",
  429: "The server has too much to do.",
  502: "The server cannot be reached.",
  503: "The server is not ready.",
  504: "It took too long.",
};

export async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not of this server, but of a proxy before it: the status alone has to do
  }
  const seconds = Number(response.headers.get("Retry-After"));
  const begin = MEANING[response.status] ?? `The server refused (status ${response.status}).`;
  return described(error, begin, {
    status: response.status,
    retryAfter: Number.isFinite(seconds) && seconds > 0 ? Math.ceil(seconds) : null,
  });
}

export function described(error, begin, details = {}) {
  const message = typeof error.message === "string" ? `${begin} ${sentence(error.message)}` : begin;
  const again = details.retryAfter ? ` Try again in ${details.retryAfter} s.` : "";
  return new RequestError(message + again, { param: error.param ?? null, ...details });
}

function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
