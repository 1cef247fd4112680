"""Q-GQA-8 at 1.2B: grouped-query attention in which the key is the value, 8 of its heads for 32 query heads.

Tables 4 and 10 of "Do Transformers Need Three Projections? A Systematic Study of QKV Variants", ICML 2026.
One file is one experiment: any two training scripts differ only in this text, the constants, the attention
class and the name of the model class. `make sync` keeps the rest identical.

Projections  c_q, C -> C, and c_k, C -> groups x head_dim; the value is the key
KV cache     K of 8 heads, which is V too: 22 layers x 512 numbers a token, 22,528 bytes in bf16

    torchrun --nproc_per_node=8 transformer_QGQA_1_2B.py     # the paper's run; started again, it resumes
    python transformer_QGQA_1_2B.py                          # one process: one GPU, or the CPU
    python transformer_QGQA_1_2B.py --output_dir outputs_1.2B_q_gqa_masked score_padding=false seed=43

Contents: attention, model, data, evaluation, training, output folder, logging, configuration, command line.
"""

from __future__ import annotations

import signal

# Until train() handles signals, Ctrl-C ends the run without a traceback, imports included.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import sys
import time
import zipfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
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
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, ValidationError
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

try:
    from flash_attn import flash_attn_func
except ImportError:  # optional, CUDA only
    flash_attn_func = None

# [variant: constants]
VARIANT = "QGQA"  # as in this file's name
PAPER_NAME = "Q-GQA-8"
SIZE = "1.2B"  # of the default configs/*.yaml
CACHED = ("k",)  # the tensors that a layer keeps for every past token
N_KV_GROUPS = 8  # KV heads of the grouped variants; None: one for each query head
OUTPUT_DIR = "outputs_1.2B_q_gqa"
# [end of variant]

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
# without RANK, a WORLD_SIZE is left over from another job
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1

# -----------------------------------------------------------------------------
# Attention

# [variant: attention]
class CausalSelfAttention(nn.Module):
    """Q-GQA: groups of query heads share a key, which is the value too; K of the groups is cached."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        head_dim = config.n_embd // config.n_head
        self.c_q = nn.Linear(config.n_embd, config.n_embd)
        self.c_k = nn.Linear(config.n_embd, config.n_kv_groups * head_dim)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        """x [B, T, C] -> [B, T, C]; with a cache, the T tokens follow those already in it."""
        B, T, C = x.shape
        n_head, head_dim = self.config.n_head, C // self.config.n_head
        n_kv_head = self.config.n_kv_groups
        q = self.c_q(x).view(B, T, n_head, head_dim).transpose(1, 2)  # [B, n_head, T, head_dim]
        k = self.c_k(x).view(B, T, n_kv_head, head_dim).transpose(1, 2)  # [B, n_kv_head, T, head_dim]
        if cache is not None:
            (k,) = cache.append(self.layer, k)  # [B, n_kv_head, past + T, head_dim]
        y = causal_attention(q, k, k, self.config)
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
        n_rep = n_head // n_kv_head
        q = q.reshape(B, n_kv_head, n_rep, head_dim)
        if n_rep == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            q = q.repeat(1, 1, 2, 1)  # in bf16 on a CPU, two rows take SDPA half the time of one
        y = F.scaled_dot_product_attention(q, k, v)[:, :, :n_rep]
        return y.reshape(B, n_head, 1, head_dim)
    # is_causal aligns the first query with the first key; after a past (S > T) the last ones must align
    mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S, enable_gqa=n_kv_head < n_head)

class KVCache:
    """The past of every layer: one [B, n_kv_head, max_length, head_dim] tensor for each name in CACHED.

    `length` positions are filled; the model advances it once per forward pass, after all layers.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, dtype, device):
        n_kv_head = config.n_kv_groups or config.n_head
        shape = (batch_size, n_kv_head, max_length, config.n_embd // config.n_head)
        self.layers = []
        for _ in range(config.n_layer):
            self.layers.append([torch.empty(shape, dtype=dtype, device=device) for _ in CACHED])
        self.batch_size = batch_size
        self.max_length = max_length
        self.length = 0  # positions filled so far

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def append(self, layer, *new):
        """Write T new positions of a layer, [B, n_kv_head, T, head_dim] each; return all positions so far."""
        end = self.length + new[0].shape[2]
        for stored, tensor in zip(self.layers[layer], new, strict=True):
            stored[:, :, self.length : end] = tensor
        return [stored[:, :, :end].to(new[0].dtype) for stored in self.layers[layer]]

# -----------------------------------------------------------------------------
# Model

LOSS_CHUNK = 2048  # positions in each chunk of logits

@contextmanager
def eval_mode(model):
    """Switch dropout off, and restore the previous mode even after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

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
        x = x + self.mlp(self.ln_2(x))
        return x

class GPT_Q_GQA(nn.Module):
    """GPT-2 style decoder: learned positions, pre-LayerNorm, output embedding tied to the input embedding."""

    def __init__(self, config: ModelConfig):
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

    def forward(self, input_ids, labels=None, cache: KVCache | None = None):
        """int64 [B, T] -> (logits [B, T, vocab_size], None), or (None, mean loss in nats) given labels.

        Labels are the inputs, shifted here; -100 is not scored. With a cache (inference only) the T tokens
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
        B, T = input_ids.shape
        past = cache.length if cache else 0
        if past + T > self.config.n_positions:
            raise ValueError(f"{past + T} tokens do not fit n_positions, {self.config.n_positions}")
        if cache and (cache.batch_size != B or past + T > cache.max_length):
            raise ValueError(f"{B} x {past + T} tokens in a cache of {cache.batch_size} x {cache.max_length}")
        x = self.wte(input_ids) + self.wpe(torch.arange(past, past + T, device=input_ids.device))
        for block in self.h:
            x = block(x, cache)
        if cache:
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

    def make_cache(self, batch_size: int, max_length: int | None = None, dtype=None) -> KVCache:
        """An empty cache, by default for n_positions tokens and in the dtype of the forward pass."""
        device = self.wte.weight.device
        max_length = self.config.n_positions if max_length is None else max_length
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"expected at least one row and one position, got {batch_size} x {max_length}")
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else self.wte.weight.dtype
        return KVCache(self.config, batch_size, max_length, dtype, device)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True):
        """Continue the prompts, int64 [B, T], to [B, T + max_new_tokens]; temperature 0 is greedy.

        Beyond n_positions the model sees the last n_positions tokens. There each step moves every token to
        another learned position, which invalidates the cache, so the window is recomputed.
        """
        B, T = idx.shape
        window = self.config.n_positions
        if T == 0 or not temperature >= 0 or (top_k is not None and top_k < 1):  # NaN is refused too
            given = f"a prompt of {T} tokens, temperature {temperature}, top_k {top_k}"
            raise ValueError(f"expected a prompt of some tokens, temperature >= 0, top_k > 0; got {given}")
        tokens = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
        cache = self.make_cache(B, min(T + max_new_tokens, window)) if use_cache else None
        # on a CPU, a product with one row in fp32 takes half the time if the embedding is stored by columns
        head = self.wte.weight
        if head.device.type == "cpu" and head.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            head = head.t().contiguous().t()
        with eval_mode(self):
            for end in range(T, T + max_new_tokens):
                if cache and end <= window:  # prefill first, then decode one token at a time
                    hidden = self.hidden_states(tokens[:, cache.length : end], cache)
                else:
                    hidden = self.hidden_states(tokens[:, max(0, end - window) : end])
                logits = F.linear(hidden[:, -1], head).float()
                if temperature == 0:
                    tokens[:, end] = logits.argmax(dim=-1)
                    continue
                if top_k is not None:
                    kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits[logits < kth_largest] = -math.inf
                tokens[:, end] = torch.multinomial((logits / temperature).softmax(dim=-1), 1)[:, 0]
        return tokens

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

