"""dataset_download.py through its command line, against numpy, tiktoken and hashlib."""

import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import GPT2_RANKS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_common import gpt2_encoding

from dataset_download import main

KEYS = {
    "source", "revision", "split", "text_column", "tokenizer", "vocab_size", "eos_id", "chunk_tokens",
    "target_tokens", "documents", "tokens", "bytes", "chunks", "finished", "requested_revision", "fallback_for",
    "train_split", "validation_from_train", "skipped_documents", "split_paragraphs", "tokenizer_sha256",
}  # fmt: skip
KINDS = ("jsonl", "jsonl.zst", "jsonl.gz", "json.gz", "parquet")
TEXTS = ["Hello world.", "", "zwei\n\nZeilen", "<|endoftext|>", "nul\0 \U0001f600", "x" * 300, "last"]


def run(source, output, *options, tokenizer="bytes", validation=0):
    arguments = ["--source", source, "--tokenizer", tokenizer, "--validation_tokens", validation]
    main([str(value) for value in (*arguments, "--output_dir", output, *options)])


def refused(capsys, *arguments, **options):
    """The one line that a run which is refused leaves on stderr."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, **options)
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("dataset_download.py: error: ")
    return message


def read_split(folder):
    """Metadata and the documents (uint16 arrays without end-of-text tokens), with the layout checked."""
    metadata = json.loads((folder / "metadata.json").read_text())
    assert set(metadata) - {"requested_from_train"} == KEYS  # which a hub source has beside them
    token_bytes = np.load(folder / "token_bytes.npy")
    assert token_bytes.dtype == np.uint16 and token_bytes.shape == (metadata["vocab_size"],)
    assert token_bytes[metadata["eos_id"]] == 0
    documents = []
    for number, chunk in enumerate(metadata["chunks"]):
        assert chunk["name"] == f"chunk_{number:03d}"
        paths = {kind: folder / f"{chunk['name']}.{kind}.npy" for kind in ("tokens", "offsets")}
        for kind, path in paths.items():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == chunk[f"{kind}_sha256"]
        tokens, offsets = np.load(paths["tokens"]), np.load(paths["offsets"])
        assert tokens.dtype == np.uint16 and offsets.dtype == np.int64
        assert offsets[0] == 0 and offsets[-1] == len(tokens) == chunk["tokens"] + chunk["documents"]
        assert (np.diff(offsets) > 0).all() and len(offsets) == chunk["documents"] + 1
        assert token_bytes[tokens].sum() == chunk["bytes"]
        assert np.flatnonzero(tokens == metadata["eos_id"]).tolist() == (offsets[1:] - 1).tolist()
        documents += [document[:-1] for document in np.split(tokens, offsets[1:-1])]
    for total in ("documents", "tokens", "bytes"):
        assert metadata[total] == sum(chunk[total] for chunk in metadata["chunks"])
    expected = {"metadata.json", "token_bytes.npy", "tokenizer.tiktoken"}
    expected |= {f"{c['name']}.{kind}.npy" for c in metadata["chunks"] for kind in ("tokens", "offsets")}
    assert {path.name for path in folder.iterdir()} == expected
    return metadata, documents


def unfinish(folder):
    """As after a kill in front of the last metadata."""
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))


def texts_of(folder):
    return [bytes(ids.astype(np.uint8)).decode() for ids in read_split(folder)[1]]


def files_of(output):
    return {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts))
    return path


def write_source(kind, folder, texts):
    """The texts as a source of the given kind; returns what to pass as --source."""
    folder.mkdir(parents=True)
    if kind == "txt":
        for number, text in enumerate(texts):
            below = folder / f"part_{number // 3}"
            below.mkdir(exist_ok=True)
            (below / f"{number:03d}.txt").write_bytes(text.encode())
        (folder / "table.csv").write_text("of no known kind: left out")
        return folder
    if kind == "jsonl":
        return write_jsonl(folder / "texts.jsonl", texts)
    if kind in ("jsonl.zst", "jsonl.gz", "json.gz"):
        import zstandard

        compress = zstandard.ZstdCompressor().compress if kind == "jsonl.zst" else gzip.compress
        lines = write_jsonl(folder / "texts", texts).read_bytes()
        # two frames in a file, as zstd -c a b > c leaves them
        (folder / f"texts.{kind}").write_bytes(compress(lines[:100]) + compress(lines[100:]))
        return folder / f"texts.{kind}"
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"number": list(range(len(texts))), "text": texts})
    parquet.write_table(table, folder / "texts.parquet", row_group_size=2)
    return folder


def random_texts(count, seed=0):
    chance = random.Random(seed)
    return [f"{number}: " + "word " * chance.randrange(60) for number in range(count)]


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", random_texts(200))


@pytest.mark.parametrize("kind", ["txt", *KINDS])
def test_documents_of_every_kind_of_file(kind, tmp_path, capsys):
    source = write_source(kind, tmp_path / "source", TEXTS)
    run(source, tmp_path / "out")
    metadata, _ = read_split(tmp_path / "out/train")
    assert texts_of(tmp_path / "out/train") == TEXTS
    size = sum(len(text.encode()) for text in TEXTS)
    expected = {
        "source": str(source), "revision": None, "split": "train", "text_column": "text", "finished": True,
        "tokenizer": "bytes", "vocab_size": 257, "eos_id": 256, "chunk_tokens": 100_000_000,
        "target_tokens": 10_000_000_000, "documents": len(TEXTS), "tokens": size, "bytes": size,
    }  # fmt: skip
    assert {key: metadata[key] for key in expected} == expected
    assert not (tmp_path / "out/validation").exists()
    printed = capsys.readouterr().out
    assert f"{1 - size / (len(TEXTS) * 2048):.1%} padding" in printed  # in the paper's rows


def test_standard_library(tmp_path):
    run("stdlib", tmp_path / "out", "--target_tokens", "1e5", validation=20_000)
    validation, train = texts_of(tmp_path / "out/validation"), texts_of(tmp_path / "out/train")
    metadata, _ = read_split(tmp_path / "out/train")
    assert metadata["source"] == "stdlib"
    assert metadata["revision"] == ".".join(map(str, sys.version_info[:3]))
    assert sum(len(text.encode()) for text in validation) >= 20_000
    assert metadata["tokens"] >= 100_000
    assert not set(filter(None, validation)) & set(train)
    for text in filter(None, train):
        compile(text, "document", "exec")


def test_a_byte_order_mark_is_no_text(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(source / "b.jsonl", ["from json", "\ufeffkept: a character of the text"])
    for name, text in {"a.txt": b"from text", "b.jsonl": (source / "b.jsonl").read_bytes()}.items():
        (source / name).write_bytes(b"\xef\xbb\xbf" + text)
    run(source, tmp_path / "out")
    assert texts_of(tmp_path / "out/train") == [
        "from text",
        "from json",
        "\ufeffkept: a character of the text",
    ]


def test_what_is_left_out_of_a_folder_is_said(tmp_path, capsys):
    source = tmp_path / "source"
    (source / ".cache").mkdir(parents=True)
    (source / "below.txt").mkdir()
    for name in (".hidden.txt", ".cache/a.txt", "c.csv", "below.txt/d.TXT", "a.txt", "below.txt/b.txt", "README.md"):
        (source / name).write_text(name)
    (source / "link.txt").symlink_to("a.txt")
    (source / "link").symlink_to("below.txt")
    run(source, tmp_path / "out")
    assert texts_of(tmp_path / "out/train") == ["a.txt", "below.txt/b.txt", "below.txt/d.TXT", "a.txt"]
    assert f"4 other files are left out, {source / '.hidden.txt'} first" in capsys.readouterr().err
    run(source / ".hidden.txt", tmp_path / "hidden")  # named, and so meant
    assert texts_of(tmp_path / "hidden/train") == [".hidden.txt"]


@pytest.mark.parametrize("target", ["nowhere", "."])
def test_a_link_that_cannot_be_read_is_refused(target, tmp_path, capsys):
    source = write_source("txt", tmp_path / "source", TEXTS)
    (source / "part_0/link.txt").symlink_to(target)
    assert "part_0/link.txt" in refused(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out/train/metadata.json").exists()


def test_a_folder_that_may_not_be_read_is_refused(tmp_path, capsys, monkeypatch):
    source = write_source("txt", tmp_path / "source", TEXTS)
    scandir = os.scandir

    def no_permission(path):  # root may read anything, so the system cannot be asked to refuse
        if str(path).endswith("part_1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", no_permission)
    message = refused(capsys, source, tmp_path / "out")
    assert "Permission denied" in message and "part_1" in message


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An environment with three packages, and the files of it that are read, in their order."""
    root = tmp_path / "environment"
    contents = {
        f"{package}/{name}.py": f"# {package}.{name}\n\nimport os\n" for package in "abc" for name in "xyz"
    }
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("a/tests/test_x.py", "b/.hidden.py", "b/data.txt", "b/x.pyc"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("left out")
    (root / "c/latin1.py").write_bytes(b"# caf\xe9")
    paths = {"purelib": str(root), "platlib": str(root)}
    monkeypatch.setattr("sysconfig.get_paths", lambda: paths)
    order = sorted(contents, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return SimpleNamespace(root=root, texts=[contents[name] for name in order])


def test_installed_packages(packages, tmp_path, capsys):
    run("site-packages", tmp_path / "out", validation=30)
    metadata, _ = read_split(tmp_path / "out/train")
    assert texts_of(tmp_path / "out/validation") + texts_of(tmp_path / "out/train") == packages.texts
    assert metadata["source"] == "site-packages" and metadata["revision"].startswith("sha256:")
    # another environment is another corpus: it gets another revision, and never goes on with what was begun
    unfinish(tmp_path / "out/train")
    (packages.root / "a/x.py").write_text("import sys\n")
    assert "a/x.py was changed" in refused(capsys, "site-packages", tmp_path / "out", validation=30)
    run("site-packages", tmp_path / "other", validation=30)
    assert read_split(tmp_path / "other/train")[0]["revision"] != metadata["revision"]


def paragraphs_of(texts):
    """The recipe that made the corpus of the committed results, on texts with Unix line ends."""
    paragraphs = sorted({part.strip("\n") for text in texts for part in text.split("\n\n")} - {""})
    return random.Random(0).sample(paragraphs, len(paragraphs))


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("\nab é"), max_size=30), min_size=1, max_size=9),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    chunk=st.integers(1, 20),
)
def test_paragraphs(texts, line_end, chunk):
    """In the order of the recipe, whatever the line ends."""
    expected = paragraphs_of(texts)
    with tempfile.TemporaryDirectory() as folder:
        source = write_jsonl(Path(folder) / "t.jsonl", [text.replace("\n", line_end) for text in texts])
        with contextlib.nullcontext() if expected else pytest.raises(SystemExit):
            run(source, Path(folder) / "out", "--split_paragraphs", "--chunk_tokens", chunk)
            assert texts_of(Path(folder) / "out/train") == expected


