"""What a shell offers for the value of an option."""

import click
from click.shell_completion import CompletionItem


def _names(choices: dict[str, str], incomplete: str) -> list[CompletionItem]:
    before, comma, last = incomplete.rpartition(",")  # `--backends numpy,to`
    return [
        CompletionItem(f"{before}{comma}{name}", help=about)
        for name, about in choices.items()
        if name.startswith(last)
    ]


def backend_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The engines, with what is missing for those that cannot run here."""
    from gpt2core.backends import available

    names = {} if param.name == "backends" else {"auto": "the fastest here"}
    found = available(load_plugins=False).values()
    return _names(names | {one.name: one.reason or f"version {one.version}" for one in found}, incomplete)


def precision_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The precisions."""
    from gpt2core.backends import PRECISIONS

    return _names(dict.fromkeys(("auto", *PRECISIONS), ""), incomplete)


def model_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`demo`, or a folder."""
    return [*_names({"demo": "bundled"}, incomplete), CompletionItem(incomplete, type="dir")]
