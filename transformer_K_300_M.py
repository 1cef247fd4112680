"""Q=K=V at 300M: one projection is query, key and value.

Tables 4 and 10 of "Do Transformers Need Three Projections? A Systematic Study of QKV Variants", ICML 2026.
Each training script is one whole experiment. Any two differ only in this text, the constants, the attention
class and the name of the model class; `make sync` keeps everything else identical.

Projections  c_k, C -> C; the query and the value are the key
KV cache     K of every head, which is V too: 20 layers x 1,024 numbers a token, 40,960 bytes in bf16

    torchrun --nproc_per_node=8 transformer_K_300_M.py     # the paper's run; started again, it resumes
    python transformer_K_300_M.py                          # one process: one GPU, or the CPU
    python transformer_K_300_M.py --output_dir outputs_k_masked score_padding=false seed=43

Contents: attention, model, data, evaluation, training, output folder, checkpoints, logging, processes, command line.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while the libraries load ends the run without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import hashlib
import json
import math
import os
import re
import resource
import shutil
import sys
import time
import zipfile
from bisect import bisect_right
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from itertools import count, islice, product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import yaml
from filelock import FileLock, Timeout
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
VARIANT = "K"  # as in this file's name
PAPER_NAME = "Q=K=V"
SIZE = "300M"  # of the default configs/*.yaml
CACHED = ("k",)  # the tensors that a layer keeps for every past token
N_KV_GROUPS = None  # KV heads of the grouped variants; None: one for each query head
OUTPUT_DIR = "outputs_k"
# [end of variant]

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

# -----------------------------------------------------------------------------
# Attention


# [variant: attention]
class CausalSelfAttention(nn.Module):
    """Q=K=V: one projection is query, key and value; K alone is cached."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        self.c_k = nn.Linear(config.n_embd, config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        """x [B, T, C] -> [B, T, C]; with a cache, the T tokens follow those already in it."""
        B, T, C = x.shape
        n_head, head_dim = self.config.n_head, C // self.config.n_head
        k = self.c_k(x).view(B, T, n_head, head_dim).transpose(1, 2)  # [B, n_head, T, head_dim]
        q = k  # of the new positions alone
        if cache is not None:
            (k,) = cache.append(self.layer, k)  # [B, n_head, past + T, head_dim]
        y = causal_attention(q, k, k, self.config)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.c_proj(y))
# [end of variant]


def causal_attention(q, k, v, config):
    """Attention of the last T of S positions to themselves and all before them.

    q [B, n_head, T, head_dim], k and v [B, n_kv_head, S, head_dim] -> [B, n_head, T, head_dim]. Where there are
    fewer KV heads than query heads, neighbouring query heads share one.
    """
    B, n_head, T, head_dim = q.shape
    n_kv_head, S = k.shape[1], k.shape[2]
    if flash_attn_func and config.use_flash_attention and q.is_cuda and q.dtype == torch.bfloat16:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return flash_attn_func(q, k, v, causal=True).transpose(1, 2)
    if T == 1:
        # Decode: one query sees every position. The query heads that share a KV head become several queries of
        # that head, so that each cached number is read once for all of them.
        q = q.reshape(B, n_kv_head, n_head // n_kv_head, head_dim)
        if q.is_cuda or q.dtype != torch.bfloat16 or n_kv_head < n_head:
            y = F.scaled_dot_product_attention(q, k, v)
        else:  # on a CPU, two products in this layout take half the time of SDPA for a single row in bf16
            scores = (k @ q.mT) / math.sqrt(head_dim)  # [B, n_head, S, 1]
            y = (v.mT @ scores.softmax(dim=-2)).mT
        return y.reshape(B, n_head, 1, head_dim)
    # is_causal aligns the first query with the first key; behind a past (S > T) the last ones belong together.
    mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S, enable_gqa=n_kv_head < n_head)


class KVCache:
    """The past of every layer: one [B, n_kv_head, max_length, head_dim] tensor for each name in CACHED.

    `length` positions are filled. The model moves it on once a forward pass, after all layers have appended.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, dtype, device):
        n_kv_head, head_dim = config.n_kv_groups or config.n_head, config.n_embd // config.n_head
        shape = (batch_size, n_kv_head, max_length, head_dim)
        self.layers = []
        for _ in range(config.n_layer):
            self.layers.append([torch.empty(shape, dtype=dtype, device=device) for _ in CACHED])
        self.batch_size, self.max_length, self.length = batch_size, max_length, 0

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


class GPT_K(nn.Module):
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
        """int64 [B, T] -> (logits [B, T, vocab_size], None), or (None, mean loss in nats) given labels [B, T].

        Labels are the inputs and are shifted in here; -100 is not scored. With a cache, the T tokens follow those
        in it and join them. ValueError where they do not fit n_positions or the cache.
        """
        hidden = self.hidden_states(input_ids, cache)
        if labels is None:
            return F.linear(hidden, self.wte.weight), None
        if torch.is_grad_enabled():
            hidden, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss_sum = ChunkedCrossEntropy.apply(hidden, self.wte.weight, targets)
        else:
            loss_sum = self.token_losses(hidden, labels).sum()
        return None, loss_sum / (labels[:, 1:] != -100).sum().clamp(min=1)

    def hidden_states(self, input_ids, cache=None):
        """The output of the final LayerNorm, [B, T, C]."""
        B, T = input_ids.shape
        past = cache.length if cache else 0
        if past + T > self.config.n_positions:
            raise ValueError(f"{past + T} tokens do not fit n_positions, {self.config.n_positions}")
        if cache and (cache.batch_size != B or past + T > cache.max_length):
            size = f"{cache.batch_size} x {cache.max_length}"
            raise ValueError(f"{B} x {past + T} tokens do not fit a cache of {size}")
        x = self.wte(input_ids) + self.wpe(torch.arange(past, past + T, device=input_ids.device))
        for block in self.h:
            x = block(x, cache)
        if cache:
            cache.length += T
        return self.ln_f(x)

    def token_losses(self, hidden, labels):
        """Cross-entropy in nats of each token given those before it: fp32 [B, T - 1], 0 where the label is -100."""
        x, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        losses = []
        for x_chunk, target in zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            logits = F.linear(x_chunk, self.wte.weight).float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
        return torch.cat(losses).view(len(labels), -1)

    def make_cache(self, batch_size: int, max_length: int | None = None, dtype=None) -> KVCache:
        """An empty cache, by default for n_positions tokens and in the dtype that the forward pass computes in."""
        weight, device = self.wte.weight, self.wte.weight.device
        max_length = self.config.n_positions if max_length is None else max_length
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"expected at least one row and one position, got {batch_size} x {max_length}")
        if dtype is None and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return KVCache(self.config, batch_size, max_length, dtype or weight.dtype, device)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True):
        """Continue the prompts, int64 [B, T], to [B, T + max_new_tokens]; temperature 0 is greedy.

        Beyond n_positions the model sees the last n_positions tokens. There each step moves every token to another
        learned position, which no cached key survives, so the window is recomputed.
        """
        (B, T), window = idx.shape, self.config.n_positions
        if T == 0:
            raise ValueError("the prompt is empty; start from the end-of-text token")
        if not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"expected temperature >= 0 and top_k > 0, got {temperature} and {top_k}")
        tokens = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
        cache = self.make_cache(B, min(T + max_new_tokens, window)) if use_cache else None
        with eval_mode(self):
            for end in range(T, T + max_new_tokens):
                if cache and end <= window:  # prefill first, then decode one token at a time
                    hidden = self.hidden_states(tokens[:, cache.length : end], cache)
                else:
                    hidden = self.hidden_states(tokens[:, max(0, end - window) : end])
                logits = F.linear(hidden[:, -1], self.wte.weight).float()
                tokens[:, end] = sample(logits, temperature, top_k)
        return tokens


