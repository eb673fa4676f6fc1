// The playground: a form, a request, and the text as it comes.

import { described, eventsOf, parse, refusal, RequestError } from "./events.js";
import { Tokens } from "./tokens.js";

const NUMBERS = ["max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logprobs"];
const ENDS = { stop: "the text came to its end", length: "as many tokens as were asked for" };
const LOOK_AGAIN_MS = 1000;

const part = (id) => document.getElementById(id);
const tokens = new Tokens(part("output"), part("tip"));
let running = null; // the AbortController of the request that runs

function bodyOf() {
  const fields = { prompt: part("prompt").value, stream: true };
  for (const name of NUMBERS) {
    const { value, validity } = part(name);
    if (validity.badInput) throw new RequestError(`${labelOf(name)} is not a number.`, { param: name });
    if (value !== "") fields[name] = Number(value);
  }
  const stops = part("stop").value.split("\n").filter((line) => line !== "");
  if (stops.length) fields.stop = stops.map((line) => line.replace(/\\(n|\\)/g, (_, c) => (c === "n" ? "\n" : c)));
  const seed = part("seed").value.trim();
  if (!/^\d{0,19}$/.test(seed)) {
    throw new RequestError("Seed must be a whole number from 0 to 9223372036854775807.", { param: "seed" });
  }
  const body = JSON.stringify(fields);
  return seed === "" ? body : `${body.slice(0, -1)},"seed":${BigInt(seed)}}`; // all its digits: no number here
}

function labelOf(name) {
  return document.querySelector(`label[for=${name}]`).textContent;
}

async function run() {
  if (running) return;
  const control = (running = new AbortController());
  const begun = performance.now();
  let count = 0;
  clearError();
  show({ busy: true, status: "Waiting for the first token\u2026" });
  part("figures").textContent = "";
  part("replay").hidden = true;
  tokens.begin(part("prompt").value);
  part("output").scrollIntoView({ block: "nearest" }); // on a small screen it stands below the form
  try {
    const headers = { "Content-Type": "application/json" };
    const key = part("api_key").value.trim();
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetch("generate", { method: "POST", headers, body: bodyOf(), signal: control.signal });
    if (!response.ok) throw await refusal(response);
    let summary = null;
    let done = false;
    for await (const data of eventsOf(response.body)) {
      done = data === "[DONE]";
      if (done) break;
      const event = parse(data);
      if (event.error) throw described(event.error, "The text broke off.");
      if (event.generations) summary = event;
      else {
        tokens.add(event);
        count += event.token_id !== null;
        if (count === 1) show({ busy: true, status: "Writing\u2026" });
        part("figures").textContent = plural(count, "token");
      }
    }
    if (!done || !summary) throw new RequestError("The connection broke before the text was complete.");
    finish(summary, (performance.now() - begun) / 1000);
  } catch (error) {
    if (control.signal.aborted) show({ busy: false, status: `Stopped after ${plural(count, "token")}.` });
    else fail(error);
  } finally {
    running = null;
  }
}

function finish(summary, seconds) {
  const [text] = summary.generations;
  const count = text.completion_tokens;
  show({ busy: false, status: `Done: ${ENDS[text.finish_reason] ?? text.finish_reason}.` });
  const speed = count > 1 ? `, ${(count / summary.elapsed_s).toFixed(0)} tok/s` : "";
  part("figures").textContent =
    `${plural(count, "token")} in ${summary.elapsed_s.toFixed(2)} s at the server${speed}; ` +
    `${seconds.toFixed(2)} s here. ${summary.model} on ${summary.backend}.`;
  part("seed-used").textContent = text.seed ?? summary.seed;
  part("replay").hidden = false;
}

function show({ busy, status }) {
  part("run").disabled = busy;
  part("stop-button").disabled = !busy;
  part("output").setAttribute("aria-busy", String(busy)); // read out once it is complete
  part("status").textContent = status;
}

function fail(error) {
  const known = error instanceof RequestError;
  const box = part("error");
  box.textContent = known ? error.message : "The server cannot be reached, or the connection broke.";
  box.hidden = false;
  show({ busy: false, status: "" });
  const field = part(known && error.status === 401 ? "api_key" : (known && error.param) || "");
  if (field?.labels) {
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
}

function clearError() {
  part("error").hidden = true;
  part("error").textContent = "";
  document.querySelectorAll("[aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

// While the server loads its model, say so; /readyz needs no key.
async function tellReadiness() {
  let status = "";
  try {
    const response = await fetch("readyz");
    if (response.status === 503) status = (await refusal(response)).message;
  } catch {
    status = "The server cannot be reached.";
  }
  if (running) return;
  part("status").textContent = status;
  if (status) setTimeout(tellReadiness, LOOK_AGAIN_MS);
}

part("form").noValidate = true; // the server's own messages name value, limit and remedy
part("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
part("stop-button").addEventListener("click", () => running?.abort());
part("seed-used").addEventListener("click", () => {
  part("seed").value = part("seed-used").textContent;
  part("seed").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape") {
    tokens.hide();
    running?.abort();
  }
});
tellReadiness();
