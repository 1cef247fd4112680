"""Parameters, operations and KV cache of every variant: by formula, counted, and measured on this machine.

    python analysis_computation_profiler.py                                # Tables 5 and 6, and the cache
    python analysis_computation_profiler.py --sizes 1.2B --memory 80GB --format markdown
    python analysis_computation_profiler.py decode --variants kqv kv gqa --contexts 2048 8192 --batches 1 8
    python analysis_computation_profiler.py train --sizes 300M --format csv > train.csv

`count`, the default, runs no model: PyTorch's meta device knows shapes alone. A forward pass of one sequence
is accounted for three times: by the closed formula; by fvcore's MACs, which equal it; and by torch.profiler's
FLOPs, which are 2 x MACs plus the element-wise work that is itemised. If the three disagree, the exit status
is 1. An analysis of all variants writes comprehensive_flop_analysis_<size>.json, for 300M unless --sizes says
otherwise.

`decode` fills the KV cache through the scripts' `generate` and decodes from it; `train` trains the scripts'
model (earlier: --measure, --measure train). Weights are random, and each run has as many positions as its
context needs. The variants take turns, after a warm-up round. Figures are medians over the rounds (lowest to
highest); "vs QKV" compares the turns of one round. A run whose memory PyTorch cannot allocate is skipped; on
a CPU, Linux may promise more than it has, and end the process.

    peak memory   of weights and run together; on a CPU, resident memory, reported on Linux only
    roofline      the decode rate if a step took no longer than reading the weights and the cache
    mfu           (6 N + 12 L d T) FLOPs a token, as a share of the GPU's dense bf16 peak
    published     Tables 14 and 15: 1.2B in bf16 on an A100

GB are 10^9 bytes, GiB 2^30.
"""

import argparse
import contextlib
import ctypes
import gc
import math
import os
import platform
import re
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from importlib import import_module
from itertools import groupby, product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated
from unittest.mock import patch

import torch
import yaml
from pydantic import ByteSize, Field, PositiveInt, TypeAdapter, ValidationError
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import report
from common import ROOT, SIZES, VARIANTS, InputError, Parser, show_what_the_terminal_can, write_text
from report import amount, giga

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below that, torch.profiler reports its every start and stop

SEQUENCE_LENGTHS = (128, 512, 1024, 2048)
PAPER_CONTEXTS = (2_048, 32_000, 128_000)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
READ_BYTES = 2**29  # far beyond every processor's cache


# -----------------------------------------------------------------------------
# Variants

MODULES = {  # the part of a model that each of its modules counts towards, named as in the released JSON
    "wte": "embedding", "wpe": "embedding", "attn": "attention", "mlp": "mlp",
    "ln_1": "layernorm", "ln_2": "layernorm", "ln_f": "layernorm",
}  # fmt: skip


