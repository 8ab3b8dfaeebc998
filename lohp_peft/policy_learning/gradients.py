"""Gradients of several losses, each with a norm of its own, over all processes."""

import os
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from lohp_peft.policy_learning.processes import Processes
from lohp_peft.policy_learning.sharding import is_sharded, local

PRECISIONS = ("no", "bf16")


def precision_of(asked: str, accelerator: Accelerator | None) -> str:
    """The mixed precision of a run: bf16 where its settings, the accelerator that was given or else a launcher say so.

    An accelerator that is made takes that of the last one in the process, so it is not asked.

    Args:
        asked: That of the settings.
        accelerator: The one that was given.

    Raises:
        ValueError: Under fp16 and fp8, whose gradients have to be scaled: `accumulate` takes and clips them as they are.
    """
    said = (
        os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if accelerator is None
        else accelerator.mixed_precision
    )
    if said not in PRECISIONS:
        raise ValueError(
            f"The mixed precision of policy learning must be one of {list(PRECISIONS)}, got an accelerator of "
            f"{said!r}, whose gradients would have to be scaled. Launch it with `--mixed_precision bf16`, or `no`."
        )
    return "bf16" if "bf16" in (asked, said) else "no"


def accumulate(
    losses: Mapping[str, tuple[Tensor, float]],
    parameters: Sequence[Parameter],
    max_grad_norm: float,
    processes: Processes,
    training_step: int,
) -> dict[str, float]:
    """Set the parameters' gradients to the weighted sum of the losses', each first clipped on its own to `max_grad_norm`.

    (Ours: residuals of SubTB are squares of nats and come in any size; clipped together they drowned the others.)

    Args:
        losses: By name, a loss and its weight.
        parameters: What is trained.
        max_grad_norm: Norm above which a gradient is clipped.
        processes: Those whose gradients are summed.
        training_step: For the message.

    Returns:
        By name the losses and, with `_grad_norm`, their gradients' norms.

    Raises:
        RuntimeError: When a loss or a gradient is not finite.
    """
    total = torch.zeros_like(torch.cat([local(p.detach()).flatten() for p in parameters]))
    scalars: dict[str, float] = {}
    for name, (loss, weight) in losses.items():
        gradient, norm = _gradient(loss, parameters, processes)
        if not (loss.isfinite() and norm.isfinite()):
            raise RuntimeError(
                f"Policy learning diverged at training step {training_step}: {name} is {loss.item()}, its gradient norm "
                f"{norm.item()}. Lower `learning_rate`, `kl_target` (which raises the temperature) or the loss's weight."
            )
        scale = weight * min(1.0, max_grad_norm / (norm.item() + 1e-12))
        total.add_(gradient, alpha=scale)
        scalars |= {name: loss.item(), f"{name}_grad_norm": norm.item()}
    for parameter, part in zip(parameters, total.split([local(p).numel() for p in parameters]), strict=True):
        parameter.grad = torch.empty_like(parameter)
        local(parameter.grad).copy_(part.view_as(local(parameter)))
    return scalars


def _gradient(loss: Tensor, parameters: Sequence[Parameter], processes: Processes) -> tuple[Tensor, Tensor]:
    """The gradient over all processes in one vector, and its norm; of sharded parameters this process's part of it.

    FSDP sums gradients itself, but only into `grad`: `torch.autograd.grad` does not know the parts.
    """
    if not is_sharded(parameters[0]):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        gradient = processes.sum(torch.cat([g.flatten() for g in gradients]))
        return gradient, gradient.norm()
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    parts = [local(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
    gradient = torch.cat([part.flatten() for part in parts])
    return gradient, processes.sum(gradient.square().sum()).sqrt()
