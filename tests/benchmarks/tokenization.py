"""How fast dataset_download.py turns documents into GPT-2 tokens, beside transformers one document at a time.

    python tests/benchmarks/tokenization.py                # half a minute on 2 cores
    python tests/benchmarks/tokenization.py --rounds 10

Both read the same documents from memory: the help texts of Python's pydoc, cut to the lengths of web pages.
Ours are the batches of dataset_download.py, from text to uint16 arrays with their place in the stream; theirs
is GPT2TokenizerFast.encode in a loop, with the vocabulary and merges of the same ranks. The run ends with an
error if the ids of a document differ. A round measures one after the other, so that whatever else the machine
does slows both; the ratio is the median of the rounds. Needs GPT-2's ranks: --ranks, or GPT2_RANKS=PATH.tiktoken.
"""

import argparse
import os
import random
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import load_tokenizer  # noqa: E402
from dataset_download import encode_rows  # noqa: E402


def documents(count):
    words = " ".join(topics.values()).split(" ")
    chance = random.Random(0)
    lengths = [min(20_000, int(chance.lognormvariate(6, 1))) for _ in range(count)]
    starts = [chance.randrange(len(words)) for _ in range(count)]
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def byte_letters():
    """GPT-2's letter for each byte: itself where it prints, else one of those from U+0100 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (value for value in range(256) if value not in printed)
    return {value: chr(value) for value in printed} | {value: chr(256 + n) for n, value in enumerate(others)}


def merge_of(token, ranks):
    """The two tokens that a token was merged from: what the earlier merges make of its bytes."""
    parts = [bytes([value]) for value in token]
    while len(parts) > 2:
        pairs = (ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False))
        _, at = min((rank, number) for number, rank in enumerate(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def transformers_tokenizer(ranks):
    from transformers import GPT2TokenizerFast

    letters = byte_letters()
    spelt = {token: "".join(letters[value] for value in token) for token in ranks}
    merged = [token for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    merges = [tuple(spelt[part] for part in merge_of(token, ranks)) for token in merged]
    vocabulary = {spelt[token]: rank for token, rank in ranks.items()} | {"<|endoftext|>": len(ranks)}
    tokenizer = GPT2TokenizerFast(vocab=vocabulary, merges=merges)
    assert len(tokenizer) == len(ranks) + 1
    return tokenizer


def timed(function):
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ranks = os.environ.get("GPT2_RANKS", ROOT.parent / "shared/data/gpt2.tiktoken")
    parser.add_argument("--ranks", type=Path, default=ranks)
    parser.add_argument("--documents", type=int, default=2_048)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not args.ranks.exists():
        print(f"tokenization: skipped, no GPT-2 ranks at {args.ranks}")
        return
    texts = documents(args.documents)
    ours = load_tokenizer(str(args.ranks))
    theirs = transformers_tokenizer(ours.ranks)
    theirs.model_max_length = sys.maxsize  # no warning about long documents

    class Rows(list):
        def place(self):
            return None

    rounds = []
    for _ in range(args.rounds):
        expected, slow = timed(lambda: [theirs.encode(text) for text in texts])
        found, fast = timed(lambda: [ids for ids, _ in encode_rows(Rows(texts), ours, 0)])
        assert all(ids.tolist() == other for ids, other in zip(found, expected, strict=True))
        rounds.append(SimpleNamespace(slow=len(texts) / slow, fast=len(texts) / fast, ratio=slow / fast))
    size = sum(len(text) for text in texts) / 1e6
    corpus = f"{len(texts):,} documents, {size:.1f} million characters"
    print(f"{corpus}, {args.rounds} rounds, {os.cpu_count()} cores")
    for name, key in (("transformers, one by one", "slow"), ("dataset_download.py", "fast")):
        print(f"{name:25} {median(getattr(r, key) for r in rounds):8,.0f} documents a second")
    ratios = sorted(r.ratio for r in rounds)
    print(f"{'ratio':25} {median(ratios):8.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
