"""A model's weights in the layout of the C kernels, as structures that C reads.

The structures have the fields of those in `kernels/products.h` and `kernels/gpt2.c`, in the same order, which
`library.py` checks when the kernels are loaded.
"""

# V vocabulary, D width, I inputs, O outputs, G groups of inputs

import ctypes
import mmap
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p
from typing import Any, Final

import numpy as np

from gpt2core.backends._shared.memory import giving_back, private_memory
from gpt2core.encodings import BFloat16, Int4, Int8, unpack_nibbles
from gpt2core.errors import BackendUnavailableError
from gpt2core.token_scores import TokenQuery, TokenScores
from gpt2core.weights import LINEAR, Block, LayerNorm, Linear, Matrix, Table, Weights, named_arrays

_FLOAT32, _BFLOAT16, _INT8, _INT4 = range(4)
_ALIGNMENT: Final = 64  # bytes; a line of the processor's cache
_MOST_INT8_INPUTS: Final = 66_000  # more of 255 * 127 would not fit in 32 bits


class CMatrix(Structure):
    """`Matrix` of products.h."""

    _fields_ = [
        ("kind", c_int),
        ("group", c_int),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("values", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
    ]


class CLinear(Structure):
    """`Linear` of gpt2.c."""

    _fields_ = [("weight", CMatrix), ("bias", c_void_p)]


class CNorm(Structure):
    """`Norm` of gpt2.c."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class CBlock(Structure):
    """`Block` of gpt2.c."""

    _fields_ = [
        ("ln_1", CNorm),
        ("ln_2", CNorm),
        ("c_attn", CLinear),
        ("attn_c_proj", CLinear),
        ("c_fc", CLinear),
        ("mlp_c_proj", CLinear),
        ("attention_scale", c_float),
    ]


class CModel(Structure):
    """`Model` of gpt2.c."""

    _fields_ = [
        *((name, c_int64) for name in ("layers", "heads", "width", "mlp", "vocabulary")),
        ("epsilon", c_float),
        *((name, c_int) for name in ("activation", "table_kind", "bfloat16_cache")),
        *((name, c_void_p) for name in ("wte", "wte_scale", "wpe")),
        ("blocks", POINTER(CBlock)),
        ("ln_f", CNorm),
        ("head", CMatrix),
    ]


class CCache(Structure):
    """`Cache` of gpt2.c."""

    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("slots", c_int64), ("capacity", c_int64)]


class CTrace(Structure):
    """`Trace` of gpt2.c."""

    _fields_ = [("hidden_states", c_void_p), ("attentions", c_void_p), ("tokens", c_int64)]


class CScores(Structure):
    """`Scores` of scores.h."""

    _fields_ = [
        *((name, c_int64) for name in ("first", "top")),
        *((name, c_void_p) for name in ("targets", "members", "ranks", "logprobs", "entropies")),
        *((name, c_void_p) for name in ("member_logprobs", "top_ids", "top_logprobs")),
    ]


def point_to(query: TokenQuery, scores: TokenScores, first: int) -> CScores:
    """A structure that names the query's arrays, and those for its answers; they must live as long as it."""
    asked = CScores(first, scores.top_ids.shape[1])
    arrays = {"targets": query.targets, "members": query.members}
    for name, array in (*arrays.items(), *((field, getattr(scores, field)) for field in _SCORES)):
        if array is not None:
            assert array.flags.c_contiguous
            setattr(asked, name, array.ctypes.data)
    return asked


_SCORES: Final = ("ranks", "logprobs", "entropies", "member_logprobs", "top_ids", "top_logprobs")


class PackedModel:
    """The weights, packed; they live as long as this does.

    Args:
        weights: float32 or quantized. Matrices are copied; the table of embeddings is read where it lies.
        library: the compiled kernels.
        threads: how many matrices are packed at once.
    """

    def __init__(self, weights: Weights, library: Any, threads: int = 1) -> None:
        self._library, self._wide = library, library.strip_width()
        self._kept: list[Any] = []
        self._to_pack: list[Callable[[], object]] = []
        self._bare: CModel | None = None
        self._arena = _Arena(sum(self._packed_nbytes(m) for m in _matrices(weights)))
        config = weights.config
        with giving_back(array for _, array in weights.named()):
            blocks = [self._block(block, config.attention_scale(i)) for i, block in enumerate(weights.blocks)]
            self._blocks = (CBlock * config.n_layer)(*blocks)
            head = self._matrix(weights.lm_head.T)
            self._pack(threads)
        kind, wte, wte_scale = self._table(weights.wte)
        self.nbytes = self._arena.nbytes
        self.model = CModel(
            *(config.n_layer, config.n_head, config.n_embd, config.mlp_dim, config.vocab_size),
            config.layer_norm_epsilon,
            library.activation_named(config.activation_function.encode()),
            *(kind, _small_cache(weights)),
            *(wte, wte_scale, self._address(np.ascontiguousarray(weights.wpe, np.float32))),
            self._blocks,
            self._norm(weights.ln_f),
            head,
        )

    def without_head(self) -> CModel:
        """The model with an identity for its head: its logits are the hidden states that the head reads."""
        if self._bare is None:
            width = self.model.width
            identity, arena = np.eye(width, dtype=np.float32), self._arena
            self._arena = self._kept_arena = _Arena(self._packed_nbytes(identity))
            head, self._arena = self._matrix(identity), arena
            self._pack(threads=1)
            self._bare = CModel.from_buffer_copy(self.model)
            self._bare.vocabulary, self._bare.head = width, head
        return self._bare

    def _address(self, array: np.ndarray) -> int:
        self._kept.append(array)
        return array.ctypes.data

    def _padded(self, vector: np.ndarray) -> int:
        """The address of a copy in whole strips."""
        size = _whole(len(vector), self._wide)
        return self._address(np.pad(np.asarray(vector, np.float32), (0, size - len(vector))))

    def _block(self, block: Block, attention_scale: float) -> CBlock:
        return CBlock(
            self._norm(block.ln_1),
            self._norm(block.ln_2),
            self._linear(block.c_attn),
            self._linear(block.attn_c_proj),
            self._linear(block.c_fc),
            self._linear(block.mlp_c_proj),
            attention_scale,
        )

    def _norm(self, norm: LayerNorm) -> CNorm:
        return CNorm(self._padded(norm.weight), self._padded(norm.bias))

    def _linear(self, linear: Linear) -> CLinear:
        return CLinear(self._matrix(linear.weight), self._padded(linear.bias))

    def _table(self, table: Table) -> tuple[int, int, int | None]:
        """Kind and addresses of a table's rows and of their scales."""
        values, *scales = (np.ascontiguousarray(array) for _, array in named_arrays("", table))
        return _layout(table)[0], self._address(values), self._address(scales[0]) if scales else None

    def _packed_nbytes(self, matrix: Matrix) -> int:
        kind, inputs, bits = _layout(matrix)
        if kind == _INT8 and inputs > _MOST_INT8_INPUTS:
            raise BackendUnavailableError(
                f"the native backend multiplies int8 matrices of up to {_MOST_INT8_INPUTS} inputs, not "
                f"{inputs}; use precision='float32' or backend='numpy'"
            )
        return _whole(inputs * _whole(matrix.shape[1], self._wide) * bits // 8, _ALIGNMENT)

    def _pack(self, threads: int) -> None:
        """Do what `_matrix` has left to do; C works outside the interpreter's lock."""
        from concurrent.futures import ThreadPoolExecutor  # milliseconds that only those who load spend

        largest_first = self._to_pack[::-1]  # the head comes last
        if threads == 1:
            for pack in largest_first:
                pack()
        else:
            with ThreadPoolExecutor(threads, "gpt2core-packing") as pool:
                for done in [pool.submit(pack) for pack in largest_first]:
                    done.result()
        self._to_pack.clear()

    def _matrix(self, matrix: Matrix) -> CMatrix:
        """Lay out a matrix (I, O), of any strides, which `_pack` then fills in."""
        kind, padded, _ = _layout(matrix)
        inputs, outputs = matrix.shape
        to = self._arena.take(self._packed_nbytes(matrix))
        library, later, group, scale, zero = self._library, self._to_pack.append, padded, None, None
        match matrix:
            case Int4():
                packed = np.ascontiguousarray(matrix.packed)
                later(lambda: library.pack_int4(packed.ctypes.data, padded, outputs, to))
                zeros = unpack_nibbles(matrix.zero)[:, : matrix.scale.shape[1]].astype(np.float32)
                group, scale, zero = matrix.group_size, self._per_group(matrix.scale), self._per_group(zeros)
            case Int8():
                int8 = matrix.values
                later(lambda: library.pack_int8(*_strided(int8), inputs, padded, outputs, to))
                scale = self._padded(matrix.scale)
            case BFloat16():
                bits = matrix.bits
                later(lambda: library.pack_bfloat16(*_strided(bits), inputs, outputs, to))
            case _:
                float32 = matrix
                later(lambda: library.pack_float32(*_strided(float32), inputs, outputs, to))
        return CMatrix(kind, group, padded, outputs, to, scale, zero)

    def _per_group(self, numbers: np.ndarray) -> int:
        """(O, G) as (strips, G, outputs of a strip)."""
        outputs, groups = numbers.shape
        padded = np.zeros((_whole(outputs, self._wide), groups), np.float32)
        padded[:outputs] = numbers
        strips = padded.reshape(-1, self._wide, groups).transpose(0, 2, 1)
        return self._address(np.ascontiguousarray(strips))


class _Arena:
    """Zeroed memory in huge pages where the system has them: fewer addresses to look up while reading."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self._used = nbytes, 0
        self._memory = private_memory(nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def take(self, nbytes: int) -> int:
        self._used += nbytes
        assert self._used <= self.nbytes
        return self._start + self._used - nbytes


def _matrices(weights: Weights) -> Iterator[Matrix]:
    for block in weights.blocks:
        yield from (getattr(block, field).weight for field in LINEAR)
    yield weights.lm_head.T


def _layout(matrix: Matrix) -> tuple[int, int, int]:
    """A matrix's kind, its inputs when it is packed, and their bits."""
    inputs = matrix.shape[0]
    match matrix:
        case Int4():
            return _INT4, 2 * matrix.packed.shape[1], 4
        case Int8():
            return _INT8, _whole(inputs, 8), 8
        case BFloat16():
            return _BFLOAT16, inputs, 16
    return _FLOAT32, inputs, 32


def _strided(array: np.ndarray) -> tuple[int, int, int]:
    """Address and strides in elements of (I, O)."""
    first, second = (stride // array.itemsize for stride in array.strides)
    return array.ctypes.data, first, second


def _small_cache(weights: Weights) -> int:
    """Whether keys and values are kept in bfloat16: where the weights are rounded more than that anyway."""
    return int(weights.precision in ("int8", "int4"))


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit
