"""Q-MQA at 1.2B: multi-query attention in which the key is the value, one head of it for 32 query heads.

Tables 4 and 10 of "Do Transformers Need Three Projections? A Systematic Study of QKV Variants", ICML 2026.
Each training script is one whole experiment, and any two differ only in what the paper varies: this text, the
constants below the imports, the attention class and the name of the model class.

Projections  c_q, d -> d, and c_kv, d -> head_dim, which is key and value
KV cache     K of one head, which is V too: 22 layers x 64 numbers a token, 2,816 bytes in bf16

    torchrun --nproc_per_node=8 transformer_QMQA_1_2B.py     # the paper's run; started again, it resumes
    python transformer_QMQA_1_2B.py                          # one process: one GPU, or the CPU
    python transformer_QMQA_1_2B.py --output_dir outputs_1.2B_qmqa_text score_padding=false seed=43
    python -c "import transformer_QMQA_1_2B as m; print(m.load_model('outputs_1.2B_qmqa/final_model.pt'))"
"""

import argparse
import base64
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from bisect import bisect_right
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import yaml
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# [variant: constants]
VARIANT = "QMQA"  # as in this file's name
PAPER_NAME = "Q-MQA"
SIZE = "1.2B"  # of the default configs/*.yaml
CACHED = ("k",)  # what a layer keeps of every past token
N_KV_GROUPS = 1  # key/value heads of the grouped variants; None: one for each query head
OUTPUT_DIR = "outputs_1.2B_qmqa"
# [end of variant]

LOSS_CHUNK = 2048  # positions whose logits exist at the same time while a loss is computed
MAX_SKIPPED_UPDATES = 10  # this many in a row mean that the run has diverged
PROMPT_TOKENS = 32  # of each written sample, taken from the validation data
DENSE_BF16_FLOPS = {  # a second, for the mfu; by the first of these that stands in the GPU's name
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip
FLASH_ATTENTION = find_spec("flash_attn") is not None


class RunError(ValueError):
    """Ends a run with one line instead of a traceback: what is wrong, where, and what to do about it."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # libraries explain themselves in paragraphs


@dataclass(kw_only=True)
class ModelConfig:
    """Architecture; configs/model_config_*.yaml explain the fields."""

    vocab_size: int = 50304
    n_positions: int = 2048
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None  # None: 4 n_embd
    n_kv_groups: int | None = N_KV_GROUPS
    dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_flash_attention: bool = True
    plain_attention: bool = False

    def __post_init__(self):
        self.n_inner = self.n_inner or 4 * self.n_embd
        if self.n_embd % self.n_head:
            raise RunError(f"n_embd: expected a multiple of n_head ({self.n_head}), got {self.n_embd}")
        fits, expected = self.n_kv_groups == N_KV_GROUPS, N_KV_GROUPS or "null"
        if N_KV_GROUPS not in (None, 1):
            fits, expected = self.n_head % (self.n_kv_groups or math.inf) == 0, f"a divisor of n_head ({self.n_head})"
        if not fits:
            raise RunError(f"n_kv_groups: expected {expected} for {PAPER_NAME}, got {self.n_kv_groups}")


@dataclass(kw_only=True)
class TrainingConfig:
    """Data, optimiser and run; configs/train_config_*.yaml explain the fields."""

    train_data: str
    val_data: str
    sequence: Literal["padded", "packed"]
    score_padding: bool
    seq_length: int
    micro_batch_size: int
    gradient_accumulation: int
    num_gpus: int
    target_tokens: int
    learning_rate: float
    min_lr: float
    lr_scheduler: Literal["cosine", "linear", "constant"]
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    grad_clip: float
    skip_grad_norm: float
    seed: int
    precision: Literal["bf16", "fp32"]
    compile: Literal["auto", True, False]
    log_interval: int
    eval_interval: int
    eval_batches: int | None
    save_interval: int
    keep_checkpoints: int | None
    sample_tokens: int
    wandb: Literal["disabled", "offline", "online"]

    def __post_init__(self):
        self.rows_per_step = self.micro_batch_size * self.gradient_accumulation * self.num_gpus
        self.tokens_per_step = self.rows_per_step * self.seq_length
        self.total_steps = self.target_tokens // self.tokens_per_step
        if self.min_lr > self.learning_rate:
            raise RunError(f"min_lr: expected at most learning_rate ({self.learning_rate}), got {self.min_lr}")
        if self.total_steps == 0:
            one = f"one step at least ({self.tokens_per_step} tokens)"
            raise RunError(f"target_tokens: expected {one}, got {self.target_tokens}")


MAY_BE_ZERO = {"dropout", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "seed", "sample_tokens"}
BELOW_ONE = {"dropout", "beta1", "beta2"}


def checked(setting, value, place):
    """The value of a config's dataclass field, or a RunError that says where it stands and what was expected."""
    kinds = get_args(setting.type) or (setting.type,)  # of int | None, of Literal["a", "b"], or the one type
    if float in kinds and type(value) in (int, str):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # PyYAML reads 2e-4 as text
    fits = type(value) in kinds or (type(value), value) in [(type(kind), kind) for kind in kinds]  # 1 is not True
    expected = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds).replace("NoneType", "null")
    if int in kinds or float in kinds:
        lowest, limit = setting.name in MAY_BE_ZERO, 1 if setting.name in BELOW_ONE else math.inf
        expected += (" of at least 0" if lowest else " above 0") + (" and below 1" if limit == 1 else "")
        fits = fits and (value is None or 0 < value < limit or (value == 0 and lowest))
    if not fits:
        raise RunError(f"{place}: {setting.name}: expected {expected}, got {value!r}")
    return value


