"""`gpt2core bench`: the comparison and the recommendation."""

from pathlib import Path
from typing import Any

import click

from gpt2core.cli.bench_comparison import (
    comparison_options,
    recommend_option,
    run_comparison,
    run_recommendation,
)
from gpt2core.cli.console import model_option, options


@click.command(short_help="Measure engines.")
@options(model_option, *comparison_options, recommend_option)
@click.option(
    "--precision", default="float32", show_default=True, help="Of the weights; several with commas."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench_results"))
@click.option("--timeout", "timeout_s", type=float, default=1800.0)
@click.option("--offline", is_flag=True)
@click.option("--report/--no-report", default=True)
@click.option("--revision")
@click.option("--json", "as_json", is_flag=True)
@click.option("--resume", is_flag=True)
@click.option("--force", is_flag=True)
def bench(recommend: bool, **given: Any) -> None:
    """Compare engines, or find the fastest."""
    if recommend:
        names = ("model", "threads", "precision", "timeout_s", "revision", "offline")
        run_recommendation(device="cpu", **{name: given[name] for name in names})
    else:
        run_comparison(**given)
