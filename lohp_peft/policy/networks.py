"""The networks of the policy: conditioning, gated directions, error feedback, a transformer over modules, a log flow."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from lohp_peft.policy.config import LoHpPolicyConfig
from lohp_peft.tasks.features import TaskFeatures


class FeatureNormalizer(nn.Module):
    """Standardises and clips features; its statistics are fitted once and saved with the policy."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def fit(self, features: Tensor) -> None:
        """Fit to features of many support sets, shape (n, size)."""
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0) + 1e-3)

    def forward(self, features: Tensor) -> Tensor:
        """Standardised features within +-4, same shape."""
        return ((features - self.mean) / self.std).clamp(-4, 4)


class ItemDropout(nn.Dropout):
    """Dropout that can be drawn item by item, so that it does not depend on how a batch is shared among processes.

    **Attributes**:
        - **generators** -- One for each item, whose rows follow each other; `None` draws from torch's own generator.
    """

    generators: Sequence[torch.Generator] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Shape (items * rows of each, ...), the same shape."""
        if self.generators is None or not self.training or not 0 < self.p < 1:
            return super().forward(x)
        shape = (len(x) // len(self.generators), *x.shape[1:])
        draws = torch.cat([torch.rand(shape, generator=g, device=g.device) for g in self.generators]).to(x.device)
        return torch.where(draws >= self.p, x / (1 - self.p), 0.0)


class Trunk(nn.Module):
    """An MLP from a support set's features and a policy step to a vector, shape (batch, hidden)."""

    def __init__(self, config: LoHpPolicyConfig, size: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.step = nn.Embedding(config.policy_steps + 1, hidden)
        self.optimizer = nn.Embedding(len(config.optimizers) + 1, hidden)
        self.first = nn.Linear(size, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.dropout = ItemDropout(config.dropout)
        nn.init.zeros_(self.step.weight)
        nn.init.zeros_(self.optimizer.weight)

    def forward(self, features: Tensor, step: Tensor, optimizer: Tensor) -> Tensor:
        """Features (batch, size), step and optimizer indices (batch,)."""
        x = self.dropout(gelu(self.first(features))) + self.step(step) + self.optimizer(optimizer)
        return gelu(self.second(x))


class Attention(nn.Module):
    """Multi-head attention of queries over keys."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, hidden)
        self.key_value = nn.Linear(hidden, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Shapes (batch, queries, hidden) and (batch, keys, hidden)."""
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # noqa: E731
        key, value = self.key_value(memory).chunk(2, -1)
        return self.out(
            scaled_dot_product_attention(*map(split, (self.query(x), key, value))).transpose(-3, -2).flatten(-2)
        )


class Block(nn.Module):
    """Self-attention over modules, cross-attention to the task, an MLP; adaptive layer norm on the condition."""

    def __init__(self, config: LoHpPolicyConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.modulation = nn.Linear(hidden, 6 * hidden)
        self.self_attention = Attention(hidden, config.num_heads)
        self.cross_attention = Attention(hidden, config.num_heads)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, task: Tensor, condition: Tensor) -> Tensor:
        """Tokens (batch, modules, hidden), task tokens (batch, t, hidden), condition (batch, hidden)."""
        scale = self.modulation(condition)[:, None].chunk(6, -1)
        x = self.norm(tokens) * (1 + scale[0]) + scale[1]
        tokens = tokens + self.self_attention(x, x)
        x = self.norm(tokens) * (1 + scale[2]) + scale[3]
        tokens = tokens + self.cross_attention(x, task)
        return tokens + self.mlp(self.norm(tokens) * (1 + scale[4]) + scale[5])


class ForwardNetwork(nn.Module):
    """A mixture of learned directions, gated feedback of errors, and a free, bounded, low-gain move per module."""

    def __init__(self, config: LoHpPolicyConfig, sizes: tuple[int, int, int], shape: tuple[int, int]) -> None:
        super().__init__()
        modules, width = shape
        hidden = config.hidden_size
        self.start = nn.Parameter(torch.zeros(modules, width))
        self.pull = nn.Parameter(torch.full((config.policy_steps, modules, 1), 0.01))
        self.directions = nn.Parameter(torch.randn(config.num_directions, modules, width) * 0.02)
        self.trunk = Trunk(config, sizes[0] + sizes[1] + modules * sizes[2] // 2)
        self.gates = nn.Linear(hidden, config.num_directions)
        nn.init.normal_(self.gates.weight, std=0.02)
        nn.init.zeros_(self.gates.bias)
        p, r = config.principal_directions, config.r
        self.feedback = nn.Parameter(torch.randn(modules, width // r, p) / p**0.5)
        self.inward = nn.Parameter(torch.eye(r + 1)[:, :r].repeat(modules, 1, 1))
        self.feedback_gates = nn.Linear(hidden, modules)
        nn.init.zeros_(self.feedback_gates.weight)
        nn.init.constant_(self.feedback_gates.bias, 0.1)
        self.token = nn.Linear(2 * width + 1 + sizes[2], hidden)
        self.module = nn.Parameter(torch.randn(modules, hidden) * 0.02)
        self.task = nn.ModuleList([nn.Linear(sizes[0], hidden), nn.Linear(sizes[1], hidden)])
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.out = nn.Linear(hidden, width + 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def gate_parameters(self) -> list[nn.Parameter]:
        """Directions, feedback and the gates that mix them."""
        gates = [*self.trunk.parameters(), *self.gates.parameters(), *self.feedback_gates.parameters()]
        return [self.start, self.pull, self.directions, self.feedback, self.inward, *gates]

    def free_parameters(self) -> list[nn.Parameter]:
        """The transformer behind the free moves."""
        mine = {id(p) for p in self.gate_parameters()}
        return [p for p in self.parameters() if id(p) not in mine]

    def forward(
        self, state: Tensor, previous: Tensor, features: TaskFeatures, flat: Tensor, step: Tensor, optimizer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The drift of the gates, in units of the scale, and the free move, in those of a step, (batch, modules, width).

        The drift is a learned start, a mixture of learned directions, and what the support set's errors ask of each
        module: `gate * feedback @ moments @ inward`, the gradient of the support loss as far as it can be known without
        a backward pass (see `tasks.task_features`).

        Args:
            state: Scaled states, shape (batch, modules, width).
            previous: Scaled previous moves, same shape.
            features: Standardised features with a batch axis.
            flat: Set features and all ratios in one vector, shape (batch, total).
            step: Policy step indices, shape (batch,).
            optimizer: Optimizer indices, shape (batch,); 0 is none in particular.
        """
        condition = self.trunk(flat, step, optimizer)
        drift = self.start + torch.einsum("bd,dmw->bmw", self.gates(condition), self.directions)
        asked = self.feedback @ features.moments @ self.inward
        drift = drift + (self.feedback_gates(condition)[..., None, None] * asked).flatten(-2)
        rms = state.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        tokens = self.token(torch.cat([state / (1 + rms), previous, rms.log(), features.modules], -1))
        tokens = tokens + self.module + condition[:, None]
        task = torch.stack([net(x) for net, x in zip(self.task, (features.set, features.labels), strict=True)], 1)
        task = torch.cat([task, condition[:, None]], 1)
        for block in self.blocks:
            tokens = block(tokens, task, condition)
        direction, magnitude = self.out(tokens).split([state.shape[-1], 1], -1)
        return drift, 3 * torch.tanh(direction * torch.exp(magnitude.clamp(-4, 2)) / 3)


class LogFlowNetwork(nn.Module):
    """Residual log flow in nats, next to the known loss over the temperature; a trunk of its own."""

    def __init__(self, config: LoHpPolicyConfig, sizes: tuple[int, int, int], shape: tuple[int, int]) -> None:
        super().__init__()
        modules, _ = shape
        self.trunk = Trunk(config, sizes[0] + sizes[1] + modules * sizes[2] // 2 + 2 * modules)
        self.out = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, state: Tensor, start: Tensor, flat: Tensor, step: Tensor, optimizer: Tensor) -> Tensor:
        """Shape (batch,), from scaled states (batch, modules, width)."""
        rms = state.square().mean(-1).add(1e-6).sqrt()
        along = (state * start).mean(-1) / start.square().mean(-1).add(1e-6).sqrt()
        hidden = self.trunk(torch.cat([flat, rms.log(), along], -1), step, optimizer)
        with torch.autocast(
            hidden.device.type, enabled=False
        ):  # a flow of thousands of nats has no fractions in bfloat16
            flow = self.out(hidden.to(self.out.weight.dtype))
        return flow.squeeze(-1).clone()  # not a view, which would lose the hooks of FSDP2 if it were changed in place