def read_config(kind, path, overrides):
    """A ModelConfig or TrainingConfig out of a YAML file; those of its fields in `overrides` replace what it says."""
    try:
        values = dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: expected a YAML file of 'key: value' lines: {error}") from error
    settings = {setting.name: setting for setting in fields(kind)}
    if unknown := [key for key in values if key not in settings]:
        raise RunError(f"{path}: {unknown[0]}: unknown key; expected one of {', '.join(settings)}")
    values = {key: checked(settings[key], value, path) for key, value in values.items()}
    overrides = {key: value for key, value in overrides.items() if key in settings}
    values |= {key: checked(settings[key], value, "command line") for key, value in overrides.items()}
    if missing := [key for key in settings if key not in values and settings[key].default is MISSING]:
        raise RunError(f"{path}: {missing[0]}: missing, expected a value")
    try:
        return kind(**values)
    except RunError as error:
        raise RunError(f"{path}: {error}") from error


def read_overrides(arguments):
    """KEY=VALUE arguments as a dict, the values read as YAML."""
    known = [setting.name for kind in (ModelConfig, TrainingConfig) for setting in fields(kind)]
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise RunError(f"command line: {argument}: expected KEY=VALUE with a KEY out of {', '.join(known)}")
        try:
            overrides[key] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            raise RunError(f"command line: {key}: expected a YAML value, got {value!r}") from error
    return overrides


class KVCache:
    """The past of every layer: a [B, max_length, kv heads, head_dim] tensor for each name in CACHED, allocated once.

    `length` positions are filled; the model moves it on after every layer has appended to its own tensors.
    """

    def __init__(self, config, batch_size, max_length, dtype, device):
        shape = batch_size, max_length, config.n_kv_groups or config.n_head, config.n_embd // config.n_head
        where = {"dtype": dtype, "device": device}
        self.layers = [[torch.empty(shape, **where) for _ in CACHED] for _ in range(config.n_layer)]
        self.batch_size, self.max_length, self.length = batch_size, max_length, 0

    @property
    def nbytes(self):
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def append(self, layer, *new):
        """Add [B, T, kv heads, head_dim] for each name in CACHED; return past and new, [B, length + T, ...] each."""
        end = self.length + new[0].shape[1]
        for stored, tensor in zip(self.layers[layer], new, strict=True):
            stored[:, self.length : end] = tensor
        return [stored[:, :end].to(new[0].dtype) for stored in self.layers[layer]]


def causal_attention(q, k, v, config):
    """Attention of the last T of S positions: q [B, T, heads, head_dim], k and v [B, S, kv heads, head_dim].

    Fewer kv heads than heads: neighbouring query heads share one. Returns [B, T, heads, head_dim].
    """
    T, S, shared = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    plain, flash = config.plain_attention, config.use_flash_attention and FLASH_ATTENTION
    if flash and not plain and q.is_cuda and q.dtype == torch.bfloat16:
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, causal=True)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # SDPA's is_causal lines up the first query with the first key. With a past, the last ones belong together: one
    # query sees everything and needs no mask, several need this one.
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if plain or 1 < T < S else None
    if not plain:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S, enable_gqa=shared > 1)
    else:  # every product in sight of a FLOP counter
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
        y = scores.masked_fill(~mask, -math.inf).softmax(dim=-1).to(v.dtype) @ v
    return y.transpose(1, 2)


