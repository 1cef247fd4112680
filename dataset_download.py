"""Text source -> token files: a corpus is tokenised once, and training reads nothing but uint16 arrays.

    python dataset_download.py                              # the paper's data: SlimPajama, 10B tokens
    python dataset_download.py --source HuggingFaceFW/fineweb-edu --config sample-10BT --output_dir fineweb
    python dataset_download.py --source my_texts --target_tokens 4e6 --validation_tokens 1e5
    python dataset_download.py --source stdlib --tokenizer bytes --validation_tokens 2e5 --output_dir demo
    python dataset_download.py --source site-packages --split_paragraphs --tokenizer bytes --output_dir code

Under <output_dir>/train and <output_dir>/validation:
    chunk_NNN.tokens.npy    uint16 [tokens + documents], an end-of-text token after each document
    chunk_NNN.offsets.npy   int64 [documents + 1], where each document starts; the last entry is the
                            chunk's length
    token_bytes.npy         uint16 [vocab_size], the bytes of each token id, 0 for the end-of-text id
    tokenizer.tiktoken      the tokenizer's ranks, one per line: base64 of the bytes, a space, the rank
    metadata.json           where the text came from, totals, SHA-256 of each file, finished or not;
                            its token counts leave out the end-of-text tokens

The same command resumes an interrupted run after its last complete chunk, and ends with the same files as
if it had never stopped. --verify reads finished files again and says what is wrong with them.

Contents: tokenizers, local sources, hub sources, chunks, the output folder, preparing, verifying and
reporting, command line.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from common import (
    CHOICES,
    InputError,
    Parser,
    Tokenizer,
    file_error,
    first_line,
    load_tokenizer,
    rank_file,
    tokenizer_name,
    warn,
    write_atomically,
    write_text,
)

SPLITS = ("validation", "train")
ROW_TOKENS = 2_048  # the paper's protocol: one document per row, truncated or padded to this length
MAX_SKIPPED = 0.01  # of the rows of a split, or of 1,000 while it has had fewer


# ----------------------------------------------------------------------------------------------------------
# Sources: what they are called, and local ones

PARTS = {  # the words by which the hub, too, tells the parts of a data set apart
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
PART = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(PARTS)})(?=[-._ 0-9]|$)")
NO_TEXT = re.compile(r"(readme|licen[cs]e|copying|citation)\b.*\.(txt|md|rst)")
PAPER_SOURCES = ["cerebras/SlimPajama-627B", "gmongaras/SlimPajama-627B_Reupload"]
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
INSTALLED = ("stdlib", "site-packages")  # Python code that comes with the running interpreter
# pydoc_data is one generated string, long enough to be most of a small validation split.
INSTALLED_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
COMPRESSIONS = {".jsonl.zst": "zstd", ".jsonl.gz": "gzip", ".json.gz": "gzip"}
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", *COMPRESSIONS, ".parquet")
BYTE_ORDER_MARK = "\ufeff"  # some editors begin a file with it


@dataclass(frozen=True)
class Source:
    """Texts in an order that never changes: read(part, place) yields them from a place in the stream on.

    Where there is no `validation`, a part of the source, the first documents of train are taken for it.
    """

    name: str
    revision: str | None
    read: Callable[[str, dict | None], LocalRows | HubRows]
    validation: str | None = None
    files: tuple[Path, ...] = ()
    fallback_for: str | None = None


def source_names(args: argparse.Namespace) -> list[str]:
    """What metadata calls the source: the names to try, best first. A configuration follows a colon."""
    source = args.source
    if source is None:
        names = PAPER_SOURCES
    elif HUB_NAME.fullmatch(source) and not source.lower().endswith(SUFFIXES) and not Path(source).exists():
        names = [source]
    else:
        is_folder = source not in INSTALLED and Path(source).is_dir()
        options = ("revision",) if is_folder else ("config", "split", "revision")
        for option in options:
            if value := getattr(args, option):
                raise InputError(f"--{option} {value}: --source {source} has none")
        names = [source if source in INSTALLED else str(Path(source).resolve())]
    if args.split_paragraphs and is_hub_source(names[0]):
        raise InputError(f"--split_paragraphs: {names[0]} is on the hub, and this needs a local source")
    return [f"{name}:{args.config}" if args.config else name for name in names]


def is_hub_source(name: str) -> bool:
    return name not in INSTALLED and not Path(name).is_absolute()


def open_source(names: list[str], revision: str | None, train_split: str, args: argparse.Namespace) -> Source:
    """Open the first name that resolves. `revision` pins a hub dataset; None takes the newest."""
    name = names[0]
    if is_hub_source(name):
        return open_hub_source(names, revision, train_split, args.text_column)
    if name in INSTALLED:
        files, revision = installed_files(name)
        parts = {"train": files}
    else:
        parts = corpus_parts(Path(args.source).resolve(), args.config)
    if train_split not in parts:
        raise InputError(f"--split {train_split}: {name} has {', '.join(parts)}; --split names one to train on")
    validation = validation_part(parts, train_split)
    if Path(args.source).is_dir():
        for part, files in parts.items():
            use = {train_split: "for training", validation: "for validation"}.get(part, "left untouched")
            print(f"{name}: {part}, {len(files):,} files from {files[0]} on: {use}", file=sys.stderr)

    def read_texts(path: Path) -> Iterator[str | NoText]:
        return read_file(path, args.text_column)

    @cache  # held in memory as a single file; where validation is of train, it is read once for both
    def paragraphs(part: str) -> list[str]:
        return distinct_paragraphs(name, parts[part], args)

    def read(part: str, place: dict | None) -> LocalRows:
        if args.split_paragraphs:
            return LocalRows([paragraphs(part)], iter, place)
        return LocalRows(parts[part], read_texts, place)

    used = [parts[train_split], parts[validation] if validation else []]
    return Source(name, revision, read, validation, tuple(chain.from_iterable(used)))


def validation_part(parts: Iterable[str], train: str) -> str | None:
    """The part that is for validation, under whichever of its names."""
    names = [name for name, kind in PARTS.items() if kind == "validation"]
    return next((name for name in names if name in parts and name != train), None)


def installed_files(name: str) -> tuple[list[Path], str]:
    """The .py files of the standard library or of the installed packages, and what tells them from others.

    They come in a fixed order that mixes the packages: validation is the first files, and by name those
    would be one package. Tests, hidden files and files that are not UTF-8 are left out.
    """
    paths = sysconfig.get_paths()
    folders = [paths["stdlib"]] if name == "stdlib" else [paths["purelib"], paths["platlib"]]
    found = {}
    for root in {Path(folder).resolve() for folder in folders}:
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            hidden = any(part.startswith(".") for part in relative.parts)
            if not hidden and INSTALLED_SKIPPED.isdisjoint(relative.parts):
                found[hashlib.sha256(relative.as_posix().encode()).digest()] = path

    files = []
    contents = hashlib.sha256()
    for name_hash, path in sorted(found.items()):
        content = path.read_bytes()
        if "\ufffd" not in content.decode(errors="replace"):
            files.append(path)
            contents.update(name_hash + hashlib.sha256(content).digest())
    revision = platform.python_version() if name == "stdlib" else f"sha256:{contents.hexdigest()[:16]}"
    return files, revision


def corpus_parts(source: Path, config: str | None) -> dict[str, list[Path]]:
    """The files of a source by the part of the data set that they are, each part sorted.

    A folder's README.md may list them, as on the hub; else folders and files called train, validation or test
    are such parts. Where nothing is called train, it is what has no such name.
    """
    known = ", ".join(SUFFIXES)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if not source.is_dir():
        if not source.name.lower().endswith(SUFFIXES):
            raise InputError(f"{source}: unknown kind of file, not {known}")
        return {"train": [source]}

    files, left_out = [], []
    for path in walk(source):
        name = path.name.lower()
        is_text = name.endswith(SUFFIXES) and not name.startswith(".") and not NO_TEXT.fullmatch(name)
        (files if is_text else left_out).append(path)
    files.sort()
    if not files:
        raise InputError(f"{source}: no {known} file in this folder, cards and licences aside")
    parts = listed_parts(source, files, config)
    if parts is None:
        parts = named_parts(source, files)
    used = set(chain.from_iterable(paths for part, paths in parts.items() if part))
    left_out += [path for path in files if path not in used]
    if left_out:
        warn(f"{source}: {len(left_out):,} other files are left out, {min(left_out)} first")
    return {part: parts[part] for part in sorted(filter(None, parts), key=lambda part: (part != "train", part))}


def walk(source: Path) -> Iterator[Path]:
    """The files below a folder, hidden ones too but not those of hidden folders."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk skips a folder that it may not read

    for folder, folders, names in os.walk(source, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in (*folders, *names)):
            if path.is_symlink() and not path.is_file() and not path.name.startswith("."):
                kind = "a link to a folder, which is not followed" if path.is_dir() else "a link to nothing"
                raise InputError(f"{path}: {kind}: remove it, or replace it with what it should stand for")
        yield from (Path(folder, name) for name in names)


