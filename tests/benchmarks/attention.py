"""Ways to let one new token attend to a KV cache on a CPU: layouts, SDPA and matrix products.

    python tests/benchmarks/attention.py
    python tests/benchmarks/attention.py --context 8192 --batch_size 8 --dtypes bf16 --json attention.json
    python tests/benchmarks/attention.py --show attention.json       # the table again

`causal_attention` takes the way marked with a star. Milliseconds of one decode step's attention in all
layers, medians of interleaved rounds. Every layer has its own cache, a part of a longer one as in `KVCache`,
and together they are beyond the processor's caches.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from decode import machine  # noqa: E402
from tabulate import tabulate  # noqa: E402

from analysis_computation_profiler import DTYPES  # noqa: E402
from common import Parser, write_text  # noqa: E402

N_HEAD, HEAD_DIM = 16, 64


def grouped(q, k, v):
    return sdpa(q, k, v, enable_gqa=True)


def folded(q, k):
    """The query heads of one KV head as rows: [B, n_head, 1, D] -> [B, n_kv_head, n_head / n_kv_head, D]."""
    return q.view(len(q), k.shape[1], -1, HEAD_DIM)


def sdpa_folded(q, k, v):
    return sdpa(folded(q, k), k, v)


def sdpa_two_rows(q, k, v):
    return sdpa(q.repeat(1, 1, 2, 1), k, v)[:, :, :1]


def products(q, k, v):
    return (folded(q, k) @ k.mT / HEAD_DIM**0.5).softmax(dim=-1) @ v


def products_by_column(q, k, v):
    scores = k @ folded(q, k).mT / HEAD_DIM**0.5
    return (v.mT @ scores.softmax(dim=-2)).mT


PROJECTED = "SDPA on [B, S, n_head, head_dim]"  # the layout of the projections, not that of the cache
CASES = [  # KV heads, tensors a layer, a way, and in which dtypes the scripts take it
    (16, 2, PROJECTED, sdpa, ()),
    (16, 2, "SDPA", sdpa, ("fp32", "bf16")),
    (16, 2, "SDPA, the query twice", sdpa_two_rows, ()),
    (16, 2, "q @ k.mT, softmax, @ v", products, ()),
    (16, 2, "k @ q.mT, softmax, v.mT @", products_by_column, ()),
    (16, 1, "SDPA", sdpa, ("fp32", "bf16")),
    (16, 1, "SDPA, the query twice", sdpa_two_rows, ()),
    (16, 1, "q @ k.mT, softmax, @ v", products, ()),
    (16, 1, "k @ q.mT, softmax, v.mT @", products_by_column, ()),
    (4, 2, "SDPA, enable_gqa", grouped, ()),
    (4, 2, "SDPA, query heads folded", sdpa_folded, ("fp32", "bf16")),
    (4, 2, "q @ k.mT, softmax, @ v, folded", products, ()),
    (1, 1, "SDPA, enable_gqa", grouped, ()),
    (1, 1, "SDPA, query heads folded", sdpa_folded, ("fp32", "bf16")),
    (1, 1, "q @ k.mT, softmax, @ v, folded", products, ()),
]


@torch.no_grad()
def measure(options, dtype):
    """Milliseconds of every round, in the order of CASES."""
    q = torch.randn(options.batch_size, N_HEAD, 1, HEAD_DIM, dtype=DTYPES[dtype])
    times = [[] for _ in CASES]
    for number in range(options.rounds + 1):  # the first is the warm-up
        for case, (n_kv_head, n_tensors, way, attend, _) in enumerate(CASES):
            shape = (options.batch_size, n_kv_head, options.context + 32, HEAD_DIM)
            order = (0, 2, 1, 3) if way == PROJECTED else (0, 1, 2, 3)
            caches = []
            for _ in range(options.layers):
                layer = [torch.empty_permuted(shape, order, dtype=q.dtype) for _ in range(n_tensors)]
                caches.append([tensor.normal_()[:, :, : options.context] for tensor in layer])
            started = time.perf_counter()
            for layer in caches:
                attend(q, layer[0], layer[-1])
            if number:
                times[case].append(1e3 * (time.perf_counter() - started))
    return times


def show(results):
    """The table of what --json keeps."""
    about = results["machine"] | results["options"]
    print(", ".join(f"{key} {value}" for key, value in about.items() if key != "transformers"), end="\n\n")
    times = results["milliseconds"]
    rows = []
    for case, (n_kv_head, n_tensors, way, _, taken) in enumerate(CASES):
        cells = [f"{median(times[dtype][case]):.1f}{' *' if dtype in taken else ''}" for dtype in times]
        rows.append([n_kv_head, ("K = V", "K and V")[n_tensors - 1], way, *cells])
    print(tabulate(rows, ["KV heads", "cached", "way", *times], tablefmt="pipe", disable_numparse=True))


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    for name, default in {"context": 4096, "batch_size": 1, "layers": 8, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep machine, options and all times there")
    parser.add_argument("--show", type=Path, metavar="FILE", help="only print the table of a file")
    options = parser.parse_args(arguments)
    if options.show:
        return show(json.loads(options.show.read_text(encoding="utf-8")))
    asked = {key: getattr(options, key) for key in ("context", "batch_size", "layers", "rounds")}
    times = {dtype: measure(options, dtype) for dtype in options.dtypes}
    results = {"machine": machine(), "options": asked, "milliseconds": times}
    if options.json:
        write_text(options.json, json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
