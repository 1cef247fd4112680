"""What stops dataset_download.py half-way, each done for real or injected where it would strike."""

import contextlib
import errno
import json
import os
import resource
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, start, wait_until_held
from filelock import FileLock
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_dataset_download import files_of, random_texts, refused, run, texts_of, write_jsonl

import dataset_download

TEXTS = random_texts(3_000)
OPTIONS = ("--chunk_tokens", 3_000)


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", TEXTS)


@pytest.fixture
def expected(source, tmp_path):
    """The files of a run that nothing interrupts."""
    run(source, tmp_path / "whole", *OPTIONS, validation=10_000)
    return files_of(tmp_path / "whole")


@contextlib.contextmanager
def script(source, output, *before, **options):
    """A process of the script, with what comes before it on the command line."""
    options["env"] = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = ["--source", source, "--tokenizer", "bytes", "--validation_tokens", 10_000, *OPTIONS]
    command = (*before, ROOT / "dataset_download.py", *arguments, "--output_dir", output)
    with start(*command, **options) as process:
        yield process


def at_the_name(name, action):
    """The words that make a process stop before it gives the file of this name its name."""
    return ROOT / "tests/to_a_moment.py", f"os:replace:{name}:before", action


def complete_files_are_whole(output, expected):
    """Files under their final names are those of the run that nothing interrupts, metadata aside."""
    for path, content in files_of(output).items():
        if path.suffix != ".tmp" and path.name != "metadata.json":
            assert content == expected[path]


@pytest.mark.parametrize(
    "name, chunks",
    [
        ("source_files.json", 0), ("validation/metadata.json", 0), ("validation/chunk_001.tokens.npy", 1),
        ("train/tokenizer.tiktoken", 0), ("train/chunk_009.offsets.npy", 9),
    ],
)  # fmt: skip
def test_a_killed_run_is_resumed_after_its_last_chunk(name, chunks, source, expected, tmp_path):
    output = tmp_path / "out"
    with script(source, output, *at_the_name(name, "kill")) as process:
        assert process.wait() == -signal.SIGKILL
    kept = sorted((output / name).parent.glob("chunk_*.npy"))[: 2 * chunks]
    before = [file.stat().st_mtime_ns for file in kept]
    if chunks:
        metadata = json.loads((output / name).with_name("metadata.json").read_bytes())
        assert not metadata["finished"] and len(metadata["chunks"]) == chunks
    run(source, output, *OPTIONS, validation=10_000)
    assert files_of(output) == expected
    assert [file.stat().st_mtime_ns for file in kept] == before


def test_control_c_ends_with_one_line(source, expected, tmp_path):
    output, held = tmp_path / "out", tmp_path / "held"
    with script(source, output, *at_the_name("train/chunk_009.offsets.npy", held)) as process:
        wait_until_held(process, held)
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("dataset_download.py: stopped")
    assert not list(output.rglob("*.tmp"))
    run(source, output, *OPTIONS, validation=10_000)
    assert files_of(output) == expected


def test_full_disk_at_any_file(tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "texts.jsonl", random_texts(60))
    options = ("--chunk_tokens", 900, "--target_tokens", 6_000)
    run(source, tmp_path / "whole", *options, validation=1_500)
    expected, fsync = files_of(tmp_path / "whole"), os.fsync
    for allowed in range(100):
        output, calls = tmp_path / f"full_{allowed}", iter(range(100))

        def full(file, allowed=allowed, calls=calls):
            if next(calls) == allowed:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(file)

        monkeypatch.setattr(os, "fsync", full)
        try:
            run(source, output, *options, validation=1_500)
            break
        except SystemExit:
            message = capsys.readouterr().err.splitlines()[-1]
            assert "No space left" in message and "the same command" in message
        finally:
            monkeypatch.setattr(os, "fsync", fsync)
        assert not list(output.rglob("*.tmp"))
        complete_files_are_whole(output, expected)
        run(source, output, *options, validation=1_500)
        assert files_of(output) == expected
    assert allowed > 20


