"""Token files -> rows -> batches -> the figures of an evaluation, each against a few lines of numpy."""

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, completed, gpt2_of, script_of, start_ranks
from hypothesis import example, given, settings
from hypothesis import strategies as st

SCRIPT = script_of("kqv")  # owns the text that the scripts share; another test holds the others to it
EOS = 60
TOKEN_BYTES = np.array([1 + i % 5 for i in range(EOS)] + [0], dtype=np.uint16)
each_sequence = pytest.mark.parametrize("sequence", ["padded", "packed"])
examples = settings(max_examples=40, deadline=None, derandomize=True)


def documents_of(lengths):
    """Documents of these lengths, whose tokens follow from their number."""
    return [np.random.default_rng(i).integers(0, EOS, n).astype(np.uint16) for i, n in enumerate(lengths)]


def write(folder, documents, chunks=None, vocabulary=TOKEN_BYTES):
    """A split as dataset_download.py writes it, with this many documents in each chunk."""
    chunks = chunks or [len(documents)]
    assert sum(chunks) == len(documents)
    folder.mkdir(parents=True, exist_ok=True)
    eos, entries, left = len(vocabulary) - 1, [], iter(documents)
    for number, count in enumerate(chunks):
        chunk = [np.append(document, eos) for document in islice(left, count)]
        offsets = np.cumsum([0, *map(len, chunk)]).astype(np.int64)
        entry = {"name": f"chunk_{number:03d}"}
        entry |= {"documents": count, "tokens": int(offsets[-1]) - count, "bytes": 0}
        for kind, array in (("tokens", np.concatenate(chunk).astype(np.uint16)), ("offsets", offsets)):
            path = folder / f"{entry['name']}.{kind}.npy"
            np.save(path, array)
            entry[f"{kind}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        entries.append(entry)
    np.save(folder / "token_bytes.npy", vocabulary)
    totals = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "bytes")}
    metadata = totals | {"tokenizer": "test", "vocab_size": len(vocabulary), "eos_id": eos}
    (folder / "metadata.json").write_text(json.dumps(metadata | {"finished": True, "chunks": entries}))
    return folder


def rows_of(documents, seq_length, sequence, eos=EOS, chunks=None):
    """What the loader must give: the rows, and where they are text."""
    texts, left = [], iter(documents)
    for count in chunks or [len(documents)]:
        chunk = list(islice(left, count))
        if sequence == "packed":
            stream = np.concatenate([np.append(document, eos) for document in chunk])
            texts += [stream[start : start + seq_length] for start in range(0, len(stream), seq_length)]
        else:
            texts += [document[:seq_length] for document in chunk]
    rows = [np.pad(text.astype(np.int64), (0, seq_length - len(text)), constant_values=eos) for text in texts]
    is_text = np.stack([np.arange(seq_length) < len(text) for text in texts])
    return np.stack(rows), is_text


def documents_in(folder):
    """The documents of a prepared split, and how many of them each chunk has."""
    documents, chunks = [], []
    for path in sorted(folder.glob("*.offsets.npy")):
        tokens, offsets = np.load(path.with_name(path.name.replace("offsets", "tokens"))), np.load(path)
        documents += [tokens[start : end - 1] for start, end in zip(offsets, offsets[1:], strict=False)]
        chunks.append(len(offsets) - 1)
    return documents, chunks


def read(loader):
    """All that a loader without a seed gives."""
    batches = list(loader)
    return tuple(torch.cat(part).numpy() for part in zip(*batches, strict=True))


# ---- rows


@each_sequence
@examples
@given(
    chunks=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6), min_size=1, max_size=4),
    seq_length=st.integers(2, 17),
)
@example([[1]], 8)
@example([[8, 8]], 8)
@example([[7], [7, 7]], 8)  # a packed row exactly
@example([[5], [0, 0, 0], [9]], 8)
@example([3 * [0], 17 * [0]], 8)
@example([[100], [3], [61]], 8)
def test_rows_hold_the_documents_whatever_their_lengths_and_chunks(sequence, chunks, seq_length):
    documents, counts = documents_of(sum(chunks, [])), [len(chunk) for chunk in chunks]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "train", documents, counts)
        rows, is_text = read(SCRIPT.get_dataloader(path, 4, seq_length, sequence))
    expected_rows, expected_text = rows_of(documents, seq_length, sequence, chunks=counts)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(is_text, expected_text)


