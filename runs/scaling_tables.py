"""The runs of a grid over sizes, tokens, rates and rows -> the gap to QKV: its slope, its cost, its figures.

    python runs/scaling_tables.py results/scaling

The complete runs are read as one grid, which results/scaling/README.md defines.

    gap            text loss minus QKV's of the same seed; in percent, the change of perplexity it comes to
    converted      QKV made Q–K=V by convert_checkpoint.py, without training
    common rate    both at the peak learning rate at which QKV is best
    own rate       each at the rate at which it is best
    intervals      in brackets, 95 % by a bootstrap over the seeds; of one cell with three, that is their
                   range. "t" is that of Student's t over the seeds, far wider; ± is half the range
    compute lost   the share of the variant's training compute that QKV does not need for the same loss

Writes scaling_table.md, scaling_table.json and figures/ into the folder, or into --output_dir.
"""

import contextlib
import math
import re
import sys
from functools import cache, partial
from itertools import cycle, groupby, product
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis_computation_profiler import theoretical_macs
from common import VARIANTS, InputError, Parser
from report import LOOKS, as_json, bootstrap, draw, listed, mean, t_interval, table, write_texts
from results_table import find_runs

# What differs over the grid. A run starts from a file of initial weights, which its seed determines.
SWEPT = {"learning_rate", "min_lr", "warmup_steps", "target_tokens", "rows a step", "init_from"}
# The verdict on whether the gap widens from 5 to 80 tokens a parameter takes three seeds at both ends.
ENDS = (5, 80)
SEEDS_TO_DECIDE = 3
MATTERS = 0.005  # nats, half a percent of perplexity
CONVERTED = "converted"  # stands among the aliases of the variants
CONVERSION = re.compile(r"^text perplexity: ([\d.]+) before, ([\d.]+) after", re.MULTILINE)
PLACE = ["parameters", "tokens", "protocol", "row", "size"]  # what the runs of a cell have in common


def cells_of(runs):
    """The complete runs as Cells, with each conversion of QKV as a run; InputError if they are no grid."""
    complete = [run for run in runs if run.final]
    if not complete:
        raise InputError("no complete runs among those named, so there is nothing to compare")
    first, rows = complete[0], []
    for run in complete:
        for key, value in shared(run).items():
            if value != shared(first)[key]:
                both = f"{shared(first)[key]} in {first.name}, and {value} in {run.name}"
                raise InputError(f"runs of two studies: {key} is {both}; name those of one")
        model, c = run.variant.config, run.config
        row = {key: run.final[key] for key in ("loss", "text_loss", "padding_fraction")} | {
            "alias": run.alias,
            "variant": run.variant.paper,
            "size": f"d{model.n_embd}",
            "parameters": model.n_layer * model.n_embd * (4 * model.n_embd + 2 * model.n_inner),  # QKV's
            "tokens": c.total_steps * c.tokens_per_step,  # padding included
            "row": c.seq_length,
            "protocol": run.protocol,
            "rate": c.learning_rate,
            "seed": run.seed,
            "macs": theoretical_macs(run.variant, c.seq_length)["total"],
        }
        rows.append(row)
        if run.alias == "kqv" and "conversion" in run.about:
            after = {"alias": CONVERTED, "variant": "QKV, converted to Q–K=V", "loss": math.nan}
            rows.append(row | after | {"text_loss": row["text_loss"] + price(run)})
    grid = pd.DataFrame(rows)
    twice = grid[grid.duplicated([*PLACE, "alias", "rate", "seed"])]
    for _, run in twice.iterrows():
        what = f"{run['variant']}, {run['size']}, {run['tokens']:,} tokens, rate {run['rate']:g}"
        raise InputError(f"the same run twice: {what}, seed {run['seed']}")
    return [Cell(place, runs) for place, runs in grid.groupby(PLACE)]


