"""safetensors files: read by memory mapping, after the whole header was checked; written in one pass.

The format (https://huggingface.co/docs/safetensors): 8 bytes of little-endian header length, a JSON header of
`name -> dtype, shape, data_offsets`, the data.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import numpy as np

from gpt2core import _files
from gpt2core._json import check_no_pointer, parse_json_object, shown, shown_name
from gpt2core._shapes import Float32
from gpt2core.encodings import widen_bfloat16
from gpt2core.errors import CheckpointError

ITEM_NBYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
TORCH_DTYPES: Final = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64",
    "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "bool": "BOOL",
}  # fmt: skip
"""PyTorch's name of a dtype -> the file's."""
READABLE: Final = ("F32", "F16", "BF16", "F64")
"""The dtypes that weights may have; other tensors can only be ignored."""

# GPT-2 XL's header has 60 kB. The format allows 100 MB, but as objects JSON takes 30 times its text, and
# seconds to check.
MAX_HEADER_NBYTES: Final = 2_000_000
MAX_TENSORS: Final = 50_000
MAX_DIMENSIONS: Final = 8
STORED: Final = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F64": "<f8",
    "I8": "i1",
    "U8": "u1",
    "I32": "<i4",
}
_BLOCK: Final = 1 << 16  # elements; a block and its mask stay in the processor's cache


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies; `begin` and `end` count bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Described(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def dtype(self) -> str:
        """One of `ITEM_NBYTES`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...


