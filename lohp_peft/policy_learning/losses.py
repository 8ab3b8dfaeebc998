"""The training losses of stage 2, each a function of the policy and a batch."""

import torch
from torch import Tensor

from lohp_peft.objectives import Segments, behaviour_cloning_loss, forward_looking_log_flow, gaussian_log_ratio
from lohp_peft.policy import LoHpPolicy
from lohp_peft.tasks import TaskFeatures


def repeat_features(features: TaskFeatures, times: int) -> TaskFeatures:
    """Every support set's features `times` times in a row."""
    parts = (features.set, features.labels, features.modules)
    return TaskFeatures(*(x.repeat_interleave(times, 0) for x in parts))


def teacher_forced_means(
    policy: LoHpPolicy, states: Tensor, features: TaskFeatures, optimizers: Tensor | None
) -> Tensor:
    """Means of the next states at given states: (batch, time + 1, ...) to (batch, time, modules, width)."""
    batch, time = states.shape[0], states.shape[1] - 1
    current = states[:, :-1].flatten(0, 1)
    previous = torch.cat([states[:, :1], states[:, :-2]], 1).flatten(0, 1)
    step = torch.arange(time, device=states.device).repeat(batch)
    optimizer = None if optimizers is None else optimizers.repeat_interleave(time)
    means = policy.forward_policy(current, step, repeat_features(features, time), previous, optimizer)
    return means.unflatten(0, (batch, time))


def step_sigmas(policy: LoHpPolicy, time: int) -> Tensor:
    """Standard deviations of the first `time` steps, shape (time, modules, 1)."""
    return policy.sigma(torch.arange(time, device=policy.scale.device))


def cloning_loss(
    policy: LoHpPolicy, states: Tensor, features: TaskFeatures, optimizers: Tensor, generator: torch.Generator
) -> Tensor:
    """Behaviour cloning of recorded steps from noisy states (noise on inputs, not on targets; Ours: notes 9.3)."""
    sigma = step_sigmas(policy, states.shape[1] - 1)
    noise = torch.randn(states.shape, generator=generator) * torch.cat([torch.zeros_like(sigma[:1]), sigma])
    noisy = states + noise * policy.state_mask
    means = teacher_forced_means(policy, noisy, features, optimizers)
    return behaviour_cloning_loss(means, states[:, 1:], sigma, policy.state_mask)


def segments(
    policy: LoHpPolicy,
    reference: LoHpPolicy,
    states: Tensor,
    losses: Tensor,
    features: TaskFeatures,
    optimizers: Tensor | None,
    temperature: float,
    tasks: Tensor | None = None,
) -> Segments:
    """Relative sub-trajectories: log-ratio to the frozen clone, forward-looking log flow.

    Args:
        policy: The policy being trained.
        reference: Its frozen behaviour clone, in the place of the backward policy.
        states: Shape (batch, time + 1, modules, width), detached here.
        losses: Relative losses of all states, shape (batch, time + 1).
        features: Batched features.
        optimizers: Optimizer indices, shape (batch,), or `None`.
        temperature: Loss per nat.
        tasks: Index of the task of each segment, for diagnostics.
    """
    states = states.detach()
    batch, time = states.shape[0], states.shape[1] - 1
    training = policy.training
    policy.eval()  # dropout would set the policy apart from its clone and fill the residuals with noise
    means = teacher_forced_means(policy, states, features, optimizers)
    with torch.no_grad():
        clone = teacher_forced_means(reference, states, features, optimizers)
    ratio = gaussian_log_ratio(states[:, 1:], means, clone, step_sigmas(policy, time), policy.state_mask)
    step = torch.arange(time + 1, device=states.device).repeat(batch)
    optimizer = None if optimizers is None else optimizers.repeat_interleave(time + 1)
    flow = policy.log_flow(states.flatten(0, 1), step, repeat_features(features, time + 1), optimizer)
    policy.train(training)
    flow = forward_looking_log_flow(flow.unflatten(0, (batch, time + 1)), losses, temperature)
    return Segments(log_pf=ratio, log_flow=flow, tasks=tasks, states=states)
