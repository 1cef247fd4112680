"""export_hf.py: the folder as its readers load it, tokenizer, model card, the way back, what is refused."""

import base64
import copy
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GPT2_RANKS, ROOT, SENTENCES, VARIANTS, arguments, gpt2_of, script_of
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_export_model import build, greedy, tokens

from transformers import (  # isort: skip
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
    DataCollatorForLanguageModeling, DataCollatorWithFlattening, PreTrainedTokenizerFast, Trainer,
    TrainingArguments, pipeline,
)  # fmt: skip

import export_hf
from common import load_tokenizer
from modeling_qkv import QKVForCausalLM

FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_qkv.py"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
SHAPE = {"vocab_size": 260, "n_positions": 64}
TRUST = {"trust_remote_code": True}


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path_factory):
    """Code that comes with a folder is copied here, and not into the user's cache."""
    cache = tmp_path_factory.getbasetemp() / "modules"
    cache.mkdir(exist_ok=True)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))


def save(alias, path, shape=SHAPE, **entries):
    """A checkpoint with a small random model of a variant; entries come on top, None takes one away."""
    model, _ = build(alias, **shape)
    script = script_of(alias)
    model_config = {name: getattr(model.config, name) for name in export_hf.SHAPE}
    contents = {"variant": script.VARIANT, "step": 8, "tokens_seen": 2048, "train_config": {}}
    contents |= {"model_state_dict": model.state_dict(), "model_config": model_config}
    contents = {name: value for name, value in (contents | entries).items() if value is not None}
    torch.save(contents, path)
    return model


def export(alias, checkpoint, folder, *options):
    export_hf.main(["--model", alias, "--checkpoint", str(checkpoint), "--output_dir", str(folder), *options])
    return folder


def refused(capsys, *arguments):
    """The one line that the command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        export_hf.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert exit.value.code == 2
    assert output.out == ""
    assert output.err.startswith("export_hf.py: error: ") and output.err.count("\n") == 1
    return output.err


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """The output folder of a finished run of Q–K=V."""
    folder = tmp_path_factory.mktemp("run") / "outputs"
    script_of("kv").main(arguments(data, folder))
    return folder


@pytest.fixture(scope="session")
def folder(run, tmp_path_factory):
    """That run's model, exported."""
    return export("kv", run / "final_model.pt", tmp_path_factory.mktemp("exported") / "hf_kv")


# -----------------------------------------------------------------------------
# The folder


def test_the_folder_of_a_run(run, folder):
    assert {path.name for path in folder.iterdir()} == FILES | TOKENIZER_FILES
    assert (folder / "modeling_qkv.py").read_bytes() == (ROOT / "modeling_qkv.py").read_bytes()
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # whoever may read one file may read all

    model = AutoModelForCausalLM.from_pretrained(folder, **TRUST)
    original = script_of("kv").load_model(run / "final_model.pt")
    text = "Document 7 says that"
    tokenizer = AutoTokenizer.from_pretrained(folder, **TRUST)
    prompt = tokenizer(text, return_tensors="pt")
    continuation = model.generate(**prompt, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert torch.equal(continuation, original.generate(prompt.input_ids, 9, temperature=0))
    assert not model.training and model.dtype == torch.float32

    defaults = model.generation_config
    assert [defaults.bos_token_id, defaults.eos_token_id, defaults.pad_token_id] == [256] * 3
    assert AutoConfig.from_pretrained(folder, **TRUST).variant == "kv"
    base = AutoModel.from_pretrained(folder, **TRUST)
    logits = base(prompt.input_ids).last_hidden_state @ original.wte.weight.T
    torch.testing.assert_close(logits, original(prompt.input_ids)[0])


@pytest.mark.parametrize("alias", VARIANTS)
def test_every_variant_computes_the_same_there_and_back_again(alias, tmp_path):
    original = save(alias, tmp_path / "a.pt")
    folder = export(alias, tmp_path / "a.pt", tmp_path / "hf", "--tokenizer", "none")
    exported = AutoModelForCausalLM.from_pretrained(folder, **TRUST)
    assert type(exported) is not QKVForCausalLM  # but the class in the folder's own file
    input_ids = tokens(2, 30)
    torch.testing.assert_close(exported(input_ids).logits, original(input_ids)[0], atol=1e-4, rtol=1e-4)
    assert {path.name for path in folder.iterdir()} == FILES

    # Saved again, the folder is as complete as before.
    exported.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", **TRUST)
    torch.testing.assert_close(again.state_dict(), exported.state_dict(), atol=0, rtol=0)
    assert torch.equal(greedy(again, input_ids), greedy(exported, input_ids))

    # Back: a checkpoint without a run, which can be exported too.
    export_hf.main(["--to_checkpoint", str(tmp_path / "again"), "--output_dir", str(tmp_path / "back")])
    (path,) = (tmp_path / "back").iterdir()
    model, contents = script_of(alias).load_model(path), torch.load(path)
    torch.testing.assert_close(model.state_dict(), original.state_dict(), atol=0, rtol=0)
    assert model.config == original.config
    assert contents.keys() == {"variant", "model_config", "model_state_dict", "folder_files"}
    assert ("n_kv_groups" in contents["model_config"]) == (VARIANTS[alias]["groups"] is not None)
    export(alias, path, tmp_path / "hf_again", "--tokenizer", "none")
    weights = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "hf_again/model.safetensors").read_bytes() == weights


