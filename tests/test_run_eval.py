"""run_eval.py against the harness's HFLM over transformers' GPT-2, on small files in the tasks' formats."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval
import pytest
import torch
import transformers
import yaml
from conftest import ROOT, SENTENCES, VARIANTS, gpt2_of, script_of
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import run_eval
from common import load_tokenizer

HARNESS_TASKS = Path(lm_eval.__file__).parent / "tasks"
PIQA = str(HARNESS_TASKS / "piqa/piqa.yaml")
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
FIVE = ["arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande"]
SHAPE = {"vocab_size": 260, "n_positions": 1024, "n_embd": 32, "n_layer": 2, "n_head": 2}


def build(alias, seed=0, **changes):
    """A small model with large random weights, so that its scores differ from request to request."""
    script, shape = script_of(alias), SHAPE | changes
    torch.manual_seed(seed)
    groups = VARIANTS[alias]["groups"] and (1 if "mqa" in alias else 2)
    config = script.ModelConfig(**shape, n_kv_groups=groups, initializer_range=0.3)
    return getattr(script, VARIANTS[alias]["class"])(config).eval()


def save(model, alias, path, train_data="nowhere", **entries):
    """A checkpoint of ours."""
    script = script_of(alias)
    contents = {"variant": script.VARIANT, "step": 8000, "epoch": 0, "tokens_seen": 123}
    contents |= {"model_state_dict": model.state_dict(), "model_config": asdict(model.config)}
    contents |= {"train_config": {"train_data": str(train_data)}} | entries
    torch.save({name: value for name, value in contents.items() if value is not None}, path)
    return path


def byte_tokenizer():
    """The byte tokenizer, as transformers knows tokenizers: id 97 is the letter a, 256 is end of text."""
    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={letter: value for value, letter in letters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    end |= {"clean_up_tokenization_spaces": False}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end)


def oracle(model):
    gpt2 = gpt2_of(model, bos_token_id=256, eos_token_id=256)
    return HFLM(pretrained=gpt2, tokenizer=byte_tokenizer(), batch_size=1)


def ours(model, batch_size=3):
    return run_eval.CheckpointLM(model, load_tokenizer("bytes"), batch_size)


def requests(kind, arguments):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


PLACES = ["the harbour", "a hill", "the old mill", "the river", "a bridge", "the market"]
THINGS = ["boat", "cart", "lantern", "letter", "basket", "bell", "rope"]


def arc(i):
    answers = [f"{THINGS[(i + j) % 7]} number {i * j}" for j in range(3 + (i % 4 != 3))]
    marks = list("ABCD" if i % 2 else "1234")[: len(answers)]
    question = {"id": str(i), "question": f"Which thing stands at {PLACES[i % 6]}?"}
    return question | {"choices": {"text": answers, "label": marks}, "answerKey": marks[i % 3]}


def hellaswag(i):
    waits = ["", " [substeps] and waits"]
    endings = [f"puts the {THINGS[(i * j) % 7]} down{waits[j % 2]}." for j in range(1, 5)]
    start = {"ctx_a": f"A woman walks to {PLACES[i % 6]}.", "ctx_b": "she" if i % 2 else "the woman"}
    start |= {"ind": i, "activity_label": "Walking [title] out"}
    return start | {"endings": endings, "label": str(i % 4)}


def piqa(i):
    goal = {"goal": f"How to keep {i} papers together", "label": i % 2}
    goal["sol1"] = f"Tie it with a {THINGS[i % 7]}"
    return goal | {"sol2": f"Leave it at {PLACES[i % 6]} for {i} days."}


def winogrande(i):
    one, other = THINGS[i % 7], THINGS[(i + 3) % 7]
    sentence = f"The {one} did not fit into the {other} at {PLACES[i % 6]} because the _ was too small."
    return {"sentence": sentence, "option1": one, "option2": other, "answer": str(1 + i % 2)}


FORMATS = {"arc_challenge": arc, "arc_easy": lambda i: arc(i + 50), "hellaswag": hellaswag, "piqa": piqa}
FORMATS |= {"winogrande": winogrande}
SOURCES = {"arc_challenge": "arc/arc_challenge", "arc_easy": "arc/arc_easy"}
SOURCES |= {"winogrande": "winogrande/default"}


def write_task(folder, name, rows, **settings):
    """A task file, with its documents beside it as JSON lines."""
    files = {}
    for split, some in (("train", rows[:6]), ("validation", rows[6:]), ("test", rows[6:])):
        files[split] = str(folder / f"{name}_{split}.jsonl")
        Path(files[split]).write_text("".join(f"{json.dumps(row)}\n" for row in some), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | data | settings), encoding="utf-8")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder of task files: the five on local documents, one to generate and one of whole texts."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in FIVE:
        include = str(HARNESS_TASKS / f"{SOURCES.get(name, f'{name}/{name}')}.yaml")
        write_task(folder, name, [FORMATS[name](i) for i in range(6 + 13)], include=include)
    splits = {"training_split": "train", "test_split": "test"}
    texts = [{"text": " ".join(SENTENCES[i : i + 1 + i % 3])} for i in range(12)]
    whole = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    write_task(
        folder, "texts", texts, **splits, output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": metric} for metric in whole],
    )  # fmt: skip
    write_task(
        folder, "sums", [{"a": i, "b": i + 1} for i in range(12)], **splits, output_type="generate_until",
        doc_to_text="{{a}} plus {{b}} is", doc_to_target="{{a + b}}", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
    )  # fmt: skip
    return folder


def scores(lm, folder, names, **settings):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    settings = {"num_fewshot": 5, "task_manager": manager, "log_samples": False} | settings
    return lm_eval.simple_evaluate(lm, tasks=names, **settings)["results"]


@pytest.fixture(autouse=True)
def harness(monkeypatch, tmp_path_factory):
    """Data sets go to a temporary folder. Listing what is installed on the machine would take seconds."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: results.update(lm_eval_version="x"))


