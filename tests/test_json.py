"""The one reader of strict JSON."""

import json

import pytest

from gpt2core._json import JSONFault, loads_strict


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, "x"]}', b'"\xc3\xa4"', "1e308", "0"])
def test_strict_json_is_read_as_python_reads_it(text):
    assert loads_strict(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message", "summary"),
    [
        ('{"secret": 1, "secret": 2}', 'key "secret" stands twice', "has a key twice"),
        ('[{"a": {"b": 1, "b": 1}}]', 'key "b" stands twice', "has a key twice"),
        ("[NaN]", "NaN is not a JSON number", "holds NaN or Infinity"),
        ("-Infinity", "-Infinity is not a JSON number", "holds NaN or Infinity"),
        ("1e309", "the number 1e309 is too large for a float", "too large for a float"),
        (b"\xff", "can't decode", "is not UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM", "is not JSON, or begins with a byte order mark"),
        ("{", "Expecting", "is not JSON"),
        ("9" * 5000, "digits", "is not JSON"),
        ("[" * 200_000, "recursion", "nests too deep"),
    ],
)
def test_what_is_not_strict_is_said_and_in_the_summary_nothing_is_quoted(text, message, summary):
    with pytest.raises(JSONFault, match=message) as caught:
        loads_strict(text)
    assert isinstance(caught.value, ValueError)
    assert summary in caught.value.summary
    assert "secret" not in caught.value.summary


def test_depth_is_bounded_where_a_bound_is_given():
    assert loads_strict("[[[1]]]", max_depth=2) == [[[1]]]  # levels below the top
    with pytest.raises(JSONFault, match="nests deeper than 2 levels"):
        loads_strict('[[[{"a": 1}]]]', max_depth=2)
