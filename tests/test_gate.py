"""Nothing silent: a run never trains on, overwrites or reports something other than what its folder holds.

What a run may not do is refused with one line, before anything in the folder is touched; what it may do
leaves no trace of the interruption. The data are checked when they are opened, and signals and closed
terminals end a run with everything saved.
"""

import errno
import fcntl
import io
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, prepare
from test_training import (
    ENDLESS,
    arguments,
    assert_same_run,
    failing_run,
    metrics,
    signal_in_step,
    to_a_moment,
    wait_until_held,
    weights,
)

import transformer_GQA_300_M as GQA
import transformer_KQV_300_M as KQV
import transformer_KV_1_300_M as KV

SCRIPT = ROOT / "transformer_KV_1_300_M.py"
MODEL_KEYS = [field.name for field in fields(KV.ModelConfig)]
TRAINING_KEYS = [field.name for field in fields(KV.TrainingConfig)]


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """The folder of a complete run of eight steps, with a checkpoint after every second."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    KV.main(arguments(data, output_dir, "dropout=0.1"))
    return output_dir


@pytest.fixture
def complete(whole_run, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(whole_run, tmp_path / "complete"))


@pytest.fixture
def half(whole_run, tmp_path):
    """The folder that a kill between steps 4 and 6 of that run leaves."""
    output_dir = Path(shutil.copytree(whole_run, tmp_path / "half"))
    for name in ("final_model.pt", "checkpoint_step_6.pt", "checkpoint_step_8.pt"):
        (output_dir / name).unlink()
    return output_dir


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


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


# -----------------------------------------------------------------------------
# A run is continued as it began, or not at all


def test_a_total_below_the_step_of_the_folder_is_refused(data, complete, capsys):
    for settings in (
        ["target_tokens=1024"],
        ["micro_batch_size=4"],
    ):  # four steps each, the folder is at eight
        line = refused(arguments(data, complete, "dropout=0.1", *settings), complete, capsys)
        assert str(complete) in line and "at step 8" in line and "end at 4" in line


@pytest.mark.parametrize("setting", ["seed=7", "learning_rate=2e-2", "score_padding=false"])
def test_a_complete_run_keeps_its_settings(setting, data, complete, capsys):
    line = refused(arguments(data, complete, "dropout=0.1", setting), complete, capsys)
    assert setting.partition("=")[0] in line
    assert "--output_dir" in line and "--init_from" in line and "--accept_changes" in line


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("n_head=4", "n_head 2 -> 4"),
        ("dropout=0.3", "dropout 0.1 -> 0.3"),
        ("seed=7", "seed 42 -> 7"),
        ("sequence=padded", "sequence packed -> padded"),
        ("learning_rate=2e-2", "learning_rate 0.01 -> 0.02"),
        ("seq_length=16", "seq_length 32 -> 16"),
    ],
)
def test_a_resumed_run_with_other_settings_is_refused(setting, change, data, half, capsys):
    line = refused(arguments(data, half, "dropout=0.1", setting), half, capsys)
    assert f"{half}/checkpoint_step_4.pt" in line and change in line


def test_a_run_that_ended_before_its_first_checkpoint_keeps_its_settings(data, whole_run, tmp_path, capsys):
    folder = tmp_path / "early"
    folder.mkdir()
    for name in ("run.yaml", "model_config.yaml", "train_config.yaml", "metrics.jsonl"):
        shutil.copy(whole_run / name, folder)
    assert "seed 42 -> 7" in refused(arguments(data, folder, "dropout=0.1", "seed=7"), folder, capsys)
    resumed(data, folder)
    assert_same_run(whole_run, folder)


HARMLESS = {  # that cannot change the result
    "micro_batch_size": ["micro_batch_size=1", "gradient_accumulation=4"],
    "gradient_accumulation": ["gradient_accumulation=4", "num_gpus=1"],
    "num_gpus": ["num_gpus=4", "gradient_accumulation=1"],
    "train_data": ["train_data={copy}/train"],
    "val_data": ["val_data={copy}/validation"],
    "use_flash_attention": ["use_flash_attention=false"],
    "compile": ["compile=auto"],
    "log_interval": ["log_interval=2"],
    "eval_interval": ["eval_interval=2"],
    "eval_batches": ["eval_batches=3"],
    "save_interval": ["save_interval=4"],
    "keep_checkpoints": ["keep_checkpoints=2"],
    "sample_tokens": ["sample_tokens=4"],
    "wandb": ["wandb=offline"],
}
DECISIVE = {
    "vocab_size": "260", "n_positions": "40", "n_embd": "48", "n_layer": "3", "n_head": "4", "n_inner": "72",
    "dropout": "0.3", "layer_norm_epsilon": "1e-2", "initializer_range": "0.1", "sequence": "padded",
    "score_padding": "false", "seq_length": "16", "target_tokens": "4096", "learning_rate": "2e-2",
    "min_lr": "0", "lr_scheduler": "linear", "warmup_steps": "3", "weight_decay": "0.9", "beta1": "0.5",
    "beta2": "0.5", "grad_clip": "0.1", "skip_grad_norm": "50", "seed": "7", "precision": "bf16",
}  # fmt: skip


def test_every_setting_is_known_to_be_harmless_or_decisive():
    assert sorted([*HARMLESS, *DECISIVE, "n_kv_groups"]) == sorted(MODEL_KEYS + TRAINING_KEYS)
    assert sorted(HARMLESS) == sorted(KV.MAY_CHANGE)


@pytest.mark.parametrize("key", DECISIVE)
def test_a_setting_that_can_change_the_result_is_refused(key, data, whole_run, capsys):
    args = arguments(data, whole_run, "dropout=0.1", f"{key}={DECISIVE[key]}")
    assert f"{key} " in refused(args, whole_run, capsys)


@pytest.mark.parametrize("key", HARMLESS)
def test_a_setting_that_cannot_change_the_result_may_differ(key, data, data_dir, whole_run, tmp_path):
    if "data" in key:
        shutil.copytree(data_dir, tmp_path / "copy")
    before = state(whole_run)
    resumed(data, whole_run, *(setting.format(copy=tmp_path / "copy") for setting in HARMLESS[key]))
    assert state(whole_run) == before


def test_the_groups_of_a_grouped_variant_are_decisive(data, tmp_path, capsys):
    args = arguments(data, tmp_path, "n_head=4", "target_tokens=512")
    GQA.main([*args, "n_kv_groups=2"])
    assert "n_kv_groups 2 -> 1" in refused([*args, "n_kv_groups=1"], tmp_path, capsys, GQA)


def test_harmless_settings_change_no_bit_of_the_result(data, whole_run, half):
    resumed(
        data,
        half,
        "num_gpus=1",
        "gradient_accumulation=4",
        "eval_interval=8",
        "save_interval=3",
        "compile=auto",
    )
    expected, found = weights(whole_run / "final_model.pt"), weights(half / "final_model.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(half)[-1] == metrics(whole_run)[-1]


def test_another_global_batch_is_refused_whatever_is_accepted(data, half, capsys):
    for settings in (
        ["num_gpus=1"],
        ["num_gpus=1", "--accept_changes"],
        ["seq_length=16", "--accept_changes"],
    ):
        refused(arguments(data, half, "dropout=0.1", *settings), half, capsys)


def test_an_accepted_change_is_written_into_run_yaml_and_every_later_checkpoint(data, half, capsys):
    changes = ["seed=7", "learning_rate=2e-2"]
    resumed(data, half, *changes, "--accept_changes")
    recorded = yaml.safe_load((half / "run.yaml").read_text(encoding="utf-8"))["changes"]
    assert (
        "step 4" in str(recorded)
        and "seed 42 -> 7" in str(recorded)
        and "learning_rate 0.01 -> 0.02" in str(recorded)
    )
    for name in ("checkpoint_step_6.pt", "final_model.pt"):
        assert torch.load(half / name, weights_only=True)["changes"] == recorded
    resumed(data, half, *changes)  # the changed settings are those of the run now
    assert "seed 7 -> 42" in refused(arguments(data, half, "dropout=0.1"), half, capsys)


def test_an_accepted_change_of_the_optimiser_takes_effect(data, half):
    """The optimiser's state in the checkpoint holds the old settings as well."""
    resumed(data, half, "weight_decay=0.7", "beta1=0.8", "beta2=0.9", "--accept_changes")
    checkpoint = torch.load(half / "checkpoint_step_6.pt", weights_only=True)
    (group,) = checkpoint["optimizer_state_dict"]["param_groups"]
    assert group["weight_decay"] == 0.7 and tuple(group["betas"]) == (0.8, 0.9)