# -----------------------------------------------------------------------------
# The language model, request by request


CONTEXTS = ["Question: what is it?\nAnswer:", "a", "ends with spaces  ", " ", "x" * 50, "\n"]
CONTEXTS += ["The boat", "The boat is"]
CONTINUATIONS = [" yes", " n", "A", " a longer answer, of some words.", "\u00e9\u4e2d"]
BATCH_SIZES = (1, 3, 8)
PAIRS = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]


def same_answers(got, expected):
    values, greedy = zip(*got, strict=True)
    expected_values, expected_greedy = zip(*expected, strict=True)
    assert greedy == expected_greedy
    torch.testing.assert_close(values, expected_values, atol=1e-4, rtol=1e-5)


def test_loglikelihood_is_that_of_hflm():
    model = build("kqv")
    asked = [pair for pair in PAIRS if pair[0].strip()]  # HFLM fails where nothing else is in the context
    expected = oracle(model).loglikelihood(requests("loglikelihood", asked))
    for batch_size in BATCH_SIZES:
        same_answers(ours(model, batch_size).loglikelihood(requests("loglikelihood", asked)), expected)
    assert len({round(value, 3) for value, _ in expected}) > len(asked) // 2  # it tells requests apart


def test_empty_contexts_follow_the_end_of_text_token():
    model = build("kqv")
    asked = requests("loglikelihood", [("", "text"), ("", "t"), (" ", "text")])
    got = ours(model).loglikelihood(asked)
    same_answers(got[:2], oracle(model).loglikelihood(asked[:2]))
    for (value, _), text in zip(got, ("text", "t", " text"), strict=True):
        tokens = torch.tensor([[256, *text.encode()]])
        log_p = model(tokens[:, :-1])[0].log_softmax(-1)
        assert value == pytest.approx(log_p.gather(2, tokens[:, 1:, None]).sum().item(), abs=1e-4)


