"""Training with two ranks beside one process, by the demo's model on random tokens.

    python tests/benchmarks/ranks.py                                        # 10 minutes on two idle cores
    python tests/benchmarks/ranks.py --output results/training/ranks.json   # with the raw figures

Held equal: the script, the model and the settings of `make demo`, the tokens of a step, one thread a process.
A rank has one micro batch a step or six, a process alone twice as many. The four take turns. A round's figure
is the median of the tokens a second that a run logs for its steps, the first three aside; a ratio is that of
one round. The run ends with an error if two ranks do not follow the losses of one process.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

SCRIPT = ROOT / "transformer_KV_1_300_M.py"
MICRO_BATCHES = (1, 6)  # of a rank, in a step
WARM_UP = 3  # steps


def write_tokens(folder):
    """A split of random bytes, a document of 2,000."""
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, 256, 2001).astype(np.uint16)
    tokens[-1] = 256  # the end-of-text token
    np.save(folder / "chunk_000.tokens.npy", tokens)
    np.save(folder / "chunk_000.offsets.npy", np.array([0, len(tokens)]))
    np.save(folder / "token_bytes.npy", np.ones(257, dtype=np.uint16))
    chunk = {"name": "chunk_000", "documents": 1, "tokens": len(tokens) - 1}
    metadata = {"chunks": [chunk], "documents": 1, "vocab_size": 257, "eos_id": 256, "finished": True}
    (folder / "metadata.json").write_text(json.dumps(metadata | {"tokenizer": "random bytes"}))


def train(ranks, micro_batches, steps, folder):
    """A run in a new folder: the tokens a second of its steps, and its losses."""
    settings = [f"train_data={folder / 'data'}", f"val_data={folder / 'data'}", "eval_batches=1", "sample_tokens=0"]
    settings += [f"gradient_accumulation={micro_batches}", f"target_tokens={steps * micro_batches * 2 * 8 * 128}"]
    settings += ["warmup_steps=0", "eval_interval=100000", "save_interval=100000", "log_interval=1"]
    configs = [f"--{kind}_config={ROOT}/configs/{kind}_config_demo.yaml" for kind in ("model", "train")]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = [sys.executable, *launch, SCRIPT, *configs, f"--output_dir={output}", *settings]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        records = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["kind"] == "train"]
    return [r["tokens_per_second"] for r in records[WARM_UP:]], [r["loss"] for r in records]


def processor():
    """Its name, where Linux tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="of a run with one micro batch a rank; of six, a fifth")
    parser.add_argument("--output", type=Path, help="write the raw figures to this JSON file")
    options = parser.parse_args(arguments)
    print(f"{processor()}, {os.cpu_count()} cores, one thread a process, torch {torch.__version__}\n")
    speeds = {(n, ranks): [] for n in MICRO_BATCHES for ranks in (1, 2)}  # the steps of each round
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder) / "data")
        for number in range(options.rounds):
            for n in MICRO_BATCHES:
                losses = {}
                for ranks in (1, 2) if number % 2 == 0 else (2, 1):
                    steps = WARM_UP + max(1, options.steps // (1 if n == 1 else 5))
                    found, losses[ranks] = train(ranks, n, steps, Path(folder))
                    speeds[n, ranks].append(found)
                    print(f"round {number + 1}: {ranks} ranks, {n}: {median(found):,.0f}", file=sys.stderr)
                assert np.allclose(losses[1], losses[2], rtol=1e-4), "two ranks have other losses than one"

    print("micro batches a rank and step; tokens/s of one process, of two ranks; their ratio (lowest to highest)")
    for n in MICRO_BATCHES:
        one, two = ([median(found) for found in speeds[n, ranks]] for ranks in (1, 2))
        ratios = [b / a for a, b in zip(one, two, strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{n:2}  {median(one):9,.0f}  {median(two):9,.0f}  {spread}")
    if options.output:
        versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
        machine = {"processor": processor(), "cores": os.cpu_count(), "threads_a_process": 1} | versions
        runs = [{"micro_batches": n, "ranks": r, "tokens_per_second": s} for (n, r), s in speeds.items()]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
