"""Token files -> rows -> batches -> the figures of an evaluation, each against a few lines of numpy."""

import hashlib
import json
import math
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, gpt2_of, script_of
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPT = script_of("kqv")  # owns the text that the scripts share; another test holds the others to it
EOS = 60
TOKEN_BYTES = np.array([1 + i % 5 for i in range(EOS)] + [0], dtype=np.uint16)
each_sequence = pytest.mark.parametrize("sequence", ["padded", "packed"])
examples = settings(max_examples=60, deadline=None, derandomize=True)


def documents_of(lengths):
    """Documents of these lengths, whose tokens follow from their number."""
    documents = []
    for i, length in enumerate(lengths):
        documents.append(np.random.default_rng(i).integers(0, EOS, length).astype(np.uint16))
    return documents


def write(folder, documents, chunks=None, finished=True, vocabulary=TOKEN_BYTES):
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
    names = {"source": "test", "revision": None, "text_column": "text", "tokenizer": "test", "split": "train"}
    sizes = {"vocab_size": len(vocabulary), "eos_id": eos, "target_tokens": 1, "chunk_tokens": 1}
    metadata = names | sizes | totals | {"finished": finished, "chunks": entries}
    (folder / "metadata.json").write_text(json.dumps(metadata))
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


def check_rows(lengths, chunks, seq_length, sequence):
    documents = documents_of(lengths)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "train", documents, chunks)
        rows, is_text = read(SCRIPT.get_dataloader(path, 4, seq_length, sequence))
    expected_rows, expected_text = rows_of(documents, seq_length, sequence, chunks=chunks)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(is_text, expected_text)


LENGTHS = {
    "one token": ([1], [1]),
    "a row exactly": ([8, 8], [2]),
    "a packed row exactly": ([7, 7, 7], [1, 2]),
    "empty documents": ([0, 3, 0, 0, 5, 0], [2, 2, 2]),
    "a chunk of empty documents": ([5, 0, 0, 0, 9], [1, 3, 1]),
    "only empty documents": ([0] * 20, [3, 17]),
    "longer than many rows": ([100, 3, 61], [1, 1, 1]),
    "a document a chunk": ([3, 9, 1, 20], [1, 1, 1, 1]),
}


@each_sequence
@pytest.mark.parametrize("case", LENGTHS)
def test_rows_hold_the_documents_at_every_edge(case, sequence):
    lengths, chunks = LENGTHS[case]
    check_rows(lengths, chunks, 8, sequence)


@each_sequence
@examples
@given(
    chunks=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6), min_size=1, max_size=4),
    seq_length=st.integers(2, 17),
)
def test_rows_hold_the_documents_whatever_their_lengths_and_chunks(sequence, chunks, seq_length):
    lengths = [length for chunk in chunks for length in chunk]
    check_rows(lengths, [len(chunk) for chunk in chunks], seq_length, sequence)


@examples
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12), seq_length=st.integers(2, 17))
def test_packed_rows_joined_are_the_documents_each_followed_by_an_end_of_text(lengths, seq_length):
    documents = documents_of(lengths)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), documents, [1] * len(lengths))
        rows, is_text = read(SCRIPT.get_dataloader(path, 3, seq_length, "packed"))
    stream = rows.ravel()[is_text.ravel()]
    ends = np.flatnonzero(stream == EOS)
    assert len(ends) == len(documents)
    for document, start, end in zip(documents, [-1, *ends], ends, strict=False):
        np.testing.assert_array_equal(stream[start + 1 : end], document)
    padding = (~is_text).sum(axis=1)
    assert padding.max() < seq_length
    assert (padding > 0).sum() <= len(documents)  # a row of each chunk at most


@each_sequence
def test_what_dataset_download_prepared_is_read_back(sequence, data_dir):
    documents, chunks = [], []
    for path in sorted((data_dir / "train").glob("*.offsets.npy")):
        tokens, offsets = np.load(path.with_name(path.name.replace("offsets", "tokens"))), np.load(path)
        documents += [tokens[start : end - 1] for start, end in zip(offsets, offsets[1:], strict=False)]
        chunks.append(len(offsets) - 1)
    assert len(documents) == 110
    assert len(chunks) > 1
    rows, is_text = read(SCRIPT.get_dataloader(data_dir / "train", 7, 96, sequence))
    expected_rows, expected_text = rows_of(documents, 96, sequence, 256, chunks)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(is_text, expected_text)


