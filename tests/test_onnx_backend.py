"""What is the ONNX Runtime backend's own: its graph, its runs, its memory, its settings."""

import mmap
import weakref

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from gpt2core.backends import create_backend
from gpt2core.backends._shared import memory
from gpt2core.backends.onnx import OnnxBackend, networks, passes
from gpt2core.backends.onnx import backend as session
from gpt2core.backends.onnx.graph import build_model, graph_weights
from gpt2core.backends.onnx.operators import padded_head_dim
from gpt2core.backends.onnx.runs import plan_runs
from gpt2core.batch import Batch
from gpt2core.checkpoint.open import open_checkpoint
from gpt2core.errors import BackendError, BackendUnavailableError, RequestError
from gpt2core.reference import reference_logits, reference_trace
from gpt2core.testing import VARIANTS, random_checkpoint, random_config, random_weights
from gpt2core.testing.conformance import TOLERANCE

TINY = random_weights(random_config())


def runs_of(*rows):
    return plan_runs(Batch.of(rows))


# --------------------------------------------------------------------------------------------------- graph


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_graph_is_valid_onnx_on_every_variant(variant):
    weights = random_weights(random_config(**VARIANTS[variant]))
    model = build_model(weights.config, dict(graph_weights(weights)))
    for tensor in model.graph.initializer:  # the checker would look for a file
        if tensor.data_location == TensorProto.EXTERNAL:
            count = int(np.prod(tensor.dims))
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
            tensor.raw_data = bytes(4 * count)
    onnx.checker.check_model(model, full_check=True)


