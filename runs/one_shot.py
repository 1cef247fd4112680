"""Conversion alone, by the default or in all WAYS of other_conversions.py: losses before and after.

    python runs/one_shot.py outputs_scaling/RUN/checkpoint_step_7680.pt --data scaling_data --all \\
        --record results/conversion/one_shot.jsonl

The record has a line for each conversion; what stands there is not computed again.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from other_conversions import DEFAULT, WAYS, convert

import convert_checkpoint as cc
from common import Parser, script_of

SHARED = {"kqv": "kv", "gqa": "qgqa", "mqa": "qmqa"}


def read_one_shots(path):
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def missing(checkpoint, ways, record_path):
    """Those of the ways in which a checkpoint has not been converted yet."""
    place = {"source": checkpoint.parent.name, "checkpoint": checkpoint.name}
    done = [record["way"] for record in read_one_shots(record_path) if record.items() >= place.items()]
    return [way for way in ways if way not in done]


def one_shot(checkpoint, data, ways, record_path):
    """Convert a checkpoint in each of the ways that are missing, and add a line for each to the record."""
    alias, contents, model = cc.read_source(checkpoint)
    to, script = SHARED[alias], script_of(alias)
    config = cc.target_config(alias, model.config, to, None)
    val_loader = cc.open_data(data / "validation", contents, config, batch_tokens=4096)
    before = script.evaluate(model, val_loader)["text_loss"]
    for way in missing(checkpoint, ways, record_path):
        loader = cc.open_data(data / "train", contents, config, seed=42)
        how = loader, way["tokens"], way["method"], way["weighting"]
        target = getattr(script_of(to), cc.VARIANTS[to]["class"])(config)
        target.load_state_dict(convert(script.load_model(checkpoint), to, config, *how)[0])
        after = script_of(to).evaluate(target.eval(), val_loader)["text_loss"]
        place = {"source": checkpoint.parent.name, "checkpoint": checkpoint.name}
        with open(record_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(place | {"way": way, "before": before, "after": after}) + "\n")
        print(f"{checkpoint}: {way}: {after - before:+.5f} nats")


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--all", action="store_true", help="in all ways, not by the default alone")
    parser.add_argument("--record", type=Path, required=True, metavar="one_shot.jsonl")
    options = parser.parse_args(arguments)
    one_shot(options.checkpoint, options.data, [DEFAULT, *(WAYS if options.all else [])], options.record)


if __name__ == "__main__":
    main()
