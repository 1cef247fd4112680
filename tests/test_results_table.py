"""results_table.py on folders whose figures were worked out by hand, and on tiny runs of the scripts."""

import csv
import io
import json
import math
import sys

import pytest
import torch
import yaml
from conftest import ROOT, VARIANTS, arguments, script_of

sys.path.insert(0, str(ROOT / "runs"))
import gather

import results_table

TINY = {"vocab_size": 257, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_inner": 96}
TITLE = ["2 layers, d 64, 8 heads", "feed-forward 96, 32 positions, vocabulary 257"]
STEPS = 4
DATA = {"training text": "1", "validation text": "2", "init_from": None, "tokenizer": "bytes"}


def read(path):
    return yaml.safe_load((ROOT / "configs" / path).read_text(encoding="utf-8"))


def write_folder(folder, model, train, about, records):
    """What the training scripts leave of a run, but for weights."""
    folder.mkdir(parents=True)
    for name, contents in (("model_config", model), ("train_config", train), ("run", about)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(contents), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records), encoding="utf-8")
    return folder


def evaluation(step, perplexity, text_perplexity, kind="val"):
    figures = {"perplexity": perplexity, "text_perplexity": text_perplexity}
    figures |= {"loss": math.log(perplexity), "text_loss": math.log(text_perplexity)}
    figures |= {"bits_per_byte": 1.0, "padding_fraction": 0.5}
    return {"kind": kind, "step": step, "tokens": 256 * step} | figures


def write_run(folder, alias, seed=1, final=(5.0, 20.0), data=DATA, size=None, step=STEPS, **settings):
    """A run folder as the training scripts leave it: `final` is its perplexity, and that of the text."""
    groups = (VARIANTS[alias]["groups"] or {}).get(size or "300M")
    model = read(f"model_config_{size or 'demo'}.yaml") | ({} if size else TINY)
    model |= {"n_kv_groups": groups} if groups else {}
    train = read("train_config_demo.yaml") | {"sequence": "padded", "seq_length": 32, "eval_batches": None}
    train |= {"num_gpus": 1, "target_tokens": STEPS * 256, "warmup_steps": 1, "seed": seed}  # by 8 rows a step
    model |= {key: value for key, value in settings.items() if key in model}
    train |= {key: value for key, value in settings.items() if key in train}
    records = [evaluation(0, 300.0, 300.0), {"kind": "train", "step": 1, "tokens": 256, "loss": 5.0}]
    records += [evaluation(2, 50.0, 100.0)] if step >= 2 else []
    records += [evaluation(STEPS, *final, "final")] if step == STEPS else []
    return write_folder(folder, model, train, data | {"variant": script_of(alias).VARIANT}, records)


@pytest.fixture
def two_seeds(tmp_path):
    """QKV and Q–K=V at two seeds each."""
    write_run(tmp_path / "kqv_1", "kqv", 1, (5.0, 20.0))
    write_run(tmp_path / "kqv_2", "kqv", 2, (5.2, 22.0))
    write_run(tmp_path / "kv_1", "kv", 1, (5.25, 21.0))
    write_run(tmp_path / "kv_2", "kv", 2, (5.3, 22.0))
    return tmp_path


def run(*args, capsys):
    """Exit status, standard output and standard error of the command line."""
    status = 0
    try:
        results_table.main([str(arg) for arg in args])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def tables(*folders, capsys):
    status, output, errors = run(*folders, "--format", "json", capsys=capsys)
    assert (status, errors) == (0, "")
    return json.loads(output)


def error_of(*folders, capsys):
    """The one line with which the tool refuses them."""
    status, output, errors = run(*folders, capsys=capsys)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("results_table.py: error: ")
    return errors


