"""Quantized weights: how near they are, that files hold them bit for bit, and who runs or refuses them."""

import json
import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt2core import GPT2, open_checkpoint
from gpt2core.backends import available, choose, create_backend, load_factory
from gpt2core.backends.base import RunsPrecisions
from gpt2core.backends.onnx import products
from gpt2core.backends.torch import products as torch_products
from gpt2core.batch import Batch
from gpt2core.checkpoint.open import save_checkpoint
from gpt2core.cli import main
from gpt2core.encodings import (
    pack_nibbles,
    round_to_bfloat16,
    unpack_nibbles,
    widen_bfloat16,
)
from gpt2core.errors import BackendUnavailableError, CheckpointError, RequestError
from gpt2core.quantization.gptq import best_rounding, round_for_inputs
from gpt2core.quantization.rounding import (
    PRECISIONS,
    dequantize,
    int8_columns,
    int8_rows,
    quantize,
)
from gpt2core.reference import reference_logits
from gpt2core.testing import CONFORMANCE_CHECKS, VARIANTS, check_backend, random_config, random_weights
from gpt2core.weights import LINEAR

TINY = random_weights(random_config())
QUANTIZED = {precision: quantize(TINY, precision) for precision in PRECISIONS}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def linear_weights(weights):
    return [(field, getattr(block, field).weight) for block in weights.blocks for field in LINEAR]


def quantized_folder(tmp_path, *options):
    folder = tmp_path / "quantized"
    assert main(["quantize", "demo", str(folder), *options]) == 0
    return folder


# ---------------------------------------------------------------------------------------------- rounding


def test_int8_is_off_by_half_a_step_of_its_own_output_at_most():
    weight = noise(70, 9) * np.geomspace(1e-3, 1e3, 9, dtype=np.float32)
    for matrix, step in (
        (int8_columns(weight), np.abs(weight).max(0) / 127),
        (int8_rows(weight), np.abs(weight).max(1)[:, None] / 127),
    ):
        assert (np.abs(matrix.float32() - weight) <= 0.5001 * step).all()
        assert np.abs(matrix.values.astype(int)).max() == 127


@pytest.mark.parametrize("extra", [0, 5])
def test_tables_and_matrices_of_more_numbers_than_are_rounded_at_once_have_each_rows_own_scale(extra):
    """2^20 numbers are rounded at once; each row is larger than the one before it."""
    rows = 2 * 2**20 // 8 + extra
    weight = noise(rows, 8) * np.geomspace(1e-3, 1e3, rows, dtype=np.float32)[:, None]
    step = np.abs(weight).max(1)[:, None] / 127
    assert (np.abs(int8_rows(weight).float32() - weight) <= 0.5001 * step).all()
    assert (np.abs(int8_columns(weight).float32() - weight) <= 0.5001 * np.abs(weight).max(0) / 127).all()


@pytest.mark.parametrize("changes", [{"n_embd": 1, "n_head": 1}, {"n_inner": 1}], ids=str)
def test_layers_with_one_input_or_one_output_become_int4_and_stay_what_they_were(changes):
    weights = random_weights(random_config(**changes))
    before = {name: array.copy() for name, array in weights.named()}
    rounded = quantize(weights, "int4", group_size=32)
    assert [matrix.shape for _, matrix in linear_weights(rounded)] == [
        matrix.shape for _, matrix in linear_weights(weights)
    ]
    for name, array in weights.named():
        np.testing.assert_array_equal(array, before[name])


def test_weights_are_rounded_once_only():
    with pytest.raises(RequestError, match="quantized already, to int8; name the float model"):
        quantize(QUANTIZED["int8"], "int4")


def test_a_matrix_of_zeros_stays_zero():
    zeros = np.zeros((64, 3), np.float32)
    assert not int8_columns(zeros).float32().any()
    assert not round_for_inputs(zeros, noise(10, 64), 32).float32().any()


