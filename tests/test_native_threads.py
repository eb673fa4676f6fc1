"""The native backend's threads and memory: as many as said, also in a forked child, and none that stay."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpt2core.backends import create_backend
from gpt2core.backends.native import NativeBackend
from gpt2core.batch import Batch
from gpt2core.checkpoint.open import save_checkpoint
from gpt2core.errors import BackendUnavailableError, RequestError
from gpt2core.quantization.rounding import PRECISIONS, quantize
from gpt2core.testing import random_config, random_weights

TINY = random_weights(random_config())


def run(script, *arguments):
    """A program of its own, whose threads and memory are only the backend's."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# ----------------------------------------------------------------------------------------- threads, processes

START = """
import gc, os, sys, time
import numpy as np, psutil
from gpt2core.backends.native import NativeBackend
from gpt2core.batch import Batch
from gpt2core.testing import random_config, random_weights
def logits(backend):
    batch = Batch.of([(range(30), 0, 0), (range(5), 0, 1)])
    return backend.forward(batch, backend.new_cache(2, 40)).tobytes()
"""
FORK = f"""{START}
backend = NativeBackend(random_weights(random_config()), threads=3)
want = logits(backend)
for turn in range(3):  # the last child closes, too
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        got = [logits(backend) for _ in range(3)]
        threads = psutil.Process().num_threads()
        if turn == 2:
            backend.close()
        os.write(write, f"{{got == [want] * 3}} {{threads}}".encode())
        os._exit(0)
    print(os.read(read, 100).decode(), os.waitpid(child, 0)[1], logits(backend) == want)
"""


def test_a_forked_child_computes_the_same_and_the_parent_goes_on():
    assert run(FORK) == ["True", "3", "0", "True"] * 3


def test_a_team_takes_one_pass_at_a_time_whoever_calls():
    backend = NativeBackend(TINY, threads=1)
    kernels, inside, most = backend._library, [], []

    class Watched:
        """The library, which notes how many are in a pass at once."""

        def __getattr__(self, name):
            return getattr(kernels, name)

        def forward(self, *arguments):
            inside.append(arguments)
            time.sleep(0.02)  # longer than another thread takes to get here
            most.append(len(inside))
            inside.pop()
            return 0

    backend._library = Watched()
    caches = [backend.new_cache(1, 8) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda cache: backend.forward(Batch.of([([1, 2], 0, 0)]), cache), caches))
    backend._library = kernels
    assert most == [1, 1, 1, 1]
    backend.close()


FORK_IN_A_PASS = f"""{START}
import threading
backend = NativeBackend(random_weights(random_config()), threads=2)
want, on = logits(backend), True
def work():
    while on:
        logits(backend)
other = threading.Thread(target=work)
other.start()
for _ in range(20):
    if (child := os.fork()) == 0:
        os._exit(0 if logits(backend) == want else 1)
    print(os.waitpid(child, 0)[1])
on = False
other.join()
print(logits(backend) == want)
"""


def test_a_child_forked_while_another_thread_is_in_a_pass_computes_the_same():
    assert run(FORK_IN_A_PASS) == ["0"] * 20 + ["True"]


THREADS = f"""{START}
def threads_like(count):
    until = time.monotonic() + 10  # a thread that was joined is listed for a moment longer
    while psutil.Process().num_threads() != count and time.monotonic() < until:
        time.sleep(0.01)
    return psutil.Process().num_threads() - count
weights = random_weights(random_config())
NativeBackend(weights, threads=1)
before = psutil.Process().num_threads()
closed, dropped = (NativeBackend(weights, threads=5) for _ in range(2))
logits(closed), logits(dropped)
print(threads_like(before + 8))
closed.close()
print(threads_like(before + 4))
closed.close()
del dropped
print(threads_like(before))
for _ in range(50):
    NativeBackend(weights, threads=3)
print(threads_like(before))
"""


def test_threads_end_with_close_and_with_the_last_reference():
    assert run(THREADS) == ["0"] * 4


def test_a_closed_backend_refuses_and_may_be_closed_again():
    backend = NativeBackend(TINY)
    cache = backend.new_cache(1, 8)
    backend.close()
    backend.close()
    with pytest.raises(RequestError, match="native backend is closed; load the model again"):
        backend.forward(Batch.of([([1], 0, 0)]), cache)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu", ""])
def test_other_devices_are_refused_by_name(device):
    with pytest.raises(BackendUnavailableError, match=f"runs on device 'cpu' only, not '{device}'"):
        create_backend("native", TINY, device=device)


# ----------------------------------------------------------------------------------------------------- memory

MEMORY = """
import sys
from gpt2core import Batch, open_checkpoint
from gpt2core.backends import create_backend
from gpt2core.testing import random_config, random_weights
def passed(weights):
    backend = create_backend("native", weights, threads=2)
    backend.forward(Batch.of([([1, 2], 0, 0)]), backend.new_cache(1, 8))
    return backend
def nbytes(name):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(name))
warm = passed(random_weights(random_config())), open_checkpoint(sys.argv[1])
before = nbytes("VmRSS")
weights = open_checkpoint(sys.argv[2]).stored
backend = passed(weights)
print((nbytes("VmRSS") - before) / weights.nbytes, (nbytes("VmHWM") - before) / weights.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from Linux's /proc")
@pytest.mark.parametrize("precision", ["float32", *PRECISIONS])
def test_one_copy_of_a_checkpoint_stays_and_the_file_is_not_kept(precision, tmp_path):
    """In a process of its own: 4.4 million parameters, whose pages of the file are given back."""
    for name, vocab_size in (("warm", 16), ("folder", 32768)):
        (tmp_path / name).mkdir()
        weights = random_weights(random_config(n_embd=128, n_layer=1, vocab_size=vocab_size))
        if precision == "float32":
            save_checkpoint(tmp_path / name, weights)
        else:
            save_checkpoint(tmp_path / name, quantize(weights, precision))
    stays, most = map(float, run(MEMORY, tmp_path / "warm", tmp_path / "folder"))
    assert 0.8 < stays < 1.2  # 1.03 to 1.05 measured
    assert most < 2.3  # 1.2 to 2.0 measured: pages are given back every 10 ms
