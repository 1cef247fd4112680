"""Output folders of training runs -> the paper's Tables 4 and 10, over seeds, and the figures.

    python results_table.py                      # the outputs_* folders here: a table for each kind of run
    python results_table.py outputs_kqv outputs_gqa --format markdown
    python results_table.py results/reduced_scale            # its runs.jsonl, which runs/gather.py wrote

A table holds runs of one shape and one data protocol; a row of it, those of one variant that differ in the
seed alone. A row marked * was trained with other settings than QKV, which the lines below the table name.

    perplexity        of the final evaluation, over all positions, padding included: the paper's protocol. A
                      model that was trained with the padding masked never learned to predict padding; for it
                      this figure means nothing
    text perplexity   over the tokens of the documents alone
    ±                 half of the range over the seeds, beside their mean
    vs QKV            from runs of the same seed, which read the same data in the same order

Incomplete runs are listed below the table and enter no mean. --output_dir writes results_table.md,
results_table.json and figures/. For runs over sizes, tokens and learning rates, see runs/scaling_tables.py.
"""

import json
import math
import operator
from dataclasses import asdict
from functools import cache, cached_property, partial
from itertools import groupby
from pathlib import Path

import numpy as np
import yaml

import report
from analysis_computation_profiler import Variant, cache_account, change
from common import SIZES, VARIANTS, InputError, Parser, first_line, script_of, show_what_the_terminal_can
from report import listed

IDENTITY = ("variant", "init_from", "training text", "validation text", "tokenizer")  # of run.yaml
TABLES = {"300M": "300M (Table 4)", "1.2B": "1.2B (Table 10)"}
FIGURES = ("perplexity", "text_perplexity", "loss", "text_loss")  # of an evaluation
SHAPE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
GROUPED_BY = {*SHAPE, "n_kv_groups", "sequence", "score_padding", "seq_length", "seed"}  # tables and rows


def find_runs(paths):
    """The Runs in what is named, or in the outputs_* folders here; InputError where there are none."""
    runs = []
    for path in paths or sorted(Path().glob("outputs_*")):
        found = [Run(record) for record in read_runs(path)]
        if paths and not found:
            raise InputError(f"{path}: no runs found, neither a runs.jsonl nor a metrics.jsonl")
        runs += found
    if not runs:
        raise InputError("no runs found: here is no folder outputs_* with a metrics.jsonl; name the folders")
    return runs


def read_runs(path):
    """The records of a runs.jsonl, of the one in a folder, or of the folder's training runs."""
    path = Path(path)
    if path.is_file() or (path / "runs.jsonl").exists():
        file = path if path.is_file() else path / "runs.jsonl"
        try:
            return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise InputError(f"{file}: not what runs/gather.py writes: {error}") from error
    folders = path, *sorted(path.glob("*"))
    return [read_run(folder) for folder in folders if (folder / "metrics.jsonl").exists()]


def read_run(folder):
    """The record of an output folder, as a line of runs.jsonl holds it.

    That is its name, what run.yaml says of weights and data, all settings, and the log.
    """
    try:
        about = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
        record = {"name": folder.resolve().name} | {key: about[key] for key in IDENTITY}
        own = script_of(alias_of(record))
        for key, cls in (("model_config", own.ModelConfig), ("train_config", own.TrainingConfig)):
            record[key] = asdict(own.load_config(cls, folder / f"{key}.yaml", {}))
        record["metrics"] = own.read_metrics(folder / "metrics.jsonl")
    except (OSError, TypeError, LookupError, ValueError, yaml.YAMLError) as error:
        what = f"{error} is missing" if isinstance(error, LookupError) else first_line(error)
        raise InputError(f"{folder}: not the output of a training script: {what}") from error
    return record


