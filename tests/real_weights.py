"""A float32 forward pass of the dequantized weights of a GGUF file, in numpy, written from the models' papers and
Transformers' code, not from this repository's: real_weights.py FILE.gguf IDS OUT.safetensors, where IDS is a list of
token ids (JSON). Writes `input_ids`, `logits` and `greedy`, the greedy continuation of the first 8 ids.

Knows Gemma 3 and Qwen 2. Needs numpy and gguf (PyPI).
"""

import json
import struct
import sys

import gguf
import numpy as np

GREEDY_PROMPT, GREEDY = 8, 12


class Model:
    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items() if "tokenizer" not in name}
        self.arch = self.fields["general.architecture"]
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.cache = {}

    def get(self, key, default=None):
        return self.fields.get(f"{self.arch}.{key}", default)

    def weight(self, name):
        if name not in self.cache:
            tensor = self.tensors[name]
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            self.cache[name] = weights.reshape([int(n) for n in reversed(tensor.shape)])
        return self.cache[name]

    def linear(self, x, name):
        y = x @ self.weight(f"{name}.weight").T
        return y + self.weight(f"{name}.bias") if f"{name}.bias" in self.tensors else y

    def norm(self, x, name):
        eps = np.float32(self.get("attention.layer_norm_rms_epsilon"))
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.weight(f"{name}.weight")

    def rope(self, x, theta):
        """Rotates [positions, heads, width]: the first half of a head with its second half."""
        half = x.shape[-1] // 2
        freq = 1.0 / theta ** (np.arange(half, dtype=np.float64) / half)
        angle = np.outer(np.arange(x.shape[0]), freq)
        cos, sin = (f(angle).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, x, block, theta, window, scale, normed):
        heads, kv = self.get("attention.head_count"), self.get("attention.head_count_kv")
        q, k, v = (
            self.linear(x, f"{block}.attn_{part}").reshape(len(x), n, -1)
            for part, n in (("q", heads), ("k", kv), ("v", kv))
        )
        if normed:
            q, k = self.norm(q, f"{block}.attn_q_norm"), self.norm(k, f"{block}.attn_k_norm")
        q, k = self.rope(q, theta), self.rope(k, theta)
        k, v = (np.repeat(part, heads // kv, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) * np.float32(scale or q.shape[-1] ** -0.5)
        distance = np.arange(len(x))[:, None] - np.arange(len(x))[None]
        hidden = (distance < 0) | (distance >= (window or len(x)))
        scores = np.where(hidden, np.float32(-np.inf), scores)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        out = np.einsum("hij,jhd->ihd", scores, v).reshape(len(x), -1)
        return self.linear(out, f"{block}.attn_output")

    def feed_forward(self, x, block, activation):
        gate = activation(self.linear(x, f"{block}.ffn_gate"))
        return self.linear(gate * self.linear(x, f"{block}.ffn_up"), f"{block}.ffn_down")

    def logits(self, ids):
        x = self.weight("token_embd.weight")[ids]
        theta = self.get("rope.freq_base")
        gemma = self.arch == "gemma3"
        if gemma:
            x = x * np.float32(x.shape[-1] ** 0.5)
        for layer in range(self.get("block_count")):
            block = f"blk.{layer}"
            y = self.norm(x, f"{block}.attn_norm")
            if gemma:
                local = (layer + 1) % 6 != 0
                window = self.get("attention.sliding_window") if local else None
                y = self.attention(y, block, 10_000.0 if local else theta, window, None, True)
                x = x + self.norm(y, f"{block}.post_attention_norm")
                y = self.feed_forward(self.norm(x, f"{block}.ffn_norm"), block, gelu)
                x = x + self.norm(y, f"{block}.post_ffw_norm")
            else:
                x = x + self.attention(y, block, theta, None, None, False)
                x = x + self.feed_forward(self.norm(x, f"{block}.ffn_norm"), block, silu)
        head = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        return self.norm(x, "output_norm") @ self.weight(head).T


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x**3)))


def main():
    path, ids, out = sys.argv[1:]
    model, ids = Model(path), json.loads(ids)
    assert model.arch in ("gemma3", "qwen2"), model.arch
    logits = model.logits(ids)
    sequence = ids[:GREEDY_PROMPT]
    for _ in range(GREEDY):
        sequence.append(int(model.logits(sequence)[-1].argmax()))
    tensors = {
        "input_ids": np.array(ids, dtype="<i8"),
        "logits": logits.astype("<f4"),
        "greedy": np.array(sequence[GREEDY_PROMPT:], dtype="<i8"),
    }
    header, at = {}, 0
    for name, tensor in tensors.items():
        kind = "I64" if tensor.dtype == np.int64 else "F32"
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    header = json.dumps(header).encode()
    with open(out, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


main()