class Variant:
    """A variant at one size: its row of configs/variants.yaml, its training script and its ModelConfig.

    `settings` replace fields of configs/model_config_<size>.yaml. InputError where the variant has no model
    of that size, or the script rejects a setting.
    """

    def __init__(self, alias, size, /, **settings):
        self.alias, self.size, self.row = alias, size, VARIANTS[alias]
        if size not in self.row["script"]:
            sizes = " and ".join(self.row["script"])
            raise InputError(f"{self.row['paper']} ({alias}) has no {size} model, only {sizes}")
        self.script = import_module(self.row["script"][size].removesuffix(".py"))
        path = ROOT / f"configs/model_config_{size}.yaml"
        try:
            self.config = self.script.load_config(self.script.ModelConfig, path, settings)
        except self.script.RunError as error:
            raise InputError(str(error)) from error
        groups = self.config.n_kv_groups
        self.paper = f"{self.row['paper']}-{groups}" if groups and groups > 1 else self.row["paper"]
        self.key = self.row["published"].get("release_name", self.paper)  # its key in the JSON
        self.label = {"size": size, "variant": self.paper, "alias": alias}  # the first fields of its records
        if settings:
            self.label["set"] = " ".join(f"{key}={value}" for key, value in settings.items())

    def build(self, device="meta", dtype=torch.float32, **changes):
        """The script's model in eval mode, with random weights; `changes` replace fields of its config."""
        with torch.device(device):
            model = getattr(self.script, self.row["class"])(replace(self.config, **changes))
        return model.to(dtype).eval()

    @cached_property
    def parameters(self):
        """Parameters by part; the output embedding is tied to the input's and counts once."""
        counts = dict.fromkeys(("total", "trainable", *MODULES.values()), 0)
        for name, parameter in self.build().named_parameters():
            part = next(MODULES[module] for module in name.split(".") if module in MODULES)
            for key in ("total", "trainable", part):
                counts[key] += parameter.numel()
        return counts

    @property
    def kv_width(self):
        """How many numbers the keys of one token take up in one layer; as many as the values."""
        return (self.config.n_kv_groups or self.config.n_head) * (self.config.n_embd // self.config.n_head)

    def cache_bytes(self, tokens=1, itemsize=2):
        """Bytes of the KV cache for so many tokens of one sequence, by formula; an itemsize of 2 is bf16."""
        return tokens * self.config.n_layer * len(self.row["cached"]) * self.kv_width * itemsize

    def published(self, figure):
        """A figure of the paper, from configs/variants.yaml; None without one, or with changed settings."""
        return None if "set" in self.label else self.row["published"].get(figure, {}).get(self.size)


def chosen(sizes, aliases, settings):
    """{size: its Variants}, where None stands for all; one asked for by size and alias has to exist."""
    variants = {}
    for size in sizes or SIZES:
        for alias in VARIANTS:
            asked = alias in (aliases or VARIANTS)
            if asked and (size in VARIANTS[alias]["script"] or sizes and aliases):
                variants.setdefault(size, []).append(Variant(alias, size, **settings))
    return variants


# -----------------------------------------------------------------------------
# Accounts


def theoretical_macs(variant, T):
    """Multiply-accumulates of the matrix products in a forward pass of T tokens (Table 6).

    Projections, 2 T^2 d in each layer (the causal mask saves nothing), MLP, output embedding.
    """
    c = variant.config
    # "Q=...": the query has no projection of its own. Where the key alone is cached, it is the value too.
    query_width = 0 if variant.paper.startswith("Q=") else c.n_embd
    width = query_width + len(variant.row["cached"]) * variant.kv_width
    attention = T * c.n_embd * (width + c.n_embd) + 2 * T * T * c.n_embd
    mlp = 2 * T * c.n_embd * c.n_inner
    lm_head = T * c.n_embd * c.vocab_size
    layers = {"total_attention": c.n_layer * attention, "total_mlp": c.n_layer * mlp, "lm_head": lm_head}
    return {"attention_per_layer": attention, "mlp_per_layer": mlp} | layers | {"total": sum(layers.values())}


def elementwise_flops(variant, T):
    """What torch.profiler counts besides matrix products, at one FLOP a number: scaled scores, additions."""
    c = variant.config
    items = {
        "score_scaling": c.n_layer * c.n_head * T * T,
        "residual_adds": 2 * c.n_layer * T * c.n_embd,
        "position_add": T * c.n_embd,
    }
    return items | {"total": sum(items.values())}


def explicit_attention(q, k, v, config):
    """The training scripts' causal_attention as the published FLOPs were counted, without a past.

    Counters see nothing inside the fused attention. Here every product is an operator of its own, and so is
    the scaling of the scores. q [B, n_head, T, head_dim], k and v [B, n_kv_head, T, head_dim] -> as q.
    """
    n_rep = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(n_rep, dim=1), v.repeat_interleave(n_rep, dim=1)
    scores = (q @ k.mT) * (1 / math.sqrt(q.shape[-1]))
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~causal, -math.inf).softmax(dim=-1) @ v


