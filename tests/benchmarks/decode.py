"""How fast the training scripts decode, beside transformers' GPT-2 with its dynamic and its static KV cache.

    python tests/benchmarks/decode.py                                # all variants; an hour on 2 cores, 12 GB
    python tests/benchmarks/decode.py --scenes long --dtypes fp32 --variants kqv kv --rounds 9
    python tests/benchmarks/decode.py --scenes short --scripts DIR   # another checkout, in turn with this one

    short   4 layers, d 512, 8 heads, a prompt of 384 tokens and 128 new ones
    long    8 layers of the 300M width (d 1024, 16 heads), a prompt of 4,064 tokens and 32 new ones

Held equal: the shape, the vocabulary, batch 1, greedy choice, the dtype of weights and cache, eval mode, the
process and its threads. GPT-2 holds the weights of QKV, and in fp32 the run ends with an error if the two
disagree on a token. All go through their own `generate`. The contestants take turns, after a warm-up round
that is not counted. A ratio is that of one round, so that what else the machine does falls on both: the
median of the rounds (lowest to highest).

    prefill   the prompt and the first new token. Where the processor only emulates bf16, it is not measured
              there: the caches are filled in fp32 and cast
    decode    the other new tokens, out of the filled cache
    better    the faster of the two transformers caches, in each round
    step      bytes that a decode step has to read: the weights without the positions, and the cache
    share     of the read bandwidth, measured in each round by passes over a large matrix that only read
    over QKV  QKV's time over the variant's, and what the bytes of a step promise
"""

import argparse
import copy
import inspect
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from unittest.mock import patch

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from tabulate import tabulate  # noqa: E402

from analysis_computation_profiler import DTYPES, bf16_is_native, device_name, read_bandwidth  # noqa: E402

VARIANTS = yaml.safe_load((ROOT / "configs/variants.yaml").read_text(encoding="utf-8"))
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


def build(alias, **shape):
    """A variant's model with the KV heads of its 300M script and random weights."""
    variant = VARIANTS[alias]
    script = import_module(variant["script"]["300M"].removesuffix(".py"))
    groups = variant["groups"] and variant["groups"]["300M"]
    torch.manual_seed(0)
    config = script.ModelConfig(**shape, n_kv_groups=groups, initializer_range=0.2)
    return getattr(script, variant["class"])(config).eval()


def build_gpt2(qkv, **settings):
    """transformers' GPT-2 with the weights of QKV; without an end token it stops nowhere, masks nothing."""
    names = ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")
    shape = {name: getattr(qkv.config, name) for name in names}
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **shape, activation_function="gelu", bos_token_id=None, eos_token_id=None, **settings
        )
    )
    transposed = {name for name in qkv.state_dict() if ".c_" in name and name.endswith("weight")}
    weights = {}
    for name, weight in qkv.state_dict().items():
        weights[f"transformer.{name}"] = weight.T if name in transposed else weight
    gpt2.load_state_dict(weights | {"lm_head.weight": qkv.wte.weight})
    return gpt2.eval()


class Script:
    """A variant's model as its training script has it."""

    def __init__(self, model):
        self.model, self.embedding = model, model.wte

    def empty_cache(self, length):
        return self.model.make_cache(1, length)

    def generate(self, tokens, new, cache):
        with patch.object(self.model, "make_cache", lambda *_: cache):
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


def cast_cache(cache, dtype):
    """The same cache with its keys and values in another dtype."""
    for layer in cache.layers:
        if isinstance(layer, list):
            layer[:] = [tensor.to(dtype) for tensor in layer]
        else:
            layer.keys, layer.values, layer.dtype = layer.keys.to(dtype), layer.values.to(dtype), dtype


