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
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import random
import re
import sys
import sysconfig
from argparse import ArgumentTypeError, Namespace
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from common import (
    CHOICES,
    InputError,
    Parser,
    Tokenizer,
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
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".parquet")
COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}


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


def source_names(args: Namespace) -> list[str]:
    """What metadata calls the source: the names to try, best first. A configuration follows a colon."""
    source = args.source
    if source is None:
        names = PAPER_SOURCES
    elif HUB_NAME.fullmatch(source) and not source.lower().endswith(SUFFIXES) and not Path(source).exists():
        names = [source]
    else:
        names = [source if source in INSTALLED else str(Path(source).resolve())]
    if on_hub(names[0]):
        if args.split_paragraphs:
            raise InputError(f"--split_paragraphs: {names[0]} is on the hub, and this needs a local source")
    elif args.revision or (args.config and not Path(names[0]).is_dir()):
        raise InputError(f"--source {source}: --revision is for the hub, --config for it and for folders")
    return [f"{name}:{args.config}" if args.config else name for name in names]


def on_hub(name: str) -> bool:
    return name not in INSTALLED and not Path(name).is_absolute()


def open_local_source(name: str, args: Namespace) -> Source:
    if name in INSTALLED:
        files, revision = installed_files(name)
        parts = {"train": files}
    else:
        parts, revision = corpus_parts(Path(args.source).resolve(), args.config), None
    train, validation = chosen_parts(name, parts, args.split)
    for part, files in parts.items():
        use = {train: "for training", validation: "for validation"}.get(part, "left untouched")
        print(f"{name}: {part}, {len(files):,} files from {files[0]} on: {use}", file=sys.stderr)

    @cache  # held in memory as a single file; where validation is of train, it is read once for both
    def paragraphs(part: str) -> list[str]:
        return distinct_paragraphs(name, parts[part], args)

    def read(part: str, place: dict | None) -> LocalRows:
        if args.split_paragraphs:
            return LocalRows([paragraphs(part)], iter, place)
        return LocalRows(parts[part], partial(read_file, column=args.text_column), place)

    used = parts[train] + (parts[validation] if validation else [])
    return Source(name, revision, read, validation, tuple(used))


def chosen_parts(source: str, parts: Iterable[str], split: str | None) -> tuple[str, str | None]:
    """The part to train on, and the one that is for validation, under whichever of its names."""
    train = split or "train"
    if train not in parts:
        raise InputError(f"--split {train}: {source} has {', '.join(parts)}; --split names one to train on")
    names = [name for name, kind in PARTS.items() if kind == "validation"]
    return train, next((name for name in names if name in parts and name != train), None)


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
    if not source.is_dir():
        if not source.name.lower().endswith(SUFFIXES) or not source.exists():
            raise InputError(f"{source}: no such file or folder, or no kind of file that is known, {known}")
        return {"train": [source]}

    found = sorted(walk(source))
    files = [path for path in found if is_text(path.name.lower())]
    if not files:
        raise InputError(f"{source}: no {known} file in this folder, cards and licences aside")
    parts = listed_parts(source, files, config)
    if parts is None:
        parts = named_parts(source, files)
    parts.pop(None, None)
    used = set(chain.from_iterable(parts.values()))
    if left_out := [path for path in found if path not in used]:
        warn(f"{source}: {len(left_out):,} other files are left out, {left_out[0]} first")
    return {part: parts[part] for part in sorted(parts, key=lambda part: (part != "train", part))}