# [variant: attention]
class CausalSelfAttention(nn.Module):
    """Q-MQA: all query heads share one key head, which is the value too; K of that head is cached."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        head_dim = config.n_embd // config.n_head
        self.c_q = nn.Linear(config.n_embd, config.n_embd)
        self.c_kv = nn.Linear(config.n_embd, head_dim)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        """x [B, T, d] -> [B, T, d]; with a cache, the T tokens follow those already in it."""
        B, T, d = x.shape
        heads, head_dim = self.config.n_head, d // self.config.n_head
        q = self.c_q(x).view(B, T, heads, head_dim)
        k = self.c_kv(x).view(B, T, 1, head_dim)
        if cache is not None:
            (k,) = cache.append(self.layer, k)  # [B, past + T, 1, head_dim]
        y = causal_attention(q, k, k, self.config)  # [B, T, heads, head_dim]
        return self.dropout(self.c_proj(y.reshape(B, T, d)))
# [end of variant]


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


class SummedLoss(torch.autograd.Function):
    """Cross-entropy in nats of rows [N, d] @ weight.T [d, V] for targets [N], summed over those that are not -100.

    A chunk of rows at a time, and its gradients with it: the logits of a whole micro batch, 6 x 2,048 x 50,304 in
    fp32, would be 2.5 GB and their gradient as much again, and computing them anew in the backward pass would make
    4 % more arithmetic in a training step.
    """

    @staticmethod
    def forward(ctx, rows, weight, targets):
        total, d_rows, d_weight = torch.zeros((), device=rows.device), [], None
        for x, target in zip(rows.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            logits = F.linear(x, weight)
            log_p = F.log_softmax(logits.float(), dim=-1)
            scored, target = (target != -100)[:, None], target.clamp(min=0)[:, None]
            total -= (log_p.gather(1, target) * scored).sum()
            d_logits = log_p.exp_().scatter_add_(1, target, -torch.ones_like(log_p[:, :1])).to(logits.dtype)
            d_rows.append((d_logits @ weight) * scored)
            product = (d_logits.t() @ (x * scored)).to(weight.dtype)
            d_weight = product if d_weight is None else d_weight.add_(product)
        ctx.save_for_backward(torch.cat(d_rows), d_weight)
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_rows, d_weight = ctx.saved_tensors
        return d_rows * d_total, d_weight * d_total, None


class GPT_QMQA(nn.Module):
    """GPT-2 style decoder: learned positions, LayerNorm before each sublayer, output embedding tied to the input's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(self._initialize)

    def _initialize(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, input_ids, labels=None, cache=None):
        """int64 [B, T] -> (logits [B, T, vocab_size], None), or (None, mean loss) where labels are given.

        Labels are the inputs, shifted in here; -100 is not scored. With a cache, the T tokens follow those in it
        and join them. ValueError where they do not fit the positions or the cache.
        """
        hidden = self.hidden_states(input_ids, cache)
        if labels is None:
            return F.linear(hidden, self.wte.weight), None
        if torch.is_grad_enabled():
            total = SummedLoss.apply(hidden[:, :-1].flatten(0, 1), self.wte.weight, labels[:, 1:].flatten())
        else:
            total = self.token_losses(hidden, labels).sum()
        return None, total / (labels[:, 1:] != -100).sum().clamp(min=1)

    def hidden_states(self, input_ids, cache=None):
        """What the output embedding reads: [B, T, d]."""
        (B, T), past = input_ids.shape, cache.length if cache else 0
        if past + T > self.config.n_positions:
            raise ValueError(f"{past + T} tokens do not fit the model's n_positions, {self.config.n_positions}")
        if cache and (cache.batch_size != B or past + T > cache.max_length):
            raise ValueError(f"{B} x {past + T} tokens do not fit a cache of {cache.batch_size} x {cache.max_length}")
        x = self.wte(input_ids) + self.wpe(torch.arange(past, past + T, device=input_ids.device))
        for block in self.h:
            x = block(x, cache)
        if cache:
            cache.length += T
        return self.ln_f(x)

    def token_losses(self, hidden, labels):
        """Cross-entropy in nats of each token given those before it: fp32 [B, T - 1], 0 where the label is -100."""
        rows, targets = hidden[:, :-1].flatten(0, 1).split(LOSS_CHUNK), labels[:, 1:].flatten().split(LOSS_CHUNK)
        logits = (F.linear(x, self.wte.weight).float() for x in rows)  # one chunk at a time
        losses = [F.cross_entropy(x, target, reduction="none") for x, target in zip(logits, targets, strict=True)]
        return torch.cat(losses).view(len(labels), -1)

    def make_cache(self, batch_size, max_length=None, dtype=None):
        """An empty KVCache; by default for n_positions tokens, in the dtype that the forward computes in."""
        weight, device = self.wte.weight, self.wte.weight.device
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        return KVCache(self.config, batch_size, max_length or self.config.n_positions, dtype, device)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True):
        """Continue the prompts, int64 [B, T], to [B, T + max_new_tokens]; temperature 0 takes the likeliest token.

        Beyond n_positions the model sees the last n_positions tokens. With learned positions each step then moves
        every token to another position, which no cached key survives, so those steps compute the window anew.
        """
        (B, T), window, was_training = idx.shape, self.config.n_positions, self.training
        if T == 0:
            raise ValueError("the prompt is empty; start from one token at least, such as the end-of-text token")
        if not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"expected a temperature of at least 0 and a top_k above 0, got {temperature} and {top_k}")
        tokens = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
        cache = self.make_cache(B, min(T + max_new_tokens, window)) if use_cache else None
        head = self.wte.weight.t()
        if head.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            head = head.contiguous()  # laid out as [d, vocab_size], a product with one row takes half the time
        self.eval()
        for end in range(T, T + max_new_tokens):
            if cache and end <= window:
                hidden = self.hidden_states(tokens[:, cache.length : end], cache)
            else:
                hidden = self.hidden_states(tokens[:, max(0, end - window) : end])
            tokens[:, end] = sample((hidden[:, -1] @ head).float(), temperature, top_k)
        self.train(was_training)
        return tokens


