"""The tables and figures of results/conversion: results.md and figures/, from runs.jsonl and one_shot.jsonl.

    python runs/conversion_tables.py
    python runs/conversion_tables.py --scaling results/scaling_own --results results/conversion_own
"""

import json
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from one_shot import DEFAULT, SHARED, WAYS, read_one_shots

from common import ROOT, VARIANTS, Parser, write_text
from report import LOOKS, save_figure, t_interval
from results_table import read_runs

FROM_THE_START = re.compile(r"(\w+?)_d(\w+?)_n(\d+)_lr([\d.]+)e-3_T256_(?:packed|padded)_seed(\d+)")
TRAINED_ON = re.compile(r"(\w+?)_d(\w+?)_n(\d+)_at(\d+)_(\w+?)_(\d+)_seed(\d+)")
PAPER = {alias: row["paper"] for alias, row in VARIANTS.items()}


# -----------------------------------------------------------------------------
# Runs


def by_place(records):
    """(tokens, text loss) of each evaluation of complete runs: from the start, [alias, shape, n][rate][seed],
    and trained on, [alias, shape, n, at, how, percent][seed].
    """
    started, trained_on = defaultdict(lambda: defaultdict(dict)), defaultdict(dict)
    for record in records:
        evaluations = [entry for entry in record["metrics"] if entry["kind"] != "train"]
        curve = [(entry["tokens"], entry["text_loss"]) for entry in evaluations]
        if not evaluations or evaluations[-1]["kind"] != "final":
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
    return min(by_rate, key=lambda rate: fmean(by_rate[rate][seed][-1][1] for seed in seeds))



# -----------------------------------------------------------------------------
# Tables


def of_seeds(by_seed, digits=4):
    """Two cells for a dict by seed: the mean, with its 95 % interval if there are three, and every value."""
    values = [by_seed[seed] for seed in sorted(by_seed)]
    if not values:
        return ["", ""]
    mean = f"{fmean(values):+.{digits}f}"
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


def write_all(scaling, results):
    """Write results.md and the figures, as far as their runs are there."""
    started, trained_on = by_place([*read_runs(scaling), *read_runs(results)])
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
    (results / "figures").mkdir(exist_ok=True)
    write_text(results / "results.md", text)
    draw(started, trained_on, read_one_shots(results / "one_shot.jsonl"), results / "figures/conversion.png")
    if any(shape.startswith("96h") for _, shape, _ in prices):
        draw_widths(started, prices, results / "figures/widths.png")


def draw(started, trained_on, one_shots, path):
    """A figure: text perplexity against training tokens, from the start and converted."""
    places = [("kqv", "64", 80), ("gqa", "64", 80), ("mqa", "64", 80), ("kqv", "96", 60)]
    places = [place for place in places if place in started]
    if not places:
        return
    columns = min(2, len(places))
    rows = math.ceil(len(places) / columns)
    size = (6 * columns, 4.5 * rows)
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    axes = figure.subplots(rows, columns, squeeze=False)
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
    save_figure(path, figure)


def draw_widths(started, prices, path):
    """A figure: the price of conversion alone against the width of a head at d96, a line for each seed."""
    by_width = defaultdict(dict)
    for (alias, shape, n), by_step in prices.items():
        width, _, n_head = shape.partition("h")
        if alias == "kqv" and width == "96":
            by_way = by_step[last_step(started, alias, shape, n)]
            by_width[n][96 // int(n_head or 6)] = by_way[json.dumps(DEFAULT)]
    figure = Figure(figsize=(6, 4), layout="constrained", dpi=120)
    ax = figure.subplots()
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
    save_figure(path, figure)


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


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    for name, study in (("scaling", "SCALING"), ("results", "RESULTS")):
        default = os.environ.get(study, ROOT / "results" / {"results": "conversion"}.get(name, name))
        parser.add_argument(f"--{name}", type=Path, default=default, metavar="DIR")
    options = parser.parse_args(arguments)
    write_all(options.scaling, options.results)


if __name__ == "__main__":
    main()
