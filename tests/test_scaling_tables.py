"""runs/scaling_tables.py on made-up runs whose gaps and slopes are known, with numpy's least squares beside it."""

import json
import math
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, VARIANTS, script_of
from test_results_table import read, write_folder

sys.path.insert(0, str(ROOT / "runs"))
import scaling_tables

import results_table
from common import InputError
from results_table import Run, find_runs, read_runs

DATA = {"training text": "1", "validation text": "2", "tokenizer": "bytes"}
RATES = (0.002, 0.004, 0.008)
BEST = {"kqv": 0.004, "kv": 0.008}  # what the made-up runs are best at
PARAMETERS = {64: 98_304, 96: 331_776, 128: 786_432}


def write_run(folder, alias, loss, width=64, per_parameter=20, rate=0.004, seed=42, data=DATA, **settings):
    """A complete run of the grid as its folder in results/scaling, with a final text loss.

    On padded rows a quarter of the positions is padding, which the model predicts for nothing.
    """
    model = read(f"model_config_scaling_{width}.yaml")
    if VARIANTS[alias]["groups"]:
        model["n_kv_groups"] = {"gqa": 2, "mqa": 1, "qgqa": 2, "qmqa": 1}[alias]
    tokens = PARAMETERS[width] * per_parameter
    steps = tokens // 1024
    train = read("train_config_scaling.yaml") | {"target_tokens": tokens, "learning_rate": rate, "seed": seed}
    train |= {"min_lr": rate / 10, "warmup_steps": steps // 10} | settings
    train["micro_batch_size"] = 1024 // train["seq_length"]
    padding = 0.25 if train["sequence"] == "padded" else 0.0
    final = {"kind": "final", "step": steps, "tokens": tokens, "padding_fraction": padding}
    for name, value in (("", loss * (1 - padding)), ("text_", loss)):
        final |= {f"{name}loss": value, f"{name}perplexity": math.exp(value)}
    about = data | {"variant": script_of(alias).VARIANT, "init_from": f"{folder.name}.initial.pt"}
    write_folder(folder, model, train, about, [final])


def noise(width, per_parameter, seed):
    return 0.0003 * math.sin(width + 7 * per_parameter + 13 * seed)


CELLS = [place for place in product((64, 96), (5, 20, 80), (42, 43, 44)) if place != (96, 20, 44)]  # not even


@pytest.fixture(scope="module")
def widening(tmp_path_factory):
    """Q–K=V is 0.02 + 0.004 ln(D/N / 20) + noise above QKV at own rates; an octave off costs 0.01."""
    folder = tmp_path_factory.mktemp("grid")
    for (width, per_parameter, seed), rate in product(CELLS, RATES):
        qkv = 1 + 30 * (PARAMETERS[width] * per_parameter) ** -0.3
        gap = 0.02 + 0.004 * math.log(per_parameter / 20) + noise(width, per_parameter, seed)
        for alias, own in (("kqv", qkv), ("kv", qkv + gap)):
            loss = own + 0.01 * abs(math.log2(rate / BEST[alias]))
            name = f"{alias}_d{width}_n{per_parameter}_{rate}_{seed}"
            write_run(folder / name, alias, loss, width, per_parameter, rate, seed)
    return folder


def report_of(*folders):
    return scaling_tables.report(find_runs(folders))[0]


@pytest.fixture(scope="module")
def report(widening):
    return report_of(widening)


def least_squares(points):
    """The slope over x of (group, x, y), an intercept for each group, by numpy."""
    groups = sorted({group for group, _, _ in points})
    columns = [[float(group == other) for group, _, _ in points] for other in groups]
    design = np.array([[x for _, x, _ in points], *columns]).T
    return np.linalg.lstsq(design, np.array([y for _, _, y in points]), rcond=None)[0][0]


def test_the_slope_that_was_put_in_comes_out(report):
    points = []
    for width, per_parameter, seed in CELLS:
        gap = 0.02 + 0.004 * math.log(per_parameter / 20) + noise(width, per_parameter, seed)
        points.append((width, math.log(per_parameter), gap))
    found = report["slopes"][0]
    assert [found[key] for key in ("alias", "rate", "over", "of")] == ["kv", "own", "tokens", "all sizes"]
    assert found["slope"] == pytest.approx(least_squares(points), rel=1e-6)
    assert found["slope"] == pytest.approx(0.004, abs=5e-4)
    low, high = found["slope_interval"]
    assert low < found["slope"] < high and high - low < 0.002
    for seed, slope in found["slope_by_seed"].items():
        mine = [point for point, (*_, other) in zip(points, CELLS, strict=True) if other == seed]
        assert slope == pytest.approx(least_squares(mine), rel=1e-6)
    assert found["verdict"] == "widens"


def slope_between(first, at_first, last, at_last):
    """Of a size with gaps in nats for the seeds 0, 1, ... at two numbers of tokens per parameter."""
    cells = []
    for ratio, values in ((first, at_first), (last, at_last)):
        gaps = dict(enumerate(values))
        cells.append(SimpleNamespace(size="d64", parameters=1, tokens_per_parameter=ratio, gaps=lambda *_, g=gaps: g))
    return scaling_tables.slope(cells, "kv", "own", "tokens")


@pytest.mark.parametrize(
    ("at_5", "at_80", "verdict"),
    [
        ((0.019, 0.020, 0.021), (0.029, 0.030, 0.032), "widens"),
        ((0.029, 0.030, 0.032), (0.019, 0.020, 0.021), "shrinks"),
        ((0.020, 0.021, 0.022), (0.021, 0.022, 0.023), "does not change"),
        ((0.0200, 0.0201, 0.0202), (0.0245, 0.0246, 0.0247), "does not change"),  # surely, but too little
        ((0.020, 0.021, 0.022), (0.023, 0.024, 0.028), "cannot tell"),  # too little on average, perhaps not
        ((0.015, 0.020, 0.031), (0.029, 0.030, 0.030), "cannot tell"),  # one seed says otherwise
        ((0.019, 0.020), (0.029, 0.030), "cannot tell"),  # two seeds
        ((0.019, 0.020, 0.021), (0.029, 0.030), "cannot tell"),
    ],
)
def test_the_verdict_is_that_of_the_criteria(at_5, at_80, verdict):
    assert scaling_tables.verdict(slope_between(5, at_5, 80, at_80)) == verdict
    assert scaling_tables.verdict(slope_between(5, at_5, 20, at_80)) == "cannot tell"
    assert slope_between(5, at_5, 80, ()) is None


def test_gaps_at_the_common_rate_and_at_own_rates(report):
    """Q–K=V's best rate is the highest of those tried, which is said."""
    gap = next(g for g in report["gaps"] if (g["size"], g["tokens_per_parameter"]) == ("d64", 20))
    assert (gap["common_rate"], gap["own_rate"], gap["seeds"]) == (0.004, 0.008, [42, 43, 44])
    own = 0.02 + sum(noise(64, 20, seed) for seed in (42, 43, 44)) / 3
    assert gap["gap_own"] == pytest.approx(100 * (math.exp(own) - 1))
    assert gap["gap_common"] == pytest.approx(100 * (math.exp(own + 0.01) - 1))
    seeds = [100 * (math.exp(0.02 + noise(64, 20, seed)) - 1) for seed in (42, 43, 44)]
    assert gap["gap_own_interval"] == pytest.approx([min(seeds), max(seeds)])  # alike: 1 in 27 draws, above 2.5 %
    edges = [note for note in report["notes"] if "at the edge" in note]
    assert len(edges) == 6 and all(note.startswith("Q–K=V") for note in edges)


def test_the_best_rate_goes_by_the_seeds_that_all_rates_have(tmp_path):
    """Seed 44 has the lowest loss and was run at one rate alone."""
    losses = {(0.002, 42): 2.0, (0.004, 42): 1.9, (0.008, 42): 2.1, (0.002, 44): 1.0}
    for (rate, seed), loss in losses.items():
        write_run(tmp_path / f"kqv_{rate}_{seed}", "kqv", loss, rate=rate, seed=seed)
        write_run(tmp_path / f"kv_{rate}_{seed}", "kv", loss + 0.05, rate=rate, seed=seed)
    report = report_of(tmp_path)
    (gap,) = report["gaps"]
    assert (gap["common_rate"], gap["own_rate"], gap["seeds"]) == (0.004, 0.004, [42])
    assert not [note for note in report["notes"] if "at the edge" in note]


def test_the_compute_lost_is_read_off_qkvs_curve(tmp_path):
    """Q–K=V at the loss that QKV has after 0.8 of the tokens, on L = 30 D^-0.3; it does 11 of 12 products."""
    for per_parameter in (5, 20):
        loss = 30 * (98_304 * per_parameter) ** -0.3
        write_run(tmp_path / f"kqv_{per_parameter}", "kqv", loss, per_parameter=per_parameter)
    write_run(tmp_path / "kv_20", "kv", 30 * (98_304 * 20 * 0.8) ** -0.3)
    report = report_of(tmp_path)
    products = {"kqv": 12 * 64**2, "kv": 11 * 64**2}
    per_token = {alias: 2 * (size + 2 * 256 * 64) + 320 * 64 for alias, size in products.items()}
    expected = 100 * (1 - 0.8 * per_token["kqv"] / per_token["kv"])
    assert report["gaps"][0]["compute_lost_percent"] == pytest.approx(expected)


def test_the_length_of_rows_by_protocol(tmp_path):
    """A gap that depends on the padding alone."""
    protocols = (("packed", True), ("padded", True), ("padded", False))
    for (sequence, scored), row, seed in product(protocols, (64, 256), (42, 43)):
        for alias, loss in (("kqv", 2.0), ("kv", 2.04 + 0.001 * (seed - 42))):
            folder = tmp_path / f"{alias}_{sequence}_{scored}_{row}_{seed}"
            write_run(folder, alias, loss, seed=seed, seq_length=row, sequence=sequence, score_padding=scored)
    report = report_of(tmp_path)
    assert len(report["lengths"]) == 6 and len(report["falls"]) == 3
    rows = {(r["protocol"], r["row"]): r for r in report["lengths"]}
    scored, packed = rows["padded, padding scored", 64], rows["packed", 64]
    assert scored["gap_common"] == packed["gap_common"] == packed["gap_all_positions"]
    assert scored["gap_all_positions"] == pytest.approx(100 * (math.exp(0.75 * 0.0405) - 1))
    assert [f["fall_text"] for f in report["falls"]] == pytest.approx([0, 0, 0], abs=1e-9)


def test_a_fall_is_paired_over_the_seeds_that_both_lengths_have(tmp_path):
    """Seed 44 has long rows alone; the gaps of the others spread far more than their falls."""
    gaps = {(64, 42): 0.10, (64, 43): 0.30, (256, 42): 0.08, (256, 43): 0.27, (256, 44): 0.90}
    for ((row, seed), gap), sequence in product(gaps.items(), ("packed", "padded")):
        for alias, loss in (("kqv", 2.0), ("kv", 2.0 + gap)):
            folder = tmp_path / f"{alias}_{sequence}_{row}_{seed}"
            write_run(folder, alias, loss, seed=seed, seq_length=row, sequence=sequence, score_padding=True)
    report = report_of(tmp_path)
    fall = next(f for f in report["falls"] if f["protocol"] == "packed")
    assert fall["seeds"] == 2 and fall["fall_text"] == pytest.approx(2.5)
    assert fall["fall_text_interval"] == pytest.approx([2, 3])
    assert fall["fall_text_t"] == pytest.approx([2.5 - 12.706 * 0.5, 2.5 + 12.706 * 0.5], abs=0.01)


def converted(folder, text, **run):
    """A QKV whose record has what a conversion printed, as runs.jsonl holds it."""
    write_run(folder / "kqv", "kqv", 2.0, **run)
    return Run(read_runs(folder)[0] | {"conversion": text})


def test_a_converted_qkv_stands_beside_the_variants(tmp_path):
    runs = []
    for seed, after in ((42, 7.5), (43, 7.6)):
        text = f"layer  0: 1.0 % left out\ntext perplexity: {math.exp(2.0):.4f} before, {after} after (+1.0%)\n"
        runs.append(converted(tmp_path / str(seed), text, seed=seed))
        write_run(tmp_path / f"kv_{seed}", "kv", 2.1, seed=seed)
        runs += find_runs([tmp_path / f"kv_{seed}"])
    kv, other = scaling_tables.report(runs)[0]["gaps"]
    assert (kv["alias"], other["alias"], other["seeds"]) == ("kv", "converted", [42, 43])
    expected = 100 * (math.sqrt(7.5 * 7.6) / math.exp(2.0) - 1)
    assert other["gap_common"] == other["gap_own"] == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("text", ["killed\n", "text perplexity: 9.0000 before, 9.1000 after (+1.1%)\n"])
def test_a_conversion_that_is_not_of_the_run_is_refused(text, tmp_path):
    with pytest.raises(InputError, match="kqv: "):
        scaling_tables.report([converted(tmp_path, text)])


def test_what_is_no_grid_is_refused_in_one_line(tmp_path, capsys):
    others = {"text": {"data": DATA | {"training text": "3"}}, "recipe": {"weight_decay": 0.2}, "twice": {}}
    for name, changes in others.items():
        write_run(tmp_path / name / "kqv_a", "kqv", 2.0)
        write_run(tmp_path / name / "kqv_b", "kqv", 2.0, **changes)
        with pytest.raises(SystemExit):
            scaling_tables.main([str(tmp_path / name)])
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / name / "scaling_table.md").exists()