def sample(logits, temperature, top_k):
    """A token for each row of [B, vocab_size]: the likeliest at temperature 0, else drawn from the top_k."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, -math.inf)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1)[:, 0]


@contextmanager
def eval_mode(model):
    """Dropout off; afterwards the model is in the mode it was in, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


LOSS_CHUNK = 2048  # positions whose logits exist at the same time


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of x [N, C] @ weight.T [C, V] against targets [N], where those are not -100.

    The logits of a whole micro batch, 6 x 2,048 x 50,304 in fp32, would take 2.5 GB and their gradient as much
    again. So the gradients are computed in the forward pass, chunk by chunk, while the logits of a chunk exist;
    computing the logits a second time in the backward pass would add 4 % to the arithmetic of a training step.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        loss_sum, grad_x, grad_weight = torch.zeros((), device=x.device), [], None
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
            grad_weight_chunk = (grad_logits.t() @ (x_chunk * scored)).to(weight.dtype)
            grad_weight = grad_weight_chunk if grad_weight is None else grad_weight.add_(grad_weight_chunk)
        ctx.save_for_backward(torch.cat(grad_x), grad_weight)
        return loss_sum

    @staticmethod
    def backward(ctx, grad_output):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_output, grad_weight * grad_output, None


# -----------------------------------------------------------------------------
# Data


class TokenDataset(Dataset):
    """Rows (input_ids int64 [T], is_text bool [T]) of one split of dataset_download.py, memory-mapped.

    In a chunk an end-of-text token follows every document, and offsets say where each document starts.
    padded: row i is document i, cut at seq_length or padded with end-of-text tokens, where is_text is false.
    packed: row i is the i-th slice of seq_length tokens; the last row of a chunk is padded.
    """

    def __init__(self, data_path, seq_length: int, sequence: str = "padded"):
        if sequence not in ("padded", "packed"):
            raise ValueError(f"sequence: expected padded or packed, got {sequence!r}")
        self.path, self.seq_length, self.packed = Path(data_path), seq_length, sequence == "packed"
        self.tokens, self.offsets = [], []  # of each chunk
        try:
            metadata = json.loads((self.path / "metadata.json").read_text(encoding="utf-8"))
            self.chunks = metadata["chunks"]  # with the SHA-256 of their files
            self.vocab_size, self.eos_id = metadata["vocab_size"], metadata["eos_id"]
            self.tokenizer = {"name": metadata["tokenizer"], "vocab_size": self.vocab_size}
            self.tokenizer |= {"sha256": metadata.get("tokenizer_sha256", {}).get("tokenizer.tiktoken")}
            self.token_bytes = self._load("token_bytes").astype(np.int64)  # of the text behind each token
            if self.token_bytes.shape != (self.vocab_size,) or not 0 <= self.eos_id < self.vocab_size:
                raise ValueError("token_bytes.npy does not fit the vocab_size and eos_id of metadata.json")
            for chunk in self.chunks:
                self._open(chunk["name"], chunk["documents"], chunk["tokens"])
            finished = metadata["finished"] and metadata["documents"] > 0
        except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise RunError(f"{self.path}: no complete token files ({problem}); run dataset_download.py") from error
        if not finished:
            raise RunError(f"{self.path}: its preparation is not finished; run dataset_download.py again")
        rows = [len(offsets) - 1 for offsets in self.offsets]
        if self.packed:
            rows = [math.ceil(len(tokens) / seq_length) for tokens in self.tokens]
        self.first_rows = np.cumsum([0, *rows])  # of each chunk

    def _load(self, name):
        try:
            return np.load(self.path / f"{name}.npy", mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{name}.npy is damaged: {error}") from error

    def _open(self, name, n_documents, n_text_tokens):
        """Map a chunk into memory; ValueError where its two files are not what metadata.json says."""
        tokens, offsets = self._load(f"{name}.tokens"), self._load(f"{name}.offsets")
        if len(tokens) == offsets[-1] == n_text_tokens:
            raise ValueError(f"{name} is of an older format; delete {self.path.parent} to prepare the data anew")
        lengths = (n_text_tokens + n_documents, n_documents + 1)
        if (len(tokens), len(offsets)) != lengths or tokens.dtype != np.uint16 or tokens[-1] != self.eos_id:
            raise ValueError(f"{name}.tokens.npy does not have the length, type or last token of metadata.json")
        if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 1).any():
            raise ValueError(f"{name}.offsets.npy does not rise from 0 to the number of tokens, {len(tokens)}")
        self.tokens.append(tokens)
        self.offsets.append(offsets)

    def verify(self):
        """Compare all chunks with their SHA-256: at 10B tokens 20 GB, half a minute from a local disk."""
        for chunk, kind in product(self.chunks, ("tokens", "offsets")):
            path = self.path / f"{chunk['name']}.{kind}.npy"
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != chunk[f"{kind}_sha256"]:
                    raise RunError(f"{path}: changed since it was prepared; see dataset_download.py --verify")

    def __len__(self):
        return int(self.first_rows[-1])

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        chunk = bisect_right(self.first_rows, i) - 1
        row, tokens, offsets = i - self.first_rows[chunk], self.tokens[chunk], self.offsets[chunk]
        if self.packed:
            text = tokens[row * self.seq_length : (row + 1) * self.seq_length]
        else:
            text = tokens[offsets[row] : offsets[row + 1] - 1][: self.seq_length]  # without its end-of-text token
        if len(text) and text.max() >= self.vocab_size:
            name, size = self.chunks[chunk]["name"], self.vocab_size
            raise RunError(f"{self.path}/{name}.tokens.npy: token {text.max()} in a vocabulary of {size}")
        input_ids = np.full(self.seq_length, self.eos_id, dtype=np.int64)
        input_ids[: len(text)] = text
        return torch.from_numpy(input_ids), torch.arange(self.seq_length) < len(text)

    def decode(self, token_ids) -> str:
        """The text of token ids, by the tokenizer that dataset_download.py keeps beside the data."""
        pieces = {self.eos_id: b"<|endoftext|>"}
        for line in (self.path / "tokenizer.tiktoken").read_bytes().splitlines():
            piece, rank = line.split()
            pieces[int(rank)] = base64.b64decode(piece)
        return b"".join(pieces.get(i, b"") for i in token_ids).decode("utf-8", errors="replace")


