"""BERT's vocab.txt, as Chinese GPT-2s have it: the ids of transformers."""

import json

import pytest
from transformers import BertTokenizer

from gpt2core.errors import CheckpointError
from gpt2core.model import GPT2
from gpt2core.testing import random_checkpoint
from gpt2core.tokenizer.tokenizer import Tokenizer

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "The", "sat", "un", "##aff", "##able",
    "中", "国", "人", "##人", "!", ",", ".", "e", "##t", "##e", "é", "a", "##b", "[", "]", "CLS", "cl",
]  # fmt: skip
TEXTS = [
    "the cats sat, unaffable!",
    "中国人 the中 cat国",
    "The THE été étè",
    "",
    " a\tab\n\nzzz",
    "[CLS] the [SEP]x",
    "\u3000a\0b",
]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"unk_token": "a", "sep_token": {"content": "."}},
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_ids_are_those_of_transformers(tmp_path, config, newline):
    (tmp_path / "vocab.txt").write_bytes(newline.join([*WORDS, ""]).encode())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    plain = {name: value["content"] if isinstance(value, dict) else value for name, value in config.items()}
    reference = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, **plain)
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text, allow_special=True) == reference.encode(text), text
    assert tokenizer.special_ids == set(reference.all_special_ids)
    assert tokenizer.special_tokens == {
        k: v for k, v in reference.special_tokens_map.items() if isinstance(v, str)
    }
    assert tokenizer.decode(tokenizer.encode("the cats"), skip_special=True) == "the cats"


def test_special_tokens_in_a_text_stay_text_and_a_model_generates_and_is_saved(tmp_path):
    folder = random_checkpoint(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    with GPT2.from_pretrained(folder, backend="numpy") as model:
        assert 2 not in model.tokenizer.encode("[CLS]", begin=False)
        assert model.generate("the cat", max_new_tokens=3).prompt_tokens == 4  # [CLS] the cat [SEP]
        model.save_pretrained(tmp_path / "saved")
    again, first = Tokenizer.from_folder(tmp_path / "saved"), Tokenizer.from_folder(folder)
    for text in TEXTS:
        assert again.encode(text, allow_special=True) == first.encode(text, allow_special=True)


def test_a_vocabulary_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n\xff\n")
    with pytest.raises(CheckpointError, match=r"vocab.txt is not UTF-8"):
        Tokenizer.from_folder(tmp_path)