class Run:
    """A run: variant, settings, how far it got and what its evaluations came to.

    Where the log has several records of a step, the last one counts.
    """

    def __init__(self, record):
        self.name, self.about = record["name"], record
        self.alias = alias_of(record)
        script = script_of(self.alias)
        evaluations, self.step = {}, 0
        try:
            model = script.ModelConfig(**record["model_config"])
            self.config = script.TrainingConfig(**record["train_config"])
            for entry in record["metrics"]:
                self.step = max(self.step, entry["step"])
                if entry["kind"] != "train":
                    if not all(math.isfinite(entry[key]) for key in FIGURES):
                        raise ValueError(f"step {entry['step']} has figures that are no numbers")
                    evaluations[entry["step"]] = entry
        except (TypeError, LookupError, ValueError) as error:
            raise InputError(f"{self.name}: not a record of a training run: {error}") from error
        self.variant = Variant(self.alias, "300M", **asdict(model))
        self.seed = self.config.seed
        self.evaluations = [evaluations[step] for step in sorted(evaluations)]

    @cached_property
    def final(self):
        """The evaluation after the last step; None if the run is incomplete."""
        end = "final", self.config.total_steps
        return next((entry for entry in self.evaluations if (entry["kind"], entry["step"]) == end), None)

    @cached_property
    def size(self):
        """300M or 1.2B where the model has that shape, else None."""
        own = shape(self.variant.config)
        return next((size for size in SIZES if own == shape(published_config(size))), None)

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
        m = self.variant.config
        described = [
            f"{m.n_layer} layers, d {m.n_embd}, {m.n_head} heads",
            f"feed-forward {m.n_inner:,}, {m.n_positions:,} positions, vocabulary {m.vocab_size:,}",
        ]
        sequence, *padding = self.protocol.split(", ")
        rows = ", ".join([f"{sequence} rows of {self.config.seq_length:,} tokens", *padding])
        return [*([TABLES[self.size]] if self.size else described), rows]

    @cached_property
    def setup(self):
        """The settings that runs have in common if they differ in variant and seed alone.

        Leaves out what cannot change the result. In place of the data's paths stand the hashes of its
        contents; in place of its three factors, the global batch.
        """
        c = self.config
        left_out = GROUPED_BY | set(script_of("kqv").MAY_CHANGE)
        settings = asdict(self.variant.config) | asdict(c)
        return {key: value for key, value in settings.items() if key not in left_out} | {
            "train_data": self.about["training text"],
            "val_data": self.about["validation text"],
            "init_from": self.about["init_from"],
            "rows a step": c.rows_per_step,
            "rows evaluated": c.eval_batches * c.micro_batch_size if c.eval_batches else "all",
        }

    def record(self):
        """The run in the JSON."""
        evaluated = self.evaluations[-1] if self.evaluations else {}
        return {
            "folder": self.name,
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


def alias_of(record):
    """The alias of the variant that a record names as the scripts' files do."""
    for alias, row in VARIANTS.items():
        if row["script"]["300M"] == f"transformer_{record['variant']}_300_M.py":
            return alias
    raise InputError(f"{record['name']}: unknown variant: {record['variant']}")


@cache
def published_config(size):
    return Variant("kqv", size).config


def shape(model):
    return [getattr(model, key) for key in SHAPE]


def compare(runs):
    """The tables: for each kind of run, its title, its rows, its runs and the notes below."""
    runs = sorted(runs, key=lambda run: (run.place, list(VARIANTS).index(run.alias), run.seed))
    return [table_of(list(here)) for _, here in groupby(runs, key=lambda run: run.place)]


def table_of(runs):
    """The table of runs of one shape and protocol."""
    rows = {}
    for run in runs:
        row = rows.setdefault((run.variant.paper, *run.setup.items()), [])
        if row and row[-1].seed == run.seed:
            who = f"{run.variant.paper}, seed {run.seed}, same settings"
            raise InputError(f"{row[-1].name} and {run.name}: the same run twice ({who}); name one of them")
        row.append(run)
    rows = list(rows.values())

    # Where QKV was trained in several ways, the one with the most seeds is compared with.
    of_qkv = [row for row in rows if row[0].alias == "kqv"]
    reference = max(of_qkv, key=lambda row: len(complete(row)), default=[])
    size = runs[0].size
    return {
        "title": runs[0].title,
        "size": size,
        # The paper's tables are both of rows with the padding scored.
        "published": "published" + " at 300M" * (not size) + ", padding scored" * (not runs[0].as_published),
        "rows": [row_record(row, reference, size or "300M") for row in rows],
        "notes": notes(rows, reference),
        "runs": runs,
    }


def complete(row):
    """The seeds of the complete runs."""
    return [run.seed for run in row if run.final]


def row_record(row, reference, size):
    """A row of the table, unrounded: means over its complete runs, beside what was published at a size."""
    variant = row[0].variant
    cached = cache_account(variant, [])
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
    pairs = [(finals[seed], of_qkv[seed]) for seed in finals if seed in of_qkv and row is not reference]
    for key in FIGURES:
        beyond = change if "perplexity" in key else operator.sub
        record |= report.mean(key, [final[key] for final in finals.values()])
        record |= report.mean(f"{key}_vs_qkv", [beyond(own[key], qkv[key]) for own, qkv in pairs])
    return record


def differences(row, reference):
    """{setting: (QKV's value, the row's)} where the two differ."""
    if not reference:
        return {}
    ours, theirs = row[0].setup, reference[0].setup
    return {key: (theirs[key], value) for key, value in ours.items() if theirs[key] != value}


def notes(rows, reference):
    """Lines about what stands in the way of a comparison, and about what is not known."""
    seeds = complete(reference)
    lines = [] if seeds else ["No complete run of QKV: nothing to compare with."]
    for row in rows:
        who, own = f"{row[0].variant.paper} ({listed(run.name for run in row)})", complete(row)
        for key, (theirs, ours) in differences(row, reference).items():
            lines.append(f"* {who}: {key} is {ours}, and {theirs} for QKV")
        if seeds and own not in ([], seeds):
            lines.append(f"{who}: its complete seeds are {listed(own)}, those of QKV {listed(seeds)}")
    if rows[0][0].protocol == "padded, padding masked":
        masked = "The padding was masked in training, so a perplexity that includes it says nothing"
        lines.append(f"{masked}; the text perplexity does.")
    return lines


RESULTS = [  # columns as report.table takes them
    ("", "variant"), ("seeds", "seeds"),
    ("perplexity", "perplexity", ".3f"), ("vs QKV", "perplexity_vs_qkv", "+.2f", " %"),
    ("{published}", "published", "g"), ("vs QKV", "published_vs_qkv", "+g", " %"),
    ("text perplexity", "text_perplexity", ".3f"), ("vs QKV", "text_perplexity_vs_qkv", "+.2f", " %"),
    ("parameters", "parameters", ","), ("cache, bytes a token", "cache_bytes_per_token", ","),
    ("saved", "cache_reduction_percent", ".1f", " %"),
]  # fmt: skip
INCOMPLETE = [
    ("incomplete", "variant"), ("seed", "seed"), ("step", "step", ","), ("of", "steps", ","),
    ("evaluated at", "evaluated_at", ","), ("perplexity", "perplexity", ".3f"),
    ("text perplexity", "text_perplexity", ".3f"), ("folder", "folder"),
]  # fmt: skip


def document(tables, heading, style, bullet):
    """Title, rows, incomplete runs and notes of every table."""
    texts = []
    for table in tables:
        texts.append(heading + ", ".join(table["title"]))
        columns = [(header.format(published=table["published"]), *how) for header, *how in RESULTS]
        texts.append(report.table(columns, table["rows"], style))
        incomplete = [run.record() for run in table["runs"] if not run.final]
        if incomplete:
            texts.append(report.table(INCOMPLETE, incomplete, style))
        if table["notes"]:
            texts.append("\n".join(bullet + line for line in table["notes"]))
    return "\n\n".join(texts) + "\n"


def as_text(tables):
    return document(tables, "", "plain", "")


def as_markdown(tables):
    return document(tables, "### ", "pipe", "- ").replace("*", "\\*")  # a mark, no emphasis


def as_csv(tables):
    """The rows of all tables, unrounded; `table` says which one a row belongs to."""
    return report.sheet([{"table": ", ".join(t["title"])} | row for t in tables for row in t["rows"]])


def as_json(tables):
    """Everything, unrounded."""
    return report.as_json([table | {"runs": [run.record() for run in table["runs"]]} for table in tables])


FORMATS = {"table": as_text, "markdown": as_markdown, "csv": as_csv, "json": as_json}


def curves(ax, table):
    """Validation loss of the text against tokens, a line for each run; the untrained model is left out."""
    unnamed = {run.variant.paper: run.variant.paper for run in table["runs"]}
    for run in table["runs"]:
        colour, marker = report.LOOKS[run.alias]
        points = [(e["tokens"] / 1e6, e["text_loss"]) for e in run.evaluations if e["step"]]
        look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1}
        ax.plot(*np.reshape(points, (-1, 2)).T, label=unnamed.pop(run.variant.paper, None), **look)
    ax.set_xlabel("training tokens, millions, padding included")
    ax.set_ylabel("validation loss of the text, nats per token")
    ax.legend(frameon=False)


