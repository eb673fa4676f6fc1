"""Make the golden files of tests/test_tokenizer_sentencepiece.py, in an environment with `sentencepiece`.

    python tests/make_spiece_golden.py BOOK.txt

Two small models are trained on the book's first 40,000 characters; the texts' ids are those that the library
gives.
"""

import json
import random
import sys
from pathlib import Path

import sentencepiece

GOLDEN = Path(__file__).parent / "golden"
MAP = "FB01\t66 69\n3000\t20\nFF21\t41\n2460\t31\n"  # ligature, wide space, wide A, circled 1
TEXTS = [
    *("Once upon a time there was a princess.", "  two  spaces and\ttab\nline  ", "", " ", "x"),
    *("\ufb01ne \uff21\u2460", "K\u00e4se gr\u00f6\u00dfer \u00fcber na\u00efve caf\u00e9"),
    *("\u65e5\u672c\u8a9e \U0001f389", "<name> said", "a<name>b", "unbelievablyextraordinary"),
    'The King\'s goblins; 1234 -- "what?"',
]


def main() -> None:
    """Train, encode, write."""
    text = Path(sys.argv[1]).read_text(encoding="utf-8", errors="ignore")[:40_000]
    lines = [line for line in text.split("\n") if line.strip()] + [TEXTS[5], TEXTS[6]] * 5
    rules = GOLDEN / "rules.tsv"
    rules.write_text(MAP)
    settings = {
        "uni": {"vocab_size": 300, "normalization_rule_tsv": str(rules), "user_defined_symbols": ["<name>"]},
        "bpe": {
            **{"vocab_size": 500, "model_type": "bpe", "byte_fallback": True},
            **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        },
    }
    words = text.split()
    texts = TEXTS + [" ".join(random.Random(i).sample(words, 12)) for i in range(6)]
    golden = {}
    for kind, options in settings.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(GOLDEN / f"spiece-{kind}"),
            num_threads=1,
            **options,
        )
        (GOLDEN / f"spiece-{kind}.vocab").unlink()
        model = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / f"spiece-{kind}.model"))
        golden[kind] = [[text, model.encode(text), model.decode(model.encode(text))] for text in texts]
    rules.unlink()
    (GOLDEN / "spiece.json").write_text(json.dumps(golden, indent=0))


if __name__ == "__main__":
    main()
