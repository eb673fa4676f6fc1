"""The engines that are compared: gpt2core's own backends and the peers that people would pick instead.

Each adapter is one module that runs in a process of its own, started by `engine_process.py`, perhaps with the
interpreter of another virtual environment, in which gpt2core is not installed. Therefore an adapter imports
nothing but the standard library, NumPy and its engine, and this module only says where adapters lie.

An adapter has a function `load(job) -> engine`, where the job is a dict that `worker` writes, and, where the
engine reads a format of its own, `prepare(job)`, which converts the checkpoint into the folder `job["work"]`.
It may have `build(job)`, which compiles what the engine keeps for later processes.
Each raises NotImplementedError, with a reason, for what its engine cannot do: that is a skip.
The engine has:

- `settings`: what was chosen for it, as JSON;
- `generate(prompts, new_tokens)`: greedy, `new_tokens` for every list of token ids, ignoring end-of-text;
  returns them as lists;
- `prefill(ids)`: all that the first token after `ids` needs;
- `logits(ids)`: float32 (T, V), for the check against the reference;
- `step_at(position)`, where its interface has single steps: a function that decodes one token there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpt2core import RequestError

HERE: Final = Path(__file__).parent
PROCESS: Final = HERE / "engine_process.py"
OWN_ADAPTER: Final = HERE / "gpt2core_engine.py"
PRECISIONS: Final = ("float32", "float16", "bfloat16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a peer's adapter lies and what it needs.

    Attributes:
        adapter: the module's path.
        packages: what it imports; a missing one is a skip, not a failure.
        install: the arguments for `pip install`.
    """

    adapter: Path
    packages: tuple[str, ...]
    install: str


PEERS: Final = {
    "transformers": Peer(HERE / "transformers_peer.py", ("torch", "transformers"), "torch transformers"),
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
    "optimum": Peer(HERE / "optimum_peer.py", ("optimum", "onnxruntime", "torch"), "'optimum[onnxruntime]'"),
}
"""The peers by name."""


def find_peer(name: str) -> Peer:
    """The peer of that name.

    Raises:
        RequestError: there is none; names those that there are.
    """
    if name not in PEERS:
        raise RequestError(f"there is no peer {name!r}; known are {', '.join(PEERS)}")
    return PEERS[name]
