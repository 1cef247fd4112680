"""Text source -> token files: a corpus is tokenised once, and training reads nothing but uint16 arrays.

    python dataset_download.py                                    # the paper's data: SlimPajama, 10B tokens
    python dataset_download.py --source HuggingFaceFW/fineweb-edu --config sample-10BT --output_dir fineweb
    python dataset_download.py --source my_texts --target_tokens 4e6 --validation_tokens 1e5
    python dataset_download.py --source stdlib --tokenizer bytes --validation_tokens 2e5 --output_dir demo
    python dataset_download.py --source site-packages --split_paragraphs --tokenizer bytes --output_dir packages

Under <output_dir>/train and <output_dir>/validation:
    chunk_NNN.tokens.npy    uint16 [tokens + documents], each document followed by an end-of-text token
    chunk_NNN.offsets.npy   int64 [documents + 1], where each document starts; the last entry is the chunk's length
    token_bytes.npy         uint16 [vocab_size], the bytes behind each token id, 0 for the end-of-text id
    tokenizer.tiktoken      the tokenizer's ranks, one a line: base64 of the bytes, a space, the rank
    metadata.json           where the text came from, totals, SHA-256 of each file, finished or not; what it calls
                            tokens are those of the text, without the end-of-text tokens

The same command continues an interrupted run behind its last complete chunk, and ends with the same files as if
it had never stopped. --verify reads finished files again and says what is wrong with them.
"""

import argparse
import base64
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import random
import re
import shlex
import shutil
import sys
import sysconfig
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

PAPER_SOURCES = ["cerebras/SlimPajama-627B", "gmongaras/SlimPajama-627B_Reupload"]
ALTERNATIVES = """data to use in its place:
    python dataset_download.py --source MBZUAI-LLM/SlimPajama-627B-DC
    python dataset_download.py --source DKYoon/SlimPajama-6B --target_tokens 5e9
    python dataset_download.py --source HuggingFaceFW/fineweb-edu --config sample-10BT"""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.zst", ".parquet")
# sources that need no download: Python code that is installed with this interpreter
INSTALLED = ("stdlib", "site-packages")
# pydoc_data is a single generated string, long enough to be most of a small validation split
INSTALLED_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MAX_VOCABULARY = 65_535
TOTALS = ("documents", "tokens", "bytes", "skipped_documents")
REMEDY = "delete it and run the command that prepared it again, which makes it and the chunks behind it anew"
BATCH_DOCUMENTS = 1_024
BATCH_CHARACTERS = 4_000_000
LONG_TEXT = 500_000
# where no token of GPT-2 reaches across: before white space, and before the last character of a run of it
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
CUT = re.compile(f"(?<=[^{SPACE}])[{SPACE}]|(?<=[{SPACE}])[{SPACE}](?=[^{SPACE}])")
BYTE_ORDER_MARK = "\ufeff"  # some editors begin a file with it
RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 64)
MAX_SKIPPED = 0.01  # of the rows of a split, or of 1,000 where it has fewer so far
ROW_TOKENS = 2_048  # the paper's protocol: a document a row, cut or filled to this length


class InputError(ValueError):
    """Something the user can mend: an argument, a file, a source out of reach."""


@dataclass(frozen=True)
class Tokenizer:
    """Token bytes with their ranks (the token ids), and the function that encodes a batch of documents."""

    name: str
    ranks: dict[bytes, int]
    encode: Callable[[list[str]], list[np.ndarray]]

    @property
    def eos_id(self) -> int:
        return len(self.ranks)


def tokenizer_name(argument: str) -> str:
    """The name that metadata keeps. A rank file is known by its content: paths move, files are replaced."""
    if argument in ("gpt2", "bytes"):
        return argument
    path = Path(argument)
    if path.suffix != ".tiktoken" or not path.is_file():
        raise InputError(f"--tokenizer {argument}: neither gpt2, bytes nor an existing .tiktoken file")
    return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def load_tokenizer(argument: str) -> Tokenizer:
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
    """Parse a .tiktoken file. InputError for a broken line, missing ranks, or over 65,535 ids."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not base64, a space and a rank") from error
    # a larger id would wrap around in uint16, and nothing would say so
    if len(ranks) + 1 > MAX_VOCABULARY:
        raise InputError(f"{path}: a vocabulary of {len(ranks) + 1:,}, and {MAX_VOCABULARY:,} is the most")
    bytes_missing = any(bytes([value]) not in ranks for value in range(256))
    if bytes_missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: the ranks must be 0, 1, 2, ... and cover each of the 256 bytes")
    return ranks


def gpt2_encoder(encoding) -> Callable[[list[str]], list[np.ndarray]]:
    """Encode a batch on all cores, 16 documents at a time: threads that meet more often wait for each other."""
    pool = ThreadPoolExecutor(os.cpu_count())

    def encode_group(texts: list[str]) -> list[np.ndarray]:
        parts = ([encoding.encode_ordinary(part) for part in split_long_text(text)] for text in texts)
        return [np.concatenate([np.asarray(ids, np.uint16) for ids in encoded]) for encoded in parts]

    def encode(texts: list[str]) -> list[np.ndarray]:
        groups = (texts[start : start + 16] for start in range(0, len(texts), 16))
        return [*chain.from_iterable(pool.map(encode_group, groups))]

    return encode


def split_long_text(text: str) -> list[str]:
    """Parts whose tokens are those of the text: tiktoken's stack overflows on a million characters of white space."""
    parts, start = [], 0
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