def test_incomplete_runs_are_named_and_left_out(tmp_path):
    for name in ("kqv_whole", "kqv_cut"):
        write_run(tmp_path / name, "kqv", 0.5)
    (tmp_path / "kqv_cut/metrics.jsonl").write_text("", encoding="utf-8")
    assert "Incomplete, and left out: kqv_cut." in report_of(tmp_path)["notes"]
    with pytest.raises(InputError, match="no complete runs"):
        report_of(tmp_path / "kqv_cut")


def test_tables_and_figures_are_written(widening, tmp_path):
    scaling_tables.main([str(widening), "--output_dir", str(tmp_path)])
    figures = ["gap.png", "gap_by_loss.png", "gap_common_rate.png", "losses.png", "rates.png"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == figures
    assert "widens" in (tmp_path / "scaling_table.md").read_text(encoding="utf-8")
    assert len(json.loads((tmp_path / "scaling_table.json").read_text(encoding="utf-8"))["gaps"]) == 6


def test_the_committed_tables_are_those_of_the_committed_runs():
    results = ROOT / "results"
    parts = scaling_tables.report(find_runs([results / "scaling"]))[0]
    assert scaling_tables.as_markdown(parts) == (results / "scaling/scaling_table.md").read_text(encoding="utf-8")
    tables = results_table.compare(find_runs([results / "reduced_scale"]))
    expected = (results / "reduced_scale/results_table.md").read_text(encoding="utf-8")
    assert results_table.as_markdown(tables) == expected