def part_of(path: Path) -> str | None:
    """The part that the folders, from the outermost in, or the name of a file say it is of."""
    *folders, name = path.parts
    suffix = next(suffix for suffix in SUFFIXES if name.lower().endswith(suffix))
    words = [*folders, name[: -len(suffix)]]
    if suffix == ".py":
        words = folders[:1]  # code has modules called test and training of its own
    found = (PART.search(word.lower()) for word in words)
    return next((PARTS[match[1]] for match in found if match), None)


def listed_parts(source: Path, files: list[Path], config: str | None) -> dict[str, list[Path]] | None:
    """The parts that the head of a folder's README.md lists, under `configs`; None where it lists none."""
    card = source / "README.md"
    head = re.match(r"---\s*\n(.*?)\n---", card.read_text("utf-8-sig"), re.DOTALL) if card.is_file() else None
    try:
        listed = (yaml.safe_load(head[1]) or {}).get("configs") if head else None
        choices = {entry["config_name"]: entry for entry in listed or () if entry.keys() & {"data_files", "data_dir"}}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{card}: its head cannot be read ({first_line(error)})") from error
    if config not in (None, *choices):
        raise InputError(f"--config {config}: not among those that {card} lists ({', '.join(choices) or 'none'})")
    if not choices:
        return None
    default = [name for name, entry in choices.items() if entry.get("default") or name == "default"]
    if config is None and len(choices) > 1 and not default:
        raise InputError(f"{card} lists several configurations: choose one, --config {', '.join(choices)}")
    entry = choices[config or (default or list(choices))[0]]
    base = source / (entry.get("data_dir") or "")
    if "data_files" not in entry:
        return named_parts(base, [path for path in files if path.is_relative_to(base)])

    from datasets.data_files import resolve_pattern, sanitize_patterns

    try:
        listed = sanitize_patterns(entry["data_files"])
    except ValueError as error:
        raise InputError(f"{card}: data_files cannot be read ({first_line(error)})") from error
    parts = {}
    for part, patterns in listed.items():
        matching = set()
        for pattern in patterns:
            with contextlib.suppress(FileNotFoundError):  # said below
                matching.update(map(Path, resolve_pattern(pattern, str(base))))
        if found := [path for path in files if path in matching]:
            parts[part] = found
        else:
            warn(f"{card} lists {', '.join(patterns)} for {part}, and no such file of a known kind is here")
    return parts


