"""The native kernels' inner loops keep their sums in registers, which only the assembly shows."""

import re

import bits
import pytest
from native_builds import driver

PRODUCTS = {
    "product_float32": r"\tv?fmla|\tvfmadd",
    "product_bfloat16": r"\tv?fmla|\tvfmadd",
    "product_int8": r"\tsdot|\tvpmaddubsw",
    "product_int4": r"\tsdot|\tvpmaddubsw",
    "attend_bfloat16": r"\tv?fmla|\tvfmadd",
}
TARGETS = {"aarch64, dot products": (24, 0.0), "gcc, AVX2, FMA": (12, 0.34)}
"""Products of a whole tile's step, stores for each that are allowed: with 16 registers one or two sums of
int4 may lie in memory."""


def inner_loops(assembly, function):
    """The lines of each loop of a function that has no other loop in it."""
    body = assembly[assembly.index(f"\n{function}:") :]
    body = body[: body.index(".size")]
    for block in re.split(r"\n(?=\.L\w+:)", body):
        label = re.match(r"\.L\w+", block)
        back = label and re.search(rf"\n\t[bj]\S*\t{re.escape(label.group())}\b", block)
        if back:
            yield block[: back.end()]


@pytest.mark.parametrize("build", TARGETS)
def test_sums_stay_in_registers_in_each_inner_loop_of_a_whole_tile(build):
    products, allowed = TARGETS[build]
    (path,) = driver(*bits.BUILDS[build]).parent.glob("*.s")
    assembly = path.read_text()
    for function, pattern in PRODUCTS.items():
        whole = [
            loop for loop in inner_loops(assembly, function) if len(re.findall(pattern, loop)) >= products
        ]
        assert whole, f"{function} has no loop with {products} products"
        for loop in whole:
            stores = len(re.findall(r"\n\t(?:st[rp]\tq|v?mov\S+\t%\wmm\d+, \S*\()", loop))
            count = len(re.findall(pattern, loop))
            assert stores <= allowed * count, f"{function}: {stores} stores for {count} products\n{loop}"
