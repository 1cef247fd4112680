"""How fast run_eval.py scores short requests, beside the released design: one request in a forward pass.

    python tests/benchmarks/evaluation.py                            # about two minutes on 2 cores
    python tests/benchmarks/evaluation.py --batch_size 32 --rounds 10

Held equal: Q–K=V with 6 layers, width 384, 6 heads and the vocabulary of 50,304, in fp32; the requests, which
are token ids already: four continuations of 2 to 12 tokens for each context of 8 to 56; the process and its
threads, torch's default number. The released design computes the logits of all positions of a single request.
run_eval.py sorts the requests by length, pads batches, and computes the logits of the continuations alone.
The two take turns, and the run ends with an error if they disagree on a score.

    ratio    the released design's time over run_eval.py's in a round: median (lowest to highest)
"""

import argparse
import os
import platform
import random
import sys
import time
from pathlib import Path
from statistics import median

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402

from common import load_tokenizer  # noqa: E402
from run_eval import CheckpointLM  # noqa: E402
from transformer_KV_1_300_M import GPT_QKV_KEqualsV, ModelConfig  # noqa: E402

SHAPE = {"n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 1024, "vocab_size": 50304}


def short_requests(count):
    """(None, context, continuation) as the harness hands them over, four of each context."""
    draw = random.Random(0)
    requests = []
    for _ in range(count // 4):
        context = [draw.randrange(50257) for _ in range(draw.randint(8, 56))]
        continuations = [[draw.randrange(50257) for _ in range(draw.randint(2, 12))] for _ in range(4)]
        requests += [(None, context, continuation) for continuation in continuations]
    return requests


@torch.no_grad()
def released(model, requests):
    """Log-probabilities of the continuations as the release computes them."""
    scores = []
    for _, context, continuation in requests:
        tokens = torch.tensor([context + continuation])
        log_p = model(tokens)[0].log_softmax(dim=-1)  # [1, T, vocab_size]
        predicted = log_p[0, len(context) - 1 : -1].gather(1, tokens[0, len(context) :, None])
        scores.append(float(predicted.sum()))
    return scores


def timed(score, requests):
    """Seconds, and the scores."""
    started = time.perf_counter()
    scores = score(requests)
    return time.perf_counter() - started, scores


def processor():
    """What the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()


def main(arguments=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = GPT_QKV_KEqualsV(ModelConfig(**SHAPE)).eval()
    lm = CheckpointLM(model, load_tokenizer("bytes"), options.batch_size)
    requests = short_requests(options.requests)
    pairs = []
    for turn in range(options.rounds + 1):
        theirs, expected = timed(lambda given: released(model, given), requests)
        ours, answers = timed(lm._loglikelihood_tokens, requests)
        torch.testing.assert_close([value for value, _ in answers], expected, atol=1e-3, rtol=1e-5)
        if turn:  # the first is for warming up
            pairs.append((theirs, ours))

    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{processor()}, {threads}, load {os.getloadavg()[0]:.1f}\n")
    rows = []
    for name, times in zip(("released design", "run_eval.py"), zip(*pairs, strict=True), strict=True):
        rows.append([name, f"{len(requests) / min(times):.1f}", f"{len(requests) / median(times):.1f}"])
    ratios = [theirs / ours for theirs, ours in pairs]
    rows.append(["ratio", "", f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"])
    headers = [f"{len(requests)} requests, batches of {options.batch_size}", "best, requests/s", "median"]
    print(tabulate(rows, headers, tablefmt="plain", disable_numparse=True))


if __name__ == "__main__":
    main()