def sample(logits, temperature, top_k):
    """A token id for each row of [B, vocab_size]: the likeliest at temperature 0, else drawn among the top_k."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1)[:, 0]


class TokenDataset(Dataset):
    """Rows of seq_length tokens out of the files of dataset_download.py, which stay on disk, memory-mapped.

    padded: row i is document i, cut at seq_length or filled up with end-of-text tokens.
    packed: the documents, each followed by an end-of-text token, are one stream; row i is its i-th stretch.
    A row is (input_ids int64 [T], is_text bool [T]); is_text is false on the filling.
    """

    def __init__(self, data_path, seq_length, sequence="padded"):
        self.path, self.seq_length, self.packed = Path(data_path), seq_length, sequence == "packed"
        try:
            metadata = json.loads((self.path / "metadata.json").read_text(encoding="utf-8"))
            self.token_bytes = np.load(self.path / "token_bytes.npy").astype(np.int64)
            self.chunks = metadata["chunks"]  # with their hashes: what a resumed run must find again
            self.tokens = [self._map(f"{chunk['name']}.tokens", chunk["tokens"]) for chunk in self.chunks]
            self.offsets = [self._map(f"{chunk['name']}.offsets", chunk["documents"] + 1) for chunk in self.chunks]
            self.vocab_size, self.eos_id = metadata["vocab_size"], metadata["eos_id"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise RunError(f"{self.path}: no complete token files ({error}); run dataset_download.py first") from error
        if not (metadata["finished"] and metadata["documents"]):
            raise RunError(f"{self.path}: its preparation is not finished; run dataset_download.py again")
        # Where each chunk starts: in documents, and in tokens of the packed stream.
        self.document_starts = np.cumsum([0, *(chunk["documents"] for chunk in self.chunks)])
        self.stream_starts = np.cumsum([0, *(chunk["documents"] + chunk["tokens"] for chunk in self.chunks)])

    def _map(self, name, length):
        try:
            array = np.load(self.path / f"{name}.npy", mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{name}.npy is damaged: {error}") from error
        if len(array) != length:
            raise ValueError(f"{name}.npy has {len(array)} entries, metadata.json says {length}")
        return array

    def __len__(self):
        return int(-(-self.stream_starts[-1] // self.seq_length) if self.packed else self.document_starts[-1])

    def __getitem__(self, index):
        text = self._stretch(index) if self.packed else self._document(index)[: self.seq_length]
        row = np.full(self.seq_length, self.eos_id, dtype=np.int64)
        row[: len(text)] = text
        return torch.from_numpy(row), torch.arange(self.seq_length) < len(text)

    def _document(self, index):
        chunk = bisect_right(self.document_starts, index) - 1
        start, end = self.offsets[chunk][index - self.document_starts[chunk] :][:2]
        return self.tokens[chunk][start:end]

    def _stretch(self, index):
        position = index * self.seq_length
        chunk = bisect_right(self.stream_starts, position) - 1
        position, offsets = position - self.stream_starts[chunk], self.offsets[chunk]
        # Document j starts at offsets[j] + j: an end-of-text token follows each of the j documents before it.
        first = bisect_right(range(len(offsets) - 1), position, key=lambda j: offsets[j] + j) - 1
        skip, room, pieces = position - offsets[first] - first, self.seq_length, []
        for document in range(self.document_starts[chunk] + first, self.document_starts[-1]):
            pieces.append(np.append(self._document(document)[skip : skip + room], self.eos_id)[:room])
            skip, room = 0, room - len(pieces[-1])
            if room == 0:
                break
        return np.concatenate(pieces)

    def decode(self, token_ids):
        """The text of token ids, by the tokenizer stored beside the data; the bare ids where there is none."""
        tokenizer = self.path / "tokenizer.tiktoken"
        if not tokenizer.exists():
            return " ".join(map(str, token_ids))
        pairs = (line.split() for line in tokenizer.read_bytes().splitlines())
        pieces = {int(rank): base64.b64decode(piece) for piece, rank in pairs} | {self.eos_id: b"<|endoftext|>"}
        return b"".join(pieces.get(i, b"") for i in token_ids).decode("utf-8", errors="replace")


def shuffled_batches(rows, batch_size, seed, start, rank, world_size):
    """Endless micro batches of row numbers for one rank, from position `start` of the run.

    Position p of a run reads row p % rows of the shuffle of epoch p // rows: a function of seed and position alone.
    The ranks take turns, so that any number of them reads the same global batches.
    """
    epoch = None
    for first in range(start + rank * batch_size, sys.maxsize, world_size * batch_size):
        batch = []
        for position in range(first, first + batch_size):
            if position // rows != epoch:
                epoch = position // rows
                shuffle = np.random.default_rng((seed, epoch)).permutation(rows)
            batch.append(int(shuffle[position % rows]))
        yield batch


def get_dataloader(data_path, batch_size, seq_length, sequence="padded", seed=None, start=0, rank=0, world_size=1):
    """Batches (input_ids int64 [B, T], is_text bool [B, T]) of TokenDataset's rows.

    Without a seed: every row once, in the order of the files. With one: shuffled and endless, from position
    `start` of the run, the micro batches of this rank alone.
    """
    dataset, pin_memory = TokenDataset(data_path, seq_length, sequence), torch.cuda.is_available()
    if seed is None:
        return DataLoader(dataset, batch_size, pin_memory=pin_memory)
    order = shuffled_batches(len(dataset), batch_size, seed, start, rank, world_size)
    return DataLoader(dataset, batch_sampler=order, pin_memory=pin_memory)


def learning_rate(step, config):
    """The rate of update number `step`, from 0 on: linear warm-up, then from learning_rate down to min_lr."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    left = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1}
    return config.min_lr + left[config.lr_scheduler] * (config.learning_rate - config.min_lr)


def accumulation_for(config, world_size):
    """Micro batches that each process takes in a step, so that any number of them trains on the same global batch."""
    total = config.gradient_accumulation * config.num_gpus
    if total % world_size:
        possible = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise RunError(f"{world_size} processes cannot share the {total} micro batches of a step; use {possible}")
    return total // world_size


