"""What the tools share: errors in one line, atomic files, tokenizers, and what is known of a checkpoint.

The training scripts import nothing from here, and this file nothing but those that it is asked for.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain, pairwise
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import numpy as np
import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
VARIANTS = yaml.safe_load((ROOT / "configs/variants.yaml").read_text(encoding="utf-8"))
SIZES = ("300M", "1.2B")

# -----------------------------------------------------------------------------
# Errors and the command line


class InputError(ValueError):
    """Something the user can put right: an argument, a file, a source that cannot be reached."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose --help begins with a script's docstring."""

    def __init__(self, script: str, description: str, **settings):
        layout = argparse.RawDescriptionHelpFormatter
        name = Path(script).name
        super().__init__(prog=name, description=description, formatter_class=layout, **settings)

    def error(self, message: object) -> NoReturn:
        """Print one line and exit with status 2; argparse would print the usage before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def show_what_the_terminal_can() -> None:
    """Print a ? for what it cannot encode, such as the dash of Q–K=V, and do not end with nothing printed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def warn(text: str) -> None:
    tqdm.write(f"WARNING: {text}", file=sys.stderr)


def report(*lines: str) -> None:
    """Print what was done. By then it is done, so that output which nobody reads is worth a warning and no more."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again at its end
        with suppress(OSError):
            warn(f"the report could not be printed: {error}")


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# -----------------------------------------------------------------------------
# Files


def write_atomically(path: Path, write: Callable) -> str:
    """Let `write` fill a temporary file, then give it its name. Returns the SHA-256 of the content."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def write_text(path: Path, text: str) -> str:
    """As write_atomically, for a text in UTF-8."""
    return write_atomically(path, lambda file: file.write(text.encode()))


# -----------------------------------------------------------------------------
# Variants and checkpoints


def script_of(alias: str) -> ModuleType:
    """The training script of a variant; that of 300M reads checkpoints of both sizes."""
    if alias not in VARIANTS:
        raise InputError(f"--model {alias}: expected one of {', '.join(VARIANTS)}")
    return import_module(VARIANTS[alias]["script"]["300M"].removesuffix(".py"))


def read_checkpoint(alias: str, path: Path | str) -> dict:
    """The contents of a checkpoint, ours or released; InputError if it is damaged or of another variant."""
    script = script_of(alias)
    try:
        return script.read_checkpoint(path)
    except ValueError as error:
        for other, row in VARIANTS.items():
            if row["script"]["300M"] in str(error):
                raise InputError(f"--model {alias}: {path} is a checkpoint of --model {other}") from error
        raise InputError(str(error)) from error


def open_checkpoint(alias: str, path: Path | str) -> tuple:
    """The contents of a checkpoint, ours or released, and the training script's model with its weights.

    ValueError where the alias or the file is not what it should be, or a weight is not finite.
    """
    contents, model = read_checkpoint(alias, path), script_of(alias).load_model(path)
    refuse_what_is_not_finite(model, path)
    return contents, model


def refuse_what_is_not_finite(model, path: Path | str) -> None:
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise InputError(f"{path}: {name} holds values that are not finite; take an earlier checkpoint")


def cache_bytes(alias: str, config) -> tuple[int, int]:
    """Bytes that a token takes in the KV cache in bf16, and what it takes in QKV, K and V of all heads."""
    head_bytes = 2 * config.n_layer * config.n_embd // config.n_head
    heads = config.n_kv_groups or config.n_head
    return len(VARIANTS[alias]["cached"]) * heads * head_bytes, 2 * config.n_head * head_bytes


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a kill cut short is left out."""
    return script_of("kqv").read_metrics(path)


def tokenizer_of(contents: dict, path: Path | str, argument: str | None = None, *folders: str | None) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    `argument` (--tokenizer) comes first, then the ranks beside the token files in `folders` and in the
    training run's own, where their content is the recorded one, then the tokenizer that the checkpoint names, or
    GPT-2's where it names none.
    InputError where none is found, and where the one asked for is not the recorded one.
    """
    recorded = contents.get("tokenizer") or {}  # released checkpoints do not say; ours have {name, sha256}
    if isinstance(recorded, str):  # of older runs
        recorded = {"name": recorded}
    config = contents.get("train_config") or {}
    name = recorded.get("name")

    def fits(tokenizer):
        digest = recorded.get("sha256") or (load_tokenizer(name).sha256 if name == "bytes" else None)
        if digest or name == "gpt2":
            return tokenizer.sha256 == (digest or GPT2_SHA256)
        start = (name or "").partition(" sha256:")[2]  # of the rank file that was named
        return name in (None, tokenizer.name) or bool(start and tokenizer.sha256.startswith(start))

    if argument:
        tokenizer = load_tokenizer(argument)
        if not fits(tokenizer):
            raise InputError(f"--tokenizer {argument}: {path} was trained with another, {name}")
    else:
        stored = (stored_tokenizer(folder) for folder in (*folders, config.get("train_data"), config.get("val_data")))
        tokenizer = next((found for found in stored if found and fits(found)), None)
        if tokenizer is None and name in ("gpt2", "bytes", None):
            tokenizer = load_tokenizer(name or "gpt2")  # the release, which does not record it, knows GPT-2's alone
        if tokenizer is None:
            lost = f"{path}: the tokenizer it was trained with, {name or 'not recorded'}, is not beside its data"
            raise InputError(f"{lost}; pass --tokenizer {CHOICES}")
    vocab_size = contents["model_config"].get("vocab_size", tokenizer.eos_id + 1)
    if tokenizer.eos_id >= vocab_size:
        known = f"has {tokenizer.eos_id + 1} token ids, and {path} knows {vocab_size}"
        raise InputError(f"--tokenizer {tokenizer.name}: {known}")
    return tokenizer


