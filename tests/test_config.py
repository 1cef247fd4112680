"""The files hold the published values, a setting that is wrong ends in one line, and none is dead."""

import contextlib
import io
import json
import math
import subprocess
import sys
from dataclasses import dataclass, fields
from datetime import date
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, SENTENCES, TINY_MODEL, TINY_RUN, VARIANTS, metrics, prepare, script_of

SCRIPTS = {alias: script_of(alias) for alias in VARIANTS}
GROUPED = {alias for alias, row in VARIANTS.items() if row["groups"]}
SCRIPT = SCRIPTS["kqv"]  # owns the text that the scripts share; another test holds the others to it
KEYS = [field.name for kind in (SCRIPT.ModelConfig, SCRIPT.TrainingConfig) for field in fields(kind)]
KEYS.remove("n_kv_groups")  # of this variant, always null
CONFIGS = {"model": ROOT / "configs/model_config_demo.yaml", "train": ROOT / "configs/train_config_demo.yaml"}
ONE_STEP = ("target_tokens=256", "warmup_steps=0")


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    """One thread, as models this small are slower on two; a folder where the configs' paths lead nowhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield
    torch.set_num_threads(threads)


def run(script, output_dir, *arguments, model=CONFIGS["model"], train=CONFIGS["train"]):
    """The script as its command line starts it; returns its metrics but for the speed, or else SystemExit."""
    script.main([f"--model_config={model}", f"--train_config={train}", f"--output_dir={output_dir}", *arguments])
    return metrics(output_dir)


# ---- the published values

MODEL = {
    "vocab_size": 50304, "n_positions": 2048, "dropout": 0.1, "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02, "use_flash_attention": True,
}  # fmt: skip
TRAINING = {
    "train_data": "slimpajama_data/train", "val_data": "slimpajama_data/validation", "sequence": "padded",
    "score_padding": True, "seq_length": 2048, "num_gpus": 8, "target_tokens": 10_000_000_000,
    "lr_scheduler": "cosine", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "skip_grad_norm": 100.0, "seed": 42, "precision": "bf16", "compile": "auto", "log_interval": 10,
    "eval_batches": None, "save_interval": 1000, "wandb": "disabled",
}  # fmt: skip
PUBLISHED = {
    "300M": (
        {"n_embd": 1024, "n_layer": 20, "n_head": 16, "n_inner": 4096},
        {"micro_batch_size": 6, "gradient_accumulation": 24, "learning_rate": 2e-4, "min_lr": 2e-5},
        {"warmup_steps": 500, "eval_interval": 200},
        {"tokens_per_step": 2_359_296, "steps": 4_238},
    ),
    "1.2B": (
        {"n_embd": 2048, "n_layer": 22, "n_head": 32, "n_inner": 8192},
        {"micro_batch_size": 2, "gradient_accumulation": 36, "learning_rate": 6e-5, "min_lr": 6e-6},
        {"warmup_steps": 1000, "eval_interval": 500},
        {"tokens_per_step": 1_179_648, "steps": 8_477},
    ),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_files_hold_the_published_values(size):
    shape, batch, intervals, derived = PUBLISHED[size]
    model = yaml.safe_load((ROOT / f"configs/model_config_{size}.yaml").read_text())
    assert model == MODEL | shape
    train = yaml.safe_load((ROOT / f"configs/train_config_{size}.yaml").read_text())
    ours = {"keep_checkpoints": None, "sample_tokens": 128}
    assert train == TRAINING | batch | intervals | ours
    rows = train["micro_batch_size"] * train["gradient_accumulation"] * train["num_gpus"]
    assert rows * train["seq_length"] == derived["tokens_per_step"]
    assert train["target_tokens"] // derived["tokens_per_step"] == derived["steps"]


@pytest.mark.parametrize("size", [*PUBLISHED, "demo"])
def test_every_field_of_both_configs_stands_in_the_files(size):
    for kind, config in (("model", SCRIPT.ModelConfig), ("train", SCRIPT.TrainingConfig)):
        values = yaml.safe_load((ROOT / f"configs/{kind}_config_{size}.yaml").read_text())
        assert values.keys() == {field.name for field in fields(config)} - {"n_kv_groups"}


def test_a_run_takes_the_steps_that_its_target_tokens_allow(data, tmp_path):
    """Rounded down: 1,000 tokens at 256 a step are 3 steps."""
    assert run(SCRIPT, tmp_path / "out", *TINY_MODEL, *TINY_RUN, *data, "target_tokens=1000")[-1]["step"] == 3


# ---- what is wrong with a setting is said in one line


def refused(output_dir, *arguments, script=SCRIPT, **paths):
    """The last line on stderr with which the script exits with 2, before it has written anything."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as exit:
        run(script, output_dir, *arguments, **paths)
    assert exit.value.code == 2
    assert not output_dir.exists()
    return stderr.getvalue().splitlines()[-1]