def shuffled_batches(n_rows, batch_size, seed, rows_seen, rank, world_size):
    """Endless micro batches of row numbers for one rank, from row `rows_seen` of the run on.

    Epoch e reads the rows in a permutation that depends on (seed, e) alone, and the ranks take the micro batches in
    turn. So neither the world size nor a resume changes the global batch of a step.
    """
    epoch = None
    for first in range(rows_seen + rank * batch_size, sys.maxsize, world_size * batch_size):
        batch = []
        for position in range(first, first + batch_size):
            if position // n_rows != epoch:
                epoch = position // n_rows
                permutation = np.random.default_rng((seed, epoch)).permutation(n_rows)
            batch.append(int(permutation[position % n_rows]))
        yield batch


def get_dataloader(
    data_path, batch_size, seq_length, sequence="padded", seed=None, rows_seen=0, rank=RANK, world_size=WORLD_SIZE
) -> DataLoader:
    """This rank's batches (input_ids int64 [B, T], is_text bool [B, T]) of TokenDataset's rows.

    Without a seed: every row once, in order, the ranks taking the batches in turn. With one: shuffled and endless,
    from row `rows_seen` of the run on. ValueError for data that cannot be read, another `sequence`, a wrong rank.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    dataset = TokenDataset(data_path, seq_length, sequence)
    n_rows = len(dataset)
    if seed is None:
        firsts = range(rank * batch_size, n_rows, world_size * batch_size)
        batches = [range(first, min(first + batch_size, n_rows)) for first in firsts]
    else:
        batches = shuffled_batches(n_rows, batch_size, seed, rows_seen, rank, world_size)
    return DataLoader(dataset, batch_sampler=batches, pin_memory=torch.cuda.is_available())


# -----------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, val_loader, max_batches: int | None = None, stop_signals=()) -> dict | None:
    """Score the rows of a get_dataloader loader, or its first max_batches batches, in the precision of the caller.

    Each rank scores its share and the sums are added, so the world size does not change the result. Returns
    loss, perplexity: in nats a token over all positions, padding included (the paper's protocol);
    text_loss, text_perplexity: over text only; bits_per_byte: of its UTF-8 text; padding_fraction: of all positions.
    None where a signal arrives meanwhile; RunError where there is nothing to score.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: expected at least 1, got {max_batches}")
    share = None if max_batches is None else len(range(RANK, max_batches, WORLD_SIZE))
    token_bytes, device = torch.from_numpy(val_loader.dataset.token_bytes), model.wte.weight.device
    sums = torch.zeros(8, dtype=torch.float64)
    with eval_mode(model):
        for input_ids, is_text in islice(val_loader, share):
            if stop_signals:
                break
            inputs = input_ids.to(device)
            losses = model.token_losses(model.hidden_states(inputs), inputs).cpu().double()
            text = is_text[:, 1:]  # the first token of a row has none before it
            text_bytes = token_bytes[input_ids[:, 1:]] * text
            counts = (losses.numel(), text.sum(), text_bytes.sum(), (~is_text).sum(), is_text.numel())
            sums[:7] += torch.tensor([losses.sum(), (losses * text).sum(), *counts], dtype=torch.float64)
    sums[7] = len(stop_signals)
    if dist.is_initialized():
        sums = sums.to(device)
        dist.all_reduce(sums)
    nats, text_nats, positions, text_positions, text_bytes, padding, total, stopped = sums.tolist()
    if stopped:
        return None
    if not text_positions:
        raise RunError(f"{val_loader.dataset.path}: no document of two tokens or more, so nothing to evaluate")
    return {
        "loss": nats / positions,
        "perplexity": float(np.exp(nats / positions)),
        "text_loss": text_nats / text_positions,
        "text_perplexity": float(np.exp(text_nats / text_positions)),
        "bits_per_byte": text_nats / math.log(2) / text_bytes if text_bytes else math.nan,
        "padding_fraction": padding / total,
    }


# -----------------------------------------------------------------------------
# Training

DENSE_BF16_FLOPS = {  # a second, for the MFU; the first of these that stands in the GPU's name counts
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip


def get_lr(step: int, config: TrainingConfig) -> float:
    """The learning rate of update number `step`, from 0 on: linear warm-up, then from learning_rate to min_lr."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    decay = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1}
    return config.min_lr + decay[config.lr_scheduler] * (config.learning_rate - config.min_lr)


def train(model_config, config, output_dir, resume="auto", init_from=None, accept_changes=False) -> int:
    """Train to the last step, or until a signal asks to stop; returns 0, or the number of that signal."""
    device = init_distributed()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    score_padding = config.sequence == "padded" and config.score_padding

    # data, and what output_dir holds: what does not go together is refused before anything is written
    with errors_on_all_ranks():
        accumulation_steps = accumulation_for(config, WORLD_SIZE)
        rows = (config.micro_batch_size, config.seq_length, config.sequence)
        train_set = TokenDataset(config.train_data, config.seq_length, config.sequence)
        val_loader = get_dataloader(config.val_data, *rows)
        run = describe_run(model_config, config, train_set, val_loader.dataset, init_from)
        start, lock = [None], nullcontext()
        if RANK == 0:
            start = [find_start(output_dir, resume, run, config.total_steps, accept_changes)]
            lock = lock_output_dir(output_dir, move_aside=resume == "never")
    if dist.is_initialized():
        dist.broadcast_object_list(start)
    path, finished, changes = start[0]

    # model and optimizer; one parameter group, since the published recipe decays biases and LayerNorms too
    with errors_on_all_ranks():
        torch.manual_seed(config.seed)
        model = ddp_model = GPT_K(model_config).to(device)
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=config.weight_decay, fused=True)

        # where to start: at a checkpoint of this run, from the weights of another, or from random weights
        step, evaluated_at = 0, None
        if path:
            checkpoint = read_checkpoint(path)
            load_weights(model, checkpoint, path)
            optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
            step = checkpoint["step"]
            run |= {"init_from": checkpoint["init_from"], "changes": checkpoint["changes"] + changes}
            evaluated_at = checkpoint["evaluated_at"] if path.parent == output_dir else None
            del checkpoint
            train_set.verify()
            print0(f"resuming from {path} at step {step} of {config.total_steps}")
        elif init_from:
            load_weights(model, read_checkpoint(init_from), init_from)
            print0(f"starting at step 0 from the weights of {init_from}")
        rows_seen = step * config.rows_per_step
        batches = iter(get_dataloader(config.train_data, *rows, config.seed, rows_seen))
        log = Logger(output_dir, run, config, step, finished)
    if config.compile is True or (config.compile == "auto" and device.type == "cuda"):
        model.compile()
    if WORLD_SIZE > 1:
        ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    print0(
        f"{PAPER_NAME}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.precision} on {device}\n"
        f"{config.total_steps:,} steps of {config.tokens_per_step:,} tokens: {config.micro_batch_size} rows of "
        f"{config.seq_length} x {accumulation_steps} accumulation steps x {WORLD_SIZE} processes"
    )

    ended = step == config.total_steps and not finished  # at the new total, or cut off between evaluation and save
    saved_at, evaluated_at = (None, None) if ended else (step, evaluated_at)
    skipped, seconds, timed_steps, stopping = 0, 0.0, 0, False
    with lock, stop_signals() as received:
        while True:  # one extra turn, so that the last evaluation and save are not written twice
            last_step = step == config.total_steps

            # once in a while, and at the end: evaluate
            if (last_step or step % config.eval_interval == 0) and step != evaluated_at and not stopping:
                with autocast:
                    results = evaluate(model, val_loader, config.eval_batches, received)
                if results is None:
                    stopping = True
                else:
                    log("final" if last_step else "val", step, results)
                    evaluated_at = step

            # once in a while, at the end and when told to stop: save
            complete = last_step and not stopping
            if (complete or stopping or step % config.save_interval == 0) and step != saved_at:
                if RANK == 0:
                    progress = {"step": step, "epoch": rows_seen // len(train_set), "evaluated_at": evaluated_at}
                    save_checkpoint(output_dir, run | progress, model, optimizer, config, complete)
                    write_samples(output_dir, step, model, val_loader.dataset, config, autocast)
                saved_at = step
            if complete or stopping:
                break

            # forward and backward over this rank's share of the global batch; gradients are of the summed loss
            t0 = time.perf_counter()
            loss_sum, n_scored = torch.zeros(2, device=device)
            for micro_step in range(accumulation_steps):
                input_ids, is_text = (tensor.to(device, non_blocking=True) for tensor in next(batches))
                labels = input_ids if score_padding else input_ids.masked_fill(~is_text, -100)
                # dropout is a function of the seed and the place in the data, whatever the world size
                row = rows_seen + (micro_step * WORLD_SIZE + RANK) * config.micro_batch_size
                torch.manual_seed(int(np.random.SeedSequence((config.seed, row)).generate_state(1)[0]))
                if WORLD_SIZE > 1:  # all-reduce the gradients once, in the last backward pass
                    ddp_model.require_backward_grad_sync = micro_step == accumulation_steps - 1
                with autocast:
                    _, loss = ddp_model(input_ids, labels)
                n = (labels[:, 1:] != -100).sum()
                (loss * n).backward()
                loss_sum += loss.detach() * n
                n_scored += n

            # the mean over the scored tokens of the global batch; DDP has averaged the gradients over the ranks
            totals = torch.stack([loss_sum, n_scored, loss_sum.new_tensor(len(received))])
            if WORLD_SIZE > 1:
                dist.all_reduce(totals)
            for p in model.parameters():
                p.grad.mul_(WORLD_SIZE / totals[1])
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            loss_sum, n_scored, stopped, grad_norm = torch.stack([*totals, grad_norm]).tolist()  # the one host sync
            if n_scored == 0:
                raise RunError(f"step {step + 1}: nothing to score: only padding and first tokens in these rows")
            loss = loss_sum / n_scored
            if not math.isfinite(loss):
                raise RunError(f"step {step + 1}: the loss is {loss}; no checkpoint has seen it. Lower learning_rate?")

            # update, unless the gradient norm is too large or not a number
            lr = get_lr(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if grad_norm <= config.skip_grad_norm:
                optimizer.step()
                skipped = 0
            else:
                skipped += 1
                print0(f"warning: step {step + 1}: update skipped, its gradient norm is {grad_norm}")
                if skipped == 10:
                    raise RunError(f"step {step + 1}: 10 updates skipped in a row. Lower learning_rate?")
            optimizer.zero_grad(set_to_none=True)
            step += 1
            rows_seen += config.rows_per_step
            stopping = stopped > 0

            # once in a while: log
            seconds += time.perf_counter() - t0
            timed_steps += 1
            if step % config.log_interval == 0 or step == config.total_steps:
                results = {"loss": loss, "perplexity": float(np.exp(loss)), "learning_rate": lr, "grad_norm": grad_norm}
                speed = timed_steps * config.tokens_per_step / seconds
                log("train", step, results | {"tokens_per_second": speed} | mfu(model, config, device, speed))
                seconds, timed_steps = 0.0, 0
    log.close(model, step, device, complete)
    return 0 if complete else (received or [signal.SIGTERM])[0]


def accumulation_for(config, world_size):
    """Gradient accumulation steps of each process, so that every world size trains on the same global batch."""
    total = config.gradient_accumulation * config.num_gpus
    if total % world_size:
        divisors = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise RunError(f"{world_size} processes cannot share the {total} micro batches of a step; use {divisors}")
    return total // world_size


def mfu(model, config, device, tokens_per_second) -> dict:
    """Model FLOPs utilisation, the share of the dense bf16 peak of all GPUs; empty where the peak is not known."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for name, peak in DENSE_BF16_FLOPS.items():
        if name in gpu:
            n_parameters = sum(p.numel() for p in model.parameters())
            attention = 12 * model.config.n_layer * model.config.n_embd * config.seq_length
            return {"mfu": (6 * n_parameters + attention) * tokens_per_second / (peak * WORLD_SIZE)}
    return {}


# -----------------------------------------------------------------------------
# Output folder: what it holds decides whether a run may start there, and at which step

CANNOT_CHANGE_THE_RESULT = (  # these may differ when a run resumes; of the first three only the product counts
    "micro_batch_size", "gradient_accumulation", "num_gpus", "train_data", "val_data", "use_flash_attention",
    "compile", "log_interval", "eval_interval", "eval_batches", "save_interval", "keep_checkpoints",
    "sample_tokens", "wandb",
)  # fmt: skip
WAYS_ON = "use another --output_dir, or --resume never, which moves the old run aside"


def describe_run(model_config, config, train_set, val_set, init_from) -> dict:
    """What a run is, as its files record it; RunError where model, data and settings do not go together."""
    if config.seq_length > model_config.n_positions:
        raise RunError(f"seq_length: expected at most n_positions, {model_config.n_positions}, got {config.seq_length}")
    if train_set.vocab_size > model_config.vocab_size:
        raise RunError(f"vocab_size: {train_set.path} needs {train_set.vocab_size}, got {model_config.vocab_size}")
    if val_set.tokenizer != train_set.tokenizer:
        raise RunError(f"{val_set.path}: its tokenizer is not that of {train_set.path}; prepare both alike")
    if val_set.chunks == train_set.chunks:
        print0("warning: val_data is the same text as train_data: its perplexity is of text seen in training")
    run = {"variant": VARIANT, "model_config": as_dict(model_config), "train_config": as_dict(config)}
    data = {"train_data": train_set.chunks, "val_data": val_set.chunks, "tokenizer": train_set.tokenizer}
    return run | data | {"init_from": init_from and str(init_from), "changes": []}


def find_start(output_dir, resume, run, total_steps, accept_changes):
    """Where a run starts: (checkpoint or None for step 0, whether all is done already, accepted changes).

    Writes nothing. RunError where output_dir holds a run that these settings would not continue as it began.
    """
    path, recorded = find_checkpoint(output_dir, resume)
    if recorded is None:
        return None, False, []
    place, step = path or output_dir, recorded.get("step", 0)
    if recorded["variant"] != VARIANT:
        raise RunError(f"{place}: a run of transformer_{recorded['variant']}_300_M.py; {WAYS_ON}")
    if recorded["init_from"] != run["init_from"] and (run["init_from"] or not path):
        before, now = (origin["init_from"] or "random weights" for origin in (recorded, run))
        raise RunError(f"{place}: began with {before}, not with {now}; {WAYS_ON}")
    for split in ("train_data", "val_data"):
        if recorded[split] != run[split]:
            raise RunError(f"{place}: made with other data than is in {run['train_config'][split]}; {WAYS_ON}")
    if step > total_steps:
        raise RunError(f"{place}: at step {step}, these settings end at {total_steps}; {WAYS_ON}")

    # every other setting that can change the result; a change of the tokens in a step would lose the place in the data
    before, now = settings_of(recorded), settings_of(run)
    changed = [key for key in now if key in before and before[key] != now[key]]
    changes = [f"{key} {before[key]} -> {now[key]}" for key in changed]
    if changed and (not accept_changes or {"seq_length", "rows in a global batch"} & {*changed}):
        more = "or --init_from to start from its weights, or --accept_changes to go on all the same"
        raise RunError(f"{place}: this would change {', '.join(changes)}; {WAYS_ON}, {more}")
    records = [(record["kind"], record["step"]) for record in read_metrics(output_dir / "metrics.jsonl")]
    finished = step == total_steps and ("final", step) in records and (output_dir / "final_model.pt").exists()
    return path, finished, [f"step {step}: {change}" for change in changes]


def settings_of(run) -> dict:
    """The settings of a run that can change its result."""
    config = run["model_config"] | run["train_config"]
    rows = config["micro_batch_size"] * config["gradient_accumulation"] * config["num_gpus"]
    decisive = {key: value for key, value in config.items() if key not in CANNOT_CHANGE_THE_RESULT}
    return decisive | {"rows in a global batch": rows}


def find_checkpoint(output_dir, resume):
    """(path, contents) of what `resume` means: never, the path of a checkpoint, or auto, the newest whole one.

    (None, what the YAML files say) for a run that ended before its first checkpoint; (None, None) for no run.
    """
    if resume == "never":
        return None, None
    if resume != "auto":
        contents = read_checkpoint(resume, to_resume=True)
        if later := [path for step, path in checkpoints(output_dir) if step > contents["step"]]:
            raise RunError(f"{later[0]}: is beyond {resume}; delete it, or use another --output_dir")
        return Path(resume), contents
    for _, path in checkpoints(output_dir):
        try:
            return path, read_checkpoint(path, to_resume=True)
        except RunError as error:
            print0(f"warning: passed over {error}")
    if checkpoints(output_dir) or (output_dir / "final_model.pt").exists():
        raise RunError(f"{output_dir}: holds a run and no checkpoint that can be resumed; {WAYS_ON}")
    if not (output_dir / "run.yaml").exists():
        return None, None
    names = ("run", "model_config", "train_config")
    try:
        run, *configs = (yaml.safe_load((output_dir / f"{name}.yaml").read_text("utf-8")) for name in names)
        return None, {"init_from": None} | run | dict(zip(names[1:], configs, strict=True))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise RunError(f"{output_dir}: the settings of the run in it cannot be read ({error}); {WAYS_ON}") from error


def lock_output_dir(output_dir, move_aside):
    """Keep other runs out of the folder; the kernel releases the lock when this process ends, however it ends."""
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(output_dir / "run.lock").acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"{output_dir}: another run is writing to it; use another --output_dir") from error
    if not move_aside or os.listdir(output_dir) == ["run.lock"]:
        return lock
    numbered = (Path(f"{output_dir}.old_{number}") for number in count(1))
    aside = next(path for path in numbered if not path.exists())
    print0(f"moving the run in {output_dir} to {aside}")
    output_dir.rename(aside)
    return lock_output_dir(output_dir, move_aside=False)


# -----------------------------------------------------------------------------
# Checkpoints


def checkpoints(output_dir) -> list:
    """(step, path) of each checkpoint in a folder, the newest first."""
    matches = (re.fullmatch(r"checkpoint_step_(\d+)\.pt", path.name) for path in Path(output_dir).glob("*.pt"))
    return sorted(((int(match[1]), output_dir / match[0]) for match in matches if match), reverse=True)


def save_checkpoint(output_dir, run, model, optimizer, config, complete):
    """checkpoint_step_N.pt and, at the end, final_model.pt; then delete what keep_checkpoints does not keep."""
    step = run["step"]
    run |= {"tokens_seen": step * config.tokens_per_step, "model_state_dict": model.state_dict()}
    if complete:
        write_atomically(output_dir / "final_model.pt", lambda file: torch.save(run, file))
    run |= {"rows_seen": step * config.rows_per_step, "optimizer_state_dict": optimizer.state_dict()}
    write_atomically(output_dir / f"checkpoint_step_{step}.pt", lambda file: torch.save(run, file))
    older = [path for saved, path in checkpoints(output_dir) if saved <= step]
    for path in older[config.keep_checkpoints or sys.maxsize :]:
        path.unlink()


def write_atomically(path, write):
    """write(file) to a temporary file, flush it to disk and rename it: `path` never holds half a file."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 1e6
        raise RunError(f"{path}: not written, {free:,.0f} MB are free; older files are whole ({error})") from error


def read_checkpoint(path, to_resume=False) -> dict:
    """The contents of a checkpoint or final_model.pt, ours or a released one; RunError where it is damaged.

    To resume from it, it must hold the place in the data, and every byte is checked against the CRCs of the file.
    """
    try:
        if to_resume and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"its part {damaged} is damaged")
        contents = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        # released checkpoints carry DDP's prefix, and the causal mask of each layer
        weights = {name.removeprefix("module."): w for name, w in contents["model_state_dict"].items()}
        contents["model_state_dict"] = {name: w for name, w in weights.items() if not name.endswith(".attn.bias")}
        contents["model_config"] = dict(contents["model_config"])
    except Exception as error:  # a file of another kind can fail in any way
        raise RunError(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})") from error
    if to_resume and not {"rows_seen", "optimizer_state_dict"} <= contents.keys():
        raise RunError(f"{path}: holds weights without a place in the data; start from them with --init_from")
    return contents


def load_weights(model, contents, path):
    """Copy the weights of a checkpoint into the model; RunError where it is of another variant or configuration."""
    if contents.get("variant", VARIANT) != VARIANT:
        raise RunError(f"{path}: not {PAPER_NAME}; load it with transformer_{contents['variant']}_300_M.py")
    for key, value in asdict(model.config).items():
        recorded = contents["model_config"].get(key, value)
        if recorded != value and key not in ("dropout", "initializer_range", "use_flash_attention"):
            raise RunError(f"{path}: made with {key} {recorded}, the configuration asks for {value}")
    try:
        model.load_state_dict(contents["model_state_dict"])
    except RuntimeError as error:
        raise RunError(f"{path}: its weights are not those of {PAPER_NAME}: {error}") from error


def load_model(path, device="cpu") -> GPT_K:
    """The model in a checkpoint or final_model.pt, ours or a released one, in eval mode.

    RunError, a ValueError, where the file is damaged or of another variant; the message names the right script.
    """
    contents = read_checkpoint(path)
    known = {key: value for key, value in contents["model_config"].items() if key in ModelConfig.__annotations__}
    try:
        with torch.device("meta"):  # allocates nothing: the weights come out of the file
            model = GPT_K(ModelConfig(**known))
    except ValidationError as error:
        raise RunError(f"{path}: its model_config is of no use: {error}") from error
    load_weights(model.to_empty(device=device), contents, path)
    return model.eval()


def write_samples(output_dir, step, model, val_set, config, autocast):
    """Continue the beginnings of three rows of the validation data through the KV cache."""
    if config.sample_tokens == 0:
        return
    prompts = torch.stack([val_set[len(val_set) * third // 3][0][:32] for third in range(3)])
    torch.manual_seed(config.seed)
    try:
        with autocast:
            idx = model.generate(prompts.to(model.wte.weight.device), config.sample_tokens, temperature=0.8, top_k=50)
        texts = [f"{val_set.decode(row[:32])} [...] {val_set.decode(row[32:])}\n" for row in idx.tolist()]
        write_atomically(output_dir / f"samples_step_{step}.txt", lambda file: file.write("\n".join(texts).encode()))
    except Exception as error:  # the checkpoint is saved, and no sample is worth the run
        print0(f"warning: no samples at step {step}: {error}")


# -----------------------------------------------------------------------------
# Logging and processes


class Logger:
    """Rank 0's account of a run: its settings as YAML, metrics.jsonl, the progress bar and, if asked for, wandb."""

    def __init__(self, output_dir, run, config, step, finished):
        self.config, self.path, self.wandb = config, output_dir / "metrics.jsonl", None
        quiet = RANK > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=config.total_steps, initial=step, unit="step", disable=quiet)
        if RANK > 0 or finished:
            return
        for leftover in output_dir.glob("*.tmp"):  # of a killed run
            leftover.unlink()
        configs = {"model_config": run["model_config"], "train_config": run["train_config"]}
        about = {key: value for key, value in run.items() if key not in configs}
        for name, contents in (configs | {"run": about}).items():
            text = yaml.safe_dump(contents, sort_keys=False)
            write_atomically(output_dir / f"{name}.yaml", lambda file, text=text: file.write(text.encode()))
        # a killed run has logged steps beyond its last checkpoint; they are about to be taken, and logged, again
        kept = [json.dumps(record) + "\n" for record in read_metrics(self.path) if record["step"] <= step and step]
        write_atomically(self.path, lambda file: file.write("".join(kept).encode()))
        if config.wandb != "disabled":
            try:  # whatever a logger fails in, it is not worth the run
                import wandb

                options = {"dir": output_dir, "mode": config.wandb, "settings": wandb.Settings(init_timeout=30)}
                self.wandb = wandb.init(project="qkv-variants", name=output_dir.name, config=asdict(config), **options)
            except Exception as error:
                print0(f"warning: wandb is not used: {error}")

    def __call__(self, kind, step, results):
        """Add a train, val or final record."""
        if RANK > 0:
            return
        record = {"kind": kind, "step": step, "tokens": step * self.config.tokens_per_step} | results
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb:
            try:
                self.wandb.log({f"{kind}/{key}": value for key, value in results.items()}, step=step)
            except Exception as error:
                print0(f"warning: wandb is not used any more: {error}")
                self.wandb = None
        self.bar.update(step - self.bar.n)
        if kind == "train":
            speed = results["tokens_per_second"]
            text = f"loss {results['loss']:.4f}, {speed:,.0f} tokens/s"
            self.bar.set_postfix_str(text)  # the bar itself shows the time left
            left = tqdm.format_interval((self.config.total_steps - step) * self.config.tokens_per_step / speed)
            text += f", {left} left"
        else:
            text = f"perplexity {results['perplexity']:.3f}, over text only {results['text_perplexity']:.3f}"
        if kind != "train" or self.bar.disable:
            print0(f"step {step} of {self.config.total_steps}, {kind}: {text}")

    def close(self, model, step, device, complete):
        """Say what the run came to."""
        self.bar.close()
        if not complete:
            print0(f"stopped and saved at step {step}; start again to resume")
            return
        records = read_metrics(self.path)
        first, *_, last = (record["text_perplexity"] for record in records if record["kind"] != "train")
        speeds = [record["tokens_per_second"] for record in records if record["kind"] == "train"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        c, cache = model.config, model.make_cache(1, dtype=torch.bfloat16)
        qkv_nbytes = 4 * c.n_layer * c.n_positions * c.n_embd
        print0(
            f"\n{PAPER_NAME}, complete after {step} steps, in {self.path.parent}\n"
            f"text perplexity  {first:.2f} before, {last:.2f} after\n"
            f"speed            {np.median(speeds or [math.nan]):,.0f} tokens a second\n"
            f"peak memory      {peak / 1e9:.2f} GB of rank 0, {device.type}\n"
            f"KV cache         {cache.nbytes:,} bytes for {c.n_positions:,} tokens in bf16; QKV takes {qkv_nbytes:,}"
        )


def print0(text):
    """Print on rank 0, above the progress bar; a closed pipe or a full disk behind stdout never ends a run."""
    if RANK == 0:
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_metrics(path) -> list[dict]:
    """The records of a metrics.jsonl, without lines that a kill cut short."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and record.keys() >= {"kind", "step"}]


def init_distributed() -> torch.device:
    """Join the other processes of torchrun, if there are any; returns the device of this one."""
    n_gpus, n_processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")  # mps: not tried
    if n_gpus:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % n_gpus)
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        try:
            dist.init_process_group("nccl" if n_gpus >= n_processes else "gloo")
        except (ValueError, RuntimeError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RunError(f"the processes could not meet at {address}: {error}") from error
    if 0 < n_gpus < n_processes:
        print0(f"warning: {n_processes} processes share {n_gpus} GPU; start one process for each GPU")
    return device


@contextmanager
def errors_on_all_ranks():
    """An error of one rank is raised on all of them, so that none waits for it and one line tells of it."""
    own = None
    try:
        yield
    except (RunError, OSError, MemoryError, RuntimeError) as error:
        own = error
    messages = [own and str(own)] * WORLD_SIZE
    if dist.is_initialized():
        dist.all_gather_object(messages, messages[0])
    for message in filter(None, messages):
        raise RunError(message) from own


@contextmanager
def stop_signals():
    """SIGTERM, SIGHUP (a closed terminal) and Ctrl-C only join the list it yields: the step in hand is finished."""
    received = []
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# Configuration and command line


class RunError(ValueError):
    """Ends a run with one line instead of a traceback: what is wrong, where, and what to do about it."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # libraries explain themselves in paragraphs


CHECKS = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(kw_only=True, config=CHECKS)
class ModelConfig:
    vocab_size: PositiveInt = Field(50304, description="GPT-2's 50,257 tokens, padded to a multiple of 128")
    n_positions: PositiveInt = Field(2048, description="context length; positions are learned")
    n_embd: PositiveInt = Field(description="width, C")
    n_layer: PositiveInt = Field(description="layers")
    n_head: PositiveInt = Field(description="query heads, of n_embd / n_head numbers each")
    n_inner: PositiveInt | None = Field(None, description="width of the MLP; null: 4 n_embd")
    n_kv_groups: PositiveInt | None = Field(N_KV_GROUPS, description="KV heads of the grouped variants")
    dropout: NonNegativeFloat = Field(0.1, lt=1, description="on the outputs of attention and MLP")
    layer_norm_epsilon: PositiveFloat = Field(1e-5, description="of every LayerNorm")
    initializer_range: PositiveFloat = Field(0.02, description="standard deviation of every initial weight")
    use_flash_attention: bool = Field(True, description="flash-attn where it is installed and fits: CUDA, bf16")

    def __post_init__(self):
        self.n_inner = self.n_inner or 4 * self.n_embd
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: expected a multiple of n_head ({self.n_head}), got {self.n_embd}")
        fits, expected = self.n_kv_groups == N_KV_GROUPS, N_KV_GROUPS or "null"
        if N_KV_GROUPS not in (None, 1):
            fits, expected = self.n_kv_groups and self.n_head % self.n_kv_groups == 0, "a divisor of n_head"
        if not fits:
            raise ValueError(f"n_kv_groups: expected {expected} for {PAPER_NAME}, got {self.n_kv_groups}")


@dataclass(kw_only=True, config=CHECKS)
class TrainingConfig:
    train_data: str = Field(description="folder of a split that dataset_download.py wrote")
    val_data: str = Field(description="folder of the split to evaluate on")
    sequence: Literal["padded", "packed"] = Field(description="padded: a document a row (paper); packed: all text")
    score_padding: bool = Field(description="padded rows: the padding counts in the training loss, as published")
    seq_length: PositiveInt = Field(ge=2, description="tokens in a row")
    micro_batch_size: PositiveInt = Field(description="rows in one forward and backward pass")
    gradient_accumulation: PositiveInt = Field(description="such passes of each GPU in a step")
    num_gpus: PositiveInt = Field(description="GPUs of the published run; other world sizes share the same batch")
    target_tokens: PositiveInt = Field(description="tokens to train on, padding included")
    learning_rate: PositiveFloat = Field(description="at the end of the warm-up")
    min_lr: NonNegativeFloat = Field(description="at the last step")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(description="from learning_rate to min_lr")
    warmup_steps: NonNegativeInt = Field(description="steps of linear warm-up")
    weight_decay: NonNegativeFloat = Field(description="of AdamW, on every parameter")
    beta1: NonNegativeFloat = Field(lt=1, description="of AdamW")
    beta2: NonNegativeFloat = Field(lt=1, description="of AdamW")
    grad_clip: PositiveFloat = Field(description="gradients of a larger norm are scaled down to it")
    skip_grad_norm: PositiveFloat = Field(description="an update with a larger gradient norm is skipped")
    seed: NonNegativeInt = Field(lt=2**63, description="of weights, order of the data and dropout")
    precision: Literal["bf16", "fp32"] = Field(description="bf16: autocast, the weights stay fp32")
    compile: Literal["auto", True, False] = Field(description="torch.compile; auto: on CUDA")
    log_interval: PositiveInt = Field(description="steps between train records")
    eval_interval: PositiveInt = Field(description="steps between evaluations")
    eval_batches: PositiveInt | None = Field(description="batches of an evaluation; null: all")
    save_interval: PositiveInt = Field(description="steps between checkpoints")
    keep_checkpoints: PositiveInt | None = Field(description="the newest so many stay; null: all")
    sample_tokens: NonNegativeInt = Field(description="length of the samples beside each checkpoint; 0: none")
    wandb: Literal["disabled", "offline", "online"] = Field(description="log to Weights & Biases too")

    def __post_init__(self):
        self.rows_per_step = self.micro_batch_size * self.gradient_accumulation * self.num_gpus
        self.tokens_per_step = self.rows_per_step * self.seq_length
        self.total_steps = self.target_tokens // self.tokens_per_step
        if self.total_steps == 0:
            one_step = f"at least one step, {self.tokens_per_step} tokens"
            raise ValueError(f"target_tokens: expected {one_step}, got {self.target_tokens}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr: expected at most learning_rate ({self.learning_rate}), got {self.min_lr}")
        if self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps: expected at most the {self.total_steps} steps, got {self.warmup_steps}")


def as_dict(config) -> dict:
    """A config as files hold it: n_kv_groups stands in those of the grouped variants alone, as in the release."""
    return {key: value for key, value in asdict(config).items() if key != "n_kv_groups" or value}


class StrictLoader(yaml.SafeLoader):
    """YAML without its surprises: a key stands once, 2e-4 is a number, 010 is ten."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{repeated[0]} stands twice")
        return super().construct_mapping(node, deep)


StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
FLOAT = re.compile(r"[-+]?\d+[eE][-+]?\d+$")
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))


def load_config(cls, path, overrides):
    """A config out of a YAML file and those overrides that are fields of it.

    RunError names the file or the command line, the key, what was expected and what was found.
    """
    overrides = {key: value for key, value in overrides.items() if key in cls.__annotations__}
    try:
        return cls(**yaml.load(Path(path).read_text(encoding="utf-8"), StrictLoader) | overrides)
    except ValidationError as error:
        first = error.errors()[0]
        key = first["loc"][0] if first["loc"] else None
        place = "command line" if key in overrides else path
        if first["type"] == "value_error":  # of __post_init__: values that do not go together
            raise RunError(f"{place}: {first['ctx']['error']}") from error
        problem = first["msg"].replace("Input should be", "expected") + f", got {first['input']!r}"
        if first["type"] == "missing":
            problem = "missing, expected a value"
        if first["type"] == "unexpected_keyword_argument":
            problem = f"unknown key; expected one of {', '.join(cls.__annotations__)}"
        raise RunError(f"{place}: {key}: {problem}") from error
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise RunError(f"{path}: expected a YAML file of 'key: value' lines: {error}") from error


def parse_overrides(arguments) -> dict:
    """KEY=VALUE arguments as a dict, the values read as YAML."""
    known, overrides = [*ModelConfig.__annotations__, *TrainingConfig.__annotations__], {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise RunError(f"command line: {argument}: expected KEY=VALUE with a KEY out of {', '.join(known)}")
        try:
            overrides[key] = yaml.load(value, StrictLoader)
        except (ValueError, yaml.YAMLError) as error:
            raise RunError(f"command line: {key}: expected a YAML value, got {value!r}") from error
    return overrides


def settings_help() -> str:
    """One line for each field of the two configs: its type, its default where it has one, what it means."""
    lines = []
    for cls in (ModelConfig, TrainingConfig):
        lines.append(f"\n{cls.__name__} (KEY=VALUE)")
        for key, field in cls.__pydantic_fields__.items():
            default = "" if field.is_required() else f" [{field.default}]"
            lines.append(f"  {key}: {cls.__annotations__[key]}{default}: {field.description}")
    return "\n".join(lines)


def main(arguments=None):
    """Exit status 0: complete; 2: ended by what the last line says; 128 + n: saved and stopped by signal n."""
    configs = Path(__file__).resolve().parent / "configs"
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=settings_help(), formatter_class=layout)
    parser.add_argument("--model_config", default=configs / f"model_config_{SIZE}.yaml")
    parser.add_argument("--train_config", default=configs / f"train_config_{SIZE}.yaml")
    parser.add_argument("--output_dir", default=OUTPUT_DIR, type=Path)
    parser.add_argument("--resume", default="auto", help="auto (the newest checkpoint), never, or a path")
    parser.add_argument("--init_from", help="begin at step 0 with the weights of a checkpoint or final_model.pt")
    parser.add_argument("--accept_changes", action="store_true", help="resume although settings have changed")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="in place of what the configs say")
    options = parser.parse_intermixed_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the dash of Q–K=V on an ASCII terminal
    try:
        overrides = parse_overrides(options.settings)
        model_config = load_config(ModelConfig, options.model_config, overrides)
        config = load_config(TrainingConfig, options.train_config, overrides)
        how = (options.output_dir, options.resume, options.init_from, options.accept_changes)
        stopped_by = train(model_config, config, *how)
    except (RunError, OSError, torch.OutOfMemoryError, dist.DistError, RuntimeError) as error:
        sys.exit(explain(error, options.output_dir))
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped_by:
        sys.exit(128 + stopped_by)


def explain(error, output_dir) -> int:
    """Print one line about what ended the run and return the exit status; an error of the program is raised again."""
    on_all_ranks = isinstance(error, RunError)  # so that the line of rank 0 will do
    if isinstance(error, OSError) and not error.filename:
        error = f"{output_dir}: {error}"
    elif isinstance(error, torch.OutOfMemoryError):
        error = f"{error} Halve micro_batch_size and double gradient_accumulation: the global batch stays the same."
    elif isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        error = f"lost another process of this run; start again to resume ({error})"
        on_all_ranks = True
    elif isinstance(error, RuntimeError):
        raise error
    if not on_all_ranks or RANK == 0:
        print(f"{Path(__file__).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
