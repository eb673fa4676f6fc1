"""What the JAX backend promises beyond conformance: few compilations, kept ones, recovery, meshes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from gpt2core.backends.jax import Gpt2Module, JaxBackend, executables
from gpt2core.backends.jax.runs import Buckets, plan_runs
from gpt2core.batch import Batch
from gpt2core.errors import BackendError, BackendUnavailableError, RequestError
from gpt2core.reference import reference_logits
from gpt2core.testing import random_config, random_weights

WEIGHTS = random_weights(random_config(n_layer=2), seed=3)
TOLERANCE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module")
def backend():
    return JaxBackend(WEIGHTS)


def last_logits(*histories):
    return np.stack([reference_logits(WEIGHTS, history)[-1] for history in histories])


# ------------------------------------------------------------------------------------------------- the module


def test_the_flax_module_alone_gives_the_references_logits():
    module = Gpt2Module(WEIGHTS)
    ids = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    want = np.stack([reference_logits(WEIGHTS, row) for row in ids.tolist()])
    np.testing.assert_allclose(nnx.jit(lambda module, ids: module(ids))(module, ids), want, **TOLERANCE)


def test_the_modules_state_holds_a_tied_head_once():
    tied = nnx.state(Gpt2Module(WEIGHTS), nnx.Param)
    separate = random_weights(random_config(n_layer=2, tie_word_embeddings=False))
    shapes = [leaf.shape for leaf in jax.tree.leaves(tied)]
    assert shapes.count(WEIGHTS.wte.shape) == 1
    assert sum(int(np.prod(shape)) for shape in shapes) * 4 == WEIGHTS.nbytes
    leaves = jax.tree.leaves(nnx.state(Gpt2Module(separate), nnx.Param))
    assert [leaf.shape for leaf in leaves].count(WEIGHTS.wte.shape) == 2


# -------------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize(
    "buckets", [Buckets(6, 1024), Buckets(5, 96, 4, (128,)), Buckets(1, 3), Buckets(33, 700)]
)
def test_every_plan_stays_within_the_shapes_that_bound_the_compilations(buckets):
    rng, bound = np.random.default_rng(0), buckets.shapes()
    for _ in range(300):
        count = int(rng.integers(1, buckets.slots + 1))
        lengths = rng.choice([1, 2, 17, buckets.capacity, int(rng.integers(1, buckets.capacity + 1))], count)
        lengths = np.minimum(lengths, buckets.capacity)
        starts = [int(rng.integers(0, buckets.capacity - n + 1)) for n in lengths]
        slots = rng.permutation(buckets.slots)[:count]
        rows = [([7] * int(n), s, int(slot)) for n, s, slot in zip(lengths, starts, slots, strict=True)]
        total = int(lengths.sum())
        batch = Batch.of(
            rows, rng.integers(0, total, int(rng.integers(0, 5))).tolist() if count % 2 else None
        )
        runs = plan_runs(batch, buckets)
        assert {run.shape for run in runs} <= bound
        assert sorted(slot for run in runs for slot in run.rows[:, 0] if slot < buckets.slots) == sorted(
            slots
        )
        assert sorted(i for run in runs for i in run.answers) == list(range(len(batch.logits_at)))
    assert len(bound) <= 300


@pytest.mark.parametrize("border", [128, 256])
def test_a_row_that_decodes_across_a_buckets_border_sees_every_position(border):
    weights = random_weights(random_config(n_positions=300, n_embd=8, n_head=2, n_layer=1), seed=5)
    tokens = np.random.default_rng(border).integers(0, 257, border + 2).tolist()
    backend = JaxBackend(weights)
    cache = backend.new_cache(1, 300)
    backend.forward(Batch.of([(tokens[: border - 1], 0, 0)], []), cache)
    got = [backend.forward(Batch.of([([tokens[i]], i, 0)]), cache)[0] for i in range(border - 1, border + 2)]
    np.testing.assert_allclose(got, reference_logits(weights, tokens)[border - 1 :], **TOLERANCE)


def test_no_step_reads_less_than_its_rows_hold():
    buckets = Buckets(4, 1000)
    for end in range(1, 1001):
        assert end <= buckets.read(end) <= 1000


def test_a_small_model_needs_few_shapes():
    assert len(Buckets(4, 96, 4, (128,)).shapes()) == 3


def test_other_lengths_in_the_same_bucket_compile_nothing_new():
    backend = JaxBackend(WEIGHTS, keep_compiled=False)
    cache = backend.new_cache(4, 96)
    backend.forward(Batch.of([([1, 2], 0, 0)]), cache)
    backend.forward(Batch.of([([3], 2, 0)]), cache)
    assert backend.compilations == 2
    backend.forward(Batch.of([([1] * 40, 0, 1), ([2] * 7, 0, 3)]), cache)
    backend.forward(Batch.of([([1], 40, 1), ([2], 7, 3), ([4], 3, 0)]), cache)
    assert (backend.compilations, backend.loaded) == (2, 0)
    assert len(cache.buckets.shapes()) == 3


# ---------------------------------------------------------------------------------------------- compile cache


def one_step(backend):
    return backend.forward(Batch.of([([1, 2, 3], 0, 0)]), backend.new_cache(2, 16))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path))
    return tmp_path / "jax"


def test_a_second_backend_loads_what_the_first_compiled(folder):
    first, second = JaxBackend(WEIGHTS), JaxBackend(WEIGHTS)
    want = one_step(first)
    np.testing.assert_array_equal(one_step(second), want)
    assert (first.compilations, first.loaded, second.compilations, second.loaded) == (1, 0, 0, 1)
    cache = second.new_cache(2, 16)
    before = cache.kv
    second.forward(Batch.of([([1, 2, 3], 0, 0)]), cache)
    assert before.is_deleted()  # a loaded step takes the cache for good as well


def test_names_of_one_activation_share_the_kept_step(folder):
    backends = []
    for name in ("silu", "swish", "tanh"):
        backends.append(JaxBackend(random_weights(random_config(activation_function=name))))
        one_step(backends[-1])
    assert [(made.compilations, made.loaded) for made in backends] == [(1, 0), (0, 1), (1, 0)]


def test_the_folder_is_the_users_alone(folder):
    one_step(JaxBackend(WEIGHTS))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-9], lambda b: b[:50] + b"?" + b[51:]])
def test_a_damaged_entry_is_compiled_anew_and_replaced(folder, damage):
    one_step(JaxBackend(WEIGHTS))
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again, after = JaxBackend(WEIGHTS), JaxBackend(WEIGHTS)
    np.testing.assert_allclose(one_step(again), last_logits([1, 2, 3]), **TOLERANCE)
    one_step(after)
    assert (again.compilations, after.compilations, after.loaded) == (1, 0, 1)


def test_what_is_kept_is_of_this_source_this_machine_and_these_shapes(monkeypatch):
    devices = jax.devices("cpu")[:1]
    key = executables.executable_key(devices, "shape")
    assert key == executables.executable_key(devices, "shape")
    others = [executables.executable_key(devices, "another shape")]
    for name, value in (
        ("_source", "another source"),
        ("count_cores", 1000),
        ("describe_processor", ("another",)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(executables, name, lambda value=value: value)
            others.append(executables.executable_key(devices, "shape"))
    assert len({key, *others}) == 5


def test_the_source_in_the_key_is_that_of_the_compiled_step(monkeypatch):
    before = executables._source()
    monkeypatch.setattr(executables, "_SOURCES", ("module.py",))
    executables._source.cache_clear()
    try:
        assert executables._source() != before
    finally:
        executables._source.cache_clear()
    assert {"module.py", "step.py"} <= {path.name for path in Path(executables.__file__).parent.iterdir()}


def test_a_folder_that_others_may_write_to_is_neither_read_nor_written(folder):
    one_step(JaxBackend(WEIGHTS))
    folder.chmod(0o777)
    before = sorted(path.stat().st_mtime_ns for path in folder.iterdir())
    backend = JaxBackend(WEIGHTS)
    one_step(backend)
    assert (backend.compilations, backend.loaded) == (1, 0)
    assert sorted(path.stat().st_mtime_ns for path in folder.iterdir()) == before


def test_a_folder_that_cannot_be_made_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT2CORE_CACHE", str(tmp_path / "file"))
    np.testing.assert_allclose(one_step(JaxBackend(WEIGHTS)), last_logits([1, 2, 3]), **TOLERANCE)


def test_without_keep_compiled_nothing_is_written(folder):
    one_step(JaxBackend(WEIGHTS, keep_compiled=False))
    assert not folder.exists()


# ---------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("x64", [False, True])
def test_the_users_configuration_is_left_alone_and_does_not_matter(x64):
    with jax.enable_x64(x64), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        before = dict(jax.config.values)
        backend = JaxBackend(WEIGHTS, keep_compiled=False)
        got = one_step(backend)
        trace = backend.trace([1, 2, 3])
        assert dict(jax.config.values) == before
        assert jax.config.jax_enable_x64 is x64
    assert (got.dtype, trace.logits.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(got, last_logits([1, 2, 3]), **TOLERANCE)


# --------------------------------------------------------------------------------------------------- failures


def failing(backend, monkeypatch, *, consume, error=None):
    """Let the next step fail, before or after it has taken the cache."""

    def step(leaves, kv, rows, wanted):
        if consume:
            kv.delete()
        raise error or RuntimeError("out of memory")

    monkeypatch.setattr(backend, "_step", lambda shape, cache: step)


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failed_batch_can_be_tried_again_whatever_became_of_the_cache(backend, monkeypatch, consume, error):
    cache = backend.new_cache(4, 96)
    a, b, c = [1, 2, 3, 4], [9, 8, 7, 6, 5, 4], [11, 12]
    backend.forward(Batch.of([(a, 0, 0), (b, 0, 2), (c, 0, 1)]), cache)
    batch = Batch.of([([5], 4, 0), ([3], 6, 2)])
    with monkeypatch.context() as patch:
        failing(backend, patch, consume=consume, error=error)
        with pytest.raises((BackendError, KeyboardInterrupt)) as raised:
            backend.forward(batch, cache)
        if isinstance(error, RuntimeError):
            says = "failed step consumed the cache" if consume else "what was cached is untouched"
            assert says in str(raised.value)
            assert "out of memory" in str(raised.value)
    np.testing.assert_allclose(backend.forward(batch, cache), last_logits([*a, 5], [*b, 3]), **TOLERANCE)
    got = backend.forward(
        Batch.of([([1], 2, 1), ([2, 3], 3, 0)]), cache
    )  # a bystander goes on, a row rewinds
    np.testing.assert_allclose(got, last_logits([*c, 1], [*a[:3], 2, 3]), **TOLERANCE)


def test_new_rows_are_served_after_a_lost_cache(backend, monkeypatch):
    cache = backend.new_cache(2, 96)
    with monkeypatch.context() as patch:
        failing(backend, patch, consume=True)
        with pytest.raises(BackendError, match="failed step consumed the cache"):
            backend.forward(Batch.of([([1, 2], 0, 0)]), cache)
    got = backend.forward(Batch.of([([4, 5], 0, 1)]), cache)
    np.testing.assert_allclose(got, last_logits([4, 5]), **TOLERANCE)


# ---------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "abacus"}, BackendUnavailableError, "'abacus' is unknown to the jax backend; use 'cpu'"),
        ({"device": "cpu:x"}, BackendUnavailableError, "'cpu:x' is unknown"),
        ({"device": "cpu:99"}, BackendUnavailableError, r"'cpu:99' is not there: JAX .* sees \d+ x cpu"),
        ({"device": "tpu"}, BackendUnavailableError, r"'tpu' is not there: JAX .* sees \d+ x cpu"),
        ({"devices": 99}, BackendUnavailableError, r"devices=99 from 'cpu' on are not there"),
        ({"devices": 0}, RequestError, "devices is 0; use a whole number of 1 or more"),
        ({"threads": 0}, RequestError, "threads is 0"),
    ],
)
def test_an_impossible_option_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        JaxBackend(WEIGHTS, **options)


def test_mesh_and_devices_exclude_each_other():
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("x",))
    with pytest.raises(RequestError, match="mesh and devices were both given"):
        JaxBackend(WEIGHTS, mesh=mesh, devices=1)


MESH = """
import jax, numpy as np
from gpt2core.backends.jax import JaxBackend
from gpt2core.testing import CONFORMANCE_CHECKS, check_backend, random_config, random_weights

