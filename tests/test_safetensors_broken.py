"""Safetensors files that are broken: typed errors, named faults, no memory taken."""

import mmap
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import bfloat16, file_bytes, layout, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2core.checkpoint.safetensors import (
    ITEM_NBYTES,
    MAX_HEADER_NBYTES,
    SafetensorsFile,
    count_nonfinite,
)
from gpt2core.errors import CheckpointError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([-1.5, 2.5], np.float32)


def opened(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return SafetensorsFile(path)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        (None, "is described by null, expected dtype, shape and data_offsets"),
        ([], "is described by []"),
        ({**GOOD, "scale": 2}, "is described by"),
        ({"dtype": "F32", "shape": [2]}, "is described by"),
        ({**GOOD, "dtype": "F33"}, 'has the unknown dtype "F33"'),
        ({**GOOD, "dtype": ["F32"]}, 'has the unknown dtype ["F32"]'),
        ({**GOOD, "shape": 2}, "has shape 2, expected up to 8 whole numbers of 0 or more"),
        ({**GOOD, "shape": [-2]}, "has shape [-2]"),
        ({**GOOD, "shape": [True, 2]}, "has shape [true, 2]"),
        ({**GOOD, "shape": [2.0]}, "has shape [2.0]"),
        ({**GOOD, "shape": ["2"]}, 'has shape ["2"]'),
        ({**GOOD, "shape": [1] * 9}, "has shape [1, 1, 1, 1, 1, 1, 1, 1, 1]"),
        ({**GOOD, "shape": [2**63]}, "has shape [9223372036854775808]"),
        ({**GOOD, "data_offsets": 0}, "has data_offsets 0, expected two whole numbers"),
        ({**GOOD, "data_offsets": [0]}, "has data_offsets [0]"),
        ({**GOOD, "data_offsets": [0, 8, 8]}, "has data_offsets [0, 8, 8]"),
        ({**GOOD, "data_offsets": [-8, 0]}, "has data_offsets [-8, 0]"),
        ({**GOOD, "data_offsets": [False, 8]}, "has data_offsets [false, 8]"),
        ({**GOOD, "data_offsets": [8, 0]}, "has data_offsets [8, 0], -8 bytes; F32 [2] needs 8"),
        ({**GOOD, "data_offsets": [0, 4]}, "has data_offsets [0, 4], 4 bytes; F32 [2] needs 8"),
        ({**GOOD, "data_offsets": [0, 12]}, "has data_offsets [0, 12], 12 bytes; F32 [2] needs 8"),
        ({**GOOD, "shape": [1]}, "has data_offsets [0, 8], 8 bytes; F32 [1] needs 4"),
        ({**GOOD, "shape": [3]}, "has data_offsets [0, 8], 8 bytes; F32 [3] needs 12"),
        ({**GOOD, "dtype": "F64"}, "F64 [2] needs 16"),
        ({"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}, "is truncated: it ends at byte"),
        (
            {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**62]},
            "needs 4835703278458516698824704",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_entry_of_a_lying_header_is_a_fault_and_nothing_is_allocated_for_it(entry, fault, tmp_path):
    file = opened(tmp_path, file_bytes({"evil": entry, "good": {**GOOD, "data_offsets": [8, 16]}}, bytes(16)))
    assert file.faulty == {"evil"}
    assert len(file.faults) == 1
    assert file.faults[0].startswith("tensor evil " + fault) or fault in file.faults[0]
    assert file.entries.keys() == {"good"}
    assert file.float32("good").tolist() == [0, 0]


def entry(begin, end):
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "nbytes", "faults", "faulty"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, ["tensor b overlaps tensor a"], {"b"}),
        ({"b": entry(0, 8), "a": entry(0, 8)}, 8, ["tensor a overlaps tensor b"], {"a"}),
        ({"a": entry(0, 12), "b": entry(4, 8)}, 12, ["tensor b overlaps tensor a"], {"b"}),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, ["4 bytes before tensor b belong to none"], set()),
        ({"a": entry(4, 8)}, 8, ["4 bytes before tensor a belong to none"], set()),
        ({"a": entry(0, 4)}, 9, ["the last 5 bytes belong to no tensor"], set()),
        ({}, 1, ["the last 1 bytes belong to no tensor"], set()),
        ({"a": entry(0, 4), "z": entry(4, 4), "b": entry(4, 8)}, 8, [], set()),
        ({"__metadata__": {"x": "y"}}, 0, [], set()),
    ],
)
def test_overlaps_holes_and_leftover_bytes_are_faults(header, nbytes, faults, faulty, tmp_path):
    file = opened(tmp_path, file_bytes(header, bytes(nbytes)))
    assert file.faults == faults
    assert file.faulty == faulty
    assert file.entries.keys() == header.keys() - faulty - {"__metadata__"}


