"""GQA-8 at 1.2B: grouped-query attention, 8 key/value heads for 32 query heads.

Tables 4 and 10 of "Do Transformers Need Three Projections? A Systematic Study of QKV Variants", ICML 2026.
One file is one experiment: any two training scripts differ only in this text, the constants, the attention
class and the name of the model class. `make sync` keeps the rest identical.

Projections  c_q, C -> C, and one fused c_kv, C -> 2 x groups x head_dim, in the order k, v
KV cache     K and V of 8 heads: 2 x 22 layers x 512 numbers a token, 45,056 bytes in bf16

    torchrun --nproc_per_node=8 transformer_GQA_1_2B.py     # the paper's run; started again, it resumes
    python transformer_GQA_1_2B.py                          # one process: one GPU, or the CPU
    python transformer_GQA_1_2B.py --output_dir outputs_1.2B_gqa_masked score_padding=false seed=43

Contents: attention, model, configuration, data, evaluation, output folder, log, processes, training, main.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
import zipfile
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

try:
    from flash_attn import flash_attn_func
except ImportError:  # optional, CUDA only
    flash_attn_func = None

# [variant: constants]
VARIANT = "GQA"  # as in this file's name
PAPER_NAME = "GQA-8"
SIZE = "1.2B"  # of the default configs/*.yaml
CACHED = ("k", "v")  # the tensors that a layer keeps for every past token
N_KV_GROUPS = 8  # KV heads of the grouped variants; None: one for each query head
OUTPUT_DIR = "outputs_1.2B_gqa"
# [end of variant]

RANK = int(os.environ.get("RANK", 0))  # set by torchrun, as WORLD_SIZE is
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1

# -----------------------------------------------------------------------------
# Attention

# [variant: attention]
class CausalSelfAttention(nn.Module):
    """GQA: groups of query heads share a KV head; K and V of the groups are cached."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer = layer
        head_dim = config.n_embd // config.n_head
        self.c_q = nn.Linear(config.n_embd, config.n_embd)
        self.c_kv = nn.Linear(config.n_embd, 2 * config.n_kv_groups * head_dim)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        """x [B, T, C] -> [B, T, C]; with a cache, the T tokens follow those already in it."""
        B, T, C = x.shape
        n_head, head_dim = self.config.n_head, C // self.config.n_head
        n_kv_head = self.config.n_kv_groups
        q = self.c_q(x).view(B, T, n_head, head_dim).transpose(1, 2)  # [B, n_head, T, head_dim]
        k, v = self.c_kv(x).split(n_kv_head * head_dim, dim=-1)
        k = k.view(B, T, n_kv_head, head_dim).transpose(1, 2)  # [B, n_kv_head, T, head_dim]
        v = v.view(B, T, n_kv_head, head_dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, n_kv_head, past + T, head_dim]
        y = causal_attention(q, k, v, self.config)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.c_proj(y))
# [end of variant]

def causal_attention(q, k, v, config):
    """Attention of the last T of S positions to themselves and all before them.

    q [B, n_head, T, head_dim], k and v [B, n_kv_head, S, head_dim] -> [B, n_head, T, head_dim]. With fewer KV
    heads than query heads, neighbouring query heads share one.
    """
    B, n_head, T, head_dim = q.shape
    n_kv_head, S = k.shape[1], k.shape[2]
    if flash_attn_func and config.use_flash_attention and q.is_cuda and q.dtype == torch.bfloat16:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return flash_attn_func(q, k, v, causal=True).transpose(1, 2)
    if T == 1:
        # decode: one query sees every position. The query heads that share a KV head become several queries
        # of that head, so that each cached number is read once for all of them.
        q = q.reshape(B, n_kv_head, n_head // n_kv_head, head_dim)
        return F.scaled_dot_product_attention(q, k, v).reshape(B, n_head, 1, head_dim)
    # is_causal aligns the first query with the first key; after a past (S > T) the last ones must align
    mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S, enable_gqa=n_kv_head < n_head)

class KVCache:
    """The past of every layer: one [B, n_kv_head, max_length, head_dim] tensor for each name in CACHED.

    A layer's tensors are allocated with its first tokens, in their dtype and on their device. `length`
    positions are filled; the model advances it after all layers of a forward pass, and it may be set back.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0
        self.layers = {}  # the tensors of each layer, by its number

    def append(self, layer, *new):
        """Write T new positions of a layer, [B, n_kv_head, T, head_dim] each; return all positions so far."""
        B, n_kv_head, T, head_dim = new[0].shape
        if layer not in self.layers:
            self.layers[layer] = [x.new_empty(B, n_kv_head, self.max_length, head_dim) for x in new]
        end = self.length + T
        for stored, x in zip(self.layers[layer], new, strict=True):
            stored[:, :, self.length : end] = x
        return [stored[:, :, :end] for stored in self.layers[layer]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.layers.values() for tensor in tensors)

# -----------------------------------------------------------------------------
# Model

LOSS_CHUNK = 2048  # positions in each chunk of logits

class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of the logits x [N, C] @ weight.T [C, V]; targets [N] of -100 are not scored.

    The logits of a micro batch, 6 x 2,048 x 50,304 in fp32, would take 2.5 GB and their gradient as much. So
    the gradients are computed in the forward pass, chunk by chunk, while the logits of a chunk exist.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        loss_sum = torch.zeros((), device=x.device)
        grad_x, grad_weight = [], None  # a part of grad_x for each chunk; the sum of grad_weight
        for x_chunk, target in zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            logits = F.linear(x_chunk, weight)
            log_probs = F.log_softmax(logits.float(), dim=-1)
            scored = (target != -100)[:, None]
            target = target[:, None].masked_fill(~scored, 0)
            loss_sum -= (log_probs.gather(1, target) * scored).sum()
            # d loss / d logits = softmax - one_hot(target)
            grad_logits = log_probs.exp_().scatter_add_(1, target, -torch.ones_like(log_probs[:, :1]))
            grad_logits = grad_logits.to(logits.dtype)
            grad_x.append((grad_logits @ weight) * scored)
            grad_chunk = (grad_logits.t() @ (x_chunk * scored)).to(weight.dtype)
            grad_weight = grad_chunk if grad_weight is None else grad_weight.add_(grad_chunk)
        ctx.save_for_backward(torch.cat(grad_x), grad_weight)
        return loss_sum

    @staticmethod
    def backward(ctx, grad_output):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_output, grad_weight * grad_output, None

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))

@contextmanager
def eval_mode(model):
    """Switch dropout off, and restore the previous mode even after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

