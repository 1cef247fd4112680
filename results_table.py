"""Output folders of training runs -> the paper's Tables 4 and 10, over seeds, and the figures.

    python results_table.py                      # the outputs_* folders here: a table for each kind of run
    python results_table.py outputs_kqv outputs_gqa --format markdown
    python results_table.py outputs_replicate --output_dir results/reduced_scale

A folder of runs is searched one level deep. A table holds runs of one shape and one data protocol; a row,
those of one variant that differ in the seed alone. A row marked * was trained otherwise than QKV, as the
lines below the table say.

    perplexity        of the final evaluation, over all positions, padding included: the paper's protocol. A
                      model that was trained with the padding masked cannot predict it: there it says nothing
    text perplexity   over the tokens of the documents alone
    ±                 half of the range over the seeds, beside their mean
    vs QKV            from runs of the same seed, which read the same data in the same order

Incomplete runs are listed below the table and enter no mean. --output_dir writes results_table.md,
results_table.json, validation_curves.png and pareto.png. Runs over sizes, tokens and rates: scaling_table.py.

Contents: reading, comparing, printing, plotting, command line.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
from dataclasses import asdict
from functools import cache, cached_property, partial
from importlib import import_module
from itertools import groupby
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import yaml
from tabulate import tabulate

import analysis_computation_profiler as profiler
import transformer_KQV_300_M as script  # what the training scripts share
from analysis_computation_profiler import SIZES, VARIANTS, Variant
from dataset_download import InputError, write_atomically

RECORDED = (
    "variant",
    "train_data",
    "val_data",
    "init_from",
    "changes",
)  # in run.yaml and in every checkpoint
TABLES = {"300M": ["300M (Table 4)"], "1.2B": ["1.2B (Table 10)"]}
FIGURES = ("perplexity", "text_perplexity", "loss", "text_loss")  # of an evaluation
SHAPE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
GROUPED_BY = {*SHAPE, "n_kv_groups", "sequence", "score_padding", "seq_length"}  # or the variant itself
UNKNOWN = {  # what is said of runs that have not recorded it
    "variant": "Variant taken from the folder's name",
    "train_data": "Training data known by path",
    "val_data": "Validation data known by path",
}


# -----------------------------------------------------------------------------
# Reading


def find_runs(paths):
    """The Runs in the folders named, or in the outputs_* of this one; InputError where there are none."""
    runs = []
    for path in paths or sorted(Path().glob("outputs_*")):
        folders = [path] if is_run(path) else sorted(folder for folder in path.glob("*") if is_run(folder))
        if paths and not folders:
            raise InputError(f"{path}: no runs found, neither a metrics.jsonl nor a folder with one")
        runs += [Run(folder) for folder in folders]
    if not runs:
        raise InputError(
            "no runs found: no folder outputs_* with a metrics.jsonl is here; name the runs' folders"
        )
    return runs


def is_run(folder):
    """Whether a training script has written into a folder: its log, or a checkpoint whose log is gone."""
    return (folder / "metrics.jsonl").exists() or bool(script.checkpoints(folder))


class Run:
    """An output folder: its variant and settings, how far it got and what its evaluations came to."""

    def __init__(self, folder):
        self.folder = folder
        self.about = recorded(folder)
        self.alias = alias_of(folder, self.about)
        own = import_module(VARIANTS[self.alias]["script"]["300M"].removesuffix(".py"))
        try:
            model = own.load_config(own.ModelConfig, folder / "model_config.yaml", [])
            self.config = script.load_config(script.TrainingConfig, folder / "train_config.yaml", [])
        except ValueError as error:  # the RunError of either script
            raise InputError(str(error)) from error
        self.variant = Variant(self.alias, "300M", **asdict(model))
        self.seed = self.config.seed
        self.step, self.evaluations = read_metrics(folder / "metrics.jsonl")

    @cached_property
    def final(self):
        """The evaluation after the last step, or None: then the run is incomplete."""
        for evaluation in self.evaluations:
            if (evaluation["kind"], evaluation["step"]) == ("final", self.config.total_steps):
                return evaluation
        return None

    @cached_property
    def size(self):
        """300M or 1.2B where the model has that shape, else None."""
        return next((s for s in SIZES if shape(self.variant.config) == shape(published_config(s))), None)

    @property
    def as_published(self):
        """Whether the data protocol is the paper's."""
        return self.config.sequence == "padded" and self.config.score_padding

    @property
    def protocol(self):
        """What is in a row, and what of it counts in the training loss."""
        if self.config.sequence == "packed":
            return "packed"
        return "padded, padding " + ("scored" if self.config.score_padding else "masked")

    @property
    def place(self):
        """Which table the run belongs to, in the order of the tables."""
        first = SIZES.index(self.size) if self.size else len(SIZES)
        c = self.config
        return first, *shape(self.variant.config), c.seq_length, not self.as_published, c.sequence

    @property
    def title(self):
        """Of its table: the shape, and the data protocol."""
        model = self.variant.config
        shape = [
            f"{model.n_layer} layers, d {model.n_embd}, {model.n_head} heads",
            f"feed-forward {model.n_inner:,}, {model.n_positions:,} positions, "
            f"vocabulary {model.vocab_size:,}",
        ]
        sequence, _, padding = self.protocol.partition(", ")
        rows = f"{sequence} rows of {self.config.seq_length:,} tokens"
        return [*TABLES.get(self.size, shape), f"{rows}, {padding}" if padding else rows]

    @cached_property
    def setup(self):
        """What is the same where runs differ in variant and seed alone.

        Without what cannot change the result: the contents of the data stand in for its paths where they are
        known, and the global batch for its three factors.
        """
        c = self.config
        left_out = GROUPED_BY | set(script.CANNOT_CHANGE_THE_RESULT) | {"seed"}
        settings = asdict(self.variant.config) | asdict(c)
        settings = {key: value for key, value in settings.items() if key not in left_out}
        for split in ("train_data", "val_data"):
            chunks = self.about.get(split)
            settings[split] = (
                fingerprint(chunks) if chunks else f"{getattr(c, split)}, contents not recorded,"
            )
        return settings | {
            "init_from": self.about.get("init_from"),
            "rows a step": c.rows_per_step,
            "rows evaluated": c.eval_batches * c.micro_batch_size if c.eval_batches else "all",
        }

    def record(self):
        """The run in the JSON."""
        evaluated = self.evaluations[-1] if self.evaluations else {}
        return {
            "folder": self.folder.name,
            "alias": self.alias,
            "variant": self.variant.paper,
            "seed": self.seed,
            "complete": self.final is not None,
            "step": self.step,
            "steps": self.config.total_steps,
            "evaluated_at": evaluated.get("step"),
            **{key: evaluated.get(key) for key in FIGURES},
            "setup": self.setup,
        }


