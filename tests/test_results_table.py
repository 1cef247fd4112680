"""results_table.py on folders whose figures were worked out by hand, and on tiny runs of the scripts."""

import csv
import io
import json
import math

import pytest
import torch
import yaml
from conftest import ROOT, VARIANTS, script_of
from test_training import arguments

import results_table

TINY = {"vocab_size": 257, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_inner": 96}
TITLE = ["2 layers, d 64, 8 heads", "feed-forward 96, 32 positions, vocabulary 257"]
STEPS = 4
DATA = {"train_data": [{"name": "chunk_000", "tokens_sha256": "1"}], "val_data": [{"name": "chunk_000"}]}


def read(path):
    return yaml.safe_load((ROOT / "configs" / path).read_text(encoding="utf-8"))


def evaluation(step, perplexity, text_perplexity, kind="val"):
    figures = {"perplexity": perplexity, "text_perplexity": text_perplexity}
    figures |= {"loss": math.log(perplexity), "text_loss": math.log(text_perplexity)}
    figures |= {"bits_per_byte": 1.0, "padding_fraction": 0.5}
    return {"kind": kind, "step": step, "tokens": 256 * step} | figures


def evaluation_line(**changes):
    """A line of a metrics.jsonl with some of its values replaced."""
    return json.dumps(evaluation(STEPS, 5.0, 20.0, "final") | changes) + "\n"


def write_run(folder, alias, seed=1, final=(5.0, 20.0), data=DATA, size=None, step=STEPS, **settings):
    """A run folder as the training scripts leave it: `final` is its perplexity, and that of the text."""
    folder.mkdir(parents=True)
    groups = (VARIANTS[alias]["groups"] or {}).get(size or "300M")
    model = read(f"model_config_{size or 'demo'}.yaml") | ({} if size else TINY)
    model |= {"n_kv_groups": groups} if groups else {}
    train = read("train_config_demo.yaml") | {"sequence": "padded", "seq_length": 32, "eval_batches": None}
    train |= {
        "num_gpus": 1,
        "target_tokens": STEPS * 256,
        "warmup_steps": 1,
        "seed": seed,
    }  # by 8 rows a step
    model |= {key: value for key, value in settings.items() if key in model}
    train |= {key: value for key, value in settings.items() if key in train}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(model), encoding="utf-8")
    (folder / "train_config.yaml").write_text(yaml.safe_dump(train), encoding="utf-8")
    if data:
        about = data | {"variant": script_of(alias).VARIANT}
        (folder / "run.yaml").write_text(yaml.safe_dump(about), encoding="utf-8")
    records = [evaluation(0, 300.0, 300.0), {"kind": "train", "step": 1, "tokens": 256, "loss": 5.0}]
    records += [evaluation(2, 50.0, 100.0)] if step >= 2 else []
    records += [evaluation(STEPS, *final, "final")] if step == STEPS else []
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records), encoding="utf-8")
    return folder


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