@dataclass(frozen=True)
class Source:
    """Rows in an order that never changes: read(split, place) yields them from a place in the stream on.

    Without a validation split of its own, validation is carved off the front of train.
    """

    name: str
    revision: str | None
    read: Callable[[str, dict | None], "FileRows | ParagraphRows | HubRows"]
    has_validation: bool = False
    files: tuple[Path, ...] = ()
    fallback_for: str | None = None


def encode_rows(rows: "FileRows | HubRows", tokenizer: Tokenizer, skip: int) -> Iterator[tuple]:
    """Yield, for each row behind the first `skip`, its tokens (uint16, None without text) and where to resume."""
    texts = iter(rows)
    if sum(1 for _ in islice(texts, skip)) < skip:
        raise InputError("the source has changed: it no longer holds the rows that were read before")
    while True:
        place = rows.place()
        if not (batch := next_batch(texts)):
            return
        tokens = iter(tokenizer.encode([text for text in batch if text is not None]))
        for number, text in enumerate(batch, 1):
            yield None if text is None else next(tokens), {"place": place, "skip": number}


def next_batch(texts: Iterator[str | None]) -> list[str | None]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text or "")
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            break
    return batch


def source_names(args: argparse.Namespace) -> list[str]:
    """What metadata calls the source: the names to try, best first. A hub configuration follows a colon."""
    source, suffix = args.source, f":{args.config}" if args.config else ""
    if source is None:
        names = [name + suffix for name in PAPER_SOURCES]
    elif HUB_NAME.fullmatch(source) and not source.endswith(SUFFIXES) and not Path(source).exists():
        names = [source + suffix]
    else:
        names = None
    if names and args.split_paragraphs:
        raise InputError(f"--split_paragraphs: {names[0]} is on the hub, and only a local source fits in memory")
    if names:
        return names
    for option in ("config", "split", "revision"):
        if value := getattr(args, option):
            raise InputError(f"--{option} {value}: only a hub source, --source owner/name, has such a thing")
    return [source] if source in INSTALLED else [str(Path(source).resolve())]


def open_source(
    names: list[str], revision: str | None, column: str, train_split: str, split_paragraphs: bool
) -> Source:
    """Open the first name that resolves. `revision` pins a hub dataset; None takes the newest."""
    if names[0] not in INSTALLED and not Path(names[0]).is_absolute():
        return open_hub_source(names, revision, column, train_split)
    if names[0] in INSTALLED:
        files, digest = installed_files(names[0])
        revision = platform.python_version() if names == ["stdlib"] else f"sha256:{digest}"
    else:
        files = corpus_files(Path(names[0]))
    # both splits come out of one reading of the corpus
    paragraphs = cache(lambda: distinct_paragraphs(files, column))

    def read(split: str, place: dict | None) -> FileRows | ParagraphRows:
        return ParagraphRows(paragraphs(), place) if split_paragraphs else FileRows(files, column, place)

    return Source(names[0], revision, read, files=tuple(files))


def open_hub_source(names: list[str], revision: str | None, column: str, train_split: str) -> Source:
    """The first name that resolves, or an InputError with every reason and what to do."""
    reasons = []
    for name in names:
        try:
            source = open_hub_dataset(name, revision, column, train_split)
        except (*network_errors(), *data_errors()) as error:
            reasons.append(f"{name} does not resolve ({first_line(error)})")
            continue
        if not reasons:
            return source
        warn(f"{reasons[0]}: using {name}, the same data, in its place")
        return replace(source, fallback_for=names[0])
    hint = ALTERNATIVES if names == PAPER_SOURCES else "nor is it a file or folder here"
    raise InputError(f"{'; '.join(reasons)}; {hint}")


def open_hub_dataset(name: str, revision: str | None, column: str, train_split: str) -> Source:
    import datasets

    repository, _, config = name.partition(":")
    waits, streams = iter(RETRY_SECONDS[:2]), None  # the library itself tries for half a minute each time
    while streams is None:
        try:
            builder = datasets.load_dataset_builder(repository, config or None, revision=revision)
            streams = builder.as_streaming_dataset()
        except network_errors() as error:
            if not try_again(name, error, waits):
                raise
    if train_split not in streams:
        raise InputError(f"its splits are {', '.join(streams)}, and {train_split} is not among them")
    # the commit is recorded, so that a restart reads the same rows after the dataset was changed
    # where each begins has to be asked before the first row is read
    starts = {split: stream.state_dict() for split, stream in streams.items()}

    def read(split: str, place: dict | None) -> HubRows:
        return HubRows(f"{name}, split {split}", streams[split], column, place or starts[split])

    return Source(name, builder.hash, read, has_validation="validation" in set(streams) - {train_split})


