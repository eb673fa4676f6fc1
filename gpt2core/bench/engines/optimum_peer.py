"""Optimum on ONNX Runtime: the export and the session that it makes, generation by transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM


def prepare(job: dict[str, Any]) -> None:
    """Export the checkpoint once."""
    _refuse_other_precisions(job)
    if not (Path(job["work"]) / "model.onnx").exists():
        ORTModelForCausalLM.from_pretrained(job["checkpoint"], export=True).save_pretrained(job["work"])


def load(job: dict[str, Any]) -> "OptimumEngine":
    """Open the export with the job's threads."""
    _refuse_other_precisions(job)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    torch.set_num_threads(job["threads"])
    model = ORTModelForCausalLM.from_pretrained(job["work"], session_options=options, local_files_only=True)
    return OptimumEngine(
        model, {"threads": job["threads"], "precision": "float32", "provider": "CPUExecutionProvider"}
    )


def _refuse_other_precisions(job: dict[str, Any]) -> None:
    if job["precision"] != "float32":
        raise NotImplementedError(f"its export is measured in float32 only, not in {job['precision']}")


class OptimumEngine:
    """`ORTModelForCausalLM` as an engine."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self._model = model
        self.settings = settings

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy."""
        ids = torch.tensor(prompts)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return tokens

    def prefill(self, ids: list[int]) -> None:
        """The exported graph computes the logits of every position."""
        self._forward(ids)[0, -1].argmax().item()

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """(T, V)."""
        found: np.ndarray[Any, Any] = self._forward(ids)[0].float().numpy()
        return found

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> Any:
        tokens = torch.tensor([ids])
        positions = torch.arange(len(ids))[None]
        return self._model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=positions
        ).logits
