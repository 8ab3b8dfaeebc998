"""Methods trained through the base model on the query loss of episodes: one adapter for all tasks, a hypernetwork, Reptile."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lohp_peft.tasks import Episode, TaskBank, TaskFeatures, balanced_rows, leave_one_out_loss
from methods.base import Method, Setting, Support, Training

States = Callable[[nn.Module, TaskFeatures], Tensor]


def train(
    module: nn.Module,
    states: States,
    training: Training,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    size_penalty: float = 0.0,
) -> dict[str, Tensor]:
    """Train `module` by AdamW and give its weights where it validates best.

    Args:
        module: What is trained.
        states: From the module and features of `b` episodes to states in units of the policy's scale, (b, modules, width).
        training: Tasks, episodes and budget.
        learning_rate: Its peak; warm-up over 20 steps, then a cosine to 0.
        weight_decay: Of AdamW.
        size_penalty: Times the mean square of the scaled states, added to the loss.
    """
    scale = training.setting.policy.scale
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(training.seed)
    best, best_loss = copy.deepcopy(module.state_dict()), math.inf
    for step in range(training.steps + 1):
        if step % training.validate_every == 0 or step == training.steps:
            loss = validation_loss(training, lambda features: scale * states(module.eval(), features))
            if loss < best_loss:
                best, best_loss = copy.deepcopy(module.state_dict()), loss
        if step == training.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = (
                learning_rate * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / training.steps))
            )
        episodes = training.episodes(generator)
        scaled = states(module.train(), training.features(episodes))
        loss = training.losses(episodes, scale * scaled).mean() + size_penalty * scaled.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        training.advance()
    return {**best, "validation_loss": torch.tensor(best_loss)}


@torch.no_grad()
def validation_loss(training: Training, states: Callable[[TaskFeatures], Tensor]) -> float:
    """Mean query loss on the validation episodes, one at a time."""
    bank, episodes = training.validation
    return float(torch.cat([_episode_loss(training, states, episode, bank) for episode in episodes]).mean())


def _episode_loss(training: Training, states, episode: Episode, bank: TaskBank) -> Tensor:
    return training.losses([episode], states(training.features([episode], bank)), bank)


class _OneState(nn.Module):
    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.zeros(*shape))

    def forward(self, condition: Tensor) -> Tensor:
        return self.state.expand(len(condition), *self.state.shape)


class MultiTask(Method):
    """One unconditional adapter, trained on all training tasks: what a generator has to beat first."""

    trained = True

    def __init__(self, learning_rate: float = 0.02) -> None:
        self.learning_rate = learning_rate

    def fit(self, training: Training) -> dict[str, Tensor]:
        module = _OneState(tuple(training.setting.policy.space.shape))
        return train(module, lambda m, features: m(features.set), training, learning_rate=self.learning_rate)

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        return tensors["state"] * setting.policy.scale


class Reptile(Method):
    """A start from which a few steps go far (Known: 1803.02999), taken as an adapter (0 steps) or adapted by AdamW.

    A training step moves the start by `outer` of the way that `inner_steps` steps of Adam on each episode's query loss go.
    It has passes for a fifth of the others' episodes.
    """

    trained = True

    def __init__(
        self, adapt_steps: int = 0, inner_steps: int = 5, inner_rate: float = 0.05, outer: float = 0.1
    ) -> None:
        self.adapt_steps, self.inner_steps, self.inner_rate, self.outer = adapt_steps, inner_steps, inner_rate, outer

    def fit(self, training: Training) -> dict[str, Tensor]:
        policy = training.setting.policy
        start = torch.zeros(tuple(policy.space.shape))
        generator = torch.Generator().manual_seed(training.seed)
        best, best_loss = start, math.inf
        steps = max(1, training.steps // self.inner_steps)
        for step in range(steps + 1):
            if step % max(1, training.validate_every // self.inner_steps) == 0 or step == steps:
                loss = validation_loss(training, lambda f, x=start: (policy.scale * x).expand(len(f.set), *x.shape))
                if loss < best_loss:
                    best, best_loss = start, loss
            if step == steps:
                break
            moved = start.expand(training.batch_size, *start.shape).clone().requires_grad_(True)
            inner = torch.optim.Adam([moved], lr=self.inner_rate)
            episodes = training.episodes(generator)
            for _ in range(self.inner_steps):
                inner.zero_grad()
                training.losses(episodes, policy.scale * moved).sum().backward()
                inner.step()
            rate = self.outer * (1 - step / steps)
            start = start + rate * (moved.detach() - start).mean(0)
            training.advance()
        return {"state": best, "validation_loss": torch.tensor(best_loss)}

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        state = setting.policy.scale * tensors["state"]
        return support_steps(setting, support, state, self.adapt_steps, self.inner_rate) if self.adapt_steps else state


def support_steps(setting: Setting, support: Support, state: Tensor, steps: int, learning_rate: float) -> Tensor:
    """AdamW on the leave-one-out loss of the shared head on the support set, in units of the policy's scale."""
    examples, scale = support.examples, setting.policy.scale
    scaled = (state / scale).clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([scaled], lr=learning_rate, weight_decay=0.0)
    with torch.enable_grad():
        for step in range(steps):
            rows = balanced_rows(examples.targets, 64, support.seed + step)
            x = setting.encoder.embed(support.encoded[rows], (scale * scaled)[None])
            given = examples.targets[rows], examples.n_classes
            loss = leave_one_out_loss(x, *given, ridge=setting.policy.config.ridge).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return scale * scaled.detach()


