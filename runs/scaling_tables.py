"""The runs of a grid over sizes, tokens, learning rates and rows -> the gap to QKV: its slope, its cost, its figures.

    python runs/scaling_tables.py results/scaling

The complete runs are read as one grid, which results/scaling/README.md defines.

    gap            text loss minus QKV's of the same seed; in percent, the change of perplexity it comes to
    converted      QKV made Q–K=V by convert_checkpoint.py, without training
    common rate    both at the peak learning rate at which QKV is best
    own rate       each at the rate at which it is best
    intervals      in brackets, 95 % by a bootstrap over the seeds; of one cell with three, that is their range.
                   "t" is that of Student's t over the seeds, far wider; ± is half the range
    compute lost   the share of the variant's training compute that QKV does not need for the same loss

Writes scaling_table.md, scaling_table.json and figures/ into the folder, or into --output_dir.

Contents: the grid, slopes, tables, figures, command line.
"""

import contextlib
import math
import re
import sys
from itertools import cycle, product
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import analysis_computation_profiler as profiler
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
PAPER = {alias: row["paper"] for alias, row in VARIANTS.items()} | {CONVERTED: "QKV, converted to Q–K=V"}
PLACE = ["parameters", "tokens", "protocol", "row", "size"]  # what the runs of a cell have in common


# -----------------------------------------------------------------------------
# The grid


def grid_of(runs):
    """The complete runs, a row each, and a row for each conversion of QKV; InputError if they are no grid.

    parameters  N, of QKV's matrices in the layers, whatever the variant
    tokens      D, of training, padding included
    """
    rows, first = [], None
    for run in runs:
        if not run.final:
            continue
        first = first or run
        for key, value in shared(run).items():
            if value != shared(first)[key]:
                both = f"{shared(first)[key]} in {first.name}, and {value} in {run.name}"
                raise InputError(f"runs of two studies: {key} is {both}; name those of one")
        model, c = run.variant.config, run.config
        row = {
            "alias": run.alias,
            "variant": run.variant.paper,
            "size": f"d{model.n_embd}",
            "parameters": model.n_layer * model.n_embd * (4 * model.n_embd + 2 * model.n_inner),
            "tokens": c.total_steps * c.tokens_per_step,
            "row": c.seq_length,
            "protocol": run.protocol,
            "rate": c.learning_rate,
            "seed": run.seed,
            "loss": run.final["loss"],
            "text_loss": run.final["text_loss"],
            "padding": run.final["padding_fraction"],
            "macs": profiler.theoretical_macs(run.variant, c.seq_length)["total"],
        }
        rows.append(row)
        if run.alias == "kqv" and "conversion" in run.about:
            after = {"alias": CONVERTED, "variant": PAPER[CONVERTED], "loss": math.nan}
            rows.append(row | after | {"text_loss": row["text_loss"] + price(run)})
    if not rows:
        raise InputError("no complete runs among those named, so there is nothing to compare")
    grid = pd.DataFrame(rows)
    twice = grid[grid.duplicated([*PLACE, "alias", "rate", "seed"])]
    if len(twice):
        what = twice.iloc[0]
        where = f"{what['variant']}, {what['size']}, {what['tokens']:,} tokens, rate {what['rate']:g}"
        raise InputError(f"the same run twice: {where}, seed {what['seed']}")
    return grid


def shared(run):
    """The settings that all runs of a grid share; what follows from the swept ones, as a share of them."""
    c, model = run.config, run.variant.config
    settings = {key: value for key, value in run.setup.items() if key not in SWEPT}
    return settings | {
        "tokens a step": c.tokens_per_step,
        "warm-up, share of the steps": f"{c.warmup_steps / c.total_steps:.2f}",
        "min_lr, share of the peak": f"{c.min_lr / c.learning_rate:.3g}",
        "width for each layer": model.n_embd / model.n_layer,
        "width of a head": model.n_embd // model.n_head,
    }