def shared(run):
    """The settings that all runs of a grid share; what follows from the swept ones, as a share of them."""
    c, model = run.config, run.variant.config
    return {key: value for key, value in run.setup.items() if key not in SWEPT} | {
        "tokens a step": c.tokens_per_step,
        "warm-up, share of the steps": f"{c.warmup_steps / c.total_steps:.2f}",
        "min_lr, share of the peak": f"{c.min_lr / c.learning_rate:.3g}",
        "width for each layer": model.n_embd / model.n_layer,
        "width of a head": model.n_embd // model.n_head,
    }


def price(run):
    """What conversion cost, in nats, by what convert_checkpoint.py printed of the run's final model."""
    found, own = CONVERSION.search(run.about["conversion"]), run.final["text_perplexity"]
    if not found or abs(float(found[1]) / own - 1) > 1e-3:
        what = f"the text perplexity {own:.4f} before and another one after"
        raise InputError(f"{run.name}: expected what convert_checkpoint.py prints, with {what}")
    return math.log(float(found[2]) / float(found[1]))


class Cell:
    """The runs of one size, number of tokens, length and content of the rows."""

    def __init__(self, place, runs):
        self.parameters, self.tokens, self.protocol, self.row, self.size = place
        self.tokens_per_parameter = float(f"{self.tokens / self.parameters:.2g}")  # steps may make 5 4.996
        self.runs = runs
        self.names = dict(zip(runs["alias"], runs["variant"], strict=True))  # as the paper writes them
        self.of = cache(self.of)  # asked for many times

    def about(self, alias, *keys):
        """What a record says of a variant and its cell."""
        return {"variant": self.names[alias], "alias": alias} | {key: getattr(self, key) for key in keys}

    def of(self, alias, key="text_loss"):
        """Final losses in nats a token, a row for each rate and a column for each seed."""
        return self.runs[self.runs["alias"] == alias].pivot(index="rate", columns="seed", values=key)

    def best_rate(self, alias):
        """The rate of lowest mean text loss over the seeds that all rates have; None without such seeds."""
        losses = self.of(alias).dropna(axis=1)
        return None if losses.empty else float(losses.mean(axis=1).idxmin())

    def losses(self, alias, rate=None, key="text_loss"):
        """{seed: loss} at a rate, or at the best."""
        losses, rate = self.of(alias, key), rate or self.best_rate(alias)
        return losses.loc[rate].dropna().to_dict() if rate in losses.index else {}

    def gaps(self, alias, at, key="text_loss"):
        """{seed: loss - QKV's}, in nats a token; `at` is common (QKV's best rate for both) or own."""
        of_qkv = self.losses("kqv", key=key)
        losses = self.losses(alias, self.best_rate("kqv") if at == "common" else None, key)
        return {seed: loss - of_qkv[seed] for seed, loss in losses.items() if seed in of_qkv}


def main_cells(cells):
    """The cells with the length and content of rows in which most sizes and numbers of tokens were run."""
    kinds = [(cell.row, cell.protocol) for cell in cells]
    most = max(kinds, key=lambda kind: (kinds.count(kind), kind))
    return [cell for cell in cells if (cell.row, cell.protocol) == most]


def compared(cells):
    """The variants beside QKV, in the order of the paper, and QKV converted: {alias: name}."""
    names = {alias: name for cell in cells for alias, name in cell.names.items()}
    return {alias: names[alias] for alias in (*VARIANTS, CONVERTED) if alias in names and alias != "kqv"}


def varied(cells):
    """The cells of one size and number of tokens with rows of several kinds, and each variant of theirs."""
    for _, group in groupby(cells, key=lambda cell: (cell.size, cell.tokens)):
        group = list(group)
        if len({cell.protocol for cell in group}) > 1:
            yield from ((group, alias) for alias in repeated(group))


def repeated(cells):
    """Those of the compared that were trained in more than one cell."""
    return [alias for alias in compared(cells) if sum(alias in cell.names for cell in cells) > 1]


def slope_coefficients(groups, x, counts):
    """The weights of cells' means whose weighted sum is the slope of a least-squares fit.

    The fit has an intercept for each group. A cell has a group, an x, and a number of values in its mean.
    Returns None where no group has two different x.
    """
    groups, x, counts = map(np.asarray, (groups, x, counts))
    centred = np.zeros(len(x))
    for group in set(groups.tolist()):
        here = groups == group
        centred[here] = x[here] - np.average(x[here], weights=counts[here])
    spread = (counts * centred**2).sum()
    return counts * centred / spread if spread > 1e-12 else None


