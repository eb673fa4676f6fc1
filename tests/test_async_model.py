"""`AsyncGPT2`: the texts of `GPT2` for coroutines, one thread for all of them, and nothing left behind."""

import asyncio
import contextlib
import threading

import fakes
import numpy as np
import pytest
from engines import HOT, idle, make_model, texts

from gpt2core import GPT2, AsyncGPT2, BackendError, InvalidSamplingError, RequestError
from gpt2core.testing import random_checkpoint

CLOSED = "this AsyncGPT2 is closed; make another one"


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def gated_model(**options):
    """A model whose steps wait for a gate, which is shut."""
    gate = threading.Event()

    def before(batch):
        assert gate.wait(20)

    return make_model(before=before, **options), gate


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name == "gpt2core-async"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert engine_threads() == []


def test_the_texts_are_those_of_the_model_one_several_and_choices():
    async def main():
        async with AsyncGPT2(make_model()) as model:
            one = await model.generate("a", max_new_tokens=9, **HOT)
            several = await model.generate(["a", [98, 99]], max_new_tokens=9, **HOT)
            choices = await model.generate("a", n=3, max_new_tokens=9, **HOT)
            assert await model.generate([]) == []
            return [one, *several, *choices]

    want = make_model()
    assert texts(asyncio.run(main())) == texts(
        [
            want.generate("a", max_new_tokens=9, **HOT),
            *want.generate(["a", [98, 99]], max_new_tokens=9, **HOT),
            *want.generate("a", n=3, max_new_tokens=9, **HOT),
        ]
    )


def test_a_stream_gives_the_pieces_of_the_model():
    async def main():
        async with AsyncGPT2(make_model()) as model:
            return [piece async for piece in model.stream(["a", "b"], n=2, max_new_tokens=9, **HOT)]

    def by_text(pieces):  # how they interleave depends on who is faster
        return sorted(pieces, key=lambda piece: (piece.prompt, piece.choice))

    want = make_model().stream(["a", "b"], n=2, max_new_tokens=9, **HOT)
    assert by_text(asyncio.run(main())) == by_text(want)