def pareto(ax, table):
    """Text loss beyond QKV's against a token's KV cache, and a line through what no other beats in both."""
    key = "text_loss_vs_qkv"
    rows = [row | {key: row[key] or 0.0} for row in table["rows"] if row[key] is not None or row["variant"] == "QKV"]
    front = []
    for size, loss in sorted((row["cache_bytes_per_token"], row[key]) for row in rows):
        if not front or loss < front[-1][1]:
            front.append((size, loss))
    ax.plot(*zip(*front, strict=True), color="0.7", zorder=1)
    for row in rows:
        (colour, marker), place = report.LOOKS[row["alias"]], (row["cache_bytes_per_token"], row[key])
        ax.errorbar(*place, row[f"{key}_spread"], color=colour, marker=marker, markersize=8, capsize=3)
        ax.annotate(row["variant"], place, (7, 5), textcoords="offset points")
    sizes = sorted({row["cache_bytes_per_token"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    ax.minorticks_off()
    ax.margins(x=0.15, y=0.1)
    ax.set_xlabel("KV cache in bf16, bytes per token")
    ax.set_ylabel("text loss beyond QKV's, nats per token")


def write_all(folder, tables):
    figures = report.write_texts(folder, "results_table", as_markdown(tables), as_json(tables))
    compared = [t for t in tables if any(row["text_loss_vs_qkv"] is not None for row in t["rows"])]
    for name, fill, shown in (("validation_curves", curves, tables), ("pareto", pareto, compared)):
        if shown:
            panels = [("\n".join(table["title"]), partial(fill, table=table)) for table in shown]
            report.draw(figures / f"{name}.png", panels)


def main(arguments=None):
    show_what_the_terminal_can()
    parser = Parser(__file__, __doc__)
    names = "runs.jsonl, output folders of runs, or folders of them"
    parser.add_argument("runs", nargs="*", type=Path, help=names)
    parser.add_argument("--format", choices=FORMATS, default="table", help="of what is printed")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="write tables and figures there")
    options = parser.parse_args(arguments)
    try:
        tables = compare(find_runs(options.runs))
        if options.output_dir:
            write_all(options.output_dir, tables)
    except (InputError, OSError) as error:
        parser.error(error)
    print(FORMATS[options.format](tables), end="")


if __name__ == "__main__":
    main()