def test_paragraphs_are_of_local_rows_that_have_a_text(tmp_path, capsys):
    assert "--split_paragraphs" in refused(capsys, "owner/name", tmp_path / "hub", "--split_paragraphs")
    source = write_jsonl(tmp_path / "none.jsonl", ["a", *[None] * 11])
    assert "11 of the first 12 rows" in refused(capsys, source, tmp_path / "out", "--split_paragraphs")
    run(source, tmp_path / "out", "--split_paragraphs", "--skip_rows_without_text")
    assert texts_of(tmp_path / "out/train") == ["a"]


def card(configs):
    return yaml.safe_dump({"license": "mit", "configs": configs}).join(["---\n", "---\n# A card, no text\n"])


def files_list(**parts):
    return [{"split": part, "path": path} for part, path in parts.items()]


# Each file by the part it is of: t(rain), v(alidation), and what is left untouched, -.
FOLDERS = {
    "folders": {"train/a.jsonl": "t", "validation/a.jsonl": "v", "test/a.jsonl": "-", "README.md": "# A card"},
    "other names": {"training/a.txt": "t", "dev/a.txt": "v", "testing/a.txt": "-", "dataset_infos.json": "{}"},
    "files": {"train.jsonl.gz": "t", "valid.jsonl.gz": "v", "eval.jsonl.gz": "-", "LICENSE.txt": "Free."},
    "words in names": {"wiki.train.txt": "t", "wiki_val.txt": "v", "my-test 2.txt": "-", "all.txt": "-"},
    "shards": {"train-00000-of-00001.parquet": "t", "data/validation-1.parquet": "v", "data/test-1.parquet": "-"},
    "chunks": {"train/chunk2/example_train_0.jsonl.zst": "t", "validation/chunk1/example_holdout_0.jsonl.zst": "v"},
    "nested": {"x/en/train/test_1.txt": "t", "x/en/dev/a.txt": "v", "x/TEST/B.TXT": "-"},
    "nothing called train": {"a.jsonl": "t", "b/train.py": "t", "validation.jsonl": "v", "test.jsonl": "-"},
    "code": {"train/a.py": "t", "validation/test/b.py": "v", "test/c.py": "-", "d.py": "-"},
    "listed": {
        "a/0.jsonl": "t", "a/1.jsonl": "t", "b/test.jsonl": "v", "c/train.jsonl": "-",
        "README.md": card([{"config_name": "x", "data_files": files_list(train="a/*", dev=["b/*"], test="c/**")}]),
    },
    "listed, with several configurations": {
        "0.jsonl": "-", "a/1.jsonl": "t", "a/dev.jsonl": "t",
        "README.md": card([
            {"config_name": "all", "data_files": "**"}, {"config_name": "some", "data_files": "a/*", "default": True},
        ]),
    },
    "listed as a folder": {
        "en/train.jsonl": "t", "en/val.jsonl": "v", "de/train.jsonl": "-",
        "README.md": card([{"config_name": "english", "data_dir": "en"}]),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_says_which_part_is_which(name, tmp_path, capsys):
    expected = {"t": [], "v": [], "-": []}
    for path, part in sorted(FOLDERS[name].items(), key=lambda item: Path(item[0])):
        target = tmp_path / "source" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path if part in expected else part)
        if (kind := path.partition(".")[2]) in KINDS:
            made = write_source(kind, tmp_path / "made" / path.replace("/", " "), [path])
            shutil.copy(made / "texts.parquet" if made.is_dir() else made, target)
        expected.get(part, []).append(path)
    run(tmp_path / "source", tmp_path / "out", validation=1)
    validation, train = texts_of(tmp_path / "out/validation"), texts_of(tmp_path / "out/train")
    if not expected["v"]:  # the first document of train
        expected["v"] = [expected["t"].pop(0)]
    assert validation == expected["v"] and train == expected["t"]
    said = capsys.readouterr().err
    assert "for training" in said
    assert not expected["-"] or "left untouched" in said or "left out" in said


def test_a_part_is_chosen_with_split_and_config(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train", "dev", "test"):
        write_jsonl(source / f"{name}.jsonl", [name, name])
    run(source, tmp_path / "test", "--split", "test")
    assert texts_of(tmp_path / "test/train") == ["test"] * 2
    assert "train" in refused(capsys, source, tmp_path / "none", "--split", "english")
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("train", "dev")]
    (source / "README.md").write_text(card(configs))
    message = refused(capsys, source, tmp_path / "out")
    assert "--config" in message and "'train', 'dev'" in message
    run(source, tmp_path / "out", "--config", "dev", validation=1)
    assert texts_of(tmp_path / "out/validation") + texts_of(tmp_path / "out/train") == ["dev"] * 2
    assert "dev" in refused(capsys, source, tmp_path / "out", "--config", "train", validation=1)  # begun with another
    (source / "README.md").write_text("---\nconfigs: 7: 8\n---\n")
    assert "README.md" in refused(capsys, source, tmp_path / "broken")


def test_layout_with_gpt2_ranks(tmp_path):
    if not GPT2_RANKS.exists():
        pytest.skip("no GPT-2 ranks on this machine")
    run(write_jsonl(tmp_path / "texts.jsonl", TEXTS), tmp_path / "out", tokenizer=GPT2_RANKS)
    metadata, documents = read_split(tmp_path / "out/train")
    assert metadata["vocab_size"] == 50_257 and metadata["eos_id"] == 50_256
    assert metadata["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert "gpt2.tiktoken" in metadata["tokenizer"]
    assert (tmp_path / "out/train/tokenizer.tiktoken").read_bytes() == GPT2_RANKS.read_bytes()
    encoding = gpt2_encoding()
    assert [ids.tolist() for ids in documents] == [encoding.encode_ordinary(text) for text in TEXTS]
    token_bytes = np.load(tmp_path / "out/train/token_bytes.npy")
    assert all(token_bytes[rank] == len(token) for token, rank in encoding._mergeable_ranks.items())


documents_strategy = st.lists(
    st.one_of(
        st.text(max_size=80),
        st.text(st.sampled_from(" \n\t'sdLL1é\0")),
        st.sampled_from(["", "\0", "<|endoftext|>", "\U0001f600\u200d", "x" * 5000]),
    ),
    min_size=1,
).filter(any)


@settings(max_examples=50, deadline=None)
@given(texts=documents_strategy, chunk=st.integers(1, 200))
def test_bytes_decode_to_the_text(texts, chunk):
    with tempfile.TemporaryDirectory() as folder:
        source = write_jsonl(Path(folder) / "texts.jsonl", texts)
        run(source, Path(folder) / "out", "--chunk_tokens", chunk)
        assert texts_of(Path(folder) / "out/train") == texts


def test_surrogates_become_the_replacement_character(tmp_path):
    source = write_jsonl(tmp_path / "texts.jsonl", ["a\ud800b", "\ud83d\ude00"])
    run(source, tmp_path / "out")
    assert texts_of(tmp_path / "out/train") == ["a\ufffdb", "\U0001f600"]


def test_validation_is_the_first_documents_and_the_one_that_fills_a_chunk_closes_it(corpus, tmp_path):
    texts = random_texts(200)
    run(corpus, tmp_path / "out", "--target_tokens", 5_000, "--chunk_tokens", 700, validation=1_000)
    validation, train = texts_of(tmp_path / "out/validation"), texts_of(tmp_path / "out/train")
    assert validation + train == texts[: len(validation) + len(train)]
    for part, target in ((validation, 1_000), (train, 5_000)):
        sizes = [len(text.encode()) for text in part]
        assert sum(sizes) - sizes[-1] < target <= sum(sizes)
    metadata, documents = read_split(tmp_path / "out/train")
    assert len(metadata["chunks"]) > 3
    ends = np.cumsum([chunk["documents"] for chunk in metadata["chunks"]])
    for chunk, end in zip(metadata["chunks"][:-1], ends, strict=False):
        assert chunk["tokens"] - len(documents[end - 1]) < 700 <= chunk["tokens"]


def test_single_document_is_cut_at_the_validation_tokens(tmp_path):
    text = "".join(random_texts(50))
    source = write_jsonl(tmp_path / "input.jsonl", [None, text, None])
    run(source, tmp_path / "out", validation=1_000)
    assert texts_of(tmp_path / "out/validation") == [text[:1_000]]
    assert texts_of(tmp_path / "out/train") == [text[1_000:]]
    expected = files_of(tmp_path / "out")
    (tmp_path / "out/train/chunk_000.tokens.npy").unlink()
    run(source, tmp_path / "out", validation=1_000)
    assert files_of(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "texts", [["only one"], ["a" * 30, "b" * 30], ["a" * 9, "b" * 9], ["a" * 60, "", None], [""] * 3, []]
)
def test_nothing_for_training_is_refused_and_can_be_mended(texts, tmp_path, capsys):
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    message = refused(capsys, source, tmp_path / "out", validation=50)
    assert "nothing is left for training" in message or "no text" in message
    write_jsonl(tmp_path / "texts.jsonl", ["a" * 30, "b" * 30])
    run(source, tmp_path / "out", validation=20)
    assert texts_of(tmp_path / "out/train") == ["b" * 30]


def test_finished_is_recognised(corpus, tmp_path, capsys):
    run(corpus, tmp_path / "out", validation=1_000)
    before = files_of(tmp_path / "out")
    corpus.unlink()  # a finished preparation does not need its source
    capsys.readouterr()
    run(corpus, tmp_path / "out", validation=1_000)
    assert "already prepared" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize(
    "option, before, now",
    [
        ("--source", "corpus.jsonl", "stdlib"),
        ("--chunk_tokens", "100000000", "5000"),
        ("--target_tokens", "10000000000", "6000"),
        ("--validation_tokens", "1000", "2000"),
        ("--validation_tokens", "1000", "0"),
        ("--tokenizer", "bytes", "gpt2"),
        ("--text_column", "text", "content"),
    ],
)
def test_other_arguments_are_refused(option, before, now, corpus, tmp_path, capsys):
    run(corpus, tmp_path / "out", validation=1_000)
    message = refused(capsys, corpus, tmp_path / "out", "--validation_tokens", 1_000, option, now)
    assert before in message and now in message and "--output_dir" in message


def test_paragraphs_and_a_later_validation_are_other_data(corpus, tmp_path, capsys):
    run(corpus, tmp_path / "out")
    assert "split_paragraphs" in refused(capsys, corpus, tmp_path / "out", "--split_paragraphs")
    # the documents of a validation that is made now could be among those of train
    assert "validation is missing" in refused(capsys, corpus, tmp_path / "out", validation=1_000)


@pytest.mark.parametrize("change", ["edited", "touched", "removed", "added"])
def test_a_source_that_changed_is_refused(change, tmp_path, capsys):
    source = write_source("txt", tmp_path / "source", random_texts(9))
    run(source, tmp_path / "out", validation=100)
    unfinish(tmp_path / "out/train")
    file = source / "part_1/004.txt"
    if change == "edited":
        stat = file.stat()
        file.write_text(file.read_text() + "!")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "touched":
        os.utime(file, (1, 1))
    elif change == "removed":
        file.unlink()
    else:
        file = source / "part_1/0045.txt"
        file.write_text("new")
    message = refused(capsys, source, tmp_path / "out", validation=100)
    assert str(file) in message and "was changed, added or removed" in message


def test_bad_files(tmp_path, capsys):
    import pyarrow
    import zstandard
    from pyarrow import parquet

    (tmp_path / "line.jsonl").write_text('{"text": "fine"}\n\n{"text": broken}\n')
    (tmp_path / "number.jsonl").write_text('{"text": "fine"}\n7\n')
    (tmp_path / "field.jsonl").write_text('{"txt": "x"}\n')
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000)
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "corpus.csv").write_text("text\nfine\n")
    (tmp_path / "empty").mkdir()
    parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "column.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(50_000))
    compressed = zstandard.ZstdCompressor().compress(lines)
    (tmp_path / "torn.jsonl.zst").write_bytes(compressed[: len(compressed) // 2])
    (tmp_path / "torn.json.gz").write_bytes(gzip.compress(lines)[:5_000])
    expected = {
        "line.jsonl": "line 3: not valid JSON",
        "number.jsonl": "line 2: not a JSON object",
        "field.jsonl": "under 'text': its last row has none; its columns are txt",
        "null.jsonl": "under 'text': its last row has a value of type NoneType",
        "deep.jsonl": "line 1: not valid JSON",
        "latin1.txt": "not valid UTF-8 at byte 3",
        "corpus.csv": "no kind of file that is known",
        "empty": "no .txt, .md, ",
        "column.parquet": "no 'text' among content",
        "torn.parquet": "not a readable parquet file",
        "torn.jsonl.zst": "Truncated",
        "torn.json.gz": "runcated",
        "missing": "no such file or folder",
    }
    for name, reason in expected.items():
        message = refused(capsys, tmp_path / name, tmp_path / "out")
        assert name in message and reason in message
    assert not list(tmp_path.glob("out/**/metadata.json"))


@pytest.fixture
def hub(monkeypatch):
    """A hub of local rows: contents[name][split] is a list of texts, revisions lists what was asked for."""
    import datasets

    stand_in = SimpleNamespace(contents={}, revisions=[], error=None)

    def load_dataset_builder(name, config, revision):
        stand_in.revisions.append(revision)
        if name not in stand_in.contents:
            raise stand_in.error or ConnectionError(f"{name} is not here\nsecond line")
        streams = {
            split: datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
            for split, texts in stand_in.contents[name].items()
        }
        return SimpleNamespace(hash="c0ffee", as_streaming_dataset=lambda: streams)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return stand_in


@pytest.mark.parametrize("name", ["validation", "valid", "dev"])
def test_hub_with_its_own_validation_split(name, hub, tmp_path):
    texts = random_texts(40)
    hub.contents["owner/name"] = {"train": texts[:30], name: texts[30:], "test": ["not this"]}
    run("owner/name", tmp_path / "out", "--config", "small", validation=50)
    assert texts_of(tmp_path / "out/train") == texts[:30]
    validation = texts_of(tmp_path / "out/validation")
    assert validation == texts[30 : 30 + len(validation)]
    metadata, _ = read_split(tmp_path / "out/train")
    assert metadata["source"] == "owner/name:small" and metadata["revision"] == "c0ffee"


def test_hub_without_validation_split_and_restart(hub, tmp_path, capsys):
    texts = random_texts(5_000)
    arguments = ("owner/name", tmp_path / "out", "--chunk_tokens", 30_000)
    hub.contents["owner/name"] = {"train": [*texts[:4_000], *[None] * 50, *texts[4_050:]]}
    assert "41 of the first 4,040 rows" in refused(capsys, *arguments, validation=50)
    assert json.loads((tmp_path / "out/train/metadata.json").read_text())["chunks"]
    hub.contents["owner/name"] = {"train": texts[:20]}
    assert "no longer holds the rows" in refused(capsys, *arguments, validation=50)
    hub.contents["owner/name"] = {"train": texts}
    run(*arguments, validation=50)
    assert texts_of(tmp_path / "out/validation") + texts_of(tmp_path / "out/train") == texts
    assert hub.revisions == [None, "c0ffee", "c0ffee"]


def test_hub_that_cannot_be_used_is_refused(hub, tmp_path, capsys):
    hub.contents["owner/name"] = {"test": ["one"]}
    message = refused(capsys, "owner/other", tmp_path / "out")
    assert "owner/other is not here" in message and "file or folder" in message
    assert "--split train: owner/name has test" in refused(capsys, "owner/name", tmp_path / "out")
    hub.error = PermissionError(13, "Permission denied", "/cache/datasets/lock")  # and is not guessed
    assert "/cache/datasets/lock" in refused(capsys, "owner/other", tmp_path / "out")


def test_the_default_source_has_a_stand_in_that_is_said_and_kept(hub, tmp_path, capsys):
    first, second = "cerebras/SlimPajama-627B", "gmongaras/SlimPajama-627B_Reupload"
    arguments = ["--tokenizer", "bytes", "--validation_tokens", "50", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(arguments)
    said = capsys.readouterr().err
    assert first in said and second in said and "--source HuggingFaceFW/fineweb-edu --config" in said

    texts = random_texts(40)
    hub.contents[second] = {"train": texts}
    main(arguments)
    assert f"{first} cannot be opened" in capsys.readouterr().err
    expected = files_of(tmp_path / "out")
    metadata, _ = read_split(tmp_path / "out/train")
    assert metadata["source"] == second and metadata["fallback_for"] == first
    # a restart does not change to the first
    shutil.rmtree(tmp_path / "out/train")
    hub.contents = {first: {"train": ["other texts"]}}
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"{second} cannot be opened" in capsys.readouterr().err
    hub.contents[second] = {"train": texts}
    main(arguments)
    assert files_of(tmp_path / "out") == expected


def test_validation_from_train_beside_a_validation_split(hub, tmp_path, capsys):
    texts = random_texts(40)
    hub.contents["owner/name"] = {"train": texts, "validation": ["not this"]}
    options = ("--tokenizer", "bytes", "--output_dir", str(tmp_path / "out"), "--source", "owner/name")
    main([*options, "--validation_from_train", "50"])
    metadata, _ = read_split(tmp_path / "out/validation")
    assert metadata["validation_from_train"] is True and metadata["target_tokens"] == 50
    assert texts_of(tmp_path / "out/validation") + texts_of(tmp_path / "out/train") == texts
    main([*options, "--validation_tokens", "50", "--output_dir", str(tmp_path / "own")])
    assert texts_of(tmp_path / "own/validation") == ["not this"]
    with pytest.raises(SystemExit):
        main([*options, "--validation_from_train", "50", "--output_dir", str(tmp_path / "own")])
    assert "with validation_from_train False, and this run asks for True" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*options, "--validation_tokens", "50"])  # would be the source's own
    assert "with requested_from_train True, and this run asks for False" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*options, "--validation_from_train", "50", "--validation_tokens", "50"])
    error = capsys.readouterr().err
    assert "not allowed with" in error and error.count("\n") == 1  # without the usage


