"""What a command of this program is: its help ends with examples, and its errors speak of its own options.

The library's messages are in Python's spelling, `max_new_tokens=50`; a person who typed a command line reads
`--max-new-tokens 50`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import click

from gpt2core import foreign_names
from gpt2core.errors import Gpt2CoreError, did_you_mean

ELSEWHERE: Final = {"local_files_only": "offline", "timeout_s": "timeout", "allow_remote": "host"}
"""A name in Python -> the option's, where they differ by more than dashes."""
_CHOICE: Final = re.compile(r"'(.*)' is not one of ", re.DOTALL)
_STRING: Final = r"'[^']*'|\"[^\"]*\""
_VALUE: Final = rf"(?:{_STRING})(?: or (?:{_STRING}))*|\[[^\]]*\]|\{{[^}}]*\}}|[^\s,;:()'\"]+"
_FREE: Final = r"(?<![\w/.'\"-])"  # not a part of a path, a quotation or another name


class Command(click.Command):
    """A command.

    Args:
        examples: command lines, shown at the end of its help.
        *args, **options: as of `click.Command`.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; what is unknown is answered with what is meant."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            answer = _answer_unknown_option(error.option_name, self.params)
            if answer is None:
                raise
            message = f"No such option {error.option_name!r}; {answer}"
            raise click.NoSuchOption(error.option_name, message, ctx=ctx) from None
        except click.BadParameter as error:
            given = _CHOICE.match(error.message)
            if given is None or error.param is None or not isinstance(error.param.type, click.Choice):
                raise
            near = did_you_mean(given[1], map(str, error.param.type.choices))
            message = error.message.rstrip(".") + near
            raise click.BadParameter(message, ctx=ctx, param=error.param) from None

    def invoke(self, ctx: click.Context) -> Any:
        """As click does; the library's errors are put into the command line's spelling."""
        try:
            return super().invoke(ctx)
        except Gpt2CoreError as error:
            error.args = (respell(str(error), self.params),)
            raise


class Group(Command, click.Group):
    """A command that has commands."""


def _answer_unknown_option(option: str, params: Sequence[click.Parameter]) -> str | None:
    """What this command calls an option of another library, or of Python; None where it has no such."""
    name = option.lstrip("-").replace("-", "_")
    own = f"--{ELSEWHERE.get(name, name).replace('_', '-')}"
    if any(own in param.opts for param in params):
        return f"use {own}"
    answer = foreign_names.SAMPLING.get(name) or foreign_names.LOADING.get(name)
    if answer is None:
        return None
    named = re.findall(rf"{_FREE}([a-z_]+)=", answer)
    known = {param.name for param in params}
    return respell(answer, params) if all(ELSEWHERE.get(one, one) in known for one in named) else None


def respell(message: str, params: Sequence[click.Parameter]) -> str:
    """A message in the command line's spelling: `top_p=0.9` is `--top-p 0.9`, `force=True` is `--force`."""
    options = {
        str(param.name): max(param.opts, key=len)
        for param in params
        if isinstance(param, click.Option) and param.opts
    }
    options |= {python: options[own] for python, own in ELSEWHERE.items() if own in options}
    for name, option in options.items():
        message = re.sub(rf"{_FREE}{name}=({_VALUE})", _as_option(option), message)
        # Of a name that is also an English word only what is certainly the parameter.
        bare = rf"{_FREE}{name}(?![\w/.'\"=-])" if "_" in name else rf"^{name}(?= is |\[)"
        message = re.sub(bare, option, message)
    return message


def _as_option(option: str) -> Callable[[re.Match[str]], str]:
    def spell(match: re.Match[str]) -> str:
        value = match[1]
        if value == "True":
            return option
        if value[0] in "[{":
            value = value[1:-1].replace(": ", "=")
        return f"{option} {re.sub(_STRING, _for_a_shell, value)}"

    return spell


def _for_a_shell(quoted: re.Match[str]) -> str:
    """Without the quotes that a shell does not need."""
    return quoted[0] if " " in quoted[0] else quoted[0][1:-1]


def respell_warning(message: str) -> str:
    """`respell` for the command that runs now, if there is one."""
    context = click.get_current_context(silent=True)
    return message if context is None else respell(message, context.command.params)
