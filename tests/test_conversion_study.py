"""The study of conversion: best rates, tables of made-up runs, other ways of conversion, Slim attention."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from importlib import import_module

import pytest
import torch
from conftest import ROOT, script_of
from test_convert import PAIRS, attention_to_the_first, build, logits_of, random_loader, save, tie_values

import convert_checkpoint as cc


def imported(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"results/conversion/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


study = imported("study")
slim = imported("slim_attention")
resting_head = imported("resting_head")


def write_run(folder, name, losses, finished=True):
    """The metrics of a run whose evaluations gave these text losses."""
    (folder / name).mkdir(parents=True)
    lines = [{"kind": "train", "step": 1, "tokens": 1024, "loss": 9.0}]
    for i, loss in enumerate(losses):
        kind = "final" if finished and i == len(losses) - 1 else "val"
        lines.append({"kind": kind, "step": 100 * i, "tokens": 102_400 * i, "text_loss": loss})
    (folder / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture
def results(tmp_path):
    """results/scaling and results/conversion, empty."""
    scaling, conversion = tmp_path / "results/scaling", tmp_path / "results/conversion"
    scaling.mkdir(parents=True)
    conversion.mkdir()
    return scaling, conversion


def run_study(results, *arguments):
    scaling, conversion = results
    study.main(["--scaling", str(scaling), "--results", str(conversion), *arguments])


def test_the_best_rate_is_that_of_the_seeds_which_all_rates_have(results, capsys):
    scaling, conversion = results
    runs = [("4", 42, 2.0), ("8", 42, 1.9), ("16", 42, 2.1), ("8", 43, 2.5), ("16", 43, 1.0)]
    for rate, seed, loss in runs:
        write_run(scaling, f"kqv_d64_n80_lr{rate}e-3_T256_packed_seed{seed}", [5.0, loss])
    write_run(scaling, "kqv_d64_n80_lr0.5e-3_T256_packed_seed42", [5.0, 0.1], finished=False)
    write_run(scaling, "kqv_d64_n80_lr2e-3_T256_scored_seed42", [5.0, 0.1])  # another protocol
    run_study(results, "best_rate", "kqv", "64", "80")
    assert capsys.readouterr().out == "8\n"
    with pytest.raises(SystemExit) as ended:
        run_study(results, "best_rate", "kv", "64", "80")
    assert ended.value.code == 2
    assert "no finished runs" in capsys.readouterr().err


def test_tables_hold_prices_gaps_and_intervals(results):
    """t with two degrees of freedom: 0.01, 0.02, 0.03 are 0.02 ± 4.303 x 0.01 / sqrt(3)."""
    scaling, conversion = results
    for seed, price in [(42, 0.01), (43, 0.02), (44, 0.03)]:
        write_run(scaling, f"kqv_d64_n80_lr8e-3_T256_packed_seed{seed}", [5.0, 2.0])
        write_run(scaling, f"kv_d64_n80_lr4e-3_T256_packed_seed{seed}", [5.0, 2.1])
        write_run(scaling, f"kv_d64_n80_lr8e-3_T256_packed_seed{seed}", [5.0, 2.2])
        write_run(conversion, f"kqv_d64_n80_at100_none_10_seed{seed}", [2.0, 1.9])
        write_run(conversion, f"kqv_d64_n80_at100_joint_svd_10_seed{seed}", [2.05, 1.9 + price])
        write_run(conversion, f"kqv_d64_n80_at50_none_0_seed{seed}", [2.5, 2.05])
        write_run(conversion, f"kqv_d64_n80_at50_joint_svd_0_seed{seed}", [2.5, 2.09 - price])
        write_run(scaling, f"kqv_d64_n80_lr16e-3_T256_packed_seed{seed}", [5.0, 2.5])
        for rate, step in ((8, 70), (8, 100), (16, 100)):
            source = f"kqv_d64_n80_lr{rate}e-3_T256_packed_seed{seed}"
            place = {"source": source, "checkpoint": f"checkpoint_step_{step}.pt"}
            line = place | {"way": study.DEFAULT, "before": 2.0, "after": 2.0 + price * step / 100 * rate / 8}
            with open(conversion / "one_shot.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
    run_study(results, "tables")
    text = (conversion / "results.md").read_text()
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    mean = "+0.0200 ± 0.0248"
    alone = sections["Conversion alone"]
    assert "+0.02000 ± 0.02484" in alone and "+0.1000 ± 0.0000" in alone
    assert "| 70 " in sections["Conversion alone, along the training"]
    half, row = sections["Converted and trained on"].splitlines()[-2:]
    ahead = [cell.strip() for cell in half.strip("|").split("|")][-2:]
    assert ahead == ["+0.0300 ± 0.0248", "+0.0200, +0.0300, +0.0400"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "QKV", "d64", "80", "at the end", "10 %", "joint_svd", "+0.0500 ± 0.0000", mean,
        "+0.0100, +0.0200, +0.0300", "+0.1000 ± 0.0000", "", "",
    ]  # fmt: skip
    best = [line for line in sections["From the start"].splitlines() if "best" in line]
    assert len(best) == 2 and "4e-3" in best[1]
    assert (conversion / "conversion.png").stat().st_size > 10_000


@pytest.mark.parametrize(("alias", "to"), PAIRS)
@pytest.mark.parametrize("way", study.WAYS, ids=lambda way: " ".join(map(str, way.values())))
def test_every_way_is_exact_where_it_can_be(alias, to, way):
    """Values that are functions of the keys; the plain ways do not find that out."""
    model = build(alias, initializer_range=0.1)
    tie_values(model)
    expected = logits_of(model)
    config = cc.target_config(alias, model.config, to, None)
    weights = study.convert_by(way | {"tokens": 400}, model, to, config, random_loader)
    target = getattr(script_of(to), cc.VARIANTS[to]["class"])(config).eval()
    target.load_state_dict(weights)
    exact = (logits_of(target) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert exact == way["method"].startswith("joint_svd")


def test_a_fit_costs_less_than_where_it_starts():
    model, heads = build("kqv"), cc.Heads(build("kqv").config, 4, caches_values=False)
    way = study.DEFAULT | {"method": "joint_svd, fitted"}
    moments = [study.OtherMoments(heads, way) for _ in model.h]
    cc.collect_moments(model, moments, random_loader(), 400)
    sums = moments[1]
    u, g = (torch.cat(parts, dim=1) for parts in zip(*sums.positions, strict=True))
    u = u - sums.mean()[:, None]

    def cost(down, up):
        return ((g * (u - u @ down.mT @ up.mT)).sum(-1) ** 2).sum()

    attention = cc.AttentionWeights(model.state_dict(), 1, heads)
    before = cc.joint_svd(sums.covariance(), sums.metric(attention), 8)
    after = sums.fit(*before)
    assert cost(*after) < 0.99 * cost(*before)


def test_a_head_is_made_to_rest_on_the_first_position(data_dir, tmp_path, capsys):
    path = save("kqv", build("kqv", initializer_range=0.1), tmp_path / "source.pt")
    model = script_of("kqv").load_model(path)
    resting_head.make_head_rest(model, random_loader(n_rows=40))
    assert attention_to_the_first("kqv", model, random_loader()[0][0], 1) > 0.99
    (x,) = cc.inputs_of([model.h[1].attn], model, random_loader()[0][0])
    value = model.h[1].attn.c_attn(x)[0, :, 64:72]
    assert value[0].abs().max() < 0.1 * value.abs().max()

    capsys.readouterr()  # what the preparation of the data printed
    resting_head.main([str(path), "--data", str(data_dir)])
    weightings = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert weightings == ["gradient", "gradient, only it", "activation"]


def test_one_shot_goes_on_where_it_stopped(results, data_dir, tmp_path, monkeypatch):
    _, conversion = results
    folder = tmp_path / "kqv_d64_n80_lr8e-3_T256_packed_seed42"
    folder.mkdir()
    path = save("kqv", build("kqv", initializer_range=0.1), folder / "checkpoint_step_7680.pt")
    monkeypatch.setattr(study, "DEFAULT", study.DEFAULT | {"tokens": 500})
    ways = [study.DEFAULT | {"method": "mean"}, study.DEFAULT | {"weighting": "none"}]
    for so_far in (0, 1, 2, 2):
        monkeypatch.setattr(study, "WAYS", ways[:so_far])
        run_study(results, "one_shot", str(path), "--data", str(data_dir), "--kind", "all")
        lines = [json.loads(line) for line in (conversion / "one_shot.jsonl").read_text().splitlines()]
        assert [line["way"] for line in lines] == [study.DEFAULT, *ways[:so_far]]
    script = script_of("kqv")
    loader = script.get_dataloader(data_dir / "validation", 4, 32, "packed")
    expected = script.evaluate(script.load_model(path), loader)["text_loss"]
    assert lines[0]["before"] == pytest.approx(expected, rel=1e-6)
    assert lines[0]["after"] != lines[0]["before"]


@pytest.mark.parametrize("T", [1, 7, 32])
def test_slim_attention_is_exact_with_keys_alone_in_the_cache(T):
    """Also in pieces: T tokens of prefill, and then one at a time."""
    model = build("kqv", initializer_range=0.2)
    input_ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, _ = model(input_ids)
        k_weights = [block.attn.c_attn.weight.chunk(3)[1].double() for block in model.h]
        condition = max(torch.linalg.cond(weight).item() for weight in k_weights)
        slim.make_slim(model)
        tolerance = 1e-6 * condition * expected.abs().max()
        assert tolerance < 0.05 * expected.abs().max()
        assert (model(input_ids)[0] - expected).abs().max() < tolerance
        cache = script_of("kv").KVCache(model.config, 2, 32, torch.float32, "cpu")
        assert len(cache.layers[0]) == 1
        logits = [model(input_ids[:, :T], cache=cache)[0]]
        for i in range(T, 32):
            logits.append(model(input_ids[:, i : i + 1], cache=cache)[0])
        assert (torch.cat(logits, dim=1) - expected).abs().max() < tolerance


# ---- runs/conversion.sh

# Stands in for the interpreter: notes its arguments, knows the best rate, has a conversion left to do, and leaves
# a finished run where a training script would.
STUB = r"""#!/bin/bash
echo "$@" >> calls.txt
case " $* " in
    *" best_rate "*" replica "*) echo 1 ;;
    *" best_rate "*) echo 8 ;;
    *" --dry_run "*) echo "a way" ;;
