"""The loop all trained methods share: AdamW, warm-up and cosine, the weights that validate best are kept."""

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lohp_peft.tasks import Episode, TaskBank, TaskFeatures
from methods.base import Training
from methods.unfinished import Unfinished, load_optimizer, optimizer_tensors

States = Callable[[TaskFeatures], Tensor]


class Best:
    """What validated best so far: the mean query loss through the base model on the validation episodes, one at a time."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.loss, self.tensors = math.inf, {}

    @torch.no_grad()
    def see(self, tensors: dict[str, Tensor], states: States) -> float:
        """Keep a copy of `tensors` when the adapters `states` gives for features are better than the kept ones."""
        bank, episodes = self.training.validation
        loss = float(torch.cat([self._loss(states, episode, bank) for episode in episodes]).mean())
        if loss < self.loss:
            self.loss, self.tensors = loss, copy.deepcopy(tensors)
        return loss

    def _loss(self, states: States, episode: Episode, bank: TaskBank) -> Tensor:
        return self.training.losses([episode], states(self.training.features([episode], bank)), bank)

    def result(self) -> dict[str, Tensor]:
        """The kept tensors and their loss."""
        return {**self.tensors, "validation_loss": torch.tensor(self.loss)}

    def load(self, result: Mapping[str, Tensor]) -> None:
        """What `result` gave."""
        self.tensors = dict(result)
        self.loss = float(self.tensors.pop("validation_loss"))


def optimise(
    module: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    states: States,
    training: Training,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    steps: int | None = None,
    validate: bool = True,
    name: str = "training",
) -> dict[str, Tensor]:
    """Train `module` by AdamW and give its weights where it validates best.

    Args:
        module: What is trained.
        loss: From the generator of a step's draws to the loss of that step.
        states: From features of `b` episodes to adapters, (b, modules, width).
        training: Tasks, episodes and budget.
        learning_rate: Its peak; warm-up over 20 steps (a fifth of a short run), then a cosine to 0.
        weight_decay: Of AdamW.
        steps: Training steps, those of the budget by default; validated, and kept, as often as the budget says.
        validate: Give the last weights instead, without `validation_loss`, where false.
        name: Of this loop among those of its method.
    """
    steps = steps or training.steps
    warm_up = max(1, min(20, steps // 5))
    every = max(1, training.validate_every * steps // training.steps)
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(training.seed)
    best, unfinished = Best(training), Unfinished(training.file(name), generator)
    first, kept = unfinished.load()
    if kept:
        module.load_state_dict(kept["module"])
        load_optimizer(optimizer, kept.get("optimizer", {}))
        best.load(kept["best"])
    for step in range(first, steps + 1):
        if (step % every == 0 or step == steps) and not (kept and step == first):
            module.eval()
            found = best.see(module.state_dict(), states) if validate else math.nan
            parts = {"module": module.state_dict(), "optimizer": optimizer_tensors(optimizer), "best": best.result()}
            unfinished.save(step, **parts)
            training.report(name, step, steps, found)
        if step == steps:
            break
        module.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss(generator).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return best.result() if validate else module.state_dict()