def test_bfloat16_is_off_by_one_part_in_256_at_most():
    x = noise(1000) * 1e3
    assert (np.abs(widen_bfloat16(round_to_bfloat16(x)) - x) <= np.abs(x) / 256).all()


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_nibbles_unpack_to_what_was_packed(length):
    values = np.random.default_rng(0).integers(0, 16, (3, length), dtype=np.uint8)
    assert np.array_equal(unpack_nibbles(pack_nibbles(values))[:, :length], values)
    assert pack_nibbles(values).shape == (3, (length + 1) // 2)


def test_searched_scales_err_less_than_those_of_the_extremes():
    w = noise(500, 64)
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    plain = (np.clip(np.rint(w / scale + zero), 0, 15) - zero) * scale
    values, scale, zero = best_rounding(w)
    searched = (values.astype(np.float32) - zero[:, None]) * scale[:, None]
    assert np.square(searched - w).sum() < 0.92 * np.square(plain - w).sum()
    assert (np.square(searched - w).sum(1) <= 1.0001 * np.square(plain - w).sum(1)).mean() > 0.99


@pytest.mark.parametrize("inputs", [64, 80])
def test_gptq_changes_products_less_than_rounding_each_weight_by_itself(inputs):
    weight = noise(inputs, 24)
    x = noise(400, 12, seed=1) @ noise(12, inputs, seed=2) + 0.1 * noise(400, inputs, seed=3)
    matrix = round_for_inputs(weight, x, 32)
    padded = np.pad(weight.T, ((0, 0), (0, -inputs % 32))).reshape(-1, 32)
    values, scale, zero = best_rounding(padded)
    alone = ((values.astype(np.float32) - zero[:, None]) * scale[:, None]).reshape(24, -1)[:, :inputs].T
    got, plain = (np.square(x @ (w - weight)).sum() for w in (matrix.float32(), alone))
    assert got < 0.5 * plain


def test_int8_leaves_the_perplexity_of_a_short_text_and_int4_raises_it_by_less_than_four_percent():
    checkpoint = open_checkpoint("demo")
    text = (  # one short text decides little, so the bounds are wide; the command in the docs reads a book
        "The old king sat by the window and looked out over the sea. It had been raining since the morning, "
        "and the ships lay still in the harbour. 'Will they come to-day?' asked the little princess, who had "
        "been standing behind his chair for a long time without saying a word. 'They will come when the wind "
        "turns,' said the king, 'and not an hour before; the wind has never yet asked a king when to blow.' "
    )
    score = {}
    for precision in ("float32", "int8", "int4"):
        with GPT2.from_pretrained(checkpoint.folder, backend="numpy", precision=precision) as model:
            score[precision] = model.score(text).perplexity
    assert abs(score["int8"] / score["float32"] - 1) < 0.004
    assert score["int4"] / score["float32"] - 1 < 0.04


def test_a_tied_head_is_rounded_and_stored_once():
    weights = QUANTIZED["int8"]
    assert weights.lm_head is weights.wte
    assert dequantize(weights).lm_head is not None
    names = [name for name, _ in weights.named()]
    assert len(names) == len(set(names))
    assert not any(name.startswith("lm_head") for name in names)
    separate = quantize(random_weights(random_config(tie_word_embeddings=False)), "int8")
    assert separate.lm_head is not separate.wte


def test_quantized_weights_take_the_memory_that_their_bits_say():
    demo = open_checkpoint("demo").stored
    share = {precision: quantize(demo, precision).nbytes / demo.nbytes for precision in ("int8", "bfloat16")}
    assert 0.25 < share["int8"] < 0.30
    assert 0.50 < share["bfloat16"] < 0.54


def test_numbers_that_are_not_finite_are_refused():
    head = TINY.wte.copy()
    head[3, 3] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        quantize(replace(TINY, wte=head, lm_head=head), "int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int3"}, "precision 'int3' is unknown; use 'int8' or 'int4' or 'bfloat16'"),
        ({"precision": "int4", "group_size": 48}, "group_size is 48; use 32 or 64 or 128"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options, message):
    with pytest.raises(RequestError, match=message):
        quantize(TINY, **options)


# -------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_read_back_bit_for_bit(tmp_path, precision, tied):
    weights = quantize(random_weights(random_config(tie_word_embeddings=tied)), precision, group_size=32)
    save_checkpoint(tmp_path, weights)
    got = open_checkpoint(tmp_path).stored
    assert (got.config, got.precision) == (weights.config, precision)
    for (name, array), (want_name, want) in zip(got.named(), weights.named(), strict=True):
        assert (name, array.dtype, array.shape) == (want_name, want.dtype, want.shape)
        assert array.tobytes() == want.tobytes()
        assert not array.flags.owndata or array.size == 0, f"{name} was copied, not mapped"
    reference = dequantize(weights)
    for (_, array), (_, want) in zip(
        open_checkpoint(tmp_path).weights.named(), reference.named(), strict=True
    ):
        assert np.array_equal(array, want)


