"""A trained model -> one with a smaller KV cache, without training: QKV to Q–K=V, GQA to Q-GQA, MQA to Q-MQA.

    python convert_checkpoint.py --checkpoint outputs_kqv/final_model.pt --to kv --output as_kv.pt \\
        --data slimpajama_data/train --val_data slimpajama_data/validation
    python convert_checkpoint.py --from_gpt2 FOLDER --to kv --output gpt2_kv.pt --data DIR --val_data DIR
    python transformer_KV_1_300_M.py --init_from as_kv.pt --output_dir trained_on learning_rate=4e-5

The scores see a key only through the query, and the output sees a value only through c_proj. So in place of
both, a head may keep s = D (u - mean) of u = [k; v], as long as u is about U s + mean. With A and B the rows
of U for key and value, A goes into the query projection (A^T q in place of q), B into the output projection
(W_O B in place of W_O). The mean costs nothing: a constant in every key drops out of the softmax, and the
attention weights of a row sum to one, so a constant in every value moves into the bias of c_proj. What is
left to choose is which head_dim of the 2 head_dim dimensions of [k; v] to keep: by a singular value
decomposition of both together, in the metric of what an error costs.

Where a KV head of the target takes the place of several (kqv to gqa, mqa, qgqa, qmqa; gqa to mqa, qmqa), the
same algebra goes over the keys and values of all of them. That leaves out far more, so train on afterwards.
The matrices of the calibration grow with the square of the width that is put together, to 1.3 GB for kqv to
qmqa at 300M and 5.9 GB at 1.2B.

With rotary positions A would have to commute with the rotations. These models have learned positions.

Contents: algebra, calibration, reading models, converting, command line.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (  # isort: skip
    VARIANTS, InputError, Parser, cache_bytes, open_checkpoint, report, script_of,
    show_what_the_terminal_can, write_atomically,
)  # fmt: skip

TARGETS = {  # what each variant can become
    "kqv": ("kv", "gqa", "mqa", "qgqa", "qmqa"),
    "gqa": ("qgqa", "mqa", "qmqa"),
    "mqa": ("qmqa",),
}
SCRIPTS = {alias: script_of(alias) for alias in ("kqv", *TARGETS["kqv"])}
TINY = 1e-200  # stands in for a zero divisor


# -----------------------------------------------------------------------------
# Algebra: which numbers to keep, and how the projections around them absorb the rest


def joint_svd(covariance, metric, rank):
    """D [..., rank, n] and U [..., n, rank]: the best numbers s = D u to keep of u [n], and u about U s.

    With covariance and metric [..., n, n] they minimise E[e^T metric e] for the error e = u - U s: D holds
    the leading singular directions of metric^1/2 covariance^1/2 (Eckart and Young), U a least-squares fit.
    """
    n = metric.shape[-1]
    size = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = 1e-6 * torch.eye(n, dtype=metric.dtype)  # among directions of no cost, energy decides
    root = square_root(metric / size.clamp(min=TINY) + ridge)
    energy, directions = torch.linalg.eigh(root @ covariance @ root)  # in rising order
    energy = energy[..., -rank:].flip(-1)
    down = directions[..., -rank:].flip(-1).mT @ root
    # A direction without energy is a constant, and the mean takes care of it.
    has_energy = energy > 1e-13 * energy[..., :1]
    inverse = torch.where(has_energy, 1 / energy.where(has_energy, 1.0), 0.0)
    up = covariance @ down.mT * inverse[..., None, :]
    return down, up


def square_root(matrix):
    """The symmetric square root of positive semidefinite matrices [..., n, n]."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt()[..., None, :] @ vectors.mT


