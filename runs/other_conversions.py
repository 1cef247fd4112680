"""What the joint decomposition of convert_checkpoint.py is compared with: plainer choices, and other metrics.

    python runs/other_conversions.py --method drop_v --checkpoint PATH --to kv --data DIR --output OUT

takes convert_checkpoint.py's options beside its own, and writes the same kind of checkpoint. WAYS are all
that results/conversion compares.

    joint_svd   convert_checkpoint.py's choice, in the metric of --weighting
    drop_v      the keys as they are, for the values too
    mean        the plain mean over the heads and, without cached values, over key and value: as Ainslie et
                al. (2023) start the training of GQA from a model with full heads

    gradient    convert_checkpoint.py's metric
    activation  what an error changes next alone, and every position counts alike
    none        every number and every position counts alike
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import convert_checkpoint as cc

METHODS = ("joint_svd", "drop_v", "mean")
WEIGHTINGS = ("gradient", "activation", "none")
DEFAULT = {"method": "joint_svd", "weighting": "gradient", "tokens": 32768}
WAYS = [DEFAULT | way for way in (
    {"weighting": "activation"}, {"weighting": "none"}, {"method": "mean"}, {"method": "drop_v"},
    {"tokens": 2048}, {"tokens": 8192}, {"tokens": 131072}, {"weighting": "activation", "tokens": 131072},
    # other metrics: values count for half or twice as much, as much as the keys; positions count alike
    {"weighting": "activation, values x 0.5"}, {"weighting": "activation, values x 2"},
    {"weighting": "activation, values as keys"},
    # the gradient with nothing of activation's metric, and no weight of positions beside it or none at all
    {"weighting": "gradient, only it"}, {"weighting": "gradient, only it, positions alike"},
)]  # fmt: skip
# Recorded, by commit 0a383c6: on the inputs of the layers that are converted already, and a fit behind the SVD.
TRIED = [DEFAULT | {"method": f"joint_svd, {how}"} for how in ("layer by layer", "fitted")]


class OtherMoments(cc.Moments):
    """Moments in another metric, by its name."""

    def __init__(self, heads, weighting):
        super().__init__(heads)
        self.weighting, _, self.change = weighting.partition(", ")

    def position_weights(self, g):
        if self.weighting != "gradient" or self.change.endswith("positions alike"):
            return torch.ones_like(g[..., :1])
        return g.square().sum(-1, keepdim=True) if self.change == "only it" else super().position_weights(g)

    def metric(self, attention):
        if self.weighting == "none":
            return torch.eye(self.first.shape[1], dtype=torch.float64).expand_as(self.second)
        if self.change.startswith("only"):
            return self.fisher
        of_gradients = self.weighting == "gradient"
        metric = super().metric(attention) if of_gradients else self.activation_metric(attention)
        if not self.change.startswith("values"):
            return metric
        n = metric.shape[-1] // 2
        if self.change == "values as keys":
            energy = (metric @ self.covariance()).diagonal(dim1=1, dim2=2)
            factor = energy[:, :n].sum(1) / energy[:, n:].sum(1)
        else:  # a factor of the values, so its square in the metric
            factor = torch.full((len(metric),), float(self.change.split()[-1]) ** 2)
        scale = torch.ones(len(metric), 2 * n, dtype=metric.dtype)
        scale[:, n:] = factor.sqrt()[:, None]
        return metric * scale[:, :, None] * scale[:, None, :]


def average(attention, heads, covariance, metric, mean, method):
    """(D, U, mean) as of convert_checkpoint.choose: the mean of a block's heads, or of its first half."""
    n_blocks, n_heads = heads.blocks.shape
    n_averaged = n_heads // 2 if method == "drop_v" else n_heads  # keys come first in a block
    share = torch.zeros(1, n_heads, dtype=torch.float64)
    share[:, :n_averaged] = 1 / n_averaged
    identity = torch.eye(heads.head_dim, dtype=torch.float64)
    down = torch.kron(share, identity).expand(n_blocks, -1, -1)
    up = torch.kron(torch.ones(n_heads, 1, dtype=torch.float64), identity).expand(n_blocks, -1, -1)
    return down, up, torch.zeros_like(mean)


def convert(model, to, config, loader, n_tokens=32768, method="joint_svd", weighting="gradient"):
    """As convert_checkpoint.convert, by another of the METHODS and in another metric."""
    if method == "drop_v" and "v" in cc.VARIANTS[to]["cached"]:
        raise cc.InputError(f"--method drop_v: {to} keeps its values; use joint_svd or mean")
    choose = cc.choose if method == "joint_svd" else partial(average, method=method)
    moments_of = partial(OtherMoments, weighting=weighting)
    return cc.convert(model, to, config, loader, n_tokens, moments_of, choose)


def main(arguments=None):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    parser.add_argument("--weighting", choices=WEIGHTINGS, default=WEIGHTINGS[0])
    options, others = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(others):
        print(__doc__)
    weighting = options.weighting if options.method == "joint_svd" else None
    cc.main(others, partial(convert, **vars(options)), options.method, weighting)


if __name__ == "__main__":
    main()
