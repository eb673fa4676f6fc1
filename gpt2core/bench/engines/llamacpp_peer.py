"""llama.cpp through llama-cpp-python's plain C functions; GGUF files are written here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

PRECISIONS = ("float32", "float16", "int8", "int4")
KINDS = {"float16": 1, "int8": 7, "int4": 2}  # llama.cpp's numbers of F16, Q8_0 and Q4_0
BATCH_TOKENS = 512
MOST_SEQUENCES = 64
_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def prepare(job: dict[str, Any]) -> None:
    """Write the GGUF file once, and quantize it."""
    kind = KINDS.get(job["precision"])
    config = json.loads((Path(job["checkpoint"]) / "config.json").read_text(encoding="utf-8"))
    _refuse_what_gguf_cannot_say(config)
    plain, path = Path(job["work"]) / "float32.gguf", _path(job)
    if not plain.exists():
        _write(Path(job["checkpoint"]), config, plain)
    if kind is not None and not path.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = kind
        code = llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), params)
        if code != 0:
            raise RuntimeError(f"llama_model_quantize ended with {code}")


def load(job: dict[str, Any]) -> "LlamaCppEngine":
    """Load the GGUF file."""
    model = llama_cpp.llama_model_load_from_file(
        str(_path(job)).encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {_path(job).name}")
    return LlamaCppEngine(model, job)


def _path(job: dict[str, Any]) -> Path:
    return Path(job["work"]) / f"{job['precision']}.gguf"


def _refuse_what_gguf_cannot_say(config: dict[str, Any]) -> None:
    faults = [
        name
        for name, differs in {
            "activation_function": config.get("activation_function", "gelu_new") not in _TANH_GELUS,
            "scale_attn_weights": not config.get("scale_attn_weights", True),
            "scale_attn_by_inverse_layer_idx": config.get("scale_attn_by_inverse_layer_idx", False),
        }.items()
        if differs
    ]
    if faults:
        raise NotImplementedError(f"GGUF's gpt2 has no way to say {', '.join(faults)}")


def _write(checkpoint: Path, config: dict[str, Any], path: Path) -> None:
    weights = {
        name.removeprefix("transformer."): np.asarray(array, np.float32)
        for name, array in load_file(checkpoint / "model.safetensors").items()
    }
    width = config["n_embd"]
    out = gguf.GGUFWriter(path, "gpt2")
    out.add_block_count(config["n_layer"])
    out.add_context_length(config["n_positions"])
    out.add_embedding_length(width)
    out.add_feed_forward_length(config.get("n_inner") or 4 * width)
    out.add_head_count(config["n_head"])
    out.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    out.add_file_type(0)
    out.add_tokenizer_model("no_vocab")  # token ids go in and come out
    out.add_vocab_size(config["vocab_size"])
    tensors = {
        "token_embd.weight": weights["wte.weight"],
        "position_embd.weight": weights["wpe.weight"],
        "output_norm.weight": weights["ln_f.weight"],
        "output_norm.bias": weights["ln_f.bias"],
        "output.weight": weights.get("lm_head.weight", weights["wte.weight"]),
    }
    for layer in range(config["n_layer"]):
        for theirs, name in _BLOCK.items():
            matrix = weights[f"h.{layer}.{theirs}.weight"]
            tensors[f"blk.{layer}.{name}.weight"] = matrix.T  # (in, out) to (out, in); a vector stays
            tensors[f"blk.{layer}.{name}.bias"] = weights[f"h.{layer}.{theirs}.bias"]
    for name, array in tensors.items():
        out.add_tensor(name, np.ascontiguousarray(array))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


class LlamaCppEngine:
    """A context per number of sequences, and greedy choices made by NumPy."""

    def __init__(self, model: Any, job: dict[str, Any]) -> None:
        self._model, self._threads = model, job["threads"]
        self._context_tokens = llama_cpp.llama_model_n_ctx_train(model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._buffer = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, MOST_SEQUENCES)
        self._contexts: dict[tuple[int, int], Any] = {}
        self.settings = {"threads": self._threads, "file": _path(job).name, "n_batch": BATCH_TOKENS}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy."""
        context = self._cleared(len(prompts), max(map(len, prompts)) + new_tokens)
        items = [(t, p, s, p == len(ids) - 1) for s, ids in enumerate(prompts) for p, t in enumerate(ids)]
        ends = [i for i, item in enumerate(items) if item[3]]
        for begin in range(
            0, len(items), BATCH_TOKENS
        ):  # the last logits of a prompt stand in its last piece
            self._decode(context, items[begin : begin + BATCH_TOKENS])
        if len(items) > BATCH_TOKENS and len(prompts) > 1:
            raise NotImplementedError(
                f"prompts of more than {BATCH_TOKENS} tokens in all, as several sequences"
            )
        rows = [end % BATCH_TOKENS for end in ends]
        texts: list[list[int]] = [[] for _ in prompts]
        for step in range(new_tokens):
            for text, row in zip(texts, rows, strict=True):
                text.append(int(self._logits(context, row).argmax()))
            if step + 1 < new_tokens:
                self._decode(
                    context,
                    [
                        (text[-1], len(ids) + step, s, True)
                        for s, (ids, text) in enumerate(zip(prompts, texts, strict=True))
                    ],
                )
                rows = list(range(len(prompts)))
        return texts

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """(T, V)."""
        context = self._cleared(1, len(ids))
        self._decode(context, [(token, position, 0, True) for position, token in enumerate(ids)])
        return np.stack([self._logits(context, row).copy() for row in range(len(ids))])

    def step_at(self, position: int) -> Callable[[], object]:
        """A pass of one token after `position` others, taken out of the cache again each time."""
        context = self._cleared(1, position + 1)
        before = [(i * 7919 % self._vocab_size, i, 0, False) for i in range(position)]
        for begin in range(0, position, BATCH_TOKENS):
            self._decode(context, before[begin : begin + BATCH_TOKENS])

        def step() -> None:
            self._decode(context, [(5, position, 0, True)])
            self._logits(context, 0)
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 0, position, -1)

        return step

    def _cleared(self, sequences: int, tokens: int) -> Any:
        tokens = min(-(-tokens // 256) * 256, max(self._context_tokens, 256))
        if (sequences, tokens) not in self._contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max, params.n_batch = sequences * tokens, sequences, BATCH_TOKENS
            params.n_threads = params.n_threads_batch = self._threads
            self._contexts[sequences, tokens] = llama_cpp.llama_init_from_model(self._model, params)
        context = self._contexts[sequences, tokens]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return context

    def _decode(self, context: Any, items: list[tuple[int, int, int, bool]]) -> None:
        """Tokens as (id, position, sequence, whether its logits are wanted)."""
        buffer = self._buffer
        buffer.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            buffer.token[i], buffer.pos[i], buffer.logits[i] = token, position, wanted
            buffer.n_seq_id[i] = 1
            buffer.seq_id[i][0] = sequence
        code = llama_cpp.llama_decode(context, buffer)
        if code != 0:
            raise RuntimeError(f"llama_decode ended with {code}")

    def _logits(self, context: Any, row: int) -> np.ndarray[Any, Any]:
        pointer = llama_cpp.llama_get_logits_ith(context, row)
        return np.ctypeslib.as_array(pointer, shape=(self._vocab_size,))