@pytest.mark.parametrize("n_positions", [40, 2048])
def test_a_context_that_is_too_long_loses_its_beginning(n_positions, capsys):
    model = build("kqv", n_positions=n_positions)
    long = "".join(f"{i} and " for i in range(n_positions // 3))
    assert len(long) > n_positions
    exact = long[: n_positions + 1 - len(" end")]
    asked = requests("loglikelihood", [(long, " end"), (long, " x"), (exact, " end"), ("short", " end")])
    expected = oracle(model).loglikelihood(asked)
    same_answers(ours(model).loglikelihood(asked), expected)
    assert f"2 of 4 requests are longer than {n_positions:,} tokens" in capsys.readouterr().err


def test_a_continuation_that_is_too_long_is_an_error():
    model = build("kqv", n_positions=40)
    assert len(ours(model).loglikelihood(requests("loglikelihood", [("a", "b" * 40)]))) == 1
    with pytest.raises(run_eval.InputError, match="continuation of 41 tokens"):
        ours(model).loglikelihood(requests("loglikelihood", [("a", "b" * 41)]))


def test_a_continuation_shared_by_two_splits_of_a_text():
    """The same tokens, cut in two places: HFLM 0.4.13 scores the shorter one at the wrong positions."""
    model = build("kqv")
    asked = requests("loglikelihood", [("one two", " three four"), ("one two three", " four")])
    alone = [oracle(model).loglikelihood([request])[0] for request in asked]
    same_answers(ours(model).loglikelihood(asked), alone)


def test_rolling_windows_are_those_of_hflm():
    model = build("kqv", n_positions=40)
    texts = [("word " * count,) for count in (1, 7, 8, 9, 16, 30)] + [("e",), ("\u4e2d" * 13,)]
    expected = oracle(model).loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    for batch_size in BATCH_SIZES:
        got = ours(model, batch_size).loglikelihood_rolling(requests("loglikelihood_rolling", texts))
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-5)


STOPS = [
    {"until": ["\n"], "max_gen_toks": 30, "do_sample": False},
    {"until": ["q", "zz", "E"], "max_gen_toks": 30},
    {"until": "a", "max_gen_toks": 17},
    {"until": [], "max_gen_toks": 9, "temperature": 0.0},
]


@pytest.mark.parametrize("settings", STOPS, ids=str)
def test_generation_is_that_of_hflm(settings):
    model = build("kqv", n_positions=64)
    prompts = [*CONTEXTS, "a context of more tokens than the model has room for beside the new ones"]
    asked = [(prompt, settings) for prompt in prompts]
    expected = oracle(model).generate_until(requests("generate_until", asked))
    for batch_size in BATCH_SIZES:
        assert ours(model, batch_size).generate_until(requests("generate_until", asked)) == expected
    assert len(set(expected)) > 4


def test_generation_from_nothing_and_with_more_than_one_setting():
    model = build("kqv", n_positions=64)
    asked = [("", STOPS[0]), ("b", STOPS[3]), ("", STOPS[3]), ("cc", STOPS[0])]
    got = ours(model, 8).generate_until(requests("generate_until", asked))
    assert [len(text) <= 9 for text in got][1:3] == [True, True]
    tokens = model.generate(torch.tensor([[256]]), 9, temperature=0)[0, 1:].tolist()
    assert got[2] == ours(model).tok_decode(tokens).partition("<|endoftext|>")[0]


# -----------------------------------------------------------------------------
# The tasks


@pytest.mark.parametrize("batch_size", [1, 8])
def test_all_tasks_score_as_hflm_over_gpt2(tasks, batch_size, reference):
    model, expected = reference
    got = scores(ours(model, batch_size), tasks, [*FIVE, "texts", "sums"])
    assert {name: got[name] for name in FIVE} == {name: expected[name] for name in FIVE}
    for name in ("texts", "sums"):
        assert close(got[name]) == expected[name]
    assert len({got[name]["acc,none"] for name in FIVE}) > 2


def close(metrics):
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
    return metrics | {key: pytest.approx(value, rel=1e-6) for key, value in numbers.items()}


@pytest.fixture(scope="session")
def reference(tasks):
    model = build("kqv")
    return model, scores(oracle(model), tasks, [*FIVE, "texts", "sums"])


@pytest.mark.parametrize("alias", VARIANTS)
def test_every_variant_scores_as_its_own_forward_says(alias, tmp_path):
    model = build(alias, seed=3)
    path = save(model, alias, tmp_path / "checkpoint_step_8000.pt")
    lm = ours(script_of(alias).load_model(path), 4)
    got = lm.loglikelihood(requests("loglikelihood", PAIRS[:12]))
    for (value, _), (context, continuation) in zip(got, PAIRS, strict=False):
        tokens = torch.tensor([list((context + continuation).encode())])
        losses = model.token_losses(model.hidden_states(tokens), tokens)[0]
        assert value == pytest.approx(-losses[len(context.rstrip()) - 1 :].sum().item(), abs=1e-3)


# -----------------------------------------------------------------------------
# The command


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, data_dir):
    """{alias: path} of two checkpoints, as if trained on the prepared data."""
    folder = tmp_path_factory.mktemp("checkpoints")
    train = data_dir / "train"
    return {alias: save(build(alias), alias, folder / f"{alias}.pt", train) for alias in ("kqv", "kv")}


