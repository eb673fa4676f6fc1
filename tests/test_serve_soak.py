"""Short forms of what `scripts/robustness` measures at length: leaks, malformed requests."""

import asyncio
import gc
import mmap
import os
import threading

import pytest
from load_client import ask_all, percentile, request
from malformed import malformed_requests
from robustness_abuse import send_malformed, slope, soak
from serving import Fake, process, serving, until

from gpt2core.testing import random_checkpoint

LEAK_LIMIT_NBYTES = 1024
REQUESTS = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("short"), n_positions=32))


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    return str(random_checkpoint(tmp_path_factory.mktemp("tiny"), n_positions=512))


def test_malformed_requests_get_answers_below_500_and_leave_the_server_alive(folder):
    with serving(model=folder, receipt_s=0.3) as server:
        statuses = asyncio.run(send_malformed(server.port, 600, seed=3))
        assert sum(statuses.values()) == 600
        assert max(statuses) < 500
        assert {400, 404, 405, 415, 422} <= set(statuses)
        until(server.idle)
        server.check_works()


def test_malformed_requests_are_the_same_for_the_same_seed():
    assert list(malformed_requests(50, seed=1)) == list(malformed_requests(50, seed=1))
    assert len(set(malformed_requests(50, seed=1))) == 50


def test_many_requests_leave_no_thread_and_no_descriptor(longer):
    with process("--model", longer) as (running, url):
        figures = asyncio.run(soak(int(url.rpartition(":")[2]), running.pid, REQUESTS))
    assert {200, 422, -1} <= set(figures["statuses"])
    assert set(figures["statuses"]) <= {200, 422, 429, -1}
    assert figures["threads"][1] <= figures["threads"][0]
    assert figures["descriptors"][1] <= figures["descriptors"][0]


def soak_in_this_process(server, count):
    return asyncio.run(soak(server.port, os.getpid(), count))


def test_a_planted_leak_is_found():
    fake = Fake(context=512)
    kept = []
    with serving(fake.load) as server:
        taken = server.driver._deliver

        def leak(updates, now_s):
            pages = mmap.mmap(-1, 16 * LEAK_LIMIT_NBYTES)  # not from what earlier tests freed
            pages.write(b"x" * len(pages))
            kept.append(pages)
            taken(updates, now_s)

        server.driver._deliver = leak
        figures = soak_in_this_process(server, 300)
        assert figures["slope_nbytes"] > LEAK_LIMIT_NBYTES


def test_a_planted_thread_and_descriptor_are_found():
    fake = Fake(context=512)
    stop = threading.Event()
    threads, files = [], []
    with serving(fake.load) as server:
        encode = server.driver.submit

        def leak(*args, **options):
            if len(threads) < 3:
                threads.append(threading.Thread(target=stop.wait))
                threads[-1].start()
                files.append(os.open(os.devnull, os.O_RDONLY))
            encode(*args, **options)

        figures_before = soak_in_this_process(server, 60)
        server.driver.submit = leak
        figures = soak_in_this_process(server, 60)
        grew = figures["threads"][1] - figures_before["threads"][1]
        assert grew >= 3
        assert figures["descriptors"][1] - figures_before["descriptors"][1] >= 3
    stop.set()
    for one in threads:
        one.join()
    for number in files:
        os.close(number)


def test_the_slope_is_that_of_a_line():
    assert slope([(0, 5), (10, 25), (20, 45)]) == pytest.approx(2)
    assert slope([(0, 5), (10, 5), (20, 5)]) == 0


def of_requests():
    gc.collect()
    return [one for one in gc.get_objects() if type(one).__name__ in ("Patient", "Ticket", "Exchange")]


def test_after_many_requests_the_server_remembers_none_of_them():
    fake = Fake(context=512)
    earlier = of_requests()  # of other tests' servers; held, so that no new one gets the same id
    before = {id(one) for one in earlier}
    with serving(fake.load) as server:
        soak_in_this_process(server, 200)
        until(server.idle)
        driver = server.driver
        assert not driver._tickets
        assert not driver._ticket_of
        assert not driver._inbox
        assert driver.places.used == 0
        assert driver.engine._scheduler.running == 0
        until(lambda: not server.uvicorn.server_state.connections)
        kept = [one for one in of_requests() if id(one) not in before]
        assert len(kept) <= 2  # and not all of them until their timers end


def test_streams_of_32_clients_are_complete_and_each_its_own(longer):
    with serving(model=longer) as server:
        bodies = [
            request("/generate", {"prompt": f"{i}", "max_new_tokens": 20, "seed": i, "stream": True})
            for i in range(32)
        ]
        together = ask_all(server.port, bodies, clients=32)
        assert all(one.status == 200 and one.clean and one.events == 22 for one in together)
        alone = ask_all(server.port, bodies[:4], clients=1)

        def texts(answer):
            return [line.partition(b'"text":')[2].partition(b',"token_id"')[0] for line in lines_of(answer)]

        assert [texts(one) for one in together[:4]] == [texts(one) for one in alone]


def lines_of(answer):
    return [line for line in answer.body.split(b"\n") if line.startswith(b'data: {"index"')]


def test_percentiles_are_values_that_occurred():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0], 0.99) == 1.0