def price(run):
    """What conversion cost, in nats, by what convert_checkpoint.py printed of the run's final model."""
    found = CONVERSION.search(run.about["conversion"])
    if not found:
        raise InputError(f"{run.name}: expected what convert_checkpoint.py prints, with the text perplexities")
    before, after = map(float, found.groups())
    own = run.final["text_perplexity"]
    if abs(before / own - 1) > 1e-3:
        other = f"text perplexity {before:.4f}, not {own:.4f} as in this run"
        raise InputError(f"{run.name}: converted was another model: {other}")
    return math.log(after / before)


class Cell:
    """The runs of one size, number of tokens, length and content of the rows."""

    def __init__(self, place, runs):
        self.parameters, self.tokens, self.protocol, self.row, self.size = place
        self.runs = runs
        self.aliases = set(runs["alias"])

    @property
    def tokens_per_parameter(self):
        """To two digits: a run has whole steps, so 5 tokens for each parameter may be 4.996."""
        return float(f"{self.tokens / self.parameters:.2g}")

    def of(self, alias, key="text_loss"):
        """Final losses in nats a token, a row for each rate and a column for each seed."""
        return self.runs[self.runs["alias"] == alias].pivot(index="rate", columns="seed", values=key)

    def best_rate(self, alias):
        """The rate of lowest mean text loss over the seeds that all rates have; None without such seeds."""
        losses = self.of(alias).dropna(axis=1)
        return None if losses.empty else float(losses.mean(axis=1).idxmin())

    def losses(self, alias, rate, key="text_loss"):
        """{seed: loss} at a rate."""
        losses = self.of(alias, key)
        return losses.loc[rate].dropna().to_dict() if rate in losses.index else {}

    def gaps(self, alias, at, key="text_loss"):
        """{seed: loss - QKV's}, in nats a token; `at` is common (QKV's best rate for both) or own."""
        common = self.best_rate("kqv")
        of_qkv = self.losses("kqv", common, key)
        losses = self.losses(alias, common if at == "common" else self.best_rate(alias), key)
        return {seed: loss - of_qkv[seed] for seed, loss in losses.items() if seed in of_qkv}


def cells_of(grid):
    return [Cell(place, runs) for place, runs in grid.groupby(PLACE)]


def main_cells(cells):
    """The cells with the length and content of rows in which most sizes and numbers of tokens were run."""
    kinds = [(cell.row, cell.protocol) for cell in cells]
    most = max(kinds, key=lambda kind: (kinds.count(kind), kind))
    return [cell for cell in cells if (cell.row, cell.protocol) == most]


def compared(cells):
    """The variants beside QKV, in the order of the paper, and QKV converted."""
    trained = set().union(*(cell.aliases for cell in cells))
    return [alias for alias in (*VARIANTS, CONVERTED) if alias in trained - {"kqv"}]


def paper_name(cells, alias):
    """A variant as the paper writes it, with its number of groups."""
    runs = next(cell.runs for cell in cells if alias in cell.aliases)
    return runs[runs["alias"] == alias]["variant"].iloc[0]


