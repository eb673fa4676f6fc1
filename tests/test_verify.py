"""`gpt2core verify`: sound backends pass; each planted fault is found, named and not fatal to the others."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from faulty import perturbed_mlp

from gpt2core import GPT2, BackendUnavailableError, CheckpointError, RequestError, open_checkpoint
from gpt2core.backends.torch.backend import TorchBackend
from gpt2core.cli import main
from gpt2core.engine.engine import Engine
from gpt2core.reference import reference_logits, reference_trace
from gpt2core.sampling.draw import sample_token, uniform
from gpt2core.sampling.params import SamplingParams
from gpt2core.sampling.transforms import temper
from gpt2core.testing import VARIANTS, check_backend, random_checkpoint, random_config, random_weights
from gpt2core.testing.conformance import a_trace_shows_the_references_numbers
from gpt2core.testing.subject import TOLERANCE
from gpt2core.trace import Trace
from gpt2core.verify import _Judge, verify, worker
from gpt2core.verify.cases import Case, Row, cases_of, texts_of
from gpt2core.verify.compare import compare_logits, first_departure, parting

QUICK = {"seeds": 2, "tokens": 12, "threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _factories_can_be_imported(monkeypatch):
    """By the workers too: `faulty.py` lies beside this file."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


def only(report):
    (one,) = report.backends
    return one


# What passes


@pytest.fixture(scope="module")
def sound(folder):
    return verify(folder, backends=["torch", "numpy"], layers=True, **QUICK)


def test_sound_backends_pass_and_the_baseline_runs_first(sound):
    assert [(one.backend, one.status, one.reasons) for one in sound.backends] == [
        ("numpy", "passed", ()),
        ("torch", "passed", ()),
    ]
    assert sound.passed
    assert sound.baseline == "numpy"


def test_every_way_of_running_is_compared_at_every_position(sound):
    for one in sound.backends:
        counts = {c.name: c.positions for c in one.comparisons}
        assert list(counts) == [
            *("prefill", "chunked prefill", "decode"),
            *("batch of 1", "batch of 3", "batch of 8"),
        ]
        assert counts["prefill"] == counts["chunked prefill"] == counts["decode"] == 96
        assert one.overall.positions == sum(counts.values())
        assert one.overall.max_difference == max(c.max_difference for c in one.comparisons)
        assert 0 < one.overall.mean_difference < one.overall.max_difference < TOLERANCE
        assert 0 <= one.overall.kl_mean_nats <= one.overall.kl_max_nats < 1e-8
        assert one.overall.top1_agreement > 0.99


def test_same_seeds_give_the_same_tokens(sound):
    numpy, torch = sound.backends
    assert numpy.agreement is None
    assert (torch.agreement.baseline, torch.agreement.texts, torch.agreement.equal_texts) == ("numpy", 2, 2)
    assert torch.agreement.equal_tokens == torch.agreement.tokens > 2


def test_both_traces_follow_the_reference(sound):
    assert [(one.layers.traced, one.layers.first) for one in sound.backends] == [(True, None), (True, None)]


def test_cost_is_measured_per_process(sound):
    numpy, torch = sound.backends
    for one in sound.backends:
        assert one.load_s > 0
        assert one.elapsed_s > 0
    assert torch.peak_memory_nbytes > numpy.peak_memory_nbytes > 10_000_000