def slope(cells, alias, at, over):
    """The slope of the gap, as a record; None where it is not determined.

    Over tokens: over ln(D/N), with an intercept for each size. Over size: over ln N, with one for each number
    of tokens per parameter. Slopes are in nats for a factor of e.
    """
    points, seeds_at = [], dict.fromkeys(ENDS, 0)
    for cell in cells:
        ratio, gap = cell.tokens_per_parameter, cell.gaps(alias, at)
        seeds_at[ratio] = max(len(gap), seeds_at.get(ratio, 0))
        place = (cell.size, math.log(ratio)) if over == "tokens" else (ratio, math.log(cell.parameters))
        if gap:
            points.append((*place, gap))

    def fitted(points, counts):
        groups, x, _ = zip(*points, strict=True) if points else ((), (), ())
        return slope_coefficients(groups, x, counts)

    coefficients = fitted(points, [len(gap) for *_, gap in points])
    if coefficients is None:
        return None
    by_seed = {}
    for seed in sorted(set().union(*(gap for *_, gap in points))):
        mine = [point for point in points if seed in point[2]]
        alone = fitted(mine, [1] * len(mine))
        if alone is not None:
            by_seed[seed] = float(alone @ [gap[seed] for *_, gap in mine])
    samples = [list(gap.values()) for *_, gap in points]
    return {
        "slope": float(coefficients @ [fmean(values) for values in samples]),
        "slope_interval": bootstrap(samples, coefficients),
        "slope_by_seed": by_seed,
        "slope_t": t_interval(by_seed.values()),
        "cells": len(points),
        "seeds_at_the_ends": min(seeds_at[end] for end in ENDS),
    }


def verdict(record):
    """widens, shrinks, does not change or cannot tell, by the criteria of results/scaling/README.md."""
    factor = math.log(ENDS[1] / ENDS[0])
    change = factor * record["slope"]
    signs = {math.copysign(1, value) for value in record["slope_by_seed"].values()}
    if record["seeds_at_the_ends"] < SEEDS_TO_DECIDE or record["slope_interval"] is None:
        return "cannot tell"
    low, high = (factor * limit for limit in record["slope_interval"])
    if low > 0 and signs == {1} and change >= MATTERS:
        return "widens"
    if high < 0 and signs == {-1} and change <= -MATTERS:
        return "shrinks"
    return "does not change" if low >= -MATTERS and high <= MATTERS else "cannot tell"


def tokens_for(loss, curve):
    """The tokens after which QKV reaches a loss, by a curve of (tokens, loss) points.

    The points are joined by straight lines in the logarithms, and the first and last line go on beyond the
    ends. None where there is no line, or it does not fall, or hardly.
    """
    curve = sorted(curve)
    for i, ((fewer, higher), (more, lower)) in enumerate(zip(curve, curve[1:], strict=False)):
        if loss >= lower or i == len(curve) - 2:
            if lower >= higher:
                return None
            share = math.log(loss / higher) / math.log(lower / higher)
            with contextlib.suppress(OverflowError):  # next to no slope
                return fewer * (more / fewer) ** share
    return None


def report(runs):
    """The parts of the tables, {name: records}, the cells that most figures show, and all cells."""
    cells = cells_of(runs)
    main = main_cells(cells)
    parts = {
        "gaps": gap_records(main),
        "slopes": slope_records(main),
        "lengths": length_records(cells),
        "falls": fall_records(cells),
        "rates": rate_records(main),
        "notes": notes(cells),
    }
    incomplete = [run.name for run in runs if not run.final]
    if incomplete:
        parts["notes"].append(f"Incomplete, and left out: {listed(incomplete)}.")
    return parts, main, cells


def percent(nats):
    """The change of perplexity, in percent, that a difference of losses comes to."""
    return 100 * math.expm1(nats)


