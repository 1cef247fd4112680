"""The models of the training scripts against transformers' GPT-2, against each other with and without the KV
cache, and against what the paper says of their size; the checkpoints they load and refuse."""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, script_of
from conftest import VARIANTS as TABLE
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel


@dataclass(frozen=True)
class Variant:
    """A variant, by its 300M script, and where the paper takes query, key and value from: a projection, and
    which part of its outputs."""

    alias: str
    q: tuple[str, int]
    k: tuple[str, int]
    v: tuple[str, int]
    groups: int | None = None  # KV heads in the tests' model of four heads; None: one for each query head

    @property
    def script(self):
        return script_of(self.alias)

    @property
    def model(self):
        return TABLE[self.alias]["class"]

    @property
    def cached(self):
        """Tensors a layer."""
        return len({self.k, self.v})

    def build(self, **changes):
        """A small model with random weights, biases and LayerNorms, in eval mode."""
        torch.manual_seed(0)
        config = self.script.ModelConfig(**(SMALL | {"n_kv_groups": self.groups} | changes))
        model = getattr(self.script, self.model)(config)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                tensor.normal_(std=0.2).add_(name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")))
        return model.eval()

    def empty(self, size):
        """The published model of a size, from its own script, without memory for its weights."""
        script = script_of(self.alias, size)
        values = yaml.safe_load((ROOT / f"configs/model_config_{size}.yaml").read_text())
        with torch.device("meta"):
            return getattr(script, self.model)(script.ModelConfig(**values))

    def widths(self, d, kv_width):
        """The outputs of each projection."""
        parts = {self.q: d, self.k: kv_width, self.v: kv_width}
        widths = dict.fromkeys((name for name, _ in parts), 0)
        for (name, _), width in parts.items():
            widths[name] += width
        return widths | {"c_proj": d}


VARIANTS = {
    variant.alias: variant
    for variant in (
        Variant("kqv", ("c_attn", 0), ("c_attn", 1), ("c_attn", 2)),
        Variant("qk", ("c_kv", 0), ("c_kv", 0), ("c_kv", 1)),
        Variant("kv", ("c_q", 0), ("c_k", 0), ("c_k", 0)),
        Variant("k", ("c_k", 0), ("c_k", 0), ("c_k", 0)),
        Variant("gqa", ("c_q", 0), ("c_kv", 0), ("c_kv", 1), groups=2),
        Variant("mqa", ("c_q", 0), ("c_kv", 0), ("c_kv", 1), groups=1),
        Variant("qgqa", ("c_q", 0), ("c_k", 0), ("c_k", 0), groups=2),
        Variant("qmqa", ("c_q", 0), ("c_kv", 0), ("c_kv", 0), groups=1),
    )
}
assert VARIANTS.keys() == TABLE.keys()
PUBLISHED = [(alias, size) for alias in VARIANTS for size in TABLE[alias]["script"]]
SMALL = {
    "vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 40,
    "layer_norm_epsilon": 1e-3, "dropout": 0.1,
}  # fmt: skip
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
# for text that all scripts share
one_variant = pytest.mark.parametrize("variant", [VARIANTS["kqv"]], ids=["kqv"])


def tokens(rows, length, seed=1):
    return torch.randint(SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def oracle(variant, model):
    """transformers' GPT-2 as a function of ids and labels, computing with the parameters of our model."""
    c, own, theirs = model.config, dict(model.named_parameters()), {}
    names = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon"]
    config = GPT2Config(**{name: getattr(c, name) for name in names}, activation_function="gelu")
    heads = {"q": c.n_head, "k": variant.groups or c.n_head, "v": variant.groups or c.n_head}
    head_dim = c.n_embd // c.n_head

    def part_of(prefix, letter, kind):
        """The rows of a projection that make the query, the key or the value; shared heads are repeated."""
        (name, part), width = getattr(variant, letter), heads[letter] * head_dim
        rows = own[f"{prefix}.{name}.{kind}"][part * width : (part + 1) * width]
        rows = rows.view(heads[letter], head_dim, -1)
        return rows.repeat_interleave(c.n_head // heads[letter], dim=0).flatten(0, 1)

    for name, tensor in own.items():
        if ".attn." in name and ".c_proj." not in name:
            continue
        convolution = ".c_" in name and name.endswith("weight")  # stored [in, out]
        theirs[f"transformer.{name}"] = tensor.T if convolution else tensor
    for layer in range(c.n_layer):
        prefix = f"h.{layer}.attn"
        weight = torch.cat([part_of(prefix, letter, "weight") for letter in "qkv"])
        bias = torch.cat([part_of(prefix, letter, "bias") for letter in "qkv"])
        theirs[f"transformer.{prefix}.c_attn.weight"] = weight.T
        theirs[f"transformer.{prefix}.c_attn.bias"] = bias[:, 0]
    theirs["lm_head.weight"] = own["wte.weight"]
    gpt2 = GPT2LMHeadModel(config).eval()
    assert theirs.keys() == gpt2.state_dict().keys()
    return lambda ids, labels=None: functional_call(gpt2, theirs, (ids,), {"labels": labels})


# ---- the model is the paper's


@each_variant
@pytest.mark.parametrize("masked", [False, True])
def test_logits_loss_and_gradients_are_those_of_transformers(variant, masked):
    """Where key and value share a projection, its gradient is the sum of the oracle's two."""
    model, ids = variant.build(), tokens(3, 24)
    labels = ids.masked_fill(tokens(3, 24, seed=2) % 3 == 0, -100) if masked else ids
    (logits, _), (_, loss), expected = model(ids), model(ids, labels=labels), oracle(variant, model)(ids, labels)
    assert logits.std() > 0.5  # large enough for the comparison to mean something
    close(logits, expected.logits)
    close(loss, expected.loss)
    names, parameters = zip(*model.named_parameters(), strict=True)
    pairs = zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected.loss)), strict=True)
    for name, (gradient, reference) in zip(names, pairs, strict=True):
        assert reference.abs().max() > 1e-4, name
        difference = (gradient - reference).abs() - 1e-4 * reference.abs()
        assert difference.max() < 1e-5, name


