"""Token files -> rows -> batches -> the figures of an evaluation, each against a few lines of numpy."""

import json
import math
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import gpt2_of, script_of
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPT = script_of("kqv")  # owns the text that the scripts share; another test holds the others to it
EOS = 60
TOKEN_BYTES = np.array([1 + i % 5 for i in range(EOS)] + [0], dtype=np.uint16)
each_sequence = pytest.mark.parametrize("sequence", ["padded", "packed"])
examples = settings(max_examples=60, deadline=None, derandomize=True)


def documents_of(lengths):
    """Documents of these lengths, whose tokens follow from their number."""
    return [np.random.default_rng(i).integers(0, EOS, length).astype(np.uint16) for i, length in enumerate(lengths)]


def write(folder, documents, chunks=None, finished=True, vocabulary=TOKEN_BYTES):
    """A split as dataset_download.py writes it, with this many documents in each chunk."""
    chunks = chunks or [len(documents)]
    assert sum(chunks) == len(documents)
    folder.mkdir(parents=True, exist_ok=True)
    entries, left = [], iter(documents)
    for number, count in enumerate(chunks):
        chunk = list(islice(left, count))
        offsets = np.cumsum([0, *map(len, chunk)]).astype(np.int64)
        name = f"chunk_{number:03d}"
        np.save(folder / f"{name}.tokens.npy", np.concatenate(chunk).astype(np.uint16))
        np.save(folder / f"{name}.offsets.npy", offsets)
        size = {"documents": count, "tokens": int(offsets[-1]), "bytes": 0}
        entries.append({"name": name} | size | {"tokens_sha256": "0", "offsets_sha256": "0"})
    np.save(folder / "token_bytes.npy", vocabulary)
    totals = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "bytes")}
    names = {"source": "test", "revision": None, "text_column": "text", "tokenizer": "test", "split": "train"}
    sizes = {"vocab_size": len(vocabulary), "eos_id": len(vocabulary) - 1, "target_tokens": 1, "chunk_tokens": 1}
    metadata = names | sizes | totals | {"finished": finished, "chunks": entries}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def rows_of(documents, seq_length, sequence, eos=EOS):
    """What the loader must give: the rows, and where they are text."""
    if sequence == "packed":
        stream = np.concatenate([np.append(document, eos) for document in documents]).astype(np.int64)
        texts = [stream[start : start + seq_length] for start in range(0, len(stream), seq_length)]
    else:
        texts = [document[:seq_length].astype(np.int64) for document in documents]
    rows = np.stack([np.pad(text, (0, seq_length - len(text)), constant_values=eos) for text in texts])
    is_text = np.stack([np.arange(seq_length) < len(text) for text in texts])
    return rows, is_text


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
    expected_rows, expected_text = rows_of(documents, seq_length, sequence)
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
    check_rows([length for chunk in chunks for length in chunk], [len(chunk) for chunk in chunks], seq_length, sequence)


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
    assert not is_text.ravel()[len(stream) :].any()
    assert len(rows.ravel()) - len(stream) < seq_length


@each_sequence
def test_what_dataset_download_prepared_is_read_back(sequence, data_dir):
    documents = []
    for path in sorted((data_dir / "train").glob("*.offsets.npy")):
        tokens = np.load(path.with_name(path.name.replace("offsets", "tokens")))
        documents += np.split(tokens, np.load(path)[1:-1])
    assert len(documents) == 110
    rows, is_text = read(SCRIPT.get_dataloader(data_dir / "train", 7, 96, sequence))
    expected_rows, expected_text = rows_of(documents, 96, sequence, eos=256)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(is_text, expected_text)


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
    return write(tmp_path_factory.mktemp("numbered"), [np.full(3, i, np.uint16) for i in range(ROWS)], [9, 14])