def test_a_terminal_shows_both_seeds_in_a_mean_and_its_spread(two_seeds, capsys):
    _, output, _ = run(two_seeds, capsys=capsys)
    _, row = (line for line in output.splitlines() if line.startswith("Q"))
    for text in (
        "Q–K=V",
        "1, 2",
        "5.275 ± 0.025",
        "+3.46 ± 1.54 %",
        "5.27",
        "+3.1 %",
        "21.500 ± 0.500",
        "50.0 %",
    ):
        assert text in row
    assert "published at 300M" in output


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
    assert [t["title"][-1] for t in others] == [
        "packed rows of 32 tokens",
        "padded rows of 32 tokens, padding masked",
    ]
    assert [bool(t["notes"]) for t in (scored, *others)] == [False, False, True]
    assert "masked in training" in others[1]["notes"][0]
    assert [t["rows"][1]["perplexity_vs_qkv"] for t in others] == [pytest.approx(4), pytest.approx(4)]
    assert [t["published"] for t in (scored, *others)] == [
        "published at 300M", *2 * ["published at 300M, padding scored"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "title", "cached", "saved", "published"),
    [
        ("300M", "300M (Table 4)", 10_240, 87.5, (5.32, 3.9)),
        ("1.2B", "1.2B (Table 10)", 22_528, 87.5, (5.158, 3.08)),
    ],
)
def test_a_size_of_the_paper_stands_beside_its_published_figures(
    size, title, cached, saved, published, tmp_path, capsys
):
    write_run(tmp_path / "a", "kqv", size=size)
    write_run(tmp_path / "b", "qgqa", size=size)
    write_run(tmp_path / "c", "kqv")
    table, other = tables(tmp_path, capsys=capsys)
    assert (table["size"], table["title"][0], other["size"]) == (size, title, None)
    row = table["rows"][1]
    assert (row["cache_bytes_per_token"], row["cache_reduction_percent"]) == (cached, saved)
    assert (row["published"], row["published_vs_qkv"]) == published
    assert size != "300M" or table["rows"][0]["parameters"] == 305_534_976
    assert "published at" not in run(tmp_path / "a", capsys=capsys)[1]


@pytest.mark.parametrize(
    ("alias", "size", "groups"), [("gqa", "300M", 2), ("qgqa", "300M", 8), ("qgqa", "1.2B", 4), ("gqa", None, 2)]
)
def test_nothing_is_published_of_other_numbers_of_kv_heads(alias, size, groups, tmp_path, capsys):
    write_run(tmp_path / "a", alias, size=size)
    write_run(tmp_path / "b", alias, size=size, n_kv_groups=groups)
    (table,) = tables(tmp_path, capsys=capsys)
    own, other = table["rows"]
    assert None not in (own["published"], own["published_vs_qkv"])
    assert (other["published"], other["published_vs_qkv"]) == (None, None)


def test_a_run_that_was_trained_otherwise_is_marked_and_named(two_seeds, capsys):
    other = DATA | {"train_data": [{"name": "chunk_000", "tokens_sha256": "2"}]}
    write_run(two_seeds / "mqa_1", "mqa", 1, (5.5, 21.0), learning_rate=0.001, warmup_steps=3)
    write_run(two_seeds / "k_1", "k", 1, (6.0, 30.0), data=other)
    write_run(
        two_seeds / "gqa_1",
        "gqa",
        1,
        (5.1, 20.0),
        log_interval=7,
        micro_batch_size=4,
        gradient_accumulation=2,
    )
    (table,) = tables(two_seeds, capsys=capsys)
    assert [row["variant"] for row in table["rows"]] == ["QKV", "Q–K=V", "Q=K=V*", "GQA-4", "MQA*"]
    assert table["rows"][-1]["perplexity_vs_qkv"] == pytest.approx(10)
    data, *others = [note for note in table["notes"] if note.startswith("*")]
    one, two = (results_table.fingerprint(about["train_data"]) for about in (DATA, other))
    assert one != two and data == f"* Q=K=V (k_1): train_data is {two}, and {one} for QKV"
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
    write_run(two_seeds / "kv_3", "kv", 3, step=2)
    write_run(two_seeds / "mqa_1", "mqa", 1, step=1)
    (table,) = tables(two_seeds, capsys=capsys)
    _, kv, mqa = table["rows"]
    assert kv["seeds"] == [1, 2] and kv["perplexity"] == pytest.approx(5.275)
    assert mqa["seeds"] == [] and mqa["perplexity"] is None and mqa["parameters"] > 0
    lines = run(two_seeds, capsys=capsys)[1].splitlines()
    table = [
        line.split() for line in lines[next(i for i, x in enumerate(lines) if x.startswith("incomplete")) :]
    ]
    assert table[1] == ["Q–K=V", "3", "2", "4", "2", "50.000", "100.000", "kv_3"]
    assert table[2] == ["MQA", "1", "1", "4", "0", "300.000", "300.000", "mqa_1"]