class HubRows:
    """The texts of a hub split, None for a row without. A lost connection is taken up again where it broke."""

    def __init__(self, name: str, stream, column: str, start: dict):
        self.name, self.stream, self.column = name, stream, column
        self.start, self.behind_start = start, 0

    def place(self) -> dict:
        """Where the stream stands: the file and the row in it, so that earlier files are not fetched again."""
        if self.behind_start:
            self.start, self.behind_start = self.stream.state_dict(), 0
        return self.start

    def __iter__(self) -> Iterator[str | None]:
        waits = iter(RETRY_SECONDS)
        while True:
            self.stream.load_state_dict(self.start)
            try:
                for row in islice(self.stream, self.behind_start, None):
                    self.behind_start += 1
                    waits = iter(RETRY_SECONDS)
                    yield text_of(row, self.column)
                return
            except network_errors() as error:
                if not try_again(self.name, error, waits):
                    raise InputError(
                        f"{self.name} is out of reach ({first_line(error)}): check the connection, and that the data "
                        "is there and open to you (`hf auth login`); complete chunks stay: run the same command again"
                    ) from error
            except data_errors() as error:
                raise InputError(f"{self.name}: a file of it cannot be read ({first_line(error)})") from error


def try_again(name: str, error: Exception, waits: Iterator[int]) -> bool:
    """Wait after an error that may pass. False: there is no use in it, or has been none so far."""
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
    """ValueError: no such configuration, or not JSON. RuntimeError: a dataset that needs its own loading script."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    return ValueError, RuntimeError, DatasetsError, pyarrow.ArrowException


def is_transient(error: Exception) -> bool:
    """Whether to try again: not where the server's answer, or that of the library, would stay the same."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    # the status is with the error, with its response, or with what it was raised from
    for link in (error, error.__cause__):
        status = getattr(getattr(link, "response", None), "status_code", None) or getattr(link, "status", None)
        if isinstance(status, int):
            return status >= 500 or status in (408, 429)
    return not (HF_HUB_OFFLINE or isinstance(error, (FileNotFoundError, PermissionError)))


def stdlib_files() -> list[Path]:
    return installed_files("stdlib")[0]


def installed_files(name: str) -> tuple[list[Path], str]:
    """The .py files of the standard library or of the installed packages, and a hash of their names and contents.

    In a fixed order that mixes the packages: validation is the first files, and by name that would be one package.
    """
    paths = sysconfig.get_paths()
    folders = [paths["stdlib"]] if name == "stdlib" else [paths["purelib"], paths["platlib"]]
    found = {}
    for root in {Path(folder).resolve() for folder in folders}:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            if INSTALLED_SKIPPED.isdisjoint(parts) and not any(part.startswith(".") for part in parts):
                found[path.relative_to(root).as_posix()] = path
    order = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    files, digest = [], hashlib.sha256()
    for relative in order:
        content = found[relative].read_bytes()
        # some old modules are not UTF-8
        if "\ufffd" not in content.decode(errors="replace"):
            files.append(found[relative])
            digest.update(f"{relative}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return files, digest.hexdigest()[:16]


def corpus_files(path: Path) -> list[Path]:
    """The file itself, or every file of a known kind below the folder, sorted. Hidden files are left out."""
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        files, hidden, others = walk(path)
        if not files:
            raise InputError(f"{path}: no {known} file in this folder")
        if hidden or others:
            warn(f"{path}: {len(files):,} files are read; left out: {hidden:,} hidden, {others:,} of other kinds")
        return sorted(files)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: unknown kind of file, not {known}")
    return [path]


def walk(root: Path) -> tuple[list[Path], int, int]:
    """The files of a known kind below a folder, how many entries are hidden, how many files of other kinds."""
    files, hidden, others = [], 0, 0

    def refuse(error: OSError) -> None:
        raise error  # os.walk passes over a folder that it may not read

    for folder, folders, names in os.walk(root, onerror=refuse):
        for name in (*folders, *names):
            path = Path(folder, name)
            if name.startswith("."):
                hidden += 1
            elif path.is_symlink() and not path.is_file():
                kind = "a link to a folder, which is not followed" if path.is_dir() else "a link to nothing"
                raise InputError(f"{path}: {kind}: remove it, or put in its place what it stands for")
            elif path.is_file() and name.endswith(SUFFIXES):
                files.append(path)
            elif name in names:
                others += 1
        folders[:] = [name for name in folders if not name.startswith(".")]
    return files, hidden, others


class FileRows:
    """The texts of local files, None for a row without."""

    def __init__(self, files: list[Path], column: str, place: dict | None):
        self.files, self.column = files, column
        self.file, self.row = (place["file"], place["row"]) if place else (0, 0)

    def place(self) -> dict:
        return {"file": self.file, "row": self.row}

    def __iter__(self) -> Iterator[str | None]:
        for path in self.files[self.file :]:
            for text in islice(read_file(path, self.column), self.row, None):
                self.row += 1
                yield text
            self.file, self.row = self.file + 1, 0


class ParagraphRows:
    """The paragraphs of a corpus in their fixed order."""

    def __init__(self, paragraphs: list[str], place: dict | None):
        self.paragraphs, self.row = paragraphs, place["row"] if place else 0

    def place(self) -> dict:
        return {"row": self.row}

    def __iter__(self) -> Iterator[str]:
        for text in islice(self.paragraphs, self.row, None):
            self.row += 1
            yield text


def distinct_paragraphs(files: list[Path], column: str) -> list[str]:
    """Every paragraph of the files once, in a random order that is always the same.

    A paragraph is what stands between blank lines. The whole corpus is held in memory.
    """
    found, rows, skipped = set(), 0, 0
    for path in files:
        for text in read_file(path, column):
            rows += 1
            if text is None:
                skipped += 1
                refuse_many_skipped(str(path), column, skipped, rows)
                continue
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            found.update(part.strip("\n") for part in text.split("\n\n"))
    found.discard("")
    if skipped:
        warn(f"{skipped:,} rows without a string under '{column}' were skipped")
    return random.Random(0).sample(sorted(found), len(found))


def read_file(path: Path, column: str) -> Iterator[str | None]:
    """Yield the documents of a file: its whole text, or the text column of each row."""
    try:
        if path.name.endswith(".parquet"):
            yield from read_parquet(path, column)
        elif path.name.endswith(".jsonl.zst"):
            # pyarrow, because zstandard's reader takes a file that was cut off for a complete one
            import pyarrow

            with pyarrow.input_stream(str(path), compression="zstd") as stream:
                yield from read_json_lines(path, io.BufferedReader(stream), column)
        elif path.name.endswith(".jsonl"):
            with path.open("rb") as lines:  # json takes a byte order mark off
                yield from read_json_lines(path, lines, column)
        else:
            yield path.read_bytes().decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 at byte {error.start:,}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error


def read_json_lines(path: Path, lines: Iterable[bytes], column: str) -> Iterator[str | None]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not valid JSON ({first_line(error)})") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not a JSON object")
            yield text_of(row, column)


