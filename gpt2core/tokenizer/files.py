"""Reads a checkpoint's tokenizer files into a `tokenizers.Tokenizer`, or says which file is wrong and how."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gpt2core._json import check_no_pointer, parse_json_object, shown
from gpt2core.errors import CheckpointError
from gpt2core.tokenizer.sentencepiece import build_tokenizer

_T = TypeVar("_T")

_MAX_NBYTES: Final = 64 * 2**20  # GPT-2's tokenizer.json has 3.6 MB
_BYTES_AND_END: Final = 257  # a vocabulary that needs no merges: all bytes and <|endoftext|>
# Classes of transformers that take add_prefix_space from tokenizer_config.json, whatever tokenizer.json says.
_PREFIX_FROM_CONFIG: Final = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
_SPECIAL_NAMES: Final = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_BERT_NAMES: Final = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}  # fmt: skip
_SENTENCEPIECE: Final = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_FLAGS: Final = ("lstrip", "rstrip", "single_word", "normalized")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `tokenizer.json`, of `vocab.json` and `merges.txt`, `vocab.txt` or `spiece.model`.

    As in transformers, `tokenizer_config.json` and `special_tokens_map.json` say what else is special, and
    `<|endoftext|>` always is when the vocabulary has it.

    Raises:
        CheckpointError: a file is missing or broken; names it and the remedy.
    """
    config = _read_object(folder / "tokenizer_config.json")
    prefix = config.get("add_prefix_space")
    if (folder / "tokenizer.json").exists():
        tokenizer = _read_tokenizer_json(folder / "tokenizer.json")
        split = tokenizer.pre_tokenizer
        follows_config = config.get("tokenizer_class") in _PREFIX_FROM_CONFIG
        if isinstance(prefix, bool) and follows_config and isinstance(split, pre_tokenizers.ByteLevel):
            split.add_prefix_space = prefix
    elif (folder / "vocab.txt").exists() and not (folder / "vocab.json").exists():
        tokenizer = _read_wordpiece(folder / "vocab.txt", config)
        _add_tokens(tokenizer, folder / "added_tokens.json")
    elif not (folder / "vocab.json").exists() and (sentences := _find_sentencepiece(folder)):
        tokenizer = _read_sentencepiece(sentences)
        _add_tokens(tokenizer, folder / "added_tokens.json")
    else:
        tokenizer = _read_vocab_and_merges(folder, add_prefix_space=prefix is True)
        _add_tokens(tokenizer, folder / "added_tokens.json")
    add_special_tokens(tokenizer, [config, _read_object(folder / "special_tokens_map.json")])
    return tokenizer


def add_special_tokens(tokenizer: Tokenizer, configs: Iterable[Mapping[str, Any]]) -> None:
    """Make special what the fields of tokenizer_config.json and the like call so, and `<|endoftext|>`."""
    special = [AddedToken("<|endoftext|>", special=True, normalized=False)]
    for config in configs:
        special += _special_tokens(config)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for token in special:
        # What the vocabulary lacks stays out: a new id would have no embedding.
        if token.content not in known and tokenizer.token_to_id(token.content) is not None:
            tokenizer.add_special_tokens([token])
            known.add(token.content)


def read_special_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Names of special tokens, as `eos_token`, with what they spell; as in transformers, GPT-2 has a default.

    Raises:
        CheckpointError: a file is broken; names it and the remedy.
    """
    files = ("special_tokens_map.json", "tokenizer_config.json")
    return name_special_tokens(tokenizer, [_read_object(folder / file) for file in files])


def name_special_tokens(tokenizer: Tokenizer, configs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """`read_special_tokens` of the fields of files, of which the last prevails."""
    found = {}
    if tokenizer.token_to_id("<|endoftext|>") is not None:
        found = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    if isinstance(tokenizer.model, models.WordPiece):
        found |= {name: t for name, t in _BERT_NAMES.items() if tokenizer.token_to_id(t) is not None}
    for config in configs:
        for name in _SPECIAL_NAMES:
            content = _content(config.get(name))
            if content is not None:
                found[name] = content
    return found


def _content(value: Any) -> str | None:
    """What a special token spells, of a value of tokenizer_config.json."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def read_chat_template(folder: Path) -> str | None:
    """The chat template of `chat_template.jinja`, or else of `tokenizer_config.json`; of several "default".

    Raises:
        CheckpointError: a file is broken; names it and the remedy.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return _read(file).decode()
        except UnicodeDecodeError as error:
            raise _broken(file, f"is not UTF-8: {error}") from error
    return chat_template_of(_read_object(folder / "tokenizer_config.json"))


def chat_template_of(config: Mapping[str, Any]) -> str | None:
    """The chat template of a tokenizer_config.json's fields; of several "default"."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {named.get("name"): named.get("template") for named in template if isinstance(named, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _read_tokenizer_json(file: Path) -> Tokenizer:
    data = _read(file)
    fields = parse_json_object(data, str(file))
    model = fields.get("model")
    if isinstance(model, dict) and not model.get("continuing_subword_prefix"):
        vocab, merges = model.get("vocab"), model.get("merges")
        if isinstance(vocab, dict) and isinstance(merges, list):
            _check_merges([m.split(" ") if isinstance(m, str) else m for m in merges], vocab, file)
    tokenizer = _build(lambda: Tokenizer.from_buffer(data), file)
    for token in fields.get("added_tokens") or ():
        _check_added(tokenizer, token["content"], token["id"], file)
    return tokenizer


