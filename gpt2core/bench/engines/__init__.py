"""The engines that are compared: gpt2core's own backends and the peers that people would pick instead.

Each adapter is one module that runs in a process of its own, started by `engine_process.py`, perhaps with the
interpreter of another virtual environment, in which gpt2core is not installed. Therefore an adapter imports
nothing but the standard library, NumPy and its engine, and this module only says where adapters lie.

An adapter has a function `load(job) -> engine`, where the job is a dict that `worker` writes. It may have
`PRECISIONS`, those that its engine offers; `start(job)`, which imports what the engine needs;
`prepare(job)`, which converts the checkpoint into the folder `job["work"]`; and `build(job)`, which compiles
what the engine keeps for later processes. Each raises NotImplementedError, with a reason, for what its engine
cannot do: that is a skip. The engine has:

- `settings`: what was chosen for it, as JSON;
- `generate(prompts, new_tokens)`: greedy, `new_tokens` for every list of token ids, ignoring end-of-text;
  returns them as lists;
- `logits(ids)`: float32 (T, V), for the check against the reference;
- `prefill(ids)`, where the first token after `ids` needs less than generating one;
- `step_at(position)`, where its interface has single steps: a function that decodes one token there.
"""

from pathlib import Path
from typing import Final, NamedTuple

HERE: Final = Path(__file__).parent
PROCESS: Final = HERE / "engine_process.py"
OWN_ADAPTER: Final = HERE / "gpt2core_engine.py"
PRECISIONS: Final = ("float32", "float16", "bfloat16", "int8", "int4")


class Peer(NamedTuple):
    """Where a peer's adapter lies and what it needs."""

    adapter: Path
    packages: tuple[str, ...]  # that it imports; a missing one is a skip, not a failure
    install: str  # the arguments for `pip install`


_TRANSFORMERS: Final = HERE / "transformers_peer.py"
PEERS: Final = {
    "transformers": Peer(_TRANSFORMERS, ("torch", "transformers"), "torch transformers"),
    "ctranslate2": Peer(
        HERE / "ctranslate2_peer.py",
        ("ctranslate2", "transformers", "torch"),
        "ctranslate2 'transformers<5' torch",
    ),
    "llamacpp": Peer(
        HERE / "llamacpp_peer.py", ("llama_cpp", "gguf", "safetensors"), "llama-cpp-python gguf safetensors"
    ),
    "openvino": Peer(
        HERE / "openvino_peer.py",
        ("openvino", "openvino_genai", "optimum", "nncf"),
        "openvino-genai 'optimum-intel[nncf,openvino]'",
    ),
    "optimum": Peer(_TRANSFORMERS, ("optimum", "onnxruntime", "torch"), "'optimum[onnxruntime]'"),
}
"""The peers by name."""