def stored_tokenizer(folder: str | Path | None) -> Tokenizer | None:
    """The tokenizer stored beside token files, under the name that their metadata have for it."""
    ranks = Path(folder or "nowhere") / "tokenizer.tiktoken"
    if not ranks.is_file():
        return None
    metadata = ranks.parent / "metadata.json"
    tokenizer = load_tokenizer(str(ranks))
    if metadata.is_file():
        tokenizer = replace(tokenizer, name=json.loads(metadata.read_text(encoding="utf-8"))["tokenizer"])
    return tokenizer


# -----------------------------------------------------------------------------
# Tokenizers

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of its rank file
CHOICES = "gpt2, bytes, PATH.tiktoken or PATH/tokenizer.json"
MAX_VOCABULARY = 65_535
LONG_TEXT = 500_000
# Where no token of GPT-2 reaches across: before white space, and before the last character of a run of it.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(value): value for value in PRINTED} | {
    chr(0x100 + place): value for place, value in enumerate(sorted(set(range(256)) - set(PRINTED)))
}
CUT = re.compile(f"(?<=[^{SPACE}])[{SPACE}]|(?<=[{SPACE}])[{SPACE}](?=[^{SPACE}])")


@dataclass(frozen=True)
class Tokenizer:
    """Token bytes with their ranks (the token ids), and the function that encodes a batch of documents."""

    name: str
    ranks: dict[bytes, int]
    encode: Callable[[list[str]], list[np.ndarray]]

    @property
    def eos_id(self) -> int:
        return len(self.ranks)

    @property
    def sha256(self) -> str:
        """Of the tokenizer.tiktoken that is stored beside the data."""
        return hashlib.sha256(rank_file(self.ranks)).hexdigest()


def tokenizer_name(argument: str) -> str:
    """The name that metadata keeps. A file is known by its content: paths move, files are replaced."""
    if argument in ("gpt2", "bytes"):
        return argument
    path = Path(argument)
    if path.suffix not in (".tiktoken", ".json") or not path.is_file():
        raise InputError(f"--tokenizer {argument}: no such file, and not {CHOICES}")
    return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def load_tokenizer(argument: str) -> Tokenizer:
    """The tokenizer that --tokenizer names: gpt2, bytes, or a file of ranks under GPT-2's pattern.

    The file is a .tiktoken, or a tokenizer.json that encodes in the same way. Raises InputError for a name that
    is none, ranks that cannot be had, and ranks that are unsound.
    """
    name = tokenizer_name(argument)
    if argument == "bytes":
        return Tokenizer(name, {bytes([value]): value for value in range(256)}, encode_bytes)
    import tiktoken

    if argument == "gpt2":
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise InputError(
                f"the gpt2 ranks are not to be had ({first_line(error)}): set TIKTOKEN_CACHE_DIR to a folder that "
                "holds them, or pass --tokenizer PATH.tiktoken"
            ) from error
        ranks = encoding._mergeable_ranks  # tiktoken has no public name for them
    else:
        path = Path(argument)
        ranks = read_tokenizer_json(path) if path.suffix == ".json" else read_ranks(path)
        # A larger id would wrap around in uint16, and nothing would say so.
        if len(ranks) + 1 > MAX_VOCABULARY:
            raise InputError(f"{path}: a vocabulary of {len(ranks) + 1:,}, and the limit is {MAX_VOCABULARY:,}")
        bytes_missing = any(bytes([value]) not in ranks for value in range(256))
        if bytes_missing or sorted(ranks.values()) != list(range(len(ranks))):
            raise InputError(f"{path}: the ranks must be 0, 1, 2, ... and cover each of the 256 bytes")
        encoding = tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(name, ranks, gpt2_encoder(encoding))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Parse a .tiktoken file. Raises InputError for a broken line."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not base64, a space and a rank") from error
    return ranks


