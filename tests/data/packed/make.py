#!/usr/bin/env python3
"""Writes the directories beside this file: random matrices as each method packs them, and the
weights that they mean.

The weights follow from the levels before they are packed, by the formulas of AutoGPTQ 0.7,
AutoAWQ 0.2, compressed-tensors 0.20, MLX and the OCP formats. Every product and every sum is
rounded to F32. Needs nothing but Python.
"""
import json
import os
import random
import struct

HERE = os.path.dirname(os.path.abspath(__file__))
R = random.Random(20)


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def f16(x):
    return struct.unpack("<e", struct.pack("<e", x))[0]


def bf16(x):
    return struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", x))[0] & 0xFFFF0000))[0]


def plain(dtype, values):
    if dtype == "F32":
        return b"".join(struct.pack("<f", v) for v in values)
    if dtype == "F16":
        return b"".join(struct.pack("<e", v) for v in values)
    return b"".join(struct.pack("<f", v)[2:] for v in values)


def words(values):
    return b"".join(struct.pack("<I", v) for v in values)


def safetensors(path, tensors):
    header, data = {}, b""
    for name, (dtype, shape, raw) in sorted(tensors.items()):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def write(name, config, tensors, weights):
    where = os.path.join(HERE, name)
    os.makedirs(where, exist_ok=True)
    with open(os.path.join(where, "config.json"), "w") as file:
        json.dump(config, file, indent=1)
        file.write("\n")
    safetensors(os.path.join(where, "model.safetensors"), tensors)
    wanted = {
        key: ("F32", shape, plain("F32", [v for row in rows for v in row]))
        for key, (shape, rows) in weights.items()
    }
    safetensors(os.path.join(where, "weights.safetensors"), wanted)


def levels(rows, cols, bits):
    return [[R.randrange(1 << bits) for _ in range(cols)] for _ in range(rows)]


def scales(rows, cols, rounded, sign=False):
    draw = lambda: rounded(R.uniform(0.001, 0.1) * (R.choice([1, -1]) if sign else 1))
    return [[draw() for _ in range(cols)] for _ in range(rows)]


def flat(matrix):
    return [v for row in matrix for v in row]


def low_first(values, bits):
    """Values of a line as words, the first one lowest; padded with zeros."""
    each = 32 // bits
    values = values + [0] * (-len(values) % each)
    return [sum(v << (bits * i) for i, v in enumerate(values[at:at + each])) for at in range(0, len(values), each)]


def transpose(matrix):
    return [list(row) for row in zip(*matrix)]


