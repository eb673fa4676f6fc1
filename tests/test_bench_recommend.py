"""`gpt2core bench recommend`: the fastest of planted timings is kept; `auto` takes it while it holds."""

import json
import os
import stat
import subprocess
import sys

import pytest

from gpt2core import GPT2, BackendUnavailableError, RequestError, backends
from gpt2core._files import cache_folder
from gpt2core.backends import choose
from gpt2core.backends import recommendation as recommended
from gpt2core.backends.recommendation import Recommendation
from gpt2core.bench.compare import recommend as module
from gpt2core.bench.compare.recommend import TEXT_TOKENS, TEXTS, recommend
from gpt2core.cli import main
from gpt2core.testing import random_checkpoint, random_config

CONFIG = random_config()
TORCH = Recommendation("torch", "float32", "it was measured", "2026-01-01T00:00:00+00:00")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPT2CORE_BACKEND", raising=False)
    return tmp_path / "cache"


def keep(entry=TORCH, **key):
    return recommended.save({entry.precision: entry}, CONFIG, **key)


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ----------------------------------------------------------------------------------------------- what is kept


def test_what_was_measured_is_taken_by_auto_with_its_reason():
    assert choose(CONFIG)[0] == "numpy"
    keep()
    assert choose(CONFIG) == ("torch", "it was measured")


def test_a_model_that_is_loaded_with_auto_runs_on_the_recommended_backend(tmp_path):
    folder = random_checkpoint(tmp_path / "model")
    keep(threads=1)
    with GPT2.from_pretrained(folder, threads=1) as model:
        assert model.backend.name == "torch"
    with GPT2.from_pretrained(folder) as model:
        assert model.backend.name == "numpy"


def test_it_holds_for_its_shape_device_threads_and_precision_only():
    keep(threads=2)
    assert choose(CONFIG, threads=2)[0] == "torch"
    assert choose(CONFIG, threads=1)[0] == "numpy"
    assert choose(CONFIG)[0] == "numpy"
    assert choose(random_config(n_layer=2), threads=2)[0] == "numpy"
    assert choose(CONFIG, threads=2, precision="int8")[0] == "numpy"
    assert choose(CONFIG, threads=2, device="tpu")[0] == "jax"


def test_what_does_not_change_the_speed_does_not_matter():
    keep()
    assert choose(random_config(layer_norm_epsilon=1e-2, scale_attn_weights=False))[0] == "torch"


def test_the_environment_comes_first(monkeypatch):
    keep()
    monkeypatch.setenv("GPT2CORE_BACKEND", "onnx")
    assert choose(CONFIG) == ("onnx", "GPT2CORE_BACKEND names it")
    monkeypatch.setenv("GPT2CORE_BACKEND", "auto")
    assert choose(CONFIG)[0] == "torch"


def test_a_later_measurement_replaces_the_earlier_one():
    keep()
    path = keep(Recommendation("onnx", "float32", "measured anew", "2026-02-01T00:00:00+00:00"))
    assert choose(CONFIG) == ("onnx", "measured anew")
    assert [one.name for one in path.parent.iterdir()] == [path.name]


# ------------------------------------------------------------------------------------- what no longer holds


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("gpt2core", "0.0.1"),
        ("python", "2.7"),
        ("packages", {"numpy": ["numpy-1.0.dist-info"]}),
        ("processor", ["model name : another"]),
        ("cores", 4096),
        ("machine", "pdp11"),
        ("compiler", "/somewhere/else/cc"),
    ],
)
def test_another_machine_or_version_is_ignored(part, value):
    path = keep()
    change(path, fingerprint=recommended.fingerprint() | {part: value})
    assert choose(CONFIG)[0] == "numpy"
    change(path, fingerprint=recommended.fingerprint())
    assert choose(CONFIG)[0] == "torch"


