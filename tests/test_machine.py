"""What `gpt2core._machine` says of cores, quotas, memory and ends of processes."""

import os
import subprocess
import sys

import pytest

from gpt2core import _machine


def cgroup(tmp_path, own, files):
    """A fake /sys/fs/cgroup and /proc of a process in the cgroups `own`, the lines of /proc/self/cgroup."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(own)
    (tmp_path / "cgroup").mkdir()
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"cgroups": tmp_path / "cgroup", "proc": tmp_path / "proc"}


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),  # a part of a core is a core
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "100000 100000\n"}, 1),
        ("0::/docker/of/the/host\n", {"cpu.max": "200000 100000\n"}, 2),  # the host's path, not mounted here
        ("0::/../../outside\n", {"cpu.max": "100000 100000\n"}, None),
        (
            "4:cpu,cpuacct:/a\n2:memory:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("1:cpu:/a\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "0\n"}, None),
        (
            "1:cpuset:/\n",
            {"cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "50000\n"},
            None,
        ),
        ("0::/\n", {"cpu.max": "not a number\n"}, None),
        ("nonsense\n", {"cpu.max": "100000 100000\n"}, None),
    ],
)
def test_a_quota_is_that_of_the_processes_cgroups(tmp_path, own, files, quota):
    assert _machine.read_quota(**cgroup(tmp_path, own, files)) == quota


def test_cores_are_those_of_the_affinity_bounded_by_the_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    folders = cgroup(tmp_path, "0::/\n", {"cpu.max": "300000 100000\n"})
    monkeypatch.setattr(_machine, "_CGROUPS", folders["cgroups"])
    monkeypatch.setattr(_machine, "_PROC", folders["proc"])
    assert _machine.count_cores() == 3
    assert _machine.limit_threads(None) == 3
    assert _machine.limit_threads(5) == 5  # who asks for more gets more
    (folders["cgroups"] / "cpu.max").write_text("1600000 100000\n")
    assert _machine.count_cores() == 8
    assert _machine.limit_threads(None) is None


def test_the_peak_is_this_processes_own_and_not_its_parents():
    block = bytearray(os.urandom(1)) * (300 << 20)  # the parent's peak is 300 MB at least
    code = "from gpt2core._machine import peak_memory_nbytes as p; print(p())"
    peak_nbytes = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    assert len(block) <= _machine.peak_memory_nbytes()
    assert 1 << 20 < peak_nbytes < 200 << 20


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-9, "its process was killed by SIGKILL"),
        (-250, "its process was killed by signal 250"),
        (3, "its process ended with exit code 3 and no result"),
    ],
)
def test_an_end_is_told_by_signal_or_code(code, text):
    assert _machine.describe_exit(code) == text


def test_the_processor_has_a_name_and_instructions(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(
        "model name\t: Some CPU\nflags\t\t: fma avx2\nbugs: x\n\nmodel name: B\n"
    )
    monkeypatch.setattr(_machine, "_PROC", tmp_path)
    _machine.describe_processor.cache_clear()
    try:
        assert _machine.describe_processor() == ("model name : Some CPU", "flags : fma avx2")
        assert _machine.name_processor() == "Some CPU"
    finally:
        _machine.describe_processor.cache_clear()


def test_peak_memory_counts_this_process_and_is_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    assert 2**20 < _machine.peak_memory_nbytes() < 2**40
    monkeypatch.setattr(_machine, "_PROC", tmp_path)
    assert 2**20 < _machine.peak_memory_nbytes() < 2**40  # from getrusage
    monkeypatch.setitem(sys.modules, "resource", None)
    assert _machine.peak_memory_nbytes() is None