def test_a_checkpoint_of_another_folder_does_not_take_over_a_run(data, whole_run, tmp_path, capsys):
    other = tmp_path / "other"
    args = arguments(data, other, "dropout=0.1", "target_tokens=512")
    KV.main([*args, "seed=7"])
    named = ["--resume", str(whole_run / "checkpoint_step_4.pt")]
    line = refused(arguments(data, other, "dropout=0.1", *named), other, capsys)
    assert str(other) in line and "seed 7 -> 42" in line


def test_a_run_without_its_run_yaml_is_not_taken_over_either(data, whole_run, tmp_path, capsys):
    """Its checkpoints say what they are of."""
    other = tmp_path / "other"
    KQV.main(arguments(data, other, "dropout=0.1", "target_tokens=512"))
    (other / "run.yaml").unlink()
    named = ["--resume", str(whole_run / "checkpoint_step_4.pt")]
    line = refused(arguments(data, other, "dropout=0.1", *named), other, capsys)
    assert str(other) in line and "variant KQV -> KV_1" in line


def test_a_damaged_run_yaml_does_not_keep_checkpoints_from_being_resumed(data, whole_run, half):
    (half / "run.yaml").write_text("{")
    resumed(data, half)
    assert_same_run(whole_run, half)


def test_a_change_that_comes_after_the_end_is_refused(data, complete, capsys):
    args = arguments(data, complete, "dropout=0.1", "weight_decay=0.7", "--accept_changes")
    line = refused(args, complete, capsys)
    assert "complete at step 8" in line and "weight_decay 0.1 -> 0.7" in line


