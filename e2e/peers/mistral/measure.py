"""Speeds of mistral.rs on one checkpoint, as JSON on stdout, by the rules of `foregate bench engine`: distinct random
prompts, greedy answers that ignore the end of sequence, the best of some turns counts.

    python measure.py MODEL_DIR CONTEXT DECODE PREFILL TURNS MOST_SECONDS BATCH,… PROMPTS,…

It takes text, not token ids: prompts are as many random tokens of the checkpoint's own vocabulary as decode to text, and
what counts is how many it says it read. It reads prompts one after the other. A load whose prompts alone would take longer
than what is left of MOST_SECONDS, by what one prompt took, is left out of the result.
"""

import json
import os
import random
import resource
import sys
import time
from pathlib import Path

# Its log goes to stdout, which is the result's.
RESULT = os.dup(1)
os.dup2(2, 1)

import psutil  # noqa: E402
from mistralrs import Architecture, ChatCompletionRequest, Runner, Which  # noqa: E402

WARM_UP = 4


class Peer:
    def __init__(self, model, sequences):
        self.runner = Runner(
            which=Which.Plain(model_id=model, arch=Architecture.Qwen3Moe),
            max_seqs=sequences,
            prefix_cache_n=0,
            no_paged_attn=True,
            chat_template=str(Path(__file__).parent / "plain.json"),
        )
        vocabulary = json.loads((Path(model) / "tokenizer.json").read_text())["model"]["vocab"]
        # Three printable characters: such a token is never joined with its neighbour.
        self.words = [word for word in vocabulary if len(word) == 3 and word.isascii() and word.isprintable()]
        self.requests = 0

    def prompt(self, tokens):
        self.requests += 1
        draw = random.Random(self.requests)
        return "".join(draw.choice(self.words) for _ in range(tokens))

    def run(self, sequences, prompt, answer):
        """Tokens read of all prompts, and after each round over the streams: seconds, tokens of each so far."""
        since = time.perf_counter()
        streams = [self.stream(self.prompt(prompt), answer) for _ in range(sequences)]
        counts, steps, read = [0] * sequences, [], 0
        live = set(range(sequences))
        while live:
            for number in sorted(live):
                chunk = next(streams[number], None)
                if chunk is None:
                    live.remove(number)
                    continue
                counts[number] += 1
                read += chunk.usage.prompt_tokens if chunk.usage else 0
            steps.append((time.perf_counter() - since, sorted(counts)))
        return read, steps

    def stream(self, text, answer):
        request = ChatCompletionRequest(
            messages=[{"role": "user", "content": text}],
            model="default",
            max_tokens=answer,
            ignore_eos=True,
            temperature=0.0,
            stream=True,
        )
        return iter(self.runner.send_chat_completion_request(request))

    def prefill(self, prompts, tokens, turns):
        speeds = []
        for _ in range(turns):
            read, steps = self.run(prompts, tokens, 1)
            speeds.append(read / steps[0][0])
        return {"prompts": prompts, "tokens": tokens, "tokens_per_second": max(speeds)}

    def decode(self, batch, context, tokens, turns):
        best = 0.0
        for _ in range(turns):
            _, steps = self.run(batch, context, tokens + WARM_UP)
            # From the first round after which no prompt is left, to the first sequence's end.
            full = [step for step in steps if step[1][0] > WARM_UP and step[1][-1] <= tokens + WARM_UP]
            (begin, before), (end, after) = full[0], full[-1]
            best = max(best, (sum(after) - sum(before)) / (end - begin))
        return {"batch": batch, "context": context, "tokens_per_second": best}


def main():
    model, context, decode, prefill, turns, most = sys.argv[1], *map(int, sys.argv[2:7])
    batches, prompts = ([int(part) for part in text.split(",")] for text in sys.argv[7:9])
    peer = Peer(model, max(batches + prompts))
    read, steps = peer.run(1, context, 1)
    # Ready is when a token has been computed, as for the others; from the start of the process.
    load = time.time() - psutil.Process().create_time()
    speed = read / steps[0][0]

    def fits(sequences, tokens):
        return sequences * tokens / speed <= most - (time.time() - psutil.Process().create_time())

    figures = {
        "load_seconds": load,
        "prefill": [peer.prefill(number, prefill, turns) for number in prompts if fits(number, prefill)],
        "decode": [peer.decode(number, context, decode, turns) for number in batches if fits(number, context)],
    }
    figures["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    os.write(RESULT, json.dumps(figures, indent=1).encode())


main()
