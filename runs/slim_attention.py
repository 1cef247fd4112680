"""Slim attention (arXiv 2503.05840): plain QKV with keys alone in its cache, exactly, and what that costs.

    python runs/slim_attention.py                              # decode time, 300M, 2,048 tokens
    python runs/slim_attention.py --checkpoint outputs_kqv/final_model.pt # how exact it is
"""

import math
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import transformer_KQV_300_M as qkv_script
import transformer_KV_1_300_M as kv_script
from common import Parser


class SlimAttention(nn.Module):
    """Takes the place of a CausalSelfAttention of QKV, with its weights; the cache is that of Q–K=V.

    All heads together, k = W_K x + b_K is as wide as x, so v = W_V W_K^-1 (k - b_K) + b_V. Head i mixes the
    keys of all heads by its attention weights, and then applies its rows of W_V W_K^-1. So a query makes
    1 + n_head passes of arithmetic over all keys, where QKV makes one over the keys and one over the values.
    """

    def __init__(self, attn):
        super().__init__()
        self.config, self.layer = attn.config, attn.layer
        self.c_attn, self.c_proj, self.dropout = attn.c_attn, attn.c_proj, attn.dropout
        C, n_head = self.config.n_embd, self.config.n_head
        _, k_weight, v_weight = attn.c_attn.weight.detach().double().chunk(3)
        _, k_bias, v_bias = attn.c_attn.bias.detach().double().chunk(3)
        maps = torch.linalg.solve(k_weight, v_weight, left=False)  # W_V W_K^-1
        self.maps = maps.float().view(n_head, C // n_head, C).mT.contiguous()  # [n_head, C, head_dim]
        self.v_bias = (v_bias - maps @ k_bias).float().view(n_head, C // n_head)

    def forward(self, x, cache=None):
        """x [B, T, C] -> [B, T, C]; with a K-only cache, the T tokens follow those already in it."""
        B, T, C = x.shape
        n_head, head_dim = self.config.n_head, C // self.config.n_head
        projected = nn.functional.linear(x, self.c_attn.weight[: 2 * C], self.c_attn.bias[: 2 * C])
        q, k = (part.view(B, T, n_head, head_dim).transpose(1, 2) for part in projected.chunk(2, dim=-1))
        if cache is not None:
            (k,) = cache.append(self.layer, k)
        S = k.shape[2]
        scores = q @ k.mT / math.sqrt(head_dim)  # [B, n_head, T, S]
        if T > 1:
            future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
            scores = scores.masked_fill(future, -math.inf)
        weights = scores.softmax(dim=-1).flatten(1, 2)  # [B, n_head T, S]
        mixed = weights[:, None] @ k  # [B, heads of the keys, n_head T, head_dim]
        mixed = mixed.permute(0, 2, 1, 3).reshape(B, n_head, T, C)
        y = mixed @ self.maps + self.v_bias[:, None]
        return self.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


def make_slim(model):
    """Put SlimAttention in the place of every attention layer of a QKV model."""
    for block in model.h:
        block.attn = SlimAttention(block.attn)
    return model


@torch.no_grad()
def show_exactness(path):
    """Print how far the logits on random tokens are from QKV's."""
    model = qkv_script.load_model(path)
    input_ids = torch.randint(model.config.vocab_size, (2, model.config.n_positions))
    expected, _ = model(input_ids)
    k_weights = [block.attn.c_attn.weight.chunk(3)[1].double() for block in model.h]
    logits, _ = make_slim(model)(input_ids)
    error = (logits - expected).abs().max() / expected.abs().max()
    conditions = ", ".join(f"{torch.linalg.cond(weight):,.0f}" for weight in k_weights)
    print(f"largest difference {error:.1e} of the largest logit; condition numbers of W_K: {conditions}")


@torch.no_grad()
def time_decode(shape, context, rounds):
    """Print the time of a decoded token at the end of a full cache, the variants in turn, weights random."""
    qkv, slim = (qkv_script.GPT(qkv_script.ModelConfig(**shape)) for _ in range(2))
    shared = kv_script.GPT_QKV_KEqualsV(kv_script.ModelConfig(**shape))
    models = {"QKV": qkv.eval(), "Slim attention": make_slim(slim).eval(), "Q–K=V": shared.eval()}
    n_steps = 8
    seconds = defaultdict(list)
    for _ in range(rounds):
        for name, model in models.items():
            cache = (qkv_script if name == "QKV" else kv_script).KVCache(context)
            model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
            for layer in cache.layers.values():
                for tensor in layer:
                    tensor.normal_()
            cache.length = context - n_steps
            started = time.perf_counter()
            for _ in range(n_steps):
                model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
            seconds[name].append((time.perf_counter() - started) / n_steps)
    print(f"{shape}, {context:,} tokens, fp32, {torch.get_num_threads()} threads")
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(times, seconds["QKV"], strict=True)]
        ms, ratio = 1000 * statistics.median(times), statistics.median(ratios)
        print(f"{name:14} {ms:6.0f} ms a token, {ratio:.2f} x QKV (medians of {rounds} rounds)")


def main():
    parser = Parser(__file__, __doc__)
    parser.add_argument("--checkpoint", help="of QKV: show exactness")
    parser.add_argument("--rounds", type=int, default=7, help="of decode timing")
    options = parser.parse_args()
    if options.checkpoint:
        show_exactness(options.checkpoint)
    else:
        time_decode({"n_embd": 1024, "n_layer": 20, "n_head": 16}, 2048, options.rounds)


if __name__ == "__main__":
    main()
