"""config.json: what real files say is understood, and nothing else is guessed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig
from transformers.activations import ACT2CLS
from transformers.generation import GenerationConfig

from gpt2core._json import listed, parse_json_object, read_json_object, shown, shown_name
from gpt2core.config import ACTIVATIONS, ModelConfig, known_token_ids
from gpt2core.errors import CheckpointError, CheckpointWarning, UnsupportedCheckpointError

SUMMARY = {
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
}  # fmt: skip
DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
COMMON = {
    "architectures": ["GPT2LMHeadModel"], "bos_token_id": 50256, "eos_token_id": 50256,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "vocab_size": 50257, **DROPOUT, **SUMMARY,
}  # fmt: skip
GENERATION = {"text-generation": {"do_sample": True, "max_length": 50}}

# The fields of public checkpoints' config.json, old and new, and what they mean.
REAL = {
    "gpt2": (
        {
            **COMMON, "activation_function": "gelu_new", "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
            "n_head": 12, "n_layer": 12, "n_positions": 1024, "task_specific_params": GENERATION,
        },
        {},
    ),
    "gpt2-medium": (
        {
            **COMMON, "activation_function": "gelu_new", "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1024,
            "n_head": 16, "n_layer": 24, "n_positions": 1024, "n_special": 0, "predict_special_tokens": True,
        },
        {"n_embd": 1024, "n_head": 16, "n_layer": 24},
    ),
    "gpt2-xl": (
        {
            **COMMON, "activation_function": "gelu_new", "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1600,
            "n_head": 25, "n_layer": 48, "n_positions": 1024, "output_past": True,
        },
        {"n_embd": 1600, "n_head": 25, "n_layer": 48},
    ),
    "distilgpt2": (
        {
            **COMMON, "_num_labels": 1, "activation_function": "gelu_new", "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0}, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
            "n_layer": 6, "n_positions": 1024, "task_specific_params": GENERATION,
        },
        {"n_layer": 6},
    ),
    "DialoGPT-small, as first published": (
        {
            "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768,
            "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
        },
        {},
    ),
    "stanford-crfm": (
        {
            **COMMON, "_name_or_path": "gpt2", "activation_function": "gelu_new",
            "gradient_checkpointing": False, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
            "n_head": 12, "n_inner": None, "n_layer": 12, "n_positions": 1024,
            "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True,
            "scale_attn_weights": True, "transformers_version": "4.11.3", "use_cache": False,
        },
        {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    ),
    "Cerebras-GPT-111M": (
        {
            "activation_function": "gelu", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.0,
            "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_inner": 3072,
            "n_layer": 10, "n_positions": 2048, "reorder_and_upcast_attn": False, "resid_pdrop": 0.0,
            "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "torch_dtype": "float32",
            "transformers_version": "4.19.2", "use_cache": True, "vocab_size": 50257,
        },
        {"activation_function": "gelu", "n_inner": 3072, "n_layer": 10, "n_positions": 2048},
    ),
    "codeparrot, with its misspelt field": (
        {
            **COMMON, "activation_function": "gelu_new", "bos_token_id": 0, "eos_token_id": 0,
            "model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024,
            "reorder_and_upcast_attn": True, "scale_attn_by_layer_idx": True, "vocab_size": 32768,
        },
        {
            "bos_token_id": 0, "eos_token_ids": (0,), "n_embd": 1600, "n_head": 25, "n_layer": 48,
            "reorder_and_upcast_attn": True, "vocab_size": 32768,
        },
    ),
    "transformers 2, every field written out": (
        {
            **COMMON, "activation_function": "gelu_new", "do_sample": False, "eos_token_ids": None,
            "finetuning_task": None, "is_decoder": False, "length_penalty": 1.0, "max_length": 20,
            "model_type": "gpt2", "num_beams": 1, "num_labels": 2, "num_return_sequences": 1,
            "output_attentions": False, "output_hidden_states": False, "pad_token_id": None,
            "pruned_heads": {}, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
            "torchscript": False, "use_bfloat16": False, "xla_device": None,
        },
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_config_of_a_published_model_is_understood(name):
    fields, differences = REAL[name]
    gpt2 = ModelConfig(bos_token_id=50256, eos_token_ids=(50256,))
    assert ModelConfig.from_json(json.dumps(fields)) == dataclasses.replace(gpt2, **differences)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_embd": 96, "n_head": 6, "n_layer": 3, "n_positions": 64, "vocab_size": 60000, "n_inner": 50},
        {"activation_function": "relu", "layer_norm_epsilon": 1e-3, "scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None},
        {"eos_token_id": [3, 50256], "dtype": "bfloat16", "num_labels": 3, "attn_implementation": "eager"},
    ],
    ids=str,
)
def test_what_transformers_writes_today_is_read_and_what_is_written_here_transformers_reads(fields, tmp_path):
    theirs = GPT2Config(**fields)
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_json((tmp_path / "config.json").read_bytes())
    back = GPT2Config.from_dict(json.loads(json.dumps(ours.to_dict())))
    for name, value in ours.to_dict().items():
        if name != "architectures":
            assert value == getattr(theirs, name), name
            assert value == getattr(back, name), name


def test_every_field_that_transformers_knows_is_known():
    fields = GPT2Config().to_dict() | GenerationConfig._get_default_generation_params()
    fields |= {"name_or_path": "", "attn_implementation": None, "experts_implementation": None}
    fields |= {field.name: fields.get(field.name) for field in dataclasses.fields(PreTrainedConfig)}
    fields |= {"tie_last_hidden_states": True, "per_layer_config": None, "torch_dtype": "float16"}
    assert ModelConfig.from_dict(fields) == ModelConfig(bos_token_id=50256, eos_token_ids=(50256,))


def test_activations_are_those_of_transformers_without_parameters():
    assert set(ACT2CLS) - ACTIVATIONS == {"prelu", "xielu"}  # these learn parameters
    assert set(ACT2CLS) >= ACTIVATIONS


def test_other_spellings_of_a_size_are_read_and_a_contradiction_is_a_fault():
    fields = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 8,
    }
    config = ModelConfig.from_dict(fields)
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (32, 4, 2, 8)
    assert ModelConfig.from_dict({**fields, "n_embd": 32}) == config
    with pytest.raises(CheckpointError, match="n_embd is given twice, as 32 and 64; remove the wrong one"):
        ModelConfig.from_dict({**fields, "n_embd": 64})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("add_cross_attention", True),
        ("auto_map", {"AutoConfig": "evil.Config"}),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}),
        ("sliding_window", 256),
        ("per_layer_config", {"0": {"n_head": 2}}),
    ],
)
def test_field_that_would_change_the_mathematics_is_refused_by_name_unless_neutral(field, value):
    ModelConfig.from_dict({field: None})
    with pytest.raises(UnsupportedCheckpointError) as error:
        ModelConfig.from_dict({field: value})
    assert f"does not implement: {field} = {json.dumps(value)}; remove a field only if" in str(error.value)


def test_all_that_is_refused_and_all_that_is_wrong_is_listed_at_once():
    fields = {
        "n_embd": 10, "n_head": 3, "vocab_size": True, "n_layer": 0, "scale_attn_weights": 1,
        "layer_norm_epsilon": -1, "eos_token_id": ["x"], "bos_token_id": [1], "n_inner": 1.5,
    }  # fmt: skip
    with pytest.raises(CheckpointError) as error:
        ModelConfig.from_dict(fields)
    message = str(error.value)
    assert not isinstance(error.value, UnsupportedCheckpointError)
    for part in (
        "vocab_size is true, expected a whole number from 1 to 2147483647",
        "n_layer is 0, expected a whole number",
        "n_embd 10 is not a multiple of n_head 3",
        "n_inner is 1.5, expected null or a whole number",
        "layer_norm_epsilon is -1, expected a positive number",
        "scale_attn_weights is 1, expected true or false",
        'eos_token_id is "x", expected a token id',
        "bos_token_id is [1], expected null or a token id",
    ):
        assert part in message

    with pytest.raises(UnsupportedCheckpointError) as error:
        ModelConfig.from_dict(
            {**fields, "rotary": True, "activation_function": "xielu", "pruned_heads": {"0": []}}, strict=True
        )
    message = str(error.value)
    for part in (
        "rotary = true (unknown field)",
        'activation_function = "xielu" (supported are gelu,',
        "also: vocab",
    ):
        assert part in message
    assert 'pruned_heads = {"0": []}' in message


# Fields of public checkpoints that nothing in transformers' GPT-2 reads.
UNREAD = {
    "author": "Heewon Jeon(madjakarta@gmail.com)", "created_date": "2021-04-28", "license": "CC-BY-NC-SA 4.0",
    "line_by_line": False, "n_vocab": 50257, "bos_token": "<|endoftext|>", "rotary": True, "n_embed": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_field_that_transformers_does_not_read_changes_nothing_there_and_is_named_in_one_warning_here(name):
    fields = {
        name: UNREAD[name],
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "architectures": ["GPT2LMHeadModel"],
    }
    want = ModelConfig.from_dict({k: v for k, v in fields.items() if k != name})
    with pytest.warns(CheckpointWarning, match="GPT-2 does not read, which are left out") as caught:
        assert ModelConfig.from_dict(fields) == want
    assert [f"left out: {name} = {shown(UNREAD[name])}" in str(w.message) for w in caught] == [True]
    ids = torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config.from_dict(fields)).eval()
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config.from_dict({k: v for k, v in fields.items() if k != name})).eval()
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, plain(ids).logits, rtol=0, atol=0)
    with pytest.raises(UnsupportedCheckpointError, match=f"{name} = .*unknown field"):
        ModelConfig.from_dict(fields, strict=True)


def test_gpt_sw3_is_a_gpt2():
    assert ModelConfig.from_dict({"model_type": "gpt-sw3"}) == ModelConfig.from_dict({})


@pytest.mark.parametrize("names", [["LlamaForCausalLM"], ["BertModel", "T5Model"]])
def test_foreign_architecture_is_refused_by_name(names):
    with pytest.raises(UnsupportedCheckpointError) as error:
        ModelConfig.from_dict({"architectures": names})
    assert f"architectures = {json.dumps(names)}" in str(error.value)


@pytest.mark.parametrize(
    "names",
    [None, [], ["GPT2DoubleHeadsModel"], ["AutoModelForCausalLM"], ["X", "TFGPT2LMHeadModel"], "GPT2"],
)
def test_architecture_that_holds_a_gpt2_or_says_nothing_is_read(names):
    assert ModelConfig.from_dict({"architectures": names}) == ModelConfig.from_dict({})


@pytest.mark.parametrize("value", [None, 5, "llama", ["gpt2"], {"x": 1}])
def test_another_model_type_is_refused(value):
    with pytest.raises(UnsupportedCheckpointError, match='gpt2core runs "gpt2" only') as error:
        ModelConfig.from_dict({"model_type": value})
    assert json.dumps(value) in str(error.value)


BAD_VALUES = [True, None, "12", 12.0, [12], {}, -1, 0, 2**31, 10**400]


@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: f"{value!s:.12}")
def test_size_that_is_no_positive_whole_number_is_a_fault(field, value):
    with pytest.raises(CheckpointError, match=f"{field} is "):
        ModelConfig.from_dict({field: value})
    with pytest.raises(CheckpointError, match=f"{field} is "):
        ModelConfig(**{field: value})


@pytest.mark.parametrize("value", [0, -1e-5, True, "1e-5", None, [1e-5], 10**400, float("nan"), float("inf")])
def test_epsilon_that_is_no_positive_finite_number_is_a_fault(value):
    with pytest.raises(
        CheckpointError, match=r"layer_norm_epsilon is .*, expected a positive number up to 1e38"
    ):
        ModelConfig.from_dict({"layer_norm_epsilon": value})


def test_whole_epsilon_becomes_a_float():
    assert isinstance(ModelConfig.from_dict({"layer_norm_epsilon": 1}).layer_norm_epsilon, float)


@pytest.mark.parametrize("value", [True, "relu ", 3, None, ["relu"], "prelu", "__class__", "\ud800"])
def test_activation_that_is_not_known_is_refused(value):
    with pytest.raises(CheckpointError, match="activation_function"):
        ModelConfig.from_dict({"activation_function": value})


def test_token_ids_are_read_as_transformers_reads_them():
    def eos(**fields):
        return ModelConfig.from_dict(fields).eos_token_ids

    assert eos() == (50256,)  # a silent file means GPT-2's own
    assert eos(vocab_size=100) == ()  # which such a vocabulary does not hold
    assert eos(eos_token_id=None) == ()
    assert eos(eos_token_id=7) == (7,)
    assert eos(eos_token_id=[7, 8]) == (7, 8)
    assert eos(eos_token_id=-1) == eos(eos_token_id=50257) == eos(eos_token_id=[10**30]) == ()
    assert eos(eos_token_id=[5, 60000], pad_token_id=-1) == (5,)
    assert ModelConfig.from_dict({"bos_token_id": -1}).bos_token_id is None
    assert known_token_ids([1, "x", True], 10) == (1, "x", True)  # left for validation to refuse


@pytest.mark.parametrize("ids", [(50257,), (-1,), ("1",), (True,), (1.0,), [1], 5, None])
def test_configuration_made_by_hand_must_have_end_tokens_of_its_vocabulary(ids):
    with pytest.raises(CheckpointError, match="eos_token_id"):
        ModelConfig(eos_token_ids=ids)


@given(
    st.builds(
        ModelConfig,
        vocab_size=st.integers(10, 99),
        n_positions=st.integers(1, 99),
        n_embd=st.sampled_from([4, 8, 12]),
        n_layer=st.integers(1, 9),
        n_head=st.sampled_from([1, 2, 4]),
        n_inner=st.none() | st.integers(1, 99),
        activation_function=st.sampled_from(sorted(ACTIVATIONS)),
        layer_norm_epsilon=st.floats(1e-12, 1.0),
        scale_attn_weights=st.booleans(),
        tie_word_embeddings=st.booleans(),
        bos_token_id=st.none() | st.integers(0, 9),
        eos_token_ids=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    )
)
def test_configuration_written_reads_back_the_same(config):
    assert ModelConfig.from_json(json.dumps(config.to_dict())) == config


def test_sizes_that_follow_from_the_configuration():
    config = ModelConfig(n_embd=48, n_head=4, n_layer=3, vocab_size=100, n_positions=16)
    assert (config.head_dim, config.mlp_dim) == (12, 192)
    assert dataclasses.replace(config, n_inner=7).mlp_dim == 7
    assert config.attention_scale(2) == 12**-0.5
    assert (
        dataclasses.replace(config, scale_attn_by_inverse_layer_idx=True).attention_scale(2) == 12**-0.5 / 3
    )
    assert dataclasses.replace(config, scale_attn_weights=False).attention_scale(2) == 1.0
    assert config.cache_nbytes(2, 10) == 2 * 3 * 2 * 10 * 48 * 4
    assert ModelConfig().parameters == 124_439_808  # GPT-2 small
    assert ModelConfig(tie_word_embeddings=False).parameters == 124_439_808 + 50257 * 768


# ---- strict JSON


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"n_embd": NaN}', "NaN is not a JSON number"),
        (b'{"n_embd": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"layer_norm_epsilon": 1e400}', "the number 1e400 is too large for a float"),
        (b'{"a": -1e999}', "the number -1e999 is too large"),
        (b'{"n_embd": 1, "n_embd": 1}', 'key "n_embd" stands twice'),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', 'key "b" stands twice'),
        (b'\xef\xbb\xbf{"n_embd": 768}', "BOM"),
        ('{"n_embd": 768}'.encode("utf-16"), "codec can't decode"),
        (b'{"a": "\xff"}', "codec can't decode"),
        (b"[" * 100_000, "recursion"),
        (b'{"a":' * 100_000, "recursion"),
        (b'{"n_embd": ' + b"9" * 5000 + b"}", "digits"),
        (b"{} {}", "Extra data"),
        (b"{'a': 1}", "Expecting property name"),
        (b'{"a": 1,}', "Expecting property name|Illegal trailing comma"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_text_that_is_not_strict_json_is_refused(text, reason):
    with pytest.raises(CheckpointError, match="config.json is not strict JSON: .*" + f"({reason})"):
        ModelConfig.from_json(text)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"x"'])
def test_json_that_is_no_object_is_refused(text):
    with pytest.raises(
        CheckpointError, match=f"config.json holds {text.replace('[]', r'..')}, expected a JSON object"
    ):
        ModelConfig.from_json(text)


@given(st.binary(max_size=40) | st.text(max_size=40))
def test_any_text_gives_a_configuration_or_a_typed_error(text):
    try:
        config = ModelConfig.from_json(text)
    except CheckpointError as error:
        assert len(str(error)) < 2000  # noqa: PT017 - most texts fail, a few pass
    else:
        assert config == ModelConfig(bos_token_id=50256, eos_token_ids=(50256,))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from(sorted(ModelConfig().to_dict())), json_values, max_size=4))
def test_any_values_give_a_valid_configuration_or_a_typed_error_of_one_printable_line(fields):
    try:
        config = ModelConfig.from_dict(fields)
    except CheckpointError as error:
        message = str(error)
        assert message.isascii()
        assert message.isprintable()
        assert len(message) < 4000
    else:
        assert config.n_embd % config.n_head == 0


def test_message_stays_short_however_much_is_wrong():
    with pytest.raises(UnsupportedCheckpointError) as error:
        ModelConfig.from_dict({f"field_{i}\x1b[31m\n": "x" * 10_000 for i in range(10_000)}, strict=True)
    message = str(error.value)
    assert "and 9980 more" in message
    assert len(message) < 4000
    assert message.isprintable()


def test_values_are_shown_as_short_printable_ascii():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown("\ud800\n\x1b") == '"\\ud800\\n\\u001b"'
    assert shown(10**5000) == "a int too large to show"
    assert shown(deep) == "[" * 57 + "..."
    assert shown({"a": [1, None, 2.5, True]}) == '{"a": [1, null, 2.5, true]}'
    assert len(shown("x" * 1000)) == 60
    assert shown(Path("x")) == '"x"'
    assert shown_name("h.0.attn.c_attn.weight") == "h.0.attn.c_attn.weight"
    assert shown_name("a b") == '"a b"'
    assert shown_name("") == '""'
    assert len(shown_name("x" * 1000)) == 60
    assert listed(["a", "b", "c"], 2) == "a; b; and 1 more"
    assert listed(["a", "b"], 2) == "a; b"


def test_duplicate_among_many_keys_is_found_at_once():
    text = "{" + ",".join(f'"{i}":0' for i in range(200_000)) + ',"199999":1}'
    with pytest.raises(
        CheckpointError, match='key "199999" stands twice'
    ):  # quadratic search would take minutes
        parse_json_object(text, "config.json")


def test_file_that_is_missing_a_folder_too_large_or_unreadable_is_named(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=f"{path} does not exist"):
        read_json_object(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match=f"{path} is not a file"):
        read_json_object(path)
    large = tmp_path / "large.json"
    large.write_text('{"a": "%s"}' % ("x" * 100))
    with pytest.raises(CheckpointError, match=f"{large} is larger than 50 bytes"):
        read_json_object(large, max_nbytes=50)
    assert read_json_object(large) == {"a": "x" * 100}

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(CheckpointError, match=f"{large} cannot be read: Permission denied"):
        read_json_object(large)