def named_parts(folder: Path, files: list[Path]) -> dict[str | None, list[Path]]:
    """Files by the part that their names are of; None for those that are of no part."""
    parts = {}
    for path in files:
        parts.setdefault(part_of(path.relative_to(folder)), []).append(path)
    if "train" not in parts and None in parts:
        parts["train"] = parts.pop(None)
    return parts


class LocalRows:
    """The texts of files, one file after the other."""

    def __init__(self, files: list, read_texts: Callable, place: dict | None):
        self.files = files
        self.read_texts = read_texts
        self.file, self.row = (place["file"], place["row"]) if place else (0, 0)

    def place(self) -> dict:
        return {"file": self.file, "row": self.row}

    def __iter__(self) -> Iterator[str | NoText]:
        for file in self.files[self.file :]:
            for text in islice(self.read_texts(file), self.row, None):
                self.row += 1
                yield text
            self.file += 1
            self.row = 0


def distinct_paragraphs(source: str, files: list[Path], args: argparse.Namespace) -> list[str]:
    """Every paragraph of the files once, in a random order that is always the same.

    A paragraph is what stands between blank lines. The whole corpus is held in memory.
    """
    found = set()
    seen = Seen(source, args.text_column, args.skip_rows_without_text)
    for text in chain.from_iterable(read_file(path, args.text_column) for path in files):
        seen.count(text)
        if isinstance(text, str):
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            found.update(part.strip("\n") for part in text.split("\n\n"))
    found.discard("")
    if seen.skipped:
        warn(f"{seen.skipped:,} rows without text under '{args.text_column}' were skipped")
    return random.Random(0).sample(sorted(found), len(found))


@dataclass(frozen=True)
class NoText:
    """In the place of a row's text: what was found there, and the columns that the row has."""

    found: str
    columns: tuple[str, ...]


@dataclass
class Seen:
    """Counts rows. InputError where more than one in a hundred, or than ten at first, have no text."""

    source: str
    column: str
    skip_rows: bool
    rows: int = 0
    skipped: int = 0
    found: Counter = field(default_factory=Counter)  # of this run

    def count(self, text: str | NoText | np.ndarray) -> None:
        self.rows += 1
        if not isinstance(text, NoText):
            return
        self.skipped += 1
        self.found[text.found] += 1
        if self.skipped > MAX_SKIPPED * max(self.rows, 1_000) and not self.skip_rows:
            raise InputError(
                f"{self.source}: {self.skipped:,} of the first {self.rows:,} rows have no text under '{self.column}' "
                f"({self.reasons()}): leave such rows out with --skip_rows_without_text, or choose among the columns "
                f"of the last one with --text_column ({', '.join(text.columns)})"
            )

    def reasons(self) -> str:
        return ", ".join(f"{kind} in {count:,}" for kind, count in self.found.most_common())


def read_file(path: Path, column: str) -> Iterator[str | NoText]:
    """Yield the documents of a file: its whole text, or the text column of each row."""
    name = path.name.lower()
    packed = next((kind for suffix, kind in COMPRESSIONS.items() if name.endswith(suffix)), None)
    try:
        if name.endswith(".parquet"):
            yield from read_parquet(path, column)
        elif packed:
            # pyarrow, because zstandard's reader takes a truncated file for a complete one
            import pyarrow

            with pyarrow.input_stream(str(path), compression=packed) as stream:
                yield from read_json_lines(path, io.BufferedReader(stream), column)
        elif name.endswith(".jsonl"):
            with path.open("rb") as lines:
                yield from read_json_lines(path, lines, column)
        else:
            yield path.read_bytes().decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 at byte {error.start:,}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error


def read_json_lines(path: Path, lines: Iterable[bytes], column: str) -> Iterator[str | NoText]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)  # which drops a byte order mark
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not valid JSON ({first_line(error)})") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not a JSON object")
            yield text_of(row, column)


