"""Backends with planted faults, for `gpt2core verify`: factories that its worker imports by name."""

import os
import time
from dataclasses import replace

import numpy as np

from gpt2core.backends.numpy.backend import NumpyBackend


def perturbed_mlp(weights, **options):
    """Layer 1's MLP is wrong by a little."""
    block = weights.blocks[1]
    wrong = (block.mlp_c_proj.weight * 1.01).astype(np.float32)
    block = replace(block, mlp_c_proj=replace(block.mlp_c_proj, weight=wrong))
    return NumpyBackend(replace(weights, blocks=(weights.blocks[0], block, *weights.blocks[2:])), **options)


def perturbed_attention(weights, **options):
    """Layer 2's queries, keys and values are wrong by a little."""
    block = weights.blocks[2]
    wrong = (block.c_attn.weight * 1.01).astype(np.float32)
    block = replace(block, c_attn=replace(block.c_attn, weight=wrong))
    return NumpyBackend(replace(weights, blocks=(*weights.blocks[:2], block, *weights.blocks[3:])), **options)


def wrong_scale(weights, **options):
    """In int8 layer 1's MLP has every scale of its second half half as large."""
    block = weights.blocks[1]
    matrix = block.mlp_c_proj.weight
    half = np.arange(len(matrix.scale)) < len(matrix.scale) // 2
    wrong = replace(matrix, scale=np.where(half, matrix.scale, matrix.scale / 2))
    block = replace(block, mlp_c_proj=replace(block.mlp_c_proj, weight=wrong))
    return NumpyBackend(replace(weights, blocks=(weights.blocks[0], block, *weights.blocks[2:])), **options)


wrong_scale.precisions = ("float32", "int8")


class Wrapped:
    """A sound backend without a trace; what derives from it spoils one thing."""

    name = "wrapped"

    def __init__(self, weights, **options):
        self._inner = NumpyBackend(weights, **options)
        self.config = self._inner.config

    def new_cache(self, slots, capacity):
        return self._inner.new_cache(slots, capacity)

    def forward(self, batch, cache):
        return self._inner.forward(batch, cache)

    def close(self):
        self._inner.close()


class NotFinite(Wrapped):
    """NaN from position 20 on."""

    def forward(self, batch, cache):
        logits = super().forward(batch, cache)
        logits[batch.positions[batch.logits_at] >= 20] = np.nan
        return logits


class WrongInBatches(Wrapped):
    """Right for one row; with several, each row gets its neighbour's logits."""

    def forward(self, batch, cache):
        logits = super().forward(batch, cache)
        return np.roll(logits, 1, axis=0) if len(batch.lengths) > 1 else logits


class WrongShape(Wrapped):
    def forward(self, batch, cache):
        return super().forward(batch, cache)[:, :-1]


class Float64(Wrapped):
    def forward(self, batch, cache):
        return super().forward(batch, cache).astype(np.float64)


class Raising(Wrapped):
    def forward(self, batch, cache):
        raise ValueError("no such luck")


class Crashing(Wrapped):
    def forward(self, batch, cache):
        print("about to crash", flush=True)
        os._exit(9)


class Killed(Wrapped):
    def forward(self, batch, cache):
        os.kill(os.getpid(), 9)


class Hanging(Wrapped):
    def forward(self, batch, cache):
        time.sleep(600)


class OtherDraws(Wrapped):
    """Sound while single positions are compared; in the texts, one token in a hundred is another."""

    def forward(self, batch, cache):
        logits = super().forward(batch, cache)
        if len(batch.lengths) > 8:  # no comparison of logits has more rows
            logits[:, 7] += 3
        return logits