def test_file_cut_anywhere_is_refused_or_names_the_tensors_that_are_cut(tmp_path):
    header, data = layout({"a": A, "b": B, "c": A + 1})
    whole = file_bytes(header, data)
    data_begin = len(whole) - len(data)
    ends = {"a": data_begin + 24, "b": data_begin + 32, "c": data_begin + 56}
    for length in range(len(whole)):
        path = tmp_path / "model.safetensors"
        path.write_bytes(whole[:length])
        if length < data_begin:
            with pytest.raises(CheckpointError) as error:
                SafetensorsFile(path)
            assert f"{path} has {length} bytes; a safe" in str(error.value) or "is truncated" in str(
                error.value
            )
        else:
            file = SafetensorsFile(path)
            cut = {name for name, end in ends.items() if end > length}
            assert file.faulty == cut
            assert [fault for fault in file.faults if "is truncated" not in fault] == []
            for name in file.entries:
                assert count_nonfinite(file.float32(name)) == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has 0 bytes; a safetensors file has at least 8"),
        (b"1234567", "has 7 bytes"),
        (file_bytes(b""), "does not begin with an opening brace"),
        (file_bytes(b" {}"), "does not begin with an opening brace"),
        (file_bytes(b"[]"), "does not begin with an opening brace"),
        (file_bytes(b"{}}"), "is not strict JSON: Extra data"),
        (file_bytes(b'{"a":1,"a":1}'), 'key "a" stands twice'),
        (file_bytes(b'{"a":NaN}'), "NaN is not a JSON number"),
        (file_bytes(b'{"\xff":1}'), "codec can't decode"),
        (file_bytes(b'{"a":' * 100_000), "recursion"),
        (
            (2**64 - 1).to_bytes(8, "little") + b"{}",
            "header should have 18446744073709551615 bytes, the file has 10",
        ),
        (
            (3).to_bytes(8, "little") + b"{}",
            "is truncated or no safetensors file: its header should have 3 bytes",
        ),
        (b"PK\x03\x04" + bytes(100), "does not begin with|should have"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "Git LFS pointer.*run `git lfs pull`",
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_file_whose_header_cannot_be_read_is_refused_by_name(content, reason, tmp_path):
    with pytest.raises(CheckpointError, match=f"(?s)model.safetensors.*({reason})"):
        opened(tmp_path, content)


def test_header_above_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_NBYTES + 1).to_bytes(8, "little"))
        file.truncate(4 * MAX_HEADER_NBYTES)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="its header has 2000001 bytes, the limit is 2000000"):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_header_of_too_many_tensors_is_refused(tmp_path):
    header = "{" + ",".join(f'"{i}":0' for i in range(50_001)) + "}"
    with pytest.raises(CheckpointError, match="its header names 50001 tensors, the limit is 50000"):
        opened(tmp_path, file_bytes(header.encode()))


def test_lying_header_takes_no_more_memory_than_an_honest_one(tmp_path):
    path = tmp_path / "x.safetensors"
    lies = {
        f"t{i}": {"dtype": "F64", "shape": [2**31, 2**31], "data_offsets": [0, 2**62]} for i in range(1000)
    }
    path.write_bytes(file_bytes(lies, bytes(8)))
    tracemalloc.start()
    try:
        file = SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert len(file.faults) == 1000


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        SafetensorsFile(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is not a file"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is not a file"):  # opening it would wait for ever
        SafetensorsFile(tmp_path / "pipe")


