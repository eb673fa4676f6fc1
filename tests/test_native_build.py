"""The native backend's library: built once, kept safely, built anew when anything it depends on changes."""

import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from gpt2core.backends._shared import c_compiler
from gpt2core.backends.native import build, library_cache
from gpt2core.backends.native.build import find_compiler, load_library
from gpt2core.errors import BackendUnavailableError

REAL_COMPILER = find_compiler()
LOAD = "import pathlib, sys; from gpt2core.backends.native.build import load_library; "
LOAD += "print(load_library(pathlib.Path(sys.argv[1])).lanes())"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPT2CORE_CFLAGS", raising=False)
    monkeypatch.setattr(build, "_loaded", {})
    return tmp_path / "cache/native"


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "gpt2.c").write_text('#include "lanes.h"\nint lanes(void) { return LANES; }\n')
    (folder / "lanes.h").write_text("#ifndef LANES\n#define LANES 4\n#endif\n")
    return folder


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    return FakeCompiler(tmp_path / "fakecc", monkeypatch)


class FakeCompiler:
    """A script that notes how it is called, and then is the real compiler, or what a test wants."""

    def __init__(self, path, monkeypatch):
        self.path, self.log = path, path.with_suffix(".log")
        self.becomes(f'exec {REAL_COMPILER} "$@"')
        monkeypatch.setenv("GPT2CORE_CC", str(path))

    def becomes(self, *lines):
        self.path.write_text("\n".join(["#!/bin/sh", f'echo "$@" >> {self.log}', *lines, ""]))
        self.path.chmod(0o755)

    @property
    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


def anew(sources):
    """What a new process would get: this one forgets what it has loaded."""
    build._loaded.clear()
    return load_library(sources)


# ----------------------------------------------------------------------------------------------- the compiler


def test_a_named_compiler_comes_first_then_cc_gcc_and_clang(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GPT2CORE_CC", raising=False)
    assert find_compiler() is None
    for name in ("clang", "gcc", "cc"):  # each comes before the one that was there already
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert find_compiler() == str(tmp_path / name)
    monkeypatch.setenv("GPT2CORE_CC", "clang")
    assert find_compiler() == str(tmp_path / "clang")
    monkeypatch.setenv("GPT2CORE_CC", str(tmp_path / "gcc"))
    assert find_compiler() == str(tmp_path / "gcc")
    monkeypatch.setenv("GPT2CORE_CC", "")
    assert find_compiler() == str(tmp_path / "cc")
    monkeypatch.setenv("GPT2CORE_CC", "icc")
    assert find_compiler() is None


def test_without_a_compiler_the_error_says_how_to_get_one(tmp_path, sources, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GPT2CORE_CC", raising=False)
    with pytest.raises(BackendUnavailableError) as caught:
        load_library(sources)
    assert str(caught.value) == (
        "the native backend needs a C compiler (gcc or clang), and none was found; "
        "install one (Debian: apt install gcc; anywhere: pip install 'gpt2core[native]') "
        "or use backend='onnx'"
    )
    monkeypatch.setenv("GPT2CORE_CC", "icc")
    with pytest.raises(BackendUnavailableError, match="GPT2CORE_CC names 'icc', which is not found"):
        load_library(sources)


def test_a_system_that_is_not_posix_is_refused_by_name(sources, monkeypatch):
    monkeypatch.setattr(c_compiler.os, "name", "nt")
    monkeypatch.setattr(c_compiler.sys, "platform", "win32")
    reason = c_compiler.missing_compiler()
    monkeypatch.undo()
    assert reason == "needs a POSIX system such as Linux or macOS, not 'win32'; run it on one"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("maxsize", 2**31 - 1, "needs 64 bits, and this Python for armv7l has 32; install one of 64"),
        ("byteorder", "big", "needs a little-endian processor, and armv7l is none; run it on another"),
    ],
)
def test_a_processor_that_the_kernels_do_not_fit_is_refused_by_name(sources, monkeypatch, name, value, said):
    monkeypatch.setattr(c_compiler.platform, "machine", lambda: "armv7l")
    monkeypatch.setattr(c_compiler, "sys", SimpleNamespace(**{**vars(sys), name: value}))
    with pytest.raises(BackendUnavailableError) as caught:
        load_library(sources)
    assert str(caught.value) == f"the native backend {said} or use backend='onnx'"


def test_a_compiler_that_fails_is_named_with_its_exit_code_and_last_words(sources, compiler, cache):
    (sources / "gpt2.c").write_text("int lanes(void) { return no_such_name; }\n")
    with pytest.raises(BackendUnavailableError) as caught:
        load_library(sources)
    for part in (str(compiler.path), "exit code 1", "no_such_name", "backend='onnx'", "GPT2CORE_CC"):
        assert part in str(caught.value)
    assert list(cache.iterdir()) == []


