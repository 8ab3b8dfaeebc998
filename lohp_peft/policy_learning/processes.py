"""A global batch shared by processes: which items are whose, and what comes of all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes of a run, each with its share of every global batch.

    A process computes its own items and gathers the values of all, so that every loss and every scalar is that of the
    global batch, in every process. Gradients flow through the own items only; their sum over processes is the gradient
    of the global batch (Ours: exact whatever the number of processes, and when a batch cannot be shared evenly).

    Args:
        accelerator: What joins them; `None` is one process.
    """

    accelerator: Accelerator | None = None

    @property
    def count(self) -> int:
        """Number of processes."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def mine(self, size: int) -> list[int]:
        """Items of this process in a global batch of `size`, as many in each process.

        Where `size` is no multiple of the number of processes, some do an item again, which `gather` leaves out.
        """
        index = 0 if self.accelerator is None else self.accelerator.process_index
        rounds = -(-size // self.count)
        return [i % size for i in range(index, rounds * self.count, self.count)]

    def gather(self, values: Tensor, size: int) -> Tensor:
        """Values of all items in order, shape (size, ...), from those of the items `mine(size)`.

        Gradients flow to `values`, not to those of other processes.
        """
        if self.accelerator is None or self.count == 1:
            return values
        parts = self.accelerator.gather(values.detach().contiguous()).unflatten(0, (self.count, len(values)))
        index = self.accelerator.process_index
        parts = [values if i == index else part for i, part in enumerate(parts.unbind(0))]
        return torch.stack(parts, 1).flatten(0, 1)[:size]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, the same bits in each of them."""
        if self.accelerator is None or self.count == 1:
            return values
        return self.accelerator.reduce(values, reduction="sum")

    def agree(self, number: float, what: str) -> None:
        """Make sure that `number` is the same in every process.

        Raises:
            RuntimeError: When it differs, with the numbers by process.
        """
        if self.accelerator is not None and self.count > 1:
            mine = torch.tensor([number], dtype=torch.float64, device=self.accelerator.device)
            found = self.accelerator.gather(mine).tolist()
            if len(set(found)) > 1:
                raise RuntimeError(f"{what} must be the same in every process, got {found} by process.")


@contextmanager
def only_writer(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold a folder for the processes of one run; a killed run holds it no longer.

    Args:
        folder: It must exist; the lock is its file `.lock`.
        accelerator: What joins the processes.

    Raises:
        RuntimeError: In all of them, when another run holds it.
    """
    lock, held = FileLock(folder / ".lock"), [True]
    if accelerator.is_main_process:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            held = [False]
    broadcast_object_list(held)
    if not held[0]:
        raise RuntimeError(
            f"One run may write to a folder, but another one is writing to {folder}. Wait until it has ended, or choose another folder."
        )
    try:
        yield
    finally:
        lock.release()