@pytest.mark.parametrize("limit", [600, 4_000])
def test_file_size_limit_of_the_system(limit, source, expected, tmp_path):
    # as a full disk, but in the middle of a write, by the kernel: 600 bytes are less than a file of offsets
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with script(source, tmp_path / "out", preexec_fn=limited) as process:
        errors = process.communicate()[1]
    assert process.returncode == 2 and "Traceback" not in errors
    assert "File too large" in errors and "the same command" in errors
    assert not list((tmp_path / "out").rglob("*.tmp"))
    complete_files_are_whole(tmp_path / "out", expected)
    run(source, tmp_path / "out", *OPTIONS, validation=10_000)
    assert files_of(tmp_path / "out") == expected


def test_two_processes_in_one_folder(source, tmp_path, capsys):
    with FileLock(tmp_path / "out/.lock"):
        assert "another dataset_download.py is at work" in refused(capsys, source, tmp_path / "out")
    run(source, tmp_path / "out")


def test_a_hub_source_that_breaks_off_is_read_on_from_its_file(tmp_path, monkeypatch, capsys):
    """Four parquet files as the data set owner/name, the last of which breaks off."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    files = [tmp_path / f"{part}.parquet" for part in range(4)]
    for part, file in enumerate(files):
        rows = pyarrow.table({"text": TEXTS[part * 750 : (part + 1) * 750]})
        parquet.write_table(rows, file, row_group_size=100)
    load = datasets.load_dataset_builder
    data_files = {"train": [str(file) for file in files]}
    opened = load("parquet", data_files=data_files)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: opened)
    monkeypatch.setattr(dataset_download, "BATCH_DOCUMENTS", 100)
    contents = [file.read_bytes() for file in files]
    output = tmp_path / "out"
    arguments = ("owner/name", output, *OPTIONS)

    files[3].write_bytes(contents[3][:4_000] + bytes(4_000) + contents[3][8_000:])
    assert "run the same command again" in refused(capsys, *arguments, validation=10_000)
    assert len(json.loads((output / "train/metadata.json").read_text())["chunks"]) > 5
    files[3].write_bytes(contents[3])
    files[1].write_bytes(contents[1][:4] + bytes(len(contents[1]) - 8) + contents[1][-4:])  # not read again
    run(*arguments, validation=10_000)
    files[1].write_bytes(contents[1])
    run("owner/name", tmp_path / "whole", *OPTIONS, validation=10_000)
    assert files_of(output) == files_of(tmp_path / "whole")


@contextlib.contextmanager
def hub_of(rows):
    """The rows of a generator function as every data set of the hub."""
    import datasets

    def builder(name, config, revision):
        stream = datasets.IterableDataset.from_generator(rows)
        return SimpleNamespace(hash="c0ffee", as_streaming_dataset=lambda: {"train": stream})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset_builder", builder)
        yield patch


@settings(max_examples=4, deadline=None)
@given(
    failures=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3)), max_size=6),
    chunk=st.integers(200, 6_000),
    batch=st.integers(1, 150),
)
def test_rows_that_fail_anywhere(failures, chunk, batch):
    """Errors of every library at any row, with any chunk and batch size: the files are always the same."""
    import aiohttp
    from huggingface_hub.errors import HTTPError

    raised = [HTTPError("reset"), aiohttp.ClientPayloadError("cut"), TimeoutError(), KeyboardInterrupt()]
    texts = [None if number % 173 == 5 else text for number, text in enumerate(TEXTS[:400])]
    left = list(failures)

    def rows(start=0):
        for number, text in enumerate(texts):
            for failure in [failure for failure in left if failure[0] == number]:
                left.remove(failure)
                raise raised[failure[1]]
            yield {"text": text}

    with tempfile.TemporaryDirectory() as folder, hub_of(rows) as patch:
        options = ("--chunk_tokens", chunk)
        while True:
            patch.setattr(dataset_download, "BATCH_DOCUMENTS", batch)
            try:
                run("owner/name", Path(folder) / "out", *options, validation=1_000)
                break
            except SystemExit as stopped:
                assert stopped.code in (2, 130) and len(left) < len(failures)
            batch = batch % 150 + 1
        left.clear()
        run("owner/name", Path(folder) / "whole", *options, validation=1_000)
        assert files_of(Path(folder) / "out") == files_of(Path(folder) / "whole")
        kept = texts_of(Path(folder) / "out/validation") + texts_of(Path(folder) / "out/train")
        assert kept == [text for text in texts if text is not None]


# Files that are damaged after they were written.


def verify(output, capsys):
    """Exit status and lines of --verify."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        dataset_download.main(["--verify", "--output_dir", str(output)])
    return stopped.value.code, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("split", ["validation", "train"])