# -----------------------------------------------------------------------------
# Slopes


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
    gaps = []
    groups = []
    x = []
    seeds_at = dict.fromkeys(ENDS, 0)
    for cell in cells:
        gap = cell.gaps(alias, at)
        if not gap:
            continue
        ratio = cell.tokens_per_parameter
        gaps.append(gap)
        groups.append(cell.size if over == "tokens" else ratio)
        x.append(math.log(ratio if over == "tokens" else cell.parameters))
        if ratio in seeds_at:
            seeds_at[ratio] = max(len(gap), seeds_at[ratio])
    coefficients = slope_coefficients(groups, x, [len(gap) for gap in gaps]) if gaps else None
    if coefficients is None:
        return None

    by_seed = {}
    for seed in sorted(set().union(*gaps)):
        having = [i for i, gap in enumerate(gaps) if seed in gap]
        alone = slope_coefficients([groups[i] for i in having], [x[i] for i in having], [1] * len(having))
        if alone is not None:
            by_seed[seed] = float(alone @ [gaps[i][seed] for i in having])
    samples = [list(gap.values()) for gap in gaps]
    return {
        "slope": float(coefficients @ [fmean(values) for values in samples]),
        "slope_interval": bootstrap(samples, coefficients),
        "slope_by_seed": by_seed,
        "slope_t": t_interval(by_seed.values()),
        "cells": len(gaps),
        "seeds_at_the_ends": min(seeds_at.values()),
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
    if low >= -MATTERS and high <= MATTERS:
        return "does not change"
    return "cannot tell"


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


# -----------------------------------------------------------------------------
# Tables


def report(runs):
    """The parts of the tables, {name: records}, the notes, and the cells that the figures show."""
    cells = cells_of(grid_of(runs))
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


def gap_fields(gaps, name):
    """Fields for the mean of gaps, as a change of perplexity in percent, and for its two intervals."""
    values = list(gaps.values())
    if not values:
        return {name: None, f"{name}_interval": None, f"{name}_t": None}

    def in_percent(interval):
        return interval and [percent(limit) for limit in interval]

    intervals = {f"{name}_interval": in_percent(bootstrap([values])), f"{name}_t": in_percent(t_interval(values))}
    return {name: percent(fmean(values))} | intervals


def gap_records(cells):
    """A row for every variant at every size and number of tokens."""
    records = []
    for alias in compared(cells):
        for cell in cells:
            if alias not in cell.aliases:
                continue
            own = cell.gaps(alias, "own")
            record = {
                "variant": paper_name(cells, alias),
                "alias": alias,
                "size": cell.size,
                "parameters": cell.parameters,
                "tokens_per_parameter": cell.tokens_per_parameter,
                "tokens": cell.tokens,
                "seeds": list(own),
                "common_rate": cell.best_rate("kqv"),
                "own_rate": cell.best_rate(alias),
            }
            record |= gap_fields(cell.gaps(alias, "common"), "gap_common")
            record |= gap_fields(own, "gap_own")
            lost = None if alias == CONVERTED else compute_lost(cells, cell, alias)
            record["compute_lost_percent"] = lost
            records.append(record)
    return records


def compute_lost(cells, cell, alias):
    """Percent of a variant's training compute that QKV of the same shape does not need for the same loss.

    Both train at their own rates; compute is the MACs of a token's forward pass times the tokens. Negative
    where QKV needs more; None where QKV's curve does not tell.
    """
    gaps = cell.gaps(alias, "own")
    curve = []
    for other in cells:
        losses = other.losses("kqv", other.best_rate("kqv"))
        if losses and other.size == cell.size:
            curve.append((other.tokens, fmean(losses.values())))
    if not gaps or len(curve) < 2:
        return None
    needed = tokens_for(dict(curve)[cell.tokens] + fmean(gaps.values()), curve)
    if needed is None:
        return None
    macs = cell.runs.groupby("alias")["macs"].first()
    return 100 * (1 - needed * macs["kqv"] / (cell.tokens * macs[alias]))


def slope_records(cells):
    """Slopes of the gap: over tokens for each parameter, all sizes and each alone, and over the size."""
    sizes = list(dict.fromkeys(cell.size for cell in cells))
    choices = [("tokens", "all sizes", cells)]
    if len(sizes) > 1:
        choices += [("tokens", size, [cell for cell in cells if cell.size == size]) for size in sizes]
        choices += [("size", "all tokens for each parameter", cells)]
    records = []
    for alias, at, (over, of, chosen) in product(compared(cells), ("own", "common"), choices):
        found = slope(chosen, alias, at, over)
        if found is None:
            continue
        about = {"variant": paper_name(cells, alias), "alias": alias, "rate": at, "over": over, "of": of}
        asked = (alias, over, of) == ("kv", "tokens", "all sizes")
        records.append(about | found | {"verdict": verdict(found) if asked else None})
    return records


def length_groups(cells):
    """The lists of cells of one size and number of tokens whose rows differ in content."""
    groups = {}
    for cell in cells:
        groups.setdefault((cell.size, cell.tokens), []).append(cell)
    return [group for group in groups.values() if len({cell.protocol for cell in group}) > 1]


def varied(group):
    """The variants that were trained with more than one kind of rows."""
    return [alias for alias in compared(group) if sum(alias in cell.aliases for cell in group) > 1]


def length_records(cells):
    """A row for every variant, protocol and length of rows: the gap over all positions and over text only."""
    records = []
    for group in length_groups(cells):
        for alias in varied(group):
            for cell in group:
                gaps = cell.gaps(alias, "common")
                if not gaps:
                    continue
                padding = cell.losses("kqv", cell.best_rate("kqv"), "padding")
                record = {
                    "variant": paper_name(group, alias),
                    "alias": alias,
                    "size": cell.size,
                    "protocol": cell.protocol,
                    "row": cell.row,
                    "seeds": list(gaps),
                    "rate": cell.best_rate("kqv"),
                    "padding_percent": 100 * next(iter(padding.values())),
                }
                record |= gap_fields(cell.gaps(alias, "common", "loss"), "gap_all_positions")
                record |= gap_fields(gaps, "gap_common")
                record |= gap_fields(cell.gaps(alias, "own"), "gap_own")
                records.append(record)
    return records


def fall_records(cells):
    """How far the gap falls from the shortest rows to the longest, over all positions and over text only.

    In 1/100 nat, in the mean over the seeds that both lengths have.
    """
    records = []
    for group in length_groups(cells):
        for alias, protocol in product(compared(group), dict.fromkeys(cell.protocol for cell in group)):
            here = [cell for cell in group if cell.protocol == protocol and cell.gaps(alias, "common")]
            if len(here) < 2:
                continue
            short, long = here[0], here[-1]
            record = {"variant": paper_name(group, alias), "alias": alias, "protocol": protocol}
            record |= {"from": short.row, "to": long.row, "seeds": None}
            for name, key in (("fall_all_positions", "loss"), ("fall_text", "text_loss")):
                before, after = (cell.gaps(alias, "common", key) for cell in (short, long))
                falls = [100 * (before[seed] - after[seed]) for seed in before if seed in after]
                record["seeds"] = len(falls) or record["seeds"]
                record[name] = fmean(falls) if falls else None
                record[f"{name}_interval"] = bootstrap([falls]) if falls else None
                record[f"{name}_t"] = t_interval(falls)
            records.append(record)
    return records


def rate_records(cells):
    """A row for every variant, size and number of tokens: the mean text loss at each rate."""
    records = []
    for cell, alias in product(cells, VARIANTS):
        for rate in cell.of(alias).index:
            losses = cell.losses(alias, rate)
            record = {
                "variant": paper_name(cells, alias),
                "alias": alias,
                "size": cell.size,
                "tokens_per_parameter": cell.tokens_per_parameter,
                "rate": rate,
                "seeds": list(losses),
                "best": "best" if rate == cell.best_rate(alias) else None,
            }
            records.append(record | mean("text_loss", losses.values()))
    return records


def notes(cells):
    """Lines about rates that were hardly searched."""
    lines, alone = [], []
    for cell, alias in product(cells, VARIANTS):
        rates = list(cell.of(alias).index)
        if not rates:
            continue
        where = f"{cell.size}, {cell.tokens_per_parameter:g} tokens per parameter, rows of {cell.row}"
        who = f"{paper_name(cells, alias)}, {where}, {cell.protocol}"
        best = cell.best_rate(alias)
        if len(rates) == 1:
            alone.append(who)
        elif best is None:
            lines.append(f"{who}: no seed was run at all of its rates, so it has no best rate and no gap.")
        elif best in (rates[0], rates[-1]):
            tried = listed(f"{rate:g}" for rate in rates)
            lines.append(f"{who}: the best rate, {best:g}, is at the edge of those tried: {tried}.")
    if alone:
        lines.append(f"At one rate alone: {'; '.join(alone)}.")
    return lines


GAPS = [  # header, key, and how a number is written: its pattern and its unit
    ("", "variant", "", ""),
    ("size", "size", "", ""),
    ("tokens per parameter", "tokens_per_parameter", "g", ""),
    ("seeds", "seeds", "", ""),
    ("common rate", "common_rate", "g", ""),
    ("gap", "gap_common", "+.2f", " %"),
    ("own rate", "own_rate", "g", ""),
    ("gap", "gap_own", "+.2f", " %"),
    ("t", "gap_own_t", "+.2f", " %"),
    ("compute lost", "compute_lost_percent", ".1f", " %"),
]
SLOPES = [
    ("", "variant", "", ""),
    ("rate", "rate", "", ""),
    ("over", "over", "", ""),
    ("of", "of", "", ""),
    ("slope", "slope", "+.4f", ""),
    ("of each seed", "slope_by_seed", "+.4f", ""),
    ("t", "slope_t", "+.4f", ""),
    ("cells", "cells", "", ""),
    ("the gap", "verdict", "", ""),
]
LENGTHS = [
    ("", "variant", "", ""),
    ("size", "size", "", ""),
    ("rows", "protocol", "", ""),
    ("tokens", "row", "", ""),
    ("padding", "padding_percent", ".1f", " %"),
    ("seeds", "seeds", "", ""),
    ("rate", "rate", "g", ""),
    ("gap over all positions", "gap_all_positions", "+.2f", " %"),
    ("over text only", "gap_common", "+.2f", " %"),
    ("text only, own rates", "gap_own", "+.2f", " %"),
]
FALLS = [
    ("", "variant", "", ""),
    ("rows", "protocol", "", ""),
    ("from", "from", "", ""),
    ("to", "to", "", ""),
    ("seeds", "seeds", "", ""),
    ("over all positions", "fall_all_positions", "+.2f", ""),
    ("t", "fall_all_positions_t", "+.2f", ""),
    ("over text only", "fall_text", "+.2f", ""),
    ("t", "fall_text_t", "+.2f", ""),
]
RATES = [
    ("", "variant", "", ""),
    ("size", "size", "", ""),
    ("tokens per parameter", "tokens_per_parameter", "g", ""),
    ("rate", "rate", "g", ""),
    ("seeds", "seeds", "", ""),
    ("text loss", "text_loss", ".4f", ""),
    ("", "best", "", ""),
]
PARTS = [  # of a report: its key, a title, the columns
    ("gaps", "Gap of text perplexity to QKV: at QKV's best rate, and each at its own", GAPS),
    ("slopes", "Slope of the gap, in nats for a factor of e", SLOPES),
    ("lengths", "Gap to QKV at QKV's best rate, by length and content of the rows", LENGTHS),
    ("falls", "Fall of that gap from the shortest rows to the longest, in 1/100 nat", FALLS),
    ("rates", "Text loss by peak learning rate, nats per token (± half the range)", RATES),
]
LEGEND = (
    "In brackets: 95 % bootstrap intervals over seeds; t: 95 % intervals by Student's t. Compute lost: the share of a "
    "variant's training compute that QKV of the same size saves when it trains to the same loss."
)


def as_markdown(parts):
    """The parts that have something in them, and the notes."""
    texts = []
    for key, title, columns in PARTS:
        if parts[key]:
            texts += [f"### {title}", *([LEGEND] if key == "gaps" else []), table(columns, parts[key], "pipe")]
    if parts["notes"]:
        texts.append("\n".join(f"- {line}" for line in parts["notes"]))
    return "\n\n".join(texts) + "\n"


# -----------------------------------------------------------------------------
# Figures

SIZE_LOOKS = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", ":"), ("#CC79A7", "D", "-."))


def seed_line(ax, points, colour, marker, line, label, shaded=False):
    """A line through the means of [(x, values)], every value a dot; if shaded, with their interval."""
    points = [(x, values) for x, values in points if values]
    if not points:
        return
    x = [x for x, _ in points]
    ax.plot(x, [fmean(values) for _, values in points], color=colour, linestyle=line)
    if shaded:
        intervals = [bootstrap([values]) or [values[0]] * 2 for _, values in points]
        ax.fill_between(x, *zip(*intervals, strict=True), color=colour, alpha=0.15, linewidth=0)
    for position, values in points:
        ax.scatter([position] * len(values), values, s=16, color=colour, marker=marker, zorder=3)
    ax.plot([], [], color=colour, marker=marker, markersize=4, linestyle=line, label=label)  # in the legend


def gap_line(ax, points, look, label):
    """A seed_line of [(x, {seed: gap in nats})], as changes of perplexity in percent."""
    points = [(x, [percent(gap) for gap in gaps.values()]) for x, gaps in points]
    seed_line(ax, points, *look, label, shaded=True)


def finish(ax, ticks, xlabel, ylabel):
    """A logarithmic x axis with its ticks, and a legend where there is a line."""
    ticks = sorted(set(ticks))
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)