def test_the_parent_loads_no_framework(folder):
    code = (
        "import sys; from gpt2core.verify import verify\n"
        f"assert verify({str(folder)!r}, backends=['numpy'], seeds=1, tokens=2).passed\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "numpy" in loaded.split()
    assert not {"torch", "onnx", "onnxruntime", "jax"} & set(loaded.split())


def test_a_checkpoint_without_a_tokenizer_and_of_a_short_context_is_verified(tmp_path):
    folder = random_checkpoint(tmp_path, n_positions=5, vocab_size=300)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    report = verify(folder, backends=["numpy"], **QUICK)
    assert report.passed
    assert (report.tokens, len(report.prompt_ids)) == (3, 2)


# Planted faults


def test_a_perturbed_mlp_fails_and_is_named_as_the_first_to_leave(folder):
    report = verify(folder, backends=["numpy", "faulty:perturbed_mlp"], layers=True, **QUICK)
    good, bad = report.backends
    assert (good.status, bad.status, report.passed) == ("passed", "failed", False)
    assert bad.layers.first.where == "layer 1 MLP"
    assert bad.layers.first.difference > bad.layers.first.allowed >= TOLERANCE
    assert "leaves the reference at layer 1 MLP" in bad.reasons
    assert all(c.max_difference > TOLERANCE for c in bad.comparisons)
    assert any(reason.startswith("prefill: logits differ by ") for reason in bad.reasons)


def test_perturbed_attention_shows_in_the_attention_map(folder):
    one = only(
        verify(folder, backends=["faulty:perturbed_attention"], layers=True, seeds=0, tokens=1, threads=1)
    )
    assert one.layers.first.where == "layer 2 attention map"


def test_a_tolerance_that_is_wide_enough_lets_a_fault_pass(folder):
    report = verify(folder, backends=["faulty:perturbed_mlp"], tolerance=10.0, **QUICK)
    assert report.passed


def test_logits_that_are_not_finite_fail(folder):
    one = only(verify(folder, backends=["faulty:NotFinite"], seeds=2, tokens=40, threads=1))
    assert one.status == "failed"
    assert one.overall.max_difference == np.inf
    assert "prefill: a logit differs infinitely or is not finite" in one.reasons
    assert any("NumericalError" in reason for reason in one.reasons)  # of the texts
    assert one.agreement is None


def test_a_fault_of_batches_only_is_found_in_the_batches(folder):
    one = only(verify(folder, backends=["faulty:WrongInBatches"], **QUICK))
    bad = {c.name for c in one.comparisons if c.max_difference > TOLERANCE}
    assert bad == {"batch of 3", "batch of 8"}
    assert one.status == "failed"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            "WrongShape",
            r"BackendError: prefill: forward returned float32 (96, 256), expected float32 (96, 257)",
        ),
        ("Float64", r"BackendError: prefill: forward returned float64 (96, 257), expected float32 (96, 257)"),
        ("Raising", "ValueError: no such luck"),
        ("Crashing", "its process ended with exit code 9 and no result; it said: about to crash"),
        ("Killed", "its process was killed by SIGKILL"),
    ],
)
def test_a_backend_that_breaks_is_a_failure_of_its_own(folder, fault, reason):
    report = verify(folder, backends=[f"faulty:{fault}", "numpy"], **QUICK)
    good, bad = report.backends
    assert (good.backend, good.status) == ("numpy", "passed")
    assert (bad.backend, bad.status, bad.overall) == (f"faulty:{fault}", "failed", None)
    assert bad.reasons[0] == reason


def test_a_backend_that_hangs_is_stopped(folder):
    one = only(verify(folder, backends=["faulty:Hanging"], timeout_s=1, **QUICK))
    assert (one.status, one.reasons) == (
        "failed",
        ("its process was stopped after 1 s; allow it more time",),
    )


def test_a_factory_that_cannot_be_imported_is_a_failure(folder):
    one = only(verify(folder, backends=["faulty:Missing"], **QUICK))
    assert one.reasons == (
        "BackendUnavailableError: faulty:Missing cannot be imported: "
        "AttributeError: module 'faulty' has no attribute 'Missing'",
    )


def test_texts_that_rounding_does_not_explain_fail(folder):
    report = verify(folder, backends=["numpy", "faulty:OtherDraws"], seeds=12, tokens=30, threads=1)
    good, bad = report.backends
    assert good.status == "passed"
    assert bad.overall.max_difference < TOLERANCE
    assert bad.agreement.equal_texts < 12
    wrong = [one for one in bad.agreement.disagreements if not one.within]
    assert wrong
    for one in wrong:
        assert one.margin > one.numeric_difference > 0
        assert any(reason.startswith(f"seed {one.seed}: new token {one.index} is") for reason in bad.reasons)


# The numbers


def test_cases_stay_inside_their_texts_and_never_leave_a_gap():
    for longest in (1, 2, 3, 33, 40, 96, 128):
        lengths = [longest, min(48, longest), min(48, longest)]
        for case in cases_of(lengths):
            cached = {}
            for rows in case.passes:
                assert len({row.slot for row in rows}) == len(rows)
                for row in rows:
                    assert row.start == cached.get(row.slot, 0) < row.end <= lengths[row.text]
                    cached[row.slot] = row.end
            assert set(cached) <= set(range(case.slots))


