"""Work in forked children of the warm test process: imports are paid once, and a child can be killed."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

import torch

FORK = multiprocessing.get_context("fork") if os.name == "posix" else None
LIMIT_S = 600
"""A child that takes longer hangs; it has hundreds of times what it needs."""
WRITERS = ("files.py", "dataset.py", "checkpoint.py", "modeling.py", "train.py")
"""Modules that write; half of the kills come while one of them runs."""


def in_child(work: Callable[[], object]):
    """Run `work` in a child: its exit code (minus the signal) and what it sent: its result, or its exception."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)  # threads do not survive a fork
        try:
            answer = work()
        except Exception as error:  # it is the parent that judges
            answer = error
        sender.send(answer)

    child = FORK.Process(target=run)
    child.start()
    sender.close()
    heard = []
    if receiver.poll(LIMIT_S):
        try:
            heard.append(receiver.recv())
        except EOFError:  # it was killed
            pass
    else:
        child.kill()
    child.join()
    receiver.close()
    return child.exitcode, heard[0] if heard else None


class Moments:
    """Counts the calls and returns of a process, all of them and those while a writer runs, and may end it at one.

    Args:
        kill: `(kind, number)`: the process dies at the `number`-th moment of kind `"any"` or `"writing"`; `None` never.
    """

    def __init__(self, kill: tuple[str, int] | None = None) -> None:
        self.counts, self.kill, self.depth = {"any": 0, "writing": 0}, kill, 0

    def __enter__(self) -> "Moments":
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_) -> None:
        sys.setprofile(None)

    def _see(self, frame, event, _argument) -> None:
        path = frame.f_code.co_filename
        writing = "lohp_peft" in path and path.endswith(WRITERS)
        for kind in ("any", "writing") if writing else ("any",):
            self.counts[kind] += 1
            if self.kill == (kind, self.counts[kind]):
                os.kill(os.getpid(), signal.SIGKILL)