esac
[[ $1 == transformer_* ]] || exit 0
to=$(grep -oP -- '--output_dir \K\S+' <<< "$@")
[[ "$@" =~ $FAIL ]] && { mkdir -p $to; touch $to/checkpoint_step_1.pt; echo "it failed"; exit $STATUS; }
mkdir -p $to
echo "seed: 1" > $to/train_config.yaml
echo '{"kind": "final", "step": 1}' > $to/metrics.jsonl
tokens=$(grep -oP 'target_tokens=\K\d+' <<< "$@")
touch $to/checkpoint_step_$((tokens / 1024)).pt
"""


@pytest.fixture
def house(tmp_path):
    """The shell script, with a stub for the interpreter."""
    (tmp_path / "runs").mkdir()
    script = (ROOT / "runs/conversion.sh").read_text(encoding="utf-8")
    (tmp_path / "runs/conversion.sh").write_text(script, encoding="utf-8")
    (tmp_path / "python").write_text(STUB, encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    steps = {"d64_n5": 480, "d64_n20": 1920, "d64_n80": 7680, "d96_n5": 1620, "d96_n20": 6480}
    for shape, last_step in (steps | {"d128_n5": 3840, "d128_n20": 15360}).items():
        leave_source(tmp_path, shape, last_step)
    return tmp_path


def leave_source(house, shape, last_step):
    """What runs/scaling.sh leaves of QKV at the best rate."""
    for seed in (42, 43, 44):
        folder = house / f"outputs_scaling/kqv_{shape}_lr8e-3_T256_packed_seed{seed}"
        folder.mkdir(parents=True)
        (folder / f"checkpoint_step_{last_step}.pt").touch()


def run(house, fail="^$", status=0, parts="1 2 3 4 5 6 7 8"):
    """The ended process, and the commands that it gave since the last time."""
    (house / "calls.txt").write_text("", encoding="utf-8")
    settings = {"PYTHON": str(house / "python"), "JOBS": "2", "PARTS": parts}
    settings |= {"FAIL": fail, "STATUS": str(status)}
    command = ["bash", "runs/conversion.sh"]
    ended = subprocess.run(command, cwd=house, env=os.environ | settings, capture_output=True, text=True)
    calls = [shlex.split(line) for line in (house / "calls.txt").read_text(encoding="utf-8").splitlines()]
    return ended, calls


def trained(calls):
    """{name of the run: its command} of the training among the commands."""
    runs = {}
    for call in calls:
        if call[0].startswith("transformer_"):
            name = call[call.index("--output_dir") + 1].removeprefix("outputs_conversion/")
            assert name not in runs
            runs[name] = call
    return runs


def test_every_run_is_one_that_its_training_script_takes_and_the_tables_know(house):
    ended, calls = run(house)
    assert ended.returncode == 0, ended.stderr
    runs = trained(calls)
    # as in results/conversion/README.md, where two runs join part 3
    assert len(runs) == 42 + 46 + 28 + 20 + 22 + 12
    for name, call in runs.items():
        script = import_module(call[0].removesuffix(".py"))
        settings = [word for word in call if "=" in word]
        paths = [ROOT / call[call.index(f"--{kind}_config") + 1] for kind in ("model", "train")]
        script.load_config(script.ModelConfig, paths[0], settings)
        config = script.load_config(script.TrainingConfig, paths[1], settings)
        assert config.tokens_per_step == 1024
        assert study.FROM_THE_START.fullmatch(name) or study.TRAINED_ON.fullmatch(name)

    # what is converted is a checkpoint that a run of that length leaves, and its training goes on from it
    steps = {"d64_n80": 7680, "d96_n60": 19440, "dreplica_n1": 1500}
    converted = [call for call in calls if call[0] == "convert_checkpoint.py"]
    assert len(converted) == sum("_at" in name and "_none_" not in name for name in runs)
    for call in converted:
        output = call[call.index("--output") + 1]
        name = output.removeprefix("outputs_conversion/").removesuffix(".initial.pt")
        assert runs[name][runs[name].index("--init_from") + 1] == output
        shape, tenths = re.match(r"\w+?_(d\w+_n\d+)_at(\d+)0_", name).groups()
        step = steps[shape] * int(tenths) // 10
        assert call[call.index("--checkpoint") + 1].endswith(f"/checkpoint_step_{step}.pt")


def test_training_goes_on_at_the_rate_of_the_schedule(house):
    """At half and at a tenth: what get_lr says of the source's step, its peak being 8e-3."""
    _, calls = run(house, parts="2")
    runs = trained(calls)
    script = script_of("kqv")
    for at, step in (("50", 3840), ("10", 768)):
        call = runs[f"kqv_d64_n80_at{at}_none_0_seed42"]
        settings = [word for word in call if "=" in word]
        path = ROOT / "configs/train_config_scaling.yaml"
        config = script.load_config(script.TrainingConfig, path, settings)
        source = [*settings, "target_tokens=7864320", "warmup_steps=768", "learning_rate=8e-3"]
        whole = script.load_config(script.TrainingConfig, path, source)
        assert config.learning_rate == pytest.approx(script.get_lr(step, whole), rel=1e-4)
        assert config.total_steps == 7680 - step
        assert config.min_lr == pytest.approx(8e-4)


