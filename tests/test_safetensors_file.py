"""Safetensors files that are sound: read number by number, and written."""

import json
import mmap
import os

import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import bfloat16, file_bytes, layout, write_tensors
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from gpt2core.checkpoint.safetensors import (
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


# ---- writing


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("written") / "model.safetensors"


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