def test_the_final_evaluation_of_a_run_that_was_prolonged_is_not_its_end(tmp_path, capsys):
    write_run(tmp_path / "a", "kqv", target_tokens=512 * STEPS)
    (table,) = tables(tmp_path / "a", capsys=capsys)
    assert [(r["complete"], r["step"], r["steps"]) for r in table["runs"]] == [(False, STEPS, 2 * STEPS)]
    assert table["notes"] == ["No complete run of QKV: nothing to compare with."]


def test_what_is_not_recorded_is_said(tmp_path, capsys):
    write_run(tmp_path / "kqv_text", "kqv", data=None)
    write_run(tmp_path / "outputs_kv", "qk", data=None)  # as the release calls the folder of Q=K–V
    write_run(tmp_path / "kv_text", "kv", data=None, train_data="elsewhere")
    (table,) = tables(tmp_path, capsys=capsys)
    assert [row["variant"] for row in table["rows"]] == ["QKV", "Q=K–V", "Q–K=V*"]
    assert table["notes"] == [
        "* Q–K=V (kv_text): train_data is elsewhere, contents not recorded, and demo_data/train, contents not "
        "recorded for QKV",
        "Variant taken from the folder's name alone: all runs.",
        "Training data known by path alone: all runs.",
        "Validation data known by path alone: all runs.",
    ]


def test_a_checkpoint_tells_the_variant_and_the_data(tmp_path, capsys):
    for name, alias in (("a", "kqv"), ("b", "kv")):
        write_run(tmp_path / name, alias, data=None)
        contents = {"variant": script_of(alias).VARIANT, "train_data": DATA["train_data"]}
        torch.save(contents, tmp_path / name / "checkpoint_step_2.pt")
        (tmp_path / name / "checkpoint_step_4.pt").write_bytes(b"damaged")
    (table,) = tables(tmp_path, capsys=capsys)
    assert [row["alias"] for row in table["rows"]] == ["kqv", "kv"]
    assert table["notes"] == ["Validation data known by path alone: all runs."]


def test_without_names_the_outputs_here_are_read(two_seeds, monkeypatch, capsys):
    (two_seeds / "all").mkdir()
    for folder in two_seeds.glob("k*"):
        folder.rename(two_seeds / "all" / folder.name)
    (two_seeds / "all").rename(two_seeds / "outputs_all")
    write_run(two_seeds / "outputs_mqa", "mqa")
    write_run(two_seeds / "elsewhere", "gqa")
    monkeypatch.chdir(two_seeds)
    (table,) = tables(capsys=capsys)
    assert [row["alias"] for row in table["rows"]] == ["kqv", "kv", "mqa"]


def test_a_run_put_aside_is_read_where_it_is_named(two_seeds, monkeypatch, capsys):
    """--resume never moves the run before it to <output_dir>.old_N."""
    write_run(two_seeds / "kv_1.old_1", "kv")
    write_run(two_seeds / "outputs_mqa", "mqa")
    write_run(two_seeds / "outputs_mqa.old_12", "mqa")
    monkeypatch.chdir(two_seeds)
    (table,) = tables(capsys=capsys)
    assert [run["folder"] for run in table["runs"]] == ["outputs_mqa"]
    (table,) = tables(two_seeds, capsys=capsys)
    assert len(table["runs"]) == 5
    (table,) = tables(two_seeds / "outputs_mqa.old_12", capsys=capsys)
    assert [run["folder"] for run in table["runs"]] == ["outputs_mqa.old_12"]


def test_every_format_holds_the_same_figures(two_seeds, capsys):
    text, markdown, sheet = (
        run(two_seeds, "--format", f, capsys=capsys)[1] for f in ("table", "markdown", "csv")
    )
    title, header, rule, *rows = [line for line in markdown.splitlines() if line]
    assert title == f"### {', '.join([*TITLE, 'padded rows of 32 tokens, padding scored'])}"
    assert {line.count("|") for line in (header, rule, *rows)} == {12}
    for cell in "|".join(rows).split("|"):
        assert cell.strip() in text
    (table,) = tables(two_seeds, capsys=capsys)
    for row, record in zip(csv.DictReader(io.StringIO(sheet)), table["rows"], strict=True):
        assert float(row["perplexity"]) == record["perplexity"] and row["seeds"] == "1, 2"


