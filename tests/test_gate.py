"""Nothing silent: what would train on, overwrite or report something other than the folder holds is refused in
one line with the key and both values, or the file, before anything there is touched."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    ENDLESS,
    arguments,
    assert_same_run,
    assert_same_weights,
    failing_run,
    metrics,
    prepare,
    start,
    to_a_moment,
    wait_until_held,
)

import transformer_GQA_300_M as GQA
import transformer_KQV_300_M as KQV
import transformer_KV_1_300_M as KV


def state(folder):
    """All that a folder holds, with the time of its last change; the lock, which is empty, aside."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def refused(args, folder, capsys, script=KV):
    """The line with which the run is refused, having written nothing into the folder."""
    before = state(folder)
    line = failing_run(args, capsys, script)
    assert state(folder) == before
    return line


def resumed(data, folder, *settings):
    KV.main(arguments(data, folder, "dropout=0.1", *settings))


def recorded(folder):
    return yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))


# -----------------------------------------------------------------------------
# Settings: a run is continued as it began, or not at all

HARMLESS = {  # that cannot change the result
    "micro_batch_size": 1, "gradient_accumulation": 8, "num_gpus": 1, "train_data": "{copy}/train",
    "val_data": "{copy}/validation", "use_flash_attention": "false", "compile": "auto", "log_interval": 2,
    "eval_interval": 8, "eval_batches": 3, "save_interval": 3, "keep_checkpoints": 2, "sample_tokens": 4,
    "wandb": "offline",
}  # fmt: skip
DECISIVE = {  # as it was, and another value
    "vocab_size": (257, 260), "n_positions": (32, 40), "n_embd": (32, 48), "n_layer": (2, 3), "n_head": (2, 4),
    "n_inner": (64, 72), "dropout": (0.1, 0.3), "layer_norm_epsilon": (1e-5, 0.01),
    "initializer_range": (0.02, 0.1), "sequence": ("packed", "padded"), "score_padding": (True, False),
    "seq_length": (32, 16), "target_tokens": (2048, 4096), "learning_rate": (0.01, 0.02),
    "min_lr": (0.001, 0.0), "lr_scheduler": ("cosine", "linear"), "warmup_steps": (2, 3),
    "weight_decay": (0.1, 0.9), "beta1": (0.9, 0.5), "beta2": (0.95, 0.5), "grad_clip": (1.0, 0.1),
    "skip_grad_norm": (100.0, 50.0), "seed": (42, 7), "precision": ("fp32", "bf16"),
}  # fmt: skip


def test_every_setting_is_known_to_be_harmless_or_decisive():
    keys = [field.name for config in (KV.ModelConfig, KV.TrainingConfig) for field in fields(config)]
    assert sorted([*HARMLESS, *DECISIVE, "n_kv_groups"]) == sorted(keys)


@pytest.mark.parametrize("key", DECISIVE)
def test_a_setting_that_can_change_the_result_is_refused_with_both_values(key, data, whole_run, capsys):
    before, after = DECISIVE[key]
    args = arguments(data, whole_run, "dropout=0.1", f"{key}={str(after).lower()}")
    line = refused(args, whole_run, capsys)
    assert str(whole_run) in line and f"{key} {before} -> {after}" in line


def test_another_global_batch_is_refused_with_both_values(data, whole_run, capsys):
    args = arguments(data, whole_run, "dropout=0.1", "num_gpus=1")
    assert "global batch 8 -> 4" in refused(args, whole_run, capsys)


def test_settings_that_cannot_change_the_result_may_differ(data_dir, data, whole_run, half, tmp_path):
    """A complete run stays as it is, and one that is resumed ends in the same bits, if it sums them alike."""
    shutil.copytree(data_dir, tmp_path / "copy")
    settings = [f"{key}={value}".format(copy=tmp_path / "copy") for key, value in HARMLESS.items()]
    before = state(whole_run)
    resumed(data, whole_run, *settings)
    assert state(whole_run) == before
    same_sums = ["wandb=disabled", "micro_batch_size=2", "gradient_accumulation=4", "eval_batches=null"]
    resumed(data, half, *settings, *same_sums)
    assert_same_weights(whole_run / "final_model.pt", half / "final_model.pt")
    assert metrics(half)[-1] == metrics(whole_run)[-1]