def test_a_ragged_case_mixes_prefill_with_decode():
    case = cases_of([128, 48, 48])[-1]
    kinds = [{row.end - row.start > 1 for row in rows} for rows in case.passes]
    assert {True, False} in kinds
    assert max(len(rows) for rows in case.passes) == 8


def test_texts_fit_vocabulary_and_context():
    texts = texts_of([5, 900, 7], vocab_size=100, context=20)
    assert [len(text) for text in texts] == [20, 20, 20]
    assert texts[0] == [5, 7] * 10
    assert max(map(max, texts)) < 100


def test_differences_top_1_and_divergence_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    want = rng.normal(size=(70, 11))
    got = want + rng.normal(size=want.shape) * 0.1
    case = Case("prefill", 1, ((Row(0, 0, 70, 0),),))
    found = compare_logits(case, got.astype(np.float32), [want])
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (want, got))
    kl = (p * np.log(p / q)).sum(-1)
    assert found.max_difference == pytest.approx(np.abs(got - want).max(), rel=1e-5)
    assert found.mean_difference == pytest.approx(np.abs(got - want).mean(), rel=1e-5)
    assert found.top1_agreement == (got.argmax(-1) == want.argmax(-1)).mean() < 1
    assert (found.kl_mean_nats, found.kl_max_nats) == pytest.approx((kl.mean(), kl.max()), rel=1e-4)


