"""What can go wrong in days of training: kills, full disks, damaged files, lost processes, ports in use.

Every failure has to end all ranks soon, with one readable line, and to leave a folder from which the next
start ends like a run that nothing happened to.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, prepare
from test_training import ENDLESS, TO_A_MOMENT, arguments, assert_same_run, metrics, torchrun

import transformer_KV_1_300_M as KV

SCRIPT = "transformer_KV_1_300_M.py"
LONG = ("target_tokens=25600", "save_interval=5", "eval_interval=20", "dropout=0.1")  # 100 steps
PATIENCE = 120  # seconds to an end, the start of the processes on a busy machine included


def newest(output_dir):
    """The step of the newest checkpoint; 0 where there is none yet."""
    return max((step for step, _ in KV.checkpoints(output_dir)), default=0)


def one_process(*args, **options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / SCRIPT), *args], text=True, stderr=-1, stdout=-1, **options
    )


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ranks_by_hand(*arguments_of_ranks, port=None, folders=None):
    """Two ranks or more without torchrun, each with arguments of its own, as on nodes that differ."""
    port, count = port or free_port(), len(arguments_of_ranks)
    folders = folders or [None] * count
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    return [
        one_process(
            *args, cwd=folder, env=os.environ | common | {"RANK": str(rank), "MASTER_PORT": str(port)}
        )
        for rank, (args, folder) in enumerate(zip(arguments_of_ranks, folders, strict=True))
    ]


def children(process):
    """{process id: environment} of the processes that one has started."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"PPid:\t{process.pid}\n" in status.read_text():
                found[int(status.parent.name)] = (status.parent / "environ").read_bytes().split(b"\0")
    return found


def rank_of_torchrun(process, rank):
    """The process id of a rank, once it runs."""
    while process.poll() is None:
        for pid, environment in children(process).items():
            if f"RANK={rank}".encode() in environment:
                return pid
        time.sleep(0.02)
    raise AssertionError(f"torchrun has ended: {process.communicate()}")


def errors_of(*processes):
    """The lines with which the script says why it ends, of all processes; none may wait for another."""
    deadline, lines = time.monotonic() + PATIENCE, []
    for process in processes:
        try:
            _, stderr = process.communicate(timeout=max(1, deadline - time.monotonic()))
        finally:
            process.kill()
        assert process.returncode != 0
        assert f'{SCRIPT}", line' not in stderr, stderr  # no traceback through the script
        lines += [line for line in stderr.splitlines() if f"{SCRIPT}: error: " in line]
    return lines


def wait_for_step(process, output_dir, step):
    """Returns when the log has reached a step, or the process its end."""
    while process.poll() is None:
        log = KV.read_metrics(output_dir / "metrics.jsonl")
        if log and log[-1]["step"] >= step:
            return
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """The folder of a run of 100 steps that nothing happened to."""
    output_dir = tmp_path_factory.mktemp("whole")
    KV.main(arguments(data, output_dir, *LONG))
    return output_dir


LONGER = (*LONG, "target_tokens=128000")  # 500 steps
HELD_BELOW = 24  # steps that one start gets at most: the run of 500 cannot end before its twentieth kill


def held_command(tmp_path, output_dir, data):
    """Arguments of a start that takes fewer than HELD_BELOW steps and then waits."""
    held = [f"torch.optim:AdamW.step:{HELD_BELOW}:before", str(tmp_path / "held"), str(ROOT / SCRIPT)]
    return [str(TO_A_MOMENT), *held, *arguments(data, output_dir, *LONGER)]


