#!/usr/bin/env python3
"""Compiles and assembles every kernel for every card, without one, and holds it to what was promised.

    gates.py CUDA_HOME OUT      OUT takes cubins and listings

1. nvcc and ptxas, each warning an error: a spill, a stack that is used, a shape a card does not have.
2. Registers, static shared memory and stack of each kernel, against ceilings.txt. UPDATE_CEILINGS=1 rewrites it.
3. The instructions that a family was written for are in its code, and none that touches a stack.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
CEILINGS = HERE / "ceilings.txt"
TARGETS = {"sm_80": "80", "sm_90a": "90a", "sm_100a": "100a"}
HEADER = """# Most registers a thread, bytes of static shared memory a block, and bytes of stack a thread that a kernel may take.
# Written by `UPDATE_CEILINGS=1 make cuda`; a change is part of the review.
"""

TENSOR = {
    "product by tensor cores": r"HMMA\.16816\.F32\.BF16",
    "asynchronous copies of 16 bytes": r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128",
    "fragments out of shared memory": r"LDSM\.16\.M88\.",
}
WIDE = {"loads of 16 bytes": r"LDG\.E\.128"}
# What kernels promise, by the beginning of their name.
PROMISES = {
    "fg_gemm_bf16": TENSOR,
    "fg_gemm_coded": TENSOR,
    "fg_moe_": TENSOR,
    "fg_add": WIDE,
    "fg_silu_mul": WIDE,
    "fg_round_bf16": WIDE,
    "fg_rms_norm": WIDE,
    "fg_combine": WIDE,
    "fg_gather_rows": WIDE,
    "fg_attention_bf16": TENSOR | {"transposed fragments": r"LDSM\.16\.MT88\.4"},
}


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_family(home, source, target, out):
    """Returns {kernel: (registers, shared, stack)} and the listing of the code."""
    number = TARGETS[target]
    cubin = out / f"{source.stem}.{target}.cubin"
    report = run([
        home / "bin/nvcc", "-std=c++17", "-O3", "-fmad=false", "-cubin", "-Werror", "all-warnings",
        "-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror",
        "-gencode", f"arch=compute_{number},code=sm_{number}", "-o", cubin, source,
    ])
    listing = run([home / "bin/nvdisasm", "-c", cubin])
    (out / f"{source.stem}.{target}.sass").write_text(listing)
    return usage(report), listing


def usage(report):
    kernels, kernel, stack = {}, None, 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            kernel, stack = found[1], 0
        elif found := re.search(r"(\d+) bytes stack frame", line):
            stack = int(found[1])
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[kernel] = (int(found[1]), int(shared[1]) if shared else 0, stack)
    return kernels


def code_of(listing):
    """{kernel: its instructions}"""
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", listing, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def promises(kernel):
    return {what: how for name, all in PROMISES.items() if kernel.startswith(name) for what, how in all.items()}


def broken(kernel, target, code):
    wrong = [f"{kernel} on {target}: no {what}" for what, how in promises(kernel).items() if not re.search(how, code)]
    if re.search(r"\b(LDL|STL)\b", code):
        wrong.append(f"{kernel} on {target}: uses its stack")
    return wrong


def read_ceilings():
    rows = (line.split() for line in CEILINGS.read_text().splitlines() if line and not line.startswith("#"))
    return {(kernel, target): tuple(map(int, numbers)) for kernel, target, *numbers in rows}


def write_ceilings(measured):
    lines = [f"{kernel} {target} {' '.join(map(str, numbers))}" for (kernel, target), numbers in sorted(measured.items())]
    CEILINGS.write_text(HEADER + "\n".join(lines) + "\n")


def above(measured):
    allowed, wrong = read_ceilings(), []
    for key, numbers in measured.items():
        ceiling = allowed.pop(key, None)
        if ceiling is None:
            wrong.append(f"{key[0]} on {key[1]}: not in ceilings.txt")
        for what, got, most in zip(("registers", "bytes of shared memory", "bytes of stack"), numbers, ceiling or ()):
            if got > most:
                wrong.append(f"{key[0]} on {key[1]}: {got} {what}, ceiling {most}")
    return wrong + [f"{kernel} on {target}: in ceilings.txt, but no such kernel" for kernel, target in allowed]


def main():
    home, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    began, measured, wrong = time.monotonic(), {}, []
    jobs = [(source, target) for source in sorted((HERE / "cu").glob("*.cu")) for target in TARGETS]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda job: compile_family(home, *job, out), jobs))
    for (source, target), (kernels, listing) in zip(jobs, done):
        code = code_of(listing)
        for kernel, numbers in kernels.items():
            measured[kernel, target] = numbers
            wrong += broken(kernel, target, code.get(kernel, ""))
    if os.environ.get("UPDATE_CEILINGS") == "1":
        write_ceilings(measured)
    wrong += above(measured)
    print("\n".join(wrong))
    kernels = len({kernel for kernel, _ in measured})
    print(f"gates: {kernels} kernels for {', '.join(TARGETS)} in {time.monotonic() - began:.0f} s, {len(wrong)} wrong")
    return 1 if wrong or not measured else 0


if __name__ == "__main__":
    sys.exit(main())
