"""Constraints compiled for one model's vocabulary by the library llguidance, each once.

llguidance (Moskal et al., github.com/guidance-ai/llguidance) runs an Earley parser over lexemes, which it
matches by derivatives of regular expressions, and walks the vocabulary as a trie of bytes. So a token is
allowed exactly where the text so far and the token can still become a text that matches, whatever tokens
divide it.
"""

# V vocabulary

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from gpt2core.config import ModelConfig
from gpt2core.constraints.matcher import Matcher
from gpt2core.errors import BackendUnavailableError, ConstraintError, RequestError
from gpt2core.sampling.constraint import KINDS
from gpt2core.sampling.params import SamplingParams
from gpt2core.tokenizer.tokenizer import Tokenizer

MAX_COMPILED: Final = 64
"""Compiled constraints of one model that are kept, the last ones used."""
MAX_COLONS: Final = 512
"""In a grammar, of which each rule has one: the compiler takes time in proportion to their square."""

_LIMITS: Final = {
    "initial_lexer_fuel": 100_000,  # 2 ms
    "step_lexer_fuel": 100_000,  # 7 ms
    "step_max_items": 50_000,  # 3 ms
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,  # 40 MB
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_STACK_NBYTES: Final = 2**26  # the compiler recurses, up to 4 KB for each 5 characters of a grammar
_OPTIONS: Final = '\n%llguidance {"no_forcing": true}'  # else it allows one way only to divide a text
_STYLE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Of JSON, unless the schema says otherwise: a small model may write nothing but white space."""
_ESCAPE: Final = re.compile(r"\\.", re.DOTALL)
_CLASSES: Final = {r"\d": "[0-9]", r"\w": "[0-9A-Za-z_]", r"\s": r"[ \t\n\r\x0B\x0C]"}
"""In ASCII, since the compiler and Python know different versions of Unicode; their opposites are left as
they are, which leaves out more than Python's do. So texts match in Python too."""
_STYLE_KEY: Final = "x-guidance"

_stack_size = threading.Lock()


class Constraints:
    """The constraints of one model. Safe to use from several threads at once.

    Args:
        tokenizer: None refuses every constraint.
        config: of the model, whose vocabulary may be larger or smaller than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer | None, config: ModelConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._lock = threading.Lock()
        self._inner: Any = None  # llguidance's tokenizer, made for the first constraint
        self._compiled: OrderedDict[tuple[str, object], Any] = OrderedDict()

    def check(self, params: SamplingParams) -> None:
        """Compile the constraint, if there is one.

        Raises:
            RequestError: the model has no tokenizer, or none whose tokens are bytes.
            ConstraintError: the constraint cannot be compiled, or no text but the empty one matches.
            BackendUnavailableError: the package llguidance is missing; says the pip extra.
        """
        self._compile(params)

    def start(self, params: SamplingParams, end_token_ids: frozenset[int]) -> Matcher | None:
        """The constraint of one text that begins, or None.

        Args:
            params: which of them.
            end_token_ids: each ends the text, so it is allowed where the text may end.

        Raises:
            RequestError: as of `check`.
        """
        compiled = self._compile(params)
        if compiled is None:
            return None
        own = frozenset(self._config.eos_token_ids)
        return Matcher(compiled, self._config.vocab_size, end_token_ids, own)

    def _compile(self, params: SamplingParams) -> Any:
        kind = next((kind for kind in KINDS if getattr(params, kind) is not None), None)
        if kind is None:
            return None
        key = kind, getattr(params, kind)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
            tokenizer = self._inner = self._inner or self._read_vocabulary(kind)
        compiled = _with_large_stack(lambda: _compile(tokenizer, kind, key[1]))
        with self._lock:
            self._compiled[key] = compiled
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def _read_vocabulary(self, kind: str) -> Any:
        if self._tokenizer is None:
            raise RequestError(f"{kind} needs text, and this model has no tokenizer; leave it out")
        if not self._tokenizer.byte_level:
            raise RequestError(
                f"{kind} needs a tokenizer whose tokens are bytes, as GPT-2's are, and this model's is of "
                "another kind; leave it out"
            )
        llguidance = _import_llguidance(kind)
        tokens = _Vocabulary(self._tokenizer, self._config)
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens))


class _Vocabulary:
    """What llguidance asks of a tokenizer. Token V stands for the end, whichever tokens end a text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        size = self.eos_token_id = config.vocab_size
        self._encode = tokenizer.encode
        self.tokens = [*map(tokenizer.token_bytes, range(size)), b"<end of the constraint>"]
        special = {*tokenizer.special_ids, *config.eos_token_ids}
        self.special_token_ids = [*(token_id for token_id in special if token_id < size), size]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _import_llguidance(kind: str) -> Any:
    try:
        import llguidance
    except ImportError as error:
        if getattr(error, "name", None) != "llguidance":
            raise BackendUnavailableError(
                f"{kind} needs the package llguidance, whose import failed: {error}; install it again"
            ) from error
        raise BackendUnavailableError(
            f"{kind} needs the package llguidance; install it with: pip install 'gpt2core[guidance]'"
        ) from error
    return llguidance


def _compile(tokenizer: Any, kind: str, source: Any) -> Any:
    """A matcher at the beginning of a text."""
    llguidance = _import_llguidance(kind)
    grammar = {"regex": _of_regex, "json_schema": _of_schema, "choice": _of_choices, "grammar": _of_grammar}
    limits = llguidance.LLParserLimits(**_LIMITS)
    made = llguidance.LLMatcher(tokenizer, grammar[kind](source) + _OPTIONS, log_level=0, limits=limits)
    if made.is_error():
        raise _describe(kind, made.get_error())
    first = np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little")
    if made.is_error():
        raise ConstraintError(f"{kind} matches no text, or is too complex; change it")
    if not first[: tokenizer.vocab_size - 1].any():
        raise ConstraintError(f"{kind} matches the empty text only; change it")
    return made


def _of_regex(regex: str) -> str:
    import llguidance

    return f"start: /{llguidance.regex_to_lark(re.sub(_ESCAPE, _in_ascii, regex), '')}/"


def _in_ascii(escape: re.Match[str]) -> str:
    return _CLASSES.get(escape[0], escape[0])


def _of_schema(schema: str) -> str:
    fields = json.loads(schema)
    own = fields.get(_STYLE_KEY, {})
    if isinstance(own, dict):  # else it is for the compiler to refuse
        fields[_STYLE_KEY] = {**_STYLE, **own}
    return f"start: %json {json.dumps(fields, ensure_ascii=False)}"


def _of_choices(choices: Sequence[str]) -> str:
    return f"start: /{'|'.join(map(_spelled, choices))}/"


def _spelled(text: str) -> str:
    """A text as a regular expression; no character but letters and digits stands for itself everywhere."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)


def _of_grammar(grammar: str) -> str:
    if (colons := grammar.count(":")) > MAX_COLONS:
        raise ConstraintError(
            f"grammar has {colons} colons; at most {MAX_COLONS} are allowed, one for each rule"
        )
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # of whatever type its reader of llama.cpp's grammars raises
        raise ConstraintError(
            f"grammar cannot be read as one of llama.cpp's: {error}; mend it",
            "grammar cannot be read as one of llama.cpp's; mend it",
        ) from error


def _describe(kind: str, message: str) -> ConstraintError:
    """The compiler's error, without the source that it quotes."""
    message = message.partition("\n   1 |")[0].partition("\n<non-verbose/>")[0].strip()
    at = re.match(r"(?:at )?(\d+)\((\d+)\)[: ]+", message) if kind == "grammar" else None
    place = f" at line {at[1]}, column {at[2]}" if at else ""
    message = re.sub(r"^(?:at )?\d+\(\d+\):\s*(failed to compile JSON schema: )?", "", message)
    known = re.search(r"^error: (.*)", message, re.MULTILINE)  # of the regex's parser, which quotes nothing
    why = known[1] if known else " ".join(message.split())
    summary = f"{kind} cannot be compiled{place}{f': {known[1]}' if known else ''}; mend it"
    return ConstraintError(f"{kind} cannot be compiled{place}: {why:.1000}; mend it", summary)


def _with_large_stack(work: Any) -> Any:
    """What `work` returns or raises, in a thread that a deeply nested grammar does not bring down."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    with _stack_size:
        before = threading.stack_size(_STACK_NBYTES)
        try:
            thread = threading.Thread(target=run, name="gpt2core-constraint", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    [(result, error)] = outcome
    if error is not None:
        raise error
    return result
