"""Run a script to a moment and kill it there, or hold it there until a signal comes.

    python to_a_moment.py MODULE:FUNCTION:WHICH:WHEN kill SCRIPT ...
    python to_a_moment.py MODULE:FUNCTION:WHICH:WHEN FILE SCRIPT ...

The moment is before or after (WHEN) one call of a function of a library: the n-th, or the first whose first
argument has a text in it (WHICH). A process that is held makes FILE, and goes on once a signal has reached
it; of several ranks, rank 0 alone is held.
"""

import importlib
import os
import runpy
import signal
import sys
from pathlib import Path

moment, action, *sys.argv = sys.argv[1:]
module, function, which, when = moment.split(":")
owner = importlib.import_module(module)
*path, name = function.split(".")
for part in path:
    owner = getattr(owner, part)
original = getattr(owner, name)
matching = 0

# Python writes a byte to this pipe for each signal that has a handler
arrived, wakes = os.pipe()
os.set_blocking(wakes, False)
signal.set_wakeup_fd(wakes)


def act():
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("RANK", "0") == "0":
        Path(action).touch()
        os.read(arrived, 1)


def watched(*args, **kwargs):
    global matching
    matches = which.isdigit() or which in str(args[0])
    matching += matches
    here = matches and matching == (int(which) if which.isdigit() else 1)
    if here and when == "before":
        act()
    result = original(*args, **kwargs)
    if here and when == "after":
        act()
    return result


setattr(owner, name, watched)
runpy.run_path(sys.argv[0], run_name="__main__")
