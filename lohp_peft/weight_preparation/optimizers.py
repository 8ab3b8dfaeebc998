"""The offline optimizers whose trajectories the policy learns from, with their defaults."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OfflineOptimizer:
    """An optimizer that records trajectories.

    Args:
        update: Name of the update rule in pytorch-optimizer.
        hyperparameters: Defaults for cores that start at zero in a weight space with orthonormal bases.
        provenance: Where the rule and the defaults come from.
        sharpness_aware: Whether the gradient is taken at an ascent step of radius `rho`, which costs a second
            forward and backward pass.
    """

    update: str
    hyperparameters: Mapping[str, Any]
    provenance: str
    sharpness_aware: bool = False

    @property
    def gradient_passes(self) -> int:
        """Forward and backward passes in one optimizer step."""
        return 2 if self.sharpness_aware else 1


# Learning rates are for cores in the bases of the tasks' first gradients (`gradient_space`); measured on six tasks of a
# sentence encoder at rank 16, 12 steps, loss on rows never trained on (the table is in benchmarks/NOTES.md). In the bases
# of the base weights the best rates were 10 to 30 times these.
OFFLINE_OPTIMIZERS: Mapping[str, OfflineOptimizer] = MappingProxyType(
    {
        "adamw": OfflineOptimizer(
            "adamw",
            {"lr": 0.005, "betas": (0.9, 0.999), "weight_decay": 0.0},
            "Rule and betas Known: 1711.05101. Learning rate Ours: best of 0.005, 0.01, 0.02 on six tasks. No decay, "
            "Ours: zero is no adapter.",
        ),
        "sgd": OfflineOptimizer(
            "sgd",
            {"lr": 0.1, "momentum": 0.9, "nesterov": True},
            "Momentum 0.9 Known: 1609.04747. Learning rate Ours: best of 0.1, 0.3, 0.8 on six tasks.",
        ),
        "sam": OfflineOptimizer(
            "adamw",
            {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.0, "rho": 0.05},
            "Sharpness-aware minimization: Lo-Hp (abstract). Rule and rho 0.05 Known: 2010.01412. Learning rate Ours: "
            "better of 0.01, 0.02 on six tasks. The rest as adamw.",
            sharpness_aware=True,
        ),
        "lion": OfflineOptimizer(
            "lion",
            {"lr": 0.005, "betas": (0.9, 0.99), "weight_decay": 0.0},
            "Rule and betas Known: 2302.06675. Learning rate Ours: best of 0.005, 0.01, 0.02 on six tasks.",
        ),
        "adan": OfflineOptimizer(
            "adan",
            {"lr": 0.005, "betas": (0.98, 0.92, 0.99), "weight_decay": 0.0},
            "Rule and betas Known: 2208.06677. Learning rate Ours: as adamw, not measured.",
        ),
    }
)


def hyperparameters(name: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Defaults of the optimizer `name` with `overrides` in their place.

    Raises:
        ValueError: On an unknown optimizer, or listing every hyper-parameter that it does not take.
    """
    if name not in OFFLINE_OPTIMIZERS:
        nearest = difflib.get_close_matches(name, OFFLINE_OPTIMIZERS, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"Unknown optimizer {name!r}; the offline optimizers are {sorted(OFFLINE_OPTIMIZERS)}.{hint}")
    offline = OFFLINE_OPTIMIZERS[name]
    accepted = set(inspect.signature(_update_rule(offline.update)).parameters) - {"params", "kwargs"}
    accepted |= {"rho"} if offline.sharpness_aware else set()
    unknown = sorted(set(overrides or {}) - accepted)
    if unknown:
        raise ValueError(f"Optimizer {name!r} takes {sorted(accepted)}, but got {unknown}.")
    return {**offline.hyperparameters, **(overrides or {})}


def build_optimizer(name: str, params: Iterable[Tensor], **hyper: Any) -> torch.optim.Optimizer:
    """Build one of `OFFLINE_OPTIMIZERS` from pytorch-optimizer.

    Args:
        name: Key of `OFFLINE_OPTIMIZERS`.
        params: Tensors to train.
        **hyper: Replacements for its default hyper-parameters.

    Returns:
        The optimizer; drive it with `take_step`, which knows that sharpness-aware ones need two gradients.

    Raises:
        ValueError: On an unknown optimizer or hyper-parameter.
    """
    values = hyperparameters(name, hyper)
    offline = OFFLINE_OPTIMIZERS[name]
    rule = _update_rule(offline.update)
    if not offline.sharpness_aware:
        return rule(list(params), **values)
    from pytorch_optimizer import SAM

    return SAM(list(params), rule, **values)


def take_step(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> Tensor:
    """One optimizer step on `loss_of()`, a loss that is the same function at every call within the step.

    Returns:
        The loss before the step, detached.
    """

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    loss = closure()
    if hasattr(optimizer, "first_step"):  # sharpness-aware: the closure is evaluated again at the ascent point
        optimizer.step(closure)
    else:
        optimizer.step()
    return loss.detach()


def _update_rule(name: str) -> Callable[..., torch.optim.Optimizer]:
    from pytorch_optimizer import load_optimizer  # slow to import

    return load_optimizer(name)