# -----------------------------------------------------------------------------
# Data, and the errors that end a run

class RunError(ValueError):
    """Ends a run with one line instead of a traceback: what is wrong, where, and what to do about it."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # libraries explain themselves in paragraphs

class OneRankError(RunError):
    """Raised on one rank while the others may know nothing of it; whoever raises it prints it."""

def require(condition, message):
    if not condition:
        raise RunError(message)

def sha256_of(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

class TokenDataset(Dataset):
    """Rows (input_ids int64 [T], is_text bool [T]) of one split of dataset_download.py, memory-mapped.

    In a chunk an end-of-text token follows every document, and offsets say where each document starts.
    padded: row i is document i, cut at seq_length or padded with end-of-text tokens, where is_text is false.
    packed: row i is the i-th slice of seq_length tokens; the last row of a chunk is padded.
    """

    def __init__(self, data_path, seq_length: int, sequence: str = "padded"):
        if sequence not in ("padded", "packed"):
            raise ValueError(f"sequence: expected padded or packed, got {sequence!r}")
        if seq_length < 1:
            raise ValueError(f"seq_length: expected at least 1, got {seq_length}")
        self.path = Path(data_path)
        self.seq_length = seq_length
        self.packed = sequence == "packed"
        self.tokens, self.offsets = [], []  # an array of each for every chunk
        sizes = []  # of the chunks, in rows
        name = "metadata.json"  # the file being read, for the message
        try:
            metadata = json.loads((self.path / name).read_text(encoding="utf-8"))
            done = metadata["finished"] and metadata["documents"] > 0 and metadata["chunks"]
            require(done, "the preparation is not finished, or found no documents")
            self.chunks, self.eos_id = metadata["chunks"], metadata["eos_id"]
            self.vocab_size = metadata["vocab_size"]
            hashes = metadata.get("tokenizer_sha256", {})
            digest = hashes.get("tokenizer.tiktoken")
            self.tokenizer = {"name": metadata["tokenizer"], "vocab_size": self.vocab_size, "sha256": digest}

            name = "token_bytes.npy"
            self.token_bytes = np.load(self.path / name).astype(np.int64)  # UTF-8 bytes of each token
            require(self.token_bytes.shape == (self.vocab_size,), f"expected {self.vocab_size} numbers")
            same = hashes.get(name) in (None, sha256_of(self.path / name))
            require(same, "changed since it was prepared")

            for chunk in self.chunks:
                n_documents = int(chunk["documents"])
                n_tokens = chunk["tokens"] + n_documents  # with their end-of-text tokens
                name = f"{chunk['name']}.tokens.npy"
                tokens = np.load(self.path / name, mmap_mode="r")
                require(tokens.shape != (chunk["tokens"],), "an older format; delete it and prepare it again")
                whole = tokens.shape == (n_tokens,) and tokens.dtype == np.uint16
                require(whole, f"expected {n_tokens} numbers in uint16, found {tokens.shape}")
                require(tokens[-1] == self.eos_id, f"ends in token {tokens[-1]}, and eos_id is {self.eos_id}")
                name = f"{chunk['name']}.offsets.npy"
                offsets = np.load(self.path / name, mmap_mode="r")
                fits = offsets.shape == (n_documents + 1,) and offsets.dtype == np.int64
                fits = fits and offsets[0] == 0 and offsets[-1] == n_tokens and (np.diff(offsets) > 0).all()
                require(fits, f"expected {n_documents + 1} int64 that rise from 0 to {n_tokens}")
                self.tokens.append(tokens)
                self.offsets.append(offsets)
                sizes.append(math.ceil(n_tokens / seq_length) if self.packed else n_documents)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
            how = f"run dataset_download.py --output_dir {self.path.parent}"
            raise RunError(f"{self.path}: no complete token files: {name}: {error}; {how}") from error
        self.first_rows = np.cumsum([0, *sizes])  # where each chunk starts; the last entry counts all rows

    def verify(self):
        """Check the SHA-256 of every chunk: 20 GB at 10B tokens, half a minute from a local disk."""
        for chunk in self.chunks:
            for kind in ("tokens", "offsets"):
                path = self.path / f"{chunk['name']}.{kind}.npy"
                same = sha256_of(path) == chunk.get(f"{kind}_sha256")
                require(same, f"{path}: changed since it was prepared")

    def __len__(self):
        return int(self.first_rows[-1])

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        chunk = bisect_right(self.first_rows, i) - 1
        row = i - self.first_rows[chunk]
        tokens, offsets = self.tokens[chunk], self.offsets[chunk]
        if self.packed:
            ids = tokens[row * self.seq_length : (row + 1) * self.seq_length]
        else:  # without its end-of-text token
            ids = tokens[offsets[row] : offsets[row + 1] - 1][: self.seq_length]
        if len(ids) and ids.max() >= self.vocab_size:
            name = f"{self.path}/{self.chunks[chunk]['name']}.tokens.npy"
            raise OneRankError(f"{name}: a token beyond the vocabulary")
        input_ids = np.full(self.seq_length, self.eos_id, dtype=np.int64)
        input_ids[: len(ids)] = ids
        return torch.from_numpy(input_ids), torch.arange(self.seq_length) < len(ids)

    def decode(self, token_ids) -> str:
        """The text of token ids, by the tokenizer that dataset_download.py keeps beside the data."""
        lines = (self.path / "tokenizer.tiktoken").read_bytes().splitlines()
        pieces = {int(i): base64.b64decode(piece) for piece, i in map(bytes.split, lines)}
        return b"".join(pieces.get(i, b"<|endoftext|>") for i in token_ids).decode("utf-8", errors="replace")

def shuffled_batches(n_rows, batch_size, seed, rows_seen, rank, world_size):
    """Endless micro batches of row numbers for one rank, from row `rows_seen` of the run on.

    Epoch e reads the rows in a permutation that depends on (seed, e) alone, and ranks take micro batches in
    turn. So neither the world size nor a resume changes the global batch of a step. Positions count the rows
    of the whole run, over all epochs.
    """
    epoch = None
    for first in count(rows_seen + rank * batch_size, world_size * batch_size):
        batch = []
        for position in range(first, first + batch_size):
            if position // n_rows != epoch:
                epoch = position // n_rows
                permutation = np.random.default_rng((seed, epoch)).permutation(n_rows)
            batch.append(int(permutation[position % n_rows]))
        yield batch

def get_dataloader(data_path, batch_size, seq_length, sequence="padded", seed=None, rows_seen=0,
                   rank=RANK, world_size=WORLD_SIZE) -> DataLoader:
    """This rank's batches (input_ids int64 [B, T], is_text bool [B, T]) of TokenDataset's rows.

    Without a seed: every row once, in order. With one: shuffled and endless, from row `rows_seen` of the run.
    ValueError for an unknown `sequence`, a size or rank out of range, or data that cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    dataset = TokenDataset(data_path, seq_length, sequence)
    if seed is None:
        firsts = range(rank * batch_size, len(dataset), world_size * batch_size)
        batches = [range(first, min(first + batch_size, len(dataset))) for first in firsts]
    else:
        batches = shuffled_batches(len(dataset), batch_size, seed, rows_seen, rank, world_size)
    return DataLoader(dataset, batch_sampler=batches, pin_memory=torch.cuda.is_available())

