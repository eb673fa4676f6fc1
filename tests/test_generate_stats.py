"""The numbers of `gpt2core generate --stats`."""

from engines import make_model

from gpt2core.cli.generate import Speed, _report


def test_the_rate_is_that_of_the_tokens_after_each_texts_first(capsys):
    speed = Speed(new_tokens=10, ttft_s=0.5, decode_s=2.0)
    _report(make_model(), 1, 2, speed, load_s=1.0, speculates=False)
    assert "first token   0.500 s, 4.0 tok/s after it\n" in capsys.readouterr().err
