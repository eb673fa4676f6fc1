"""Stop strings: the text is cut before the first, and nothing that may begin one is given out."""

import fakes
from engines import TOKENIZER, make_engine, run
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2core.sampling.params import SamplingParams
from gpt2core.tokenizer.stream import TextStream


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: before the stop string that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


STOPS = st.text("ab€é", min_size=1, max_size=5) | st.text("ab", min_size=1, max_size=8)


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("ab€é", max_size=25) | st.text("ab", max_size=25),
    broken=st.lists(st.integers(128, 255), max_size=2),
    stops=st.lists(STOPS, min_size=1, max_size=4),
    new=st.integers(1, 40),
)
@example(text="aab", broken=[], stops=["ab", "aac"], new=9)
@example(text="abababc", broken=[], stops=["ababc"], new=40)
@example(text="xab", broken=[], stops=["b", "ab"], new=9)
@example(text="aabaabaaa", broken=[], stops=["aabaaa"], new=40)
@example(text="aabaaabaaa", broken=[], stops=["aabaaabaaa", "aabaaab!"], new=40)
@example(text="€", broken=[], stops=["€"], new=3)
@example(text="aaaa", broken=[], stops=["aaaaa"], new=4)
@example(text="ab", broken=[0xE2], stops=["�"], new=3)
def test_streamed_pieces_join_to_the_text_cut_before_the_first_stop_string(text, broken, stops, new):
    script = [*text.encode(), *broken]
    engine = make_engine(fakes.FakeBackend(fakes.config(128), fakes.scripted({b"p": script})))
    [request] = engine.submit(list(b"p"), SamplingParams(max_new_tokens=new, stop=stops))
    updates = run(engine)
    assert "".join(u.text for u in updates) == request.text
    generated = request.generated
    assert generated == [*script, fakes.END][: len(generated)]
    whole = TOKENIZER.decode(generated, skip_special=True)
    assert request.text == cut(whole, stops)[0]
    reason = "stop" if cut(whole, stops)[1] or generated[-1] == fakes.END else "length"
    assert request.finish_reason == reason
    # Until then no stop string was complete, and the longest text that may begin one was held back, no more.
    decoder, certain, emitted = TOKENIZER.stream_decoder(), "", ""
    for update in updates[:-1]:
        certain += decoder.push(update.token_id)
        emitted += update.text
        assert not cut(certain, stops)[1]
        held = max((len(start) for start in starts_of(stops) if certain.endswith(start)), default=0)
        assert emitted == certain[: len(certain) - held]


def starts_of(stops: list[str]) -> set[str]:
    return {stop[:k] for stop in stops for k in range(1, len(stop))}


def test_a_stop_string_in_the_prompt_does_not_count():
    engine = make_engine(fakes.FakeBackend(fakes.config(), fakes.scripted({b"a.": b"b.c"})))
    [request] = engine.submit(list(b"a."), SamplingParams(max_new_tokens=9, stop=".", echo=True))
    run(engine)
    assert (request.text, request.finish_reason) == ("a.b", "stop")
    assert request.generated == [*b"b."]


def test_text_after_a_stop_string_is_never_given_out():
    stream = TextStream(TOKENIZER.stream_decoder(), ["b"])
    assert [stream.push(token) for token in b"abc"] == ["a", "", ""]
    assert stream.stopped
    assert stream.flush() == ""
