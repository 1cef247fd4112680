"""How fast the training scripts decode, beside transformers' GPT-2 with its dynamic and its static KV cache.

    python tests/benchmarks/decode.py                                # all variants; an hour on 2 cores, 12 GB
    python tests/benchmarks/decode.py --scenes long --dtypes fp32 --variants kqv kv --rounds 9
    python tests/benchmarks/decode.py --json decode.json             # keep every time of every round
    python tests/benchmarks/decode.py --show decode.json             # the tables again

    short   4 layers, d 512, 8 heads, a prompt of 384 tokens and 128 new ones
    long    8 layers of the 300M width (d 1024, 16 heads), a prompt of 4,064 tokens and 32 new ones

Held equal: shape, vocabulary, batch 1, greedy choice, dtype of weights and cache, eval mode and process.
GPT-2 holds the weights of QKV, and in fp32 the run ends with an error if the two disagree on a token. The
contestants take turns, after a warm-up round. Ratios are those of one round: median (lowest to highest).

    prefill   the prompt and the first new token
    decode    the other new tokens, out of the filled cache
    better    the faster of the two transformers caches, in each round
    step      bytes that a decode step has to read: the weights without the positions, and the cache
    share     of the read bandwidth, measured in each round by passes over a large matrix that only read
    over QKV  QKV's time over the variant's, and what the bytes of a step promise

A processor that only emulates bf16 is measured in fp32 alone.
"""

import copy
import inspect
import json
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from tabulate import tabulate  # noqa: E402

from analysis_computation_profiler import (  # noqa: E402
    DTYPES,
    Variant,
    bf16_is_native,
    device_name,
    read_bandwidth,
    step_bytes,
)
from common import VARIANTS, Parser, write_text  # noqa: E402

SCENES = {  # shape, tokens of the prompt, new tokens
    "short": ({"n_layer": 4, "n_embd": 512, "n_head": 8}, 384, 128),
    "long": ({"n_layer": 8, "n_embd": 1024, "n_head": 16}, 4064, 32),
}
PREFILL_ROUNDS = 3
DYNAMIC, STATIC = "transformers, dynamic", "transformers, static"
CPU = torch.device("cpu")
# what transformers calls the cache, before 5.24 and since
FORWARD = inspect.signature(transformers.GPT2LMHeadModel.forward).parameters
CACHE_ARGUMENT = "cache" if "cache" in FORWARD else "past_key_values"


# -----------------------------------------------------------------------------
# Contestants


def build_gpt2(qkv, **settings):
    """transformers' GPT-2 with the weights of QKV; without an end token it stops nowhere, masks nothing."""
    names = ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")
    shape = {name: getattr(qkv.config, name) for name in names}
    shape |= {"activation_function": "gelu", "bos_token_id": None, "eos_token_id": None}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **settings))
    weights = {"lm_head.weight": qkv.wte.weight}
    for name, weight in qkv.state_dict().items():
        stored_transposed = ".c_" in name and name.endswith("weight")
        weights[f"transformer.{name}"] = weight.T if stored_transposed else weight
    gpt2.load_state_dict(weights)
    return gpt2.eval()


class Script:
    """A variant's model as its training script has it."""

    def __init__(self, alias, **shape):
        # the KV heads of 300M; larger weights, so that the greedy choice is no near tie
        self.variant = Variant(alias, "300M", **shape, n_inner=None, initializer_range=0.2)
        torch.manual_seed(0)
        self.model = self.variant.build("cpu")
        self.embedding, self.empty_cache = self.model.wte, self.variant.script.KVCache

    def generate(self, tokens, new, cache):
        with patch.object(self.variant.script, "KVCache", lambda _: cache):
            return self.model.generate(tokens, new, temperature=0)


class GPT2:
    """transformers' model, with a cache of one kind."""

    def __init__(self, model, static):
        self.model, self.embedding, self.static = model, model.transformer.wte, static

    def empty_cache(self, length):
        if self.static:
            return transformers.StaticCache(config=self.model.config, max_cache_len=length)
        return transformers.DynamicCache(config=self.model.config)

    def generate(self, tokens, new, cache):
        length = {"max_new_tokens": new, "min_new_tokens": new}
        return self.model.generate(tokens, do_sample=False, **length, **{CACHE_ARGUMENT: cache})


# -----------------------------------------------------------------------------
# Measurement


def timed(contestant, tokens, new, cache):
    """Seconds from the call to the end and from the first forward pass to the end, and the tokens."""
    starts = []
    hook = contestant.embedding.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    called = time.perf_counter()
    tokens = contestant.generate(tokens, new, cache)
    returned = time.perf_counter()
    hook.remove()
    assert len(starts) == new, f"{len(starts)} forward passes for {new} tokens: no cache?"
    return returned - called, returned - starts[0], tokens


