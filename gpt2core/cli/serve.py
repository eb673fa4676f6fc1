"""`gpt2core serve`: an HTTP server."""

from pathlib import Path
from typing import Any

import click

from gpt2core.cli.command import Command
from gpt2core.cli.console import model_options, options, speculation_options
from gpt2core.errors import BackendUnavailableError, RequestError

PACKAGES = ("fastapi", "jinja2", "prometheus_client", "pydantic", "pydantic_settings", "starlette", "uvicorn")


@click.command(
    cls=Command,
    short_help="Run an HTTP server.",
    examples=(
        "gpt2core serve --model demo",
        "gpt2core serve --model demo --host 0.0.0.0 --api-key-file keys.txt --allowed-hosts api.example.org",
    ),
)
@options(*model_options, *speculation_options)
@click.option("--served-name", metavar="NAME", help="The model's name in the API.  [default: from --model]")
@click.option(
    "--chat-template", metavar="FILE|dialogpt|plain", help="How chats become prompts.  [default: the model's]"
)
@click.option("--host", metavar="ADDRESS", help="Where to listen.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="0 takes a free one.  [default: 8000]")
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the keys that requests must bring, one a line.",
)
@click.option("--insecure-no-auth", is_flag=True, help="Listen beyond this machine without a key.")
@click.option("--allowed-hosts", metavar="NAMES", help="Accepted Host names, with commas between.")
@click.option("--max-batch", metavar="N", type=click.IntRange(min=1), help="Texts at once.  [default: 32]")
@click.option("--max-queue", metavar="N", type=click.IntRange(min=0), help="Texts that wait.  [default: 64]")
@click.option("--deadline", "deadline_s", metavar="SECONDS", type=float, help="Per request.  [default: 120]")
@click.option("--drain", "drain_s", metavar="SECONDS", type=float, help="After SIGTERM.  [default: 30]")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="Least level logged.  [default: info]",
)
@click.pass_context
def serve(context: click.Context, /, **given: Any) -> None:
    """Serve a model over HTTP: its own API, OpenAI's completions, metrics and a playground page.

    Every option and limit is also an environment variable, GPT2CORE_ and its name (docs/serving.md).
    Requests are logged on stderr, one line of JSON each, without their text.
    """
    try:
        from pydantic import ValidationError

        from gpt2core.serve.server import run
        from gpt2core.serve.settings import Settings, describe_faults
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise BackendUnavailableError(
            f"the server needs the package {error.name}; install it with: pip install 'gpt2core[serve]'"
        ) from error
    default = click.core.ParameterSource.DEFAULT
    chosen = {name: value for name, value in given.items() if context.get_parameter_source(name) != default}
    try:
        settings = Settings(**chosen)
    except ValidationError as error:
        names = {str(option.name): option.opts[-1] for option in context.command.params}
        options = {name: names[name] for name in chosen}
        raise RequestError(describe_faults(error, options)) from None
    run(settings)
