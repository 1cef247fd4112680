"""Text source -> token files: a corpus is tokenised once, and training reads nothing but uint16 arrays.

    python dataset_download.py                                    # the paper's data: SlimPajama, 10B tokens
    python dataset_download.py --source HuggingFaceFW/fineweb-edu --config sample-10BT --output_dir fineweb
    python dataset_download.py --source my_texts --target_tokens 4e6 --validation_tokens 1e5
    python dataset_download.py --source stdlib --tokenizer bytes --validation_tokens 2e5 --output_dir demo

Under <output_dir>/train and <output_dir>/validation:
    chunk_NNN.tokens.npy    uint16 [tokens], documents back to back, no separators
    chunk_NNN.offsets.npy   int64 [documents + 1], document i is tokens[offsets[i]:offsets[i + 1]]
    token_bytes.npy         uint16 [vocab_size], the bytes behind each token id, 0 for the end-of-text id
    tokenizer.tiktoken      the tokenizer's ranks, one a line: base64 of the bytes, a space, the rank
    metadata.json           where the text came from, totals, SHA-256 of each chunk's files, finished or not

The same command continues an interrupted run: complete chunks stay, and their documents are skipped.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")
TEXT_COLUMN = "text"
# pydoc_data is a single generated string, long enough to be most of a small validation split
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MAX_VOCABULARY = 65_535
BATCH_DOCUMENTS = 1_024
BATCH_CHARACTERS = 4_000_000
ROW_TOKENS = 2_048  # the paper's protocol: a document a row, cut or filled to this length


class InputError(ValueError):
    """Something the user can mend: an argument, a file, a source out of reach."""


@dataclass(frozen=True)
class Tokenizer:
    """Token bytes with their ranks (the token ids), and the function that encodes a batch of documents."""

    name: str
    ranks: dict[bytes, int]
    encode: Callable[[list[str]], list]

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
    threads = os.cpu_count() or 1
    return Tokenizer(name, ranks, lambda texts: encoding.encode_ordinary_batch(texts, num_threads=threads))


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


def encode_bytes(texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(utf8(text), np.uint8) for text in texts]


def utf8(text: str) -> bytes:
    """UTF-8 of a document. Surrogate pairs are joined and lone ones become U+FFFD, as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the tokens of each document, uint16 [tokens], encoding a bounded batch at a time."""
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield from (np.asarray(ids, np.uint16) for ids in tokenizer.encode(batch))
            batch, characters = [], 0
    yield from (np.asarray(ids, np.uint16) for ids in tokenizer.encode(batch))


@dataclass(frozen=True)
class Source:
    """Documents in an order that never changes: read(split, skip) yields those after the first `skip`.

    Without a validation split of its own, validation is carved off the front of train.
    """

    name: str
    revision: str | None
    read: Callable[[str, int], Iterable[str]]
    has_validation: bool = False


def source_names(argument: str | None, config: str | None) -> list[str]:
    """What metadata calls the source: the names to try, best first. A hub configuration follows a colon."""
    like_hub_name = argument and HUB_NAME.fullmatch(argument) and not argument.endswith(SUFFIXES)
    if like_hub_name and not Path(argument).exists():
        return [f"{argument}:{config}" if config else argument]
    if config:
        raise InputError(f"--config {config}: only a hub source, --source owner/name, has configurations")
    if argument is None:
        return PAPER_SOURCES
    return ["stdlib"] if argument == "stdlib" else [str(Path(argument).resolve())]


def open_source(names: list[str], revision: str | None) -> Source:
    """Open the first name that resolves. `revision` pins a hub dataset; None takes the newest."""
    path = Path(names[0])
    if names != ["stdlib"] and not path.is_absolute():
        return open_hub_source(names, revision)
    files = stdlib_files() if names == ["stdlib"] else corpus_files(path)
    return Source(names[0], revision, lambda split, skip: read_files(files, skip))


def open_hub_source(names: list[str], revision: str | None) -> Source:
    """The first name that resolves, or an InputError with every reason and what to do."""
    reasons = []
    for name in names:
        try:
            source = open_hub_dataset(name, revision)
        # ValueError: no such configuration. RuntimeError: a dataset that needs its own loading script.
        except (OSError, ValueError, RuntimeError) as error:
            reasons.append(f"{name} does not resolve ({first_line(error)})")
            continue
        if reasons:
            print(f"WARNING: {reasons[0]}: using {name}, the same data, in its place", file=sys.stderr)
        return source
    hint = ALTERNATIVES if names == PAPER_SOURCES else "nor is it a file or folder here"
    raise InputError(f"{'; '.join(reasons)}; {hint}")


def open_hub_dataset(name: str, revision: str | None) -> Source:
    import datasets

    repository, _, config = name.partition(":")
    builder = datasets.load_dataset_builder(repository, config or None, revision=revision)
    streams = builder.as_streaming_dataset()
    if "train" not in streams:
        raise InputError(f"its splits are {', '.join(streams)}, and train is not among them")

    def read(split: str, skip: int) -> Iterator[str]:
        for number, row in enumerate(streams[split].skip(skip), skip + 1):
            yield text_of(row, f"{name}, split {split}, row {number}")

    # the commit is recorded, so that a restart reads the same rows after the dataset was changed
    return Source(name, builder.hash, read, has_validation="validation" in streams)


def stdlib_files() -> list[Path]:
    """The .py files of this Python's standard library, in a fixed order that mixes its packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if STDLIB_SKIPPED.isdisjoint(path.relative_to(root).parts)]
    # some old modules are not UTF-8
    files = [path for path in files if "\ufffd" not in path.read_bytes().decode(errors="replace")]
    # validation is the first files: by name, that would be asyncio alone
    return sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def corpus_files(path: Path) -> list[Path]:
    """The file itself, or every file of a known kind below the folder, sorted."""
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
        if not files:
            raise InputError(f"{path}: no {known} file in this folder")
        return files
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: unknown kind of file, not {known}")
    return [path]


