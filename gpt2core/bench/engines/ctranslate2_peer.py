"""CTranslate2: its own converter, one generator over all threads."""

import json
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np

PRECISIONS = ("float32", "bfloat16", "int8")
_NAMES = "gpt2core-tokens.json"


def prepare(job: dict[str, Any]) -> None:
    """Convert the checkpoint once; what is computed in is chosen when it is loaded."""
    work = Path(job["work"])
    if not (work / _NAMES).exists():
        ctranslate2.converters.TransformersConverter(job["checkpoint"]).convert(str(work), force=True)
        (work / _NAMES).write_text(json.dumps(_names_of_tokens(Path(job["checkpoint"]))))


def load(job: dict[str, Any]) -> "CTranslate2Engine":
    """Load the converted model in the job's precision."""
    how = {"compute_type": job["precision"], "intra_threads": job["threads"], "inter_threads": 1}
    model = ctranslate2.Generator(job["work"], **how)
    names = json.loads((Path(job["work"]) / _NAMES).read_text())
    settings = {"threads": job["threads"], "compute_type": model.compute_type, "inter_threads": 1}
    return CTranslate2Engine(model, names, settings)


def _names_of_tokens(checkpoint: Path) -> list[str]:
    """Of each id: prompts are given by name."""
    if (checkpoint / "vocab.json").exists():
        ids = json.loads((checkpoint / "vocab.json").read_text(encoding="utf-8"))
    else:
        ids = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return sorted(ids, key=lambda name: int(ids[name]))


class CTranslate2Engine:
    """`ctranslate2.Generator` as an engine."""

    def __init__(self, model: Any, names: list[str], settings: dict[str, Any]) -> None:
        self._model, self._names, self.settings = model, names, settings

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy."""
        limits = {"max_length": new_tokens, "min_length": new_tokens}
        named = [[self._names[i] for i in prompt] for prompt in prompts]
        out = self._model.generate_batch(named, include_prompt_in_result=False, sampling_topk=1, **limits)
        return [result.sequences_ids[0] for result in out]

    def prefill(self, ids: list[int]) -> None:
        """It computes the logits of every position."""
        self._model.forward_batch([[self._names[i] for i in ids]])

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """(T, V)."""
        found = self._model.forward_batch([[self._names[i] for i in ids]])
        return np.array(found)[0].astype(np.float32)
