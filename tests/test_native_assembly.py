"""The native kernels' inner loops keep their sums in registers, which only the assembly shows."""

import re

import bits
import pytest
from native_builds import driver

FUSED = r"\tv?fmla|\tvfmadd"
WHOLE = r"\tsmmla|\tsdot|\tvpmaddubsw|vpdpbusd"
PRODUCTS = {
    "product_float32": FUSED,
    "product_bfloat16": FUSED,
    "product_int8": WHOLE,
    "product_int4": WHOLE,
    "attend_bfloat16": FUSED,
}
TARGETS = {
    "aarch64, matrix products": (24, 0.0, 0.0),
    "aarch64, dot products": (24, 0.0, 0.0),
    "gcc, AVX2, FMA": (12, 0.09, 0.34),
    "gcc, AVX-VNNI": (12, 0.09, 0.09),
    "clang, AVX-VNNI": (12, 0.17, 0.0),
}
"""Products of a whole tile's step, and stores for each that are allowed, of floats and of whole numbers: with
16 registers one or two sums may lie in memory."""


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
    products, *allowed = TARGETS[build]
    compiler, _, name = build.partition(", ")
    compiler, flags = bits.AARCH64.get(build) or (compiler, bits.X86[name])
    (path,) = driver(compiler, flags).parent.glob("*.s")
    assembly = path.read_text()
    for function, pattern in PRODUCTS.items():
        whole = [
            loop for loop in inner_loops(assembly, function) if len(re.findall(pattern, loop)) >= products
        ]
        assert whole, f"{function} has no loop with {products} products"
        for loop in whole:
            stores = len(re.findall(r"\n\t(?:st[rp]\tq|v?mov\S+\t%\wmm\d+, \S*\()", loop))
            count = len(re.findall(pattern, loop))
            assert stores <= allowed[pattern == WHOLE] * count, (
                f"{function}: {stores} stores for {count} products\n{loop}"
            )
