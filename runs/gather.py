"""Finished runs of outputs_* folders -> runs.jsonl and runs.csv of a study.

    python runs/gather.py outputs_scaling --to results/scaling
    python runs/gather.py --to results/scaling --text scaling_data     # before anything is trained

A line of runs.jsonl holds a run's name, variant, initial weights, hashes of its data, settings and log, and
what convert_checkpoint.py printed of it; runs.csv has a row a run, for reading. A run of the same name is
replaced. Runs on another text are refused, since they would not belong to the same grid: --text asks for that
beforehand.
"""

import hashlib
import json
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import InputError, Parser, write_text
from report import sheet
from results_table import Run, read_run, read_runs


def refuse_another_text(texts, recorded, results):
    """InputError where runs are recorded and a text is none of theirs."""
    known = {record["training text"] for record in recorded}
    others = sorted(set(texts) - known)
    if known and others:
        texts = f"({', '.join(sorted(known))}) than is prepared here ({', '.join(others)})"
        apart = f"keep these apart with RESULTS={results}_own"
        raise InputError(f"{results} holds runs on other text {texts}; {apart}")


def text_of(data):
    """The hash that run.yaml keeps of a prepared split."""
    chunks = json.loads((data / "train/metadata.json").read_text(encoding="utf-8"))["chunks"]
    return hashlib.sha256(json.dumps(chunks, sort_keys=True).encode()).hexdigest()[:12]


def finished(outputs):
    """The records of the complete runs among the folders in `outputs`."""
    for log in sorted(outputs.glob("*/metrics.jsonl")):
        if '"final"' in log.read_text(encoding="utf-8"):
            yield finished_run(log.parent.resolve())


@cache
def finished_run(folder):
    """Its record, with what convert_checkpoint.py printed of it, if it was converted."""
    conversion = folder / "conversion.txt"
    converted = {"conversion": conversion.read_text(encoding="utf-8")} if conversion.exists() else {}
    return read_run(folder) | converted


def gather(found, results):
    """Add records to a study's files, in place of those of the same name."""
    runs = {record["name"]: record for record in [*read_runs(results), *found]}
    runs = [runs[name] for name in sorted(runs)]
    lines = [json.dumps(run, ensure_ascii=False, separators=(",", ":")) + "\n" for run in runs]
    results.mkdir(parents=True, exist_ok=True)
    write_text(results / "runs.jsonl", "".join(lines))
    write_text(results / "runs.csv", sheet([row(Run(run)) for run in runs]))


def row(run):
    """What a reader looks for first."""
    model, c, final = run.variant.config, run.config, run.final or {}
    return {
        "name": run.name,
        "variant": run.variant.paper,
        "layers": model.n_layer,
        "width": model.n_embd,
        "heads": model.n_head,
        "tokens": c.total_steps * c.tokens_per_step,
        "row": c.seq_length,
        "protocol": run.protocol,
        "learning_rate": c.learning_rate,
        "seed": run.seed,
        **{key: round(final[key], 5) for key in ("text_loss", "text_perplexity", "perplexity") if final},
    }


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    parser.add_argument("outputs", nargs="*", type=Path, metavar="DIR", help="folders of output folders")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="the study's folder")
    parser.add_argument("--text", type=Path, metavar="DIR", help="data whose text the study has to have")
    options = parser.parse_args(arguments)
    try:
        found = [record for outputs in options.outputs for record in finished(outputs)]
        texts = [record["training text"] for record in found]
        texts += [text_of(options.text)] if options.text else []
        refuse_another_text(texts, read_runs(options.to), options.to)
        if options.outputs:
            gather(found, options.to)
    except (InputError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