@pytest.fixture
def kv(checkpoints):
    return ["--model", "kv", "--checkpoint", checkpoints["kv"]]


@pytest.fixture
def local(monkeypatch):
    """The harness's 14,000 files are not read; its PIQA stands for them."""

    def manager(include_path=None, include_defaults=False):
        return TaskManager(include_path=include_path or str(HARNESS_TASKS / "piqa"), include_defaults=False)

    monkeypatch.setattr(run_eval, "TaskManager", manager)


def command(*arguments):
    run_eval.main([str(argument) for argument in arguments])


def failure(capsys, *arguments):
    """The one line that a command ends with, with status 2."""
    with pytest.raises(SystemExit) as ended:
        command(*arguments)
    *bars, line = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and not any("error" in bar.lower() for bar in bars), bars
    return line.removeprefix("run_eval.py: error: ")


def written(path):
    """The report, and its first checkpoint; no NaN, which only some readers of JSON take."""
    report = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    return report, next(iter(report["checkpoints"].values()))


def test_one_table_and_one_file_of_two_checkpoints(tasks, checkpoints, data_dir, tmp_path, capsys, reference):
    output = tmp_path / "scores.json"
    given = ["--model", *checkpoints, "--checkpoint", *checkpoints.values(), "--include_path", tasks]
    given += ["--tasks", *FIVE, "perplexity", "--val_data", data_dir / "validation"]
    command(*given, "--output_path", output, "--batch_size", 4)
    out = capsys.readouterr().out
    report, first = written(output)
    second = [*report["checkpoints"].values()][1]
    assert first["harness"]["results"] == {name: reference[1][name] for name in FIVE}
    assert first["harness"]["results"] != second["harness"]["results"]
    assert report["versions"]["lm_eval"] == version("lm_eval")
    assert report["settings"]["num_fewshot"] == 5
    assert second["sha256"] == hashlib.sha256(checkpoints["kv"].read_bytes()).hexdigest()
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in out.splitlines()}
    piqa_scores = first["harness"]["results"]["piqa"]
    value, stderr = 100 * piqa_scores["acc_norm,none"], 100 * piqa_scores["acc_norm_stderr,none"]
    assert lines["piqa", "acc_norm"][:4] == ["50.0", f"{value:.2f}", "±", f"{stderr:.2f}"]
    mean = sum(first["harness"]["results"][name]["acc,none"] for name in FIVE) * 20
    assert lines["mean", "acc"][:2] == ["35.0", f"{mean:.2f}"]
    assert lines["mean,", "published"][-2:] == ["36.40", "35.99"]
    bits = [f"{each['perplexity']['packed']['bits_per_byte']:.2f}" for each in (first, second)]
    assert lines["perplexity", "packed,"][-2:] == bits


def a_record(alias, size, groups):
    """Of a checkpoint with the same accuracy in all of the five tasks."""
    results = {task: {"alias": task, "acc,none": 0.45, "acc_stderr,none": 0.02} for task in FIVE}
    described = {"alias": alias, "size": size, "model_config": {"n_kv_groups": groups}}
    return described | {"harness": {"results": results}}