def test_the_groups_of_a_grouped_variant_are_decisive(data, tmp_path, capsys):
    args = arguments(data, tmp_path, "n_head=4", "target_tokens=512")
    GQA.main([*args, "n_kv_groups=2"])
    assert "n_kv_groups 2 -> 1" in refused([*args, "n_kv_groups=1"], tmp_path, capsys, GQA)


def test_a_run_that_ended_before_its_first_checkpoint_keeps_its_settings(data, whole_run, tmp_path, capsys):
    folder = tmp_path / "early"
    folder.mkdir()
    for name in ("run.yaml", "model_config.yaml", "train_config.yaml", "metrics.jsonl"):
        shutil.copy(whole_run / name, folder)
    assert "seed 42 -> 7" in refused(arguments(data, folder, "dropout=0.1", "seed=7"), folder, capsys)
    resumed(data, folder)
    assert_same_run(whole_run, folder)


def test_an_accepted_change_takes_effect_and_is_that_of_the_run_from_then_on(data, half, capsys):
    """The optimiser's state in the checkpoint holds the old settings as well."""
    changes = ["seed=7", "weight_decay=0.7", "beta1=0.8", "beta2=0.9"]
    resumed(data, half, *changes, "--accept_changes")
    checkpoint = torch.load(half / "checkpoint_step_6.pt", weights_only=True)
    (group,) = checkpoint["optimizer_state_dict"]["param_groups"]
    assert group["weight_decay"] == 0.7 and tuple(group["betas"]) == (0.8, 0.9)
    assert (recorded(half)["seed"], recorded(half)["weight_decay"]) == (7, 0.7)
    resumed(data, half, *changes)
    assert "seed 7 -> 42" in refused(arguments(data, half, "dropout=0.1"), half, capsys)


def test_a_total_below_the_step_of_the_folder_is_refused_whatever_is_accepted(data, whole_run, capsys):
    args = arguments(data, whole_run, "dropout=0.1", "target_tokens=1024", "--accept_changes")
    assert f"{whole_run}/checkpoint_step_8.pt" in refused(args, whole_run, capsys)


def test_a_checkpoint_exactly_at_a_new_total_is_evaluated_and_saved_as_final(data, whole_run, half):
    resumed(data, half, "target_tokens=1024", "--accept_changes")
    last = metrics(half)[-1]
    assert (last["kind"], last["step"]) == ("final", 4)
    assert last["loss"] == next(r["loss"] for r in metrics(whole_run) if (r["kind"], r["step"]) == ("val", 4))
    assert_same_weights(whole_run / "checkpoint_step_4.pt", half / "final_model.pt")


# -----------------------------------------------------------------------------
# Other work in the folder


def test_another_variant_is_refused_with_both_whatever_is_accepted(data, half, capsys):
    args = arguments(data, half, "dropout=0.1")
    line = refused(args, half, capsys, KQV)
    assert str(half) in line and "variant KV_1 -> KQV" in line
    assert str(half) in refused([*args, "--accept_changes"], half, capsys, KQV)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_text_is_refused_with_both_fingerprints(split, data, half, tmp_path, capsys):
    other = prepare(tmp_path / "other", [f"Quite another text, number {i}. " * 5 for i in range(60)])
    settings = [other[0], data[1]] if split == "train" else [data[0], other[1]]
    line = refused(arguments(settings, half, "dropout=0.1"), half, capsys)
    name = {"train": "training text", "validation": "validation text"}[split]
    assert f"{name} {recorded(half)[name]} -> " in line


