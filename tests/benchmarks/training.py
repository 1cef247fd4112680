"""Training steps at the true 300M shape: a training script beside the released design and transformers' GPT-2.

    python tests/benchmarks/training.py                     # half an hour on 2 cores; 24 GB of memory
    python tests/benchmarks/training.py --rounds 3 --precision fp32 --layers 4 --output steps.json
    python tests/benchmarks/training.py --scripts DIR       # another checkout's script, in turn with this one's

Held equal: QKV with 20 layers, d 1024, 16 heads, T 1024, one row a step, vocabulary 50,304, dropout 0.1, the initial
weights, AdamW with one group of parameters, gradients clipped at 1, the threads that torch takes by default. A step
is everything from the token ids to the zeroed gradients.

    script        transformer_KQV_300_M.py from its command line, reading its rows from token files
    other script  the same of another checkout, with --scripts
    released      explicit attention with a mask buffer in each layer, AdamW that is not fused, all logits in fp32
    transformers  GPT2LMHeadModel with its default attention and loss, fused AdamW

Each is a process of its own, and they take their steps in turn, so that what else the machine does falls on all of
them. The run ends with an error if their first losses, without dropout, disagree. A ratio is that of the steps of one
round: median (lowest to highest). Memory is the most that the process held in resident pages.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from decode import CPU, build_gpt2, device_name  # noqa: E402

from analysis_computation_profiler import bf16_is_native  # noqa: E402

KQV = import_module("transformer_KQV_300_M")
T = 1024


class ReleasedAttention(nn.Module):
    """Every score of the square in memory, masked by a buffer that belongs to the layer."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        size = config.n_positions
        self.register_buffer("bias", torch.tril(torch.ones(size, size)).view(1, 1, size, size), persistent=False)

    def forward(self, x, cache=None):
        B, T, d = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(d, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.shape[-1]))
        scores = scores.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, d)))


class ReleasedGPT(KQV.GPT):
    """The script's model, but for its attention and its loss."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.h:
            block.attn = ReleasedAttention(config)

    def forward(self, input_ids, labels):
        logits = F.linear(self.hidden_states(input_ids), self.wte.weight)
        return logits, F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def loss_of(model, ids, precision):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        output = model(ids, labels=ids)
    return output.loss if hasattr(output, "loss") else output[1]


def settings_of(options, folder):
    """Of the 300M configs, cut to one row a step."""
    data = f"{folder}/data"
    settings = {"n_positions": T, "n_layer": options.layers, "train_data": data, "val_data": data}
    settings |= {"sequence": "packed", "seq_length": T, "eval_batches": 1, "micro_batch_size": 1}
    settings |= {"gradient_accumulation": 1, "num_gpus": 1, "log_interval": 1000000, "eval_interval": 1000000}
    return settings | {"precision": options.precision, "warmup_steps": 1}


def configs_of(options, folder):
    kinds = {"model": KQV.ModelConfig, "train": KQV.TrainingConfig}
    files = {kind: ROOT / f"configs/{kind}_config_300M.yaml" for kind in kinds}
    return [KQV.load_config(kinds[kind], files[kind], settings_of(options, folder)) for kind in kinds]


def train_script(checkout, options, folder, connection):
    """The script's own main(), held once a step, where it asks for the learning rate."""
    path = Path(checkout) / "transformer_KQV_300_M.py"
    spec = spec_from_file_location("script_under_test", path)
    script = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(script)
    original, started = script.get_lr, None

    def get_lr(step, config):
        nonlocal started
        if started:
            connection.send((time.perf_counter() - started, peak_memory()))
        if connection.recv() != "step":
            os._exit(0)
        started = time.perf_counter()
        return original(step, config)

    script.get_lr = get_lr
    files = [f"--{kind}_config={ROOT}/configs/{kind}_config_300M.yaml" for kind in ("model", "train")]
    settings = [f"{key}={value}" for key, value in settings_of(options, folder).items()]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        script.main([*files, f"--output_dir={output}/run", *settings])


def build(name, options, folder):
    """A model, and the function that takes a step on the next row."""
    data = f"{folder}/data"
    model_config, config = configs_of(options, folder)
    torch.manual_seed(config.seed)
    reference = KQV.GPT(model_config)
    if name == "released":
        model = ReleasedGPT(model_config)
        model.load_state_dict(reference.state_dict())
    elif name.endswith("script"):
        model = reference
    else:
        model = build_gpt2(reference, resid_pdrop=model_config.dropout, embd_pdrop=0, attn_pdrop=0).train()
    recipe = {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), fused=name != "released", **recipe)
    batches = iter(KQV.get_dataloader(data, 1, T, "packed", config.seed))

    def step():
        loss = loss_of(model, next(batches)[0], options.precision)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step


