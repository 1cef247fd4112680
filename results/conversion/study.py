"""What runs/conversion.sh computes beside training: conversion alone in many ways, best rates and tables.

    python results/conversion/study.py best_rate kqv 64 80     # of results/scaling and results/conversion
    python results/conversion/study.py one_shot PATH.pt --data scaling_data --kind all
    python results/conversion/study.py tables                  # results.md and the figures

one_shot.jsonl has a line for each conversion that one_shot made; what stands there is not computed again. A grid
of one's own text has folders of its own: --scaling results/scaling_own --results results/conversion_own.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import torch
from matplotlib.ticker import LogLocator, NullLocator
from tabulate import tabulate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import convert_checkpoint as cc  # noqa: E402
import results_table  # noqa: E402
from report import LOOKS  # noqa: E402
from scaling_table import t_interval  # noqa: E402

FROM_THE_START = re.compile(r"(\w+?)_d(\w+?)_n(\d+)_lr([\d.]+)e-3_T256_(?:packed|padded)_seed(\d+)")
TRAINED_ON = re.compile(r"(\w+?)_d(\w+?)_n(\d+)_at(\d+)_(\w+?)_(\d+)_seed(\d+)")
SHARED = {"kqv": "kv", "gqa": "qgqa", "mqa": "qmqa"}
PAPER = {alias: row["paper"] for alias, row in cc.VARIANTS.items()}


# -----------------------------------------------------------------------------
# Runs


def evaluations(records):
    """(tokens, text loss) of each evaluation of a run, or None where it has no final one."""
    if not any(record["kind"] == "final" for record in records):
        return None
    return [(record["tokens"], record["text_loss"]) for record in records if record["kind"] != "train"]


def read_runs(folders):
    """Evaluations of runs from the start, [alias, shape, n][rate][seed], and of those trained on,
    [alias, shape, n, at, how, percent][seed], in the runs.jsonl of the folders.
    """
    started, trained_on = defaultdict(lambda: defaultdict(dict)), defaultdict(dict)
    for record in (record for folder in folders for record in results_table.read_runs(folder)):
        curve = evaluations(record["metrics"])
        if curve is None:
            continue
        if match := FROM_THE_START.fullmatch(record["name"]):
            alias, shape, n, rate, seed = match.groups()
            started[alias, shape, int(n)][float(rate)][int(seed)] = curve
        elif match := TRAINED_ON.fullmatch(record["name"]):
            alias, shape, n, at, how, percent, seed = match.groups()
            trained_on[alias, shape, int(n), int(at), how, int(percent)][int(seed)] = curve
    return started, trained_on


def best_rate(by_rate):
    """The rate of the lowest final loss, in the mean over the seeds that all rates have."""
    seeds = set.intersection(*({*by_seed} for by_seed in by_rate.values()))
    if not seeds:
        raise ValueError("no seed was run at every rate")
    return min(by_rate, key=lambda rate: statistics.fmean(by_rate[rate][seed][-1][1] for seed in seeds))


def same_end(folder, folders):
    """Whether a run that was trained again ends at the text loss that its record in the folders has."""
    ends = [evaluations(parent / folder.name) for parent in folders if (parent / folder.name).exists()]
    again, recorded = evaluations(folder)[-1][1], ends[0][-1][1]
    if abs(again - recorded) < 1e-4:
        return True
    print(f"study.py: {folder} ends at {again:.5f}, its record at {recorded:.5f}: another processor?", file=sys.stderr)
    print("Study a grid of your own: SCALING=results/scaling_own RESULTS=results/conversion_own", file=sys.stderr)
    return False


# -----------------------------------------------------------------------------
# Conversion alone

DEFAULT = {"method": "joint_svd", "weighting": "gradient", "tokens": 32768}
WAYS = [
    DEFAULT | {"weighting": "activation"},
    DEFAULT | {"weighting": "none"},
    DEFAULT | {"method": "mean"},
    DEFAULT | {"method": "drop_v"},
    DEFAULT | {"tokens": 2048},
    DEFAULT | {"tokens": 8192},
    DEFAULT | {"tokens": 131072},
    DEFAULT | {"weighting": "activation", "tokens": 131072},
    # other metrics: values count for half or twice as much, as much as the keys; positions count alike
    DEFAULT | {"weighting": "activation, values x 0.5"},
    DEFAULT | {"weighting": "activation, values x 2"},
    DEFAULT | {"weighting": "activation, values as keys"},
    # the gradient with nothing of activation's metric, and no weight of positions beside it or none at all
    DEFAULT | {"weighting": "gradient, only it"},
    DEFAULT | {"weighting": "gradient, only it, positions alike"},
    # other ways: the inputs of the layers that are converted already, and a fit behind the SVD
    DEFAULT | {"method": "joint_svd, layer by layer"},
    DEFAULT | {"method": "joint_svd, fitted"},
]


class OtherMoments(cc.Moments):
    """Moments of one of the WAYS: another metric by its name, and for a fit all positions as well."""

    def __init__(self, heads, way):
        weighting, _, self.change = way["weighting"].partition(", ")
        super().__init__(heads, weighting)
        self.positions = [] if way["method"].endswith("fitted") else None

    def add(self, kv, queries, gradients=None):
        if self.positions is not None:
            self.positions.append((self.by_block(kv), self.by_block(gradients)))
        if not self.change.startswith("only"):
            super().add(kv, queries, gradients)
            return
        u, g = self.by_block(kv), self.by_block(gradients)
        alike = self.change.endswith("positions alike")
        weights = torch.ones_like(u[..., :1]) if alike else g.square().sum(-1, keepdim=True)
        self.fisher += g.mT @ g
        self.weight += weights.sum(dim=(1, 2))
        self.first += (weights * u).sum(1)
        self.second += (weights * u).mT @ u

    def by_block(self, kv):
        return self.heads.by_block(kv.double()).transpose(0, 1)  # [blocks, T, n]

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
    if way["method"] in cc.METHODS and way["weighting"] in cc.WEIGHTINGS:
        return cc.convert(model, to, config, way["method"], way["weighting"], loader_of(), way["tokens"])[0]
    heads = cc.Heads(model.config, config.n_kv_groups or config.n_head, caches_values=False)
    key_name = "c_k" if to in ("kv", "qgqa") else "c_kv"
    one_by_one = way["method"].endswith("layer by layer")
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".attn." not in name}
    moments = None
    for number in range(config.n_layer):
        if moments is None or one_by_one:
            moments = [OtherMoments(heads, way) for _ in model.h]
            cc.collect_moments(model, moments, loader_of(), way["tokens"])
        sums, attention = moments[number], cc.AttentionWeights(model.state_dict(), number, heads)
        down, up = cc.joint_svd(sums.covariance(), sums.metric(attention), heads.head_dim)
        down, up = cc.even_rows(attention, down, up)
        if way["method"].endswith("fitted"):
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


def one_shot(path, data, kind, record_path, dry_run=False):
    """Convert a checkpoint by default or in all ways, and add a line for each to one_shot.jsonl.

    A dry run only prints the ways that are not there yet.
    """
    place = {"source": path.parent.name, "checkpoint": path.name}
    done = [record["way"] for record in read_one_shots(record_path) if {key: record[key] for key in place} == place]
    ways = [way for way in [DEFAULT, *(WAYS if kind == "all" else [])] if way not in done]
    if dry_run:
        print("\n".join(json.dumps(way) for way in ways))
    if dry_run or not ways:
        return
    alias, model, contents = cc.read_source(path, "cpu")
    to = SHARED[alias]
    config = cc.target_config(alias, model.config, to, None)
    val_loader = cc.open_data(data / "validation", contents, config, batch_tokens=4096)
    before = cc.SCRIPTS[alias].evaluate(model, val_loader)["text_loss"]

    def loader_of():
        return cc.open_data(data / "train", contents, config, seed=42)

    for way in ways:
        source = cc.SCRIPTS[alias].load_model(path)
        target = getattr(cc.SCRIPTS[to], cc.VARIANTS[to]["class"])(config)
        target.load_state_dict(convert_by(way, source, to, config, loader_of))
        after = cc.SCRIPTS[to].evaluate(target.eval(), val_loader)["text_loss"]
        with open(record_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(place | {"way": way, "before": before, "after": after}) + "\n")
        print(f"{path}: {way}: {after - before:+.5f} nats")


def read_one_shots(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -----------------------------------------------------------------------------
# Tables


def of_seeds(by_seed, digits=4):
    """Two cells for a dict by seed: the mean, with its 95 % interval if there are three, and every value."""
    values = [by_seed[seed] for seed in sorted(by_seed)]
    if not values:
        return ["", ""]
    mean = f"{statistics.fmean(values):+.{digits}f}"
    if len(values) == 3:
        low, high = t_interval(values)
        mean += f" ± {(high - low) / 2:.{digits}f}"
    return [mean, ", ".join(f"{value:+.{digits}f}" for value in values)]


def paired(curves, references, place=-1):
    """The differences of two dicts of evaluations by seed, at their first (0) or last (-1) evaluation."""
    both = curves.keys() & references.keys()
    return {seed: curves[seed][place][1] - references[seed][place][1] for seed in both}


def gap_of(started, alias, shape, n):
    """By seed, what sharing from the start costs, each variant at its own best rate; empty if not run."""
    source, shared = started.get((alias, shape, n)), started.get((SHARED[alias], shape, n))
    if not source or not shared:
        return {}
    return paired(shared[best_rate(shared)], source[best_rate(source)])


def read_prices(path, started):
    """Of the conversions alone, of sources at their best rate:
    {(alias, shape, n): {step: {way as JSON: {seed: price}}}}.
    """
    prices = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for record in read_one_shots(path):
        alias, shape, n, rate, seed = FROM_THE_START.fullmatch(record["source"]).groups()
        if float(rate) != best_rate(started[alias, shape, int(n)]):
            continue
        step = int(re.search(r"\d+", record["checkpoint"])[0])
        by_seed = prices[alias, shape, int(n)][step][json.dumps(record["way"])]
        by_seed[int(seed)] = record["after"] - record["before"]
    return prices


def last_step(started, alias, shape, n):
    """Of the sources: the end of their training, 1,024 tokens a step."""
    source = started[alias, shape, n]
    return max(curve[-1][0] for curve in source[best_rate(source)].values()) // 1024


def alone_table(started, prices):
    rows = []
    for (alias, shape, n), by_step in prices.items():
        price = by_step[last_step(started, alias, shape, n)][json.dumps(DEFAULT)]
        gap = gap_of(started, alias, shape, n)
        rows.append([PAPER[alias], f"d{shape}", n, *of_seeds(price, 5), *of_seeds(gap)])
    return ["source", "shape", "D/N", "price", "of the seeds", "gap from the start", "of the seeds"], rows


def along_table(prices):
    rows = []
    for (alias, shape, n), by_step in prices.items():
        for step in sorted(by_step):
            if len(by_step) > 1:
                price = by_step[step][json.dumps(DEFAULT)]
                rows.append([PAPER[alias], f"d{shape}", n, f"{step:,}", *of_seeds(price)])
    return ["source", "shape", "D/N", "step", "price", "of the seeds"], rows


def ways_table(started, prices):
    rows = []
    for (alias, shape, n), by_step in prices.items():
        by_way = by_step[last_step(started, alias, shape, n)]
        for way in (DEFAULT, *WAYS):
            if len(by_way) > 1 and json.dumps(way) in by_way:
                how = [way["method"], way["weighting"], f"{way['tokens']:,}"]
                rows.append([PAPER[alias], f"d{shape}", n, *how, *of_seeds(by_way[json.dumps(way)])])
    return ["source", "shape", "D/N", "method", "weighting", "tokens", "price", "of the seeds"], rows


def trained_on_table(started, trained_on):
    rows = []
    for (alias, shape, n, at, how, percent), curves in sorted(trained_on.items()):
        source = trained_on.get((alias, shape, n, at, "none", percent), {})  # it went on in the same way
        if how != "none":
            when = "at the end" if at == 100 else f"at {at} %"
            more = f"{percent} %" if at == 100 else f"{100 - at} %"
            alone, price = paired(curves, source, 0), paired(curves, source)
            gap, ahead = gap_of(started, alias, shape, n), {}
            shared = started.get((SHARED[alias], shape, n))
            if shared and at < 100:  # at the same total of tokens
                ahead = paired(shared[best_rate(shared)], curves)
            place = [PAPER[alias], f"d{shape}", n, when, more, how]
            rows.append([*place, of_seeds(alone)[0], *of_seeds(price), of_seeds(gap)[0], *of_seeds(ahead)])
    headers = ["source", "shape", "D/N", "converted", "trained on for", "by", "price before", "price after"]
    headers += ["of the seeds", "gap from the start"]
    return [*headers, "sharing from the start is behind it by", "of the seeds"], rows


def rates_table(started):
    rows = []
    for (alias, shape, n), by_rate in sorted(started.items()):
        best = best_rate(by_rate)
        for rate, curves in sorted(by_rate.items()):
            losses = ", ".join(f"{curves[seed][-1][1]:.4f}" for seed in sorted(curves))
            mark = "best" if rate == best else ""
            rows.append([PAPER[alias], f"d{shape}", n, f"{rate:g}e-3", losses, mark])
    return ["variant", "shape", "D/N", "peak rate", "text loss of the seeds", ""], rows


def tables(scaling, results):
    """Write results.md, conversion.png and widths.png from the metrics and one_shot.jsonl, as far as they are there."""
    started, trained_on = read_runs([scaling, results])
    prices = read_prices(results / "one_shot.jsonl", started)
    parts = {
        "Conversion alone": alone_table(started, prices),
        "Conversion alone, along the training": along_table(prices),
        "Ways of conversion alone": ways_table(started, prices),
        "Converted and trained on": trained_on_table(started, trained_on),
        "From the start": rates_table(started),
    }
    text = "# Tables of conversion\n\nLosses, prices and gaps in nats per token of text; ± is a 95 % t interval.\n"
    for title, (headers, rows) in parts.items():
        if rows:
            text += f"\n## {title}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n"
    (results / "results.md").write_text(text, encoding="utf-8")
    draw(started, trained_on, read_one_shots(results / "one_shot.jsonl"), results / "conversion.png")
    if any(shape.startswith("96h") for _, shape, _ in prices):
        draw_widths(started, prices, results / "widths.png")


def draw(started, trained_on, one_shots, path):
    """A figure: text perplexity against training tokens, from the start and converted."""
    places = [("kqv", "64", 80), ("gqa", "64", 80), ("mqa", "64", 80), ("kqv", "96", 60)]
    places = [place for place in places if place in started]
    if not places:
        return
    columns = min(2, len(places))
    rows = math.ceil(len(places) / columns)
    size = (6 * columns, 4.5 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(places) :]:
        ax.remove()
    for ax, (alias, shape, n) in zip(axes.flat, places, strict=False):
        source = started[alias, shape, n]
        total = max(curve[-1][0] for curve in source[best_rate(source)].values())
        for at, how, percent, colour, label in (
            (10, "none", 0, "0.8", None),
            (50, "none", 0, "0.8", None),
            (10, "joint_svd", 0, "#0072B2", "converted at 10 %"),
            (10, "own_rate", 0, "#56B4E9", "the same, on at Q–K=V's rate"),
            (50, "joint_svd", 0, "#009E73", "converted at 50 %"),
            (100, "none", 10, "0.8", f"{PAPER[alias]}, continued alike"),
            (100, "joint_svd", 10, "#CC79A7", "converted at 100 %, 10 % more"),
        ):
            curves = []
            for curve in trained_on.get((alias, shape, n, at, how, percent), {}).values():
                curves.append([(total * at / 100 + tokens, loss) for tokens, loss in curve])
            add_curves(ax, curves, colour, label)
        before, after = along(one_shots, f"{alias}_d{shape}_n{n}_lr{best_rate(source):g}e-3")
        if max(map(len, after), default=0) > 1:
            add_curves(ax, after, "#E69F00", "converted at every 10 %, no training", linestyle=":")
        for variant, look in ((alias, "kqv"), (SHARED[alias], "kv")):
            if by_rate := started.get((variant, shape, n)):
                curves = by_rate[best_rate(by_rate)]
                trained = [curve[1:] for curve in curves.values()]  # without the untrained model
                if variant == alias and max(map(len, before), default=0) > 1:
                    trained = before  # more of its points
                add_curves(ax, trained, LOOKS[look][0], f"{PAPER[variant]} from the start", linestyle="--")
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_title(f"{PAPER[alias]}, d{shape}, {n} tokens per parameter", fontsize="medium")
        ax.set_xlabel("training tokens, millions")
        ax.set_ylabel("text perplexity (log scale)")
        ax.legend(frameon=False, loc="lower left", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_widths(started, prices, path):
    """A figure: the price of conversion alone against the width of a head at d96, a line for each seed."""
    by_width = defaultdict(dict)
    for (alias, shape, n), by_step in prices.items():
        width, _, n_head = shape.partition("h")
        if alias == "kqv" and width == "96":
            by_way = by_step[last_step(started, alias, shape, n)]
            by_width[n][96 // int(n_head or 6)] = by_way[json.dumps(DEFAULT)]
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for n, colour in ((20, "#0072B2"), (60, "#E69F00")):
        label = f"{n} tokens per parameter"
        for seed in (42, 43, 44):
            points = sorted((width, price[seed]) for width, price in by_width[n].items() if seed in price)
            if points:
                ax.plot(*zip(*points, strict=True), ".-", color=colour, linewidth=1, label=label)
                label = None
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks([12, 16, 24, 32, 48], ["12", "16", "24", "32", "48"], minor=False)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("width of a head")
    ax.set_ylabel("price of conversion, nats")
    ax.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def along(one_shots, sources):
    """Of a source's checkpoints: curves of (tokens, text loss), one a seed, before and after conversion by default."""
    before, after = defaultdict(list), defaultdict(list)
    for record in one_shots:
        if record["source"].startswith(sources) and record["way"] == DEFAULT:
            tokens = 1024 * int(re.search(r"\d+", record["checkpoint"])[0])
            before[record["source"]].append((tokens, record["before"]))
            after[record["source"]].append((tokens, record["after"]))
    return [sorted(curve) for curve in before.values()], [sorted(curve) for curve in after.values()]