def read_parquet(path: Path, column: str) -> Iterator[str | None]:
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


def text_of(row: dict, column: str) -> str | None:
    text = row.get(column)
    return text if isinstance(text, str) else None


def warn(text: str) -> None:
    tqdm.write(f"WARNING: {text}", file=sys.stderr)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclass
class Chunk:
    """Tokens at 2 bytes each, offsets at 8, the rows skipped among them, and where to resume behind them.

    `text_tokens` counts the tokens without the end-of-text token behind each document.
    """

    tokens: array = field(default_factory=lambda: array("H"))
    offsets: array = field(default_factory=lambda: array("q", [0]))
    text_tokens: int = 0
    skipped: int = 0
    resume: dict | None = None


def split_chunks(
    encoded: Iterator[tuple], metadata: dict, leave_some: bool, progress: Callable[[int], object]
) -> Iterator[Chunk]:
    """Yield chunks from where metadata stands, up to the document that reaches the target or to the end.

    The last one holds no document where only rows without text are left. InputError, before it is yielded, for
    a split without any token, and with `leave_some` when no text comes after the split, or less than its last
    document took beyond the target: a document is never cut in two, and one may be longer than all the others.
    """
    total, target, skipped = metadata["tokens"], metadata["target_tokens"], metadata["skipped_documents"]
    rows, chunk = metadata["documents"] + skipped, Chunk()
    while total < target and (row := next(encoded, None)):
        ids, chunk.resume = row
        rows += 1
        if ids is None:
            skipped += 1
            chunk.skipped += 1
            refuse_many_skipped(metadata["source"], metadata["text_column"], skipped, rows)
            continue
        chunk.tokens.frombytes(ids.tobytes())
        chunk.tokens.append(metadata["eos_id"])
        chunk.offsets.append(len(chunk.tokens))
        chunk.text_tokens += len(ids)
        total += len(ids)
        progress(len(ids))
        if chunk.text_tokens >= metadata["chunk_tokens"] and total < target:
            yield chunk
            chunk = Chunk()
    if total == 0:
        raise InputError(
            f"{metadata['source']} has no text for the {metadata['split']} split: {skipped:,} of {rows:,} rows have "
            f"no string under '{metadata['text_column']}'"
        )
    if leave_some:
        beyond, left = total - target, 0
        while left < max(1, beyond) and (row := next(encoded, None)):
            left += 0 if row[0] is None else len(row[0])
        if left == 0:
            raise nothing_left(metadata["source"], total)
        if left < beyond:
            raise InputError(
                f"{metadata['source']}: validation would end with a document that takes it to {total:,} tokens, where "
                f"{target:,} were asked for, and leave {left:,} for training: divide the document, put it last, or "
                "prepare without validation, --validation_tokens 0"
            )
    yield chunk


def refuse_many_skipped(source: str, column: str, skipped: int, rows: int) -> None:
    if skipped > MAX_SKIPPED * max(rows, 1_000):
        raise InputError(
            f"{source}: {skipped:,} of the first {rows:,} rows have no string under '{column}'; over "
            f"{MAX_SKIPPED:.0%} is too many: name the right --text_column"
        )


def nothing_left(source: str, tokens: int) -> InputError:
    return InputError(f"nothing is left for training: validation takes all {tokens:,} tokens of {source}")


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


def remove_temporary_files(output: Path) -> None:
    """Delete what a killed run was writing."""
    for pattern in ("source_files.json.tmp", "validation/*.tmp", "train/*.tmp"):
        for path in output.glob(pattern):
            path.unlink()


def write_array(path: Path, values: np.ndarray) -> str:
    return write_atomically(path, lambda file: np.save(file, values))