def test_means_spreads_and_paired_changes(two_seeds, capsys):
    (table,) = tables(two_seeds, capsys=capsys)
    qkv, kv = table["rows"]
    assert (table["notes"], qkv["seeds"], kv["seeds"]) == ([], [1, 2], [1, 2])
    assert (qkv["perplexity"], qkv["perplexity_spread"]) == pytest.approx((5.1, 0.1))
    assert (qkv["text_perplexity"], qkv["text_perplexity_spread"]) == pytest.approx((21, 1))
    assert qkv["perplexity_vs_qkv"] is None and qkv["text_loss_vs_qkv"] is None
    # 5.25 / 5.0 and 5.3 / 5.2; 21 / 20 and 22 / 22
    assert kv["perplexity_vs_qkv"] == pytest.approx((5 + 100 / 52) / 2)
    assert kv["perplexity_vs_qkv_spread"] == pytest.approx((5 - 100 / 52) / 2)
    assert (kv["text_perplexity_vs_qkv"], kv["text_perplexity_vs_qkv_spread"]) == pytest.approx((2.5, 2.5))
    assert kv["text_loss_vs_qkv"] == kv["text_loss_vs_qkv_spread"] == pytest.approx(math.log(1.05) / 2)


def test_changes_pair_the_seeds_that_both_have(two_seeds, capsys):
    write_run(two_seeds / "gqa_2", "gqa", 2, (5.252, 22.0))
    write_run(two_seeds / "mqa_3", "mqa", 3, (5.5, 25.0))
    (table,) = tables(two_seeds, capsys=capsys)
    gqa, mqa = table["rows"][2:]
    assert gqa["perplexity_vs_qkv"] == pytest.approx(1) and gqa["perplexity_vs_qkv_spread"] is None
    assert mqa["perplexity"] == 5.5 and mqa["perplexity_vs_qkv"] is None
    assert table["notes"] == [
        "GQA-4 (gqa_2): its complete seeds are 2, those of QKV 1, 2",
        "MQA (mqa_3): its complete seeds are 3, those of QKV 1, 2",
    ]


def test_each_protocol_has_its_table_and_its_own_qkv(two_seeds, capsys):
    for name, settings in (("masked", {"score_padding": False}), ("packed", {"sequence": "packed"})):
        write_run(two_seeds / f"kqv_{name}", "kqv", 1, (10.0, 20.0), **settings)
        write_run(two_seeds / f"kv_{name}", "kv", 1, (10.4, 20.8), **settings)
    scored, *others = tables(two_seeds, capsys=capsys)
    assert scored["title"] == [*TITLE, "padded rows of 32 tokens, padding scored"]
    assert [t["title"][-1].removeprefix("padded rows of 32 tokens, ") for t in others] == [
        "packed rows of 32 tokens", "padding masked",
    ]  # fmt: skip
    assert [bool(t["notes"]) for t in (scored, *others)] == [False, False, True]
    assert [t["rows"][1]["perplexity_vs_qkv"] for t in others] == [pytest.approx(4), pytest.approx(4)]
    assert ["padding scored" in t["published"] for t in (scored, *others)] == [False, True, True]


@pytest.mark.parametrize(
    ("size", "title", "cached", "published", "other_groups"),
    [
        ("300M", "300M (Table 4)", 10_240, (5.32, 3.9), 8),
        ("1.2B", "1.2B (Table 10)", 22_528, (5.158, 3.08), 4),
    ],
)
def test_a_size_of_the_paper_stands_beside_its_published_figures(
    size, title, cached, published, other_groups, tmp_path, capsys
):
    """Of which there are none for other numbers of KV heads."""
    write_run(tmp_path / "a", "kqv", size=size)
    write_run(tmp_path / "b", "qgqa", size=size)
    write_run(tmp_path / "c", "kqv")
    write_run(tmp_path / "d", "qgqa", size=size, n_kv_groups=other_groups)
    table, other = tables(tmp_path, capsys=capsys)
    assert (table["size"], table["title"][0], other["size"]) == (size, title, None)
    _, row, otherwise = table["rows"]
    assert (row["cache_bytes_per_token"], row["cache_reduction_percent"]) == (cached, 87.5)
    assert (row["published"], row["published_vs_qkv"]) == published
    assert (otherwise["published"], otherwise["published_vs_qkv"]) == (None, None)
    assert size != "300M" or table["rows"][0]["parameters"] == 305_534_976