@pytest.mark.parametrize("vocab", [2, 5, 64, 257])
def test_parting_finds_the_bisection_at_which_two_draws_part(vocab):
    """There the drawn token lies in the lower half exactly if the random number is below its share."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=vocab).astype(np.float32)
    params, drawn = SamplingParams(temperature=1.0), {}
    for seed in range(60):
        options = {"token_ids": [1], "prompt_tokens": 1, "eos_token_ids": (), "seed": seed, "choice": 0}
        drawn[seed] = sample_token(logits, params, **options)
    weights = np.exp(temper(logits, 1.0))
    for seed, token in drawn.items():
        for other in rng.integers(0, vocab, 8).tolist():
            if other != token:
                depth, share = parting(weights, token, other)
                assert (uniform(seed, 0, 1, depth) < share) == (token < other)


@pytest.mark.parametrize("name", ["native", "no_such_module:Backend"])  # made in vain, and not even found
def test_a_backend_that_was_named_and_cannot_load_fails_the_run(folder, monkeypatch, name):
    monkeypatch.setenv("GPT2CORE_CC", "no-such-compiler")
    report = verify(folder, backends=[name, "numpy"], seeds=0, tokens=1)
    assert {one.backend: one.status for one in report.backends} == {"numpy": "passed", name: "failed"}
    assert not report.passed


def test_half_a_case_file_of_a_process_that_died_is_not_read(tmp_path):
    weights, killed = random_weights(random_config()), "its process was killed by SIGKILL"
    logits = [reference_logits(weights, [1, 2, 3, 4])]
    sizes = {"tolerance": 1e-3, "prompt_ids": [], "cases": cases_of([4]), "trace": None}
    (tmp_path / "case-0.npy").write_bytes(b"\x93NUMPY\x01\x00")
    report = _Judge(weights=weights, logits=logits, **sizes).report("x", tmp_path, {"errors": [killed]})
    assert (report.status, report.reasons, report.comparisons) == ("failed", (killed,), ())


def test_the_first_departure_is_the_first_in_the_order_of_computation():
    want = reference_trace(random_weights(random_config()), [1, 2, 3, 4])

    def spoiled(**changes):
        arrays = {name: getattr(want, name).copy() for name in ("hidden_states", "attentions", "logits")}
        for name, (where, value) in changes.items():
            arrays[name][where] += value
        return first_departure(Trace(**arrays), want, 1e-4)

    assert spoiled() is None
    assert spoiled(logits=((2, 7), 1.0)).where == "logits"
    assert spoiled(hidden_states=((0, 0, 0), np.nan)).difference == np.inf
    found = spoiled(hidden_states=((3, 1, 0), 1.0), logits=((0, 0), 1.0))
    assert (found.where, found.position) == ("layer 1 attention", 1)
    found = spoiled(attentions=((1, 0, 3, 0), 0.01), hidden_states=((3, 3, 0), 1.0))
    assert (found.where, found.position) == ("layer 1 attention map", 3)


@pytest.mark.parametrize("variant", ["plain", "both_mistral_flags", "odd_head_size", "activation_relu"])
def test_torchs_trace_is_the_references(variant):
    weights = random_weights(random_config(**VARIANTS[variant]))
    check_backend(TorchBackend, weights, checks=[a_trace_shows_the_references_numbers])


def test_a_trace_of_a_closed_torch_backend_is_refused():
    backend = TorchBackend(random_weights(random_config()))
    backend.close()
    with pytest.raises(RequestError, match="the torch backend is closed"):
        backend.trace([1])


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0; it must be 1 or more"),
        ({"tolerance": 0.0}, "tolerance is 0.0; it must be above 0 and finite"),
        ({"tolerance": float("nan")}, "tolerance is nan; it must be above 0 and finite"),
        ({"seeds": -1}, "seeds is -1; it must be 0 or more"),
        ({"tokens": 0}, "tokens is 0; it must be 1 or more"),
        ({"timeout_s": 0}, "timeout_s is 0; it must be above 0"),
        ({"backends": []}, r"backends is \[\], expected a list of names"),
        ({"backends": "numpy"}, "backends is 'numpy', expected a list of names"),
    ],
)
def test_an_option_out_of_its_range_is_refused(folder, options, message):
    with pytest.raises(RequestError, match=message):
        verify(folder, **options)


def test_an_unknown_backend_and_a_missing_checkpoint_are_refused(folder, tmp_path):
    with pytest.raises(
        BackendUnavailableError, match="there is no backend 'nump'; known are numpy, native, torch"
    ):
        verify(folder, backends=["nump"])
    with pytest.raises(CheckpointError, match="is not an existing folder"):
        verify(tmp_path / "none", backends=["numpy"])


# The command


@pytest.fixture
def run(capfd):
    def run(*args):
        code = main(["verify", *map(str, args)])
        return code, *capfd.readouterr()

    return run


def test_the_command_prints_a_table_and_ends_with_0(run, folder):
    code, out, err = run(folder, "--backends", "numpy", "--seeds", "1", "--tokens", "4", "--threads", "1")
    assert (code, err) == (0, "")
    heading, row, *rest = out.splitlines()
    assert heading.split()[:4] == ["backend", "status", "max", "diff"]
    assert row.split()[:2] == ["numpy", "passed"]
    assert "baseline" in row
    assert rest == [
        "",
        "logits: 615 positions against the reference; allowed difference 0.0002",
        "tokens: 1 seeds x 4 tokens at temperature 0.8, compared with numpy's",
    ]


def test_the_command_names_what_failed_and_ends_with_1(run, folder):
    backends = "numpy,faulty:perturbed_mlp,faulty:Crashing"
    code, out, err = run(folder, "--backends", backends, "--layers", "--seeds", "1", "--tokens", "30")
    assert (code, err) == (1, "gpt2core: faulty:perturbed_mlp, faulty:Crashing failed\n")
    assert "faulty:perturbed_mlp: layers: first leaves the reference at layer 1 MLP (position " in out
    assert "faulty:perturbed_mlp: FAILED: leaves the reference at layer 1 MLP\n" in out
    assert "faulty:Crashing: FAILED: its process ended with exit code 9" in out


def test_the_command_tells_a_disagreement_and_its_margin(run, folder):
    options = ("--backends", "numpy,faulty:OtherDraws", "--seeds", "12", "--tokens", "30")
    code, out, _ = run(folder, *options)
    assert code == 1
    assert ": NOT within margin\n" in out


def test_the_command_says_that_a_backend_has_no_trace(run, folder):
    code, out, _ = run(folder, "--backends", "faulty:Wrapped", "--layers", "--seeds", "0")
    assert code == 0
    assert "faulty:Wrapped: layers: this backend lacks the capability Traces\n" in out


def test_json_is_one_strict_document_also_where_numbers_are_not_finite(run, folder):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    code, out, _ = run(folder, "--backends", "faulty:NotFinite", "--json", "--seeds", "1", "--tokens", "2")
    assert code == 1
    assert out.count("\n") == 1
    document = json.loads(out, parse_constant=refuse)
    assert (document["model"], document["passed"]) == (str(folder), False)
    (one,) = document["backends"]
    assert (one["status"], one["overall"]["max_difference"]) == ("failed", None)
    assert one["comparisons"][0]["name"] == "prefill"


def test_a_backend_that_cannot_run_is_skipped_with_the_remedy(run, folder, monkeypatch):
    from gpt2core import backends

    stranger = EntryPoint("stranger", "strange:Backend", backends.ENTRY_POINT_GROUP)
    monkeypatch.setattr(backends, "find_spec", lambda name: object() if name == "numpy" else None)
    monkeypatch.setenv("GPT2CORE_CC", "no-such-compiler")
    monkeypatch.setattr(backends, "_plugins", lambda: {"stranger": stranger})  # not the worker's
    code, out, _ = run(folder, "--seeds", "0")
    assert code == 0
    assert "stranger: skipped: BackendUnavailableError: there is no backend 'stranger'" in out
    assert "torch: skipped: install it with: pip install 'gpt2core[torch]'\n" in out
    assert "native: skipped: needs a C compiler, and GPT2CORE_CC names 'no-such-compiler'" in out


def test_the_commands_tolerance_is_the_librarys():
    from gpt2core.cli import program

    (option,) = (p for p in program.commands["verify"].params if p.name == "tolerance")
    assert f"[default: {TOLERANCE:.0e}".replace("e-0", "e-") in option.help


def test_the_worker_writes_logits_texts_and_trace(folder, tmp_path):
    texts = [[1, 2, 3, 4], [5, 6, 7], [8, 9]]
    job = {"backend": "faulty:perturbed_mlp", "model": str(folder), "threads": 1, "texts": texts}
    job |= {"prompt_ids": [1, 2], "seeds": 3, "tokens": 4, "temperature": 0.8, "traced_ids": [1, 2, 3]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    worker.main(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["errors"], result["traced"]) == ([], True)
    weights = perturbed_mlp(open_checkpoint(folder).weights)._weights
    got = np.load(tmp_path / "case-0.npy")
    np.testing.assert_allclose(got, reference_logits(weights, texts[0]), atol=TOLERANCE, rtol=0)
    with GPT2.from_pretrained(folder, backend="numpy") as model:
        engine = Engine(perturbed_mlp(open_checkpoint(folder).weights), model.tokenizer)
    for seed, tokens in enumerate(result["tokens"]):
        params = SamplingParams(max_new_tokens=4, temperature=0.8, seed=seed)
        (sequence,) = engine.submit([1, 2], params)
        while not sequence.finished:
            engine.step()
        assert sequence.generated == tokens
    with np.load(tmp_path / "trace.npz") as trace:
        assert trace["hidden_states"].shape == (7, 3, 32)
        assert trace["attentions"].shape == (3, 4, 3, 3)
        assert trace["logits"].shape == (3, 257)


@pytest.mark.parametrize(
    ("backend", "traced", "errors"),
    [
        ("faulty:Wrapped", False, []),
        ("faulty:Raising", False, ["ValueError: no such luck", "BackendError: "]),
        ("faulty:WrongShape", False, ["BackendError: prefill: forward returned ", "BackendError: "]),
        ("faulty:Missing", None, ["BackendUnavailableError: faulty:Missing cannot be imported: "]),
    ],
)
def test_the_worker_lets_no_fault_hide_another(folder, tmp_path, backend, traced, errors):
    job = {"backend": backend, "model": str(folder), "threads": 1, "texts": [[1, 2], [3], [4]]}
    job |= {"prompt_ids": [1, 2], "seeds": 2, "tokens": 2, "temperature": 0.8, "traced_ids": [1]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    worker.main(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["traced"] == traced
    assert len(result["errors"]) == len(errors)
    for got, want in zip(result["errors"], errors, strict=True):
        assert got.startswith(want)


def test_the_worker_reports_what_it_could_not_open(folder, tmp_path):
    job = {"backend": "numpy", "model": str(tmp_path / "none"), "threads": None}
    (tmp_path / "job.json").write_text(json.dumps(job))
    worker.main(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert "CheckpointError" in result["errors"][0]
    assert result["peak_memory_nbytes"] > 0