def gap_figures(folder, cells):
    """Q–K=V's gap against tokens per parameter, a line for each size: gap.png at own rates, gap_common_rate.png
    at QKV's; gap_other_variants.png has the others at the smallest size, where they make a line.
    """
    sizes = list(dict.fromkeys(cell.size for cell in cells))
    smallest = [cell for cell in cells if cell.size == sizes[0]]
    lines = [alias for alias in compared(cells) if sum(alias in cell.aliases for cell in smallest) > 1]
    others = [alias for alias in lines if alias not in ("kv", CONVERTED)]

    def trained_and_converted(ax, at):
        for size, look in zip(sizes, cycle(SIZE_LOOKS), strict=False):
            here = [cell for cell in cells if cell.size == size]
            points = [(cell.tokens_per_parameter, cell.gaps("kv", at)) for cell in here]
            gap_line(ax, points, look, f"{size} ({here[0].parameters:,} parameters)")
        for size, look in zip(sizes, cycle(SIZE_LOOKS), strict=False):
            here = [cell for cell in cells if cell.size == size]
            points = [(cell.tokens_per_parameter, cell.gaps(CONVERTED, "common")) for cell in here]
            gap_line(ax, points, (look[0], "x", "-."), f"{size}, QKV converted")

    def other_variants(ax):
        for alias in others:
            points = [(cell.tokens_per_parameter, cell.gaps(alias, "own")) for cell in smallest]
            gap_line(ax, points, (*LOOKS[alias], "-"), paper_name(cells, alias))

    def panel(name, title, fill):
        def show(axes):
            (ax,) = axes
            fill(ax)
            ax.axhline(0, color="0.6", linewidth=0.8)
            ax.set_ylim(top=1.35 * ax.get_ylim()[1])  # room for the legend
            ticks = [cell.tokens_per_parameter for cell in cells]
            finish(ax, ticks, "tokens per parameter, D / N", "text perplexity beyond QKV's, %")

        draw(folder / name, [title], show)

    panel("gap.png", "Q–K=V, each at its own best rate", lambda ax: trained_and_converted(ax, "own"))
    title = "Q–K=V, both at QKV's best rate"
    panel("gap_common_rate.png", title, lambda ax: trained_and_converted(ax, "common"))
    if others:
        panel("gap_other_variants.png", f"other variants at {sizes[0]}, own rates", other_variants)