def altered(folder, kind, **changes):
    """A copy of the demo config with other values; a value of `...` removes the key."""
    values = yaml.safe_load(CONFIGS[kind].read_text()) | changes
    path = folder / f"altered_{kind}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not ...}))
    return path


WRONG = {
    "vocab_size": 0, "n_positions": -1, "n_embd": "wide", "n_layer": None, "n_head": 2.5, "n_inner": -1,
    "n_kv_groups": "four", "dropout": 1.0, "layer_norm_epsilon": math.inf, "initializer_range": [0.02],
    "use_flash_attention": 3, "train_data": 7, "val_data": None, "sequence": "stacked", "score_padding": "maybe",
    "seq_length": 1, "micro_batch_size": 0, "gradient_accumulation": 2.5, "num_gpus": 0,
    "target_tokens": "1e6 tokens", "learning_rate": math.nan, "min_lr": -1e-4, "lr_scheduler": "cosinus",
    "warmup_steps": -1, "weight_decay": -0.1, "beta1": -0.5, "beta2": 1, "grad_clip": 0, "skip_grad_norm": 0,
    "seed": -1, "precision": "fp16", "compile": "sometimes", "log_interval": 0, "eval_interval": 0,
    "eval_batches": 0, "save_interval": None, "keep_checkpoints": 0, "sample_tokens": -1, "wandb": True,
}  # fmt: skip


def kind_of(key):
    return "model" if key in {field.name for field in fields(SCRIPT.ModelConfig)} else "train"


def test_every_key_has_a_wrong_value_here():
    assert sorted(WRONG) == sorted([*KEYS, "n_kv_groups"])


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_refused_with_its_key_and_the_file_or_the_command_line(key, tmp_path):
    path = altered(tmp_path, kind_of(key), **{key: WRONG[key]})
    line = refused(tmp_path / "out", **{kind_of(key): path})
    assert f"{path}: {key}" in line
    typed = yaml.safe_dump(WRONG[key], default_flow_style=True).splitlines()[0]
    assert f"command line: {key}" in refused(tmp_path / "out", f"{key}={typed}")


AWKWARD = [
    None, True, 10**400, -(10**400), 0.5, math.nan, math.inf, "", "nan", "1e999", "auto\n", "\u2028", b"\xff",
    date(2024, 2, 29), [], {}, [1], {"a": None},
]  # fmt: skip


@pytest.mark.parametrize("value", AWKWARD, ids=lambda value: f"{value!r:.9}")
def test_an_awkward_value_is_a_value_or_refused_with_its_key(value, tmp_path):
    for key in ("n_layer", "seed", "learning_rate", "dropout", "eval_batches", "compile", "sequence"):
        config = SCRIPT.ModelConfig if kind_of(key) == "model" else SCRIPT.TrainingConfig
        path = altered(tmp_path, kind_of(key), **{key: value})
        try:
            found = getattr(SCRIPT.load_config(config, path, {}), key)
        except SCRIPT.RunError as error:
            assert f"{path}: {key}" in str(error) and "\n" not in str(error)
        else:
            assert found == value


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_unknown_key_in_a_file_is_refused(kind, tmp_path):
    path = altered(tmp_path, kind, learnign_rate=1e-3)
    assert f"{path}: learnign_rate" in refused(tmp_path / "out", **{kind: path})


@pytest.mark.parametrize("key", ["n_embd", "n_head", "micro_batch_size", "eval_batches", "wandb"])
def test_a_missing_key_is_refused_unless_the_command_line_has_it(key, tmp_path):
    kind = kind_of(key)
    path = altered(tmp_path, kind, **{key: ...})
    assert f"{path}: {key}" in refused(tmp_path / "out", **{kind: path})
    value = yaml.safe_load(CONFIGS[kind].read_text())[key]
    assert "seed" in refused(tmp_path / "out", f"{key}={value}", "seed=x", **{kind: path})


