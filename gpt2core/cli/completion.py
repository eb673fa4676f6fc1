"""`gpt2core completion`: the script that lets a shell complete commands, options and values."""

from typing import Any

import click
from click.shell_completion import get_completion_class

from gpt2core.cli.command import Command
from gpt2core.cli.console import write

VARIABLE = "_GPT2CORE_COMPLETE"


@click.command(
    cls=Command,
    short_help="Print the script that lets a shell complete commands.",
    examples=(
        "gpt2core completion bash >> ~/.bashrc",
        "gpt2core completion zsh >> ~/.zshrc",
        "gpt2core completion fish > ~/.config/fish/completions/gpt2core.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands, options, backends and precisions in SHELL."""
    kind: Any = get_completion_class(shell)
    assert kind is not None
    program = context.find_root().command
    write(kind(program, {}, "gpt2core", VARIABLE).source() + "\n")
