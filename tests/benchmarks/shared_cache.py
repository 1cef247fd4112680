"""Decode speed and memory of SharedKVCache beside DynamicCache, on a random Llama of SmolLM2-135M's shape.

    OMP_NUM_THREADS=2 python tests/benchmarks/shared_cache.py --output results/rotary/cache.json

Both caches are filled with as many random positions; then single tokens are decoded with the two in turn, so that other
work on the machine slows both alike. The ratio of a pair of steps is DynamicCache's time through SharedKVCache's: its
median and middle half are reported, and the best time of each. Peak memory (Linux) is that of a process of its own that
fills one cache and decodes from it, above the loaded model's.
"""

import argparse
import inspect
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from share_kv import SharedKVCache

NAME = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def make_model(dtype, layers):
    torch.manual_seed(0)
    heads = dict(num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=16384, tie_word_embeddings=True)
    sizes = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers)
    model = LlamaForCausalLM(LlamaConfig(**heads, **sizes)).to(dtype).eval()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data.copy_(layer.self_attn.k_proj.weight.data)
    return model


@torch.no_grad()
def fill(model, cache, length):
    """`length` random positions in the cache, as a prompt would leave them."""
    model.model.rotary_emb(model.lm_head.weight, torch.arange(length)[None])  # SharedKVCache sees the positions here
    for i in range(model.config.num_hidden_layers):
        x = torch.randn(1, 3, length, 64).to(model.dtype)
        cache.update(x, x.clone(), i)
    return cache


@torch.no_grad()
def decode(model, cache):
    started = time.perf_counter()
    model(torch.tensor([[7]]), use_cache=True, **{NAME: cache})
    return time.perf_counter() - started


def measure(dtype, length, layers, steps):
    model = make_model(dtype, layers)
    stock = fill(model, DynamicCache(config=model.config), length)
    shared = fill(model, SharedKVCache(model), length)
    times = []
    for step in range(steps + 3):
        pair = (stock, shared) if step % 2 else (shared, stock)
        both = {id(cache): decode(model, cache) for cache in pair}
        if step >= 3:
            times.append((both[id(stock)], both[id(shared)]))
    ratios = sorted(a / b for a, b in times)
    return {
        "dtype": str(dtype).removeprefix("torch."), "positions": length, "layers": layers, "steps": steps,
        "speed of DynamicCache's, median": round(statistics.median(ratios), 3),
        "middle half": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)],
        "best ms, DynamicCache": round(1e3 * min(a for a, _ in times), 2),
        "best ms, SharedKVCache": round(1e3 * min(b for _, b in times), 2),
        "nbytes": shared.nbytes,
        "nbytes, DynamicCache": sum(x.nbytes for layer in stock.layers for x in (layer.keys, layer.values)),
    }  # fmt: skip


def peak(kind, dtype, length, layers):
    """In a process of its own: memory above the loaded model's after filling a cache and decoding 8 tokens, in MiB."""
    model = make_model(dtype, layers)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins again
    before = peak_kb()
    cache = fill(model, SharedKVCache(model) if kind == "shared" else DynamicCache(config=model.config), length)
    for _ in range(8):
        decode(model, cache)
    return (peak_kb() - before) / 1024


def peak_kb():
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output")
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peak:
        print(round(peak(a.peak, getattr(torch, a.dtypes[0]), a.positions[0], a.layers), 1))
        return
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    processor = names[0] if names else platform.processor()
    result = {"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}
    result |= {"transformers": transformers.__version__, "rows": []}
    for dtype in a.dtypes:
        for length in a.positions:
            row = measure(getattr(torch, dtype), length, a.layers, a.steps)
            for kind in ("stock", "shared"):
                command = [sys.executable, __file__, "--peak", kind, "--dtypes", dtype, "--positions", str(length)]
                run = subprocess.run([*command, "--layers", str(a.layers)], capture_output=True, text=True, check=True)
                row[f"peak MiB, {kind}"] = float(run.stdout)
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
    if a.output:
        Path(a.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
