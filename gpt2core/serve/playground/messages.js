// What people are told when a request fails. The API's own messages are written for programs: they are shown only
// where this page knows nothing better, and then with the form's words.

const OF_CODE = {
  invalid_api_key: "The API key is missing or wrong. Enter it here.",
  loading: "The model is still being loaded.",
  draining: "The server is being stopped.",
  engine_failed: "The model has failed. Whoever runs the server has to start it again.",
  queue_full: "The server is busy with other texts.",
  client_queue_full: "The server is still busy with your other texts.",
  deadline_exceeded: "The text took longer than this server allows. Ask for fewer tokens, or try again later.",
  numerical_error: "The model computed something that is not a number, so the text ends here.",
  body_too_large: "The prompt is too long for this server. Shorten it.",
};
const OF_STATUS = {
  401: OF_CODE.invalid_api_key,
  408: "The prompt took too long to arrive. Try again.",
  413: OF_CODE.body_too_large,
  429: "The server is busy.",
  502: "The server cannot be reached.",
  503: "The server is not ready.",
  504: "The server took too long.",
};

export class RequestError extends Error {
  constructor(message, { param = null, code = null } = {}) {
    super(message);
    this.param = param; // the id of the field to mend
    this.code = code;
  }
}

export async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not of this server, but of a proxy before it: the status alone has to do
  }
  const seconds = Number(response.headers.get("Retry-After"));
  const again = Number.isFinite(seconds) && seconds > 0 ? ` Try again in ${Math.ceil(seconds)} s.` : "";
  return described(error, { status: response.status, again });
}

export function described(error, { status = 0, again = "" } = {}) {
  const param = status === 401 ? "api_key" : (error.param ?? null);
  let message = OF_CODE[error.code] ?? OF_STATUS[status];
  if (message === undefined) {
    const begin = param || !status ? "" : `The server could not answer (status ${status}). `;
    message = begin + (typeof error.message === "string" ? inWordsOfTheForm(error.message) : "");
  }
  return new RequestError((message || "The server could not answer.").trim() + again, { param, code: error.code });
}

// What is wrong with a field, or "": the checks that the browser makes, told beside the text instead of in bubbles.
export function faultOf(field) {
  const { badInput, rangeUnderflow, rangeOverflow, stepMismatch, patternMismatch } = field.validity;
  const label = labelOf(field.id);
  if (badInput) return `${label} is not a number.`;
  if (rangeUnderflow) return `${label} must be at least ${field.min}.`;
  if (rangeOverflow) return `${label} can be at most ${field.max}.`;
  if (stepMismatch) return `${label} must be a whole number.`;
  if (patternMismatch) return `${label} must be a whole number from 0 to 9223372036854775807.`;
  return "";
}

function inWordsOfTheForm(text) {
  return text
    .replace(/\bpass (\w+)=(\w+)/g, (_, name, value) => `set ${labelOf(name)} to ${value}`)
    .replace(/\b[a-z]+(?:_[a-z]+)+\b/g, labelOf)
    .split("; ")
    .map(sentence)
    .join(" ");
}

function labelOf(name) {
  return document.querySelector(`label[for="${CSS.escape(name)}"]`)?.textContent ?? name;
}

function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