# -----------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(model, val_loader, max_batches: int | None = None, received=()) -> dict | None:
    """Evaluate on val_loader, or on its first max_batches batches. Autocast is up to the caller.

    Each rank scores its share and the sums are added, so the world size does not change the result. Returns
    loss, perplexity: nats per token over all positions, padding included (the paper's protocol), and its exp;
    text_loss, text_perplexity: over text only; bits_per_byte: of its UTF-8; padding_fraction: of positions.
    None if a signal arrives meanwhile. RunError if there is nothing to score, ValueError for wrong arguments.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: expected at least 1, got {max_batches}")
    if max_batches is None and isinstance(getattr(val_loader, "batch_sampler", None), Iterator):
        raise ValueError("max_batches: expected a number for a shuffled loader, which is endless")
    dataset = val_loader.dataset
    size, limit = len(dataset.token_bytes), model.config.vocab_size
    if size > limit:
        raise ValueError(f"vocab_size: {size} tokens in the data, {limit} in the model")

    # max_batches counts those of all ranks, which take them in turn
    share = None if max_batches is None else len(range(RANK, max_batches, WORLD_SIZE))
    token_bytes = torch.from_numpy(dataset.token_bytes)
    device = model.wte.weight.device
    sums = torch.zeros(7, dtype=torch.float64)  # as unpacked below
    with eval_mode(model):
        for input_ids, is_text in islice(val_loader, share):
            if received:  # signals to stop
                break
            inputs = input_ids.to(device)
            losses = model.token_losses(model.hidden_states(inputs), inputs).cpu().double()
            text = is_text[:, 1:]  # the first token of a row has none before it
            text_bytes = (token_bytes[input_ids[:, 1:]] * text).sum()
            counts = losses.numel(), text.sum(), text_bytes, (~is_text).sum(), is_text.numel()
            sums += torch.tensor([losses.sum(), (losses * text).sum(), *counts], dtype=torch.float64)
    parts = all_gather(None if received else sums)
    if any(part is None for part in parts):
        return None
    nats, text_nats, positions, text_positions, text_bytes, padding, total = sum(parts).tolist()
    require(text_positions, f"{dataset.path}: no document of two tokens or more, nothing to score")
    loss = nats / positions
    text_loss = text_nats / text_positions
    results = {"loss": loss, "perplexity": float(np.exp(loss))}
    results |= {"text_loss": text_loss, "text_perplexity": float(np.exp(text_loss))}
    results["bits_per_byte"] = text_nats / math.log(2) / text_bytes if text_bytes else math.nan
    return results | {"padding_fraction": padding / total}

# -----------------------------------------------------------------------------
# Training

LOWER_RATE = "Lower learning_rate and resume with --accept_changes."

def get_lr(step: int, config: TrainingConfig) -> float:
    """The rate of update number `step`, from 0 on: linear warm-up, then from learning_rate to min_lr."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    decay = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1}
    return config.min_lr + decay[config.lr_scheduler] * (config.learning_rate - config.min_lr)

