"""Weight spaces: adapters as points in one coordinate system, exact in the weight update they stand for.

A LoRA (B, A) is not unique: (B M^-1, M A) is the same update. A space fixes the gauge. Its points are *states*,
tensors of shape (modules, width) with one row per target module, zero-padded to the widest module.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lohp_peft.adapters.layout import AdapterLayout, base_of
from lohp_peft.adapters.sketch import Adapter, RowSketch, unit_updates


@dataclass(frozen=True)
class EncodedAdapter:
    """A state and what was lost.

    Args:
        state: Shape (modules, width).
        energy_kept: Share of each module's squared Frobenius norm that the space holds; 1 for a zero update.
    """

    state: Tensor
    energy_kept: dict[str, float]


class WeightSpace(ABC):
    """Coordinates for adapters over a layout.

    Args:
        layout: Target modules.
        r: Rank of decoded adapters.

    Raises:
        ValueError: When the rank is not from 1 to the smallest side of a module, naming all that are too small.
    """

    kind: str

    def __init__(self, layout: AdapterLayout, r: int) -> None:
        if r < 1:
            raise ValueError(f"`r` must be at least 1, got {r}.")
        too_small = [f"{s.name} ({s.d_out}, {s.d_in})" for s in layout.modules if r > min(s.d_in, s.d_out)]
        if too_small:
            raise ValueError(f"`r`={r} exceeds the smaller side of: {', '.join(too_small)}.")
        self.layout, self.r = layout, r
        sizes = [rows * columns for rows, columns in map(self._core_shape, range(len(layout.modules)))]
        self.width = max(sizes)
        self.mask = torch.arange(self.width)[None] < torch.tensor(sizes)[:, None]
        self._index = {spec.name: i for i, spec in enumerate(layout.modules)}

    @property
    def shape(self) -> tuple[int, int]:
        """(modules, width) of a state."""
        return len(self.layout.modules), self.width

    @abstractmethod
    def _core_shape(self, index: int) -> tuple[int, int]:
        """Shape of a module's matrix of coordinates."""

    @abstractmethod
    def input_basis(self, index: int) -> Tensor:
        """The orthonormal input directions of a module, shape (d_in, r).

        Args:
            index: Place of the module in the layout.
        """

    @abstractmethod
    def output_basis(self, index: int) -> Tensor | None:
        """The orthonormal output directions of a module, shape (d_out, r), or `None` when all of the output is free.

        Args:
            index: Place of the module in the layout.
        """

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """The bases, for a safetensors file."""

    def _matrix(self, index: int, states: Tensor) -> Tensor:
        """A module's coordinates out of states (..., modules, width), as (..., rows, columns)."""
        rows, columns = self._core_shape(index)
        return states[..., index, : rows * columns].unflatten(-1, (rows, columns))

    def encode(self, adapter: Adapter) -> EncodedAdapter:
        """Project an adapter of any rank onto the space; modules it lacks are zero.

        Args:
            adapter: By module name `lora_A` (rank, d_in) and `lora_B` (d_out, rank), scaling 1.

        Returns:
            The state, float32 (float64 when the adapter is), and how much of each update it holds.

        Raises:
            ValueError: Listing every unknown module and every shape that differs.
        """
        wrong = []
        for name, (a, b) in adapter.items():
            if name not in self._index:
                wrong.append(f"{name}: not in the layout")
                continue
            spec = self.layout.modules[self._index[name]]
            if a.shape[-1] != spec.d_in or b.shape[0] != spec.d_out or a.shape[0] != b.shape[1]:
                wrong.append(
                    f"{name}: A {tuple(a.shape)}, B {tuple(b.shape)}, expected (r, {spec.d_in}), ({spec.d_out}, r)"
                )
        if wrong:
            raise ValueError(f"The adapter does not fit the weight space: {'; '.join(wrong)}.")
        double = any(x.dtype == torch.float64 for pair in adapter.values() for x in pair)
        dtype = torch.float64 if double else torch.float32
        device = next((a.device for a, _ in adapter.values()), None)
        state = torch.zeros(self.shape, dtype=dtype, device=device)
        kept = {}
        for name, (a, b) in adapter.items():
            i = self._index[name]
            a, b = a.detach().to(device, dtype), b.detach().to(device, dtype)
            u = self.output_basis(i)
            coordinates = (b if u is None else _dual(u.to(b)).T @ b) @ (a @ _dual(self.input_basis(i).to(a)))
            state[i, : coordinates.numel()] = coordinates.flatten()
            total = torch.trace((b.T @ b) @ (a @ a.T))
            kept[name] = float(coordinates.square().sum() / total) if total > 0 else 1.0
        return EncodedAdapter(state, kept)

    def decode(self, state: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The `lora_A` (r, d_in) and `lora_B` (d_out, r) of every module, with `B @ A` the exact update.

        The scaling is 1, so `lora_alpha == r`.

        Args:
            state: Shape (modules, width).

        Raises:
            ValueError: When the state's shape is not (modules, width).
        """
        if tuple(state.shape) != self.shape:
            raise ValueError(f"A state of this space has shape {self.shape}, got {tuple(state.shape)}.")
        adapter = {}
        for i, spec in enumerate(self.layout.modules):
            c, v, u = self._matrix(i, state), self.input_basis(i), self.output_basis(i)
            b = c.clone() if u is None else u.to(c) @ c
            adapter[spec.name] = (v.to(c).T.clone(memory_format=torch.contiguous_format), b.contiguous())
        return adapter

    def delta_weight(self, state: Tensor) -> dict[str, Tensor]:
        """The update of every module, shape (d_out, d_in).

        Args:
            state: Shape (modules, width).
        """
        return {name: b @ a for name, (a, b) in self.decode(state).items()}

    def apply(self, index: int, x: Tensor, states: Tensor, owner: Tensor | None = None) -> Tensor:
        """The update of module `index` applied to its inputs, differentiable in `states`.

        Args:
            index: Module.
            x: Inputs, shape (n, ..., d_in).
            states: Adapters, shape (s, modules, width).
            owner: Adapter of each input, shape (n,), or `None` when there is one adapter.

        Returns:
            Shape (n, ..., d_out).

        Raises:
            ValueError: When several adapters come without `owner`.
        """
        if owner is None and len(states) != 1:
            raise ValueError(
                f"`owner` must name the adapter of each text when there are several, got {len(states)} adapters."
            )
        c = self._matrix(index, states).to(x)
        z = x @ self.input_basis(index).to(x)
        if owner is None:
            z = z @ c[0].T
        else:
            z = (
                torch.bmm(z.flatten(1, -2), c[owner].transpose(1, 2)).unflatten(1, z.shape[1:-1])
                if z.dim() > 2
                else (torch.einsum("nk,nok->no", z, c[owner]))
            )
        u = self.output_basis(index)
        return z if u is None else z @ u.to(x).T

    @staticmethod
    def from_tensors(layout: AdapterLayout, kind: str, r: int, tensors: Mapping[str, Tensor]) -> "WeightSpace":
        """Rebuild a space from `to_tensors`.

        Args:
            layout: Layout of the modules.
            kind: `"core"` or `"lora_b"`.
            r: Rank.
            tensors: What `to_tensors` gave.

        Returns:
            The same space.

        Raises:
            ValueError: On an unknown kind, or bases that are missing or of the wrong shape, listing all.
        """
        spaces = {space.kind: space for space in (CoreSpace, LoraBSpace)}
        if kind not in spaces:
            raise ValueError(f"`kind` of a weight space must be one of {sorted(spaces)}, got {kind!r}.")
        sides = {"core": ("input", "output"), "lora_b": ("input",)}[kind]
        names = {side: [f"{side}.{i}" for i in range(len(layout.modules))] for side in sides}
        missing = [name for side in sides for name in names[side] if name not in tensors]
        if missing:
            raise ValueError(f"The bases do not fit the layout: {', '.join(missing)} are missing.")
        surplus = sorted(set(tensors) - {name for side in sides for name in names[side]})
        wrong = [f"{name} is {x.dtype}" for name, x in sorted(tensors.items()) if x.dtype != torch.float32]
        if surplus or wrong:
            problems = [*wrong, *(f"{name} belongs to no module" for name in surplus)]
            raise ValueError(f"The bases must be one float32 matrix a module and side: {'; '.join(problems)}.")
        return spaces[kind](layout, r, *([tensors[name] for name in names[side]] for side in sides))


def _dual(basis: Tensor) -> Tensor:
    """`Q (Q^T Q)^-1`: Q itself but for the rounding of its float32 columns, so that projecting is exact in float64."""
    return torch.linalg.solve(basis.T @ basis, basis.T).T


def _check_bases(layout: AdapterLayout, r: int, sides: dict[str, list[Tensor]]) -> None:
    """Raise unless every module has a basis of r orthonormal columns on each side."""
    wrong = []
    for side, bases in sides.items():
        if len(bases) != len(layout.modules):
            raise ValueError(f"A weight space needs {len(layout.modules)} bases on side {side}, got {len(bases)}.")
        for spec, basis in zip(layout.modules, bases, strict=True):
            expected = (getattr(spec, side), r)
            if tuple(basis.shape) != expected:
                wrong.append(f"{spec.name} {side}: shape {tuple(basis.shape)}, expected {expected}")
            elif not torch.allclose(basis.T @ basis, torch.eye(r, device=basis.device), atol=1e-3):
                wrong.append(f"{spec.name} {side}: columns are not orthonormal")
    if wrong:
        raise ValueError(f"The bases do not fit the layout: {'; '.join(wrong)}.")


class CoreSpace(WeightSpace):
    """`ΔW = U C V^T` per module with fixed orthonormal U (d_out, r), V (d_in, r); the state holds the cores C (r, r).

    (Ours: r² numbers per module whatever the model's width, and |C|_F = |ΔW|_F.)
    """

    kind = "core"

    def __init__(self, layout: AdapterLayout, r: int, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        super().__init__(layout, r)
        self._inputs, self._outputs = [x.float() for x in inputs], [x.float() for x in outputs]
        _check_bases(layout, r, {"d_in": self._inputs, "d_out": self._outputs})

    def _core_shape(self, index: int) -> tuple[int, int]:
        return self.r, self.r

    def input_basis(self, index: int) -> Tensor:
        """See `WeightSpace`."""
        return self._inputs[index]

    def output_basis(self, index: int) -> Tensor:
        """See `WeightSpace`."""
        return self._outputs[index]

    def to_tensors(self) -> dict[str, Tensor]:
        """See `WeightSpace`."""
        tensors = {f"input.{i}": v.contiguous() for i, v in enumerate(self._inputs)}
        return tensors | {f"output.{i}": u.contiguous() for i, u in enumerate(self._outputs)}

    @classmethod
    def from_base_weights(cls, model: nn.Module, layout: AdapterLayout, r: int) -> "CoreSpace":
        """The space of bases from the leading singular vectors of the base weights (Known: 2404.02948, PiSSA's subspace).

        Args:
            model: The base model.
            layout: Target modules.
            r: Rank, at most the smaller side of every module.
        """
        layout.check_fits(model)
        inputs, outputs = [], []
        for spec in layout.modules:
            module = base_of(model).get_submodule(spec.name)
            module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            weight = dequantize_module_weight(module).detach().to("cpu", torch.float32)
            if isinstance(module, Conv1D):
                weight = weight.T
            u, _, vh = torch.linalg.svd(weight, full_matrices=False)
            inputs.append(vh[:r].T.contiguous())
            outputs.append(u[:, :r].contiguous())
        return cls(layout, r, inputs, outputs)

    @classmethod
    def from_trajectories(cls, layout: AdapterLayout, r: int, adapters: Iterable[Adapter]) -> "CoreSpace":
        """The space of bases from recorded updates: leading directions of the sums of ΔW^T ΔW and ΔW ΔW^T, a joint SVD.

        Each adapter counts by its energy share, so that long runs do not drown short ones (Ours).

        Args:
            layout: Target modules.
            r: Rank.
            adapters: By module name `lora_A` (rank, d_in) and `lora_B` (d_out, rank), of any rank; read once.

        Raises:
            ValueError: When there is no adapter, or a module has no update in any.
        """
        sketches = {s.name: (RowSketch(s.d_in), RowSketch(s.d_out)) for s in layout.modules}
        for name, a, b in unit_updates(adapters):
            if name in sketches:
                right, left = sketches[name]
                right.add(torch.linalg.qr(b)[1] @ a)
                left.add(torch.linalg.qr(a.T)[1] @ b.T)
        empty = [s.name for s in layout.modules if not len(sketches[s.name][0].rows)]
        if empty:
            raise ValueError(f"No recorded update to take bases from for: {', '.join(empty)}.")
        bases = [[sketch.leading(r) for sketch in sketches[s.name]] for s in layout.modules]
        return cls(layout, r, [v for v, _ in bases], [u for _, u in bases])


class LoraBSpace(WeightSpace):
    """`A` frozen, shared, with orthonormal rows; the state is `B` (d_out, r), no gauge freedom, |B|_F = |ΔW|_F."""

    kind = "lora_b"

    def __init__(self, layout: AdapterLayout, r: int, inputs: list[Tensor]) -> None:
        super().__init__(layout, r)
        self._inputs = [x.float() for x in inputs]
        _check_bases(layout, r, {"d_in": self._inputs})

    def _core_shape(self, index: int) -> tuple[int, int]:
        return self.layout.modules[index].d_out, self.r

    def input_basis(self, index: int) -> Tensor:
        """See `WeightSpace`."""
        return self._inputs[index]

    def output_basis(self, index: int) -> None:
        """See `WeightSpace`."""
        return None

    def to_tensors(self) -> dict[str, Tensor]:
        """See `WeightSpace`."""
        return {f"input.{i}": v.contiguous() for i, v in enumerate(self._inputs)}

    @classmethod
    def seeded(cls, layout: AdapterLayout, r: int, seed: int = 0) -> "LoraBSpace":
        """The space of random orthonormal rows of A, the same for everybody with the same seed.

        Args:
            layout: Target modules.
            r: Rank.
            seed: Seed of the rows.
        """
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn(s.d_in, r, generator=generator, dtype=torch.float64) for s in layout.modules]
        return cls(layout, r, [torch.linalg.qr(draw)[0].float().contiguous() for draw in draws])

    @classmethod
    def from_trajectories(cls, layout: AdapterLayout, r: int, adapters: Iterable[Adapter]) -> "LoraBSpace":
        """The space along the leading input directions of recorded updates: exact where they share an A of rank `r`.

        Each adapter counts by its energy share, as in `CoreSpace.from_trajectories`; a module without an update gets
        random rows.

        Args:
            layout: Target modules.
            r: Rank.
            adapters: See `CoreSpace.from_trajectories`.
        """
        sketches = {s.name: RowSketch(s.d_in) for s in layout.modules}
        for name, a, b in unit_updates(adapters):
            if name in sketches:
                sketches[name].add(torch.linalg.qr(b)[1] @ a)
        return cls(layout, r, [sketches[s.name].leading(r) for s in layout.modules])
