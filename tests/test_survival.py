"""What can go wrong in days of training: it ends all ranks soon, and the next start ends like a run that nothing
happened to."""

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import (
    ENDLESS,
    PATIENCE,
    SCRIPT,
    arguments,
    assert_same_run,
    assert_same_weights,
    completed,
    failing_run,
    metrics,
    start,
    start_ranks,
    steps_of,
    to_a_moment,
)

import transformer_KV_1_300_M as KV


def rank_of_torchrun(process, rank):
    """The process id of a rank, once it runs."""
    while process.poll() is None:
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                of_torchrun = f"PPid:\t{process.pid}\n" in status.read_text()
                if of_torchrun and f"\0RANK={rank}\0" in (status.parent / "environ").read_text():
                    return int(status.parent.name)
        time.sleep(0.02)
    raise AssertionError(f"torchrun has ended: {process.communicate()}")


def errors_of(process):
    """The lines with which the script says why it ends, on all ranks; none may wait for another."""
    try:
        _, stderr = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode != 0
    return [line for line in stderr.splitlines() if f"{SCRIPT.name}: error: " in line]


def wait_for_step(process, output_dir, step):
    """Returns when the log has reached a step, or the process its end."""
    while process.poll() is None:
        log = KV.read_metrics(output_dir / "metrics.jsonl")
        if log and log[-1]["step"] >= step:
            return
        time.sleep(0.01)


# -----------------------------------------------------------------------------
# Kills

LONGER = ("target_tokens=128000", "save_interval=5", "eval_interval=20", "dropout=0.1")  # 500 steps
HELD_BELOW = 24  # steps that one start gets at most: the run of 500 cannot end before its twentieth kill


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [None, 2])
def test_twenty_kills_at_random_moments_leave_no_trace(ranks, data, tmp_path):
    """Of the process, or of one rank of two."""
    killed, moments, seed = tmp_path / "killed", set(), int.from_bytes(os.urandom(4), "little")
    chance = random.Random(seed)
    print(f"seed {seed}")  # shown where the test fails
    held = f"torch.optim:AdamW.step:{HELD_BELOW}:before"
    for _ in range(20):
        done, held_file = max(steps_of(killed), default=0), tmp_path / "held"
        process = start(*to_a_moment(held, held_file, arguments(data, killed, *LONGER)), ranks=ranks)
        wait_for_step(process, killed, done + chance.randint(1, 9))
        time.sleep(chance.uniform(0, 0.05))
        victim = rank_of_torchrun(process, chance.randint(0, 1)) if ranks else process.pid
        os.kill(victim, signal.SIGKILL)
        errors_of(process)
        moments.add(KV.read_metrics(killed / "metrics.jsonl")[-1]["step"])
    assert len(moments) > 5
    assert not (killed / "final_model.pt").exists()
    for folder in (killed, tmp_path / "whole"):
        completed(start(SCRIPT, *arguments(data, folder, *LONGER), ranks=ranks))
    assert_same_run(tmp_path / "whole", killed)


def test_a_killed_rank_ends_the_other_and_the_next_start_goes_on(data, tmp_path):
    process = start(SCRIPT, *arguments(data, tmp_path, ENDLESS), ranks=2)
    wait_for_step(process, tmp_path, 5)
    os.kill(rank_of_torchrun(process, 1), signal.SIGKILL)
    errors_of(process)
    saved = max(steps_of(tmp_path))
    KV.main(arguments(data, tmp_path, f"target_tokens={256 * (saved + 1)}", "--accept_changes"))
    assert [record["step"] for record in metrics(tmp_path)][-2:] == [saved + 1, saved + 1]


# -----------------------------------------------------------------------------
# Ranks


def test_three_ranks_killed_and_resumed_end_in_the_same_bits(data, tmp_path):
    """Of more than two, a sum depends on where a gradient lies in DDP's buckets, which are laid out anew after
    the first backward pass. Control: without the pass that the script throws away, 27 of the 32 final tensors
    differ, by up to 1.7e-6, and the final loss by 3e-10."""
    settings = ["gradient_accumulation=3", "num_gpus=1", "target_tokens=1536", "save_interval=4", "n_embd=128"]
    for folder, moment in (("killed", "torch.optim:AdamW.step:7:before"), ("whole", None), ("killed", None)):
        args = arguments(data, tmp_path / folder, *settings)
        if moment:
            errors_of(start_ranks(*3 * [to_a_moment(moment, "kill", args)]))
            assert steps_of(tmp_path / folder) == [4]
        else:
            completed(start_ranks(*3 * [[SCRIPT, *args]]))
    assert steps_of(tmp_path / "whole") == [4, 8]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_two_processes_follow_the_losses_of_one_which_goes_on_where_they_end(data, tmp_path):
    """Documents of unequal length, unmasked alone: a mean over the means of micro batches would differ."""
    settings = ["sequence=padded", "score_padding=false", "n_positions=128", "seq_length=128", "dropout=0.1"]
    args = [*settings, "target_tokens=8192"]
    KV.main(arguments(data, tmp_path / "one", *args))
    output = completed(start_ranks(*2 * [[SCRIPT, *arguments(data, tmp_path / "two", *args)]]))
    assert output.count("step 8 of 8: final") == 1  # rank 0 alone speaks
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("final_model.pt", "checkpoint_step_8.pt", "checkpoint_step_6.pt"):
        (tmp_path / "two" / name).unlink()
    KV.main(arguments(data, tmp_path / "two", *args))
    for several in (two, metrics(tmp_path / "two")):
        for left, right in zip(one, several, strict=True):
            assert left["kind"] == right["kind"]
            # the evaluation before the first step scores the same weights, half of the rows on each rank
            tolerance = 1e-12 if left["step"] == 0 else 1e-5
            numbers = [{k: v for k, v in record.items() if k != "kind"} for record in (left, right)]
            assert numbers[0] == pytest.approx(numbers[1], rel=tolerance)