def peak_memory():
    """Bytes: the most resident memory this process has held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def work(name, options, folder, connection):
    """A contestant: sends its first loss, then takes a step and sends its seconds and memory whenever it is asked."""
    model, step = build(name, options, folder)
    model.eval()
    with torch.no_grad():
        connection.send(float(loss_of(model, torch.arange(T)[None] * 37 % 50257, options.precision)))
    model.train()
    if name.endswith("script"):
        del model, step
        train_script(ROOT if name == "script" else options.scripts, options, folder, connection)
    while connection.recv() == "step":
        started = time.perf_counter()
        step()
        connection.send((time.perf_counter() - started, peak_memory()))


def write_tokens(folder):
    """Token files with a thousand rows of random ids."""
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, 50256, 1000 * T).astype(np.uint16)
    tokens[-1] = 50256  # the end-of-text token
    np.save(folder / "chunk_000.tokens.npy", tokens)
    np.save(folder / "chunk_000.offsets.npy", np.array([0, len(tokens)]))
    np.save(folder / "token_bytes.npy", np.ones(50257, dtype=np.uint16))
    chunk = {"name": "chunk_000", "documents": 1, "tokens": len(tokens) - 1}
    for kind in ("tokens", "offsets"):  # older scripts check them
        chunk[f"{kind}_sha256"] = hashlib.sha256((folder / f"chunk_000.{kind}.npy").read_bytes()).hexdigest()
    metadata = {"chunks": [chunk], "documents": 1, "vocab_size": 50257, "eos_id": 50256, "finished": True}
    metadata["tokenizer"] = "random ids"
    (folder / "metadata.json").write_text(json.dumps(metadata))


def measure(options, folder):
    """Seconds and bytes of every step, [(seconds, bytes), ...] for each contestant; the first round warms up."""
    context, workers = multiprocessing.get_context("spawn"), {}
    contestants = ["released", "transformers", *(["other script"] if options.scripts else []), "script"]
    for name in contestants:
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(name, options, folder, theirs), daemon=True).start()
        theirs.close()  # so that a contestant that dies is an EOFError here
        workers[name] = ours
    losses = {name: connection.recv() for name, connection in workers.items()}
    print("first losses:", ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()), flush=True)
    assert max(losses.values()) - min(losses.values()) < 0.02, "the models disagree"
    steps = {name: [] for name in contestants}
    for turn in range(options.rounds + 1):
        for name, connection in workers.items():
            connection.send("step")
            steps[name].append(connection.recv())
            print(f"round {turn}: {name} {steps[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
    for connection in workers.values():
        connection.send("stop")
    return {name: each[1:] for name, each in steps.items()}


def row(name, steps):
    """A line of the table, whose ratios are those to the released design, transformers and the other script."""
    seconds = [s for s, _ in steps[name]]
    cells = f"{name:14}{min(seconds):9.2f}{median(seconds):11.2f}{T / median(seconds):10.1f}"
    for other in list(steps)[:-1]:
        ratios = [theirs / s for (theirs, _), s in zip(steps[other], seconds, strict=True)]
        cells += f"{median(ratios):7.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    peak = {each: max(memory for _, memory in steps[each]) for each in steps}
    return f"{cells}{peak[name] / 1e9:7.2f}{peak[name] / peak['released']:13.2f}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    native = bf16_is_native(torch.device("cpu"))
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16" if native else "fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--scripts", metavar="DIR", help="a checkout whose script takes turns with this one's")
    parser.add_argument("--output", type=Path, help="write the seconds and bytes of every step to this JSON file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder) / "data")
        steps = measure(options, folder)
    print(f"{device_name(CPU)} of {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{options.precision}{'' if native else ' (this processor has no bf16)'}, {options.layers} layers\n")
    head = f"{'':14}{'best, s':>9}{'median, s':>11}{'tokens/s':>10}"
    head += "".join(f"{'times ' + name:>23}" for name in list(steps)[:-1])
    print(f"{head}{'GB':>7}{'of released':>13}")
    for name in steps:
        print(row(name, steps))
    if options.output:
        machine = {"processor": device_name(CPU), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        machine |= {"torch": torch.__version__, "precision": options.precision, "layers": options.layers}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"machine": machine, "seconds and bytes": steps}, indent=1) + "\n")


if __name__ == "__main__":
    main()
