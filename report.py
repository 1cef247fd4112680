"""Tables and figures of the tools: records in, text or a PNG out.

A record is a dict of one row. Beside a figure `x` it may hold `x_low` and `x_high`, the range over rounds.
"""

from __future__ import annotations

import csv
import io
import json
import math
from functools import partial
from statistics import fmean

from scipy import stats
from tabulate import tabulate

from common import VARIANTS, write_atomically, write_text

LOOKS = {alias: tuple(row["look"]) for alias, row in VARIANTS.items()}  # a colour and a marker in figures

integer = "{:,.0f}".format
percent = "{:.1f} %".format
change = "{:+.1f} %".format


def amount(value):
    """Two decimals, and three digits below 1."""
    return f"{value:,.2f}" if value >= 1 else f"{value:#.3g}"


def giga(value):
    """Bytes as GB."""
    return amount(value / 1e9)


def rate(value):
    """A decimal below 1,000, none above."""
    return f"{value:,.1f}" if value < 1000 else integer(value)


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
    """95 % interval of the sum of coefficient x mean over samples, each resampled with replacement 10,000 times.

    None where a sample has one value, so that there is nothing to draw from.
    """
    samples = [list(values) for values in samples]
    if min(map(len, samples)) < 2:
        return None

    def total(*drawn, axis):
        return sum(c * values.mean(axis=axis) for c, values in zip(coefficients, drawn, strict=True))

    found = stats.bootstrap(samples, total, n_resamples=10_000, method="percentile", rng=0)
    return list(map(float, found.confidence_interval))


def cell(record, key, write):
    """The text of a value, with its range where it has one; empty where the record has no such value."""
    if record.get(key) is None:
        return ""
    text = write(record[key])
    low, high = record.get(f"{key}_low"), record.get(f"{key}_high")
    return text if low == high else f"{text} ({write(low)} to {write(high)})"


def view(columns, records, style):
    """A table of records, without columns that are empty throughout, such as a GPU's figures on a CPU."""
    filled = []
    for header, key, write in columns:
        cells = [cell(record, key, write) for record in records]
        if any(cells):
            filled.append((header, cells))
    headers = [header for header, _ in filled]
    rows = zip(*(cells for _, cells in filled), strict=True)
    return grid(headers, rows, style)


def grid(headers, rows, style):
    """A table in one of tabulate's styles: the first column to the left, the others to the right."""
    alignment = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, style, colalign=alignment, disable_numparse=True)


def value(record, key, pattern="", unit=""):
    """The text of a value, with its spread or its interval where it has one; empty for None."""
    found = record[key]
    if found is None:
        return ""
    if isinstance(found, list | dict):
        return listed(f"{part:{pattern}}" for part in (found.values() if isinstance(found, dict) else found))
    spread, interval = record.get(f"{key}_spread"), record.get(f"{key}_interval")
    text = f"{found:{pattern}}" + ("" if spread is None else f" ± {spread:{pattern.lstrip('+')}}") + unit
    return text + (" [{:{p}}, {:{p}}]".format(*interval, p=pattern) if interval else "")


def table(columns, records, style):
    """A table of records; a column is a header, a key, and for numbers their pattern and their unit."""
    headers = [header for header, *_ in columns]
    return grid(headers, [[value(record, *how) for _, *how in columns] for record in records], style)


def sheet(rows):
    """Records as comma-separated values; a list is written as its items."""
    file = io.StringIO()
    writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        lists = {key: listed(value) for key, value in row.items() if isinstance(value, list)}
        writer.writerow(row | lists)
    return file.getvalue()


def listed(values):
    return ", ".join(map(str, values))


def as_json(records):
    """What there is, unrounded: lists of records by table, or the entries of a size by variant."""
    return json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_texts(folder, name, markdown, json_text):
    """A table as <name>.md and <name>.json; returns the folder for its figures."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.md", markdown)
    write_text(folder / f"{name}.json", json_text)
    return folder / "figures"


def draw(path, fills):
    """A PNG with a panel for each (title, fill); fill(ax) draws in it."""
    figure, axes = panels([title for title, _ in fills])
    for ax, (_, fill) in zip(axes, fills, strict=True):
        ax.title.set_fontsize("medium")
        fill(ax)
    save_figure(path, figure)


def panels(titles):
    """A figure and its axes, one for each title, up to three side by side."""
    from matplotlib.figure import Figure

    columns = min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(0.5 + 5.5 * columns, 4.5 * rows), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(titles) :]:
        ax.remove()
    axes = axes[: len(titles)]
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(path, figure):
    write_atomically(path, partial(figure.savefig, format="png"))


def pareto_front(points):
    """The (cost, loss) points that no other beats in one without losing in the other, by rising cost."""
    front = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front