def gptq(name, outs, ins, bits, group, version, order, middle=False, dtype="F16"):
    groups = -(-ins // group)
    q = levels(outs, ins, bits)
    lowest = 0 if version == "gptq_v2" else 1
    zero = [[(1 << bits) // 2 if middle else R.randrange(lowest, 1 << bits) for _ in range(groups)] for _ in range(outs)]
    s = scales(outs, groups, f16 if dtype == "F16" else f32)
    index = [i // group for i in range(ins)]
    if order:
        R.shuffle(index)
    w = [[f32(s[o][index[i]] * (q[o][i] - zero[o][index[i]])) for i in range(ins)] for o in range(outs)]
    stored = [[z - lowest for z in row] for row in zero]
    packed = transpose([low_first(row, bits) for row in q])
    zeros = [low_first(row, bits) for row in transpose(stored)]
    tensors = {
        "a.qweight": ("I32", [len(packed), outs], words(flat(packed))),
        "a.qzeros": ("I32", [groups, len(zeros[0])], words(flat(zeros))),
        "a.scales": (dtype, [groups, outs], plain(dtype, flat(transpose(s)))),
        "a.g_idx": ("I32", [ins], words(index)),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order}
    if version:
        config["checkpoint_format"] = version
    write(name, {"quantization_config": config}, tensors, {"a.weight": ([outs, ins], w)})


def awq(name, outs, ins, group):
    groups, q = ins // group, levels(outs, ins, 4)
    zero, s = levels(outs, groups, 4), scales(outs, groups, f16)
    w = [[f32(s[o][i // group] * (q[o][i] - zero[o][i // group])) for i in range(ins)] for o in range(outs)]
    nibbles = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(row):
        return [sum(row[at + nibbles[i]] << (4 * i) for i in range(8)) for at in range(0, outs, 8)]

    tensors = {
        "a.qweight": ("I32", [ins, outs // 8], words(flat([pack(row) for row in transpose(q)]))),
        "a.qzeros": ("I32", [groups, outs // 8], words(flat([pack(row) for row in transpose(zero)]))),
        "a.scales": ("F16", [groups, outs], plain("F16", flat(transpose(s)))),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    write(name, {"quantization_config": config}, tensors, {"a.weight": ([outs, ins], w)})


def compressed(name, outs, ins, bits, group, symmetric, order=False):
    groups, half = ins // group, 1 << (bits - 1)
    q, s = levels(outs, ins, bits), scales(outs, groups, bf16)
    zero = [[half if symmetric else R.randrange(1 << bits) for _ in range(groups)] for _ in range(outs)]
    index = [i // group for i in range(ins)]
    if order:
        R.shuffle(index)
    w = [[f32(s[o][index[i]] * (q[o][i] - zero[o][index[i]])) for i in range(ins)] for o in range(outs)]
    packed = [low_first(row, bits) for row in q]
    tensors = {
        "a.weight_packed": ("I32", [outs, len(packed[0])], words(flat(packed))),
        "a.weight_scale": ("BF16", [outs, groups], plain("BF16", flat(s))),
        "a.weight_shape": ("I64", [2], struct.pack("<qq", outs, ins)),
    }
    if not symmetric:
        zeros = transpose([low_first(column, bits) for column in transpose(zero)])
        tensors["a.weight_zero_point"] = ("I32", [len(zeros), groups], words(flat(zeros)))
    if order:
        tensors["a.weight_g_idx"] = ("I32", [ins], words(index))
    group = {"weights": {"num_bits": bits, "type": "int", "symmetric": symmetric}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    write(name, {"quantization_config": config}, tensors, {"a.weight": ([outs, ins], w)})


def e4m3(byte):
    exponent, fraction = byte >> 3 & 15, byte & 7
    value = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -value if byte & 0x80 else value


def e4m3_bytes(rows, cols):
    return [[R.choice([b for b in range(256) if b & 0x7F != 0x7F]) for _ in range(cols)] for _ in range(rows)]


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e2m1(nibble):
    return -FP4[nibble & 7] if nibble & 8 else FP4[nibble]


def fp8(name, outs, ins, shape, block, method, dtype, suffix):
    q = e4m3_bytes(outs, ins)
    down, across = -(-outs // block[0]), -(-ins // block[1])
    s = scales(down, across, bf16 if dtype == "BF16" else f32)
    w = [[f32(e4m3(q[o][i]) * s[o // block[0]][i // block[1]]) for i in range(ins)] for o in range(outs)]
    tensors = {
        "a.weight": ("F8_E4M3", [outs, ins], bytes(flat(q))),
        "a." + suffix: (dtype, shape or [down, across], plain(dtype, flat(s))),
        "a.input_scale": ("F32", [1], plain("F32", [0.5])),
    }
    write(name, {"quantization_config": method}, tensors, {"a.weight": ([outs, ins], w)})


def nvfp4(name, outs, ins):
    q, s = levels(outs, ins, 4), [[R.randrange(1, 127) for _ in range(ins // 16)] for _ in range(outs)]
    whole = f32(R.uniform(100, 3000))
    w = [[f32(e2m1(q[o][i]) * f32(e4m3(s[o][i // 16]) / whole)) for i in range(ins)] for o in range(outs)]
    tensors = {
        "a.weight_packed": ("U8", [outs, ins // 2], bytes(a | b << 4 for row in q for a, b in zip(row[::2], row[1::2]))),
        "a.weight_scale": ("F8_E4M3", [outs, ins // 16], bytes(flat(s))),
        "a.weight_global_scale": ("F32", [1], plain("F32", [whole])),
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}},
    }
    write(name, {"quantization_config": config}, tensors, {"a.weight": ([outs, ins], w)})


def bit_string(row, bits):
    whole = sum(v << (bits * i) for i, v in enumerate(row))
    return whole.to_bytes(len(row) * bits // 8, "little")


def mlx_affine(name, widths, dtype, stack=None):
    rounded = {"F16": f16, "BF16": bf16, "F32": f32}[dtype]
    tensors, weights = {}, {}
    config = {"bits": 4, "group_size": 64}
    for bits, rows, cols, group in widths:
        module = f"b{bits}g{group}"
        q, s, b = levels(rows, cols, bits), scales(rows, cols // group, rounded, True), scales(rows, cols // group, rounded, True)
        w = [[f32(f32(s[o][i // group] * q[o][i]) + b[o][i // group]) for i in range(cols)] for o in range(rows)]
        outer = [stack, rows // stack] if stack else [rows]
        tensors[module + ".weight"] = ("U32", outer + [cols * bits // 32], b"".join(bit_string(row, bits) for row in q))
        tensors[module + ".scales"] = (dtype, outer + [cols // group], plain(dtype, flat(s)))
        tensors[module + ".biases"] = (dtype, outer + [cols // group], plain(dtype, flat(b)))
        weights[module + ".weight"] = (outer + [cols], w)
        if (bits, group) != (4, 64):
            config[module] = {"bits": bits, "group_size": group}
    write(name, {"quantization": config}, tensors, weights)


def mlx_float(name, mode, rows, cols, bits, group):
    q = levels(rows, cols, 4) if bits == 4 else e4m3_bytes(rows, cols)
    number = e2m1 if bits == 4 else e4m3
    s = [[R.randrange(1, 120) if mode == "nvfp4" else R.randrange(100, 140) for _ in range(cols // group)] for _ in range(rows)]
    scale = e4m3 if mode == "nvfp4" else (lambda byte: 2.0 ** (byte - 127))
    w = [[f32(number(q[o][i]) * scale(s[o][i // group])) for i in range(cols)] for o in range(rows)]
    tensors = {
        "a.weight": ("U32", [rows, cols * bits // 32], b"".join(bit_string(row, bits) for row in q)),
        "a.scales": ("U8", [rows, cols // group], bytes(flat(s))),
    }
    config = {"bits": bits, "group_size": group, "mode": mode}
    write(name, {"quantization": config}, tensors, {"a.weight": ([rows, cols], w)})


def mxfp4(name, experts, rows, groups):
    cols = 32 * groups
    q, s = levels(experts * rows, cols, 4), [[R.randrange(0, 160) for _ in range(groups)] for _ in range(experts * rows)]
    w = [[f32(e2m1(q[o][i]) * 2.0 ** (s[o][i // 32] - 127)) for i in range(cols)] for o in range(experts * rows)]
    tensors = {
        "a.down_proj_blocks": ("U8", [experts, rows, groups, 16], bytes(a | b << 4 for row in q for a, b in zip(row[::2], row[1::2]))),
        "a.down_proj_scales": ("U8", [experts, rows, groups], bytes(flat(s))),
    }
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    write(name, config, tensors, {"a.down_proj_blocks": ([experts, rows, cols], w)})


gptq("gptq-v1", 24, 64, 4, 32, None, False)
gptq("gptq-v1-ragged", 8, 80, 4, 32, "gptq", False)
gptq("gptq-v1-order", 16, 64, 4, 16, "gptq", True)
gptq("gptq-v2", 40, 64, 4, 32, "gptq_v2", False)
gptq("gptq-2bit", 16, 64, 2, 32, "gptq_v2", False)
gptq("gptq-8bit", 12, 64, 8, 32, "gptq", False, True)
gptq("gptq-8bit-asym", 12, 64, 8, 32, "gptq_v2", False)
gptq("gptq-f32-scales", 8, 64, 4, 32, "gptq", False, dtype="F32")
awq("awq", 24, 96, 32)
awq("awq-g48", 8, 96, 48)
compressed("ct-4bit", 20, 96, 4, 32, True)
compressed("ct-4bit-asym", 20, 72, 4, 24, False)
compressed("ct-4bit-tail", 6, 20, 4, 20, False)
compressed("ct-8bit", 6, 64, 8, 64, True)
compressed("ct-4bit-order", 6, 64, 4, 16, True, True)
channel = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}
fp8("fp8-channel", 10, 33, None, (1, 33), channel, "BF16", "weight_scale")
fp8("fp8-tensor", 10, 33, [1], (10, 33), channel, "F32", "weight_scale")
block = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 24]}
fp8("fp8-block", 37, 50, None, (16, 24), block, "F32", "weight_scale_inv")
nvfp4("nvfp4", 6, 48)
mlx_affine("mlx", [(4, 10, 128, 64), (2, 5, 64, 32), (3, 5, 64, 32), (5, 5, 64, 64), (6, 5, 64, 32), (8, 5, 64, 32)], "BF16")
mlx_affine("mlx-f16-stacked", [(4, 12, 64, 64), (3, 12, 128, 128)], "F16", 3)
mlx_affine("mlx-f32", [(4, 3, 64, 64)], "F32")
mlx_float("mlx-mxfp4", "mxfp4", 6, 96, 4, 32)
mlx_float("mlx-mxfp8", "mxfp8", 6, 96, 8, 32)
mlx_float("mlx-nvfp4", "nvfp4", 6, 48, 4, 16)
mxfp4("mxfp4", 2, 6, 3)