@pytest.mark.parametrize("sequence", [["padded"], ["packed"], []])
def test_what_dataset_download_prepared_is_read_back(sequence, data_dir):
    """Padded, the paper's protocol, unless told."""
    documents, chunks = documents_in(data_dir / "train")
    assert len(documents) == 110 and len(chunks) > 1
    loader = SCRIPT.get_dataloader(str(data_dir / "train"), 7, 96, *sequence)
    expected_rows, expected_text = rows_of(documents, 96, *sequence or ["padded"], 256, chunks)
    for found, expected in zip(read(loader), (expected_rows, expected_text), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    assert next(iter(loader))[0].shape == (7, 96)


def test_ids_up_to_the_largest_uint16_are_kept(tmp_path):
    vocabulary = np.ones(65_535, dtype=np.uint16)
    documents = [np.array([65_533, 0, 40_000], dtype=np.uint16)]
    path = write(tmp_path, documents, vocabulary=vocabulary)
    rows, _ = read(SCRIPT.get_dataloader(path, 1, 4))
    assert rows.tolist() == [[65_533, 0, 40_000, 65_534]]


def test_tokens_stay_on_disk_memory_mapped(tmp_path):
    """Reading a row must not bring a chunk of 100 million tokens into memory."""
    path = write(tmp_path, documents_of([5, 9, 3]), [2, 1])
    dataset = SCRIPT.TokenDataset(path, 4, "packed")
    dataset[1]
    assert all(isinstance(array, np.memmap) for array in [*dataset.tokens, *dataset.offsets])


# ---- order


ROWS = 23


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A data set whose padded row i begins with token i."""
    documents = [np.full(3, i, np.uint16) for i in range(ROWS)]
    return write(tmp_path_factory.mktemp("numbered"), documents, [9, 14])


@contextmanager
def place(rank, world_size):
    """As torchrun says it to a rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SCRIPT, "RANK", rank)
        patch.setattr(SCRIPT, "WORLD_SIZE", world_size)
        yield


