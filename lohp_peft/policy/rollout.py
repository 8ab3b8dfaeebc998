"""Rolling the policy out: from no adapter, or from a recorded prefix, to a final adapter."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lohp_peft.policy.modeling import LoHpPolicy
from lohp_peft.tasks.features import TaskFeatures

Measure = Callable[[Tensor, int], TaskFeatures]


def rollout(
    policy: LoHpPolicy,
    features: TaskFeatures,
    *,
    prefix: Tensor | None = None,
    optimizer: Tensor | None = None,
    noise: float = 0.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    measure: Measure | None = None,
    policy_steps: int | None = None,
) -> Tensor:
    """The states of a rollout, shape (batch, steps + 1, modules, width); differentiable in the policy when noise-free.

    Args:
        policy: The policy.
        features: Batched task features (batch first).
        prefix: Recorded states to continue from, shape (batch, p, modules, width), kept bit for bit; `None` starts at
            the zero state.
        optimizer: Optimizer indices, shape (batch,), see `LoHpPolicy.forward_policy`.
        noise: Standard deviation in units of the policy's sigma; 0 takes mean steps, 1 samples the policy.
        generator: Source of the noise; a list of one for each row of the batch makes rows independent of their company.
        measure: Closed loop: called with the states (batch, modules, width) and the step, returns the features
            measured at the current adapters. `None` is open loop.
        policy_steps: Stop after this many steps in all; `None` for the policy's own number.

    Raises:
        ValueError: When `policy_steps` is not in 1..K, or the prefix is longer than that.
    """
    total = policy.config.policy_steps if policy_steps is None else policy_steps
    if not 1 <= total <= policy.config.policy_steps:
        raise ValueError(f"`policy_steps` must be in 1..{policy.config.policy_steps} (the policy's own), got {total}.")
    batch = len(features.set)
    if prefix is None:
        prefix = policy.scale.new_zeros(batch, 1, *policy.config.state_shape)
    if not 1 <= prefix.shape[1] <= total + 1:
        raise ValueError(f"`prefix` must hold 1..{total + 1} states, got {prefix.shape[1]}.")
    states = list(prefix.unbind(1))
    for k in range(prefix.shape[1] - 1, total):
        step = torch.full((batch,), k, dtype=torch.long, device=states[-1].device)
        if measure is not None and k > 0:
            features = measure(states[-1], k)
        previous = states[-2] if len(states) > 1 else None
        following = policy.forward_policy(states[-1], step, features, previous, optimizer)
        if noise > 0:
            following = following + noise * policy.sigma(step) * _normal(following, generator) * policy.state_mask
        states.append(following)
    return torch.stack(states, 1)


def _normal(like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Standard normal noise of the shape of `like`, drawn where the generator lives, so that devices agree."""
    if generator is None:
        return torch.randn_like(like)
    if isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like)
    rows = [torch.randn(like.shape[1:], generator=g, device=g.device, dtype=like.dtype) for g in generator]
    return torch.stack(rows).to(like)
