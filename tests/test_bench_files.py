"""The benchmark's files: complete old or complete new, whatever fails, and refused when they do not fit."""

import errno
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gpt2core.bench import BenchmarkError, fingerprint
from gpt2core.bench import store as environment_module
from gpt2core.bench import store as files
from gpt2core.bench.errors import check_installed
from gpt2core.bench.store import ResultsFolder, check_folder, differences

OLD, NEW = b"old " * 1000, b"new " * 5000
ENVIRONMENT = fingerprint()
SETTINGS = {"kind": "classic", "runs": 2, "prompts": ["One", "Two"], "timeout_s": 1.0, "retries": 2}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Whole files


def fail_writes_after(monkeypatch, nbytes: int, code: int = errno.ENOSPC) -> None:
    """Let os.write write so many bytes in all, in short pieces, and then fail."""
    left, real = nbytes, os.write

    def write(descriptor, data):
        nonlocal left
        if left == 0:
            raise OSError(code, os.strerror(code))
        written = real(descriptor, bytes(data)[: min(left, 777)])
        left -= written
        return written

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("name", ["open", "fsync", "replace"])
def test_a_system_call_that_fails_leaves_the_complete_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / "x"
    path.write_bytes(OLD)

    def fail(*arguments, **options):
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(BenchmarkError, match="cannot be written: broken"):
            files.write_atomically(path, NEW)
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["x"]