def test_a_run_that_was_trained_otherwise_is_marked_and_named(two_seeds, capsys):
    other = DATA | {"training text": "9"}
    write_run(two_seeds / "mqa_1", "mqa", 1, (5.5, 21.0), learning_rate=0.001, warmup_steps=3)
    write_run(two_seeds / "k_1", "k", 1, (6.0, 30.0), data=other)
    write_run(two_seeds / "gqa_1", "gqa", 1, log_interval=7, micro_batch_size=4, gradient_accumulation=2)
    (table,) = tables(two_seeds, capsys=capsys)
    assert [row["variant"] for row in table["rows"]] == ["QKV", "Q–K=V", "Q=K=V*", "GQA-4", "MQA*"]
    assert table["rows"][-1]["perplexity_vs_qkv"] == pytest.approx(10)
    data, *others = [note for note in table["notes"] if note.startswith("*")]
    assert data == "* Q=K=V (k_1): train_data is 9, and 1 for QKV"
    assert others == [
        "* MQA (mqa_1): learning_rate is 0.001, and 0.003 for QKV",
        "* MQA (mqa_1): warmup_steps is 3, and 1 for QKV",
    ]
    assert "| Q=K=V\\* |" in run(two_seeds, "--format", "markdown", capsys=capsys)[1]


def test_two_ways_of_training_a_variant_are_two_rows(two_seeds, capsys):
    write_run(two_seeds / "kv_3", "kv", 1, (5.1, 20.0), learning_rate=0.001)
    write_run(two_seeds / "kqv_3", "kqv", 1, (4.0, 18.0), learning_rate=0.001)
    (table,) = tables(two_seeds, capsys=capsys)
    assert [row["variant"] for row in table["rows"]] == ["QKV", "QKV*", "Q–K=V", "Q–K=V*"]
    assert [row["perplexity_vs_qkv"] for row in table["rows"]][::3] == [None, pytest.approx(2)]


def test_incomplete_runs_are_shown_and_enter_no_mean(two_seeds, capsys):
    """Nor does one that was prolonged after its final evaluation."""
    write_run(two_seeds / "kv_3", "kv", 3, step=2)
    write_run(two_seeds / "mqa_1", "mqa", 1, step=1)
    write_run(two_seeds / "k_1", "k", 1, target_tokens=512 * STEPS)
    (table,) = tables(two_seeds, capsys=capsys)
    _, kv, *others = table["rows"]
    assert kv["seeds"] == [1, 2] and kv["perplexity"] == pytest.approx(5.275)
    assert [(row["seeds"], row["perplexity"]) for row in others] == [([], None), ([], None)]
    shown = [line.split() for line in run(two_seeds, capsys=capsys)[1].splitlines()]
    assert [line for line in shown if line and line[-1] in ("kv_3", "k_1", "mqa_1")] == [
        ["Q–K=V", "3", "2", "4", "2", "50.000", "100.000", "kv_3"],
        ["Q=K=V", "1", "4", "8", "4", "5.000", "20.000", "k_1"],
        ["MQA", "1", "1", "4", "0", "300.000", "300.000", "mqa_1"],
    ]


def test_without_names_the_outputs_here_are_read(two_seeds, monkeypatch, capsys):
    write_run(two_seeds / "outputs_all/k", "k")
    write_run(two_seeds / "outputs_mqa", "mqa")
    monkeypatch.chdir(two_seeds)
    (table,) = tables(capsys=capsys)
    assert [row["alias"] for row in table["rows"]] == ["k", "mqa"]


def test_every_format_holds_the_same_figures(two_seeds, capsys):
    text, markdown, sheet = (run(two_seeds, "--format", f, capsys=capsys)[1] for f in ("table", "markdown", "csv"))
    title, _, _, *rows = [line for line in markdown.splitlines() if line]
    assert title == f"### {', '.join([*TITLE, 'padded rows of 32 tokens, padding scored'])}"
    cells = [cell.strip() for cell in rows[-1].split("|")]
    assert all(cell in text for cell in cells)
    for figure in ("Q–K=V", "1, 2", "5.275 ± 0.025", "+3.46 ± 1.54 %", "5.27", "+3.1 %", "21.500 ± 0.500"):
        assert figure in cells
    (table,) = tables(two_seeds, capsys=capsys)
    for row, record in zip(csv.DictReader(io.StringIO(sheet)), table["rows"], strict=True):
        assert float(row["perplexity"]) == record["perplexity"] and row["seeds"] == "1, 2"