@pytest.mark.slow
def test_compiled_ranks_follow_the_losses_of_eager_ones(data, tmp_path):
    """With a loss in several chunks of 2,048 positions."""
    large = ["vocab_size=40000", "n_embd=256", "micro_batch_size=80", "target_tokens=40960", "dropout=0"]
    for compiled in ("true", "false"):
        args = arguments(data, tmp_path / compiled, *large, "save_interval=100", f"compile={compiled}")
        _, errors = (process := start(SCRIPT, *args, ranks=2)).communicate(timeout=280)
        assert process.returncode == 0, errors
    for left, right in zip(metrics(tmp_path / "true"), metrics(tmp_path / "false"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


def test_what_one_node_lacks_ends_both_in_one_line(data, tmp_path):
    good = arguments(data, tmp_path / "out")
    bad = arguments(data, tmp_path / "out", "train_data=/nowhere")
    (line,) = errors_of(start_ranks([SCRIPT, *good], [SCRIPT, *bad]))
    assert "/nowhere" in line
    assert not list(tmp_path.glob("out/*.*[!k]"))


def test_nodes_that_see_other_files_below_the_same_paths_end_in_one_line(data, half, tmp_path):
    """A disk on each, where only the first has the checkpoints."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(half, here / "out")
    there.mkdir()
    args = arguments(data, "out", "dropout=0.1")
    (line,) = errors_of(start_ranks([SCRIPT, *args], [SCRIPT, *args], folders=(here, there)))
    assert "ranks" in line
    assert steps_of(here / "out") == [2, 4] and not list(there.glob("out/*.pt"))


# -----------------------------------------------------------------------------
# Disks and files

LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, 2 * [int(sys.argv.pop(1))])
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_is_named_with_its_file_and_leaves_the_checkpoints_before_it(data, whole_run, half):
    """A limit on the size of a file lets the log through, and stops a checkpoint in the middle."""
    before = {path.name: path.read_bytes() for path in half.glob("*.pt")}
    size = len(before["checkpoint_step_4.pt"]) // 2
    (line,) = errors_of(start("-c", LIMITED, size, SCRIPT, *arguments(data, half, "dropout=0.1")))
    assert f"{half}/checkpoint_step_6.pt: " in line and "full" in line
    assert {path.name: path.read_bytes() for path in half.glob("*.pt*")} == before
    KV.main(arguments(data, half, "dropout=0.1"))
    assert_same_run(whole_run, half)


def flip_a_byte(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


DAMAGE = {
    "flipped": flip_a_byte,
    "truncated": lambda content: content[:-1000],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over(damage, data, whole_run, half, capsys):
    path = half / "checkpoint_step_4.pt"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    KV.main(arguments(data, half, "dropout=0.1"))
    output = capsys.readouterr().out
    assert str(path) in output and f"from {half}/checkpoint_step_2.pt" in output
    assert_same_run(whole_run, half)


def test_a_folder_whose_checkpoints_are_all_damaged_is_left_alone(data, half, capsys):
    for path in KV.checkpoints(half):
        path.write_bytes(flip_a_byte(path.read_bytes()))
    before = {path.name: path.read_bytes() for path in half.iterdir()}
    assert str(half) in failing_run(arguments(data, half, "dropout=0.1"), capsys, KV)
    assert {path.name: path.read_bytes() for path in half.iterdir()} == before


def test_a_log_that_a_kill_cut_short_or_that_is_gone_does_not_keep_a_run_from_going_on(data, whole_run, half):
    with open(half / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "tra')
    KV.main(arguments(data, half, "dropout=0.1"))
    assert_same_run(whole_run, half)
    (half / "final_model.pt").unlink()
    (half / "metrics.jsonl").unlink()
    KV.main(arguments(data, half, "dropout=0.1"))
    assert metrics(half) == metrics(whole_run)[-1:]
    assert_same_weights(half / "final_model.pt", whole_run / "final_model.pt")


def test_a_checkpoint_may_be_a_link_and_the_files_of_others_are_left_alone(data, whole_run, half, tmp_path):
    (half / "checkpoint_step_4.pt").rename(tmp_path / "stored.pt")
    (half / "checkpoint_step_4.pt").symlink_to(tmp_path / "stored.pt")
    (half / "thesis.tmp").write_text("mine")
    KV.main(arguments(data, half, "dropout=0.1"))
    assert_same_run(whole_run, half)
    assert (half / "thesis.tmp").read_text() == "mine"
