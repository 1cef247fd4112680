"""What the tools share: errors in one line, atomic files, tokenizers, and what is known of a checkpoint.

The training scripts import nothing from here. This file imports nothing from the repository but the training
scripts that it is asked for.

Contents: errors and the command line, files, variants and checkpoints, tokenizers.
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
from itertools import chain
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


def first_line(error: Exception) -> str:
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


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a kill cut short is left out."""
    return script_of("kqv").read_metrics(path)


def tokenizer_of(contents: dict, path: Path | str, argument: str | None = None, *folders: str | None) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    `argument` (--tokenizer) comes first, then the ranks beside the token files in `folders` and in the
    training run's own, where their content is the recorded one, then the tokenizer that the checkpoint names.
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
        return name in (None, tokenizer.name)

    if argument:
        tokenizer = load_tokenizer(argument)
        if not fits(tokenizer):
            raise InputError(f"--tokenizer {argument}: {path} was trained with another, {name}")
    else:
        stored = (stored_tokenizer(folder) for folder in (*folders, config.get("train_data"), config.get("val_data")))
        tokenizer = next((found for found in stored if found and fits(found)), None)
        if tokenizer is None and name in ("gpt2", "bytes"):
            tokenizer = load_tokenizer(name)
        if tokenizer is None:
            lost = f"{path}: the tokenizer it was trained with, {name or 'not recorded'}, is not beside its data"
            raise InputError(f"{lost}; pass --tokenizer gpt2, bytes or PATH.tiktoken")
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
MAX_VOCABULARY = 65_535
LONG_TEXT = 500_000
# Where no token of GPT-2 reaches across: before white space, and before the last character of a run of it.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
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
    """The name that metadata keeps. A rank file is known by its content: paths move, files are replaced."""
    if argument in ("gpt2", "bytes"):
        return argument
    path = Path(argument)
    if path.suffix != ".tiktoken" or not path.is_file():
        raise InputError(f"--tokenizer {argument}: neither gpt2, bytes nor an existing .tiktoken file")
    return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def load_tokenizer(argument: str) -> Tokenizer:
    """The tokenizer that --tokenizer names: gpt2, bytes, or a .tiktoken file of ranks under GPT-2's pattern.

    Raises InputError for a name that is none, ranks that cannot be reached, and ranks that are unsound.
    """
    name = tokenizer_name(argument)
    if argument == "bytes":
        return Tokenizer(name, {bytes([value]): value for value in range(256)}, encode_bytes)
    import tiktoken

    if argument == "gpt2":
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise InputError(
                "the gpt2 ranks are out of reach: set TIKTOKEN_CACHE_DIR to a folder that holds them, or "
                f"pass --tokenizer PATH.tiktoken ({first_line(error)})"
            ) from error
        ranks = encoding._mergeable_ranks  # tiktoken has no public name for them
    else:
        ranks = read_ranks(Path(argument))
        encoding = tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(name, ranks, gpt2_encoder(encoding))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Parse a .tiktoken file. Raises InputError for a broken line, missing ranks, or over 65,535 ids."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not base64, a space and a rank") from error
    # A larger id would wrap around in uint16, and nothing would say so.
    if len(ranks) + 1 > MAX_VOCABULARY:
        raise InputError(f"{path}: a vocabulary of {len(ranks) + 1:,}, and the limit is {MAX_VOCABULARY:,}")
    bytes_missing = any(bytes([value]) not in ranks for value in range(256))
    if bytes_missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: the ranks must be 0, 1, 2, ... and cover each of the 256 bytes")
    return ranks


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
    return [np.frombuffer(utf8(text), np.uint8).astype(np.uint16) for text in texts]


def utf8(text: str) -> bytes:
    """UTF-8 of a document. Surrogate pairs are joined and lone ones become U+FFFD, as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
