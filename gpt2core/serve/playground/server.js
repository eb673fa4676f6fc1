// What the server says before anything is run: whether it is ready, which model it has, how long the prompt is.

import { refusal } from "./messages.js";

const LOOK_AGAIN_MS = 1000;
const PAUSE_MS = 250; // in typing, before the prompt's tokens are counted

// Calls `told` with what keeps the server from working, "" once it works; /readyz needs no key.
export async function watchReadiness(told) {
  let waits = "";
  try {
    const response = await fetch("readyz");
    if (response.status === 503) waits = (await refusal(response)).message;
  } catch {
    waits = "The server cannot be reached.";
  }
  told(waits);
  if (waits) setTimeout(() => watchReadiness(told), LOOK_AGAIN_MS);
}

// The model's name, backend and context, and the most alternatives; null where the server does not say.
export async function aboutServer() {
  try {
    const response = await fetch("playground/server.json");
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}

// Counts the tokens of what stands in a field, some time after it was changed.
export class TokenCount {
  constructor(headers, told) {
    this.headers = headers;
    this.told = told;
    this.timer = null;
    this.asked = null; // the AbortController of the count that is under way
  }

  later(text) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.now(text), PAUSE_MS);
  }

  async now(text) {
    clearTimeout(this.timer);
    this.asked?.abort();
    const { signal } = (this.asked = new AbortController());
    let counted = null;
    if (text === "") {
      this.told(counted);
      return;
    }
    try {
      const body = JSON.stringify({ prompt: text });
      const response = await fetch("tokenize", { method: "POST", headers: this.headers(), body, signal });
      if (response.ok) counted = await response.json();
    } catch {
      // not told, like a count that was refused: Run says what is wrong
    }
    if (!signal.aborted) this.told(counted);
  }
}