TOGETHER = [
    (["min_lr=2e-3", "learning_rate=1e-3"], "min_lr", "learning_rate"),
    (["target_tokens=255"], "target_tokens", "256"),  # 2 x 2 x 2 rows of 32
    (["warmup_steps=9"], "warmup_steps", "8"),
    (["n_embd=30", "n_head=4"], "n_embd", "n_head"),
]


@pytest.mark.parametrize(("arguments", "key", "other"), TOGETHER)
def test_values_that_do_not_go_together_are_refused(arguments, key, other, data, tmp_path):
    line = refused(tmp_path / "out", *TINY_MODEL, *TINY_RUN, *data, *arguments)
    assert key in line and other in line


WRONG_GROUPS = [(["kqv", "qk", "kv", "k"], [1, 8]), (["mqa", "qmqa"], [2, None]), (["gqa", "qgqa"], [3, 16, None])]


@pytest.mark.parametrize(("alias", "wrong"), [(alias, wrong) for row, wrong in WRONG_GROUPS for alias in row])
def test_groups_that_are_not_of_the_variant_are_refused(alias, wrong, tmp_path):
    for groups in wrong:
        line = refused(tmp_path / "out", f"n_kv_groups={groups or 'null'}", script=SCRIPTS[alias])
        assert "n_kv_groups: " in line and str(groups) in line