def read_files(files: list[Path], skip: int) -> Iterator[str]:
    documents = chain.from_iterable(map(read_file, files))
    if sum(1 for _ in islice(documents, skip)) < skip:
        raise InputError(f"the source has changed: it no longer holds the {skip:,} documents read before")
    return documents


def read_file(path: Path) -> Iterator[str]:
    """Yield the documents of a file: its whole text, or the text column of each row."""
    try:
        if path.name.endswith(".parquet"):
            yield from read_parquet(path)
        elif path.name.endswith(".jsonl.zst"):
            # pyarrow, because zstandard's reader takes a file that was cut off for a complete one
            import pyarrow

            with pyarrow.input_stream(str(path), compression="zstd") as stream:
                yield from read_json_lines(path, io.BufferedReader(stream))
        elif path.name.endswith(".jsonl"):
            with path.open("rb") as lines:
                yield from read_json_lines(path, lines)
        else:
            yield path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 at byte {error.start:,}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error


def read_json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error
            yield text_of(row, f"{path}, line {number}")


def read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if TEXT_COLUMN not in file.schema_arrow.names:
                raise InputError(f"{path}: no '{TEXT_COLUMN}' among {', '.join(file.schema_arrow.names)}")
            batches = file.iter_batches(batch_size=256, columns=[TEXT_COLUMN])
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, 1):
                yield text_of(row, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def text_of(row: object, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(TEXT_COLUMN), str):
        raise InputError(f"{where}: no string under '{TEXT_COLUMN}'")
    return row[TEXT_COLUMN]


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def split_chunks(
    encoded: Iterator[np.ndarray], metadata: dict, leave_one: bool, progress: Callable[[int], object]
) -> Iterator[tuple[array, array]]:
    """Yield chunks from where metadata stands, up to the document that reaches the target or to the end.

    A chunk is its tokens, 2 bytes each, and its offsets, 8 bytes each. InputError, before the last chunk is
    yielded, for a split without any token, and with `leave_one` when no document comes after the split.
    """
    total, target = metadata["tokens"], metadata["target_tokens"]
    tokens, offsets = array("H"), array("q", [0])
    while total < target and (ids := next(encoded, None)) is not None:
        tokens.frombytes(ids.tobytes())
        offsets.append(len(tokens))
        total += len(ids)
        progress(len(ids))
        if len(tokens) >= metadata["chunk_tokens"] and total < target:
            yield tokens, offsets
            tokens, offsets = array("H"), array("q", [0])
    if total == 0:
        raise InputError(f"{metadata['source']} has no text for the {metadata['split']} split")
    if leave_one and next(encoded, None) is None:
        raise nothing_left(metadata["source"], total)
    if len(offsets) > 1:
        yield tokens, offsets


def nothing_left(source: str, tokens: int) -> InputError:
    return InputError(f"nothing is left for training: validation takes all {tokens:,} tokens of {source}")


def write_atomically(path: Path, write: Callable) -> str:
    """Let `write` fill a temporary file, then give it its name. Returns the SHA-256 of the content."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w+b") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    os.replace(temporary, path)
    return digest


def write_array(path: Path, values: np.ndarray) -> str:
    return write_atomically(path, lambda file: np.save(file, values))


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Write what bits per byte and decoding need. Returns the bytes behind each id, uint16 [vocab_size]."""
    by_rank = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    lines = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(by_rank))
    token_bytes = np.array([*map(len, by_rank), 0], np.uint16)
    write_atomically(folder / "tokenizer.tiktoken", lambda file: file.write(lines))
    write_array(folder / "token_bytes.npy", token_bytes)
    return token_bytes


