"""Exported folders as `lm_eval --model hf` takes them, against run_eval.py, item by item."""

import pytest
from conftest import VARIANTS
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from test_export import export, modules, save  # noqa: F401
from test_run_eval import FIVE, harness, tasks  # noqa: F401

from common import load_tokenizer
from run_eval import CheckpointLM


def answers(samples):
    """{(task, document): its answers} of the harness's samples; an answer is (log-probability, is greedy)."""
    return {
        (task, sample["doc_id"]): [tuple(answer) for answer in sample["filtered_resps"]]
        for task, items in samples.items()
        for sample in items
    }


OTHERS = [pytest.param(alias, marks=pytest.mark.slow) for alias in VARIANTS if alias != "kv"]


@pytest.mark.parametrize("alias", ["kv", *OTHERS])
def test_the_five_tasks_score_as_in_run_eval(alias, tmp_path, tasks):  # noqa: F811
    """Byte tokens, and room for five solved examples."""
    model = save(alias, tmp_path / "a.pt", {"vocab_size": 260, "n_positions": 1024})
    folder = export(alias, tmp_path / "a.pt", tmp_path / "hf", "--tokenizer", "bytes")
    lm = CheckpointLM(model, load_tokenizer("bytes"), batch_size=4)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    settings = {"tasks": FIVE, "num_fewshot": 5, "task_manager": manager}
    ours = answers(simple_evaluate(lm, **settings)["samples"])
    settings |= {"model_args": f"pretrained={folder},trust_remote_code=True", "device": "cpu", "batch_size": 4}
    theirs = answers(simple_evaluate("hf", **settings)["samples"])
    assert ours.keys() == theirs.keys() and len(ours) == 13 * len(FIVE)
    for item, expected in ours.items():
        values, greedy = zip(*expected, strict=True)
        their_values, their_greedy = zip(*theirs[item], strict=True)
        assert their_greedy == greedy
        assert their_values == pytest.approx(values, abs=1e-3)