def test_the_output_dir_holds_tables_and_figures(two_seeds, tmp_path_factory, capsys):
    written = tmp_path_factory.mktemp("out") / "results/reduced"
    status, output, _ = run(two_seeds, "--output_dir", written, "--format", "markdown", capsys=capsys)
    names = ["pareto.png", "results_table.json", "results_table.md", "validation_curves.png"]
    assert status == 0 and sorted(path.name for path in written.iterdir()) == names
    assert (written / "results_table.md").read_text(encoding="utf-8") == output
    assert json.loads((written / "results_table.json").read_text(encoding="utf-8"))[0]["rows"]
    assert all((written / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))


def test_figures_can_do_without_qkv_and_without_evaluations(tmp_path, capsys):
    write_run(tmp_path / "runs/a", "kv", step=1)
    assert run(tmp_path / "runs", "--output_dir", tmp_path / "out", capsys=capsys)[0] == 0
    assert (tmp_path / "out/validation_curves.png").exists() and not (tmp_path / "out/pareto.png").exists()


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("metrics.jsonl", "what\n", "metrics.jsonl: not the metrics of a training script"),
        (
            "metrics.jsonl",
            '{"kind": "val", "step": 1}\n',
            "metrics.jsonl: not the metrics of a training script",
        ),
        ("metrics.jsonl", "[]\n", "metrics.jsonl: not the metrics of a training script"),
        (
            "metrics.jsonl",
            evaluation_line(text_loss="3.0"),
            "step 4: text_loss: expected a number, got '3.0'",
        ),
        (
            "metrics.jsonl",
            evaluation_line(perplexity=math.nan),
            "step 4: perplexity: expected a number, got nan",
        ),
        ("metrics.jsonl", evaluation_line(step=None), "no line is a record with kind and step"),
        ("train_config.yaml", "seed: 1\n", "train_config.yaml: train_data: missing"),
        (
            "model_config.yaml",
            "n_embd: text\n",
            "model_config.yaml: n_embd: expected a valid integer, got 'text'",
        ),
        ("model_config.yaml", "", "model_config.yaml: expected YAML"),
        ("run.yaml", "variant: other\n", "unknown variant: other"),
        ("run.yaml", "[", "run.yaml: expected a YAML file"),
        ("run.yaml", None, "unknown variant: not recorded, nor told by this name"),
    ],
)
def test_a_broken_folder_is_one_line(name, contents, message, tmp_path, capsys):
    folder = write_run(tmp_path / "broken", "kqv")
    (folder / name).unlink()
    if contents is not None:
        (folder / name).write_text(contents, encoding="utf-8")
    status, output, errors = run(folder, capsys=capsys)
    assert (status, output) == (2, "")
    assert errors.startswith("results_table.py: error: ") and errors.count("\n") == 1 and message in errors


def test_checkpoints_without_their_log_are_not_passed_over(two_seeds, capsys):
    (two_seeds / "kv_1/checkpoint_step_4.pt").touch()
    (two_seeds / "kv_1/metrics.jsonl").unlink()
    status, output, errors = run(two_seeds, capsys=capsys)
    assert (status, output) == (2, "") and "kv_1/metrics.jsonl: missing" in errors and errors.count("\n") == 1


def test_of_a_log_that_was_appended_to_the_last_record_of_a_step_counts(tmp_path, capsys):
    """Killed in the middle of a line and resumed from an earlier checkpoint, as the scripts do it."""
    folder = write_run(tmp_path / "kqv_1", "kqv", final=(9.0, 90.0))
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.write('{"kind": "train", "st')
        log.write(json.dumps({"kind": "train", "step": 2, "tokens": 512, "loss": 4.0}) + "\n")
        log.write(json.dumps(evaluation(2, 40.0, 80.0)) + "\n")
        log.write(json.dumps(evaluation(STEPS, 5.0, 20.0, "final")) + "\n{")
    (table,) = tables(folder, capsys=capsys)
    assert table["rows"][0]["perplexity"] == 5.0 and table["runs"][0]["step"] == STEPS
    evaluations = results_table.Run(folder).evaluations
    assert [(e["step"], e["text_perplexity"]) for e in evaluations] == [(0, 300.0), (2, 80.0), (4, 20.0)]