def train(model_config, config, output_dir, resume="auto", init_from=None, accept_changes=False) -> int:
    """Train to the last step, or until a signal asks to stop; returns 0, or the number of that signal."""
    device = init_distributed()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    # data and output folder: what does not fit together is refused before anything is written
    with errors_on_all_ranks():
        accumulation_steps = accumulation_for(config, WORLD_SIZE)
        loader_args = (config.micro_batch_size, config.seq_length, config.sequence)
        train_set = TokenDataset(config.train_data, config.seq_length, config.sequence)
        val_loader = get_dataloader(config.val_data, *loader_args)
        run = describe_run(model_config, config, train_set, val_loader.dataset, init_from)
    require_same_on_all_ranks("settings and data", run)
    with errors_on_all_ranks():
        found = [] if resume == "never" else checkpoints(output_dir)
        start = find_start(output_dir, resume, run, config.total_steps, accept_changes) if RANK == 0 else None
    path, evaluated_at, saved_at, run = all_gather(start)[0]  # rank 0 decides

    # the checkpoint to start from: this run's, or another's for its weights; the same file on all ranks
    source = path or init_from
    if source:
        with errors_on_all_ranks():
            checkpoint = read_checkpoint(source, to_resume=path is not None)
            recorded = checkpoint.get("tokenizer")  # released checkpoints do not say
            digest = recorded.get("sha256") if isinstance(recorded, dict) else None
            same = digest in (None, train_set.tokenizer["sha256"])
            require(same, f"{source}: was trained with another tokenizer than that of {config.train_data}")
            parts = [(part.filename, part.CRC) for part in zipfile.ZipFile(source).infolist()]
        require_same_on_all_ranks(source, parts)

    # model and optimizer; one parameter group, since the published recipe decays biases and LayerNorms too
    with errors_on_all_ranks():
        torch.manual_seed(config.seed)
        model = GPT_Q_GQA(model_config).to(device)
        recipe = {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **recipe)
        step = checkpoint["step"] if path else 0
        if source:
            load_weights(model, checkpoint, source)
        if path:
            train_set.verify()
            val_loader.dataset.verify()
            load_optimizer(optimizer, checkpoint, path)
            optimizer.param_groups[0].update(recipe)  # over the recorded one: a change may be accepted
        checkpoint = None  # or its file would stay mapped to memory
        rows_seen = step * config.rows_per_step
        batches = iter(get_dataloader(config.train_data, *loader_args, config.seed, rows_seen))

    # from here on the folder is this run's: rank 0 keeps others out
    with errors_on_all_ranks():
        lock = lock_output_dir(output_dir, resume == "never") if RANK == 0 else nullcontext()

    # compile if asked to, and print what will run
    if config.compile is True or (config.compile == "auto" and device.type == "cuda"):
        model.compile()
    n_parameters = sum(p.numel() for p in model.parameters())
    print0(f"{PAPER_NAME}: {n_parameters:,} parameters, {config.precision} on {device}")
    batch = f"{config.micro_batch_size} rows x {accumulation_steps} accumulation steps x {WORLD_SIZE} ranks"
    print0(f"{config.total_steps:,} steps of {batch}, {config.tokens_per_step:,} tokens")
    if path:
        print0(f"resuming from {path} at step {step} of {config.total_steps}")
    elif init_from:
        print0(f"starting at step 0 with the weights of {init_from}")

    score_padding = config.sequence == "padded" and config.score_padding
    stopping = False
    skipped_in_a_row = 0
    seconds, timed_steps, skipped = 0.0, 0, 0  # since the last train record
    with lock, stop_signals() as received:
        with errors_on_all_ranks():
            # another run may have saved between the first look and the lock
            same = RANK > 0 or checkpoints(output_dir) == found
            require(same, f"{output_dir}: another run has just saved there; start again")
            finished = config.total_steps == step == evaluated_at == saved_at
            log = Logger(output_dir, run, config, step, finished)
        while True:  # the last iteration only evaluates and saves
            last_step = step == config.total_steps

            # once in a while, and at the end: evaluate
            if (last_step or step % config.eval_interval == 0) and step != evaluated_at and not stopping:
                with autocast:
                    results = evaluate(model, val_loader, config.eval_batches, received)
                stopping = results is None
                if results:
                    finite = math.isfinite(results["loss"])
                    require(finite, f"step {step}: the validation loss is {results['loss']}. {LOWER_RATE}")
                    log("final" if last_step else "val", step, results)
                    evaluated_at = step

            # once in a while, at the end and when told to stop: save
            complete = last_step and not stopping
            if (complete or stopping or step % config.save_interval == 0) and step != saved_at:
                finite = all(p.isfinite().all() for p in model.parameters())
                require(finite, f"step {step}: weights are not finite, and not saved. {LOWER_RATE}")
                if RANK == 0:
                    progress = {"step": step, "epoch": rows_seen // len(train_set)}
                    save_checkpoint(output_dir, run | progress, model, optimizer, config, complete)
                    if config.sample_tokens and not stopping:
                        write_samples(output_dir, step, model, val_loader.dataset, config, autocast)
                saved_at = step
            if complete or stopping:
                all_gather(None)  # torchrun ends all ranks soon after the first: wait for rank 0 to save
                break

            # forward and backward over this rank's share of the global batch; gradients of the summed loss
            t0 = time.perf_counter()
            loss_sum, n_scored = torch.zeros(2, device=device)
            for micro_step in range(accumulation_steps):
                input_ids, is_text = (tensor.to(device, non_blocking=True) for tensor in next(batches))
                labels = input_ids if score_padding else input_ids.masked_fill(~is_text, -100)
                # dropout is seeded by the micro batch's first row, and so does not depend on the world size
                row = rows_seen + (micro_step * WORLD_SIZE + RANK) * config.micro_batch_size
                torch.manual_seed(int(np.random.SeedSequence((config.seed, row)).generate_state(1)[0]))
                with autocast:
                    _, loss = model(input_ids, labels)
                n = (labels[:, 1:] != -100).sum()
                (loss * n).backward()
                loss_sum += loss.detach() * n
                n_scored += n

            # sum over the ranks, once a step, and divide by the scored tokens of the global batch; a signal
            # to one rank stops all of them
            totals = torch.stack([loss_sum, n_scored, loss_sum.new_tensor(len(received))])
            if dist.is_initialized():
                for tensor in [totals, *(p.grad for p in model.parameters())]:
                    dist.all_reduce(tensor)
            for p in model.parameters():
                p.grad.mul_(1 / totals[1])
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            loss_sum, n_scored, stopped, grad_norm = torch.stack([*totals, grad_norm]).tolist()  # host sync
            require(n_scored, f"step {step + 1}: nothing to score in a global batch of {config.train_data}")
            loss = loss_sum / n_scored
            stopping = stopped > 0
            require(math.isfinite(loss), f"step {step + 1}: the loss is {loss}. {LOWER_RATE}")

            # update, unless the gradient norm is too large or not a number
            lr = get_lr(step, config)
            optimizer.param_groups[0]["lr"] = lr
            if grad_norm <= config.skip_grad_norm:
                optimizer.step()
                skipped_in_a_row = 0
            else:
                print0(f"warning: step {step + 1}: update skipped, its gradient norm is {grad_norm}")
                skipped += 1
                skipped_in_a_row += 1
                require(skipped_in_a_row < 10, f"step {step + 1}: 10 updates skipped in a row. {LOWER_RATE}")
            optimizer.zero_grad(set_to_none=True)
            step += 1
            rows_seen += config.rows_per_step

            # once in a while: log
            seconds += time.perf_counter() - t0
            timed_steps += 1
            if step % config.log_interval == 0 or step == config.total_steps:
                speed = timed_steps * config.tokens_per_step / seconds
                results = {"loss": loss, "perplexity": float(np.exp(loss)), "learning_rate": lr}
                results |= {"grad_norm": grad_norm, "tokens_per_second": speed}
                if skipped:
                    results["skipped_updates"] = skipped
                log("train", step, results | mfu(model, config, device, speed))
                seconds, timed_steps, skipped = 0.0, 0, 0
    log.close(model, step, device, complete)
    if complete:
        return 0
    return received[0] if received else signal.SIGTERM  # another rank received it

def accumulation_for(config, world_size) -> int:
    """Gradient accumulation steps of each process; every world size shares the same global batch."""
    total = config.gradient_accumulation * config.num_gpus
    if total % world_size:
        sizes = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise RunError(f"{world_size} ranks cannot share {total} micro batches; use {sizes}")
    return total // world_size

def mfu(model, config, device, tokens_per_second) -> dict:
    """Model FLOPs utilisation: the share of the dense bf16 peak of all GPUs, if it is known."""
    # dense bf16 TFLOP/s; the first match wins, so the longer names come first
    peaks = {"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((1e12 * peak for name, peak in peaks.items() if name in gpu), None)
    n_parameters = sum(p.numel() for p in model.parameters())
    flops = 6 * n_parameters + 12 * model.config.n_layer * model.config.n_embd * config.seq_length
    return {"mfu": flops * tokens_per_second / (peak * WORLD_SIZE)} if peak else {}

# -----------------------------------------------------------------------------
# Output folder: what it holds decides whether a run may start there; checkpoints

MAY_CHANGE = (  # on a resume: text, global batch and recipe stay the same
    "micro_batch_size", "gradient_accumulation", "num_gpus", "train_data", "val_data", "use_flash_attention",
    "compile", "log_interval", "eval_interval", "eval_batches", "save_interval", "keep_checkpoints",
    "sample_tokens", "wandb",
)
ARCHITECTURE = {  # what weights are tied to
    "variant", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "n_kv_groups",
    "layer_norm_epsilon",
}
NEVER_CHANGES = ARCHITECTURE | {"init_from", "training text", "validation text", "seq_length", "global batch"}
WAYS_ON = "use another --output_dir, or --resume never to move the old run aside"

def describe_run(model_config, config, train_set, val_set, init_from) -> dict:
    """What a run is, as its files record it; RunError if model and data do not go together."""
    length, longest = config.seq_length, model_config.n_positions
    require(length <= longest, f"seq_length: expected at most n_positions ({longest}), got {length}")
    size, limit = train_set.vocab_size, model_config.vocab_size
    require(size <= limit, f"vocab_size: expected at least {size} for {train_set.path}, got {limit}")
    same = val_set.tokenizer == train_set.tokenizer
    require(same, f"{val_set.path}: its tokenizer is not that of {train_set.path}; prepare both alike")
    if val_set.chunks == train_set.chunks:
        print0("warning: val_data is the text of train_data, so its perplexity is of text seen in training")
    run = {"variant": VARIANT, "model_config": asdict(model_config), "train_config": asdict(config)}
    if N_KV_GROUPS is None:  # as in the release
        del run["model_config"]["n_kv_groups"]
    data = {"train_data": train_set.chunks, "val_data": val_set.chunks, "tokenizer": train_set.tokenizer}
    return run | data | {"init_from": init_from and str(Path(init_from)), "changes": []}

def facts_of(run) -> dict:
    """All that can change the result of a run."""
    config = run["model_config"] | run["train_config"]
    facts = {key: value for key, value in config.items() if key not in MAY_CHANGE}
    for name, split in {"training text": "train_data", "validation text": "val_data"}.items():
        facts[name] = "sha256 " + hashlib.sha256(json.dumps(run[split]).encode()).hexdigest()[:8]
    rows = config["micro_batch_size"] * config["gradient_accumulation"] * config["num_gpus"]
    return facts | {"variant": run["variant"], "init_from": run["init_from"], "global batch": rows}

def find_start(output_dir, resume, run, total_steps, accept_changes):
    """(the checkpoint's path or None, its step if evaluated, its step if saved, the run to record).

    RunError if output_dir holds a run that these settings would not continue as it began. Writes nothing.
    """
    path, recorded = find_checkpoint(output_dir, resume)
    if recorded is None:
        return None, None, 0, run  # step 0, where there is nothing to save
    step = recorded["step"] if path else 0
    require(step <= total_steps, f"{path}: at step {step}, these settings end at {total_steps}; {WAYS_ON}")
    if path and not run["init_from"]:  # it need not be given again
        run = run | {"init_from": recorded.get("init_from")}
    changes = changes_since(recorded, run, path or output_dir, accept_changes)
    here = path is None or path.parent.resolve() == output_dir.resolve()
    held = None if here else find_checkpoint(output_dir, "auto")[1]
    if held is not None:  # the checkpoint is from elsewhere, and this folder holds a run of its own
        changes_since(held, run, output_dir, accept_changes=False)

    # what is done of this step, by the log and by the files
    kind = "final" if step == total_steps else "val"
    records = read_metrics(output_dir / "metrics.jsonl") if path else []  # at step 0 the log starts again
    evaluated = (kind, step) in [(record["kind"], record["step"]) for record in records]
    saved = here and step < total_steps
    if here and step == total_steps:
        with suppress(RunError):  # final_model.pt may be missing, damaged, or of a shorter run
            saved = read_checkpoint(output_dir / "final_model.pt").get("step") == step

    history = recorded.get("changes") or []
    if changes:
        complete = step == total_steps and evaluated and saved
        require(not complete, f"{output_dir}: complete at step {step}, too late for {changes}; {WAYS_ON}")
        history = [*history, f"step {step}: {changes}"]
    return path, step if evaluated else None, step if saved else None, run | {"changes": history}

def changes_since(recorded, run, place, accept_changes) -> str:
    """What a run changes in the settings that were recorded; RunError if that is not accepted."""
    try:
        before = facts_of(recorded)
    except (LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{place}: does not record its settings ({error}); {WAYS_ON}") from error
    now = facts_of(run)
    changed = {key for key in now.keys() & before.keys() if before[key] != now[key]}
    changes = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in sorted(changed))
    ways_on = WAYS_ON
    if not changed & (ARCHITECTURE | {"init_from"}):
        ways_on += ", or start there from its weights with --init_from"
    if not changed & NEVER_CHANGES:
        ways_on += ", or resume despite them with --accept_changes"
    accepted = not changed or (accept_changes and not changed & NEVER_CHANGES)
    require(accepted, f"{place}: a run with other settings, {changes}; {ways_on}")
    return changes

def find_checkpoint(output_dir, resume):
    """(path, contents) of the checkpoint to resume: the newest whole one (auto), or the one `resume` names.

    (None, its run.yaml) for a run that ended before its first checkpoint; (None, None) for no run, or never.
    """
    if resume == "never":
        return None, None
    if resume != "auto":
        contents = read_checkpoint(resume, to_resume=True)
        later = [path.name for step, path in checkpoints(output_dir) if step > contents["step"]]
        require(not later, f"{output_dir}: holds {', '.join(later)}, beyond {resume}; {WAYS_ON}")
        return Path(resume), contents
    for _, path in checkpoints(output_dir):
        try:
            return path, read_checkpoint(path, to_resume=True)
        except RunError as error:
            print0(f"warning: skipping {error}")
    unusable = checkpoints(output_dir) or (output_dir / "final_model.pt").exists()
    require(not unusable, f"{output_dir}: holds a run and no checkpoint to resume it from; {WAYS_ON}")
    return None, read_run(output_dir)

def read_run(output_dir):
    """The run.yaml of a folder; None if it has none."""
    try:
        return yaml.safe_load((output_dir / "run.yaml").read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{output_dir}/run.yaml: cannot be read ({error}); {WAYS_ON}") from error

def lock_output_dir(output_dir, move_aside):
    """Keep other runs out of the folder; the kernel releases the lock when this process ends."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = open(output_dir / "run.lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"{output_dir}: another run is writing to it; use another --output_dir") from error
    except OSError as error:
        raise RunError(f"{output_dir}: the file system has no locks: {error}") from error
    if not move_aside or os.listdir(output_dir) == ["run.lock"]:
        return lock
    aside = next(path for n in count(1) if not (path := Path(f"{output_dir}.old_{n}")).exists())
    output_dir.rename(aside)
    print0(f"moved the run in {output_dir} to {aside}")
    return lock_output_dir(output_dir, move_aside=False)  # a new folder under the old name

def checkpoints(output_dir) -> list:
    """(step, path) of each checkpoint in a folder, the newest first."""
    names = (re.fullmatch(r"checkpoint_step_(\d+)\.pt", path.name) for path in output_dir.glob("*.pt"))
    return sorted(((int(name[1]), output_dir / name[0]) for name in names if name), reverse=True)

def save_checkpoint(output_dir, contents, model, optimizer, config, complete):
    """Write checkpoint_step_N.pt, at the end final_model.pt too; drop all but the newest keep_checkpoints."""
    step = contents["step"]
    final = contents | {"model_state_dict": model.state_dict(), "tokens_seen": step * config.tokens_per_step}
    if complete:
        write_atomically(output_dir / "final_model.pt", lambda file: torch.save(final, file))
    rows_seen = step * config.rows_per_step
    resumable = final | {"rows_seen": rows_seen, "optimizer_state_dict": optimizer.state_dict()}
    write_atomically(output_dir / f"checkpoint_step_{step}.pt", lambda file: torch.save(resumable, file))
    if config.keep_checkpoints:
        saved = [path for at, path in checkpoints(output_dir) if at <= step]  # a damaged one may be later
        for path in saved[config.keep_checkpoints :]:
            path.unlink()

def write_samples(output_dir, step, model, val_set, config, autocast):
    """Continue the beginnings of three rows of the validation data through the KV cache."""
    torch.manual_seed(config.seed)
    try:
        prompts = torch.stack([val_set[len(val_set) * third // 3][0][:32] for third in range(3)])
        T = prompts.shape[1]
        with autocast:
            idx = model.generate(prompts.to(model.wte.weight.device), config.sample_tokens, 0.8, top_k=50)
        texts = [f"{val_set.decode(row[:T])} [...] {val_set.decode(row[T:])}\n" for row in idx.tolist()]
        path, text = output_dir / f"samples_step_{step}.txt", "\n".join(texts)
        write_atomically(path, lambda file: file.write(text.encode()))
    except Exception as error:  # the checkpoint is saved: a failed sample must not end the run
        print0(f"warning: no samples at step {step}: {error}")

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

def read_checkpoint(path, to_resume=False) -> dict:
    """The contents of a checkpoint or final_model.pt, ours or a released one; RunError if it is damaged.

    Its bytes are checked against the CRCs in the file. To resume, it must hold the place in the data.
    """
    try:
        damaged = zipfile.ZipFile(path).testzip()  # about 3 GB a second
        require(damaged is None, f"the CRC of {damaged} is wrong")
        contents = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        # released checkpoints carry DDP's prefix, and the causal mask of each layer
        weights = {name.removeprefix("module."): w for name, w in contents["model_state_dict"].items()}
        contents["model_state_dict"] = {n: w for n, w in weights.items() if not n.endswith(".attn.bias")}
    except Exception as error:  # a file of another kind can fail in any way
        raise RunError(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})") from error
    variant = contents.get("variant", VARIANT)  # released checkpoints do not say
    script = Path(__file__).name.replace(f"_{VARIANT}_", f"_{variant}_")
    require(variant == VARIANT or to_resume, f"{path}: not a checkpoint of {PAPER_NAME}, but of {script}")
    whole = not to_resume or {"rows_seen", "optimizer_state_dict"} <= contents.keys()
    require(whole, f"{path}: holds weights and no place in the data; start from them with --init_from")
    step = contents.get("step")
    require(not to_resume or (isinstance(step, int) and step >= 0), f"{path}: its step is {step!r}")
    return contents

def load_weights(model, contents, path):
    """Copy the weights of a checkpoint into the model; RunError if it was made with another configuration."""
    recorded = contents.get("model_config")
    require(isinstance(recorded, dict), f"{path}: records no model_config")
    for key, value in asdict(model.config).items():
        saved = recorded.get(key)
        fits = saved in (None, value) or key not in ARCHITECTURE  # released checkpoints leave out defaults
        require(fits, f"{path}: made with {key} {saved}, and the configuration asks for {value}")
    try:
        model.load_state_dict(contents["model_state_dict"])
    except RuntimeError as error:
        raise RunError(f"{path}: not the weights of {PAPER_NAME} in this configuration") from error

def load_optimizer(optimizer, contents, path):
    """Restore AdamW's state from a checkpoint; RunError if it does not fit the model."""
    try:
        optimizer.load_state_dict(contents["optimizer_state_dict"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: its optimizer_state_dict does not fit the model: {error!r}") from error

def load_model(path, device="cpu") -> GPT_Q_GQA:
    """The model in a checkpoint or final_model.pt, ours or a released one, in eval mode.

    RunError, a ValueError, if the file is damaged or of another variant; it names the right script.
    """
    contents = read_checkpoint(path)
    try:
        config = {k: v for k, v in contents["model_config"].items() if k in ModelConfig.__annotations__}
        with torch.device("meta"):  # allocates nothing: the weights come out of the file
            model = GPT_Q_GQA(ModelConfig(**config))
    except (KeyError, AttributeError, ValueError) as error:
        raise RunError(f"{path}: its model_config is not one of {PAPER_NAME}: {error}") from error
    load_weights(model.to_empty(device=device), contents, path)
    return model.eval()

# -----------------------------------------------------------------------------
# Logging and processes

class Logger:
    """Rank 0's logging: settings as YAML, metrics.jsonl, the progress bar, and wandb if asked."""

    def __init__(self, output_dir, run, config, step, finished):
        self.config = config
        self.path = output_dir / "metrics.jsonl"
        self.wandb = None
        hidden = RANK > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=config.total_steps, initial=step, unit="step", disable=hidden)
        if RANK > 0 or finished:
            return
        for name in ("checkpoint_step_*.pt", "final_model.pt", "samples_step_*.txt"):
            for leftover in output_dir.glob(f"{name}.tmp"):  # of a killed run
                leftover.unlink()
        # a killed run has logged steps beyond its last checkpoint; they are taken, and logged, again
        records = read_metrics(self.path) if step else []
        kept = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
        texts = {"metrics.jsonl": "".join(kept), "run.yaml": yaml.safe_dump(run, sort_keys=False)}
        for name in ("model_config", "train_config"):
            texts[f"{name}.yaml"] = yaml.safe_dump(run[name], sort_keys=False)
        for name, text in texts.items():
            write_atomically(output_dir / name, lambda file, text=text: file.write(text.encode()))
        if config.wandb != "disabled":
            try:  # a failure of wandb must not end the run
                import wandb

                options = {"name": output_dir.name, "dir": output_dir, "mode": config.wandb, "config": run}
                options["settings"] = wandb.Settings(init_timeout=30)
                self.wandb = wandb.init(project="qkv-variants", **options)
            except Exception as error:
                print0(f"warning: wandb disabled: {error}")

    def __call__(self, kind, step, results):
        """Add a train, val or final record."""
        if RANK > 0:
            return
        record = {"kind": kind, "step": step, "tokens": step * self.config.tokens_per_step} | results
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        try:
            if self.wandb:
                self.wandb.log({f"{kind}/{key}": value for key, value in results.items()}, step=step)
        except Exception as error:
            print0(f"warning: wandb disabled: {error}")
            self.wandb = None
        self.bar.update(step - self.bar.n)
        if kind == "train":
            speed = results["tokens_per_second"]
            left = (self.config.total_steps - step) * self.config.tokens_per_step / speed
            text = f"loss {results['loss']:.4f}, {speed:,.0f} tokens/s"
            self.bar.set_postfix_str(text)  # the bar itself shows the time left
            text += f", {tqdm.format_interval(left)} left"
        else:
            text = f"perplexity {results['perplexity']:.3f}, over text only {results['text_perplexity']:.3f}"
        if kind != "train" or self.bar.disable:
            print0(f"step {step} of {self.config.total_steps}, {kind}: {text}")

    def close(self, model, step, device, complete):
        """Print the final summary."""
        self.bar.close()
        if not complete:
            return print0(f"stopped at step {step}; start again to resume")
        evaluations = [record for record in read_metrics(self.path) if record["kind"] != "train"]
        unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        print0(f"{PAPER_NAME}, complete after {step} steps, in {self.path.parent}")
        for record in evaluations[:: max(1, len(evaluations) - 1)]:  # the first and the last
            print0(f"text perplexity  {record['text_perplexity']:.2f} at step {record['step']}")
        print0(f"peak memory      {peak / 1e9:.2f} GB of rank 0 on {device.type}")
        c = model.config
        nbytes = model.make_cache(1, 1, torch.bfloat16).nbytes * c.n_positions
        qkv = 2 * 2 * c.n_layer * c.n_positions * c.n_embd  # K and V, two bytes a number
        print0(f"KV cache         {nbytes:,} bytes for {c.n_positions:,} tokens in bf16; QKV takes {qkv:,}")

def print0(text):
    """Print on rank 0, above the progress bar; a closed pipe or a full disk there never ends a run."""
    try:
        if RANK == 0:
            tqdm.write(text)
            sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115

def read_metrics(path) -> list[dict]:
    """The records of a metrics.jsonl, without lines that a kill cut short."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and "kind" in r and isinstance(r.get("step"), int)]

def init_distributed() -> torch.device:
    """Join the other processes of torchrun, if there are any; returns the device of this one."""
    n_gpus = torch.cuda.device_count()
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")  # mps: not tried
    if n_gpus:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % n_gpus)
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        if 0 < n_gpus < n_processes:
            print0(f"warning: {n_processes} processes share {n_gpus} GPU; start one process for each GPU")
        try:
            dist.init_process_group("nccl" if n_gpus >= n_processes else "gloo")
        except (ValueError, RuntimeError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise OneRankError(f"the processes could not meet at {address}: {error}") from error
    return device

def all_gather(value) -> list:
    """The value of every rank, by rank."""
    values = [value] * WORLD_SIZE
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

def require_same_on_all_ranks(name, value):
    """RunError if the value differs, as when a path leads to another file on another node."""
    values = all_gather(value)
    others = [rank for rank in range(WORLD_SIZE) if values[rank] != values[0]]
    require(not others, f"{name}: rank {others} differs from rank 0; do all nodes see the same files?")

@contextmanager
def errors_on_all_ranks():
    """An error of one rank is raised on all of them, so that none hangs and it is printed once."""
    own = None
    try:
        yield
    except Exception as error:
        own = error
    failed = [message for message in all_gather(own and (str(own) or repr(own))) if message]
    if own and not isinstance(own, OSError | MemoryError | RuntimeError | RunError):
        raise own  # an error of the program keeps its traceback
    if failed:
        raise RunError(failed[0]) from own

@contextmanager
def stop_signals():
    """Collect SIGTERM, SIGHUP (a closed terminal) and Ctrl-C in a list, so that a step can end first."""
    received, handlers = [], {}
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            handlers[number] = signal.signal(number, lambda n, _: received.append(n))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

# -----------------------------------------------------------------------------
# Configuration

CHECKS = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
PositiveInt = Annotated[int, Field(gt=0, lt=2**60)]  # larger sizes overflow in torch

@dataclass(kw_only=True, config=CHECKS)
class ModelConfig:
    vocab_size: PositiveInt = Field(50304, description="GPT-2's 50,257 tokens, padded to a multiple of 128")
    n_positions: PositiveInt = Field(2048, description="context length; positions are learned")
    n_embd: PositiveInt = Field(description="width, C")
    n_layer: PositiveInt = Field(description="layers")
    n_head: PositiveInt = Field(description="query heads; head_dim is n_embd / n_head")
    n_inner: PositiveInt | None = Field(None, description="width of the MLP; null: 4 n_embd")
    n_kv_groups: PositiveInt | None = Field(N_KV_GROUPS, description="KV heads of the grouped variants")
    dropout: NonNegativeFloat = Field(0.1, lt=1, description="on the outputs of attention and MLP")
    layer_norm_epsilon: PositiveFloat = Field(1e-5, description="of every LayerNorm")
    initializer_range: PositiveFloat = Field(0.02, description="standard deviation of the initial weights")
    use_flash_attention: bool = Field(True, description="flash-attn, if it is installed and fits: CUDA, bf16")

    def __post_init__(self):
        self.n_inner = self.n_inner or 4 * self.n_embd
        C, n_head = self.n_embd, self.n_head
        require(C % n_head == 0, f"n_embd: expected a multiple of n_head ({n_head}), got {C}")
        fits, expected = self.n_kv_groups == N_KV_GROUPS, N_KV_GROUPS or "null"
        if N_KV_GROUPS not in (None, 1):
            fits = self.n_kv_groups and n_head % self.n_kv_groups == 0
            expected = f"a divisor of n_head ({n_head})"
        require(fits, f"n_kv_groups: expected {expected} for {PAPER_NAME}, got {self.n_kv_groups}")

@dataclass(kw_only=True, config=CHECKS)
class TrainingConfig:
    train_data: str = Field(description="folder of a split that dataset_download.py wrote")
    val_data: str = Field(description="folder of the split to evaluate on")
    sequence: Literal["padded", "packed"] = Field(description="padded: a document a row; packed: full rows")
    score_padding: bool = Field(description="score the padding in the training loss, as published")
    seq_length: PositiveInt = Field(ge=2, description="tokens in a row")
    micro_batch_size: PositiveInt = Field(description="rows in one forward and backward pass")
    gradient_accumulation: PositiveInt = Field(description="passes of each GPU in a step")
    num_gpus: PositiveInt = Field(description="GPUs of the published run; any world size shares its batch")
    target_tokens: PositiveInt = Field(description="tokens to train on, padding included")
    learning_rate: PositiveFloat = Field(description="at the end of the warm-up")
    min_lr: NonNegativeFloat = Field(description="where the decay ends")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(description="from learning_rate to min_lr")
    warmup_steps: NonNegativeInt = Field(description="steps of linear warm-up")
    weight_decay: NonNegativeFloat = Field(description="of AdamW, on every parameter")
    beta1: NonNegativeFloat = Field(lt=1, description="of AdamW")
    beta2: NonNegativeFloat = Field(lt=1, description="of AdamW")
    grad_clip: PositiveFloat = Field(description="gradients of a larger norm are scaled down to it")
    skip_grad_norm: PositiveFloat = Field(description="an update with a larger gradient norm is skipped")
    seed: NonNegativeInt = Field(lt=2**63, description="of weights, order of the data and dropout")
    precision: Literal["bf16", "fp32"] = Field(description="bf16: autocast, the weights stay fp32")
    compile: Literal["auto"] | bool = Field(description="torch.compile; auto: on CUDA")
    log_interval: PositiveInt = Field(description="steps between train records")
    eval_interval: PositiveInt = Field(description="steps between evaluations")
    eval_batches: PositiveInt | None = Field(description="batches of an evaluation; null: all")
    save_interval: PositiveInt = Field(description="steps between checkpoints")
    keep_checkpoints: PositiveInt | None = Field(description="how many of the newest to keep; null: all")
    sample_tokens: NonNegativeInt = Field(description="length of the samples beside each checkpoint; 0: none")
    wandb: Literal["disabled", "offline", "online"] = Field(description="log to Weights & Biases too")

    def __post_init__(self):
        self.rows_per_step = self.micro_batch_size * self.gradient_accumulation * self.num_gpus
        self.tokens_per_step = self.rows_per_step * self.seq_length
        self.total_steps = steps = self.target_tokens // self.tokens_per_step
        one = f"one step ({self.tokens_per_step} tokens) at least"
        require(steps, f"target_tokens: expected {one}, got {self.target_tokens}")
        lr, warmup = self.learning_rate, self.warmup_steps
        require(self.min_lr <= lr, f"min_lr: expected at most learning_rate ({lr}), got {self.min_lr}")
        require(warmup <= steps, f"warmup_steps: expected at most {steps}, the whole run, got {warmup}")

def load_config(cls, path, overrides):
    """A config from a YAML file and from those KEY=VALUE overrides that are fields of it.

    RunError names the file or the command line, the key, what was expected and what was found.
    """
    load = YAML(typ="safe", pure=True).load  # YAML 1.2: 2e-4 is a number, 010 is ten, a key twice an error
    place, typed = path, {}
    try:
        values = dict(load(Path(path).read_text(encoding="utf-8")))
        for override in overrides:
            key, _, value = override.partition("=")
            if key in cls.__annotations__:
                place = f"command line: {key}"
                typed[key] = load(value)
        place = path
        return cls(**values | typed)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # of __post_init__: values that do not go together
            place = f"{path} and command line" if typed else path
            raise RunError(f"{place}: {first['ctx']['error']}") from error
        key = first["loc"][0]
        place = "command line" if key in typed else path
        types = [e["msg"].removeprefix("Input should be ") for e in error.errors() if e["loc"][0] == key]
        expected = f"expected {' or '.join(types)}, got {first['input']!r}"
        if first["type"] == "missing":
            expected = "missing, expected a value"
        if first["type"] == "unexpected_keyword_argument":
            expected = f"unknown key; expected one of {', '.join(cls.__annotations__)}"
        raise RunError(f"{place}: {key}: {expected}") from error
    except (OSError, ValueError, TypeError, RecursionError, YAMLError) as error:
        expected = "YAML, a file of 'key: value' lines" if place == path else "a YAML value"
        raise RunError(f"{place}: expected {expected}: {error}") from error

def settings_help() -> str:
    """A line for every setting of the two configs."""
    lines = []
    for cls, kind in ((ModelConfig, "model"), (TrainingConfig, "training")):
        lines.append(f"\n{kind} settings, KEY=VALUE: type, default if there is one, meaning")
        for key, field in cls.__pydantic_fields__.items():
            default = "" if field.is_required() else f" = {field.default}"
            lines.append(f"  {key}: {cls.__annotations__[key]}{default}: {field.description}")
    return "\n".join(lines)

# -----------------------------------------------------------------------------
# Command line

def main(arguments=None):
    """Exit status 0: complete; 2: failed, the last line says why; 128 + n: saved, stopped by signal n."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the script
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with suppress(AttributeError):  # not a text stream
            getattr(sys, name).reconfigure(errors="replace")  # the dash of Q–K=V on an ASCII terminal

    configs = Path(__file__).resolve().parent / "configs"
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=settings_help(), formatter_class=layout)
    parser.add_argument("--model_config", default=configs / f"model_config_{SIZE}.yaml")
    parser.add_argument("--train_config", default=configs / f"train_config_{SIZE}.yaml")
    parser.add_argument("--output_dir", default=OUTPUT_DIR, type=Path)
    parser.add_argument("--resume", default="auto", help="auto (the newest checkpoint), never, or a path")
    parser.add_argument("--init_from", help="begin at step 0 with the weights of another run")
    parser.add_argument("--accept_changes", action="store_true", help="resume although settings have changed")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="overrides the configs")
    options = parser.parse_intermixed_args(arguments)
    try:
        init_distributed()
        with errors_on_all_ranks():
            require(options.init_from != "", "--init_from: expected the path of a checkpoint, got nothing")
            known = [*ModelConfig.__annotations__, *TrainingConfig.__annotations__]
            expected = f"KEY=VALUE with a KEY out of {', '.join(known)}"
            for setting in options.settings:
                key, equals, _ = setting.partition("=")
                require(equals and key in known, f"command line: {setting}: expected {expected}")
            model_config = load_config(ModelConfig, options.model_config, options.settings)
            config = load_config(TrainingConfig, options.train_config, options.settings)
        start = (options.resume, options.init_from, options.accept_changes)
        number = train(model_config, config, options.output_dir, *start)
    except (RunError, OSError, RuntimeError) as error:
        sys.exit(explain(error, options.output_dir))
    if dist.is_initialized():
        dist.destroy_process_group()
    if number:
        sys.exit(128 + number)

def explain(error, output_dir) -> int:
    """Print one line about what ended the run, return the exit status; raise errors of the program again."""
    on_one_rank = isinstance(error, OneRankError) or not isinstance(error, RunError)
    message = str(error)
    if isinstance(error, OSError) and not error.filename:
        message = f"{output_dir}: {error}"
    elif isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message:  # on a CPU
        message += " Halve micro_batch_size, double gradient_accumulation: the global batch is the same."
    elif isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in message):
        message = f"lost another process of this run; start again to resume ({error})"
        on_one_rank = False
    elif isinstance(error, RuntimeError):
        raise error
    if on_one_rank or RANK == 0:  # what all ranks raise is printed once
        print(f"{Path(__file__).name}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    main()