def walk(source: Path) -> Iterator[Path]:
    """The files below a folder, hidden ones and links to folders too, but not what is in them."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk skips a folder that it may not read

    for folder, folders, names in os.walk(source, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(folder, name).is_symlink()]
        yield from (Path(folder, name) for name in names + links)


def is_text(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith(".") and not NO_TEXT.fullmatch(name)


def listed_parts(source: Path, files: list[Path], config: str | None) -> dict[str, list[Path]] | None:
    """The parts that a folder's README.md lists under `configs`, as datasets reads it; None without any."""
    card = source / "README.md"
    if not card.is_file() or "\nconfigs:" not in card.read_text(encoding="utf-8", errors="replace"):
        if config:
            raise InputError(f"--config {config}: {source} has no README.md that lists configurations")
        return None
    import datasets

    try:
        listed = datasets.load_dataset_builder(str(source), config).config.data_files
    except Exception as error:  # the library's own, and those of what it reads
        why = " ".join(str(error).split())
        raise InputError(f"{card}, of which --config chooses a part, cannot be used: {why}") from error
    parts = {str(part): set(paths) for part, paths in listed.items()}
    parts = {part: [path for path in files if str(path) in paths] for part, paths in parts.items()}
    return {part: found for part, found in parts.items() if found}


def named_parts(folder: Path, files: list[Path]) -> dict[str | None, list[Path]]:
    """Files by the part that their names are of; None for those that are of no part."""
    parts = {}
    for path in files:
        parts.setdefault(part_of(path.relative_to(folder)), []).append(path)
    if "train" not in parts and None in parts:
        parts["train"] = parts.pop(None)
    return parts


def part_of(path: Path) -> str | None:
    """The part that the folders, from the outermost in, or the name of a file say it is of."""
    *folders, name = path.parts
    suffix = next(suffix for suffix in SUFFIXES if name.lower().endswith(suffix))
    words = [*folders, name[: -len(suffix)]]
    if suffix == ".py":
        words = folders[:1]  # code has modules called test and training of its own
    found = (PART.search(word.lower()) for word in words)
    return next((PARTS[match[1]] for match in found if match), None)


def distinct_paragraphs(source: str, files: list[Path], args: Namespace) -> list[str]:
    """Every paragraph of the files once, in a random order that is always the same.

    A paragraph is what stands between blank lines. The whole corpus is held in memory.
    """
    found = set()
    skipped = 0
    texts = chain.from_iterable(read_file(path, args.text_column) for path in files)
    for rows, text in enumerate(texts, 1):
        if isinstance(text, NoText):
            skipped += 1
            limit_skipped(skipped, rows, text, source, args)
        else:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            found.update(part.strip("\n") for part in text.split("\n\n"))
    found.discard("")
    if skipped:
        warn(f"{skipped:,} rows without text under '{args.text_column}' were skipped")
    return random.Random(0).sample(sorted(found), len(found))


# ----------------------------------------------------------------------------------------------------------
# Files and their rows


@dataclass(frozen=True)
class NoText:
    """In the place of a row's text: what was found there, and the columns that the row has."""

    found: str


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


def read_file(path: Path, column: str) -> Iterator[str | NoText]:
    """Yield the documents of a file: its whole text, or the text column of each row."""
    name = path.name.lower()
    try:
        if name.endswith(TEXT_SUFFIXES):
            yield path.read_bytes().decode("utf-8-sig")
        elif name.endswith(".parquet"):
            yield from read_parquet(path, column)
        else:
            yield from read_json_lines(path, column)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 at byte {error.start:,}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error


def read_json_lines(path: Path, column: str) -> Iterator[str | NoText]:
    import pyarrow  # zstandard's reader takes a truncated file for a complete one

    with pyarrow.input_stream(str(path), compression=COMPRESSIONS.get(path.suffix.lower())) as stream:
        for number, line in enumerate(io.BufferedReader(stream), 1):
            if line.strip():
                try:
                    row = json.loads(line)  # which drops a byte order mark
                except (ValueError, RecursionError) as error:
                    why = f"not valid JSON ({first_line(error)})"
                    raise InputError(f"{path}, line {number}: {why}") from error
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: not a JSON object")
                yield text_of(row, column, row)


