"""Methods that learn from recorded adapters alone; the base model is used to validate, never to train.

Adapters are in units of the policy's scale, so that all modules count alike. Each training step draws recorded runs and,
for each, features of a fresh draw of its task's examples.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lohp_peft.tasks import TaskFeatures
from methods.base import Method, Setting, Support, Training
from methods.conditional import loaded, network_of
from methods.optimise import optimise

BATCH = 16
STEPS_PER_TRAINING_STEP = 5
"""Training steps for one of the methods trained through the base model, which cost 20 times as much."""


class FromRecordings(Method):
    """What these methods share: a network, a loss on a batch of recorded paths, and adapters from features."""

    trained = True
    conditional = True
    from_recordings = True
    learning_rate = 1e-3
    weight_decay = 0.0

    def network(self, setting: Setting) -> nn.Module:
        """The network, untrained."""
        raise NotImplementedError

    def loss(self, network: nn.Module, paths: Tensor, condition: TaskFeatures, setting: Setting) -> Tensor:
        """Loss on `b` paths of scaled adapters, shape (b, knots, modules, width), with features of their tasks."""
        raise NotImplementedError

    def generate(self, network: nn.Module, features: TaskFeatures, setting: Setting, seed: int) -> Tensor:
        """Scaled adapters, shape (b, modules, width)."""
        raise NotImplementedError

    def prepare(self, network: nn.Module, paths: Tensor, setting: Setting) -> None:
        """Set what is fitted in closed form before training, on all paths."""

    def fit(self, training: Training) -> dict[str, Tensor]:
        if training.recordings is None:
            raise ValueError(f"{type(self).__name__} learns from recorded adapters; the training has none.")
        setting, (names, paths) = training.setting, training.recordings
        scale = setting.policy.scale
        known = [i for i, name in enumerate(names) if name in training.sampler.rows]
        names, paths = [names[i] for i in known], paths[known] / scale
        torch.manual_seed(training.seed)
        network = self.network(setting)
        self.prepare(network, paths, setting)

        def loss(generator: torch.Generator) -> Tensor:
            chosen = torch.randint(len(names), (BATCH,), generator=generator)
            episodes = [training.sampler.whole_task_episode(names[i], generator) for i in chosen.tolist()]
            return self.loss(network, paths[chosen], training.features(episodes), setting)

        return optimise(
            network,
            loss,
            lambda features: scale * self.generate(network, features, setting, training.seed),
            training,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            steps=STEPS_PER_TRAINING_STEP * training.steps,
        )

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        network = loaded(self.network(setting), tensors)
        return setting.policy.scale * self.generate(network, support.features, setting, support.seed)[0]


class TextToLoraRecon(FromRecordings):
    """The hypernetwork of Text-to-LoRA regressed on recorded adapters, L1 (Known: 2506.06105)."""

    def network(self, setting: Setting) -> nn.Module:
        return network_of(setting)

    def loss(self, network: nn.Module, paths: Tensor, condition: TaskFeatures, setting: Setting) -> Tensor:
        return (network(setting.condition(condition)) - paths[:, -1]).abs().mean()

    def generate(self, network: nn.Module, features: TaskFeatures, setting: Setting, seed: int) -> Tensor:
        return network(setting.condition(features))


class Decoder(nn.Module):
    """Cascaded convolutions, along the features and across the tokens in turn, from a few tokens to one a module."""

    def __init__(self, tokens: int, size: int, shape: tuple[int, int], hidden: int = 256) -> None:
        super().__init__()
        modules, width = shape
        counts = (tokens, 8, modules, modules)
        self.first = nn.Linear(size, hidden)
        self.along = nn.ModuleList([nn.Conv1d(n, m, 5, padding=2) for n, m in zip(counts, counts[1:], strict=False)])
        self.across = nn.ModuleList([nn.Conv1d(hidden, hidden, 3, padding=1) for _ in counts[1:]])
        self.head = nn.Linear(hidden, width)
        self.register_buffer("weight", torch.ones(modules, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """From (b, tokens, size) to (b, modules, width)."""
        x = self.first(tokens)
        for along, across in zip(self.along, self.across, strict=True):
            x = silu(along(x))
            x = x + silu(across(x.transpose(1, 2)).transpose(1, 2))
        return self.head(x)


class DragAndDrop(FromRecordings):
    """In the style of Drag-and-Drop LLMs (Known: 2506.16406): a convolutional decoder from unlabelled texts.

    It reads mean and spread of the texts' embeddings, no labels, and is regressed on recorded adapters by a square error
    weighted by the inverse variance of each entry.
    """

    learning_rate = 3e-4

    def network(self, setting: Setting) -> nn.Module:
        return Decoder(2, len(setting.policy.normalize_set.mean) // 2, tuple(setting.policy.space.shape))

    def prepare(self, network: nn.Module, paths: Tensor, setting: Setting) -> None:
        variance = paths[:, -1].var(0)
        network.weight.copy_(variance.mean() / variance.clamp(min=0.01 * float(variance.mean())))
        network.weight.div_(network.weight.mean())

    def loss(self, network: nn.Module, paths: Tensor, condition: TaskFeatures, setting: Setting) -> Tensor:
        return (network.weight * (self.generate(network, condition, setting, 0) - paths[:, -1]).square()).mean()

    def generate(self, network: nn.Module, features: TaskFeatures, setting: Setting, seed: int) -> Tensor:
        return network(setting.policy.normalize_set(features.set).unflatten(-1, (2, -1)))


class LatentDenoiser(nn.Module):
    """A linear autoencoder, exact in closed form for few runs, and a denoiser of its latents."""

    def __init__(self, condition: int, size: int, latent: int = 64, hidden: int = 512) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.zeros(latent, size))
        self.register_buffer("spread", torch.ones(latent))
        layers = [nn.Linear(latent + 2 + condition, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
        self.denoise = nn.Sequential(*layers, nn.Linear(hidden, latent))

    def forward(self, z: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """The noise in latents (b, latent) at times (b,) in 0..1."""
        return self.denoise(torch.cat([z, time[:, None], (torch.pi * time[:, None]).cos(), condition], -1))


class WeightDiffusion(FromRecordings):
    """In the style of p-diff (Known: 2402.13144): diffusion over latents of trained adapters.

    1000 linear noise levels, the noise is predicted; sampled in 50 deterministic steps. Latents that a prediction stands for
    are kept within `most` standard deviations, as samplers of images do: a small error at the first levels is a large one in
    the latents. Unconditional, or conditioned on our features.
    """

    weight_decay = 2e-6
    most = 3.0

    def __init__(self, conditional: bool, sampling_steps: int = 50) -> None:
        self.conditional, self.sampling_steps = conditional, sampling_steps
        self.kept = (1 - torch.linspace(1e-4, 2e-2, 1000)).cumprod(0)

    def condition(self, features: TaskFeatures, setting: Setting) -> Tensor:
        """Features, or none of them."""
        return setting.condition(features) if self.conditional else features.set[:, :0]

    def network(self, setting: Setting) -> nn.Module:
        modules, width = setting.policy.space.shape
        size = self.condition(setting.policy.reference_set.features, setting).shape[-1]
        return LatentDenoiser(size, modules * width)

    def prepare(self, network: nn.Module, paths: Tensor, setting: Setting) -> None:
        flat = paths[:, -1].flatten(1)
        network.mean.copy_(flat.mean(0))
        basis = torch.linalg.svd(flat - network.mean, full_matrices=False).Vh[: len(network.basis)]
        network.basis[: len(basis)] = basis
        network.spread.copy_(((flat - network.mean) @ network.basis.T).std(0).clamp(min=1e-6))

    def loss(self, network: nn.Module, paths: Tensor, condition: TaskFeatures, setting: Setting) -> Tensor:
        z = (paths[:, -1].flatten(1) - network.mean) @ network.basis.T / network.spread
        level = torch.randint(len(self.kept), (len(z),))
        kept, noise = self.kept[level][:, None], torch.randn_like(z)
        noisy = kept.sqrt() * z + (1 - kept).sqrt() * noise
        predicted = network(noisy, level / len(self.kept), self.condition(condition, setting))
        return (predicted - noise).square().mean()

    def generate(self, network: nn.Module, features: TaskFeatures, setting: Setting, seed: int) -> Tensor:
        condition = self.condition(features, setting)
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(len(condition), len(network.basis), generator=generator)
        levels = torch.linspace(len(self.kept) - 1, 0, self.sampling_steps).long()
        after = [*self.kept[levels[1:]], torch.tensor(1.0)]
        for level, kept_after in zip(levels, after, strict=True):
            kept = self.kept[level]
            noise = network(z, (level / len(self.kept)).expand(len(z)), condition)
            clean = ((z - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-self.most, self.most)
            noise = (z - kept.sqrt() * clean) / (1 - kept).sqrt()
            z = kept_after.sqrt() * clean + (1 - kept_after).sqrt() * noise
        flat = network.mean + (z * network.spread) @ network.basis
        return flat.unflatten(-1, tuple(setting.policy.space.shape))


class LocalDenoising(FromRecordings):
    """In the style of Mc-Di (Known: 2502.01117): denoising whose targets are the next recorded adapters of the trajectory.

    Between two knots the state is on the line from one to the next, with noise that falls to zero; the network predicts the
    next knot. It starts from no adapter and takes five steps a segment.
    """

    def __init__(self, noise: float = 0.1, steps_per_segment: int = 5, segments: int = 4) -> None:
        self.noise, self.steps_per_segment, self.segments = noise, steps_per_segment, segments

    def network(self, setting: Setting) -> nn.Module:
        return network_of(setting, reads_state=True)

    def loss(self, network: nn.Module, paths: Tensor, condition: TaskFeatures, setting: Setting) -> Tensor:
        b, rows = len(paths), torch.arange(len(paths))
        segment, share = torch.randint(self.segments, (b,)), torch.rand(b)
        start, target = paths[rows, segment], paths[rows, segment + 1]
        noisy = torch.lerp(start, target, share[:, None, None])
        noisy = noisy + self.noise * (1 - share)[:, None, None] * torch.randn_like(noisy)
        predicted = network(setting.condition(condition), noisy, (segment + share) / self.segments)
        return (predicted - target).square().mean()

    def generate(self, network: nn.Module, features: TaskFeatures, setting: Setting, seed: int) -> Tensor:
        condition = setting.condition(features)
        x = torch.zeros(len(condition), *setting.policy.space.shape)
        for segment in range(self.segments):
            for step in range(self.steps_per_segment):
                time = torch.full((len(x),), (segment + step / self.steps_per_segment) / self.segments)
                x = x + (network(condition, x, time) - x) / (self.steps_per_segment - step)
        return x
