"""Run a command in a terminal of 80 columns and write what it prints, when it prints it, as an animated SVG.

    python scripts/record_terminal.py docs/terminal.svg -- gpt2core generate "Once upon a time" --seed 7

The picture plays once, at the speed of the recording. Where animations are off, it shows the whole output.
Nothing in it is fetched from elsewhere. Needs a POSIX system.
"""

import os
import pty
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

COLUMNS: Final = 80
TYPING_S: Final = 0.03  # for each character of the command, which nobody typed
CELL_WIDTH, LINE_HEIGHT, FONT_SIZE, MARGIN = 8.4, 20, 14, 16
HEADER_HEIGHT: Final = 30
FONT: Final = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
INK, PROMPT, PAPER, DOTS = "#e6edf3", "#7ee787", "#0d1117", ("#ff5f57", "#febc2e", "#28c840")
STATUS_LINE: Final = re.compile(r"[^\n]*\r(?!\n)|\x1b\[[0-9;?]*[A-Za-z]")
"""What a progress line leaves behind: text that a carriage return takes back, and escape sequences."""


@dataclass(frozen=True)
class Run:
    """Characters that appeared together."""

    line: int
    column: int
    text: str
    shown_s: float
    color: str = INK


def record(command: list[str]) -> list[tuple[float, str]]:
    """Run a command in a pseudo-terminal: what it printed, with the seconds after its start.

    Raises:
        SystemExit: the command failed; its output is the message.
    """
    started_s = time.monotonic()
    terminal, its_end = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=its_end, env=environment)
    os.close(its_end)
    pieces = []
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        pieces.append((time.monotonic() - started_s, piece))
    os.close(terminal)
    code = process.wait()
    text = b"".join(piece for _, piece in pieces).decode()
    if code != 0:
        raise SystemExit(f"{shlex.join(command)} ended with {code}:\n{text}")
    return [(shown_s, piece.decode()) for shown_s, piece in pieces]


def lay_out(command: list[str], pieces: list[tuple[float, str]]) -> list[Run]:
    """Where on the screen each piece stands, below the command that is typed."""
    runs = [Run(0, 0, "$", 0, PROMPT)]
    line, column = 0, 2

    def put(text: str, shown_s: float) -> None:
        nonlocal line, column
        for part in re.findall(r"\n|[^\n]+", text):
            if part == "\n":
                line, column = line + 1, 0
                continue
            while part:
                if column == COLUMNS:
                    line, column = line + 1, 0
                fitting, part = part[: COLUMNS - column], part[COLUMNS - column :]
                runs.append(Run(line, column, fitting, shown_s))
                column += len(fitting)

    typed = shlex.join(command).replace("'", '"')
    for i, character in enumerate(typed):
        put(character, i * TYPING_S)
    begun_s = len(typed) * TYPING_S
    put("\n", begun_s)
    for shown_s, piece in pieces:
        put(STATUS_LINE.sub("", piece).replace("\r\n", "\n"), begun_s + shown_s)
    return runs


def svg(runs: list[Run], title: str) -> str:
    """The runs as a picture."""
    width = COLUMNS * CELL_WIDTH + 2 * MARGIN
    height = HEADER_HEIGHT + (max(run.line for run in runs) + 1) * LINE_HEIGHT + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>text{{font:{FONT_SIZE}px {FONT};white-space:pre;animation:hide steps(1,end) backwards}}"
        "@keyframes hide{from{opacity:0}}@media(prefers-reduced-motion){text{animation:none}}</style>",
        f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>',
    ]
    for i, color in enumerate(DOTS):
        lines.append(f'<circle cx="{MARGIN + 4 + 18 * i}" cy="17" r="5" fill="{color}"/>')
    for run in runs:
        if run.text.isspace():
            continue
        x = MARGIN + run.column * CELL_WIDTH
        y = HEADER_HEIGHT + run.line * LINE_HEIGHT + FONT_SIZE
        lines.append(
            f'<text x="{x:g}" y="{y:g}" textLength="{len(run.text) * CELL_WIDTH:g}" xml:space="preserve" '
            f'lengthAdjust="spacingAndGlyphs" fill="{run.color}" '
            f'style="animation-duration:{run.shown_s:.2f}s">{escape(run.text)}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def main(arguments: list[str]) -> None:
    """`PICTURE -- COMMAND ARGUMENT...`."""
    if len(arguments) < 3 or arguments[1] != "--":
        raise SystemExit("usage: record_terminal.py PICTURE.svg -- COMMAND [ARGUMENT...]")
    picture, _, *command = arguments
    Path(picture).write_text(svg(lay_out(command, record(command)), shlex.join(command)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