def test_a_limit_of_the_system_on_file_sizes_leaves_the_old_file(tmp_path):
    """The real thing: the kernel writes what fits, then refuses."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from gpt2core.bench import store as files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))\n"
        "path = Path(sys.argv[1])\n"
        "from contextlib import closing\nwith closing(files.Log(path / 'runs.jsonl')) as log:\n"
        "    log.append({'a': 1})\n"
        "    for action in (lambda: files.write_atomically(path / 'x', b'new' * 5000),\n"
        "                   lambda: log.append({'b': 'b' * 10_000})):\n"
        "        try: action()\n"
        "        except files.BenchmarkError as error: print(error)\n"
    )
    (tmp_path / "x").write_bytes(OLD)
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert run.stderr == ""
    assert [line.split(": ")[1].split(";")[0] for line in run.stdout.splitlines()] == ["File too large"] * 2
    assert (tmp_path / "x").read_bytes() == OLD
    assert (tmp_path / "runs.jsonl").read_bytes() == b'{"a": 1}\n'
    assert names(tmp_path) == ["runs.jsonl", "x"]


def test_an_array_is_read_without_pickle(tmp_path):
    array = np.array([[1.5, np.nan], [2.0, 3.0]])
    files.write_array(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), array)
    with pytest.raises(ValueError, match="Object arrays"):
        files.write_array(tmp_path / "b.npy", np.array([object()]))
    assert names(tmp_path) == ["a.npy"]


def test_json_is_strict_and_keeps_every_text(tmp_path):
    document = {"text": "Öl \u2028 \ud800 \0 \n 👍", "x": 0.1}
    data = files.encode_json(document)
    assert data.count(b"\n") == 1
    assert "Öl" in data.decode()
    assert json.loads(data) == document
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.encode_json({"x": float("nan")})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[1]", r"holds \[1\], expected a JSON object"),
        (b"{", "is not strict JSON"),
        (b"\xff", "is not strict JSON"),
        (b"[" * 100_000, "is not strict JSON"),
    ],
)
def test_what_is_no_json_object_is_refused_by_name(tmp_path, data, message):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(BenchmarkError, match=rf"x\.json .*{message}"):
        files.read_json(tmp_path / "x.json")


def test_a_missing_or_giant_file_is_refused(tmp_path, monkeypatch):
    with pytest.raises(BenchmarkError, match=r"x\.json does not exist"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"{}    ")
    monkeypatch.setattr(files, "MAX_JSON_NBYTES", 5)
    with pytest.raises(BenchmarkError, match="larger than 5 bytes"):
        files.read_json(tmp_path / "x.json")
    with pytest.raises(BenchmarkError, match="cannot be read: Is a directory"):
        files.read_log(tmp_path)


# The log


def test_a_log_torn_at_any_byte_of_its_last_line_loses_that_line_only(tmp_path):
    lines = [files.encode_json({"n": n, "text": "ö"}) for n in range(3)]
    whole, path = b"".join(lines), tmp_path / "runs.jsonl"
    for cut in range(len(whole) - len(lines[-1]), len(whole)):
        path.write_bytes(whole[:cut])
        assert [record["n"] for record in files.read_log(path)] == [0, 1]
        with closing(files.Log(path)) as log:
            assert path.read_bytes() == b"".join(lines[:2])
            log.append({"n": 9})
        assert [record["n"] for record in files.read_log(path)] == [0, 1, 9]


def test_a_log_that_does_not_exist_is_empty_and_a_broken_line_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert files.read_log(path) == []
    path.write_bytes(b'{"n": 0}\nrubbish\n{"n": 2}\n')
    with pytest.raises(BenchmarkError, match=r"runs\.jsonl, line 2 is not strict JSON"):
        files.read_log(path)


@pytest.mark.parametrize("nbytes", [0, 1, 20])
def test_a_line_that_the_disk_refuses_leaves_the_lines_before(tmp_path, monkeypatch, nbytes):
    path = tmp_path / "runs.jsonl"
    with closing(files.Log(path)) as log:
        log.append({"n": 0})
        with monkeypatch.context() as patch:
            fail_writes_after(patch, nbytes)
            with pytest.raises(
                BenchmarkError, match="No space left on device; what was measured before is safe"
            ):
                log.append({"text": "x" * 100})
        assert path.read_bytes() == b'{"n": 0}\n'
        log.append({"n": 1})
    assert files.read_log(path) == [{"n": 0}, {"n": 1}]


def test_an_interrupt_in_the_middle_of_a_line_leaves_the_lines_before(tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"

    def interrupt(descriptor):
        raise KeyboardInterrupt

    with closing(files.Log(path)) as log:
        log.append({"n": 0})
        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            log.append({"n": 1})
    assert path.read_bytes() == b'{"n": 0}\n'


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(BenchmarkError, match=r"runs\.jsonl cannot be written: No such file"):
        files.Log(tmp_path / "missing" / "runs.jsonl")


# The environment


def test_the_fingerprint_names_the_machine_and_is_stable():
    assert fingerprint() == ENVIRONMENT
    assert len(ENVIRONMENT["id"]) == 16
    machine = ENVIRONMENT["machine"]
    assert machine["cores"] == len(os.sched_getaffinity(0))
    assert machine["memory_nbytes"] > 2**28
    assert machine["cpu"]
    assert ENVIRONMENT["packages"]["numpy"] == np.__version__
    assert "llama-cpp-python" not in ENVIRONMENT["packages"] or ENVIRONMENT["packages"]["llama-cpp-python"]


@pytest.mark.parametrize(
    ("change", "value"),
    [("name_processor", "another"), ("count_cores", 99), ("_version", "0"), ("_memory_nbytes", 1)],
)
def test_another_machine_or_version_has_another_id(monkeypatch, change, value):
    monkeypatch.setattr(environment_module, change, lambda *arguments: value)
    assert fingerprint()["id"] != ENVIRONMENT["id"]


def test_other_work_is_what_is_busy_beside_this_process_and_its_children(monkeypatch, tmp_path):
    tick = os.sysconf("SC_CLK_TCK")
    stat, now_s, own_s = tmp_path / "stat", [100.0], [1.0]
    monkeypatch.setattr(environment_module, "CPU_TIMES", stat)
    monkeypatch.setattr(environment_module.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(environment_module.os, "times", lambda: (own_s[0], 0.0, 0.0, 0.0, 0.0))

    def tell(user_s, idle_s, steal_s):
        stat.write_text(f"cpu  {user_s * tick} 0 0 {idle_s * tick} 0 0 0 {steal_s * tick} 0 0\ncpu0 1\n")

    tell(50, 50, 0)
    watch = environment_module.OtherWorkWatch()
    tell(65, 53, 2)  # of 20 s on two cores 15 busy, 2 stolen
    now_s[0], own_s[0] = 110.0, 6.0  # 5 of them our own, within 10 s
    other = watch.read()
    assert other.others_cores == pytest.approx(1.0)
    assert other.steal_share == pytest.approx(0.1)
    stat.unlink()
    assert watch.read() == environment_module.OtherWork(None, None)
    assert environment_module.OtherWorkWatch().read() == environment_module.OtherWork(None, None)


def test_differences_are_named_by_their_path():
    there = {"a": {"b": 1, "c": 2}, "d": "x" * 100}
    here = {"a": {"b": 1, "c": 3}, "e": None, "f": [1]}
    assert differences(there, here) == [
        "a.c: 2 there, 3 here",
        'd: "' + "x" * 56 + "... there, none here",
        "f: none there, [1] here",
    ]
    assert differences(here, here) == []


def test_a_missing_package_is_named_with_its_extra():
    check_installed("numpy")
    with pytest.raises(
        BenchmarkError, match=r"nosuchpackage is not installed; .*pip install 'gpt2core\[bench\]'"
    ):
        check_installed("numpy", "nosuchpackage")
    with pytest.raises(BenchmarkError, match="no1, no2 are not installed"):
        check_installed("no1", "no2")


# The folder


def begin(path: Path, settings=SETTINGS, environment=ENVIRONMENT, **how) -> ResultsFolder:
    return ResultsFolder(path, settings, environment, **how)


def test_a_new_folder_is_made_and_filled_again_on_resume(tmp_path):
    path = tmp_path / "a" / "b"
    with begin(path) as folder:
        folder.append({"n": 0})
    assert names(path) == ["environment.json", "runs.jsonl", "settings.json"]
    assert json.loads((path / "settings.json").read_text()) == SETTINGS
    assert json.loads((path / "environment.json").read_text()) == ENVIRONMENT
    with begin(path, resume=True) as folder:
        assert folder.records == [{"n": 0}]
        folder.append({"n": 1})
        folder.keep([{"n": 1}])
        folder.append({"n": 2})
    assert files.read_log(path / "runs.jsonl") == [{"n": 1}, {"n": 2}]


def test_a_folder_that_holds_anything_is_refused_without_resume_or_force(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BenchmarkError, match=r"is not empty; .*--resume.*--force"):
        begin(tmp_path)
    with pytest.raises(BenchmarkError, match="holds no benchmark to resume"):
        begin(tmp_path, resume=True)
    assert names(tmp_path) == ["mine.txt"]


def test_force_replaces_the_benchmark_and_leaves_other_files(tmp_path):
    with begin(tmp_path) as folder:
        folder.append({"n": 0})
    made = ["benchmark_results.npy", "benchmark_results.json", "report.html", "gpt2_benchmark_line.png"]
    for name in [*made, "mine.png"]:
        (tmp_path / name).write_text("x")
    with begin(tmp_path, settings=SETTINGS | {"runs": 3}, force=True) as folder:
        assert folder.records == []
    assert names(tmp_path) == ["environment.json", "mine.png", "runs.jsonl", "settings.json"]
    assert json.loads((tmp_path / "settings.json").read_text())["runs"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": ENVIRONMENT["machine"] | {"cpu": "6502"}}, r"machine\.cpu: .* there, \"6502\" here"),
        ({"gpt2core": "9.9"}, r'gpt2core: ".*" there, "9.9" here'),
        ({"packages": {}}, r"packages\.numpy: \".*\" there, none here"),
    ],
)
def test_results_of_another_machine_or_version_are_not_resumed(tmp_path, change, message):
    begin(tmp_path).__exit__()
    there = (tmp_path / "runs.jsonl").stat().st_mtime_ns
    with pytest.raises(BenchmarkError, match=rf"another machine or other versions \({message}") as caught:
        check_folder(tmp_path, ENVIRONMENT | change | {"id": "0"}, resume=True, force=False)
    assert "id:" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "runs.jsonl").stat().st_mtime_ns == there


def test_other_settings_are_not_resumed_but_another_limit_of_time_is(tmp_path):
    begin(tmp_path).__exit__()
    with pytest.raises(BenchmarkError, match=r"of other settings \(model: none there, \"demo\" here\)"):
        begin(tmp_path, settings=SETTINGS | {"runs": 5, "model": "demo"}, resume=True)
    with pytest.raises(BenchmarkError, match=r"of other settings \(runs: 2 there, 1 here\)"):
        begin(tmp_path, settings=SETTINGS | {"runs": 1}, resume=True)
    begin(tmp_path, settings=SETTINGS | {"timeout_s": 9.0}, resume=True).__exit__()
    assert json.loads((tmp_path / "settings.json").read_text())["timeout_s"] == 9.0


@pytest.mark.parametrize("name", ["runs", "rounds"])
def test_a_resumed_benchmark_may_have_more_runs_and_rounds_but_not_fewer(tmp_path, name):
    begin(tmp_path, settings=SETTINGS | {name: 3}).__exit__()
    begin(tmp_path, settings=SETTINGS | {name: 5}, resume=True).__exit__()
    assert json.loads((tmp_path / "settings.json").read_text())[name] == 5
    with pytest.raises(BenchmarkError, match=rf"{name}: 5 there, 4 here"):
        begin(tmp_path, settings=SETTINGS | {name: 4}, resume=True)


def test_many_differences_are_counted(tmp_path):
    begin(tmp_path).__exit__()
    with pytest.raises(BenchmarkError, match=r"and 3 more\)"):
        begin(tmp_path, settings=SETTINGS | {f"x{n}": n for n in range(8)}, resume=True)


def test_what_a_kill_leaves_before_the_settings_are_written_is_begun_anew(tmp_path):
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / ".settings.json.0123abcd.tmp").write_text("{")
    with begin(tmp_path, resume=True) as folder:
        assert folder.records == []
        assert names(tmp_path) == ["environment.json", "runs.jsonl", "settings.json"]


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_bench_files as tests\n"
        "tests.begin(tests.Path(sys.argv[1]), resume=True)"
    )
    command = [sys.executable, "-c", code, tmp_path, Path(__file__).parent]
    with begin(tmp_path):
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert f"another process writes to {tmp_path}" in run.stderr
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_an_output_that_is_a_file_is_one_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(BenchmarkError, match="cannot be read: Not a directory"):
        check_folder(path, ENVIRONMENT, resume=False, force=False)
    with pytest.raises(BenchmarkError, match="cannot be made"):
        begin(path)
