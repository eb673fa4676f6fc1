"""A process ends as it is told while threads compute on the native backend; the long form is
`scripts/robustness exit`."""

import signal
import subprocess
import sys

import httpx2
import pytest
from exit_program import ENDED_S, ENDS, WAYS, exit_code
from serving import process

from gpt2core.quantization.rounding import PRECISIONS
from gpt2core.testing import random_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("exit") / "model", n_positions=512)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_process_ends_with_its_own_exit_code_while_daemon_threads_compute(way, end, checkpoint):
    assert exit_code("native", way, end, checkpoint) == ENDS[end]


@pytest.mark.parametrize("end", ["return", "sys.exit"])
def test_such_an_end_is_no_matter_of_luck(end, checkpoint):
    """Freed under a running pass, memory and threads broke 7 of 11 processes."""
    assert [exit_code("native", "forward", end, checkpoint) for _ in range(5)] == [ENDS[end]] * 5


def test_the_server_ends_at_a_second_signal_while_it_computes(checkpoint):
    with process("--model", checkpoint, "--backend", "native", "--threads", "2") as (running, url):
        body = {"prompt": "a", "max_new_tokens": 500, "n": 4, "stream": True}
        with (
            httpx2.Client(timeout=20) as client,
            client.stream("POST", f"{url}/generate", json=body) as answer,
        ):
            next(answer.iter_raw())
            running.send_signal(signal.SIGTERM)
            running.send_signal(signal.SIGTERM)
            assert running.wait(ENDED_S) in (0, -signal.SIGTERM)


TURNS = """
import os, sys, threading
from gpt2core.backends import create_backend
from gpt2core.batch import Batch
from gpt2core.testing import random_config, random_weights
backend = create_backend("native", random_weights(random_config()), threads=2, precision=sys.argv[1])
texts = [Batch.of([(range(20 + n), 0, 0)], range(20 + n)) for n in range(6)]
def logits(batch):
    return backend.forward(batch, backend.new_cache(1, 60)).tobytes()
want, right = [logits(batch) for batch in texts], []
def work(n):
    right.extend(logits(texts[n]) == want[n] for _ in range(60))
threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
os._exit(right != [True] * 360)
"""


@pytest.mark.parametrize("precision", ["float32", *PRECISIONS])
def test_python_threads_with_caches_of_their_own_get_the_bits_of_one_alone(precision):
    """In a process that can be killed: passes that do not wait for each other may never end."""
    assert subprocess.run([sys.executable, "-c", TURNS, precision], timeout=60).returncode == 0
