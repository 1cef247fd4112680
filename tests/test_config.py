"""The files hold the published values, a setting that is wrong ends in one line, and none is dead."""

import contextlib
import io
import json
import math
import subprocess
import sys
from dataclasses import fields
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, SENTENCES, TINY_MODEL, TINY_RUN, VARIANTS, metrics, prepare, script_of

SCRIPTS = {alias: script_of(alias) for alias in VARIANTS}
GROUPED = {alias for alias, row in VARIANTS.items() if row["groups"]}
SCRIPT = SCRIPTS["kqv"]  # owns the text that the scripts share; another test holds the others to it
MODEL_KEYS = {field.name for field in fields(SCRIPT.ModelConfig)}
TRAIN_KEYS = {field.name for field in fields(SCRIPT.TrainingConfig)}
CONFIGS = {"model": ROOT / "configs/model_config_demo.yaml", "train": ROOT / "configs/train_config_demo.yaml"}
ONE_STEP = ("target_tokens=256", "warmup_steps=0")


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    """A folder where the configs' paths lead nowhere."""
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield


def read(path):
    return yaml.safe_load(path.read_text())


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
    assert read(ROOT / f"configs/model_config_{size}.yaml") == MODEL | shape
    train = read(ROOT / f"configs/train_config_{size}.yaml")
    ours = {"keep_checkpoints": None, "sample_tokens": 128}
    assert train == TRAINING | batch | intervals | ours
    rows = train["micro_batch_size"] * train["gradient_accumulation"] * train["num_gpus"]
    assert rows * train["seq_length"] == derived["tokens_per_step"]
    assert train["target_tokens"] // derived["tokens_per_step"] == derived["steps"]


@pytest.mark.parametrize("size", [*PUBLISHED, "demo"])
def test_every_field_of_both_configs_stands_in_the_files(size):
    for kind, keys in (("model", MODEL_KEYS - {"n_kv_groups"}), ("train", TRAIN_KEYS)):
        assert read(ROOT / f"configs/{kind}_config_{size}.yaml").keys() == keys


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
    values = read(CONFIGS[kind]) | changes
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
    return "model" if key in MODEL_KEYS else "train"


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_refused_with_its_key_and_the_file_or_the_command_line(key, tmp_path):
    path = altered(tmp_path, kind_of(key), **{key: WRONG[key]})
    line = refused(tmp_path / "out", **{kind_of(key): path})
    assert f"{path}: {key}" in line
    typed = yaml.safe_dump(WRONG[key], default_flow_style=True).splitlines()[0]
    assert f"command line: {key}" in refused(tmp_path / "out", f"{key}={typed}")


@pytest.mark.parametrize("key", ["n_embd", "eval_batches"])
def test_a_missing_key_is_refused_unless_the_command_line_has_it(key, tmp_path):
    kind = kind_of(key)
    path = altered(tmp_path, kind, **{key: ...})
    assert f"{path}: {key}" in refused(tmp_path / "out", **{kind: path})
    value = read(CONFIGS[kind])[key]
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


UNREADABLE = {
    "is missing": lambda path: None,
    "is a folder": lambda path: path.mkdir(),
    "is empty": lambda path: path.write_text(""),
    "is not YAML": lambda path: path.write_text("n_embd: [32\nn_layer: 2\n"),
    "is a list": lambda path: path.write_text("- n_embd\n- n_layer\n"),
    "is not UTF-8": lambda path: path.write_bytes(b"n_embd: 32 # \xff\xfe\n"),
    "has a date that is none": lambda path: path.write_text("n_embd: 2024-13-45\n"),
    "has an unknown key": lambda path: path.write_text(CONFIGS["model"].read_text() + "n_embed: 32\n"),
    "would run code": lambda path: path.write_text("n_embd: !!python/object/apply:os.getcwd []\n"),
}


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_file_that_is_no_config_is_refused_by_name(content, tmp_path):
    path = tmp_path / "config.yaml"
    UNREADABLE[content](path)
    assert str(path) in refused(tmp_path / "out", model=path)


