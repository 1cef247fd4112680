"""What stops dataset_download.py half-way, each done for real or injected where it would strike."""

import errno
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset_download import (
    OFFLINE,
    SCRIPT,
    files_of,
    held,
    random_texts,
    refused,
    run,
    texts_of,
    write_jsonl,
)

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


def command(source, output, *options):
    arguments = ["--source", source, "--tokenizer", "bytes", "--validation_tokens", 10_000, *OPTIONS]
    return [sys.executable, SCRIPT, *map(str, (*arguments, "--output_dir", output, *options))]


def start(*arguments, **options):
    environment = os.environ | OFFLINE
    return subprocess.Popen(
        command(*arguments), env=environment, stderr=subprocess.PIPE, text=True, **options
    )


def complete_files_are_whole(output, expected):
    """Files under their final names are those of the run that nothing interrupts, metadata aside."""
    for path, content in files_of(output).items():
        if path.suffix != ".tmp" and path.name != "metadata.json":
            assert content == expected[path]


@pytest.mark.parametrize(
    "name", ["source_files.json", "validation/chunk_001.tokens.npy", "train/metadata.json"]
)
def test_temporary_files_of_a_killed_run_are_removed(name, source, expected, tmp_path):
    output = tmp_path / "out"
    with held(name, tmp_path, *command(source, output)[2:]) as process:
        process.kill()
    assert (output / f"{name}.tmp").exists()
    # also those of chunks that are never made again, but nobody else's
    (output / "train").mkdir(exist_ok=True)
    (output / "train/chunk_777.tokens.npy.tmp").write_bytes(b"part of it")
    (output / "notes.tmp").write_bytes(b"of somebody else")
    run(source, output, *OPTIONS, validation=10_000)
    assert (output / "notes.tmp").read_bytes() == b"of somebody else"
    (output / "notes.tmp").unlink()
    assert files_of(output) == expected


@pytest.mark.parametrize(
    "name", ["source_files.json", "validation/chunk_001.tokens.npy", "train/chunk_009.offsets.npy"]
)
def test_control_c_ends_with_one_line(name, source, expected, tmp_path):
    output = tmp_path / "out"
    with held(name, tmp_path, *command(source, output)[2:]) as process:
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("dataset_download.py: stopped")
    assert not list(output.rglob("*.tmp"))
    run(source, output, *OPTIONS, validation=10_000)
    assert files_of(output) == expected


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_full_disk_at_any_file(name, tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "texts.jsonl", random_texts(60))
    options = ("--chunk_tokens", 900, "--target_tokens", 6_000)
    run(source, tmp_path / "whole", *options, validation=1_500)
    expected, function = files_of(tmp_path / "whole"), getattr(os, name)
    for allowed in range(100):
        output, calls = tmp_path / f"full_{allowed}", iter(range(100))

        def full(*arguments, allowed=allowed, calls=calls):
            if next(calls) == allowed:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments)

        monkeypatch.setattr(os, name, full)
        try:
            run(source, output, *options, validation=1_500)
            break
        except SystemExit:
            message = capsys.readouterr().err.splitlines()[-1]
            assert "No space left" in message and "the same command" in message
        finally:
            monkeypatch.setattr(os, name, function)
        assert not list(output.rglob("*.tmp"))
        complete_files_are_whole(output, expected)
        run(source, output, *options, validation=1_500)
        assert files_of(output) == expected
    assert allowed > 20


@pytest.mark.parametrize("limit", [600, 2_000, 4_000])
def test_file_size_limit_of_the_system(limit, source, expected, tmp_path):
    # as a full disk, but in the middle of a write, by the kernel: 600 bytes are less than a file of offsets
    with start(
        source, tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    ) as process:
        errors = process.communicate()[1]
    assert process.returncode == 2 and "Traceback" not in errors
    assert "File too large" in errors and "the same command" in errors
    assert not list((tmp_path / "out").rglob("*.tmp"))
    complete_files_are_whole(tmp_path / "out", expected)
    run(source, tmp_path / "out", *OPTIONS, validation=10_000)
    assert files_of(tmp_path / "out") == expected