def test_what_is_done_is_not_repeated_and_what_stopped_is_resumed(house):
    stopped = "kqv_d64_n80_at50_joint_svd_0_seed43"
    ended, calls = run(house, parts="2", fail=stopped, status=1)
    assert ended.returncode != 0
    assert f"{stopped}: it failed" in ended.stderr
    assert len(trained(calls)) == 42
    ended, calls = run(house, parts="2")
    assert ended.returncode == 0
    (call,) = trained(calls).values()
    assert f"outputs_conversion/{stopped}" in call and "--init_from" not in call
    assert "convert_checkpoint.py" not in [call[0] for call in calls]


def test_a_stop_stops_all(house):
    ended, calls = run(house, parts="2", fail="at100", status=143)
    assert ended.returncode != 0
    assert len(trained(calls)) <= 4


def test_a_source_whose_checkpoints_are_gone_is_trained_again_once(house):
    names = [f"kqv_d64_n80_lr8e-3_T256_packed_seed{seed}" for seed in (42, 43, 44)]
    for name in names:
        shutil.rmtree(house / f"outputs_scaling/{name}")
        write_run(house / "results/scaling", name, [5.0, 2.0])
    ended, calls = run(house, parts="1 2")
    assert ended.returncode == 0, ended.stderr
    runs = trained(calls)
    assert len(runs) == 42 + 3 and runs.keys() > {*names}
    assert not [name for name in names if (house / f"results/conversion/{name}").exists()]
    sources = [call[call.index("--checkpoint") + 1] for call in calls if call[0] == "convert_checkpoint.py"]
    assert {source.rpartition("/")[0].removeprefix("outputs_conversion/") for source in sources} == {*names}


