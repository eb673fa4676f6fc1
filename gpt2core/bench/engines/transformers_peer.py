"""Hugging Face transformers: `generate` with its default attention and cache."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import GPT2LMHeadModel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(job: dict[str, Any]) -> "TransformersEngine":
    """Load the checkpoint in the job's precision."""
    if job["precision"] not in DTYPES:
        raise NotImplementedError(f"transformers has no {job['precision']} weights by itself")
    torch.set_num_threads(job["threads"])
    model: Any = GPT2LMHeadModel.from_pretrained(job["checkpoint"], local_files_only=True)
    return TransformersEngine(model.eval().to(DTYPES[job["precision"]]), job)


class TransformersEngine:
    """A model of transformers, or one with its interface, as an engine."""

    def __init__(self, model: Any, job: dict[str, Any]) -> None:
        self._model = model
        self.settings = {
            "threads": torch.get_num_threads(),
            "precision": job["precision"],
            "attention": getattr(model.config, "_attn_implementation", None),
        }

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

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> None:
        """Logits of the last position."""
        self._model(torch.tensor([ids]), logits_to_keep=1)[0][0, -1].argmax().item()

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """(T, V)."""
        found: np.ndarray[Any, Any] = self._model(torch.tensor([ids])).logits[0].float().numpy()
        return found

    @torch.inference_mode()
    def step_at(self, position: int) -> Callable[[], object]:
        """A pass of one token after `position` others, whose cache is cut back each time."""
        vocab_size = self._model.config.vocab_size
        before = torch.tensor([[i * 7919 % vocab_size for i in range(position)]])
        cache = self._model(before, use_cache=True, logits_to_keep=1).past_key_values
        one = torch.tensor([[5]])

        @torch.inference_mode()
        def step() -> None:
            self._model(one, past_key_values=cache, use_cache=True)
            cache.crop(-1)  # one token less; other arguments mean other things in other versions

        return step