def test_text_generation_pipelines(folder):
    generate = pipeline("text-generation", model=str(folder), **TRUST)
    prompts = ["Document", "Document 7 says that", "A"]
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = [texts[0]["generated_text"] for texts in generate(prompts, batch_size=3, **options)]
    assert together == alone
    assert all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))
    # The pipeline asks for 256 tokens where nobody says how many; the model ends at its last position.
    assert generate("Document")[0]["generated_text"].startswith("Document")


def test_a_released_checkpoint(tmp_path):
    model = save("qgqa", tmp_path / "ours.pt")
    weights = {f"module.{name}": weight for name, weight in model.state_dict().items()}
    weights |= {f"module.h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    save("qgqa", tmp_path / "released.pt", variant=None, model_state_dict=weights, optimizer_state_dict={})
    folder = export("qgqa", tmp_path / "released.pt", tmp_path / "hf", "--tokenizer", "bytes")
    exported = AutoModelForCausalLM.from_pretrained(folder, **TRUST)
    input_ids = tokens(2, 30)
    torch.testing.assert_close(exported(input_ids).logits, model(input_ids)[0], atol=1e-4, rtol=1e-4)
    assert exported.config.n_kv_groups == 2


# -----------------------------------------------------------------------------
# Tokenizer


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """A .tiktoken file of 256 bytes and some merges."""
    pieces = [bytes([value]) for value in range(256)]
    pieces += [b"th", b" th", b" the", b"he", b"in", b"  ", b"   ", b"\n\n"]
    pieces += [b"ab", b"bc", b"abc", b"aa", b"aaa"]
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizers(ranks, tmp_path_factory):
    """Pairs of what dataset_download.py encodes with and what AutoTokenizer loads, by name."""
    pairs = {}
    for name in ("bytes", str(ranks), str(GPT2_RANKS)):
        if name != str(GPT2_RANKS) or GPT2_RANKS.exists():
            tokenizer = load_tokenizer(name)
            folder = tmp_path_factory.mktemp("tokenizer")
            export_hf.fast_tokenizer(tokenizer, tokenizer.eos_id + 2, 64).save_pretrained(folder)
            pairs[Path(name).stem] = tokenizer, AutoTokenizer.from_pretrained(folder)
    return pairs


texts = st.text() | st.text("abch th\n\t \u3000\u00a0'sl1<|endoftext|>.\u00e9\u4e2d\U0001f600")


@pytest.mark.parametrize("name", ["bytes", "small", "gpt2"])
@given(text=texts)
def test_the_tokenizer_encodes_as_the_training_data_were(tokenizers, name, text):
    if name not in tokenizers:
        pytest.skip("needs the GPT-2 ranks")
    ours, theirs = tokenizers[name]
    ids = ours.encode([text])[0].tolist()
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == text


def test_the_end_of_text_token(tokenizers):
    for ours, theirs in tokenizers.values():
        assert len(theirs) == ours.eos_id + 2
        assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id] == [ours.eos_id] * 2 + [ours.eos_id + 1]
        assert theirs("a" + theirs.eos_token).input_ids == [*theirs("a").input_ids, ours.eos_id]
        # What GPT-2 calls it is letters, as in the training data, and so are its own letters if one asks for that.
        assert theirs("<|endoftext|>").input_ids == ours.encode(["<|endoftext|>"])[0].tolist()
        letters = theirs(theirs.eos_token, split_special_tokens=True).input_ids
        assert letters == ours.encode([theirs.eos_token])[0].tolist()
        assert theirs.decode([97, ours.eos_id], skip_special_tokens=True) == theirs.decode([97])
        assert theirs.model_max_length == 64