@each_sequence
def test_there_is_no_row_before_the_first_or_behind_the_last(sequence, tmp_path):
    dataset = SCRIPT.get_dataloader(write(tmp_path, documents_of([5, 9])), 2, 4, sequence).dataset
    dataset[len(dataset) - 1]
    for row in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[row]


@each_sequence
def test_batches_are_int64_ids_and_a_bool_mask(sequence, tmp_path):
    path = write(tmp_path, documents_of([5, 9]))
    input_ids, is_text = next(iter(SCRIPT.get_dataloader(str(path), 2, 4, sequence)))
    assert (input_ids.dtype, is_text.dtype) == (torch.int64, torch.bool)
    assert input_ids.shape == is_text.shape == (2, 4)


def test_padded_is_the_protocol_unless_told(tmp_path):
    path = write(tmp_path, documents_of([5, 9]))
    rows, _ = read(SCRIPT.get_dataloader(path, 2, 7))
    np.testing.assert_array_equal(rows, rows_of(documents_of([5, 9]), 7, "padded")[0])


@each_sequence
def test_ids_up_to_the_largest_uint16_are_kept(sequence, tmp_path):
    vocabulary = np.ones(65_535, dtype=np.uint16)
    documents = [np.array([65_533, 0, 40_000], dtype=np.uint16)]
    path = write(tmp_path, documents, vocabulary=vocabulary)
    rows, _ = read(SCRIPT.get_dataloader(path, 1, 4, sequence))
    assert rows.tolist() == [[65_533, 0, 40_000, 65_534]]


def test_another_way_to_make_rows_is_refused(tmp_path):
    path = write(tmp_path, documents_of([5, 9]))
    with pytest.raises(ValueError, match="sequence: expected padded or packed, got 'pakced'"):
        SCRIPT.get_dataloader(path, 2, 7, "pakced")


def test_tokens_stay_on_disk_memory_mapped(tmp_path):
    """Reading a row must not bring a chunk of 100 million tokens into memory."""
    path = write(tmp_path, documents_of([5, 9, 3]), [2, 1])
    dataset = SCRIPT.get_dataloader(path, 1, 4, "packed").dataset
    dataset[1]
    assert len(dataset.tokens) == 2
    for array in [*dataset.tokens, *dataset.offsets]:
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable


# ---- order


