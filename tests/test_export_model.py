"""modeling_qkv.py against the training scripts: what each variant computes, caches, generates and trains.

Runs on the installed transformers and, in a slow test of test_export.py, on the oldest that requirements.txt
admits.
"""

import ast
import json
import sys
import warnings

import pytest
import torch
import transformers
from conftest import ROOT, VARIANTS, gpt2_of, script_of
from transformers import DynamicCache, GenerationConfig, QuantizedCache, StaticCache, cache_utils

from modeling_qkv import CACHE_NAME, QKVConfig, QKVForCausalLM

SHAPE = {"vocab_size": 61, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "dropout": 0.0}
END_OF_TEXT = 60


def build(alias, dtype=torch.float32, **changes):
    """A small model of a training script with large random weights, and the same model in transformers."""
    script = script_of(alias)
    groups = {"gqa": 2, "qgqa": 2, "mqa": 1, "qmqa": 1}.get(alias)
    shape = SHAPE | changes
    torch.manual_seed(1)
    model_config = script.ModelConfig(**shape, n_kv_groups=groups, initializer_range=0.2)
    model = getattr(script, VARIANTS[alias]["class"])(model_config).eval()
    for parameter in model.parameters():  # biases and LayerNorms too, which start at 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)

    config = QKVConfig(variant=alias, n_kv_groups=groups, **shape)
    exported = QKVForCausalLM(config)
    exported.transformer.load_state_dict(model.state_dict())
    return model.to(dtype), exported.to(dtype).eval()


def tokens(*shape, seed=0):
    return torch.randint(END_OF_TEXT, shape, generator=torch.Generator().manual_seed(seed))


def greedy(exported, prompt, new=12, **settings):
    """Prompt and continuation, [B, T + new]; nothing ends a text early, and no token is taken for padding."""
    settings = {"do_sample": False, "pad_token_id": END_OF_TEXT} | settings
    if prompt is not None:
        settings = {"attention_mask": torch.ones_like(prompt)} | settings
    return exported.generate(prompt, max_new_tokens=new, **settings)


def cache_of(output):
    return getattr(output, CACHE_NAME)


def tensors_of(cache):
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def test_it_imports_nothing_but_torch_and_transformers():
    tree = ast.parse((ROOT / "modeling_qkv.py").read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
    assert {"torch", "transformers"} <= imported
    assert imported - {"torch", "transformers"} <= set(sys.stdlib_module_names)


# -----------------------------------------------------------------------------
# Forward and backward


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("alias", VARIANTS)
def test_logits_loss_and_gradients_are_those_of_the_script(alias, attention):
    model, exported = build(alias)
    exported.set_attn_implementation(attention)
    input_ids = tokens(3, 20)
    labels = input_ids.masked_fill(torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.3, -100)

    torch.testing.assert_close(exported(input_ids).logits, model(input_ids)[0], atol=1e-4, rtol=1e-4)
    _, loss = model(input_ids, labels)
    output = exported(input_ids, labels=labels)
    torch.testing.assert_close(output.loss, loss)

    loss.backward()
    output.loss.backward()
    ours = {name: parameter.grad for name, parameter in exported.transformer.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_qkv_is_transformers_own_gpt2():
    model, exported = build("kqv")
    gpt2 = gpt2_of(model)
    input_ids = tokens(2, 16)
    torch.testing.assert_close(exported(input_ids).logits, gpt2(input_ids).logits, atol=1e-4, rtol=1e-4)
    several = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}
    for settings in ({}, {"num_beams": 3}, several):
        assert torch.equal(greedy(exported, input_ids, **settings), greedy(gpt2, input_ids, **settings))


@pytest.mark.parametrize("alias", VARIANTS)
def test_bf16(alias):
    _, reference = build(alias)
    model, exported = build(alias, torch.bfloat16)
    input_ids = tokens(2, 24)
    expected = reference(input_ids).logits
    output = exported(input_ids, use_cache=True)
    assert output.logits.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in tensors_of(cache_of(output))} == {torch.bfloat16}

    # Rounding is the only difference: as far from fp32 as the script's own bf16.
    error = (output.logits.float() - expected).abs().mean()
    assert error <= 1.2 * (model(input_ids)[0].float() - expected).abs().mean()
    assert error < 0.05 * expected.std()


