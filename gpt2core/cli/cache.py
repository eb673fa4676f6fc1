"""`gpt2core cache`: what the user's cache folder holds, and how to be rid of it."""

import shutil
from pathlib import Path

import click

from gpt2core.cli.command import Command
from gpt2core.cli.console import format_nbytes, json_option, write, write_json, write_table

PARTS = {
    "rounded": "models rounded to fewer bits when they were loaded",
    "native": "the native backend's compiled kernels",
    "jax": "JAX's compiled steps",
    "recommended": "what `bench recommend` measured",
    "bench": "what benchmarks have prepared",
    "chat": "the lines of earlier chats",
}
"""Folders of the cache, and what is in them."""


@click.command(
    cls=Command,
    short_help="Show what is kept in the user's cache, or remove it.",
    examples=("gpt2core cache", "gpt2core cache --clear rounded", "gpt2core cache --clear all"),
)
@click.option(
    "--clear",
    metavar="PART",
    type=click.Choice([*PARTS, "all"]),
    multiple=True,
    help=f"Remove {', '.join(PARTS)} or all; repeatable.",
)
@json_option
def cache(clear: tuple[str, ...], as_json: bool) -> None:
    """Show what gpt2core keeps in the user's cache folder, part by part; all of it is made again when needed.

    Models of the hub are not among it: `hf cache` shows those.
    """
    from gpt2core._files import cache_folder

    for part in PARTS if "all" in clear else clear:
        shutil.rmtree(cache_folder(part), ignore_errors=True)
        if cache_folder(part).exists():
            raise OSError(f"{cache_folder(part)} cannot be removed; look at its owner and permissions")
    sizes = {part: _nbytes(cache_folder(part)) for part in PARTS}
    if as_json:
        write_json({"folder": str(cache_folder("")), "nbytes": sizes})
        return
    write_table([(part, format_nbytes(sizes[part]), what) for part, what in PARTS.items()])
    write(f"\n{cache_folder('')}\n")


def _nbytes(folder: Path) -> int:
    """Bytes of all files; those that vanish meanwhile count as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total