def read_parquet(path: Path, column: str) -> Iterator[str | NoText]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise InputError(f"{path}: no '{column}' among {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from (text_of(row, column) for row in batch.to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def text_of(row: dict, column: str) -> str | NoText:
    text = row.get(column)
    if isinstance(text, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            text = text.decode()
    if isinstance(text, str):
        return text
    found = "bytes that are not UTF-8" if isinstance(text, bytes) else f"a value of type {type(text).__name__}"
    if text is None:
        found = "null" if column in row else "no such column"
    return NoText(found, tuple(row))


# ----------------------------------------------------------------------------------------------------------
# Hub sources

ALTERNATIVES = """data to use instead:
    python dataset_download.py --source MBZUAI-LLM/SlimPajama-627B-DC
    python dataset_download.py --source DKYoon/SlimPajama-6B --target_tokens 5e9
    python dataset_download.py --source HuggingFaceFW/fineweb-edu --config sample-10BT"""
RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 64)


def open_hub_source(names: list[str], revision: str | None, train_split: str, column: str) -> Source:
    """The first name that resolves. Raises InputError with every reason and what to do."""
    reasons = []
    for name in names:
        try:
            source = open_hub_dataset(name, revision, train_split, column)
        except InputError:  # it resolves, and has no such split
            raise
        except (*network_errors(), *data_errors()) as error:
            if file_error(error):  # another source would meet it too
                raise hub_error(name, error) from error
            reasons.append(f"{name} does not resolve ({first_line(error)})")
            continue
        if not reasons:
            return source
        warn(f"{reasons[0]}: using {name}, the same data, instead")
        return replace(source, fallback_for=names[0])
    hint = ALTERNATIVES if names == PAPER_SOURCES else "nor is it a file or folder here"
    raise InputError(f"{'; '.join(reasons)}; {hint}")


def open_hub_dataset(name: str, revision: str | None, train_split: str, column: str) -> Source:
    import datasets

    repository, _, config = name.partition(":")
    builder = datasets.load_dataset_builder(repository, config or None, revision=revision)
    streams = builder.as_streaming_dataset()
    if train_split not in streams:
        raise InputError(f"--split {train_split}: {name} has the splits {', '.join(streams)}")
    # Where each begins has to be asked before the first row is read.
    starts = {split: stream.state_dict() for split, stream in streams.items()}

    def read(split: str, place: dict | None) -> HubRows:
        return HubRows(f"{name}, split {split}", streams[split], column, place or starts[split])

    # The commit is recorded: a restart reads the same rows although the dataset was changed meanwhile.
    return Source(name, builder.hash, read, validation_part(streams, train_split))


class HubRows:
    """The texts of a hub split. After a lost connection it continues where it was."""

    def __init__(self, name: str, stream, column: str, start: dict):
        self.name = name
        self.stream = stream
        self.column = column
        self.start = start
        self.rows_since_start = 0

    def place(self) -> dict:
        """Where the stream is: the file and the row in it, so that earlier files are not fetched again."""
        if self.rows_since_start:
            self.start = self.stream.state_dict()
            self.rows_since_start = 0
        return self.start

    def __iter__(self) -> Iterator[str | NoText]:
        waits = iter(RETRY_SECONDS)
        while True:
            self.stream.load_state_dict(self.start)
            try:
                for row in islice(self.stream, self.rows_since_start, None):
                    self.rows_since_start += 1
                    waits = iter(RETRY_SECONDS)
                    yield text_of(row, self.column)
                return
            except network_errors() as error:
                if not try_again(self.name, error, waits):
                    raise hub_error(self.name, error) from error
            except data_errors() as error:
                raise InputError(f"{self.name}: a file of it cannot be read ({first_line(error)})") from error


def hub_error(name: str, error: Exception) -> InputError:
    """What to do about an error: of this machine's files, of the connection, or of the data."""
    again = "complete chunks stay: run the same command again"
    if local := file_error(error):
        return InputError(f"{name}: {local}, on this machine (HF_HOME is the folder of the cache); {again}")
    if is_transient(error) or isinstance(error, ConnectionError):
        return InputError(f"{name} is out of reach ({first_line(error)}): check the connection; {again}")
    opened = "is it there, and open to you (`hf auth login`)?"
    return InputError(f"{name} cannot be read ({first_line(error)}): {opened} {again.capitalize()}")


def try_again(name: str, error: Exception, waits: Iterator[int]) -> bool:
    """Wait after an error that may pass. False where waiting is no use, or has been none so far."""
    seconds = next(waits, None) if is_transient(error) else None
    if seconds is not None:
        warn(f"{name}: the connection is lost ({first_line(error)}): trying again in {seconds} s")
        time.sleep(seconds)
    return seconds is not None


def network_errors() -> tuple[type[Exception], ...]:
    import aiohttp

    # under whichever of its names the HTTP library is installed
    from huggingface_hub.errors import HTTPError

    return OSError, HTTPError, aiohttp.ClientError


def data_errors() -> tuple[type[Exception], ...]:
    """ValueError: no such configuration, or not JSON. RuntimeError: the dataset needs a loading script."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    return ValueError, RuntimeError, DatasetsError, pyarrow.ArrowException


def is_transient(error: Exception) -> bool:
    """Whether to try again: not where the answer of the server, or of the library, would stay the same."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    # The status is with the error, with its response, or with what it was raised from.
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        status = getattr(response, "status_code", None) or getattr(link, "status", None)
        if isinstance(status, int):
            return status >= 500 or status in (408, 429)
    return not (HF_HUB_OFFLINE or isinstance(error, FileNotFoundError) or file_error(error))


# ----------------------------------------------------------------------------------------------------------
# Chunks: from texts to arrays

BATCH_DOCUMENTS = 1_024
BATCH_CHARACTERS = 4_000_000


@dataclass
class Chunk:
    """Documents on their way to a file, the rows skipped between them, and where to resume after them.

    `text_tokens` counts the tokens without the end-of-text token after each document.
    """

    tokens: array = field(default_factory=lambda: array("H"))  # 2 bytes each
    offsets: array = field(default_factory=lambda: array("q", [0]))  # 8 bytes each
    text_tokens: int = 0
    skipped: int = 0
    resume: dict | None = None


def encode_rows(rows: LocalRows | HubRows, tokenizer: Tokenizer, skip: int) -> Iterator[tuple]:
    """Yield, for each row after the first `skip`, its tokens (uint16) or NoText, and where to resume."""
    texts = iter(rows)
    if sum(1 for _ in islice(texts, skip)) < skip:
        raise InputError("the source has changed: it no longer holds the rows that were read before")
    while True:
        place = rows.place()
        batch = next_batch(texts)
        if not batch:
            return
        tokens = iter(tokenizer.encode([text for text in batch if isinstance(text, str)]))
        for number, text in enumerate(batch, 1):
            yield next(tokens) if isinstance(text, str) else text, {"place": place, "skip": number}


def next_batch(texts: Iterator[str | NoText]) -> list[str | NoText]:
    batch = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text) if isinstance(text, str) else 0
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            break
    return batch