def test_the_graph_holds_no_weights():
    model = build_model(TINY.config, dict(graph_weights(TINY)))
    external = {t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert external == {name for name, _ in TINY.named()} - {"wte.weight", "wpe.weight"} | {"lm_head.weight"}
    assert len(model.SerializeToString()) < 0.2 * TINY.nbytes


def test_the_graph_takes_the_checkpoints_own_arrays():
    own = {**dict(TINY.named()), "lm_head.weight": TINY.lm_head}
    assert all(array is own[name] for name, array in graph_weights(TINY))


def test_only_attention_is_copied_where_heads_are_widened():
    weights = random_weights(random_config(n_embd=35, n_head=5))
    assert padded_head_dim(weights.config) == 8
    own = {**dict(weights.named()), "lm_head.weight": weights.lm_head}
    copied = {name for name, array in graph_weights(weights) if array is not own[name]}
    assert copied == {
        f"h.{i}.attn.{part}" for i in range(3) for part in ("c_attn.weight", "c_attn.bias", "c_proj.weight")
    }


# ---------------------------------------------------------------------------------------------------- runs


def test_neighbouring_rows_share_a_run_whatever_their_order():
    (run,) = runs_of(([1], 5, 2), ([2], 3, 0), ([3], 9, 1))
    assert run.slots == slice(0, 3)
    assert run.tokens.tolist() == [[2], [3], [1]]
    assert run.seqlens_k.tolist() == [3, 9, 5]
    assert run.source.tolist() == [1, 2, 0]
    assert run.place.tolist() == [0, 1, 2]


def test_a_small_hole_is_bridged_at_the_first_position():
    (run,) = runs_of(([1], 5, 0), ([2], 3, 3))
    assert run.slots == slice(0, 4)
    assert run.seqlens_k.tolist() == [5, 0, 0, 3]
    assert run.place.tolist() == [0, 3]
    assert run.bridged.tolist() == [1, 2]


def test_a_wide_hole_is_not_bridged():
    runs = runs_of(([1], 5, 0), ([2], 3, 9))
    assert [run.slots for run in runs] == [slice(0, 1), slice(9, 10)]
    assert [run.bridged.tolist() for run in runs] == [[], []]


def test_prompts_that_begin_together_share_a_run_if_padding_is_cheap():
    (run,) = runs_of(([1, 2, 3], 0, 0), ([4, 5], 0, 1))
    assert run.tokens.tolist() == [[1, 2, 3], [4, 5, 5]]
    assert run.positions.tolist() == [[0, 1, 2], [0, 1, 1]]
    assert run.source.tolist() == [0, 1, 2, 3, 4]
    assert run.place.tolist() == [0, 1, 2, 3, 4]
    assert len(runs_of((range(60), 0, 0), ([4, 5], 0, 1))) == 2


def test_a_long_text_alone_is_read_in_parts():
    parts = runs_of((range(600), 100, 3), ([9], 0, 0))[1:]
    assert [part.tokens[0].tolist() for part in parts] == [
        list(range(256)), list(range(256, 512)), list(range(512, 600))
    ]  # fmt: skip
    assert [part.positions[0, 0] for part in parts] == [100, 356, 612]
    assert [part.seqlens_k.tolist() for part in parts] == [[355], [611], [699]]
    assert [part.source[0] for part in parts] == [0, 256, 512]
    assert [len(part.place) for part in parts] == [256, 256, 88]
    assert {part.slots.start for part in parts} == {3}


def test_the_parts_of_a_long_text_give_the_references_logits():
    weights = random_weights(random_config(n_positions=600))
    backend = OnnxBackend(weights)
    tokens = [i * 7 % 257 for i in range(600)]
    wanted = [0, 255, 256, 511, 512, 599]
    got = backend.forward(Batch.of([(tokens, 0, 1)], wanted), backend.new_cache(2, 600))
    np.testing.assert_allclose(got, reference_logits(weights, tokens)[wanted], rtol=0, atol=TOLERANCE)


def test_decoding_runs_stand_before_all_others():
    runs = runs_of(([1, 2], 0, 0), ([3, 4], 2, 1), ([5], 8, 2))
    assert [run.slots for run in runs] == [slice(2, 3), slice(0, 1), slice(1, 2)]
    assert runs[2].positions.tolist() == [[2, 3]]
    assert runs[2].seqlens_k.tolist() == [3]


def bridged_cache(backend):
    """Three rows in slots 0, 1 and 2, the middle one as long as the cache."""
    cache = backend.new_cache(3, 8)
    backend.forward(Batch.of([([1, 2, 3], 0, 0), (range(8), 0, 1), ([8, 9], 0, 2)]), cache)
    return cache


def test_a_bridged_sleepers_cache_keeps_every_byte():
    backend = OnnxBackend(TINY)
    cache = bridged_cache(backend)
    before = cache.kv[:, :, 1].tobytes()
    got = backend.forward(Batch.of([([10], 3, 0), ([11], 2, 2)]), cache)
    assert cache.kv[:, :, 1].tobytes() == before
    want = [reference_logits(TINY, tokens)[-1] for tokens in ([1, 2, 3, 10], [8, 9, 11])]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_a_bridged_sleepers_cache_keeps_every_byte_when_the_pass_fails():
    backend = OnnxBackend(TINY)
    cache = bridged_cache(backend)
    before = cache.kv[:, :, 1].tobytes()

    real = backend._network._passes._session

    class Failing:
        def io_binding(self):
            return real.io_binding()

        def run_with_iobinding(self, binding):
            cache.kv[:, :, :, :, 0] = 7
            raise RuntimeError("no more memory")

    backend._network._passes._session = Failing()
    with pytest.raises(BackendError, match="no more memory"):
        backend.forward(Batch.of([([10], 3, 0), ([11], 2, 2)]), cache)
    assert cache.kv[:, :, 1].tobytes() == before


# -------------------------------------------------------------------------------------------------- memory


def test_the_cache_is_bound_once_and_written_in_place():
    backend = OnnxBackend(TINY)
    cache = backend.new_cache(2, 16)
    backend.forward(Batch.of([([1, 2], 0, 1)]), cache)
    assert np.abs(cache.kv[:, :, 1, :, :2]).min() > 0
    assert not cache.kv[:, :, 0].any()
    assert not cache.kv[:, :, 1, :, 2:].any()
    bound = backend._network._passes._bindings[cache][1, 2]
    backend.forward(Batch.of([([3], 2, 1)]), cache)
    assert backend._network._passes._bindings[cache][1, 2] is bound


def test_bindings_do_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(passes, "_MOST_BINDINGS", 2)
    backend = OnnxBackend(TINY)
    cache = backend.new_cache(4, 16)
    for slot in range(4):
        backend.forward(Batch.of([([1], 0, slot)]), cache)
        assert len(backend._network._passes._bindings[cache]) <= 2


def test_mapped_weights_are_handed_over_where_they_lie_and_nothing_is_written_to_disk(tmp_path):
    folder = random_checkpoint(tmp_path)
    before = sorted(path.name for path in folder.iterdir())
    weights = open_checkpoint(folder).weights
    backend = OnnxBackend(weights)
    (kept,) = backend._network._passes._kept
    assert kept["lm_head.weight"].data_ptr() == weights.wte.ctypes.data
    assert sorted(path.name for path in folder.iterdir()) == before
    np.testing.assert_allclose(
        backend.forward(Batch.of([([1, 2], 0, 0)]), backend.new_cache(1, 8))[0],
        reference_logits(weights, [1, 2])[-1],
        rtol=0,
        atol=TOLERANCE,
    )


def test_pages_are_given_back_only_where_the_map_cannot_be_written_to(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(np.arange(4096, dtype=np.float32).tobytes())
    with path.open("rb") as file:
        read = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    assert memory.read_only_map(np.frombuffer(read, np.float32)[5:].reshape(1, -1)) is read
    assert memory.read_only_map(np.frombuffer(private, np.float32)) is None
    assert memory.read_only_map(np.zeros(3)) is None
    array = np.frombuffer(read, np.float32)
    with memory.giving_back([array]):
        pass
    assert array[4095] == 4095


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("device", ["tpu", "", "cuda:x", "cuda:", "cpu:0"])
def test_unknown_devices_are_refused_by_name(device):
    with pytest.raises(BackendUnavailableError, match=f"device '{device}' is unknown .* use 'cpu'"):
        OnnxBackend(TINY, device=device)


def test_a_missing_cuda_provider_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailableError, match=r"'cuda:1' is not there: .* onnxruntime-gpu"):
        OnnxBackend(TINY, device="cuda:1")


def test_cuda_asks_for_its_provider_by_index(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    want = [("CUDAExecutionProvider", {"device_id": 2}), "CPUExecutionProvider"]
    assert session._providers("cuda:2") == want
    assert session._providers("cuda")[0] == ("CUDAExecutionProvider", {"device_id": 0})


def test_threads_and_spinning_reach_onnx_runtime(monkeypatch):
    seen = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: seen.append(a[1]) or real(*a, **k))
    monkeypatch.setenv(session.SPINNING_VARIABLE, "0")
    OnnxBackend(TINY, threads=2)
    OnnxBackend(TINY, spinning=True)
    key = "session.intra_op.allow_spinning"
    assert [options.intra_op_num_threads for options in seen] == [2, 0]
    assert [options.get_session_config_entry(key) for options in seen] == ["0", "1"]
    assert seen[0].get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_bad_spinning_variable_is_refused(monkeypatch):
    monkeypatch.setenv(session.SPINNING_VARIABLE, "yes")
    with pytest.raises(RequestError, match="GPT2CORE_ONNX_SPINNING is 'yes'; use '0' or '1'"):
        OnnxBackend(TINY)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_pip_extra(monkeypatch, package):
    def without(module):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("gpt2core.backends.importlib.import_module", without)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'gpt2core\[onnx\]'"):
        create_backend("onnx", TINY)


def test_a_failure_inside_onnx_runtime_is_a_backend_error():
    backend = OnnxBackend(TINY)
    cache = backend.new_cache(1, 8)
    cache.kv = cache.kv[:, :, :, :1]
    with pytest.raises(BackendError, match="onnx backend failed on cpu"):
        backend.forward(Batch.of([([1, 2], 0, 0)]), cache)


def test_a_graph_that_is_refused_is_a_backend_error(monkeypatch):
    monkeypatch.setattr(networks, "build_model", lambda *_, **__: onnx.ModelProto())
    with pytest.raises(BackendError, match="onnx backend could not start on cpu"):
        OnnxBackend(TINY)


def test_closing_frees_the_session_though_a_cache_lives_on():
    backend = OnnxBackend(TINY)
    cache = backend.new_cache(1, 8)
    backend.forward(Batch.of([([1], 0, 0)]), cache)
    network = weakref.ref(backend._network._passes)
    backend.close()
    assert network() is None
    assert cache.nbytes > 0


# ------------------------------------------------------------------------------------------------- tracing


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trace_is_the_references_on_every_variant(variant):
    weights = random_weights(random_config(**VARIANTS[variant]))
    got, want = OnnxBackend(weights).trace([3, 1, 4, 1, 5]), reference_trace(weights, [3, 1, 4, 1, 5])
    for (name, mine), (_, theirs) in zip(got.parts(), want.parts(), strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE, err_msg=name)


def test_the_session_that_traces_is_made_once_and_on_demand():
    backend = OnnxBackend(TINY)
    assert backend._tracer is None
    backend.trace([1])
    tracer = backend._tracer
    backend.trace([1, 2])
    assert backend._tracer is tracer
    backend.close()
    with pytest.raises(RequestError, match="onnx backend is closed"):
        backend.trace([1])


def test_a_trace_that_fails_is_a_backend_error(monkeypatch):
    backend = OnnxBackend(TINY)
    monkeypatch.setattr(networks, "build_model", lambda *_, **__: onnx.ModelProto())
    with pytest.raises(BackendError, match="onnx backend failed to trace on cpu"):
        backend.trace([1])
