"""runs/*.sh: what they ask of the training scripts, and the weights that variants of a seed start from."""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import yaml
from conftest import ROOT, VARIANTS, script_of

sys.path.insert(0, str(ROOT / "runs"))
initial_weights = import_module("initial_weights")
CONFIG = ROOT / "configs/model_config_scaling_64.yaml"
# Stands in for the interpreter: notes its arguments, and leaves a finished run where a training script would.
STUB = r"""#!/bin/bash
echo "$@" >> calls.txt
[[ $1 == convert_checkpoint.py ]] && echo "text perplexity: 2.0 before, 2.1 after (+5%)"
[[ $1 == transformer_* ]] || exit 0
to=$(grep -oP -- '--output_dir \K\S+' <<< "$@")
[[ "$@" =~ $FAIL ]] && { echo "it failed"; exit $STATUS; }
mkdir -p $to
echo "seed: 1" > $to/train_config.yaml
echo '{"kind": "final", "step": 1}' > $to/metrics.jsonl
touch $to/final_model.pt
"""


def initial(alias, tmp_path, seed=42):
    path = tmp_path / f"{alias}.pt"
    arguments = [alias, "--model_config", str(CONFIG), "--seed", str(seed), "--output", str(path)]
    initial_weights.main(arguments + (["--n_kv_groups", "2"] if alias in ("gqa", "qgqa") else []))
    return path


@pytest.mark.parametrize("alias", VARIANTS)
def test_variants_of_a_seed_start_from_the_weights_that_they_share(alias, tmp_path):
    own = script_of(alias).load_model(initial(alias, tmp_path)).state_dict()
    qkv = script_of("kqv").load_model(initial("kqv", tmp_path)).state_dict()
    for name in own.keys() & qkv.keys():
        assert torch.equal(own[name], qkv[name])
    q, k, v = qkv["h.1.attn.c_attn.weight"].chunk(3)
    rows = {"gqa": 32, "qgqa": 32, "mqa": 16, "qmqa": 16}.get(alias, 64)
    expected = {
        "kqv": {"c_attn": [q, k, v]},
        "qk": {"c_kv": [k, v]},
        "kv": {"c_q": [q], "c_k": [k]},
        "k": {"c_k": [k]},
        "gqa": {"c_q": [q], "c_kv": [k[:rows], v[:rows]]},
        "mqa": {"c_q": [q], "c_kv": [k[:rows], v[:rows]]},
        "qgqa": {"c_q": [q], "c_k": [k[:rows]]},
        "qmqa": {"c_q": [q], "c_kv": [k[:rows]]},
    }[alias]
    for projection, parts in expected.items():
        assert torch.equal(own[f"h.1.attn.{projection}.weight"], torch.cat(parts))


def test_qkv_starts_as_its_training_script_would(tmp_path):
    script = script_of("kqv")
    torch.manual_seed(43)
    fresh = script.GPT(script.ModelConfig(**yaml.safe_load(CONFIG.read_text(encoding="utf-8"))))
    stored = script.load_model(initial("kqv", tmp_path, seed=43)).state_dict()
    for name, weight in fresh.state_dict().items():
        assert torch.equal(weight, stored[name])


