"""Tables and figures of the tools: records in, text or a PNG out. A record is a dict of one row."""

from __future__ import annotations

import json
import math
from functools import partial
from statistics import fmean

from scipy import stats
from tabulate import tabulate

from common import VARIANTS, write_atomically, write_text

LOOKS = {alias: tuple(row["look"]) for alias, row in VARIANTS.items()}  # a colour and a marker in figures

# -----------------------------------------------------------------------------
# Statistics


def mean(name, values):
    """Fields for the mean, and for half of the range as its spread, which one value does not have."""
    values = list(values)
    spread = (max(values) - min(values)) / 2 if len(values) > 1 else None
    return {name: fmean(values) if values else None, f"{name}_spread": spread}


def t_interval(values):
    """95 % interval of the mean by Student's t; None for fewer than two values."""
    values = list(values)
    if len(values) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return [fmean(values) - half, fmean(values) + half]


def bootstrap(samples, coefficients=(1,)):
    """95 % interval of the sum of coefficient x mean over samples, each resampled with replacement.

    10,000 times. None where a sample has one value, so that there is nothing to draw from.
    """
    samples = [list(values) for values in samples]
    if min(map(len, samples)) < 2:
        return None

    def total(*drawn, axis):
        return sum(c * values.mean(axis=axis) for c, values in zip(coefficients, drawn, strict=True))

    found = stats.bootstrap(samples, total, n_resamples=10_000, method="percentile", rng=0)
    return list(map(float, found.confidence_interval))


# -----------------------------------------------------------------------------
# Tables


def amount(value):
    """Two decimals, and three digits below 1."""
    return f"{value:,.2f}" if value >= 1 else f"{value:#.3g}"


def giga(value):
    """Bytes as GB."""
    return amount(value / 1e9)


def cell(record, key, pattern="", unit=""):
    """The text of a value; empty where the record has none.

    Behind it stands its spread (± x_spread), its interval [x_interval] or its range (x_low to x_high), where
    the record has one. The pattern is one of format(), or a function that writes a number.
    """
    value = record.get(key)
    write = pattern if callable(pattern) else f"{{:{pattern}}}".format
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return listed(map(write, value.values() if isinstance(value, dict) else value))
    text = write(value)
    if record.get(f"{key}_spread") is not None:
        text += f" ± {write(record[f'{key}_spread']).lstrip('+')}"
    low, high = record.get(f"{key}_low"), record.get(f"{key}_high")
    if low != high:
        text += f" ({write(low)} to {write(high)})"
    interval = record.get(f"{key}_interval")
    return text + unit + (f" [{listed(map(write, interval))}]" if interval else "")


def table(columns, records, style):
    """A table of records in one of tabulate's styles, without columns that are empty throughout.

    A column is a header, a key, and for numbers their pattern and their unit.
    """
    columns = [(header, [cell(record, *how) for record in records]) for header, *how in columns]
    columns = [(header, cells) for header, cells in columns if any(cells)]
    headers, columns = zip(*columns, strict=True)
    alignment = ["left"] + ["right"] * (len(headers) - 1)
    rows = zip(*columns, strict=True)
    return tabulate(rows, headers, style, colalign=alignment, disable_numparse=True)


def sheet(rows):
    """Records as comma-separated values; a list is written as its items."""
    from pandas import DataFrame

    rows = [{key: listed(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows]
    return DataFrame(rows, dtype=object).to_csv(index=False)


def listed(values):
    return ", ".join(map(str, values))


def as_json(records):
    """What there is, unrounded."""
    return json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_texts(folder, name, markdown, json_text):
    """A table as <name>.md and <name>.json; returns the folder for its figures."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.md", markdown)
    write_text(folder / f"{name}.json", json_text)
    return folder / "figures"


# -----------------------------------------------------------------------------
# Figures


def draw(path, fills):
    """A PNG with a panel for each (title, fill), up to three side by side; fill(ax) draws in it."""
    from matplotlib.figure import Figure

    columns = min(3, len(fills))
    rows = math.ceil(len(fills) / columns)
    figure = Figure(figsize=(0.5 + 5.5 * columns, 4.5 * rows), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(fills) :]:
        ax.remove()
    for ax, (title, fill) in zip(axes, fills, strict=False):
        ax.set_title(title, fontsize="medium")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        fill(ax)
    save_figure(path, figure)


def save_figure(path, figure):
    write_atomically(path, partial(figure.savefig, format="png"))