def test_of_a_long_complaint_the_last_lines_are_shown(sources, compiler):
    compiler.becomes("i=0; while [ $i -lt 1000 ]; do echo line $i >&2; i=$((i+1)); done; exit 7")
    with pytest.raises(BackendUnavailableError, match="exit code 7") as caught:
        load_library(sources)
    assert str(caught.value).splitlines()[1:] == [f"line {i}" for i in range(988, 1000)]


def test_a_compiler_that_does_not_start_is_named(sources, compiler):
    compiler.path.write_text("neither script nor program")
    with pytest.raises(BackendUnavailableError, match="fakecc does not start"):
        load_library(sources)


def test_a_compiler_that_takes_too_long_is_ended_with_what_it_started(
    sources, compiler, tmp_path, monkeypatch
):
    compiler.becomes(f"sh -c 'sleep 2; touch {tmp_path}/still-there' & wait")
    monkeypatch.setattr(build, "COMPILE_TIMEOUT_S", 0.3)
    before_s = time.monotonic()
    with pytest.raises(BackendUnavailableError, match=r"fakecc took longer than 0\.3 s"):
        load_library(sources)
    assert time.monotonic() - before_s < 1.9
    time.sleep(2.2 - (time.monotonic() - before_s))
    assert not (tmp_path / "still-there").exists()


def test_flags_that_cannot_be_split_are_refused_by_name(sources, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CFLAGS", "-DX='")
    with pytest.raises(BackendUnavailableError, match=r"GPT2CORE_CFLAGS is .*No closing quotation"):
        load_library(sources)


# ----------------------------------------------------------------------------------------------- what is kept


def test_the_second_process_takes_the_file_without_running_the_compiler(sources, compiler):
    answers = [
        subprocess.run([sys.executable, "-c", LOAD, sources], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    said = (
        f"gpt2core: compiling the native backend for this processor with {compiler.path}, which takes some "
    )
    said += "seconds once\n"
    assert [(one.stdout, one.stderr) for one in answers] == [("4\n", said), ("4\n", "")]
    assert len(compiler.calls) == 1


def test_a_process_loads_a_library_once_also_from_many_threads(sources, compiler):
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_library(sources))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(one) for one in found}) == 1
    assert len(compiler.calls) == 1


def test_flags_come_in_this_order_and_further_ones_last(sources, compiler, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CFLAGS", "-O1 -D'LANES=(7 - 1)'")
    assert load_library(sources).lanes() == 6
    words = compiler.calls[0].split()
    assert words[:2] == ["-O3", "-std=gnu11"]
    assert {"-fno-math-errno", "-fPIC", "-shared", "-pthread"} < set(words)
    assert words.index("-O3") < words.index("-O1") < words.index("gpt2.c") < words.index("-lm")
    own = [n for n, word in enumerate(words) if word.endswith("=native")]
    assert all(n < words.index("-O1") for n in own)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "s390x"])
def test_the_code_is_for_this_processor(monkeypatch, machine):
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    flags = build._flags()
    assert ("-march=native" in flags) == (machine == "x86_64")
    assert ("-mcpu=native" in flags) == (machine == "aarch64")


def test_another_source_header_or_flag_is_another_library(sources, compiler, monkeypatch, cache):
    assert load_library(sources).lanes() == 4
    (sources / "lanes.h").write_text("#ifndef LANES\n#define LANES 8\n#endif\n")
    assert load_library(sources).lanes() == 8
    (sources / "gpt2.c").write_text('#include "lanes.h"\nint lanes(void) { return 2 * LANES; }\n')
    assert load_library(sources).lanes() == 16
    monkeypatch.setenv("GPT2CORE_CFLAGS", "-DLANES=50")
    assert load_library(sources).lanes() == 100
    monkeypatch.delenv("GPT2CORE_CFLAGS")
    assert load_library(sources).lanes() == 16
    assert len(compiler.calls) == len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("change", ["content", "time", "path"])
def test_another_compiler_builds_anew(sources, compiler, tmp_path, monkeypatch, change):
    load_library(sources)
    if change == "content":
        compiler.becomes("# another version", f'exec {REAL_COMPILER} "$@"')
    elif change == "time":
        os.utime(compiler.path, (1, 1))
    else:
        shutil.copy2(compiler.path, tmp_path / "othercc")
        monkeypatch.setenv("GPT2CORE_CC", str(tmp_path / "othercc"))
    anew(sources)
    anew(sources)
    assert len(compiler.calls) == 2


