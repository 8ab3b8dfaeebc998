"""A one-shot hypernetwork: features of the examples in, an adapter out, trained through the base model or on recordings."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from methods.base import Method, Setting, Support, Training
from methods.optimise import optimise


class HyperNetwork(nn.Module):
    """Features and a module's embedding through a residual MLP to the module's core (Known: 2506.06105).

    Args:
        condition: Size of the features.
        shape: Modules and width of an adapter.
        reads_state: Whether a current adapter and a time in 0..1 are read as well, as a denoiser does.
        hidden: Width.
        embedding: Size of a module's embedding.
    """

    def __init__(
        self,
        condition: int,
        shape: Sequence[int],
        *,
        reads_state: bool = False,
        hidden: int = 256,
        embedding: int = 64,
    ) -> None:
        super().__init__()
        modules, width = shape
        self.condition = nn.Linear(condition, hidden)
        self.module = nn.Parameter(torch.randn(modules, embedding) * 0.02)
        self.first = nn.Linear(hidden + embedding, hidden)
        self.now = nn.Linear(width + 2, hidden) if reads_state else None
        self.blocks = nn.ModuleList([self._block(hidden) for _ in range(2)])
        self.head = nn.Linear(hidden, width)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @staticmethod
    def _block(hidden: int) -> nn.Module:
        layers = (nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Dropout(0.05))
        return nn.Sequential(*layers, nn.Linear(hidden, hidden))

    def forward(self, condition: Tensor, state: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """From (b, condition), and (b, modules, width) with (b,) where it reads them, to (b, modules, width)."""
        x = self.condition(condition)[:, None].expand(-1, len(self.module), -1)
        x = self.first(torch.cat([x, self.module.expand(len(x), -1, -1)], -1))
        if self.now is not None:
            clock = torch.stack([time, (torch.pi * time).cos()], -1)[:, None].expand(-1, len(self.module), -1)
            x = x + self.now(torch.cat([state, clock], -1))
        x = silu(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def network_of(setting: Setting, **options) -> HyperNetwork:
    """A network that reads all our features."""
    policy = setting.policy
    size = sum(len(x.mean) for x in (policy.normalize_set, policy.normalize_labels, policy.normalize_modules))
    return HyperNetwork(size, tuple(policy.space.shape), **options)


def loaded(network: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The network with its trained weights, for use."""
    network.load_state_dict({name: tensors[name] for name in network.state_dict()})
    return network.eval()


class TextToLoraSFT(Method):
    """A hypernetwork trained through the base model (Known: 2506.06105), on our features of the examples."""

    trained = True
    conditional = True

    def __init__(self, learning_rate: float = 1e-3) -> None:
        self.learning_rate = learning_rate

    def fit(self, training: Training) -> dict[str, Tensor]:
        setting = training.setting
        scale = setting.policy.scale
        torch.manual_seed(training.seed)
        network = network_of(setting)

        def loss(generator: torch.Generator) -> Tensor:
            episodes = training.episodes(generator)
            scaled = network(setting.condition(training.features(episodes)))
            return training.losses(episodes, scale * scaled).mean() + 1e-3 * scaled.square().mean()

        return optimise(
            network,
            loss,
            lambda features: scale * network(setting.condition(features)),
            training,
            learning_rate=self.learning_rate,
            weight_decay=0.01,
        )

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        network = loaded(network_of(setting), tensors)
        return setting.policy.scale * network(setting.condition(support.features))[0]