class HyperNetwork(nn.Module):
    """Features and a module's embedding through a residual MLP to the module's core (Known: 2506.06105)."""

    def __init__(self, condition: int, shape: Sequence[int], hidden: int = 256, embedding: int = 64) -> None:
        super().__init__()
        modules, width = shape
        self.condition = nn.Linear(condition, hidden)
        self.module = nn.Parameter(torch.randn(modules, embedding) * 0.02)
        self.first = nn.Linear(hidden + embedding, hidden)
        layers = lambda: nn.Sequential(  # noqa: E731
            nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Dropout(0.05), nn.Linear(hidden, hidden)
        )
        self.blocks = nn.ModuleList([layers() for _ in range(2)])
        self.head = nn.Linear(hidden, width)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, condition: Tensor) -> Tensor:
        """From (b, condition) to scaled states, shape (b, modules, width)."""
        x = self.condition(condition)[:, None].expand(-1, len(self.module), -1)
        x = torch.nn.functional.silu(self.first(torch.cat([x, self.module.expand(len(x), -1, -1)], -1)))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class TextToLoraSFT(Method):
    """A one-shot hypernetwork trained through the base model (Known: 2506.06105), on our features of the examples."""

    trained = True
    conditional = True

    def __init__(self, learning_rate: float = 1e-3) -> None:
        self.learning_rate = learning_rate

    def _network(self, setting: Setting) -> HyperNetwork:
        policy = setting.policy
        size = sum(len(x.mean) for x in (policy.normalize_set, policy.normalize_labels, policy.normalize_modules))
        return HyperNetwork(size, tuple(policy.space.shape))

    def fit(self, training: Training) -> dict[str, Tensor]:
        setting = training.setting
        torch.manual_seed(training.seed)
        return train(
            self._network(setting),
            lambda network, features: network(setting.condition(features)),
            training,
            learning_rate=self.learning_rate,
            weight_decay=0.01,
            size_penalty=1e-3,
        )

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        network = self._network(setting).eval()
        network.load_state_dict({name: tensors[name] for name in network.state_dict()})
        return setting.policy.scale * network(setting.condition(support.features))[0]


class TextToLoraRecon(TextToLoraSFT):
    """The same network regressed on the training tasks' recorded adapters: no pass through the base model in training.

    L1 on states in units of the policy's scale (Known: 2506.06105), on features of fresh draws of each task's examples; validated
    through the base model.
    """

    def __init__(self, learning_rate: float = 1e-3, steps_per_training_step: int = 10) -> None:
        super().__init__(learning_rate)
        self.steps_per_training_step = steps_per_training_step

    def fit(self, training: Training) -> dict[str, Tensor]:
        setting = training.setting
        torch.manual_seed(training.seed)
        network, scale = self._network(setting), setting.policy.scale
        reference = setting.policy.reference_set
        targets = {name: state / scale for name, state in zip(reference.names, reference.states, strict=True)}
        names = [name for name in training.sampler.names if name in targets]
        steps = training.steps * self.steps_per_training_step
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=0.1)
        generator = torch.Generator().manual_seed(training.seed)
        best, best_loss = copy.deepcopy(network.state_dict()), math.inf
        every = max(1, training.validate_every * self.steps_per_training_step)
        for step in range(1, steps + 1):
            chosen = [names[int(i)] for i in torch.randint(len(names), (16,), generator=generator)]
            episodes = [training.sampler.whole_task_episode(name, generator) for name in chosen]
            with torch.no_grad():
                condition = setting.condition(training.features(episodes))
            loss = (network.train()(condition) - torch.stack([targets[name] for name in chosen])).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rates.step()
            if step % every == 0 or step == steps:
                network.eval()
                found = validation_loss(training, lambda f: scale * network(setting.condition(f)))
                if found < best_loss:
                    best, best_loss = copy.deepcopy(network.state_dict()), found
        return {**best, "validation_loss": torch.tensor(best_loss)}