def with_intervals(name, by_seed, convert=percent):
    """Fields for a mean and its two intervals; of gaps, as changes of perplexity in percent."""
    values = list(by_seed.values())
    intervals = {f"{name}_interval": bootstrap([values]), f"{name}_t": t_interval(values)}
    intervals = {key: limits and [convert(limit) for limit in limits] for key, limits in intervals.items()}
    return {name: convert(fmean(values)) if values else None} | intervals


def gap_records(cells):
    """A row for every variant at every size and number of tokens."""
    records = []
    for alias, cell in product(compared(cells), cells):
        if alias in cell.names:
            own = cell.gaps(alias, "own")
            record = cell.about(alias, "size", "parameters", "tokens_per_parameter", "tokens")
            record |= {"seeds": list(own)}
            record |= {"common_rate": cell.best_rate("kqv"), "own_rate": cell.best_rate(alias)}
            record |= with_intervals("gap_common", cell.gaps(alias, "common"))
            record |= with_intervals("gap_own", own)
            records.append(record | {"compute_lost_percent": compute_lost(cells, cell, alias)})
    return records


def compute_lost(cells, cell, alias):
    """Percent of a variant's training compute that QKV of the same shape does not need for the same loss.

    Both train at their own rates; compute is the MACs of a token's forward pass times the tokens. Negative
    where QKV needs more; None where QKV's curve does not tell.
    """
    gaps, curve = cell.gaps(alias, "own"), {}
    for other in cells:
        losses = other.losses("kqv")
        if losses and other.size == cell.size:
            curve[other.tokens] = fmean(losses.values())
    if not gaps or alias == CONVERTED:
        return None
    needed = tokens_for(curve[cell.tokens] + fmean(gaps.values()), curve.items())
    macs = cell.runs.groupby("alias")["macs"].first()
    return None if needed is None else 100 * (1 - needed * macs["kqv"] / (cell.tokens * macs[alias]))


def slope_records(cells):
    """Slopes of the gap: over tokens for each parameter, all sizes and each alone, and over the size."""
    sizes = dict.fromkeys(cell.size for cell in cells)
    choices = [("tokens", "all sizes", cells)]
    if len(sizes) > 1:
        choices += [("tokens", size, [cell for cell in cells if cell.size == size]) for size in sizes]
        choices += [("size", "all tokens for each parameter", cells)]
    records = []
    names = compared(cells)
    for alias, at, (over, of, chosen) in product(names, ("own", "common"), choices):
        if found := slope(chosen, alias, at, over):
            about = {"variant": names[alias], "alias": alias, "rate": at, "over": over, "of": of}
            asked = (alias, over, of) == ("kv", "tokens", "all sizes")
            records.append(about | found | {"verdict": verdict(found) if asked else None})
    return records


def length_records(cells):
    """A row for every variant, protocol and length of rows: the gap over all positions and over text only."""
    records = []
    for group, alias in varied(cells):
        for cell in group:
            if gaps := cell.gaps(alias, "common"):
                record = cell.about(alias, "size", "protocol", "row")
                padding = next(iter(cell.losses("kqv", key="padding_fraction").values()))
                record |= {"seeds": list(gaps), "rate": cell.best_rate("kqv")}
                record |= {"padding_percent": 100 * padding}
                record |= with_intervals("gap_all_positions", cell.gaps(alias, "common", "loss"))
                record |= with_intervals("gap_common", gaps)
                records.append(record | with_intervals("gap_own", cell.gaps(alias, "own")))
    return records


def fall_records(cells):
    """How far the gap falls from the shortest rows to the longest, over all positions and over text only.

    In 1/100 nat, in the mean over the seeds that both lengths have.
    """
    records = []
    for group, alias in varied(cells):
        for protocol in dict.fromkeys(cell.protocol for cell in group):
            here = [cell for cell in group if cell.protocol == protocol and cell.gaps(alias, "common")]
            if len(here) < 2:
                continue
            falls = {}
            for key in ("loss", "text_loss"):
                before, after = (cell.gaps(alias, "common", key) for cell in (here[0], here[-1]))
                falls[key] = {seed: 100 * (before[seed] - after[seed]) for seed in before if seed in after}
            record = here[0].about(alias, "protocol")
            record |= {"from": here[0].row, "to": here[-1].row, "seeds": len(falls["text_loss"])}
            record |= with_intervals("fall_all_positions", falls["loss"], float)
            records.append(record | with_intervals("fall_text", falls["text_loss"], float))
    return records


