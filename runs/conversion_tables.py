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

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from one_shot import SHARED, read_one_shots
from other_conversions import DEFAULT, TRIED, WAYS

from common import ROOT, VARIANTS, InputError, Parser, write_text
from report import LOOKS, save_figure, t_interval
from results_table import read_runs

FROM_THE_START = re.compile(r"(\w+?)_d(\w+?)_n(\d+)_lr([\d.]+)e-3_T256_(?:packed|padded)_seed(\d+)")
TRAINED_ON = re.compile(r"(\w+?)_d(\w+?)_n(\d+)_at(\d+)_(\w+?)_(\d+)_seed(\d+)")
PAPER = {alias: row["paper"] for alias, row in VARIANTS.items()}
PLACE = ["alias", "shape", "n"]
HEADERS = ["source", "shape", "D/N"]  # of these


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
        raise InputError("no seed was run at every rate, so that there is no best one")
    return min(by_rate, key=lambda rate: fmean(by_rate[rate][seed][-1][1] for seed in seeds))


def at_best(started, *place):
    """{seed: curve} of a variant at its best rate; empty if it was not run."""
    by_rate = started.get(place)
    return by_rate[best_rate(by_rate)] if by_rate else {}


def length(started, *place):
    """The tokens of a source's training."""
    return max(curve[-1][0] for curve in at_best(started, *place).values())


def conversions(path, started):
    """The conversions alone, of sources at their best rate, a row each; `end`: training had ended."""
    rows = []
    for record in read_one_shots(path):
        alias, shape, n, rate, seed = FROM_THE_START.fullmatch(record["source"]).groups()
        place = alias, shape, int(n)
        if float(rate) == best_rate(started[place]):
            tokens = 1024 * int(re.search(r"\d+", record["checkpoint"])[0])
            at = [*place, int(seed), tokens, tokens == length(started, *place), json.dumps(record["way"])]
            rows.append([*at, record["before"], record["after"], record["after"] - record["before"]])
    return pd.DataFrame(rows, columns=[*PLACE, "seed", "tokens", "end", "way", "before", "after", "price"])


def named(alias, shape, n):
    return [PAPER[alias], f"d{shape}", n]


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


def price_of(rows, digits=4):
    return of_seeds(dict(zip(rows["seed"], rows["price"], strict=True)), digits)


def paired(curves, references, place=-1):
    """The differences of two dicts of evaluations by seed, at their first (0) or last (-1) evaluation."""
    both = curves.keys() & references.keys()
    return {seed: curves[seed][place][1] - references[seed][place][1] for seed in both}


def gap_of(started, alias, *place):
    """By seed, what sharing from the start costs, each variant at its own best rate; empty if not run."""
    return paired(at_best(started, SHARED[alias], *place), at_best(started, alias, *place))


def tables_of_conversion_alone(started, alone):
    """Three tables: at the end by default, along the training, and all ways."""
    end, along, ways = [], [], []
    for place, rows in alone.groupby(PLACE, sort=False):
        default, at_end = rows[rows["way"] == json.dumps(DEFAULT)], rows[rows["end"]]
        at_the_end = price_of(default[default["end"]], 5)
        end.append([*named(*place), *at_the_end, *of_seeds(gap_of(started, *place))])
        if rows["tokens"].nunique() > 1:
            for tokens, here in default.groupby("tokens"):
                along.append([*named(*place), f"{tokens // 1024:,}", *price_of(here)])
        if at_end["way"].nunique() > 1:
            for way in (DEFAULT, *WAYS, *TRIED):
                here = at_end[at_end["way"] == json.dumps(way)]
                how = [way["method"], way["weighting"], f"{way['tokens']:,}"]
                ways += [[*named(*place), *how, *price_of(here)]] if len(here) else []
    price = ["price", "of the seeds"]
    return (
        ([*HEADERS, *price, "gap from the start", "of the seeds"], end),
        ([*HEADERS, "step", *price], along),
        ([*HEADERS, "method", "weighting", "tokens", *price], ways),
    )


def trained_on_table(started, trained_on):
    rows = []
    for (*place, at, how, percent), curves in sorted(trained_on.items()):
        if how == "none":
            continue
        source = trained_on.get((*place, at, "none", percent), {})  # it went on in the same way
        when = ["at the end", f"{percent} %"] if at == 100 else [f"at {at} %", f"{100 - at} %"]
        # Beside sharing from the start where the total of tokens is the same.
        shared = at_best(started, SHARED[place[0]], *place[1:]) if at < 100 else {}
        prices = [of_seeds(paired(curves, source, 0))[0], *of_seeds(paired(curves, source))]
        gaps = [of_seeds(gap_of(started, *place))[0], *of_seeds(paired(shared, curves))]
        rows.append([*named(*place), *when, how, *prices, *gaps])
    headers = ["converted", "trained on for", "by", "price before", "price after", "of the seeds"]
    ahead = ["sharing from the start is behind it by", "of the seeds"]
    return [*HEADERS, *headers, "gap from the start", *ahead], rows