@pytest.fixture
def own_data(data_dir, tmp_path):
    """A copy of the prepared data, to be changed, and the settings that name it."""
    folder = Path(shutil.copytree(data_dir, tmp_path / "data"))
    return folder, [f"train_data={folder / 'train'}", f"val_data={folder / 'validation'}"]


def edit(folder, **values):
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_another_tokenizer_of_the_same_name_is_refused_with_both_contents(own_data, half, capsys):
    """For a run as for --init_from."""
    folder, settings = own_data
    for split in ("train", "validation"):
        edit(folder / split, tokenizer_sha256={"tokenizer.tiktoken": 64 * "a"})
    line = refused(arguments(settings, half, "dropout=0.1"), half, capsys)
    assert f"tokenizer {recorded(half)['tokenizer']} -> " in line and "sha256:aaaaaaaa" in line
    path = half / "checkpoint_step_4.pt"
    line = failing_run(arguments(settings, half.with_name("new"), f"--init_from={path}"), capsys, KV)
    assert str(path) in line and "tokenizer" in line


@pytest.mark.parametrize("left", ["checkpoint_step_8.pt", "final_model.pt", "weights.pt"])
def test_weights_without_a_run_are_left_alone(left, data, whole_run, tmp_path, capsys):
    shutil.copy(whole_run / "checkpoint_step_8.pt", tmp_path / left)
    if left == "final_model.pt":  # of a run whose checkpoints are gone
        shutil.copy(whole_run / "run.yaml", tmp_path)
    line = refused(arguments(data, tmp_path, "dropout=0.1", "--accept_changes"), tmp_path, capsys)
    assert str(tmp_path) in line and "--output_dir" in line


def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_leaves_no_lock(data, tmp_path, capsys):
    args = arguments(data, tmp_path / "run", ENDLESS)
    first = start(*to_a_moment("torch:Tensor.backward:9:before", tmp_path / "held", args))
    wait_until_held(first, tmp_path / "held")
    line = refused(args, tmp_path / "run", capsys)
    assert str(tmp_path / "run") in line and "another run" in line
    first.kill()
    first.communicate()
    KV.main(arguments(data, tmp_path / "run", "target_tokens=768", "--accept_changes"))
    assert metrics(tmp_path / "run")[-1]["step"] == 3


# -----------------------------------------------------------------------------
# --init_from: the weights of another run


def save_released(source, path):
    """As the release saves: DDP's prefix, the causal masks, and neither variant nor tokenizer."""
    contents = torch.load(source, weights_only=True)
    kept = {key: contents[key] for key in ("step", "epoch", "tokens_seen", "model_config", "train_config")}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(2)}
    state = contents["model_state_dict"] | masks
    torch.save(kept | {"model_state_dict": {f"module.{name}": w for name, w in state.items()}}, path)


@pytest.mark.parametrize("source", ["final_model.pt", "released"])
def test_init_from_starts_at_step_0_with_these_weights(source, data, whole_run, tmp_path, capsys):
    path, folder = whole_run / source, tmp_path / "run"
    if source == "released":
        path = tmp_path / "checkpoint_step_1000.pt"
        save_released(whole_run / "final_model.pt", path)
    args = arguments(data, folder, "dropout=0.1", "target_tokens=512", f"--init_from={path}")
    KV.main(args)
    first = metrics(folder)[0]
    assert (first["kind"], first["step"]) == ("val", 0)
    assert first["loss"] == metrics(whole_run)[-1]["loss"]
    assert recorded(folder)["init_from"] == str(path)
    before = state(folder)
    KV.main(args)
    assert state(folder) == before
    assert f"init_from {path} -> None" in refused(args[:-1], folder, capsys)
    args = arguments(data, whole_run, "dropout=0.1", f"--init_from={path}")
    assert f"init_from None -> {path}" in refused(args, whole_run, capsys)