ROWS = 23


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A data set whose padded row i begins with token i."""
    documents = [np.full(3, i, np.uint16) for i in range(ROWS)]
    return write(tmp_path_factory.mktemp("numbered"), documents, [9, 14])


def order(path, count, batch_size=3, seed=5, **place):
    """The numbers of the first rows that a process reads."""
    loader = SCRIPT.get_dataloader(path, batch_size, 4, "padded", seed=seed, **place)
    batches = islice(loader, -(-count // batch_size))
    return [number for ids, _ in batches for number in ids[:, 0].tolist()][:count]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize("rows_seen", [0, 60])
def test_any_number_of_processes_reads_the_same_global_batches(numbered, world_size, batch_size, rows_seen):
    """Of 4 micro batches a step: a process alone takes them all, of two each takes two, and so on."""
    steps, micro_batches = 3, 4
    count = steps * micro_batches * batch_size
    alone = np.array(order(numbered, count, batch_size, rows_seen=rows_seen)).reshape(-1, batch_size)
    shares = []
    for rank in range(world_size):
        place = {"rows_seen": rows_seen, "rank": rank, "world_size": world_size}
        share = order(numbered, count // world_size, batch_size, **place)
        shares.append(np.array(share).reshape(-1, batch_size))
    np.testing.assert_array_equal(np.stack(shares, axis=1).reshape(-1, batch_size), alone)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 30])
def test_every_row_comes_once_an_epoch_and_each_epoch_in_another_order(numbered, batch_size):
    epochs = np.array(order(numbered, 4 * ROWS, batch_size)).reshape(4, ROWS)
    for epoch in epochs:
        assert sorted(epoch) == list(range(ROWS))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tuple(epochs[0]) != tuple(range(ROWS))


def test_the_order_does_not_depend_on_the_batch_size(numbered):
    assert order(numbered, 60, batch_size=1) == order(numbered, 60, batch_size=7)


@examples
@given(rows_seen=st.integers(0, 5 * ROWS), batch_size=st.integers(1, 6))
def test_a_loader_starts_where_a_run_was_interrupted(numbered, rows_seen, batch_size):
    whole = order(numbered, 5 * ROWS + 20)
    assert order(numbered, 20, batch_size, rows_seen=rows_seen) == whole[rows_seen : rows_seen + 20]


def test_the_order_is_the_seeds(numbered):
    assert order(numbered, 40, seed=5) == order(numbered, 40, seed=5)
    assert order(numbered, 40, seed=5) != order(numbered, 40, seed=6)
    assert sorted(order(numbered, ROWS, seed=0)) == list(range(ROWS))


def test_without_a_seed_every_row_comes_once_in_order_and_the_last_batch_is_short(numbered):
    batches = [ids[:, 0].tolist() for ids, _ in SCRIPT.get_dataloader(numbered, 5, 4, "padded")]
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert sum(batches, []) == list(range(ROWS))


@examples
@given(world_size=st.integers(1, 9), batch_size=st.integers(1, 30))
def test_without_a_seed_the_ranks_take_the_batches_in_turn(numbered, world_size, batch_size):
    """All rows but no row twice; with more ranks than batches, some have none."""
    rows = list(range(ROWS))
    batches = [rows[start : start + batch_size] for start in range(0, ROWS, batch_size)]
    for rank in range(world_size):
        loader = SCRIPT.get_dataloader(numbered, batch_size, 4, rank=rank, world_size=world_size)
        assert [ids[:, 0].tolist() for ids, _ in loader] == batches[rank::world_size]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (7, 3), (-1, 2), (0, 0)])
def test_a_rank_beyond_the_world_size_is_refused(numbered, rank, world_size, seed):
    with pytest.raises(ValueError, match=f"rank: expected 0 to {world_size - 1}, got {rank}"):
        SCRIPT.get_dataloader(numbered, 3, 4, seed=seed, rank=rank, world_size=world_size)


# ---- files that are not whole


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(folder, **changes):
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder, name, make):
    """Put make(array) in the place of an array."""
    np.save(folder / name, make(np.load(folder / name)))


def older_format(folder):
    """As it was before end-of-text tokens: the same metadata, only the documents, their offsets."""
    for path in folder.glob("*.offsets.npy"):
        offsets = np.load(path)
        name = path.name.replace("offsets", "tokens")
        change(folder, name, lambda tokens, ends=offsets[1:] - 1: np.delete(tokens, ends))
        np.save(path, offsets - np.arange(len(offsets)))


METADATA, BYTES = "metadata.json", "token_bytes.npy"
TOKENS, OFFSETS = "chunk_001.tokens.npy", "chunk_001.offsets.npy"
DAMAGE = {  # what is done to the folder, and what the message names
    "no metadata": (lambda folder: (folder / METADATA).unlink(), METADATA),
    "unfinished": (lambda folder: rewrite(folder, finished=False), "not finished"),
    "metadata cut off": (lambda folder: half(folder / METADATA), METADATA),
    "metadata empty": (lambda folder: (folder / METADATA).write_text(""), METADATA),
    "metadata of something else": (lambda folder: (folder / METADATA).write_text('{"name": "x"}'), METADATA),
    "metadata no text": (lambda folder: (folder / METADATA).write_bytes(b"\xff\x00"), METADATA),
    "no chunks": (lambda folder: rewrite(folder, chunks=[]), "complete"),
    "no documents": (lambda folder: rewrite(folder, documents=0, chunks=[]), "not finished"),
    "another eos_id": (lambda folder: rewrite(folder, eos_id=3), "chunk_000"),
    "eos_id beyond the vocabulary": (lambda folder: rewrite(folder, eos_id=EOS + 1), "chunk_000"),
    "eos_id below zero": (lambda folder: rewrite(folder, eos_id=-1), "chunk_000"),
    "tokens no array": (lambda folder: (folder / TOKENS).write_text("tokens"), "chunk_001"),
    "older format": (older_format, "chunk_000"),
}
for name in (TOKENS, OFFSETS, BYTES):
    named = name.partition(".")[0]
    DAMAGE[f"{name} missing"] = (lambda folder, name=name: (folder / name).unlink(), named)
    DAMAGE[f"{name} cut off"] = (lambda folder, name=name: half(folder / name), named)
    DAMAGE[f"{name} empty"] = (lambda folder, name=name: (folder / name).write_bytes(b""), named)
OTHER_ARRAYS = {  # arrays that are whole, in the place of the right ones
    "token_bytes short": (BYTES, lambda array: array[:-1]),
    "token_bytes text": (BYTES, lambda array: np.full(len(array), "x")),
    "tokens of another type": (TOKENS, lambda array: array.astype(np.int32)),
    "tokens in two columns": (TOKENS, lambda array: np.stack([array, array], axis=1)),
    "tokens a number": (TOKENS, lambda array: array[0]),
    "a token more": (TOKENS, lambda array: np.append(array, array[-1])),
    "a token less": (TOKENS, lambda array: array[:-1]),
    "no end of text at the end": (TOKENS, lambda array: np.append(array[:-1], array[:1])),
    "offsets reversed": (OFFSETS, lambda array: array[::-1]),
    "offsets that fall": (OFFSETS, lambda array: array[[0, 2, 1, 3]]),
    "offsets that stand": (OFFSETS, lambda array: array[[0, 1, 1, 3]]),
    "offsets below zero": (OFFSETS, lambda array: np.append(-5, array[1:])),
    "offsets beyond the tokens": (OFFSETS, lambda array: np.append(array[:-1], 99)),
    "offsets that are no integers": (OFFSETS, lambda array: array.astype(float)),
    "an offset less": (OFFSETS, lambda array: array[[0, 2, 3]]),
}
for case, (name, make) in OTHER_ARRAYS.items():
    named = name.partition(".")[0]  # the chunk, of whose two files either may be wrong
    DAMAGE[case] = (lambda folder, name=name, make=make: change(folder, name, make), named)


@each_sequence
@pytest.mark.parametrize("damage", DAMAGE)
def test_token_files_that_are_not_whole_are_refused_by_name(damage, sequence, tmp_path):
    folder = write(tmp_path / "train", documents_of([9, 30, 12, 4]), [1, 3])
    do, named = DAMAGE[damage]
    do(folder)
    assert named in check_refused(folder, sequence)


def test_files_of_the_older_format_are_refused_with_what_to_delete(tmp_path):
    older_format(write(tmp_path / "data/train", documents_of([9, 30, 12, 4]), [1, 3]))
    message = check_refused(tmp_path / "data/train")
    assert "older format" in message
    assert "delete" in message
    assert f"dataset_download.py --output_dir {tmp_path / 'data'}" in message


def test_a_folder_that_is_missing_is_refused_with_what_to_run(tmp_path):
    check_refused(tmp_path / "nowhere")


def check_refused(folder, sequence="padded"):
    """A RunError of one line that names the folder and the script that makes it anew; returns the line."""
    with pytest.raises(SCRIPT.RunError) as caught:
        SCRIPT.get_dataloader(folder, 2, 8, sequence)
    message = str(caught.value)
    assert str(folder) in message
    assert "dataset_download.py" in message
    assert "\n" not in message
    return message


KEYS = ["vocab_size", "eos_id", "tokenizer", "tokenizer_sha256", "documents", "tokens", "finished", "chunks"]
CHUNK_KEYS = ["name", "documents", "tokens", "bytes", "tokens_sha256", "offsets_sha256"]
PLACES = [[], ["chunks", 0], *([key] for key in KEYS), *(["chunks", 0, key] for key in CHUNK_KEYS)]
TEXT = st.text(max_size=5)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([0, 1, -1, 61.0])
SHORT = {"max_size": 3}
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, **SHORT) | st.dictionaries(TEXT, inner, **SHORT))


@pytest.fixture(scope="module")
def overwritten(tmp_path_factory):
    """A split whose metadata.json is there to be overwritten, and what stood in it."""
    folder = write(tmp_path_factory.mktemp("overwritten"), documents_of([9, 30, 12]), [2, 1])
    return folder, (folder / METADATA).read_text()


@settings(examples, max_examples=200)
@given(place=st.sampled_from(PLACES), value=JSON)
def test_whatever_stands_in_metadata_the_rows_are_right_or_refused_in_a_line(overwritten, place, value):
    folder, original = overwritten
    root = {"metadata": json.loads(original)}
    *parents, last = ["metadata", *place]
    inner = root
    for key in parents:
        inner = inner[key]
    inner[last] = value
    (folder / METADATA).write_text(json.dumps(root["metadata"]))
    for sequence in ("padded", "packed"):
        try:
            rows, is_text = read(SCRIPT.get_dataloader(folder, 2, 8, sequence))
        except SCRIPT.RunError:
            message = check_refused(folder, sequence)
            assert place or METADATA in message
        else:
            expected_rows, expected_text = rows_of(documents_of([9, 30, 12]), 8, sequence, chunks=[2, 1])
            np.testing.assert_array_equal(rows, expected_rows)
            np.testing.assert_array_equal(is_text, expected_text)


@each_sequence
def test_a_token_beyond_the_vocabulary_ends_the_reading_with_the_name_of_its_file(sequence, tmp_path):
    """It is found where it is read: looking through all tokens would take a minute at 10B."""
    folder = write(tmp_path / "train", documents_of([9, 30, 12]), [1, 2])
    tokens = np.load(folder / TOKENS)
    tokens[3] = EOS + 1
    np.save(folder / TOKENS, tokens)
    loader = SCRIPT.get_dataloader(folder, 1, 8, sequence)
    with pytest.raises(SCRIPT.RunError) as caught:
        list(loader)
    message = str(caught.value)
    assert str(folder / TOKENS) in message
    assert "beyond the vocabulary" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", [TOKENS, OFFSETS])
def test_a_change_of_one_bit_is_found_by_verification(name, tmp_path):
    folder = write(tmp_path / "train", documents_of([9, 30, 12]), [1, 2])
    SCRIPT.get_dataloader(folder, 2, 8).dataset.verify()
    contents = bytearray((folder / name).read_bytes())
    contents[-7 if name == TOKENS else -16] ^= 1
    (folder / name).write_bytes(contents)
    dataset = SCRIPT.get_dataloader(folder, 2, 8).dataset  # it looks whole
    with pytest.raises(SCRIPT.RunError, match=f"^{folder / name}: ") as caught:
        dataset.verify()
    assert "\n" not in str(caught.value)


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
def test_an_evaluation_is_the_obvious_arithmetic_over_the_rows(sequence, split):
    model = model_of()
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(split, 3, T, sequence))
    expected = expected_of(model, *rows_of(DOCUMENTS, T, sequence, chunks=CHUNKS))
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert all(type(value) is float for value in results.values())  # for metrics.jsonl


@each_sequence
@pytest.mark.parametrize("max_batches", [1, 2, 100, None])
def test_max_batches_takes_the_first_ones(sequence, max_batches, split):
    model, (rows, is_text) = model_of(), rows_of(DOCUMENTS, T, sequence, chunks=CHUNKS)
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(split, 2, T, sequence), max_batches)
    taken = None if max_batches is None else 2 * max_batches
    expected = expected_of(model, rows[:taken], is_text[:taken])
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("max_batches", [0, -1])
def test_an_evaluation_of_no_batches_is_refused(max_batches, split):
    with pytest.raises(ValueError, match=f"max_batches: expected at least 1, got {max_batches}"):
        SCRIPT.evaluate(model_of(), SCRIPT.get_dataloader(split, 2, T), max_batches)


def test_an_evaluation_ends_at_the_next_batch_when_a_signal_arrives(split):
    model, received, batches = model_of(), [], []

    def second_batch_brings_a_signal(*_):
        batches.append(1)
        if len(batches) == 2:
            received.append(15)

    model.h[0].register_forward_hook(second_batch_brings_a_signal)
    model.train()
    assert SCRIPT.evaluate(model, SCRIPT.get_dataloader(split, 2, T), None, received) is None
    assert len(batches) == 2
    assert model.training


RANK_PROGRAM = """
import json
import sys

