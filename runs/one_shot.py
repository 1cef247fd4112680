"""Conversion alone, by the default or in all the ways that results/conversion compares: losses before and after.

    python runs/one_shot.py outputs_scaling/RUN/checkpoint_step_7680.pt --data scaling_data --all \\
        --record results/conversion/one_shot.jsonl

The record has a line for each conversion; what stands there is not computed again.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import other_conversions

import convert_checkpoint as cc
from common import Parser, script_of

SHARED = {"kqv": "kv", "gqa": "qgqa", "mqa": "qmqa"}
DEFAULT = {"method": "joint_svd", "weighting": "gradient", "tokens": 32768}
WAYS = [DEFAULT | way for way in (
    {"weighting": "activation"}, {"weighting": "none"}, {"method": "mean"}, {"method": "drop_v"},
    {"tokens": 2048}, {"tokens": 8192}, {"tokens": 131072}, {"weighting": "activation", "tokens": 131072},
    # other metrics: values count for half or twice as much, as much as the keys; positions count alike
    {"weighting": "activation, values x 0.5"}, {"weighting": "activation, values x 2"},
    {"weighting": "activation, values as keys"},
    # the gradient with nothing of activation's metric, and no weight of positions beside it or none at all
    {"weighting": "gradient, only it"}, {"weighting": "gradient, only it, positions alike"},
    # other ways: the inputs of the layers that are converted already, and a fit behind the SVD
    {"method": "joint_svd, layer by layer"}, {"method": "joint_svd, fitted"},
)]  # fmt: skip


class OtherMoments(other_conversions.WeightedMoments):
    """Moments of one of the WAYS: another metric by its name, and for a fit all positions as well."""

    def __init__(self, heads, way):
        weighting, _, self.change = way["weighting"].partition(", ")
        super().__init__(heads, weighting)
        self.positions = [] if way["method"].endswith("fitted") else None

    def add(self, kv, queries, gradients):
        if self.positions is not None:
            parts = (self.heads.by_block(tensor.double()).transpose(0, 1) for tensor in (kv, gradients))
            self.positions.append(tuple(parts))
        super().add(kv, queries, gradients)

    def position_weights(self, g):
        if self.change.endswith("positions alike"):
            return torch.ones_like(g[..., :1])
        return g.square().sum(-1, keepdim=True) if self.change == "only it" else super().position_weights(g)

    def metric(self, attention):
        if self.change.startswith("only"):
            return self.fisher
        metric = super().metric(attention)
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

    def fit(self, down, up):
        """D and U that minimise the mean of (g^T (u - U D u))^2: what each position's own error costs."""
        u, g = (torch.cat(parts, dim=1) for parts in zip(*self.positions, strict=True))
        u = u - self.mean()[:, None]
        g = g / (g * u).square().sum(dim=(1, 2), keepdim=True).sqrt()
        down, up = down.clone().requires_grad_(), up.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([down, up], max_iter=30, history_size=10, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            total = ((g * u).sum(-1) - ((g @ up) * (u @ down.mT)).sum(-1)).square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        return down.detach(), up.detach()


def convert_by(way, model, to, config, loader_of):
    """The state dict of the target by one of the WAYS; loader_of() is a new loader of the training data."""
    method, weighting = way["method"], way["weighting"]
    if method in other_conversions.METHODS and weighting in other_conversions.WEIGHTINGS:
        return other_conversions.convert(model, to, config, loader_of(), way["tokens"], method, weighting)[0]
    heads = cc.Heads(model.config, config.n_kv_groups or config.n_head, caches_values=False)
    key_name = "c_k" if to in ("kv", "qgqa") else "c_kv"
    one_by_one = method.endswith("layer by layer")
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".attn." not in name}
    moments = None
    for number in range(config.n_layer):
        if moments is None or one_by_one:
            moments = [OtherMoments(heads, way) for _ in model.h]
            cc.collect_moments(model, moments, loader_of(), way["tokens"])
        sums, attention = moments[number], cc.AttentionWeights(model.state_dict(), number, heads)
        down, up = cc.joint_svd(sums.covariance(), sums.metric(attention), heads.head_dim)
        down, up = cc.even_rows(attention, down, up)
        if method.endswith("fitted"):
            down, up = sums.fit(down, up)
        converted = cc.absorb(attention, heads, down, up, sums.mean(), key_name)
        weights |= {f"h.{number}.attn.{name}": tensor for name, tensor in converted.items()}
        if one_by_one:
            keep_what_is_kept(model.h[number].attn, heads, attention, up @ down, sums.mean())
    return weights


@torch.no_grad()
def keep_what_is_kept(attn, heads, attention, projector, mean):
    """Give the source's layer what is left of its keys and values u: projector (u - mean) + mean."""
    _, projection = cc.projections(attn)
    rows = len(projection.weight) - heads.kv_width + heads.by_block(torch.arange(heads.kv_width)).flatten()
    bias = projector @ (attention.kv_bias - mean)[..., None]
    projection.weight[rows] = (projector @ attention.kv_weight).flatten(0, 1).float()
    projection.bias[rows] = (bias[..., 0] + mean).flatten().float()


def read_one_shots(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def missing(checkpoint, ways, record_path):
    """Those of the ways in which a checkpoint has not been converted yet."""
    place = {"source": checkpoint.parent.name, "checkpoint": checkpoint.name}
    done = [record["way"] for record in read_one_shots(record_path) if record.items() >= place.items()]
    return [way for way in ways if way not in done]


def one_shot(checkpoint, data, ways, record_path):
    """Convert a checkpoint in each of the ways that are missing, and add a line for each to the record."""
    alias, contents, model = cc.read_source(checkpoint)
    to, script = SHARED[alias], script_of(alias)
    config = cc.target_config(alias, model.config, to, None)
    val_loader = cc.open_data(data / "validation", contents, config, batch_tokens=4096)
    before = script.evaluate(model, val_loader)["text_loss"]
    for way in missing(checkpoint, ways, record_path):
        source = script.load_model(checkpoint)
        target = getattr(script_of(to), cc.VARIANTS[to]["class"])(config)
        target.load_state_dict(
            convert_by(way, source, to, config, lambda: cc.open_data(data / "train", contents, config, seed=42))
        )
        after = script_of(to).evaluate(target.eval(), val_loader)["text_loss"]
        place = {"source": checkpoint.parent.name, "checkpoint": checkpoint.name}
        with open(record_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(place | {"way": way, "before": before, "after": after}) + "\n")
        print(f"{checkpoint}: {way}: {after - before:+.5f} nats")


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--all", action="store_true", help="in all ways, not by the default alone")
    parser.add_argument("--record", type=Path, required=True, metavar="one_shot.jsonl")
    options = parser.parse_args(arguments)
    one_shot(options.checkpoint, options.data, [DEFAULT, *(WAYS if options.all else [])], options.record)


if __name__ == "__main__":
    main()
