"""Greedy text from the model beside this file, with onnxruntime, numpy and tokenizers alone.

python generate.py "Once upon a time" 40
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Model:
    """One sequence and its keys and values; a new object begins a new sequence."""

    def __init__(self, folder: Path) -> None:
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        facts = self.session.get_modelmeta().custom_metadata_map
        self.n_positions = int(facts["n_positions"])
        self.in_place = facts["form"] == "fast"
        self.length = 0  # tokens seen so far
        # The fast form writes into buffers of any length; the portable one returns longer ones each time.
        capacity = self.n_positions if self.in_place else 0
        self.past = {
            put.name: np.zeros((1, put.shape[1], capacity, put.shape[3]), np.float32)
            for put in self.session.get_inputs()
            if put.name.startswith("past_key_") or put.name.startswith("past_value_")
        }

    def step(self, ids: list[int], *, every: bool = False) -> Any:
        """Append tokens; the logits after the last of them (1, V), or after every one (S, V)."""
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "logits_at": np.arange(len(ids)) if every else np.array([len(ids) - 1]),
        }
        if self.in_place:
            feeds["past_length"] = np.array([self.length], np.int64)
            binding = self.session.io_binding()
            for name, array in (feeds | self.past).items():
                binding.bind_cpu_input(name, array)
            for name, array in self.past.items():
                present = name.replace("past", "present")
                binding.bind_output(present, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            binding.bind_output("logits")
            self.session.run_with_iobinding(binding)
            logits = binding.get_outputs()[-1].numpy()
        else:
            logits, *present = self.session.run(None, feeds | self.past)
            self.past = dict(zip(self.past, present, strict=True))
        self.length += len(ids)
        return logits


def main(prompt: str, max_new_tokens: int) -> None:
    """Print the prompt and what follows it."""
    from tokenizers import Tokenizer

    folder = Path(__file__).parent
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model, ids = Model(folder), tokenizer.encode(prompt).ids
    logits, end = model.step(ids), tokenizer.token_to_id("<|endoftext|>")
    for _ in range(min(max_new_tokens, model.n_positions - len(ids))):
        token = int(logits[-1].argmax())
        if token == end:
            break
        ids.append(token)
        if len(ids) < model.n_positions:
            logits = model.step([token])
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
