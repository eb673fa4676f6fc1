// The generated text as a row of tokens, coloured by probability; what else was likely is told in a tooltip.

const BORDERS = [0.02, 0.1, 0.3, 0.7]; // of the legend
const VISIBLE = { " ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d" };

export class Tokens {
  constructor(output, tip) {
    this.output = output;
    this.tip = tip;
    this.infos = new WeakMap(); // element -> the tokens that it shows
    this.held = []; // tokens whose text has not come yet: half a character, or what may begin a stop string
    this.shown = null;
    output.addEventListener("keydown", (event) => this.#move(event));
    for (const type of ["pointerover", "focusin"]) {
      output.addEventListener(type, (event) => this.#show(event.target));
    }
    output.addEventListener("pointerleave", () => this.#show(document.activeElement));
    output.addEventListener("focusout", () => this.hide());
    for (const type of ["resize", "scroll"]) window.addEventListener(type, () => this.#place(), { passive: true });
  }

  begin(prompt) {
    this.hide();
    this.held = [];
    const given = document.createElement("span");
    given.className = "prompt";
    given.textContent = prompt;
    this.output.replaceChildren(given);
  }

  add(event) {
    if (event.token_id !== null && event.logprob !== undefined) this.held.push(event);
    if (!event.text) return;
    const token = document.createElement("span");
    token.textContent = event.text;
    if (this.held.length) {
      const logprob = this.held.reduce((sum, one) => sum + one.logprob, 0);
      token.className = "token";
      token.dataset.p = BORDERS.filter((border) => Math.exp(logprob) >= border).length;
      token.tabIndex = this.output.querySelector(".token") ? -1 : 0; // one stop for Tab; arrow keys go on
      this.infos.set(token, this.held);
      this.held = [];
    }
    this.output.append(token);
  }

  hide() {
    this.tip.hidden = true;
    this.shown?.removeAttribute("aria-describedby");
    this.shown = null;
  }

  #move(event) {
    const all = [...this.output.querySelectorAll(".token")];
    const here = all.indexOf(document.activeElement);
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    const goal = { Home: 0, End: all.length - 1 }[event.key] ?? (step && here + step);
    if (here < 0 || goal === undefined || !all[goal]) return;
    event.preventDefault();
    all[here].tabIndex = -1;
    all[goal].tabIndex = 0;
    all[goal].focus();
  }

  #show(target) {
    const infos = this.infos.get(target);
    this.hide();
    if (!infos) return;
    this.tip.replaceChildren(...infos.map(table));
    this.tip.hidden = false;
    target.setAttribute("aria-describedby", this.tip.id);
    this.shown = target;
    this.#place();
  }

  #place() {
    if (!this.shown) return;
    const [line] = this.shown.getClientRects(); // a token may be wrapped
    const below = line.bottom + this.tip.offsetHeight + 8 < window.innerHeight;
    const left = Math.min(line.left, document.documentElement.clientWidth - this.tip.offsetWidth - 8);
    const top = below ? line.bottom + 4 : Math.max(4, line.top - this.tip.offsetHeight - 4);
    this.tip.style.left = `${Math.max(8, left)}px`;
    this.tip.style.top = `${top}px`;
  }
}

function table(info) {
  const rows = [...(info.top_logprobs ?? [])];
  if (!rows.some((one) => one.token_id === info.token_id)) rows.push(info); // drawn from further down
  const result = document.createElement("table");
  result.createCaption().textContent = `${visible(info.token)} had ${percent(info.logprob)}`;
  for (const one of rows) {
    const row = result.insertRow();
    row.classList.toggle("drawn", one.token_id === info.token_id);
    const bar = document.createElement("span");
    bar.className = "share";
    bar.style.width = `${100 * Math.exp(one.logprob)}%`;
    row.insertCell().textContent = visible(one.token);
    row.insertCell().textContent = percent(one.logprob);
    row.insertCell().append(bar);
  }
  return result;
}

function visible(text) {
  return text === "" ? "(empty)" : text.replace(/[ \n\t\r]/g, (one) => VISIBLE[one]);
}

export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share >= 99.95 && share < 100) return "> 99.9 %";
  return share < 0.1 ? "< 0.1 %" : `${share.toFixed(1)} %`;
}