def test_another_processor_builds_anew(sources, compiler, monkeypatch):
    load_library(sources)
    monkeypatch.setattr(build, "describe_processor", lambda: ("another",))
    anew(sources)
    assert len(compiler.calls) == 2


def test_beyond_so_many_libraries_the_oldest_is_removed(sources, cache, monkeypatch):
    monkeypatch.setattr(library_cache, "_MAX_FILES", 2)
    for n in range(3):
        monkeypatch.setenv("GPT2CORE_CFLAGS", f"-DLANES={n}")
        load_library(sources)
        (newest,) = [path for path in cache.iterdir() if path.stat().st_mtime > 1000]
        os.utime(newest, (n, n))
    assert sorted(path.stat().st_mtime for path in cache.iterdir()) == [1, 2]


# -------------------------------------------------------------------------------------- what is not trusted


@pytest.mark.parametrize("damage", ["empty", "cut short", "a bit", "noise", "no library"])
def test_a_damaged_file_is_built_anew_once(sources, compiler, cache, damage):
    load_library(sources)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    bad = {
        "empty": b"",
        "cut short": good[: len(good) // 2],
        "a bit": good[:5000] + bytes([good[5000] ^ 1]) + good[5001:],
        "noise": bytes(range(256)) * 60,
        "no library": b"text" + build.hashlib.sha256(b"text").digest(),
    }[damage]
    path.unlink()  # another file, not the one that is loaded
    path.write_bytes(bad)
    path.chmod(0o600)
    assert anew(sources).lanes() == 4
    assert len(compiler.calls) == 2
    assert path.read_bytes() == good
    anew(sources)
    assert len(compiler.calls) == 2


def test_the_folder_and_the_file_are_the_users_alone_whatever_the_umask(sources, compiler, cache):
    before = os.umask(0)
    try:
        load_library(sources)
    finally:
        os.umask(before)
    (path,) = cache.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    anew(sources)
    assert len(compiler.calls) == 1


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_a_file_that_others_may_write_is_replaced(sources, compiler, cache, mode):
    load_library(sources)
    (path,) = cache.iterdir()
    path.chmod(mode)
    assert anew(sources).lanes() == 4
    assert len(compiler.calls) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_that_others_may_write_is_neither_loaded_from_nor_written(sources, compiler, cache):
    load_library(sources)
    (path,) = cache.iterdir()
    before = path.stat()
    cache.chmod(0o777)
    assert anew(sources).lanes() == 4
    assert len(compiler.calls) == 2
    assert list(cache.iterdir()) == [path]
    assert path.stat() == before


def test_somebody_elses_folder_is_not_loaded_from(sources, compiler, monkeypatch):
    load_library(sources)
    monkeypatch.setattr(os, "getuid", lambda: os.stat(sources).st_uid + 1)
    assert anew(sources).lanes() == 4
    assert len(compiler.calls) == 2


def test_without_a_folder_to_write_to_it_is_built_elsewhere_and_nothing_is_left(
    sources, compiler, cache, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    cache.parent.write_text("a file where the folder should be")
    assert load_library(sources).lanes() == 4
    assert f"-o {elsewhere}" in compiler.calls[0]
    assert list(elsewhere.iterdir()) == []


def test_a_folder_whose_files_must_not_be_executed_is_named_with_the_remedy(sources, monkeypatch):
    def refuse(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(build.ctypes, "CDLL", refuse)
    with pytest.raises(BackendUnavailableError, match=r"failed to map segment.*GPT2CORE_CACHE"):
        load_library(sources)


def test_two_processes_that_build_at_once_do_no_harm(sources, compiler, cache):
    both_are_here = f'while [ "$(wc -l < {compiler.log})" -lt 2 ]; do sleep 0.02; done'
    compiler.becomes(both_are_here, f'exec {REAL_COMPILER} "$@"')
    command = [sys.executable, "-c", LOAD, str(sources)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = [one.communicate(timeout=60) for one in running]
    assert [(out, err.count("\n")) for out, err in answers] == [("4\n", 1)] * 2
    assert len(compiler.calls) == 2
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    assert anew(sources).lanes() == 4
    assert len(compiler.calls) == 2


# ------------------------------------------------------------------------------------------------ the kernels


def test_the_librarys_own_kernels_compile_without_a_warning(monkeypatch):
    monkeypatch.setenv("GPT2CORE_CFLAGS", "-Wall -Wextra -Werror -O1")
    assert load_library().gpt2core_lanes() >= 1