class LargestLogits(TorchDispatchMode):
    """Notes the most rows of logits that one tensor has held."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        shape = getattr(result, "shape", ())
        transposed_embedding = shape == (SMALL["n_embd"], SMALL["vocab_size"])
        if len(shape) > 1 and shape[-1] == SMALL["vocab_size"] and not transposed_embedding:
            self.rows = max(self.rows, shape[:-1].numel())
        return result


@one_variant
def test_a_loss_in_chunks_is_the_whole_loss_and_never_holds_all_logits(variant, monkeypatch):
    model, ids = variant.build(), tokens(3, 24)
    labels = ids.masked_fill(tokens(3, 24, seed=2) % 4 == 0, -100)
    parameters = list(model.parameters())
    whole = F.cross_entropy(model(ids)[0][:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = torch.autograd.grad(whole, parameters)
    monkeypatch.setattr(variant.script, "LOSS_CHUNK", 5)  # does not divide the 3 x 23 positions
    with LargestLogits() as largest:
        loss = model(ids, labels=labels)[1]
        gradients = torch.autograd.grad(loss, parameters)
    close(loss, whole)
    close(gradients, expected)
    assert largest.rows == 5
    assert model(ids, labels=torch.full_like(ids, -100))[1] == 0


@one_variant
def test_the_loss_in_bf16_has_the_gradients_of_the_obvious_one(variant):
    """Both round the logits to bf16 and add up in fp32; the rest is the order of the sums."""
    model, ids = variant.build(), tokens(3, 24)
    names, parameters = zip(*model.named_parameters(), strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        obvious = F.cross_entropy(model(ids)[0][:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss = model(ids, labels=ids)[1]
    assert loss.dtype == torch.float32
    close(loss, obvious, 1e-4)
    pairs = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(obvious, parameters), strict=True)
    for name, (gradient, expected) in zip(names, pairs, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 0.02 * expected.norm(), name


@one_variant
@pytest.mark.parametrize("wrong", [-1, SMALL["vocab_size"]])
def test_a_label_that_is_neither_a_token_nor_minus_100_raises(variant, wrong):
    """On a GPU it is an assertion of the device."""
    ids = tokens(2, 8)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        variant.build()(ids, labels=torch.full_like(ids, wrong))


# ---- the attention function alone


def explicit_attention(q, k, v):
    """Attention as a sum in float64: the last T of S positions, each over itself and all before it."""
    q, k, v = (tensor.double().numpy() for tensor in (q, k, v))
    B, n_head, T, head_dim = q.shape
    n_rep, past = n_head // k.shape[1], k.shape[2] - T
    y = np.zeros(q.shape)
    for b, head, t in np.ndindex(B, n_head, T):
        keys, values = k[b, head // n_rep, : past + t + 1], v[b, head // n_rep, : past + t + 1]
        shares = np.exp(keys @ q[b, head, t] / math.sqrt(head_dim))
        y[b, head, t] = shares @ values / shares.sum()
    return torch.from_numpy(y)


@one_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_kv_head", [16, 4, 1])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 50), (4, 4), (3, 50)])
def test_attention_is_the_explicit_sum(variant, T, S, shared, n_kv_head, dtype):
    """Of one query (decode) and of several (prefill), over views of a longer cache."""
    torch.manual_seed(0)
    q = torch.randn(2, 16, T, 8).to(dtype)
    cached = [torch.randn(2, n_kv_head, 60, 8).to(dtype)[:, :, :S] for _ in range(2)]
    k, v = (cached[0], cached[0]) if shared else cached
    y = variant.script.causal_attention(q, k, v, variant.build().config)
    assert (y.shape, y.dtype) == (q.shape, dtype)
    close(y.double(), explicit_attention(q, k, v), {torch.float32: 1e-5, torch.bfloat16: 0.015}[dtype])


@one_variant
def test_dropout_acts_on_what_attention_and_mlp_give_and_nowhere_else(variant):
    model, ids, given = variant.build(dropout=0.5), tokens(8, 24), {}
    for name in ("attn", "mlp"):
        module = getattr(model.h[0], name)
        module.register_forward_hook(lambda *args, name=name: given.update({name: args[-1]}))
    model(ids)
    expected = given["attn"]
    model.train()(ids)
    for output in given.values():
        assert (output == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    kept = given["attn"] != 0
    close(given["attn"][kept], 2 * expected[kept])  # neither embeddings nor attention weights lost any
    for name, tensor in model.named_parameters():
        if ".c_proj." in name:
            tensor.data.zero_()
    assert torch.equal(model(ids)[0], model(ids)[0])


# ---- the KV cache


def in_pieces(variant, model, ids, split):
    cache = variant.script.KVCache(ids.shape[1])
    return torch.cat([model(piece, cache=cache)[0] for piece in ids.split(split, dim=1)], dim=1), cache


@each_variant
@pytest.mark.parametrize("split", [[24], [1] * 24, [23, 1], [1, 23], [7, 1, 9, 7]])
def test_reading_in_pieces_through_the_cache_gives_the_uncached_logits(variant, split):
    model, ids = variant.build(), tokens(3, 24)
    close(in_pieces(variant, model, ids, split)[0], model(ids)[0])


@each_variant
@pytest.mark.parametrize("split", [[1] * 24, [7, 1, 9, 7]])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bf16_the_cache_changes_no_more_than_bf16_does_by_itself(variant, split, weights):
    """Under autocast, and with weights in bf16."""
    model, ids = variant.build(), tokens(3, 24)
    exact = model(ids)[0]
    model.to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        cached, cache = in_pieces(variant, model, ids, split)
        uncached = model(ids)[0]
    assert {tensor.dtype for layer in cache.layers.values() for tensor in layer} == {torch.bfloat16}
    rounding = (uncached.float() - exact).abs().max()
    assert (cached.float() - exact).abs().max() < 2 * rounding


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_holds_what_the_paper_says_and_nothing_else(variant, dtype):
    model, cache = variant.build().to(dtype), variant.script.KVCache(20)
    with torch.no_grad():
        for count in (5, 15):
            model(tokens(3, count), cache=cache)
    heads = variant.groups or SMALL["n_head"]
    held = [tensor for layer in cache.layers.values() for tensor in layer]
    assert [tensor.shape for tensor in held] == [(3, heads, 20, 8)] * SMALL["n_layer"] * variant.cached
    assert cache.nbytes == SMALL["n_layer"] * variant.cached * 3 * 20 * heads * 8 * dtype.itemsize
    assert cache.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert cache.length == 20


# Tables 4 and 10: the percentage of QKV's cache that a variant saves.
SAVED = {
    "300M": {"kqv": 0, "kv": 50, "qk": 0, "k": 50, "gqa": 75, "mqa": 93.8, "qgqa": 87.5, "qmqa": 96.9},
    "1.2B": {"kqv": 0, "kv": 50, "gqa": 75, "mqa": 96.9, "qgqa": 87.5, "qmqa": 98.4},
}


@pytest.mark.parametrize(("alias", "size"), PUBLISHED)
def test_the_published_models_cache_the_published_bytes(alias, size):
    """In bf16; QKV at 300M takes 81,920 bytes a token, 10.49 GB for 128,000 tokens."""
    layers, heads, groups = {"300M": (20, 16, 4), "1.2B": (22, 32, 8)}[size]
    groups = {"gqa": groups, "qgqa": groups, "mqa": 1, "qmqa": 1}.get(alias, heads)
    cache = VARIANTS[alias].script.KVCache(128_000)
    VARIANTS[alias].empty(size).bfloat16()(torch.zeros(1, 1, dtype=torch.int64, device="meta"), cache=cache)
    assert cache.nbytes == 128_000 * VARIANTS[alias].cached * layers * groups * 64 * 2
    qkv = 128_000 * {"300M": 81_920, "1.2B": 2 * 22 * 2048 * 2}[size]
    assert 100 * (1 - cache.nbytes / qkv) == pytest.approx(SAVED[size][alias], abs=0.0501)


@each_variant
def test_a_cache_can_be_set_back_and_filled_with_other_tokens(variant):
    model, ids, others = variant.build(), tokens(2, 12), tokens(2, 6, seed=2)
    cache = variant.script.KVCache(24)
    model(ids, cache=cache)
    assert cache.length == 12
    cache.length = 7
    close(model(others, cache=cache)[0], model(torch.cat([ids[:, :7], others], dim=1))[0][:, 7:])
    assert cache.length == 13


@one_variant
@pytest.mark.parametrize(("max_length", "limit"), [(None, 24), (100, 24), (6, 6)])
def test_more_tokens_than_fit_are_refused_with_both_numbers(variant, max_length, limit):
    """In the model's positions or in a cache, which stays usable."""
    model, ids = variant.build(), tokens(2, limit + 1)
    cache = max_length and variant.script.KVCache(max_length)
    if cache:
        model(ids[:, :4], cache=cache)
    with pytest.raises(ValueError, match=rf"{limit + 1}.* {limit}"):
        model(ids[:, 4:] if cache else ids, cache=cache)
    if cache:
        close(model(ids[:, 4:limit], cache=cache)[0], model(ids[:, :limit])[0][:, 4:])


