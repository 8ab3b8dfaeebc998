"""The training losses of stage 2, each a function of the policy and a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lohp_peft.objectives import (
    BackwardReference,
    Segments,
    behaviour_cloning_loss,
    forward_looking_log_flow,
    gaussian_log_prob,
    gaussian_log_ratio,
)
from lohp_peft.policy import LoHpPolicy, rollout
from lohp_peft.policy_learning.processes import Processes
from lohp_peft.tasks import TaskFeatures


def repeat_features(features: TaskFeatures, times: int) -> TaskFeatures:
    """Every support set's features `times` times in a row."""
    return features.map(lambda part: part.repeat_interleave(times, 0))


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
    policy: LoHpPolicy,
    states: Tensor,
    features: TaskFeatures,
    optimizers: Tensor,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Behaviour cloning of recorded steps from noisy states (noise on inputs, not on targets; Ours: notes 9.3).

    Returns:
        One loss for each recording, shape (batch,), in nats per entry; noise is drawn from a generator for each.
    """
    sigma = step_sigmas(policy, states.shape[1] - 1)
    noise = torch.stack([torch.randn(states.shape[1:], generator=g) for g in generators]).to(states)
    noise = noise * torch.cat([torch.zeros_like(sigma[:1]), sigma])
    noisy = states + noise * policy.state_mask
    means = teacher_forced_means(policy, noisy, features, optimizers)
    return behaviour_cloning_loss(means, states[:, 1:], sigma, policy.state_mask, reduction="none").mean(1)


def segments(
    policy: LoHpPolicy,
    reference: LoHpPolicy | BackwardReference,
    states: Tensor,
    losses: Tensor,
    features: TaskFeatures,
    optimizers: Tensor | None,
    temperature: float,
    tasks: Tensor | None = None,
    processes: Processes | None = None,
) -> Segments:
    """Sub-trajectories with their log-probabilities against the reference and their forward-looking log flow.

    Args:
        policy: The policy being trained.
        reference: What stands in the place of the backward policy: a frozen clone of the policy (relative form), or a
            backward policy fitted on the recordings.
        states: Shape (batch, time + 1, modules, width), detached here.
        losses: Relative losses of all states, shape (batch, time + 1).
        features: Batched features, of this process's segments.
        optimizers: Optimizer indices of this process's segments, or `None`.
        temperature: Loss per nat.
        tasks: Index of the task of each segment, for diagnostics.
        processes: Those that share the segments; every one of them gets all.
    """
    processes, size, every = processes or Processes(), len(states), states.detach()
    states = every[processes.mine(size)]
    batch, time = states.shape[0], states.shape[1] - 1
    training = policy.training
    policy.eval()  # dropout would set the policy apart from its clone and fill the residuals with noise
    log_pf, log_ref = log_probabilities(policy, reference, states, features, optimizers)
    step = torch.arange(time + 1, device=states.device).repeat(batch)
    optimizer = None if optimizers is None else optimizers.repeat_interleave(time + 1)
    flow = policy.log_flow(states.flatten(0, 1), step, repeat_features(features, time + 1), optimizer)
    policy.train(training)
    log_pf, flow = processes.gather(log_pf, size), processes.gather(flow.unflatten(0, (batch, time + 1)), size)
    log_ref = None if log_ref is None else processes.gather(log_ref, size)
    flow = forward_looking_log_flow(flow, losses, temperature)
    return Segments(log_pf=log_pf, log_ref=log_ref, log_flow=flow, tasks=tasks, states=every)


def log_probabilities(
    policy: LoHpPolicy,
    reference: LoHpPolicy | BackwardReference,
    states: Tensor,
    features: TaskFeatures,
    optimizers: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`log_pf` and `log_ref` of the steps between `states`, each (batch, time) in nats.

    With a clone the first is the log-ratio already, exact where the two agree, and the second `None`.
    """
    time = states.shape[1] - 1
    means, sigma = teacher_forced_means(policy, states, features, optimizers), step_sigmas(policy, time)
    if isinstance(reference, BackwardReference):
        steps = torch.arange(time, device=states.device).expand(len(states), time)
        back = reference.log_prob(states[:, :-1], states[:, 1:], steps)
        return gaussian_log_prob(states[:, 1:], means, sigma, policy.state_mask), back
    with torch.no_grad():
        clone = teacher_forced_means(reference, states, features, optimizers)
    return gaussian_log_ratio(states[:, 1:], means, clone, sigma, policy.state_mask), None


@torch.no_grad()
def divergence(policy: LoHpPolicy, clone: LoHpPolicy, features: TaskFeatures) -> Tensor:
    """Kullback-Leibler divergence of the policy from its clone along its mean rollouts, in nats, shape (batch,).

    Both are Gaussian with one covariance, so each step costs `|mean - clone's mean|² / 2 sigma²`.
    """
    states = rollout(policy, features)
    means, others = (teacher_forced_means(p, states, features, None) for p in (policy, clone))
    step = (means - others) / step_sigmas(policy, states.shape[1] - 1)
    return 0.5 * (step * policy.state_mask).square().sum((1, 2, 3))
