"""Many updates in little memory: what the bases of a weight space are taken from."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

Adapter = Mapping[str, tuple[Tensor, Tensor]]
"""By module name: `lora_A` (r, d_in) and `lora_B` (d_out, r), scaling folded in, so that the update is `B @ A`."""


def unit_updates(adapters: Iterable[Adapter]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, A and B, float64, of every update that is not zero; each adapter scaled to the energy 1.

    With B = Q R, ΔW^T ΔW = (R A)^T (R A), and the same transposed.
    """
    for adapter in adapters:
        pairs = {name: (a.detach().cpu().double(), b.detach().cpu().double()) for name, (a, b) in adapter.items()}
        energies = {name: float(torch.trace((b.T @ b) @ (a @ a.T))) for name, (a, b) in pairs.items()}
        scale = max(sum(energies.values()), 1e-30) ** -0.5
        yield from ((name, a, b * scale) for name, (a, b) in pairs.items() if energies[name] > 0)


class RowSketch:
    """Rows whose Gram matrix is a sum of Gram matrices, kept exactly in at most a few times their width.

    (Ours: a d x d Gram matrix per module and side would need gigabytes for a large model.)

    Args:
        width: Their length.
    """

    def __init__(self, width: int) -> None:
        self.rows = torch.zeros(0, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows, shape (n, width)."""
        self.rows = torch.cat([self.rows, rows])
        if len(self.rows) > 2 * self.rows.shape[1]:
            self.rows = torch.linalg.qr(self.rows)[1]

    def leading(self, r: int) -> Tensor:
        """Leading right singular vectors, shape (width, r), completed to r orthonormal columns if there are fewer."""
        vectors = torch.linalg.svd(self.rows, full_matrices=False)[2][:r].T
        if vectors.shape[1] < r:
            generator = torch.Generator().manual_seed(0)
            free = torch.randn(len(vectors), r - vectors.shape[1], generator=generator, dtype=vectors.dtype)
            vectors = torch.cat([vectors, free], 1)
        return torch.linalg.qr(vectors)[0].float().contiguous()
