"""How fast run_eval.py scores short requests, beside the released design: one request in a forward pass.

    python tests/benchmarks/evaluation.py                            # about two minutes on 2 cores
    python tests/benchmarks/evaluation.py --batch_size 32 --rounds 10 --output FILE.json

Held equal: Q–K=V with 6 layers, width 384, 6 heads and the vocabulary of 50,304, in fp32; the requests, which
are token ids already: four continuations of 2 to 12 tokens for each context of 8 to 56; the process and its
threads, torch's default number. The released design computes the logits of all positions of a single request.
run_eval.py, through the harness's HFLM, sorts the requests by length, pads batches, and computes the logits
from the first continuation of a batch on. HFLM stands for the harness's own adapter, which computes them all,
over transformers' GPT-2 of this shape with random weights. They take turns, and the run ends with an error if
run_eval.py's scores differ from the released design's.

    ratio    the released design's time over the other's in a round: median (lowest to highest)
"""

import json
import logging
import os
import platform
import random
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from tabulate import tabulate  # noqa: E402

from common import Parser, load_tokenizer  # noqa: E402
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


def values_of(lm):
    """The log-probabilities that one of the harness's language models answers with."""
    return lambda requests: [value for value, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write every time as JSON")
    options = parser.parse_args(arguments)

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = GPT_QKV_KEqualsV(ModelConfig(**SHAPE)).eval()
    lm = CheckpointLM(model, load_tokenizer("bytes"), options.batch_size)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE, use_cache=False)).eval()
    plain = HFLM(gpt2, tokenizer=lm.tokenizer, batch_size=options.batch_size, logits_cache=False)
    contestants = {"released design": lambda given: released(model, given), "run_eval.py": values_of(lm)}
    contestants["HFLM over GPT-2"] = values_of(plain)

    requests = short_requests(options.requests)
    seconds, scores = {name: [] for name in contestants}, {}
    for turn in range(options.rounds + 1):
        for name, score in contestants.items():
            started = time.perf_counter()
            scores[name] = score(requests)
            if turn:  # the first is for warming up
                seconds[name].append(time.perf_counter() - started)
        torch.testing.assert_close(scores["run_eval.py"], scores["released design"], atol=1e-3, rtol=1e-5)

    versions = {name: version(name) for name in ("torch", "transformers", "lm_eval")}
    info = Path("/proc/cpuinfo")
    models = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else [platform.processor()]
    machine = {"processor": models[0], "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    machine["load"] = os.getloadavg()[0]
    settings = {"requests": len(requests), "batch_size": options.batch_size, "rounds": options.rounds}
    print(f"{machine}, {versions}\n")
    rows, ratios = [], {}
    for name, times in seconds.items():
        ratio = sorted(theirs / own for theirs, own in zip(seconds["released design"], times, strict=True))
        ratios[name] = {"median": median(ratio), "lowest": ratio[0], "highest": ratio[-1]}
        rows.append([name, f"{len(requests) / min(times):.1f}", f"{len(requests) / median(times):.1f}"])
        rows[-1].append(f"{median(ratio):.2f} ({ratio[0]:.2f} to {ratio[-1]:.2f})")
    what = f"{len(requests)} requests, batches of {options.batch_size}"
    headers = [what, "best, requests/s", "median", "ratio"]
    print(tabulate(rows, headers, tablefmt="plain", disable_numparse=True))
    if options.output:
        record = settings | {"shape": SHAPE} | machine | versions | {"seconds": seconds, "ratio": ratios}
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