@pytest.mark.parametrize("argument", ["learnign_rate=1", "seed", "=3", "output_dir=x", "seed=[", "seed=2024-13-45"])
def test_what_is_no_setting_is_refused_on_the_command_line(argument, tmp_path):
    key, _, value = argument.partition("=")
    line = refused(tmp_path / "out", argument)
    assert "error: " in line and (key in line or value in line)


# ---- what is asked for is what runs


@pytest.mark.parametrize("alias", ["kqv", "gqa"])
def test_the_resolved_configs_are_what_was_asked_for_and_give_the_same_run_again(alias, data, tmp_path):
    first, second, script = tmp_path / "first", tmp_path / "second", SCRIPTS[alias]
    asked = [*TINY_MODEL, *TINY_RUN, *data, "dropout=0.2", "learning_rate=2e-2", "eval_batches=null"]
    asked += ["n_head=4", "n_kv_groups=2"] if alias in GROUPED else []
    records = run(script, first, *asked)
    overrides = {key: yaml.safe_load(value) for key, value in (setting.split("=") for setting in asked)}
    overrides |= {"learning_rate": 2e-2, "min_lr": 1e-3, "dropout": 0.2}
    for kind, names in (("model", MODEL_KEYS), ("train", TRAIN_KEYS)):
        expected = read(CONFIGS[kind]) | ({"n_kv_groups": None} if kind == "model" else {})
        expected |= {key: value for key, value in overrides.items() if key in names}
        assert read(first / f"{kind}_config.yaml") == expected
    files = {"model": first / "model_config.yaml", "train": first / "train_config.yaml"}
    assert run(script, second, **files) == records


def test_settings_go_before_between_and_after_the_options_and_the_last_of_two_counts(data, tmp_path):
    """A width of the MLP that is null is four times the model's; 1,000 tokens at 256 a step are 3 steps."""
    configs = ["--model_config", str(CONFIGS["model"]), "--train_config", str(CONFIGS["train"])]
    output = ["--output_dir", str(tmp_path / "out"), "target_tokens=1000", "seed=4"]
    SCRIPT.main(["seed=3", *TINY_MODEL, *configs, *TINY_RUN, "dropout=0.3", *output, *data, "n_inner=null"])
    model, train = (read(tmp_path / f"out/{kind}_config.yaml") for kind in CONFIGS)
    assert (model["dropout"], model["n_inner"], train["seed"]) == (0.3, 4 * 32, 4)
    assert metrics(tmp_path / "out")[-1]["step"] == 3


def test_numbers_in_scientific_notation_are_numbers_in_the_file_and_on_the_command_line(tmp_path):
    """PyYAML takes 2e-4 for text."""
    path = altered(tmp_path, "train", learning_rate=..., min_lr=0)
    path.write_text(path.read_text() + "learning_rate: 2e-4\n")
    for settings in ({}, dict([SCRIPT.setting("learning_rate=2e-4")])):
        config = SCRIPT.load_config(SCRIPT.TrainingConfig, path, settings)
        assert (config.learning_rate, config.min_lr) == (0.0002, 0.0)


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