def rate_records(cells):
    """A row for every variant, size and number of tokens: the mean text loss at each rate."""
    records = []
    for cell, alias in product(cells, VARIANTS):
        for rate in cell.of(alias).index:
            losses = cell.losses(alias, rate)
            record = cell.about(alias, "size", "tokens_per_parameter") | {"rate": rate, "seeds": list(losses)}
            record |= {"best": "best" if rate == cell.best_rate(alias) else None}
            records.append(record | mean("text_loss", losses.values()))
    return records


def notes(cells):
    """Lines about rates that were hardly searched."""
    lines, alone = [], []
    for cell, alias in product(cells, VARIANTS):
        if alias not in cell.names:
            continue
        rates, best = list(cell.of(alias).index), cell.best_rate(alias)
        where = f"{cell.size}, {cell.tokens_per_parameter:g} tokens per parameter, rows of {cell.row}"
        who = f"{cell.names[alias]}, {where}, {cell.protocol}"
        if len(rates) == 1:
            alone.append(who)
        elif best is None:
            lines.append(f"{who}: no seed was run at all of its rates, so it has no best rate and no gap.")
        elif best in (rates[0], rates[-1]):
            tried = listed(f"{rate:g}" for rate in rates)
            lines.append(f"{who}: the best rate, {best:g}, is at the edge of those tried: {tried}.")
    return lines + ([f"At one rate alone: {'; '.join(alone)}."] if alone else [])


RATIO = ("tokens per parameter", "tokens_per_parameter", "g")
PARTS = [  # of a report: its key, a title, and the columns as report.table takes them
    ("gaps", "Gap of text perplexity to QKV: at QKV's best rate, and each at its own", [
        ("", "variant"), ("size", "size"), RATIO, ("seeds", "seeds"),
        ("common rate", "common_rate", "g"), ("gap", "gap_common", "+.2f", " %"),
        ("own rate", "own_rate", "g"), ("gap", "gap_own", "+.2f", " %"), ("t", "gap_own_t", "+.2f", " %"),
        ("compute lost", "compute_lost_percent", ".1f", " %"),
    ]),
    ("slopes", "Slope of the gap, in nats for a factor of e", [
        ("", "variant"), ("rate", "rate"), ("over", "over"), ("of", "of"), ("slope", "slope", "+.4f"),
        ("of each seed", "slope_by_seed", "+.4f"), ("t", "slope_t", "+.4f"), ("cells", "cells"),
        ("the gap", "verdict"),
    ]),
    ("lengths", "Gap to QKV at QKV's best rate, by length and content of the rows", [
        ("", "variant"), ("size", "size"), ("rows", "protocol"), ("tokens", "row"),
        ("padding", "padding_percent", ".1f", " %"), ("seeds", "seeds"), ("rate", "rate", "g"),
        ("gap over all positions", "gap_all_positions", "+.2f", " %"),
        ("over text only", "gap_common", "+.2f", " %"), ("text only, own rates", "gap_own", "+.2f", " %"),
    ]),
    ("falls", "Fall of that gap from the shortest rows to the longest, in 1/100 nat", [
        ("", "variant"), ("rows", "protocol"), ("from", "from"), ("to", "to"), ("seeds", "seeds"),
        ("over all positions", "fall_all_positions", "+.2f"), ("t", "fall_all_positions_t", "+.2f"),
        ("over text only", "fall_text", "+.2f"), ("t", "fall_text_t", "+.2f"),
    ]),
    ("rates", "Text loss by peak learning rate, nats per token (± half the range)", [
        ("", "variant"), ("size", "size"), RATIO, ("rate", "rate", "g"), ("seeds", "seeds"),
        ("text loss", "text_loss", ".4f"), ("", "best"),
    ]),
]  # fmt: skip
LEGEND = (
    "In brackets: 95 % bootstrap intervals over seeds; t: 95 % intervals by Student's t. "
    "Compute lost: the share of a variant's training compute that QKV of the same size saves "
    "when it trains to the same loss."
)