@pytest.mark.parametrize(("size", "expected"), [("300M", "300M"), ("1.2B", "1.2B"), ("demo", None)])
def test_the_size_is_read_from_the_checkpoint(size, expected):
    config = (ROOT / f"configs/model_config_{size}.yaml").read_text(encoding="utf-8")
    assert run_eval.size_of(yaml.safe_load(config)) == expected


def test_nothing_is_published_of_other_numbers_of_kv_heads():
    """GQA-4 is another model than GQA-8, which is the one of 1.2B; at 300M it is the other way round."""
    shapes = ("1.2B", 8), ("1.2B", 4), ("300M", 4), ("300M", 8), (None, 4), (None, 2)
    records = {str(shape): a_record("gqa", *shape) for shape in shapes}
    records["MQA"] = a_record("mqa", "1.2B", 1)
    (row,) = [line for line in run_eval.table(records) if "published" in line]
    assert row.replace("not given", "-").split()[-7:] == ["35.86", "-", "35.86", "-", "35.86", "-", "-"]


def test_shares_are_in_per_cent():
    """All alike in a table, which says so; what is no share is as the harness gives it."""
    record = a_record("kv", None, None)
    record["harness"]["results"]["own"] = {"acc,none": 0.25, "f1,flexible": 0.5, "brier_score,none": 0.75}
    lines = [line.split() for line in run_eval.table({"A": record})]
    assert [line[-1] for line in lines if line[:1] == ["own"]] == ["25.00", "50.00", "0.75"]
    assert " ".join(lines[-1]).startswith("in per cent: acc, f1, acc_norm;")