# ---- generation


def greedy(model, ids, count):
    """The obvious loop: the likeliest next token of the last n_positions tokens."""
    for _ in range(count):
        logits = model(ids[:, -SMALL["n_positions"] :])[0]
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


@each_variant
@pytest.mark.parametrize(("prompt", "count"), [(1, 30), (5, 0), (5, 8), (24, 8), (27, 8)])
def test_greedy_generation_is_the_obvious_loop_past_n_positions_too(variant, prompt, count):
    model, ids = variant.build(), tokens(3, prompt)
    expected = greedy(model, ids, count)
    for use_cache in (True, False):
        result = model.generate(ids, count, temperature=0, use_cache=use_cache)
        assert result.dtype == torch.int64
        assert torch.equal(result, expected)


@one_variant
@pytest.mark.parametrize(
    ("prompt", "use_cache", "expected"),
    [(5, True, [5, 1, 1, 1]), (5, False, [5, 6, 7, 8]), (23, True, [23, 1, 24, 24])],  # the window moves on
)
def test_with_the_cache_each_step_reads_one_token(variant, prompt, use_cache, expected):
    model, lengths = variant.build(), []
    model.h[0].register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    model.generate(tokens(2, prompt), 4, temperature=0, use_cache=use_cache)
    assert lengths == expected


