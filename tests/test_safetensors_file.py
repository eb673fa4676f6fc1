"""The memory-mapped reader and the writer, against the reference implementation and against broken files."""

import json
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
from hypothesis.extra import numpy as st_numpy

from gpt2core.checkpoint.safetensors import (
    ITEM_NBYTES,
    MAX_HEADER_NBYTES,
    SafetensorsFile,
    TensorData,
    count_nonfinite,
    equal_arrays,
    replacing,
    write_safetensors,
)
from gpt2core.errors import CheckpointError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([-1.5, 2.5], np.float32)


def base_of(array):
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def opened(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return SafetensorsFile(path)


# ---- reading what is sound


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_file_of_the_reference_writer_is_read_number_by_number(dtype, tmp_path):
    rng = np.random.default_rng(1)
    tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in (("a", (3, 4)), ("b.c", (7,)))}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.faults == []
    assert file.entries.keys() == tensors.keys()
    for name, array in tensors.items():
        got = file.float32(name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, array.astype(np.float32))


def test_aligned_float32_is_a_read_only_view_of_the_mapped_file(tmp_path):
    write_tensors(tmp_path / "x", {"a": A, "b": B})
    file = SafetensorsFile(tmp_path / "x")
    first, again = file.float32("a"), file.float32("a")
    assert isinstance(base_of(first), mmap.mmap)
    assert np.shares_memory(first, again)
    assert not first.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        first.flags.writeable = True


def test_mapping_outlives_the_file_object_and_the_name(tmp_path):
    write_tensors(tmp_path / "x", {"a": A})
    array = SafetensorsFile(tmp_path / "x").float32("a")
    (tmp_path / "x").unlink()
    np.testing.assert_array_equal(array, A)


def test_misaligned_float32_is_copied_and_read_only(tmp_path):
    header, data = layout({"a": A, "b": B})
    for spaces in range(8):  # the data begin at every remainder of 8
        text = json.dumps(header).encode() + b" " * spaces
        file = opened(tmp_path, file_bytes(text, data))
        aligned = len(text) % 4 == 0
        for name, want in (("a", A), ("b", B)):
            got = file.float32(name)
            np.testing.assert_array_equal(got, want)
            assert got.flags.aligned
            assert not got.flags.writeable
            assert isinstance(base_of(got), mmap.mmap) == aligned


def test_other_dtypes_are_converted_copies(tmp_path):
    write_tensors(tmp_path / "x", {"a": A.astype(np.float16), "b": B.astype(np.float64), "c": bfloat16(B)})
    file = SafetensorsFile(tmp_path / "x")
    for name, want in (("a", A), ("b", B), ("c", B)):
        got = file.float32(name)
        np.testing.assert_array_equal(got, want)
        assert not got.flags.writeable
        assert not isinstance(base_of(got), mmap.mmap)


def test_bfloat16_and_float16_convert_exactly_over_all_bit_patterns(tmp_path):
    bits = np.arange(65536, dtype=np.uint16)
    write_tensors(tmp_path / "x", {"b": bits, "h": bits.view(np.float16)})
    file = SafetensorsFile(tmp_path / "x")

    got = file.float32("b")
    exponent = ((bits >> 7) & 0xFF).astype(np.int64)
    fraction = (bits & 0x7F).astype(np.float64)
    value = np.where(exponent == 0, fraction * 2.0**-133, (128 + fraction) * 2.0 ** (exponent - 134.0))
    value = np.where(bits >> 15, -value, value)
    finite = exponent != 255
    assert finite.sum() == 65536 - 256
    np.testing.assert_array_equal(got[finite], value[finite])
    np.testing.assert_array_equal(np.signbit(got), bits >> 15 == 1)
    assert not np.isfinite(got[~finite]).any()

    got = file.float32("h")
    exponent = ((bits >> 10) & 0x1F).astype(np.int64)
    fraction = (bits & 0x3FF).astype(np.float64)
    value = np.where(exponent == 0, fraction * 2.0**-24, (1024 + fraction) * 2.0 ** (exponent - 25.0))
    value = np.where(bits >> 15, -value, value)
    finite = exponent != 31
    np.testing.assert_array_equal(got[finite], value[finite])
    assert not np.isfinite(got[~finite]).any()


def test_float64_beyond_float32_becomes_infinite_without_a_warning(tmp_path):
    write_tensors(tmp_path / "x", {"a": np.array([1e300, 1.0])})
    array = SafetensorsFile(tmp_path / "x").float32("a")
    assert array.tolist() == [np.inf, 1.0]
    assert count_nonfinite(array) == 1


def test_scalars_and_empty_tensors_are_sound(tmp_path):
    write_tensors(tmp_path / "x", {"a": np.zeros((0, 5), np.float32), "b": np.array(2.5, np.float32), "c": B})
    file = SafetensorsFile(tmp_path / "x")
    assert file.faults == []
    assert file.float32("a").shape == (0, 5)
    assert file.float32("b") == 2.5


@pytest.mark.parametrize("size", [1, 5, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 200_000])
def test_non_finite_numbers_are_counted_wherever_they_stand(size):
    array = np.ones(size, np.float32)
    assert count_nonfinite(array) == 0
    for i in {0, size // 2, size - 1}:
        for bad in (np.nan, np.inf, -np.inf):
            array[i] = bad
            assert count_nonfinite(array) == 1
        array[i] = 3e38  # a sum of such would overflow
    assert count_nonfinite(array) == 0
    array[:] = np.nan
    assert count_nonfinite(array.reshape(1, -1)) == size


def test_arrays_differ_wherever_one_number_does():
    a = np.zeros((300, 301), np.float32)
    assert equal_arrays(a, a.copy())
    for i in (0, 65535, 65536, 300 * 301 - 1):
        b = a.copy()
        b.flat[i] = 1e-30
        assert not equal_arrays(a, b)


# ---- files that are broken


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


# ---- writing


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st_numpy.arrays(np.float32, st_numpy.array_shapes(min_dims=0, max_dims=3, max_side=4)),
        max_size=4,
    )
)
def test_written_file_is_read_by_the_reference_implementation(scratch, tensors):
    with replacing(scratch) as file:
        write_safetensors(file, {n: TensorData("F32", a.shape, lambda a=a: a) for n, a in tensors.items()})
    got = safetensors.numpy.load_file(scratch)
    assert got.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(got[name], array)
        assert SafetensorsFile(scratch).entries[name].begin % 4 == 0
    assert len(tensors) == 0 or min(e.begin for e in SafetensorsFile(scratch).entries.values()) % 64 == 0


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def full():
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(CheckpointError, match=f"{path} cannot be written: No space left on device"),
        replacing(path) as f,
    ):
        write_safetensors(f, {"a": TensorData("F32", (1,), full)})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]
    with (
        pytest.raises(CheckpointError, match="gone/x cannot be written: No such file"),
        replacing(tmp_path / "gone/x"),
    ):
        raise AssertionError("the body must not run")


def test_reader_sees_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
