"""Speeds of vLLM on one checkpoint, as JSON on stdout, by the rules of `foregate bench engine`: distinct random
prompts, greedy answers that ignore the end of sequence, the best of some turns counts.

    python vllm_measure.py MODEL_DIR CONTEXT DECODE PREFILL TURNS BATCH,… PROMPTS,…

With TURNS 0 it only starts: vLLM keeps what it compiles for later starts.
Threads and memory for keys and values are set in vLLM's environment. Decoding is timed between the steps that gave
every sequence a token, so reading the prompts is no part of it.
"""

import json
import os
import random
import resource
import sys
import time

# Its log goes to stdout, which is the result's; and the engine runs here, so that a step can be timed.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
RESULT = os.dup(1)
os.dup2(2, 1)

import psutil  # noqa: E402
import torch  # noqa: E402
import vllm  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

WARM_UP = 4


class Peer:
    def __init__(self, model, length, sequences):
        self.llm = LLM(
            model=model,
            dtype="bfloat16",
            max_model_len=length,
            max_num_seqs=sequences,
            enable_prefix_caching=False,
            seed=0,
        )
        self.engine = self.llm.llm_engine
        self.vocab = self.llm.llm_engine.model_config.get_vocab_size()
        self.requests = 0

    def run(self, sequences, prompt, answer):
        """Seconds since the start and tokens of each sequence so far, after each step."""
        draw = random.Random(self.requests + 1)
        prompts = [[draw.randrange(3, self.vocab) for _ in range(prompt)] for _ in range(sequences)]
        params = SamplingParams(max_tokens=answer, min_tokens=answer, ignore_eos=True, temperature=0, detokenize=False)
        since = time.perf_counter()
        counts = {}
        for tokens in prompts:
            name = str(self.requests)
            self.requests += 1
            self.engine.add_request(name, {"prompt_token_ids": tokens}, params)
            counts[name] = 0
        steps = []
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            steps.append((time.perf_counter() - since, sorted(counts.values())))
        return steps

    def prefill(self, prompts, tokens, turns):
        times = [self.run(prompts, tokens, 1)[-1][0] for _ in range(turns)]
        return {"prompts": prompts, "tokens": tokens, "tokens_per_second": prompts * tokens / min(times)}

    def decode(self, batch, context, tokens, turns):
        best = 0.0
        for _ in range(turns):
            steps = self.run(batch, context, tokens + WARM_UP + 8)
            # From the first step after which no prompt is left, to the first sequence's end.
            full = [step for step in steps if step[1][0] > WARM_UP and step[1][-1] < tokens + WARM_UP + 8]
            (begin, before), (end, after) = full[0], full[-1]
            best = max(best, (sum(after) - sum(before)) / (end - begin))
        return {"batch": batch, "context": context, "tokens_per_second": best}


def main():
    model, context, decode, prefill, turns = sys.argv[1], *map(int, sys.argv[2:6])
    batches, prompts = ([int(part) for part in text.split(",")] for text in sys.argv[6:8])
    length = max(prefill + 1, context + decode + WARM_UP + 16)
    peer = Peer(model, length, max(batches + prompts))
    peer.run(1, 16, 1)
    if turns == 0:
        return
    # Ready is when a token has been computed, as for the others; from the start of the process.
    load = time.time() - psutil.Process().create_time()
    figures = {
        "version": vllm.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_seconds": load,
        "prefill": [peer.prefill(number, prefill, turns) for number in prompts],
        "decode": [peer.decode(number, context, decode, turns) for number in batches],
    }
    figures["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    os.write(RESULT, json.dumps(figures, indent=1).encode())


main()
