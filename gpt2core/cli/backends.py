"""`gpt2core backends`: the engines that can compute here, and which one `--backend auto` takes."""

from contextlib import suppress

import click

from gpt2core.cli.command import Command
from gpt2core.cli.console import json_option, one_line, write, write_json, write_table


@click.command(
    cls=Command,
    short_help="List the engines and what `auto` would choose.",
    examples=("gpt2core backends", "gpt2core backends --threads 2 --json"),
)
@click.option("--threads", type=click.IntRange(min=1), help="What `auto` would choose with so many.")
@json_option
def backends(threads: int | None, as_json: bool) -> None:
    """List the engines, how to install those that are missing, and which one `auto` would choose.

    `gpt2core bench recommend` measures which one is the fastest here, and `auto` takes that. Where
    GPT2CORE_BACKEND names no engine there is no choice to show; a line says so.
    """
    from gpt2core.backends import available, choose
    from gpt2core.checkpoint.open import Source, read_config, resolve
    from gpt2core.config import ModelConfig
    from gpt2core.errors import BackendUnavailableError, CheckpointError

    engines = available().values()
    models = {"openai-community/gpt2": ModelConfig()}
    with suppress(CheckpointError):  # an installation without the demo model
        models = {"demo": read_config(resolve(Source("demo"))), **models}
    auto: dict[str, tuple[str, str]] = {}
    unknown = ""
    try:
        auto = {model: choose(config, threads=threads) for model, config in models.items()}
    except BackendUnavailableError as error:  # the list below is what helps then
        unknown = one_line(str(error))
    if as_json:
        choices = {model: auto.get(model, (None, unknown)) for model in models}
        write_json(
            {
                "backends": [
                    {"name": e.name, "available": e.available, "version": e.version, "reason": e.reason}
                    for e in engines
                ],
                "auto": {model: {"backend": name, "why": why} for model, (name, why) in choices.items()},
            }
        )
        return
    write_table(
        [
            ("backend", "version", "status"),
            *((e.name, e.version or "-", "available" if e.available else e.reason) for e in engines),
        ]
    )
    write("\n")
    if unknown:
        write(f"auto has no choice: {unknown}\n")
        return
    write_table([("model", "auto", "why"), *((model, name, why) for model, (name, why) in auto.items())])