@pytest.fixture
def house(tmp_path):
    """A folder with the shell scripts and a stub for the interpreter."""
    (tmp_path / "runs").mkdir()
    for name in ("scaling", "replicate"):
        script = (ROOT / f"runs/{name}.sh").read_text(encoding="utf-8")
        (tmp_path / f"runs/{name}.sh").write_text(script, encoding="utf-8")
    (tmp_path / "python").write_text(STUB, encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    return tmp_path


@pytest.fixture
def small_house(house):
    """The same with a grid of four runs."""
    path = house / "runs/scaling.sh"
    grid = 'grid() {\n    cells 64 20 "4 8" "42" 256 packed kqv kv\n}\n'
    path.write_text(re.sub(r"(?ms)^grid\(\) \{\n.*?^\}\n", grid, path.read_text(encoding="utf-8")), encoding="utf-8")
    return house


def run(house, name, fail="^$", status=0):
    """The process of a script of runs/, its commands, and those of them that train."""
    (house / "calls.txt").write_text("", encoding="utf-8")
    settings = {"PYTHON": str(house / "python"), "JOBS": "1", "FAIL": fail, "STATUS": str(status)}
    command = ["bash", f"runs/{name}.sh"]
    done = subprocess.run(command, cwd=house, env=os.environ | settings, capture_output=True, text=True)
    calls = [shlex.split(line) for line in (house / "calls.txt").read_text(encoding="utf-8").splitlines()]
    return done, calls, [call for call in calls if call[0].startswith("transformer_")]


@pytest.mark.parametrize("name", ["scaling", "replicate"])
def test_every_run_is_one_that_its_training_script_takes(house, name):
    done, _, trained = run(house, name)
    assert done.returncode == 0, done.stderr
    folders = [call[call.index("--output_dir") + 1] for call in trained]
    assert len(folders) == len(set(folders)) > 10
    for call in trained:
        if "seed=42" not in call:
            continue  # the same again
        script = import_module(call[0].removesuffix(".py"))
        settings = dict(script.setting(word) for word in call if "=" in word)
        paths = [ROOT / call[call.index(f"--{kind}_config") + 1] for kind in ("model", "train")]
        model = script.load_config(script.ModelConfig, paths[0], settings)
        config = script.load_config(script.TrainingConfig, paths[1], settings)
        assert config.tokens_per_step == 1024 and config.target_tokens % 1024 == 0
        assert config.seq_length <= model.n_positions


def test_no_run_and_no_conversion_is_repeated(small_house):
    """Each end point of QKV is converted; a run counts that is complete here, or recorded."""
    _, calls, first = run(small_house, "scaling")
    models = [call[call.index("--checkpoint") + 1] for call in calls if call[0] == "convert_checkpoint.py"]
    folders = [f"outputs_scaling/kqv_d64_n20_lr{rate}e-3_T256_packed_seed42" for rate in (4, 8)]
    assert models == [f"{folder}/final_model.pt" for folder in folders]
    assert "2.1 after" in (small_house / folders[0] / "conversion.txt").read_text(encoding="utf-8")
    for name in folders:
        (small_house / name / "metrics.jsonl").unlink()
    (small_house / "results/scaling").mkdir(parents=True)
    line = '{"name":"kqv_d64_n20_lr8e-3_T256_packed_seed42","variant":"KQV"}\n'
    (small_house / "results/scaling/runs.jsonl").write_text(line, encoding="utf-8")
    done, calls, again = run(small_house, "scaling")
    assert done.returncode == 0 and again == first[:1]
    assert "convert_checkpoint.py" not in [call[0] for call in calls]


@pytest.mark.parametrize(("status", "trained"), [(2, 4), (143, 2)], ids=["fails", "is stopped"])
def test_after_a_run_that_fails_the_others_go_on_and_a_stop_stops_all(small_house, status, trained):
    name = "kv_d64_n20_lr4e-3_T256_packed_seed42"  # the second of four
    done, _, runs = run(small_house, "scaling", fail=name, status=status)
    assert done.returncode != 0 and len(runs) == trained
    assert f"{name}: it failed" in done.stderr


@pytest.mark.parametrize("name", ["scaling", "replicate"])
def test_the_text_is_asked_about_before_anything_is_trained(house, name):
    stub = STUB.replace("[[ $1 == convert", '[[ "$@" =~ --text ]] && exit 2\n[[ $1 == convert')
    (house / "python").write_text(stub, encoding="utf-8")
    done, calls, _ = run(house, name)
    assert done.returncode == 2
    assert [call[0] for call in calls] == ["dataset_download.py", "runs/gather.py"]