def test_init_from_of_another_variant_or_shape_or_a_damaged_file_begins_no_run(data, whole_run, tmp_path, capsys):
    source, damaged, missing = whole_run / "final_model.pt", tmp_path / "damaged.pt", tmp_path / "missing.pt"
    content = source.read_bytes()
    damaged.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    for name, script, path, settings, word in (
        ("variant", KQV, source, [], "transformer_KV_1_300_M.py"),
        ("heads", KV, source, ["n_head=4"], "n_head"),
        ("shape", KV, source, ["n_inner=72"], "c_fc"),
        ("damaged", KV, damaged, [], "whole checkpoint"),
        ("missing", KV, missing, [], "No such file"),
    ):
        args = arguments(data, tmp_path / name, *settings, f"--init_from={path}")
        line = failing_run(args, capsys, script)
        assert str(path) in line and word in line
        assert [file.name for file in (tmp_path / name).iterdir()] == ["run.lock"]


# -----------------------------------------------------------------------------
# Data and settings that do not go together


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train_data=nowhere"], ["nowhere", "dataset_download.py"]),
        (["seq_length=64", "target_tokens=4096"], ["seq_length", "n_positions"]),
        (["vocab_size=100"], ["vocab_size", "257"]),
        (["--output_dir=/dev/null/run"], ["/dev/null/run"]),
    ],
)
def test_what_cannot_work_is_said_before_any_work(settings, words, data, tmp_path, capsys):
    line = failing_run(arguments(data, tmp_path / "out", *settings), capsys, KV)
    assert all(word in line for word in words)
    assert not (tmp_path / "out").exists()


def test_ranks_that_cannot_share_the_batch_are_refused(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(KV, "WORLD_SIZE", 3)  # of 2 x 2 micro batches
    monkeypatch.setattr(KV, "all_gather", lambda value: [value])
    line = failing_run(arguments(data, tmp_path / "out"), capsys, KV)
    assert "3 ranks" in line and "gradient_accumulation" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("split", "change", "words"),
    [
        ("train", {"finished": False}, ["data/train", "dataset_download.py"]),
        ("validation", {"finished": False}, ["data/validation", "dataset_download.py"]),
        ("validation", {"tokenizer_sha256": {"tokenizer.tiktoken": 64 * "a"}}, ["val_data", "tokenizer"]),
    ],
)
def test_data_not_whole_or_of_two_tokenizers_are_named(split, change, words, own_data, tmp_path, capsys):
    folder, settings = own_data
    edit(folder / split, **change)
    line = failing_run(arguments(settings, tmp_path / "out"), capsys, KV)
    assert all(word in line for word in words)
    assert not (tmp_path / "out").exists()


def test_a_broken_tokenizer_file_costs_the_samples_and_nothing_else(own_data, tmp_path, capsys):
    folder, settings = own_data
    (folder / "validation/tokenizer.tiktoken").write_bytes(b"not a tokenizer\n")
    KV.main(arguments(settings, tmp_path / "out"))
    assert capsys.readouterr().out.count("warning: no samples") == 4
    assert len(KV.checkpoints(tmp_path / "out")) == 4
    assert (tmp_path / "out/final_model.pt").exists() and not list(tmp_path.glob("out/samples_*"))


def test_data_with_nothing_to_score_are_refused(data, tmp_path, capsys):
    letters = prepare(tmp_path, ["abcdefghijklmnopqrstuvwxyz"[i % 26] for i in range(60)], validation_tokens=20)
    masked = ["sequence=padded", "score_padding=false"]
    for name, settings, folder in (("train", [letters[0], data[1]], 0), ("val", [data[0], letters[1]], 1)):
        line = failing_run(arguments(settings, tmp_path / name, *masked), capsys, KV)
        assert "nothing to score" in line and letters[folder].partition("=")[2] in line
        assert not list((tmp_path / name).glob("*.pt"))