def order(path, count, batch_size=3, seed=5, **place):
    """The numbers of the first rows that a process reads."""
    loader = SCRIPT.get_dataloader(path, batch_size, 4, "padded", seed=seed, **place)
    batches = islice(loader, -(-count // batch_size))
    return [number for ids, _ in batches for number in ids[:, 0].tolist()][:count]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize("start", [0, 60])
def test_any_number_of_processes_reads_the_same_global_batches(numbered, world_size, batch_size, start):
    """Of 4 micro batches a step: a process alone takes them all, of two each takes two, and so on."""
    steps, micro_batches = 3, 4
    count = steps * micro_batches * batch_size
    alone = np.array(order(numbered, count, batch_size, start=start)).reshape(-1, batch_size)
    shared = [
        np.array(
            order(numbered, count // world_size, batch_size, start=start, rank=rank, world_size=world_size)
        ).reshape(-1, batch_size)
        for rank in range(world_size)
    ]
    np.testing.assert_array_equal(np.stack(shared, axis=1).reshape(-1, batch_size), alone)


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
@given(start=st.integers(0, 5 * ROWS), batch_size=st.integers(1, 6))
def test_a_loader_starts_where_a_run_was_interrupted(numbered, start, batch_size):
    whole = order(numbered, 5 * ROWS + 20)
    assert order(numbered, 20, batch_size, start=start) == whole[start : start + 20]


def test_the_order_is_the_seeds(numbered):
    assert order(numbered, 40, seed=5) == order(numbered, 40, seed=5)
    assert order(numbered, 40, seed=5) != order(numbered, 40, seed=6)
    assert sorted(order(numbered, ROWS, seed=0)) == list(range(ROWS))


def test_without_a_seed_every_row_comes_once_in_order_and_the_last_batch_is_short(numbered):
    batches = [ids[:, 0].tolist() for ids, _ in SCRIPT.get_dataloader(numbered, 5, 4, "padded")]
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert sum(batches, []) == list(range(ROWS))


# ---- files that are not whole


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(folder, **changes):
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def more_tokens(folder, extra):
    path = folder / "chunk_001.tokens.npy"
    tokens = np.load(path)
    np.save(path, np.append(tokens, tokens)[: len(tokens) + extra])


DAMAGE = {
    "no metadata": lambda folder: (folder / "metadata.json").unlink(),
    "unfinished": lambda folder: rewrite(folder, finished=False),
    "metadata cut off": lambda folder: half(folder / "metadata.json"),
    "metadata empty": lambda folder: (folder / "metadata.json").write_text(""),
    "metadata of something else": lambda folder: (folder / "metadata.json").write_text('{"name": "x"}'),
    "chunk missing": lambda folder: (folder / "chunk_001.tokens.npy").unlink(),
    "offsets missing": lambda folder: (folder / "chunk_001.offsets.npy").unlink(),
    "token_bytes missing": lambda folder: (folder / "token_bytes.npy").unlink(),
    "tokens cut off": lambda folder: half(folder / "chunk_001.tokens.npy"),
    "offsets cut off": lambda folder: half(folder / "chunk_001.offsets.npy"),
    "tokens empty": lambda folder: (folder / "chunk_001.tokens.npy").write_bytes(b""),
    "offsets empty": lambda folder: (folder / "chunk_001.offsets.npy").write_bytes(b""),
    "token_bytes empty": lambda folder: (folder / "token_bytes.npy").write_bytes(b""),
    "tokens no array": lambda folder: (folder / "chunk_001.tokens.npy").write_text("tokens"),
    "a token more": lambda folder: more_tokens(folder, 1),
    "a token less": lambda folder: more_tokens(folder, -1),
    "no documents": lambda folder: rewrite(folder, documents=0, chunks=[]),
}


@each_sequence
@pytest.mark.parametrize("damage", DAMAGE)
def test_token_files_that_are_not_whole_are_refused_by_name(damage, sequence, tmp_path):
    folder = write(tmp_path / "train", documents_of([9, 30, 12]), [1, 2])
    DAMAGE[damage](folder)
    check_refused(folder, sequence)


def test_a_folder_that_is_missing_is_refused_with_what_to_run(tmp_path):
    check_refused(tmp_path / "nowhere")


def check_refused(folder, sequence="padded"):
    with pytest.raises(ValueError) as caught:
        SCRIPT.get_dataloader(folder, 2, 8, sequence)
    message = str(caught.value)
    assert str(folder) in message
    assert "dataset_download.py" in message
    assert "\n" not in message


# ---- evaluation

T = 12
DOCUMENTS = documents_of([5, 30, 0, 1, 12, 2, 7, 19, 11, 3])


def model_of(dropout=0.0, n_positions=T):
    """A small model whose losses differ a lot between tokens."""
    torch.manual_seed(0)
    shape = {"vocab_size": EOS + 1, "n_positions": n_positions, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = SCRIPT.ModelConfig(**shape, dropout=dropout, initializer_range=0.2)
    return SCRIPT.GPT(config).eval()


def expected_of(model, rows, is_text):
    """An evaluation in numpy: the log-probability of each token of a row but the first, from the model's logits."""
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
    return write(tmp_path_factory.mktemp("evaluated"), DOCUMENTS, [4, 6])


@each_sequence
def test_an_evaluation_is_the_obvious_arithmetic_over_the_rows(sequence, split):
    model = model_of()
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(split, 3, T, sequence))
    expected = expected_of(model, *rows_of(DOCUMENTS, T, sequence))
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert all(type(value) is float for value in results.values())  # for metrics.jsonl


@each_sequence
@pytest.mark.parametrize("max_batches", [1, 2, 100, None])
def test_max_batches_takes_the_first_ones(sequence, max_batches, split):
    model, (rows, is_text) = model_of(), rows_of(DOCUMENTS, T, sequence)
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(split, 2, T, sequence), max_batches)
    taken = None if max_batches is None else 2 * max_batches
    expected = expected_of(model, rows[:taken], is_text[:taken])
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@each_sequence
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_change_an_evaluation(batch_size, sequence, split):
    model = model_of()
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(split, batch_size, T, sequence))
    reference = SCRIPT.evaluate(model, SCRIPT.get_dataloader(split, 4, T, sequence))
    assert results == pytest.approx(reference, rel=1e-6)


def test_packed_rows_are_text_but_for_the_end_of_the_last(tmp_path):
    model = model_of()
    full = write(tmp_path / "full", documents_of([11, 23, 11]), [2, 1])  # 4 rows of 12, with the ends of text
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(full, 2, T, "packed"))
    assert results["padding_fraction"] == 0
    assert results["text_loss"] == results["loss"]
    tail = write(tmp_path / "tail", documents_of([11, 23, 11, 2]))  # a fifth, of 3
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(tail, 2, T, "packed"))
    assert results["padding_fraction"] == pytest.approx(9 / 60)
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
    """The size of the paper's validation set, in the slow test: its rows by numpy, its losses by GPT2LMHeadModel."""
    T, lengths = 256, np.random.default_rng(0).lognormal(5, 1, total // 245).astype(int)
    documents, model = documents_of(lengths), model_of(n_positions=T)
    path = write(tmp_path, documents, [len(documents) // 2, len(documents) - len(documents) // 2])
    assert lengths.sum() == pytest.approx(total, rel=0.1)
    results = SCRIPT.evaluate(model, SCRIPT.get_dataloader(path, 16, T, sequence))

    gpt2, losses = gpt2_of(model), []
    rows, is_text = rows_of(documents, T, sequence)
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
