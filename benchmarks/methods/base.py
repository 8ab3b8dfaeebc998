"""What every method of the comparison gets, and what it gives back.

A method has the same base model, weight space, support examples and closed-form head as all others. One that is trained
(`fit`) gets the same training tasks, episodes and number of passes through the base model, and its tensors are saved.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lohp_peft import LoHpPolicy
from lohp_peft.tasks import (
    EncodedTexts,
    Episode,
    EpisodeSampler,
    Examples,
    Head,
    TaskBank,
    TaskFeatures,
    TextEncoder,
    TextStatistics,
    balanced_rows,
    leave_one_out_loss,
    solve_head,
    task_features,
)


@dataclass(frozen=True)
class Setting:
    """The policy gives weight space, head, features and the training tasks' adapters; only `ours` uses its networks."""

    policy: LoHpPolicy
    encoder: TextEncoder

    def solve(self, embeddings: Tensor, examples: Examples) -> Head:
        """The head all methods share."""
        config = self.policy.config
        return solve_head(embeddings, examples.targets, examples.n_classes, config.head, ridge=config.ridge)

    def condition(self, features: TaskFeatures) -> Tensor:
        """What conditional methods see of a support set: the policy's features, standardised, shape (b, size)."""
        policy = self.policy
        parts = (
            policy.normalize_set(features.set),
            policy.normalize_labels(features.labels),
            policy.normalize_modules(features.modules.flatten(-2)),
        )
        return torch.cat(parts, -1)

    def support(self, examples: Examples, seed: int, family: str = "") -> "Support":
        """A support set, read once."""
        encoded = self.encoder.prepare(examples.texts, examples.texts_b)
        statistics = self.encoder.statistics(encoded)
        return Support(examples, encoded, statistics, self.features(statistics, examples), seed, family)

    def features(self, statistics: TextStatistics, examples: Examples) -> TaskFeatures:
        """Features of examples, with a batch axis."""
        reference = self.policy.reference_tensors()
        return TaskFeatures.stack([task_features(statistics, examples.targets, examples.n_classes, reference)])

    def support_losses(self, support: "Support", states: Tensor, most_texts: int = 64) -> Tensor:
        """Leave-one-out loss of each of `s` states (s, modules, width) on at most `most_texts` support texts, (s,)."""
        examples, ridge = support.examples, self.policy.config.ridge
        rows = balanced_rows(examples.targets, most_texts, support.seed)
        part, given = support.encoded[rows], (examples.targets[rows], examples.n_classes)
        losses = [leave_one_out_loss(self.encoder.embed(part, state[None]), *given, ridge=ridge) for state in states]
        return torch.stack([loss.mean() for loss in losses]).to(states.device)


@dataclass(frozen=True)
class Support:
    """A support set, what one forward pass kept of it, and what conditional methods are told of it.

    Its task's family is for an oracle only.
    """

    examples: Examples
    encoded: EncodedTexts
    statistics: TextStatistics
    features: TaskFeatures
    seed: int
    family: str = ""


@dataclass(frozen=True)
class Adapted:
    """A classifier: a head on the embeddings of the base model under `state`, or of another `encoder`.

    Texts are read once up to the first adapted layer, for all methods; an encoder that is tuned below it reads them anew.
    """

    head: Head
    state: Tensor | None = None
    encoder: TextEncoder | None = None
    tuned_below: bool = False


@dataclass
class Training:
    """What a trained method learns from.

    `recordings` are the task of each recorded run and its adapters at the policy's knots, (runs, knots, modules, width). In
    `folder` it is kept how far a training has come, so that one that was stopped can go on.
    """

    setting: Setting
    bank: TaskBank
    sampler: EpisodeSampler
    validation: tuple[TaskBank, list[Episode]]
    seed: int = 0
    steps: int = 600
    batch_size: int = 6
    validate_every: int = 100
    recordings: tuple[list[str], Tensor] | None = None
    folder: Path | None = None

    def file(self, name: str) -> Path | None:
        """Where a training loop of that name is kept; nowhere without a folder."""
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def report(self, name: str, step: int, steps: int, loss: float) -> None:
        """Tell how far a training is that is kept; the loss is NaN where there is none."""
        if self.folder is not None:
            told = "" if math.isnan(loss) else f", validation loss {loss:.4f}"
            print(f"{self.folder.stem}: {name} step {step} of {steps}{told}", flush=True)

    def episodes(self, generator: torch.Generator) -> list[Episode]:
        """The episodes of one training step."""
        return [self.sampler.sample(generator) for _ in range(self.batch_size)]

    def features(self, episodes: list[Episode], bank: TaskBank | None = None) -> TaskFeatures:
        """Features of the episodes, batched."""
        bank, reference = bank or self.bank, self.setting.policy.reference_tensors()
        return TaskFeatures.stack([bank.features(e.known, e.known_labels, e.n_classes, reference) for e in episodes])

    def losses(self, episodes: list[Episode], states: Tensor, bank: TaskBank | None = None) -> Tensor:
        """Query loss of each episode under its state (b, modules, width), shape (b,); calibrated as in policy learning."""
        config = self.setting.policy.config
        settings = {"head": config.head, "ridge": config.ridge, "calibrated": True}
        losses, _ = (bank or self.bank).episode_losses(episodes, states[:, None], **settings)
        return losses[:, 0].to(states.device)


class Method:
    """A way to come from a support set to a classifier; see the module's docstring."""

    trained = False
    conditional = False
    from_recordings = False  # is trained on recorded adapters
    requires: tuple[str, ...] = ()  # packages beyond those of the benchmarks
    full_data = False  # gets all training rows of the task, once, in the place of the support sets: a ceiling
    most_draws: int | None = None  # support sets of a task, where one costs minutes; the first ones
    fitted_as: str | None = None  # the name of another method whose training this one shares

    def fit(self, training: Training) -> dict[str, Tensor]:
        """Train; the tensors are all that `state` gets."""
        return {}

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        """The adapter, shape (modules, width)."""
        raise NotImplementedError

    def adapt(
        self, setting: Setting, tensors: dict[str, Tensor], support: Support, told: TaskFeatures | None = None
    ) -> Adapted:
        """The classifier; a control tells a conditional method other features, the head keeps the true support."""
        with torch.no_grad():
            state = self.state(setting, tensors, support if told is None else replace(support, features=told))
            head = setting.solve(setting.encoder.embed(support.encoded, state[None]), support.examples)
        return Adapted(head, state)