def recorded(folder):
    """What a run recorded of itself: its variant, by the name of its script, and the chunks of its data."""
    about = folder / "run.yaml"
    if about.exists():
        try:
            return dict(yaml.safe_load(about.read_text(encoding="utf-8")))
        except (TypeError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{about}: expected a YAML file of 'key: value' lines") from error
    for path in (*(path for _, path in script.checkpoints(folder)), folder / "final_model.pt"):
        with contextlib.suppress(Exception):  # a damaged file can fail in any way; the next one may be whole
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return {key: contents[key] for key in RECORDED if key in contents}
    return {}


def alias_of(folder, about):
    """The variant as recorded, else by the folder's name: a script's default, or ALIAS_anything."""
    if "variant" in about:
        names = {row["script"]["300M"]: alias for alias, row in VARIANTS.items()}
        name = f"transformer_{about['variant']}_300_M.py"
    else:
        names = {name: alias for alias, row in VARIANTS.items() for name in row["output_dir"].values()}
        names |= {alias: alias for alias in VARIANTS}
        name = folder.name if folder.name in names else folder.name.partition("_")[0]
    if name not in names:
        raise InputError(
            f"{folder}: unknown variant: {about.get('variant', 'not recorded, nor told by this name')}"
        )
    return names[name]


def read_metrics(path):
    """The last step in a metrics.jsonl, and its evaluations by step.

    The log is only ever appended to. A killed run leaves a torn line, which is passed over; resumed, it logs
    the steps since its checkpoint again, and the last record of a step counts.
    """
    if not path.exists():
        raise InputError(f"{path}: missing, though checkpoints lie beside it")
    records = script.read_metrics(path)
    if path.stat().st_size and not records:
        raise InputError(
            f"{path}: not the metrics of a training script: no line is a record with kind and step"
        )

    last_step, evaluations = 0, {}
    for record in records:
        step = number(record, "step", path)
        last_step = max(last_step, step)
        if record["kind"] != "train":
            wanted = ("step", "tokens", "padding_fraction", *FIGURES)
            evaluations[step] = {"kind": record["kind"]} | {key: number(record, key, path) for key in wanted}
    return last_step, [evaluations[step] for step in sorted(evaluations)]


def number(record, key, path):
    """A number of a record; InputError where it is missing, a text, infinite or not a number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        where = f"step {record['step']}: {key}: expected a number, got {value!r}"
        raise InputError(f"{path}: not the metrics of a training script: {where}")
    return value


@cache
def published_config(size):
    return Variant("kqv", size).config


def shape(model):
    return [getattr(model, key) for key in SHAPE]


def fingerprint(chunks):
    """Short for the hashes of all files of a split, in their order."""
    return hashlib.sha256(json.dumps(chunks, sort_keys=True).encode()).hexdigest()[:12]


# -----------------------------------------------------------------------------
# Comparing


def compare(runs):
    """The tables: runs grouped by place, and in each the rows, the runs and what is to be said about them."""
    runs = sorted(runs, key=lambda run: (run.place, list(VARIANTS).index(run.alias), run.seed))
    return [table_of(list(here)) for _, here in groupby(runs, key=lambda run: run.place)]


def table_of(runs):
    """The runs of one place, side by side."""
    rows = {}
    for run in runs:
        row = rows.setdefault((run.variant.paper, *run.setup.items()), [])
        refuse_twice(run, row)
        row.append(run)
    rows, size = list(rows.values()), runs[0].size

    # Where QKV was trained in several ways, the one with the most seeds.
    reference = max(
        (row for row in rows if row[0].alias == "kqv"), key=lambda row: len(complete(row)), default=[]
    )
    records = [row_record(row, reference, size or "300M") for row in rows]
    # Both of the paper's tables are of rows with the padding scored.
    published = (
        "published" + ("" if size else " at 300M") + ("" if runs[0].as_published else ", padding scored")
    )
    about = {"title": runs[0].title, "size": size, "published": published}
    return about | {"rows": records, "notes": notes(rows, reference), "runs": runs}


def refuse_twice(run, others):
    for other in others:
        if other.seed == run.seed:
            who = f"{run.variant.paper}, seed {run.seed}, same settings"
            raise InputError(f"{other.folder} and {run.folder}: the same run twice ({who}); name one of them")


def complete(row):
    return [run.seed for run in row if run.final]


def row_record(row, reference, published_at):
    """A row of the table: the means over its complete runs, unrounded."""
    variant, alias = row[0].variant, row[0].alias
    cached = profiler.cache_account(variant, [])

    def published(figure):
        return VARIANTS[alias]["published"].get(figure, {}).get(published_at)

    record = {
        "variant": variant.paper + ("*" if differences(row, reference) else ""),
        "alias": alias,
        "seeds": complete(row),
        "parameters": variant.parameters["total"],
        "cache_bytes_per_token": cached["bytes_per_token"],
        "cache_reduction_percent": cached["reduction_percent"],
        "published": published("perplexity"),
        "published_vs_qkv": published("perplexity_change"),
    }

    # Changes are those of a seed, against QKV's run of the same seed.
    finals, of_qkv = ({run.seed: run.final for run in runs if run.final} for runs in (row, reference))
    pairs = [
        (final, of_qkv[seed]) for seed, final in finals.items() if seed in of_qkv and row is not reference
    ]
    for key in FIGURES:
        record |= mean(key, [final[key] for final in finals.values()])
        change = (lambda a, b: 100 * (a / b - 1)) if "perplexity" in key else (lambda a, b: a - b)
        record |= mean(f"{key}_vs_qkv", [change(final[key], other[key]) for final, other in pairs])
    return record


def mean(name, values):
    """The mean, and as the spread half of the range, which one value does not have."""
    if not values:
        return {name: None, f"{name}_spread": None}
    return {
        name: fmean(values),
        f"{name}_spread": (max(values) - min(values)) / 2 if len(values) > 1 else None,
    }


def differences(row, reference):
    """Where the settings of a row are not QKV's: {key: (QKV's, the row's)}."""
    if not reference:
        return {}
    ours, theirs = row[0].setup, reference[0].setup
    return {key: (theirs[key], value) for key, value in ours.items() if theirs[key] != value}


def notes(rows, reference):
    """Lines about what stands in the way of a comparison, and about what is not known."""
    seeds, lines = complete(reference), []
    if not seeds:
        lines.append("No complete run of QKV: nothing to compare with.")
    for row in rows:
        who = f"{row[0].variant.paper} ({folders(row)})"
        for key, (theirs, ours) in differences(row, reference).items():
            lines.append(f"* {who}: {key}: {theirs} of QKV, {ours} of the run")
        if seeds and complete(row) not in ([], seeds):
            lines.append(f"{who}: complete seeds: {listed(seeds)} of QKV, {listed(complete(row))} of the run")
    everyone = [run for row in rows for run in row]
    if everyone[0].protocol == "padded, padding masked":
        lines.append(
            "The padding was masked in training: a perplexity that includes it says nothing, the text's does."
        )
    return lines + recorded_notes(everyone)


def recorded_notes(runs):
    """Lines about what runs have not recorded, and about settings that changed while they ran."""
    lines = []
    for run in runs:
        if run.about.get("changes"):
            lines.append(f"{run.folder.name}: settings changed on the way: {listed(run.about['changes'])}.")
    for key, what in UNKNOWN.items():
        without = [run for run in runs if not run.about.get(key)]
        if without:
            lines.append(f"{what} alone: {'all runs' if without == runs else folders(without)}.")
    return lines


def folders(runs):
    return listed(run.folder.name for run in runs)


def listed(values):
    return ", ".join(map(str, values))


# -----------------------------------------------------------------------------
# Printing

RESULTS = [  # header, key, and how a number is written: its pattern and its unit
    ("", "variant", "", ""),
    ("seeds", "seeds", "", ""),
    ("perplexity", "perplexity", ".3f", ""),
    ("vs QKV", "perplexity_vs_qkv", "+.2f", " %"),
    ("{published}", "published", "g", ""),
    ("vs QKV", "published_vs_qkv", "+g", " %"),
    ("text perplexity", "text_perplexity", ".3f", ""),
    ("vs QKV", "text_perplexity_vs_qkv", "+.2f", " %"),
    ("parameters", "parameters", ",", ""),
    ("cache, bytes a token", "cache_bytes_per_token", ",", ""),
    ("saved", "cache_reduction_percent", ".1f", " %"),
]
INCOMPLETE = [
    ("incomplete", "variant", "", ""),
    ("seed", "seed", "", ""),
    ("step", "step", ",", ""),
    ("of", "steps", ",", ""),
    ("evaluated at", "evaluated_at", ",", ""),
    ("perplexity", "perplexity", ".3f", ""),
    ("text perplexity", "text_perplexity", ".3f", ""),
    ("folder", "folder", "", ""),
]


def cell(record, key, pattern, unit):
    """The text of a value, with its spread or its interval where it has one."""
    value = record[key]
    if value is None:
        return ""
    if isinstance(value, list):
        return listed(value)
    if isinstance(value, dict):
        return listed(f"{part:{pattern}}" for part in value.values())
    text = f"{value:{pattern}}"
    if record.get(f"{key}_spread") is not None:
        text += f" ± {record[f'{key}_spread']:{pattern.lstrip('+')}}"
    text += unit
    if record.get(f"{key}_interval") is not None:
        low, high = record[f"{key}_interval"]
        text += f" [{low:{pattern}}, {high:{pattern}}]"
    return text


def grid(columns, records, style):
    """A table in a style of tabulate: the first column to the left, the others to the right."""
    rows = [[cell(record, *how) for _, *how in columns] for record in records]
    headers = [header for header, *_ in columns]
    align = ("left", *["right"] * (len(columns) - 1))
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=align)