def _read_vocab_and_merges(folder: Path, *, add_prefix_space: bool) -> Tokenizer:
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    missing = [file.name for file in (vocab_file, merges_file) if not file.exists()]
    if missing:
        raise _broken(
            folder, f"has no tokenizer: tokenizer.json is missing, and so is {' and '.join(missing)}"
        )
    vocab = parse_json_object(_read(vocab_file), str(vocab_file))
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise _broken(
                vocab_file,
                f"gives the token {shown(token)} the id {shown(token_id)}, expected a whole number from 0 to "
                f"{2**31 - 1}",
            )
    if len(set(vocab.values())) != len(vocab):
        raise _broken(vocab_file, "gives two tokens the same id")
    try:
        lines = _read(merges_file).decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise _broken(merges_file, f"is not UTF-8: {error}") from error
    if lines[0].startswith("#version"):
        del lines[0]
    merges = [line.split(" ") for line in lines if line]
    if not merges and len(vocab) > _BYTES_AND_END:
        raise _broken(merges_file, f"holds no merges, and vocab.json {len(vocab)} tokens")
    _check_merges(merges, vocab, merges_file)
    pairs = [(left, right) for left, right in merges]
    tokenizer = _build(lambda: Tokenizer(models.BPE(vocab, pairs)), vocab_file)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _find_sentencepiece(folder: Path) -> Path | None:
    return next((folder / name for name in _SENTENCEPIECE if (folder / name).exists()), None)


def _read_sentencepiece(file: Path) -> Tokenizer:
    data = _read(file)
    return _build(lambda: build_tokenizer(data), file)


def _read_wordpiece(file: Path, config: Mapping[str, Any]) -> Tokenizer:
    """BERT's WordPiece, which Chinese GPT-2s use, with the settings of transformers' BertTokenizer.

    As there, a text begins with `[CLS]` and ends with `[SEP]`.
    """
    try:
        lines = _read(file).decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise _broken(file, f"is not UTF-8: {error}") from error
    if not lines[-1]:
        del lines[-1]
    vocab = {token: i for i, token in enumerate(lines)}
    named = {name: _content(config.get(name)) for name in _BERT_NAMES}
    names = _BERT_NAMES | {name: content for name, content in named.items() if content is not None}
    tokenizer = _build(lambda: Tokenizer(models.WordPiece(vocab, unk_token=names["unk_token"])), file)
    accents = config.get("strip_accents")
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars") is not False,
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=config.get("do_lower_case") is not False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    add_special_tokens(tokenizer, [dict(names)])
    begin, end = names["cls_token"], names["sep_token"]
    if begin in vocab and end in vocab:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[begin, "$A", end], special_tokens=[(begin, vocab[begin]), (end, vocab[end])]
        )
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, file: Path) -> None:
    """Add the tokens of `added_tokens.json`, which older versions of transformers wrote: content -> id."""
    added = _read_object(file)
    for content in sorted(added, key=lambda content: (type(added[content]) is not int, added[content])):
        tokenizer.add_tokens([AddedToken(content, normalized=False)])
        _check_added(tokenizer, content, added[content], file)


def _check_added(tokenizer: Tokenizer, content: str, token_id: object, file: Path) -> None:
    actual = tokenizer.token_to_id(content)
    if actual != token_id:  # the library numbers added tokens itself, and goes on silently
        raise _broken(
            file,
            f"gives the added token {shown(content)} the id {shown(token_id)}, and its place is {actual}",
        )


def _special_tokens(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """What a `tokenizer_config.json` or `special_tokens_map.json` calls special."""
    values = [config.get(name) for name in _SPECIAL_NAMES]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(name)
        values += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    added = config.get("added_tokens_decoder")
    if isinstance(added, dict):
        values += [token for token in added.values() if isinstance(token, dict) and token.get("special")]
    for value in values:
        fields = value if isinstance(value, dict) else {"content": value}
        if isinstance(fields.get("content"), str) and fields["content"]:
            flags = {name: fields.get(name) is True for name in _FLAGS}
            yield AddedToken(fields["content"], special=True, **flags)


def _check_merges(merges: Iterable[Any], vocab: Mapping[str, Any], file: Path) -> None:
    # Here and not in the tokenizers library, which panics on some of these and prints a trace.
    for number, merge in enumerate(merges, 1):
        if not isinstance(merge, list) or [type(part) for part in merge] != [str, str]:
            raise _broken(file, f"holds as merge {number} {shown(merge)}, expected two tokens")
        left, right = merge
        for token in (left, right, left + right):
            if token not in vocab:
                raise _broken(
                    file,
                    f"holds as merge {number} {shown(merge)}, but the vocabulary has no token {shown(token)}",
                )


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file that need not exist."""
    return parse_json_object(_read(file), str(file)) if file.exists() else {}


def _read(file: Path) -> bytes:
    try:
        if not file.is_file():  # also keeps a pipe or a device from being opened
            raise _broken(file, "is not a file")
        with file.open("rb") as stream:
            data = stream.read(_MAX_NBYTES + 1)
    except OSError as error:
        raise _broken(file, f"cannot be read: {error.strerror}") from error
    if not data:
        raise _broken(file, "is empty")
    check_no_pointer(file, data)
    if len(data) > _MAX_NBYTES:
        raise _broken(file, f"is larger than {_MAX_NBYTES} bytes, the limit for a tokenizer's file")
    return data


def _build(make: Callable[[], _T], file: Path) -> _T:
    try:
        return make()
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise _broken(file, f"is not a tokenizer that can be read: {error}") from error


def is_library_error(error: BaseException) -> bool:
    """Whether an error is of the tokenizers library: Exception itself, or PanicException, which is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _broken(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {fault}; download the checkpoint again, or save its tokenizer anew with transformers"
    )