def loss_figure(path, cells):
    """Text loss against tokens, log-log: QKV and Q–K=V at own rates, a line a size, every seed a dot."""
    sizes = list(dict.fromkeys(cell.size for cell in cells))

    def show(axes):
        (ax,) = axes
        for alias in ("kqv", "kv"):
            for size, (_, marker, line) in zip(sizes, cycle(SIZE_LOOKS), strict=False):
                points = []
                for cell in cells:
                    if cell.size == size:
                        losses = cell.losses(alias, cell.best_rate(alias))
                        points.append((cell.tokens / 1e6, list(losses.values())))
                label = f"{VARIANTS[alias]['paper']}, {size}"
                seed_line(ax, points, LOOKS[alias][0], marker, line, label)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter("{x:g}")
        tokens = [cell.tokens / 1e6 for cell in cells]
        powers = range(math.floor(math.log2(min(tokens))), math.ceil(math.log2(max(tokens))) + 1)
        ticks = [2.0**power for power in powers]
        finish(ax, ticks, "training tokens D, millions (log scale)", "text loss, nats per token (log scale)")
        ax.set_xlim(min(tokens) / 1.2, max(tokens) * 1.2)

    draw(path, ["each at its own best rate"], show)


def progress_figure(path, cells):
    """Q–K=V's gap against QKV's text loss, each at its own best rate: every seed a dot, every size a look."""
    cells = [cell for cell in cells if cell.gaps("kv", "own")]
    sizes = list(dict.fromkeys(cell.size for cell in cells))

    def show(axes):
        (ax,) = axes
        for size, (colour, marker, _) in zip(sizes, cycle(SIZE_LOOKS), strict=False):
            points = []
            for cell in cells:
                if cell.size == size:
                    of_qkv = cell.losses("kqv", cell.best_rate("kqv"))
                    points += [(of_qkv[seed], gap) for seed, gap in cell.gaps("kv", "own").items()]
            ax.scatter(*zip(*points, strict=True), s=20, color=colour, marker=marker, label=size)
        ax.axhline(0, color="0.6", linewidth=0.8)
        ax.invert_xaxis()  # training goes to the right
        ax.set_xlabel("text loss of QKV, nats per token")
        ax.set_ylabel("gap of Q–K=V, nats per token")
        ax.legend(frameon=False)

    if cells:
        draw(path, ["each at its own best rate"], show)