class Heads:
    """Which heads of the source each cached head of the target stands for.

    blocks is int64 [blocks, heads]; the key of KV head i has the number i, its value n_kv_head + i. A target
    that caches no values has a block for each of its KV heads, of keys and then values. One that caches
    values has a block for each head of its keys and, behind those, one for each head of its values.
    """

    def __init__(self, config, target_heads, caches_values):
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_groups or config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.kv_width = 2 * self.n_kv_head * self.head_dim  # keys and values of all KV heads
        numbers = torch.arange(2 * self.n_kv_head).view(2, target_heads, -1)
        self.blocks = numbers.flatten(0, 1) if caches_values else numbers.transpose(0, 1).flatten(1)

    def by_block(self, kv):
        """Keys and values as the projection gives them, [..., kv_width] -> [..., blocks, n]."""
        heads = kv.unflatten(-1, (2 * self.n_kv_head, self.head_dim))
        return heads[..., self.blocks, :].flatten(-2)

    def by_query_head(self, by_block):
        """[blocks, n, ...] -> two [n_head, head_dim, ...]: for the key and the value of each query head."""
        heads = by_block.unflatten(1, (-1, self.head_dim)).flatten(0, 1)
        heads = heads[self.blocks.flatten().argsort()]  # in the order of the projection again
        return heads.repeat_interleave(self.n_head // self.n_kv_head, dim=0).chunk(2)


class AttentionWeights:
    """The weights of one layer of the source in fp64, by heads and blocks."""

    def __init__(self, weights, number, heads):
        prefix = f"h.{number}.attn"
        # In c_attn the queries come first; keys and values are the last outputs of c_attn, and all of c_kv.
        fused = f"{prefix}.c_attn.weight" in weights
        q, kv = ("c_attn", "c_attn") if fused else ("c_q", "c_kv")
        C, kv_width = heads.n_head * heads.head_dim, heads.kv_width
        by_head = (heads.n_head, heads.head_dim)
        q_weight = weights[f"{prefix}.{q}.weight"][:C].double()
        self.q_weight = q_weight.unflatten(0, by_head)  # [n_head, head_dim, C]
        self.q_bias = weights[f"{prefix}.{q}.bias"][:C].double().unflatten(0, by_head)
        kv_weight = weights[f"{prefix}.{kv}.weight"][-kv_width:].double()
        self.kv_weight = heads.by_block(kv_weight.T).permute(1, 2, 0)  # [blocks, n, C]
        self.kv_bias = heads.by_block(weights[f"{prefix}.{kv}.bias"][-kv_width:].double())  # [blocks, n]
        output = weights[f"{prefix}.c_proj.weight"].double()
        self.output = output.unflatten(1, by_head).transpose(0, 1)  # [n_head, C, head_dim]
        self.output_bias = weights[f"{prefix}.c_proj.bias"].double()


def absorb(attention, heads, down, up, mean, key_name):
    """The target's attention in fp32, for s = down (u - mean) with keys and values u about up s + mean."""
    A, B = heads.by_query_head(up)
    _, value_mean = heads.by_query_head(mean)
    tensors = {
        "c_q.weight": (A.mT @ attention.q_weight).flatten(0, 1),
        "c_q.bias": (A.mT @ attention.q_bias[..., None]).flatten(),
        f"{key_name}.weight": (down @ attention.kv_weight).flatten(0, 1),
        f"{key_name}.bias": (down @ (attention.kv_bias - mean)[..., None]).flatten(),
        "c_proj.weight": (attention.output @ B).transpose(0, 1).flatten(1),
        "c_proj.bias": attention.output_bias + (attention.output @ value_mean[..., None]).sum(dim=(0, 2)),
    }
    return {name: tensor.float() for name, tensor in tensors.items()}


def even_rows(attention, down, up):
    """The same numbers, scaled: the rows of the new projection have the size of those whose place they take.

    This changes nothing but how training continues: AdamW takes steps of the same size everywhere, and got
    further with even rows than with numbers of unit variance, or rotated to resemble the old keys.
    """
    old, new = attention.kv_weight, down @ attention.kv_weight
    old = old.square().mean(dim=(1, 2))[:, None, None]  # 0 in a head whose keys and values are constant
    size = (old / new.square().mean(-1, keepdim=True).clamp(min=TINY)).sqrt()
    return down * size, torch.where(old > 0, up / size.mT.clamp(min=TINY), 0.0)


# -----------------------------------------------------------------------------
# Calibration: what the keys and values of each layer do on a sample of the training data


class Moments:
    """Mean, covariance and metric of the keys and values of one layer, by blocks, out of sums over positions.

    With g the gradient of the loss with respect to the keys and values of a position, the metric is E[g g^T],
    the empirical Fisher information, and a position counts with |g|^2. Where nothing looks there is no
    gradient, as at most positions of a head that rests on the first one; yet a key that is badly kept there
    would draw attention. So a tenth of what an error changes next is added, by energy: q e / sqrt(head_dim)
    in a score, W_O e in the output. And to the weight of each position, a tenth of its row's mean.
    """

    def __init__(self, heads):
        self.heads = heads
        n_blocks, n = len(heads.blocks), heads.blocks.shape[1] * heads.head_dim
        self.n_positions = 0
        self.weight = torch.zeros(n_blocks, dtype=torch.float64)
        self.first = torch.zeros(n_blocks, n, dtype=torch.float64)
        self.second = torch.zeros(n_blocks, n, n, dtype=torch.float64)
        self.fisher = torch.zeros(n_blocks, n, n, dtype=torch.float64)
        self.queries = torch.zeros(heads.n_head, heads.head_dim, heads.head_dim, dtype=torch.float64)

    def add(self, kv, queries, gradients):
        """Keys and values of a row [T, kv_width], their gradients, and its queries [T, C]."""
        u = self.heads.by_block(kv.double()).transpose(0, 1)  # [blocks, T, n]
        g = self.heads.by_block(gradients.double()).transpose(0, 1)
        q = queries.double().unflatten(-1, (self.heads.n_head, -1)).transpose(0, 1)
        weights = self.position_weights(g)
        self.n_positions += len(kv)
        self.weight += weights.sum(dim=(1, 2))
        self.first += (weights * u).sum(1)
        self.second += (weights * u).mT @ u
        self.fisher += g.mT @ g
        self.queries += q.mT @ q

    def position_weights(self, g):
        """[blocks, T, 1], of the gradients g [blocks, T, n] of a row."""
        squares = g.square().sum(-1, keepdim=True)
        return (squares + squares.mean(1, keepdim=True) / 10).clamp(min=TINY)

    def mean(self):
        return self.first / self.weight[:, None]

    def covariance(self):
        mean = self.mean()
        return self.second / self.weight[:, None, None] - mean[:, :, None] * mean[:, None, :]

    def metric(self, attention):
        """[blocks, n, n], up to a factor for each block."""
        return self.of_unit_energy(self.fisher) + self.of_unit_energy(self.activation_metric(attention)) / 10

    def activation_metric(self, attention):
        """[blocks, n, n]: what an error in a key costs in the scores, and in a value in the output."""
        scores = self.queries / self.n_positions / self.heads.head_dim
        outputs = attention.output.mT @ attention.output
        # The query heads that share a KV head add up; heads in a block stand side by side.
        costs = torch.cat([scores, outputs]).unflatten(0, (2 * self.heads.n_kv_head, -1)).sum(1)
        return torch.stack([torch.block_diag(*costs[block]) for block in self.heads.blocks])

    def of_unit_energy(self, metric):
        """Scaled, so that the keys and values themselves cost 1 in every block."""
        energy = (metric @ self.covariance()).diagonal(dim1=1, dim2=2).sum(-1)
        return metric / energy.clamp(min=TINY)[:, None, None]


def collect_moments(model, moments, loader, n_tokens):
    """Add the first rows of a shuffled loader to each layer's Moments; returns how many tokens they held."""
    model.requires_grad_(False)
    n_seen = 0
    with tqdm(total=n_tokens, unit="token", desc="calibration", disable=not sys.stderr.isatty()) as bar:
        for number, (input_ids, is_text) in enumerate(loader, start=1):
            input_ids = input_ids[:, : is_text.sum()]  # padding stands at the end, where no text sees it
            if input_ids.shape[1] > 1:
                add_row(model, moments, input_ids.to(model.wte.weight.device))
                n_seen += input_ids.shape[1]
                bar.update(min(input_ids.shape[1], n_tokens - bar.n))
            if n_seen >= n_tokens or number == len(loader.dataset):
                break
    if n_seen == 0:
        raise InputError(f"{loader.dataset.path}: no text of two tokens or more to calibrate on")
    return n_seen


@torch.no_grad()
def inputs_of(modules, model, input_ids):
    """The input of each of the modules, [1, T, C], in one forward pass."""
    inputs = []
    hooks = [module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for module in modules]
    model.hidden_states(input_ids)
    for hook in hooks:
        hook.remove()
    return inputs


def projections(attn):
    """The modules whose first outputs are the queries, and whose last are keys and values."""
    return (attn.c_attn, attn.c_attn) if hasattr(attn, "c_attn") else (attn.c_q, attn.c_kv)


def add_row(model, moments, input_ids):
    """Add a row's keys, values and queries, and the gradients of the first two, to each layer's Moments.

    The backward pass computes each layer anew from its input, so that it holds the activations of one at a
    time: by calculation 2 GB beside the model are enough for kv at 1.2B and 2,048 positions.
    """
    inputs = inputs_of([*model.h, model.ln_f], model, input_ids)
    x = inputs.pop().requires_grad_()
    hidden = model.ln_f(x)
    (gradient,) = torch.autograd.grad(hidden, x, loss_gradient(hidden.detach(), model.wte.weight, input_ids))
    for block, sums in zip(reversed(model.h), reversed(moments), strict=True):
        x, projected = inputs.pop().requires_grad_(), []
        q_projection, kv_projection = projections(block.attn)
        hook = kv_projection.register_forward_hook(lambda *given, kept=projected: kept.append(given[-1]))
        y = block(x)
        hook.remove()
        gradient, of_projected = torch.autograd.grad(y, (x, *projected), gradient)
        kv, of_kv = (part.detach()[0, :, -sums.heads.kv_width :] for part in (*projected, of_projected))
        with torch.no_grad():
            C = x.shape[-1]
            queries = F.linear(block.ln_1(x)[0], q_projection.weight[:C], q_projection.bias[:C])
        sums.add(kv.cpu(), queries.cpu(), of_kv.cpu())


@torch.no_grad()
def loss_gradient(hidden, embedding, input_ids):
    """The gradient of the summed cross-entropy of input_ids [1, T] with respect to hidden [1, T, C]."""
    gradient = torch.zeros_like(hidden)  # in chunks of 256 positions, since their logits are large
    for start in range(0, hidden.shape[1] - 1, 256):
        targets = input_ids[0, 1:][start : start + 256]
        end = start + len(targets)
        errors = F.linear(hidden[0, start:end], embedding).softmax(dim=-1)
        errors[torch.arange(len(targets)), targets] -= 1
        gradient[0, start:end] = errors @ embedding
    return gradient


def check_sample(number, covariance, attention, norm):
    """InputError where the sample does not tell directions apart that the weights do.

    The inputs of the layer are LayerNorm's outputs: of mean zero, but for its gain and bias.
    """
    reached = attention.kv_weight * norm.weight.detach().cpu().double()
    reached = reached - reached.mean(-1, keepdim=True)
    expected = torch.linalg.matrix_rank(reached, rtol=1e-4)  # weaker directions need not be in the sample
    found = torch.linalg.matrix_rank(covariance, rtol=1e-13, hermitian=True)
    if (found < expected).any():
        block = int((expected - found).argmax())
        raise InputError(
            f"layer {number}: rank-deficient covariance: the calibration sample tells {found[block]} of "
            f"{expected[block]} directions of keys and values apart; take more --tokens or more varied --data"
        )


# -----------------------------------------------------------------------------
# Reading models


def read_source(path):
    """(alias, model, contents) of a QKV, GQA or MQA, ours or released."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        variant = contents.get("variant") or variant_of(contents)
    except Exception as error:  # a file of another kind can fail in any way
        raise InputError(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})") from error
    aliases = {SCRIPTS[alias].VARIANT: alias for alias in TARGETS}
    if variant not in aliases:
        raise InputError(f"{path}: a checkpoint of variant {variant}; expected one of {', '.join(aliases)}")
    return aliases[variant], *open_checkpoint(aliases[variant], path)


def variant_of(contents):
    """That of a released checkpoint, which does not name it: QKV has no c_kv, and MQA one KV head."""
    grouped = any(name.endswith("h.0.attn.c_kv.weight") for name in contents["model_state_dict"])
    if not grouped:
        return "KQV"
    return "MQA" if contents["model_config"].get("n_kv_groups", 1) == 1 else "GQA"


def read_gpt2(folder):
    """A GPT-2 in a folder as our QKV, which has the exact GELU: (model, its tokenizer, transformers' model).

    The vocabulary is not padded.
    """
    from transformers import GPT2LMHeadModel  # seconds, which other sources need not wait
    from transformers.utils import logging

    from export_hf import read_folder, tokenizer_entries

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gpt2 = read_folder(folder, GPT2LMHeadModel)
    script, c = SCRIPTS["kqv"], gpt2.config
    expected = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    }
    for key, values in expected.items():
        if getattr(c, key) not in values:
            raise InputError(f"{folder}/config.json: {key} is {getattr(c, key)}, expected {values[0]}")
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon")
    config = script.ModelConfig(dropout=c.resid_pdrop, **{name: getattr(c, name) for name in names})
    weights = {}
    for name, tensor in gpt2.transformer.named_parameters():
        is_matrix = ".c_" in name and name.endswith(".weight")  # transformers stores these [in, out]
        weights[name] = tensor.detach().T if is_matrix else tensor.detach()
    with torch.device("meta"):
        model = script.GPT(config)
    model.load_state_dict(weights, assign=True)
    return model.eval(), tokenizer_entries(folder), gpt2


@torch.no_grad()
def gpt2_text_perplexity(gpt2, loader, n_batches):
    """The text_perplexity of the training scripts' evaluate, from transformers' own forward pass and loss."""
    nats, n_scored = 0.0, 0
    for input_ids, is_text in islice(loader, n_batches):
        if n := int(is_text[:, 1:].sum()):  # of no tokens, the mean is not a number
            loss = gpt2(input_ids, labels=input_ids.masked_fill(~is_text, -100)).loss
            nats, n_scored = nats + loss.item() * n, n_scored + n
    return math.exp(nats / n_scored)


# -----------------------------------------------------------------------------
# Converting


def target_config(alias, config, to, n_kv_groups):
    """The target's ModelConfig; InputError where the source cannot become it."""
    if to not in TARGETS[alias] and to != alias:
        possible = ", ".join(TARGETS[alias])
        raise InputError(f"--to {to}: {VARIANTS[alias]['paper']} can become {possible}")
    if to in ("gqa", "qgqa"):
        heads = config.n_kv_groups or config.n_head
        usual = heads if alias == "gqa" else math.gcd(heads, max(4, heads // 4))
        groups = n_kv_groups or usual
        if groups < 1 or heads % groups:
            raise InputError(f"--n_kv_groups {groups}: expected a divisor of the source's {heads} KV heads")
    else:
        groups = 1 if to in ("mqa", "qmqa") else None
        if n_kv_groups not in (None, groups):
            raise InputError(f"--n_kv_groups {n_kv_groups}: not for {to}; meant for gqa and qgqa")
    return SCRIPTS[to].ModelConfig(**asdict(config) | {"n_kv_groups": groups})


def choose(attention, heads, covariance, metric, mean):
    """(D, U, mean) of the numbers that each block keeps: the leading directions of its keys and values."""
    return *even_rows(attention, *joint_svd(covariance, metric, heads.head_dim)), mean


def convert(model, to, config, loader, n_tokens=32768, moments_of=Moments, choose=choose):
    """The target's state dict, the energy left out in each layer, and the tokens of calibration.

    model       of the source. It loses its attention layers on the way, so that none is in memory twice
    config      the target's
    loader      get_dataloader's, shuffled, of single rows
    moments_of, choose   other sums over the sample, another choice: see runs/other_conversions.py
    """
    heads = Heads(model.config, config.n_kv_groups or config.n_head, "v" in VARIANTS[to]["cached"])
    key_name = "c_k" if to in ("kv", "qgqa") else "c_kv"
    moments = [moments_of(heads) for _ in model.h]
    n_seen = collect_moments(model, moments, loader, n_tokens)

    weights, left_out = {name: tensor.cpu() for name, tensor in model.state_dict().items()}, []
    bar = tqdm(moments, unit="layer", desc="conversion", disable=not sys.stderr.isatty())
    for number, sums in enumerate(bar):
        attention = AttentionWeights(weights, number, heads)
        covariance, metric = sums.covariance(), sums.metric(attention)
        if not (covariance.isfinite().all() and metric.isfinite().all()):
            raise InputError(f"layer {number}: keys, values or their gradients overflow on the data")
        check_sample(number, covariance, attention, model.h[number].ln_1)

        # what to keep of keys and values
        down, up, mean = choose(attention, heads, covariance, metric, sums.mean())
        rest = torch.eye(up.shape[1], dtype=torch.float64) - up @ down
        lost, total = metric @ rest @ covariance @ rest.mT, metric @ covariance
        lost, total = (product.diagonal(dim1=1, dim2=2).sum() for product in (lost, total))
        left_out.append(float(lost / total.clamp(min=TINY)))

        # the target's attention in the place of the source's
        converted = absorb(attention, heads, down, up, mean, key_name)
        prefix = f"h.{number}.attn."
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
        weights |= {prefix + name: tensor for name, tensor in converted.items()}
        model.h[number].attn = None
        moments[number] = None
    return weights, left_out, n_seen


# -----------------------------------------------------------------------------
# Data


def open_data(folder, contents, config, seed=None, batch_tokens=1):
    """A loader of rows as the model was trained on; packed, full ones where it was trained elsewhere."""
    settings = contents.get("train_config") or {"sequence": "packed"}
    sequence = settings.get("sequence") or "padded"  # a released checkpoint does not say, and had no other
    seq_length = min(settings.get("seq_length") or config.n_positions, config.n_positions)
    batch_size = max(1, batch_tokens // seq_length)
    loader = SCRIPTS["kqv"].get_dataloader(folder, batch_size, seq_length, sequence, seed)

    found, recorded = loader.dataset.tokenizer, contents.get("tokenizer") or {}
    if isinstance(recorded, str):  # of older runs
        recorded = {"name": recorded}
    # By content, or by name where a content is not known
    key = "sha256" if found["sha256"] and recorded.get("sha256") else "name"
    known = f"the model has {config.vocab_size:,} token ids, and {described(recorded)}"
    if (recorded and found[key] != recorded[key]) or found["vocab_size"] > config.vocab_size:
        raise InputError(f"{folder}: data of another tokenizer: {described(found)}; {known}")
    if not recorded:
        report(f"{folder}: encoded with {described(found)}; {known}")
    return loader


def described(tokenizer):
    if not tokenizer:
        return "does not say which tokenizer it was trained with"
    digest = f", sha256 {tokenizer['sha256'][:8]}" if tokenizer.get("sha256") else ""
    return f"the tokenizer {tokenizer['name']}{digest}"


# -----------------------------------------------------------------------------
# Command line


def check_options(options):
    """InputError for what cannot work, before anything is read."""
    output, to = Path(options.output), options.to
    if options.checkpoint and to in (None, "kqv"):
        raise InputError(f"--to: expected one of {', '.join(TARGETS['kqv'])}; a GPT-2 alone can become QKV")
    if to not in (None, "kqv") and not options.data:
        raise InputError("--data: missing; a conversion takes a sample of the training data")
    if output.is_dir():
        raise InputError(f"--output {output}: a folder; expected the name of a file")
    if options.checkpoint and output.exists() and output.samefile(options.checkpoint):
        raise InputError(f"--output {output}: would overwrite the checkpoint that it is made from")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {options.device}: {str(error).splitlines()[0]}") from error


def check_output(output, n_bytes):
    """InputError or OSError where a file of n_bytes cannot be written."""
    output.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output.parent).close()
    free = shutil.disk_usage(output.parent).free
    if n_bytes > free:
        sizes = f"takes up to {n_bytes / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
        raise InputError(f"--output {output}: {sizes}")


def run(options, convert, how):
    """Read, evaluate, convert, write, evaluate what was written. how: {method, weighting}, to be recorded."""
    check_options(options)
    started = time.perf_counter()

    # The source, the target's configuration and the data: what does not go together is refused here.
    gpt2 = None
    if options.from_gpt2:
        alias, (model, contents, gpt2) = "kqv", read_gpt2(Path(options.from_gpt2))
    else:
        alias, contents, model = read_source(options.checkpoint)
    to, source_config = options.to or "kqv", model.config
    config, script = target_config(alias, source_config, to, options.n_kv_groups), SCRIPTS[to]
    if options.data:
        loader = open_data(options.data, contents, config, options.seed)
    if options.val_data:
        val_loader = open_data(options.val_data, contents, config, batch_tokens=2048)
        n_batches = math.ceil(options.val_tokens / next(iter(val_loader))[0].numel())
    output = Path(options.output)
    check_output(output, sum(p.nbytes for p in model.parameters()))

    # The source as it is, to compare with.
    model.to(options.device)
    if options.val_data:
        before = SCRIPTS[alias].evaluate(model, val_loader, n_batches)
        if gpt2:
            theirs, ours = gpt2_text_perplexity(gpt2, val_loader, n_batches), before["text_perplexity"]
            change = f"{ours:.4f} in QKV with the exact GELU ({ours / theirs - 1:+.3%})"
            report(f"text perplexity: {theirs:.4f} in transformers, {change}")
    del gpt2

    # Convert and write.
    if to == "kqv":
        weights, left_out, n_seen = model.state_dict(), [], 0
        how = {"method": "copy", "weighting": None}
    else:
        weights, left_out, n_seen = convert(model, to, config, loader, options.tokens)
    del model
    source = Path(options.checkpoint or options.from_gpt2).resolve().name
    about = {"source": source, "variant": SCRIPTS[alias].VARIANT, **how}
    about |= {"calibration_tokens": n_seen, "energy_left_out": left_out or None}
    about |= {"trained_for_tokens": contents.get("tokens_seen"), "trained_for_steps": contents.get("step")}
    kept = ("tokenizer", "folder_files", "train_config", "init_from")
    written = {key: contents[key] for key in kept if contents.get(key)}
    if options.checkpoint and "variant" not in contents:
        written["init_from"] = source  # the release's weights, whose licence nobody here knows
    written |= {"variant": script.VARIANT, "step": 0, "model_config": asdict(config)}
    written |= {"converted_from": about, "model_state_dict": weights}
    write_atomically(output, partial(torch.save, written))
    del weights, written

    # Say what came of it, of the file as it was written.
    lost = "of the energy of keys and values left out"
    lines = [f"layer {number:2}: {share:8.3%} {lost}" for number, share in enumerate(left_out)]
    model = script.load_model(output, options.device)
    if options.val_data and to != "kqv":
        after = script.evaluate(model, val_loader, n_batches)
        for name, key in (("text perplexity", "text_perplexity"), ("over all positions", "perplexity")):
            change = f"{after[key] / before[key] - 1:+.2%}"
            lines.append(f"{name}: {before[key]:.4f} before, {after[key]:.4f} after ({change})")
    sizes = cache_bytes(alias, source_config)[0], cache_bytes(to, config)[0]
    lines.append("KV cache in bf16: {:,} bytes a token before, {:,} after".format(*sizes))
    report(*lines, f"{output}: {VARIANTS[to]['paper']}, after {time.perf_counter() - started:.0f} s")


def main(arguments=None, convert=convert, method="joint_svd", weighting="gradient"):
    parser = Parser(__file__, __doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="PATH", help="of a training script: QKV, GQA or MQA")
    source.add_argument("--from_gpt2", metavar="FOLDER", help="of a transformers GPT-2, on this machine")
    add("--to", choices=SCRIPTS, help="the target; kqv only from a GPT-2, whose default it is")
    add("--output", metavar="PATH", required=True, help="checkpoint to write: weights alone, for --init_from")
    add("--data", metavar="DIR", help="training split, for calibration")
    add("--val_data", metavar="DIR", help="validation split, for the perplexities before and after")
    usual = "those of a GQA; for QKV a quarter of its heads, and 4 at least: 4 at 300M, 8 at 1.2B"
    add("--n_kv_groups", type=int, help=f"KV heads of gqa and qgqa; default: {usual}")
    add("--tokens", type=int, default=32768, help="of calibration, whose time they decide (default: %(default)s)")
    add("--val_tokens", type=int, default=262144, help="to evaluate, in whole batches (default: %(default)s)")
    add("--seed", type=int, default=42, help="of the calibration sample")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="to calibrate and evaluate on (default: %(default)s)")
    options = parser.parse_args(arguments)
    show_what_the_terminal_can()
    try:
        run(options, convert, {"method": method, "weighting": weighting})
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
