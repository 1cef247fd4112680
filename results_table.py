"""Output folders of training runs -> the paper's Tables 4 and 10, over seeds, and the figures.

    python results_table.py                      # the outputs_* folders here: a table for each kind of run
    python results_table.py outputs_kqv outputs_gqa --format markdown
    python results_table.py outputs_replicate --output_dir results/reduced_scale

A folder of runs is searched one level deep, leaving out the *.old_N that --resume never puts aside. A table
holds runs of one shape and one data protocol; a row of it, those of one variant that differ in the seed alone.
A row marked * was trained with other settings than QKV, which the lines below the table name.

    perplexity        of the final evaluation, over all positions, padding included: the paper's protocol. A
                      model that was trained with the padding masked never learned to predict padding; for it
                      this figure means nothing
    text perplexity   over the tokens of the documents alone
    ±                 half of the range over the seeds, beside their mean
    vs QKV            from runs of the same seed, which read the same data in the same order

Incomplete runs are listed below the table and enter no mean. --output_dir writes results_table.md,
results_table.json, validation_curves.png and pareto.png. For runs over sizes, tokens and learning rates, see
scaling_table.py.

Contents: reading, comparing, printing, plotting, command line.
"""

import contextlib
import hashlib
import json
import math
from dataclasses import asdict
from functools import cache, cached_property
from importlib import import_module
from itertools import groupby
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import yaml

import analysis_computation_profiler as profiler
import report
import transformer_KQV_300_M as script  # what the training scripts share
from analysis_computation_profiler import Variant
from common import SIZES, VARIANTS, InputError, Parser, show_what_the_terminal_can, write_text
from report import listed

RECORDED = ("variant", "train_data", "val_data", "init_from", "changes")  # in run.yaml and checkpoints
TABLES = {"300M": ["300M (Table 4)"], "1.2B": ["1.2B (Table 10)"]}
FIGURES = ("perplexity", "text_perplexity", "loss", "text_loss")  # of an evaluation
SHAPE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
GROUPED_BY = {*SHAPE, "n_kv_groups", "sequence", "score_padding", "seq_length"}  # into tables, or by variant
NOT_RECORDED = {  # what is said of runs that lack it
    "variant": "Variant taken from the folder's name",
    "train_data": "Training data known by path",
    "val_data": "Validation data known by path",
}


# -----------------------------------------------------------------------------
# Reading


def find_runs(paths):
    """The Runs in the folders named, or in the outputs_* of this one; InputError where there are none."""
    runs = []
    for path in paths or within(Path(), "outputs_*"):
        folders = [path] if is_run(path) else [folder for folder in within(path, "*") if is_run(folder)]
        if paths and not folders:
            raise InputError(f"{path}: no runs found, neither a metrics.jsonl nor a folder with one")
        runs += [Run(folder) for folder in folders]
    if not runs:
        what = "no folder outputs_* with a metrics.jsonl is here; name the runs' folders"
        raise InputError(f"no runs found: {what}")
    return runs


def within(folder, pattern):
    """What lies in a folder, without the runs that `--resume never` has put aside."""
    return sorted(path for path in folder.glob(pattern) if not path.match("*.old_[0-9]*"))


def is_run(folder):
    """Whether a training script has written here: there is its log, or a checkpoint whose log is gone."""
    return (folder / "metrics.jsonl").exists() or bool(script.checkpoints(folder))


