"""Embeddings by a float32 forward pass in numpy, written from the BERT paper, Transformers' and sentence-transformers'
code, not from this repository's: real_embeddings.py DIR OUT.json, where DIR is the checkpoint of a BERT whose embedding
is the mean, of length 1. Writes a list of texts with their token ids and vectors. Needs numpy.
"""

import json
import math
import struct
import sys
import unicodedata

import numpy as np

TEXTS = [
    "A swarm of peers keeps the weights.",
    "Weights are kept by a swarm of peers.",
    "The soup needs salt, and perhaps a little more time on the stove; don't let it boil!",
    "Über naïve cafés, 42 €: antidisestablishmentarianism...",
    "x",
    "",
    "Call me Ishmael. " * 80,
]


class Tokenizer:
    """BERT's uncased tokenizer: words and punctuation, then the longest pieces that the vocabulary has."""

    def __init__(self, path):
        self.vocab = json.load(open(path))["model"]["vocab"]

    @staticmethod
    def words(text):
        text = unicodedata.normalize("NFD", text.lower())
        text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        for part in text.split():
            word = ""
            for c in part:
                ascii_mark = 33 <= ord(c) <= 47 or 58 <= ord(c) <= 64 or 91 <= ord(c) <= 96 or 123 <= ord(c) <= 126
                if ascii_mark or unicodedata.category(c).startswith("P"):
                    yield from (word, c) if word else (c,)
                    word = ""
                else:
                    word += c
            if word:
                yield word

    def pieces(self, word):
        ids, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.vocab:
                    break
            else:
                return [self.vocab["[UNK]"]]
            ids.append(self.vocab[piece])
            start = end
        return ids

    def encode(self, text, most):
        ids = [id for word in self.words(text) for id in self.pieces(word)][: most - 2]
        return [self.vocab["[CLS]"], *ids, self.vocab["[SEP]"]]


class Bert:
    def __init__(self, dir):
        self.config = json.load(open(f"{dir}/config.json"))
        data = open(f"{dir}/model.safetensors", "rb").read()
        (length,) = struct.unpack("<Q", data[:8])
        self.tensors = {}
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if entry.get("dtype") == "F32":
                start, end = (8 + length + at for at in entry["data_offsets"])
                self.tensors[name] = np.frombuffer(data[start:end], dtype="<f4").reshape(entry["shape"])

    def linear(self, x, name):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.config["layer_norm_eps"]))
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def attention(self, x, layer):
        heads = self.config["num_attention_heads"]
        q, k, v = (
            self.linear(x, f"{layer}.attention.self.{part}").reshape(len(x), heads, -1)
            for part in ("query", "key", "value")
        )
        scores = np.einsum("ihd,jhd->hij", q, k) / np.float32(math.sqrt(q.shape[-1]))
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        return np.einsum("hij,jhd->ihd", scores, v).reshape(len(x), -1)

    def states(self, ids):
        table = "embeddings.{}_embeddings.weight".format
        x = self.tensors[table("word")][ids] + self.tensors[table("position")][: len(ids)]
        x = self.norm(x + self.tensors[table("token_type")][0], "embeddings.LayerNorm")
        for number in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{number}"
            y = self.linear(self.attention(x, layer), f"{layer}.attention.output.dense")
            x = self.norm(x + y, f"{layer}.attention.output.LayerNorm")
            y = gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(x + self.linear(y, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return x


def gelu(x):
    return (0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).astype(np.float32)


def main():
    dir, out = sys.argv[1:]
    tokenizer, bert = Tokenizer(f"{dir}/tokenizer.json"), Bert(dir)
    most = json.load(open(f"{dir}/sentence_bert_config.json"))["max_seq_length"]
    rows = []
    for text in TEXTS:
        ids = tokenizer.encode(text, most)
        vector = bert.states(ids).mean(0)
        vector /= np.linalg.norm(vector)
        rows.append({"text": text, "ids": ids, "vector": vector.tolist()})
    first, second = (np.array(row["vector"]) for row in rows[:2])
    print(f"cosine of the first two texts: {first @ second:.5f}")
    with open(out, "w") as file:
        json.dump(rows, file)


main()
