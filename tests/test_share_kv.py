"""share_kv.py: exactness in every family, the cache beside the stock cache, the fit, refusals, resume, the output."""

import copy
import json
import math
import os
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
    for part in ids.split(10, 1):
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
    with pytest.raises(ValueError, match="share_kv.py"):
        SharedKVCache(make_model("llama"))