@one_variant
def test_sampling_is_a_function_of_the_seed_with_and_without_the_cache(variant):
    model, ids = variant.build(), tokens(3, 6)

    def sampled(seed, use_cache):
        torch.manual_seed(seed)
        return model.generate(ids, 25, temperature=0.9, top_k=4, use_cache=use_cache)

    assert torch.equal(sampled(1, True), sampled(1, True))
    assert torch.equal(sampled(1, True), sampled(1, False))
    assert not torch.equal(sampled(1, True), sampled(2, True))
    assert torch.equal(model.generate(ids, 25, top_k=1), model.generate(ids, 25, temperature=0))


@one_variant
@pytest.mark.parametrize(("temperature", "top_k"), [(0.6, None), (1.5, 7), (1.0, 1000)])
def test_sampled_tokens_have_the_frequencies_of_the_softmax(variant, temperature, top_k):
    model, ids = variant.build(), tokens(1, 4).expand(10_000, -1)
    torch.manual_seed(5)
    frequencies = model.generate(ids, 1, temperature, top_k)[:, -1].bincount(minlength=61) / len(ids)
    logits = model(ids[:1])[0][0, -1] / temperature
    if top_k == 7:
        logits[logits.argsort(descending=True)[7:]] = -math.inf
    expected = logits.softmax(dim=-1)
    assert ((frequencies > 0) <= (expected > 0)).all()
    assert (frequencies - expected).abs().max() < 0.02  # four standard deviations


