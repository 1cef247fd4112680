"""Ranks without torchrun, which import torch together: a third of the time of a test.

    python forked_ranks.py '[[FOLDER, [SCRIPT, ARGUMENT, ...]], ...]'

Forks a rank for each entry, with a folder and arguments of its own, as on nodes that differ. A rank that fails
does not end the others; they have to end by themselves. The exit status is 1 if any has failed.
"""

import json
import os
import runpy
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch._dynamo  # noqa: F401, as torch.optim does

import transformer_KV_1_300_M  # noqa: F401, for what it imports

commands = json.loads(sys.argv[1])
with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(commands))}
for rank, (folder, command) in enumerate(commands):
    if os.fork() == 0:
        os.environ.update(place, RANK=str(rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.chdir(folder)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        sys.exit()
statuses = [os.wait()[1] for _ in commands]
sys.exit(any(statuses))