def killed_again_and_again(start, victim, output_dir, times):
    """Start the run and kill it some steps on, at a random moment, so often; the last steps logged."""
    moments, seed = [], int.from_bytes(os.urandom(4), "little")
    chance = random.Random(seed)
    print(f"seed {seed}")  # shown where the test fails
    for _ in range(times):
        done = newest(output_dir)
        process = start()
        wait_for_step(process, output_dir, done + chance.randint(1, 9))
        time.sleep(chance.uniform(0, 0.05))
        os.kill(victim(process), signal.SIGKILL)
        errors_of(process)
        moments.append(KV.read_metrics(output_dir / "metrics.jsonl")[-1]["step"])
    return moments


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_at_random_moments_leave_no_trace(data, tmp_path):
    command = [sys.executable, *held_command(tmp_path, tmp_path / "killed", data)]

    def start():
        return subprocess.Popen(command, text=True, stderr=-1, stdout=-1)

    moments = killed_again_and_again(start, lambda process: process.pid, tmp_path / "killed", 20)
    assert len(set(moments)) > 5
    assert not (tmp_path / "killed/final_model.pt").exists()
    KV.main(arguments(data, tmp_path / "killed", *LONGER))
    KV.main(arguments(data, tmp_path / "whole", *LONGER))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_of_one_rank_of_two_leave_no_trace(data, tmp_path):
    command = held_command(tmp_path, tmp_path / "killed", data)
    chance = random.Random(0)

    def victim(process):
        return rank_of_torchrun(process, chance.randint(0, 1))

    killed_again_and_again(lambda: torchrun(2, *command), victim, tmp_path / "killed", 20)
    assert not (tmp_path / "killed/final_model.pt").exists()
    for folder in ("killed", "whole"):
        run = torchrun(2, SCRIPT, *arguments(data, tmp_path / folder, *LONGER))
        _, stderr = run.communicate(timeout=600)
        assert run.returncode == 0, stderr
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_and_the_next_start_goes_on(rank, data, tmp_path, capsys):
    process = torchrun(2, SCRIPT, *arguments(data, tmp_path, *LONG, ENDLESS))
    wait_for_step(process, tmp_path, 12)
    os.kill(rank_of_torchrun(process, rank), signal.SIGKILL)
    lines = errors_of(process)
    assert len(lines) == (rank == 1)  # rank 0 cannot say that it was killed itself; torchrun does
    assert all("start again to resume" in line for line in lines)
    saved = newest(tmp_path)
    KV.main(arguments(data, tmp_path, *LONG, f"target_tokens={256 * (saved + 3)}", "--accept_changes"))
    assert f"resuming from {tmp_path}/checkpoint_step_{saved}.pt" in capsys.readouterr().out
    assert newest(tmp_path) == saved + 3


def test_three_ranks_resume_bit_for_bit(data, tmp_path):
    """With two, a sum has one order. With more it may depend on where a gradient lies in a buffer."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = ["gradient_accumulation=3", "num_gpus=1", "target_tokens=1536", "save_interval=4", "n_embd=128"]
    for folder in (whole, resumed):
        process = torchrun(3, SCRIPT, *arguments(data, folder, *settings))
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        if folder == whole:
            resumed.mkdir()
            for name in ("checkpoint_step_4.pt", "run.yaml", "metrics.jsonl"):
                shutil.copy(whole / name, resumed)
    assert newest(whole) == 8
    assert_same_run(whole, resumed)


def test_a_run_goes_on_with_another_number_of_processes(data, tmp_path):
    """Four, then two, and all in one: the same batches and dropout, so the same losses but for rounding."""
    settings = *LONG, "lr_scheduler=constant", "log_interval=1"
    for count, tokens in ((4, 2560), (2, 5120)):
        longer = [f"target_tokens={tokens}", "--accept_changes"]
        process = torchrun(count, SCRIPT, *arguments(data, tmp_path / "several", *settings, *longer))
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    KV.main(arguments(data, tmp_path / "one", *settings, "target_tokens=5120"))
    several, one = (KV.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("several", "one"))
    several = [
        record for record in several if (record["kind"], record["step"]) != ("final", 10)
    ]  # of the first part
    for left, right in zip(several, one, strict=True):
        assert (left["kind"], left["step"]) == (right["kind"], right["step"])
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, 2 * [int(sys.argv.pop(1))])
from torch.distributed.run import main
main()
"""