@one_variant
@pytest.mark.parametrize("training", [True, False])
def test_generation_switches_dropout_and_gradients_off_and_leaves_the_mode_as_it_was(variant, training):
    """Where it fails, too."""
    model, ids = variant.build(dropout=0.5), tokens(2, 5)
    expected, grad = greedy(model, ids, 8), []
    model.h[0].register_forward_hook(lambda *_: grad.append(torch.is_grad_enabled()))
    model.train(training)
    assert torch.equal(model.generate(ids, 8, temperature=0), expected)
    assert {module.training for module in model.modules()} == {training}
    assert not any(grad)
    with pytest.raises(IndexError):
        model.generate(ids + 100, 3)
    assert {module.training for module in model.modules()} == {training}


# ---- size and initialisation


# Projections of width d in a layer, and key/value heads of width 64 beside them at 300M and at 1.2B.
OUTPUTS = {
    "kqv": (4, 0, 0), "qk": (3, 0, 0), "kv": (3, 0, 0), "k": (2, 0, 0),
    "gqa": (2, 8, 16), "mqa": (2, 2, 2), "qgqa": (2, 4, 8), "qmqa": (2, 1, 1),
}  # fmt: skip


def parameter_counts(alias, size):
    """Of the whole model and of its attention layers, added up by hand."""
    wide, *narrow = OUTPUTS[alias]
    d, layers, inner, heads = {"300M": (1024, 20, 4096, narrow[0]), "1.2B": (2048, 22, 8192, narrow[1])}[size]
    attention = layers * (d + 1) * (wide * d + heads * 64)
    mlp, norms = layers * (2 * d * inner + inner + d), layers * 4 * d + 2 * d
    return 50304 * d + 2048 * d + attention + mlp + norms, attention


