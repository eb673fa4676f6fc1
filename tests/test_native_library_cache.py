"""Where libraries are kept: exchanged by nobody, found full or unfit, forked from, left by killed builds."""

import ctypes
import os
import stat
import subprocess
import sys
import time

import pytest

from gpt2core.backends.native import build, library_cache
from gpt2core.backends.native.build import find_compiler, load_library
from gpt2core.errors import BackendUnavailableError

COMPILER = find_compiler()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "above/cache"))
    monkeypatch.delenv("GPT2CORE_CFLAGS", raising=False)
    monkeypatch.setattr(build, "_loaded", {})
    return tmp_path / "above/cache/native"


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "gpt2.c").write_text(
        "#ifndef LANES\n#define LANES 4\n#endif\nint lanes(void) { return LANES; }\n"
    )
    return folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Set what runs before the real compiler: lines of shell."""

    def becomes(*lines):
        path = tmp_path / "fakecc"
        path.write_text("\n".join(["#!/bin/sh", *lines, f'exec {COMPILER} "$@"', ""]))
        path.chmod(0o755)
        monkeypatch.setenv("GPT2CORE_CC", str(path))

    return becomes


def forget():
    """What this process has loaded, so that the next call asks the folder as a new process would."""
    build._loaded.clear()


# ---------------------------------------------------------------------------------------------- who may write


def test_a_folder_exchanged_between_the_look_and_the_load_is_not_loaded(sources, cache, monkeypatch):
    assert load_library(sources).lanes() == 4
    (kept,) = cache.iterdir()
    evil = cache.with_name("evil")
    evil.mkdir()
    source = evil / "evil.c"
    source.write_text("int lanes(void) { return 666; }\n")
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", evil / kept.name], check=True)
    load = ctypes.CDLL

    def exchange_and_load(path):
        cache.rename(cache.with_name("away"))
        evil.rename(cache)
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", exchange_and_load)
    forget()
    found = load_library(sources)
    assert cache.with_name("away").exists(), "nothing was exchanged"
    assert found.lanes() == 4


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_where_others_may_rename_a_folder_above_nothing_is_loaded_or_kept(sources, cache, mode, compiler):
    load_library(sources)
    (kept,) = cache.iterdir()
    compiler()
    cache.parent.parent.chmod(mode)
    forget()
    before = kept.stat()
    assert load_library(sources).lanes() == 4
    assert list(cache.iterdir()) == [kept]
    assert kept.stat() == before
    cache.parent.parent.chmod(0o1777)  # as /tmp: all may write, nobody may rename what is another's
    forget()
    load_library(sources)
    assert len(list(cache.iterdir())) == 2


def test_folders_above_are_made_for_this_user_alone_whatever_the_umask(sources, cache):
    before = os.umask(0)
    try:
        load_library(sources)
    finally:
        os.umask(before)
    made = (cache, cache.parent, cache.parent.parent)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in made] == [0o700] * 3


def test_libraries_loaded_one_after_the_other_are_not_taken_for_each_other(sources, monkeypatch):
    """Descriptors have the same number again and again, and loaders remember names."""
    for again in range(2):
        for lanes in (4, 8, 16, 32):
            monkeypatch.setenv("GPT2CORE_CFLAGS", f"-DLANES={lanes}")
            forget()
            assert load_library(sources).lanes() == lanes, f"round {again}"


def test_a_pipe_or_a_link_in_its_place_is_not_read(sources, cache, tmp_path):
    load_library(sources)
    (kept,) = cache.iterdir()
    for put in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "other.so")):
        kept.rename(tmp_path / "other.so")
        put(kept)
        forget()
        assert load_library(sources).lanes() == 4
        assert stat.S_ISREG(kept.lstat().st_mode)


def test_a_temporary_folder_in_which_others_may_rename_is_not_built_in(sources, cache, temporary):
    cache.parent.parent.write_text("a file where the folder should be")
    temporary.chmod(0o777)
    with pytest.raises(BackendUnavailableError, match=f"others could exchange what lies in .* {temporary}"):
        load_library(sources)


# ------------------------------------------------------------------------------------------ no room, no right


@pytest.mark.parametrize("said", ["No space left on device", "Disk quota exceeded", "Read-only file system"])
def test_in_a_full_cache_folder_it_is_built_in_the_temporary_one(sources, cache, compiler, temporary, said):
    compiler(f'case "$*" in *{cache}*) echo "ld: final link failed: {said}" >&2; exit 1;; esac')
    assert load_library(sources).lanes() == 4
    assert list(cache.iterdir()) == list(temporary.iterdir()) == []


def test_where_both_folders_are_full_the_error_says_so(sources, compiler):
    compiler("echo 'ld: final link failed: No space left on device' >&2; exit 1")
    with pytest.raises(BackendUnavailableError, match=r"No space left on device.*GPT2CORE_CACHE.*'onnx'"):
        load_library(sources)


def test_in_a_cache_folder_without_execution_it_is_built_in_the_temporary_one(
    sources, cache, temporary, monkeypatch
):
    load = ctypes.CDLL

    def refuse(path):
        if str(cache) in os.path.realpath(path):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert load_library(sources).lanes() == 4
    assert list(cache.iterdir()) == list(temporary.iterdir()) == []


def test_the_compilers_own_files_lie_beside_its_result(sources, compiler, tmp_path):
    compiler(f"echo $TMPDIR > {tmp_path}/log")
    load_library(sources)
    assert (tmp_path / "log").read_text().startswith(f"{tmp_path}/above/cache/native/.")


# --------------------------------------------------------------------------------------------- fork, and kill

FORK_IN_A_BUILD = """
import os, pathlib, sys, threading, time
from gpt2core.backends.native.build import load_library
sources, started = map(pathlib.Path, sys.argv[1:])
builder = threading.Thread(target=load_library, args=(sources,))
builder.start()
while not started.exists():
    time.sleep(0.01)
if os.fork() == 0:
    assert load_library(sources).lanes() == 4
    sys.exit(0)
code = os.waitstatus_to_exitcode(os.wait()[1])
builder.join()
assert load_library(sources).lanes() == 4
sys.exit(code)
"""


def test_a_child_forked_during_a_build_builds_too_and_harms_neither(sources, cache, compiler, tmp_path):
    compiler(f"touch {tmp_path}/started", "sleep 0.5")
    command = [sys.executable, "-c", FORK_IN_A_BUILD, sources, tmp_path / "started"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    said = [line.partition(" for ")[0] for line in done.stderr.splitlines()]
    assert (done.returncode, said) == (0, ["gpt2core: compiling the native backend"] * 2)
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_what_a_killed_build_left_is_removed_by_a_later_one_and_a_running_one_is_spared(
    sources, cache, compiler, tmp_path, monkeypatch
):
    compiler(f"touch {tmp_path}/started", "sleep 5")
    code = "import pathlib, sys; from gpt2core.backends.native.build import load_library; "
    code += "load_library(pathlib.Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", code, sources], start_new_session=True) as killed:
        until_s = time.monotonic() + 20
        while not (tmp_path / "started").exists() and time.monotonic() < until_s:
            time.sleep(0.01)
        killed.kill()
    (left,) = cache.iterdir()
    running = cache / ".running"
    running.mkdir()
    old_s = time.time() - library_cache._ABANDONED_S - 1
    os.utime(left, (old_s, old_s))
    monkeypatch.delenv("GPT2CORE_CC")
    load_library(sources)
    assert sorted(path.suffix or path.name for path in cache.iterdir()) == [".running", ".so"]