def test_a_full_disk_is_named_with_its_file_and_leaves_the_checkpoints_before_it(data, tmp_path, capsys):
    """A limit on the size of a file lets the log through, and stops a checkpoint in the middle."""
    KV.main(arguments(data, tmp_path, *LONG, "target_tokens=2560"))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
    size = (tmp_path / "checkpoint_step_10.pt").stat().st_size
    launch = [
        sys.executable,
        "-c",
        LIMITED,
        str(size // 2),
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / SCRIPT),
    ]
    launch += arguments(data, tmp_path, *LONG, "--accept_changes")
    process = subprocess.Popen(launch, text=True, stderr=-1, stdout=-1)
    (line,) = errors_of(process)
    assert f"{tmp_path}/checkpoint_step_15.pt: " in line and "full" in line
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pt*")} == before
    capsys.readouterr()
    KV.main(arguments(data, tmp_path, *LONG, "target_tokens=3840", "--accept_changes"))
    assert f"resuming from {tmp_path}/checkpoint_step_10.pt" in capsys.readouterr().out
    assert newest(tmp_path) == 15


def test_what_one_node_lacks_is_said_by_rank_0_and_ends_both(data, tmp_path):
    good = arguments(data, tmp_path / "out")
    for bad, words in [
        (arguments(data, tmp_path / "out", "train_data=/nowhere"), "/nowhere: no complete token files"),
        ([*good, "--train_config", "/nowhere.yaml"], "/nowhere.yaml: expected"),
    ]:
        first, second = ranks_by_hand(good, bad)
        (line,) = errors_of(first)
        assert words in line, line
        assert errors_of(second) == []


def test_what_differs_between_the_nodes_ends_both(data_dir, data, whole_run, tmp_path):
    """The same relative paths lead to other files on the second node: another text, other weights."""
    here, there = tmp_path / "here", tmp_path / "there"
    prepare(there, [f"Another text, number {i}, for the second node. " * 9 for i in range(60)])
    shutil.copytree(data_dir, here / "data")
    paths = ["train_data=data/train", "val_data=data/validation"]
    args = other = arguments(paths, tmp_path / "out")
    for what in ("settings and data", "weights.pt", "settings and data"):
        first, second = ranks_by_hand(args, other, folders=(here, there))
        (line,) = errors_of(first)
        assert f"{what}: rank [1] differs" in line
        assert errors_of(second) == []
        assert not (tmp_path / "out").exists()
        shutil.rmtree(there / "data")
        shutil.copytree(data_dir, there / "data")  # now the same text
        shutil.copy(whole_run / "final_model.pt", here / "weights.pt")
        shutil.copy(whole_run / "checkpoint_step_80.pt", there / "weights.pt")
        args = other = arguments(paths, tmp_path / "out", *LONG, "--init_from", "weights.pt")
        if what == "weights.pt":  # now the same, but for a setting that may change from start to start
            shutil.copy(here / "weights.pt", there / "weights.pt")
            other = [*args, "eval_interval=1"]


