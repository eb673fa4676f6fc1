"""One HTML file: texts colored by surprisal, token by token, without anything from outside."""

import html
import json
import math
from collections.abc import Sequence
from typing import Final

from gpt2core.scoring.score import Score, TokenScore

_STEPS_BITS: Final = (0.5, 2.0, 5.0, 9.0)
"""Surprisals, in bits, at which the color changes."""
_STYLE: Final = """
:root { color-scheme: light dark; --page: #fbfbfa; --panel: #ffffff; --text: #1c2024; --muted: #565d66;
  --line: #c9ced4; --p4: #ffb765; --p3: #ffdcb0; --p2: transparent; --p1: #d9eafb; --p0: #a9d2f8;
  --under: #8a4b00; font: 16px/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --panel: #1c2024; --text: #e8eaed;
  --muted: #a9b1ba; --line: #454c54; --p4: #8a4b00; --p3: #55330d; --p1: #183a58; --p0: #0f5591;
  --under: #ffb765; } }
*, ::before, ::after { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem 1.25rem; background: var(--page); color: var(--text); }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p.note, .legend, dt { color: var(--muted); font-size: .875rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2; padding: .75rem;
  background: var(--panel);  border: 1px solid var(--line); border-radius: .5rem; }
.t { border-radius: .2rem; padding: .1rem 0; cursor: default; }
.t:focus-visible, .t:hover { outline: 2px solid var(--under); }
.s0 { background: var(--p0); } .s1 { background: var(--p1); } .s3 { background: var(--p3); }
.s4 { background: var(--p4); text-decoration: underline; text-decoration-color: var(--under); }
.none { color: var(--muted); }
#card { position: fixed; left: 1rem; bottom: 1rem; max-width: 24rem; padding: .6rem .8rem;
  background: var(--panel); border: 1px solid var(--line); border-radius: .5rem;
  box-shadow: 0 2px 12px #0004; }
#card[hidden] { display: none; }
#card dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .75rem; margin: 0; }
#card dd { margin: 0; font-variant-numeric: tabular-nums; } #card code { white-space: pre-wrap; }
svg { width: 100%; height: 12rem; } svg path { fill: none; stroke: var(--under); stroke-width: 1.2; }
svg line { stroke: var(--line); } svg text { fill: var(--muted); font-size: 11px; }
"""
_SCRIPT: Final = """
const card = document.getElementById("card");
const UNIT = document.body.dataset.unit;
function row(list, name, value) {
  const term = document.createElement("dt"), detail = document.createElement("dd");
  term.textContent = name; detail.textContent = value; list.append(term, detail);
}
function show(token) {
  const data = JSON.parse(token.dataset.t), list = document.createElement("dl");
  row(list, "token", JSON.stringify(data.text) + "  #" + data.id);
  row(list, "surprisal", data.surprisal === null ? "not predicted" : data.surprisal.toFixed(3) + " " + UNIT);
  if (data.rank !== null) row(list, "rank", data.rank);
  if (data.entropy !== null) row(list, "entropy", data.entropy.toFixed(3) + " " + UNIT);
  for (const [text, p] of data.top) row(list, (100 * p).toFixed(1) + " %", JSON.stringify(text));
  card.replaceChildren(list); card.hidden = false;
}
for (const kind of ["mouseover", "focusin", "click"])
  document.addEventListener(kind, (event) => {
    const token = event.target.closest("[data-t]");
    if (token) show(token); else if (kind !== "focusin") card.hidden = true;
  });
"""
MOST_TEXTS: Final = 200
"""Texts that one page shows; a browser is slow with more."""


