"""Trains the two SentencePiece models of this directory and writes what sentencepiece makes of some texts.

    python make.py TEXT        # with the package sentencepiece; TEXT is any file of English prose
"""

import json
import sys

import sentencepiece as spm

TEXTS = [
    "Once upon a time there was a whale.",
    " leading and  double   spaces \n\nand lines\ttabs ",
    "naïve café, Ünïcode: 漢字かな交じり文, Ω≈ç√ and 🐳🐋",
    "",
    "x",
    "<|end|> is one symbol, <s> is not text",
    "1234567890 don't stop-believing; e.g. (a+b)*c == d",
]
expected = {}
for name, prefix in [("prefixed", True), ("plain", False)]:
    spm.SentencePieceTrainer.train(
        input=sys.argv[1], model_prefix=name, vocab_size=640, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=prefix,
        remove_extra_whitespaces=False, user_defined_symbols=["<|end|>"], character_coverage=0.999,
        num_threads=1,
    )
    model = spm.SentencePieceProcessor(model_file=f"{name}.model")
    expected[name] = [[text, model.encode(text)] for text in TEXTS]
with open("expected.json", "w") as out:
    json.dump(expected, out, ensure_ascii=False)
