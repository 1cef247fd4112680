"""Training through the command line: the order of data, resuming, stopping, and what ends a run."""

import contextlib
import errno
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY_MODEL, TINY_RUN, VARIANTS, prepare, script_of

import transformer_KV_1_300_M as KV

GOLDEN = Path(__file__).with_name("golden_losses.json")
TO_A_MOMENT = Path(__file__).with_name("to_a_moment.py")
ENDLESS = "target_tokens=1000000000000"  # a run that no signal can come too late for


def arguments(data, output_dir, *settings):
    configs = ["--model_config", str(ROOT / "configs/model_config_demo.yaml")]
    configs += [
        "--train_config",
        str(ROOT / "configs/train_config_demo.yaml"),
        "--output_dir",
        str(output_dir),
    ]
    return [*configs, *TINY_MODEL, *TINY_RUN, *data, *settings]


def metrics(output_dir):
    """The records of a run, without the one field that no two runs share."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def assert_same_run(left, right):
    """Bit-identical weights, at the end and in every checkpoint that both have, and the same log."""
    assert metrics(left) == metrics(right)
    for name in ["final_model.pt", *(path.name for path in left.glob("checkpoint_step_*.pt"))]:
        expected, found = weights(left / name), weights(right / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


def torchrun(processes, script, *args, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*command, str(ROOT / script), *args], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """The folder of an uninterrupted run with dropout."""
    output_dir = tmp_path_factory.mktemp("whole")
    KV.main(arguments(data, output_dir, "dropout=0.1"))
    return output_dir


def to_a_moment(moment, action, args, terminal=subprocess.PIPE, **options):
    """Start the script as its command line does, to be killed or held at a moment; see to_a_moment.py."""
    command = [
        sys.executable,
        str(TO_A_MOMENT),
        moment,
        str(action),
        str(ROOT / "transformer_KV_1_300_M.py"),
        *args,
    ]
    return subprocess.Popen(command, text=True, stdout=terminal, stderr=terminal, **options)


def wait_until_held(process, file):
    """Returns once the process has come to its moment."""
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(
    "moment",
    [
        "torch.optim:AdamW.step:4:after",  # between two checkpoints, beyond the last logged step
        "pathlib:Path.replace:checkpoint_step_4.pt:before",  # the second checkpoint has no name yet
        "pathlib:Path.replace:checkpoint_step_4.pt:after",  # just when the second checkpoint has its name
        "pathlib:Path.replace:final_model.pt:before",  # the final record is logged, the model has no name yet
        "pathlib:Path.replace:final_model.pt:after",  # final_model.pt is there, the last checkpoint is not
    ],
)
def test_a_killed_run_resumes_to_the_same_weights_and_log(moment, data, whole_run, tmp_path):
    killed = to_a_moment(moment, "kill", arguments(data, tmp_path, "dropout=0.1"))
    _, errors = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "checkpoint_step_8.pt").exists()
    KV.main(arguments(data, tmp_path, "dropout=0.1"))
    assert_same_run(whole_run, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "settings",
    [
        ("dropout=0.1",),
        # Documents of unequal length: a mean over micro-batch means would give other losses on two processes.
        ("dropout=0.0", "sequence=padded", "score_padding=false", "n_positions=128", "seq_length=128",
         "target_tokens=8192"),
    ],
    ids=["packed, with dropout", "padded, padding masked"],
)  # fmt: skip
def test_two_processes_follow_the_losses_of_one(settings, data, tmp_path):
    KV.main(arguments(data, tmp_path / "one", *settings))
    process = torchrun(2, "transformer_KV_1_300_M.py", *arguments(data, tmp_path / "two", *settings))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for left, right in zip(one, two, strict=True):
        assert left.pop("kind") == right.pop("kind")
        # The evaluation before the first step scores the same weights, half of the rows on each rank.
        assert left == pytest.approx(right, rel=1e-12 if left["step"] == 0 else 1e-5)
    assert output.count("step 8 of 8, final") == 1  # rank 0 alone speaks


@pytest.mark.slow
def test_compiled_ranks_follow_the_losses_of_eager_ones(data, tmp_path):
    """With a loss in several chunks of 2,048 positions."""
    large = (
        "vocab_size=40000",
        "n_embd=256",
        "micro_batch_size=80",
        "target_tokens=40960",
        "save_interval=100",
    )
    for compiled in ("true", "false"):
        args = arguments(data, tmp_path / compiled, *large, f"compile={compiled}", "dropout=0.0")
        process = torchrun(2, "transformer_KV_1_300_M.py", *args)
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
    for left, right in zip(metrics(tmp_path / "true"), metrics(tmp_path / "false"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


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
        assert losses[0] == pytest.approx(5.55, abs=0.1)  # the logarithm of 257 equally likely tokens
        assert losses[-1] < 0.75 * losses[0]


def signal_in_step(step, number, monkeypatch):
    """Let a signal reach this process in the middle of a step, once; a step has four backward passes."""
    backward, calls = torch.Tensor.backward, []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4 * step:
            signal.raise_signal(number)
        return backward(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", counted)


def test_a_resumed_run_goes_on_with_rows_it_has_not_seen(data, tmp_path, monkeypatch):
    read, original = [], KV.TokenDataset.__getitem__

    def recorded(dataset, index):
        if dataset.path.name == "train":
            read.append(index)
        return original(dataset, index)

    monkeypatch.setattr(KV.TokenDataset, "__getitem__", recorded)
    signal_in_step(2, signal.SIGTERM, monkeypatch)
    args = arguments(data, tmp_path / "stopped", "target_tokens=1024", "save_interval=1000")
    with pytest.raises(SystemExit):
        KV.main(args)
    assert len(read) == 16
    KV.main(args)
    assert len(set(read)) == len(read) == 32
    KV.main(arguments(data, tmp_path / "whole", "target_tokens=1024"))
    assert read[32:] == read[:32]


def test_a_second_start_of_a_complete_run_changes_nothing(data, whole_run, capsys):
    def state():
        return {path.name: path.stat().st_mtime_ns for path in whole_run.glob("*.pt")}

    before, log = state(), metrics(whole_run)
    KV.main(arguments(data, whole_run, "dropout=0.1"))
    assert (state(), metrics(whole_run)) == (before, log)
    assert "complete after 8 steps" in capsys.readouterr().out


def test_the_summary_tells_the_figures_of_the_run(data, whole_run, capsys):
    KV.main(arguments(data, whole_run, "dropout=0.1"))
    summary, log = capsys.readouterr().out, metrics(whole_run)
    evaluations = [record for record in log if record["kind"] != "train"]
    for record in (evaluations[0], evaluations[-1]):
        assert f"text perplexity  {record['text_perplexity']:.2f} at step {record['step']}" in summary
    assert str(whole_run) in summary
    # 2 layers, 32 positions, 32 numbers, 2 bytes; QKV keeps a second tensor of that size
    assert "4,096 bytes for 32 tokens in bf16; QKV takes 8,192" in summary
    assert re.search(r"peak memory +\d+\.\d\d GB of rank 0 on cpu", summary)
    assert "24,288 parameters, fp32 on cpu" in summary
    assert "8 steps of 2 rows x 4 accumulation steps x 1 ranks, 256 tokens" in summary


def test_the_log_has_the_documented_fields(whole_run):
    records = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records] == ["val"] + 4 * ["train"] + ["val"] + 4 * ["train"] + ["final"]
    common = {"kind", "step", "tokens", "loss", "perplexity"}
    evaluation = {"text_loss", "text_perplexity", "bits_per_byte", "padding_fraction"}
    for record in records:
        train = {"learning_rate", "grad_norm", "tokens_per_second"}
        assert record.keys() == common | (train if record["kind"] == "train" else evaluation)
        assert record["tokens"] == record["step"] * 256


def test_a_checkpoint_has_the_released_layout(whole_run):
    contents = torch.load(whole_run / "checkpoint_step_4.pt", weights_only=True)
    released = {"step", "epoch", "tokens_seen", "model_state_dict", "optimizer_state_dict", "model_config"}
    assert released | {"train_config"} <= contents.keys()
    assert (contents["step"], contents["tokens_seen"]) == (4, 1024)
    assert contents["model_config"]["n_layer"] == 2 and "n_kv_groups" not in contents["model_config"]
    assert sorted(path.name for path in whole_run.glob("checkpoint_step_*")) == [
        f"checkpoint_step_{step}.pt" for step in (2, 4, 6, 8)
    ]
    model = KV.load_model(whole_run / "final_model.pt")
    assert all(
        torch.equal(w, weights(whole_run / "checkpoint_step_8.pt")[n]) for n, w in model.state_dict().items()
    )


def test_a_terminal_shows_loss_speed_and_the_time_left(data, tmp_path):
    terminal, inside = pty.openpty()
    args = arguments(data, tmp_path, "target_tokens=12800", "eval_interval=1000", "save_interval=1000")
    termios.tcsetwinsize(inside, (24, 120))
    command = [sys.executable, str(ROOT / "transformer_KV_1_300_M.py"), *args]
    process = subprocess.Popen(command, stderr=inside, stdout=subprocess.DEVNULL)
    os.close(inside)
    shown = ""
    with contextlib.suppress(OSError):  # which a terminal raises when its last writer is gone
        while read := os.read(terminal, 4096):
            shown += read.decode(errors="replace")
    assert process.wait(timeout=120) == 0
    assert re.search(r"loss \d\.\d{4}, [\d,]+ tokens/s", shown)
    assert re.search(r"\d+/50 \[\d\d:\d\d<\d\d:\d\d", shown)  # tqdm's: steps, time gone, time left


def test_a_log_file_shows_the_time_left(data, tmp_path, capsys):
    KV.main(arguments(data, tmp_path))
    lines = [line for line in capsys.readouterr().out.splitlines() if ", train: " in line]
    assert len(lines) == 8
    assert all(
        re.fullmatch(r"step \d of 8, train: loss \d\.\d{4}, [\d,]+ tokens/s, \d\d:\d\d left", x) for x in lines
    )


def test_samples_continue_validation_text(data, whole_run):
    text = (whole_run / "samples_step_8.txt").read_text(encoding="utf-8")
    assert text.count("[...]") == 3 and text.startswith("Document 0 says that 0 times 40 ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_in_hand_and_the_next_start_goes_on(number, data, tmp_path):
    args = arguments(data, tmp_path, "save_interval=1000", ENDLESS)
    process = to_a_moment(
        "torch:Tensor.backward:9:before", tmp_path / "held", args
    )  # the third step: four a step
    wait_until_held(process, tmp_path / "held")
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert "stopped at step 3; start again to resume" in output
    assert [step for step, _ in KV.checkpoints(tmp_path)] == [3]
    assert metrics(tmp_path)[-1]["step"] == 3


def test_a_signal_to_torchrun_stops_all_ranks_with_a_checkpoint(data, tmp_path):
    args = arguments(data, tmp_path, "save_interval=1000", ENDLESS)
    held = ["torch:Tensor.backward:5:before", str(tmp_path / "held"), str(ROOT / "transformer_KV_1_300_M.py")]
    process = torchrun(2, TO_A_MOMENT, *held, *args)
    wait_until_held(process, tmp_path / "held")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("stopped at step 3; start again to resume") == 1
    assert [step for step, _ in KV.checkpoints(tmp_path)] == [3]
    KV.main(arguments(data, tmp_path, "target_tokens=1024", "--accept_changes"))
    assert metrics(tmp_path)[-1]["step"] == 4


def failing_run(args, capsys, script=KV):
    """The one line that a run ends with when it cannot go on."""
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


def poisoned(whole_run, tmp_path, step):
    """A folder with one checkpoint, whose final LayerNorm holds a NaN."""
    contents = torch.load(whole_run / f"checkpoint_step_{step}.pt", weights_only=True)
    contents["model_state_dict"]["ln_f.weight"][0] = torch.nan
    torch.save(contents, tmp_path / f"checkpoint_step_{step}.pt")


def test_a_loss_that_is_not_a_number_stops_before_a_checkpoint(data, whole_run, tmp_path, capsys):
    poisoned(whole_run, tmp_path, 4)
    error = failing_run(arguments(data, tmp_path, "dropout=0.1"), capsys)
    assert "step 4: the validation loss is nan" in error
    shutil.copy(whole_run / "metrics.jsonl", tmp_path)  # it is evaluated, so training goes on
    error = failing_run(arguments(data, tmp_path, "dropout=0.1"), capsys)
    assert "step 5: the loss is nan" in error
    assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint_step_4.pt"]


@pytest.mark.parametrize("evaluated", [1, 8])
def test_weights_that_are_not_numbers_are_not_saved(evaluated, data, tmp_path, capsys):
    settings = ["learning_rate=1e30", "min_lr=0", "warmup_steps=0", "lr_scheduler=constant", "save_interval=1"]
    error = failing_run(arguments(data, tmp_path, *settings, f"eval_interval={evaluated}"), capsys)
    assert "step 1: " in error or "step 2: " in error
    for path in tmp_path.glob("*.pt"):
        assert all(tensor.isfinite().all() for tensor in weights(path).values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_an_update_beyond_the_norm_is_skipped_and_counted(data, tmp_path, capsys):
    KV.main(arguments(data, tmp_path, "skip_grad_norm=1e-6"))
    assert capsys.readouterr().out.count("update skipped") == 8
    last = torch.load(tmp_path / "checkpoint_step_8.pt", weights_only=True)
    first = weights(tmp_path / "checkpoint_step_2.pt")
    assert last["step"] == 8 and not last["optimizer_state_dict"]["state"]
    assert all(torch.equal(first[name], tensor) for name, tensor in last["model_state_dict"].items())


def test_several_skipped_updates_in_a_row_stop_the_run(data, tmp_path, capsys):
    error = failing_run(arguments(data, tmp_path, "skip_grad_norm=1e-6", "target_tokens=4096"), capsys)
    assert "step 10: 10 updates skipped in a row" in error


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (
            "GPT_QKV_KEqualsV.forward",
            torch.OutOfMemoryError("CUDA out of memory."),
            ["Halve micro_batch_size"],
        ),
        ("Logger.__call__", OSError(errno.ENOSPC, "No space left on device"), ["No space left"]),
        (
            "GPT_QKV_KEqualsV.forward",
            dist.DistBackendError("NCCL error"),
            ["lost another process", "start again"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_ends_a_run_in_the_middle_is_one_line(
    function, error, words, data, tmp_path, capsys, monkeypatch
):
    def fail(*_):
        raise error

    owner, _, method = function.partition(".")
    monkeypatch.setattr(getattr(KV, owner), method, fail)
    line = failing_run(arguments(data, tmp_path), capsys)
    assert all(word in line for word in [*words, error.args[-1]])
    assert str(tmp_path) in line or not isinstance(error, OSError)


def test_a_path_with_gloo_in_its_name_is_no_lost_process(data, tmp_path, capsys):
    line = failing_run(arguments(data, tmp_path, f"train_data={tmp_path}/gloo"), capsys)
    assert f"{tmp_path}/gloo: no complete token files" in line and "lost" not in line


def test_an_error_of_the_program_keeps_its_traceback(data, tmp_path, monkeypatch):
    monkeypatch.setattr(KV, "get_lr", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        KV.main(arguments(data, tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_newest_checkpoint_is_passed_over_but_refused_by_name(
    damage, data, whole_run, tmp_path, capsys
):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint_step_{step}.pt").write_bytes(
            (whole_run / f"checkpoint_step_{step}.pt").read_bytes()
        )
    newest = tmp_path / "checkpoint_step_6.pt"
    content = {"truncated": newest.read_bytes()[:-1000], "empty": b"", "text": b"not a checkpoint\n"}
    newest.write_bytes(content[damage])
    error = failing_run(arguments(data, tmp_path, "dropout=0.1", "--resume", str(newest)), capsys)
    assert f"{newest}: not a whole checkpoint" in error
    KV.main(arguments(data, tmp_path, "dropout=0.1"))
    output = capsys.readouterr().out
    assert (
        f"skipping {newest}" in output
        and f"resuming from {tmp_path}/checkpoint_step_4.pt at step 4" in output
    )
    expected, found = weights(whole_run / "final_model.pt"), weights(tmp_path / "final_model.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_resume_never_moves_the_old_run_aside_as_a_whole(data, whole_run, tmp_path):
    output_dir, aside = tmp_path / "run", tmp_path / "run.old_1"
    output_dir.mkdir()
    (output_dir / "checkpoint_step_900.pt").write_bytes((whole_run / "checkpoint_step_8.pt").read_bytes())
    KV.main(arguments(data, output_dir, "dropout=0.1", "--resume", "never"))
    assert_same_run(whole_run, output_dir)
    assert [step for step, _ in KV.checkpoints(output_dir)] == [8, 6, 4, 2]
    assert [step for step, _ in KV.checkpoints(aside)] == [900]


def test_resuming_from_a_named_checkpoint_ends_like_the_whole_run(data, whole_run, tmp_path):
    named = whole_run / "checkpoint_step_4.pt"
    KV.main(arguments(data, tmp_path, "dropout=0.1", "--resume", str(named)))
    expected, found = weights(whole_run / "final_model.pt"), weights(tmp_path / "final_model.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_complete_checkpoint_named_for_another_folder_is_evaluated_there(data, whole_run, tmp_path, capsys):
    KV.main(arguments(data, tmp_path, "dropout=0.1", "--resume", str(whole_run / "checkpoint_step_8.pt")))
    assert metrics(tmp_path) == metrics(whole_run)[-1:]
    assert "complete after 8 steps" in capsys.readouterr().out


def test_resuming_on_other_data_or_another_shape_is_refused(data, whole_run, tmp_path, capsys):
    other = prepare(tmp_path / "other", [f"Quite another text, number {i}. " * 5 for i in range(40)])
    checkpoint = ["--resume", str(whole_run / "checkpoint_step_4.pt")]
    error = failing_run(arguments(other, tmp_path / "out", *checkpoint), capsys)
    assert "training text" in error and "validation text" in error
    error = failing_run(arguments(data, tmp_path / "out", *checkpoint, "n_inner=32"), capsys)
    assert "n_inner 64 -> 32" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train_data=nowhere"], ["nowhere", "dataset_download.py"]),
        (["seq_length=64", "target_tokens=4096"], ["seq_length", "64", "32"]),
        (["vocab_size=100"], ["vocab_size", "257", "100"]),
        (["--output_dir", "/dev/null/run"], ["/dev/null/run"]),
    ],
)
def test_what_cannot_work_is_said_before_any_work(settings, words, data, tmp_path, capsys):
    error = failing_run(arguments(data, tmp_path / "out", *settings), capsys)
    assert all(word in error for word in words)
    assert not (tmp_path / "out").exists()


def test_a_number_of_processes_that_cannot_share_the_batch_names_those_that_can(data):
    config = KV.load_config(KV.TrainingConfig, ROOT / "configs/train_config_300M.yaml", [])
    assert [KV.accumulation_for(config, n) for n in (1, 2, 6, 8, 64)] == [192, 96, 32, 24, 3]
    with pytest.raises(
        ValueError, match="5 ranks .* 192 .* use 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 192"
    ):
        KV.accumulation_for(config, 5)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_mfu_is_the_share_of_the_peak_of_all_gpus(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    config = KV.load_config(KV.TrainingConfig, ROOT / "configs/train_config_300M.yaml", [])
    model_config = KV.load_config(KV.ModelConfig, ROOT / "configs/model_config_300M.yaml", [])
    with torch.device("meta"):
        model = KV.GPT_QKV_KEqualsV(model_config)
    monkeypatch.setattr(KV, "WORLD_SIZE", 8)
    speed = 10 * 2_359_296 / 20
    flops = 6 * 284_542_976 + 12 * 20 * 1024 * 2048  # a token: 300M of Q–K=V
    result = KV.mfu(model, config, torch.device("cuda"), speed)
    assert result == {"mfu": pytest.approx(flops * speed / (8 * peak))}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "some other GPU")
    assert KV.mfu(model, config, torch.device("cuda"), speed) == {}
    assert KV.mfu(model, config, torch.device("cpu"), speed) == {}