def document(tables, heading, style, bullet):
    """Title, rows, incomplete runs and notes of every table."""
    texts = []
    for table in tables:
        texts.append(heading + ", ".join(table["title"]))
        columns = [(header.format(published=table["published"]), *how) for header, *how in RESULTS]
        texts.append(grid(columns, table["rows"], style))
        incomplete = [run.record() for run in table["runs"] if not run.final]
        if incomplete:
            texts.append(grid(INCOMPLETE, incomplete, style))
        if table["notes"]:
            texts.append("\n".join(bullet + line for line in table["notes"]))
    return "\n\n".join(texts) + "\n"


def as_text(tables):
    return document(tables, "", "plain", "")


def as_markdown(tables):
    return document(tables, "### ", "pipe", "- ").replace("*", "\\*")  # a mark, no emphasis


def as_csv(tables):
    """The rows of all tables, unrounded; `table` says which one a row belongs to."""
    return sheet(
        [{"table": ", ".join(table["title"])} | record for table in tables for record in table["rows"]]
    )


def sheet(rows):
    """Records as comma-separated values."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0] if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {key: listed(value) if isinstance(value, list) else value for key, value in row.items()}
        )
    return file.getvalue()


def as_json(tables):
    """Everything, unrounded."""
    return dumped([table | {"runs": [run.record() for run in table["runs"]]} for table in tables])


def dumped(records):
    return json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS = {"table": as_text, "markdown": as_markdown, "csv": as_csv, "json": as_json}


# -----------------------------------------------------------------------------
# Plotting


def figure(path, titles, draw):
    """A PNG with a panel for each title; draw(axes) fills them."""
    figure, axes = profiler.panels(titles)
    for ax in axes:
        ax.title.set_fontsize("medium")
    draw(axes)
    write_atomically(path, partial(figure.savefig, format="png"))


def table_figure(path, tables, draw):
    """A panel for each table, which draw(ax, table) fills."""

    def draw_all(axes):
        for ax, table in zip(axes, tables, strict=True):
            draw(ax, table)

    figure(path, ["\n".join(table["title"]) for table in tables], draw_all)


def curves(ax, table):
    """Validation loss of the text against tokens, a line for each run; the untrained model is left out."""
    for run in table["runs"]:
        colour, marker = profiler.LOOKS[run.alias]
        points = [(e["tokens"] / 1e6, e["text_loss"]) for e in run.evaluations if e["step"]]
        label = run.variant.paper if run.variant.paper not in ax.get_legend_handles_labels()[1] else None
        look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1, "label": label}
        ax.plot(*np.reshape(points, (-1, 2)).T, **look)
    ax.set_xlabel("training tokens, millions, padding included")
    ax.set_ylabel("validation loss of the text, nats a token")
    ax.legend(frameon=False)


def pareto(ax, table):
    """Text loss beyond QKV's against a token's KV cache; the line joins those that no other beats in both."""
    compared = [
        row for row in table["rows"] if row["text_loss_vs_qkv"] is not None or row["variant"] == "QKV"
    ]
    points = [(row["cache_bytes_per_token"], row["text_loss_vs_qkv"] or 0.0, row) for row in compared]
    front, lowest = [], math.inf
    for size, loss, _ in sorted(points, key=lambda point: point[:2]):
        if loss < lowest:
            front.append((size, loss))
            lowest = loss
    ax.plot(*zip(*front, strict=True), color="0.7", zorder=1)
    for size, loss, row in points:
        colour, marker = profiler.LOOKS[row["alias"]]
        look = {"color": colour, "marker": marker, "markersize": 8, "capsize": 3}
        ax.errorbar(size, loss, row["text_loss_vs_qkv_spread"], **look)
        ax.annotate(row["variant"], (size, loss), (7, 5), textcoords="offset points")
    sizes = sorted({size for size, *_ in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    ax.minorticks_off()
    ax.margins(x=0.15, y=0.1)
    ax.set_xlabel("KV cache in bf16, bytes a token")
    ax.set_ylabel("text loss beyond QKV's, nats a token")


# -----------------------------------------------------------------------------
# Command line


def write_texts(folder, name, what, forms):
    """The tables as <name>.md and <name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, form in (("md", "markdown"), ("json", "json")):
        text = forms[form](what).encode()
        write_atomically(folder / f"{name}.{suffix}", lambda file, text=text: file.write(text))


def write_all(folder, tables):
    write_texts(folder, "results_table", tables, FORMATS)
    table_figure(folder / "validation_curves.png", tables, curves)
    having = [table for table in tables if any(row["text_loss_vs_qkv"] is not None for row in table["rows"])]
    if having:
        table_figure(folder / "pareto.png", having, pareto)


def command_line(file, description, report, forms, write, arguments):
    """Read the runs in the folders named, report on them, write files where asked for, and print."""
    form = argparse.RawDescriptionHelpFormatter
    parser = profiler.Parser(prog=Path(file).name, description=description, formatter_class=form)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="runs, or folders of runs")
    parser.add_argument("--format", choices=forms, default="table", help="of what is printed")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="write tables and figures there")
    options = parser.parse_args(arguments)
    try:
        what = report(find_runs(options.folders))
        if options.output_dir:
            write(options.output_dir, what)
    except ModuleNotFoundError as error:
        parser.error(f"{error}; pip install -r requirements.txt")
    except (InputError, OSError) as error:
        parser.error(error)
    print(forms[options.format](what), end="")


def main(arguments=None):
    command_line(__file__, __doc__, compare, FORMATS, write_all, arguments)


if __name__ == "__main__":
    main()