def test_two_processes_in_one_folder(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another dataset_download.py is at work" in refused(capsys, source, tmp_path / "out")
    run(source, tmp_path / "out")


def test_two_processes_started_together(source, expected, tmp_path):
    output = tmp_path / "out"
    processes = [start(source, output) for _ in range(3)]
    errors = [process.communicate()[1] for process in processes]
    assert all(process.returncode in (0, 2) for process in processes)
    assert any(process.returncode == 0 for process in processes)
    for process, text in zip(processes, errors, strict=True):
        assert process.returncode == 0 or "another" in text
    assert files_of(output) == expected


# The network: a server on this machine that fails on request, streamed through datasets.


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Three parquet files over HTTP as the hub dataset owner/name; `failures`: kind by number of request."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    www = tmp_path / "www"
    www.mkdir()
    for part in range(3):
        rows = pyarrow.table({"text": TEXTS[part * 1_000 : (part + 1) * 1_000]})
        parquet.write_table(rows, www / f"{part}.parquet", row_group_size=100)
    state = SimpleNamespace(failures={}, requests=[], is_open=False)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self.answer((www / self.path.strip("/")).read_bytes(), 200, b"")

        def do_GET(self):
            data = (www / self.path.strip("/")).read_bytes()
            state.requests.append(self.path)
            failure = state.failures.get(len(state.requests)) if state.is_open else None
            if isinstance(failure, int):
                return self.answer(b"", failure, b"")
            if wanted := self.headers.get("Range"):
                first, last = (
                    int(number or len(data)) for number in wanted.removeprefix("bytes=").split("-")
                )
                data, span = data[first : last + 1], f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                self.answer(data, 206, data[: len(data) // 2] if failure == "cut" else data, span)
            else:
                self.answer(data, 200, data[: len(data) // 2] if failure == "cut" else data)
            if failure == "cut":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        def answer(self, data, status, body, span=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Accept-Ranges", "bytes")
            if span:
                self.send_header("Content-Range", span)
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, address):
            pass  # the client hangs up when it has what it wants

    for name in ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES"):
        monkeypatch.setattr(datasets.config, name, 1)
    for name in ("STREAMING_READ_RETRY_INTERVAL", "STREAMING_OPEN_RETRY_INTERVAL"):
        monkeypatch.setattr(datasets.config, name, 0)
    monkeypatch.setattr(dataset_download, "RETRY_SECONDS", (0, 0, 0))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    load = datasets.load_dataset_builder
    with Server(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{listener.server_port}/{part}.parquet" for part in range(3)]

        def builder(name, config, revision):
            state.is_open = False
            opened = load("parquet", data_files={"train": urls}, cache_dir=str(tmp_path))
            streams = opened.as_streaming_dataset()
            state.requests.clear()
            state.is_open = True
            return SimpleNamespace(hash=opened.hash, as_streaming_dataset=lambda: streams)

        monkeypatch.setattr(datasets, "load_dataset_builder", builder)
        yield state
        listener.shutdown()


def test_a_flaky_server_is_asked_again(server, tmp_path, capsys):
    run("owner/name", tmp_path / "whole", *OPTIONS, validation=10_000)
    expected, requests = files_of(tmp_path / "whole"), len(server.requests)
    assert requests > 3
    kinds = [[503], ["cut"], [429, 500], ["cut", 503, "cut"]]
    for first in range(1, requests + 1):
        failures = kinds[first % 4]
        server.failures = dict(enumerate(failures, first))
        run("owner/name", tmp_path / f"out_{first}", *OPTIONS, validation=10_000)
        assert "trying again" in capsys.readouterr().err
        assert files_of(tmp_path / f"out_{first}") == expected


@pytest.mark.parametrize("failure, attempts", [(404, 1), (403, 1), (503, 4), ("cut", 4)])
def test_a_server_that_stays_away(failure, attempts, server, tmp_path, capsys):
    run("owner/name", tmp_path / "whole", *OPTIONS, validation=10_000)
    output, requests = tmp_path / "out", len(server.requests)
    server.failures = dict.fromkeys(range(requests, 1_000), failure)
    message = refused(capsys, "owner/name", output, *OPTIONS, validation=10_000)
    assert "owner/name, split train" in message and "run the same command again" in message.lower()
    assert ("out of reach" in message) == (attempts > 1)  # an answer came, and will stay the same
    assert requests + attempts - 1 <= len(server.requests) < requests + 4 * attempts
    kept = json.loads((output / "train/metadata.json").read_text())["chunks"]
    assert len(kept) > 5
    server.failures = {}
    run("owner/name", output, *OPTIONS, validation=10_000)
    assert files_of(output) == files_of(tmp_path / "whole")
    # beside the few documents that tell whether there is but one, nothing in front of the last chunk is read
    assert "/1.parquet" not in server.requests[3:]


@settings(max_examples=4, deadline=None)
@given(
    failures=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3)), max_size=6),
    chunk=st.integers(200, 6_000),
    batch=st.integers(1, 150),
)
def test_rows_that_fail_anywhere(failures, chunk, batch):
    """Errors of every library at any row, with any chunk and batch size: the files are always the same."""
    import aiohttp
    import datasets
    from huggingface_hub.errors import HTTPError

    raised = [
        HTTPError("reset"),
        aiohttp.ClientPayloadError("cut"),
        TimeoutError("slow"),
        KeyboardInterrupt(),
    ]
    texts, left = (
        [None if number % 173 == 5 else text for number, text in enumerate(TEXTS[:400])],
        list(failures),
    )

    def rows(start=0):
        for number, text in enumerate(texts):
            for failure in [failure for failure in left if failure[0] == number]:
                left.remove(failure)
                raise raised[failure[1]]
            yield {"text": text}

    def builder(name, config, revision):
        stream = datasets.IterableDataset.from_generator(rows)
        return SimpleNamespace(hash="c0ffee", as_streaming_dataset=lambda: {"train": stream})

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset_builder", builder)
        patch.setattr(dataset_download, "RETRY_SECONDS", (0,) * 10)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        options = ("--chunk_tokens", chunk)
        while True:
            patch.setattr(dataset_download, "BATCH_DOCUMENTS", batch)
            try:
                run("owner/name", Path(folder) / "out", *options, validation=1_000)
                break
            except SystemExit as stopped:
                assert stopped.code == 130
            batch = batch % 150 + 1
        left.clear()
        run("owner/name", Path(folder) / "whole", *options, validation=1_000)
        assert files_of(Path(folder) / "out") == files_of(Path(folder) / "whole")
        kept = texts_of(Path(folder) / "out/validation") + texts_of(Path(folder) / "out/train")
        assert kept == [text for text in texts if text is not None]


@pytest.mark.parametrize("when", ["opened", "read"])
def test_a_fault_of_this_machine_is_not_called_the_network(when, tmp_path, monkeypatch, capsys):
    import datasets

    calls = []

    def builder(name, config, revision):
        calls.append(name)
        if when == "opened":
            next(broken())
        stream = datasets.IterableDataset.from_generator(broken)
        return SimpleNamespace(hash="c0ffee", as_streaming_dataset=lambda: {"train": stream})

    def broken():
        try:
            raise PermissionError(errno.EACCES, "Permission denied", "/cache/datasets/lock")
        except OSError as error:
            raise RuntimeError("the data set cannot be read") from error
        yield

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(SystemExit):  # the paper's source, whose stand-in would meet the same
        dataset_download.main(["--tokenizer", "bytes", "--target_tokens", "9", "--output_dir", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert "/cache/datasets/lock" in message and len(calls) == 1
    assert "out of reach" not in message and "resolve" not in message and "trying again" not in message


def test_a_restart_never_changes_the_source(tmp_path, monkeypatch, capsys):
    import datasets

    first, second = dataset_download.PAPER_SOURCES
    reachable = {second}

    def builder(name, config, revision):
        if name not in reachable:
            raise ConnectionError(f"{name} is not here")
        stream = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
        return SimpleNamespace(hash="c0ffee", as_streaming_dataset=lambda: {"train": stream})

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    output = tmp_path / "out"
    arguments = [
        "--tokenizer",
        "bytes",
        "--validation_tokens",
        "5000",
        "--output_dir",
        str(output),
        *map(str, OPTIONS),
    ]
    with monkeypatch.context() as patch:
        calls, write_chunk = iter(range(100)), dataset_download.write_chunk

        def stop_later(*values):
            if next(calls) == 5:
                raise KeyboardInterrupt
            return write_chunk(*values)

        patch.setattr(dataset_download, "write_chunk", stop_later)
        with pytest.raises(SystemExit):
            dataset_download.main(arguments)
    metadata = json.loads((output / "train/metadata.json").read_text())
    assert metadata["source"] == second and metadata["fallback_for"] == first and not metadata["finished"]
    reachable.clear()
    reachable.add(first)
    with pytest.raises(SystemExit):
        dataset_download.main(arguments)
    assert f"{second} does not resolve" in capsys.readouterr().err.splitlines()[-1]
    reachable.add(second)
    dataset_download.main(arguments)
    assert json.loads((output / "train/metadata.json").read_text())["source"] == second


# Files that are damaged after they were written.


def verify(output, capsys):
    """Exit status and lines of --verify."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        dataset_download.main(["--verify", "--output_dir", str(output)])
    return stopped.value.code, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["chunk_004.tokens.npy", "chunk_004.offsets.npy", "chunk_000.tokens.npy"])
@pytest.mark.parametrize("split", ["validation", "train"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
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
    "content, reason",
    [
        ('{"source"', "Invalid JSON"),
        ("[]", ""),
        ({"tokens": "many"}, "tokens"),
        ({"chunks": [{"name": "chunk_000"}]}, "chunks: 0: documents"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--verify",)])
def test_metadata_of_any_other_shape(options, content, reason, source, tmp_path, capsys):
    run(source, tmp_path / "out")
    path = tmp_path / "out/train/metadata.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content, encoding="latin-1")
    message = refused(capsys, source, tmp_path / "out", *options)
    assert f"{path}: not what this script writes" in message and reason in message


def test_a_file_system_without_locks(source, expected, tmp_path, capsys, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run(source, tmp_path / "out", *OPTIONS, validation=10_000)
    assert "No locks available" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == expected


@settings(max_examples=10, deadline=None)
@given(stops=st.lists(st.integers(0, 60), max_size=8), chunk=st.integers(100, 4_000))
def test_stopped_at_any_step(stops, chunk):
    """Killed before any of the renames that make a file final, again and again."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        source, output = write_jsonl(Path(folder) / "texts.jsonl", TEXTS[:60]), Path(folder) / "out"
        replace = os.replace
        for stop in stops:
            calls = iter(range(1_000))

            def stop_later(before, after, stop=stop, calls=calls):
                if next(calls) == stop:
                    raise KeyboardInterrupt
                replace(before, after)

            patch.setattr(os, "replace", stop_later)
            try:
                run(source, output, "--chunk_tokens", chunk, validation=1_000)
            except SystemExit as stopped:
                assert stopped.code == 130
        patch.undo()
        run(source, output, "--chunk_tokens", chunk, validation=1_000)
        run(source, Path(folder) / "whole", "--chunk_tokens", chunk, validation=1_000)
        assert files_of(output) == files_of(Path(folder) / "whole")


