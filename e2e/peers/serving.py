"""The same open-loop load through HTTP on each server."""

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

RATES = "1,2,4"
REQUESTS = 30
LOAD = ["--prompt-tokens", "128", "--vocab", "32000", "--output-tokens", "32", "--warmup", "2"]
OBJECTIVE = ["--slo-ttft-ms", "1000", "--slo-tpot-ms", "100"]
# Longest wait for a server to be ready.
START = 300


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def servers(run, port):
    """(name, command, environment)."""
    foregate = [run.foregate, "up", "--model", run.model, "--workers", "1", "--port", port]
    # What `vllm serve` starts; the command itself looks for a package of another name than the wheel's.
    vllm = [run.vllm("python"), "-m", "vllm.entrypoints.openai.api_server", "--model", run.model]
    vllm += ["--port", port, "--host", "127.0.0.1", "--dtype", "bfloat16"]
    vllm += ["--max-model-len", "4096", "--max-num-seqs", "64", "--no-enable-prefix-caching"]
    return [("Foregate", foregate, {}), ("vLLM", vllm, run.vllm_settings())]


def ask(url):
    """One token of the first model that the server lists."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": [5, 6, 7], "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60):
        pass


def ready(url, process):
    """Seconds until the server gives a token; None if it ends or takes too long."""
    since = time.monotonic()
    while time.monotonic() - since < START and process.poll() is None:
        try:
            ask(url)
            return time.monotonic() - since
        except (OSError, LookupError):
            time.sleep(0.2)
    return None


def stop(process):
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def load(run, name, url):
    # The one plot per server shows latency against the offered rate.
    figures = Path(tempfile.mkdtemp()) / "figures.json"
    svg = run.out / f"serve-{name.lower()}.svg"
    command = [run.foregate, "bench", "serve", "--url", url, "--rate", RATES, "--requests", str(REQUESTS)]
    done = subprocess.run(
        [*command, *LOAD, *OBJECTIVE, "--json", figures, "--svg", svg], capture_output=True, text=True
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    return json.loads(figures.read_text())["runs"]


def measure(run, environment):
    """Server → seconds until ready and figures per rate; None where it failed."""
    result = {"requests_per_rate": REQUESTS, "load": LOAD, "objective": OBJECTIVE, "servers": {}}
    for at in range(2):
        port = free_port()
        name, command, more = servers(run, port)[at]
        url = f"http://127.0.0.1:{port}"
        with tempfile.TemporaryFile("w+") as log:
            command = ["taskset", "-c", run.cores, *map(str, command)]
            process = subprocess.Popen(command, env=environment(more), stdout=log, stderr=log)
            try:
                seconds = ready(url, process)
                runs = load(run, name, url) if seconds is not None else None
            finally:
                stop(process)
            if runs is None:
                log.seek(0)
                print(log.read()[-3000:], file=sys.stderr)
        print(f"peers: {name} through HTTP: {'failed' if runs is None else 'done'}", flush=True)
        result["servers"][name] = {"ready_seconds": seconds, "runs": runs}
    return result
