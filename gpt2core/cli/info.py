"""`gpt2core info`: what a checkpoint is, without reading its weights."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from gpt2core.cli.command import Command
from gpt2core.cli.console import (
    checkpoint_options,
    find,
    format_nbytes,
    json_option,
    options,
    write_json,
    write_table,
)


@click.command(
    cls=Command,
    short_help="Describe a checkpoint.",
    examples=("gpt2core info demo", "gpt2core info openai-community/gpt2 --offline --json"),
)
@click.argument("model", default="demo")
@options(*checkpoint_options)
@click.option("--strict", is_flag=True, help="Refuse a config.json with fields that are not known.")
@options(json_option)
def info(model: str, revision: str | None, offline: bool, strict: bool, as_json: bool) -> None:
    """Describe MODEL: the demo model, a folder, or a model's id on the hub."""
    from gpt2core._json import read_json_object
    from gpt2core.backends import run_precision
    from gpt2core.checkpoint.folder import read_storage
    from gpt2core.checkpoint.open import Source, locate
    from gpt2core.config import unread_fields
    from gpt2core.loading import read_tokenizer_if_any

    folder = find(model, revision=revision, offline=offline)
    located = locate(Source(folder, local_files_only=offline))
    config, storage = read_storage(located.base, strict=strict)
    tokenizer, missing = read_tokenizer_if_any(located.tokenizer)
    document = {
        "model": model,
        "folder": str(folder),
        "base": str(located.base),
        "adapter": None if located.adapter is None else str(located.adapter),
        "config": dataclasses.asdict(config),
        "unread_fields": unread_fields(read_json_object(located.base / "config.json")),
        "precision": storage.precision,
        "group_size": storage.group_size,
        "backends": run_precision(storage.precision),
        "parameters": config.parameters,
        "float32_nbytes": 4 * config.parameters,
        "cache_nbytes_per_sequence": config.cache_nbytes(1, config.n_positions),
        "tokenizer": {"missing": missing}
        if tokenizer is None
        else {"vocab_size": tokenizer.vocab_size, "special_ids": sorted(tokenizer.special_ids)},
        "files": _files(folder),
    }
    if as_json:
        write_json(document)
    else:
        write_table(_rows(document))


def _files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def _rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    from gpt2core.config import unread_text

    config, tokenizer = document["config"], document["tokenizer"]
    parameters = document["parameters"]
    cache_nbytes = document["cache_nbytes_per_sequence"]
    rows: list[tuple[str, ...]] = [
        ("model", document["model"]),
        ("folder", document["folder"]),
        *([("adapter of", document["base"])] if document["base"] != document["folder"] else ()),
        ("parameters", f"{parameters:,} ({format_nbytes(document['float32_nbytes'])} as float32)"),
        ("precision", _precision(document)),
        (
            "KV cache",
            f"{format_nbytes(cache_nbytes)} per sequence of {config['n_positions']} tokens, float32",
        ),
        ("tied head", "yes" if config["tie_word_embeddings"] else "no"),
        ("tokenizer", _tokenizer_text(tokenizer)),
    ]
    rows += [("config", ""), *((f"  {name}", _shown(value)) for name, value in config.items())]
    if document["unread_fields"]:
        rows.append(("not read", unread_text(document["unread_fields"])))
    rows += [("files", ""), *((f"  {name}", format_nbytes(size)) for name, size in document["files"].items())]
    return rows


def _tokenizer_text(tokenizer: dict[str, Any]) -> str:
    if "missing" in tokenizer:
        return f"none, only token ids can be used: {tokenizer['missing']}"
    return f"{tokenizer['vocab_size']} tokens, {len(tokenizer['special_ids'])} of them special"


def _precision(document: dict[str, Any]) -> str:
    groups = f", groups of {document['group_size']}" if document["group_size"] else ""
    return f"{document['precision']}{groups}; runs on {', '.join(document['backends'])}"


def _shown(value: object) -> str:
    match value:
        case None | ():
            return "-"
        case bool():
            return "yes" if value else "no"
        case tuple():
            return ", ".join(map(str, value))
    return str(value)