def test_the_command_writes_a_model_that_loads_and_speaks(tmp_path, capsys):
    folder = quantized_folder(tmp_path, "--precision", "int8")
    assert "0.27 of float32's" in capsys.readouterr().out
    with GPT2.from_pretrained(folder) as model, GPT2.from_pretrained("demo", precision="int8") as direct:
        assert (model.backend.precision, direct.backend.precision) == ("int8", "int8")
        text = model.generate("Once upon a time", max_new_tokens=8, temperature=0)
        assert text.text == direct.generate("Once upon a time", max_new_tokens=8, temperature=0).text


def test_the_command_refuses_what_would_lose_something(tmp_path, capsys):
    folder = quantized_folder(tmp_path)
    assert main(["quantize", "demo", str(folder)]) == 1
    assert "already holds model.safetensors" in capsys.readouterr().err
    assert main(["quantize", str(folder), str(tmp_path / "again")]) == 2
    assert "is quantized already, to int8" in capsys.readouterr().err
    assert main(["quantize", "demo", str(folder), "--precision", "bfloat16", "--force"]) == 0
    assert open_checkpoint(folder).stored.precision == "bfloat16"


def test_a_quantized_folder_with_another_precision_asked_for_is_refused(tmp_path):
    save_checkpoint(tmp_path, QUANTIZED["int8"])
    stored = open_checkpoint(tmp_path).stored
    with pytest.raises(
        RequestError, match="'float32' is asked for, but the checkpoint is quantized to 'int8'"
    ):
        create_backend("numpy", stored, precision="float32")


def test_faults_of_a_quantized_file_are_all_named(tmp_path):
    save_checkpoint(tmp_path, QUANTIZED["int8"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 4}))
    with pytest.raises(CheckpointError, match=r"has a fault: config\.json says 4 layers, the file has 3"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    with pytest.raises(CheckpointError, match="2 layers, the file has 3"):
        open_checkpoint(tmp_path)
    for bad in ({"version": 2, "precision": "int8"}, {"version": 1, "precision": "int4"}, "int8", {}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"gpt2core_quantization": bad}))
        with pytest.raises(CheckpointError, match="this version does not read"):
            open_checkpoint(tmp_path)


# ----------------------------------------------------------------------------------------------- backends


def test_the_registry_knows_what_each_factory_runs_and_every_other_precision_is_refused_by_name():
    for name in available(load_plugins=False):
        factory = load_factory(name)
        offered = factory.precisions if isinstance(factory, RunsPrecisions) else ("float32",)
        for precision in ("float32", *PRECISIONS):
            if precision in offered:
                create_backend(name, TINY, precision=precision).close()
            else:
                with pytest.raises(
                    RequestError, match=f"the {name} backend does not run precision '{precision}'"
                ):
                    create_backend(name, TINY, precision=precision)


def test_auto_takes_a_backend_that_runs_the_precision():
    large = random_config("small")
    for precision in PRECISIONS:
        factory = load_factory(choose(large, precision=precision)[0])
        assert isinstance(factory, RunsPrecisions)
        assert precision in factory.precisions


def quantizing(name, precision):
    """A factory for `check_backend`: it runs the rounded weights that its float32 ones were made of."""

    def make(weights, **options):
        rounded = QUANTIZED_OF[precision]
        if weights.config != rounded.config:  # the suite's other model
            return create_backend(name, weights, precision=precision, **options)
        return create_backend(name, replace(rounded, wpe=weights.wpe), **options)

    return make


QUANTIZED_OF = {p: quantize(random_weights(random_config()), p, group_size=32) for p in PRECISIONS}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("check", CONFORMANCE_CHECKS, ids=lambda check: check.__name__)
def test_numpy_computes_what_the_dequantized_weights_say(check, precision):
    check_backend(quantizing("numpy", precision), dequantize(QUANTIZED_OF[precision]), checks=[check])


ROUNDED_INPUTS = 0.6
"""Largest difference of a logit where inputs are rounded to 8 bits too; 0.41 was the most measured."""


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("check", CONFORMANCE_CHECKS, ids=lambda check: check.__name__)
def test_onnx_computes_what_the_dequantized_weights_say_but_for_rounded_inputs(check, precision):
    reference = dequantize(QUANTIZED_OF[precision])
    check_backend(quantizing("onnx", precision), reference, checks=[check], tolerance=ROUNDED_INPUTS)


