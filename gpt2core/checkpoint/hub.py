"""Checkpoints from the Hugging Face Hub: only the files that are needed, local files first."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gpt2core._json import listed, read_json_object
from gpt2core.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gpt2core.checkpoint.folder import SMALL_FILES, WEIGHTS, WEIGHTS_INDEX, find_pickles
from gpt2core.errors import CheckpointError, UnsupportedCheckpointError

_DIGITS: Final = "[0-9]" * 5  # not "*", which would match "/" and ".." too
_WANTED: Final = (
    *(*SMALL_FILES, ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS, WEIGHTS_INDEX),
    f"model-{_DIGITS}-of-{_DIGITS}.safetensors",
)
_TOKENIZER: Final = "tokenizer.json"
_NAME: Final = r"\w(?:[\w.-]{0,94}\w)?"
_ID: Final = re.compile(rf"(?:{_NAME}/)?{_NAME}", re.ASCII)

_URL: Final = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/(?P<id>[^/?#]+/[^/?#]+|[^/?#]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)[^?#]*)?/?(?:[?#].*)?"
)


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form `name` or `owner/name` of a repository on the hub."""
    return bool(_ID.fullmatch(text)) and "--" not in text and ".." not in text and not text.endswith(".git")


def parse_url(text: str) -> tuple[str, str | None] | None:
    """The repository and revision of an address that was copied from the hub's pages; None if it is none."""
    match = _URL.fullmatch(text)
    return (match["id"], match["revision"]) if match and is_hub_id(match["id"]) else None


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from and how it is read: the arguments of `open_checkpoint`."""

    model: str | os.PathLike[str]
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    strict: bool = False
    adapter: str | os.PathLike[str] | None = None


def download(source: Source, *, progress: bool = True) -> Path:
    """The folder of a repository's snapshot in huggingface_hub's cache, downloaded if it is not complete.

    A complete cached snapshot is used without asking the network, so a branch stays what it was when it was
    downloaded; name a commit, or clear the cache, to change that. huggingface_hub's environment variables
    hold (`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, ...). `progress` shows its bars on stderr.

    Raises:
        CheckpointError: saying what was tried and what would help.
    """
    import huggingface_hub  # here: importing it takes a quarter of a second
    from huggingface_hub import constants, errors

    repo_id, revision = str(source.model), source.revision
    wanted: dict[str, Any] = {
        "repo_id": repo_id,
        "revision": revision,
        "cache_dir": source.cache_dir,
        "token": source.token,
        "allow_patterns": list(_WANTED),
    }
    name = repo_id if revision is None else f"{repo_id} at revision {revision}"
    cached = None
    try:
        cached = Path(huggingface_hub.snapshot_download(**wanted, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        if incomplete := getattr(error, "snapshot_path", None):  # older versions return the folder instead
            cached = Path(incomplete)
    lacking = _lacking(cached)
    if cached and not lacking:
        return cached
    if cached and (pickles := find_pickles(cached)) and not _gained_weights(source):
        raise _only_pickles(name, repo_id, pickles)
    usable = cached if lacking == [_TOKENIZER] else None  # a repository need not have a tokenizer
    if source.local_files_only or constants.HF_HUB_OFFLINE:
        if usable:
            return usable
        reason = "local_files_only=True" if source.local_files_only else "HF_HUB_OFFLINE"
        cache = source.cache_dir or constants.HF_HUB_CACHE
        raise CheckpointError(
            f"{name} is not in the cache {cache} (missing: {listed(lacking)}), "
            f"and {reason} forbids the network; allow it once, or name a folder that holds the model"
        )
    try:
        silence = {} if progress else {"tqdm_class": _silent_bar()}
        folder = Path(huggingface_hub.snapshot_download(**wanted, **silence))
    # Not one kind of error: huggingface_hub rides on requests, httpx or httpx2, depending on its version.
    except Exception as error:
        if usable:
            return usable
        raise CheckpointError(_why(error, repo_id, name, constants.ENDPOINT)) from error
    lacking = _lacking(folder)
    if lacking and lacking != [_TOKENIZER]:
        raise _incomplete(source, name, folder, lacking)
    return folder


def _lacking(folder: Path | None) -> list[str]:
    """What a model needs and `folder` does not hold, the tokenizer last."""
    if folder is None:
        return ["config.json", WEIGHTS, _TOKENIZER]
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        return [] if (folder / ADAPTER_WEIGHTS).is_file() else [ADAPTER_WEIGHTS]
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    if not (folder / WEIGHTS).is_file():
        if (folder / WEIGHTS_INDEX).is_file():
            weight_map = read_json_object(folder / WEIGHTS_INDEX).get("weight_map")
            shards = weight_map.values() if isinstance(weight_map, dict) else ()
            lacking += sorted({str(shard) for shard in shards if not (folder / str(shard)).is_file()})
        else:
            lacking.append(WEIGHTS)
    tokenizers = ((_TOKENIZER,), ("vocab.json", "merges.txt"), ("vocab.txt",))
    if not any(all((folder / name).is_file() for name in names) for names in tokenizers):
        lacking.append(_TOKENIZER)
    return lacking


def _silent_bar() -> Any:
    from huggingface_hub import utils

    bar: Any = utils.tqdm  # type: ignore[attr-defined]

    class Silent(bar):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


def _why(error: Exception, repo_id: str, name: str, endpoint: str) -> str:
    from huggingface_hub import errors

    status = _status(error)
    login = "pass a token (token=..., HF_TOKEN, or `hf auth login`)"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms at {endpoint}/{repo_id}, then {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{endpoint} has no {name}; give a branch, tag or commit that {repo_id} has"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name} is no folder here, and {endpoint} has no such model or hides it (status {status}); "
            f"check the spelling, or if it is private, {login}"
        )
    if status in (401, 403):
        return f"{endpoint} denies access to {name} (status {status}); {login} that may read it"
    reason = next(iter(str(error).strip().splitlines()), "")
    return (
        f"{name} is no folder here and could not be downloaded from {endpoint} "
        f"({type(error).__name__}: {reason:.300}); check the network and try again: whole files are kept"
    )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, which huggingface_hub may have wrapped in others."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _incomplete(source: Source, name: str, folder: Path, lacking: list[str]) -> CheckpointError:
    import huggingface_hub

    text = f"{name} lacks {listed(lacking, 5)}"
    repo_id = str(source.model)
    try:
        api = huggingface_hub.HfApi(token=source.token)
        files = api.list_repo_files(repo_id, revision=source.revision)
    except Exception:  # as above; the listing only makes the message better
        return CheckpointError(f"{text} (what it has was downloaded to {folder})")
    pickles = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if WEIGHTS in lacking and pickles:
        return _only_pickles(name, repo_id, pickles)
    return CheckpointError(f"{text}; it has {listed(sorted(files), 10)}")


def _only_pickles(name: str, repo_id: str, pickles: list[str]) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"{name} has only pickled weights ({listed(pickles, 3)}), which can run code when they are read; "
        f"if you trust them, run `gpt2core convert {repo_id}` and name the folder that it makes"
    )


def _gained_weights(source: Source) -> bool:
    """Whether the hub has safetensors where the cache has pickles; asked once, briefly, where it may be."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if source.local_files_only or constants.HF_HUB_OFFLINE:
        return False
    url = f"{constants.ENDPOINT}/{source.model}/resolve/{source.revision or 'main'}/{WEIGHTS}"
    headers = build_hf_headers(token=source.token)
    try:  # without huggingface_hub's retries, which take 20 seconds where there is no network
        answer = huggingface_hub.get_session().head(url, headers=headers, timeout=3)
    except Exception:  # of whatever client huggingface_hub rides on
        return False
    return bool(200 <= answer.status_code < 400)


def download_pickles(source: Source, *, progress: bool = True) -> Path:
    """The folder of a repository's snapshot with its pickled weights, for `gpt2core convert`.

    Raises:
        CheckpointError: it cannot be downloaded; says what would help.
    """
    import huggingface_hub
    from huggingface_hub import constants

    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(source.model),
                revision=source.revision,
                cache_dir=None if source.cache_dir is None else Path(source.cache_dir),
                token=source.token,
                local_files_only=source.local_files_only,
                allow_patterns=[
                    *SMALL_FILES,
                    "pytorch_model*.bin",
                    "pytorch_model.bin.index.json",
                    "ckpt.pt",
                ],
                **({} if progress else {"tqdm_class": _silent_bar()}),
            )
        )
    except Exception as error:  # as in `download`
        name = str(source.model)
        raise CheckpointError(_why(error, name, name, constants.ENDPOINT)) from error