def test_embeddings_in_place_of_tokens():
    _, exported = build("kv")
    input_ids = tokens(2, 10)
    embeddings = exported.get_input_embeddings()(input_ids)
    torch.testing.assert_close(exported(inputs_embeds=embeddings).logits, exported(input_ids).logits)
    for new in (12, 100):  # 100: to the last position
        continuation = greedy(exported, None, inputs_embeds=embeddings, new=new)
        assert torch.equal(continuation, greedy(exported, input_ids, new=new)[:, 10:])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        exported()


@pytest.mark.parametrize("alias", VARIANTS)
def test_attentions_and_hidden_states(alias):
    _, exported = build(alias)
    exported.set_attn_implementation("eager")
    output = exported(tokens(2, 9), output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 9, 9)] * 2
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 9, 32)] * 3
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 9))
        assert not weights.triu(1).any()
    assert isinstance(exported(tokens(1, 3), return_dict=False), tuple)


def test_only_the_logits_asked_for_are_computed():
    _, exported = build("qk")
    input_ids = tokens(2, 9)
    full = exported(input_ids).logits
    torch.testing.assert_close(exported(input_ids, logits_to_keep=2).logits, full[:, -2:])
    some = exported(input_ids, logits_to_keep=torch.tensor([1, 5])).logits
    torch.testing.assert_close(some, full[:, [1, 5]])


# -----------------------------------------------------------------------------
# Cache


@pytest.mark.parametrize("alias", VARIANTS)
def test_the_cache_takes_the_bytes_of_the_profiler_s_formula(alias):
    _, exported = build(alias)
    config = exported.config
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=30)):
        exported(tokens(3, 20), **{CACHE_NAME: cache})
        exported(tokens(3, 10), **{CACHE_NAME: cache})
        bytes_a_position = len(VARIANTS[alias]["cached"]) * config.n_kv_groups * 8 * 4  # heads of width 8 in fp32
        assert sum(tensor.nbytes for tensor in tensors_of(cache)) == bytes_a_position * config.n_layer * 3 * 30

    # Two of the 20 layers at 300M, without the memory: shapes alone, against the profiler's committed output.
    with torch.device("meta"):
        groups = (VARIANTS[alias]["groups"] or {}).get("300M")
        large = QKVForCausalLM(QKVConfig(variant=alias, n_layer=2, n_kv_groups=groups)).to(torch.bfloat16)
        output = large(torch.zeros(1, 3, dtype=torch.long), use_cache=True)
    profiled = json.loads((ROOT / "comprehensive_flop_analysis_300M.json").read_text(encoding="utf-8"))
    name = VARIANTS[alias]["name"]
    (per_token,) = (
        entry["kv_cache"]["bytes_per_token"] for entry in profiled.values() if entry["attention_type"] == name
    )
    assert sum(tensor.nbytes for tensor in tensors_of(cache_of(output))) == 3 * per_token * 2 / 20