@pytest.mark.parametrize("variant", ["separate_head", "odd_head_size", "narrow_mlp"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_onnx_is_near_the_dequantized_weights_on_every_shape(variant, precision, few):
    weights = quantize(random_weights(random_config(**VARIANTS[variant])), precision, group_size=32)
    tokens = np.random.default_rng(1).integers(0, 257, 40).tolist()
    want = reference_logits(dequantize(weights), tokens)
    backend = create_backend("onnx", weights)
    if few:  # passes of few tokens have operators of their own
        cache = backend.new_cache(1, 40)
        parts = [
            backend.forward(Batch.of([(tokens[i : i + 4], i, 0)], range(4)), cache) for i in range(0, 40, 4)
        ]
        got = np.concatenate(parts)
    else:
        got = backend.forward(Batch.of([(tokens, 0, 0)], range(40)), backend.new_cache(1, 40))
    assert np.sqrt(np.square(got - want).mean()) < 0.06 * want.std()
    probability = np.exp(want - want.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    other = np.exp(got - got.max(1, keepdims=True))
    other /= other.sum(1, keepdims=True)
    assert (probability * np.log(probability / other)).sum(1).mean() < 0.006
    assert (got.argmax(1) == want.argmax(1)).mean() >= 0.85


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "flags : fma avx2 avx512_vnni", False),
        ("AMD64", "flags : avx_vnni", False),
        ("x86_64", "flags : fma avx2", True),
        ("x86_64", None, True),
        ("aarch64", None, False),
    ],
)
def test_only_x86_with_vnni_adds_products_without_overflow(tmp_path, monkeypatch, machine, flags, expected):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    assert products.sums_overflow(tmp_path / "cpuinfo") is expected


ROUNDED_ROWS = 0.4
"""Largest difference of a logit in PyTorch, whose scales are one per row; 0.25 was the most measured."""


@pytest.mark.parametrize("check", CONFORMANCE_CHECKS, ids=lambda check: check.__name__)
def test_torch_computes_what_the_dequantized_weights_say_but_for_rounded_inputs(check):
    reference = dequantize(QUANTIZED_OF["int8"])
    check_backend(quantizing("torch", "int8"), reference, checks=[check], tolerance=ROUNDED_ROWS)


@pytest.mark.parametrize(
    "changes",
    [
        *(VARIANTS[name] for name in ("separate_head", "odd_head_size", "narrow_mlp")),
        *({"activation_function": name} for name in ("gelu", "gelu_10", "relu", "silu")),
    ],
    ids=str,
)
def test_torch_is_near_the_dequantized_weights_on_every_shape_and_activation(changes):
    weights = quantize(random_weights(random_config(**changes)), "int8")
    tokens = np.random.default_rng(1).integers(0, 257, 40).tolist()
    want = reference_logits(dequantize(weights), tokens)
    backend = create_backend("torch", weights)
    got = backend.forward(Batch.of([(tokens, 0, 0)], range(40)), backend.new_cache(1, 40))
    assert np.sqrt(np.square(got - want).mean()) < 0.045 * want.std()


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_an_int8_product_of_torch_is_that_of_the_rounded_rows(rows):
    weight = int8_columns(noise(64, 24))
    x, bias = noise(rows, 64, seed=1) * np.geomspace(0.01, 100, rows, dtype=np.float32)[:, None], noise(24)
    scale = np.abs(x).max(1, keepdims=True) / 127
    want = np.rint(x / scale).astype(np.float64) * scale @ weight.float32() + bias
    parts = map(torch.from_numpy, (weight.values.T.copy(), weight.scale.copy(), bias))
    got = torch_products.int8_product(*parts)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), rtol=2e-5)


def test_a_text_in_torchs_int8_does_not_depend_on_those_that_share_its_products():
    """The neighbours' numbers are a thousand times as large, or none: a common scale would show."""
    weight = int8_columns(noise(64, 24))
    product = torch_products.int8_product(torch.tensor(weight.values.T), torch.tensor(weight.scale))
    x = torch.from_numpy(noise(4, 64, seed=1))
    alone = product(x[:1])
    x[1:] *= torch.tensor([[1000.0], [0.0], [torch.nan]])
    together = product(x)
    assert torch.equal(together[:1], alone)
    assert torch.equal(together[2], torch.zeros(24))
    assert together[3].isnan().all()