def read_parquet(path: Path, column: str) -> Iterator[str | NoText]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise InputError(f"{path}: no '{column}' among {', '.join(names)}")
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from (text_of({column: text}, column, names) for text in batch[column].to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def text_of(row: dict, column: str, names: Iterable[str]) -> str | NoText:
    """The text of a row. Bytes are text where they are UTF-8."""
    text = row.get(column)
    if isinstance(text, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            text = text.decode()
    if isinstance(text, str):
        return text
    found = f"a value of type {type(text).__name__}" if column in row else "none"
    return NoText(f"{found}; its columns are {', '.join(names)}")


def limit_skipped(skipped: int, rows: int, last: NoText, source: str, args: Namespace) -> None:
    """InputError where more than one row in a hundred, or than ten at first, had no text."""
    if skipped > MAX_SKIPPED * max(rows, 1_000) and not args.skip_rows_without_text:
        raise InputError(
            f"{source}: {skipped:,} of the first {rows:,} rows have no text under '{args.text_column}' (the "
            f"last has {last.found}): name another --text_column, or pass --skip_rows_without_text"
        )


# ----------------------------------------------------------------------------------------------------------
# Hub sources

ALTERNATIVES = """data to use instead:
    python dataset_download.py --source MBZUAI-LLM/SlimPajama-627B-DC
    python dataset_download.py --source DKYoon/SlimPajama-6B --target_tokens 5e9
    python dataset_download.py --source HuggingFaceFW/fineweb-edu --config sample-10BT"""


def open_hub_source(names: list[str], revision: str | None, args: Namespace) -> Source:
    """The first name that can be opened. `revision` pins its content; None takes the newest."""
    import datasets

    reasons = []
    for name in names:
        repository, _, config = name.partition(":")
        try:
            builder = datasets.load_dataset_builder(repository, config or None, revision=revision)
            streams = builder.as_streaming_dataset()
            break
        except Exception as error:  # the library's own, and those of what it reads and asks over the network
            reasons.append(f"{name} cannot be opened ({first_line(error)})")
    else:
        reasons.append(ALTERNATIVES if names == PAPER_SOURCES else "nor is it a file or folder here")
        raise InputError("; ".join(reasons))
    if reasons:
        warn(f"{reasons[0]}: using {name}, the same data, instead")
    _, validation = chosen_parts(name, streams, args.split)
    # Where each begins has to be asked before the first row is read.
    starts = {split: stream.state_dict() for split, stream in streams.items()}

    def read(split: str, place: dict | None) -> HubRows:
        return HubRows(streams[split], args.text_column, place or starts[split])

    # The commit is recorded: a restart reads the same rows although the dataset was changed meanwhile.
    asked = source_names(args)[0]
    return Source(name, builder.hash, read, validation, fallback_for=None if name == asked else asked)


class HubRows:
    """The texts of a hub split. The library itself asks a server that fails again, for minutes."""

    def __init__(self, stream, column: str, start: dict):
        self.stream = stream
        self.column = column
        self.start = start
        self.begun = False

    def place(self) -> dict:
        """Where the stream is: the file and the row in it, so that earlier files are not fetched again."""
        return self.stream.state_dict() if self.begun else self.start

    def __iter__(self) -> Iterator[str | NoText]:
        self.stream.load_state_dict(self.start)
        try:
            for row in self.stream:
                self.begun = True
                yield text_of(row, self.column, row)
        except Exception as error:
            why = f"the source cannot be read on ({first_line(error.__cause__ or error)})"
            raise InputError(f"{why}; complete chunks stay: run the same command again") from error


# ----------------------------------------------------------------------------------------------------------
# Chunks: from texts to arrays

BATCH_DOCUMENTS = 1_024
BATCH_CHARACTERS = 4_000_000


@dataclass
class Chunk:
    """Documents on their way to a file, the rows skipped between them, and where to resume after them."""

    tokens: array = field(default_factory=lambda: array("H"))  # 2 bytes each
    offsets: array = field(default_factory=lambda: array("q", [0]))  # 8 bytes each
    documents: int = 0
    text_tokens: int = 0  # without the end-of-text token after each document
    skipped: int = 0
    resume: dict | None = None


def encode_rows(rows: LocalRows | HubRows, tokenizer: Tokenizer, skip: int) -> Iterator[tuple]:
    """Yield, for each row after the first `skip`, its tokens (uint16) or NoText, and where to resume."""
    texts = iter(rows)
    if sum(1 for _ in islice(texts, skip)) < skip:
        raise InputError("the source has changed: it no longer holds the rows that were read before")
    while True:
        place, batch, characters = rows.place(), [], 0
        for text in texts:
            batch.append(text)
            characters += 0 if isinstance(text, NoText) else len(text)
            if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                break
        if not batch:
            return
        tokens = iter(tokenizer.encode([text for text in batch if isinstance(text, str)]))
        for number, text in enumerate(batch, 1):
            yield next(tokens) if isinstance(text, str) else text, {"place": place, "skip": number}


def next_chunk(encoded: Iterator[tuple], metadata: Metadata, args: Namespace, progress: Callable) -> Chunk:
    """The documents up to the one that fills the chunk or the split, or up to the last one."""
    chunk = Chunk()
    room = min(metadata.chunk_tokens, metadata.target_tokens - metadata.tokens)
    last = "nothing: there is none"
    while chunk.text_tokens < room and (row := next(encoded, None)):
        ids, chunk.resume = row
        if isinstance(ids, NoText):
            last = ids.found
            chunk.skipped += 1
            skipped = metadata.skipped_documents + chunk.skipped
            rows = metadata.documents + chunk.documents + skipped
            limit_skipped(skipped, rows, ids, metadata.source, args)
            continue
        last = "an empty text"
        chunk.tokens.frombytes(ids.tobytes())
        chunk.tokens.append(metadata.eos_id)
        chunk.offsets.append(len(chunk.tokens))
        chunk.documents += 1
        chunk.text_tokens += len(ids)
        progress(len(ids))
    if not metadata.tokens + chunk.text_tokens:
        where = f"the {metadata.split} split under '{args.text_column}'"
        raise InputError(f"{metadata.source} has no text for {where}: its last row has {last}")
    return chunk


# ----------------------------------------------------------------------------------------------------------
# The output folder: its files, and what an earlier run left in it

TOTALS = ("documents", "tokens", "bytes", "skipped_documents")


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
    fallback_for: str | None  # the name that could not be opened, where another was used instead
    requested_revision: str | None
    revision: str | None  # commit of a hub dataset, Python's version, hash of the installed packages
    train_split: str
    text_column: str
    split_paragraphs: bool = False
    validation_from_train: bool
    requested_from_train: bool | None = None  # --validation_from_train, for a hub source
    split: str
    tokenizer: str
    tokenizer_sha256: dict[str, str] = {}
    vocab_size: int
    eos_id: int
    target_tokens: int
    chunk_tokens: int
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    skipped_documents: int = 0
    finished: bool = False
    chunks: list[ChunkEntry] = []
    resume: dict | None = None  # while unfinished: a place in the source, and the rows to skip from there

    def set_chunks(self, chunks: list[ChunkEntry]) -> None:
        """Keep these chunks, and make the totals theirs."""
        self.chunks = chunks
        for key in TOTALS:
            setattr(self, key, sum(getattr(entry, key) for entry in chunks))


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
        why = ": ".join(map(str, [*first["loc"], first["msg"]]))
        raise InputError(f"{path}: not what this script writes ({why}): use another --output_dir") from error


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
    return ChunkEntry(
        name=name,
        documents=chunk.documents,
        tokens=chunk.text_tokens,
        bytes=int(token_bytes[tokens].sum()),
        skipped_documents=chunk.skipped,
        tokens_sha256=write_array(folder / f"{name}.tokens.npy", tokens),
        offsets_sha256=write_array(folder / f"{name}.offsets.npy", np.asarray(chunk.offsets, np.int64)),
    )


def chunk_files(folder: Path, entry: ChunkEntry) -> dict[str, Path]:
    return {kind: folder / f"{entry.name}.{kind}.npy" for kind in ("tokens", "offsets")}


def refuse_other_arguments(output: Path, recorded: dict, asked: dict, targets: dict[str, int]) -> None:
    """InputError, with both values, where the output folder was prepared with other arguments."""
    another = f"choose another --output_dir, or delete what is prepared in {output}"
    if recorded["train"] and targets["validation"] and not recorded["validation"]:
        # Its documents may be among those of train.
        raise InputError(f"{output / 'validation'} is missing, and cannot be made beside a train: {another}")
    for split, metadata in recorded.items():
        for key, value in {**asked, "target_tokens": targets[split]}.items():
            if metadata and getattr(metadata, key) != value:
                before = f"was prepared with {key} {getattr(metadata, key)}"
                raise InputError(f"{output / split} {before}, and this run asks for {value}: {another}")


def cut_back(folder: Path, metadata: Metadata | None) -> Metadata | None:
    """Metadata up to the first missing file: the rest is made again. --verify finds damaged ones."""
    if metadata is None:
        return None
    for number, entry in enumerate(metadata.chunks):
        missing = [path for path in chunk_files(folder, entry).values() if not path.exists()]
        if missing:
            warn(f"{missing[0]} is missing: {len(metadata.chunks) - number} chunks are made again")
            metadata.set_chunks(metadata.chunks[:number])
            metadata.finished, metadata.resume = False, None
            break
    whole = all((folder / name).exists() for name in metadata.tokenizer_sha256)
    metadata.finished = metadata.finished and whole
    return metadata


def check_source_files(output: Path, source: Source, fresh: bool) -> None:
    """Note size and time of every source file at a fresh start; later, InputError for one that changed."""
    path = output / "source_files.json"
    stats = {str(file): file.stat() for file in source.files}
    found = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    if fresh or not path.exists():
        write_text(path, json.dumps(found, indent=0))
        return
    noted = json.loads(path.read_bytes())
    changed = [name for name in noted.keys() | found.keys() if noted.get(name) != found.get(name)]
    if changed:
        what = f"{min(changed)} was changed, added or removed since {output} was begun"
        raise InputError(f"{what}: put it back as it was, or choose another --output_dir")


# ----------------------------------------------------------------------------------------------------------
# Preparing


def prepare(args: Namespace) -> None:
    """Write the splits asked for, or what an interrupted run left to do of them, and report."""
    output = Path(args.output_dir)
    held_out = args.validation_from_train or args.validation_tokens
    targets = {"validation": held_out, "train": args.target_tokens}
    with FileLock(output / ".lock", blocking=False):
        recorded = {split: read_metadata(output / split) for split in SPLITS}
        earlier = recorded["validation"] or recorded["train"]
        names, asked = asked_for(args, earlier)
        refuse_other_arguments(output, recorded, asked, targets)
        splits = {split: cut_back(output / split, recorded[split]) for split in SPLITS if targets[split]}
        if all(metadata and metadata.finished for metadata in splits.values()):
            print("already prepared")
        else:
            tokenizer = load_tokenizer(args.tokenizer)
            if on_hub(names[0]):
                source = open_hub_source(names, earlier.revision if earlier else args.revision, args)
            else:
                source = open_local_source(names[0], args)
            check_source_files(output, source, fresh=not earlier)
            for split, metadata in splits.items():
                splits[split] = metadata or new_metadata(asked, source, tokenizer, split, targets[split])
            prepare_splits(output, source, tokenizer, splits, args)
        for split, metadata in splits.items():
            report(output / split, metadata)


def asked_for(args: Namespace, earlier: Metadata | None) -> tuple[list[str], dict]:
    """The names of sources to try, and what the metadata of an earlier run has to agree with."""
    names = source_names(args)
    if earlier and earlier.source in names:
        names = [earlier.source]  # a restart never changes to another source than opened before
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
    if on_hub(names[0]):
        asked["requested_from_train"] = bool(args.validation_from_train)
    return names, asked


def new_metadata(asked: dict, source: Source, tokenizer: Tokenizer, split: str, target: int) -> Metadata:
    return Metadata(**{
        "validation_from_train": not source.validation,
        **asked,
        "source": source.name,
        "fallback_for": source.fallback_for,
        "revision": source.revision,
        "split": split,
        "target_tokens": target,
        "vocab_size": tokenizer.eos_id + 1,
        "eos_id": tokenizer.eos_id,
    })  # fmt: skip


def prepare_splits(output: Path, source: Source, tokenizer: Tokenizer, splits: dict, args: Namespace) -> None:
    """Prepare validation, then train, which begins after the rows that were taken for validation."""
    validation = splits.get("validation")
    taken = validation if validation and validation.validation_from_train else None
    if taken:
        source = cut_single_document(source, tokenizer, taken)
    for split, metadata in splits.items():
        if metadata.finished:
            continue
        part = metadata.train_split if split == "train" or taken else source.validation
        read = [metadata, taken] if taken and split == "train" else [metadata]
        rows = sum(known.documents + known.skipped_documents for known in read)
        resume = metadata.resume or {"place": None, "skip": rows}
        encoded = encode_rows(source.read(part, resume["place"]), tokenizer, resume["skip"])
        prepare_split(output / split, metadata, encoded, tokenizer, args)


def cut_single_document(source: Source, tokenizer: Tokenizer, taken: Metadata) -> Source:
    """A source of one document becomes one of two: its first tokens for validation, the rest for train."""
    documents, skipped = [], []
    for text in source.read(taken.train_split, None):
        (skipped if isinstance(text, NoText) else documents).append(text)
        if len(documents) > 1 or len(skipped) > MAX_SKIPPED * 1_000:
            return source
    ids = tokenizer.encode(documents)[0] if documents else ()
    if len(ids) <= taken.target_tokens:
        return source  # nothing is left for training, which is said where that is found
    rows = [*skipped, ids[: taken.target_tokens], ids[taken.target_tokens :]]
    return replace(source, read=lambda part, place: LocalRows([rows], iter, place))


def prepare_split(
    folder: Path, metadata: Metadata, encoded: Iterator[tuple], tokenizer: Tokenizer, args: Namespace
) -> None:
    """Write a split. Metadata is written again after each chunk, so that it never names a missing file.

    InputError before the last chunk of validation where it has taken all that train could have.
    """
    split, target = metadata.split, metadata.target_tokens
    folder.mkdir(parents=True, exist_ok=True)
    token_bytes = write_tokenizer(folder, tokenizer, metadata)
    # once a second, also in the log of a job
    layout = {"desc": split, "unit": "token", "unit_scale": True, "mininterval": 1}
    with tqdm(total=target, initial=metadata.tokens, **layout) as bar:
        while not metadata.finished:
            chunk = next_chunk(encoded, metadata, args, bar.update)
            total = metadata.tokens + chunk.text_tokens
            metadata.finished = total >= target or chunk.text_tokens < metadata.chunk_tokens
            is_last = metadata.finished and split == "validation" and metadata.validation_from_train
            if is_last and not any(isinstance(ids, np.ndarray) and len(ids) for ids, _ in encoded):
                taken = f"validation takes all {total:,} tokens of {metadata.source}, in whole documents"
                mend = "try --split_paragraphs, or --validation_tokens 0"
                raise InputError(f"nothing is left for training: {taken}: {mend}")
            metadata.resume = None if metadata.finished else chunk.resume
            if chunk.documents:
                entry = write_chunk(folder, f"chunk_{len(metadata.chunks):03d}", chunk, token_bytes)
                metadata.set_chunks([*metadata.chunks, entry])
            else:
                metadata.skipped_documents += chunk.skipped
            write_metadata(folder, metadata)


# ----------------------------------------------------------------------------------------------------------
# Verifying and reporting


def find_problems(folder: Path) -> Iterator[str]:
    """Read the files of a split again, and say what is wrong with them."""
    again = "run the command that prepares it again"
    metadata = read_metadata(folder)
    if metadata is None:
        if folder.name == "train":
            yield f"{folder}: not begun: {again}"
        return
    recorded = {folder / name: digest for name, digest in metadata.tokenizer_sha256.items()}
    for entry in metadata.chunks:
        for kind, path in chunk_files(folder, entry).items():
            recorded[path] = getattr(entry, f"{kind}_sha256")
    for path, digest in recorded.items():
        if not path.exists():
            yield f"{path} is missing: {again}"
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                yield f"{path} is damaged (metadata.json has another SHA-256): delete it and {again}"
    if not metadata.finished:
        yield f"{folder}: not finished: {again}"


def report(folder: Path, metadata: Metadata) -> None:
    """Print a split's totals, and how much of the paper's rows would be padding."""
    documents, tokens, size = metadata.documents, metadata.tokens, metadata.bytes
    kept = 0
    for entry in metadata.chunks:
        lengths = np.diff(np.load(chunk_files(folder, entry)["offsets"])) - 1  # of the texts alone
        kept += int(np.minimum(lengths, ROW_TOKENS).sum())
    if skipped := metadata.skipped_documents:
        print(f"{folder}: {skipped:,} rows without text under '{metadata.text_column}' were skipped")
    if tokens < metadata.target_tokens:
        print(f"{folder}: the source ended before {metadata.target_tokens:,} tokens")
    print(
        f"{folder}: {documents:,} documents, {tokens:,} tokens, {size:,} bytes, {size / tokens:.2f} bytes a "
        f"token; {1 - kept / (documents * ROW_TOKENS):.1%} padding in rows of {ROW_TOKENS:,}, one a "
        f"document, which hold {kept / tokens:.1%} of the tokens"
    )


# ----------------------------------------------------------------------------------------------------------
# Command line


def token_count(text: str, least: int = 1) -> int:
    """A whole number of tokens, as in 4000000, 4_000_000 or 4e6."""
    with contextlib.suppress(ValueError):
        number = float(text)
        if number >= least and number.is_integer():
            return int(number)
    raise ArgumentTypeError(f"{text} is not a number of tokens, such as 4000000 or 4e6")


def argument_parser() -> Parser:
    parser = Parser(__file__, __doc__)
    add = parser.add_argument
    add(
        "--source",
        help=f"owner/name on the hub; a file ({', '.join(SUFFIXES)}), or a folder of them, whose parts are "
        "told apart by its README.md or by their names; stdlib or site-packages, the code of Python's "
        "standard library or of the installed packages",
    )
    add("--config", help="configuration of a hub source, or of a folder whose README.md lists some")
    add("--split", help="split of such a source to train on (default: train)")
    add("--revision", help="commit, tag or branch of a hub source (default: the newest, which is recorded)")
    add("--text_column", default="text", help="where .jsonl, .parquet and hub sources keep their text")
    without_text = "skip any number of rows that have no text, not one in a hundred at most"
    add("--skip_rows_without_text", action="store_true", help=without_text)
    paragraphs = "make each distinct paragraph of a local source a document, in a fixed random order"
    add("--split_paragraphs", action="store_true", help=paragraphs)
    add("--tokenizer", default="gpt2", help=f"{CHOICES} (default: gpt2)")
    add("--target_tokens", type=token_count, default=10_000_000_000, help="for training (default: 1e10)")
    validation = parser.add_mutually_exclusive_group().add_argument
    or_none = partial(token_count, least=0)
    validation("--validation_tokens", type=or_none, default=10_000_000, help="0: none (default: 1e7)")
    from_train = "the first N tokens' documents of train, even where the source has a validation split"
    validation("--validation_from_train", type=token_count, metavar="N", help=from_train)
    add("--chunk_tokens", type=token_count, default=100_000_000, help="in each chunk (default: 1e8)")
    add("--output_dir", default="slimpajama_data", help="folder of the splits (default: %(default)s)")
    add("--verify", action="store_true", help="check the files in --output_dir; exit status 1 if any is bad")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    try:
        if args.verify:
            problems = [text for split in SPLITS for text in find_problems(Path(args.output_dir, split))]
            print(*problems or [f"{args.output_dir}: all files are as they were written"], sep="\n")
            parser.exit(int(bool(problems)))
        prepare(args)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped: the same command resumes after the last complete chunk\n")
    except Timeout:
        parser.error(f"{args.output_dir}: another {parser.prog} is at work in this folder")
    except InputError as error:
        parser.error(error)
    except OSError as error:  # a full disk, no permission
        parser.error(f"{args.output_dir}: {error}; what is complete stays: run the same command again")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
    main()
