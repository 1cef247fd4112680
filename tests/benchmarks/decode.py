"""How fast the training scripts decode, beside transformers' GPT-2 with its own KV cache.

    python tests/benchmarks/decode.py                                # kqv, kv, gqa, qmqa; some minutes on 2 cores
    python tests/benchmarks/decode.py --variants kv qgqa --rounds 10

Held equal: 4 layers, d 512, 8 heads, n_positions 1024, the vocabulary, a prompt of 384 tokens, 128 new tokens, batch
1, greedy, fp32, eval mode, the process and the threads that torch takes by default. GPT-2 holds the weights of QKV,
and the run ends with an error if the two disagree on a token. Every measurement of a script follows one of GPT-2; a
ratio is that of such a pair, so that what else the machine does falls on both.

    prefill  from the call of generate to the second forward pass: the prompt and the first new token
    decode   the other 127 tokens
    ratio    GPT-2's time over the script's: median of the rounds (lowest to highest), of decode and of the whole call
"""

import argparse
import os
import platform
import sys
import time
from importlib import import_module
from pathlib import Path
from statistics import median

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402

SHAPE = {"n_layer": 4, "n_embd": 512, "n_head": 8, "n_positions": 1024}
PROMPT, NEW = 384, 128
DEFAULT = ["kqv", "kv", "gqa", "qmqa"]
VARIANTS = yaml.safe_load((ROOT / "configs/variants.yaml").read_text(encoding="utf-8"))


def build(alias, vocab_size):
    """A variant's model with the key/value heads of its 300M script."""
    variant = VARIANTS[alias]
    script = import_module(variant["script"]["300M"].removesuffix(".py"))
    groups = variant["groups"] and variant["groups"]["300M"]
    torch.manual_seed(0)
    config = script.ModelConfig(**SHAPE, vocab_size=vocab_size, n_kv_groups=groups, initializer_range=0.2)
    return getattr(script, variant["class"])(config).eval()


def build_gpt2(qkv, **settings):
    """transformers' GPT-2 with the weights of QKV. Without an end token there is nothing to stop at or to mask."""
    shape = {name: getattr(qkv.config, name) for name in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")}
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, activation_function="gelu", bos_token_id=None, eos_token_id=None, **settings)
    )
    transposed = {name for name in qkv.state_dict() if ".c_" in name and name.endswith("weight")}
    weights = {f"transformer.{name}": w.T if name in transposed else w for name, w in qkv.state_dict().items()}
    gpt2.load_state_dict(weights | {"lm_head.weight": qkv.wte.weight})
    return gpt2.eval()


def measure(embedding, generate):
    """Seconds of prefill and of decode, and the tokens; every forward pass begins with the token embedding."""
    starts = []
    hook = embedding.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    called = time.perf_counter()
    tokens = generate()
    returned = time.perf_counter()
    hook.remove()
    assert len(starts) == NEW, f"{len(starts)} forward passes for {NEW} tokens: no cache?"
    return starts[1] - called, returned - starts[1], tokens


def processor():
    """What the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def row(name, times, reference=None):
    """A line of the table: best and median of each figure, and how the pairs compare."""
    prefill, decode = [1000 * p for p, _ in times], [(NEW - 1) / d for _, d in times]
    cells = f"{name:14}{min(prefill):8.1f}{median(prefill):8.1f}{max(decode):10.1f}{median(decode):8.1f}"
    if reference:
        pairs = list(zip(reference, times, strict=True))
        for ratios in ([a[1] / b[1] for a, b in pairs], [sum(a) / sum(b) for a, b in pairs]):
            cells += f"{median(ratios):9.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return cells


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT, metavar="ALIAS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab_size", type=int, default=50304)
    options = parser.parse_args(arguments)

    qkv = build("kqv", options.vocab_size)
    gpt2 = build_gpt2(qkv)
    models = {alias: qkv if alias == "kqv" else build(alias, options.vocab_size) for alias in options.variants}
    prompt = torch.randint(options.vocab_size, (1, PROMPT))
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "use_cache": True}
    times, references = {alias: [] for alias in models}, {alias: [] for alias in models}
    for turn in range(options.rounds + 1):
        for alias, model in models.items():
            *theirs, expected = measure(gpt2.transformer.wte, lambda: gpt2.generate(prompt, **settings))
            *ours, tokens = measure(model.wte, lambda model=model: model.generate(prompt, NEW, temperature=0))
            if alias == "kqv":
                assert torch.equal(tokens, expected), "QKV and transformers' GPT-2 disagree on a token"
            if turn:  # the first is for warming up
                times[alias].append(ours)
                references[alias].append(theirs)

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}")
    print(f"\n{'':14}{'prefill, ms':>16}{'decode, tokens/s':>18}{'ratio of decode':>20}{'of the whole call':>23}")
    print(f"{'':14}{'best':>8}{'median':>8}{'best':>10}{'median':>8}")
    print(row("transformers", [pair for pairs in references.values() for pair in pairs]))
    for alias in models:
        print(row(alias, times[alias], references[alias]))


if __name__ == "__main__":
    main()
