"""How fast memory is read: the roof of the comparison's roofline."""

import types

import pytest

from gpt2core.bench.compare import bandwidth


def test_the_read_bandwidth_is_that_of_the_fastest_way():
    found = bandwidth.read_bandwidth(1, nbytes=32 << 20)
    assert found["value"] == max(found["by_method"].values()) == found["by_method"][found["method"]]
    assert 1e8 < found["value"] < 1e13
    assert found["buffer_nbytes"] == 32 << 20
    assert (len(found["by_method"]), found["threads"]) == (4, 1)


def test_the_bandwidth_is_the_bytes_of_the_buffer_over_the_fastest_repeat(monkeypatch):
    """Four ways of reading, five times each; the clock is read before and after each."""
    durations = [[9, 8, 4, 8, 9], [9, 2, 3, 9, 9], [5, 5, 5, 5, 5], [9, 9, 9, 9, 8]]
    readings = [float(t) for way in durations for taken in way for t in (0, taken)]
    clock = types.SimpleNamespace(perf_counter=iter(readings).__next__)
    monkeypatch.setattr(bandwidth, "time", clock)
    found = bandwidth._measure(2, 1 << 20)
    assert found["buffer_nbytes"] == 1 << 20
    assert list(found["by_method"].values()) == [(1 << 20) / fastest for fastest in (4, 2, 5, 8)]
    assert (found["value"], found["method"]) == ((1 << 20) / 2, "sum")


def test_the_buffer_is_much_larger_than_the_caches(tmp_path, monkeypatch):
    assert bandwidth.buffer_nbytes() >= bandwidth.LEAST_NBYTES
    for number, size in enumerate(["48K", "512000K", "odd"]):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}/size").write_text(f"{size}\n")
    monkeypatch.setattr(bandwidth, "Path", lambda path: tmp_path)
    assert bandwidth.buffer_nbytes() == 4 * 512000 * 1024


def test_a_bandwidth_process_that_fails_says_its_last_line():
    with pytest.raises(RuntimeError, match=r"measuring the read bandwidth failed: .*Error"):
        bandwidth.read_bandwidth(1, nbytes=1 << 55)