def step_bytes(model, length):
    """Bytes that a decode step reads with `length` tokens in the cache."""
    weights = sum(p.nbytes for p in model.parameters()) - model.wpe.weight.nbytes
    return weights + model.make_cache(1, length).nbytes


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
    """Seconds of prefill and of a decode step by contestant and round, and each round's read bandwidth."""
    prefill, decode = {name: [] for name in contestants}, {name: [] for name in contestants}
    filled, first, bandwidths = {}, {}, []

    # prefill; it leaves the caches from which the decode starts
    native = dtype == "fp32" or bf16_is_native(CPU)
    for _ in range(PREFILL_ROUNDS if native else 1):
        for name, contestant in contestants.items():
            contestant.model.to(DTYPES[dtype] if native else torch.float32)
            filled[name] = contestant.empty_cache(prompt.shape[1] + new)
            seconds, _, first[name] = timed(contestant, prompt, 1, filled[name])
            prefill[name].append(seconds)
    if not native:
        prefill = None
        for name, contestant in contestants.items():
            contestant.model.to(DTYPES[dtype])
            cast_cache(filled[name], DTYPES[dtype])

    # decode, from a copy of the filled cache; the first round is the warm-up
    for number in range(rounds + 1):
        bandwidth = read_bandwidth(CPU, repeats=2)
        answers = {}
        for name, contestant in contestants.items():
            cache = copy.deepcopy(filled[name])
            _, seconds, answers[name] = timed(contestant, first[name], new - 1, cache)
            if number:
                decode[name].append(seconds / (new - 1))
        if number:
            bandwidths.append(bandwidth)
        if dtype == "fp32" and "kqv" in answers:
            for name in (DYNAMIC, STATIC):
                assert torch.equal(answers["kqv"], answers[name]), f"QKV and {name} disagree on a token"
    return prefill, decode, bandwidths


# -----------------------------------------------------------------------------
# Printing


def ratio(theirs, ours):
    """Their time over ours, the median over the rounds."""
    return f"{median(a / b for a, b in zip(theirs, ours, strict=True)):.2f}"


def ratio_and_range(theirs, ours):
    """The same, with the lowest and the highest."""
    values = [a / b for a, b in zip(theirs, ours, strict=True)]
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(contestants, prefill, decode, bandwidths, length):
    """The results of `measure`, as a table in Markdown."""
    read = {}
    for name, contestant in contestants.items():
        if isinstance(contestant, Script):
            read[name] = step_bytes(contestant.model, length)
    rows = []
    for name in contestants:
        row = {"": VARIANTS[name]["paper"] if name in VARIANTS else name}
        if prefill:
            better = list(map(min, prefill[DYNAMIC], prefill[STATIC]))
            row["prefill, s"] = f"{median(prefill[name]):.2f}"
            row["vs transformers"] = ratio(better, prefill[name]) if name in read else ""
        row["decode, tokens/s"] = f"{1 / median(decode[name]):.1f}"
        if name in read:
            better = list(map(min, decode[DYNAMIC], decode[STATIC]))
            row["vs dynamic"] = ratio(decode[DYNAMIC], decode[name])
            row["vs static"] = ratio(decode[STATIC], decode[name])
            row["vs better"] = ratio_and_range(better, decode[name])
            row["step, MB"] = f"{read[name] / 1e6:.0f}"
            shares = [read[name] / s / b for s, b in zip(decode[name], bandwidths, strict=True)]
            row["share"] = f"{100 * median(shares):.0f} %"
        if name in read and "kqv" in read:
            row["over QKV"] = ratio_and_range(decode["kqv"], decode[name])
            row["promised"] = f"{read['kqv'] / read[name]:.2f}"
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def main(arguments=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="ALIAS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    busy = "time of the process on the processor, not on the clock: for a machine at work, with --threads 1"
    parser.add_argument("--cpu_time", action="store_true", help=busy)
    parser.add_argument("--vocab_size", type=int, default=50304)
    parser.add_argument("--scripts", default=ROOT, help="folder of the training scripts to measure")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(options.scripts))
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        time.perf_counter = time.process_time

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{device_name(CPU)} of {os.cpu_count()} cores, {versions}")
    print(f"{'CPU time' if options.cpu_time else 'wall-clock time'}, load {os.getloadavg()[0]:.1f}")
    for scene in options.scenes:
        shape, prompt_length, new = SCENES[scene]
        shape = shape | {"n_positions": prompt_length + new, "vocab_size": options.vocab_size}
        qkv = build("kqv", **shape)
        gpt2 = build_gpt2(qkv)
        contestants = {DYNAMIC: GPT2(gpt2, static=False), STATIC: GPT2(gpt2, static=True)}
        for alias in options.variants:
            contestants[alias] = Script(qkv if alias == "kqv" else build(alias, **shape))
        prompt = torch.randint(options.vocab_size, (1, prompt_length))
        for dtype in options.dtypes:
            results = measure(contestants, prompt, new, dtype, options.rounds)
            print(f"\n### {scene}, {dtype}, reads at {median(results[-1]) / 1e9:.1f} GB/s\n")
            print(table(contestants, *results, prompt_length + new // 2))


if __name__ == "__main__":
    main()