def test_special_tokens_that_a_user_adds_are_one_id_each(tokenizers):
    for ours, theirs in tokenizers.values():
        theirs = copy.deepcopy(theirs)
        theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        theirs.add_tokens(["<q>"])
        found = theirs("<|im_start|>a<q><|im_end|>").input_ids
        assert found == [ours.eos_id + 2, *ours.encode(["a"])[0].tolist(), ours.eos_id + 4, ours.eos_id + 3]


def test_a_vocabulary_without_a_spare_id_has_none_for_padding(run, folder, checkpoints, tmp_path, capsys):
    """Of 257 ids, a byte tokenizer needs all; of 260 not."""
    assert AutoTokenizer.from_pretrained(folder, **TRUST).pad_token_id == 256
    assert "no id to spare for padding" in (folder / "README.md").read_text(encoding="utf-8")
    export("kv", run / "final_model.pt", tmp_path / "without", "--tokenizer", "bytes")
    assert "no token id is left for padding" in capsys.readouterr().out
    export("kv", checkpoints / "kv.pt", tmp_path / "with", "--tokenizer", "bytes")
    assert "padding" not in capsys.readouterr().out
    assert AutoConfig.from_pretrained(tmp_path / "with", **TRUST).pad_token_id == 257


# -----------------------------------------------------------------------------
# Fine-tuning


@pytest.fixture(scope="module")
def spacious(checkpoints, tmp_path_factory):
    """A folder whose vocabulary has ids to spare."""
    return export("kv", checkpoints / "kv.pt", tmp_path_factory.mktemp("spacious") / "hf", "--tokenizer", "bytes")


def loss_of_single_texts(model, texts):
    """The mean over all predicted tokens, text by text: nothing is padded."""
    nats = [model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in texts]
    return sum(nats) / sum(ids.shape[1] - 1 for ids in texts)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_a_step_of_the_trainer_has_the_loss_of_single_texts_and_of_gpt2(batch_size, tmp_path):
    """Whatever the batch size; with its end of text as a label, and from transformers' GPT-2 of the same weights."""
    original = save("kqv", tmp_path / "a.pt")
    folder = export("kqv", tmp_path / "a.pt", tmp_path / "hf", "--tokenizer", "bytes")
    model = AutoModelForCausalLM.from_pretrained(folder, **TRUST)
    tokenizer = AutoTokenizer.from_pretrained(folder, **TRUST)
    rows = [tokenizer("a text of bytes"[: 2 * n] + tokenizer.eos_token) for n in range(1, 7)]
    texts = [torch.tensor([row.input_ids]) for row in rows]
    assert all(text[0, -1] == tokenizer.eos_token_id for text in texts)

    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator(rows)
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 6
    settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 6 // batch_size}
    settings |= {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True}
    settings = TrainingArguments(str(tmp_path), disable_tqdm=True, **settings)
    expected = loss_of_single_texts(model.eval(), texts)
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-3)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(expected, abs=1e-3)
    assert expected == pytest.approx(loss_of_single_texts(gpt2_of(original), texts), abs=1e-4)