def test_a_thousand_requests_are_in_flight_on_one_thread():
    model, gate = gated_model(max_batch=16)
    prompts = [[1 + i % 200, 1 + i // 200] for i in range(1000)]

    async def main():
        before = threading.active_count()
        async with AsyncGPT2(model) as served:
            tasks = [
                asyncio.create_task(served.generate(ids, max_new_tokens=3, temperature=1, seed=i))
                for i, ids in enumerate(prompts)
            ]
            await until(lambda: model.engine.waiting + model.engine.running == 1000)
            assert threading.active_count() == before + 1
            gate.set()
            return await asyncio.gather(*tasks)

    got = asyncio.run(main())
    want = make_model()
    assert [generation.token_ids for generation in got] == [
        want.generate(ids, max_new_tokens=3, temperature=1, seed=i).token_ids for i, ids in enumerate(prompts)
    ]
    assert idle(model)


def test_the_loop_goes_on_while_a_step_computes():
    model, gate = gated_model()

    async def main():
        async with AsyncGPT2(model) as served:
            task = asyncio.create_task(served.generate("a", max_new_tokens=2))
            await until(lambda: model.engine.running == 1)
            turns = 0
            for _ in range(50):
                await asyncio.sleep(0)
                turns += 1
            assert not task.done()
            gate.set()
            return turns, await task

    turns, generation = asyncio.run(main())
    assert (turns, len(generation.token_ids)) == (50, 2)


def test_a_cancelled_task_frees_its_slot_and_the_others_go_on():
    model, gate = gated_model(max_batch=2)

    async def main():
        async with AsyncGPT2(model) as served:
            tasks = [
                asyncio.create_task(served.generate(prompt, max_new_tokens=20, **HOT)) for prompt in "abcd"
            ]
            await until(lambda: model.engine.running == 2 and model.engine.waiting == 2)
            tasks[0].cancel()  # runs
            tasks[3].cancel()  # waits
            gate.set()
            got = await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: idle(model) and not served._bells)  # the loop closes it in a task of its own
            return got

    got = asyncio.run(main())
    assert [type(one) for one in (got[0], got[3])] == [asyncio.CancelledError] * 2
    assert texts(got[1:3]) == texts(make_model().generate(["b", "c"], max_new_tokens=20, **HOT))


def test_a_timeout_ends_the_request():
    model, gate = gated_model()

    async def main():
        async with AsyncGPT2(model) as served:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await served.generate("a", max_new_tokens=20)
            assert idle(model)
            gate.set()

    asyncio.run(main())


def test_leaving_a_stream_ends_it():
    model = make_model(context=512)

    async def main():
        async with AsyncGPT2(model) as served:
            async with contextlib.aclosing(served.stream("a", max_new_tokens=400)) as pieces:
                async for _ in pieces:
                    break
            assert idle(model)
            async for _ in served.stream("a", max_new_tokens=400):
                break
            await until(lambda: idle(model) and not served._bells)  # the loop closes it in a task of its own

    asyncio.run(main())


def test_wrong_requests_are_refused_and_a_stream_refuses_them_at_once():
    async def main():
        async with AsyncGPT2(make_model()) as model:
            with pytest.raises(InvalidSamplingError, match="unknown sampling parameter"):
                await model.generate("a", temprature=1)
            with pytest.raises(RequestError, match="prompt is empty"):
                await model.generate("")
            with pytest.raises(RequestError, match="prompt 1 of the list"):
                model.stream(["a", ""])

    asyncio.run(main())


def test_a_backend_that_fails_ends_the_requests_of_that_step_and_the_next_ones_run():
    failures = [RuntimeError("no")]

    def before(batch):
        if failures:
            raise failures.pop()

    async def main():
        async with AsyncGPT2(make_model(before=before)) as model:
            with pytest.raises(BackendError, match="RuntimeError: no"):
                await model.generate("a")
            failures.append(RuntimeError("again"))
            with pytest.raises(BackendError, match="RuntimeError: again"):
                async for _ in model.stream("a"):
                    pass
            return await model.generate("a", max_new_tokens=5, **HOT)

    got = asyncio.run(main())
    assert texts([got]) == texts([make_model().generate("a", max_new_tokens=5, **HOT)])


def test_if_the_thread_dies_everybody_is_told(monkeypatch):
    model, gate = gated_model()

    def broken():
        assert gate.wait(20)
        raise MemoryError("broken")

    monkeypatch.setattr(model.engine, "step", broken)

    async def main():
        async with AsyncGPT2(model) as served:
            tasks = [asyncio.create_task(served.generate("a")) for _ in range(3)]
            await until(lambda: model.engine.waiting == 3)
            gate.set()
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(error, BackendError)
                assert "the engine's thread has ended: MemoryError('broken')" in str(error)
            assert idle(model)
            with pytest.raises(BackendError, match="make another AsyncGPT2"):
                await served.generate("a")

    asyncio.run(main())


def test_closing_ends_what_runs_as_cancelled_and_leaves_the_model_open():
    model, gate = gated_model(max_batch=1)

    async def main():
        served = AsyncGPT2(model)
        tasks = [asyncio.create_task(served.generate("a", max_new_tokens=9)) for _ in range(2)]
        scoring = asyncio.create_task(served.score("abc"))
        await until(lambda: model.engine.running + model.engine.waiting == 3)
        closing = asyncio.create_task(served.close())
        await asyncio.sleep(0)
        gate.set()
        await closing
        await served.close()
        assert [(await task).finish_reason for task in tasks] == ["cancelled"] * 2
        with pytest.raises(RequestError, match=CLOSED):
            await scoring
        with pytest.raises(RequestError, match=CLOSED):
            await served.generate("a")
        with pytest.raises(RequestError, match=CLOSED):
            await anext(served.stream("a"))

    asyncio.run(main())
    assert texts([model.generate("a", max_new_tokens=5)]) == texts(
        [make_model().generate("a", max_new_tokens=5)]
    )


def test_closing_the_model_ends_its_requests_as_cancelled():
    model, gate = gated_model()

    async def main():
        async with AsyncGPT2(model) as served:
            task = asyncio.create_task(served.generate("a", max_new_tokens=10**9, overflow="slide"))
            await until(lambda: model.engine.running == 1)
            gate.set()
            await asyncio.to_thread(model.close)
            assert (await task).finish_reason == "cancelled"
            with pytest.raises(RequestError, match="this model is closed"):
                await served.generate("a")

    asyncio.run(main())


def test_another_event_loop_is_refused_by_name_while_the_first_runs():
    async def main():
        async with AsyncGPT2(make_model()) as model:
            await model.generate("a", max_new_tokens=1)

            async def elsewhere():
                with pytest.raises(RequestError, match="belongs to another event loop; make one for each"):
                    await model.generate("a", max_new_tokens=1)
                async with AsyncGPT2(model.model) as other:  # they may share a model
                    return await other.generate("b", max_new_tokens=7, **HOT)

            there = asyncio.to_thread(asyncio.run, elsewhere())
            return await asyncio.gather(there, model.generate("c", max_new_tokens=7, **HOT))

    assert texts(asyncio.run(main())) == texts(make_model().generate(["b", "c"], max_new_tokens=7, **HOT))


def test_a_loop_that_has_ended_is_followed_by_the_next():
    model = AsyncGPT2(make_model())
    got = [asyncio.run(model.generate(prompt, max_new_tokens=7, **HOT)) for prompt in "abc"]
    asyncio.run(model.close())
    assert texts(got) == texts(make_model().generate(["a", "b", "c"], max_new_tokens=7, **HOT))


def test_threads_that_call_the_model_share_the_batch():
    model, gate = gated_model()

    async def main():
        async with AsyncGPT2(model) as served:
            threads = [
                asyncio.create_task(asyncio.to_thread(model.generate, p, max_new_tokens=30, **HOT))
                for p in "ab"
            ]
            await until(lambda: model.engine.running + model.engine.waiting == 2)
            tasks = [asyncio.create_task(served.generate(p, max_new_tokens=30, **HOT)) for p in "cd"]
            await until(lambda: model.engine.running + model.engine.waiting == 4)
            gate.set()
            return await asyncio.gather(*threads, *tasks)

    got = asyncio.run(main())
    assert texts(got) == texts(make_model().generate(list("abcd"), max_new_tokens=30, **HOT))
    assert any(len(batch.lengths) == 4 for batch in model.backend.batches)


def test_scores_are_those_of_the_model(tmp_path):
    folder = random_checkpoint(tmp_path)
    long = "Once upon a time. " * 20
    with GPT2.from_pretrained(folder) as model:

        async def main():
            async with AsyncGPT2(model) as served:
                with pytest.raises(RequestError, match="text 1 of the list: text has 1 token"):
                    await served.score(["Two", "x"])
                with pytest.raises(RequestError, match="text has 1 token"):
                    await served.score("x")
                one, two, several = await asyncio.gather(
                    served.score(long), served.score("Two", bos="eos", top=2), served.score(["One", long])
                )
                return [one, two, *several]

        got = asyncio.run(main())
        want = [model.score(long), model.score("Two", bos="eos", top=2), *model.score(["One", long])]
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
            assert one.token_ids == other.token_ids


def test_a_score_that_is_cancelled_frees_its_slots():
    model, gate = gated_model()

    async def main():
        async with AsyncGPT2(model) as served:
            task = asyncio.create_task(served.score(["abc", "def" * 50]))
            await until(lambda: model.engine.running > 0)
            task.cancel()
            gate.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert idle(model)
            return await served.score("abc")

    assert len(asyncio.run(main()).logprobs) == 2


def test_many_streams_end_and_nothing_is_left():
    model = make_model(max_batch=4)

    async def collect(served, prompt):
        return "".join([piece.text async for piece in served.stream(prompt, max_new_tokens=6, **HOT)])

    async def main():
        async with AsyncGPT2(model) as served:
            got = await asyncio.gather(*(collect(served, chr(97 + i % 26)) for i in range(100)))
            assert not served._bells
            return got

    alone = make_model()
    want = {c: alone.generate(c, max_new_tokens=6, **HOT).text for c in map(chr, range(97, 123))}
    assert asyncio.run(main()) == [want[chr(97 + i % 26)] for i in range(100)]
    assert idle(model)


def test_a_speculating_model_gives_the_same_texts():
    def repeating(history, vocab_size):
        logits = fakes.endless(history[-1:], vocab_size)
        logits[(history[-1] + 1) % 4] += 20
        return logits

    options = {"speculation": "prompt_lookup", "max_batch": 1}

    async def main():
        async with AsyncGPT2(make_model(repeating, **options)) as model:
            pieces = [piece.token_id async for piece in model.stream([0, 1, 2, 3] * 3, max_new_tokens=40)]
            return pieces, await model.generate([0, 1, 2, 3] * 3, max_new_tokens=40)

    pieces, generation = asyncio.run(main())
    assert pieces == generation.token_ids
    assert pieces == make_model(repeating).generate([0, 1, 2, 3] * 3, max_new_tokens=40).token_ids