def test_split_revision_and_text_column(hub, tmp_path, capsys):
    hub.contents["owner/name"] = {"english": random_texts(40), "validation": random_texts(9, seed=1)}
    options = ("--split", "english", "--revision", "v1")
    run("owner/name", tmp_path / "out", *options, validation=50)
    assert texts_of(tmp_path / "out/train") == random_texts(40)
    metadata, _ = read_split(tmp_path / "out/train")
    assert metadata["train_split"] == "english" and metadata["requested_revision"] == "v1"
    assert hub.revisions == ["v1"] and metadata["revision"] == "c0ffee"
    for other, key in (("--split german --revision v1", "english"), ("--split english --revision v2", "v1")):
        message = refused(capsys, "owner/name", tmp_path / "out", *other.split(), validation=50)
        assert key in message and ("german" in message or "v2" in message)
    (tmp_path / "texts.jsonl").write_text('{"content": "a"}\n{"content": "b"}\n')
    run(tmp_path / "texts.jsonl", tmp_path / "local", "--text_column", "content")
    assert texts_of(tmp_path / "local/train") == ["a", "b"]


@pytest.mark.parametrize("option", ["--config", "--split", "--revision"])
def test_hub_options_without_hub_are_refused(option, corpus, tmp_path, capsys):
    assert option in refused(capsys, corpus, tmp_path / "out", option, "small")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet", "hub"])
