"""Methods trained through the base model on the query loss of episodes that know nothing of the task at hand."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lohp_peft.tasks import EpisodeSampler, leave_one_out_steps
from methods.base import Method, Setting, Support, Training
from methods.optimise import Best, optimise
from methods.unfinished import Unfinished


class OneState(nn.Module):
    """A single adapter in units of the policy's scale."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.zeros(*shape))


def one_adapter(training: Training, sampler: EpisodeSampler, learning_rate: float, **options) -> dict[str, Tensor]:
    """One adapter trained on the episodes of a sampler; `options` are those of `optimise`."""
    policy = training.setting.policy
    module = OneState(tuple(policy.space.shape))

    def repeated(count: int) -> Tensor:
        return (policy.scale * module.state).expand(count, *module.state.shape)

    def loss(generator: torch.Generator) -> Tensor:
        episodes = [sampler.sample(generator) for _ in range(training.batch_size)]
        return training.losses(episodes, repeated(len(episodes))).mean()

    return optimise(
        module, loss, lambda features: repeated(len(features.set)), training, learning_rate=learning_rate, **options
    )


class MultiTask(Method):
    """One unconditional adapter, trained on all training tasks: what a generator has to beat first."""

    trained = True

    def __init__(self, learning_rate: float = 0.1) -> None:
        self.learning_rate = learning_rate

    def fit(self, training: Training) -> dict[str, Tensor]:
        return one_adapter(training, training.sampler, self.learning_rate)

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        return tensors["state"] * setting.policy.scale


class FamilySpecialists(MultiTask):
    """One unconditional adapter for each family of training tasks; an oracle says which family a task is of.

    The families share the budget by the root of their number of tasks. A family without training tasks gets its nearest
    relative by name (sentiment3 the sentiment tasks'), or no adapter.
    """

    def fit(self, training: Training) -> dict[str, Tensor]:
        tasks, bank = training.bank.tasks, training.bank
        families: dict[str, dict[str, Tensor]] = {}
        for name in training.sampler.names:
            families.setdefault(tasks[name].family, {})[name] = bank.labels[name]
        share = training.steps / sum(len(labels) ** 0.5 for labels in families.values())
        found = {}
        for family, labels in families.items():
            steps = max(1, round(share * len(labels) ** 0.5))
            sampler = EpisodeSampler(labels)
            options = {"steps": steps, "validate": False, "name": family}
            found[family] = one_adapter(training, sampler, self.learning_rate, **options)["state"]
        return found

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        family = support.family if support.family in tensors else support.family.rstrip("0123456789")
        if family not in tensors:
            return torch.zeros(tuple(setting.policy.space.shape))
        return tensors[family] * setting.policy.scale


class Reptile(Method):
    """A start from which a few steps go far (Known: 1803.02999), taken as an adapter (0 steps) or adapted by Adam.

    A training step moves the start by `outer` of the way that `inner_steps` steps of Adam on each episode's query loss go.
    It has passes for a fifth of the others' episodes.
    """

    trained = True

    def __init__(
        self, adapt_steps: int = 0, inner_steps: int = 5, inner_rate: float = 0.05, outer: float = 0.1
    ) -> None:
        self.adapt_steps, self.inner_steps, self.inner_rate, self.outer = adapt_steps, inner_steps, inner_rate, outer
        self.fitted_as = "reptile" if adapt_steps else None

    def fit(self, training: Training) -> dict[str, Tensor]:
        scale = training.setting.policy.scale
        start = torch.zeros(tuple(training.setting.policy.space.shape))
        generator = torch.Generator().manual_seed(training.seed)
        best, unfinished = Best(training), Unfinished(training.file("training"), generator)
        first, kept = unfinished.load()
        if kept:
            start = kept["start"]["state"]
            best.load(kept["best"])
        steps = max(1, training.steps // self.inner_steps)
        every = max(1, training.validate_every // self.inner_steps)
        for step in range(first, steps + 1):
            if (step % every == 0 or step == steps) and not (kept and step == first):
                found = best.see({"state": start}, lambda f, x=start: (scale * x).expand(len(f.set), *x.shape))
                unfinished.save(step, start={"state": start}, best=best.result())
                training.report("training", step, steps, found)
            if step == steps:
                break
            moved = start.expand(training.batch_size, *start.shape).clone().requires_grad_(True)
            inner = torch.optim.Adam([moved], lr=self.inner_rate)
            episodes = training.episodes(generator)
            for _ in range(self.inner_steps):
                inner.zero_grad()
                training.losses(episodes, scale * moved).sum().backward()
                inner.step()
            rate = self.outer * (1 - step / steps)
            start = start + rate * (moved.detach() - start).mean(0)
        return best.result()

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        state = setting.policy.scale * tensors["state"]
        if not self.adapt_steps:
            return state
        examples = support.examples
        *_, (adapted,) = leave_one_out_steps(
            setting.encoder,
            support.encoded,
            examples.targets,
            examples.n_classes,
            [torch.arange(len(examples))],
            state,
            setting.policy.scale,
            steps=self.adapt_steps,
            learning_rate=self.inner_rate,
            ridge=setting.policy.config.ridge,
            seed=support.seed,
        )
        return adapted
