"""The study of conversion: its schedule, tables of made-up runs, other ways of conversion."""

import json
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, script_of
from test_convert import PAIRS, build, logits_of, random_loader, save, tie_values
from test_results_table import evaluation, write_folder

sys.path.insert(0, str(ROOT / "runs"))
import conversion
import conversion_tables
import one_shot

import convert_checkpoint as cc
from common import VARIANTS
from results_table import read_runs

DEFAULT = one_shot.DEFAULT
STEPS = {"d64_n5": 480, "d64_n20": 1920, "d64_n80": 7680, "d96_n5": 1620, "d96_n20": 6480, "d128_n5": 3840}


def record(name, losses, text="1"):
    """What runs.jsonl holds of a run whose evaluations gave these text losses, as far as the study reads it."""
    metrics = [{"kind": "train", "step": 1, "tokens": 1024, "loss": 9.0}]
    for i, loss in enumerate(losses):
        kind = "final" if i == len(losses) - 1 else "val"
        metrics.append({"kind": kind, "step": 100 * i, "tokens": 102_400 * i, "text_loss": loss})
    return {"name": name, "training text": text, "metrics": metrics}


def write(folder, records, name="runs.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in records), encoding="utf-8")


def test_tables_hold_prices_gaps_and_intervals(tmp_path):
    """t with two degrees of freedom: 0.01, 0.02, 0.03 are 0.02 ± 4.303 x 0.01 / sqrt(3)."""
    scaling, results = tmp_path / "scaling", tmp_path / "conversion"
    runs, lines = [], []
    for seed, price in [(42, 0.01), (43, 0.02), (44, 0.03)]:
        for name, losses in {
            "kqv_d64_n80_lr8e-3_T256_packed": [5.0, 2.0],
            "kqv_d64_n80_lr16e-3_T256_packed": [5.0, 2.5],
            "kv_d64_n80_lr4e-3_T256_packed": [5.0, 2.1],
            "kv_d64_n80_lr8e-3_T256_packed": [5.0, 2.2],
            "kqv_d64_n80_at100_none_10": [2.0, 1.9],
            "kqv_d64_n80_at100_joint_svd_10": [2.05, 1.9 + price],
            "kqv_d64_n80_at50_none_0": [2.5, 2.05],
            "kqv_d64_n80_at50_joint_svd_0": [2.5, 2.09 - price],
        }.items():
            runs.append(record(f"{name}_seed{seed}", losses))
        for rate, step in ((8, 70), (8, 100), (16, 100)):
            place = {"source": f"kqv_d64_n80_lr{rate}e-3_T256_packed_seed{seed}"}
            place |= {"checkpoint": f"checkpoint_step_{step}.pt", "way": DEFAULT}
            lines.append(place | {"before": 2.0, "after": 2.0 + price * step / 100 * rate / 8})
    # No other protocol counts, no unfinished run, and no seed that was not run at every rate.
    runs += [record("kqv_d64_n80_lr2e-3_T256_scored_seed42", [5.0, 0.1])]
    runs += [record("kqv_d64_n80_lr0.5e-3_T256_packed_seed42", [0.1, 0.1])]
    runs[-1]["metrics"].pop()
    runs += [record("kqv_d64_n80_lr16e-3_T256_packed_seed45", [5.0, 0.1])]
    write(scaling, [run for run in runs if "_lr" in run["name"]])
    write(results, [run for run in runs if "_at" in run["name"]])
    write(results, lines, "one_shot.jsonl")
    conversion_tables.main(["--scaling", str(scaling), "--results", str(results)])
    text = (results / "results.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    alone = sections["Conversion alone"]
    assert "+0.02000 ± 0.02484" in alone and "+0.1000 ± 0.0000" in alone
    assert "| 70 " in sections["Conversion alone, along the training"]
    half, row = sections["Converted and trained on"].splitlines()[-2:]
    ahead = [cell.strip() for cell in half.strip("|").split("|")][-2:]
    assert ahead == ["+0.0300 ± 0.0248", "+0.0200, +0.0300, +0.0400"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "QKV", "d64", "80", "at the end", "10 %", "joint_svd", "+0.0500 ± 0.0000", "+0.0200 ± 0.0248",
        "+0.0100, +0.0200, +0.0300", "+0.1000 ± 0.0000", "", "",
    ]  # fmt: skip
    assert (results / "figures/conversion.png").stat().st_size > 10_000


# ---- other ways


@pytest.mark.parametrize(("alias", "to"), PAIRS)
@pytest.mark.parametrize("way", one_shot.WAYS, ids=lambda way: " ".join(map(str, way.values())))
def test_every_way_is_exact_where_it_can_be(alias, to, way):
    """Values that are functions of the keys; the plain ways do not find that out."""
    model = build(alias, initializer_range=0.1)
    tie_values(model)
    expected = logits_of(model)
    config = cc.target_config(alias, model.config, to, None)
    weights, *_ = one_shot.convert(model, to, config, random_loader(), 400, way["method"], way["weighting"])
    target = getattr(script_of(to), VARIANTS[to]["class"])(config).eval()
    target.load_state_dict(weights)
    exact = (logits_of(target) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert exact == way["method"].startswith("joint_svd")


def test_one_shot_goes_on_where_it_stopped(data_dir, tmp_path):
    folder, file = tmp_path / "kqv_d64_n80_lr8e-3_T256_packed_seed42", tmp_path / "one_shot.jsonl"
    folder.mkdir()
    path = save("kqv", build("kqv", initializer_range=0.1), folder / "checkpoint_step_7680.pt")
    ways = [DEFAULT | {"tokens": 500}, DEFAULT | {"method": "mean"}, DEFAULT | {"weighting": "none", "tokens": 500}]
    for so_far in (1, 2, 3, 3):
        one_shot.one_shot(path, data_dir, ways[:so_far], file)
        lines = one_shot.read_one_shots(file)
        assert [line["way"] for line in lines] == ways[:so_far]
    script = script_of("kqv")
    loader = script.get_dataloader(data_dir / "validation", 4, 32, "packed")
    expected = script.evaluate(script.load_model(path), loader)["text_loss"]
    assert lines[0]["before"] == pytest.approx(expected, rel=1e-6)
    assert lines[0]["after"] != lines[0]["before"]


# ---- the schedule


class House:
    """An empty working folder, with runs of scaling on record, where commands only leave what they would."""

    def __init__(self, folder):
        self.folder, self.calls, self.failing, self.status = folder, [], "^$", 0
        names = [f"{alias}_{shape}_lr8e-3_T256_packed" for alias in ("kqv", "kv") for shape in STEPS]
        write(folder / "scaling", [record(f"{name}_seed{seed}", [5.0, 2.0]) for name in names for seed in (42, 43, 44)])
        for shape, seed in [(shape, seed) for shape in STEPS for seed in (42, 43, 44)]:
            source = folder / f"outputs_scaling/kqv_{shape}_lr8e-3_T256_packed_seed{seed}"
            source.mkdir(parents=True)
            for tenths in range(1, 11):
                (source / f"checkpoint_step_{STEPS[shape] // 10 * tenths}.pt").touch()

    def call(self, command, **options):
        """Stands in for subprocess.call."""
        words = [str(word) for word in command[1:]]
        self.calls.append(words)
        if re.search(self.failing, shlex.join(words)):
            return self.status
        if "--output" in words:
            Path(words[words.index("--output") + 1]).touch()
        if Path(words[0]).name.startswith("transformer_"):
            self.train(words)
        return 0

    def train(self, words):
        script = sys.modules[Path(words[0]).stem]
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        settings = {key: yaml.safe_load(value) for key, value in settings.items()}
        settings = {k: float(v) if isinstance(v, str) else v for k, v in settings.items()}  # 8e-3, to YAML a string
        path = {name: words[words.index(f"--{name}") + 1] for name in ("model_config", "train_config", "output_dir")}
        model = script.load_config(script.ModelConfig, path["model_config"], settings)
        config = script.load_config(script.TrainingConfig, path["train_config"], settings)
        assert config.tokens_per_step == 1024
        final = evaluation(config.total_steps, 7.4, 7.4, "final") | {"tokens": config.target_tokens}
        about = {"variant": script.VARIANT, "init_from": None, "training text": "1", "validation text": "2"}
        about |= {"tokenizer": "bytes"}
        to = write_folder(Path(path["output_dir"]), asdict(model), asdict(config), about, [final])
        for tenths in range(1, 11):
            (to / f"checkpoint_step_{config.total_steps // 10 * tenths}.pt").touch()

    def run(self, *parts):
        """The exit status of the study, and its commands since the last time."""
        self.calls = []
        where = ["--scaling", str(self.folder / "scaling"), "--results", str(self.folder / "conversion")]
        with pytest.raises(SystemExit) as ended:
            conversion.main([*where, "--parts", *map(str, parts)])
        return ended.value.code, self.calls

    def trained(self):
        """{name of the run: its command}."""
        runs = [call for call in self.calls if Path(call[0]).name.startswith("transformer_")]
        return {Path(call[call.index("--output_dir") + 1]).name: call for call in runs}


@pytest.fixture
def house(tmp_path, monkeypatch):
    house = House(tmp_path)
    for alias in conversion.VARIANTS:
        script_of(alias)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conversion.subprocess, "call", house.call)
    monkeypatch.setattr(conversion, "text_of", lambda folder: "1")
    monkeypatch.setattr(conversion_tables, "write_all", lambda scaling, results: None)
    return house


def test_every_run_is_one_that_its_training_script_takes_and_the_tables_know(house):
    status, calls = house.run(1, 2, 3, 4, 5, 6, 7, 8)
    assert status == 0
    runs = house.trained()
    assert len(runs) == 42 + 46 + 28 + 20 + 22 + 12  # as in results/conversion/PLAN.md, where two runs join part 3
    known = (conversion_tables.FROM_THE_START, conversion_tables.TRAINED_ON)
    assert all(any(pattern.fullmatch(name) for pattern in known) for name in runs)

    # What is converted is a checkpoint that a run of that length leaves, and its training goes on from it.
    steps = {"d64_n80": 7680, "d96_n60": 19440, "dreplica_n1": 1500}
    converted = [call for call in calls if "--checkpoint" in call]
    assert len(converted) == sum("_at" in name and "_none_" not in name for name in runs)
    for call in converted:
        output = call[call.index("--output") + 1]
        name = Path(output).name.removesuffix(".initial.pt")
        assert runs[name][runs[name].index("--init_from") + 1] == output
        shape, tenths = re.match(r"\w+?_(d\w+_n\d+)_at(\d+)0_", name).groups()
        step = steps[shape] * int(tenths) // 10
        assert call[call.index("--checkpoint") + 1].endswith(f"/checkpoint_step_{step}.pt")
    assert {record["name"] for record in read_runs(house.folder / "conversion")} == set(runs)


def test_training_goes_on_at_the_rate_of_the_schedule(house):
    """At half and at a tenth: what a run of the whole length with a peak of 8e-3 has there."""
    house.run(2)
    script = script_of("kqv")
    common = yaml.safe_load((ROOT / "configs/train_config_scaling.yaml").read_text(encoding="utf-8"))
    source = {"target_tokens": 7_864_320, "warmup_steps": 768, "learning_rate": 8e-3, "min_lr": 8e-4}
    for at, step in ((50, 3840), (10, 768)):
        words = house.trained()[f"kqv_d64_n80_at{at}_none_0_seed42"]
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        expected = script.get_lr(step, script.TrainingConfig(**common | source))
        assert float(settings["learning_rate"]) == pytest.approx(expected, rel=1e-5)
        assert int(settings["target_tokens"]) == 1024 * (7680 - step)
        assert float(settings["min_lr"]) == pytest.approx(8e-4)


def test_what_is_done_is_not_repeated_and_what_failed_is_tried_again(house, capsys):
    house.failing, house.status = "output_dir outputs_conversion/kqv_d64_n80_at50_joint_svd_0_seed43", 2
    status, _ = house.run(2)
    assert status == 1 and "kqv_d64_n80_at50_joint_svd_0_seed43" in capsys.readouterr().err
    assert len(house.trained()) == 42
    house.failing, house.status = "output_dir", -15  # a stop stops all
    assert house.run(2)[0] == 2
    house.failing = "^$"
    status, calls = house.run(2)
    assert status == 0 and list(house.trained()) == ["kqv_d64_n80_at50_joint_svd_0_seed43"]
    assert not [call for call in calls if "--checkpoint" in call]  # that was done


def test_without_checkpoints_or_with_another_text_nothing_is_trained(house, monkeypatch, capsys):
    (house.folder / "outputs_scaling").rename(house.folder / "elsewhere")
    for says in ("SCALING=results/scaling_own", "keep these apart with RESULTS="):
        status, _ = house.run(2)
        error = capsys.readouterr().err
        assert status == 2 and not house.trained()
        assert says in error and error.count("\n") == 1
        monkeypatch.setattr(conversion, "text_of", lambda folder: "other")
