"""Measures Foregate and its peers in turns on one machine: table, JSON and plot.

    compare.py FOREGATE OUT_DIR ROUNDS THREADS

Paths and versions come in the environment, from ./versions. A round is one turn of each engine; a ratio is the median
over the rounds of (Foregate / peer), both of the same round, so that a machine that slows down hits both.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import machine
import picture
import serving
import table

HERE = Path(__file__).parent
CONTEXT, DECODE, PREFILL = 64, 64, 512
BATCHES, PROMPTS = (1, 8, 32), (1, 32)
# Seconds after which llama.cpp begins no further prompt: it reads one after the other, so the speed is the same.
MOST_SECONDS = 10
# Seconds of a turn of mistral.rs in which it is given further prompts: it reads some tokens a second, one prompt after the other.
MOST_READING = 300
# Seconds after which a turn is ended and counts as failed: no engine may keep the others waiting for ever.
MOST_TURN = 600
# Engines that are so slow that one turn of theirs takes longer than a round of all the others: only in the first round.
ONCE = {"mistral.rs"}
# Passes within a turn: the middle one of ours counts, the better one of a peer.
OUR_TURNS, TURNS = 3, 2


def environment(more):
    """Ours, without what slows a current OpenBLAS down, and with nothing that looks for a network."""
    clean = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    return clean | {"HF_HUB_OFFLINE": "1"} | more


class Run:
    """One comparison: its arguments and the cores that everybody is held to."""

    def __init__(self, arguments):
        self.foregate, self.out = arguments[0], Path(arguments[1])
        self.rounds, self.threads = int(arguments[2]), int(arguments[3])
        self.model = os.environ["MODEL"]
        cores = sorted(os.sched_getaffinity(0))[: self.threads]
        if len(cores) < self.threads:
            sys.exit(f"THREADS={self.threads}: this machine gives {len(cores)} cores; lower it")
        self.cores = ",".join(map(str, cores))

    def call(self, command, more=None):
        """Runs to the end, or to its deadline; gives stdout, or None with the reason on stderr."""
        command = ["taskset", "-c", self.cores, *map(str, command)]
        try:
            done = subprocess.run(command, env=environment(more or {}), capture_output=True, text=True, timeout=MOST_TURN)
        except subprocess.TimeoutExpired:
            print(f"not done after {MOST_TURN} s", file=sys.stderr)
            return None
        if done.returncode:
            print("\n".join(done.stderr.splitlines()[-15:]), file=sys.stderr)
            return None
        return done.stdout

    # What each engine is called with.

    def foregate_run(self, quantization):
        command = [self.foregate, "bench", "engine", "--model", self.model, "--threads", self.threads]
        command += ["--batch", ",".join(map(str, BATCHES)), "--context", CONTEXT, "--decode", DECODE]
        command += ["--prompts", ",".join(map(str, PROMPTS)), "--prefill", PREFILL, "--turns", OUR_TURNS]
        command += ["--no-telemetry", "--json"]
        if quantization:
            command += ["--quantization", quantization]
        return self.call(command)

    def vllm_run(self, _, turns=TURNS):
        sizes = [CONTEXT, DECODE, PREFILL, turns, ",".join(map(str, BATCHES)), ",".join(map(str, PROMPTS))]
        return self.call([self.vllm("python"), HERE / "vllm/measure.py", self.model, *sizes], self.vllm_settings())

    def vllm_compiles(self):
        """vLLM compiles at its first start and keeps that, so that every counted start is a later one."""
        mark = Path(os.environ["VLLM"]) / "run/compiled"
        if not mark.exists() and self.vllm_run(None, turns=0) is not None:
            mark.touch()

    def llama_run(self, form):
        root = Path(os.environ["LLAMA"])
        sizes = [self.threads, CONTEXT, DECODE, PREFILL, TURNS, MOST_SECONDS]
        sizes += [",".join(map(str, BATCHES)), ",".join(map(str, PROMPTS))]
        binary = root / "target/release/foregate-peer-llama"
        # Threads of OpenMP that stay on their cores and wait actively, as llama.cpp's own pool does.
        settings = {"OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "active"}
        return self.call([binary, root / f"{form}.gguf", *sizes], settings)

    def mistral_run(self, _):
        root = Path(os.environ["MISTRAL"])
        sizes = [CONTEXT, DECODE, PREFILL, 1, MOST_READING, ",".join(map(str, BATCHES)), ",".join(map(str, PROMPTS))]
        command = [root / "venv/bin/python", HERE / "mistral/measure.py", root / "model", *sizes]
        return self.call(command, {"RAYON_NUM_THREADS": str(self.threads)})

    def vllm(self, program):
        return Path(os.environ["VLLM"]) / "venv/bin" / program

    def vllm_settings(self):
        """What vLLM's documentation for CPUs recommends: bound threads, TCMalloc, Intel's OpenMP."""
        root = Path(os.environ["VLLM"])
        preload = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"), root / "venv/lib/libiomp5.so"]
        return {
            "VLLM_CPU_OMP_THREADS_BIND": self.cores,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(root / "run"),
            "TORCHINDUCTOR_CACHE_DIR": str(root / "run/inductor"),
            "LD_PRELOAD": ":".join(str(path) for path in preload if path.exists()),
        }


def engines(run):
    """(name, format, what the engine calls that format, how it is run), in order of turns."""
    return [
        ("Foregate", "bf16", None, run.foregate_run),
        ("vLLM", "bf16", None, run.vllm_run),
        ("llama.cpp", "bf16", "bf16", run.llama_run),
        ("mistral.rs", "bf16", None, run.mistral_run),
        ("Foregate", "int8", "int8", run.foregate_run),
        ("llama.cpp", "int8", "q8_0", run.llama_run),
        ("Foregate", "int4", "int4", run.foregate_run),
        ("llama.cpp", "int4", "q4_0", run.llama_run),
    ]


def measures(figures):
    """One number per row of the table."""
    rows = {f"decode, batch {one['batch']}": one["tokens_per_second"] for one in figures["decode"]}
    for one in figures["prefill"]:
        rows[f"prefill, {one['prompts']} × {one['tokens']} tokens"] = one["tokens_per_second"]
    rows["load, s"] = figures["load_seconds"]
    rows["peak memory, GB"] = figures["peak_rss_bytes"] / 1e9
    return rows


def turn(run, engine):
    name, form, theirs, command = engine
    since = time.monotonic()
    output = command(theirs)
    took = time.monotonic() - since
    print(f"peers: {name}, {form}: {'failed' if output is None else f'{took:.0f} s'}", flush=True)
    if output is None:
        return None
    figures = json.loads(output)
    return {"figures": figures, "rows": measures(figures), "seconds": took}


def main():
    run = Run(sys.argv[1:])
    run.out.mkdir(parents=True, exist_ok=True)
    record = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": f"make bench-peers ROUNDS={run.rounds} THREADS={run.threads}",
        "machine": machine.describe(),
        "versions": machine.versions(run),
        "threads": run.threads,
        "rounds": [],
    }
    run.vllm_compiles()
    for number in range(run.rounds):
        print(f"peers: round {number + 1} of {run.rounds}", flush=True)
        turns = [one for one in engines(run) if number == 0 or one[0] not in ONCE]
        record["rounds"].append({f"{one[0]} {one[1]}": turn(run, one) for one in turns})
    record["serving"] = serving.measure(run, environment)
    record["medians"] = medians(record["rounds"])
    record["ratios"] = ratios(record["rounds"])
    record["bandwidth_gb_s"] = machine.bandwidths(record["rounds"])
    (run.out / "peers.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    picture.write(run.out / "peers.svg", record)
    table.write(run.out / "README.md", record)


def medians(rounds):
    """Engine → row → median."""
    result = {}
    for engine in rounds[0]:
        turns = [one[engine]["rows"] for one in rounds if one.get(engine)]
        if turns:
            rows = [row for row in turns[0] if all(row in one for one in turns)]
            result[engine] = {row: median(one[row] for one in turns) for row in rows}
    return result


def ratios(rounds):
    """Peer → row → median of Foregate over the peer of the same round and format."""
    result = {}
    for peer in rounds[0]:
        name, form = peer.rsplit(" ", 1)
        ours = f"Foregate {form}"
        pairs = [(one[ours]["rows"], one[peer]["rows"]) for one in rounds if one[ours] and one.get(peer)]
        if name != "Foregate" and pairs:
            rows = [row for row in pairs[0][0] if all(row in theirs for _, theirs in pairs)]
            result[peer] = {row: median(a[row] / b[row] for a, b in pairs) for row in rows}
    return result


main()