def test_two_processes_score_as_one(tasks, checkpoints, data_dir, tmp_path, capsys):
    """Of 5 documents, which two cannot share evenly; rank 0 alone prints and writes."""
    arguments = ["--model", "kqv", "--checkpoint", checkpoints["kqv"], "--include_path", tasks]
    arguments += ["--val_data", data_dir / "validation", "--limit", "5"]
    arguments += ["--tasks", "winogrande", "hellaswag", "texts", "sums", "perplexity"]
    command(*arguments, "--output_path", tmp_path / "1.json")
    given = map(str, [*TWO_PROCESSES, ROOT / "run_eval.py", *arguments, "--output_path", tmp_path / "2.json"])
    ended = subprocess.run([*given], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == capsys.readouterr().out
    (first, one), (second, two) = (written(tmp_path / name) for name in ("1.json", "2.json"))
    assert [report["settings"]["processes"] for report in (first, second)] == [1, 2]
    for name, metrics in one["harness"]["results"].items():
        assert close(metrics) == two["harness"]["results"][name]
    for protocol, results in one["perplexity"].items():
        assert results == pytest.approx(two["perplexity"][protocol], rel=1e-6)


def test_positions_that_training_never_reached_are_not_used(data_dir, tmp_path, monkeypatch):
    """Neither in the rows of the perplexity, which is then that of the final evaluation, nor in prompts."""
    monkeypatch.setattr(run_eval, "TaskManager", None)  # perplexity alone needs no task
    path = save(build("kv"), "kv", tmp_path / "a.pt", train_config={"seq_length": 64})
    val_data, output = data_dir / "validation", tmp_path / "a.json"
    command("--model", "kv", "--checkpoint", path, "--val_data", val_data, "--output_path", output)
    script, model = script_of("kv"), script_of("kv").load_model(path)
    for protocol, results in written(output)[1]["perplexity"].items():
        loader = script.get_dataloader(val_data, 8, 64, protocol)
        assert results == pytest.approx(script.evaluate(model, loader))
    options = SimpleNamespace(tokenizer="bytes", val_data=None)
    known, tokenizer = run_eval.open_checkpoint("kv", str(path), options)
    lm = run_eval.CheckpointLM(model, tokenizer, 8, known["positions"])
    long = lm.loglikelihood(requests("loglikelihood", [("x" * 200, " end"), ("x" * 61, " end")]))
    same_answers(long[:1], long[1:])


def test_a_released_checkpoint(tasks, tmp_path, capsys):
    """DDP's prefix, mask buffers, no variant; bfloat16; a share: one document, without a standard error."""
    model = build("kv", seed=5)
    mask = {f"module.h.{i}.attn.bias": torch.ones(1, 1, 1024, 1024).tril() for i in range(2)}
    weights = {f"module.{name}": tensor for name, tensor in model.state_dict().items()} | mask
    path = save(model, "kv", tmp_path / "released.pt", variant=None, model_state_dict=weights)
    common = ["--model", "kv", "--include_path", tasks, "--tasks", "piqa", "--limit", "0.05"]
    common += ["--tokenizer", "bytes", "--dtype", "bfloat16", "--output_path", tmp_path / "o.json"]
    rows = []
    for checkpoint in (path, save(model, "kv", tmp_path / "ours.pt")):
        command(*common, "--checkpoint", checkpoint)
        rows.append(capsys.readouterr().out)
    assert rows[0] == rows[1] and " ± " not in rows[0]
    samples = written(tmp_path / "o.json")[1]["harness"]["n-samples"]["piqa"]
    assert samples == {"original": 13, "effective": 1}


def test_the_log_of_each_document(tasks, kv, tmp_path):
    """Beside the report, which stays small."""
    given = ["--include_path", tasks, "--limit", 3, "--tasks", "piqa", "sums"]
    command(*kv, *given, "--log_samples", "--output_path", tmp_path / "a.json")
    (file,) = tmp_path.glob("a.*piqa.jsonl")
    documents = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [document["doc_id"] for document in documents] == [0, 1, 2]
    assert documents[0]["arguments"][1][1] == " " + documents[0]["doc"]["sol2"]
    assert len([*tmp_path.glob("a.*sums.jsonl")]) == 1
    record = written(tmp_path / "a.json")[1]
    accuracy = sum(document["acc"] for document in documents) / 3
    assert record["harness"]["results"]["piqa"]["acc,none"] == pytest.approx(accuracy)
    assert "samples" not in record["harness"]


# -----------------------------------------------------------------------------
# Naming tasks


NAMED = {
    "blanks after commas": (["piqa,", "sums", ",texts"], {"piqa", "sums", "texts"}),
    "wildcards": (["arc_*", "p?qa"], {"arc_challenge", "arc_easy", "piqa"}),
    "a wildcard and a name in it": (["sum[rs]", "sums"], {"sums"}),
}


@pytest.mark.parametrize("given, expected", NAMED.values(), ids=NAMED)
def test_ways_to_name_tasks(given, expected, tasks, kv, local, capsys):
    command(*kv, "--include_path", tasks, "--limit", 1, "--tasks", *given)
    rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()[1:]
    assert {row.split()[0] for row in rows} == expected


# -----------------------------------------------------------------------------
# What can be wrong


def own_task(tmp_path, kv, rows=range(9), **settings):
    """The arguments that score a task of ours on local files."""
    write_task(tmp_path, "own", [piqa(i) for i in rows], include=PIQA, **settings)
    return [*kv, "--include_path", tmp_path, "--tasks", "own", "--num_fewshot", 0]


WRONG = {
    "no checkpoint": (["--model", "kv"], "required: --checkpoint"),
    "two aliases for one": (["--model", "kv", "kqv"], "--model: expected one for all checkpoints"),
    "unknown alias": (["--model", "vk"], "--model vk: expected one of kqv, qk, kv,"),
    "another variant": (["--model", "gqa"], "is a checkpoint of --model kv"),
    "no such file": (["--checkpoint", "nowhere.pt"], "nowhere.pt: not a whole checkpoint"),
    "unknown task": (["--tasks", "piqa,piqua"], "--tasks piqua, 5-shot: "),
    "no documents": (["--limit", "0"], "--limit 0: expected a number of documents"),
    "empty batch": (["--batch_size", "0"], "--batch_size 0: expected auto or a whole number"),
    "no task files": (["--include_path", "nowhere"], "--include_path nowhere: no such folder"),
    "no token files": (["--val_data", "nowhere"], "nowhere: no complete token files"),
    "perplexity of nothing": (["--tasks", "perplexity"], "--tasks perplexity: needs --val_data"),
    "a log beside nothing": (["--log_samples"], "--log_samples: needs --output_path"),
    "no such tokenizer": (["--tokenizer", "x"], "--tokenizer x: "),
    "device": (["--device", "abacus"], "--device abacus: "),
    "no such GPU": (["--device", "cuda:99"], "--device cuda:99: "),
    "no output folder": (["--output_path", "nowhere/a.json"], "No such file or directory: "),
    "output to a folder": (["--output_path", "{tasks}"], ": is a folder, expected a file"),
}


@pytest.mark.parametrize("arguments, words", WRONG.values(), ids=WRONG)
def test_errors_come_before_work_in_one_line(arguments, words, kv, tasks, local, capsys, monkeypatch):
    monkeypatch.setattr(run_eval, "evaluate_checkpoint", None)
    given = [] if words.startswith("required") else [*kv, "--include_path", tasks]
    assert words in failure(capsys, *given, *(argument.format(tasks=tasks) for argument in arguments))


@pytest.mark.parametrize("content", [b"task: m\n  data: [", b"task: m\ninclude: nowhere.yaml", b"task: m\xfc"])
def test_a_broken_task_file_is_named(content, kv, local, tmp_path, capsys):
    """Or the harness would take its own task of that name; other tasks run."""
    (tmp_path / "broken.yaml").write_bytes(content)
    given = own_task(tmp_path, kv)
    line = failure(capsys, *given, "--tasks", "hellaswag")
    assert line.startswith(f"--include_path: {tmp_path / 'broken.yaml'} cannot be read: ")
    command(*given, "--limit", 1)


GENERATED = {"output_type": "generate_until", "doc_to_text": "{{goal}}", "doc_to_target": "{{sol1}}"}
GENERATED |= {"metric_list": [{"metric": "exact_match"}]}
GENERATED |= {"generation_kwargs": {"until": ["x"], "max_gen_toks": 1024}}
DIVIDED = {"doc_to_text": "{{1 / (goal | length - 29)}}"}  # by zero where i has one digit, as in the examples
HUB = {"dataset_path": "baber/piqa", "dataset_kwargs": None}
LOCAL_FILES = "to run on local files, see Downstream tasks in docs/operations.md"
FAULTS = {  # settings, --num_fewshot, what is said
    "too few examples": ({}, 6, "^--tasks own, 6-shot: "),  # of 6, one is a spare
    "a template that fails": (DIVIDED, 2, "^--tasks own, 2-shot: ZeroDivision"),
    "no network": (HUB, 0, f"reach 'baber/piqa'.*{LOCAL_FILES}"),
    "code of the model": ({"unsafe_code": True}, 0, r"kv\.pt: .*own.* unsafe"),
    "no room for a prompt": (GENERATED, 0, r"kv\.pt: .*1024"),
}


@pytest.mark.parametrize("settings, shots, words", FAULTS.values(), ids=FAULTS)
def test_what_a_task_fails_with_is_passed_on_in_one_line(settings, shots, words, kv, tmp_path, capsys):
    given = own_task(tmp_path, kv, range(4, 14), **settings)
    assert re.search(words, failure(capsys, *given, "--num_fewshot", shots))


def test_a_task_that_says_0_keeps_to_it(kv, tmp_path):
    command(*own_task(tmp_path, kv, num_fewshot=0), "--num_fewshot", 99)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.ENOLCK], ids=errno.errorcode.get)
