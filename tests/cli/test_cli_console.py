"""The parts that the commands print with: sizes and strict numbers."""

import math

import pytest

from gpt2core.cli import console


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_951, "1.0 MB"),
     (498_000_000, "498.0 MB"), (6_500_000_000, "6.5 GB"), (3 * 10**15, "3000.0 TB")],
)  # fmt: skip
def test_format_nbytes(nbytes, text):
    assert console.format_nbytes(nbytes) == text


@pytest.mark.parametrize(("value", "want"), [(1.5, 1.5), (None, None), (math.inf, None), (math.nan, None)])
def test_finite_keeps_json_strict(value, want):
    assert console.finite(value) == want