def ranks():
    """The rank of this process and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values):
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def say(text):
    """Print on rank 0, above the progress bar where there is one."""
    if ranks()[0] == 0:
        tqdm.write(text)


@torch.no_grad()
def evaluate(model, val_loader, max_batches=None):
    """Score the rows of a get_dataloader loader, or its first max_batches batches, in the precision of the caller.

    Every rank scores its share and the sums are added, so the number of ranks does not change the result.
    Returns a dict: loss and perplexity over every position, filling included (the paper's protocol); text_loss and
    text_perplexity over document tokens alone; bits_per_byte of their UTF-8 text; padding_fraction of all positions.
    """
    device, was_training, (rank, world_size) = model.wte.weight.device, model.training, ranks()
    token_bytes = torch.from_numpy(val_loader.dataset.token_bytes).to(device)
    sums = torch.zeros(7, dtype=torch.float64, device=device)
    model.eval()
    for input_ids, is_text in islice(val_loader, rank, max_batches, world_size):
        input_ids, is_text = input_ids.to(device), is_text.to(device)
        losses = model.token_losses(model.hidden_states(input_ids), input_ids).double()
        text = is_text[:, 1:]
        counted = losses, torch.ones_like(losses), losses * text, text, token_bytes[input_ids[:, 1:]] * text
        sums += torch.stack([values.sum() for values in (*counted, is_text, ~is_text)])
    model.train(was_training)
    nats, positions, text_nats, text_positions, text_bytes, text, filling = sum_over_ranks(sums).tolist()
    if not text_positions:
        raise RunError(f"{val_loader.dataset.path}: no document of two tokens or more, so nothing to evaluate")
    return {
        "loss": nats / positions,
        "perplexity": float(np.exp(nats / positions)),
        "text_loss": text_nats / text_positions,
        "text_perplexity": float(np.exp(text_nats / text_positions)),
        "bits_per_byte": text_nats / math.log(2) / text_bytes if text_bytes else math.nan,
        "padding_fraction": filling / (text + filling),
    }


def save(path, contents):
    """torch.save under a temporary name, flushed to disk, then renamed: no half file ever stands under `path`."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with open(partial, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        partial.unlink(missing_ok=True)
        needed, free = nbytes(contents) / 1e6, shutil.disk_usage(path.parent).free / 1e6
        space = f"it takes {needed:,.1f} MB, and {free:,.1f} MB are free"
        raise RunError(f"{path}: not saved: {space}; the checkpoints before it are whole ({error})") from error


def nbytes(contents):
    """Bytes of the tensors in nested dicts."""
    return sum(map(nbytes, contents.values())) if isinstance(contents, dict) else getattr(contents, "nbytes", 0)


def read_checkpoint(path):
    """The contents of a checkpoint, ours or a released one, with its weights under the names of this script.

    RunError where the file is missing, truncated, not a checkpoint, or that of another variant.
    """
    try:
        contents = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        # Released checkpoints carry DDP's prefix, and the causal mask of each layer.
        weights = {name.removeprefix("module."): w for name, w in contents["model_state_dict"].items()}
        weights = {name: w for name, w in weights.items() if not name.endswith(".attn.bias")}
        config = contents["model_config"]
        variant = contents.get("variant") or variant_of(weights, config["n_embd"] // config["n_head"])
    except Exception as error:  # a file of another kind can fail in any way
        raise RunError(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})") from error
    if variant != VARIANT:
        raise RunError(f"{path}: not a checkpoint of {PAPER_NAME}; load it with transformer_{variant}_300_M.py")
    return contents | {"model_state_dict": weights}


def variant_of(weights, head_dim):
    """The variant of a released checkpoint, as in its script's name, told by the shapes of its projections."""
    names = sorted({name.split(".")[3] for name in weights if name.startswith("h.0.attn.")} - {"c_proj"})
    width, d = weights[f"h.0.attn.{names[0]}.weight"].shape
    if names == ["c_k", "c_q"]:
        return "KV_1" if width == d else "QGQA"
    if names == ["c_kv", "c_q"]:
        return {head_dim: "QMQA", 2 * head_dim: "MQA"}.get(width, "GQA")
    return {"c_attn": "KQV", "c_kv": "QK", "c_k": "K"}[names[0]]


def load_weights(model, contents, path):
    """Copy the weights of a checkpoint into the model; RunError where it was made with another configuration."""
    weights, own = contents["model_state_dict"], model.state_dict()
    if weights.keys() != own.keys() or any(weights[name].shape != own[name].shape for name in own):
        raise RunError(f"{path}: its weights fit another configuration: {contents['model_config']}")
    model.load_state_dict(weights)


def load_model(path, device="cpu"):
    """The model in a checkpoint or final_model.pt, ours or a released one, in eval mode."""
    contents = read_checkpoint(path)
    config, names = contents["model_config"], {setting.name for setting in fields(ModelConfig)}
    known = {name: value for name, value in config.items() if name in names}
    try:
        if N_KV_GROUPS and "n_kv_groups" not in known:  # a released checkpoint does not always say
            weights = contents["model_state_dict"].items()
            width = next(len(weight) for name, weight in weights if name.startswith("h.0.attn.c_k")) // len(CACHED)
            known["n_kv_groups"] = width * config["n_head"] // config["n_embd"]
        with torch.device("meta"):  # allocates nothing: the weights come out of the file
            model = GPT_QMQA(ModelConfig(**known))
    except (TypeError, ArithmeticError, RunError) as error:
        raise RunError(f"{path}: its model_config is of no use: {error}") from error
    load_weights(model.to_empty(device=device), contents, path)
    return model.eval()


def checkpoints(output_dir):
    """The checkpoints in a folder, {step: path}, the newest first."""
    paths = {path.stem.rpartition("_")[2]: path for path in output_dir.glob("checkpoint_step_*.pt")}
    return {step: paths[str(step)] for step in sorted((int(name) for name in paths if name.isdigit()), reverse=True)}


def find_checkpoint(output_dir, resume):
    """The checkpoint to go on from, or None: the newest whole one (auto), none (never), or that path."""
    if resume != "auto":
        return None if resume == "never" else Path(resume)
    for path in checkpoints(output_dir).values():
        try:
            read_checkpoint(path)
            return path
        except RunError as error:
            say(f"warning: passed over {error}")
    return None


def join_processes():
    """Join the processes that torchrun started, if it did; returns the device of this one."""
    local_rank, local_count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local_rank % gpus)
    if "RANK" in os.environ:
        try:
            dist.init_process_group("nccl" if gpus >= local_count else "gloo")
        except (ValueError, RuntimeError) as error:
            place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise RunError(f"the processes could not meet at {place}: {error}") from error
    if 0 < gpus < local_count:
        say(f"warning: {local_count} processes share {gpus} GPU; start one for each GPU to train at full speed")
    return torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")