def test_a_new_version_of_a_framework_invalidates_it(tmp_path, monkeypatch):
    for version in ("1.0", "1.1"):
        site = tmp_path / version
        (site / "flax").mkdir(parents=True)
        (site / "flax/__init__.py").touch()
        (site / f"flax-{version}.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "1.0")
    monkeypatch.delitem(sys.modules, "flax", raising=False)
    assert recommended.fingerprint()["packages"]["flax"] == ["flax-1.0.dist-info"]
    keep()
    assert choose(CONFIG)[0] == "torch"
    monkeypatch.syspath_prepend(tmp_path / "1.1")
    assert choose(CONFIG)[0] == "numpy"


def test_a_backend_that_is_gone_is_not_taken(monkeypatch):
    keep()
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert choose(CONFIG)[0] == "numpy"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"format": 2}',
        b'{"format": 1, "by_precision": []}',
        b'{"format": 1, "by_precision": {"float32": []}}',
        b'{"format": 1, "by_precision": {"float32": {"backend": 7}}}',
        b"[" * 100_000,
        b" " * 70_000 + b"{}",
    ],
    ids=range(11),
)
def test_a_damaged_file_is_ignored(content):
    path = keep()
    path.write_bytes(content)
    assert choose(CONFIG)[0] == "numpy"


@pytest.mark.parametrize("name", ["nothing", "", "numpy; rm"])
def test_a_name_that_is_no_backend_is_ignored(name):
    keep(Recommendation(name, "float32", "planted", "now"))
    assert choose(CONFIG)[0] == "numpy"


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_a_file_that_others_may_write_is_ignored(mode):
    path = keep()
    path.chmod(mode)
    assert choose(CONFIG)[0] == "numpy"


def test_a_folder_that_others_may_write_is_neither_read_nor_written():
    path = keep()
    path.parent.chmod(0o777)
    assert choose(CONFIG)[0] == "numpy"
    with pytest.raises(OSError, match="not this user's alone"):
        keep()


def test_somebody_elses_file_is_ignored(monkeypatch):
    keep()
    monkeypatch.setattr(os, "getuid", lambda: os.stat(__file__).st_uid + 1)
    assert choose(CONFIG)[0] == "numpy"