def test_a_run_is_moved_aside_only_when_all_ranks_can_start(data, whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    good = arguments(data, folder, *LONG, "--resume", "never")
    first, second = ranks_by_hand(good, [*good, "train_data=/nowhere"])
    (line,) = errors_of(first)
    assert "/nowhere" in line and errors_of(second) == []
    assert (folder / "final_model.pt").exists() and not list(tmp_path.glob("run.old*"))


def test_an_output_folder_that_the_nodes_do_not_share_is_noticed(data, whole_run, tmp_path):
    """A relative path leads each of two nodes to a disk of its own; only the first holds the checkpoint."""
    args = arguments(data, whole_run.name, *LONG)
    first, second = ranks_by_hand(args, args, folders=(whole_run.parent, tmp_path))
    (line,) = errors_of(first)
    assert f"{whole_run.name}/checkpoint_step_100.pt" in line and "No such file" in line
    assert errors_of(second) == []


def test_a_missing_chunk_is_named(data, tmp_path):
    settings = prepare(
        tmp_path, [f"Text number {i} of some that fill two chunks and more. " * 9 for i in range(60)]
    )
    chunk = sorted((tmp_path / "data/train").glob("*.tokens.npy"))[1]
    chunk.unlink()
    (line,) = errors_of(torchrun(2, SCRIPT, *arguments(settings, tmp_path / "out")))
    assert chunk.name in line and "dataset_download.py" in line
    assert not (tmp_path / "out").exists()


def test_a_rank_that_alone_reads_a_damaged_row_tells_of_it(tmp_path):
    """One token of one document, so that one of two ranks draws it, and rank 0 need not be that one."""
    settings = prepare(tmp_path, [f"Text number {i} of some that fill a chunk or more. " * 9 for i in range(60)])
    chunk = min((tmp_path / "data/train").glob("*.tokens.npy"))
    tokens = np.load(chunk, mmap_mode="r+")
    tokens[3] = 60_000
    tokens.flush()
    lines = errors_of(torchrun(2, SCRIPT, *arguments(settings, tmp_path / "out", *LONG, "sequence=padded")))
    assert any(f"{chunk}: a token beyond the vocabulary" in line for line in lines)


def test_a_loss_that_is_not_a_number_ends_two_ranks_with_one_line(data, whole_run, tmp_path):
    contents = torch.load(whole_run / "checkpoint_step_5.pt", weights_only=True)
    contents["model_state_dict"]["ln_f.weight"][0] = torch.nan
    torch.save(contents, tmp_path / "checkpoint_step_5.pt")
    (line,) = errors_of(torchrun(2, SCRIPT, *arguments(data, tmp_path, *LONG)))
    assert "step 6: the loss is nan" in line
    assert [path.name for path in tmp_path.glob("*.pt*")] == ["checkpoint_step_5.pt"]


def test_an_output_folder_that_cannot_be_written_ends_two_ranks_with_one_line(data):
    (line,) = errors_of(torchrun(2, SCRIPT, *arguments(data, "/proc/run")))  # not even root may write there
    assert "/proc/run" in line


def test_a_port_in_use_is_named(data, tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        process, *_ = ranks_by_hand(arguments(data, tmp_path / "out"), port=port)
        (line,) = errors_of(process)
    assert f"127.0.0.1:{port}" in line and "in use" in line
    assert not (tmp_path / "out").exists()


def agents(count, args):
    """One torchrun a node, all on this machine, as the README starts them."""
    place = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    options = [f"--nnodes={count}", "--nproc_per_node=1", *place]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / SCRIPT), *args]
    return [subprocess.Popen(command, text=True, stderr=-1, stdout=-1) for _ in range(count)]


def test_two_nodes_train_like_one_process(data, tmp_path):
    nodes = agents(2, arguments(data, tmp_path / "two", "dropout=0.1"))
    for node in nodes:
        _, stderr = node.communicate(timeout=120)
        assert node.returncode == 0, stderr
    KV.main(arguments(data, tmp_path / "one", "dropout=0.1"))
    for left, right in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)


def test_a_process_killed_on_one_node_ends_the_other(data, tmp_path):
    nodes = agents(2, arguments(data, tmp_path, *LONG, ENDLESS))
    wait_for_step(nodes[0], tmp_path, 7)
    (victim,) = (
        pid for node in nodes for pid, environment in children(node).items() if b"RANK=1" in environment
    )
    os.kill(victim, signal.SIGKILL)
    lines = errors_of(*nodes)
    assert len(lines) == 1 and "start again to resume" in lines[0]