def rate_figure(path, cells):
    """Text loss against the peak learning rate, a panel for each size and number of tokens that was swept."""
    swept = [cell for cell in cells if cell.runs.groupby("alias")["rate"].nunique().max() > 2]

    def show(axes):
        for ax, cell in zip(axes, swept, strict=True):
            for alias in VARIANTS:
                rates = cell.of(alias).index
                points = [(1000 * rate, list(cell.losses(alias, rate).values())) for rate in rates]
                if points:
                    seed_line(ax, points, *LOOKS[alias], "-", paper_name(swept, alias))
            ticks = 1000 * cell.runs["rate"].unique()
            finish(ax, ticks, "peak learning rate, x 1e-3", "text loss, nats per token")

    if swept:
        titles = [f"{cell.size}, {cell.tokens_per_parameter:g} tokens per parameter" for cell in swept]
        draw(path, titles, show)


def length_figure(path, cells):
    """Q–K=V's gap against the length of rows, by their content: over all positions, and over text only.

    Without the padding in training a model cannot predict it, so there the first panel has no such line.
    """
    groups = [group for group in length_groups(cells) if "kv" in varied(group)]
    if not groups:
        return
    cells = groups[0]
    looks = dict(zip(dict.fromkeys(cell.protocol for cell in cells), cycle(SIZE_LOOKS), strict=False))

    def show(axes):
        for ax, key in zip(axes, ("loss", "text_loss"), strict=True):
            for protocol, look in looks.items():
                if key == "loss" and protocol == "padded, padding masked":
                    continue
                here = [cell for cell in cells if cell.protocol == protocol]
                gap_line(ax, [(cell.row, cell.gaps("kv", "common", key)) for cell in here], look, protocol)
            ax.axhline(0, color="0.6", linewidth=0.8)
            ax.set_ylim(bottom=-2)  # room for the legend
            finish(ax, [cell.row for cell in cells], "tokens in a row, T", "perplexity beyond QKV's, %")

    draw(path, ["Q–K=V, over all positions", "Q–K=V, over text only"], show)


# -----------------------------------------------------------------------------
# Command line


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="a study's folder, or output folders of runs")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="default: the first folder named")
    options = parser.parse_args(arguments)
    try:
        parts, main, cells = report(find_runs(options.runs))
    except InputError as error:
        parser.error(error)
    folder = options.output_dir or options.runs[0]
    figures = write_texts(folder, "scaling_table", as_markdown(parts), as_json(parts))
    gap_figures(figures, main)
    loss_figure(figures / "losses.png", main)
    progress_figure(figures / "gap_by_loss.png", main)
    rate_figure(figures / "rates.png", main)
    length_figure(figures / "lengths.png", cells)


if __name__ == "__main__":
    main()