def test_another_architecture_is_not_offered_ways_that_would_be_refused(data, half, capsys):
    line = refused(arguments(data, half, "dropout=0.1", "n_inner=72"), half, capsys)
    assert "n_inner 64 -> 72" in line and "--output_dir" in line
    assert "--accept_changes" not in line and "--init_from" not in line


def test_another_variant_leaves_the_folder_alone(data, complete, capsys):
    line = refused(arguments(data, complete, "dropout=0.1"), complete, capsys, KQV)
    assert str(complete) in line and "KV_1" in line


@pytest.mark.parametrize("damage", ["flipped", "cut off", "unreadable"])
def test_a_folder_whose_checkpoints_are_all_damaged_is_left_alone(
    damage, data, complete, capsys, monkeypatch
):
    for _, path in KV.checkpoints(complete):
        if damage == "flipped":
            flip_a_byte(path)
        if damage == "cut off":
            path.write_bytes(path.read_bytes()[:-1000])
    if damage == "unreadable":  # for a moment, as on a network

        def fail(*_, **__):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(torch, "load", fail)
    line = refused(arguments(data, complete, "dropout=0.1"), complete, capsys)
    assert str(complete) in line and "--resume never" in line


def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_leaves_no_lock(data, tmp_path, capsys):
    args = arguments(data, tmp_path / "run", "save_interval=2", ENDLESS)
    first = to_a_moment("torch:Tensor.backward:9:before", tmp_path / "held", args)
    wait_until_held(first, tmp_path / "held")
    line = refused(args, tmp_path / "run", capsys)
    assert str(tmp_path / "run") in line and "another run" in line
    first.kill()
    first.communicate()
    KV.main(arguments(data, tmp_path / "run", "target_tokens=768", "--accept_changes"))
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def test_resume_never_twice_moves_two_whole_runs_aside(data, whole_run, complete):
    def files(folder):
        return {path.name: content for path, (content, _) in state(folder).items()}

    first = files(complete)
    resumed(data, complete, "--resume", "never", "seed=7")
    second = files(complete)
    resumed(data, complete, "--resume", "never")
    assert files(complete.with_name("complete.old_1")) == first
    assert files(complete.with_name("complete.old_2")) == second
    assert_same_run(whole_run, complete)


