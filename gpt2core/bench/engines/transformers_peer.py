"""Hugging Face transformers with its default attention and cache; and Optimum's export on ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

PRECISIONS = ("float32", "float16", "bfloat16")


def start(job: dict[str, Any]) -> None:
    """Import what the job's engine is made of: the class, since the packages load their parts when asked."""
    if job["engine"] == "transformers":
        from transformers import GPT2LMHeadModel  # noqa: F401
    else:
        from optimum.onnxruntime import ORTModelForCausalLM  # noqa: F401

        if job["precision"] != "float32":
            raise NotImplementedError(f"its export is measured in float32 only, not in {job['precision']}")


def prepare(job: dict[str, Any]) -> None:
    """Export the checkpoint once, for Optimum."""
    if job["engine"] == "optimum" and not (Path(job["work"]) / "model.onnx").exists():
        from optimum.onnxruntime import ORTModelForCausalLM

        ORTModelForCausalLM.from_pretrained(job["checkpoint"], export=True).save_pretrained(job["work"])


def load(job: dict[str, Any]) -> "ExportedEngine":
    """Load the checkpoint in the job's precision, or open its export with the job's threads."""
    torch.set_num_threads(job["threads"])
    settings = {"threads": torch.get_num_threads(), "precision": job["precision"]}
    if job["engine"] == "transformers":
        from transformers import GPT2LMHeadModel

        model: Any = GPT2LMHeadModel.from_pretrained(job["checkpoint"], local_files_only=True)
        model = model.eval().to(getattr(torch, job["precision"]))
        return TransformersEngine(model, settings | {"attention": model.config._attn_implementation})
    import onnxruntime
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    model = ORTModelForCausalLM.from_pretrained(job["work"], session_options=options, local_files_only=True)
    return ExportedEngine(model, settings | {"provider": "CPUExecutionProvider"})


class ExportedEngine:
    """`ORTModelForCausalLM` as an engine: its graph computes the logits of every position."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self._model, self.settings = model, settings

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy; an end-of-text token that is none can never be drawn."""
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
        """All logits, of which the last position's are needed."""
        self._forward(ids)[0, -1].argmax().item()

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """(T, V)."""
        found: np.ndarray[Any, Any] = self._forward(ids)[0].float().numpy()
        return found

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> Any:
        tokens, positions = torch.tensor([ids]), torch.arange(len(ids))[None]
        mask = torch.ones_like(tokens)
        return self._model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits  # (1, T, V)


class TransformersEngine(ExportedEngine):
    """A model of transformers as an engine."""

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> None:
        """Logits of the last position."""
        self._model(torch.tensor([ids]), logits_to_keep=1)[0][0, -1].argmax().item()

    @torch.inference_mode()
    def step_at(self, position: int) -> Callable[[], object]:
        """A pass of one token after `position` others, whose cache is cut back each time."""
        vocab_size = self._model.config.vocab_size
        before = torch.tensor([[i * 7919 % vocab_size for i in range(position)]])
        cache = self._model(before, use_cache=True, logits_to_keep=1).past_key_values
        token = torch.tensor([[5]])

        @torch.inference_mode()
        def step() -> None:
            self._model(token, past_key_values=cache, use_cache=True)
            cache.crop(-1)  # one token less; other arguments mean other things in other versions

        return step