@pytest.mark.parametrize(
    "damage, name",
    [("missing", "chunk_004.offsets.npy"), ("cut", "chunk_000.tokens.npy"),
     ("changed", "chunk_004.tokens.npy")],
)
def test_damage_is_found_and_mended(damage, split, name, tmp_path, capsys):
    source, output = write_jsonl(tmp_path / "texts.jsonl", random_texts(300)), tmp_path / "out"
    run(source, output, "--chunk_tokens", 2_000, validation=10_000)
    expected, path = files_of(output), output / split / name
    assert verify(output, capsys)[0] == 0
    (output / "train").rename(output / "moved")  # as after a kill between the two splits
    status, lines = verify(output, capsys)
    assert status == 1 and "train: not begun" in lines[-1]
    (output / "moved").rename(output / "train")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-5] if damage == "cut" else content[:-5] + b"\x01" + content[-4:])
    status, lines = verify(output, capsys)
    assert status == 1 and str(path) in lines[-1 if split == "train" else 0]
    if damage != "missing":
        path.unlink()
    before = {file: file.stat().st_mtime_ns for file in output.rglob("chunk_*")}
    run(source, output, "--chunk_tokens", 2_000, validation=10_000)
    assert files_of(output) == expected
    first = int(name[6:9])
    for file, time_ns in before.items():
        if file.parent.name != split or int(file.name[6:9]) < first:
            assert file.stat().st_mtime_ns == time_ns


@pytest.mark.parametrize("name", ["token_bytes.npy", "tokenizer.tiktoken"])
def test_lost_tokenizer_is_written_again(name, source, tmp_path, capsys):
    run(source, tmp_path / "out")
    expected = files_of(tmp_path / "out")
    (tmp_path / "out/train" / name).unlink()
    assert verify(tmp_path / "out", capsys)[0] == 1
    run(source, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "content, reason", [("[]", ""), ({"chunks": [{"name": "x"}]}, "chunks: 0: documents")]
)
@pytest.mark.parametrize("options", [(), ("--verify",)])
def test_metadata_of_any_other_shape(options, content, reason, source, tmp_path, capsys):
    run(source, tmp_path / "out")
    path = tmp_path / "out/train/metadata.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    message = refused(capsys, source, tmp_path / "out", *options)
    assert f"{path}: not what this script writes" in message and reason in message


@pytest.mark.parametrize("of_the_hub", [False, True])
@settings(max_examples=6, deadline=None)
@given(stops=st.lists(st.integers(0, 60), max_size=8), chunk=st.integers(100, 4_000))
@example(stops=[3, 7, 9, 11], chunk=200)
def test_stopped_at_any_step(of_the_hub, stops, chunk):
    """Before any of the renames that make a file final, again and again."""

    def rows():
        yield from ({"text": text} for text in TEXTS[:60])

    options = ("--chunk_tokens", chunk)
    with tempfile.TemporaryDirectory() as folder, hub_of(rows) as patch:
        source = "owner/name" if of_the_hub else write_jsonl(Path(folder) / "texts.jsonl", TEXTS[:60])
        output, whole, replace = Path(folder) / "out", Path(folder) / "whole", os.replace
        for stop in stops:
            calls = iter(range(1_000))

            def stop_later(before, after, stop=stop, calls=calls):
                if next(calls) == stop:
                    raise KeyboardInterrupt
                replace(before, after)

            patch.setattr(os, "replace", stop_later)
            try:
                run(source, output, *options, validation=1_000)
            except SystemExit as stopped:
                assert stopped.code == 130
        patch.setattr(os, "replace", replace)
        run(source, output, *options, validation=1_000)
        run(source, whole, *options, validation=1_000)
        assert files_of(output) == files_of(whole)
