"""The fields of `SamplingParams` as options; only `echo` is left to the command, whose output it is about."""

import re
from typing import Any

import click
from click.core import ParameterSource

from gpt2core.cli.constraint_options import constraint_options, read_constraint
from gpt2core.errors import RequestError, in_short

text_options = (
    click.option(
        "-n",
        "--max-new-tokens",
        metavar="N",
        type=int,
        help="How many tokens at most.  [default: 100, or as far as the context reaches]",
    ),
    click.option("--min-new-tokens", metavar="N", type=int, default=0, help="No end before so many tokens."),
    click.option("--max-length", metavar="N", type=int, help="Tokens at most, those of the prompt included."),
    click.option(
        "-t",
        "--temperature",
        type=float,
        default=0.8,
        show_default=True,
        help="0: the likeliest token.",
    ),
    click.option("--top-k", metavar="K", type=int, help="Only the K likeliest tokens."),
    click.option("--top-p", metavar="P", type=float, default=1.0, help="Only the likeliest that sum to P."),
    click.option("--min-p", metavar="P", type=float, default=0.0, help="None below P times the likeliest."),
    click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: less of what occurred."),
    click.option("--presence-penalty", type=float, default=0.0, help="Taken from tokens of the text."),
    click.option("--frequency-penalty", type=float, default=0.0, help="The same, times their number."),
    click.option(
        "--no-repeat-ngram-size", metavar="N", type=int, default=0, help="No N tokens occur twice in a row."
    ),
    click.option(
        "--logit-bias", metavar="ID=BIAS", multiple=True, help="Added to a token's logit; repeatable."
    ),
    click.option("--stop", metavar="TEXT", multiple=True, help="End before this text; repeatable."),
    click.option(
        "--stop-token-id",
        "stop_token_ids",
        metavar="ID",
        type=int,
        multiple=True,
        help="End at this token; repeatable.",
    ),
    click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token."),
    click.option("-s", "--seed", type=int, help="The same seed gives the same text.  [default: a new one]"),
    *constraint_options,
)
"""Of one text, in the order of --help."""

sampling_options = (
    *text_options,
    click.option("--n", metavar="N", type=int, default=1, show_default=True, help="How many continuations."),
    click.option(
        "--logprobs",
        metavar="K",
        type=int,
        help="Also each token's log probability, and the K likeliest tokens.",
    ),
    click.option(
        "--overflow",
        type=click.Choice(["error", "truncate", "slide"]),
        default="error",
        show_default=True,
        help="Beyond the context: leave out the prompt's beginning, or go on with the newest half.",
    ),
    click.option(
        "--num-beams",
        metavar="N",
        type=int,
        default=1,
        help="Search for the likeliest text with N beams; draws nothing.",
    ),
    click.option("--length-penalty", type=float, default=1.0, help="Of beams; above 0: rather longer texts."),
    click.option(
        "--early-stopping",
        type=click.Choice(["no", "yes", "never"]),
        default="no",
        callback=lambda context, option, value: {"no": False, "yes": True}.get(value, value),
        help="Of beams: yes ends with N texts, never looks for better ones to the end.",
    ),
)
"""Of `generate`: all of them."""


def to_fields(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of `SamplingParams` that these options mean.

    Raises:
        RequestError: a --logit-bias is not ID=BIAS, or a file cannot be read.
    """
    fields = {**read_constraint(given), "logit_bias": dict(map(_bias, given["logit_bias"]))}
    context = click.get_current_context()
    if (
        given.get("num_beams", 1) > 1
        and context.get_parameter_source("temperature") is ParameterSource.DEFAULT
    ):
        fields["temperature"] = 0.0  # the default is for drawing
    return fields


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    if not re.fullmatch(r"\s*\d+\s*", token_id):
        raise RequestError(f"--logit-bias is {in_short(text)}; give a token id and a number, as 50256=-100")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise RequestError(
            f"--logit-bias is {in_short(text)}; give a token id and a number, as 50256=-100"
        ) from None
