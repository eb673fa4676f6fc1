"""Reads a checkpoint's tokenizer files into a `tokenizers.Tokenizer`, or says which file is wrong and how."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gpt2core.config import parse_json_object
from gpt2core.errors import CheckpointError

_T = TypeVar("_T")

# Classes of transformers that take add_prefix_space from tokenizer_config.json, whatever tokenizer.json says.
_PREFIX_FROM_CONFIG: Final = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
_SPECIAL_NAMES: Final = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_REMEDY: Final = (
    "download the checkpoint again, or save its tokenizer anew with transformers' save_pretrained"
)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `tokenizer.json`, or else of `vocab.json` and `merges.txt`.

    As in transformers, `tokenizer_config.json` and `special_tokens_map.json` say what else is special, and
    `<|endoftext|>` always is when the vocabulary has it.

    Raises:
        CheckpointError: a file is missing or broken; names it and the remedy.
    """
    config = _read_object(folder / "tokenizer_config.json")
    prefix = config.get("add_prefix_space")
    if (folder / "tokenizer.json").exists():
        tokenizer = _read_tokenizer_json(folder / "tokenizer.json")
        if (
            isinstance(prefix, bool)
            and config.get("tokenizer_class") in _PREFIX_FROM_CONFIG
            and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
        ):
            tokenizer.pre_tokenizer.add_prefix_space = prefix
    else:
        tokenizer = _read_vocab_and_merges(folder, add_prefix_space=prefix is True)
        _add_tokens(tokenizer, folder / "added_tokens.json")
    special = [AddedToken("<|endoftext|>", special=True, normalized=False)]
    special += _special_tokens(config)
    special += _special_tokens(_read_object(folder / "special_tokens_map.json"))
    # What the vocabulary lacks stays out: a new id would have no embedding.
    known = [token for token in special if tokenizer.token_to_id(token.content) is not None]
    already = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    tokenizer.add_special_tokens([token for token in known if token.content not in already])
    return tokenizer


def _read_tokenizer_json(file: Path) -> Tokenizer:
    data = _read(file)
    fields = parse_json_object(data, str(file))
    model = fields.get("model")
    if (
        isinstance(model, dict)
        and isinstance(model.get("vocab"), dict)
        and isinstance(model.get("merges"), list)
    ):
        if not model.get("continuing_subword_prefix"):
            merges = [tuple(m.split(" ")) if isinstance(m, str) else m for m in model["merges"]]
            _check_merges(merges, model["vocab"], file)
    return _build(lambda: Tokenizer.from_buffer(data), file)


def _read_vocab_and_merges(folder: Path, *, add_prefix_space: bool) -> Tokenizer:
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    for file in (vocab_file, merges_file):
        if not file.exists():
            raise CheckpointError(
                f"{folder} has no tokenizer: neither tokenizer.json nor {file.name} (with "
                f"{'merges.txt' if file is vocab_file else 'vocab.json'}) is there; {_REMEDY}"
            )
    vocab = parse_json_object(_read(vocab_file), str(vocab_file))
    if not vocab:
        raise CheckpointError(f"{vocab_file} holds no tokens; {_REMEDY}")
    for token, token_id in vocab.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
            raise CheckpointError(
                f"{vocab_file}: token {token!r} has the id {token_id!r:.40}; it must be a whole number from 0 to "
                f"{2**31 - 1}; {_REMEDY}"
            )
    if len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{vocab_file} gives two tokens the same id; {_REMEDY}")
    try:
        lines = _read(merges_file).decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{merges_file} is not UTF-8: {error}; {_REMEDY}") from error
    if lines[0].startswith("#version"):
        del lines[0]
    merges = [tuple(line.split(" ")) for line in lines if line]
    if not merges and len(vocab) > 257:  # 257: all bytes and <|endoftext|>
        raise CheckpointError(f"{merges_file} holds no merges, and vocab.json {len(vocab)} tokens; {_REMEDY}")
    _check_merges(merges, vocab, merges_file)
    tokenizer = _build(lambda: Tokenizer(models.BPE(vocab, merges)), vocab_file)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, file: Path) -> None:
    """Add the tokens of `added_tokens.json`, which older versions of transformers wrote: content -> id."""
    for content, token_id in sorted(_read_object(file).items(), key=lambda item: str(item[1])):
        tokenizer.add_tokens([AddedToken(content, normalized=False)])
        if tokenizer.token_to_id(content) != token_id:
            raise CheckpointError(
                f"{file}: token {content!r} has the id {token_id!r:.40}, and the next free one is "
                f"{tokenizer.token_to_id(content)}; {_REMEDY}"
            )


def _special_tokens(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """What a `tokenizer_config.json` or `special_tokens_map.json` calls special."""
    values = [config.get(name) for name in _SPECIAL_NAMES]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(name)
        values += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    added = config.get("added_tokens_decoder")
    if isinstance(added, dict):
        values += [
            token for token in added.values() if isinstance(token, dict) and token.get("special") is True
        ]
    for value in values:
        fields = value if isinstance(value, dict) else {"content": value}
        if isinstance(fields.get("content"), str) and fields["content"]:
            flags = {
                name: fields.get(name) is True for name in ("lstrip", "rstrip", "single_word", "normalized")
            }
            yield AddedToken(fields["content"], special=True, **flags)


def _check_merges(merges: Iterable[Any], vocab: Mapping[str, Any], file: Path) -> None:
    # Here and not in the tokenizers library, which panics on some of these and prints a trace.
    for number, merge in enumerate(merges, 1):
        if not isinstance(merge, tuple | list) or [type(part) for part in merge] != [str, str]:
            raise CheckpointError(f"{file}: merge {number} is {merge!r:.60}, expected two tokens; {_REMEDY}")
        for token in (*merge, merge[0] + merge[1]):
            if token not in vocab:
                raise CheckpointError(
                    f"{file}: merge {number}, {' '.join(merge)!r}, needs the token {token!r}, which the vocabulary "
                    f"lacks; {_REMEDY}"
                )


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file that need not exist."""
    return parse_json_object(_read(file), str(file)) if file.exists() else {}


def _read(file: Path) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; {_REMEDY}") from error
    if not data:
        raise CheckpointError(f"{file} is empty; {_REMEDY}")
    return data


def _build(make: Callable[[], _T], file: Path) -> _T:
    try:
        return make()
    except BaseException as error:
        # The library raises bare Exception, and PanicException, which does not even derive from that.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(
                f"{file} is not a tokenizer that can be read: {error}; {_REMEDY}"
            ) from error
        raise
