"""What tests of constraints share: schemas, grammars, and one model's constraints."""

import fakes
from engines import TOKENIZER

from gpt2core.constraints.compiler import Constraints

ENDS = frozenset({fakes.END})
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee", None]}, "maxItems": 3},
        "happy": {"type": "boolean"},
    },
    "required": ["name", "age", "likes", "happy"],
    "additionalProperties": False,
}
SUM = """
start: term (" + " term)*
term: NUMBER | "(" start ")"
NUMBER: /[0-9]{1,3}/
"""
ASKED = {
    "regex": {"regex": "([a-f]{2,9},)+[0-9]"},
    "json_schema": {"json_schema": {"type": "array", "items": {"enum": ["abc", "abcabc"]}, "maxItems": 5}},
    "choice": {"choice": ["abcabcabcabcabc", "abcabcabdabdabdabd"]},
    "grammar": {"grammar": 'start: ("ab" "c"+ "d"?)+ "!"'},
}


def constraints(vocab_size=257, tokenizer=TOKENIZER, **config) -> Constraints:
    return Constraints(tokenizer, fakes.config(vocab_size=vocab_size, **config))
