"""Exported folders as `lm_eval --model hf` takes them, against run_eval.py, item by item."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import VARIANTS, script_of
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from test_export import export, modules, save  # noqa: F401
from test_run_eval import FIVE, harness, tasks  # noqa: F401

from common import load_tokenizer
from run_eval import CheckpointLM


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """Checkpoint and exported folder of an alias, made once: byte tokens, room for five solved examples."""
    made = {}

    def make(alias):
        if alias not in made:
            folder = tmp_path_factory.mktemp(alias)
            checkpoint = folder / "checkpoint.pt"
            save(alias, checkpoint, {"vocab_size": 260, "n_positions": 1024})
            export(alias, checkpoint, folder / "hf", "--tokenizer", "bytes")
            made[alias] = checkpoint, folder / "hf"
        return made[alias]

    return make


def answers(samples):
    """{(task, document): its answers} of the harness's samples; an answer is (log-probability, is greedy)."""
    return {
        (task, sample["doc_id"]): [tuple(answer) for answer in sample["filtered_resps"]]
        for task, items in samples.items()
        for sample in items
    }


def same_answers(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) == 13 * len(FIVE)
    for item, expected in ours.items():
        values, greedy = zip(*expected, strict=True)
        their_values, their_greedy = zip(*theirs[item], strict=True)
        assert their_greedy == greedy
        assert their_values == pytest.approx(values, abs=1e-3)


def own_scores(alias, checkpoint, folder):
    """The samples of run_eval.py's own language model."""
    model = script_of(alias).load_model(checkpoint)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = CheckpointLM(model, load_tokenizer("bytes"), batch_size=4)
    return simple_evaluate(lm, tasks=FIVE, num_fewshot=5, task_manager=manager)["samples"]


def check(alias, exports, folder):
    checkpoint, exported = exports(alias)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    arguments = f"pretrained={exported},trust_remote_code=True"
    settings = {"tasks": FIVE, "num_fewshot": 5, "task_manager": manager, "device": "cpu", "batch_size": 4}
    theirs = simple_evaluate("hf", model_args=arguments, **settings)["samples"]
    same_answers(answers(own_scores(alias, checkpoint, folder)), answers(theirs))


@pytest.mark.parametrize("alias", ["kv"])
def test_the_five_tasks_score_as_in_run_eval(alias, exports, tasks):  # noqa: F811
    check(alias, exports, tasks)


@pytest.mark.slow
@pytest.mark.parametrize("alias", [alias for alias in VARIANTS if alias != "kv"])
def test_the_five_tasks_score_as_in_run_eval_for_the_others(alias, exports, tasks):  # noqa: F811
    check(alias, exports, tasks)


@pytest.mark.slow
def test_the_command_scores_what_run_eval_scores(exports, tasks, tmp_path):  # noqa: F811
    checkpoint, exported = exports("qgqa")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={exported},trust_remote_code=True", "--tasks", ",".join(FIVE)]
    command += ["--include_path", str(tasks), "--num_fewshot", "5", "--log_samples"]
    command += ["--output_path", str(tmp_path / "scores")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]

    theirs = {}
    for name in FIVE:
        (file,) = (tmp_path / "scores").rglob(f"samples_{name}_*.jsonl")
        theirs[name] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for sample in theirs[name]:  # written as text
            sample["filtered_resps"] = [
                (float(value), str(greedy) == "True") for value, greedy in sample["filtered_resps"]
            ]
    with torch.inference_mode():
        same_answers(answers(own_scores("qgqa", checkpoint, tasks)), answers(theirs))