def split_chunks(
    encoded: Iterator[tuple], metadata: Metadata, skip_rows: bool, leave_some: bool, progress: Callable
) -> Iterator[Chunk]:
    """Yield chunks from where metadata stands to the document that reaches the target, or to the last one.

    The last chunk has no document where only rows without text are left. Raises InputError before it for a
    split without any token and, with `leave_some`, for one that leaves nothing for training.
    """
    source, column = metadata.source, metadata.text_column
    total, target = metadata.tokens, metadata.target_tokens
    skipped = metadata.skipped_documents
    seen = Seen(source, column, skip_rows, metadata.documents + skipped, skipped)
    chunk = Chunk()
    while total < target and (row := next(encoded, None)):
        ids, chunk.resume = row
        seen.count(ids)
        if isinstance(ids, NoText):
            chunk.skipped += 1
            continue
        chunk.tokens.frombytes(ids.tobytes())
        chunk.tokens.append(metadata.eos_id)
        chunk.offsets.append(len(chunk.tokens))
        chunk.text_tokens += len(ids)
        total += len(ids)
        progress(len(ids))
        if chunk.text_tokens >= metadata.chunk_tokens and total < target:
            yield chunk
            chunk = Chunk()
    if total == 0:
        why = f"all of its {seen.rows:,} documents are empty"
        if seen.skipped:
            why = f"{seen.skipped:,} of {seen.rows:,} rows have none under '{column}' ({seen.reasons()})"
        raise InputError(f"{source} has no text for the {metadata.split} split: {why}")
    if leave_some and not any(isinstance(ids, np.ndarray) and len(ids) for ids, _ in encoded):
        raise InputError(
            f"nothing is left for training: validation takes all {total:,} tokens of {source}, in whole documents: "
            "make documents of its paragraphs, --split_paragraphs, or take no validation, --validation_tokens 0"
        )
    yield chunk


# ----------------------------------------------------------------------------------------------------------
# The output folder: its files, and what an earlier run left in it

TOTALS = ("documents", "tokens", "bytes", "skipped_documents")
REMEDY = "delete it and run the command that prepared it, which makes it and the chunks after it again"


class ChunkEntry(BaseModel):
    name: str
    documents: int
    tokens: int
    bytes: int
    skipped_documents: int
    tokens_sha256: str
    offsets_sha256: str


class Metadata(BaseModel):
    """The contents of metadata.json. `tokens` are those of the text, without the end-of-text tokens."""

    source: str
    fallback_for: str | None  # the name that did not resolve, where another was used instead
    requested_revision: str | None
    revision: str | None  # commit of a hub dataset, Python's version, hash of the installed packages
    train_split: str
    text_column: str
    split_paragraphs: bool = False
    validation_from_train: bool
    requested_from_train: bool | None = None  # --validation_from_train, for a hub source
    split: str
    tokenizer: str
    tokenizer_sha256: dict[str, str]
    vocab_size: int
    eos_id: int
    target_tokens: int
    chunk_tokens: int
    documents: int
    tokens: int
    bytes: int
    skipped_documents: int
    finished: bool
    chunks: list[ChunkEntry]
    resume: dict | None = None  # while unfinished: a place in the source, and the rows to skip from there


def write_array(path: Path, values: np.ndarray) -> str:
    return write_atomically(path, lambda file: np.save(file, values))


def read_metadata(folder: Path) -> Metadata | None:
    """The metadata of a split, None where there are none. Raises InputError for any other content."""
    path = folder / "metadata.json"
    if not path.exists():
        return None
    try:
        return Metadata.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{key}: " for key in first["loc"])
        raise InputError(
            f"{path}: not what this script writes ({where}{first['msg']}): choose another --output_dir, or "
            "delete what is prepared in this one and start over"
        ) from error


def write_metadata(folder: Path, metadata: Metadata) -> None:
    absent = {key for key in ("resume", "requested_from_train") if getattr(metadata, key) is None}
    write_text(folder / "metadata.json", metadata.model_dump_json(indent=2, exclude=absent) + "\n")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, metadata: Metadata) -> np.ndarray:
    """Write what bits per byte and decoding need. Returns the bytes of each id, uint16 [vocab_size]."""
    lines = rank_file(tokenizer.ranks)
    token_bytes = np.zeros(tokenizer.eos_id + 1, np.uint16)  # 0 for the end-of-text id
    for token, rank in tokenizer.ranks.items():
        token_bytes[rank] = len(token)
    metadata.tokenizer_sha256 = {
        "tokenizer.tiktoken": write_atomically(folder / "tokenizer.tiktoken", lambda file: file.write(lines)),
        "token_bytes.npy": write_array(folder / "token_bytes.npy", token_bytes),
    }
    return token_bytes