def test_file_that_shrinks_while_it_is_opened_is_a_typed_error(tmp_path, monkeypatch):
    write_tensors(tmp_path / "x", {"a": A})

    def shrunk(*args, **kwargs):
        raise ValueError("mmap length is greater than file size")

    monkeypatch.setattr(mmap, "mmap", shrunk)
    with pytest.raises(CheckpointError, match="x cannot be read: mmap length is greater"):
        SafetensorsFile(tmp_path / "x")


def read_everything(path: Path) -> None:
    """Opens a file and reads what it says is sound."""
    file = SafetensorsFile(path)
    for name, item in file.entries.items():
        if item.dtype in ("F32", "F16", "BF16", "F64"):
            array = file.float32(name)
            assert array.nbytes <= 8 * path.stat().st_size  # at most a converted copy
            count_nonfinite(array)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


WHOLE = file_bytes(*layout({"a": A, "b": B.astype(np.float16), "c": bfloat16(B)}))


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), min_size=1, max_size=3))
@settings(max_examples=300)
def test_flipped_bytes_never_crash(scratch, flips):
    content = bytearray(WHOLE)
    for position, mask in flips:
        content[position] ^= mask
    scratch.write_bytes(content)
    try:
        read_everything(scratch)
    except CheckpointError as error:
        assert str(scratch) in str(error)  # noqa: PT017 - a flip in the data is no fault of the file


def test_every_single_flipped_byte_of_the_header_is_survived(scratch):
    for position in range(len(WHOLE) - len(A.tobytes()) - 8):
        for mask in (1, 0x20, 0x80, 0xFF):
            content = bytearray(WHOLE)
            content[position] ^= mask
            scratch.write_bytes(content)
            try:
                read_everything(scratch)
            except CheckpointError as error:
                assert str(scratch) in str(error)  # noqa: PT017


values = st.sampled_from(
    ["F32", "F16", "BOOL", "X", 0, 1, 2, 8, 24, -1, 2**62, 2**64, True, None, 1.5, [], {}, [2, 3]]
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": values,
        "shape": values | st.lists(values, max_size=3),
        "data_offsets": values | st.lists(values, min_size=2, max_size=2),
        "other": values,
    },
)


@given(st.dictionaries(st.text(max_size=4), entries | values, max_size=4), st.binary(max_size=40))
@settings(max_examples=300)
def test_any_header_gives_faults_or_sound_tensors(scratch, header, data):
    scratch.write_bytes(file_bytes(header, data))
    file = SafetensorsFile(scratch)
    assert file.entries.keys() | file.faulty == header.keys() - {"__metadata__"}
    assert not file.entries.keys() & file.faulty
    assert all(fault.isascii() and fault.isprintable() for fault in file.faults)
    read_everything(scratch)


@st.composite
def nearly_sound(draw):
    """Tensors side by side, of which some have another size or place than they should."""
    header, end = {}, 0
    slip = st.sampled_from([0] * 12 + [-4, -1, 1, 4, 8])
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True)):
        dtype = draw(st.sampled_from(["U8", "F16", "F32", "F64", "BF16", "I8"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        begin = max(0, end + draw(slip))
        end = max(0, begin + int(np.prod(shape)) * ITEM_NBYTES[dtype] + draw(slip))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return file_bytes(header, bytes(max(0, end + draw(slip))))


@given(nearly_sound())
@settings(max_examples=500)
def test_what_the_reference_reader_refuses_has_faults_here_and_nothing_else_has(scratch, content):
    scratch.write_bytes(content)
    try:
        safetensors.deserialize(content)
        refused = False
    except safetensors.SafetensorError:
        refused = True
    assert bool(SafetensorsFile(scratch).faults) == refused
