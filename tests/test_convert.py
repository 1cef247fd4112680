"""convert_checkpoint.py: exact where keys and values have no more directions than a head keeps, the best
choice where they have more (numpy), the same as transformers' GPT-2, and one line for what cannot work."""

import json
import re
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, VARIANTS, arguments, gpt2_of, metrics, prepare, script_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import convert_checkpoint as cc
import dataset_download
import export_hf

sys.path.insert(0, str(ROOT / "runs"))
import other_conversions

PAIRS = [("kqv", "kv"), ("gqa", "qgqa"), ("mqa", "qmqa")]
ALL = [(alias, to) for alias, targets in cc.TARGETS.items() for to in targets]
SHAPE = {"vocab_size": 257, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}


def build(alias, seed=0, **changes):
    """A small model with large random weights, biases and gains, so that everything in it matters."""
    script = script_of(alias)
    groups = {"gqa": 2, "qgqa": 2, "mqa": 1, "qmqa": 1}.get(alias)
    torch.manual_seed(seed)
    config = script.ModelConfig(**SHAPE | {"n_kv_groups": groups, "initializer_range": 0.3} | changes)
    model = getattr(script, VARIANTS[alias]["class"])(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def save(alias, model, path, **entries):
    script = script_of(alias)
    contents = {"variant": script.VARIANT, "step": 8, "model_config": asdict(model.config)}
    torch.save(contents | {"model_state_dict": model.state_dict()} | entries, path)
    return path


def split_projections(alias, model, number):
    """(q, k, v), each (weight, bias), of a layer of any variant; k and v of every query head."""
    c, attn = model.config, model.h[number].attn
    if alias == "kqv":
        parts = attn.c_attn.weight.chunk(3), attn.c_attn.bias.chunk(3)
        return list(zip(*parts, strict=True))
    q = (attn.c_q.weight, attn.c_q.bias)
    kv = attn.c_k if hasattr(attn, "c_k") else attn.c_kv
    halves = 2 if VARIANTS[alias]["cached"] == ["k", "v"] else 1
    weights, biases = kv.weight.chunk(halves), kv.bias.chunk(halves)
    shared = c.n_head // (c.n_kv_groups or c.n_head)
    repeated = []
    for weight, bias in zip(weights, biases, strict=True):
        weight = weight.unflatten(0, (-1, c.n_embd // c.n_head)).repeat_interleave(shared, 0).flatten(0, 1)
        bias = bias.unflatten(0, (-1, c.n_embd // c.n_head)).repeat_interleave(shared, 0).flatten()
        repeated.append((weight, bias))
    return [q, repeated[0], repeated[-1]]


def in_transformers(alias, model):
    """transformers' GPT-2 with the weights of a model of any variant."""
    qkv = build("kqv", **{key: getattr(model.config, key) for key in SHAPE})
    weights = {name: w for name, w in model.state_dict().items() if name in qkv.state_dict()}
    for number in range(model.config.n_layer):
        parts = split_projections(alias, model, number)
        weights[f"h.{number}.attn.c_attn.weight"] = torch.cat([weight for weight, _ in parts])
        weights[f"h.{number}.attn.c_attn.bias"] = torch.cat([bias for _, bias in parts])
    qkv.load_state_dict(weights)
    return gpt2_of(qkv)


def random_loader(vocab_size=257, T=32, n_rows=24, seed=0):
    """Rows as get_dataloader gives them."""
    rows = torch.from_numpy(np.random.default_rng(seed).integers(0, vocab_size, (n_rows, 1, T)))
    return Loader([(row, torch.ones_like(row, dtype=torch.bool)) for row in rows])


class Loader(list):
    @property
    def dataset(self):
        return self


def converted(alias, model, to, loader=None, n_kv_groups=None, convert=cc.convert, **options):
    """The model that convert makes, and the energy left out of its layers. The source is used up."""
    script = script_of(to)
    config = cc.target_config(alias, model.config, to, n_kv_groups)
    weights, left_out, _ = convert(model, to, config, loader or random_loader(), **options)
    target = getattr(script, VARIANTS[to]["class"])(config).eval()
    target.load_state_dict(weights)
    return target, left_out


def logits_of(model, seed=1, T=32):
    input_ids = torch.randint(model.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model(input_ids)
    return logits.logits if hasattr(logits, "logits") else logits[0]


def tie_values(model, seed=0):
    """Makes every value an invertible map of its key and a constant: V = B K + c, in every head."""
    c, generator = model.config, torch.Generator().manual_seed(seed)
    head_dim, width = c.n_embd // c.n_head, (c.n_kv_groups or c.n_head) * (c.n_embd // c.n_head)
    with torch.no_grad():
        for block in model.h:
            projection = block.attn.c_attn if hasattr(block.attn, "c_attn") else block.attn.c_kv
            weight, bias = projection.weight[-2 * width :], projection.bias[-2 * width :]
            for start in range(0, width, head_dim):
                key, value = slice(start, start + head_dim), slice(width + start, width + start + head_dim)
                B = torch.eye(head_dim) + 0.5 * torch.randn(head_dim, head_dim, generator=generator)
                weight[value] = B @ weight[key]
                bias[value] = B @ bias[key] + torch.randn(head_dim, generator=generator)


# ---- exactness


@pytest.mark.parametrize(("alias", "to"), PAIRS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    seed=st.integers(0, 2**31),
    heads=st.sampled_from([(2, 1), (4, 2), (4, 4), (6, 3)]),
    head_dim=st.sampled_from([4, 8, 12]),
)
def test_values_that_are_functions_of_the_keys_convert_exactly(alias, to, seed, heads, head_dim):
    n_head, groups = heads
    groups = {"kqv": None, "gqa": groups, "mqa": 1}[alias]
    shape = {"n_embd": n_head * head_dim, "n_head": n_head, "n_kv_groups": groups}
    model = build(alias, seed, initializer_range=0.1, **shape)
    tie_values(model, seed)
    expected = logits_of(in_transformers(alias, model))
    target, left_out = converted(alias, model, to)
    assert max(left_out) < 1e-9
    assert (logits_of(target) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("weighting", other_conversions.WEIGHTINGS)
def test_a_head_with_constant_keys_and_values_converts_exactly(weighting):
    model = build("kqv", n_layer=1)
    tie_values(model)
    head = slice(8, 16)
    with torch.no_grad():
        for part in model.h[0].attn.c_attn.weight.chunk(3)[1:]:
            part[head] = 0
    before = logits_of(model)
    result, _ = converted("kqv", model, "kv", convert=other_conversions.convert, weighting=weighting)
    assert (logits_of(result) - before).abs().max() < 1e-3


@pytest.mark.parametrize(("alias", "to"), PAIRS)
def test_keys_and_values_of_a_joint_rank_that_fits_a_head_convert_exactly(alias, to):
    """Keys and values with nothing in common, of half of the joint rank each: exact from rank head_dim, 8, down."""
    errors = []
    for joint_rank in (16, 12, 10, 8, 4):
        model = build(alias, initializer_range=0.1)
        width = (model.config.n_kv_groups or model.config.n_head) * 8
        with torch.no_grad():
            for block in model.h:
                projection = block.attn.c_attn if alias == "kqv" else block.attn.c_kv
                for rows in projection.weight[-2 * width :].split(8):  # the keys or the values of a head
                    U, S, V = torch.linalg.svd(rows, full_matrices=False)
                    rows.copy_(U[:, : joint_rank // 2] * S[: joint_rank // 2] @ V[: joint_rank // 2])
        expected = logits_of(in_transformers(alias, model))
        target, _ = converted(alias, model, to)
        errors.append(float((logits_of(target) - expected).abs().max() / expected.abs().max()))
    assert errors[0] > errors[1] > errors[2] > 1e-3
    assert max(errors[3:]) < 1e-4


@pytest.mark.parametrize(("n_head", "groups"), [(16, 4), (32, 8), (12, 4), (6, 2), (3, 1)])
def test_qkv_gets_the_paper_s_kv_heads_if_none_are_asked_for(n_head, groups):
    config = script_of("kqv").ModelConfig(n_embd=8 * n_head, n_layer=1, n_head=n_head)
    for to in ("gqa", "qgqa"):
        assert cc.target_config("kqv", config, to, None).n_kv_groups == groups


# ---- which directions: against numpy


def covariance_like(rng, n, rank, decay=0.5):
    factor = rng.standard_normal((n, rank)) * decay ** np.arange(rank)
    return factor @ factor.T


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(2, 12), data=st.data())
def test_joint_svd_leaves_out_the_smallest_singular_values_in_the_metric(seed, n, data):
    rng = np.random.default_rng(seed)
    rank, joint_rank = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    covariance, metric = covariance_like(rng, n, joint_rank), covariance_like(rng, n, n, 0.9)
    down, up = (x.numpy() for x in cc.joint_svd(torch.from_numpy(covariance), torch.from_numpy(metric), rank))
    assert down.shape == (rank, n) and up.shape == (n, rank)

    # Eckart and Young: the singular values of the unsquared factors, from numpy
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0))
    best = np.square(np.linalg.svd(np.linalg.cholesky(metric).T @ root, compute_uv=False))
    rest = np.eye(n) - up @ down
    error = np.trace(metric @ rest @ covariance @ rest.T)
    assert error == pytest.approx(best[rank:].sum(), abs=1e-5 * best.sum())
    if rank >= joint_rank:
        assert error < 1e-5 * best.sum()


def test_the_gradients_and_covariances_are_those_of_transformers():
    """Moments of QKV from the outputs of GPT-2's c_attn and the gradients that autograd leaves there.

    A position counts with its squared gradient and a tenth of the row's mean.
    """
    model, loader = build("kqv", initializer_range=0.1), random_loader(n_rows=5)
    gpt2 = gpt2_of(model)
    outputs = []
    for block in gpt2.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    kv, gradients = [[], []], [[], []]
    for input_ids, _ in loader:
        outputs.clear()
        loss = gpt2(input_ids, labels=input_ids).loss * (input_ids.shape[1] - 1)  # of the sum, not the mean
        for number, gradient in enumerate(torch.autograd.grad(loss, outputs)):
            kv[number].append(outputs[number][0].detach().double().numpy()[:, 32:])
            gradients[number].append(gradient[0].double().numpy()[:, 32:])

    heads = cc.Heads(model.config, 4, caches_values=False)
    moments = [cc.Moments(heads) for _ in model.h]
    assert cc.collect_moments(model, moments, loader, 5 * 32) == 5 * 32
    for number, sums in enumerate(moments):
        u, g = np.concatenate(kv[number]), np.concatenate(gradients[number])
        for head in range(4):
            own = [*range(8 * head, 8 * head + 8), *range(32 + 8 * head, 40 + 8 * head)]  # its key, its value
            squares = np.square(g[:, own]).sum(1).reshape(5, 32)
            weights = (squares + squares.mean(1, keepdims=True) / 10).flatten()
            covariance = np.cov(u[:, own].T, aweights=weights, ddof=0)
            tolerance = 1e-3 * covariance.max()
            np.testing.assert_allclose(sums.covariance()[head], covariance, rtol=1e-3, atol=tolerance)
            fisher = g[:, own].T @ g[:, own]
            np.testing.assert_allclose(sums.fisher[head], fisher, rtol=1e-3, atol=1e-3 * fisher.max())
            mean = np.average(u[:, own], axis=0, weights=weights)
            np.testing.assert_allclose(sums.mean()[head], mean, rtol=1e-3, atol=1e-3)


def test_the_activation_metric_is_that_of_queries_and_output():
    """GQA: two query heads share a KV head, so that their costs add up."""
    model, loader = build("gqa"), random_loader(n_rows=3)
    heads = cc.Heads(model.config, 2, caches_values=False)
    attention = cc.AttentionWeights(model.state_dict(), 0, heads)
    with torch.no_grad():
        x = torch.cat([model.wte(ids) + model.wpe.weight for ids, _ in loader]).flatten(0, 1)
        q = model.h[0].attn.c_q(model.h[0].ln_1(x)).double().numpy().reshape(-1, 4, 8)
    output = model.h[0].attn.c_proj.weight.detach().double().numpy().reshape(32, 4, 8)
    moments = [cc.Moments(heads) for _ in model.h]
    cc.collect_moments(model, moments, loader, 96)
    metric = moments[0].activation_metric(attention).numpy()
    for group, members in enumerate([(0, 1), (2, 3)]):
        scores = sum(np.einsum("na,nb->ab", q[:, i], q[:, i]) / len(q) / 8 for i in members)
        outputs = sum(output[:, i].T @ output[:, i] for i in members)
        np.testing.assert_allclose(metric[group, :8, :8], scores, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(metric[group, 8:, 8:], outputs, rtol=1e-6)
        assert not metric[group, :8, 8:].any()


@pytest.mark.parametrize("size", [5, 40])
def test_a_head_that_rests_on_the_first_position_stays_there(size):
    """Nearly all of its attention goes there, so that no other key has a gradient worth the name."""
    model = build("kqv", n_layer=1, initializer_range=0.1)
    attn = model.h[0].attn
    with torch.no_grad():
        model.wpe.weight *= 0.3
        model.wpe.weight[0, :2] += torch.tensor([20.0, -20.0])
        attn.c_attn.weight[:8] = 0  # every query of the head is the same,
        attn.c_attn.bias[:8] = 0
        attn.c_attn.bias[0] = size
        attn.c_attn.weight[32] = 0  # and its keys find the first position
        attn.c_attn.weight[32, :2] = torch.tensor([1.0, -1.0])
    input_ids = torch.randint(257, (1, 32), generator=torch.Generator().manual_seed(9))
    assert attention_to_the_first("kqv", model, input_ids) > 0.999
    result, _ = converted("kqv", model, "kv", loader=random_loader(n_rows=100), n_tokens=3200)
    assert attention_to_the_first("kv", result, input_ids) > 0.99


@torch.no_grad()
def attention_to_the_first(alias, model, input_ids, number=0):
    """The mean over positions of how much head 0 of a layer attends to position 0."""
    ((x,),) = cc.inputs_of([model.h[number].attn], model, input_ids)
    q, k = ((x @ weight.T + bias)[:, :8] for weight, bias in split_projections(alias, model, number)[:2])
    scores = (q @ k.T / 8**0.5).masked_fill(torch.ones(32, 32).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)[1:, 0].mean()


def test_padding_is_no_text():
    """Whatever stands behind the text of a row changes nothing."""
    heads = cc.Heads(build("kqv").config, 4, caches_values=False)
    found = []
    for filler in (0, 200):
        rows = random_loader(n_rows=6)
        padded = []
        for n, (input_ids, _) in enumerate(rows, start=20):
            is_text = torch.arange(32)[None] < n
            padded.append((input_ids.masked_fill(~is_text, filler), is_text))
        found.append([cc.Moments(heads) for _ in range(2)])
        assert cc.collect_moments(build("kqv"), found[-1], Loader(padded), 10_000) == sum(range(20, 26))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.second, other.second, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.fisher, other.fisher, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.queries, other.queries, rtol=1e-4, atol=1e-6)


# ---- runs/other_conversions.py: the plain ways, literally


def test_drop_v_leaves_queries_keys_and_output_alone():
    model = build("kqv")
    (q, k, _), attn = split_projections("kqv", model, 1), model.h[1].attn
    expected = {"c_q": q, "c_k": k, "c_proj": (attn.c_proj.weight, attn.c_proj.bias)}
    expected = {name: [tensor.detach().clone() for tensor in pair] for name, pair in expected.items()}
    target, _ = converted("kqv", model, "kv", convert=other_conversions.convert, method="drop_v")
    for name, pair in expected.items():
        projection = getattr(target.h[1].attn, name)
        torch.testing.assert_close([projection.weight.data, projection.bias.data], pair)


def test_mean_from_qkv_to_gqa_is_the_mean_over_the_heads_of_a_group():
    """As Ainslie et al. (2023) start the training of GQA from a model with full heads."""
    model = build("kqv")
    _, (k, k_bias), (v, _) = split_projections("kqv", model, 1)
    expected = torch.cat([part.unflatten(0, (2, 2, 8)).mean(1).flatten(0, 1) for part in (k, v)]).clone()
    bias = k_bias.unflatten(0, (2, 2, 8)).mean(1).flatten().clone()
    target, _ = converted("kqv", model, "gqa", None, 2, other_conversions.convert, method="mean")
    torch.testing.assert_close(target.h[1].attn.c_kv.weight, expected)
    torch.testing.assert_close(target.h[1].attn.c_kv.bias[:16], bias)


@pytest.mark.parametrize(("alias", "to"), PAIRS)
def test_the_joint_svd_is_closer_than_the_plain_ways(alias, to):
    expected = logits_of(build(alias, initializer_range=0.1))
    errors = {}
    for method in ("joint_svd", "drop_v", "mean"):
        model = build(alias, initializer_range=0.1)
        target, left_out = converted(alias, model, to, convert=other_conversions.convert, method=method)
        errors[method] = float((logits_of(target) - expected).square().mean()), max(left_out)
    for method in ("drop_v", "mean"):
        assert errors["joint_svd"][0] < 0.8 * errors[method][0]
        assert errors["joint_svd"][1] < errors[method][1]


# ---- the command


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A function that gives the path of a checkpoint of a variant."""
    folder, paths = tmp_path_factory.mktemp("sources"), {}

    def path_of(alias):
        if alias not in paths:
            paths[alias] = save(alias, build(alias, initializer_range=0.1), folder / f"{alias}.pt")
        return paths[alias]

    return path_of


@pytest.mark.parametrize(("alias", "to"), ALL)
def test_every_target_s_script_loads_what_is_written(alias, to, source, data_dir, tmp_path, capsys):
    output = tmp_path / "new" / f"{to}.pt"
    groups = ["--n_kv_groups", "2"] if to in ("gqa", "qgqa") else []
    cc.main([
        "--checkpoint", str(source(alias)), "--to", to, "--output", str(output), "--tokens", "2000",
        "--data", str(data_dir / "train"), "--val_data", str(data_dir / "validation"), *groups,
    ])  # fmt: skip
    contents = torch.load(output, weights_only=True)
    assert contents["variant"] == script_of(to).VARIANT and contents["step"] == 0
    about = contents["converted_from"]
    assert about["variant"] == script_of(alias).VARIANT and about["source"] == f"{alias}.pt"
    assert about["method"] == "joint_svd" and about["weighting"] == "gradient"
    assert 2000 <= about["calibration_tokens"] < 2032
    assert len(about["energy_left_out"]) == 2
    assert [path.name for path in output.parent.iterdir()] == [output.name]  # and no temporary file

    # It is the model that it says: transformers gives the same logits.
    model = script_of(to).load_model(output)
    assert type(model).__name__ == VARIANTS[to]["class"]
    torch.testing.assert_close(logits_of(in_transformers(to, model)), logits_of(model), rtol=1e-3, atol=1e-3)
    printed = capsys.readouterr().out
    c = model.config
    n_cached = len(VARIANTS[to]["cached"]) * (c.n_kv_groups or c.n_head)
    assert f"{n_cached * 8 * 2 * 2:,} after" in printed  # heads of width 8 in bf16, two layers
    for share in about["energy_left_out"]:
        assert f"{share:.3%} of the energy" in printed


@pytest.mark.parametrize(("alias", "to"), PAIRS)
def test_a_released_checkpoint_does_not_name_its_variant(alias, to, data_dir, tmp_path):
    """Names with DDP's prefix, a mask in every layer, no entry for the variant."""
    model = build(alias, initializer_range=0.1)
    contents = torch.load(save(alias, model, tmp_path / "ours.pt", train_config={"sequence": "padded"}))
    weights = {f"module.{name}": w for name, w in model.state_dict().items()}
    weights |= {f"module.h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    contents |= {"model_state_dict": weights, "train_config": {"batch_size": 6}}
    torch.save({key: value for key, value in contents.items() if key != "variant"}, tmp_path / "released.pt")
    found = {}
    for name in ("ours.pt", "released.pt"):
        given = ["--checkpoint", tmp_path / name, "--to", to, "--output", tmp_path / "o.pt", "--tokens", 1000]
        cc.main([str(each) for each in (*given, "--data", data_dir / "train")])
        found[name] = torch.load(tmp_path / "o.pt", weights_only=True)
    assert found["released.pt"]["init_from"] == "released.pt" and "init_from" not in found["ours.pt"]
    assert len({each["converted_from"]["variant"] for each in found.values()}) == 1
    one, other = (each["model_state_dict"] for each in found.values())
    torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_a_run_is_converted_and_trained_on(data, data_dir, tmp_path, capsys):
    """Nothing in its checkpoint is made up for this test; its vocabulary is padded beyond the tokenizer's."""
    script_of("kqv").main(arguments(data, tmp_path / "kqv", "vocab_size=320"))
    checkpoint, output = tmp_path / "kqv/final_model.pt", tmp_path / "kv.pt"
    splits = ["--data", str(data_dir / "train"), "--val_data", str(data_dir / "validation")]
    cc.main(["--checkpoint", str(checkpoint), "--to", "kv", "--output", str(output), *splits])
    printed = re.search(r"text perplexity: ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out)
    recorded = script_of("kqv").read_checkpoint(checkpoint)["tokenizer"]
    assert script_of("kv").read_checkpoint(output)["tokenizer"] == recorded
    more = ["vocab_size=320", "target_tokens=512", "warmup_steps=1", f"--init_from={output}"]
    script_of("kv").main(arguments(data, tmp_path / "kv", *more))
    last = metrics(tmp_path / "kqv")[-1]
    first = next(record for record in metrics(tmp_path / "kv") if record["kind"] == "val")
    assert (last["kind"], first["step"]) == ("final", 0)
    expected = last["text_perplexity"], first["text_perplexity"]
    assert [float(value) for value in printed.groups()] == pytest.approx(expected, rel=1e-4)


def test_calibration_reads_the_rows_that_the_model_was_trained_on(data_dir):
    """Padded rows of 24 where the checkpoint says so; packed and full where it does not."""
    config = SimpleNamespace(vocab_size=257, n_positions=32)
    recorded = {"train_config": {"sequence": "padded", "seq_length": 24}}
    loader = cc.open_data(data_dir / "train", recorded, config)
    assert (loader.dataset.packed, loader.dataset.seq_length) == (False, 24)
    loader = cc.open_data(data_dir / "train", {}, config, batch_tokens=100)
    assert (loader.dataset.packed, loader.dataset.seq_length) == (True, 32)
    assert next(iter(loader))[0].shape == (3, 32)


# ---- GPT-2


@pytest.fixture(scope="module", params=["gelu", "gelu_new"])
def gpt2(request, tmp_path_factory):
    """A folder with a random GPT-2 of transformers, and the model."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "n_positions": 48, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40}
    others = {"initializer_range": 0.3, "bos_token_id": 256, "eos_token_id": 256}
    config = GPT2Config(**shape, **others, activation_function=request.param)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder, model


def test_a_gpt2_becomes_qkv(gpt2, data_dir, tmp_path, capsys):
    """With the exact GELU its logits are transformers'; with gelu_new the perplexities differ."""
    folder, theirs = gpt2
    output = tmp_path / "kqv.pt"
    validation = data_dir / "validation"
    cc.main(["--from_gpt2", str(folder), "--output", str(output), "--val_data", str(validation)])
    ours = script_of("kqv").load_model(output)
    assert ours.config.n_inner == 40 and ours.config.vocab_size == 257
    difference = (logits_of(ours) - logits_of(theirs)).abs().max()
    if theirs.config.activation_function == "gelu":
        assert difference < 1e-4
    else:
        assert difference > 1e-4  # or the test would not see the activation

    # transformers' perplexity over the same rows, with its own loss, row by row
    loader = script_of("kqv").get_dataloader(validation, 1, 48, "packed")
    nats, n = 0.0, 0
    for input_ids, is_text in loader:
        row = input_ids[:, : is_text.sum()]
        with torch.no_grad():
            nats += theirs(row, labels=row).loss.item() * (row.shape[1] - 1)
        n += row.shape[1] - 1
    expected = script_of("kqv").evaluate(ours, loader)["text_perplexity"]
    printed = capsys.readouterr().out
    assert "does not say which tokenizer it was trained with" in printed
    found = re.search(r"([\d.]+) in transformers, ([\d.]+) in QKV", printed)
    assert float(found[1]) == pytest.approx(np.exp(nats / n), rel=1e-4)
    assert float(found[2]) == pytest.approx(expected, rel=1e-4)


def test_a_gpt2_becomes_q_k_v_in_one_go(gpt2, data_dir, tmp_path):
    folder, _ = gpt2
    convert = ["--to", "kv", "--data", str(data_dir / "train"), "--tokens", "2000"]
    cc.main(["--from_gpt2", str(folder), "--output", str(tmp_path / "kqv.pt")])
    cc.main(["--checkpoint", str(tmp_path / "kqv.pt"), "--output", str(tmp_path / "two_steps.pt"), *convert])
    cc.main(["--from_gpt2", str(folder), "--output", str(tmp_path / "one_step.pt"), *convert])
    names = ("one_step.pt", "two_steps.pt")
    one, other = (script_of("kv").load_model(tmp_path / name).state_dict() for name in names)
    assert all(torch.equal(one[name], other[name]) for name in one)


def trained_tokenizer(texts):
    """A byte-level BPE, as people train one for a GPT-2 of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=270, **options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture
def own_gpt2(tmp_path):
    """A folder with a GPT-2 and its tokenizer, and data that were encoded with it."""
    folder = tmp_path / "own"
    shape = {"vocab_size": 271, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)
    tokenizer = trained_tokenizer(SENTENCES)
    tokenizer.save_pretrained(folder)
    same = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}  # it adds no token
    (tmp_path / "own.json").write_text(json.dumps(same))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES))
    dataset_download.main([
        "--source", str(tmp_path / "texts.jsonl"), "--tokenizer", str(tmp_path / "own.json"),
        "--target_tokens", "1e5", "--validation_tokens", "500", "--output_dir", str(tmp_path / "data"),
    ])  # fmt: skip
    return folder, tokenizer


def convert_gpt2(folder, tmp_path):
    arguments = ["--from_gpt2", folder, "--to", "kv", "--output", tmp_path / "kv.pt", "--tokens", "2000"]
    cc.main([str(argument) for argument in (*arguments, "--data", tmp_path / "data/train")])
    return tmp_path / "kv.pt"


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_the_export_of_a_converted_gpt2_has_the_gpt2_s_own_tokenizer(form, own_gpt2, tmp_path):
    folder, tokenizer = own_gpt2
    if form == "vocab.json":  # as old folders have it
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": 270}))
        (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    else:
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.save_pretrained(folder)
    export_hf.export("kv", convert_gpt2(folder, tmp_path), tmp_path / "hf", None)
    shipped = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for text in ("Document 7 says <|endoftext|>", "  na\u00efve\n", SENTENCES[9]):
        assert shipped(text).input_ids == tokenizer(text).input_ids
    assert shipped.eos_token_id == 270 and shipped.chat_template == tokenizer.chat_template


def test_data_of_another_tokenizer_than_the_gpt2_s_own_are_refused(own_gpt2, tmp_path, capsys):
    """Its tokenizer may differ in the ranks, or in what it does before it looks them up."""
    folder, tokenizer = own_gpt2
    lower, spaced = trained_tokenizer(SENTENCES), trained_tokenizer(SENTENCES)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for other in (trained_tokenizer(["alpha" * 3, "beta" * 3, "gamma" * 3] * 9), lower, spaced):
        other.save_pretrained(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            convert_gpt2(folder, tmp_path)
        assert "data of another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "kv.pt").exists()


# ---- errors


def fails(capsys, **given):
    """The one line on stderr of a command that ends with exit status 2; None leaves an argument out."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cc.main([f"--{key}={value}" for key, value in given.items() if value is not None])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.fixture
def refused(capsys, source, data_dir, tmp_path):
    """A function that runs a conversion of QKV with changed arguments, and gives the line it ends with."""

    def run(**changes):
        usual = {"checkpoint": source("kqv"), "to": "kv", "data": data_dir / "train"}
        line = fails(capsys, **usual | {"output": tmp_path / "o.pt", "tokens": 500} | changes)
        assert not (tmp_path / "o.pt").exists() and not (tmp_path / "o.pt.tmp").exists()
        return line

    return run


def test_what_does_not_go_together_is_refused(refused, source, tmp_path):
    assert "--data: missing" in refused(data=None)
    assert "expected one of kv, gqa, mqa, qgqa, qmqa" in refused(to=None)
    assert "a GPT-2 alone can become QKV" in refused(to="kqv")
    assert "GQA can become qgqa, mqa, qmqa" in refused(checkpoint=source("gqa"))
    assert "--device fpga: " in refused(device="fpga")
    assert "divisor of the source's 4 KV heads" in refused(to="qgqa", n_kv_groups=3)
    assert "meant for gqa and qgqa" in refused(n_kv_groups=2)
    assert "would overwrite" in refused(output=source("kqv"))
    assert "a folder" in refused(output=tmp_path)
    assert "no complete token files" in refused(data=tmp_path)


def test_checkpoints_of_no_use_are_refused(refused, tmp_path, source):
    assert "missing.pt" in refused(checkpoint="missing.pt", output=tmp_path / "new/o.pt")
    assert not (tmp_path / "new").exists()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(source("kqv").read_bytes()[:-1000])
    assert "cut.pt: not a whole checkpoint" in refused(checkpoint=cut)
    for alias in ("kv", "qk", "qgqa"):
        line = refused(checkpoint=save(alias, build(alias), tmp_path / f"{alias}.pt"))
        assert f"variant {script_of(alias).VARIANT}; expected one of KQV, GQA, MQA" in line
    for factor, said in ((torch.nan, "h.0.mlp.c_proj.weight holds values"), (1e38, "overflow on the data")):
        model = build("kqv")
        model.h[0].mlp.c_proj.weight.data *= factor
        assert said in refused(checkpoint=save("kqv", model, tmp_path / "large.pt"))


def test_data_of_another_vocabulary_is_refused(refused, tmp_path):
    small = save("kqv", build("kqv", vocab_size=100), tmp_path / "small.pt")
    assert "another tokenizer: the tokenizer bytes, sha256" in refused(checkpoint=small)
    by_name, by_content = {"name": "gpt2", "sha256": None}, {"name": "bytes", "sha256": "0123456789"}
    for recorded, said in (("gpt2", "gpt2"), (by_name, "gpt2"), (by_content, "bytes, sha256 01234567")):
        other = save("kqv", build("kqv"), tmp_path / "other.pt", tokenizer=recorded)
        assert f"and the tokenizer {said}" in refused(checkpoint=other)


def test_a_sample_that_is_too_small_or_too_uniform_is_refused(refused, tmp_path):
    wide = save("kqv", build("kqv", n_embd=64, n_head=1), tmp_path / "wide.pt")
    assert "tells 31 of 63 directions" in refused(checkpoint=wide, tokens=32)  # one of each is the mean
    prepare(tmp_path / "uniform", ["a" * 40] * 30, validation_tokens=0)
    model = build("kqv")
    model.wpe.weight.data.zero_()  # else every position is another input
    uniform = save("kqv", model, tmp_path / "uniform.pt")
    line = refused(checkpoint=uniform, data=tmp_path / "uniform/data/train")
    assert re.search(r"layer 0: rank-deficient covariance: the calibration sample tells \d of 16 dir", line)
    prepare(tmp_path / "short", ["a"] * 30, validation_tokens=0)
    padded = save("kqv", build("kqv"), tmp_path / "padded.pt", train_config={"sequence": "padded"})
    assert "no text of two tokens" in refused(checkpoint=padded, data=tmp_path / "short/data/train")


def test_a_gpt2_that_qkv_cannot_be_is_refused(capsys, tmp_path, gpt2):
    folder, model = gpt2
    output = tmp_path / "converted/o.pt"
    assert "not for kqv" in fails(capsys, from_gpt2=folder, n_kv_groups=2, output=output)
    model.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"model_type": "llama"}, "model_type is llama, expected gpt2"),
        ({"activation_function": "relu"}, "activation_function is relu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_layer": 3}, "missing keys: transformer.h.2."),
        ({"resid_pdrop": 1.0}, "dropout"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        assert said in fails(capsys, from_gpt2=tmp_path, output=output)
    assert not output.parent.exists()


def test_an_output_that_cannot_be_written_is_seen_before_the_work(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(cc, "collect_moments", None)
    (tmp_path / "file").touch()
    assert "file" in refused(output=tmp_path / "file/o.pt")
    monkeypatch.setattr(cc.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "takes up to" in refused()