def write_chunk(folder: Path, name: str, chunk: Chunk, token_bytes: np.ndarray) -> ChunkEntry:
    """Write the two files of a chunk. Returns its entry in metadata."""
    tokens = np.asarray(chunk.tokens, np.uint16)
    offsets = np.asarray(chunk.offsets, np.int64)
    return ChunkEntry(
        name=name,
        documents=len(offsets) - 1,
        tokens=chunk.text_tokens,
        bytes=int(token_bytes[tokens].sum()),
        skipped_documents=chunk.skipped,
        tokens_sha256=write_array(folder / f"{name}.tokens.npy", tokens),
        offsets_sha256=write_array(folder / f"{name}.offsets.npy", offsets),
    )


def chunk_files(folder: Path, entry: ChunkEntry) -> dict[str, Path]:
    return {kind: folder / f"{entry.name}.{kind}.npy" for kind in ("tokens", "offsets")}


def refuse_other_arguments(output: Path, recorded: dict, asked: dict, targets: dict[str, int]) -> None:
    """InputError, with both values, where the output folder was prepared with other arguments."""
    if recorded["train"] and targets["validation"] and not recorded["validation"]:
        # Its documents may be among those of train.
        raise InputError(
            f"{output / 'validation'} is missing, and cannot be made beside the train that is there: choose "
            f"another --output_dir, or delete what is prepared in {output}"
        )
    for split, metadata in recorded.items():
        for key, value in {**asked, "target_tokens": targets[split]}.items():
            unknown = key == "requested_from_train" and metadata and metadata.requested_from_train is None
            if metadata and not unknown and getattr(metadata, key) != value:
                raise InputError(
                    f"{output / split} was prepared with {key} {getattr(metadata, key)}, and this run asks "
                    f"for {value}: choose another --output_dir, or delete what is prepared in {output}"
                )


def cut_back(folder: Path, metadata: Metadata | None) -> Metadata | None:
    """Metadata up to the first missing file: the rest is made again. --verify finds damaged ones."""
    if metadata is None:
        return None
    for number, entry in enumerate(metadata.chunks):
        missing = [path for path in chunk_files(folder, entry).values() if not path.exists()]
        if missing:
            warn(f"{missing[0]} is missing: {len(metadata.chunks) - number} chunks are made again")
            chunks = metadata.chunks[:number]
            totals = {key: sum(getattr(kept, key) for kept in chunks) for key in TOTALS}
            return metadata.model_copy(update={**totals, "chunks": chunks, "finished": False, "resume": None})
    whole = all((folder / name).exists() for name in metadata.tokenizer_sha256)
    return metadata.model_copy(update={"finished": metadata.finished and whole})


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder. The kernel releases the lock however this one ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{folder}: another dataset_download.py is at work in this folder") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        warn(f"{folder}: this file system has no locks ({first_line(error)}): start one process at a time")
    try:
        yield
    finally:
        lock.release()


def check_source_files(output: Path, source: Source, fresh: bool) -> None:
    """Note size and time of every source file at a fresh start; later, InputError for one that changed."""
    path = output / "source_files.json"
    found = {}
    for file in source.files:
        stat = file.stat()
        found[str(file)] = [stat.st_size, stat.st_mtime_ns]
    noted = json.loads(path.read_bytes()) if path.exists() and not fresh else None
    if noted is None:
        write_text(path, json.dumps(found, indent=0))
        return
    changed = [name for name in noted.keys() | found.keys() if noted.get(name) != found.get(name)]
    if changed:
        raise InputError(
            f"{min(changed)} was changed, added or removed since {output} was begun: put it back as it was, "
            "or choose another --output_dir"
        )


def check_disk(output: Path, source: Source, splits: dict[str, Metadata]) -> None:
    """InputError where the disk has no room for what is left to do, at 100 tokens a document and more.

    A token takes 2 bytes; a document 2 for its end-of-text token and 8 for its offset.
    """
    tokens = sum(metadata.target_tokens for metadata in splits.values())
    if source.files and all(path.name.lower().endswith((*TEXT_SUFFIXES, ".jsonl")) for path in source.files):
        # A token is at least a byte of text.
        tokens = min(tokens, sum(path.stat().st_size for path in source.files))
    tokens -= sum(metadata.tokens for metadata in splits.values())
    needed = 2 * tokens + 10 * tokens // 100
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(f"{output}: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free")


# ----------------------------------------------------------------------------------------------------------
# Preparing


