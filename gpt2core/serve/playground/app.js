// The playground: a form, a request, and the text as it comes.

import { eventsOf, parse } from "./events.js";
import { described, faultOf, refusal, RequestError } from "./messages.js";
import { aboutServer, TokenCount, watchReadiness } from "./server.js";
import { Tokens } from "./tokens.js";

const NUMBERS = ["max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logprobs"];
const ENDS = { stop: "the text came to its end", length: "as many tokens as were asked for" };
const NARROW = "(max-width: 52rem)"; // as in style.css

const part = (id) => document.getElementById(id);
const tokens = new Tokens(part("output"), part("tip"));
let running = null; // the AbortController of the request that runs
let counted = null; // the prompt's tokens, as the server counted them

function bodyOf(seed) {
  const fields = { prompt: part("prompt").value, stream: true };
  if (fields.prompt === "") throw new RequestError("Write a prompt first.", { param: "prompt" });
  for (const name of [...NUMBERS, "seed"]) {
    const fault = faultOf(part(name));
    if (fault) throw new RequestError(fault, { param: name });
  }
  for (const name of NUMBERS) {
    const { value } = part(name);
    if (value !== "") fields[name] = Number(value);
  }
  const stops = part("stop").value.split("\n").filter((line) => line !== "");
  if (stops.length) fields.stop = stops.map((line) => line.replace(/\\(n|\\)/g, (_, c) => (c === "n" ? "\n" : c)));
  return `${JSON.stringify(fields).slice(0, -1)},"seed":${seed}}`; // all its digits: no number here
}

// The seed of the form, or one drawn here: so it is known also of a text that was stopped.
function seedOf() {
  const given = part("seed").value.trim();
  if (/^\d+$/.test(given)) return BigInt(given);
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return (BigInt(high >>> 1) << 32n) | BigInt(low);
}

function headers() {
  const key = part("api_key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function run() {
  if (running) return;
  const control = (running = new AbortController());
  const begun = performance.now();
  let count = 0;
  clearError();
  show({ busy: true, status: "Waiting for the first token\u2026" });
  try {
    const seed = seedOf();
    const body = bodyOf(seed);
    const response = await fetch("generate", { method: "POST", headers: headers(), body, signal: control.signal });
    if (!response.ok) throw await refusal(response);
    begin(seed); // only now: what is refused leaves the last text as it is
    let summary = null;
    let done = false;
    for await (const data of eventsOf(response.body)) {
      done = data === "[DONE]";
      if (done) break;
      const event = parse(data);
      if (event.error) throw described(event.error);
      if (event.generations) summary = event;
      else {
        follow(() => tokens.add(event));
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

function begin(seed) {
  tokens.begin(part("prompt").value);
  part("figures").textContent = "";
  part("seed-used").textContent = seed;
  part("replay").hidden = false;
  disable(part("copy"), false);
  const end = part("result-end");
  end.scrollIntoView({ block: "nearest" });
}

// Lets the page scroll with the text, unless its reader has scrolled away from its end.
function follow(add) {
  const hidden = () => part("result-end").getBoundingClientRect().bottom - window.innerHeight + coveredBelow();
  const reading = hidden() < 2;
  add();
  if (reading) window.scrollBy(0, Math.max(0, hidden()));
}

// How much of the window the buttons cover where they stand at its end.
function coveredBelow() {
  const actions = document.querySelector(".actions");
  return getComputedStyle(actions).position === "sticky" ? actions.offsetHeight : 0;
}

function finish(summary, seconds) {
  const [text] = summary.generations;
  const count = text.completion_tokens;
  show({ busy: false, status: `Done: ${ENDS[text.finish_reason] ?? text.finish_reason}.` });
  const speed = count > 1 ? `, ${(count / summary.elapsed_s).toFixed(0)} tok/s` : "";
  follow(() => {
    part("figures").textContent =
      `${plural(count, "token")} in ${summary.elapsed_s.toFixed(2)} s at the server${speed}; ` +
      `${seconds.toFixed(2)} s here. ${summary.model} on ${summary.backend}.`;
    part("seed-used").textContent = text.seed ?? summary.seed;
  });
}

function show({ busy, status }) {
  disable(part("run"), busy);
  disable(part("stop-button"), !busy);
  part("output").setAttribute("aria-busy", String(busy)); // read out once it is complete
  part("status").textContent = status;
}

// A button that is disabled outright loses the focus, and the keyboard its place.
function disable(button, disabled) {
  button.setAttribute("aria-disabled", String(disabled));
}

function isDisabled(button) {
  return button.getAttribute("aria-disabled") === "true";
}

function fail(error) {
  const known = error instanceof RequestError;
  const box = part("error");
  box.textContent = known ? error.message : "The server cannot be reached, or the connection broke.";
  box.hidden = false;
  show({ busy: false, status: "" });
  const field = part((known && error.param) || "");
  if (!field?.labels) return;
  if (part("sampling").contains(field)) part("sampling").open = true;
  field.setAttribute("aria-invalid", "true");
  field.focus();
}

function clearError() {
  part("error").hidden = true;
  part("error").textContent = "";
  document.querySelectorAll("[aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

async function introduce() {
  const about = await aboutServer();
  if (!about) return;
  const facts = [about.model, about.backend && `on ${about.backend}`, about.context && `context ${about.context}`];
  part("model").textContent = facts.filter(Boolean).join(", ").replace(", on ", " on ");
  const field = part("logprobs");
  field.max = about.max_logprobs;
  if (Number(field.value) > about.max_logprobs) field.value = about.max_logprobs;
}

function tellSize() {
  const box = part("prompt-size");
  const room = counted && counted.max_model_len - counted.count;
  const wanted = Number(part("max_new_tokens").value);
  const short = counted ? wanted - room : 0;
  box.textContent = counted
    ? `${counted.count} of ${counted.max_model_len} tokens` +
      (short > 0 ? `: ${plural(short, "token")} too many with ${wanted} new ones` : "")
    : "";
  box.classList.toggle("too-many", short > 0);
}

const size = new TokenCount(headers, (answer) => {
  counted = answer;
  tellSize();
});

async function copy() {
  if (isDisabled(part("copy"))) return;
  const text = part("output").textContent;
  try {
    await navigator.clipboard.writeText(text); // refused where the page came by plain HTTP from another machine
  } catch {
    copySelection();
  }
  if (!running) part("status").textContent = "Copied.";
}

function copySelection() {
  const before = document.activeElement;
  const box = document.createElement("textarea");
  box.value = part("output").textContent;
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
  before?.focus();
}

part("form").noValidate = true; // see faultOf
part("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
part("stop-button").addEventListener("click", () => running?.abort());
part("copy").addEventListener("click", copy);
part("prompt").addEventListener("input", () => size.later(part("prompt").value));
part("max_new_tokens").addEventListener("input", tellSize);
part("api_key").addEventListener("change", () => size.now(part("prompt").value));
part("seed-used").addEventListener("click", () => {
  part("seed").value = part("seed-used").textContent;
  part("sampling").open = true;
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
if (matchMedia(NARROW).matches) part("sampling").open = false;
introduce();
watchReadiness((waits) => {
  if (!running) part("status").textContent = waits;
  if (waits) return;
  introduce();
  size.now(part("prompt").value);
});