def measure(contestants, prompt, new, dtype, rounds):
    """Seconds of prefill and of a decode step by contestant and round; read bandwidths; bytes of a step."""
    prefill, decode = {name: [] for name in contestants}, {name: [] for name in contestants}
    filled, first, bandwidths = {}, {}, []

    # prefill; it leaves the caches from which the decode starts
    for _ in range(PREFILL_ROUNDS):
        for name, contestant in contestants.items():
            contestant.model.to(DTYPES[dtype])
            filled[name] = contestant.empty_cache(prompt.shape[1] + new)
            seconds, _, first[name] = timed(contestant, prompt, 1, filled[name])
            prefill[name].append(seconds)

    # decode, from a copy of the filled cache; the first round is the warm-up
    for _ in range(rounds + 1):
        bandwidths.append(read_bandwidth(CPU, repeats=2))
        answers = {}
        for name, contestant in contestants.items():
            _, seconds, answers[name] = timed(contestant, first[name], new - 1, copy.deepcopy(filled[name]))
            decode[name].append(seconds / (new - 1))
        if dtype == "fp32" and "kqv" in answers:
            for name in (DYNAMIC, STATIC):
                assert torch.equal(answers["kqv"], answers[name]), f"QKV and {name} disagree on a token"
    decode = {name: times[1:] for name, times in decode.items()}
    length = prompt.shape[1] + new // 2
    read = {}
    for name in filter(VARIANTS.__contains__, contestants):
        read[name] = step_bytes(contestants[name].variant, length, 1, DTYPES[dtype].itemsize)
    return {"prefill": prefill, "decode": decode, "bandwidth": bandwidths[1:], "step_bytes": read}


# -----------------------------------------------------------------------------
# Printing


def ratio(theirs, ours):
    """Their time over ours: the median over the rounds, the lowest and the highest."""
    values = [a / b for a, b in zip(theirs, ours, strict=True)]
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(times):
    """The results of `measure`, as a table in Markdown."""
    prefill, decode, read = times["prefill"], times["decode"], times["step_bytes"]
    better_prefill, better = (list(map(min, phase[DYNAMIC], phase[STATIC])) for phase in (prefill, decode))
    rows = []
    for name in decode:
        row = {"": VARIANTS[name]["paper"] if name in VARIANTS else name}
        row["prefill, s"] = f"{median(prefill[name]):.2f}"
        row["decode, tokens/s"] = f"{1 / median(decode[name]):.1f}"
        if name in read:
            row["prefill vs better"] = ratio(better_prefill, prefill[name])
            row["vs better"] = ratio(better, decode[name])
            row["step, MB"] = f"{read[name] / 1e6:.0f}"
            shares = [read[name] / s / b for s, b in zip(decode[name], times["bandwidth"], strict=True)]
            row["share"] = f"{100 * median(shares):.0f} %"
        if name in read and "kqv" in read:
            row["over QKV"] = ratio(decode["kqv"], decode[name])
            row["promised"] = f"{read['kqv'] / read[name]:.2f}"
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def machine():
    """What the figures were taken on."""
    return {
        "processor": device_name(CPU), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def show(results):
    """The tables of what --json keeps."""
    print(", ".join(f"{key} {value}" for key, value in (results["machine"] | results["options"]).items()))
    for times in results["times"]:
        bandwidth = median(times["bandwidth"]) / 1e9
        print(f"\n### {times['scene']}, {times['dtype']}, reads at {bandwidth:.1f} GB/s\n\n{table(times)}")


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES))
    native = list(DTYPES) if bf16_is_native(CPU) else ["fp32"]
    parser.add_argument("--dtypes", nargs="+", choices=native, default=native)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="ALIAS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep machine, options and all times there")
    parser.add_argument("--show", type=Path, metavar="FILE", help="only print the tables of a file")
    options = parser.parse_args(arguments)
    if options.show:
        return show(json.loads(options.show.read_text(encoding="utf-8")))

    results = {"machine": machine(), "options": {"rounds": options.rounds}, "times": []}
    for scene in options.scenes:
        shape, prompt_length, new = SCENES[scene]
        shape = shape | {"n_positions": prompt_length + new}
        qkv = Script("kqv", **shape)
        gpt2 = build_gpt2(qkv.model)
        contestants = {DYNAMIC: GPT2(gpt2, static=False), STATIC: GPT2(gpt2, static=True)}
        for alias in options.variants:
            contestants[alias] = qkv if alias == "kqv" else Script(alias, **shape)
        prompt = torch.randint(qkv.variant.config.vocab_size, (1, prompt_length))
        for dtype in options.dtypes:
            times = measure(contestants, prompt, new, dtype, options.rounds)
            results["times"].append({"scene": scene, "dtype": dtype} | times)
            if options.json:
                write_text(options.json, json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