def test_what_a_run_began_with_and_changed_on_the_way_is_said(two_seeds, capsys):
    for name, more in (
        ("kv_1", {"init_from": "a.pt"}),
        ("kv_2", {"changes": ["step 2: dropout 0.0 -> 0.1"]}),
    ):
        about = yaml.safe_load((two_seeds / name / "run.yaml").read_text(encoding="utf-8"))
        (two_seeds / name / "run.yaml").write_text(yaml.safe_dump(about | more), encoding="utf-8")
    (table,) = tables(two_seeds, capsys=capsys)
    assert [row["variant"] for row in table["rows"]] == ["QKV", "Q–K=V*", "Q–K=V"]
    assert "* Q–K=V (kv_1): init_from is a.pt, and None for QKV" in table["notes"]
    assert "kv_2: settings changed on the way: step 2: dropout 0.0 -> 0.1." in table["notes"]


def test_settings_that_cannot_change_the_result_are_those_of_the_training_scripts(two_seeds):
    setup = results_table.Run(two_seeds / "kqv_1").setup
    listed = set(script_of("kqv").MAY_CHANGE)
    assert {"compile", "micro_batch_size", "keep_checkpoints", "wandb"} <= listed
    assert not (listed - {"train_data", "val_data"}) & set(setup)


def test_no_runs_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for args in ([], ["missing"], [tmp_path]):
        status, _, errors = run(*args, capsys=capsys)
        assert status == 2 and "no runs found" in errors and errors.count("\n") == 1


def test_the_same_run_twice_is_refused(two_seeds, capsys):
    write_run(two_seeds / "kv_again", "kv", 2)
    status, _, errors = run(two_seeds, capsys=capsys)
    assert (
        status == 2 and "kv_2 and" in errors and "the same run twice (Q–K=V, seed 2, same settings)" in errors
    )


def test_runs_of_the_training_scripts(data, tmp_path, capsys):
    """Two variants at two seeds, through training."""
    finals = {}
    for alias in ("kqv", "kv"):
        for seed in (1, 2):
            folder = tmp_path / f"runs/{alias}_packed_seed{seed}"
            script_of(alias).main(arguments(data, folder, f"seed={seed}"))
            finals[alias, seed] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])[
                "perplexity"
            ]
    capsys.readouterr()
    (table,) = tables(tmp_path / "runs", capsys=capsys)
    qkv, kv = table["rows"]
    assert [note for note in table["notes"] if not note.startswith("Validation data")] == []
    assert qkv["perplexity"] == pytest.approx((finals["kqv", 1] + finals["kqv", 2]) / 2)
    changes = [100 * (finals["kv", seed] / finals["kqv", seed] - 1) for seed in (1, 2)]
    assert kv["perplexity_vs_qkv"] == pytest.approx(sum(changes) / 2)
    for alias, row in zip(("kqv", "kv"), table["rows"], strict=True):
        model = script_of(alias).load_model(tmp_path / f"runs/{alias}_packed_seed1/final_model.pt")
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["cache_bytes_per_token"] == model.make_cache(1, 1, torch.bfloat16).nbytes
    # The small files alone tell the same, but for what the checkpoints recorded.
    for path in (tmp_path / "runs").glob("*/*.pt"):
        path.unlink()
    (small,) = tables(tmp_path / "runs", capsys=capsys)
    assert [row["perplexity_vs_qkv"] for row in small["rows"]] == [
        row["perplexity_vs_qkv"] for row in table["rows"]
    ]