def write_chunk(folder: Path, name: str, chunk: tuple[array, array], token_bytes: np.ndarray) -> dict:
    """Write the two files of a chunk. Returns its entry in metadata."""
    tokens, offsets = np.asarray(chunk[0], np.uint16), np.asarray(chunk[1], np.int64)
    # in slices, because indexing with the whole chunk would take its memory a second time
    slices = (tokens[start : start + 2**20] for start in range(0, len(tokens), 2**20))
    return {
        "name": name,
        "documents": len(offsets) - 1,
        "tokens": len(tokens),
        "bytes": sum(int(token_bytes[ids].sum()) for ids in slices),
        "tokens_sha256": write_array(folder / f"{name}.tokens.npy", tokens),
        "offsets_sha256": write_array(folder / f"{name}.offsets.npy", offsets),
    }


def write_metadata(folder: Path, metadata: dict) -> None:
    content = json.dumps(metadata, indent=2) + "\n"
    write_atomically(folder / "metadata.json", lambda file: file.write(content.encode()))


def read_metadata(folder: Path) -> dict | None:
    path = folder / "metadata.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def prepare(args: argparse.Namespace) -> None:
    """Write the splits asked for, or what an interrupted run left to do of them, and report."""
    output = Path(args.output_dir)
    targets = {"validation": args.validation_tokens, "train": args.target_tokens}
    recorded = {split: read_metadata(output / split) for split in targets}
    names, asked = asked_for(args, recorded["validation"] or recorded["train"])
    refuse_other_arguments(output, recorded, asked, targets)
    splits = {split: recorded[split] for split in targets if targets[split]}
    if all(metadata and metadata["finished"] for metadata in splits.values()):
        print("already prepared")
    else:
        tokenizer = load_tokenizer(args.tokenizer)
        check_disk(output, sum(targets.values()) - sum(known["tokens"] for known in splits.values() if known))
        source = open_source(names, asked["revision"])
        for split, known in splits.items():
            splits[split] = known or new_metadata(asked, source, tokenizer, split, targets[split])
        prepare_splits(output, source, tokenizer, splits)
    for split, metadata in splits.items():
        report(output / split, metadata)


def asked_for(args: argparse.Namespace, earlier: dict | None) -> tuple[list[str], dict]:
    """The names of sources to try, and what the metadata of an earlier run has to agree with."""
    names = source_names(args.source, args.config)
    if earlier and earlier["source"] in names:
        # a restart never changes over from the source that resolved before
        names = [earlier["source"]]
    asked = {
        "source": names[0],
        "revision": earlier["revision"] if earlier else None,
        "text_column": TEXT_COLUMN,
        "tokenizer": tokenizer_name(args.tokenizer),
        "chunk_tokens": args.chunk_tokens,
    }
    if names == ["stdlib"]:
        asked["revision"] = platform.python_version()
    return names, asked