def test_rows_with_infinity_stay_not_finite_in_torchs_int8():
    weight = int8_columns(noise(64, 24))
    product = torch_products.int8_product(torch.tensor(weight.values.T), torch.tensor(weight.scale))
    x = torch.from_numpy(noise(2, 64, seed=1))
    x[0, 7] = -torch.inf
    assert not product(x)[0].isfinite().any()


@pytest.mark.parametrize(
    ("capabilities", "steps"),
    [
        ({"architecture": "x86_64", "avx512_vnni": True}, 127),
        ({"architecture": "x86_64", "avx_vnni": True}, 127),
        ({"architecture": "x86_64", "avx2": True}, 63),
        ({"architecture": "aarch64"}, 127),
        ({}, 63),
    ],
)
def test_torch_rounds_to_fewer_steps_where_sums_of_products_could_overflow(capabilities, steps):
    assert torch_products._steps(capabilities) == steps


@pytest.mark.parametrize("steps", [127, 63])
def test_what_torch_hands_to_its_int8_product_is_as_fine_as_said(monkeypatch, steps):
    seen = []
    multiply = torch_products._INT8_PRODUCT
    monkeypatch.setattr(torch_products, "_INT8_PRODUCT", lambda q, *a: seen.append(q) or multiply(q, *a))
    monkeypatch.setattr(torch_products, "_steps", lambda _: steps)
    weight, x = int8_columns(noise(64, 24)), noise(6, 64, seed=1)
    product = torch_products.int8_product(torch.tensor(weight.values.T), torch.tensor(weight.scale))
    got = product(torch.from_numpy(x)).numpy()
    assert int(seen[0].max()) <= 2 * steps + 1
    error = np.square(got - x @ weight.float32()).mean() ** 0.5
    assert error < {127: 0.08, 63: 0.16}[steps]


def test_torch_refuses_quantized_weights_on_other_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        BackendUnavailableError, match="the torch backend runs precision 'int8' on device 'cpu' only, not 'cu"
    ):
        create_backend("torch", QUANTIZED["int8"], device="cuda")


def test_a_torch_without_the_int8_product_says_what_to_use(monkeypatch):
    monkeypatch.setattr(torch_products, "_INT8_PRODUCT", None)
    with pytest.raises(BackendUnavailableError, match="does not run precision 'int8' here; use"):
        create_backend("torch", QUANTIZED["int8"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from Linux's /proc")
def test_torch_keeps_one_copy_of_a_quantized_folder(tmp_path):
    """In a process of its own: 21 MB of weights, of which oneDNN's copy stays and the file's pages do not."""
    config = random_config(n_embd=512, n_layer=6, n_head=8, vocab_size=4096)
    save_checkpoint(tmp_path, quantize(random_weights(config), "int8"))
    code = f"""
import psutil
from gpt2core import Batch, open_checkpoint
from gpt2core.backends import create_backend
from gpt2core.testing import random_config, random_weights
def run(weights):
    backend = create_backend("torch", weights, precision="int8")
    backend.forward(Batch.of([([1, 2], 0, 0)]), backend.new_cache(1, 8))
    return backend
warm = run(random_weights(random_config()))
weights, rss = open_checkpoint({str(tmp_path)!r}).stored, psutil.Process().memory_info().rss
backend = run(weights)
print((psutil.Process().memory_info().rss - rss) / weights.nbytes)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.8 < float(result.stdout) < 1.4


def test_onnx_refuses_quantized_weights_on_other_devices():
    with pytest.raises(
        BackendUnavailableError, match="runs precision 'int8' on device 'cpu' only, not 'cuda'"
    ):
        create_backend("onnx", QUANTIZED["int8"], device="cuda")


@pytest.mark.parametrize("variant", ["separate_head", "odd_head_size", "narrow_mlp"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_numpy_runs_every_shape(variant, precision):
    weights = quantize(random_weights(random_config(**VARIANTS[variant])), precision)
    check_backend(
        lambda _, **options: create_backend("numpy", weights, **options),
        dequantize(weights),
        checks=CONFORMANCE_CHECKS[:1],
    )
