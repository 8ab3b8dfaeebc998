"""The policy's own segments: rollouts and splices, scored forward-only; and the temperature that follows from them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lohp_peft.objectives import BackwardReference, calibrate_path_temperature, calibrate_temperature
from lohp_peft.policy import LoHpPolicy, rollout
from lohp_peft.policy_learning.config import PolicyLearningConfig
from lohp_peft.policy_learning.losses import log_probabilities, repeat_features
from lohp_peft.policy_learning.recordings import MAX_RELATIVE_LOSS, Recordings
from lohp_peft.policy_learning.replay_buffer import Rollout
from lohp_peft.tasks import Episode, EpisodeSampler, TaskBank, TaskFeatures

logger = logging.getLogger(__name__)

MAX_REWARD_RANGE = 20.0
"""Most nats the recordings' mean loss decrease is worth (Ours: a smaller temperature left residuals of 1e6 nats²)."""
TEMPERATURE_EPISODES = 6


def episode_features(policy: LoHpPolicy, bank: TaskBank, episodes: Sequence[Episode]) -> TaskFeatures:
    """Features of the episodes' support sets, batched."""
    reference = policy.reference_tensors()
    return TaskFeatures.stack([bank.features(e.known, e.known_labels, e.n_classes, reference) for e in episodes])


@dataclass(frozen=True)
class OnPolicy:
    """Where rollouts come from.

    Args:
        policy: The policy that walks.
        bank: The tasks it walks for, with their reward.
        recordings: Recorded runs, whose prefixes are continued in splices.
        sampler: Source of episodes.
        config: Settings.
    """

    policy: LoHpPolicy
    bank: TaskBank
    recordings: Recordings
    sampler: EpisodeSampler
    config: PolicyLearningConfig

    @torch.no_grad()
    def fresh(self, generator: torch.Generator, splice: bool) -> list[Rollout]:
        """Scored rollouts from no adapter, and with `splice` as many from a recorded prefix of random length."""
        times, steps = self.config.rollouts_per_task, self.config.policy_steps
        episode = self.sampler.sample(generator)
        features = repeat_features(episode_features(self.policy, self.bank, [episode]), times)
        states = rollout(self.policy, features, noise=1.0, generator=generator)
        found = self.scored(episode, states, features, 0)
        if not splice:
            return found
        index = self.recordings.sample(1, generator, self.sampler.rows)
        episode = self.sampler.whole_task_episode(self.recordings.tasks[int(index)], generator)
        prefix = 1 + int(torch.randint(steps - 1, (1,), generator=generator)) if steps > 1 else 0
        features = repeat_features(episode_features(self.policy, self.bank, [episode]), times)
        recorded = self.recordings.states[index, : prefix + 1].expand(times, -1, -1, -1)
        states = rollout(self.policy, features, prefix=recorded, noise=1.0, generator=generator)
        return found + self.scored(episode, states, features, prefix)

    def scored(self, episode: Episode, states: Tensor, features: TaskFeatures, prefix: int) -> list[Rollout]:
        """Rollouts (batch, time + 1, modules, width) of one episode with their losses over that of no adapter."""
        losses = self._losses(episode, states.flatten(0, 1)).view(states.shape[:2])
        start = losses[:, :1] if prefix == 0 else self._losses(episode, torch.zeros_like(states[0, :1]))
        losses = (losses / start.clamp(min=1e-6)).clamp(max=MAX_RELATIVE_LOSS)
        return [Rollout(states[i], losses[i], features[i], prefix) for i in range(len(states))]

    def _losses(self, episode: Episode, states: Tensor) -> Tensor:
        config = self.config
        return self.bank.episode_losses([episode], states[None], head=config.head, ridge=config.ridge)[0][0]


@torch.no_grad()
def reference_temperature(
    source: OnPolicy, reference: LoHpPolicy | BackwardReference, generator: Callable[[int], torch.Generator]
) -> float:
    """Loss per nat, by rule; its floor makes the recordings' mean decrease worth `MAX_REWARD_RANGE` nats.

    Args:
        source: Rollouts, recordings and settings.
        reference: A clone (the spread of its rollouts, or of the recordings' ends when off-policy), or a backward policy
            (the cost of recorded paths; where that is not positive, as with a clone).
        generator: By number; the same in every process, so that they agree.
    """
    config, losses = source.config, source.recordings.losses
    decrease = float((losses[:, 0] - losses[:, -1]).clamp(min=0).mean())
    floor = max(decrease / MAX_REWARD_RANGE, 1e-3)
    if config.subtb_weight == 0:
        return floor
    if isinstance(reference, BackwardReference):
        costs, last = _path_costs(source, reference, generator(0)).cpu(), losses[:, -1].cpu()
        fallen = -losses.diff(dim=1)[:, ~reference.point_masses].sum(1).cpu()
        if float(costs.mean()) > 0 and float(fallen.mean()) > 0:
            return max(calibrate_path_temperature(last + fallen, last, costs), floor)
        logger.warning(
            "The policy finds the recordings less likely than the fitted backward policy does, by %.3g nats a trajectory, or "
            "their losses do not fall behind the first step (by %.3g on average): the temperature follows from rollouts "
            "instead. Longer behaviour cloning may help.",
            -float(costs.mean()),
            float(fallen.mean()),
        )
        reference = source.policy
    if config.mode == "off_policy":
        final, names = losses[:, -1], source.recordings.tasks
        spread = [final[[i for i, task in enumerate(names) if task == name]] for name in sorted(set(names))]
        variance = torch.stack([x.var() for x in spread if len(x) > 1] or [final.var(correction=0)]).mean()
        return max(float((variance / (2 * config.kl_target)).sqrt()), floor)
    final = []
    for i in range(TEMPERATURE_EPISODES):
        episode = source.sampler.sample(generator(i))
        features = episode_features(reference, source.bank, [episode])
        features = repeat_features(features, config.rollouts_per_task)
        states = rollout(reference, features, noise=1.0, generator=generator(TEMPERATURE_EPISODES + i))
        final.append(torch.stack([r.losses[-1] for r in source.scored(episode, states, features, 0)]))
    spread = torch.stack(final).cpu()
    if not spread.var(1).any():
        logger.warning(
            "All rollouts of the reference end at the same loss, %.3g times that of no adapter, which is what losses are "
            "clipped at where they are larger: the temperature is its floor, %.3g. A smaller `noise_scale` may help.",
            float(spread.mean()),
            floor,
        )
        return floor
    return max(calibrate_temperature(spread, config.kl_target), floor)


def _path_costs(source: OnPolicy, reference: BackwardReference, generator: torch.Generator) -> Tensor:
    """`sum_k log P_F - log P_B` of every recorded run of a task that gives episodes, in nats, without point masses."""
    policy, recordings = source.policy.eval(), source.recordings
    usable = [i for i, name in enumerate(recordings.tasks) if name in source.sampler.rows]
    costs = recordings.losses.new_zeros(len(usable))
    for k, i in enumerate(usable):
        name = recordings.tasks[i]
        episode = source.sampler.whole_task_episode(name, generator)
        features = episode_features(policy, source.bank, [episode])
        run = recordings.states[i : i + 1], features, recordings.optimizers[i : i + 1]
        log_pf, log_ref = log_probabilities(policy, reference, *run)
        ratios = log_pf if log_ref is None else log_pf - log_ref
        costs[k] = ratios[:, ~reference.point_masses].sum()
    return costs