wanted = ("decoding_equals_prefilling", "batch_equals_single", "a_trace_shows_the_references_numbers")
checks = [check for check in CONFORMANCE_CHECKS if check.__name__ in wanted]
assert len(jax.devices()) == 4 and len(checks) == 3
weights = random_weights(random_config(n_layer=2, n_positions=64), seed=3)

made = []
def four(weights, *, device="cpu", threads=None):
    made.append(JaxBackend(weights, device=device, threads=threads, devices=4))
    return made[-1]

check_backend(four, weights, checks=checks)
check_backend(four, weights, checks=checks[:1])
assert made[-1].loaded == 1, "a sharded step was not kept"
kv = made[0].new_cache(2, 8).kv
assert {shard.data.shape for shard in kv.addressable_shards} == {(2, 2, 2, 1, 8, 8)}
odd = random_weights(random_config(n_layer=1, n_positions=64, n_embd=35, n_head=5), seed=3)
mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))
check_backend(lambda w, **options: JaxBackend(w, mesh=mesh), odd, checks=checks[:1])
print("agree")
"""


def test_a_model_cut_over_four_devices_agrees_with_the_reference(tmp_path):
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "GPT2CORE_CACHE": str(tmp_path),
    }
    result = subprocess.run([sys.executable, "-c", MESH], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "agree\n"), result.stderr[-2000:]