def write_tokenizer(folder: Path, tokenizer: Tokenizer, metadata: dict) -> np.ndarray:
    """Write what bits per byte and decoding need. Returns the bytes behind each id, uint16 [vocab_size]."""
    by_rank = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    lines = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(by_rank))
    token_bytes = np.array([*map(len, by_rank), 0], np.uint16)
    metadata["tokenizer_sha256"] = {
        "tokenizer.tiktoken": write_atomically(folder / "tokenizer.tiktoken", lambda file: file.write(lines)),
        "token_bytes.npy": write_array(folder / "token_bytes.npy", token_bytes),
    }
    return token_bytes


def write_chunk(folder: Path, name: str, chunk: Chunk, token_bytes: np.ndarray) -> dict:
    """Write the two files of a chunk. Returns its entry in metadata."""
    tokens, offsets = np.asarray(chunk.tokens, np.uint16), np.asarray(chunk.offsets, np.int64)
    return {
        "name": name,
        "documents": len(offsets) - 1,
        "tokens": chunk.text_tokens,
        "bytes": sum(int(token_bytes[ids].sum()) for ids in slices(tokens)),
        "skipped_documents": chunk.skipped,
        "tokens_sha256": write_array(folder / f"{name}.tokens.npy", tokens),
        "offsets_sha256": write_array(folder / f"{name}.offsets.npy", offsets),
    }


def slices(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """A chunk in pieces: what is computed from the whole of it would take its memory a second time."""
    return (tokens[start : start + 2**20] for start in range(0, len(tokens), 2**20))


def write_metadata(folder: Path, metadata: dict) -> None:
    content = json.dumps(metadata, indent=2) + "\n"
    write_atomically(folder / "metadata.json", lambda file: file.write(content.encode()))


def read_metadata(folder: Path) -> dict | None:
    path = folder / "metadata.json"
    try:
        return json.loads(path.read_bytes()) if path.exists() else None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}): delete {folder.parent} and start over") from error


def chunk_files(folder: Path, entry: dict) -> dict[str, tuple[Path, int]]:
    """The files of a chunk by kind, with their lengths."""
    lengths = {"tokens": entry["tokens"] + entry["documents"], "offsets": entry["documents"] + 1}
    return {kind: (folder / f"{entry['name']}.{kind}.npy", length) for kind, length in lengths.items()}


def is_old_format(folder: Path, metadata: dict) -> bool:
    """Whether a chunk has no end-of-text token at its end, as earlier versions of this script left them all."""
    for entry in metadata["chunks"]:
        try:
            tokens = np.load(chunk_files(folder, entry)["tokens"][0], mmap_mode="r")
        except (OSError, ValueError, EOFError):
            continue  # missing or damaged: reported as that
        if len(tokens) == entry["tokens"] and metadata["eos_id"] not in tokens[-1:]:
            return True
    return False


def old_format(output: Path, split: str) -> str:
    return (
        f"{output / split} has the token files of an earlier version, without an end-of-text token behind each "
        f"document: make them anew with: rm -r {shlex.quote(str(output))} && {preparing_command(output)}"
    )


def preparing_command(output: Path) -> str:
    """The command that prepares a folder like this one, out of its metadata."""
    recorded = {split: read_metadata(output / split) for split in ("validation", "train")}
    known = recorded["train"] or recorded["validation"]
    source, config = known["source"], ""
    if not Path(source).is_absolute():
        source, _, config = source.partition(":")
    carved_from_hub = known["validation_from_train"] and known["revision"] and source not in INSTALLED
    validation_option = "validation_from_train" if carved_from_hub else "validation_tokens"
    options = {
        "source": source,
        "config": config,
        "split": known["train_split"].removeprefix("train"),
        "revision": known["requested_revision"],
        # a rank file is recorded by its name and hash, without its folder
        "tokenizer": known["tokenizer"].partition(" sha256:")[0],
        "target_tokens": recorded["train"] and known["target_tokens"],
        validation_option: recorded["validation"]["target_tokens"] if recorded["validation"] else 0,
    }
    if known["text_column"] != "text":
        options["text_column"] = known["text_column"]
    if known.get("split_paragraphs"):
        options["split_paragraphs"] = True
    if known["chunk_tokens"] != 100_000_000:
        options["chunk_tokens"] = known["chunk_tokens"]
    options["output_dir"] = output
    words = ["python", "dataset_download.py"]
    for name, value in options.items():
        if value not in (None, ""):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def cut_back(folder: Path, metadata: dict | None) -> dict | None:
    """Metadata up to the first missing file, which is made anew with all behind it. InputError for a damaged one."""
    if metadata is None:
        return None
    for number, entry in enumerate(metadata["chunks"]):
        for path, length in chunk_files(folder, entry).values():
            if not path.exists():
                warn(f"{path} is missing: {len(metadata['chunks']) - number} chunks are made anew")
                chunks = metadata["chunks"][:number]
                totals = {key: sum(chunk[key] for chunk in chunks) for key in TOTALS}
                kept = {key: value for key, value in metadata.items() if key != "resume"}
                return {**kept, **totals, "finished": False, "chunks": chunks}
            try:
                found = len(np.load(path, mmap_mode="r"))
            except (ValueError, EOFError) as error:
                found = first_line(error)
            if found != length:
                raise InputError(f"{path} is damaged ({found}, not {length} numbers): {REMEDY}")
    whole = all((folder / name).exists() for name in metadata.get("tokenizer_sha256", ()))
    return {**metadata, "finished": metadata["finished"] and whole}