def test_rows_without_text_are_counted(kind, hub, tmp_path, capsys):
    texts = [None if number in (0, 7, 30, 39) else text for number, text in enumerate(random_texts(40))]
    hub.contents["owner/name"] = {"train": texts}
    source = "owner/name" if kind == "hub" else write_source(kind, tmp_path / "source", texts)
    run(source, tmp_path / "out", "--chunk_tokens", 100, validation=1_000)
    validation, train = (read_split(tmp_path / "out" / split)[0] for split in ("validation", "train"))
    assert validation["skipped_documents"] + train["skipped_documents"] == 4
    assert texts_of(tmp_path / "out/validation") + texts_of(tmp_path / "out/train") == [
        t for t in texts if t is not None
    ]
    assert "rows without text under 'text' were skipped" in capsys.readouterr().out


def test_many_rows_without_text(tmp_path, capsys):
    import pyarrow
    from pyarrow import parquet

    rows = [b"caf\xe9"] + [None if number % 50 == 0 else f"{number}".encode() for number in range(1, 2_000)]
    parquet.write_table(pyarrow.table({"text": rows, "title": ["a"] * 2_000}), tmp_path / "rows.parquet")
    message = refused(capsys, tmp_path / "rows.parquet", tmp_path / "out", "--chunk_tokens", 100)
    assert "11 of the first" in message and "type NoneType; its columns are text, title" in message
    run(tmp_path / "rows.parquet", tmp_path / "out", "--chunk_tokens", 100, "--skip_rows_without_text")
    kept = [row.decode() for row in rows[1:] if row is not None]
    assert texts_of(tmp_path / "out/train") == kept
    assert read_split(tmp_path / "out/train")[0]["skipped_documents"] == 40

    lines = [json.dumps({"text": number, "title": "a"}) for number in range(20)]
    (tmp_path / "numbers.jsonl").write_text("\n".join(lines))
    message = refused(capsys, tmp_path / "numbers.jsonl", tmp_path / "numbers")
    assert "11 of the first 11" in message and "type int; its columns are text, title" in message