def test_a_source_that_ends_elsewhere_stops_all(house):
    shutil.rmtree(house / "outputs_scaling/kqv_d64_n80_lr8e-3_T256_packed_seed42")
    stub = STUB.replace('case " $* " in', 'case " $* " in\n    *" same_end "*) exit 1 ;;')
    (house / "python").write_text(stub, encoding="utf-8")
    for times in (1, 0):  # whatever the other job does, and when started again
        ended, calls = run(house, parts="1")
        assert ended.returncode != 0 and len(trained(calls)) == times
        assert "does: see" in ended.stderr or times == 1
    assert (house / "outputs_conversion/kqv_d64_n80_lr8e-3_T256_packed_seed42.differs").exists()


def test_a_run_that_ends_elsewhere_than_its_record_is_named(results, tmp_path, capsys):
    name = "kqv_d64_n80_lr8e-3_T256_packed_seed42"
    write_run(results[0], name, [5.0, 2.0])
    for folder, loss, status in (("same", 2.00001, 0), ("other", 2.01, 1)):
        write_run(tmp_path / folder, name, [5.0, loss])
        with pytest.raises(SystemExit) as ended:
            run_study(results, "same_end", str(tmp_path / folder / name))
        assert ended.value.code == status
    assert "2.01000, its record at 2.00000" in capsys.readouterr().err


def test_another_text_is_refused(house):
    (house / "scaling_data/train").mkdir(parents=True)
    (house / "scaling_data/train/metadata.json").write_text('{"revision": "sha256:aa"}', encoding="utf-8")
    (house / "results/scaling").mkdir(parents=True)
    (house / "results/scaling/corpus.txt").write_text("sha256:bb\n", encoding="utf-8")
    ended, calls = run(house)
    assert ended.returncode == 2
    assert "sha256:aa" in ended.stderr and "sha256:bb" in ended.stderr
    assert not trained(calls)