def built_together(build):
    """The Trainer that build() makes, once every rank has one; else the error of the first that has none, on all."""
    trainer, error = None, None
    try:
        trainer = build()
    except (RunError, OSError) as caught:
        error = str(caught)
    reports = [(error, trainer and trainer.step)]
    if dist.is_initialized():
        reports *= dist.get_world_size()
        dist.all_gather_object(reports, reports[0])
    if errors := [error for error, _ in reports if error]:
        raise RunError(errors[0])
    if len(steps := {step for _, step in reports}) > 1:
        raise RunError(f"the ranks would resume at different steps, {steps}; do all nodes see the same output_dir?")
    return trainer


@contextlib.contextmanager
def stop_signals():
    """Collects SIGTERM and Ctrl-C in the list it yields, so that the step in hand can be finished and saved."""
    received = []
    handlers = {n: signal.signal(n, lambda n, _: received.append(n)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start_wandb(output_dir, config):
    """A wandb run, or None; nothing that goes wrong with it may hold up or end the training."""
    if config.wandb == "disabled":
        return None
    try:
        import wandb

        options = {"name": output_dir.name, "dir": output_dir, "settings": wandb.Settings(init_timeout=30)}
        return wandb.init(project="qkv-variants", mode=config.wandb, config=asdict(config), **options)
    except Exception as error:  # whatever a logger fails in, it is not worth the run
        say(f"warning: wandb is not used: {error}")
        return None


def read_metrics(path):
    """The records of a metrics.jsonl, but for a last line that a kill cut short."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def as_dict(config):
    return {name: value for name, value in asdict(config).items() if name != "n_kv_groups" or value}


class Trainer:
    """A run: the model, the optimiser and the place in the data, which together make a checkpoint."""

    def __init__(self, options, device):
        overrides = read_overrides(options.settings)
        self.model_config = model_config = read_config(ModelConfig, options.model_config, overrides)
        self.config = config = read_config(TrainingConfig, options.train_config, overrides)
        self.output_dir = output_dir = options.output_dir
        self.device, (self.rank, self.world_size) = device, ranks()
        self.accumulation = accumulation_for(config, self.world_size)
        if config.seq_length > model_config.n_positions:
            raise RunError(f"seq_length: {config.seq_length} is more than n_positions, {model_config.n_positions}")
        path = find_checkpoint(output_dir, options.resume)
        resumed = read_checkpoint(path) if path else {"step": 0, "rows_seen": 0, "evaluated": None}
        self.step, self.rows_seen = resumed["step"], resumed["rows_seen"]
        self.evaluated = resumed["evaluated"] if path and path.parent == output_dir else None

        layout = config.micro_batch_size, config.seq_length, config.sequence
        self.val_loader = get_dataloader(config.val_data, *layout)
        loader = get_dataloader(config.train_data, *layout, config.seed, self.rows_seen, self.rank, self.world_size)
        self.data, self.batches = loader.dataset, iter(loader)
        if self.data.vocab_size > model_config.vocab_size:
            raise RunError(f"vocab_size: {self.data.path} needs {self.data.vocab_size}, got {model_config.vocab_size}")

        torch.manual_seed(config.seed)
        self.model = self.replica = GPT_QMQA(model_config).to(self.device)
        # One group of parameters: the published recipe decays biases and LayerNorms too.
        recipe = {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **recipe)
        if path:
            if resumed["data"] != self.data.chunks:
                raise RunError(f"{path}: trained on other data than is in {self.data.path}; use another --output_dir")
            load_weights(self.model, resumed, path)
            self.optimizer.load_state_dict(resumed["optimizer_state_dict"])
            say(f"resuming from {path} at step {self.step} of {config.total_steps}")
        if config.compile is True or (config.compile == "auto" and self.device.type == "cuda"):
            self.model.compile()
        self.skipped, self.timed_steps, self.timed_seconds = 0, 0, 0.0
        if self.rank == 0:
            self._open_output_dir()

    def _open_output_dir(self):
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for step, path in checkpoints(self.output_dir).items():
            if step > self.step:  # of a run that this one replaces: no resume must find it
                path.rename(path.with_suffix(".pt.old"))
        run = {"variant": VARIANT, "train_data": self.data.chunks, "val_data": self.val_loader.dataset.chunks}
        settings = {"model_config": as_dict(self.model_config), "train_config": as_dict(self.config), "run": run}
        for name, contents in settings.items():
            text = yaml.safe_dump(contents, sort_keys=False)
            (self.output_dir / f"{name}.yaml").write_text(text, encoding="utf-8")
        # A killed run has logged steps beyond its last checkpoint; they are about to be taken, and logged, again.
        self.metrics = self.output_dir / "metrics.jsonl"
        kept = [record for record in read_metrics(self.metrics) if self.step and record["step"] <= self.step]
        self.metrics.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
        self.wandb = start_wandb(self.output_dir, self.config)
        no_terminal = not sys.stderr.isatty()
        self.bar = tqdm(total=self.config.total_steps, initial=self.step, unit="step", disable=no_terminal)

    def train(self, received):
        """Train to the last step, or until a signal arrives in the list `received`; returns whether all is done."""
        if self.world_size > 1:  # here, because it waits for the other ranks to have built their models
            self.replica = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        saved, stop = self.step, False
        while True:  # one turn more than there are steps, so that evaluating and saving stand here alone
            last = self.step == self.config.total_steps
            if (last or (self.step % self.config.eval_interval == 0 and not stop)) and self.evaluated != self.step:
                with autocast(self.config, self.device):
                    results = evaluate(self.model, self.val_loader, self.config.eval_batches)
                self.evaluated = self.step
                self._log("final" if last else "val", results)
            if (last or stop or self.step % self.config.save_interval == 0) and saved != self.step:
                saved = self.step
                if self.rank == 0:
                    self._write_samples()
                    self._save(last)
            if last or stop:
                return last
            stop = self._update(received)

    def _update(self, received):
        """Take one step on the next global batch; returns whether some rank was told to stop."""
        config, started = self.config, time.perf_counter()
        loss = self._backward([next(self.batches) for _ in range(self.accumulation)])
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        summed = sum_over_ranks(torch.stack([loss, loss.new_tensor(len(received))]))
        loss, told, grad_norm = torch.stack([*summed, grad_norm]).tolist()  # the one wait for the device in a step
        if not math.isfinite(loss):
            raise RunError(f"step {self.step + 1}: the loss is {loss}; no checkpoint has seen it. Lower learning_rate?")
        rate = learning_rate(self.step, config)
        if grad_norm <= config.skip_grad_norm:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.skipped = 0
        else:  # too large, or not a number
            self.skipped += 1
            say(f"warning: step {self.step + 1}: update skipped, its gradient norm is {grad_norm}")
            if self.skipped == MAX_SKIPPED_UPDATES:
                raise RunError(f"step {self.step + 1}: {self.skipped} updates skipped in a row. Lower learning_rate?")
        self.optimizer.zero_grad()
        self.step, self.rows_seen = self.step + 1, self.rows_seen + config.rows_per_step
        self.timed_steps += 1
        self.timed_seconds += time.perf_counter() - started
        if self.step % config.log_interval == 0 or self.step == config.total_steps:
            results = {"loss": loss, "perplexity": float(np.exp(loss)), "learning_rate": rate, "grad_norm": grad_norm}
            self._log("train", results | self._speed())
        return told > 0

    def _backward(self, batches):
        """Gradients of the mean loss over the scored tokens of the global batch; returns this rank's share of it."""
        config, loss = self.config, torch.zeros((), device=self.device)
        score_filling = config.sequence == "padded" and config.score_padding
        scored = [int((is_text | score_filling)[:, 1:].sum()) for _, is_text in batches]
        total = sum_over_ranks(torch.tensor(float(sum(scored)), device=self.device)).clamp(min=1)
        for i, batch in enumerate(batches):
            # Dropout is a function of seed and position in the data, whatever the number of processes or resumes.
            row = self.rows_seen + (i * self.world_size + self.rank) * config.micro_batch_size
            torch.manual_seed(int(np.random.SeedSequence((config.seed, row)).generate_state(1)[0]))
            input_ids, is_text = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            labels = input_ids if score_filling else input_ids.masked_fill(~is_text, -100)
            more_to_come = self.world_size > 1 and i < len(batches) - 1
            with self.replica.no_sync() if more_to_come else contextlib.nullcontext():
                with autocast(config, self.device):
                    _, mean = self.replica(input_ids, labels)
                share = mean * (scored[i] / total)
                (share * self.world_size).backward()  # DDP takes the mean over the ranks
            loss += share.detach()
        return loss

    def _speed(self):
        """tokens_per_second since the last call and, on a known GPU, mfu: the share of its dense bf16 peak."""
        config, c = self.config, self.model_config
        speed = self.timed_steps * config.tokens_per_step / self.timed_seconds
        self.timed_steps, self.timed_seconds = 0, 0.0
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        for name, peak in DENSE_BF16_FLOPS.items():
            if name in gpu:
                parameters = sum(p.numel() for p in self.model.parameters())
                flops = 6 * parameters + 12 * c.n_layer * c.n_embd * config.seq_length  # a token, both passes
                return {"tokens_per_second": speed, "mfu": flops * speed / (peak * self.world_size)}
        return {"tokens_per_second": speed}

    def _log(self, kind, results):
        if self.rank != 0:
            return
        record = {"kind": kind, "step": self.step, "tokens": self.rows_seen * self.config.seq_length} | results
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")
        if self.wandb:
            try:
                self.wandb.log({f"{kind}/{name}": value for name, value in results.items()}, step=self.step)
            except Exception as error:  # as in start_wandb
                say(f"warning: wandb is not used any more: {error}")
                self.wandb = None
        self.bar.update(self.step - self.bar.n)
        if kind == "train":
            text = f"loss {results['loss']:.4f}, {results['tokens_per_second']:,.0f} tokens/s"
            self.bar.set_postfix_str(text)  # beside it, the bar shows the time left
            left = (self.config.total_steps - self.step) * self.config.tokens_per_step / results["tokens_per_second"]
            text += f", {tqdm.format_interval(left)} left"
        else:
            text = f"perplexity {results['perplexity']:.3f}, of the text alone {results['text_perplexity']:.3f}"
        if kind != "train" or self.bar.disable:
            say(f"step {self.step} of {self.config.total_steps}, {kind}: {text}")

    def _save(self, last):
        model = {
            "variant": VARIANT,
            "step": self.step,
            "epoch": self.rows_seen // len(self.data),
            "tokens_seen": self.rows_seen * self.config.seq_length,
            "model_state_dict": self.model.state_dict(),
            "model_config": as_dict(self.model_config),
            "train_config": as_dict(self.config),
        }
        place = {"rows_seen": self.rows_seen, "evaluated": self.evaluated, "data": self.data.chunks}
        if last:
            save(self.output_dir / "final_model.pt", model)
        optimizer = {"optimizer_state_dict": self.optimizer.state_dict()}
        save(self.output_dir / f"checkpoint_step_{self.step}.pt", model | place | optimizer)
        for path in list(checkpoints(self.output_dir).values())[self.config.keep_checkpoints or sys.maxsize :]:
            path.unlink()

    def _write_samples(self):
        """Continue the beginnings of three rows of the validation data, through the KV cache."""
        if not self.config.sample_tokens:
            return
        data = self.val_loader.dataset
        rows = (0, len(data) // 3, 2 * len(data) // 3)
        prompts = torch.stack([data[row][0][:PROMPT_TOKENS] for row in rows]).to(self.device)
        torch.manual_seed(self.config.seed)
        with autocast(self.config, self.device):
            tokens = self.model.generate(prompts, self.config.sample_tokens, temperature=0.8, top_k=50).tolist()
        texts = [f"{data.decode(t[:PROMPT_TOKENS])} [...] {data.decode(t[PROMPT_TOKENS:])}\n" for t in tokens]
        (self.output_dir / f"samples_step_{self.step}.txt").write_text("\n".join(texts), encoding="utf-8")

    def summary(self):
        """What the run came to, from its metrics and its cache."""
        records, c = read_metrics(self.metrics), self.model_config
        before, after = (next(r for r in order if r["kind"] != "train") for order in (records, records[::-1]))
        speed = np.median([r["tokens_per_second"] for r in records if r["kind"] == "train"] or [math.nan])
        cache, full = self.model.make_cache(1, dtype=torch.bfloat16).nbytes, 4 * c.n_layer * c.n_positions * c.n_embd
        files = "metrics.jsonl", f"samples_step_{self.step}.txt", f"checkpoint_step_{self.step}.pt", "final_model.pt"
        return f"""
{PAPER_NAME}, {sum(p.numel() for p in self.model.parameters()):,} parameters, complete after {self.step} steps
text perplexity  {before["text_perplexity"]:.2f} at step {before["step"]}, {after["text_perplexity"]:.2f} at the end
speed            {speed:,.0f} tokens a second
KV cache         {cache:,} bytes for {c.n_positions:,} tokens in bf16; QKV takes {full:,}
in {self.output_dir}: {", ".join(name for name in files if (self.output_dir / name).exists())}"""


def autocast(config, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def explained(error, output_dir):
    """Print one line about what ended the run, and return the exit status; any other RuntimeError is raised again."""
    said_by_all = isinstance(error, RunError)  # so that one line, of rank 0, will do
    if isinstance(error, OSError) and not error.filename:
        error = f"{output_dir}: {error}"
    elif isinstance(error, torch.OutOfMemoryError):
        error = f"{error} Halve micro_batch_size and double gradient_accumulation: the global batch stays the same."
    elif isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        error, said_by_all = f"lost another process of this run; start again to resume ({error})", True
    elif isinstance(error, RuntimeError):
        raise error
    if not said_by_all or os.environ.get("RANK", "0") == "0":
        print(f"{Path(__file__).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = Path(__file__).resolve().parent / "configs"
    parser.add_argument("--model_config", default=configs / f"model_config_{SIZE}.yaml")
    parser.add_argument("--train_config", default=configs / f"train_config_{SIZE}.yaml")
    parser.add_argument("--output_dir", default=OUTPUT_DIR, type=Path)
    parser.add_argument("--resume", default="auto", help="auto, never or the path of a checkpoint")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="in place of what the configs say")
    options = parser.parse_intermixed_args(arguments)
    try:
        device = join_processes()
        trainer = built_together(lambda: Trainer(options, device))
        with stop_signals() as received:
            complete = trainer.train(received)
    except (RunError, OSError, RuntimeError) as error:
        sys.exit(explained(error, options.output_dir))
    if trainer.rank == 0:
        trainer.bar.close()
        print(trainer.summary() if complete else f"stopped and saved at step {trainer.step}; start again to resume")
    if dist.is_initialized():
        dist.destroy_process_group()
    if not complete:
        sys.exit(128 + (received or [signal.SIGTERM])[0])


if __name__ == "__main__":
    main()
