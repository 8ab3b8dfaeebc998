"""Bases of the weight space from what the training tasks ask of the base weights, before anything is recorded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import Adapter, CoreSpace, WeightSpace
from lohp_peft.tasks.encoder import TextEncoder
from lohp_peft.tasks.requirements import check_gradients
from lohp_peft.tasks.task import Task
from lohp_peft.trajectories import TrajectoryDataset
from lohp_peft.trajectories.manifest import MANIFEST_NAME
from lohp_peft.weight_preparation.config import WeightPreparationConfig
from lohp_peft.weight_preparation.plan import check_same_space, select_all_rows
from lohp_peft.weight_preparation.process import process_of
from lohp_peft.weight_preparation.rows import keyed_generator
from lohp_peft.weight_preparation.scoring import query_loss

KEPT_RANK = 32
"""Rank kept of one gradient, which has at most that of its tokens (Ours: 91 to 99 % of its energy in MiniLM)."""


def gradient_space(
    tasks: Sequence[Task],
    encoder: TextEncoder,
    r: int,
    config: WeightPreparationConfig | None = None,
    *,
    minibatches: int = 2,
    output_dir: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> CoreSpace:
    """The core space of rank `r` along the leading directions of the tasks' first gradients.

    (Known: 2407.05000 and 2411.19557, the first step of full fine-tuning as a LoRA's subspace; over many tasks at once,
    Ours: a direction that no training task asked for cannot be overfitted to. At rank 16 AdamW on 16 shots of validation
    tasks went from 8 points better than in the bases of the base weights, on sentiment, to 6 worse, on aspect
    sentiment; recorded runs of 68 training tasks ended at 0.65 instead of 0.75 nats.)

    Args:
        tasks: Training tasks.
        encoder: Encoder of the base model, in any weight space over the target modules.
        r: Rank.
        config: Minibatches are drawn as preparation will draw them.
        minibatches: Gradients per task.
        output_dir: Where the trajectories will go; if some are there already, their bases are taken.
        accelerator: See `prepare_trajectories`; every process gets the bases of the first.

    Raises:
        ValueError: When `output_dir` holds trajectories of another layout, kind of space or rank, naming both sides; when
            the base model passes no gradients.
    """
    process = process_of(encoder, accelerator)
    check_gradients(encoder.base_model)
    layout = encoder.space.layout
    shared: list[dict[str, Tensor] | None] = [None]
    if process.is_main_process:
        if output_dir is not None and (Path(output_dir) / MANIFEST_NAME).exists():
            space = _recorded_space(Path(output_dir), layout, r)
        else:
            gradients = first_gradients(tasks, encoder, config, minibatches=minibatches)
            space = CoreSpace.from_trajectories(layout, r, gradients)
        shared = [space.to_tensors()]
    broadcast_object_list(shared)
    return cast(CoreSpace, WeightSpace.from_tensors(layout, CoreSpace.kind, r, shared[0] or {}))


def _recorded_space(folder: Path, layout: AdapterLayout, r: int) -> CoreSpace:
    dataset = TrajectoryDataset.open(folder, on_damage="skip")
    check_same_space(dataset, CoreSpace.kind, r, layout)
    return cast(CoreSpace, dataset.space)


def first_gradients(
    tasks: Sequence[Task], encoder: TextEncoder, config: WeightPreparationConfig | None = None, *, minibatches: int = 2
) -> Iterator[Adapter]:
    """The gradient of each minibatch's loss with respect to the base weights, as an adapter of rank `KEPT_RANK`.

    Args:
        tasks: Training tasks.
        encoder: Encoder of the base model.
        config: How minibatches are drawn, see `prepare_trajectories`.
        minibatches: Gradients per task.
    """
    config = config or WeightPreparationConfig()
    names = [spec.name for spec in encoder.space.layout.modules]
    for name, rows in select_all_rows(tasks, config).items():
        encoded = encoder.prepare(rows.examples.texts, rows.examples.texts_b)
        generator = keyed_generator(name, "gradients")
        for _ in range(minibatches):
            state = torch.zeros(tuple(encoder.space.shape), device=encoder.device, requires_grad=True)
            with _weight_gradients(encoder) as gradients:
                loss = query_loss(encoder, encoded, rows.sample(config, generator), state, config.head)
                torch.autograd.grad(loss, state)  # passes every target module's output on its way
            yield {module: _low_rank(gradient) for module, gradient in zip(names, gradients, strict=True)}


@contextmanager
def _weight_gradients(encoder: TextEncoder) -> Iterator[list[Tensor]]:
    """Gradients with respect to the target weights, (d_out, d_in), of whatever is sent backwards inside.

    From the modules' inputs and the gradients of their outputs, so that weights may be frozen, transposed or quantised.
    """
    specs = encoder.space.layout.modules
    gradients = [torch.zeros(spec.d_out, spec.d_in, device=encoder.device) for spec in specs]

    def hook_for(total: Tensor):
        def hook(_module, args, output):
            x = args[0].detach().flatten(0, -2).float()

            def keep(gradient: Tensor) -> None:
                total.addmm_(gradient.flatten(0, -2).float().T, x)

            output.register_hook(keep)

        return hook

    modules = [encoder.base_model.get_submodule(spec.name) for spec in specs]
    handles = []
    try:
        handles = [module.register_forward_hook(hook_for(g)) for module, g in zip(modules, gradients, strict=True)]
        yield gradients
    finally:
        for handle in handles:
            handle.remove()


def _low_rank(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """`lora_A` and `lora_B` of the best approximation of rank `KEPT_RANK`."""
    q = min(KEPT_RANK, *gradient.shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(gradient, q=q)
    return (s[:, None] * v.T).contiguous(), u.contiguous()