def as_markdown(parts):
    """The parts that have something in them, and the notes."""
    texts = []
    for key, title, columns in PARTS:
        if parts[key]:
            legend = [LEGEND] if key == "gaps" else []
            texts += [f"### {title}", *legend, table(columns, parts[key], "pipe")]
    if parts["notes"]:
        texts.append("\n".join(f"- {line}" for line in parts["notes"]))
    return "\n\n".join(texts) + "\n"


CELL_LOOKS = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", ":"), ("#CC79A7", "D", "-."))


def by(key, cells):
    """The cells in lists of one size or protocol: (its value, a look, the cells) for each."""
    values = dict.fromkeys(getattr(cell, key) for cell in cells)
    for value, look in zip(values, cycle(CELL_LOOKS), strict=False):
        yield value, look, [cell for cell in cells if getattr(cell, key) == value]


def seed_line(ax, points, look, label, shaded=False):
    """A line through the means of [(x, values)], every value a dot; if shaded, with their interval."""
    points = [(x, list(values)) for x, values in points]
    points = [(x, values) for x, values in points if values]
    if not points:
        return
    colour, marker, line = look
    x = [x for x, _ in points]
    ax.plot(x, [fmean(values) for _, values in points], color=colour, linestyle=line)
    if shaded:
        intervals = [bootstrap([values]) or [values[0]] * 2 for _, values in points]
        ax.fill_between(x, *zip(*intervals, strict=True), color=colour, alpha=0.15, linewidth=0)
    for position, values in points:
        ax.scatter([position] * len(values), values, s=16, color=colour, marker=marker, zorder=3)
    ax.plot([], [], color=colour, marker=marker, markersize=4, linestyle=line, label=label)  # in the legend


def gap_line(ax, cells, alias, at, look, label, x="tokens_per_parameter", key="text_loss"):
    """The gap as a change of perplexity in percent, against a property of the cells."""
    gaps = [(getattr(cell, x), map(percent, cell.gaps(alias, at, key).values())) for cell in cells]
    seed_line(ax, gaps, look, label, shaded=True)


def finish(ax, ticks, xlabel, ylabel):
    """A logarithmic x axis with its ticks, and a legend where there is a line."""
    ticks = sorted(set(ticks))
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)


def finish_gaps(ax, cells):
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_ylim(top=1.35 * ax.get_ylim()[1])  # room for the legend
    ticks = [cell.tokens_per_parameter for cell in cells]
    finish(ax, ticks, "tokens per parameter, D / N", "text perplexity beyond QKV's, %")


def trained_and_converted(ax, cells, at):
    """Q–K=V's gap against tokens per parameter, a line for each size, and that of QKV converted."""
    for size, look, here in by("size", cells):
        gap_line(ax, here, "kv", at, look, f"{size} ({here[0].parameters:,} parameters)")
    for size, (colour, *_), here in by("size", cells):
        gap_line(ax, here, CONVERTED, "common", (colour, "x", "-."), f"{size}, QKV converted")
    finish_gaps(ax, cells)


def other_variants(ax, cells, smallest, aliases):
    for alias in aliases:
        gap_line(ax, smallest, alias, "own", (*LOOKS[alias], "-"), compared(smallest)[alias])
    finish_gaps(ax, cells)


def losses(ax, cells):
    """Text loss against tokens, log-log: QKV and Q–K=V at own rates, a line a size, every seed a dot."""
    for alias in ("kqv", "kv"):
        for size, (_, marker, line), here in by("size", cells):
            points = [(cell.tokens / 1e6, cell.losses(alias).values()) for cell in here]
            seed_line(ax, points, (LOOKS[alias][0], marker, line), f"{VARIANTS[alias]['paper']}, {size}")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")
    tokens = [cell.tokens / 1e6 for cell in cells]
    powers = range(math.floor(math.log2(min(tokens))), math.ceil(math.log2(max(tokens))) + 1)
    ticks = [2.0**power for power in powers]
    finish(ax, ticks, "training tokens D, millions (log scale)", "text loss, nats per token (log scale)")
    ax.set_xlim(min(tokens) / 1.2, max(tokens) * 1.2)