class Tensors(Protocol):
    """Tensors under the names of a checkpoint: those of a file, or some in memory.

    The attributes are those of `SafetensorsFile`.
    """

    path: Path
    faulty: set[str]
    faults: list[str]

    @property
    def entries(self) -> Mapping[str, Described]:
        """The sound tensors by name."""
        ...

    def stored(self, name: str) -> np.ndarray:
        """A tensor as it is stored."""
        ...

    def float32(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor as a read-only float32 array."""
        ...


class SafetensorsFile:
    """One file, memory-mapped read-only; opening it allocates no more than its header takes.

    Attributes:
        path: the file.
        entries: the sound tensors by name.
        faulty: names of tensors that the header gets wrong or that are cut off.
        faults: what is wrong with them, and with the file's layout, one line each.
        metadata: of the header, as it stands there; None where there is none.

    Raises:
        CheckpointError: the file cannot be opened or its header cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, TensorEntry] = {}
        self.faulty: set[str] = set()
        self.faults: list[str] = []
        try:
            if not path.is_file():  # also keeps a pipe or a device from being opened
                raise CheckpointError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
            with path.open("rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                header = _read_header(path, file, nbytes)
                data_begin = file.tell()
                self._map = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file was cut after its size was read
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self.metadata = header.pop("__metadata__", None)
        cut: dict[str, int] = {}  # -> its end
        for name, value in header.items():
            entry = _parse_entry(value, data_begin)
            if isinstance(entry, TensorEntry) and entry.end > nbytes:
                self.faulty.add(name)
                cut[name] = entry.end
            elif isinstance(entry, TensorEntry):
                self.entries[name] = entry
            else:
                self.faulty.add(name)
                self.faults.append(f"tensor {shown_name(name)} {entry}")
        if len(cut) == 1:
            [(name, end)] = cut.items()
            self.faults.append(
                f"tensor {shown_name(name)} is truncated: it ends at byte {end}, the file at byte {nbytes}"
            )
        elif cut:
            self.faults.append(
                f"the file is truncated: it has {nbytes} bytes and its header promises {max(cut.values())}, "
                f"so {len(cut)} of {len(header)} tensors are cut off; download or convert it again"
            )
        self._check_layout(data_begin, nbytes)

    def _check_layout(self, data_begin: int, nbytes: int) -> None:
        """Find tensors that overlap and, where every tensor is known, bytes that belong to none."""
        covered, last = data_begin, ""
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin < covered and entry.end > entry.begin:
                self.faulty.add(name)
                self.faults.append(f"tensor {shown_name(name)} overlaps tensor {shown_name(last)}")
            elif entry.begin > covered and not self.faults:
                self.faults.append(
                    f"{entry.begin - covered} bytes before tensor {shown_name(name)} belong to none"
                )
            if entry.end > covered:
                covered, last = entry.end, name
        if covered < nbytes and not self.faults:
            self.faults.append(f"the last {nbytes - covered} bytes belong to no tensor")
        for name in self.faulty:
            self.entries.pop(name, None)

    def stored(self, name: str) -> np.ndarray:
        """A tensor as it is stored, bfloat16 as uint16: a read-only view of the mapped file where aligned."""
        entry = self.entries[name]
        array = np.frombuffer(self._map, STORED[entry.dtype], math.prod(entry.shape), entry.begin)
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array.reshape(entry.shape)

    def float32(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor as a read-only float32 array.

        A view of the mapped file where that holds float32 at an aligned place; else a converted copy. float16
        and bfloat16 convert exactly, float64 rounds.
        """
        entry = self.entries[name]
        count = math.prod(entry.shape)
        stored = np.frombuffer(self._map, STORED[entry.dtype], count, entry.begin)
        with np.errstate(all="ignore"):  # whoever wants finite numbers counts them afterwards
            if entry.dtype == "BF16":
                array = widen_bfloat16(stored)
            else:
                array = stored.astype(np.float32, copy=not stored.flags.aligned)
        array = array.reshape(entry.shape)
        array.flags.writeable = False
        return array


def count_nonfinite(array: Float32[np.ndarray, "..."]) -> int:
    """How many elements are NaN or infinite, found block by block: no temporary of the array's size."""
    flat = array.reshape(-1)
    finite = sum(np.count_nonzero(np.isfinite(flat[i : i + _BLOCK])) for i in range(0, flat.size, _BLOCK))
    return flat.size - int(finite)


def equal_arrays(a: Float32[np.ndarray, "..."], b: Float32[np.ndarray, "..."]) -> bool:
    """Whether two arrays of one shape are equal, found block by block."""
    a, b = a.reshape(-1), b.reshape(-1)
    return all(np.array_equal(a[i : i + _BLOCK], b[i : i + _BLOCK]) for i in range(0, a.size, _BLOCK))


def _read_header(path: Path, file: BinaryIO, nbytes: int) -> dict[str, Any]:
    head = file.read(40)
    check_no_pointer(path, head)
    if len(head) < 8:
        raise CheckpointError(f"{path} has {nbytes} bytes; a safetensors file has at least 8")
    length = int.from_bytes(head[:8], "little")
    if length > nbytes - 8:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file: its header should have {length} bytes, "
            f"the file has {nbytes}; download or convert it again"
        )
    if length > MAX_HEADER_NBYTES:
        raise CheckpointError(f"{path}: its header has {length} bytes, the limit is {MAX_HEADER_NBYTES}")
    file.seek(8)
    text = file.read(length)
    if not text.startswith(b"{"):
        raise CheckpointError(
            f"{path} is no safetensors file: its header does not begin with an opening brace"
        )
    header = parse_json_object(text, f"the header of {path}")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: its header names {len(header)} tensors, the limit is {MAX_TENSORS}")
    return header


def _parse_entry(value: object, data_begin: int) -> TensorEntry | str:
    """Check one entry of the header by itself; a string says what is wrong."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return f"is described by {shown(value)}, expected dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_NBYTES:
        return f"has the unknown dtype {shown(dtype)}"
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        return f"has shape {shown(shape)}, expected up to {MAX_DIMENSIONS} whole numbers of 0 or more"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        return f"has data_offsets {shown(offsets)}, expected two whole numbers of 0 or more"
    begin, end = offsets
    needed = math.prod(shape) * ITEM_NBYTES[dtype]
    if end - begin != needed:
        return (
            f"has data_offsets {shown(offsets)}, {end - begin} bytes; {dtype} {shown(shape)} needs {needed}"
        )
    return TensorEntry(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


@dataclass(frozen=True, slots=True)
class TensorData:
    """A tensor to be written: `read()` gives its bytes as a contiguous array when their turn has come."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, TensorData], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors one after the other; at most one is held in memory at a time.

    Without `metadata` there is what older transformers want of a model's file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * ITEM_NBYTES[tensor.dtype]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data begin at a multiple of 64, which XLA wants
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.read().data.cast("B"))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file so that at every moment `path` is the complete old or the complete new one.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written to, ...
    """
    try:
        with _files.replacing(path) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
