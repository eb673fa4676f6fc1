"""OpenVINO GenAI: the export of optimum-intel and `LLMPipeline`.

OpenVINO computes a float32 model in bfloat16 where the processor has it, unless INFERENCE_PRECISION_HINT says
f32; "float32" means that hint here, and "bfloat16" its default.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
BITS = {"int8": 8, "int4": 4}  # of the weights; the others keep them
GROUP_SIZE = 64
_MODEL = "openvino_model.xml"


def prepare(job: dict[str, Any]) -> None:
    """Export the checkpoint once per precision of the weights."""
    bits, work = BITS.get(job["precision"]), Path(job["work"])
    if (work / _MODEL).exists():
        return
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    main_export(
        job["checkpoint"],
        work,
        task="text-generation-with-past",
        library_name="transformers",
        stateful=True,
        convert_tokenizer=True,
        ov_config=OVConfig(dtype="fp32"),
    )
    if bits is not None:
        _quantize(work, bits)


def _quantize(work: Path, bits: int) -> None:
    import nncf  # noqa: F401 - optimum needs it here, and its absence is a skip
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    group = {"group_size": GROUP_SIZE} if bits == 4 else {}
    config = OVWeightQuantizationConfig(bits=bits, sym=False, **group)
    model = OVModelForCausalLM.from_pretrained(work, quantization_config=config, compile=False)
    with tempfile.TemporaryDirectory(dir=work) as name:
        model.save_pretrained(name)
        for path in Path(name).glob("openvino_model.*"):
            path.replace(work / path.name)


def load(job: dict[str, Any]) -> "OpenVinoEngine":
    """Compile the exported model with the job's threads."""
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": job["threads"]}
    if job["precision"] == "float32":
        properties["INFERENCE_PRECISION_HINT"] = "f32"
    pipeline = openvino_genai.LLMPipeline(job["work"], "CPU", ATTENTION_BACKEND="SDPA", **properties)
    bits = BITS.get(job["precision"], 32)
    settings = {**properties, "ATTENTION_BACKEND": "SDPA", "weight_bits": bits}
    return OpenVinoEngine(pipeline, job["work"], properties, settings)


class OpenVinoEngine:
    """`LLMPipeline` as an engine; logits come from the same model under the same properties."""

    def __init__(
        self, pipeline: Any, work: str, properties: dict[str, Any], settings: dict[str, Any]
    ) -> None:
        self._pipeline, self._work, self._properties = pipeline, work, properties
        self.settings = settings

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy."""
        ids = np.array(prompts, np.int64)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos, config.do_sample = True, False
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return [list(tokens) for tokens in self._pipeline.generate(inputs, config).tokens]

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """(T, V)."""
        model = openvino.Core().compile_model(str(Path(self._work) / _MODEL), "CPU", self._properties)
        request = model.create_infer_request()
        tokens = np.array([ids], np.int64)
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for port in model.inputs for name in port.names}
        out = request.infer({name: value for name, value in inputs.items() if name in names})
        return np.array(out[model.output("logits")][0], np.float32)