def observe(folder, *settings):
    """What a user sees of a run of four steps with these settings, but for configurations and times."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        records = run(SCRIPT, folder, *TINY_MODEL, *TINY_RUN, "target_tokens=1024", *settings)
    trained = [record for record in records if record["kind"] == "train"]
    weights = torch.load(folder / "final_model.pt")["model_state_dict"]
    return {
        "records": records,
        "losses": [record["loss"] for record in trained],
        "rates": [record["learning_rate"] for record in trained],
        "evaluations": [record for record in records if record["kind"] != "train"],
        "steps": [(record["kind"], record["step"]) for record in records],
        "start": records[0],  # the evaluation of the initial weights
        "weights": {name: tensor.tolist() for name, tensor in weights.items()},
        "shapes": {name: tensor.shape for name, tensor in weights.items()},
        "checkpoints": sorted(path.name for path in folder.glob("*.pt")),
        "samples": {path.name: path.read_text() for path in folder.glob("samples*")},
        "printed": printed.getvalue(),
    }


@pytest.fixture(scope="module")
def observed(data, tmp_path_factory):
    """observe() in a new folder, or, where the same settings were observed before, what was seen then."""
    seen = {}

    def lookup(*settings):
        if settings not in seen:
            seen[settings] = observe(tmp_path_factory.mktemp("run") / "out", *data, *settings)
        return seen[settings]

    return lookup


LONGER_THAN_TEXTS = ("sequence=padded", "n_positions=128", "seq_length=128", "target_tokens=4096")
ROWS = {  # a setting, and every aspect of a run that it changes
    "vocab_size=260": "shapes losses", "n_positions=40": "shapes printed", "n_embd=48": "shapes losses printed",
    "n_layer=3": "shapes losses", "n_head=4": "losses", "n_inner=72": "shapes losses", "dropout=0.3": "losses",
    "layer_norm_epsilon=1e-2": "losses", "initializer_range=0.1": "losses",
    "sequence=padded": "losses evaluations", "score_padding=false": "losses weights",
    "seq_length=16": "losses records", "micro_batch_size=1": "losses records",
    "gradient_accumulation=1": "losses records", "num_gpus=1": "losses records",
    "target_tokens=512": "records checkpoints", "learning_rate=2e-2": "rates losses", "min_lr=0": "rates",
    "lr_scheduler=constant": "rates weights", "warmup_steps=3": "rates losses", "weight_decay=0.9": "losses",
    "beta1=0.5": "losses", "beta2=0.5": "losses", "grad_clip=0.001": "weights",
    "skip_grad_norm=0.001": "losses printed", "seed=7": "start losses weights samples",
    "precision=bf16": "losses", "log_interval=2": "losses", "eval_interval=1": "evaluations",
    "eval_batches=1": "evaluations", "save_interval=1": "checkpoints samples", "keep_checkpoints=1": "checkpoints",
    "sample_tokens=0": "samples",
}  # fmt: skip


@pytest.mark.parametrize("setting", ROWS)
def test_a_key_changes_what_it_says(setting, observed):
    given = LONGER_THAN_TEXTS if setting.startswith("score_padding") else ()
    before, after = observed(*given), observed(*given, setting)
    for aspect in ROWS[setting].split():
        assert before[aspect] != after[aspect], aspect


def test_two_runs_of_the_same_settings_are_the_same(observed, data, tmp_path):
    """Or else every key above would seem alive."""
    before, after = observed(), observe(tmp_path / "out", *data)
    for aspect in before.keys() - {"printed"}:
        assert before[aspect] == after[aspect], aspect


def test_counts_in_the_metrics_and_files_follow_the_intervals(observed):
    seen, trained = observed(), [("train", step) for step in (1, 2, 3, 4)]
    assert seen["steps"] == [("val", 0), *trained, ("final", 4)]
    assert seen["checkpoints"] == ["checkpoint_step_2.pt", "checkpoint_step_4.pt", "final_model.pt"]
    assert sorted(seen["samples"]) == ["samples_step_2.txt", "samples_step_4.txt"]
    assert observed("log_interval=2")["steps"] == [("val", 0), trained[1], trained[3], ("final", 4)]
    evaluated = [("val", 0), trained[0], ("val", 1), trained[1], ("val", 2), trained[2], ("val", 3), trained[3]]
    assert observed("eval_interval=1")["steps"] == [*evaluated, ("final", 4)]
    every = [f"checkpoint_step_{step}.pt" for step in (1, 2, 3, 4)]
    assert observed("save_interval=1")["checkpoints"] == [*every, "final_model.pt"]
    assert observed("keep_checkpoints=1")["checkpoints"] == ["checkpoint_step_4.pt", "final_model.pt"]
    assert observed("sample_tokens=0")["samples"] == {}


def test_the_schedules_warm_up_and_end_at_min_lr():
    """Six steps, two of warm-up, from 1e-2 down to 1e-3."""
    for name, decay in {
        "cosine": [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)],
        "linear": [1, 0.75, 0.5, 0.25, 0],
        "constant": 5 * [1],
    }.items():
        settings = dict(map(SCRIPT.setting, [*TINY_RUN, "target_tokens=1536", f"lr_scheduler={name}"]))
        config = SCRIPT.load_config(SCRIPT.TrainingConfig, CONFIGS["train"], settings)
        rates = [SCRIPT.get_lr(step, config) for step in range(7)]
        assert rates == pytest.approx([5e-3, 1e-2, *(1e-3 + 9e-3 * share for share in decay)])


@pytest.mark.parametrize("key", ["train_data", "val_data"])
def test_data_come_from_the_folder_named(key, observed, tmp_path):
    other = dict(setting.split("=") for setting in prepare(tmp_path, [s.upper() for s in SENTENCES]))
    before, after = observed(), observed(f"{key}={other[key]}")
    assert (before["losses"] == after["losses"]) == (key == "val_data")
    assert before["evaluations"] != after["evaluations"]
    assert before["samples"] != after["samples"]


def one_step(data, tmp_path, *settings):
    return run(SCRIPT, tmp_path / "out", *TINY_MODEL, *TINY_RUN, *data, *ONE_STEP, *settings)


@pytest.mark.parametrize(("value", "compiled"), [("true", True), ("false", False), ("auto", torch.cuda.is_available())])
def test_compile_compiles_and_auto_where_there_is_a_gpu(value, compiled, data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: calls.append(type(module).__name__))
    one_step(data, tmp_path, f"compile={value}")
    assert bool(calls) == compiled


def test_flash_attention_is_used_where_it_is_asked_for_installed_and_fits(monkeypatch):
    """A stand-in for the package, and tensors that say they are on a GPU."""
    calls = []

    def flash_attn_func(q, k, v, causal):
        assert causal and q.dtype == k.dtype == v.dtype == torch.bfloat16
        calls.append((q.shape, k.shape))  # [B, T, heads, head_dim]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def attention(dtype=torch.bfloat16, use_flash_attention=True):
        calls.clear()
        config = SCRIPT.ModelConfig(n_embd=32, n_layer=1, n_head=4, use_flash_attention=use_flash_attention)
        q, k, v = torch.randn(3, 1, 4, 7, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            return SCRIPT.causal_attention(q, k[:, :2], v[:, :2], config)

    monkeypatch.setattr(SCRIPT, "flash_attn_func", flash_attn_func)
    with_flash = attention()
    assert calls == [((1, 7, 4, 8), (1, 7, 2, 8))]
    torch.testing.assert_close(with_flash, attention(use_flash_attention=False), atol=1e-2, rtol=1e-2)
    assert calls == []
    attention(torch.float32)
    assert calls == []
    monkeypatch.setattr(SCRIPT, "flash_attn_func", None)
    attention()
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


def test_wandb_gets_the_metrics_when_it_is_asked_for(data, tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    records = one_step(data, tmp_path, "wandb=online")
    assert [options["mode"] for options in wandb.options] == ["online"]
    assert [step for step, _ in wandb.logged] == [record["step"] for record in records]
    for (_, values), record in zip(wandb.logged, records, strict=True):
        assert record["loss"] in values.values()


@pytest.mark.parametrize("failure", ["import", "init", "log", None])
def test_a_run_completes_without_wandb_and_says_so_if_asked(failure, data, tmp_path, monkeypatch, capsys):
    missing = failure in ("import", None)  # then importing it raises ImportError
    monkeypatch.setitem(sys.modules, "wandb", None if missing else FakeWandb(failure))
    records = one_step(data, tmp_path, f"wandb={'offline' if failure else 'disabled'}")
    assert records[-1]["kind"] == "final"
    assert ("warning: no wandb" in capsys.readouterr().out) == bool(failure)


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


def test_no_key_is_left_out_of_the_tests_above():
    """n_kv_groups has its tests beside the models."""
    own_test = {"n_kv_groups", "use_flash_attention", "train_data", "val_data", "compile", "wandb"}
    alive = {setting.partition("=")[0] for setting in ROWS} | own_test
    assert alive == WRONG.keys() == MODEL_KEYS | TRAIN_KEYS