def test_texts_in_a_row_without_padding_have_the_loss_of_single_texts(spacious):
    """A row of the stock collator, in evaluation mode and with the default of use_cache."""
    model = AutoModelForCausalLM.from_pretrained(spacious, **TRUST)
    tokenizer = AutoTokenizer.from_pretrained(spacious, **TRUST)
    rows = [{"input_ids": tokenizer(text + tokenizer.eos_token).input_ids} for text in ("one", "and two", "3")]
    batch = DataCollatorWithFlattening()(rows)
    assert batch["input_ids"].shape[0] == 1
    expected = loss_of_single_texts(model, [torch.tensor([row["input_ids"]]) for row in rows])
    assert model(**batch).loss.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_reads_the_last_token_of_the_text(side, spacious):
    """As TRL's RewardTrainer builds on: one number a row, whatever its padding."""
    model = AutoModelForSequenceClassification.from_pretrained(spacious, num_labels=1, **TRUST)
    tokenizer = AutoTokenizer.from_pretrained(spacious, padding_side=side, **TRUST)
    texts = ["good" + tokenizer.eos_token, "not so good" + tokenizer.eos_token]
    scores = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = torch.cat([model(tokenizer(text, return_tensors="pt").input_ids).logits for text in texts])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-4)
    hidden = model.transformer(tokenizer(texts[0], return_tensors="pt").input_ids).last_hidden_state
    torch.testing.assert_close(alone[0], model.score(hidden[0, -1]))
    loss = -torch.nn.functional.logsigmoid(scores[0] - scores[1]).mean()
    loss.backward()
    assert model.score.weight.grad.any() and model.transformer.wte.weight.grad.any()