class Run:
    """An output folder: variant, settings, how far the run got and what its evaluations came to."""

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
        """The evaluation after the last step; None if the run is incomplete."""
        for evaluation in self.evaluations:
            if evaluation["kind"] == "final" and evaluation["step"] == self.config.total_steps:
                return evaluation
        return None

    @cached_property
    def size(self):
        """300M or 1.2B where the model has that shape, else None."""
        for size in SIZES:
            if shape(self.variant.config) == shape(published_config(size)):
                return size
        return None

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
        """The title of its table, in parts: the shape, and the data protocol."""
        model = self.variant.config
        layers = f"{model.n_layer} layers, d {model.n_embd}, {model.n_head} heads"
        rest = f"{model.n_positions:,} positions, vocabulary {model.vocab_size:,}"
        described = [layers, f"feed-forward {model.n_inner:,}, {rest}"]
        sequence, _, padding = self.protocol.partition(", ")
        rows = f"{sequence} rows of {self.config.seq_length:,} tokens"
        return [*TABLES.get(self.size, described), f"{rows}, {padding}" if padding else rows]

    @cached_property
    def setup(self):
        """The settings that runs have in common if they differ in variant and seed alone.

        Leaves out what cannot change the result. In place of the data's paths stand its contents, where they
        are known; in place of its three factors, the global batch.
        """
        c = self.config
        left_out = GROUPED_BY | set(script.MAY_CHANGE) | {"seed"}
        settings = asdict(self.variant.config) | asdict(c)
        settings = {key: value for key, value in settings.items() if key not in left_out}
        for split in ("train_data", "val_data"):
            chunks = self.about.get(split)
            unknown = f"{getattr(c, split)}, contents not recorded"
            settings[split] = fingerprint(chunks) if chunks else unknown
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
    """What a run recorded of itself, in run.yaml or else in its newest readable checkpoint; {} without."""
    about = folder / "run.yaml"
    if about.exists():
        try:
            return dict(yaml.safe_load(about.read_text(encoding="utf-8")))
        except (TypeError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{about}: expected a YAML file of 'key: value' lines") from error
    for path in (*(path for _, path in script.checkpoints(folder)), folder / "final_model.pt"):
        with contextlib.suppress(Exception):  # a damaged file can fail in any way; the next may be whole
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
        variant = about.get("variant", "not recorded, nor told by this name")
        raise InputError(f"{folder}: unknown variant: {variant}")
    return names[name]


def read_metrics(path):
    """(the last step, the evaluations by rising step) of a metrics.jsonl.

    The log is only ever appended to. A kill can cut a line short, which is passed over; a resumed run logs
    the steps since its checkpoint again, and the last record of a step counts.
    """
    if not path.exists():
        raise InputError(f"{path}: missing, though checkpoints lie beside it")
    records = script.read_metrics(path)
    if path.stat().st_size and not records:
        what = "no line is a record with kind and step"
        raise InputError(f"{path}: not the metrics of a training script: {what}")

    last_step = 0
    evaluations = {}
    for record in records:
        step = number(record, "step", path)
        last_step = max(last_step, step)
        if record["kind"] != "train":
            wanted = ("step", "tokens", "padding_fraction", *FIGURES)
            evaluations[step] = {"kind": record["kind"]} | {key: number(record, key, path) for key in wanted}
    return last_step, [evaluations[step] for step in sorted(evaluations)]


def number(record, key, path):
    """A finite number from a record; InputError for anything else, or nothing."""
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
    """A short hash that stands for those of all files of a split, in their order."""
    return hashlib.sha256(json.dumps(chunks, sort_keys=True).encode()).hexdigest()[:12]


# -----------------------------------------------------------------------------
# Comparing


def compare(runs):
    """The tables: for each kind of run, its title, its rows, its runs and the notes below."""
    runs = sorted(runs, key=lambda run: (run.place, list(VARIANTS).index(run.alias), run.seed))
    return [table_of(list(here)) for _, here in groupby(runs, key=lambda run: run.place)]


def table_of(runs):
    """The table of runs of one shape and protocol."""
    rows = {}
    for run in runs:
        row = rows.setdefault((run.variant.paper, *run.setup.items()), [])
        refuse_twice(run, row)
        row.append(run)
    rows = list(rows.values())

    # Where QKV was trained in several ways, the one with the most seeds is compared with.
    of_qkv = [row for row in rows if row[0].alias == "kqv"]
    reference = max(of_qkv, key=lambda row: len(complete(row)), default=[])

    # The paper's tables are both of rows with the padding scored.
    size = runs[0].size
    published = "published" if size else "published at 300M"
    if not runs[0].as_published:
        published += ", padding scored"
    return {
        "title": runs[0].title,
        "size": size,
        "published": published,
        "rows": [row_record(row, reference, size or "300M") for row in rows],
        "notes": notes(rows, reference),
        "runs": runs,
    }


def refuse_twice(run, others):
    """InputError where a run of the same row has the same seed."""
    for other in others:
        if other.seed == run.seed:
            who = f"{run.variant.paper}, seed {run.seed}, same settings"
            raise InputError(f"{other.folder} and {run.folder}: the same run twice ({who}); name one of them")


def complete(row):
    """The seeds of the complete runs."""
    return [run.seed for run in row if run.final]


def row_record(row, reference, size):
    """A row of the table, unrounded: means over its complete runs, beside what was published at a size."""
    variant = row[0].variant
    cached = profiler.cache_account(variant, [])
    # GQA-2's figures are not those of GQA-4.
    as_published = variant.config.n_kv_groups == (variant.row["groups"] or {}).get(size)
    published = variant.row["published"] if as_published else {}
    record = {
        "variant": variant.paper + ("*" if differences(row, reference) else ""),
        "alias": variant.alias,
        "seeds": complete(row),
        "parameters": variant.parameters["total"],
        "cache_bytes_per_token": cached["bytes_per_token"],
        "cache_reduction_percent": cached["reduction_percent"],
        "published": published.get("perplexity", {}).get(size),
        "published_vs_qkv": published.get("perplexity_change", {}).get(size),
    }

    # A change is that of a seed, against QKV's run of the same seed.
    finals = {run.seed: run.final for run in row if run.final}
    of_qkv = {run.seed: run.final for run in reference if run.final}
    paired = [seed for seed in finals if seed in of_qkv and row is not reference]
    for key in FIGURES:
        changes = []
        for seed in paired:
            ours, qkv = finals[seed][key], of_qkv[seed][key]
            changes.append(100 * (ours / qkv - 1) if "perplexity" in key else ours - qkv)
        record |= mean(key, [final[key] for final in finals.values()])
        record |= mean(f"{key}_vs_qkv", changes)
    return record


def mean(name, values):
    """Fields for the mean, and for half of the range as its spread, which one value does not have."""
    spread = (max(values) - min(values)) / 2 if len(values) > 1 else None
    return {name: fmean(values) if values else None, f"{name}_spread": spread}


def differences(row, reference):
    """{setting: (QKV's value, the row's)} where the two differ."""
    if not reference:
        return {}
    ours, theirs = row[0].setup, reference[0].setup
    return {key: (theirs[key], value) for key, value in ours.items() if theirs[key] != value}


def notes(rows, reference):
    """Lines about what stands in the way of a comparison, and about what is not known."""
    seeds = complete(reference)
    lines = []
    if not seeds:
        lines.append("No complete run of QKV: nothing to compare with.")
    for row in rows:
        who = f"{row[0].variant.paper} ({folders(row)})"
        for key, (theirs, ours) in differences(row, reference).items():
            lines.append(f"* {who}: {key} is {ours}, and {theirs} for QKV")
        if seeds and complete(row) not in ([], seeds):
            lines.append(f"{who}: its complete seeds are {listed(complete(row))}, those of QKV {listed(seeds)}")
    runs = [run for row in rows for run in row]
    if runs[0].protocol == "padded, padding masked":
        lines.append(
            "The padding was masked in training, so a perplexity that includes it says nothing; "
            "the text perplexity does."
        )
    return lines + recorded_notes(runs)


def recorded_notes(runs):
    """Lines about what runs have not recorded, and about settings that changed while they ran."""
    lines = []
    for run in runs:
        if run.about.get("changes"):
            lines.append(f"{run.folder.name}: settings changed on the way: {listed(run.about['changes'])}.")
    for key, what in NOT_RECORDED.items():
        without = [run for run in runs if not run.about.get(key)]
        if without:
            lines.append(f"{what} alone: {'all runs' if without == runs else folders(without)}.")
    return lines


def folders(runs):
    return listed(run.folder.name for run in runs)


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
    """The text of a value, with its spread or its interval where it has one; empty for None."""
    value = record[key]
    if value is None:
        return ""
    if isinstance(value, list):
        return listed(f"{part:{pattern}}" for part in value)
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
    """A table of records by columns such as RESULTS, in one of tabulate's styles."""
    headers = [header for header, *_ in columns]
    rows = [[cell(record, *how) for _, *how in columns] for record in records]
    return report.grid(headers, rows, style)


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
    rows = []
    for table in tables:
        rows += [{"table": ", ".join(table["title"])} | record for record in table["rows"]]
    return report.sheet(rows)


def as_json(tables):
    """Everything, unrounded."""
    return report.as_json([table | {"runs": [run.record() for run in table["runs"]]} for table in tables])


FORMATS = {"table": as_text, "markdown": as_markdown, "csv": as_csv, "json": as_json}


# -----------------------------------------------------------------------------
# Plotting


def figure(path, titles, draw):
    """A PNG with a panel for each title; draw(axes) fills them."""
    figure, axes = report.panels(titles)
    for ax in axes:
        ax.title.set_fontsize("medium")
    draw(axes)
    report.save_figure(path, figure)


def table_figure(path, tables, draw):
    """A panel for each table, which draw(ax, table) fills."""

    def draw_all(axes):
        for ax, table in zip(axes, tables, strict=True):
            draw(ax, table)

    figure(path, ["\n".join(table["title"]) for table in tables], draw_all)


def curves(ax, table):
    """Validation loss of the text against tokens, a line for each run; the untrained model is left out."""
    named = set()
    for run in table["runs"]:
        colour, marker = report.LOOKS[run.alias]
        points = [(e["tokens"] / 1e6, e["text_loss"]) for e in run.evaluations if e["step"]]
        name = run.variant.paper
        look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1}
        ax.plot(*np.reshape(points, (-1, 2)).T, label=None if name in named else name, **look)
        named.add(name)
    ax.set_xlabel("training tokens, millions, padding included")
    ax.set_ylabel("validation loss of the text, nats per token")
    ax.legend(frameon=False)