def add_curves(ax, curves, colour, label, linestyle="-"):
    """A line for each seed, one of them with the label."""
    for curve in curves:
        tokens, losses = zip(*curve, strict=True)
        perplexities = [math.exp(loss) for loss in losses]
        millions = [n / 1e6 for n in tokens]
        ax.plot(millions, perplexities, linestyle, color=colour, linewidth=1, marker=".", label=label)
        label = None


# -----------------------------------------------------------------------------
# Command line


def main(arguments=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=Path(__file__).name, description=__doc__, formatter_class=layout)
    where = {"type": Path, "metavar": "DIR"}
    parser.add_argument("--scaling", default=ROOT / "results/scaling", help="runs of runs/scaling.sh", **where)
    parser.add_argument("--results", default=HERE, help="of this study", **where)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("best_rate", help="print a peak rate, in thousandths")
    command.add_argument("alias", choices=cc.SCRIPTS)
    command.add_argument("shape")
    command.add_argument("n", type=int, help="tokens for each parameter")
    command = commands.add_parser("one_shot", help="convert a checkpoint, add the losses to one_shot.jsonl")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--kind", choices=("default", "all"), default="default")
    command.add_argument("--dry_run", action="store_true", help="print the ways that are not there yet")
    command = commands.add_parser("same_end", help="compare a run that was trained again with its record")
    command.add_argument("folder", type=Path)
    commands.add_parser("tables", help="write results.md and conversion.png")
    options = parser.parse_args(arguments)
    if options.command == "one_shot":
        record_path = options.results / "one_shot.jsonl"
        one_shot(options.checkpoint, options.data, options.kind, record_path, options.dry_run)
    elif options.command == "tables":
        tables(options.scaling, options.results)
    elif options.command == "same_end":
        sys.exit(0 if same_end(options.folder, [options.scaling, options.results]) else 1)
    else:
        started, _ = read_runs([options.scaling, options.results])
        by_rate = started.get((options.alias, options.shape, options.n))
        if not by_rate:
            what = f"{options.alias} of d{options.shape} at D/N {options.n}"
            print(f"study.py: error: {what}: no finished runs; see runs/scaling.sh", file=sys.stderr)
            sys.exit(2)
        print(f"{best_rate(by_rate):g}")


if __name__ == "__main__":
    main()