def gap_by_loss(ax, cells):
    """Q–K=V's gap against QKV's text loss, each at its own best rate: every seed a dot, every size a look."""
    for size, (colour, marker, _), here in by("size", cells):
        points = [(c.losses("kqv")[seed], gap) for c in here for seed, gap in c.gaps("kv", "own").items()]
        ax.scatter(*zip(*points, strict=True), s=20, color=colour, marker=marker, label=size)
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.invert_xaxis()  # training goes to the right
    ax.set(xlabel="text loss of QKV, nats per token", ylabel="gap of Q–K=V, nats per token")
    ax.legend(frameon=False)


def rates(ax, cell):
    """Text loss against the peak learning rate."""
    for alias in VARIANTS:
        points = [(1000 * rate, cell.losses(alias, rate).values()) for rate in cell.of(alias).index]
        seed_line(ax, points, (*LOOKS[alias], "-"), cell.names.get(alias))
    finish(ax, 1000 * cell.runs["rate"].unique(), "peak learning rate, x 1e-3", "text loss, nats per token")


def lengths(ax, cells, key):
    """Q–K=V's gap against the length of rows, by their content."""
    for protocol, look, here in by("protocol", cells):
        if key == "loss" and protocol == "padded, padding masked":
            continue  # it never learned to predict padding
        gap_line(ax, here, "kv", "common", look, protocol, "row", key)
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_ylim(bottom=-2)  # room for the legend
    finish(ax, [cell.row for cell in cells], "tokens in a row, T", "perplexity beyond QKV's, %")


def draw_all(folder, cells, all_cells):
    """The figures for which there are runs."""
    gaps = partial(trained_and_converted, cells=cells)
    panels = {
        "gap": [("Q–K=V, each at its own best rate", partial(gaps, at="own"))],
        "gap_common_rate": [("Q–K=V, both at QKV's best rate", partial(gaps, at="common"))],
        "losses": [("each at its own best rate", partial(losses, cells=cells))],
    }
    smallest = [cell for cell in cells if cell.size == cells[0].size]
    if others := [alias for alias in repeated(smallest) if alias not in ("kv", CONVERTED)]:
        fill = partial(other_variants, cells=cells, smallest=smallest, aliases=others)
        panels["gap_other_variants"] = [(f"other variants at {cells[0].size}, own rates", fill)]
    if with_gaps := [cell for cell in cells if cell.gaps("kv", "own")]:
        panels["gap_by_loss"] = [("each at its own best rate", partial(gap_by_loss, cells=with_gaps))]
    if swept := [cell for cell in cells if cell.runs.groupby("alias")["rate"].nunique().max() > 2]:
        where = "{0.size}, {0.tokens_per_parameter:g} tokens per parameter".format
        panels["rates"] = [(where(cell), partial(rates, cell=cell)) for cell in swept]
    if group := next((group for group, alias in varied(all_cells) if alias == "kv"), None):
        panels["lengths"] = [
            ("Q–K=V, over all positions", partial(lengths, cells=group, key="loss")),
            ("Q–K=V, over text only", partial(lengths, cells=group, key="text_loss")),
        ]
    for name, fills in panels.items():
        draw(folder / f"{name}.png", fills)


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="a study's folder, or output folders of runs")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="default: the first folder named")
    options = parser.parse_args(arguments)
    try:
        parts, cells, all_cells = report(find_runs(options.runs))
    except InputError as error:
        parser.error(error)
    folder = options.output_dir or options.runs[0]
    draw_all(write_texts(folder, "scaling_table", as_markdown(parts), as_json(parts)), cells, all_cells)


if __name__ == "__main__":
    main()
