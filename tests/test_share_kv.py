"""share_kv.py: exactness in every family, the cache beside the stock cache, the fit, refusals, resume, the output."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

import share_kv
from share_kv import SharedKVCache

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=None),
    "qwen2": {},
    "qwen3": {},
    "smollm3": dict(no_rope_layers=[1, 1, 0], pad_token_id=0, layer_types=["full_attention"] * 3),
    "gemma3_text": dict(layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=16),
}
SIZES = dict(
    vocab_size=256, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def make_model(family, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | settings))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # biases and norms are 0 and 1 in a new model: here they must matter
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 2 / p.shape[-1] ** 0.5) + ("norm" in name))
    return model


def layers_of(model):
    return [model.get_decoder().layers[i].self_attn for i in share_kv.shareable(model.config)]


def make_shared(family, **settings):
    model = make_model(family, **settings)
    for attention in layers_of(model):
        attention.v_proj = copy.deepcopy(attention.k_proj)
    return model


def rows(n, length=64, seed=1):
    return torch.randint(3, 256, (n, length), generator=torch.Generator().manual_seed(seed))


def cache_argument(model, cache):
    import inspect

    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    return {name: cache}


def generated(model, cache=None, **settings):
    if "inputs" not in settings:
        settings["inputs"] = rows(2, 20)
    if cache is not None:
        settings |= cache_argument(model, cache)
    return model.generate(max_new_tokens=24, min_new_tokens=24, do_sample=settings.pop("do_sample", False), **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_linear_in_keys_are_shared_without_loss(family):
    """Where v = L k in each head, s carries both: the converted model gives the original's logits."""
    model = make_model(family)
    for attention in layers_of(model):
        k, v = attention.k_proj, attention.v_proj
        with torch.no_grad():
            for head in range(2):
                part = slice(16 * head, 16 * head + 16)
                L = torch.randn(16, 16) / 4 + torch.eye(16)
                for x, y in zip(k.parameters(), v.parameters(), strict=True):
                    y[part] = L @ x[part]
    text = rows(4)
    wanted = model(text).logits.detach()
    C, G = share_kv.second_moments(model, text)
    for i, attention in zip(share_kv.shareable(model.config), layers_of(model), strict=True):
        share_kv.share_attention(attention, [share_kv.solve(c, g) for c, g in zip(C[i], G[i], strict=True)])
    assert all(share_kv.is_shared(attention) for attention in layers_of(model))
    torch.testing.assert_close(model(text).logits, wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_fit_brings_every_family_nearer(family, tmp_path):
    """Norms, biases, layers without rotation and windows included; the original is left as it was."""
    model, text = make_model(family).requires_grad_(False), rows(16)
    wanted, shared = model(text).logits, share_kv.shareable(model.config)
    C, G = share_kv.second_moments(model, text)
    student = share_kv.make_student(model)
    for i in shared:
        solutions = [share_kv.solve(c, g) for c, g in zip(C[i], G[i], strict=True)]
        share_kv.share_attention(student.get_decoder().layers[i].self_attn, solutions)
    closed_form = (student(text).logits - wanted).pow(2).mean().item()
    share_kv.fit_layers(model, student, text, shared, 3, tmp_path)
    assert (student(text).logits - wanted).pow(2).mean() < 0.9 * closed_form
    assert torch.equal(model(text).logits, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_gives_the_tokens_of_the_stock_cache(family):
    model = make_shared(family)
    padded, mask = rows(3, 20), torch.ones(3, 20, dtype=torch.long)
    padded[1, :7], mask[1, :7] = 0, 0
    padded[2, :3], mask[2, :3] = 0, 0
    for settings in (
        {},
        dict(inputs=padded, attention_mask=mask),
        dict(inputs=padded, attention_mask=mask, num_beams=3),
    ):
        wanted = generated(model, **settings)
        assert torch.equal(generated(model, SharedKVCache(model), **settings), wanted)


def test_sampling_and_assisted_decoding():
    model, assistant = make_shared("llama"), make_shared("llama", num_hidden_layers=1)
    for settings in (dict(do_sample=True), dict(inputs=rows(1, 20), assistant_model=assistant)):
        torch.manual_seed(3)
        wanted = generated(model, **settings)
        torch.manual_seed(3)
        assert torch.equal(generated(model, SharedKVCache(model), **settings), wanted)


@torch.no_grad()
def logits(model, ids, cache):
    return model(ids, use_cache=True, **cache_argument(model, cache)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_crop_and_batches(family):
    """The same logits as the stock cache after chunks, a crop, repeated and selected rows, a reset and a copy."""
    model = make_shared(family, sliding_window=1024) if family == "gemma3_text" else make_shared(family)
    ids, caches = rows(2, 40), (SharedKVCache(model), DynamicCache(config=model.config))
    results = []
    for cache in caches:
        logits(model, ids[:, :10], cache)
        logits(model, ids[:, 10:20], cache)
        cache.crop(-5)
        out = [logits(model, ids[:, 15:16], cache)]
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        out.append(logits(model, ids[:, 16:20], cache))
        other = copy.deepcopy(cache)
        out.append(logits(model, ids[:, 20:21], cache))
        out.append(logits(model, ids[:, 30:31], other))
        cache.reset()
        out += [logits(model, ids[:, :5], cache), logits(model, ids[:, 5:6], cache)]
        results.append(out)
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_two_caches_and_other_passes_in_between():
    model, ids = make_shared("qwen3"), rows(2, 30)
    one, two = SharedKVCache(model), SharedKVCache(model)
    for i, part in enumerate(ids.split(10, 1)):
        with torch.inference_mode(i == 0):
            first = logits(model, part[:1], one)
        model(rows(3, 17))
        second = logits(model, part[1:], two)
    torch.testing.assert_close(torch.cat([first, second]), model(ids).logits[:, 20:], atol=1e-4, rtol=1e-4)


def test_half_of_the_bytes_exactly():
    model, ids = make_shared("llama"), rows(2, 50)
    shared, stock = SharedKVCache(model), DynamicCache(config=model.config)
    for cache in (shared, stock):
        logits(model, ids, cache)
        logits(model, ids[:, :1], cache)
    assert 2 * shared.nbytes == sum(x.nbytes for layer in stock.layers for x in (layer.keys, layer.values))


def test_layers_that_are_not_shared_keep_both():
    model = make_shared("llama")
    torch.nn.init.normal_(layers_of(model)[0].v_proj.weight)
    cache = SharedKVCache(model)
    assert torch.equal(generated(model, cache), generated(model))
    kept = cache.get_seq_length() * 2 * 2 * 16 * 4  # batch, heads, width, bytes
    assert cache.nbytes == (2 + 1 + 1) * kept
    different, quantised = make_model("llama"), make_model("llama")
    for attention in layers_of(quantised):
        for name in ("k_proj", "v_proj"):
            packed = torch.nn.Module()
            packed.register_buffer("qweight", torch.randint(9, (4, 4)))
            setattr(attention, name, packed)
    for model in (different, quantised):
        with pytest.raises(ValueError, match="share_kv.py"):
            SharedKVCache(model)


# -- The command, on a small trained model ----------------------------------------------------------------------------


def make_text(n, seed):
    """Sentences that repeat their own made-up names, so that predicting them takes attention."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(n):
        name, place = ("".join(chr(97 + c) for c in torch.randint(0, 8, (4,), generator=generator)) for _ in "12")
        lines.append(f"{name} is in {place}, in {place} is {name}.\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama of bytes, trained for some seconds, its tokenizer, and text/ to convert it on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    root = tmp_path_factory.mktemp("trained")
    alphabet = {c: i + 3 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet | {"<pad>": 0, "<s>": 1, "</s>": 2}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    torch.manual_seed(0)
    settings = dict(vocab_size=259, initializer_range=0.1, num_key_value_heads=1, head_dim=8)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES | settings))
    ids = torch.tensor(tokenizer(make_text(4000, 0))["input_ids"])
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    for i in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, i / 20) * (1 - i / 300)
        batch = rows[torch.randint(len(rows), (16,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.to(torch.bfloat16).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text(make_text(800, 1))
    (root / "text" / "b.jsonl").write_text("".join(json.dumps({"text": make_text(40, n)}) + "\n" for n in (2, 3, 4)))
    (root / "held_out.txt").write_text(make_text(60, 5))
    return root


def convert(folder, out, *more, text="text", model="model"):
    argv = ["--model", folder / model, "--text", folder / text, "--output_dir", out, "--tokens", 4096, *more]
    share_kv.main([str(x) for x in argv])
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto")


def perplexities(capsys):
    found = re.findall(r"^perplexity, ([\w ]+): ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    return {stage: float(value) for stage, value in found}


def test_each_stage_brings_the_model_back(folder, tmp_path, capsys):
    """The fit, and training alone, each make up for most of what the closed form costs."""
    evaluate = ["--eval_text", folder / "held_out.txt"]
    convert(folder, tmp_path / "trained", "--fit_epochs", 0, "--train_tokens", 16384, *evaluate)
    trained = perplexities(capsys)
    model = convert(folder, tmp_path / "out", *evaluate)
    at = perplexities(capsys)
    assert list(at) == ["original", "closed form", "fit", "as saved"]
    price = at["closed form"] - at["original"]
    assert at["fit"] - at["original"] < price / 2 > trained["training"] - at["original"] and price > 0.02
    assert at["as saved"] == pytest.approx(at["fit"], rel=0.01)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16
    for layer in model.model.layers:
        assert torch.equal(layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight)
    original = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight, original.model.layers[1].mlp.up_proj.weight)
    assert model.generation_config.temperature == 0.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{at['fit']:.3f}" in card and f"{3 * 8 * 2:,} bytes" in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "trained"]


def test_dial_leaves_the_other_layers_alone(folder, tmp_path):
    original = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    for share, number in ((0.5, 3), (0.66, 2), (0.83, 1)):
        model = convert(folder, tmp_path / str(share), "--cache", share, "--fit_epochs", 0)
        pairs = zip(layers_of(model), layers_of(original), strict=True)
        same = [all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)) for a, b in pairs]
        assert same == [not share_kv.is_shared(attention) for attention in layers_of(model)] and sum(same) == 3 - number
        cache = SharedKVCache(model)
        generated(model, cache)
        assert cache.nbytes / (2 * 3 * 2 * 8 * 2 * cache.get_seq_length()) == pytest.approx(share, abs=0.01)


def test_interrupted_conversion_goes_on_from_the_last_layer(folder, tmp_path, monkeypatch, capsys):
    whole = convert(folder, tmp_path / "whole", "--train_tokens", 2048)
    real, saved = share_kv.save, []

    def dies(state, path):
        if path.name == "layer002.pt":
            raise KeyboardInterrupt
        saved.append(path.name)
        real(state, path)

    monkeypatch.setattr(share_kv, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", "--train_tokens", 2048)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(share_kv, "save", lambda state, path: (saved.append(path.name), real(state, path)))
    with pytest.raises(SystemExit, match="another conversion"):
        convert(folder, tmp_path / "out", "--fit_epochs", 1)
    resumed = convert(folder, tmp_path / "out", "--train_tokens", 2048)
    assert [name for name in saved if name.startswith("layer")] == ["layer000.pt", "layer001.pt", "layer002.pt"]
    for x, y in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=0)


def test_interrupted_training_goes_on(tmp_path, monkeypatch):
    """Training that was stopped after a few steps ends in the weights of one that was not."""
    original, text = make_shared("llama").requires_grad_(False), rows(8)
    noisy = copy.deepcopy(original)
    for attention in layers_of(noisy):
        attention.k_proj.weight.mul_(1.1)
    whole, part = share_kv.make_student(noisy), share_kv.make_student(noisy)
    share_kv.train(original, whole, text, tmp_path / "whole.pt")
    real = share_kv.step

    def dies(optimizer, progress):
        if progress > 0.5:
            raise KeyboardInterrupt
        real(optimizer, progress)

    monkeypatch.setattr(share_kv, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        share_kv.train(original, part, text, tmp_path / "part.pt", every=0)
    assert torch.load(tmp_path / "part.pt")["step"] == 4
    monkeypatch.setattr(share_kv, "step", real)
    resumed = share_kv.make_student(noisy)
    share_kv.train(original, resumed, text, tmp_path / "part.pt")
    for x, y in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(x, y)


def test_rows_begin_as_the_tokenizer_begins_a_text(folder):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    plain = share_kv.read_rows([folder / "text"], tokenizer, 8, 64)
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    begun = share_kv.read_rows([folder / "text"], tokenizer, 8, 64)
    assert plain.shape == begun.shape == (8, 64) and not (plain == 1).any()
    assert (begun[:, 0] == 1).all() and not (begun[:, 1:] == 1).any()


def test_output_loads_from_another_directory(folder, tmp_path):
    """In a process that knows nothing of this repository, transformers takes the cache from the folder itself."""
    convert(folder, tmp_path / "out", "--fit_epochs", 0)
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer(["abcd is in", "hgfe is in bcda, in bc"], return_tensors="pt", padding=True, padding_side="left")
settings = dict(max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
stock = model.generate(**inputs, **settings)
small = model.generate(**inputs, **settings, custom_generate=sys.argv[1], trust_remote_code=True)
assert torch.equal(stock.sequences, small.sequences)
print(type(small.past_key_values).__name__)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or "transformers" in v}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, tmp_path / "out"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "SharedKVCache"


def test_what_cannot_be_converted_is_one_line(folder, tmp_path):
    def refused(*more, **where):
        with pytest.raises(SystemExit) as error:
            convert(folder, tmp_path / "out", *more, **where)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        return str(error.value)

    original = json.loads((folder / "model" / "config.json").read_text())

    def variant(name, **changes):
        new = folder / name
        new.mkdir()
        for path in (folder / "model").iterdir():
            os.link(path, new / path.name)
        (new / "config.json").unlink()
        (new / "config.json").write_text(json.dumps(original | changes))
        return name

    assert "phi3" in refused(model=variant("fused", model_type="phi3"))
    assert "quantised" in refused(model=variant("quantised", quantization_config={"quant_method": "gptq", "bits": 4}))
    assert "window" in refused(model=variant("windows", model_type="mistral", sliding_window=8))
    (folder / "binary.bin").write_bytes(b"\xff\xfe\x00")
    assert "binary.bin" in refused(text="binary.bin")
    assert "nowhere" in refused(text="nowhere")
    (folder / "rows.jsonl").write_text('{"content": "x"}\n')
    assert '"text"' in refused(text="rows.jsonl")
    assert "1,000,000" in refused("--tokens", 1_000_000).replace("999,936", "1,000,000")
    assert "--cache" in refused("--cache", 0.3)
    convert(folder, folder / "shared", "--fit_epochs", 0)
    assert "already" in refused(model="shared")
    assert "exists" in str(pytest.raises(SystemExit, convert, folder, folder / "shared").value)