@pytest.mark.parametrize("alias", VARIANTS)
def test_decoding_from_the_cache_is_decoding_without(alias):
    model, exported = build(alias)
    prompt = tokens(3, 9)
    expected = greedy(exported, prompt, use_cache=False)
    assert torch.equal(expected, model.generate(prompt, 12, temperature=0))
    assert torch.equal(greedy(exported, prompt), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(greedy(exported, prompt, **static), expected)

    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(greedy(exported, prompt, **beams), greedy(exported, prompt, use_cache=False, **beams))
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        sampled.append(greedy(exported, prompt, do_sample=True, top_k=5, use_cache=use_cache))
    assert torch.equal(*sampled)


@pytest.mark.parametrize("alias", ["kqv", "kv", "qgqa"])
def test_several_tokens_at_a_time_follow_the_cached_ones(alias):
    _, exported = build(alias)
    input_ids = tokens(2, 20)
    full = exported(input_ids).logits
    cache = DynamicCache(config=exported.config)
    parts = [exported(part, **{CACHE_NAME: cache}).logits for part in input_ids.split([7, 1, 5, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-4, rtol=1e-4)

    # Taken back, the cache goes on from there: what assisted decoding does with rejected tokens.
    cache.crop(-8)
    again = exported(input_ids[:, 12:], **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(again, full[:, 12:], atol=1e-4, rtol=1e-4)

    # And so does generation from the cache that generate() returned.
    first = greedy(exported, input_ids, new=5, return_dict_in_generate=True)
    rest = greedy(exported, first.sequences, new=7, **{CACHE_NAME: cache_of(first)})
    assert torch.equal(rest, greedy(exported, input_ids, new=12))


@pytest.mark.parametrize("alias", ["kqv", "kv", "qmqa"])
def test_assisted_decoding_and_prompt_lookup_give_the_greedy_tokens(alias):
    _, exported = build(alias)
    _, assistant = build("k", n_layer=1)
    prompt = tokens(1, 10)
    expected = greedy(exported, prompt)
    assert torch.equal(greedy(exported, prompt, assistant_model=exported), expected)
    assert torch.equal(greedy(exported, prompt, assistant_model=assistant), expected)
    assert torch.equal(greedy(exported, prompt, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("alias", ["kqv", "kv"])
def test_a_prompt_prefilled_in_chunks(alias):
    _, exported = build(alias)
    prompt = tokens(2, 18)
    for cache in ({}, {"cache_implementation": "static"}):
        chunked = greedy(exported, prompt, prefill_chunk_size=8, disable_compile=True, **cache)
        assert torch.equal(chunked, greedy(exported, prompt))


def quantized(config):
    return QuantizedCache(backend="fp8", config=config)


def allocated_in_advance(config):
    """As transformers' export of models does it."""
    cache, head_dim = StaticCache(config=config, max_cache_len=16), config.n_embd // config.n_head
    cache.early_initialization(2, config.n_kv_groups, head_dim, torch.float32, torch.device("cpu"))
    return cache


@pytest.mark.parametrize("alias", ["kqv", "kv", "qgqa"])
@pytest.mark.parametrize(("cache_for", "tolerance"), [(quantized, 0.1), (allocated_in_advance, 1e-4)])
def test_a_cache_that_has_room_for_values_keeps_the_key_there_too(alias, cache_for, tolerance):
    """Eight bits a number leave the logits near what they were."""
    if cache_for is quantized and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("needs the library's own backend")
    _, exported = build(alias)
    input_ids = tokens(2, 16)
    full, cache = exported(input_ids).logits, cache_for(exported.config)
    parts = [exported(part, **{CACHE_NAME: cache}).logits for part in input_ids.split([9, 1, 6], dim=1)]
    assert (torch.cat(parts, dim=1) - full).abs().mean() < tolerance * full.std()


@pytest.mark.skipif(not hasattr(transformers, "ContinuousBatchingConfig"), reason="newer than the oldest version")
@pytest.mark.parametrize("alias", ["kqv", "kv", "qgqa"])
def test_continuous_batching(alias):
    _, exported = build(alias)
    prompts = [tokens(1, length)[0].tolist() for length in (5, 9)]
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By default it takes most of the machine's memory.
    small = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    options = {"generation_config": settings, "continuous_batching_config": small, "progress_bar": False}
    found = exported.generate_batch(inputs=prompts, **options)
    for prompt, answer in zip(prompts, found.values(), strict=True):
        expected = greedy(exported, torch.tensor([prompt]))[0, len(prompt) :][:4]
        assert answer.generated_tokens == expected.tolist()


def test_both_names_of_the_cache(recwarn):
    _, exported = build("kv")
    input_ids = tokens(1, 6)
    expected = exported.transformer(input_ids).last_hidden_state[:, 4:]
    for name in ("cache", "past_key_values"):
        past = DynamicCache(config=exported.config)
        exported(input_ids[:, :4], **{name: past})
        output = exported.transformer(input_ids[:, 4:], **{name: past})
        torch.testing.assert_close(output.last_hidden_state, expected)
        assert cache_of(output) is past and past.get_seq_length() == 6
    # The library's own name raises no warning of its age.
    recwarn.clear()
    greedy(exported, input_ids)
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]


# -----------------------------------------------------------------------------
# Padding and positions


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("alias", VARIANTS)
def test_a_padded_row_has_the_logits_of_its_text_alone(alias, side):
    _, exported = build(alias)
    lengths = [4, 9, 7]
    batch = torch.full((3, 9), END_OF_TEXT)
    mask = torch.zeros(3, 9, dtype=torch.long)
    texts = [tokens(length, seed=length) for length in lengths]
    for row, text in enumerate(texts):
        place = slice(9 - len(text), 9) if side == "left" else slice(0, len(text))
        batch[row, place] = text
        mask[row, place] = 1
    logits = exported(batch, attention_mask=mask).logits
    for row, text in enumerate(texts):
        alone = exported(text[None]).logits[0]
        torch.testing.assert_close(logits[row, mask[row] == 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("alias", "attention"), [*((alias, "sdpa") for alias in VARIANTS), ("kv", "eager")])
def test_left_padded_prompts_are_continued_as_single_ones(alias, attention):
    _, exported = build(alias)
    exported.set_attn_implementation(attention)
    texts = [tokens(length, seed=length) for length in (3, 8, 6)]
    batch = torch.stack([torch.cat([torch.full((8 - len(text),), END_OF_TEXT), text]) for text in texts])
    mask = torch.stack([torch.arange(8) >= 8 - len(text) for text in texts]).long()
    alone = [greedy(exported, text[None], new=6)[0, len(text) :] for text in texts]
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        together = greedy(exported, batch, new=6, attention_mask=mask, **cache)
        assert torch.equal(together[:, 8:], torch.stack(alone))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("alias", ["kqv", "kv", "qgqa"])
def test_texts_in_a_packed_row_do_not_see_each_other(alias, attention):
    _, exported = build(alias)
    exported.set_attn_implementation(attention)
    texts = [tokens(length, seed=length) for length in (30, 5, 20)]  # 55 tokens in a model of 48 positions
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    alone = torch.cat([exported(text[None]).logits for text in texts], dim=1)
    for use_cache in (True, False):
        packed = exported(torch.cat(texts)[None], position_ids=positions[None], use_cache=use_cache).logits
        torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


def test_more_tokens_than_positions_are_an_error_with_both_numbers():
    _, exported = build("kv")
    with pytest.raises(ValueError, match="49 tokens do not fit the model's n_positions, 48"):
        exported(tokens(1, 49))
    cache = exported(tokens(1, 48), use_cache=True).past_key_values
    for mask in (None, torch.ones(1, 49)):
        with pytest.raises(ValueError, match="49 tokens do not fit the model's n_positions, 48"):
            exported(tokens(1, 1), attention_mask=mask, past_key_values=cache)


def test_generation_ends_at_the_last_position():
    model, exported = build("kv")
    prompt = tokens(1, 40)
    text = greedy(exported, prompt, new=100)
    assert torch.equal(text, model.generate(prompt, 8, temperature=0))
    with pytest.raises(ValueError, match="48"):
        greedy(exported, tokens(1, 48))


# -----------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("alias", VARIANTS)
def test_gradient_checkpointing_leaves_the_gradients_as_they_are(alias):
    _, exported = build(alias)
    exported.train()
    input_ids = tokens(2, 12)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings(action="ignore"):  # 5.24 has another name for it, which 5.20 lacks
                exported.gradient_checkpointing_enable()
        exported.zero_grad()
        exported(input_ids, labels=input_ids, use_cache=True).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in exported.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_dropout_is_where_the_paper_has_it():
    model, exported = build("kv", dropout=0.25)
    input_ids = tokens(2, 12)
    losses = []
    for trained in (model.train(), exported.train()):
        torch.manual_seed(3)
        output = trained(input_ids, labels=input_ids)
        losses.append(output[1] if isinstance(output, tuple) else output.loss)
    torch.testing.assert_close(*losses)
    assert not torch.isclose(losses[1], exported.eval()(input_ids, labels=input_ids).loss)


WAYS = {
    **{f"LoRA {each}": ("LoraConfig", each, {"r": 2, "target_modules": "all-linear"}) for each in VARIANTS},
    "prompt": ("PromptTuningConfig", "kv", {"num_virtual_tokens": 3}),
    "IA3": ("IA3Config", "kv", {"target_modules": ["c_q", "c_k", "c_fc"], "feedforward_modules": ["c_fc"]}),
    "OFT": ("OFTConfig", "kv", {"target_modules": ["c_q", "c_k", "c_fc"], "r": 4, "oft_block_size": 0}),
}


@pytest.mark.parametrize(("method", "alias", "options"), WAYS.values(), ids=WAYS)
def test_peft_attaches_and_trains(method, alias, options):
    peft = pytest.importorskip("peft")
    _, exported = build(alias)
    input_ids = tokens(2, 12)
    before = exported(input_ids).logits.detach()
    tuned = peft.get_peft_model(exported, getattr(peft, method)(task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = tuned(input_ids, labels=input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    if method == "LoraConfig":
        merged = tuned.merge_and_unload()
        assert isinstance(merged, QKVForCausalLM) and not torch.allclose(merged(input_ids).logits, before)


@pytest.mark.parametrize("alias", VARIANTS)
def test_a_prefix_of_the_keys_and_values_of_a_prompt_is_that_prompt(alias):
    """PEFT's prefix tuning, whose prefix can be any; it learns its shape from config.to_dict()."""
    peft = pytest.importorskip("peft")
    _, exported = build(alias)
    text, prompt = tokens(2, 9), tokens(1, 3, seed=5)
    cache = cache_of(exported(prompt, use_cache=True))
    expected = exported(torch.cat([prompt.expand(2, 3), text], dim=1)).logits[:, 3:]
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(exported, settings)
    halves = [(layer.keys, layer.values if layer.values.numel() else layer.keys) for layer in cache.layers]
    prefix = torch.stack([half[0].transpose(0, 1) for layer in halves for half in layer], dim=1)
    tuned.prompt_encoder["default"].embedding.weight.data = prefix.flatten(1).detach().clone()
    torch.testing.assert_close(tuned(text).logits, expected, atol=1e-4, rtol=1e-4)
    tuned(text, labels=text).loss.backward()
    assert tuned.prompt_encoder["default"].embedding.weight.grad.any()


# -----------------------------------------------------------------------------
# Configuration, saving, embeddings


def test_the_embeddings_can_be_resized():
    _, exported = build("kv")
    input_ids = tokens(1, 9)
    before = exported(input_ids).logits
    exported.resize_token_embeddings(70)
    logits = exported(input_ids).logits
    assert logits.shape == (1, 9, 70) and exported.config.vocab_size == 70
    torch.testing.assert_close(logits[:, :, :61], before)
    assert exported.lm_head.weight is exported.transformer.wte.weight


def test_new_weights_are_drawn_as_in_the_paper():
    torch.manual_seed(0)
    config = QKVConfig(variant="gqa", n_embd=256, n_layer=2, n_head=4, n_kv_groups=2, vocab_size=999)
    exported = QKVForCausalLM(config)
    for name, parameter in exported.named_parameters():
        if "ln_" in name:
            assert torch.equal(parameter, torch.ones(256) if name.endswith("weight") else torch.zeros(256))
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.mean().abs() < 1e-3 and parameter.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"variant": "qvk"}, f"variant: expected one of {', '.join(VARIANTS)}, got 'qvk'"),
        ({"n_embd": 30}, "n_embd: expected a multiple of n_head"),
        ({"variant": "mqa", "n_kv_groups": 2}, "n_kv_groups: "),
        ({"variant": "qgqa", "n_kv_groups": 3}, "n_kv_groups: "),
        ({"variant": "gqa", "n_kv_groups": 0}, "n_kv_groups: "),
        ({"variant": "kv", "n_kv_groups": 2}, "n_kv_groups: "),
    ],
)
def test_a_configuration_that_does_not_go_together_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        QKVConfig(**SHAPE | settings)


@pytest.mark.parametrize(("variant", "groups"), [("kqv", None), ("kv", None), ("gqa", 2), ("mqa", None), ("qgqa", 2)])
def test_the_names_that_the_library_has_for_the_shape(variant, groups):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": groups}
    config = QKVConfig(variant=variant, vocab_size=61, max_position_embeddings=48, **shape)
    own_names = QKVConfig(variant=variant, n_kv_groups=groups, **SHAPE | {"dropout": 0.1})
    assert config.to_dict() == own_names.to_dict()
    assert shape.items() - {("num_key_value_heads", None)} <= config.to_dict().items()
    assert QKVConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("alias", ["kqv", "kv", "qgqa"])
def test_compiled_in_one_graph(alias):
    _, exported = build(alias)
    prompt = tokens(2, 9)
    expected = greedy(exported, prompt)
    torch.compiler.reset()
    compiled = torch.compile(exported, fullgraph=True)
    torch.testing.assert_close(compiled(prompt).logits, exported(prompt).logits, atol=1e-4, rtol=1e-4)

    cache = StaticCache(config=exported.config, max_cache_len=21)
    text, step = prompt, prompt
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        for _ in range(12):
            logits = (exported if step is prompt else compiled)(step, **{CACHE_NAME: cache}).logits
            step = logits[:, -1:].argmax(dim=-1)
            text = torch.cat([text, step], dim=1)
    assert torch.equal(text, expected)