sys.path[:0] = sys.argv[1:3]
from test_token_data import CASES, SCRIPT, T, model_of

read = []
whole = SCRIPT.TokenDataset.__getitem__
SCRIPT.TokenDataset.__getitem__ = lambda self, i: read.append(int(i)) or whole(self, i)
SCRIPT.init_distributed()
for sequence, batch_size, max_batches in CASES:
    read.clear()
    loader = SCRIPT.get_dataloader(sys.argv[3], batch_size, T, sequence)
    results = SCRIPT.evaluate(model_of(), loader, max_batches)
    with open(f"{sys.argv[4]}/rank_{SCRIPT.RANK}.jsonl", "a") as file:
        file.write(json.dumps([results, read]) + "\\n")
SCRIPT.dist.destroy_process_group()
"""
CASES = [("padded", 2, None), ("packed", 3, None), ("padded", 4, None), ("padded", 2, 1), ("packed", 2, 4)]


@pytest.fixture(scope="module")
def ranks(split, tmp_path_factory):
    """What each of three ranks got from the evaluations of CASES, and the rows that it read for them."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANK_PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    command = [*launch, folder / "ranks.py", ROOT, ROOT / "tests", split, folder]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
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


@each_sequence
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_change_an_evaluation(batch_size, sequence, split):
    model = model_of()
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(split, batch_size, T, sequence))
    reference = SCRIPT.evaluate(model, SCRIPT.get_dataloader(split, 4, T, sequence))
    assert results == pytest.approx(reference, rel=1e-6)


