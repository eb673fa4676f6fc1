"""GPT-2's byte-level BPE taken apart, as formats other than Hugging Face's hold it, and put together."""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from gpt2core.errors import CheckpointError
from gpt2core.tokenizer.files import is_library_error
from gpt2core.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ByteLevelParts:
    """A byte-level BPE.

    Attributes:
        tokens: by id, as vocab.json spells them; added tokens as they are in a text; None for an id without
            a token.
        merges: in their order.
        special: ids of special tokens.
        added: ids of tokens that are added and not special.
    """

    tokens: Sequence[str | None]
    merges: Sequence[tuple[str, ...]]
    special: Set[int]
    added: Set[int]


def byte_level_parts(tokenizer: Tokenizer) -> ByteLevelParts | None:
    """The parts of a tokenizer; None if it is not of GPT-2's kind, so that parts would not say all of it."""
    state = json.loads(tokenizer.files()["tokenizer.json"])
    model, split = state["model"], state["pre_tokenizer"]
    plain = (
        model.get("type") == "BPE"
        and not any(model.get(name) for name in ("unk_token", "continuing_subword_prefix"))
        and not any(model.get(name) for name in ("end_of_word_suffix", "byte_fallback", "ignore_merges"))
        and state["normalizer"] is None
        and split is not None
        and split["type"] == state["decoder"]["type"] == "ByteLevel"
        and split.get("use_regex", True)
        and not split["add_prefix_space"]
    )
    if not plain:
        return None
    added = {token["id"]: token for token in state["added_tokens"]}
    by_id = {i: token for token, i in model["vocab"].items()}
    by_id |= {i: token["content"] for i, token in added.items()}
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    return ByteLevelParts(
        tokens=[by_id.get(i) for i in range(max(by_id) + 1)],
        merges=merges,
        special={i for i, token in added.items() if token["special"]},
        added={i for i, token in added.items() if not token["special"]},
    )


def byte_level_tokenizer(
    parts: ByteLevelParts, *, special_tokens: Mapping[str, str], chat_template: str | None, label: Path
) -> Tokenizer:
    """A tokenizer of parts that the file `label` holds.

    Raises:
        CheckpointError: they do not fit together.
    """
    tokens = [*parts.tokens]
    while tokens and tokens[-1] is None:
        tokens.pop()
    behind = len(tokens)  # added tokens that end the vocabulary stand beside it, as transformers keeps them
    while behind and behind - 1 in parts.special | parts.added:
        behind -= 1
    vocab = {token: i for i, token in enumerate(tokens[:behind]) if token is not None}
    try:
        inner = tokenizers.Tokenizer(models.BPE(vocab, [(left, right) for left, right in parts.merges]))
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise CheckpointError(f"{label}: its tokens and merges do not fit together: {error}") from error
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    for i, token in enumerate(tokens):
        if token is not None and i in parts.special | parts.added:
            inner.add_tokens([AddedToken(token, special=i in parts.special, normalized=False)])
            if inner.token_to_id(token) != i:
                raise CheckpointError(f"{label}: its token {i} cannot be added at that place")
    return Tokenizer(inner, special_tokens=special_tokens, chat_template=chat_template)