@pytest.mark.parametrize(("alias", "size"), PUBLISHED)
def test_published_sizes_have_the_parameters_of_the_architecture(alias, size):
    model = VARIANTS[alias].empty(size)
    total = sum(tensor.numel() for tensor in model.parameters())
    attention = sum(tensor.numel() for name, tensor in model.named_parameters() if ".attn." in name)
    assert (total, attention) == parameter_counts(alias, size)
    published = {"kqv": (305_534_976, 83_968_000), "k": (263_550_976, 41_984_000)}
    published |= dict.fromkeys(("kv", "qk"), (284_542_976, 62_976_000))
    if size == "300M" and alias in published:
        assert (total, attention) == published[alias]


@each_variant
def test_state_dict_has_the_released_names_and_no_buffers(variant):
    model = variant.build()
    kv_width = (variant.groups or 4) * 8
    layer = {f"{norm}.{kind}": (32,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    for name, width in variant.widths(32, kv_width).items():
        layer |= {f"attn.{name}.weight": (width, 32), f"attn.{name}.bias": (width,)}
    layer |= {"mlp.c_fc.weight": (40, 32), "mlp.c_fc.bias": (40,)}
    layer |= {"mlp.c_proj.weight": (32, 40), "mlp.c_proj.bias": (32,)}
    expected = {"wte.weight": (61, 32), "wpe.weight": (24, 32), "ln_f.weight": (32,), "ln_f.bias": (32,)}
    expected |= {f"h.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert list(model.buffers()) == []


@one_variant
@pytest.mark.parametrize("std", [0.02, 0.05])
def test_weights_start_normal_and_biases_at_zero(variant, std):
    torch.manual_seed(0)
    wider = {"n_embd": 128, "n_inner": 128, "n_positions": 128}
    config = variant.script.ModelConfig(**(SMALL | wider), initializer_range=std)
    for name, tensor in getattr(variant.script, variant.model)(config).named_parameters():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "ln_" in name:
            assert (tensor == 1).all(), name
        else:
            assert tensor.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(tensor.mean().item()) < std / 20, name
            assert tensor.abs().max() > 3 * std, name  # normal, not uniform


# ---- checkpoints


def released_config(**changes):
    """As the release writes it: n_kv_groups in the grouped variants only, and a key that ours do not know."""
    return SMALL | {"initializer_range": 0.02, "gradient_checkpointing": False} | changes


def save_released(path, state, config):
    """With DDP's prefix and the causal masks."""
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 24, 24).tril() for layer in range(config["n_layer"])}
    contents = {"step": 7, "epoch": 0, "tokens_seen": 7 * 2_359_296, "optimizer_state_dict": {}}
    contents |= {"model_state_dict": {f"module.{name}": tensor for name, tensor in (state | masks).items()}}
    contents |= {"model_config": config, "train_config": {"learning_rate": 2e-4, "micro_batch_size": 6}}
    torch.save(contents, path)
    return path


SHAPES = {"300M": (16, 4), "1.2B": (32, 8)}  # heads, and groups of the variants with several


def fake_released(path, alias, size):
    """The projections of a released checkpoint, narrow, with the names and proportions of their variant."""
    heads, groups = SHAPES[size]
    d, groups = heads * 4, {"gqa": groups, "qgqa": groups, "mqa": 1, "qmqa": 1}.get(alias)
    config = released_config(n_layer=1, n_embd=d, n_head=heads) | ({"n_kv_groups": groups} if groups else {})
    state = {"wte.weight": torch.zeros(61, d), "wpe.weight": torch.zeros(24, d)}
    for name, width in VARIANTS[alias].widths(d, (groups or heads) * 4).items():
        state[f"h.0.attn.{name}.weight"] = torch.zeros(width, d)
        state[f"h.0.attn.{name}.bias"] = torch.zeros(width)
    return save_released(path, state, config)


# of 300M, of 1.2B, of the released Q-GQA at 300M, and of MQA, which is GQA with a single group
HEADS_AND_GROUPS = [(16, 4), (32, 8), (16, 8), (16, 1)]


@pytest.mark.parametrize(("alias", "size"), PUBLISHED)
def test_either_size_loads_a_released_checkpoint_of_any_groups_in_eval_mode(alias, size, tmp_path):
    variant, script = VARIANTS[alias], script_of(alias, size)
    for heads, groups in HEADS_AND_GROUPS if alias in ("gqa", "qgqa") else [(16, variant.groups)]:
        shape = {"n_head": heads, "n_embd": 4 * heads} | ({"n_kv_groups": groups} if groups else {})
        model, ids = variant.build(**shape), tokens(2, 24)
        path = save_released(tmp_path / "7.pt", model.state_dict(), released_config(**shape))
        loaded = script.load_model(str(path))
        assert type(loaded).__name__ == variant.model and loaded.config.n_kv_groups == groups
        assert not any(module.training for module in loaded.modules())
        assert loaded.wte.weight.requires_grad  # it can be trained on
        assert torch.equal(loaded(ids)[0], model(ids)[0])


@each_variant
def test_a_checkpoint_of_another_variant_is_refused(variant, tmp_path):
    """Ours by its name, with the script to use; a released one, as configuration or projections do not fit."""
    path = tmp_path / "checkpoint_step_7.pt"
    for other in VARIANTS.values():
        if other != variant:
            torch.save(whole(other) | {"variant": other.script.VARIANT}, path)
            check_refused(variant, path, variant.script.PAPER_NAME, TABLE[other.alias]["script"]["300M"])
        for size in SHAPES if other != variant and (variant.alias, other.alias) != ("gqa", "mqa") else ():
            check_refused(variant, fake_released(path, other.alias, size))


def check_refused(variant, path, *parts):
    """load_model raises a ValueError: a line with path and parts, or pydantic's words on a setting."""
    with pytest.raises(ValueError) as caught:
        variant.script.load_model(path)
    message = str(caught.value)
    if isinstance(caught.value, variant.script.RunError):
        assert "\n" not in message
        assert all(part in message for part in (str(path), *parts))
    else:
        assert "ModelConfig" in message and not parts


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def whole(variant):
    return {"model_state_dict": variant.build().state_dict(), "model_config": released_config()}


def packed(contents, keep):
    """This much of the file of a checkpoint."""
    torch.save(contents, buffer := io.BytesIO())
    return buffer.getvalue()[: int(keep * buffer.tell())]


BROKEN = {  # what is to be saved in the place of a whole checkpoint; bytes are the file itself
    "empty file": lambda whole: b"",
    "cut in half": lambda whole: packed(whole, 0.5),
    "end missing": lambda whole: packed(whole, 0.999),
    "text file": lambda whole: b"loss 3.2\nloss 3.1\n",
    "bare state dict": lambda whole: whole["model_state_dict"],
    "list": lambda whole: list(whole.values()),
    "other project": lambda whole: whole | {"model_state_dict": {"layers.0": torch.zeros(3, 3)}},
    "weights missing": lambda whole: whole | {"model_state_dict": {"ln_f.bias": torch.zeros(32)}},
    "no width in config": lambda whole: whole | {"model_config": {"n_layer": 3, "n_head": 4}},
}
for key, value in (
    ("n_layer", 4), ("n_positions", 33), ("n_head", 0), ("n_head", 3), ("n_head", "four"), ("n_kv_groups", 3)
):  # fmt: skip
    config = released_config(**{key: value})
    BROKEN[f"{key} {value} in config"] = lambda whole, config=config: whole | {"model_config": config}


@one_variant
@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line_by_name(variant, damage, tmp_path):
    path, broken = tmp_path / "checkpoint_step_7.pt", BROKEN[damage](whole(variant))
    if isinstance(broken, bytes):
        path.write_bytes(broken)
    else:
        torch.save(broken, path)
    check_refused(variant, path)
    check_refused(variant, tmp_path)
    check_refused(variant, tmp_path / "missing.pt")


@one_variant
@pytest.mark.parametrize("beside", [False, True])
def test_code_in_a_checkpoint_never_runs(variant, beside, tmp_path):
    path, trace = tmp_path / "checkpoint_step_7.pt", tmp_path / "ran"
    evil = {"optimizer_state_dict": Evil(trace)}
    torch.save(whole(variant) | evil if beside else {"model_state_dict": Evil(trace)}, path)
    check_refused(variant, path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have run