def fvcore_macs(model, input_ids):
    """fvcore's count of a forward pass, without its estimate for LayerNorm."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, input_ids)
    analysis.unsupported_ops_warnings(False)  # element-wise operators, which have no MACs
    return sum(count for operator, count in analysis.by_operator().items() if operator != "layer_norm")


def profiled_flops(model, input_ids):
    """torch.profiler's FLOPs of a forward pass, by operator.

    The profiler goes by shapes, so the meta device will do. Some of that device's kernels are written in
    Python, though, and call further operators that no real device runs. So an operator counts only if the
    model called it, or if linear or matmul did, which PyTorch composes of other operators on every device.
    """
    watch = profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True)
    with torch.no_grad(), watch as run:
        model(input_ids)
    flops = Counter()
    for event in run.events():
        caller = event.cpu_parent
        while caller and caller.name in ("aten::linear", "aten::matmul"):
            caller = caller.cpu_parent
        if event.flops and not caller:
            flops[event.name] += event.flops
    return dict(sorted(flops.items()))


def forward_account(variant, model, T):
    """The three accounts of one forward pass of T tokens, in the form of the JSON."""
    input_ids = torch.zeros(1, T, dtype=torch.int64, device=model.wte.weight.device)
    macs = theoretical_macs(variant, T)
    with patch.object(variant.script, "causal_attention", explicit_attention):
        by_operator = profiled_flops(model, input_ids)
        counted_macs = fvcore_macs(model, input_ids)
    flops = sum(by_operator.values())
    ratio = flops / (2 * macs["total"])
    return {
        "theoretical_macs": macs,
        "actual_flops": {"total_flops": flops, "total_gflops": flops / 1e9, "by_operator": by_operator},
        "overhead_percent": 100 * (ratio - 1),
        "ratio": ratio,
        "fvcore_macs": counted_macs,
        "elementwise_flops": elementwise_flops(variant, T),
    }


def cache_account(variant, contexts):
    """The KV cache of one sequence in bf16, by context, and its saving over caching K and V of every head."""
    c = variant.config
    sizes = {str(context): variant.cache_bytes(context) for context in contexts}
    return {
        "dtype": "bf16",
        "cached": variant.row["cached"],
        "heads": c.n_kv_groups or c.n_head,
        "bytes_per_token": variant.cache_bytes(),
        "reduction_percent": 100 * (1 - variant.cache_bytes() / (2 * c.n_layer * c.n_embd * 2)),
        "by_context": {T: {"bytes": n, "gb": n / 1e9, "gib": n / 2**30} for T, n in sizes.items()},
    }


def analyse(alias, size):
    """A variant's entry in comprehensive_flop_analysis_<size>.json: the release's fields, ours beside them.

    `ratio` is FLOPs over 2 x MACs, and `overhead_percent` is how far it exceeds 1.
    """
    variant = Variant(alias, size)
    model = variant.build()
    return {
        "model_name": variant.paper,
        "attention_type": variant.row["name"],
        "parameters": variant.parameters,
        "max_seq_len": variant.config.n_positions,
        "analysis_by_seq_len": {str(T): forward_account(variant, model, T) for T in SEQUENCE_LENGTHS},
        "kv_cache": cache_account(variant, PAPER_CONTEXTS),
    }


def change(ours, theirs):
    """By how many percent a figure differs from another's."""
    return 100 * (ours / theirs - 1)