def test_a_full_disk_at_a_start_leaves_metrics_and_settings_as_they_were(data, half, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = refused(arguments(data, half, "dropout=0.1"), half, capsys)
    assert str(half) in line and "No space left on device" in line


def test_lines_that_are_no_records_are_skipped(data, whole_run, half):
    with open(half / "metrics.jsonl", "ab") as file:
        file.write(b'[]\n{"kind": "train"}\n{"kind": "train", "step": null}\n\xff\xfe\n{"kind": "tra')
    resumed(data, half)
    assert_same_run(whole_run, half)


def test_a_run_goes_on_without_its_log_and_repeats_the_evaluation_that_it_lacks(data, whole_run, half):
    (half / "metrics.jsonl").unlink()
    resumed(data, half)
    expected = [record for record in metrics(whole_run) if record["step"] >= 4]
    expected.remove(next(record for record in expected if (record["kind"], record["step"]) == ("train", 4)))
    assert metrics(half) == expected


def test_a_checkpoint_exactly_at_a_new_total_is_evaluated_and_saved_as_final(data, whole_run, half):
    resumed(data, half, "target_tokens=1024", "--accept_changes")
    last = metrics(half)[-1]
    assert (last["kind"], last["step"]) == ("final", 4)
    val = next(record for record in metrics(whole_run) if (record["kind"], record["step"]) == ("val", 4))
    assert last["loss"] == val["loss"]
    expected, found = weights(whole_run / "checkpoint_step_4.pt"), weights(half / "final_model.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_longer_run_that_is_stopped_at_its_end_still_writes_its_final_model(data, complete, monkeypatch):
    """The final_model.pt of the shorter run stands there meanwhile."""
    longer = arguments(data, complete, "dropout=0.1", "target_tokens=2560", "--accept_changes")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_in_step(2, signal.SIGTERM, patch)  # step 10
        KV.main(longer)
    assert (complete / "checkpoint_step_10.pt").exists()
    KV.main(longer)
    assert torch.load(complete / "final_model.pt", weights_only=True)["step"] == 10
    expected, found = weights(complete / "checkpoint_step_10.pt"), weights(complete / "final_model.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_damaged_final_model_is_written_again(data, whole_run, complete):
    path = complete / "final_model.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    resumed(data, complete)
    expected, found = weights(whole_run / "final_model.pt"), weights(path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_that_is_a_link_to_other_storage_is_resumed(data, half, tmp_path):
    stored = tmp_path / "stored.pt"
    (half / "checkpoint_step_4.pt").rename(stored)
    (half / "checkpoint_step_4.pt").symlink_to(stored)
    resumed(data, half)
    assert (half / "checkpoint_step_4.pt").is_symlink()


def test_a_run_that_ends_while_another_starts_is_not_overwritten(data, half, capsys, monkeypatch):
    lock = KV.lock_output_dir

    def another_saves_first(folder, move_aside):
        shutil.copy(folder / "checkpoint_step_4.pt", folder / "checkpoint_step_6.pt")
        return lock(folder, move_aside)

    monkeypatch.setattr(KV, "lock_output_dir", another_saves_first)
    line = failing_run(arguments(data, half, "dropout=0.1"), capsys)
    assert "another run has just saved there" in line


def test_the_files_of_others_are_left_alone(data, half):
    (half / "thesis.tmp").write_text("mine")
    (half / "checkpoint_step_6.pt.tmp").write_text("of a killed run")
    resumed(data, half)
    assert (half / "thesis.tmp").read_text() == "mine"
    assert not (half / "checkpoint_step_6.pt.tmp").exists()


def test_a_world_size_without_a_rank_does_not_count(data, whole_run, tmp_path):
    """As a stale `export WORLD_SIZE=2` leaves it."""
    command = [sys.executable, str(SCRIPT), *arguments(data, tmp_path / "run", "dropout=0.1")]
    subprocess.run(command, env=os.environ | {"WORLD_SIZE": "2"}, check=True, capture_output=True)
    assert metrics(tmp_path / "run") == metrics(whole_run)


def test_a_flipped_byte_in_the_newest_checkpoint_is_noticed_and_the_one_before_it_resumed(
    data, whole_run, half, capsys
):
    flip_a_byte(half / "checkpoint_step_4.pt")
    resumed(data, half)
    output = capsys.readouterr().out
    assert f"skipping {half}/checkpoint_step_4.pt" in output
    assert f"resuming from {half}/checkpoint_step_2.pt" in output
    assert_same_run(whole_run, half)


def test_a_checkpoint_with_zeros_before_its_number_is_found(data, whole_run, half):
    (half / "checkpoint_step_4.pt").rename(half / "checkpoint_step_0004.pt")
    resumed(data, half)
    expected, found = weights(whole_run / "final_model.pt"), weights(half / "final_model.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_older_than_those_of_the_folder_is_not_resumed_there(data, half, capsys):
    line = refused(
        arguments(data, half, "dropout=0.1", "--resume", str(half / "checkpoint_step_2.pt")), half, capsys
    )
    assert "checkpoint_step_4.pt" in line and "--output_dir" in line


@pytest.mark.parametrize(
    "content", ["{", "just text", "[1, 2]", "variant: KV_1\n", "variant: KV_1\nmodel_config: 3\n"]
)
def test_a_run_yaml_that_cannot_be_read_is_named(content, data, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(content)
    assert str(tmp_path) in refused(arguments(data, tmp_path), tmp_path, capsys)


def test_a_checkpoint_that_does_not_say_what_it_is_of_is_refused_in_one_line(data, half, tmp_path, capsys):
    path = half / "checkpoint_step_4.pt"
    contents = torch.load(path, weights_only=True)
    for key in ("train_config", "train_data", "init_from"):
        torch.save({name: value for name, value in contents.items() if name != key}, path)
        assert str(path) in refused(arguments(data, half, "--resume", str(path)), half, capsys)


# -----------------------------------------------------------------------------
# --init_from: the weights of another run


@pytest.mark.parametrize("name", ["final_model.pt", "checkpoint_step_8.pt"])
def test_init_from_starts_at_step_0_with_these_weights(name, data, whole_run, tmp_path):
    source = whole_run / name
    KV.main(arguments(data, tmp_path / "run", "dropout=0.1", "target_tokens=512", "--init_from", str(source)))
    first = metrics(tmp_path / "run")[0]
    assert (first["kind"], first["step"]) == ("val", 0)
    assert first["loss"] == metrics(whole_run)[-1]["loss"]
    assert yaml.safe_load((tmp_path / "run/run.yaml").read_text(encoding="utf-8"))["init_from"] == str(source)


def test_a_run_with_init_from_resumes_with_and_without_naming_it_again(
    data, whole_run, tmp_path, monkeypatch
):
    source_path = tmp_path / "source.pt"
    shutil.copy(whole_run / "final_model.pt", source_path)
    source = ["--init_from", str(source_path)]
    KV.main(arguments(data, tmp_path / "whole", *source))
    for again in (source, []):
        folder = tmp_path / f"stopped{len(again)}"
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            signal_in_step(3, signal.SIGTERM, patch)
            KV.main(arguments(data, folder, *source))
        source_path.rename(tmp_path / "elsewhere.pt")  # a resume no longer needs it
        KV.main(arguments(data, folder, *again))
        (tmp_path / "elsewhere.pt").rename(source_path)
        assert weights(folder / "final_model.pt").keys() == weights(tmp_path / "whole/final_model.pt").keys()
        assert metrics(folder) == metrics(tmp_path / "whole")
        recorded = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
        assert recorded["init_from"] == source[1]


def test_other_weights_than_the_folder_began_with_are_refused(data, whole_run, half, capsys):
    args = arguments(data, half, "dropout=0.1", "--init_from", str(whole_run / "final_model.pt"))
    assert "init_from" in refused(args, half, capsys)


def test_init_from_of_another_variant_or_shape_or_a_damaged_file_writes_nothing(
    data, whole_run, tmp_path, capsys
):
    source, damaged, missing = whole_run / "final_model.pt", tmp_path / "damaged.pt", tmp_path / "missing.pt"
    damaged.write_bytes(source.read_bytes()[:-1000])
    flipped = tmp_path / "flipped.pt"
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    shapeless, foreign = tmp_path / "shapeless.pt", tmp_path / "foreign.pt"
    contents = torch.load(source, weights_only=True)
    tokenizer = contents["tokenizer"] | {"sha256": 64 * "0"}
    torch.save(contents | {"tokenizer": tokenizer}, foreign)
    del contents["model_config"]
    torch.save(contents, shapeless)
    for name, script, path, settings, word in (
        ("variant", KQV, source, [], "KV_1_300_M.py"),
        ("shape", KV, source, ["n_head=4"], "n_head"),
        ("damaged", KV, damaged, [], "not a whole checkpoint"),
        ("missing", KV, missing, [], "No such file"),
        ("shape, of a run moved aside", KV, source, ["n_head=4", "--resume", "never"], "n_head"),
        ("without its shape", KV, shapeless, [], "records no model_config"),
        ("flipped", KV, flipped, [], "CRC"),
        ("another tokenizer", KV, foreign, [], "tokenizer"),
    ):
        line = failing_run(
            arguments(data, tmp_path / name, *settings, "--init_from", str(path)), capsys, script
        )
        assert str(path) in line and word in line
        assert not (tmp_path / name).exists()
    line = failing_run(arguments(data, tmp_path / "unset", "--init_from", ""), capsys)
    assert "--init_from: expected the path of a checkpoint" in line


def test_a_run_may_begin_with_the_weights_that_it_moves_aside(data, complete):
    before = weights(complete / "final_model.pt")
    KV.main(arguments(data, complete, "--resume", "never", "--init_from", str(complete / "final_model.pt")))
    assert metrics(complete)[0]["loss"] == metrics(Path(f"{complete}.old_1"))[-1]["loss"]
    after = weights(Path(f"{complete}.old_1") / "final_model.pt")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_alone_cannot_be_resumed_and_point_to_init_from(data, whole_run, tmp_path, capsys):
    released = tmp_path / "checkpoint_step_1000.pt"
    contents = torch.load(whole_run / "checkpoint_step_8.pt", weights_only=True)
    keys = ("step", "epoch", "tokens_seen", "model_state_dict", "optimizer_state_dict", "model_config")
    torch.save({key: contents[key] for key in keys}, released)
    for path in (whole_run / "final_model.pt", released):
        line = failing_run(arguments(data, tmp_path / "out", "dropout=0.1", "--resume", str(path)), capsys)
        assert str(path) in line and "--init_from" in line
        assert not (tmp_path / "out").exists()
    KV.main(
        arguments(data, tmp_path / "out", "target_tokens=256", "warmup_steps=0", "--init_from", str(released))
    )


# -----------------------------------------------------------------------------
# The data are what they were when they were prepared


@pytest.fixture
def own_data(data_dir, tmp_path):
    """A copy of the prepared data, to be damaged, and the settings that name it."""
    folder = Path(shutil.copytree(data_dir, tmp_path / "data"))
    return folder, [f"train_data={folder / 'train'}", f"val_data={folder / 'validation'}"]


def change(name, edit):
    """A change of the numbers in one of the files of a split."""

    def apply(folder):
        path = folder / name
        numbers = np.load(path)
        np.save(path, edit(numbers))
        return path

    return apply


def rewrite(name, edit):
    """A change of the bytes of one of the files of a split."""

    def apply(folder):
        path = folder / name
        path.write_bytes(edit(path.read_bytes()))
        return path

    return apply


def metadata(**values):
    return rewrite("metadata.json", lambda text: json.dumps(json.loads(text) | values).encode())


def beyond_the_vocabulary(tokens):
    tokens[:-1] = 300
    return tokens


DAMAGE = {
    "offsets that fall": change("chunk_000.offsets.npy", lambda offsets: offsets[::-1].copy()),
    "negative offsets": change("chunk_000.offsets.npy", lambda offsets: -offsets),
    "too few offsets": change("chunk_000.offsets.npy", lambda offsets: offsets[:-1]),
    "offsets in fractions": change("chunk_000.offsets.npy", lambda offsets: offsets.astype(float)),
    "tokens beyond the vocabulary": change("chunk_000.tokens.npy", beyond_the_vocabulary),
    "tokens of another width": change("chunk_000.tokens.npy", lambda tokens: tokens.astype(np.int32)),
    "a truncated token file": rewrite("chunk_000.tokens.npy", lambda content: content[:-200]),
    "an empty token file": rewrite("chunk_000.tokens.npy", lambda content: b""),
    "too few token_bytes": change("token_bytes.npy", lambda sizes: sizes[:100]),
    "other token_bytes": change("token_bytes.npy", lambda sizes: 2 * sizes),
    "an eos_id edited": metadata(eos_id=17),
    "an eos_id beyond the vocabulary": metadata(eos_id=1000),
    "no chunks": metadata(chunks=[]),
    "chunks that are none": metadata(chunks="all"),
    "an unfinished preparation": metadata(finished=False),
    "metadata that are a list": rewrite("metadata.json", lambda text: b"[]"),
    "metadata that are null": rewrite("metadata.json", lambda text: b"null"),
    "metadata that are empty": rewrite("metadata.json", lambda text: b""),
    "metadata that are cut off": rewrite("metadata.json", lambda text: text[:50]),
    "metadata that are no UTF-8": rewrite("metadata.json", lambda text: b"\xff\xfe" + text),
}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_are_named(damage, split, own_data, tmp_path, capsys):
    folder, settings = own_data
    path = DAMAGE[damage](folder / split)
    line = failing_run(arguments(settings, tmp_path / "out"), capsys)
    assert str(path.parent) in line
    assert path.name in line or (path.name == "metadata.json" and ".npy" in line)  # where the two disagree
    assert not list(tmp_path.glob("out/*.pt"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tokens_that_changed_between_two_starts_are_noticed(split, own_data, tmp_path, capsys, monkeypatch):
    folder, settings = own_data
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_in_step(3, signal.SIGTERM, patch)
        KV.main(arguments(settings, tmp_path / "out"))
    capsys.readouterr()
    path = change("chunk_000.tokens.npy", lambda tokens: np.where(tokens == ord("a"), ord("b"), tokens))(
        folder / split
    )
    line = failing_run(arguments(settings, tmp_path / "out"), capsys)
    assert str(path) in line


def test_validation_data_of_another_tokenizer_are_refused(own_data, tmp_path, capsys):
    folder, settings = own_data
    metadata(tokenizer="other.tiktoken sha256:0123456789abcdef")(folder / "validation")
    line = failing_run(arguments(settings, tmp_path / "out"), capsys)
    assert str(folder / "validation") in line and "tokenizer" in line
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_too_small_for_the_data_is_refused(data, tmp_path, capsys):
    line = failing_run(arguments(data, tmp_path / "out", "vocab_size=256"), capsys)
    assert "vocab_size" in line and "257" in line
    assert not (tmp_path / "out").exists()


def test_a_broken_tokenizer_file_costs_the_samples_and_nothing_else(own_data, tmp_path, capsys):
    folder, settings = own_data
    (folder / "validation/tokenizer.tiktoken").write_bytes(b"not a tokenizer\n")
    KV.main(arguments(settings, tmp_path / "out"))
    assert capsys.readouterr().out.count("warning: no samples at step") == 4
    assert [step for step, _ in KV.checkpoints(tmp_path / "out")] == [8, 6, 4, 2]
    assert (tmp_path / "out/final_model.pt").exists() and not list(tmp_path.glob("out/samples_*"))


def test_data_with_nothing_to_score_are_refused(data, tmp_path, capsys):
    letters = prepare(
        tmp_path, ["abcdefghijklmnopqrstuvwxyz"[i % 26] for i in range(60)], validation_tokens=20
    )
    masked = ["sequence=padded", "score_padding=false"]
    line = failing_run(arguments([letters[0], data[1]], tmp_path / "out", *masked), capsys)
    assert "nothing to score" in line and letters[0].partition("=")[2] in line
    assert not list(tmp_path.glob("out/*.pt"))
    line = failing_run(arguments([data[0], letters[1]], tmp_path / "val", *masked), capsys)
    assert "nothing to score" in line and letters[1].partition("=")[2] in line


def test_training_text_as_validation_text_is_said(data, tmp_path, capsys):
    train = data[0].partition("=")[2]
    KV.main(arguments(data, tmp_path, "target_tokens=256", "warmup_steps=0", f"val_data={train}"))
    assert "warning: val_data" in capsys.readouterr().out


def test_a_loader_refuses_what_it_would_misread(data_dir):
    with pytest.raises(ValueError, match="pakced"):
        KV.get_dataloader(data_dir / "train", 2, 32, sequence="pakced")
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank"):
            KV.get_dataloader(data_dir / "train", 2, 32, rank=rank, world_size=world_size)
    with pytest.raises(ValueError, match="batch_size"):
        KV.get_dataloader(data_dir / "train", 0, 32)
    with pytest.raises(ValueError, match="seq_length"):
        KV.get_dataloader(data_dir / "train", 2, 0, sequence="packed")
    dataset = KV.TokenDataset(data_dir / "train", 32)
    for row in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[row]


# -----------------------------------------------------------------------------
# Signals and closed pipes: everything is saved


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_evaluation_at_its_next_batch(number, data, whole_run, tmp_path, monkeypatch):
    batches, cross_entropy = [], F.cross_entropy

    def counted(*args, **kwargs):
        batches.append(1)
        if len(batches) == first + 3:
            signal.raise_signal(number)
        return cross_entropy(*args, **kwargs)

    val_set = KV.TokenDataset(data[1].partition("=")[2], 32, "packed")
    first = -(-len(val_set) // 2)  # batches of the evaluation before the first step; the next is at step 4
    monkeypatch.setattr(F, "cross_entropy", counted)
    with pytest.raises(SystemExit) as stop:
        resumed(data, tmp_path)
    assert stop.value.code == 128 + number
    assert len(batches) == first + 3
    assert [step for step, _ in KV.checkpoints(tmp_path)] == [4, 2]
    assert [r["step"] for r in metrics(tmp_path) if r["kind"] == "val"] == [0]
    resumed(data, tmp_path)
    assert_same_run(whole_run, tmp_path)


def test_a_closed_terminal_saves_the_step_in_hand(data, tmp_path):
    terminal, inside = pty.openpty()
    process = to_a_moment(
        "torch:Tensor.backward:9:before", tmp_path / "held", arguments(data, tmp_path, ENDLESS), stdin=inside,
        terminal=inside, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(inside)
    wait_until_held(process, tmp_path / "held")
    os.close(terminal)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    assert KV.checkpoints(tmp_path)[0][0] == 3
    assert metrics(tmp_path)[-1]["step"] == 3


def test_a_closed_pipe_does_not_end_a_run(data, whole_run, tmp_path):
    """As in `python transformer_KV_1_300_M.py | head -0`."""
    command = [sys.executable, str(SCRIPT), *arguments(data, tmp_path, "dropout=0.1")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 0, errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert_same_run(whole_run, tmp_path)


def test_closed_streams_do_not_end_a_run(data, whole_run, tmp_path):
    """As in `python transformer_KV_1_300_M.py >&- 2>&-`."""
    command = shlex.join([sys.executable, str(SCRIPT), *arguments(data, tmp_path, "dropout=0.1")])
    assert subprocess.run(["sh", "-c", f"exec {command} >&- 2>&-"], timeout=120).returncode == 0
    assert_same_run(whole_run, tmp_path)


def test_a_full_disk_behind_the_output_does_not_end_a_run(data, whole_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    resumed(data, tmp_path)
    assert_same_run(whole_run, tmp_path)


def test_an_ascii_terminal_does_not_end_a_run(data, whole_run, tmp_path, monkeypatch):
    """The dash of Q–K=V is no ASCII."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    resumed(data, tmp_path)
    assert b"complete after 8 steps" in written.getvalue()
    assert_same_run(whole_run, tmp_path)


def test_control_c_during_the_imports_ends_without_a_traceback(data, tmp_path):
    """An optional library holds the script in the middle of its imports."""
    held = tmp_path / "held"
    (tmp_path / "flash_attn.py").write_text(
        f"import pathlib, signal\npathlib.Path({str(held)!r}).touch()\nsignal.pause()"
    )
    command = [sys.executable, str(SCRIPT), *arguments(data, tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)
    wait_until_held(process, held)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert output + errors == ""


# -----------------------------------------------------------------------------
# One line instead of a traceback, and no setting that is read as another


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["seed=18446744073709551617"], ["seed"]),
        (["seq_length=1"], ["seq_length"]),
        (["warmup_steps=9"], ["warmup_steps", "8"]),
        (["n_embd=2147483648", "n_head=1", "n_inner=8"], ["alloc"]),
        (["n_positions=1000000000000000"], ["alloc"]),
    ],
    ids=lambda value: value[0].partition("=")[0] if "=" in value[0] else "",
)
def test_absurd_settings_end_in_one_line(settings, words, data, tmp_path, capsys):
    line = failing_run(arguments(data, tmp_path / "out", *settings), capsys)
    assert all(word in line for word in words)


def test_a_key_that_stands_twice_is_refused(data, tmp_path, capsys):
    config = tmp_path / "train.yaml"
    config.write_text((ROOT / "configs/train_config_demo.yaml").read_text(encoding="utf-8") + "seed: 7\n")
    line = failing_run([*arguments(data, tmp_path / "out"), "--train_config", str(config)], capsys)
    assert str(config) in line and "seed" in line


def test_a_number_with_a_leading_zero_is_decimal(data, tmp_path):
    settings = ["seed=010", "target_tokens=256", "warmup_steps=0"]
    KV.main(arguments(data, tmp_path, *settings))
    assert yaml.safe_load((tmp_path / "train_config.yaml").read_text(encoding="utf-8"))["seed"] == 10


def test_evaluate_refuses_what_it_cannot_score(data):
    folder = data[1].partition("=")[2]
    loader = KV.get_dataloader(folder, 2, 32)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = KV.GPT_QKV_KEqualsV(KV.ModelConfig(vocab_size=257, **shape))
    with pytest.raises(ValueError, match="max_batches"):
        KV.evaluate(model, loader, max_batches=0)
    endless = KV.get_dataloader(folder, 2, 32, seed=1)
    with pytest.raises(ValueError, match="endless"):
        KV.evaluate(model, endless)
    assert KV.evaluate(model, endless, max_batches=2)["loss"] > 0
    small = KV.GPT_QKV_KEqualsV(KV.ModelConfig(vocab_size=256, **shape))
    with pytest.raises(ValueError, match="257 tokens in the data"):
        KV.evaluate(small, loader)


def test_the_model_refuses_what_it_would_misread():
    model = KV.GPT_QKV_KEqualsV(KV.ModelConfig(vocab_size=61, n_positions=8, n_embd=32, n_layer=1, n_head=2))
    ids = torch.arange(8).view(1, 8)
    for label in (-5, 61):  # -100 alone is not scored
        labels = ids.clone()
        labels[0, 3] = label
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises((ValueError, IndexError, RuntimeError)):
                model(ids, labels)
    for size in ((2, 0), (0, 2)):
        with pytest.raises(ValueError, match="expected"):
            model.make_cache(*size)


def test_a_generate_that_fails_leaves_the_model_in_training_mode(monkeypatch):
    model = KV.GPT_QKV_KEqualsV(
        KV.ModelConfig(vocab_size=61, n_positions=8, n_embd=32, n_layer=1, n_head=2)
    ).train()
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[99]]), 2)
    assert model.training and model.h[0].attn.training


def test_help_lists_every_setting_with_type_and_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        KV.main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for config in (KV.ModelConfig, KV.TrainingConfig):
        for key, field in config.__pydantic_fields__.items():
            assert f" {key} " in shown.replace(":", " ").replace("(", " ")
            assert " ".join(field.description.split()) in shown
            assert config.__annotations__[key] in shown