def pareto(ax, table):
    """Text loss beyond QKV's against a token's KV cache, with a line through the Pareto front."""
    points = []
    for row in table["rows"]:
        if row["text_loss_vs_qkv"] is not None or row["variant"] == "QKV":
            points.append((row["cache_bytes_per_token"], row["text_loss_vs_qkv"] or 0.0, row))
    front = report.pareto_front((size, loss) for size, loss, _ in points)
    ax.plot(*zip(*front, strict=True), color="0.7", zorder=1)
    for size, loss, row in points:
        colour, marker = report.LOOKS[row["alias"]]
        look = {"color": colour, "marker": marker, "markersize": 8, "capsize": 3}
        ax.errorbar(size, loss, row["text_loss_vs_qkv_spread"], **look)
        ax.annotate(row["variant"], (size, loss), (7, 5), textcoords="offset points")
    sizes = sorted({size for size, *_ in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    ax.minorticks_off()
    ax.margins(x=0.15, y=0.1)
    ax.set_xlabel("KV cache in bf16, bytes per token")
    ax.set_ylabel("text loss beyond QKV's, nats per token")


# -----------------------------------------------------------------------------
# Command line


def write_texts(folder, name, what, forms):
    """What was found, as <name>.md and <name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.md", forms["markdown"](what))
    write_text(folder / f"{name}.json", forms["json"](what))


def write_all(folder, tables):
    write_texts(folder, "results_table", tables, FORMATS)
    table_figure(folder / "validation_curves.png", tables, curves)
    compared = [t for t in tables if any(row["text_loss_vs_qkv"] is not None for row in t["rows"])]
    if compared:
        table_figure(folder / "pareto.png", compared, pareto)


def command_line(file, description, report, forms, write, arguments):
    """The command of a script: read the runs in the folders named, report on them, write files, and print."""
    show_what_the_terminal_can()
    parser = Parser(file, description)
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
