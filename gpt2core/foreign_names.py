"""What other libraries call the options that have another name here, and what to write instead.

Hugging Face's names first, then those of vLLM, llama.cpp and OpenAI. Each answer is in Python's spelling;
the command line puts it into its own.
"""

from typing import Final

_NO_GROUPS: Final = "beams are not divided into groups here; leave it out"
_NOT_NEEDED: Final = "it is not needed here; leave it out"
_ONE_COPY: Final = "weights are mapped from their file anyway; leave it out"

SAMPLING: Final = {
    "do_sample": "temperature=0.8 (any above 0) draws, temperature=0 takes the likeliest token",
    "num_beam_groups": _NO_GROUPS,
    "diversity_penalty": _NO_GROUPS,
    "use_beam_search": "use num_beams=4",
    "beam_width": "use num_beams=4",
    "logits_processor": "use logits_processors=[f] with f(token_ids, logits) -> logits",
    "stopping_criteria": "use stopping=[g] with g(token_ids, text) -> bool",
    "prefix_allowed_tokens_fn": "use regex, json_schema, choice, grammar or logits_processors=[f]",
    "response_format": "use json_schema={'type': 'object'}, or another schema",
    "structured_outputs": "use regex, json_schema, choice or grammar",
    "guided_decoding": "use regex, json_schema, choice or grammar",
    "guided_regex": "use regex='[0-9]+'",
    "guided_json": "use json_schema={'type': 'object'}, or another schema",
    "guided_choice": "use choice=['yes', 'no']",
    "guided_grammar": 'use grammar=\'start: "yes" | "no"\'',
    "stop_strings": "use stop='text'",
    "stop_sequences": "use stop='text'",
    "eos_token_id": "use stop_token_ids=[50256]",
    "best_of": "use n=2",
    "max_tokens": "use max_new_tokens=100",
    "n_predict": "use max_new_tokens=100",
    "num_predict": "use max_new_tokens=100",
    "max_output_tokens": "use max_new_tokens=100",
    "min_length": "use min_new_tokens=10, which does not count the prompt",
    "min_tokens": "use min_new_tokens=10",
    "temp": "use temperature=0.8",
    "repeat_penalty": "use repetition_penalty=1.2",
    "bad_words_ids": "use logit_bias={50256: -100}",
    "suppress_tokens": "use logit_bias={50256: -100}",
    "sequence_bias": "use logit_bias={50256: -100}",
    "typical_p": "use top_p=0.95 or min_p=0.05",
    "epsilon_cutoff": "use min_p=0.05",
    "eta_cutoff": "use min_p=0.05",
    "truncation": "use overflow='truncate'",
    "truncate_prompt_tokens": "use overflow='truncate'",
    "context_shift": "use overflow='slide'",
    "return_full_text": "use echo=True",
    "output_scores": "use logprobs=0",
    "output_logits": "use logprobs=0",
    "top_logprobs": "use logprobs=5",
    "manual_seed": "use seed=7",
    "random_seed": "use seed=7",
    "pad_token_id": _NOT_NEEDED,
    "attention_mask": _NOT_NEEDED,
    "use_cache": _NOT_NEEDED,
    "skip_special_tokens": _NOT_NEEDED,
    "streamer": "call stream, which yields pieces",
    "generation_config": "pass SamplingParams, or its fields",
    "assistant_model": "name the draft model when the model is loaded, with draft_model='FOLDER'",
    "prompt_lookup_num_tokens": "load the model with speculation='prompt_lookup'",
}
"""A sampling parameter elsewhere -> what to write here."""

LOADING: Final = {
    "torch_dtype": "use precision='bfloat16', or leave it out for that of the file",
    "dtype": "use precision='bfloat16', or leave it out for that of the file",
    "load_in_8bit": "use precision='int8'",
    "load_in_4bit": "use precision='int4'",
    "quantization_config": "use precision='int8' or 'int4'",
    "device_map": "use device='cuda'",
    "engine": "use backend='auto'",
    "framework": "use backend='auto'",
    "num_threads": "use threads=4",
    "n_threads": "use threads=4",
    "use_auth_token": "use token='hf_...'",
    "peft_model": "use adapter='FOLDER'",
    "lora": "use adapter='FOLDER'",
    "cache_folder": "use cache_dir='FOLDER'",
    "local_files": "use local_files_only=True",
    "trust_remote_code": "no code of a model is ever run; leave it out",
    "subfolder": "name the folder itself as the model",
    "attn_implementation": _NOT_NEEDED,
    "use_safetensors": "weights are always read from safetensors; leave it out",
    "low_cpu_mem_usage": _ONE_COPY,
    "use_mmap": _ONE_COPY,
}
"""An option of `from_pretrained` elsewhere -> what to write here."""

BACKENDS: Final = {
    "pytorch": "torch",
    "onnxruntime": "onnx",
    "ort": "onnx",
    "flax": "jax",
    "xla": "jax",
    "np": "numpy",
    "c": "native",
    "cpu": "native",
}
PRECISIONS: Final = {
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp16": "bfloat16",
    "float16": "bfloat16",
    "half": "bfloat16",
    "bf16": "bfloat16",
    "8bit": "int8",
    "q8": "int8",
    "q8_0": "int8",
    "4bit": "int4",
    "q4": "int4",
    "q4_0": "int4",
    "nf4": "int4",
}
"""What others call a backend or precision -> its name here, or the nearest that there is."""