def test_a_cache_that_cannot_be_written_is_not_a_missing_network(number, kv, tmp_path, capsys, monkeypatch):
    """Another user's lock, which is named; a full disk, a file system without locks, which are not."""
    cache = tmp_path / "cache"
    given = own_task(tmp_path, kv)

    def refused(*given, **settings):
        raise OSError(number, os.strerror(number), *[str(cache / "x.lock")] * (number == errno.EACCES))

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", refused)
    line = failure(capsys, *given)
    assert os.strerror(number) in line and str(cache) in line
    assert not re.search("hub|network|reach|local files", line)


def test_an_exported_folder_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "config.json").touch()
    line = failure(capsys, "--model", "kv", "--checkpoint", tmp_path)
    assert f"export_hf.py --to_checkpoint {tmp_path}" in line and "lm_eval --model hf" in line


def test_data_of_another_tokenizer(data_dir, tmp_path, capsys):
    """Their ids are all within the model's vocabulary, and their perplexity would mean nothing."""
    other = shutil.copytree(data_dir / "validation", tmp_path / "other")
    with open(other / "tokenizer.tiktoken", "ab") as file:
        file.write(b"dGg= 256\n")  # th
    for train_data, recorded in (other, "bytes"), (data_dir / "train", None):
        path = save(build("kv"), "kv", tmp_path / "a.pt", train_data, tokenizer=recorded)
        line = failure(capsys, "--model", "kv", "--checkpoint", path, "--val_data", other)
        assert line.startswith(f"--val_data {other}: ") and f"is not the tokenizer of {path}" in line


