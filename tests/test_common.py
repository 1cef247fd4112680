"""common.py: which tokenizer a checkpoint was trained with, tokenizer.json, and whose fault an error is."""

import base64
import errno
import json

import pytest
import tiktoken
from conftest import GPT2_RANKS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import common
from common import InputError, load_tokenizer, tokenizer_of

TEXTS = [f"Document {i} says that {i} times {j} is {i * j}: naïve, don't!\n\n" for i, j in enumerate(range(40, 240))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Byte-level BPE of the tokenizers library, 256 bytes, 200 merges and <|endoftext|>; its file, and itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=456, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    tokenizer.save(str(path))
    return path, tokenizer


def write_ranks(path, *more):
    tokens = [*(bytes([value]) for value in range(256)), *more]
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))
    return path


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(max_size=60), st.text(st.sampled_from("Docment says that 12*'t\n ïé\x00"), max_size=60)))
def test_tokenizer_json_encodes_as_its_library(text, trained):
    assume("<|endoftext|>" not in text)  # which the library takes for the special token
    path, tokenizer = trained
    loaded = load_tokenizer(str(path))
    assert loaded.eos_id == tokenizer.token_to_id("<|endoftext|>") == 456
    assert loaded.encode([text])[0].tolist() == tokenizer.encode(text).ids


def test_the_tokenizer_of_an_export_is_taken_back(trained, tmp_path):
    from export_hf import fast_tokenizer

    tokenizer = load_tokenizer(str(trained[0]))
    fast_tokenizer(tokenizer, vocab_size=512, model_max_length=64).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).ranks == tokenizer.ranks


def test_text_that_has_the_letters_of_a_special_token_stays_text(trained):
    (ids,) = load_tokenizer(str(trained[0])).encode(["a<|endoftext|>b"])
    assert 456 not in ids


def changed(contents, change):
    """The file's contents after a change: a path of keys, and the value that comes to stand there."""
    *keys, last, value = change
    part = contents
    for key in keys:
        part = part[key]
    part[last] = value(part[last]) if callable(value) else value
    return contents


TEMPLATE = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
SPECIAL = {"id": 456, "content": "<|endoftext|>", "special": True}


@pytest.mark.parametrize(
    "change, named",
    [
        (("model", "type", "Unigram"), "Unigram"),
        (("model", "dropout", 0.1), "dropout"),
        (("model", "end_of_word_suffix", "</w>"), "end_of_word_suffix"),
        (("model", "merges", lambda merges: merges[::-1]), "merge 0"),
        (("model", "merges", lambda merges: merges[:-1]), "ids"),
        (("normalizer", {"type": "NFC"}), "NFC"),
        (("pre_tokenizer", "add_prefix_space", True), "add_prefix_space"),
        (("pre_tokenizer", {"type": "Whitespace"}), "Whitespace"),
        (("pre_tokenizer", None), "pre_tokenizer"),
        (("post_processor", TEMPLATE | {"special_tokens": {"<s>": {}}}), "TemplateProcessing"),
        (("added_tokens", [SPECIAL | {"special": False}]), "<|endoftext|>"),
        (("added_tokens", [SPECIAL | {"id": 457}, SPECIAL | {"content": "<pad>"}]), "457"),
        (("model", 7), "tokenizer.json"),
    ],
)
def test_a_tokenizer_json_that_encodes_otherwise_is_refused(change, named, trained, tmp_path):
    contents = changed(json.loads(trained[0].read_text()), change)
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(InputError, match=named.replace("|", "\\|")) as refused:
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert str(tmp_path / "tokenizer.json") in str(refused.value)


def test_special_tokens_behind_the_end_of_text_fit(trained, tmp_path):
    contents = json.loads(trained[0].read_text())
    contents["added_tokens"].append(SPECIAL | {"id": 457, "content": "<|pad|>"})
    contents["post_processor"] = TEMPLATE  # which adds nothing; transformers writes it
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).sha256 == load_tokenizer(str(trained[0])).sha256
    # the configuration beside it says that another one ends a text
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|pad|>"}')
    with pytest.raises(InputError, match="457"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("content", [b"not ranks\n", b"YQ==\n", b"YQ== 1\n", None])
def test_unsound_ranks_are_refused(content, tmp_path):
    path = tmp_path / "ranks.tiktoken"
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError, match="ranks.tiktoken"):
        load_tokenizer(str(path))