def test_the_file_and_its_folder_are_the_users_alone(cache):
    path = keep()
    assert path.is_relative_to(cache)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_full_disk_leaves_the_old_file(monkeypatch):
    path = keep()
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        keep(Recommendation("onnx", "float32", "measured anew", "now"))
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2CORE_CACHE", "~/own")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("part") == tmp_path / "own/part"
    monkeypatch.delenv("GPT2CORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("part") == tmp_path / "xdg/gpt2core/part"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("part") == tmp_path / ".cache/gpt2core/part"


def test_reading_it_loads_no_framework_and_nothing_of_the_benchmarks():
    keep()
    code = (
        "import sys\nfrom gpt2core.backends import choose\nfrom gpt2core.testing import random_config\n"
        "assert choose(random_config())[0] == 'torch'\nprint(*sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "torch",
        "jax",
        "onnxruntime",
        "onnx",
        "flax",
        "importlib.metadata",
        "gpt2core.bench",
        "tempfile",
    }
    assert "gpt2core.backends.recommendation" in out
    assert heavy & {*out} - {"tempfile"} == set()


def test_gpt2core_backends_shows_the_choice_and_why(capfd):
    from gpt2core import ModelConfig

    recommended.save({"float32": TORCH}, ModelConfig())
    assert main(["backends"]) == 0
    (line,) = [one for one in capfd.readouterr().out.splitlines() if one.startswith("openai-community/gpt2")]
    assert line.split() == ["openai-community/gpt2", "torch", *TORCH.why.split()]
    assert main(["backends", "--threads", "2"]) == 0
    assert TORCH.why not in capfd.readouterr().out


# ------------------------------------------------------------------------------------------- what is measured


def plant(monkeypatch, figures):
    """Let engines have these (seconds to the first token, tokens per second), round by round; or an error."""
    asked = []

    def measure(engine, *, cells, threads, device, **_):
        asked.append((engine.name, engine.precision, threads, device))
        rounds = figures[engine.name]
        figure = (
            rounds if isinstance(rounds, str) else rounds[sum(one[0] == engine.name for one in asked) - 1]
        )
        for measure in (cell.measure for cell in cells):
            line = {"measure": measure, "status": "ok", "error": None}
            if isinstance(figure, str):
                yield line | {"status": "failed", "error": figure, "value": None}
            else:
                first_s, rate = figure
                values = {"first_token_cold_s": first_s, "decode_tok_s": rate, "peak_memory_nbytes": 1e9}
                yield line | {"value": values[measure]}

    monkeypatch.setattr(module.worker, "measure", measure)
    return asked


FIGURES = {
    "numpy": [(0.5, 50.0), (0.4, 49.0)],
    "native": [(1.0, 30.0), (1.0, 32.0)],
    "torch": [(2.5, 60.0), (2.0, 64.0)],
    "jax": "ValueError: it fell over",
    "onnx": [(2.0, 50.0), (1.0, 80.0)],
}


def test_the_fastest_of_planted_timings_is_recommended_and_taken(tmp_path, monkeypatch):
    plant(monkeypatch, FIGURES)
    folder = random_checkpoint(tmp_path / "model")
    found = recommend(folder, threads=2)
    assert [one.backend for one in found.candidates] == ["onnx", "torch", "numpy", "native", "jax"]
    assert found.fastest.session_s == pytest.approx(1.0 + TEXTS * TEXT_TOKENS / 80.0)
    assert found.candidates[-1].error == "ValueError: it fell over"
    name, why = choose(CONFIG, threads=2)
    assert name == "onnx"
    assert "10 texts in 17 s, torch 22 s, numpy 26 s, native 41 s" in why
    assert choose(CONFIG)[0] == "numpy"


def test_a_slow_start_outweighs_speed_for_a_small_model(tmp_path, monkeypatch):
    plant(monkeypatch, {**FIGURES, "numpy": [(0.2, 3000.0)] * 2, "onnx": [(2.0, 6000.0)] * 2})
    assert recommend(random_checkpoint(tmp_path / "model")).fastest.backend == "numpy"


def test_every_backend_is_asked_twice_in_turns_and_one_that_failed_only_once(tmp_path, monkeypatch):
    asked = plant(monkeypatch, FIGURES)
    recommend(random_checkpoint(tmp_path / "model"), threads=3)
    first, second = ["numpy", "native", "torch", "jax", "onnx"], ["native", "torch", "onnx", "numpy"]
    assert [one[0] for one in asked] == first + second
    assert {one[1:] for one in asked} == {("float32", 3, "cpu")}


def test_nothing_is_kept_where_no_backend_ran(tmp_path, monkeypatch, cache):
    plant(monkeypatch, dict.fromkeys(FIGURES, "OSError: none"))
    with pytest.raises(BackendUnavailableError, match=r"no backend ran on cpu: .*numpy: OSError: none"):
        recommend(random_checkpoint(tmp_path / "model"))
    assert not cache.exists()


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(RequestError, match="offers no precision 'float7', only auto, float32"):
        recommend(random_checkpoint(tmp_path / "model"), precisions=["float7"])


@pytest.mark.parametrize("spelling", [("recommend",), ("--recommend",)], ids=" ".join)
def test_the_command_measures_keeps_and_says_what_it_found(tmp_path, capfd, monkeypatch, spelling):
    plant(monkeypatch, FIGURES)
    folder = str(random_checkpoint(tmp_path / "model"))
    assert main(["bench", *spelling, "--model", folder, "--threads", "2"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].split() == ["backend", "precision", "first", "token", "tok/s", "10", "texts", "peak"]
    assert out[1].split() == ["onnx", "float32", "1.00", "s", "80", "17.00", "s", "1.0", "GB"]
    assert "failed: ValueError: it fell over" in out[5]
    assert out[-1] == "fastest: onnx in float32; `--backend auto` takes it with --threads 2 from now on"
    assert choose(CONFIG, threads=2)[0] == "onnx"


def test_the_precision_is_that_of_the_checkpoint_unless_another_is_named(tmp_path, monkeypatch):
    asked = plant(monkeypatch, FIGURES)
    folder, rounded = random_checkpoint(tmp_path / "model"), tmp_path / "int8"
    assert main(["quantize", str(folder), str(rounded), "--precision", "int8"]) == 0
    assert recommend(rounded).fastest.precision == "int8"
    assert {name[1] for name in asked} == {"int8"}


def test_real_backends_are_measured_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BUILT_IN", ("numpy",))
    found = recommend(random_checkpoint(tmp_path / "model"), threads=1)
    (one,) = found.candidates
    assert (one.backend, one.error) == ("numpy", None)
    assert one.first_token_s > 0.05
    assert one.tokens_per_s > 1
    assert one.peak_memory_nbytes > 10_000_000
    assert choose(CONFIG, threads=1)[1] == recommended.find(CONFIG, threads=1).why