class GPT_GQA(nn.Module):
    """GPT-2 style decoder: learned positions, pre-LayerNorm, output embedding tied to the input embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, input_ids, labels=None, cache=None):
        """int64 [B, T] -> (logits [B, T, vocab_size], None), or (None, mean loss in nats) given labels.

        Labels are the inputs, shifted here; -100 is not scored. With a KVCache (inference only) the T tokens
        follow those in it and join them. ValueError if they do not fit n_positions or the cache.
        """
        hidden = self.hidden_states(input_ids, cache)
        if labels is None:
            return F.linear(hidden, self.wte.weight), None
        hidden, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss_sum = ChunkedCrossEntropy.apply(hidden, self.wte.weight, targets)
        return None, loss_sum / (targets != -100).sum().clamp(min=1)

    def hidden_states(self, input_ids, cache=None):
        """The output of the final LayerNorm, [B, T, C]."""
        past, T = 0 if cache is None else cache.length, input_ids.shape[1]
        limit = self.config.n_positions if cache is None else min(self.config.n_positions, cache.max_length)
        if past + T > limit:
            raise ValueError(f"{past + T} tokens do not fit {limit} positions")
        x = self.wte(input_ids) + self.wpe(torch.arange(past, past + T, device=input_ids.device))
        for block in self.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def token_losses(self, hidden, labels):
        """Cross-entropy in nats of each token but the first: [B, T - 1], 0 where the label is -100."""
        x, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        losses = []
        for x_chunk, target in zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            logits = F.linear(x_chunk, self.wte.weight).float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
        return torch.cat(losses).view(len(labels), -1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True):
        """Continue the prompts, int64 [B, T], to [B, T + max_new_tokens]; temperature 0 is greedy.

        Beyond n_positions the model sees the last n_positions tokens. There each step moves every token to
        another learned position, which invalidates the cache, so the window is recomputed.
        """
        window = self.config.n_positions
        cache = KVCache(min(window, idx.shape[1] + max_new_tokens)) if use_cache else None
        with eval_mode(self):
            for _ in range(max_new_tokens):
                if cache is not None and idx.shape[1] <= window:  # prefill, then one token at a time
                    hidden = self.hidden_states(idx[:, cache.length :], cache)
                else:
                    hidden = self.hidden_states(idx[:, -window:])
                logits = F.linear(hidden[:, -1], self.wte.weight).float()
                if top_k is not None:
                    kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits[logits < kth_largest] = -math.inf
                if temperature == 0:
                    token = logits.argmax(dim=-1, keepdim=True)
                else:
                    token = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
                idx = torch.cat([idx, token], dim=1)
        return idx

# -----------------------------------------------------------------------------
# Configuration: the settings of configs/*.yaml

class RunError(ValueError):
    """Ends a run with one line instead of a traceback: what is wrong, where, and what to do about it."""

    def __str__(self):
        return " ".join(super().__str__().split())  # libraries explain themselves in paragraphs

def require(condition, message):
    if not condition:
        raise RunError(message)

CHECKS = {"extra": "forbid", "allow_inf_nan": False}
Fraction = Annotated[float, Field(ge=0, lt=1)]

@dataclass(kw_only=True, config=CHECKS)
class ModelConfig:
    vocab_size: PositiveInt = 50304  # GPT-2's 50,257 tokens, padded to a multiple of 128
    n_positions: PositiveInt = 2048  # context length; positions are learned
    n_embd: PositiveInt  # width, C
    n_layer: PositiveInt
    n_head: PositiveInt  # query heads; head_dim is n_embd / n_head
    n_inner: PositiveInt | None = None  # width of the MLP; null: 4 n_embd
    n_kv_groups: PositiveInt | None = N_KV_GROUPS  # KV heads of the grouped variants
    dropout: Fraction = 0.1  # on the outputs of attention and MLP
    layer_norm_epsilon: PositiveFloat = 1e-5
    initializer_range: PositiveFloat = 0.02  # standard deviation of the initial weights
    use_flash_attention: bool = True  # flash-attn, if it is installed and fits: CUDA, bf16

    def __post_init__(self):
        self.n_inner = self.n_inner or 4 * self.n_embd
        require(self.n_embd % self.n_head == 0, f"n_embd: expected a multiple of n_head, {self.n_head}")
        n = self.n_kv_groups  # GQA and Q-GQA alone leave a choice
        fits = n == N_KV_GROUPS if N_KV_GROUPS in (None, 1) else n is not None and self.n_head % n == 0
        require(fits, f"n_kv_groups: {PAPER_NAME} with {self.n_head} heads cannot have {n}")

@dataclass(kw_only=True, config=CHECKS)
class TrainingConfig:
    train_data: str  # folder of a split that dataset_download.py wrote
    val_data: str  # folder of the split to evaluate on
    sequence: Literal["padded", "packed"]  # padded: a document a row; packed: full rows
    score_padding: bool  # score the padding in the training loss, as published
    seq_length: Annotated[int, Field(ge=2)]  # tokens in a row
    micro_batch_size: PositiveInt  # rows in one forward and backward pass
    gradient_accumulation: PositiveInt  # passes of each GPU in a step
    num_gpus: PositiveInt  # of the published run: a factor of the global batch, on any number of GPUs
    target_tokens: PositiveInt  # tokens to train on, padding included
    learning_rate: PositiveFloat  # at the end of the warm-up
    min_lr: NonNegativeFloat  # where the decay ends
    lr_scheduler: Literal["cosine", "linear", "constant"]  # from learning_rate to min_lr
    warmup_steps: NonNegativeInt  # steps of linear warm-up
    weight_decay: NonNegativeFloat  # of AdamW, on every parameter
    beta1: Fraction
    beta2: Fraction
    grad_clip: PositiveFloat  # gradients of a larger norm are scaled down to it
    skip_grad_norm: PositiveFloat  # an update with a larger gradient norm is skipped
    seed: NonNegativeInt  # of weights, order of the data and dropout
    precision: Literal["bf16", "fp32"]  # bf16: autocast, the weights stay fp32
    compile: Literal["auto"] | bool  # torch.compile; auto: on CUDA
    log_interval: PositiveInt  # steps between train records
    eval_interval: PositiveInt  # steps between evaluations
    eval_batches: PositiveInt | None  # batches of an evaluation; null: all
    save_interval: PositiveInt  # steps between checkpoints
    keep_checkpoints: PositiveInt | None  # how many of the newest to keep; null: all
    sample_tokens: NonNegativeInt  # length of the samples beside each checkpoint; 0: none
    wandb: Literal["disabled", "offline", "online"]  # log to Weights & Biases too

    def __post_init__(self):
        self.rows_per_step = self.micro_batch_size * self.gradient_accumulation * self.num_gpus
        self.tokens_per_step = self.rows_per_step * self.seq_length
        self.total_steps = self.target_tokens // self.tokens_per_step
        require(self.total_steps, f"target_tokens: less than one step of {self.tokens_per_step} tokens")
        require(self.warmup_steps <= self.total_steps, f"warmup_steps: more than all {self.total_steps}")
        require(self.min_lr <= self.learning_rate, "min_lr: more than learning_rate")

def load_config(cls, path, settings):
    """A config from a YAML file and from those {key: value} settings that are fields of it."""
    settings = {key: value for key, value in settings.items() if key in cls.__annotations__}
    try:
        return cls(**yaml.safe_load(Path(path).read_text(encoding="utf-8")) | settings)
    except ValidationError as error:
        first = error.errors()[0]  # of a key, or of __post_init__, where values do not go together
        place = "command line" if set(first["loc"]) & settings.keys() else path
        key = f"{first['loc'][0]}, {first['input']!r:.40}" if first["loc"] else "settings that do not fit"
        raise RunError(f"{place}: {key}: {first['msg'].removeprefix('Value error, ')}") from error
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: cannot be read as lines of 'key: value': {error}") from error

# -----------------------------------------------------------------------------
# Data

class TokenDataset(Dataset):
    """Rows (input_ids int64 [T], is_text bool [T]) of one split of dataset_download.py, memory-mapped.

    In a chunk an end-of-text token follows every document, and offsets say where each document starts.
    padded: row i is document i, cut at seq_length or padded with end-of-text tokens, where is_text is false.
    packed: row i is the i-th slice of seq_length tokens; the last row of a chunk is padded.
    """

    def __init__(self, data_path, seq_length: int, sequence: str = "padded"):
        self.path, self.seq_length, self.packed = Path(data_path), seq_length, sequence == "packed"
        self.tokens, self.offsets = [], []  # an array of each for every chunk
        sizes = []  # of the chunks, in rows
        try:
            metadata = json.loads((self.path / "metadata.json").read_text(encoding="utf-8"))
            require(metadata["finished"] and metadata["documents"], "not finished, or without documents")
            self.eos_id, self.vocab_size = metadata["eos_id"], metadata["vocab_size"]
            self.token_bytes = np.load(self.path / "token_bytes.npy").astype(np.int64)  # UTF-8 length of each
            self.chunks = metadata["chunks"]
            for chunk in self.chunks:
                tokens = np.load(self.path / f"{chunk['name']}.tokens.npy", mmap_mode="r")
                offsets = np.load(self.path / f"{chunk['name']}.offsets.npy", mmap_mode="r")
                whole = len(offsets) == chunk["documents"] + 1 and offsets[-1] == len(tokens)
                require(whole, f"{chunk['name']} has another length than its metadata say")
                self.tokens.append(tokens)
                self.offsets.append(offsets)
                sizes.append(math.ceil(len(tokens) / seq_length) if self.packed else chunk["documents"])
            digest = metadata.get("tokenizer_sha256", {}).get("tokenizer.tiktoken")
            self.tokenizer = {"name": metadata["tokenizer"], "vocab_size": self.vocab_size, "sha256": digest}
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            how = f"run dataset_download.py --output_dir {self.path.parent}"
            raise RunError(f"{self.path}: no complete token files: {error}; {how}") from error
        self.first_rows = np.cumsum([0, *sizes])  # where each chunk starts; the last entry counts all rows

    def __len__(self):
        return int(self.first_rows[-1])

    def __getitem__(self, i):
        chunk = bisect_right(self.first_rows, i) - 1
        row = i - self.first_rows[chunk]
        tokens, offsets = self.tokens[chunk], self.offsets[chunk]
        if self.packed:
            ids = tokens[row * self.seq_length : (row + 1) * self.seq_length]
        else:  # without its end-of-text token, which counts as padding
            ids = tokens[offsets[row] : offsets[row + 1] - 1][: self.seq_length]
        input_ids = np.full(self.seq_length, self.eos_id, dtype=np.int64)
        input_ids[: len(ids)] = ids
        return torch.from_numpy(input_ids), torch.arange(self.seq_length) < len(ids)

    def decode(self, token_ids) -> str:
        """The text of token ids, by the tokenizer that dataset_download.py keeps beside the data."""
        lines = (self.path / "tokenizer.tiktoken").read_bytes().splitlines()
        pieces = {int(i): base64.b64decode(piece) for piece, i in map(bytes.split, lines)}
        return b"".join(pieces.get(i, b"<|endoftext|>") for i in token_ids).decode("utf-8", errors="replace")

def shuffled_batches(n_rows, batch_size, seed, rows_seen):
    """Endless micro batches of row numbers for this rank, from row `rows_seen` of the run on.

    Epoch e reads the rows in a permutation that depends on (seed, e) alone, and ranks take micro batches in
    turn. So neither the world size nor a resume changes the global batch of a step. Positions count the rows
    of the whole run, over all epochs.
    """
    epoch = None
    for first in count(rows_seen + RANK * batch_size, WORLD_SIZE * batch_size):
        batch = []
        for position in range(first, first + batch_size):
            if position // n_rows != epoch:
                epoch = position // n_rows
                permutation = np.random.default_rng((seed, epoch)).permutation(n_rows)
            batch.append(int(permutation[position % n_rows]))
        yield batch

def get_dataloader(data_path, batch_size, seq_length, sequence="padded", seed=None, rows_seen=0):
    """This rank's batches (input_ids int64 [B, T], is_text bool [B, T]) of TokenDataset's rows.

    Without a seed: every row once, in order. With one: shuffled and endless, from row `rows_seen` of the run.
    """
    dataset = TokenDataset(data_path, seq_length, sequence)
    if seed is None:
        firsts = range(RANK * batch_size, len(dataset), WORLD_SIZE * batch_size)
        batches = [range(first, min(first + batch_size, len(dataset))) for first in firsts]
    else:
        batches = shuffled_batches(len(dataset), batch_size, seed, rows_seen)
    return DataLoader(dataset, batch_sampler=batches, pin_memory=torch.cuda.is_available())

# -----------------------------------------------------------------------------
# Evaluation

STOP = []  # signals received; after one, the step in hand is finished and saved, and the run ends

@torch.no_grad()
def evaluate(model, val_loader, max_batches: int | None = None) -> dict | None:
    """Evaluate on val_loader, or on its first max_batches batches.

    Each rank scores its share and the sums are added, so the world size does not change the result. Returns
    loss, perplexity: nats per token over all positions, padding included (the paper's protocol), and its exp;
    text_loss, text_perplexity: over text only; bits_per_byte: of its UTF-8; padding_fraction: of positions.
    None if a signal to stop arrives meanwhile. Autocast, and init_distributed under torchrun, are up to you.
    """
    # max_batches is a total over all ranks, which take batches in turn
    share = None if max_batches is None else len(range(RANK, max_batches, WORLD_SIZE))
    token_bytes = torch.from_numpy(val_loader.dataset.token_bytes)
    sums = torch.zeros(7, dtype=torch.float64)  # as unpacked below
    with eval_mode(model):
        for input_ids, is_text in islice(val_loader, share):
            if STOP:
                break
            inputs = input_ids.to(model.wte.weight.device)
            losses = model.token_losses(model.hidden_states(inputs), inputs).cpu().double()
            text = is_text[:, 1:]  # the first token of a row is not predicted
            text_bytes = (token_bytes[input_ids[:, 1:]] * text).sum()
            counts = losses.numel(), text.sum(), text_bytes, (~is_text).sum(), is_text.numel()
            sums += torch.tensor([losses.sum(), (losses * text).sum(), *counts], dtype=torch.float64)
    parts = all_gather(None if STOP else sums)
    if any(part is None for part in parts):
        return None
    nats, text_nats, positions, text_positions, text_bytes, padding, total = sum(parts).tolist()
    require(text_bytes, f"{val_loader.dataset.path}: no document of two tokens or more, nothing to score")
    loss, text_loss = nats / positions, text_nats / text_positions
    results = {"loss": loss, "perplexity": float(np.exp(loss))}
    results |= {"text_loss": text_loss, "text_perplexity": float(np.exp(text_loss))}
    bits_per_byte = text_nats / math.log(2) / text_bytes
    return results | {"bits_per_byte": bits_per_byte, "padding_fraction": padding / total}

# -----------------------------------------------------------------------------
# Output folder: one folder is one run, which goes on from its newest checkpoint

MAY_CHANGE = (  # on a resume; "global batch" guards the product of the first three
    "micro_batch_size", "gradient_accumulation", "num_gpus", "train_data", "val_data", "use_flash_attention",
    "compile", "log_interval", "eval_interval", "eval_batches", "save_interval", "keep_checkpoints",
    "sample_tokens", "wandb",
)

def write_atomically(path, write):
    """Write to a temporary file, flush it to disk and rename it: `path` never holds half a file."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        raise RunError(f"{path}: not saved; is the disk full? Older files are whole ({error})") from error
    finally:
        partial.unlink(missing_ok=True)

def read_checkpoint(path) -> dict:
    """The contents of a checkpoint or final_model.pt; RunError if it is damaged or of another variant."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # checks the CRCs, about 3 GB a second
        require(damaged is None, f"the CRC of {damaged} is wrong")
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # released checkpoints carry DDP's prefix and the causal masks, and do not say their variant
        weights = {name.removeprefix("module."): w for name, w in contents["model_state_dict"].items()}
        contents["model_state_dict"] = {n: w for n, w in weights.items() if not n.endswith(".attn.bias")}
        contents["model_config"], variant = dict(contents["model_config"]), contents.get("variant", VARIANT)
    except Exception as error:  # a file of another kind can fail in any way
        raise RunError(f"{path}: not a whole checkpoint: {error}") from error
    script = Path(__file__).name.replace(f"_{VARIANT}_", f"_{variant}_")
    require(variant == VARIANT, f"{path}: not a checkpoint of {PAPER_NAME}, but of {script}")
    return contents

def identity_of_run(model_config, config, train_set, val_set, init_from) -> dict:
    """All that can change the result of a run, flat; run.yaml records it, and a resume has to repeat it."""
    identity = {"variant": VARIANT, "init_from": init_from, "global batch": config.rows_per_step}
    for name, data in {"training text": train_set, "validation text": val_set}.items():
        hashes = json.dumps(data.chunks, sort_keys=True).encode()  # they cover the SHA-256 of every file
        identity[name] = hashlib.sha256(hashes).hexdigest()[:12]
    identity["tokenizer"] = f"{train_set.tokenizer['name']} sha256:{str(train_set.tokenizer['sha256'])[:8]}"
    settings = asdict(model_config) | asdict(config)
    return identity | {key: value for key, value in settings.items() if key not in MAY_CHANGE}

def checkpoints(output_dir) -> list:
    """The checkpoints in a folder, the newest last."""
    found = output_dir.glob("checkpoint_step_[0-9]*.pt")
    return sorted(found, key=lambda path: int(path.stem.rpartition("_")[2]))

def claim(output_dir, identity, accept_changes):
    """Lock the folder and return the lock; RunError if another run has it, or has left other work there."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = open(output_dir / "run.lock", "w")  # noqa: SIM115, the kernel releases it with the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunError(f"{output_dir}: in use by another run, or without file locks: {error}") from error

    record = output_dir / "run.yaml"
    if record.exists():
        recorded = yaml.safe_load(record.read_text(encoding="utf-8")) or {}
        keys = [key for key in identity if identity[key] != recorded.get(key)]
        changes = ", ".join(f"{key} {recorded.get(key)} -> {identity[key]}" for key in keys)
        ways_on = "use another --output_dir, or resume despite the changes with --accept_changes"
        require(not changes or accept_changes, f"{output_dir}: a run with {changes}; {ways_on}")
    resumable = record.exists() and checkpoints(output_dir)
    unknown = f"{output_dir}: holds weights and no run to resume; use another --output_dir"
    require(resumable or not [*output_dir.glob("*.pt")], unknown)
    return lock

def newest_checkpoint(output_dir):
    """(path, contents) of the newest whole checkpoint; (None, None) if there is none at all."""
    for path in reversed(checkpoints(output_dir)):
        try:
            return path, read_checkpoint(path)
        except RunError as error:
            print0(f"warning: passed over {error}")
    require(not checkpoints(output_dir), f"{output_dir}: no checkpoint is whole; use another --output_dir")
    return None, None

def save_checkpoint(output_dir, contents, optimizer, keep, complete):
    """Write checkpoint_step_N.pt, at the end final_model.pt too; drop all but the newest `keep`."""
    whole = contents | {"optimizer_state_dict": optimizer.state_dict()}
    path = output_dir / f"checkpoint_step_{contents['step']}.pt"
    write_atomically(path, lambda file: torch.save(whole, file))
    if complete:
        write_atomically(output_dir / "final_model.pt", lambda file: torch.save(contents, file))
    for old in checkpoints(output_dir)[:-keep] if keep else []:
        if old != path:  # it would be the oldest where a damaged one is of a later step
            old.unlink()

def load_weights(model, contents, path):
    """Copy the weights of a checkpoint into the model; RunError if it was made with another architecture."""
    for key in ("n_head", "layer_norm_epsilon"):  # what the shapes do not tell
        asked = getattr(model.config, key)
        saved = contents["model_config"].get(key, asked)  # released checkpoints leave out defaults
        require(asked == saved, f"{path}: made with {key} {saved}, and the configuration asks for {asked}")
    try:
        model.load_state_dict(contents["model_state_dict"])
    except RuntimeError as error:
        raise RunError(f"{path}: not the weights of {PAPER_NAME} in this configuration: {error}") from error

def load_model(path, device="cpu") -> GPT_GQA:
    """The model in a checkpoint or final_model.pt, ours or a released one, in eval mode.

    RunError, a ValueError, if the file is damaged or of another variant.
    """
    contents = read_checkpoint(path)
    settings = {k: v for k, v in contents["model_config"].items() if k in ModelConfig.__annotations__}
    model = GPT_GQA(ModelConfig(**settings))
    load_weights(model, contents, path)
    return model.to(device).eval()

# -----------------------------------------------------------------------------
# Log

def print0(text):
    """Print on rank 0, above the progress bar; a closed pipe or a full disk there never ends a run."""
    try:
        if RANK == 0:
            tqdm.write(text)
            sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115

def read_metrics(path) -> list[dict]:
    """The records of a metrics.jsonl, without a last line that a kill cut short."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

class Log:
    """Rank 0's log: settings as YAML, metrics.jsonl, the terminal, and wandb if asked for."""

    def __init__(self, output_dir, identity, model_config, config, step):
        self.path, self.config, self.wandb = output_dir / "metrics.jsonl", config, None
        # a killed run has logged steps beyond its last checkpoint: they run again, so their records go, and
        # so does the evaluation at the checkpoint's own step, which is repeated too
        records = read_metrics(self.path)
        kept = [r for r in records if r["step"] < step or (r["step"] == step and r["kind"] == "train")]
        texts = {"metrics.jsonl": "".join(json.dumps(record) + "\n" for record in kept)}
        settings = {"run": identity, "model_config": asdict(model_config), "train_config": asdict(config)}
        texts |= {f"{name}.yaml": yaml.safe_dump(settings[name], sort_keys=False) for name in settings}
        for name, text in texts.items():
            write_atomically(output_dir / name, lambda file, text=text: file.write(text.encode()))
        if config.wandb != "disabled":
            try:
                import wandb

                options = {"dir": output_dir, "mode": config.wandb, "config": identity}
                self.wandb = wandb.init(project="qkv-variants", name=output_dir.name, **options)
            except Exception as error:  # a failure of wandb must not end a run
                print0(f"warning: no wandb: {error}")

    def __call__(self, kind, step, results):
        """Add a train, val or final record, and print what a reader wants of it."""
        record = {"kind": kind, "step": step, "tokens": step * self.config.tokens_per_step} | results
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        text = f"{kind} loss {results['loss']:.4f}"
        if kind == "train":
            speed = results["tokens_per_second"]
            seconds_left = (self.config.total_steps - step) * self.config.tokens_per_step / speed
            text += f", {speed:,.0f} tokens/s, {tqdm.format_interval(seconds_left)} left"
        else:
            text += f", perplexity {results['perplexity']:.3f}, of the text {results['text_perplexity']:.3f}"
        print0(f"step {step} of {self.config.total_steps}: {text}")
        try:
            if self.wandb:
                self.wandb.log({f"{kind}/{key}": value for key, value in results.items()}, step=step)
        except Exception as error:
            print0(f"warning: no wandb from step {step} on: {error}")
            self.wandb = None

def write_samples(output_dir, step, model, val_set, config):
    """Continue the beginnings of three rows of the validation data through the KV cache."""
    torch.manual_seed(config.seed)
    try:
        prompts = torch.stack([val_set[len(val_set) * third // 3][0][:32] for third in range(3)])
        idx = model.generate(prompts.to(model.wte.weight.device), config.sample_tokens, 0.8, top_k=50)
        text = "\n\n".join(val_set.decode(row) for row in idx.tolist())
        (output_dir / f"samples_step_{step}.txt").write_text(text, encoding="utf-8")
    except Exception as error:  # the checkpoint is saved: samples must not end the run
        print0(f"warning: no samples at step {step}: {error}")

# -----------------------------------------------------------------------------
# Processes

def init_distributed() -> torch.device:
    """Join the other processes of torchrun, if there are any; returns the device of this one."""
    device, n_gpus = torch.device("cpu"), torch.cuda.device_count()
    if n_gpus:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % n_gpus)
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if n_gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) else "gloo")
    return device

def all_gather(value) -> list:
    """The value of every rank, by rank."""
    values = [value] * WORLD_SIZE
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

@contextmanager
def errors_on_all_ranks():
    """What fails inside on one rank is raised on all of them, so that none waits for it forever."""
    message = None
    try:
        yield
    except (RunError, OSError) as error:
        message = str(error)
    failures = [text for text in all_gather(message) if text]
    if failures:
        raise RunError(failures[0])

# -----------------------------------------------------------------------------
# Training

LOWER_RATE = " Lower learning_rate and resume with --accept_changes."

def get_lr(step: int, config: TrainingConfig) -> float:
    """The rate of update number `step`, from 0 on: linear warm-up, then from learning_rate to min_lr."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    decay = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1}
    return config.min_lr + decay[config.lr_scheduler] * (config.learning_rate - config.min_lr)

def mfu(n_parameters, model_config, config, device, tokens_per_second) -> dict:
    """Model FLOPs utilisation: the share of the dense bf16 peak of all GPUs, where it is known."""
    # TFLOP/s; the first match wins, so the longer names come first
    peaks = {"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((1e12 * peak for name, peak in peaks.items() if name in gpu), None)
    flops = 6 * n_parameters + 12 * model_config.n_layer * model_config.n_embd * config.seq_length
    return {"mfu": flops * tokens_per_second / (peak * WORLD_SIZE)} if peak else {}

def train(model_config, config, output_dir, init_from=None, accept_changes=False) -> bool:
    """Train to the last step, or until a signal asks to stop; returns whether the run is complete."""
    device = init_distributed()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    # data and output folder: what does not fit together is refused here, on all ranks
    with errors_on_all_ranks():
        batch_size, row_shape = config.micro_batch_size, (config.seq_length, config.sequence)
        val_loader = get_dataloader(config.val_data, batch_size, *row_shape)
        train_set, val_set = TokenDataset(config.train_data, *row_shape), val_loader.dataset
        require(config.seq_length <= model_config.n_positions, "seq_length: more than n_positions")
        require(train_set.vocab_size <= model_config.vocab_size, f"vocab_size: below {train_set.vocab_size}")
        require(train_set.tokenizer == val_set.tokenizer, "train_data and val_data: two tokenizers")
        accumulation_steps, rest = divmod(config.gradient_accumulation * config.num_gpus, WORLD_SIZE)
        require(not rest, f"{WORLD_SIZE} ranks cannot share gradient_accumulation x num_gpus micro batches")
        identity = identity_of_run(model_config, config, train_set, val_set, init_from)
        lock = claim(output_dir, identity, accept_changes) if RANK == 0 else None  # noqa: F841

    # weights and optimizer: of the newest checkpoint, of another run, or new
    with errors_on_all_ranks():
        path, checkpoint = newest_checkpoint(output_dir)
        resumed = path is not None
        if not resumed and init_from is not None:
            path, checkpoint = init_from, read_checkpoint(init_from)
        torch.manual_seed(config.seed)
        model = GPT_GQA(model_config).to(device)
        # one parameter group, since the published recipe decays biases and LayerNorms too
        recipe = {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **recipe)
        if checkpoint:
            recorded = checkpoint.get("tokenizer") or train_set.tokenizer  # released checkpoints do not say
            same = recorded in (train_set.tokenizer, train_set.tokenizer["name"])  # older ones say its name
            require(same, f"{path}: was trained with another tokenizer than that of {train_set.path}")
            load_weights(model, checkpoint, path)
        if resumed:
            optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
            optimizer.param_groups[0].update(recipe)  # over the recorded one: a change may be accepted
        start = step = checkpoint["step"] if resumed else 0
        require(step <= config.total_steps, f"{path}: beyond the last step of these settings")
        final = output_dir / "final_model.pt"  # it may be of a shorter run
        complete = step == config.total_steps and final.exists() and read_checkpoint(final)["step"] == step
    del checkpoint
    starts = all_gather((identity, step, complete))
    require(starts.count(starts[0]) == WORLD_SIZE, "the ranks see different settings, data or checkpoints")

    n_parameters = sum(p.numel() for p in model.parameters())
    print0(f"{PAPER_NAME}: {n_parameters:,} parameters, {config.precision}, {WORLD_SIZE} ranks on {device}")
    print0(f"step {step} of {config.total_steps} in {output_dir}, from {path or 'initial weights'}")
    if complete:
        return True
    with errors_on_all_ranks():
        log = Log(output_dir, identity, model_config, config, step) if RANK == 0 else lambda *record: None
    if config.compile is True or (config.compile == "auto" and device.type == "cuda"):
        model.compile()
    ddp = model
    if dist.is_initialized():
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # DDP lays out its buckets anew after its first backward pass, and three ranks or more then sum in
        # another order. This pass, thrown away, makes that happen now: all steps of a run sum alike, and on
        # a CPU a resumed run ends in the bits of an uninterrupted one. CUDA's attention is not that exact.
        ids = torch.zeros(config.micro_batch_size, config.seq_length, dtype=torch.int64, device=device)
        with autocast:
            _, loss = ddp(ids, ids)
        loss.backward()
        optimizer.zero_grad(set_to_none=True)

    rows_seen = step * config.rows_per_step
    batches = iter(get_dataloader(config.train_data, batch_size, *row_shape, config.seed, rows_seen))
    score_padding = config.sequence == "padded" and config.score_padding
    bar = tqdm(total=config.total_steps, initial=step, disable=RANK > 0 or None)  # None: if not on a terminal
    stopping = False
    skipped_in_a_row = 0
    seconds, timed_steps = 0.0, 0  # since the last train record
    while True:  # the last iteration only evaluates and saves
        last_step = step == config.total_steps

        # every eval_interval steps, and at the end: evaluate
        if (last_step or step % config.eval_interval == 0) and not stopping:
            with autocast:
                results = evaluate(model, val_loader, config.eval_batches)
            stopping = results is None
            if results:
                require(math.isfinite(results["loss"]), f"step {step}: val loss is not finite.{LOWER_RATE}")
                log("final" if last_step else "val", step, results)

        # every save_interval steps, at the end and when told to stop: save
        complete = last_step and not stopping
        due = step > start and (stopping or step % config.save_interval == 0)
        if RANK == 0 and (complete or due):
            contents = {"variant": VARIANT, "step": step, "epoch": rows_seen // len(train_set)}
            contents |= {"tokens_seen": step * config.tokens_per_step, "tokenizer": train_set.tokenizer}
            contents |= {"model_config": asdict(model_config), "train_config": asdict(config)}
            contents["model_state_dict"] = model.state_dict()
            save_checkpoint(output_dir, contents, optimizer, config.keep_checkpoints, complete)
            if config.sample_tokens and not stopping:
                with autocast:
                    write_samples(output_dir, step, model, val_set, config)
        if complete or stopping:
            all_gather(None)  # a barrier: torchrun ends all ranks soon after the first; let rank 0 save
            bar.close()
            return complete

        # forward and backward over this rank's share of the global batch; gradients of the summed loss
        t0 = time.perf_counter()
        loss_sum, n_scored = torch.zeros(2, device=device)
        for micro_step in range(accumulation_steps):
            ddp.require_backward_grad_sync = micro_step == accumulation_steps - 1  # once a step
            input_ids, is_text = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            labels = input_ids if score_padding else input_ids.masked_fill(~is_text, -100)
            # dropout is seeded by the micro batch's first row, and so does not depend on the world size
            row = rows_seen + (micro_step * WORLD_SIZE + RANK) * config.micro_batch_size
            torch.manual_seed(int(np.random.SeedSequence((config.seed, row)).generate_state(1)[0]))
            with autocast:
                _, loss = ddp(input_ids, labels)
            n = (labels[:, 1:] != -100).sum()
            (loss * n).backward()
            loss_sum += loss.detach() * n
            n_scored += n

        # from DDP's mean over the ranks to the mean over the scored tokens of the global batch
        totals = torch.stack([loss_sum, n_scored, loss_sum.new_tensor(len(STOP))])
        if dist.is_initialized():
            dist.all_reduce(totals)
        for p in model.parameters():
            p.grad.mul_(WORLD_SIZE / totals[1])
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        loss_sum, n_scored, stops, grad_norm = torch.stack([*totals, grad_norm]).tolist()  # host sync
        stopping = stops > 0  # a signal to one rank stops all of them
        require(n_scored, f"step {step + 1}: nothing to score in a global batch of {config.train_data}")
        loss = loss_sum / n_scored
        require(math.isfinite(loss), f"step {step + 1}: the loss is {loss}.{LOWER_RATE}")

        # update, unless the gradient norm is too large or not a number
        lr = optimizer.param_groups[0]["lr"] = get_lr(step, config)
        if grad_norm <= config.skip_grad_norm:
            optimizer.step()
            skipped_in_a_row = 0
        else:
            skipped_in_a_row += 1
            print0(f"warning: step {step + 1}: update skipped, its gradient norm is {grad_norm}")
            require(skipped_in_a_row < 10, f"step {step + 1}: 10 updates skipped in a row.{LOWER_RATE}")
        optimizer.zero_grad(set_to_none=True)
        step += 1
        rows_seen += config.rows_per_step
        bar.update()

        # every log_interval steps, and at the end: log
        seconds += time.perf_counter() - t0
        timed_steps += 1
        if step % config.log_interval == 0 or step == config.total_steps:
            speed = timed_steps * config.tokens_per_step / seconds
            results = {"loss": loss, "perplexity": float(np.exp(loss)), "learning_rate": lr}
            results |= {"grad_norm": grad_norm, "tokens_per_second": speed}
            log("train", step, results | mfu(n_parameters, model_config, config, device, speed))
            seconds, timed_steps = 0.0, 0

# -----------------------------------------------------------------------------
# Command line

def setting(text):
    """(key, value) of a KEY=VALUE on the command line; the value is YAML, as in the files."""
    key, equals, value = text.partition("=")
    if not equals or key not in ModelConfig.__annotations__ | TrainingConfig.__annotations__:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE, with a KEY of configs/*.yaml")
    return key, yaml.safe_load(value)

def main(arguments=None):
    """Exit status 0: complete; 1: stopped by a signal, and saved; 2: failed, the last line says why."""
    configs = Path(__file__).resolve().parent / "configs"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.epilog = "Every setting is explained in the files in configs/, which KEY=VALUE overrides."
    parser.add_argument("--model_config", default=configs / f"model_config_{SIZE}.yaml", help="architecture")
    parser.add_argument("--train_config", default=configs / f"train_config_{SIZE}.yaml", help="the recipe")
    parser.add_argument("--output_dir", default=OUTPUT_DIR, type=Path, help=f"default: {OUTPUT_DIR}")
    parser.add_argument("--init_from", help="begin at step 0 with the weights of this checkpoint")
    parser.add_argument("--accept_changes", action="store_true", help="resume although settings have changed")
    parser.add_argument("settings", nargs="*", type=setting, metavar="KEY=VALUE", help="override the files")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda n, _: STOP.append(n))
    try:
        options = parser.parse_intermixed_args(arguments)
        init_distributed()
        with errors_on_all_ranks():
            model_config = load_config(ModelConfig, options.model_config, dict(options.settings))
            config = load_config(TrainingConfig, options.train_config, dict(options.settings))
        complete = train(model_config, config, options.output_dir, options.init_from, options.accept_changes)
    except (RunError, OSError, yaml.YAMLError, torch.OutOfMemoryError) as error:
        if RANK == 0 or not isinstance(error, RunError):  # a RunError is raised on rank 0, or on all ranks
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            hint = "; halve micro_batch_size and double gradient_accumulation" if out_of_memory else ""
            print(f"{Path(__file__).name}: error: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()
    if not complete:
        print0("stopped; start again to resume")
        sys.exit(1)

if __name__ == "__main__":
    main()
