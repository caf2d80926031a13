#!/usr/bin/env python3
"""Checks Foregate's kit on a machine with a card: Python 3.10 or newer with torch, no Rust, no CUDA toolkit.

  gpu_check.py KIT OUT             everything, on the card
  gpu_check.py KIT OUT --no-card   what needs none: the tables, the comparisons on wrong outputs, the operations on the processor

KIT is what `make gpu-check` packs. A line per case, a table last, OUT/report.json; exit code 0 only if every case passed. Inputs are new
each time; --seed repeats them. Nothing of the machine is changed.
"""

import argparse
import concurrent.futures
import ctypes
import json
import lzma
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request

try:
    import torch
except ImportError:
    torch = None

# ---------------------------------------------------------------- numbers

"""Arrays are (shape, list of float or int) where torch is missing, so that the script's own logic can be tested anywhere; the
references below are written over rows of such lists. They are slow and plain on purpose: what they say is the definition."""


def rounded_bf16(x):
    """The nearest bfloat16, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    if (bits & 0x7F800000) == 0x7F800000:
        return x
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def rounded_f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


class Random:
    """xorshift64*; the same numbers everywhere."""

    def __init__(self, seed):
        self.state = (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (2**64 - 1) or 1

    def bits(self):
        x = self.state
        x ^= x >> 12
        x ^= (x << 25) & (2**64 - 1)
        x ^= x >> 27
        self.state = x
        return (x * 0x2545F4914F6CDD1D) & (2**64 - 1)

    def below(self, n):
        return self.bits() % n

    def uniform(self):
        return (self.bits() >> 40) / 2**23 - 1.0

    def floats(self, count, scale=1.0):
        return [rounded_f32(self.uniform() * scale) for _ in range(count)]

    def sample(self, n, k):
        pool = list(range(n))
        for i in range(k):
            j = i + self.below(n - i)
            pool[i], pool[j] = pool[j], pool[i]
        return sorted(pool[:k])


def rows_of(values, width):
    return [values[at : at + width] for at in range(0, len(values), width)]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b))


def matrix_times(x_rows, w_rows, bias=None):
    """float64 through torch where it is, else plain sums: both are far below the tolerance."""
    if torch is not None and len(x_rows) * len(w_rows) * len(w_rows[0]) > 10_000:
        out = torch.tensor(x_rows, dtype=torch.float64) @ torch.tensor(w_rows, dtype=torch.float64).T
        out = out.tolist()
    else:
        out = [[dot(x, w) for w in w_rows] for x in x_rows]
    if bias is not None:
        out = [[v + b for v, b in zip(row, bias)] for row in out]
    return out


def flat(rows):
    return [v for row in rows for v in row]


def silu(x):
    return x / (1.0 + math.exp(-x)) if x > -700 else 0.0


# ---------------------------------------------------------------- safetensors

SIZES = {"F32": ("f", 4), "U32": ("I", 4), "BF16": ("H", 2), "F16": ("e", 2), "U8": ("B", 1)}


def write_tensors(path, tensors, parameters):
    """tensors: name -> (dtype, shape, values). Parameters are texts in the metadata."""
    header, blobs, at = {"__metadata__": {k: str(v) for k, v in parameters.items()}}, [], 0
    for name, (dtype, shape, values) in tensors.items():
        if dtype == "BF16":
            words = [struct.unpack("<I", struct.pack("<f", v))[0] >> 16 for v in values]
            blob = struct.pack(f"<{len(words)}H", *words)
        else:
            blob = struct.pack(f"<{len(values)}{SIZES[dtype][0]}", *values)
        assert len(values) == math.prod(shape), name
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def read_tensors(path):
    with open(path, "rb") as source:
        data = source.read()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        code, size = SIZES[entry["dtype"]]
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = list(struct.unpack(f"<{(last - first) // size}{code}", data[first:last]))
    return tensors


# ---------------------------------------------------------------- comparison


def compare(got, want, tolerance):
    """None if `got` is right, else what is wrong. `want`: name -> values; integers must be equal, floats near by the norm of
    the difference over the norm of the reference, and each by itself near the largest of the reference."""
    for name, reference in want.items():
        if name not in got:
            return f"no output {name}"
        values = got[name]
        if len(values) != len(reference):
            return f"{name}: {len(values)} values, not {len(reference)}"
        if reference and isinstance(reference[0], int):
            for at, (a, b) in enumerate(zip(values, reference)):
                if a != b:
                    return f"{name}[{at}] is {a}, not {b}"
            continue
        for at, value in enumerate(values):
            if math.isnan(value):
                return f"{name}[{at}] was not written, or is not a number"
        off = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(values, reference)))
        norm = math.sqrt(math.fsum(b * b for b in reference)) or 1.0
        if not off / norm <= tolerance:
            return f"{name}: relative error {off / norm:.2e}, allowed {tolerance:.0e}"
        largest = max((abs(b) for b in reference), default=0.0) or 1.0
        for at, (a, b) in enumerate(zip(values, reference)):
            if not abs(a - b) <= 30 * tolerance * largest:
                return f"{name}[{at}] is {a}, not {b}"
    return None


def wrong_outputs_are_noticed():
    """The comparison's own test: each of these must fail, and the right one must not."""
    random = Random(7)
    want = {"out": random.floats(64), "ids": [random.below(9) for _ in range(16)]}
    right = {name: list(values) for name, values in want.items()}

    def changed(name, change):
        got = {key: list(values) for key, values in right.items()}
        change(got[name])
        return got

    def put(at, value):
        return lambda values: values.__setitem__(at, value)

    wrong = {
        "one value off": changed("out", lambda v: put(3, v[3] + 0.05)(v)),
        "one value not written": changed("out", put(63, math.nan)),
        "infinite": changed("out", put(0, math.inf)),
        "two values exchanged": changed("out", lambda v: v.__setitem__(slice(0, 2), [v[1], v[0]])),
        "all a little too large": changed("out", lambda v: v.__setitem__(slice(None), [x * 1.002 for x in v])),
        "zeros": changed("out", lambda v: v.__setitem__(slice(None), [0.0] * len(v))),
        "one integer off": changed("ids", lambda v: put(5, v[5] + 1)(v)),
        "too few": changed("out", lambda v: v.pop()),
        "none": {"ids": right["ids"]},
    }
    if compare(right, want, 1e-3) is not None:
        return "the right output does not pass"
    passed = [what for what, got in wrong.items() if compare(got, want, 1e-3) is None]
    return f"wrong outputs pass: {', '.join(passed)}" if passed else None