def make_page(
    scores: Sequence[tuple[str, Score]], *, title: str, cite: str, base: float, left_out: int = 0
) -> str:
    """The page.

    Args:
        scores: names of texts, and their scores.
        title: of the page.
        cite: what fixes the numbers.
        base: of the surprisals and entropies.
        left_out: how many texts are not shown.
    """
    unit = "bits" if base == 2 else "nats" if base == math.e else f"digits to base {base:g}"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{_STYLE}</style><body data-unit="{unit}"><h1>{html.escape(title)}</h1>'
        f'<p class="note">{html.escape(cite)}</p>{_legend(base, unit)}'
    ]
    for name, score in scores:
        tokens = score.by_token(base)
        shown = "".join(_token(token, base) for token in _whole(tokens, score))
        parts.append(
            f"<section><h2>{html.escape(name)}</h2>"
            f'<p class="note">{len(tokens)} tokens, perplexity {score.perplexity:.2f}</p>'
            f"{_curve(tokens, unit) if len(scores) == 1 else ''}"
            f'<div class="text">{shown}</div></section>'
        )
    if left_out:
        parts.append(f'<p class="note">{left_out} further texts are not shown.</p>')
    parts.append(f'<div id="card" hidden role="status"></div><script>{_SCRIPT}</script></body></html>\n')
    return "".join(parts)


def _whole(tokens: list[TokenScore], score: Score) -> list[tuple[str, TokenScore]]:
    """Tokens with the characters that end in them: one that is split between tokens shows in its last."""
    shown, done = [], 0
    ends = [token.end for token in tokens]
    for i, token in enumerate(tokens):
        last = i + 1 == len(tokens) or tokens[i + 1].start >= token.end
        end = ends[i] if last else max(done, token.end - 1)
        shown.append((score.text[done:end], token))
        done = max(done, end)
    return shown


def _token(shown: tuple[str, TokenScore], base: float) -> str:
    text, token = shown
    data = {
        "text": token.text,
        "id": token.token_id,
        "surprisal": _number(token.surprisal),
        "rank": token.rank,
        "entropy": _number(token.entropy),
        "top": [[one.text, math.exp(one.logprob)] for one in token.top or ()],
    }
    if token.surprisal is None or not math.isfinite(token.surprisal):
        kind = "none" if token.surprisal is None else "s4"
    else:
        bits = token.surprisal * math.log2(base)
        kind = f"s{sum(bits >= step for step in _STEPS_BITS)}"
    packed = html.escape(json.dumps(data, ensure_ascii=False))
    return f'<span class="t {kind}" tabindex="0" data-t="{packed}">{html.escape(text)}</span>'


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _legend(base: float, unit: str) -> str:
    steps = [step / math.log2(base) for step in _STEPS_BITS]
    names = [f"below {steps[0]:.3g}", *(f"from {step:.3g}" for step in steps)]
    marks = " ".join(f'<span class="t s{i}">&nbsp;{name}&nbsp;</span>' for i, name in enumerate(names))
    hint = "Point at a token for its rank, entropy and alternatives."
    return f'<p class="legend">Surprisal in {unit}: {marks}. {hint}</p>'


def _curve(tokens: list[TokenScore], unit: str) -> str:
    """The surprisal along the text, averaged over stretches so that the line has at most 400 points."""
    values = [t.surprisal for t in tokens if t.surprisal is not None and math.isfinite(t.surprisal)]
    if len(values) < 2:
        return ""
    stretch = -(-len(values) // 400)
    means = [
        sum(part) / len(part) for part in (values[i : i + stretch] for i in range(0, len(values), stretch))
    ]
    top = max(means) or 1.0
    points = " L".join(
        f"{40 + 750 * i / max(1, len(means) - 1):.1f},{170 - 150 * mean / top:.1f}"
        for i, mean in enumerate(means)
    )
    label = f"surprisal, {unit}" + (f", means of {stretch} tokens" if stretch > 1 else "")
    return (
        f'<svg viewBox="0 0 800 190" role="img" aria-label="{label}">'
        '<line x1="40" y1="170" x2="790" y2="170"/><line x1="40" y1="20" x2="40" y2="170"/>'
        f'<text x="4" y="24">{top:.1f}</text><text x="4" y="174">0</text>'
        f'<text x="44" y="186">{label}</text><path d="M{points}"/></svg>'
    )