def new_metadata(asked: dict, source: Source, tokenizer: Tokenizer, split: str, target: int) -> dict:
    return {
        **asked,
        "source": source.name,
        "revision": source.revision,
        "split": split,
        "target_tokens": target,
        "vocab_size": tokenizer.eos_id + 1,
        "eos_id": tokenizer.eos_id,
        "documents": 0,
        "tokens": 0,
        "bytes": 0,
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
            if metadata and metadata[key] != value:
                raise InputError(
                    f"{output / split} was prepared with {key} {metadata[key]}, and this run asks for "
                    f"{value}: choose another --output_dir, or delete {output}"
                )


def check_disk(output: Path, tokens: int) -> None:
    # 2 bytes a token and 8 a document: ample from 100 tokens a document on, and SlimPajama has 1,000
    needed = 2 * tokens + 8 * tokens // 100
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(f"{output}: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free")


def prepare_splits(output: Path, source: Source, tokenizer: Tokenizer, splits: dict[str, dict]) -> None:
    """Prepare validation, then train, which begins after the documents carved off for validation."""
    carved = "validation" in splits and not source.has_validation
    halves = cut_single_document(source, tokenizer, splits["validation"]["target_tokens"]) if carved else None
    for split, metadata in splits.items():
        if metadata["finished"]:
            continue
        done = metadata["documents"]
        if halves:
            encoded = iter(halves[split][done:])
        elif carved:
            skip = done if split == "validation" else done + splits["validation"]["documents"]
            encoded = encode_documents(source.read("train", skip), tokenizer)
        else:
            encoded = encode_documents(source.read(split, done), tokenizer)
        leave_one = carved and not halves and split == "validation"
        prepare_split(output / split, metadata, encoded, tokenizer, leave_one)


def cut_single_document(source: Source, tokenizer: Tokenizer, tokens: int) -> dict | None:
    """For a source of one document: its first `tokens` tokens for validation, the rest for train."""
    documents = list(islice(source.read("train", 0), 2))
    if len(documents) != 1:
        return None
    (ids,) = encode_documents(documents, tokenizer)
    if len(ids) <= tokens:
        raise nothing_left(source.name, len(ids))
    return {"validation": [ids[:tokens]], "train": [ids[tokens:]]}


def prepare_split(
    folder: Path, metadata: dict, encoded: Iterator[np.ndarray], tokenizer: Tokenizer, leave_one: bool
) -> None:
    """Write a split. Metadata is rewritten behind each chunk, so that it never names a file not there."""
    split, target = metadata["split"], metadata["target_tokens"]
    folder.mkdir(parents=True, exist_ok=True)
    token_bytes = write_tokenizer(folder, tokenizer)
    # disable=None: no bar where stderr is not a terminal
    with tqdm(
        desc=split, total=target, initial=metadata["tokens"], unit="token", unit_scale=True, disable=None
    ) as bar:
        for chunk in split_chunks(encoded, metadata, leave_one, bar.update):
            entry = write_chunk(folder, f"chunk_{len(metadata['chunks']):03d}", chunk, token_bytes)
            metadata["chunks"].append(entry)
            for total in ("documents", "tokens", "bytes"):
                metadata[total] += entry[total]
            write_metadata(folder, metadata)
            if bar.disable:
                print(f"{split}: {metadata['tokens']:,} of {target:,} tokens", file=sys.stderr, flush=True)
    metadata["finished"] = True
    write_metadata(folder, metadata)


def report(folder: Path, metadata: dict) -> None:
    """Print a split's totals, and how much of the paper's rows would be padding."""
    documents, tokens, size = metadata["documents"], metadata["tokens"], metadata["bytes"]
    kept = 0
    for chunk in metadata["chunks"]:
        lengths = np.diff(np.load(folder / f"{chunk['name']}.offsets.npy"))
        kept += int(np.minimum(lengths, ROW_TOKENS).sum())
    if tokens < metadata["target_tokens"]:
        print(f"{folder}: the source ended before {metadata['target_tokens']:,} tokens")
    print(
        f"{folder}: {documents:,} documents, {tokens:,} tokens, {size:,} bytes, {size / tokens:.2f} bytes a "
        f"token; {1 - kept / (documents * ROW_TOKENS):.1%} padding in rows of {ROW_TOKENS:,}, one a document"
    )


def token_count(text: str) -> int:
    """A whole number of tokens, as in 4000000, 4_000_000 or 4e6."""
    number = float(text)
    if number < 0 or not number.is_integer():
        raise ValueError(f"{text} is not a number of tokens")
    return int(number)


def positive_token_count(text: str) -> int:
    number = token_count(text)
    if number == 0:
        raise ValueError("no tokens")
    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="dataset_download.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", help="hub name, stdlib, a .txt, .jsonl, .jsonl.zst or .parquet file, a folder of them")
    add("--config", help="configuration of a hub source")
    add("--tokenizer", default="gpt2", help="gpt2, bytes or PATH.tiktoken")
    add("--target_tokens", type=positive_token_count, default=10_000_000_000, help="for training")
    add("--validation_tokens", type=token_count, default=10_000_000, help="0: no validation split")
    add("--chunk_tokens", type=positive_token_count, default=100_000_000, help="per pair of files")
    add("--output_dir", default="slimpajama_data")
    try:
        prepare(parser.parse_args(argv))
    except (InputError, OSError) as error:
        # OSError: a full disk, a lost connection. What is complete stays, for the same command to continue.
        print(f"dataset_download.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