def order(path, count, batch_size=3, seed=5, rows_seen=0):
    """The numbers of the first rows that a process reads."""
    loader = SCRIPT.get_dataloader(path, batch_size, 4, "padded", seed=seed, rows_seen=rows_seen)
    batches = islice(loader, -(-count // batch_size))
    return [number for ids, _ in batches for number in ids[:, 0].tolist()][:count]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("batch_size", "rows_seen"), [(1, 60), (5, 0), (3, 60)])
def test_any_number_of_processes_reads_the_same_global_batches(numbered, world_size, batch_size, rows_seen):
    """Of 4 micro batches a step: a process alone takes them all, of two each takes two, and so on."""
    steps, micro_batches = 3, 4
    count = steps * micro_batches * batch_size
    alone = np.array(order(numbered, count, batch_size, rows_seen=rows_seen)).reshape(-1, batch_size)
    shares = []
    for rank in range(world_size):
        with place(rank, world_size):
            share = order(numbered, count // world_size, batch_size, rows_seen=rows_seen)
        shares.append(np.array(share).reshape(-1, batch_size))
    np.testing.assert_array_equal(np.stack(shares, axis=1).reshape(-1, batch_size), alone)


def test_every_row_comes_once_an_epoch_and_each_epoch_and_seed_in_another_order(numbered):
    epochs = np.array(order(numbered, 4 * ROWS, 4)).reshape(4, ROWS)
    for epoch in epochs:
        assert sorted(epoch) == list(range(ROWS))
    assert len({tuple(range(ROWS)), *map(tuple, epochs)}) == 5
    assert order(numbered, ROWS, seed=6) != epochs[0].tolist()


@examples
@given(rows_seen=st.integers(0, 5 * ROWS), batch_size=st.integers(1, 6))
def test_a_loader_starts_where_a_run_was_interrupted(numbered, rows_seen, batch_size):
    whole = order(numbered, 5 * ROWS + 20)
    assert order(numbered, 20, batch_size, rows_seen=rows_seen) == whole[rows_seen : rows_seen + 20]


@examples
@given(world_size=st.integers(1, 9), batch_size=st.integers(1, 30))
def test_without_a_seed_the_ranks_take_the_batches_in_turn(numbered, world_size, batch_size):
    """All rows but no row twice; with more ranks than batches, some have none."""
    rows = list(range(ROWS))
    batches = [rows[start : start + batch_size] for start in range(0, ROWS, batch_size)]
    for rank in range(world_size):
        with place(rank, world_size):
            read_by_rank = [ids[:, 0].tolist() for ids, _ in SCRIPT.get_dataloader(numbered, batch_size, 4)]
        assert read_by_rank == batches[rank::world_size]


# ---- files that are not whole


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(folder, **changes):
    path = folder / METADATA
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(name, make):
    """Put make(array) in the place of an array."""
    return lambda folder: np.save(folder / name, make(np.load(folder / name)))


METADATA, BYTES = "metadata.json", "token_bytes.npy"
TOKENS, OFFSETS = "chunk_001.tokens.npy", "chunk_001.offsets.npy"
DAMAGE = {  # what is done to the folder; dataset_download.py --verify finds the rest
    "no folder": lambda folder: shutil.rmtree(folder),
    "unfinished": lambda folder: rewrite(folder, finished=False),
    "metadata of something else": lambda folder: (folder / METADATA).write_text('{"name": "x"}'),
    "metadata a list": lambda folder: (folder / METADATA).write_text("[]"),
    "metadata no text": lambda folder: (folder / METADATA).write_bytes(b"\xff\x00"),
    "no documents": lambda folder: rewrite(folder, documents=0, chunks=[]),
    "tokens no array": lambda folder: (folder / TOKENS).write_text("tokens"),
    "a token more": change(TOKENS, lambda array: np.append(array, array[-1])),
    "an offset less": change(OFFSETS, lambda array: array[[0, 2, 3]]),
    "offsets of another length": change(OFFSETS, lambda array: np.append(array[:-1], 99)),
}
for name in (METADATA, TOKENS, OFFSETS, BYTES):
    DAMAGE[f"{name} missing"] = lambda folder, name=name: (folder / name).unlink()
    DAMAGE[f"{name} cut off"] = lambda folder, name=name: half(folder / name)
    DAMAGE[f"{name} empty"] = lambda folder, name=name: (folder / name).write_bytes(b"")


@pytest.mark.parametrize("damage", DAMAGE)
def test_token_files_that_are_not_whole_are_refused_by_name(damage, tmp_path):
    """In one line with the folder and the script that makes it anew."""
    folder = write(tmp_path / "train", documents_of([9, 30, 12, 4]), [1, 3])
    DAMAGE[damage](folder)
    with pytest.raises(SCRIPT.RunError) as caught:
        SCRIPT.get_dataloader(folder, 2, 8)
    message = str(caught.value)
    assert str(folder) in message and "dataset_download.py" in message and "\n" not in message


# ---- evaluation

T = 12
DOCUMENTS, CHUNKS = documents_of([5, 30, 0, 1, 12, 2, 7, 19, 11, 3]), [4, 6]


def model_of(dropout=0.0, n_positions=T):
    """A small model whose losses differ a lot between tokens."""
    torch.manual_seed(0)
    shape = {"vocab_size": EOS + 1, "n_positions": n_positions, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = SCRIPT.ModelConfig(**shape, dropout=dropout, initializer_range=0.2)
    return SCRIPT.GPT(config).eval()


def expected_of(model, rows, is_text):
    """An evaluation in numpy: the log-probability of each token of a row but the first, from the logits."""
    with torch.no_grad():
        logits = model(torch.from_numpy(rows))[0][:, :-1].double().numpy()
    targets, text = rows[:, 1:], is_text[:, 1:]
    largest = logits.max(axis=-1, keepdims=True)
    logarithm = np.log(np.exp(logits - largest).sum(axis=-1)) + largest[..., 0]
    losses = logarithm - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return {
        "loss": losses.mean(),
        "perplexity": math.exp(losses.mean()),
        "text_loss": losses[text].mean(),
        "text_perplexity": math.exp(losses[text].mean()),
        "bits_per_byte": losses[text].sum() / math.log(2) / TOKEN_BYTES[targets[text]].sum(),
        "padding_fraction": 1 - is_text.mean(),
    }


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write(tmp_path_factory.mktemp("evaluated"), DOCUMENTS, CHUNKS)


@each_sequence
@pytest.mark.parametrize(("batch_size", "max_batches"), [(1, None), (3, None), (2, 1), (2, 100)])
def test_an_evaluation_is_the_obvious_arithmetic_over_the_rows(sequence, batch_size, max_batches, split):
    model, (rows, is_text) = model_of(), rows_of(DOCUMENTS, T, sequence, chunks=CHUNKS)
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(split, batch_size, T, sequence), max_batches)
    taken = max_batches and batch_size * max_batches
    expected = expected_of(model, rows[:taken], is_text[:taken])
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert all(type(value) is float for value in results.values())  # for metrics.jsonl


RANK_PROGRAM = """
import json
import sys

sys.path.insert(0, sys.argv[1])
import transformer_KQV_300_M as SCRIPT

read = []
whole = SCRIPT.TokenDataset.__getitem__
SCRIPT.TokenDataset.__getitem__ = lambda self, i: read.append(int(i)) or whole(self, i)
SCRIPT.init_distributed()
model = SCRIPT.load_model(sys.argv[3] + "/model.pt")
for sequence, batch_size, max_batches in json.loads(sys.argv[4]):
    read.clear()
    loader = SCRIPT.get_dataloader(sys.argv[2], batch_size, model.config.n_positions, sequence)
    results = SCRIPT.evaluate(model, loader, max_batches)
    with open(f"{sys.argv[3]}/rank_{SCRIPT.RANK}.jsonl", "a") as file:
        file.write(json.dumps([results, read]) + "\\n")
SCRIPT.dist.destroy_process_group()
"""
CASES = [("padded", 2, None), ("packed", 3, None), ("padded", 4, None), ("padded", 2, 1), ("packed", 2, 4)]


@pytest.fixture(scope="module")
def ranks(split, tmp_path_factory):
    """What each of three ranks got from the evaluations of CASES, and the rows that it read for them."""
    folder = tmp_path_factory.mktemp("ranks")
    model = model_of()
    contents = {"model_state_dict": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
    torch.save(contents, folder / "model.pt")
    (folder / "ranks.py").write_text(RANK_PROGRAM)
    completed(start_ranks(*3 * [[folder / "ranks.py", ROOT, split, folder, json.dumps(CASES)]]))
    lines = [(folder / f"rank_{rank}.jsonl").read_text().splitlines() for rank in range(3)]
    return [[json.loads(line) for line in of_rank] for of_rank in lines]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_several_ranks_evaluate_the_same_and_no_row_is_read_twice(case, ranks, split):
    """In two of the cases there are fewer batches than ranks, so that a rank has nothing to read."""
    sequence, batch_size, max_batches = CASES[case]
    rows, is_text = rows_of(DOCUMENTS, T, sequence, chunks=CHUNKS)
    taken = len(rows) if max_batches is None else min(len(rows), batch_size * max_batches)
    expected = expected_of(model_of(), rows[:taken], is_text[:taken])
    read = []
    for of_rank in ranks:
        results, own = of_rank[case]
        assert results == ranks[0][case][0]
        assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert len(own) <= math.ceil(taken / batch_size / 3) * batch_size
        read += own
    assert sorted(read) == list(range(taken))


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_switches_dropout_and_gradients_off_and_leaves_the_mode_as_it_was(training, split):
    model, loader, grad = model_of(dropout=0.5), SCRIPT.get_dataloader(split, 3, T), []
    expected = SCRIPT.evaluate(model, loader)
    model.h[0].register_forward_hook(lambda *_: grad.append(torch.is_grad_enabled()))
    model.train(training)
    assert SCRIPT.evaluate(model, loader) == expected
    assert {module.training for module in model.modules()} == {training}
    assert grad
    assert not any(grad)


ten_million = pytest.param(10_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize("total", [30_000, ten_million])
@each_sequence
def test_an_evaluation_is_that_of_transformers_on_the_same_tokens(sequence, total, tmp_path):
    """Rows by numpy, losses by GPT2LMHeadModel; the slow test has the size of the paper's validation set."""
    T, lengths = 256, np.random.default_rng(0).lognormal(5, 1, total // 245).astype(int)
    documents, model = documents_of(lengths), model_of(n_positions=T)
    chunks = [len(documents) // 2, len(documents) - len(documents) // 2]
    path = write(tmp_path, documents, chunks)
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(path, 16, T, sequence))

    gpt2, losses = gpt2_of(model), []
    rows, is_text = rows_of(documents, T, sequence, chunks=chunks)
    for start in range(0, len(rows), 16):
        ids = torch.from_numpy(rows[start : start + 16])
        with torch.no_grad():
            log_p = gpt2(ids).logits[:, :-1].log_softmax(dim=-1)
        losses.append(-log_p.gather(2, ids[:, 1:, None])[..., 0].double().numpy())
    losses, text, targets = np.concatenate(losses), is_text[:, 1:], rows[:, 1:]
    assert results["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert results["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-6)
    assert results["text_loss"] == pytest.approx(losses[text].mean(), rel=1e-6)
    bits = losses[text].sum() / np.log(2) / TOKEN_BYTES[targets[text]].sum()
    assert results["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert results["padding_fraction"] == pytest.approx(1 - is_text.mean())