def prepare(args: argparse.Namespace) -> None:
    """Write the splits asked for, or what an interrupted run left to do of them, and report."""
    output = Path(args.output_dir)
    targets = {
        "validation": args.validation_from_train or args.validation_tokens,
        "train": args.target_tokens,
    }
    recorded = {split: read_metadata(output / split) for split in targets}
    names, asked = asked_for(args, recorded["validation"] or recorded["train"])
    refuse_other_arguments(output, recorded, asked, targets)
    for split, metadata in recorded.items():
        if metadata and is_old_format(output / split, metadata):
            raise InputError(old_format(output, split))
    splits = {split: cut_back(output / split, recorded[split]) for split in targets if targets[split]}
    if all(metadata and metadata["finished"] for metadata in splits.values()):
        print("already prepared")
    else:
        tokenizer = load_tokenizer(args.tokenizer)
        earlier = recorded["validation"] or recorded["train"] or {}
        revision = earlier.get("revision", asked.get("revision", args.revision))
        source = open_source(names, revision, args.text_column, asked["train_split"], args.split_paragraphs)
        for split, known in splits.items():
            splits[split] = known or new_metadata(args, asked, source, tokenizer, split, targets[split])
        check_disk(output, source, splits)
        with locked(output):
            if recorded != {split: read_metadata(output / split) for split in targets}:
                raise InputError(f"{output}: another process has just written here: run the same command again")
            remove_temporary_files(output)
            check_source_files(output, source, fresh=not earlier)
            prepare_splits(output, source, tokenizer, splits)
    for split, metadata in splits.items():
        report(output / split, metadata)


def asked_for(args: argparse.Namespace, earlier: dict | None) -> tuple[list[str], dict]:
    """The names of sources to try, and what the metadata of an earlier run has to agree with."""
    names = source_names(args)
    if earlier and earlier["source"] in names:
        # a restart never changes over from the source that resolved before
        names = [earlier["source"]]
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
    return names, asked


def new_metadata(
    args: argparse.Namespace, asked: dict, source: Source, tokenizer: Tokenizer, split: str, target: int
) -> dict:
    carved = not source.has_validation or bool(args.validation_from_train)
    if split == "validation" and carved and not source.files and not args.validation_from_train:
        warn(f"{source.name} has no validation split: the first {target:,} tokens of {asked['train_split']} become one")
    return {
        **asked,
        "source": source.name,
        "fallback_for": source.fallback_for,
        "revision": source.revision,
        "validation_from_train": carved,
        "split": split,
        "target_tokens": target,
        "vocab_size": tokenizer.eos_id + 1,
        "eos_id": tokenizer.eos_id,
        **dict.fromkeys(TOTALS, 0),
        "finished": False,
        "chunks": [],
    }


def refuse_other_arguments(output: Path, recorded: dict, asked: dict, targets: dict[str, int]) -> None:
    """InputError, with both values, when the output folder was prepared with other arguments."""
    before = dict(recorded)
    if recorded["train"] and not recorded["validation"]:
        # prepared without validation, whose documents would now be among those of train
        before["validation"] = {**recorded["train"], "target_tokens": 0}
    for split, metadata in before.items():
        for key, value in {**asked, "target_tokens": targets[split]}.items():
            if metadata and metadata.get(key, value) != value:
                raise InputError(
                    f"{output / split} was prepared with {key} {metadata[key]}, and this run asks for "
                    f"{value}: choose another --output_dir, or delete {output}"
                )