def test_packed_rows_are_text_but_for_the_end_of_each_chunk(tmp_path):
    model = model_of()
    # with the ends of text, 36 tokens and 12: three rows and one
    full = write(tmp_path / "full", documents_of([11, 23, 11]), [2, 1])
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(full, 2, T, "packed"))
    assert results["padding_fraction"] == 0
    assert results["text_loss"] == results["loss"]
    # 17 tokens and 27: two rows and three
    tail = write(tmp_path / "tail", documents_of([11, 4, 23, 2]), [2, 2])
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(tail, 2, T, "packed"))
    assert results["padding_fraction"] == pytest.approx((7 + 9) / 60)
    assert results["text_loss"] != results["loss"]


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


def test_an_evaluation_follows_the_precision_of_its_caller(split):
    model, loader = model_of(), SCRIPT.get_dataloader(split, 3, T)
    exact = SCRIPT.evaluate(model, loader)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = SCRIPT.evaluate(model, loader)
    assert rounded != exact
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_text_without_bytes_has_no_bits_per_byte(tmp_path):
    path = write(tmp_path, documents_of([5, 6]), vocabulary=np.zeros_like(TOKEN_BYTES))
    assert math.isnan(SCRIPT.evaluate(model_of(), SCRIPT.get_dataloader(path, 2, T))["bits_per_byte"])


def test_an_evaluation_without_a_token_to_predict_is_refused_by_name(tmp_path):
    path = write(tmp_path, documents_of([1, 0, 1]))
    with pytest.raises(ValueError, match=str(path)):
        SCRIPT.evaluate(model_of(), SCRIPT.get_dataloader(path, 2, T))


ten_million = pytest.param(10_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize("total", [60_000, ten_million])
@each_sequence
def test_an_evaluation_is_that_of_transformers_on_the_same_tokens(sequence, total, tmp_path):
    """Rows by numpy, losses by GPT2LMHeadModel; the slow test has the size of the paper's validation set."""
    T, lengths = 256, np.random.default_rng(0).lognormal(5, 1, total // 245).astype(int)
    documents, model = documents_of(lengths), model_of(n_positions=T)
    chunks = [len(documents) // 2, len(documents) - len(documents) // 2]
    path = write(tmp_path, documents, chunks)
    assert lengths.sum() == pytest.approx(total, rel=0.1)
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