def prepare(args: argparse.Namespace) -> None:
    """Write the splits asked for, or what an interrupted run left to do of them, and report."""
    output = Path(args.output_dir)
    targets = {
        "validation": args.validation_from_train or args.validation_tokens,
        "train": args.target_tokens,
    }

    # What is there already has to come from the same arguments, in the same format, and be whole.
    recorded = {split: read_metadata(output / split) for split in SPLITS}
    earlier = recorded["validation"] or recorded["train"]
    names, asked = asked_for(args, earlier)
    refuse_other_arguments(output, recorded, asked, targets)
    splits = {split: cut_back(output / split, recorded[split]) for split in SPLITS if targets[split]}

    if all(metadata and metadata.finished for metadata in splits.values()):
        print("already prepared")
    else:
        tokenizer = load_tokenizer(args.tokenizer)
        revision = earlier.revision if earlier else args.revision
        source = open_source(names, revision, asked["train_split"], args)
        for split, known in splits.items():
            splits[split] = known or new_metadata(args, asked, source, tokenizer, split, targets[split])
        check_disk(output, source, splits)
        with locked(output):
            if recorded != {split: read_metadata(output / split) for split in SPLITS}:
                raise InputError(f"{output}: another process has just written here: run the command again")
            for pattern in ("source_files.json.tmp", "validation/*.tmp", "train/*.tmp"):
                for path in output.glob(pattern):
                    path.unlink()  # what a killed run was writing
            check_source_files(output, source, fresh=not earlier)
            prepare_splits(output, source, tokenizer, splits, args.skip_rows_without_text)
    for split, metadata in splits.items():
        report(output / split, metadata)


def asked_for(args: argparse.Namespace, earlier: Metadata | None) -> tuple[list[str], dict]:
    """The names of sources to try, and what the metadata of an earlier run has to agree with."""
    names = source_names(args)
    if earlier and earlier.source in names:
        names = [earlier.source]  # a restart never changes to another source than resolved before
    asked = {
        "source": names[0],
        "requested_revision": args.revision,
        "train_split": args.split or "train",
        "text_column": args.text_column,
        "split_paragraphs": args.split_paragraphs,
        "tokenizer": tokenizer_name(args.tokenizer),
        "chunk_tokens": args.chunk_tokens,
    }
    if names == ["stdlib"]:
        asked["revision"] = platform.python_version()
    if args.validation_from_train:
        asked["validation_from_train"] = True
    if is_hub_source(names[0]):
        asked["requested_from_train"] = bool(args.validation_from_train)
    return names, asked


def new_metadata(
    args: argparse.Namespace, asked: dict, source: Source, tokenizer: Tokenizer, split: str, target: int
) -> Metadata:
    from_train = not source.validation or bool(args.validation_from_train)
    if split == "validation" and from_train and not source.files and not args.validation_from_train:
        first = f"the first {target:,} tokens of {asked['train_split']}"
        warn(f"{source.name} has no validation split of its own: {first} become one")
    known = {
        **asked,
        "source": source.name,
        "fallback_for": source.fallback_for,
        "revision": source.revision,
        "validation_from_train": from_train,
        "split": split,
        "target_tokens": target,
        "vocab_size": tokenizer.eos_id + 1,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": {},
        **dict.fromkeys(TOTALS, 0),
        "finished": False,
        "chunks": [],
    }
    return Metadata(**known)


def prepare_splits(
    output: Path, source: Source, tokenizer: Tokenizer, splits: dict[str, Metadata], skip_rows: bool
) -> None:
    """Prepare validation, then train, which begins after the rows that were taken for validation."""
    validation = splits.get("validation")
    taken = validation if validation and validation.validation_from_train else None
    for split, metadata in splits.items():
        if metadata.finished:
            continue
        encoded = remaining_rows(source, tokenizer, metadata, taken)
        prepare_split(output / split, metadata, encoded, tokenizer, skip_rows, leave_some=metadata is taken)


def remaining_rows(
    source: Source, tokenizer: Tokenizer, metadata: Metadata, taken: Metadata | None
) -> Iterator[tuple]:
    """The encoded rows of a split after those it has. `taken` is validation, where it is part of train."""
    resume = metadata.resume
    if resume is None:
        before = metadata.documents + metadata.skipped_documents
        if taken and metadata is not taken:
            before += taken.documents + taken.skipped_documents
        resume = {"place": None, "skip": before}
    of_train = metadata.split == "train" or metadata is taken
    name = metadata.train_split if of_train else source.validation
    return encode_rows(source.read(name, resume["place"]), tokenizer, resume["skip"])


def prepare_split(
    folder: Path,
    metadata: Metadata,
    encoded: Iterator[tuple],
    tokenizer: Tokenizer,
    skip_rows: bool,
    leave_some: bool,
) -> None:
    """Write a split. Metadata is written again after each chunk, so that it never names a missing file."""
    split = metadata.split
    target = metadata.target_tokens
    before = metadata.tokens
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    token_bytes = write_tokenizer(folder, tokenizer, metadata)
    # disable=None: no bar where stderr is not a terminal
    with tqdm(desc=split, total=target, initial=before, unit="token", unit_scale=True, disable=None) as bar:
        for chunk in split_chunks(encoded, metadata, skip_rows, leave_some, bar.update):
            if len(chunk.offsets) == 1:
                metadata.skipped_documents += chunk.skipped
                break
            entry = write_chunk(folder, f"chunk_{len(metadata.chunks):03d}", chunk, token_bytes)
            metadata.chunks.append(entry)
            metadata.resume = chunk.resume
            for key in TOTALS:
                setattr(metadata, key, getattr(metadata, key) + getattr(entry, key))
            write_metadata(folder, metadata)
            if bar.disable:
                rate = max(1, metadata.tokens - before) / (time.monotonic() - started)
                left = tqdm.format_interval(max(0, target - metadata.tokens) / rate)
                done = f"{metadata.tokens:,} of {target:,} tokens, {rate:,.0f} tokens a second, {left} left"
                print(f"{split}: {done}", file=sys.stderr, flush=True)
    metadata.resume = None
    metadata.finished = True
    write_metadata(folder, metadata)


