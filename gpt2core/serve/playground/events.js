// Server-sent events out of a fetch response.

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