# ---------------------------------------------------------------- the operations, by their definitions


class Case:
    """An operation with its inputs and what must come out."""

    def __init__(self, op, label, tensors, parameters, want, tolerance):
        self.op, self.label, self.tensors = op, label, tensors
        self.parameters, self.want, self.tolerance = parameters, want, tolerance


def f32(shape, values):
    return ("F32", shape, values)


def u32(shape, values):
    return ("U32", shape, values)


def rounded_f16(x):
    return struct.unpack("<e", struct.pack("<e", x))[0]


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e2m1(code):
    return -E2M1[code & 7] if code & 8 else E2M1[code]


def e4m3(code):
    exponent, mantissa = code >> 3 & 15, code & 7
    size = mantissa / 512 if exponent == 0 else (8 + mantissa) / 8 * 2.0 ** (exponent - 7)
    return -size if code & 0x80 else size


# Formats of codes with scales, as `foregate op` calls them.
CODED = ("int8", "int4 32", "fp8 128 128", "fp8 3 16", "mxfp4")


def rounds_inputs(dtype):
    return dtype not in ("F32", "F16")


def coded_matrix(random, form, n, k):
    """Canonical bytes (kernels/src/dtype.rs) of random codes, and the numbers that they stand for."""
    kind, *sizes = form.split()
    sizes = [int(size) for size in sizes]
    block_n, block_k = {"int8": (1, k), "int4": (1, *sizes), "fp8": tuple(sizes), "mxfp4": (1, 32)}[kind]
    groups = -(-k // block_k)
    blocks = -(-n // block_n) * groups
    four = kind in ("int4", "mxfp4")
    codes = [[random.below(16 if four else 256) for _ in range(k)] for _ in range(n)]
    if kind == "fp8":
        codes = [[0x42 if code & 0x7F == 0x7F else code for code in row] for row in codes]
    # So that weights are about as large as those of other formats.
    largest = {"int8": 128, "int4": 8, "fp8": 448, "mxfp4": 6}[kind] * math.sqrt(k)
    zeros = [random.below(17) for _ in range(blocks)] if kind == "int4" else []
    if kind == "mxfp4":
        tail = [127 - round(math.log2(largest)) + random.below(2) for _ in range(blocks)]
        scales = [2.0 ** (byte - 127) for byte in tail]
    else:
        scales = [rounded_f32((0.5 + abs(random.uniform())) / largest) for _ in range(blocks)]
        tail = struct.pack(f"<{blocks}f", *scales)
    rows = []
    for output, row in enumerate(codes):
        at = [output // block_n * groups + input // block_k for input in range(k)]
        if kind == "int8":
            numbers = [code - 256 if code > 127 else code for code in row]
        elif kind == "int4":
            numbers = [code - zeros[block] for code, block in zip(row, at)]
        else:
            numbers = [e4m3(code) if kind == "fp8" else e2m1(code) for code in row]
        rows.append([number * scales[block] for number, block in zip(numbers, at)])
    if four:
        codes = [[low | high << 4 for low, high in zip(row[::2], row[1::2] + [0] * (k % 2))] for row in codes]
    return flat(codes) + list(tail) + zeros, flat(rows)


def weights(random, name, dtype, count, n, k):
    """`count` matrices: the tensor, the parameters that tell its format, and the numbers of each."""
    if dtype in CODED:
        made = [coded_matrix(random, dtype, n, k) for _ in range(count)]
        tensor = ("U8", (count, len(made[0][0])), flat(one for one, _ in made))
        return tensor, {f"{name}.format": dtype, f"{name}.n": n, f"{name}.k": k}, [numbers for _, numbers in made]
    near = {"BF16": rounded_bf16, "F16": rounded_f16, "F32": lambda v: v}[dtype]
    made = [[near(v) for v in random.floats(n * k, 1 / math.sqrt(k))] for _ in range(count)]
    return (dtype, (count, n, k), flat(made)), {}, made


def case_matmul(random, rows, n, k, dtype, bias):
    x = random.floats(rows * k)
    if rounds_inputs(dtype):
        x = [rounded_bf16(v) for v in x]
    tensors = {"x": f32((rows, k), x)}
    tensors["w"], parameters, (w,) = weights(random, "w", dtype, 1, n, k)
    b = random.floats(n) if bias else None
    if bias:
        tensors["bias"] = f32((n,), b)
    want = {"out": flat(matrix_times(rows_of(x, k), rows_of(w, k), b))}
    return Case("matmul", f"{dtype} {rows}x{n}x{k}{' bias' if bias else ''}", tensors, parameters, want, 1e-5)


def case_embed(random, ids, vocabulary, width, dtype):
    tensor, parameters, (table,) = weights(random, "table", dtype, 1, vocabulary, width)
    chosen = [random.below(vocabulary) for _ in range(ids)]
    # A code times its scale is one rounding.
    want = {"out": [rounded_f32(v) for i in chosen for v in rows_of(table, width)[i]]}
    tensors = {"table": tensor, "ids": u32((ids,), chosen)}
    return Case("embed", f"{dtype} {ids} of {vocabulary}x{width}", tensors, parameters, want, 0.0)


def normed(row, weight, eps):
    scale = 1.0 / math.sqrt(math.fsum(v * v for v in row) / len(row) + eps)
    return [v * scale * w for v, w in zip(row, weight)]


def case_rms_norm(random, rows, width, add):
    x, weight, eps = random.floats(rows * width), random.floats(width), rounded_f32(1e-6)
    tensors = {"x": f32((rows, width), x), "weight": f32((width,), weight)}
    if add:
        more = random.floats(rows * width)
        tensors["add"] = f32((rows, width), more)
        x = [rounded_f32(a + b) for a, b in zip(x, more)]
    want = {"out": flat(normed(row, weight, eps) for row in rows_of(x, width)), "x": x}
    return Case("rms_norm", f"{rows}x{width}{' add' if add else ''}", tensors, {"eps": eps}, want, 1e-5)


def case_rope(random, rows, heads, head_dim, norm):
    half = head_dim // 2
    x = random.floats(rows * heads * head_dim)
    positions = [random.below(4000) for _ in range(rows)]
    frequencies = [rounded_f32(10000.0 ** (-i / half)) for i in range(half)]
    tensors = {
        "x": f32((rows, heads * head_dim), x),
        "positions": u32((rows,), positions),
        "inv_freq": f32((half,), frequencies),
    }
    parameters = {"heads": heads, "head_dim": head_dim}
    per_head = rows_of(x, head_dim)
    if norm:
        weight = random.floats(head_dim)
        tensors["norm"] = f32((head_dim,), weight)
        parameters["eps"] = rounded_f32(1e-6)
        per_head = [normed(head, weight, parameters["eps"]) for head in per_head]
    out = []
    for number, head in enumerate(per_head):
        position = positions[number // heads]
        turned = list(head)
        for i in range(half):
            # The angle is a product of float32; the same here, or large positions say nothing.
            angle = rounded_f32(rounded_f32(position) * frequencies[i])
            c, s = math.cos(angle), math.sin(angle)
            turned[i] = head[i] * c - head[i + half] * s
            turned[i + half] = head[i + half] * c + head[i] * s
        out += turned
    return Case("rope", f"{rows} rows {heads}x{head_dim}{' norm' if norm else ''}", tensors, parameters, {"x": out}, 1e-5)


def case_attention(random, lengths, queries, heads, kv_heads, head_dim, page_tokens, dtype):
    """Sequences of these lengths; of each the last `queries` positions ask."""
    width, sequences = kv_heads * head_dim, len(lengths)
    round_kv = rounded_bf16 if dtype == "BF16" else (lambda v: v)
    pages = [[] for _ in range(sequences)]
    free = list(range(sum(-(-length // page_tokens) for length in lengths) + 3))
    for sequence, length in enumerate(lengths):
        for _ in range(-(-length // page_tokens)):
            pages[sequence].append(free.pop(random.below(len(free))))
    stride = max(map(len, pages))
    table = flat(row + [0] * (stride - len(row)) for row in pages)
    keys = [random.floats(length * width) for length in lengths]
    values = [random.floats(length * width) for length in lengths]
    asked = [(s, p) for s, length in enumerate(lengths) for p in range(max(0, length - queries), length)]
    q = random.floats(len(asked) * heads * head_dim)
    scale = rounded_f32(1 / math.sqrt(head_dim))
    out = []
    for row, (sequence, position) in enumerate(asked):
        for head in range(heads):
            kv = head // (heads // kv_heads)
            at = (row * heads + head) * head_dim
            query = [round_kv(v) for v in q[at : at + head_dim]]

            def of(store, p):
                first = p * width + kv * head_dim
                return [round_kv(v) for v in store[sequence][first : first + head_dim]]

            scores = [dot(query, of(keys, p)) * scale for p in range(position + 1)]
            top = max(scores)
            weights = [math.exp(v - top) for v in scores]
            total = math.fsum(weights)
            seen = [of(values, p) for p in range(position + 1)]
            out += [math.fsum(w * v[i] for w, v in zip(weights, seen)) / total for i in range(head_dim)]
    tensors = {
        "q": f32((len(asked), heads * head_dim), q),
        "k": f32((sum(lengths), width), flat(keys)),
        "v": f32((sum(lengths), width), flat(values)),
        "lengths": u32((sequences,), list(lengths)),
        "tables": u32((sequences, stride), table),
        "sequence_of_row": u32((len(asked),), [s for s, _ in asked]),
        "positions": u32((len(asked),), [p for _, p in asked]),
    }
    parameters = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "page_tokens": page_tokens,
        "pages": sum(-(-length // page_tokens) for length in lengths) + 3,
        "scale": scale,
        "kv": dtype,
    }
    label = f"{dtype} lengths {list(lengths)} x{queries}, {heads}/{kv_heads} heads of {head_dim}, pages of {page_tokens}"
    return Case("attention", label, tensors, parameters, {"out": out}, 5e-3 if dtype == "BF16" else 1e-5)


def case_gate(random, rows, experts, top_k, normalise):
    logits = random.floats(rows * experts, 3.0)
    ids, weights = [], []
    for row in rows_of(logits, experts):
        top = max(row)
        exps = [math.exp(v - top) for v in row]
        total = math.fsum(exps)
        chosen = sorted(sorted(range(experts), key=lambda e: (-row[e], e))[:top_k])
        picked = [exps[e] / total for e in chosen]
        if normalise:
            picked = [p / math.fsum(picked) for p in picked]
        ids += chosen
        weights += picked
    parameters = {"top_k": top_k, "normalise": int(normalise)}
    want = {"experts": ids, "weights": weights}
    return Case("gate", f"{rows}x{experts} top {top_k}", {"logits": f32((rows, experts), logits)}, parameters, want, 1e-5)


def case_expert_layer(random, rows, experts, top_k, hidden, inner, dtype, crowd):
    """`crowd`: all rows on the first experts."""
    x = random.floats(rows * hidden)
    of_gate, parameters, gate = weights(random, "gate", dtype, experts, inner, hidden)
    of_up, more, up = weights(random, "up", dtype, experts, inner, hidden)
    of_down, last, down = weights(random, "down", dtype, experts, hidden, inner)
    parameters = parameters | more | last
    chosen = [list(range(top_k)) if crowd else random.sample(experts, top_k) for _ in range(rows)]
    shares = [random.floats(top_k) for _ in range(rows)]
    rounded = (lambda row: [rounded_bf16(v) for v in row]) if rounds_inputs(dtype) else (lambda row: row)
    out = []
    for row, picked, scales in zip(rows_of(x, hidden), chosen, shares):
        total = [0.0] * hidden
        for e, scale in zip(picked, scales):
            (g,) = matrix_times([rounded(row)], rows_of(gate[e], hidden))
            (u,) = matrix_times([rounded(row)], rows_of(up[e], hidden))
            (d,) = matrix_times([rounded([silu(a) * b for a, b in zip(g, u)])], rows_of(down[e], inner))
            total = [t + scale * v for t, v in zip(total, d)]
        out += total
    tensors = {
        "x": f32((rows, hidden), x),
        "experts": u32((rows, top_k), flat(chosen)),
        "weights": f32((rows, top_k), flat(shares)),
        "gate": of_gate,
        "up": of_up,
        "down": of_down,
    }
    label = f"{dtype} {rows} rows, {experts} experts top {top_k}, {hidden}x{inner}{', all on the first' if crowd else ''}"
    # A value near the middle of two bfloat16 is rounded either way after the first half.
    return Case("expert_layer", label, tensors, parameters, {"out": out}, 3e-3 if rounds_inputs(dtype) else 1e-5)


def case_add(random, count):
    x, y = random.floats(count), random.floats(count)
    want = {"x": [rounded_f32(a + b) for a, b in zip(x, y)]}
    return Case("add", f"{count}", {"x": f32((count,), x), "y": f32((count,), y)}, {}, want, 0.0)


def case_sigmoid_scale(random, rows, width):
    x, logits = random.floats(rows * width), random.floats(rows, 4.0)
    want = {"x": [v / (1 + math.exp(-l)) for row, l in zip(rows_of(x, width), logits) for v in row]}
    tensors = {"x": f32((rows, width), x), "logits": f32((rows,), logits)}
    return Case("sigmoid_scale", f"{rows}x{width}", tensors, {}, want, 1e-5)


def case_clamp(random, count):
    x = random.floats(count, 3.0)
    want = {"x": [min(max(v, -1.0), 1.0) for v in x]}
    return Case("clamp", f"{count}", {"x": f32((count,), x)}, {"limit": 1.0}, want, 0.0)


def case_gather(random, rows, of, width):
    x, chosen = random.floats(of * width), [random.below(of) for _ in range(rows)]
    want = {"out": flat(rows_of(x, width)[i] for i in chosen)}
    tensors = {"x": f32((of, width), x), "rows": u32((rows,), chosen)}
    return Case("gather", f"{rows} of {of}x{width}", tensors, {}, want, 0.0)


def cases(random):
    """One row, sizes that are no multiple of a tile, everything on one expert, and what models have."""
    for dtype in ("F32", "BF16"):
        yield case_matmul(random, 1, 64, 64, dtype, False)
        yield case_matmul(random, 9, 65, 40, dtype, True)
        yield case_matmul(random, 33, 130, 96, dtype, False)
        yield case_matmul(random, 130, 72, 64, dtype, False)
        yield case_matmul(random, 2, 7, 3, dtype, True)
        yield case_embed(random, 5, 50, 24, dtype)
        yield case_attention(random, (1,), 1, 4, 2, 16, 4, dtype)
        yield case_attention(random, (33, 5, 64), 3, 4, 4, 32, 16, dtype)
        yield case_attention(random, (520, 17), 2, 4, 2, 64, 16, dtype)
        yield case_attention(random, (40,), 40, 8, 1, 128, 8, dtype)
        yield case_expert_layer(random, 1, 8, 2, 32, 48, dtype, False)
        yield case_expert_layer(random, 13, 8, 4, 40, 24, dtype, False)
        yield case_expert_layer(random, 20, 6, 2, 32, 32, dtype, True)
    for dtype in ("F16", *CODED):
        yield case_matmul(random, 1, 64, 64, dtype, False)
        yield case_matmul(random, 9, 65, 40, dtype, True)
        yield case_matmul(random, 70, 130, 288, dtype, False)
        yield case_embed(random, 5, 50, 70, dtype)
        yield case_expert_layer(random, 1, 8, 2, 32, 48, dtype, False)
        yield case_expert_layer(random, 13, 8, 4, 64, 96, dtype, False)
        yield case_expert_layer(random, 20, 6, 2, 32, 40, dtype, True)
    yield case_rms_norm(random, 1, 64, False)
    yield case_rms_norm(random, 7, 33, True)
    yield case_rms_norm(random, 3, 2048, True)
    yield case_rope(random, 1, 2, 8, False)
    yield case_rope(random, 5, 4, 64, True)
    yield case_rope(random, 3, 2, 128, False)
    yield case_gate(random, 1, 8, 1, False)
    yield case_gate(random, 9, 33, 4, True)
    yield case_gate(random, 5, 128, 8, True)
    yield case_add(random, 1)
    yield case_add(random, 1001)
    yield case_sigmoid_scale(random, 3, 65)
    yield case_clamp(random, 300)
    yield case_gather(random, 4, 9, 33)


# ---------------------------------------------------------------- running


class Report:
    def __init__(self, out):
        self.out, self.lines, self.facts = out, [], {}

    def add(self, group, name, wrong, note=""):
        self.lines.append({"group": group, "case": name, "passed": wrong is None, "note": wrong or note})
        print(f"{'pass' if wrong is None else 'FAIL'}  {group:<10} {name}  {wrong or note}", flush=True)
        self.save()

    def save(self):
        with open(os.path.join(self.out, "report.json"), "w") as file:
            json.dump({"facts": self.facts, "cases": self.lines}, file, indent=1)

    def end(self):
        print()
        groups = dict.fromkeys(line["group"] for line in self.lines)
        for group in groups:
            of = [line for line in self.lines if line["group"] == group]
            failed = [line for line in of if not line["passed"]]
            print(f"{group:<10} {len(of) - len(failed):>4} of {len(of)} passed")
            for line in failed:
                print(f"           FAIL {line['case']}: {line['note']}")
        return 0 if self.lines and all(line["passed"] for line in self.lines) else 1


def unpacked(folder, out):
    """The program of the kit, unpacked beside what is measured: the kit may stand where nothing can be written."""
    program = os.path.join(out, "foregate")
    with lzma.open(os.path.join(folder, "foregate.xz")) as packed, open(program, "wb") as file:
        shutil.copyfileobj(packed, file)
    os.chmod(program, 0o755)
    return program


class Kit:
    def __init__(self, folder, out, device):
        self.folder, self.out, self.device = folder, out, device
        self.program = unpacked(folder, out)
        self.env = dict(os.environ)
        if torch is not None:
            wheels = os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "nvidia")
            paths = [os.path.join(wheels, "nccl", "lib"), "/usr/local/nvidia/lib64", self.env.get("LD_LIBRARY_PATH", "")]
            self.env["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)

    def run(self, *arguments, timeout=300, env=()):
        command = [self.program, *arguments]
        return subprocess.run(command, env={**self.env, **dict(env)}, capture_output=True, text=True, timeout=timeout)

    def op(self, case, tensors=None, device=None):
        """Runs an operation. Gives (outputs, None) or (None, why not)."""
        source, target = (os.path.join(self.out, name) for name in ("in.safetensors", "out.safetensors"))
        write_tensors(source, tensors or case.tensors, case.parameters)
        if os.path.exists(target):
            os.remove(target)
        ran = self.run("op", case.op, "--device", device or self.device, "--in", source, "--out", target)
        if ran.returncode != 0:
            return None, f"exit code {ran.returncode}: {ran.stderr.strip()[-300:]}"
        if not os.path.exists(target):
            return None, "exit code 0, and no output"
        return read_tensors(target), None


def bits(tensors):
    return {name: struct.pack(f"<{len(v)}{'f' if v and isinstance(v[0], float) else 'I'}", *v) for name, v in tensors.items()}


def check_operations(kit, report, random):
    for case in cases(random):
        got, wrong = kit.op(case)
        wrong = wrong or compare(got, case.want, case.tolerance)
        if wrong is None:
            again, wrong = kit.op(case)
            if wrong is None and bits(again) != bits(got):
                wrong = "the same inputs give other bits the second time: a race"
        report.add("operations", f"{case.op} {case.label}", wrong)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(kit, device, settings, ask):
    """Serves the demonstration model on a device with settings of its weights, and gives what `ask(url)` says."""
    port = free_port()
    name = "-".join([device, *settings.values()])
    manifest = os.path.join(kit.out, f"{name}.yaml")
    said = "".join(f", {field}: {value}" for field, value in settings.items())
    with open(manifest, "w") as file:
        file.write(
            "apiVersion: foregate.dev/v1alpha1\nkind: MoeCluster\nmetadata: {name: check}\nspec:\n"
            f"  model: {{uri: {os.path.join(kit.folder, 'demo')}, servedNames: [demo]{said}}}\n"
            f"  workers: {{count: 1, device: {device}}}\n"
        )
    log = open(os.path.join(kit.out, f"{name}.log"), "w")
    process = subprocess.Popen(
        [kit.program, "up", "-f", manifest, "--port", str(port)], env=kit.env, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"`foregate up` on {device} ended with {process.returncode}, see {name}.log")
            try:
                urllib.request.urlopen(url + "/ready", timeout=2).read()
                return ask(url)
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"`foregate up` on {device} is not ready after two minutes, see {name}.log")
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def complete(url, prompt, tokens):
    body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True, "logprobs": 5}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        choice = json.load(answer)["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]


def differs(ours, theirs):
    """None if two greedy streams agree: equal, or apart only where the two best tokens were as good as equal."""
    for at, (a, b) in enumerate(zip(ours[0], theirs[0])):
        if a == b:
            continue
        best = sorted(theirs[2][at].values(), reverse=True)
        gap = best[0] - best[1] if len(best) > 1 else math.inf
        return None if gap < 0.05 else f"token {at} is {a}, not {b}, which led by {gap:.3f}"
    near = max((abs(a - b) for a, b in zip(ours[1], theirs[1])), default=math.inf)
    return None if near < 0.1 else f"log-probabilities differ by {near:.3f}"


# Settings of `spec.model` that the demonstration model is served with.
SERVED = ({}, *({"quantization": name} for name in ("int8", "int4", "fp8", "mxfp4")), {"dtype": "float16"})


def check_model(kit, report, random, settings):
    label = " ".join(settings.values()) or "as stored"
    prompts = [[3 + random.below(200) for _ in range(1 + random.below(60))] for _ in range(8)]

    def ask(url):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda prompt: complete(url, prompt, 48), prompts))

    try:
        theirs = serve(kit, "cpu", settings, ask)
        ours = serve(kit, kit.device, settings, ask)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        report.add("model", f"{label}, served on both devices", f"{type(error).__name__}: {error}")
        return
    same = 0
    for number, (a, b) in enumerate(zip(ours, theirs)):
        same += a[0] == b[0]
        report.add("model", f"{label}, prompt {number} of {len(prompts[number])} tokens", differs(a, b))
    report.facts[f"streams equal to the processor's, {label}"] = f"{same} of {len(prompts)}"


def check_nccl(kit, report):
    ran = kit.run("op", "nccl", "--device", kit.device, timeout=180)
    wrong = None if ran.returncode == 0 else f"exit code {ran.returncode}: {ran.stderr.strip()[-300:]}"
    report.add("nccl", "one rank: join, reduce, exchange, end, abort", wrong, ran.stdout.strip())
    # What the fabric of workers does. Several ranks share a card from 2.30 on only, and where the card has room for their blocks.
    found = re.search(r"NCCL (\d+)\.(\d+)", ran.stdout)
    shared = found is not None and tuple(map(int, found.groups())) >= (2, 30)
    for ranks in (1, 2) if shared else (1,):
        env = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "4"} if ranks > 1 else {}
        ran = kit.run("op", "collective", "--device", kit.device, "--ranks", str(ranks), timeout=240, env=env)
        wrong = None if ran.returncode == 0 else f"exit code {ran.returncode}: {ran.stderr.strip()[-300:]}"
        report.add("nccl", f"the fabric's collectives, ranks on this card: {ranks}", wrong, ran.stdout.strip())


# ---------------------------------------------------------------- kernels by themselves: arguments and times

BYTES = {"u32": "I", "f32": "f", "u64": "Q"}


def kernel_table(text):
    """The table of README.md: symbol -> types of its parameters, `*` for an address; and the threads of a block."""
    tables, attention = {}, None
    for line in text.splitlines():
        if line.startswith("**Attention's parameters**"):
            attention = line
        elif attention is not None and attention.count("`*f32 out [") == 0 and line.strip():
            attention += " " + line
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 5 or not cells[0].startswith("`"):
            continue
        names = re.findall(r"`([^`]+)`", cells[0])
        stem = names[0].rsplit("_m", 1)[0]
        names = [name if name.startswith("fg_") else stem + name for name in names]
        for name in names:
            tables[name] = (cells[1], int(cells[3]))
    out, last = {}, None
    for name, (parameters, block) in tables.items():
        if parameters == "the same":
            parameters = last
        elif parameters.startswith("the same with"):
            change = re.findall(r"`([^`]+)`", parameters)[0]
            word = change.split()[-1]
            parameters = re.sub(rf"`\*\w+ {word}\b([^`]*)`", f"`{change}\\1`", last)
        elif parameters.startswith("see below"):
            change = re.findall(r"`([^`]+)`", parameters)[0]
            parameters = re.sub(r"`cache`", f"`{change}`", attention or "")
        last = parameters
        types = re.findall(r"`(\*?)(\w+) \w+\??[^`]*`", parameters)
        out[name] = (["*" if star else kind for star, kind in types], block)
    return out


# What the timed kernels are launched with. `check_arguments` holds it to the table.
TIMED = {
    "fg_rms_norm": ["*", "*", "*", "f32", "*", "*", "u32"],
    "fg_gemm_bf16_m8": ["*", "*", "*", "*", "u32", "u32", "u32"],
    "fg_gemm_bf16_m64": ["*", "*", "*", "*", "u32", "u32", "u32"],
    "fg_gemm_bf16_m128": ["*", "*", "*", "*", "u32", "u32", "u32"],
    "fg_gemm_coded_m8": ["*", "*", "u32", "u32", "u32", "*", "*", "u32", "u32", "u32"],
    "fg_gemm_coded_m64": ["*", "*", "u32", "u32", "u32", "*", "*", "u32", "u32", "u32"],
    "fg_moe_gate_up_bf16_m16": ["*", "*", "*", "*", "*", "*", "*", "*", "*", "u32", "u32"],
    "fg_moe_down_bf16_m16": ["*", "*", "*", "*", "*", "*", "*", "u32", "u32"],
}


def check_arguments(kit, report):
    with open(os.path.join(kit.folder, "KERNELS.md")) as file:
        table = kernel_table(file.read())
    report.add("tables", "kernels in the table", None if len(table) >= 20 else f"only {len(table)} were understood", f"{len(table)}")
    for name, types in TIMED.items():
        found = table.get(name)
        wrong = None
        if found is None:
            wrong = "not in the table"
        elif found[0] != types:
            wrong = f"the table has {found[0]}, this script {types}"
        report.add("tables", f"arguments of {name}", wrong)
    return table


class Driver:
    """The driver's calls that a launch needs, in torch's context."""

    def __init__(self, kit, table):
        torch.zeros(1, device="cuda")
        self.cuda, self.table, self.functions = ctypes.CDLL("libcuda.so.1"), table, {}
        folder = os.path.join(kit.folder, "fatbins")
        self.modules = []
        for name in sorted(os.listdir(folder)):
            module = ctypes.c_void_p()
            with open(os.path.join(folder, name), "rb") as file:
                image = file.read()
            self.check(self.cuda.cuModuleLoadData(ctypes.byref(module), image), f"loading {name}")
            self.modules.append(module)

    def check(self, code, what):
        if code != 0:
            raise RuntimeError(f"{what}: CUDA error {code}")

    def function(self, symbol):
        if symbol not in self.functions:
            function = ctypes.c_void_p()
            for module in self.modules:
                if self.cuda.cuModuleGetFunction(ctypes.byref(function), module, symbol.encode()) == 0:
                    break
            else:
                raise RuntimeError(f"no kernel {symbol}")
            self.functions[symbol] = function
        return self.functions[symbol]

    def launch(self, symbol, grid, values):
        types, block = self.table[symbol]
        cells = []
        for kind, value in zip(types, values, strict=True):
            if kind == "*":
                cells.append(ctypes.c_uint64(0 if value is None else value.data_ptr()))
            else:
                cells.append({"u32": ctypes.c_uint32, "f32": ctypes.c_float, "u64": ctypes.c_uint64}[kind](value))
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        x, y, z = (*grid, 1, 1)[:3]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = self.cuda.cuLaunchKernel(self.function(symbol), x, y, z, block, 1, 1, 0, stream, pointers, None)
        self.check(code, symbol)


def graph_of(sets, work):
    """`work(set)` over all sets, as one graph: launches cost the host nothing, and the sets together do not fit the cache."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for one in sets:
            work(one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in sets:
            work(one)
    return graph


def microseconds(sets, work, repeats=15):
    """Median time of `work` on one set."""
    graph = graph_of(sets, work)
    times = []
    for number in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end) * 1000 / len(sets))
    return sorted(times)[len(times) // 2]


def ceilings(report):
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds([None], lambda _: target.copy_(source), 7)
    bandwidth = 2 * source.numel() * 4 / copy * 1e-6
    del source, target
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = microseconds([None], lambda _: a @ b, 7)
    flops = 2 * 8192**3 / product * 1e-6
    report.facts["copy, TB/s"], report.facts["bf16 product, TFLOP/s"] = round(bandwidth, 3), round(flops, 1)
    print(f"ceilings: {bandwidth:.2f} TB/s, {flops:.0f} TFLOP/s")
    return bandwidth


def near(got, want, tolerance):
    off = (got.double() - want.double()).norm() / want.double().norm()
    return None if off.item() <= tolerance else f"relative error {off.item():.2e}"


def timed(report, name, bandwidth, count_bytes, ours, theirs, wrong):
    """`ours` and `theirs`: two timings each, so that their spread is seen."""
    floor = count_bytes / bandwidth * 1e-6
    best, spread = min(ours), max(ours) - min(ours)
    note = f"{best:.1f} us (spread {spread:.1f}), torch {min(theirs):.1f} us, floor {floor:.1f} us, {100 * floor / best:.0f} % of it"
    report.facts.setdefault("times", {})[name] = {"us": ours, "torch us": theirs, "floor us": floor, "bytes": count_bytes}
    report.add("times", name, wrong, note)


def check_times(kit, report, table, bandwidth):
    driver = Driver(kit, table)
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    for rows, symbol in ((1, "fg_gemm_bf16_m8"), (8, "fg_gemm_bf16_m8"), (64, "fg_gemm_bf16_m64"), (512, "fg_gemm_bf16_m128")):
        n, k = 4096, 2048
        tile, wide = (128, 128) if symbol.endswith("m128") else (64, int(symbol.rsplit("m", 1)[1]))
        sets = [
            (torch.randn(rows, k, **bf16), torch.randn(n, k, **bf16) / math.sqrt(k), torch.full((rows, n), math.nan, device="cuda"))
            for _ in range(16)
        ]
        grid = (-(-n // tile), -(-rows // wide))
        run = lambda s: driver.launch(symbol, grid, [s[0], s[1], None, s[2], rows, n, k])
        ours = [microseconds(sets, run) for _ in range(2)]
        wrong = near(sets[0][2], sets[0][0].double() @ sets[0][1].double().T, 1e-5)
        theirs = [microseconds(sets, lambda s: torch.matmul(s[0], s[1].T)) for _ in range(2)]
        moved = n * k * 2 + rows * k * 2 + rows * n * 4
        timed(report, f"product {rows}x{n}x{k}", bandwidth, moved, ours, theirs, wrong)
    for rows in (1, 64):
        width = 2048
        sets = [
            (torch.randn(rows, width, device="cuda"), torch.randn(width, device="cuda"), torch.full((rows, width), math.nan, device="cuda"))
            for _ in range(64)
        ]
        run = lambda s: driver.launch("fg_rms_norm", (rows,), [s[0], None, s[1], 1e-6, s[2], None, width])
        ours = [microseconds(sets, run) for _ in range(2)]
        x = sets[0][0].double()
        wrong = near(sets[0][2], x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * sets[0][1].double(), 1e-5)
        theirs = [microseconds(sets, lambda s: torch.nn.functional.rms_norm(s[0], (width,), s[1], 1e-6)) for _ in range(2)]
        timed(report, f"norm {rows}x{width}", bandwidth, rows * width * 8, ours, theirs, wrong)
    for kind in ("int8", "int4", "fp8", "mxfp4"):
        check_coded(report, driver, bandwidth, kind)
    for per_expert in (1, 8):
        check_experts(report, driver, bandwidth, per_expert)


def codes_on_card(kind, n, k):
    """Canonical bytes of random codes, what a launch is told of them, and the numbers that they stand for."""
    draw = lambda most, *shape: torch.randint(0, most, shape, device="cuda", dtype=torch.uint8)
    scaled = lambda largest, *shape: (0.5 + torch.rand(*shape, device="cuda")) / (largest * math.sqrt(k))
    as_bytes = lambda values: values.contiguous().flatten().view(torch.uint8)
    across = lambda values, count: values.double().repeat_interleave(count, 1)
    pairs = lambda codes: codes[:, ::2] | (codes[:, 1::2] << 4)
    if kind == "int8":
        codes, scales = draw(256, n, k), scaled(128, n, 1)
        return torch.cat([codes.flatten(), as_bytes(scales)]), (1, 1, k), codes.view(torch.int8).double() * scales.double()
    if kind == "int4":
        codes, scales, zeros = draw(16, n, k), scaled(8, n, k // 64), draw(17, n, k // 64)
        data = torch.cat([as_bytes(pairs(codes)), as_bytes(scales), zeros.flatten()])
        return data, (2, 1, 64), (codes.double() - across(zeros, 64)) * across(scales, 64)
    if kind == "fp8":
        codes, scales = draw(256, n, k), scaled(448, n // 128, k // 128)
        codes[(codes & 0x7F) == 0x7F] = 0x42
        wide = across(scales, 128).repeat_interleave(128, 0)
        return torch.cat([codes.flatten(), as_bytes(scales)]), (3, 128, 128), codes.view(torch.float8_e4m3fn).float().double() * wide
    codes, powers = draw(16, n, k), draw(2, n, k // 32) + (127 - 2 - round(math.log2(k) / 2))
    numbers = torch.tensor([e2m1(code) for code in range(16)], device="cuda", dtype=torch.float64)[codes.long()]
    return torch.cat([as_bytes(pairs(codes)), powers.flatten()]), (4, 1, 32), numbers * torch.exp2(across(powers, 32) - 127)


def check_coded(report, driver, bandwidth, kind):
    """Products with codes, beside torch's with bfloat16 weights of the same shape."""
    n, k = 4096, 2048
    made = [codes_on_card(kind, n, k) for _ in range(16)]
    plain = [numbers.to(torch.bfloat16) for _, _, numbers in made]
    for rows, symbol in ((1, "fg_gemm_coded_m8"), (64, "fg_gemm_coded_m64")):
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        sets = [(data, told, torch.full((rows, n), math.nan, device="cuda")) for data, told, _ in made]
        grid = (-(-n // 64), -(-rows // int(symbol.rsplit("m", 1)[1])))
        run = lambda s: driver.launch(symbol, grid, [x, s[0], *s[1], None, s[2], rows, n, k])
        ours = [microseconds(sets, run) for _ in range(2)]
        wrong = near(sets[0][2], x.double() @ made[0][2].T, 1e-5)
        theirs = [microseconds(plain, lambda w: torch.matmul(x, w.T)) for _ in range(2)]
        moved = made[0][0].numel() + rows * k * 2 + rows * n * 4
        timed(report, f"product {kind} {rows}x{n}x{k}", bandwidth, moved, ours, theirs, wrong)


def check_experts(report, driver, bandwidth, per_expert):
    experts, hidden, inner, tile = 64, 2048, 768, 16
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    slots = experts * per_expert
    gate, up = (torch.randn(experts, inner, hidden, **bf16) / math.sqrt(hidden) for _ in range(2))
    down = torch.randn(experts, hidden, inner, **bf16) / math.sqrt(inner)
    words = lambda values: torch.tensor(values, device="cuda", dtype=torch.int32)
    addresses = lambda w: torch.tensor([w[e].data_ptr() for e in range(experts)], device="cuda", dtype=torch.int64)
    offsets = words([e * per_expert for e in range(experts + 1)])
    tile_group, tile_first, tile_count = words(range(experts)), words([e * per_expert for e in range(experts)]), words([experts])
    x = torch.randn(slots, hidden, **bf16)
    between, out = torch.full((slots, inner), math.nan, **bf16), torch.full((slots, hidden), math.nan, device="cuda")
    tables = [addresses(w) for w in (gate, up, down)]

    def run(_):
        first = [x, None, tables[0], tables[1], offsets, tile_group, tile_first, tile_count, between, inner, hidden]
        driver.launch("fg_moe_gate_up_bf16_m16", (264,), first)
        driver.launch("fg_moe_down_bf16_m16", (264,), [between, tables[2], offsets, tile_group, tile_first, tile_count, out, hidden, inner])

    ours = [microseconds([None], run) for _ in range(2)]
    by_expert = x.view(experts, per_expert, hidden)
    g, u = (torch.bmm(by_expert.double(), w.double().transpose(1, 2)) for w in (gate, up))
    middle = (torch.nn.functional.silu(g) * u).to(torch.bfloat16).double()
    wrong = near(out.view(experts, per_expert, hidden), torch.bmm(middle, down.double().transpose(1, 2)), 3e-3)

    def torch_way(_):
        a = torch.bmm(by_expert, gate.transpose(1, 2))
        b = torch.bmm(by_expert, up.transpose(1, 2))
        torch.bmm(torch.nn.functional.silu(a) * b, down.transpose(1, 2))

    theirs = [microseconds([None], torch_way) for _ in range(2)]
    # The weights of all experts are 604 MB: far more than the cache.
    moved = 3 * experts * inner * hidden * 2
    timed(report, f"experts, {per_expert} rows each", bandwidth, moved, ours, theirs, wrong)


# ---------------------------------------------------------------- all of it


def facts(kit, report):
    said = {"python": sys.version.split()[0], "torch": getattr(torch, "__version__", None), "device": kit.device}
    ran = kit.run("doctor", "--port", "0", *(["--device", "cuda"] if kit.device == "cuda" else []))
    said["doctor"] = ran.stdout.splitlines()
    if torch is not None and torch.cuda.is_available():
        said["card"] = torch.cuda.get_device_name(0)
        smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        said["nvidia-smi"] = smi.stdout.strip()
    report.facts.update(said)
    print(json.dumps(said, indent=1))
    if kit.device == "cuda":
        report.add("doctor", "foregate doctor --device cuda", None if ran.returncode == 0 else ran.stderr.strip()[-300:])
    return ran


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit")
    parser.add_argument("out")
    parser.add_argument("--no-card", action="store_true", help="only what needs no card")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    kit = Kit(args.kit, args.out, "cpu" if args.no_card else "cuda")
    report, random = Report(args.out), Random(args.seed)
    report.facts["seed"] = args.seed
    if not args.no_card and (torch is None or not torch.cuda.is_available()):
        print("gpu_check: no card, or no torch that sees it: give --no-card for what needs neither", file=sys.stderr)
        return 2
    facts(kit, report)
    report.add("self", "wrong outputs are noticed", wrong_outputs_are_noticed())
    table = check_arguments(kit, report)
    check_operations(kit, report, random)
    if args.no_card:
        return report.end()
    bandwidth = ceilings(report)
    for settings in SERVED:
        check_model(kit, report, random, settings)
    check_nccl(kit, report)
    try:
        check_times(kit, report, table, bandwidth)
    except (RuntimeError, KeyError, ValueError) as error:
        report.add("times", "kernels by themselves", f"{type(error).__name__}: {error}")
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