def bytes_needed(source: Source, splits: dict[str, dict]) -> int:
    """Disk for what is left to do, at 100 tokens a document and more.

    A token takes 2 bytes; a document 2 for its end-of-text token and 8 for its offset.
    """
    tokens = sum(metadata["target_tokens"] for metadata in splits.values())
    if source.files and all(path.name.endswith((*TEXT_SUFFIXES, ".jsonl")) for path in source.files):
        # a token is at least a byte of text
        tokens = min(tokens, sum(path.stat().st_size for path in source.files))
    tokens -= sum(metadata["tokens"] for metadata in splits.values())
    return max(0, 2 * tokens + 10 * tokens // 100)


def check_disk(output: Path, source: Source, splits: dict[str, dict]) -> None:
    needed = bytes_needed(source, splits)
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(f"{output}: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into the folder. The system lets go of the lock however this one ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder}: another dataset_download.py is at work in this folder") from error
        except OSError as error:
            warn(f"{folder}: this file system has no locks ({first_line(error)}): start one process at a time")
        yield


def check_source_files(output: Path, source: Source, fresh: bool) -> None:
    """Note size and time of every source file at a fresh start; afterwards, InputError for one that changed."""
    path = output / "source_files.json"
    stats = {str(file): file.stat() for file in source.files}
    found = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    if fresh or not path.exists():
        write_atomically(path, lambda file: file.write(json.dumps(found, indent=0).encode()))
        return
    noted = json.loads(path.read_bytes())
    if changed := sorted(name for name in noted.keys() | found.keys() if noted.get(name) != found.get(name)):
        raise InputError(
            f"{changed[0]} was changed, added or removed since {output} was begun: put it back as it was, or choose "
            "another --output_dir"
        )


def prepare_splits(output: Path, source: Source, tokenizer: Tokenizer, splits: dict[str, dict]) -> None:
    """Prepare validation, then train, which begins behind the rows carved off for validation."""
    validation, train = splits.get("validation"), splits["train"]
    carved = validation is not None and validation["validation_from_train"]
    halves = cut_single_document(source, train["train_split"], tokenizer, validation) if carved else None
    for split, metadata in splits.items():
        if metadata["finished"]:
            continue
        if halves:
            encoded = ((ids, None) for ids in halves[split][metadata["documents"] :])
        else:
            behind = [metadata, validation] if carved and split == "train" else [metadata]
            rows_read = sum(part["documents"] + part["skipped_documents"] for part in behind)
            resume = metadata.get("resume") or {"place": None, "skip": rows_read}
            name = "validation" if split == "validation" and not carved else metadata["train_split"]
            encoded = encode_rows(source.read(name, resume["place"]), tokenizer, resume["skip"])
        leave_some = carved and not halves and split == "validation"
        try:
            prepare_split(output / split, metadata, encoded, tokenizer, leave_some)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            needed = f"{bytes_needed(source, splits) / 1e9:,.3f} GB more are needed"
            raise InputError(
                f"{output}: no space left, {needed}: make room, then run the same command again"
            ) from error


def cut_single_document(source: Source, split: str, tokenizer: Tokenizer, validation: dict) -> dict | None:
    """For a source of one document: its first tokens for validation, the rest for train."""
    texts = (text for text in source.read(split, None) if text is not None)
    documents = list(islice(texts, 2))
    if len(documents) != 1:
        return None
    (ids,) = tokenizer.encode(documents)
    tokens = validation["target_tokens"]
    if len(ids) <= tokens:
        raise nothing_left(source.name, len(ids))
    return {"validation": [ids[:tokens]], "train": [ids[tokens:]]}


def prepare_split(
    folder: Path, metadata: dict, encoded: Iterator[tuple], tokenizer: Tokenizer, leave_some: bool
) -> None:
    """Write a split. Metadata is rewritten behind each chunk, so that it never names a file not there."""
    split, target = metadata["split"], metadata["target_tokens"]
    folder.mkdir(parents=True, exist_ok=True)
    token_bytes = write_tokenizer(folder, tokenizer, metadata)
    before, started = metadata["tokens"], time.monotonic()
    # disable=None: no bar where stderr is not a terminal
    with tqdm(desc=split, total=target, initial=before, unit="token", unit_scale=True, disable=None) as bar:
        for chunk in split_chunks(encoded, metadata, leave_some, bar.update):
            if len(chunk.offsets) == 1:
                metadata["skipped_documents"] += chunk.skipped
                break
            entry = write_chunk(folder, f"chunk_{len(metadata['chunks']):03d}", chunk, token_bytes)
            metadata["chunks"].append(entry)
            metadata["resume"] = chunk.resume
            for total in TOTALS:
                metadata[total] += entry[total]
            write_metadata(folder, metadata)
            if bar.disable:
                done, seconds = metadata["tokens"], time.monotonic() - started
                left = tqdm.format_interval(max(0, target - done) * seconds / (done - before))
                rate = f"{(done - before) / seconds:,.0f} tokens a second, {left} left"
                print(f"{split}: {done:,} of {target:,} tokens, {rate}", file=sys.stderr, flush=True)
    metadata.pop("resume", None)
    metadata["finished"] = True
    write_metadata(folder, metadata)


def verify(output: Path) -> int:
    """Read the files of every split again and print what is wrong. Returns the exit status."""
    folders = [output / split for split in ("validation", "train") if (output / split / "metadata.json").exists()]
    if not folders:
        raise InputError(f"{output}: nothing is prepared here")
    problems = 0
    for folder in folders:
        metadata, before = read_metadata(folder), problems
        if is_old_format(folder, metadata):
            raise InputError(old_format(output, folder.name))
        for problem in verify_split(folder, metadata):
            print(problem)
            problems += 1
        if problems == before:
            print(
                f"{folder}: {metadata['tokens']:,} tokens in {len(metadata['chunks'])} chunks are as they were written"
            )
    return 1 if problems else 0


def verify_split(folder: Path, metadata: dict) -> Iterator[str]:
    for name, digest in metadata.get("tokenizer_sha256", {}).items():
        yield from verify_file(folder / name, digest)
    for entry in metadata["chunks"]:
        files = chunk_files(folder, entry)
        damaged = [line for kind, (path, _) in files.items() for line in verify_file(path, entry[f"{kind}_sha256"])]
        yield from damaged or verify_chunk(folder, entry, metadata)
    for key in TOTALS:
        total = sum(entry.get(key, 0) for entry in metadata["chunks"])
        # rows without text behind the last document belong to no chunk
        if key in metadata and metadata[key] != total and (key != "skipped_documents" or metadata[key] < total):
            wrong = f"{key} {metadata[key]:,}, and its chunks hold {total:,}"
            yield f"{folder / 'metadata.json'}: {wrong}: delete {folder.parent} and start over"
    if not metadata["finished"]:
        yield f"{folder}: not finished: run the command that began it again"


def verify_file(path: Path, digest: str) -> Iterator[str]:
    if not path.exists():
        yield f"{path} is missing: run the command that prepared it again"
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            yield f"{path} is damaged (another SHA-256 than in metadata.json): {REMEDY}"


def verify_chunk(folder: Path, entry: dict, metadata: dict) -> Iterator[str]:
    """What a SHA-256 cannot tell: whether the content was sound when it was written."""
    (tokens_path, length), (offsets_path, documents) = chunk_files(folder, entry).values()
    tokens, offsets = np.load(tokens_path, mmap_mode="r"), np.load(offsets_path)
    vocab_size = metadata["vocab_size"]
    if len(tokens) != length or any(int(ids.max()) >= vocab_size for ids in slices(tokens)):
        yield f"{tokens_path}: not {length:,} ids below {vocab_size:,}: {REMEDY}"
        return
    complete = len(offsets) == documents and offsets[0] == 0 and offsets[-1] == length
    if not complete or (np.diff(offsets) <= 0).any():
        yield f"{offsets_path}: not {documents:,} rising offsets from 0 to {length:,}: {REMEDY}"
        return
    # the end-of-text id stands behind each document, and nowhere else
    ends = tokens[offsets[1:] - 1] == metadata["eos_id"]
    separators = sum(int((ids == metadata["eos_id"]).sum()) for ids in slices(tokens))
    if not ends.all() or separators != entry["documents"]:
        yield f"{tokens_path}: not an end-of-text token behind each of {entry['documents']:,} documents: {REMEDY}"


def report(folder: Path, metadata: dict) -> None:
    """Print a split's totals, and how much of the paper's rows would be padding."""
    documents, tokens, size = metadata["documents"], metadata["tokens"], metadata["bytes"]
    kept = 0
    for chunk in metadata["chunks"]:
        lengths = np.diff(np.load(folder / f"{chunk['name']}.offsets.npy")) - 1  # without the end-of-text tokens
        kept += int(np.minimum(lengths, ROW_TOKENS).sum())
    if skipped := metadata.get("skipped_documents"):
        print(f"{folder}: {skipped:,} rows without a string under '{metadata['text_column']}' were skipped")
    if tokens >= 2 * metadata["target_tokens"]:
        asked = f"{metadata['target_tokens']:,} tokens were asked for"
        print(f"{folder}: {asked}, and the last document, which is not cut, made them {tokens:,}")
    if tokens < metadata["target_tokens"]:
        print(f"{folder}: the source ended before {metadata['target_tokens']:,} tokens")
    print(
        f"{folder}: {documents:,} documents, {tokens:,} tokens, {size:,} bytes, {size / tokens:.2f} bytes a "
        f"token; {1 - kept / (documents * ROW_TOKENS):.1%} padding in rows of {ROW_TOKENS:,}, one a document, which "
        f"hold {kept / tokens:.1%} of the tokens"
    )


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="dataset_download.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--source",
        help="owner/name on the hub; a .txt, .md, .rst, .py, .jsonl, .jsonl.zst or .parquet file, or a folder of "
        "them; stdlib or site-packages, the source of Python's standard library or of the installed packages",
    )
    add("--config", help="configuration of a hub source")
    add("--split", help="split of a hub source to train on (default: train)")
    add(
        "--revision",
        help="commit, tag or branch of a hub source (default: the newest commit, which is recorded)",
    )
    add(
        "--text_column",
        default="text",
        help="where the rows of .jsonl, .parquet and hub sources keep their text",
    )
    add(
        "--split_paragraphs",
        action="store_true",
        help="make each paragraph of a local source a document, drop duplicates, and put them in a fixed random order "
        "(holds the corpus in memory)",
    )
    add("--tokenizer", default="gpt2", help="gpt2, bytes or PATH.tiktoken")
    add("--target_tokens", type=positive_token_count, default=10_000_000_000, help="for training")
    validation = parser.add_mutually_exclusive_group().add_argument
    validation("--validation_tokens", type=token_count, default=10_000_000, help="0: no validation split")
    validation(
        "--validation_from_train",
        type=positive_token_count,
        metavar="N",
        help="take the first N tokens' "
        "documents of train for validation, also where the source has a validation split of its own",
    )
    add("--chunk_tokens", type=positive_token_count, default=100_000_000, help="per pair of files")
    add("--output_dir", default="slimpajama_data")
    add(
        "--verify",
        action="store_true",
        help="check the finished files in --output_dir; exit status 1 if any is bad",
    )
    args = parser.parse_args(argv)
    try:
        if args.verify:
            sys.exit(verify(Path(args.output_dir)))
        prepare(args)
    except KeyboardInterrupt:
        print(
            "dataset_download.py: stopped: the same command goes on behind the last complete chunk",
            file=sys.stderr,
        )
        sys.exit(130)
    except (InputError, OSError) as error:
        # OSError: a full disk, a lost connection. What is complete stays, for the same command to continue.
        print(f"dataset_download.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