def test_a_vocabulary_that_uint16_cannot_hold_is_refused(tmp_path):
    path = write_ranks(tmp_path / "large.tiktoken", *(b"%06d" % number for number in range(65_535 - 256)))
    with pytest.raises(InputError, match="65,536"):
        load_tokenizer(str(path))


def test_gpt2_that_is_not_to_be_had_says_why_and_what_to_do(monkeypatch):
    def fail(name):
        raise PermissionError(errno.EACCES, "Permission denied", "/cache/6d1c")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(InputError, match="/cache/6d1c.*TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")


@pytest.mark.skipif(not GPT2_RANKS.exists(), reason="no GPT-2 ranks on this machine")
def test_long_texts_are_cut_where_no_token_reaches_across(monkeypatch):
    tokenizer, encoding = load_tokenizer(str(GPT2_RANKS)), gpt2_encoding()
    million = ["a" * 1_000_000, " " * 1_200_000 + "end", "\n" * 1_000_000, "é " * 1_000_000]
    assert [encoding.decode(ids.tolist()) for ids in tokenizer.encode(million)] == million

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.sampled_from(" \n\t\r\x0b\x1c\x85\xa0\u2003\u3000ab'1!s\u0301é"), max_size=60), st.integers(1, 9))
    def check(text, part):
        monkeypatch.setattr(common, "LONG_TEXT", part)
        assert tokenizer.encode([text])[0].tolist() == encoding.encode_ordinary(text)

    check()


def gpt2_encoding():
    """GPT-2 with the split pattern as OpenAI first published it."""
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = common.read_ranks(GPT2_RANKS)
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def checkpoint(tokenizer, vocab_size=512, **train_config):
    return {"tokenizer": tokenizer, "model_config": {"vocab_size": vocab_size}, "train_config": train_config}


def prepared(folder, path):
    """A data folder with the tokenizer that metadata call by the name of a rank file."""
    folder.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(str(path))
    (folder / "tokenizer.tiktoken").write_bytes(common.rank_file(tokenizer.ranks))
    (folder / "metadata.json").write_text(json.dumps({"tokenizer": tokenizer.name}))
    return {"name": tokenizer.name, "vocab_size": tokenizer.eos_id + 1, "sha256": tokenizer.sha256}


def test_data_that_were_prepared_anew_do_not_change_a_checkpoints_tokenizer(tmp_path):
    first, second = write_ranks(tmp_path / "a.tiktoken", b"th"), write_ranks(tmp_path / "b.tiktoken", b"he")
    recorded = prepared(tmp_path / "data", first)
    contents = checkpoint(recorded, train_data=str(tmp_path / "data"))
    assert tokenizer_of(contents, "x.pt").name == recorded["name"]
    prepared(tmp_path / "data", second)
    for known in (recorded, recorded["name"]):  # as now, and as older runs recorded it
        contents["tokenizer"] = known
        with pytest.raises(InputError, match="a.tiktoken"):
            tokenizer_of(contents, "x.pt")
        with pytest.raises(InputError, match="b.tiktoken"):
            tokenizer_of(contents, "x.pt", str(second))
        assert b"th" in tokenizer_of(contents, "x.pt", str(first)).ranks
    assert tokenizer_of(checkpoint("bytes", train_data=str(tmp_path / "data")), "x.pt").name == "bytes"


def test_where_a_tokenizer_is_looked_for(tmp_path):
    ranks = write_ranks(tmp_path / "a.tiktoken", b"th")
    recorded = prepared(tmp_path / "data", ranks)
    assert tokenizer_of(checkpoint(recorded), "x.pt", None, None, str(tmp_path / "data")).sha256 == recorded["sha256"]
    unknown = checkpoint(None)  # a released checkpoint
    assert tokenizer_of(unknown, "x.pt", None, str(tmp_path / "data")).name == recorded["name"]
    with pytest.raises(InputError, match="--tokenizer"):
        tokenizer_of(unknown, "x.pt")
    with pytest.raises(InputError, match="257"):
        tokenizer_of(checkpoint("bytes", vocab_size=256), "x.pt")


def test_a_tokenizer_json_is_the_rank_file_that_was_recorded(trained, tmp_path):
    ranks = load_tokenizer(str(trained[0])).ranks
    (tmp_path / "ranks.tiktoken").write_bytes(common.rank_file(ranks))
    recorded = prepared(tmp_path / "data", tmp_path / "ranks.tiktoken")
    for known in (recorded, recorded["name"]):
        assert tokenizer_of(checkpoint(known), "x.pt", str(trained[0])).ranks == ranks