def test_the_default_tokenizer_is_the_one_beside_the_data(ranks, data_dir, tmp_path, capsys):
    save("kv", tmp_path / "a.pt", train_config={"train_data": str(data_dir / "train")})
    folder = export("kv", tmp_path / "a.pt", tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 256
    assert "tokenizer: bytes" in capsys.readouterr().out

    # Without the data a checkpoint may still say what it was, and takes no other.
    save("kv", tmp_path / "b.pt", {"vocab_size": 300}, tokenizer="bytes")
    folder = export("kv", tmp_path / "b.pt", tmp_path / "hf_b")
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 256
    given = ["--model", "kv", "--checkpoint", tmp_path / "b.pt", "--output_dir", tmp_path / "hf_c"]
    assert "was trained with another, bytes" in refused(capsys, *given, "--tokenizer", ranks)


# -----------------------------------------------------------------------------
# Model card


def card_of(folder):
    """The rows of the card's table, and its whole text."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    return dict(line.split(" | ", 1) for line in lines if line), text


def test_the_card_of_a_run(run, folder, data_dir):
    rows, text = card_of(folder)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    final = next(record for record in map(json.loads, lines) if record["kind"] == "final")
    for row, name in [
        ("perplexity over all positions", "perplexity"),
        ("perplexity over text only", "text_perplexity"),
        ("bits per byte of text", "bits_per_byte"),
    ]:
        assert float(rows[row]) == pytest.approx(final[name], rel=1e-3)
    assert rows["variant"] == "Q–K=V (`kv`): the key is the value"
    assert rows["parameters"] == f"{AutoModelForCausalLM.from_pretrained(folder, **TRUST).num_parameters():,}"
    assert rows["KV cache"] == "K alone: 128 bytes a token in bf16; QKV of this shape: 256"
    assert rows["trained"].startswith("2,048 tokens") and "8 steps" in rows["trained"]
    assert rows["tokenizer"] == "bytes"
    assert rows["data"].startswith("local files, texts")
    assert "MIT" in rows["licence"] and ModelCard(text).data.license == "mit"
    assert "learning_rate: 0.01" in text
    assert str(data_dir.parent) not in text  # where things stood is nobody's business


def test_the_card_says_what_is_not_known(tmp_path):
    save("qgqa", tmp_path / "a.pt", step=None, tokens_seen=None, train_config=None)
    rows, text = card_of(export("qgqa", tmp_path / "a.pt", tmp_path / "hf", "--tokenizer", "none"))
    unknown = {name for name, value in rows.items() if value == "not known"}
    assert unknown >= {"data", "trained", "perplexity over all positions", "bits per byte of text", "licence"}
    assert rows["tokenizer"] == "none in this folder" and "Settings of the run" not in text
    assert "AutoModelForCausalLM" in text and "pipeline(" not in text  # which needs a tokenizer
    assert rows["variant"].startswith("Q-GQA-2")


def test_the_card_of_other_weights_than_the_run_s(run, tmp_path):
    """Of another step, without the run's figures; begun elsewhere, under a licence that is not known."""
    shutil.copytree(run, tmp_path / "run")
    save("kv", tmp_path / "run/other.pt", step=5, train_config={"seed": 42}, init_from="elsewhere.pt")
    rows, text = card_of(export("kv", tmp_path / "run/other.pt", tmp_path / "hf", "--tokenizer", "none"))
    assert rows["perplexity over text only"] == "not known"
    assert rows["licence"] == "not known" and "license: unknown" in text
    assert "begun from the weights of elsewhere.pt" in rows["trained"]


def test_the_card_of_a_converted_checkpoint(tmp_path):
    origin = {"source": "/somewhere/outputs_kqv/final_model.pt", "variant": "KQV", "method": "joint_svd"}
    origin |= {"trained_for_tokens": 12345}
    save("kv", tmp_path / "a.pt", step=0, tokens_seen=None, train_config=None, converted_from=origin)
    record = {"kind": "val", "step": 0, "perplexity": 99.0}  # of the run that it came out of
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    rows, text = card_of(export("kv", tmp_path / "a.pt", tmp_path / "hf", "--tokenizer", "none"))
    assert all(known in rows["trained"] for known in ("joint_svd", "final_model.pt", "KQV", "12,345"))
    assert rows["perplexity over all positions"] == "not known"
    assert "somewhere" not in text


# -----------------------------------------------------------------------------
# The way back


def test_a_fine_tuned_model_comes_back(folder, data_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **TRUST)
    tokenizer = AutoTokenizer.from_pretrained(folder, **TRUST)
    batch = tokenizer(SENTENCES[:4], return_tensors="pt", padding=True, truncation=True, max_length=32)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1

    # By default the checkpoint stands in the folder itself.
    export_hf.main(["--to_checkpoint", str(tmp_path / "tuned"), "--model", "kv"])
    script = script_of("kv")
    back = script.load_model(tmp_path / "tuned/final_model.pt")
    recorded = torch.load(tmp_path / "tuned/final_model.pt", weights_only=True)["tokenizer"]
    assert recorded == script.TokenDataset(data_dir / "validation", 32).tokenizer
    expected = {name: weight.float() for name, weight in model.transformer.state_dict().items()}
    torch.testing.assert_close(back.state_dict(), expected, atol=0, rtol=0)
    results = script.evaluate(back, script.get_dataloader(data_dir / "validation", 4, 32, "packed"))
    assert 1 < results["text_perplexity"] < 300


def test_added_tokens_and_a_chat_template_come_back(spacious, data_dir, tmp_path):
    """And the way of generating; from there into another export, under whatever name of the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(spacious, **TRUST)
    tokenizer = AutoTokenizer.from_pretrained(spacious, **TRUST)
    tokenizer.add_tokens(["<q>", "</q>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    model.resize_token_embeddings(300)
    model.generation_config.eos_token_id = [256, 260]
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    export_hf.main(["--to_checkpoint", str(tmp_path / "tuned"), "--output_dir", str(tmp_path / "back")])
    path = tmp_path / "back/final_model.pt"
    assert torch.load(path)["tokenizer"] == script_of("kv").TokenDataset(data_dir / "train", 32).tokenizer

    for number, options in enumerate(([], ["--tokenizer", "bytes"])):
        folder = export("kv", path, tmp_path / f"again{number}", *options)
        again = AutoTokenizer.from_pretrained(folder, **TRUST)
        text = "<q>a</q><|im_end|><|endoftext|>"
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again(text).input_ids[:4] == [258, 97, 259, 260]
        chat = [{"role": "user", "content": "a"}]
        assert again.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)
        loaded = AutoModelForCausalLM.from_pretrained(folder, **TRUST)
        assert loaded.generation_config.eos_token_id == [256, 260] and loaded.config.vocab_size == 300
    folder = export("kv", path, tmp_path / "bare", "--tokenizer", "none")
    assert not TOKENIZER_FILES & {file.name for file in folder.iterdir()}


def test_a_tokenizer_of_another_vocabulary_is_not_taken_for_the_recorded_one(spacious, ranks, tmp_path):
    other = shutil.copytree(spacious, tmp_path / "other")
    export_hf.fast_tokenizer(load_tokenizer(str(ranks)), 300, 64).save_pretrained(other)
    export_hf.main(["--to_checkpoint", str(other), "--output_dir", str(tmp_path / "back")])
    recorded = torch.load(tmp_path / "back/final_model.pt")["tokenizer"]
    assert recorded["sha256"] == load_tokenizer(str(ranks)).sha256


LAST = "transformer.ln_f.bias"


def spoil(folder, **changes):
    """Change entries of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def with_weights(folder, change):
    """Let `change` alter the dict of a folder's weights."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "not a folder of transformers"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a folder of transformers"),
        (lambda folder: spoil(folder, model_type="gpt2"), "model_type is gpt2, expected qkv"),
        (lambda folder: spoil(folder, tie_word_embeddings=False), "untied embeddings"),
        (lambda folder: spoil(folder, variant="qkv"), "variant: expected one of"),
        (lambda folder: spoil(folder, n_inner=48, intermediate_size=48), "do not fit, mismatched keys"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge_and_unload"),
        (truncate, "not a whole model"),
        (lambda folder: with_weights(folder, lambda w: w[LAST].fill_(torch.nan)), f"{LAST} holds values"),
        (lambda folder: with_weights(folder, lambda w: w.pop(LAST)), f"do not fit, missing keys: {LAST}"),
        (lambda folder: with_weights(folder, lambda w: w.update(a=torch.ones(2))), "unexpected keys: a"),
    ],
)
def test_a_folder_that_is_not_the_whole_model_is_refused(damage, words, folder, tmp_path, capsys):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    damage(damaged)
    output = tmp_path / "back"
    assert words in refused(capsys, "--to_checkpoint", damaged, "--output_dir", output)
    assert not output.exists()


def test_the_way_back_overwrites_nothing_and_checks_the_alias(folder, tmp_path, capsys):
    (tmp_path / "final_model.pt").write_text("precious")
    error = refused(capsys, "--to_checkpoint", folder, "--output_dir", tmp_path)
    assert "exists already" in error
    assert (tmp_path / "final_model.pt").read_text() == "precious"
    error = refused(capsys, "--to_checkpoint", folder, "--model", "gqa", "--output_dir", tmp_path / "new")
    assert "holds a model of --model kv" in error


# -----------------------------------------------------------------------------
# What is refused, and what is left behind


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of checkpoints, good and bad."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save("kv", folder / "kv.pt")
    model, _ = build("kv", **SHAPE)
    weights = model.state_dict()
    save("kv", folder / "nan.pt", model_state_dict=weights | {"ln_f.bias": torch.full((32,), float("nan"))})
    save("kv", folder / "part.pt", model_state_dict={"wte.weight": weights["wte.weight"]})
    (folder / "half.pt").write_bytes((folder / "kv.pt").read_bytes()[:5000])
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "kqx", "--checkpoint", "kv.pt"], "--model kqx: expected one of kqv, qk, kv, k, gqa"),
        (["--model", "gqa", "--checkpoint", "kv.pt"], "is a checkpoint of --model kv"),
        (["--model", "kv", "--checkpoint", "none.pt"], "none.pt"),
        (["--model", "kv", "--checkpoint", "half.pt"], "half.pt"),
        (["--model", "kv", "--checkpoint", "part.pt"], "part.pt"),
        (["--model", "kv", "--checkpoint", "nan.pt"], "nan.pt: ln_f.bias holds values that are not finite"),
        (["--model", "kv", "--checkpoint", "kv.pt"], "pass --tokenizer"),
        (["--model", "kv", "--checkpoint", "kv.pt", "--tokenizer", "words"], "--tokenizer words"),
    ],
)
def test_errors_take_one_line_and_leave_nothing(arguments, words, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(checkpoints)
    assert words in refused(capsys, *arguments, "--output_dir", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", ["", "--model kv --checkpoint a", "--to_checkpoint a --tokenizer gpt2"])
def test_arguments_that_do_not_go_together_are_refused(arguments, capsys):
    assert "--to_checkpoint" in refused(capsys, *arguments.split())


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_exists_is_not_overwritten(kind, checkpoints, tmp_path, capsys):
    output = tmp_path / "hf"
    precious = output / "precious" if kind == "folder" else output
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("keep me")
    arguments = ["--model", "kv", "--checkpoint", checkpoints / "kv.pt", "--tokenizer", "none"]
    assert "exists already" in refused(capsys, *arguments, "--output_dir", output)
    assert precious.read_text() == "keep me"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("target", ["disk", "not_there_yet"])
def test_the_folder_may_be_a_link(target, checkpoints, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "hf").symlink_to(tmp_path / target)
    folder = export("kv", checkpoints / "kv.pt", tmp_path / "hf", "--tokenizer", "none")
    assert folder.is_symlink() and {path.name for path in (tmp_path / target).iterdir()} == FILES


@pytest.mark.parametrize("output", ["> /dev/full", ">&-", "| true"])
def test_an_export_whose_report_nobody_reads_is_complete(output, checkpoints, tmp_path):
    command = [sys.executable, ROOT / "export_hf.py", "--model", "kv", "--checkpoint", checkpoints / "kv.pt"]
    command += ["--tokenizer", "bytes", "--output_dir", tmp_path / "hf"]
    line = f"set -o pipefail; {shlex.join(map(str, command))} {output}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr
    assert {path.name for path in (tmp_path / "hf").iterdir()} == FILES | TOKENIZER_FILES


def full_disk(*arguments, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", [QKVForCausalLM, PreTrainedTokenizerFast])
def test_a_full_disk_leaves_no_folder(kind, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kind, "save_pretrained", full_disk)
    arguments = ["--model", "kv", "--checkpoint", checkpoints / "kv.pt", "--tokenizer", "bytes"]
    error = refused(capsys, *arguments, "--output_dir", tmp_path / "hf")
    assert f"{tmp_path / 'hf'}: not written" in error and "No space left" in error
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_under_the_final_name(checkpoints, tmp_path):
    output = tmp_path / "hf"
    child = os.fork()
    if child == 0:  # killed when all files are written
        export_hf.same_logits = lambda *models: os.kill(os.getpid(), signal.SIGKILL)
        export("kv", checkpoints / "kv.pt", output, "--tokenizer", "none")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert not output.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("hf.tmp")
    export("kv", checkpoints / "kv.pt", output, "--tokenizer", "none")  # which nothing holds up


def test_an_export_that_computes_something_else_is_refused(checkpoints, tmp_path, capsys, monkeypatch):
    original = QKVForCausalLM.from_pretrained

    def scrambled(folder, **options):
        exported = original(folder, **options)
        exported.transformer.h[1].attn.c_q.weight.data += 0.1
        return exported

    monkeypatch.setattr(QKVForCausalLM, "from_pretrained", scrambled)
    arguments = ["--model", "kv", "--checkpoint", checkpoints / "kv.pt", "--tokenizer", "none"]
    error = refused(capsys, *arguments, "--output_dir", tmp_path / "hf")
    assert "does not compute what the training script does" in error
    assert list(tmp_path.iterdir()) == []


# -----------------------------------------------------------------------------
# Other environments


def site_packages(environment):
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_oldest_transformers_that_requirements_admit(folder, tmp_path):
    """A virtual environment with the oldest version, and this one's packages for the rest."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (bounds,) = [line for line in lines if line.startswith("transformers")]
    oldest = bounds.partition(">=")[2].partition(",")[0]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", f"transformers=={oldest}"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"transformers {oldest} cannot be installed here: {installed.stderr[-200:]}")
    others = Path(transformers.__file__).parents[1]  # behind its own, so that its own goes first
    (site_packages(tmp_path / "venv") / "others.pth").write_text(f"{others}\n")

    files = [f"tests/{name}" for name in ("test_export_model.py", "test_export.py")]
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", f"--basetemp={tmp_path / 'tests'}"]
    command = [python, "-m", "pytest", *files, *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]

    # A folder that the newest wrote is read by the oldest.
    program = "from transformers import pipeline; import sys, transformers; print(transformers.__version__)"
    program += "; print(pipeline('text-generation', sys.argv[1], trust_remote_code=True)('Document'))"
    options = {"cwd": tmp_path, "env": os.environ | {"HF_HOME": str(tmp_path / "home")}}
    result = subprocess.run([python, "-c", program, str(folder)], capture_output=True, text=True, **options)
    assert result.stdout.startswith(oldest) and "generated_text" in result.stdout, result.stderr
