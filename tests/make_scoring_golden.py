"""Numbers of two other packages for the demo model, which tests/test_words.py compares with this one's.

python -m venv peers
peers/bin/pip install torch transformers pandas wordsprobability==0.17 minicons==0.3.39
peers/bin/python tests/make_scoring_golden.py gpt2core/demo > tests/scoring_golden.json
"""

import json
import sys

import torch
import wordsprobability.main as words
from minicons.scorer import IncrementalLMScorer
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from wordsprobability.models import bow_lm

TEXTS = [
    "Once upon a time there was a little girl who lived near the forest.",
    'The king said, "Where is my crown?" and nobody answered him.',
    "Unbelievable stories: the fox's whiskers trembled!",
]
END = "<|endoftext|>"


def load(folder: str) -> tuple:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json", bos_token=END, eos_token=END, pad_token=END
    )
    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval(), tokenizer


class DemoModel(bow_lm.GPT2BaseModel):
    def _initialise_model(self) -> tuple:
        return load(sys.argv[1])


def by_word() -> list:
    """For each text its words with corrected and raw surprisal, in nats."""
    words.get_model = lambda name: DemoModel()
    words.get_bow_symbol = lambda name: DemoModel.bow_symbol
    frame = words._get_surprisal_per_word(TEXTS, "demo", True).reset_index()
    return [
        [
            [row.word, round(float(row.surprisal), 6), round(float(row.surprisal_buggy), 6)]
            for row in frame[frame.text_id == i].itertuples()
        ]
        for i in range(len(TEXTS))
    ]


def by_token(bos: bool) -> list:
    """For each text its tokens with surprisal in bits and rank."""
    model, tokenizer = load(sys.argv[1])
    scorer = IncrementalLMScorer(model, "cpu", tokenizer=tokenizer)
    found = scorer.token_score(TEXTS, bos_token=bos, surprisal=True, base_two=True, rank=True)
    return [[[token, round(float(bits), 6), int(rank)] for token, bits, rank in text] for text in found]


golden = {
    "texts": TEXTS,
    "wordsprobability": by_word(),
    "minicons": {"bos": by_token(True), "none": by_token(False)},
}
print(json.dumps(golden, ensure_ascii=False))