def account_records(variant, entry, qkv, contexts, memory):
    """{table: flat records} of an entry, beside QKV's of the same size, or none.

    `unexplained` is how far its three accounts disagree; `sequences` is how many caches fit into `memory`
    bytes beside the weights, all in bf16.
    """
    total = entry["parameters"]["total"]
    parameters = variant.label | entry["parameters"]
    if qkv:
        parameters["total_vs_qkv"] = change(total, qkv["parameters"]["total"])

    compute = []
    for T, forward in entry["analysis_by_seq_len"].items():
        macs, flops = forward["theoretical_macs"]["total"], forward["actual_flops"]["total_flops"]
        items = dict(forward["elementwise_flops"])
        unexplained = abs(forward["fvcore_macs"] - macs) + abs(flops - 2 * macs - items.pop("total"))
        row = {"T": int(T), "theoretical_macs": macs, "fvcore_macs": forward["fvcore_macs"]}
        row |= {"profiled_flops": flops, **items, "unexplained": unexplained, "ratio": forward["ratio"]}
        if qkv:
            row["macs_vs_qkv"] = change(macs, qkv["analysis_by_seq_len"][T]["theoretical_macs"]["total"])
        compute.append(variant.label | row)

    account = cache_account(variant, contexts)
    same = {key: account[key] for key in ("bytes_per_token", "reduction_percent")}
    same |= variant.label | {"weight_bytes": 2 * total, "memory_bytes": memory}
    cache = [
        same | {"context": int(context), **size, "sequences": max(0, memory - 2 * total) // size["bytes"]}
        for context, size in account["by_context"].items()
    ]
    return {"parameters": [parameters], "compute": compute, "kv_cache": cache}


# -----------------------------------------------------------------------------
# Measurement: the machine

Machine = namedtuple("Machine", "device dtype bandwidth")  # that is measured on; reads in bytes a second


def of_linux(path):
    """A file that Linux keeps about processes and processors; empty elsewhere."""
    return Path(path).read_text() if Path(path).exists() else ""


def device_name(device):
    """The device's name, and for a CPU the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"^model name\s*: (.*)$", of_linux("/proc/cpuinfo"), re.MULTILINE)
    return f"{names[0] if names else platform.processor()}, threads: {torch.get_num_threads()}"


def bf16_is_native(device):
    """Whether the device computes in bf16; one that emulates it is faster in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", of_linux("/proc/cpuinfo")))


def now(device):
    """Seconds on a clock, when the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def read_bandwidth(device, repeats=5):
    """Bytes a second of the fastest way to pass over a large matrix, which writes next to nothing."""
    matrix = torch.ones(1024, READ_BYTES // 4096, device=device)
    row = torch.ones(1, 1024, device=device)
    times = []
    for read in (matrix.sum, lambda: row @ matrix) * repeats:
        start = now(device)
        for _ in range(8):  # on a GPU, enough for the wait at the end not to count
            read()
        times.append((now(device) - start) / 8)
    return matrix.nbytes / min(times)


class PeakMemory:
    """The highest rise of the memory in use above where it stood when this object was made."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        # Freed memory goes back to the system; otherwise the next model would reuse it, and show no rise.
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        with contextlib.suppress(AttributeError, OSError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
        self.before = torch.cuda.memory_allocated() if self.cuda else resident("VmRSS")

    def restart(self):
        """Forget the peak so far, such as that of building a model in fp32 and casting it."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS

    def read(self):
        """The rise, as a field of a record; without one outside Linux, where a peak cannot be restarted."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        return {} if peak is None else {"peak_bytes": peak - self.before}


def resident(field):
    """Bytes of resident memory, now (VmRSS) or at its peak (VmHWM); None outside Linux."""
    found = re.search(rf"{field}:\s+(\d+) kB", of_linux("/proc/self/status"))
    return 1024 * int(found[1]) if found else None


# -----------------------------------------------------------------------------
# Measurement: turns


def step_bytes(variant, context, batch, itemsize):
    """Bytes that one decode step has to read: every weight but the table of positions, and `batch` caches."""
    weights = variant.parameters["total"] - variant.config.n_positions * variant.config.n_embd
    return weights * itemsize + batch * variant.cache_bytes(context, itemsize)


def decode_turn(variant, machine, context, batch, steps):
    """One `generate` of the script's model: the prompt and a token, then `steps` tokens from the cache."""
    device = machine.device
    peak = PeakMemory(device)
    n_positions = max(variant.config.n_positions, context + steps + 1)
    model = variant.build(device, machine.dtype, n_positions=n_positions)
    prompt = torch.randint(variant.config.vocab_size, (batch, context), device=device)
    caches = []  # of each forward pass
    times = []

    def at_first_layer(layer, inputs):
        caches.append(inputs[1])
        if len(caches) == 2:  # the first pass is the prompt's, the second begins to decode
            times.append(now(device))

    model.h[0].register_forward_pre_hook(at_first_layer)
    peak.restart()
    times.append(now(device))
    model.generate(prompt, steps + 1, temperature=0)
    times.append(now(device))

    # On average a step reads the prompt and half of what is decoded.
    read = step_bytes(variant, context + steps / 2, batch, machine.dtype.itemsize)
    roofline = batch * machine.bandwidth / read
    decode = batch * steps / (times[2] - times[1])
    return {
        "n_positions": n_positions,
        "cache_bytes": caches[-1].nbytes,
        "formula_bytes": batch * variant.cache_bytes(context + steps + 1, machine.dtype.itemsize),
        **peak.read(),
        "prefill": batch * context / (times[1] - times[0]),
        "decode": decode,
        "roofline": roofline,
        "of_roofline": 100 * decode / roofline,
    }


def train_turn(variant, machine, micro_batch_size, seq_length, steps):
    """An update of the script's model as it trains, from so many micro batches."""
    device = machine.device
    peak = PeakMemory(device)
    model = variant.build(device, n_positions=max(variant.config.n_positions, seq_length)).train()
    if device.type == "cuda":
        torch.compiler.reset()  # forget what was compiled for the last model
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = torch.randint(variant.config.vocab_size, (micro_batch_size, seq_length), device=device)

    def update():
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=machine.dtype == torch.bfloat16):
                _, loss = model(batch, batch)
            (loss / steps).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    update()  # compiles, and makes the optimiser's state
    peak.restart()
    start = now(device)
    update()
    rate = steps * micro_batch_size * seq_length / (now(device) - start)
    length = SimpleNamespace(seq_length=seq_length)
    share = variant.script.mfu(variant.parameters["total"], variant.config, length, device, rate)
    return {"train": rate, **peak.read(), **{key: 100 * value for key, value in share.items()}}


# -----------------------------------------------------------------------------
# Measurement: rounds

MEASUREMENTS = {"decode": decode_turn, "train": train_turn}
FIGURES = ("peak_bytes", "prefill", "decode", "roofline", "of_roofline", "train", "mfu")  # of each turn anew


def over_rounds(turns, qkvs):
    """A record of turns: median and range of each figure, and of its change in percent against QKV's turn.

    `qkvs` are QKV's turns of the same rounds, or None. What does not differ between turns stays as it is.
    """
    record = {key: value for key, value in turns[0].items() if key not in FIGURES}
    for key in [key for key in FIGURES if key in turns[0]]:
        by_round = {key: [turn[key] for turn in turns]}
        if qkvs:
            pairs = zip(turns, qkvs, strict=True)
            by_round[f"{key}_vs_qkv"] = [change(ours[key], qkv[key]) for ours, qkv in pairs]
        for name, values in by_round.items():
            record |= {name: median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
    return record


def take_turns(variants, turn, rounds, progress):
    """({alias: results of turn(variant), round by round}, {alias: how it ran out of memory}).

    Every round goes through all variants, so that whatever else the machine does affects them alike. The
    first round warms up and does not count.
    """
    results, failed = {variant.alias: [] for variant in variants}, {}
    for variant in variants * (rounds + 1):
        progress()
        if variant.alias in failed:
            continue
        try:
            results[variant.alias].append(turn(variant))
        except RuntimeError as error:  # torch.OutOfMemoryError is one, but a CPU does not raise it
            if "tried to allocate" not in str(error).lower():
                raise
            failed[variant.alias] = str(error).splitlines()[0]
    return {alias: turns[1:] for alias, turns in results.items() if alias not in failed}, failed


def points_of(options, size):
    """The keyword arguments of every turn at a size."""
    if options.command == "decode":
        pairs = product(options.contexts, options.batches)
        return [{"context": context, "batch": batch, "steps": options.steps} for context, batch in pairs]
    published = yaml.safe_load((ROOT / f"configs/train_config_{size}.yaml").read_text(encoding="utf-8"))
    point = {key: getattr(options, key) or published[key] for key in ("micro_batch_size", "seq_length")}
    return [point | {"steps": options.steps}]


def measure(variants, options):
    """Records of what was measured, of what was skipped, and of the machine."""
    machine = Machine(options.device, DTYPES[options.dtype], read_bandwidth(options.device))
    points = [(size, point) for size in variants for point in points_of(options, size)]
    turns = (options.rounds + 1) * sum(len(variants[size]) for size, _ in points)
    measured, skipped = [], []
    with tqdm(total=turns, unit="turn", disable=None) as bar:
        for size, point in points:
            place = ", ".join(f"{key} {value}" for key, value in point.items())
            bar.set_description(f"{size}, {place}")
            turn = partial(MEASUREMENTS[options.command], machine=machine, **point)
            results, failed = take_turns(variants[size], turn, options.rounds, bar.update)
            for variant in variants[size]:
                record = variant.label | point
                if variant.alias in failed:
                    skipped.append(record | {"place": place, "reason": failed[variant.alias]})
                    continue
                published = {f"published_{key}": variant.published(key) for key in ("decode", "peak_memory")}
                measured.append(record | published | over_rounds(results[variant.alias], results.get("kqv")))
    about = {
        "device": device_name(machine.device), "cores": os.cpu_count(), "python": platform.python_version(),
        "torch": torch.__version__, "dtype": options.dtype, "rounds": options.rounds,
        "read_bandwidth": machine.bandwidth,
    }  # fmt: skip
    return {"machine": [about], options.command: measured, "skipped": skipped}


# -----------------------------------------------------------------------------
# Printing

# The tables of each kind of record: a title, and columns as report.table takes them.
NAME, TOKENS = ("", "variant"), ("tokens", "context", ",")
COUNT, SPEED, PERCENT, CHANGE = (",.0f",), (",.1f",), (".1f", " %"), ("+.1f", " %")
TABLES = {
    "parameters": [("Parameters at {model}; the paper's Table 5 is of 300M", [
        NAME, ("total", "total", *COUNT), ("vs QKV", "total_vs_qkv", *CHANGE),
        ("attention", "attention", *COUNT), ("MLP", "mlp", *COUNT), ("embeddings", "embedding", *COUNT),
        ("LayerNorm", "layernorm", *COUNT),
    ])],
    "compute": [("A forward pass of T tokens at {model}; the paper's Table 6 is of 300M", [
        NAME, ("T", "T", *COUNT), ("MACs, formula", "theoretical_macs", *COUNT),
        ("vs QKV", "macs_vs_qkv", *CHANGE), ("MACs, fvcore", "fvcore_macs", *COUNT),
        ("FLOPs, torch.profiler", "profiled_flops", *COUNT), ("scaled scores", "score_scaling", *COUNT),
        ("residuals", "residual_adds", *COUNT), ("positions", "position_add", *COUNT),
        ("unexplained", "unexplained", *COUNT), ("FLOPs / 2 MACs", "ratio", ".6f"),
    ])],
    "kv_cache": [("KV cache of a sequence at {model}, bf16", [
        NAME, ("bytes a token", "bytes_per_token", *COUNT), ("saved", "reduction_percent", *PERCENT),
        TOKENS, ("GB", "gb", amount), ("GiB", "gib", amount), ("weights, GB", "weight_bytes", giga),
        ("memory, GB", "memory_bytes", giga), ("sequences that fit", "sequences", *COUNT),
    ])],
    "decode": [
        ("KV cache and peak memory at {model}", [
            NAME, TOKENS, ("batch", "batch"), ("cache, bytes", "cache_bytes", *COUNT),
            ("formula", "formula_bytes", *COUNT), ("peak memory, GB", "peak_bytes", giga),
            ("vs QKV", "peak_bytes_vs_qkv", *CHANGE), ("published", "published_peak_memory"),
        ]),
        ("Prefill and decode at {model}, tokens a second", [
            NAME, TOKENS, ("batch", "batch"), ("prefill", "prefill", *SPEED), ("decode", "decode", *SPEED),
            ("vs QKV", "decode_vs_qkv", *CHANGE), ("published", "published_decode"),
            ("roofline", "roofline", *SPEED), ("vs QKV", "roofline_vs_qkv", *CHANGE),
            ("reached", "of_roofline", *PERCENT),
        ]),
    ],
    "train": [("Training at {model}", [
        NAME, ("rows", "micro_batch_size"), ("T", "seq_length", *COUNT), ("micro batches", "steps"),
        ("tokens/s", "train", *SPEED), ("vs QKV", "train_vs_qkv", *CHANGE),
        ("peak memory, GB", "peak_bytes", giga), ("vs QKV", "peak_bytes_vs_qkv", *CHANGE),
        ("mfu", "mfu", *PERCENT),
    ])],
    "machine": [("Measured on", [
        ("device", "device"), ("torch", "torch"), ("dtype", "dtype"), ("rounds", "rounds"),
        ("reads, GB/s", "read_bandwidth", giga),
    ])],
    "skipped": [("Skipped at {model}", [NAME, ("run", "place"), ("reason", "reason")])],
}  # fmt: skip


def as_tables(records, heading, style):
    """The tables of all records, model by model: a size, and what --set changed."""

    def model_of(record):
        return " with ".join(record[key] for key in ("size", "set") if key in record)

    blocks = []
    for name, of_name in records.items():
        for model, of_model in groupby(of_name, model_of):
            rows = list(of_model)
            for title, columns in TABLES[name]:
                blocks += [heading + title.format(model=model), report.table(columns, rows, style)]
    return "\n\n".join(blocks) + "\n"


def as_csv(records):
    """One sheet of all records, unrounded; `table` says where a record belongs, what it lacks is empty."""
    return report.sheet([{"table": name} | record for name, of_name in records.items() for record in of_name])


FORMATS = {
    "table": partial(as_tables, heading="", style="simple"),
    "markdown": partial(as_tables, heading="### ", style="pipe"),
    "json": report.as_json,
    "csv": as_csv,
}


# -----------------------------------------------------------------------------
# Command line

DEFAULTS = {  # of measurements; elsewhere None stands for all, or for the published setting
    "cpu": {  # takes minutes
        "sizes": ["300M"], "variants": ["kqv", "kv", "gqa", "qmqa"], "contexts": [512, 2_048], "batches": [1],
        "micro_batch_size": 1, "seq_length": 256,
    },
    "cuda": {"contexts": [2_048, 8_192, 32_000], "batches": [1, 8]},
}  # fmt: skip
STEPS = {"decode": {"cpu": 32, "cuda": 128}, "train": {"cpu": 1, "cuda": 24}}


def checked(kind, expected):
    """A type for argparse: what pydantic reads in a text."""

    def read(text):
        try:
            return TypeAdapter(kind).validate_python(text)
        except ValidationError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    return read


positive = checked(PositiveInt, "a whole number above 0")
memory_size = checked(Annotated[ByteSize, Field(ge=10**6)], "an amount such as 40GB or 24GiB")


def setting(text):
    """(key, value) of a KEY=VALUE; the training scripts check the value."""
    key, _, value = text.partition("=")
    known = Variant("kqv", "300M").script.ModelConfig.__annotations__
    with contextlib.suppress(yaml.YAMLError):
        if key in known:
            return key, yaml.safe_load(value)
    raise argparse.ArgumentTypeError(f"{text}: expected KEY=VALUE, with a KEY out of {', '.join(known)}")


def command_line():
    parser = Parser(__file__, __doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, prog=parser.prog, title="commands; each has a --help of its own",
        metavar="COMMAND", parser_class=lambda prog, description: Parser(prog, description),
    )  # fmt: skip

    def command(name, about):
        add = commands.add_parser(name, description=about, help=about).add_argument
        add("--sizes", nargs="+", choices=SIZES, help="default: both; measured on a CPU: 300M")
        every, few = (", ".join(aliases) for aliases in (VARIANTS, DEFAULTS["cpu"]["variants"]))
        aliases = f"{every} (default: all; measured on a CPU: {few})"
        add("--variants", nargs="+", choices=VARIANTS, metavar="ALIAS", help=aliases)
        add("--format", choices=FORMATS, default="table", help="of what is printed")
        return add

    def measurement(name, about, steps):
        add = command(name, about)
        add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
        add("--dtype", choices=DTYPES, help="default: bf16 where it is native; training casts by autocast")
        add("--rounds", type=positive, default=3, metavar="N", help="turns of each variant after the warm-up")
        add("--steps", type=positive, metavar="N", help=steps)
        fields = "fields of the model's config to change"
        add("--set", nargs="+", action="extend", type=setting, default=[], metavar="KEY=VALUE", help=fields)
        return add

    contexts = {"nargs": "+", "type": positive, "metavar": "T", "help": "tokens in the KV cache"}
    add = command("count", "parameters, operations and cache without running a model (the default)")
    add("--contexts", default=PAPER_CONTEXTS, **contexts)
    memory = "for weights and caches, such as 24GiB (default: 40GB)"
    add("--memory", type=memory_size, default=40 * 10**9, metavar="SIZE", help=memory)
    add("--output_dir", type=Path, default=Path(), metavar="DIR", help="of the JSON (default: here)")
    add = measurement("decode", "prefill and decode through the KV cache", "tokens decoded in a turn")
    add("--contexts", **contexts)
    add("--batches", nargs="+", type=positive, metavar="B", help="sequences at the same time")
    add = measurement("train", "updates as the training scripts make them", "micro batches in an update")
    add("--micro_batch_size", type=positive, metavar="B", help="rows in a forward and backward pass")
    add("--seq_length", type=positive, metavar="T", help="tokens in a row")
    return parser


def with_command(arguments):
    """The arguments behind a subcommand: `count` if none is named; earlier, `--measure` led."""
    if "--measure" in arguments:
        name = "train" if "train" in arguments else "decode"
        return [name, *(argument for argument in arguments if argument not in ("--measure", name))]
    named = arguments[:1] and arguments[0] in ("count", *MEASUREMENTS, "-h", "--help")
    return arguments if named else ["count", *arguments]


def complete(options):
    """Fill in what depends on the device of a measurement; InputError where it is not there."""
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise InputError("--device cuda: PyTorch finds no CUDA device")
    options.device = torch.device(options.device or ("cuda" if has_cuda else "cpu"))
    options.dtype = options.dtype or ("bf16" if bf16_is_native(options.device) else "fp32")
    options.steps = options.steps or STEPS[options.command][options.device.type]
    for name, value in DEFAULTS[options.device.type].items():
        if getattr(options, name, value) is None:
            setattr(options, name, value)


def run_accounts(options):
    """The records of an analysis without measuring; writes the JSON."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    variants = chosen(options.sizes, options.variants, {})
    everyone = [variant for of_size in variants.values() for variant in of_size]
    # Tracing and reading traces is Python's work: two processes take half the time.
    with ProcessPoolExecutor(min(2, len(everyone)), get_context("spawn")) as pool:
        entries = pool.map(analyse, [v.alias for v in everyone], [v.size for v in everyone])
        entries = list(tqdm(entries, total=len(everyone), unit="variant", disable=None))

    records = {"parameters": [], "compute": [], "kv_cache": []}
    by_size = {size: {} for size in variants}
    for variant, entry in zip(everyone, entries, strict=True):
        by_size[variant.size][variant.key] = entry
        qkv = by_size[variant.size].get("QKV")
        of_variant = account_records(variant, entry, qkv, options.contexts, options.memory)
        for name, rows in of_variant.items():
            records[name] += rows

    # A file holds all variants of its size, or is left as it is.
    for size in [] if options.variants else options.sizes or ["300M"]:
        path = options.output_dir / f"comprehensive_flop_analysis_{size}.json"
        write_text(path, report.as_json(by_size[size]))
    return records


def main(arguments=None):
    show_what_the_terminal_can()
    parser = command_line()
    options = parser.parse_args(with_command(sys.argv[1:] if arguments is None else arguments))
    try:
        if options.command == "count":
            records = run_accounts(options)
        else:
            complete(options)
            records = measure(chosen(options.sizes, options.variants, dict(options.set)), options)
    except ModuleNotFoundError as error:
        parser.error(f"{error}; pip install -r requirements.txt")
    except (InputError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")
    print(FORMATS[options.format](records), end="")
    if any(record["unexplained"] for record in records.get("compute", ())):
        parser.exit(1, f"{parser.prog}: error: the accounts of a forward pass disagree; see `unexplained`\n")


if __name__ == "__main__":
    main()
