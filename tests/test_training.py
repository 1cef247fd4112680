"""Training through the command line: the losses, the order of the data, resuming, stopping, what ends a run."""

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import signal
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    ENDLESS,
    PATIENCE,
    ROOT,
    SCRIPT,
    VARIANTS,
    arguments,
    assert_same_run,
    assert_same_weights,
    failing_run,
    gpt2_of,
    metrics,
    script_of,
    start,
    steps_of,
    to_a_moment,
    wait_until_held,
    weights,
)  # fmt: skip
from test_token_data import documents_in, rows_of

import transformer_KQV_300_M as KQV
import transformer_KV_1_300_M as KV

GOLDEN = Path(__file__).with_name("golden_losses.json")
LONG_ROWS = ["sequence=padded", "n_positions=128", "seq_length=128"]  # longer than some of the texts


# -----------------------------------------------------------------------------
# The losses


@pytest.mark.parametrize("alias", VARIANTS)
def test_a_tiny_run_repeats_the_recorded_losses(alias, data, tmp_path):
    """A change that is meant to have no effect has none. To record anew, see CONTRIBUTING.md."""
    heads = ["n_head=8"] if VARIANTS[alias]["groups"] else []  # as the most groups
    script_of(alias).main(arguments(data, tmp_path, "dropout=0.1", "target_tokens=4096", *heads))
    losses = [record["loss"] for record in metrics(tmp_path)]
    recorded = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("RECORD_GOLDEN"):
        recorded[alias] = [round(loss, 6) for loss in losses]
        lines = [f' "{name}": {json.dumps(recorded[name])}' for name in VARIANTS if name in recorded]
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert losses == pytest.approx(recorded[alias], rel=1e-4)


def test_the_golden_losses_are_those_of_a_model_that_learns():
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == VARIANTS.keys()
    assert len(set(map(tuple, golden.values()))) == len(VARIANTS)
    for losses in golden.values():
        assert losses[0] == pytest.approx(math.log(257), abs=0.1)  # 257 equally likely tokens
        assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("protocol", [["sequence=packed"], LONG_ROWS, [*LONG_ROWS, "score_padding=false"]])