def rates_table(started):
    rows = []
    for place, by_rate in sorted(started.items()):
        for rate, curves in sorted(by_rate.items()):
            losses = ", ".join(f"{curves[seed][-1][1]:.4f}" for seed in sorted(curves))
            best = "best" if rate == best_rate(by_rate) else ""
            rows.append([*named(*place), f"{rate:g}e-3", losses, best])
    return ["variant", *HEADERS[1:], "peak rate", "text loss of the seeds", ""], rows


def write_all(scaling, results):
    """Write results.md and the figures, as far as their runs are there."""
    started, trained_on = by_place([*read_runs(scaling), *read_runs(results)])
    alone = conversions(results / "one_shot.jsonl", started)
    titles = ["Conversion alone", "Conversion alone, along the training", "Ways of conversion alone"]
    tables = dict(zip(titles, tables_of_conversion_alone(started, alone), strict=True))
    tables["Converted and trained on"] = trained_on_table(started, trained_on)
    tables["From the start"] = rates_table(started)
    text = "# Tables of conversion\n\n"
    text += "Losses, prices and gaps in nats per token of text; ± is a 95 % t interval.\n"
    for title, (headers, rows) in tables.items():
        if rows:
            text += f"\n## {title}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n"
    (results / "figures").mkdir(exist_ok=True)
    write_text(results / "results.md", text)
    draw(started, trained_on, alone, results / "figures/conversion.png")


def draw(started, trained_on, alone, path):
    """A figure: text perplexity against training tokens, from the start and converted."""
    places = [("kqv", "64", 80), ("gqa", "64", 80), ("mqa", "64", 80), ("kqv", "96", 60)]
    places = [place for place in places if place in started]
    if not places:
        return
    columns = min(2, len(places))
    rows = math.ceil(len(places) / columns)
    figure = Figure(figsize=(6 * columns, 4.5 * rows), layout="constrained", dpi=120)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(places) :]:
        ax.remove()
    for ax, place in zip(axes.flat, places, strict=False):
        alias, shape, n = place
        total = length(started, *place)
        for at, how, percent, colour, label in (
            (10, "none", 0, "0.8", None),
            (50, "none", 0, "0.8", None),
            (10, "joint_svd", 0, "#0072B2", "converted at 10 %"),
            (10, "own_rate", 0, "#56B4E9", "the same, on at Q–K=V's rate"),
            (50, "joint_svd", 0, "#009E73", "converted at 50 %"),
            (100, "none", 10, "0.8", f"{PAPER[alias]}, continued alike"),
            (100, "joint_svd", 10, "#CC79A7", "converted at 100 %, 10 % more"),
        ):
            for curve in trained_on.get((*place, at, how, percent), {}).values():
                whole = [(total * at / 100 + tokens, loss) for tokens, loss in curve]
                label = add_curve(ax, whole, colour, label)

        here = alone[(alone["way"] == json.dumps(DEFAULT)) & (alone[PLACE] == list(place)).all(axis=1)]
        here = here.sort_values("tokens")
        by_seed = [rows for _, rows in here.groupby("seed") if here["tokens"].nunique() > 1]
        label = "converted at every 10 %, no training"
        for rows in by_seed:
            label = add_curve(ax, zip(rows["tokens"], rows["after"], strict=True), "#E69F00", label, ":")
        for variant, look in ((alias, "kqv"), (SHARED[alias], "kv")):
            curves = at_best(started, variant, shape, n).values()
            curves = [curve[1:] for curve in curves]  # not the untrained model
            if variant == alias and by_seed:  # more of its points
                curves = [zip(rows["tokens"], rows["before"], strict=True) for rows in by_seed]
            label = f"{PAPER[variant]} from the start"
            for curve in curves:
                label = add_curve(ax, curve, LOOKS[look][0], label, "--")
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_title(f"{PAPER[alias]}, d{shape}, {n} tokens per parameter", fontsize="medium")
        ax.set(xlabel="training tokens, millions", ylabel="text perplexity (log scale)")
        ax.legend(frameon=False, loc="lower left", fontsize="small")
    save_figure(path, figure)


def add_curve(ax, curve, colour, label, linestyle="-"):
    """Draws a line, and returns None: the label is for the first of several."""
    tokens, losses = zip(*curve, strict=True)
    look = {"color": colour, "linewidth": 1, "marker": ".", "label": label}
    ax.plot([n / 1e6 for n in tokens], [math.exp(loss) for loss in losses], linestyle, **look)


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    for name, study in (("scaling", "SCALING"), ("results", "RESULTS")):
        default = os.environ.get(study, ROOT / "results" / {"results": "conversion"}.get(name, name))
        parser.add_argument(f"--{name}", type=Path, default=default, metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        write_all(options.scaling, options.results)
    except (InputError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