def test_the_output_dir_holds_tables_and_figures(two_seeds, tmp_path_factory, capsys):
    written = tmp_path_factory.mktemp("out") / "results/reduced"
    _, output, _ = run(two_seeds, "--output_dir", written, "--format", "markdown", capsys=capsys)
    assert (written / "results_table.md").read_text(encoding="utf-8") == output
    assert json.loads((written / "results_table.json").read_text(encoding="utf-8"))[0]["rows"]
    for name in ("pareto.png", "validation_curves.png"):
        assert (written / "figures" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("metrics.jsonl", '{"kind": "val", "step": 1}\n'),
        ("metrics.jsonl", "[]\n"),
        ("metrics.jsonl", json.dumps(evaluation(STEPS, 5.0, 20.0, "final") | {"perplexity": math.nan}) + "\n"),
        ("train_config.yaml", "seed: 1\n"),
        ("model_config.yaml", "n_embd: text\n"),
        ("run.yaml", "variant: other\n"),
        ("run.yaml", "["),
        ("run.yaml", None),
    ],
)
def test_a_broken_folder_is_one_line(name, contents, tmp_path, capsys):
    folder = write_run(tmp_path / "broken", "kqv")
    (folder / name).unlink()
    if contents is not None:
        (folder / name).write_text(contents, encoding="utf-8")
    assert "broken" in error_of(folder, capsys=capsys)


def test_of_a_log_that_was_appended_to_the_last_record_of_a_step_counts(tmp_path, capsys):
    """Killed in the middle of a line."""
    folder = write_run(tmp_path / "kqv_1", "kqv", final=(9.0, 90.0))
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(evaluation(STEPS, 5.0, 20.0, "final")) + "\n{")
    (table,) = tables(folder, capsys=capsys)
    assert table["rows"][0]["perplexity"] == 5.0 and table["runs"][0]["step"] == STEPS


def test_no_runs_and_the_same_run_twice_are_refused(two_seeds, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    for folders in ([], ["missing"], ["."]):
        assert "no runs found" in error_of(*folders, capsys=capsys)
    write_run(two_seeds / "kv_again", "kv", 2)
    assert "kv_2 and kv_again: the same run twice" in error_of(two_seeds, capsys=capsys)


def test_gathered_runs_are_the_runs(two_seeds, tmp_path_factory, capsys):
    """runs/gather.py: complete runs alone, in place of those of the same name; another text is refused."""
    study = tmp_path_factory.mktemp("study")
    write_run(two_seeds / "kv_3", "kv", 3, step=2)
    gather.main([str(two_seeds), "--to", str(study)])
    (of_folders,), (of_lines,) = tables(two_seeds, capsys=capsys), tables(study, capsys=capsys)
    assert of_lines["rows"] == of_folders["rows"]
    with open(study / "runs.csv", encoding="utf-8", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["kqv_1", "kqv_2", "kv_1", "kv_2"]
    before = (study / "runs.jsonl").read_bytes()
    gather.main([str(two_seeds), "--to", str(study)])
    assert (study / "runs.jsonl").read_bytes() == before
    write_run(two_seeds / "mqa_1", "mqa", 1, data=DATA | {"training text": "other"})
    with pytest.raises(SystemExit) as ended:
        gather.main([str(two_seeds), "--to", str(study)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "RESULTS=" in error and error.count("\n") == 1
    assert (study / "runs.jsonl").read_bytes() == before


def test_runs_of_the_training_scripts(data, tmp_path, capsys):
    """Two variants through training."""
    finals = {}
    for alias in ("kqv", "kv"):
        folder = tmp_path / f"runs/{alias}_packed_seed1"
        script_of(alias).main(arguments(data, folder, "seed=1"))
        finals[alias] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["perplexity"]
    capsys.readouterr()
    (table,) = tables(tmp_path / "runs", capsys=capsys)
    qkv, kv = table["rows"]
    assert table["notes"] == [] and qkv["perplexity"] == finals["kqv"]
    assert kv["perplexity_vs_qkv"] == pytest.approx(100 * (finals["kv"] / finals["kqv"] - 1))
    model = script_of("kv").load_model(tmp_path / "runs/kv_packed_seed1/final_model.pt")
    assert kv["parameters"] == sum(p.numel() for p in model.parameters())
    cache = script_of("kv").KVCache(1)
    model.bfloat16()(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    assert kv["cache_bytes_per_token"] == cache.nbytes