def test_a_diverged_model_costs_no_scores_of_those_before(tasks, checkpoints, data_dir, tmp_path, capsys):
    model = build("kv")
    model.ln_f.weight.data[3] = float("nan")
    damaged = save(model, "kv", tmp_path / "nan.pt")
    line = failure(capsys, "--model", "kv", "--checkpoint", damaged, "--val_data", data_dir / "validation")
    assert line.startswith(f"{damaged}: its loss on {data_dir / 'validation'} is not finite")
    given = ["--include_path", tasks, "--tasks", "piqa", "--limit", 2, "--tokenizer", "bytes"]
    given += ["--output_path", tmp_path / "a.json", "--checkpoint", checkpoints["kqv"], damaged]
    with pytest.raises(SystemExit) as ended:
        command("--model", "kqv", "kv", *given)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert f"run_eval.py: error: {damaged}: its log-probabilities are not finite" in err
    assert re.search(r"piqa +acc +50.0 +\d+", out)
    assert list(written(tmp_path / "a.json")[0]["checkpoints"]) == ["kqv, step 8000"]


def test_scores_outlive_a_full_disk(tasks, kv, tmp_path, capsys, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_eval, "write_text", full)
    given = ["--include_path", tasks, "--limit", 3, "--tasks", "piqa", "--output_path", tmp_path / "a.json"]
    with pytest.raises(SystemExit):
        command(*kv, *given)
    out, err = capsys.readouterr()
    assert "piqa" in out and "No space left on device" in err


@pytest.mark.slow
def test_an_error_ends_all_processes_and_is_printed_once(tasks, kv, tmp_path):
    """Whether all have it, or some alone, before the work or in the middle of it."""
    small = save(build("kv", n_positions=20), "kv", tmp_path / "small.pt")
    wrong = {
        "--model x:": ["--model", "x"],
        "--include_path nowhere:": ["--include_path", "nowhere"],
        "longer than a row, 20": ["--checkpoint", small, "--num_fewshot", 0, "--tokenizer", "bytes"],
    }
    for words, changed in wrong.items():
        arguments = [*kv, "--include_path", tasks, "--tasks", "hellaswag", *changed]
        given = map(str, [*TWO_PROCESSES, ROOT / "run_eval.py", *arguments])
        ended = subprocess.run([*given], capture_output=True, text=True, cwd=tmp_path)
        assert ended.returncode != 0
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith("run_eval.py: error:")]
        assert words in line
        assert "[rank" not in ended.stderr  # as the lines of a traceback begin


@pytest.mark.slow
def test_the_harness_own_tasks_are_found(kv, capsys):
    line = failure(capsys, *kv)
    assert line.startswith("--tasks arc_challenge, 5-shot: ") and "allenai/ai2_arc" in line