@pytest.mark.parametrize("alias", ["gqa", "qgqa"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_change_the_width_of_the_shared_projection(alias, groups):
    config = SCRIPTS[alias].ModelConfig(n_embd=32, n_layer=1, n_head=4, n_kv_groups=groups)
    model = getattr(SCRIPTS[alias], VARIANTS[alias]["class"])(config)
    shared = model.h[0].attn.c_kv if alias == "gqa" else model.h[0].attn.c_k
    assert shared.out_features == groups * 8 * len(VARIANTS[alias]["cached"])


UNREADABLE = {
    "is missing": lambda path: None,
    "is a folder": lambda path: path.mkdir(),
    "is empty": lambda path: path.write_text(""),
    "is not YAML": lambda path: path.write_text("n_embd: [32\nn_layer: 2\n"),
    "is a list": lambda path: path.write_text("- n_embd\n- n_layer\n"),
    "is a list of pairs": lambda path: path.write_text("- [n_embd, 32]\n- [n_layer, 2]\n"),
    "is text": lambda path: path.write_text("a model"),
    "is not UTF-8": lambda path: path.write_bytes(b"n_embd: 32 # \xff\xfe\n"),
    "has a date that is none": lambda path: path.write_text("n_embd: 2024-13-45\n"),
    "would run code": lambda path: path.write_text("n_embd: !!python/object/apply:os.getcwd []\n"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("content", UNREADABLE)
def test_a_file_that_is_no_config_is_refused_by_name(kind, content, tmp_path):
    path = tmp_path / "config.yaml"
    UNREADABLE[content](path)
    assert str(path) in refused(tmp_path / "out", **{kind: path})


@pytest.mark.parametrize(
    "argument",
    ["learnign_rate=1e-3", "seed", "=3", "Seed=3", "seed =3", "output_dir=x", "seed=[", "seed=!!x 3",
     "train_data=2024-13-45", "seed='", "train_data=a: b: c", "train_data=@x"],
)  # fmt: skip
def test_what_is_no_setting_is_refused_on_the_command_line(argument, tmp_path):
    key, _, value = argument.partition("=")
    line = refused(tmp_path / "out", argument)
    assert "error: " in line and (key in line or value in line or "'tag:yaml.org,2002:x'" in line)


# ---- what is asked for is what runs


def read(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("alias", ["kqv", "gqa"])
def test_the_resolved_configs_are_what_was_asked_for_and_give_the_same_run_again(alias, data, tmp_path):
    first, second, script = tmp_path / "first", tmp_path / "second", SCRIPTS[alias]
    asked = [*TINY_MODEL, *TINY_RUN, *data, "dropout=0.2", "learning_rate=2e-2", "eval_batches=null"]
    asked += ["n_head=4", "n_kv_groups=2"] if alias in GROUPED else []
    records = run(script, first, *asked)
    overrides = {key: yaml.safe_load(value) for key, value in (setting.split("=") for setting in asked)}
    overrides |= {"learning_rate": 2e-2, "min_lr": 1e-3, "dropout": 0.2}
    for kind, config in (("model", script.ModelConfig), ("train", script.TrainingConfig)):
        names = {field.name for field in fields(config)}
        expected = read(CONFIGS[kind]) | ({"n_kv_groups": None} if kind == "model" else {})
        expected |= {key: value for key, value in overrides.items() if key in names}
        assert read(first / f"{kind}_config.yaml") == expected
    files = {"model": first / "model_config.yaml", "train": first / "train_config.yaml"}
    assert run(script, second, **files) == records
    for kind in CONFIGS:
        assert read(second / f"{kind}_config.yaml") == read(first / f"{kind}_config.yaml")


def test_n_inner_is_four_times_the_width_unless_set(data, tmp_path):
    model = altered(tmp_path, "model", n_inner=None)
    settings = [setting for setting in TINY_MODEL if not setting.startswith("n_inner")]
    run(SCRIPT, tmp_path / "out", *settings, *TINY_RUN, *data, *ONE_STEP, model=model)
    assert read(tmp_path / "out/model_config.yaml")["n_inner"] == 4 * 32


def test_numbers_in_scientific_notation_are_numbers_in_the_file_and_on_the_command_line(data, tmp_path):
    """PyYAML takes 2e-4 for text."""
    path = altered(tmp_path, "train", learning_rate=..., min_lr=...)
    path.write_text(path.read_text() + "learning_rate: 2e-4\nmin_lr: 0\n")
    settings = [s for s in TINY_RUN if not s.startswith(("learning_rate", "min_lr"))] + [*ONE_STEP]
    in_file = run(SCRIPT, tmp_path / "a", *TINY_MODEL, *settings, *data, train=path)
    typed = run(SCRIPT, tmp_path / "b", *TINY_MODEL, *settings, *data, "learning_rate=2e-4", "min_lr=0")
    assert in_file == typed
    for folder in (tmp_path / "a", tmp_path / "b"):
        resolved = read(folder / "train_config.yaml")
        assert (resolved["learning_rate"], resolved["min_lr"]) == (0.0002, 0.0)


def test_settings_go_before_between_and_after_the_options(data, tmp_path):
    configs = ["--model_config", str(CONFIGS["model"]), "--train_config", str(CONFIGS["train"])]
    output = ["--output_dir", str(tmp_path / "out")]
    SCRIPT.main(["seed=3", *TINY_MODEL, *configs, *TINY_RUN, "dropout=0.3", *output, *data, *ONE_STEP])
    assert read(tmp_path / "out/model_config.yaml")["dropout"] == 0.3
    train = read(tmp_path / "out/train_config.yaml")
    assert (train["seed"], train["target_tokens"]) == (3, 256)


def test_the_last_of_two_values_counts(data, tmp_path):
    run(SCRIPT, tmp_path / "out", "seed=3", *TINY_MODEL, *TINY_RUN, *data, *ONE_STEP, "seed=4")
    assert read(tmp_path / "out/train_config.yaml")["seed"] == 4


def test_one_process_takes_the_global_batch_of_eight(data, tmp_path):
    """However 24 rows are dealt out to processes and micro batches, the same data make the same step."""
    settings = [*TINY_MODEL, *TINY_RUN, *data, f"target_tokens={3 * 24 * 32}", "eval_batches=null"]
    shares = {"8": (8, 3, 1), "1": (1, 24, 1), "4": (2, 2, 6)}
    names = ("num_gpus", "gradient_accumulation", "micro_batch_size")
    eight, one, larger = (
        run(SCRIPT, tmp_path / folder, *settings, *(f"{n}={x}" for n, x in zip(names, values, strict=True)))
        for folder, values in shares.items()
    )
    assert eight == one
    assert (eight[-1]["step"], eight[-1]["tokens"]) == (3, 3 * 24 * 32)
    assert [record["step"] for record in larger] == [record["step"] for record in one]
    for a, b in zip(larger, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


# ---- no key is dead


@dataclass
class Seen:
    """What a user can observe of a run, its own configuration aside."""

    records: list
    files: dict  # name: size of the text or tensors, so that times and configs do not count
    weights: dict
    printed: str

    @property
    def losses(self):
        return [r["loss"] for r in self.records if r["kind"] == "train"]

    @property
    def shapes(self):
        return {name: tensor.shape for name, tensor in self.weights.items()}

    @property
    def rates(self):
        return [r["learning_rate"] for r in self.records if r["kind"] == "train"]

    def kinds(self, *kinds):
        return [(r["kind"], r["step"]) for r in self.records if r["kind"] in kinds]

    @property
    def evaluations(self):
        return [r for r in self.records if r["kind"] != "train"]

    @property
    def start(self):
        return self.evaluations[0]  # of the initial weights

    @property
    def checkpoints(self):
        return sorted(name for name in self.files if name.endswith(".pt"))

    @property
    def samples(self):
        return {name: text for name, text in self.files.items() if name.startswith("samples")}


def observe(folder, *settings):
    """A run of four steps with these settings."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        records = run(SCRIPT, folder, *TINY_MODEL, *TINY_RUN, "target_tokens=1024", *settings)
    files = {path.name: path.read_text() if path.suffix == ".txt" else "" for path in folder.iterdir()}
    weights = torch.load(folder / "final_model.pt")["model_state_dict"]
    return Seen(records, files, weights, printed.getvalue())


@pytest.fixture(scope="module")
def observed(data, tmp_path_factory):
    """observe() in a new folder, or, where the same settings were observed before, what was seen then."""
    seen = {}

    def lookup(*settings):
        if settings not in seen:
            seen[settings] = observe(tmp_path_factory.mktemp("run") / "out", *data, *settings)
        return seen[settings]

    return lookup


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """Settings that name a data set of other texts."""
    paths = prepare(tmp_path_factory.mktemp("other"), [s.upper() for s in SENTENCES])
    return dict(setting.split("=") for setting in paths)


def changes(change, *aspects, given=()):
    """A row: the setting `change`, beside those `given`, changes every one of these aspects of the run."""
    return change, aspects, given


# longer than some texts
LONG_ROWS = ("sequence=padded", "n_positions=128", "seq_length=128", "target_tokens=4096")
ROWS = {
    "vocab_size": changes("vocab_size=260", "shapes", "losses"),
    "n_positions": changes("n_positions=40", "shapes", "printed"),
    "n_embd": changes("n_embd=48", "shapes", "losses", "printed"),
    "n_layer": changes("n_layer=3", "shapes", "losses"),
    "n_head": changes("n_head=4", "losses"),
    "n_inner": changes("n_inner=72", "shapes", "losses"),
    "dropout": changes("dropout=0.3", "losses"),
    "layer_norm_epsilon": changes("layer_norm_epsilon=1e-2", "losses"),
    "initializer_range": changes("initializer_range=0.1", "losses"),
    "sequence": changes("sequence=padded", "losses", "evaluations"),
    "score_padding": changes("score_padding=false", "losses", "weights", given=LONG_ROWS),
    "seq_length": changes("seq_length=16", "losses", "records"),
    "micro_batch_size": changes("micro_batch_size=1", "losses", "records"),
    "gradient_accumulation": changes("gradient_accumulation=1", "losses", "records"),
    "num_gpus": changes("num_gpus=1", "losses", "records"),
    "target_tokens": changes("target_tokens=512", "records", "checkpoints"),
    "learning_rate": changes("learning_rate=2e-2", "rates", "losses"),
    "min_lr": changes("min_lr=0", "rates"),
    "lr_scheduler": changes("lr_scheduler=constant", "rates", "weights"),
    "warmup_steps": changes("warmup_steps=3", "rates", "losses"),
    "weight_decay": changes("weight_decay=0.9", "losses"),
    "beta1": changes("beta1=0.5", "losses"),
    "beta2": changes("beta2=0.5", "losses"),
    "grad_clip": changes("grad_clip=0.001", "weights"),
    "skip_grad_norm": changes("skip_grad_norm=0.001", "losses", "printed"),
    "seed": changes("seed=7", "start", "losses", "weights", "samples"),
    "precision": changes("precision=bf16", "losses"),
    "log_interval": changes("log_interval=2", "losses"),
    "eval_interval": changes("eval_interval=1", "evaluations"),
    "eval_batches": changes("eval_batches=1", "evaluations"),
    "save_interval": changes("save_interval=1", "checkpoints", "samples"),
    "keep_checkpoints": changes("keep_checkpoints=1", "checkpoints"),
    "sample_tokens": changes("sample_tokens=0", "samples"),
}


def same(a, b):
    if isinstance(a, dict) and a.keys() == b.keys():
        return all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b


@pytest.mark.parametrize("key", ROWS)
def test_a_key_changes_what_it_says(key, observed):
    change, aspects, given = ROWS[key]
    before, after = observed(*given), observed(*given, change)
    assert change.startswith(f"{key}=")
    for aspect in aspects:
        assert not same(getattr(before, aspect), getattr(after, aspect)), aspect


def test_two_runs_of_the_same_settings_are_the_same(observed, data, tmp_path):
    """Or else every key above would seem alive."""
    before, after = observed(), observe(tmp_path / "out", *data)
    for aspect in {aspect for _, aspects, _ in ROWS.values() for aspect in aspects} - {"printed"}:
        assert same(getattr(before, aspect), getattr(after, aspect)), aspect


def test_counts_in_the_metrics_and_files_follow_the_intervals(observed):
    seen = observed()
    assert seen.kinds("train") == [("train", step) for step in (1, 2, 3, 4)]
    assert seen.kinds("val", "final") == [("val", 0), ("final", 4)]
    assert seen.checkpoints == ["checkpoint_step_2.pt", "checkpoint_step_4.pt", "final_model.pt"]
    assert sorted(seen.samples) == ["samples_step_2.txt", "samples_step_4.txt"]
    assert observed("log_interval=2").kinds("train") == [("train", 2), ("train", 4)]
    evaluations = [*(("val", step) for step in range(4)), ("final", 4)]
    assert observed("eval_interval=1").kinds("val", "final") == evaluations
    every = [f"checkpoint_step_{step}.pt" for step in (1, 2, 3, 4)]
    assert observed("save_interval=1").checkpoints == [*every, "final_model.pt"]
    assert observed("keep_checkpoints=1").checkpoints == ["checkpoint_step_4.pt", "final_model.pt"]
    assert observed("sample_tokens=0").samples == {}
    assert "skipped" in observed("skip_grad_norm=0.001").printed
    assert "skipped" not in seen.printed


def test_the_schedules_warm_up_and_end_at_min_lr(observed):
    """Four steps, two of warm-up, from 1e-2 down to 1e-3."""
    rates = {name: observed(f"lr_scheduler={name}").rates for name in ("cosine", "linear", "constant")}
    assert rates["cosine"] == pytest.approx([5e-3, 1e-2, 1e-2, 5.5e-3])
    assert rates["linear"] == pytest.approx([5e-3, 1e-2, 1e-2, 5.5e-3])
    assert rates["constant"] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])
    assert observed("warmup_steps=3").rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])
    assert observed("warmup_steps=0").rates[0] == pytest.approx(1e-2)
    longer = ("target_tokens=1536",)  # six steps
    rates = {name: observed(*longer, f"lr_scheduler={name}").rates for name in ("cosine", "linear")}
    cosine = [1e-3 + 9e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates["cosine"] == pytest.approx([5e-3, 1e-2, *cosine])
    assert rates["linear"] == pytest.approx([5e-3, 1e-2, 1e-2, 7.75e-3, 5.5e-3, 3.25e-3])


def test_skipped_updates_leave_the_weights_as_they_were(observed):
    seen = observed("skip_grad_norm=0.001", "log_interval=1", "eval_batches=null")
    assert len({record["loss"] for record in seen.evaluations}) == 1


@pytest.mark.parametrize("key", ["train_data", "val_data"])
def test_data_come_from_the_folder_named(key, observed, other_data):
    before, after = observed(), observed(f"{key}={other_data[key]}")
    assert same(before.losses, after.losses) == (key == "val_data")
    assert not same(before.evaluations, after.evaluations)
    assert same(before.samples, after.samples) is False


def one_step(data, tmp_path, *settings):
    return run(SCRIPT, tmp_path / "out", *TINY_MODEL, *TINY_RUN, *data, *ONE_STEP, *settings)


@pytest.mark.parametrize(("value", "compiled"), [("true", True), ("false", False), ("auto", False)])
def test_compile_compiles_the_model_and_auto_does_not_on_the_cpu(
    value, compiled, data, tmp_path, monkeypatch
):
    if torch.cuda.is_available():
        pytest.skip("auto compiles where there is a GPU")
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: calls.append(type(module).__name__))
    one_step(data, tmp_path, f"compile={value}")
    assert bool(calls) == compiled


@pytest.mark.parametrize("alias", SCRIPTS)
def test_flash_attention_is_used_where_it_is_asked_for_installed_and_fits(alias, monkeypatch):
    """A stand-in for the package, and tensors that say they are on a GPU."""
    script, calls = SCRIPTS[alias], []

    def flash_attn_func(q, k, v, causal):
        assert causal
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        calls.append(q.shape)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(script, "flash_attn_func", flash_attn_func)
    ids = torch.arange(8).view(1, 8)

    def logits(precision, **changes):
        torch.manual_seed(0)
        values = {"vocab_size": 61, "n_positions": 8, "n_embd": 32, "n_layer": 2, "n_head": 4}
        groups = {"n_kv_groups": 2 if alias in {"gqa", "qgqa"} else 1} if alias in GROUPED else {}
        config = script.ModelConfig(**values, **groups, **changes)
        model = getattr(script, VARIANTS[alias]["class"])(config).eval()
        calls.clear()
        autocast = torch.autocast("cpu", precision, enabled=precision != torch.float32)
        with autocast, monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            return model(ids)[0].float()

    with_flash = logits(torch.bfloat16)
    assert calls == [(1, 8, 4, 8)] * 2  # each layer, [B, T, heads, head_dim]
    without = logits(torch.bfloat16, use_flash_attention=False)
    assert calls == []
    torch.testing.assert_close(with_flash, without, atol=1e-2, rtol=1e-2)
    logits(torch.float32)
    assert calls == []
    monkeypatch.setattr(script, "flash_attn_func", None)
    logits(torch.bfloat16)
    assert calls == []


class FakeWandb(ModuleType):
    """Keeps what a run tells it, or fails at a step of it."""

    def __init__(self, fails_in=None):
        super().__init__("wandb")
        self.fails_in, self.options, self.logged = fails_in, [], []

    def init(self, **options):
        assert self.fails_in != "init"
        self.options.append(options)
        return self

    def log(self, values, step):
        assert self.fails_in != "log"
        self.logged.append((step, values))


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_gets_the_metrics_when_it_is_asked_for(mode, data, tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    records = one_step(data, tmp_path, f"wandb={mode}")
    assert [options["mode"] for options in wandb.options] == [mode]
    assert [step for step, _ in wandb.logged] == [record["step"] for record in records]
    for (_, values), record in zip(wandb.logged, records, strict=True):
        assert record["loss"] in values.values()


def test_wandb_is_not_even_imported_unless_it_is_asked_for(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    one_step(data, tmp_path, "wandb=disabled")
    output = capsys.readouterr()
    assert "warning" not in output.out + output.err


@pytest.mark.parametrize("failure", ["import", "init", "log"])
def test_a_run_completes_without_wandb_and_says_so(failure, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None if failure == "import" else FakeWandb(failure))
    records = one_step(data, tmp_path, "wandb=offline")
    assert records[-1]["kind"] == "final"
    assert "warning: no wandb" in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_wandb_keeps_an_offline_run(data, tmp_path):
    """In a process of its own, which wandb may end as it likes."""
    settings = [*TINY_MODEL, *TINY_RUN, *data, "target_tokens=1024", "wandb=offline"]
    configs = [word for kind, path in CONFIGS.items() for word in (f"--{kind}_config", str(path))]
    command = [sys.executable, SCRIPT.__file__, *configs, "--output_dir", str(tmp_path / "out"), *settings]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "warning" not in finished.stdout + finished.stderr
    (kept,) = (tmp_path / "out/wandb").glob("offline-run-*/*.wandb")
    written, records = kept.read_bytes(), SCRIPT.read_metrics(tmp_path / "out/metrics.jsonl")
    assert len(records) == 6
    for record in records:
        assert f"{record['kind']}/loss".encode() in written
        assert json.dumps(record["loss"]).encode() in written


OWN_TEST = {
    "n_kv_groups": test_groups_change_the_width_of_the_shared_projection,
    "use_flash_attention": test_flash_attention_is_used_where_it_is_asked_for_installed_and_fits,
    "train_data": partial(test_data_come_from_the_folder_named, "train_data"),
    "val_data": partial(test_data_come_from_the_folder_named, "val_data"),
    "compile": test_compile_compiles_the_model_and_auto_does_not_on_the_cpu,
    "wandb": test_wandb_gets_the_metrics_when_it_is_asked_for,
}


def test_no_key_is_left_out_of_the_tests_above():
    keys = [field.name for kind in (SCRIPT.ModelConfig, SCRIPT.TrainingConfig) for field in fields(kind)]
    assert sorted([*ROWS, *OWN_TEST]) == sorted(keys)