def read_tokenizer_json(path: Path) -> dict[bytes, int]:
    """The ranks of a tokenizer.json whose encoding of every text is theirs under GPT-2's pattern.

    Raises InputError, with the part that does not fit, for every other tokenizer.json.
    """

    def refuse(part: str) -> NoReturn:
        raise InputError(f"--tokenizer {path}: {part}; only byte-level BPE as GPT-2's can be used")

    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        model = contents["model"]
        if model.get("type", "BPE") != "BPE":
            refuse(f"its model is {model['type']}")
        added = {token["content"]: token for token in contents.get("added_tokens") or ()}
        vocabulary = {token: rank for token, rank in model["vocab"].items() if token not in added}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        pairs = [(text_bytes(left), text_bytes(right)) for left, right in merges]
        ranks = {text_bytes(token): rank for token, rank in vocabulary.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--tokenizer {path}: not the tokenizer.json of a byte-level BPE ({error!r})") from error

    for part in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(part):
            refuse(f"its model has {part} {model[part]}")
    split = contents.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers") or [split]
    level = steps[-1]
    regexes = [step.get("pattern", {}).get("Regex") for step in steps[:-1]]
    usual = regexes == ([] if level.get("use_regex", True) else [GPT2_PATTERN])
    if not usual or level.get("type") != "ByteLevel" or level.get("add_prefix_space"):
        refuse(f"its pre_tokenizer is {json.dumps(split)[:200]}")
    for part, harmless in (("normalizer", None), ("post_processor", "ByteLevel")):  # which moves offsets alone
        found = contents.get(part) or {"type": harmless}
        if found.get("type") != harmless and found.get("special_tokens") != {}:  # a template that adds no token
            refuse(f"its {part} is {found.get('type')}")
    if ordinary := [content for content, token in added.items() if not token.get("special")]:
        refuse(f"its added token {ordinary[0]!r} is not a special one")

    # transformers writes a tiktoken tokenizer with every pair that makes a token, by the token's rank
    halves = {(token[:i], token[i:]) for token in ranks for i in range(1, len(token))}
    every_pair = {(left, right) for left, right in halves if left in ranks and right in ranks}
    results = [ranks.get(left + right, -1) for left, right in pairs]
    if set(pairs) != every_pair or results != sorted(results):
        if sorted(ranks.values()) != list(range(256 + len(merges))):
            refuse("its ids are not those of 256 bytes and then of the merges, from 0 on, with special tokens behind")
        for rank, (left, right) in enumerate(pairs, 256):
            # Ranks alone merge as the list does, in every text, where they make each token of the same two.
            if ranks.get(left + right) != rank or merged(left + right, ranks, rank) != [left, right]:
                refuse(f"its merge {rank - 256}, {left!r} with {right!r}, is out of order")

    beside = path.with_name("tokenizer_config.json")
    eos = json.loads(beside.read_text(encoding="utf-8")).get("eos_token") if beside.is_file() else None
    eos = eos["content"] if isinstance(eos, dict) else eos
    if eos not in added:  # the usual name, or the first
        eos = min(added, key=lambda text: (text != "<|endoftext|>", added[text]["id"]), default=None)
    if eos and added[eos]["id"] != len(ranks):
        refuse(f"its {eos} has id {added[eos]['id']}, where the one behind the ranks, {len(ranks)}, ends a text")
    return ranks


def text_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for. Bytes that print stand for themselves, others for U+0100 on."""
    return bytes(BYTE_OF[character] for character in token)


def merged(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """What byte pair encoding makes of a token with the ranks below the limit."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 1:
        found = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        if (lowest := min(found)) >= limit:
            break
        place = found.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def rank_file(ranks: dict[bytes, int]) -> bytes:
    """The content of a .tiktoken file, as read_ranks reads it."""
    by_rank = sorted(ranks, key=ranks.__getitem__)
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(by_rank))


def gpt2_encoder(encoding) -> Callable[[list[str]], list[np.ndarray]]:
    """Encode a batch on all cores, in tasks of 16 documents: threads that meet more often only wait."""
    pool = ThreadPoolExecutor(os.cpu_count())

    def encode_group(texts: list[str]) -> list[np.ndarray]:
        encoded = []
        for text in texts:
            parts = [np.asarray(encoding.encode_ordinary(part), np.uint16) for part in split_long_text(text)]
            encoded.append(np.concatenate(parts))
        return encoded

    def encode(texts: list[str]) -> list[np.ndarray]:
        groups = (texts[start : start + 16] for start in range(0, len(texts), 16))
        return list(chain.from_iterable(pool.map(encode_group, groups)))

    return encode


def split_long_text(text: str) -> list[str]:
    """Parts with the tokens of the whole: a million characters of white space overflow tiktoken's stack."""
    parts = []
    start = 0
    while len(text) - start > LONG_TEXT and (match := CUT.search(text, start + LONG_TEXT)):
        parts.append(text[start : match.start()])
        start = match.start()
    return [*parts, text[start:]]


def encode_bytes(texts: list[str]) -> list[np.ndarray]:
    """The bytes of UTF-8. Surrogate pairs are joined and lone ones become U+FFFD, as in tiktoken."""
    texts = (text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts)
    return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]