def test_a_whole_run_is_a_loop_over_transformers(protocol, data, data_dir, tmp_path):
    """24 steps of four micro batches; the rows and their order by numpy, model and loss by GPT2LMHeadModel."""
    T = 128 if "seq_length=128" in protocol else 32
    KQV.main(arguments(data, tmp_path, *protocol, f"target_tokens={24 * 8 * T}", "eval_interval=100"))

    documents, chunks = documents_in(data_dir / "train")
    sequence = "packed" if protocol == ["sequence=packed"] else "padded"
    rows, is_text = rows_of(documents, T, sequence, eos=256, chunks=chunks)
    order = np.concatenate([np.random.default_rng((42, epoch)).permutation(len(rows)) for epoch in range(4)])
    labels = rows if protocol == LONG_ROWS else np.where(is_text, rows, -100)
    config = KQV.ModelConfig(vocab_size=257, n_positions=T, n_embd=32, n_layer=2, n_head=2, n_inner=64)
    torch.manual_seed(42)
    gpt2, losses = gpt2_of(KQV.GPT(config), n_inner=64), []
    optimizer = torch.optim.AdamW(gpt2.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(24):
        lr = 1e-2 * (step + 1) / 2  # two steps of warm-up, then a cosine from 1e-2 to 1e-3
        if step >= 2:
            lr = 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 2) / 22)) / 2
        batch = order[8 * step : 8 * step + 8]
        loss = gpt2(torch.from_numpy(rows[batch]), labels=torch.from_numpy(labels[batch])).loss
        loss.backward()
        nn.utils.clip_grad_norm_(gpt2.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert [r["loss"] for r in metrics(tmp_path) if r["kind"] == "train"] == pytest.approx(losses, rel=1e-5)


# -----------------------------------------------------------------------------
# Resuming and stopping


@pytest.mark.parametrize(
    "moment",
    [
        "torch.optim:AdamW.step:4:after",  # between two checkpoints, beyond the last logged step
        "pathlib:Path.replace:checkpoint_step_4.pt:before",  # the second checkpoint has no name yet
        "pathlib:Path.replace:checkpoint_step_8.pt:after",  # of checkpoint and final model, one is there
    ],
)
def test_a_killed_run_resumes_to_the_same_weights_and_log(moment, data, whole_run, tmp_path):
    killed = start(*to_a_moment(moment, "kill", arguments(data, tmp_path, "dropout=0.1")))
    _, errors = killed.communicate(timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL, errors
    KV.main(arguments(data, tmp_path, "dropout=0.1"))
    assert_same_run(whole_run, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


@contextlib.contextmanager
def signal_in_step(step, number=signal.SIGTERM):
    """Let a signal reach this process in the middle of a step, which has four backward passes; it ends with 1."""
    backward, calls = torch.Tensor.backward, []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4 * step - 1:
            signal.raise_signal(number)
        return backward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(torch.Tensor, "backward", counted)
        yield
    assert stop.value.code == 1
    KV.STOP.clear()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_the_step_in_hand_and_the_next_start_goes_on(number, data, whole_run, tmp_path):
    with signal_in_step(3, number):
        KV.main(arguments(data, tmp_path, "dropout=0.1"))
    assert steps_of(tmp_path) == [2, 3]
    assert metrics(tmp_path)[-1]["step"] == 3
    KV.main(arguments(data, tmp_path, "dropout=0.1"))
    (tmp_path / "checkpoint_step_3.pt").unlink()
    assert_same_run(whole_run, tmp_path)


def test_a_signal_ends_the_evaluation_at_its_next_batch(data, whole_run, tmp_path, monkeypatch):
    batches, cross_entropy = [], F.cross_entropy

    def counted(*args, **kwargs):
        batches.append(1)
        if len(batches) == first + 3:
            signal.raise_signal(signal.SIGTERM)
        return cross_entropy(*args, **kwargs)

    val_set = KV.TokenDataset(data[1].partition("=")[2], 32, "packed")
    first = -(-len(val_set) // 2)  # batches of the evaluation before the first step; the next is at step 4
    monkeypatch.setattr(F, "cross_entropy", counted)
    with pytest.raises(SystemExit) as stop:
        KV.main(arguments(data, tmp_path, "dropout=0.1"))
    KV.STOP.clear()
    assert stop.value.code == 1 and len(batches) == first + 3
    assert steps_of(tmp_path) == [2, 4]
    assert [r["step"] for r in metrics(tmp_path) if r["kind"] == "val"] == [0]
    KV.main(arguments(data, tmp_path, "dropout=0.1"))
    assert_same_run(whole_run, tmp_path)


def test_a_signal_to_torchrun_stops_all_ranks_with_one_checkpoint(data, tmp_path):
    args = arguments(data, tmp_path, "save_interval=1000", "eval_interval=1000", ENDLESS)
    # the fifth pass of a rank, two a step after the one that is thrown away
    held = to_a_moment("torch:Tensor.backward:6:before", tmp_path / "held", args)
    process = start(*held, ranks=2)
    wait_until_held(process, tmp_path / "held")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and output.count("start again to resume") == 1
    assert steps_of(tmp_path) == [3]
    KV.main(arguments(data, tmp_path, "target_tokens=1024", "--accept_changes"))
    assert metrics(tmp_path)[-1]["step"] == 4


def test_a_closed_terminal_saves_the_step_in_hand(data, tmp_path):
    terminal, inside = pty.openpty()
    streams = {"stdin": inside, "stdout": inside, "stderr": inside}
    process = start(
        *to_a_moment("torch:Tensor.backward:9:before", tmp_path / "held", arguments(data, tmp_path, ENDLESS)),
        **streams, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(inside)
    wait_until_held(process, tmp_path / "held")
    os.close(terminal)
    assert process.wait(timeout=PATIENCE) == 1
    assert steps_of(tmp_path)[-1] == metrics(tmp_path)[-1]["step"] == 3


def test_a_resumed_run_goes_on_with_rows_it_has_not_seen(data, tmp_path, monkeypatch):
    read, original = [], KV.TokenDataset.__getitem__

    def recorded(dataset, index):
        if dataset.path.name == "train":
            read.append(index)
        return original(dataset, index)

    monkeypatch.setattr(KV.TokenDataset, "__getitem__", recorded)
    args = arguments(data, tmp_path / "stopped", "target_tokens=1024", "save_interval=1000")
    with signal_in_step(2):
        KV.main(args)
    assert len(read) == 16
    KV.main(args)
    assert len(set(read)) == len(read) == 32
    KV.main(arguments(data, tmp_path / "whole", "target_tokens=1024"))
    assert read[32:] == read[:32]


def test_a_longer_run_that_is_stopped_at_its_end_still_writes_its_final_model(data, tmp_path):
    """The final_model.pt of the shorter run stands there meanwhile."""
    KV.main(arguments(data, tmp_path, "target_tokens=512"))
    longer = arguments(data, tmp_path, "target_tokens=1024", "--accept_changes")
    with signal_in_step(2):  # of this start: step 4
        KV.main(longer)
    assert steps_of(tmp_path) == [2, 4]
    KV.main(longer)
    assert torch.load(tmp_path / "final_model.pt", weights_only=True)["step"] == 4
    assert_same_weights(tmp_path / "checkpoint_step_4.pt", tmp_path / "final_model.pt")
    assert (metrics(tmp_path)[-1]["kind"], metrics(tmp_path)[-1]["step"]) == ("final", 4)


# -----------------------------------------------------------------------------
# What a run writes and shows


def test_the_log_has_the_documented_fields(whole_run):
    records = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records] == ["val"] + 4 * ["train"] + ["val"] + 4 * ["train"] + ["final"]
    common = {"kind", "step", "tokens", "loss", "perplexity"}
    evaluation = {"text_loss", "text_perplexity", "bits_per_byte", "padding_fraction"}
    for record in records:
        train = {"learning_rate", "grad_norm", "tokens_per_second"}
        assert record.keys() == common | (train if record["kind"] == "train" else evaluation)
        assert record["tokens"] == record["step"] * 256


def test_a_checkpoint_has_the_released_layout_and_loads(whole_run, data_dir):
    contents = torch.load(whole_run / "checkpoint_step_4.pt", weights_only=True)
    released = {"step", "epoch", "tokens_seen", "model_state_dict", "optimizer_state_dict", "model_config"}
    assert released | {"train_config"} <= contents.keys()
    assert (contents["step"], contents["tokens_seen"], type(contents["model_config"])) == (4, 1024, dict)
    assert contents["tokenizer"].keys() == {"name", "vocab_size", "sha256"}
    assert not any(name.startswith("module.") for name in contents["model_state_dict"])
    assert steps_of(whole_run) == [2, 4, 6, 8]
    assert_same_weights(whole_run / "final_model.pt", whole_run / "checkpoint_step_8.pt")
    logged, loader = metrics(whole_run)[-1], KV.get_dataloader(data_dir / "validation", 2, 32, "packed")
    model = KV.load_model(whole_run / "final_model.pt")
    assert KV.evaluate(model, loader)["loss"] == pytest.approx(logged["loss"], abs=1e-6)
    samples = (whole_run / "samples_step_8.txt").read_text(encoding="utf-8")
    assert samples.startswith("Document 0 says that 0 times 40 ")  # continues validation text


def test_a_terminal_shows_loss_speed_and_the_time_left(data, tmp_path):
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 120))
    args = arguments(data, tmp_path, "target_tokens=12800", "eval_interval=1000", "save_interval=1000")
    process = start(SCRIPT, *args, stdout=inside, stderr=inside)
    os.close(inside)
    shown = ""
    with contextlib.suppress(OSError):  # which a terminal raises when its last writer is gone
        while read := os.read(terminal, 4096):
            shown += read.decode(errors="replace")
    assert process.wait(timeout=PATIENCE) == 0
    lines = re.findall(r"step \d+ of 50: train loss \d\.\d{4}, [\d,]+ tokens/s, \d\d:\d\d left", shown)
    assert len(lines) == 50
    assert re.search(r"\d+/50 \[\d\d:\d\d<\d\d:\d\d", shown)  # tqdm's: steps, time gone, time left


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 PCIe", 756e12), ("some other GPU", None)])
def test_mfu_is_the_share_of_the_peak_of_all_gpus(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(KV, "WORLD_SIZE", 8)
    config = KV.load_config(KV.TrainingConfig, ROOT / "configs/train_config_300M.yaml", {})
    model_config = KV.load_config(KV.ModelConfig, ROOT / "configs/model_config_300M.yaml", {})
    n_parameters, speed = 284_542_976, 10 * 2_359_296 / 20  # of Q–K=V; tokens a second
    flops = 6 * n_parameters + 12 * 20 * 1024 * 2048  # a token
    expected = {"mfu": pytest.approx(flops * speed / (8 * peak))} if peak else {}
    assert KV.mfu(n_parameters, model_config, config, torch.device("cuda"), speed) == expected
    assert KV.mfu(n_parameters, model_config, config, torch.device("cpu"), speed) == {}


# -----------------------------------------------------------------------------
# What ends a run in the middle


@pytest.mark.parametrize("evaluated", [1, 8])
def test_weights_that_are_not_numbers_are_not_saved(evaluated, data, tmp_path, capsys):
    settings = ["learning_rate=1e30", "min_lr=0", "warmup_steps=0", "lr_scheduler=constant", "save_interval=1"]
    line = failing_run(arguments(data, tmp_path, *settings, f"eval_interval={evaluated}"), capsys, KV)
    assert re.search("step [12]: .*learning_rate", line)
    for path in tmp_path.glob("*.pt"):
        assert all(tensor.isfinite().all() for tensor in weights(path).values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_an_update_beyond_the_norm_is_skipped_and_ten_in_a_row_end_the_run(data, tmp_path, capsys):
    line = failing_run(arguments(data, tmp_path, "skip_grad_norm=1e-6", "target_tokens=4096"), capsys, KV)
    assert "step 10: " in line
    last = torch.load(tmp_path / "checkpoint_step_8.pt", weights_only=True)
    assert last["step"] == 8 and not last["optimizer_state_dict"]["state"]
    assert_same_weights(tmp_path / "checkpoint_step_2.pt", tmp_path / "checkpoint_step_8.pt")


def test_too_little_memory_says_which_settings_need_less(data, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(KV.GPT_QKV_KEqualsV, "forward", fail)
    line = failing_run(arguments(data, tmp_path), capsys, KV)
    assert all(part in line for part in ("CUDA out of memory.", "micro_batch_size", "gradient_accumulation"))


def test_a_closed_pipe_does_not_end_a_run(data, whole_run, tmp_path):
    """As in `python transformer_KV_1_300_M.py | head -0`."""
    process = start(SCRIPT, *arguments(data, tmp_path, "dropout=0.1"))
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=PATIENCE) == 0, errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert_same_run(whole_run, tmp_path)


def test_a_full_disk_behind_the_output_does_not_end_a_run(data, whole_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    KV.main(arguments(data, tmp_path, "dropout=0.1"))
    assert_same_run(whole_run, tmp_path)