# ----------------------------------------------------------------------------------------------------------
# Verifying and reporting


def verify(output: Path) -> int:
    """Read the files of every split again and print what is wrong. Returns the exit status."""
    recorded = {split: read_metadata(output / split) for split in SPLITS}
    if not any(recorded.values()):
        raise InputError(f"{output}: nothing is prepared here")
    status = 0
    for split, metadata in recorded.items():
        if metadata is None and split == "train":
            print(f"{output / split}: not begun: run the command that began {output} again")
            status = 1
        if metadata is None:
            continue
        folder = output / split
        problems = list(find_problems(folder, metadata))
        for problem in problems:
            print(problem)
            status = 1
        if not problems:
            tokens = f"{metadata.tokens:,} tokens in {len(metadata.chunks)} chunks"
            print(f"{folder}: {tokens} are as they were written")
    return status


def find_problems(folder: Path, metadata: Metadata) -> Iterator[str]:
    for name, digest in metadata.tokenizer_sha256.items():
        yield from check_hash(folder / name, digest)
    for entry in metadata.chunks:
        for kind, path in chunk_files(folder, entry).items():
            yield from check_hash(path, getattr(entry, f"{kind}_sha256"))
    if not metadata.finished:
        yield f"{folder}: not finished: run the command that began it again"


def check_hash(path: Path, digest: str) -> Iterator[str]:
    if not path.exists():
        yield f"{path} is missing: run the command that prepared it again"
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            yield f"{path} is damaged (its SHA-256 is not the one in metadata.json): {REMEDY}"


def report(folder: Path, metadata: Metadata) -> None:
    """Print a split's totals, and how much of the paper's rows would be padding."""
    documents, tokens, size = metadata.documents, metadata.tokens, metadata.bytes
    target = metadata.target_tokens
    kept = 0
    for entry in metadata.chunks:
        lengths = np.diff(np.load(chunk_files(folder, entry)["offsets"])) - 1  # without the end-of-text tokens
        kept += int(np.minimum(lengths, ROW_TOKENS).sum())
    if skipped := metadata.skipped_documents:
        print(f"{folder}: {skipped:,} rows without text under '{metadata.text_column}' were skipped")
    if tokens < target:
        print(f"{folder}: the source ended before {target:,} tokens")
    print(
        f"{folder}: {documents:,} documents, {tokens:,} tokens, {size:,} bytes, {size / tokens:.2f} bytes a "
        f"token; {1 - kept / (documents * ROW_TOKENS):.1%} padding in rows of {ROW_TOKENS:,}, one a "
        f"document, which hold {kept / tokens:.1%} of the tokens"
    )


# ----------------------------------------------------------------------------------------------------------
# Command line


def token_count(text: str) -> int:
    """A whole number of tokens, as in 4000000, 4_000_000 or 4e6."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if number < 0 or not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of tokens, such as 4000000 or 4e6")
    return int(number)


def positive_token_count(text: str) -> int:
    if token_count(text) == 0:
        raise argparse.ArgumentTypeError("at least one token is needed")
    return token_count(text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__)
    add = parser.add_argument
    add(
        "--source",
        help="owner/name on the hub; a .txt, .md, .rst, .py, .jsonl, .jsonl.zst, .jsonl.gz, .json.gz or .parquet "
        "file, or a folder of them, whose parts are told apart by its README.md or by their names; stdlib or "
        "site-packages: the code of Python's standard library, or of the installed packages",
    )
    add("--config", help="configuration of a hub source, or of a folder whose README.md lists some")
    add("--split", help="split of such a source to train on (default: train)")
    add("--revision", help="commit, tag or branch of a hub source (default: the newest, which is recorded)")
    add("--text_column", default="text", help="where .jsonl, .parquet and hub sources keep their text")
    add(
        "--skip_rows_without_text",
        action="store_true",
        help="skip any number of rows that have no text, not one in a hundred at most",
    )
    add(
        "--split_paragraphs",
        action="store_true",
        help="make each paragraph of a local source a document, drop duplicates, and put them in a fixed "
        "random order; holds the corpus in memory",
    )
    add("--tokenizer", default="gpt2", help=f"{CHOICES} (default: gpt2)")
    add("--target_tokens", type=positive_token_count, default=10_000_000_000, help="for training (default: 1e10)")
    validation = parser.add_mutually_exclusive_group().add_argument
    validation("--validation_tokens", type=token_count, default=10_000_000, help="0: none (default: 1e7)")
    validation(
        "--validation_from_train",
        type=positive_token_count,
        metavar="N",
        help="take the first N tokens' documents of train for validation, even where the source has a "
        "validation split of its own",
    )
    add("--chunk_tokens", type=positive_token_count, default=100_000_000, help="in each chunk (default: 1e8)")
    add("--output_dir", default="slimpajama_data", help="folder of the splits (default: %(default)s)")
    add("--verify", action="store_true", help="check the files in --output_dir; exit status 1 if any is bad")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        if args.verify:
            sys.exit(verify(Path(args.output_dir)))
        prepare(args)
    except KeyboardInterrupt:
        stopped = "stopped: the same command resumes after the last complete chunk"
        print(f"dataset_download.py: {stopped}", file=sys.stderr)
        sys.exit(130)
    except InputError as error:
        print(f"dataset_download.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, no permission
        again = "what is complete stays, and the same command goes on from there"
        print(f"dataset_download.py: error: {args.output_dir}: {error}; {again}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
    main()
