"""Stage 2 from top to bottom: behaviour cloning, then hybrid-policy sub-trajectory balance, one Accelerate loop."""

import copy
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from lohp_peft.objectives import calibrate_temperature, hybrid_loss, schedule_fractions
from lohp_peft.policy import LoHpPolicy, rollout
from lohp_peft.policy_learning.config import PolicyLearningConfig
from lohp_peft.policy_learning.losses import cloning_loss, repeat_features, segments
from lohp_peft.policy_learning.recordings import Recordings
from lohp_peft.policy_learning.replay_buffer import ReplayBuffer, Rollout
from lohp_peft.tasks import Episode, EpisodeSampler, TaskBank, TaskFeatures

logger = logging.getLogger(__name__)

Log = Callable[[int, Mapping[str, float]], None]
MAX_REWARD_RANGE = 20.0
"""Most nats the recordings' mean loss decrease is worth (Ours: a smaller temperature left residuals of 1e6 nats²)."""


class LoHpTrainer:
    """Trains a [`LoHpPolicy`] on recordings (off-policy), rollouts (on-policy) and splices of both.

    Every random number is keyed by (seed, training step, purpose), so that an interrupted run that resumes equals an
    uninterrupted one, bit for bit. Gradients are averaged over processes.

    Args:
        policy: The policy, with space, scales and normalisers fitted.
        bank: Training tasks.
        recordings: Their recorded runs.
        sampler: Source of episodes.
        config: Settings.
        validation: Fixed validation episodes and the bank that holds their tasks, or `None`.
        accelerator: Device placement, mixed precision and processes.
        log: Called with the training step and its scalars.
    """

    def __init__(
        self,
        policy: LoHpPolicy,
        bank: TaskBank,
        recordings: Recordings,
        sampler: EpisodeSampler,
        config: PolicyLearningConfig,
        *,
        validation: tuple[TaskBank, Sequence[Episode]] | None = None,
        accelerator: Accelerator | None = None,
        log: Log | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator()
        self.policy = policy.to(self.accelerator.device)
        self.bank, self.recordings, self.sampler, self.config = bank, recordings, sampler, config
        self.validation, self.log = validation, log or (lambda step, scalars: None)
        self.reference: LoHpPolicy | None = None
        self.temperature = float("nan")
        self.buffer = ReplayBuffer(config.buffer_size)
        self.step, self.best = 0, (math.inf, -1)
        network = policy.forward_network
        groups = [
            {"params": network.gate_parameters(), "lr": config.learning_rate},
            {"params": network.free_parameters(), "lr": config.free_learning_rate},
            {"params": list(policy.log_flow_network.parameters()), "lr": config.log_flow_learning_rate},
        ]
        self.optimizer = self.accelerator.prepare(torch.optim.Adam(groups))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.best_weights: dict[str, Tensor] = {}

    @property
    def total_steps(self) -> int:
        """Training steps of both phases."""
        hybrid = 0 if self.config.preset == "behaviour_cloning" else self.config.training_steps
        return self.config.cloning_steps + hybrid

    def train(self, folder: Path | None = None) -> LoHpPolicy:
        """Run to the end, from the checkpoint in `folder` when there is one, and load the best validated weights."""
        if folder is not None and (folder / "state.json").is_file():
            self.load(folder)
        while self.step < self.total_steps:
            if self.step == self.config.cloning_steps and self.reference is None:
                self._start_hybrid_phase()
            scalars = self.training_step()
            self.step += 1
            due = self.step % self.config.validate_every == 0 or self.step == self.total_steps
            if self.validation is not None and due:
                scalars |= self.validate()
            self.log(self.step, scalars)
            if folder is not None and (self.step % self.config.save_every == 0 or self.step == self.total_steps):
                self.save(folder)
        if self.best_weights:
            self.policy.load_state_dict(self.best_weights)
        return self.policy.eval()

    def training_step(self) -> dict[str, float]:
        """One update; returns its scalars."""
        self.policy.train()
        torch.manual_seed(self._key("dropout", self.accelerator.process_index))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._schedule()
        with self.accelerator.autocast():
            losses, scalars = self._cloning_phase() if self.reference is None else self._hybrid_phase()
        scalars |= self._accumulate(losses)
        self.optimizer.step()
        return scalars

    def _accumulate(self, losses: Mapping[str, tuple[Tensor, float]]) -> dict[str, float]:
        """Sum the losses' gradients, each clipped on its own to its weight times `max_grad_norm`.

        (Ours: residuals of SubTB are squares of nats and come in any size; clipped together they drowned the others.)
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        totals = [torch.zeros_like(p) for p in parameters]
        scalars: dict[str, float] = {}
        for name, (loss, weight) in losses.items():
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            if self.accelerator.num_processes > 1:
                gradients = tuple(
                    self.accelerator.reduce(torch.zeros_like(p) if g is None else g, reduction="mean")
                    for g, p in zip(gradients, parameters, strict=True)
                )
            norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
            if not torch.isfinite(loss) or not torch.isfinite(norm):
                raise RuntimeError(
                    f"Policy learning diverged at training step {self.step}: {name} is {loss.item()}, its gradient norm "
                    f"{norm.item()}. Lower `learning_rate`, `kl_target` (which raises the temperature) or the loss's weight."
                )
            scale = weight * min(1.0, self.config.max_grad_norm / (norm.item() + 1e-12))
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient, alpha=scale)
            scalars |= {name: loss.item(), f"{name}_grad_norm": norm.item()}
        for parameter, total in zip(parameters, totals, strict=True):
            parameter.grad = total
        return scalars

    def _cloning_phase(self) -> tuple[dict[str, tuple[Tensor, float]], dict[str, float]]:
        index, features, optimizers = self._recorded_batch()
        loss = cloning_loss(self.policy, self.recordings.states[index], features, optimizers, self._generator("noise"))
        return {"cloning": (loss, 1.0)}, {}

    def _hybrid_phase(self) -> tuple[dict[str, tuple[Tensor, float]], dict[str, float]]:
        config = self.config
        scalars: dict[str, float] = {}
        index, features, optimizers = self._recorded_batch()
        states = self.recordings.states[index]
        cloning = cloning_loss(self.policy, states, features, optimizers, self._generator("noise"))
        losses = {"cloning": (cloning, config.cloning_weight)}
        if config.subtb_weight > 0:
            batches = self._segments(index, features, optimizers)
            progress = (self.step - config.cloning_steps) / max(config.training_steps, 1)
            weights = schedule_fractions(progress, config.mode)
            weights = {source: weights[source] for source in batches}
            if sum(weights.values()) > 0:
                subtb, diagnostics = hybrid_loss(
                    batches, weights, lam=config.subtb_lambda, robust_delta=config.robust_delta
                )
                losses["subtb"] = (subtb, config.subtb_weight)
                scalars |= {name: float(x) for name, x in diagnostics.items()}
        if config.preset == "lohp+path" and config.path_weight > 0:
            losses["path"] = (self._path_loss(), config.path_weight)
        return losses, scalars

    def _path_loss(self) -> Tensor:
        """The reward's gradient through the mean rollout (Known: reparameterised path gradient; off in `lohp`)."""
        episodes = self._episodes("path", self._share(self.config.batch_size))
        features = self._features(episodes)
        states = rollout(self.policy, features)
        losses, _ = self.bank.episode_losses(episodes, states[:, -1:], head=self.config.head, ridge=self.config.ridge)
        loss = losses.mean()
        if self.config.path_prefix_weight > 0 and self.config.policy_steps > 1:
            generator = self._generator("prefix")
            k = 1 + int(torch.randint(self.config.policy_steps - 1, (1,), generator=generator))
            early, _ = self.bank.episode_losses(
                episodes, states[:, k : k + 1], head=self.config.head, ridge=self.config.ridge
            )
            loss = (1 - self.config.path_prefix_weight) * loss + self.config.path_prefix_weight * early.mean()
        return loss

    def _segments(self, index: Tensor, features: TaskFeatures, optimizers: Tensor) -> dict:
        """Recorded, spliced and on-policy segments of this step."""
        if self.reference is None:
            raise RuntimeError("The frozen behaviour clone does not exist before the hybrid phase.")
        made = {}
        if self.config.mode != "on_policy":
            made["recorded"] = segments(
                self.policy,
                self.reference,
                self.recordings.states[index],
                self.recordings.losses[index],
                features,
                optimizers,
                self.temperature,
                self._task_indices(index),
            )
        if self.config.mode != "off_policy":
            if (self.step - self.config.cloning_steps) % self.config.on_policy_every == 0:
                self.buffer.add(self._fresh_rollouts())
            replayed = self.buffer.sample(self.config.recorded_batch_size, self._generator("replay"))
            for source, wanted in (("on_policy", False), ("spliced", True)):
                batch = [item for item in replayed if (item.prefix > 0) == wanted]
                if batch:
                    states = torch.stack([item.states for item in batch])
                    losses = torch.stack([item.losses for item in batch])
                    of = TaskFeatures.stack([item.features for item in batch])
                    # Rollouts of one support set share their features, bit for bit.
                    tasks = torch.unique(of.labels, dim=0, return_inverse=True)[1]
                    made[source] = segments(
                        self.policy, self.reference, states, losses, of, None, self.temperature, tasks
                    )
        return made

    @torch.no_grad()
    def _fresh_rollouts(self) -> list[Rollout]:
        """Score new rollouts: from no adapter, and (hybrid) spliced onto recorded prefixes of random length."""
        self.policy.eval()
        generator, config = self._generator("rollout"), self.config
        found = []
        episode = self._episodes("rollout", 1)[0]
        features = repeat_features(self._features([episode]), config.rollouts_per_task)
        states = rollout(self.policy, features, noise=1.0, generator=generator)
        found += self._scored(episode, states, features, 0)
        if config.mode == "hybrid":
            index = self.recordings.sample(1, generator, self.sampler.rows)
            name = self.recordings.tasks[int(index)]
            episode = self.sampler.whole_task_episode(name, generator)
            prefix = (
                1 + int(torch.randint(config.policy_steps - 1, (1,), generator=generator))
                if config.policy_steps > 1
                else 0
            )
            features = repeat_features(self._features([episode]), config.rollouts_per_task)
            recorded = self.recordings.states[index, : prefix + 1].expand(config.rollouts_per_task, -1, -1, -1)
            states = rollout(self.policy, features, prefix=recorded, noise=1.0, generator=generator)
            found += self._scored(episode, states, features, prefix)
        self.policy.train()
        return found

    def _scored(self, episode: Episode, states: Tensor, features: TaskFeatures, prefix: int) -> list[Rollout]:
        losses, _ = self.bank.episode_losses(
            [episode], states.flatten(0, 1)[None], head=self.config.head, ridge=self.config.ridge
        )
        losses = losses.view(states.shape[:2])
        losses = (losses / losses[:, :1].clamp(min=1e-6) if prefix == 0 else losses / self._start_loss(episode)).clamp(
            max=2.0
        )
        each = [TaskFeatures(features.set[i], features.labels[i], features.modules[i]) for i in range(len(states))]
        return [Rollout(states[i], losses[i], each[i], prefix) for i in range(len(states))]

    def _start_loss(self, episode: Episode) -> Tensor:
        zero = self.policy.scale.new_zeros(1, 1, *self.policy.config.state_shape)
        losses, _ = self.bank.episode_losses([episode], zero, head=self.config.head, ridge=self.config.ridge)
        return losses.clamp(min=1e-6)

    def _start_hybrid_phase(self) -> None:
        """Freeze the behaviour clone as the reference and set the temperature from its rollouts."""
        self.reference = copy.deepcopy(self.policy).eval().requires_grad_(False)
        decrease = float((self.recordings.losses[:, 0] - self.recordings.losses[:, -1]).clamp(min=0).mean().detach())
        floor = max(decrease / MAX_REWARD_RANGE, 1e-3)
        if self.config.mode == "off_policy" or self.config.subtb_weight == 0:
            final = self.recordings.losses[:, -1]
            spread = [
                final[[i for i, t in enumerate(self.recordings.tasks) if t == n]] for n in set(self.recordings.tasks)
            ]
            variance = torch.stack([x.var() for x in spread if len(x) > 1] or [final.var()]).mean()
            self.temperature = max(float((variance / (2 * self.config.kl_target)).sqrt()), floor)
            return
        with torch.no_grad():
            final = []
            for i in range(6):  # the same episodes in every process, so that they agree on the temperature
                episode = self.sampler.sample(self._generator("temperature", i))
                features = repeat_features(self._features([episode]), self.config.rollouts_per_task)
                states = rollout(self.reference, features, noise=1.0, generator=self._generator("temperature"))
                final.append([r.losses[-1] for r in self._scored(episode, states, features, 0)])
        losses = torch.tensor([[float(x) for x in row] for row in final])
        self.temperature = max(calibrate_temperature(losses, self.config.kl_target), floor)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean query loss and accuracy of mean rollouts on the fixed validation episodes; keeps the best weights."""
        if self.validation is None:
            raise RuntimeError("This trainer has no validation episodes.")
        bank, episodes = self.validation
        self.policy.eval()
        losses, accuracies = [], []
        for episode in episodes:
            features = self._features([episode], bank)
            final = rollout(self.policy, features)[:, -1:]
            loss, accuracy = bank.episode_losses([episode], final, head=self.config.head, ridge=self.config.ridge)
            losses.append(float(loss))
            accuracies.append(float(accuracy))
        loss = sum(losses) / len(losses)
        if loss < self.best[0]:
            self.best = (loss, self.step)
            self.best_weights = {k: v.detach().clone() for k, v in self.policy.state_dict().items()}
        return {"validation_loss": loss, "validation_accuracy": sum(accuracies) / len(accuracies)}

    def save(self, folder: Path) -> None:
        """Write everything needed to continue, atomically, without pickle."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        if self.reference is not None:
            tensors |= {f"reference.{k}": v for k, v in self.reference.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best_weights.items()}
        tensors |= {f"buffer.{k}": v for k, v in self.buffer.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        folder.mkdir(parents=True, exist_ok=True)
        name = f"state-{self.step}.safetensors"
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, folder / name)
        record = {"step": self.step, "best": list(self.best), "temperature": self.temperature, "file": name}
        record["config"] = asdict(self.config)
        temporary = folder / "state.json.tmp"
        temporary.write_text(json.dumps(record))
        os.replace(temporary, folder / "state.json")
        for old in folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, folder: Path) -> None:
        """Continue from `save`.

        Raises:
            ValueError: When the checkpoint was made with other settings, naming them with both values.
        """
        record = json.loads((folder / "state.json").read_text())
        mine = json.loads(json.dumps(asdict(self.config)))
        differ = {k: (record["config"].get(k), v) for k, v in mine.items() if record["config"].get(k) != v}
        if differ:
            raise ValueError(
                f"The checkpoint in {folder} has other settings, (checkpoint, now): {differ}. Use a new folder."
            )
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / record["file"], device=str(self.accelerator.device)).items():
            kind, _, rest = name.partition(".")
            groups.setdefault(kind, {})[rest] = tensor
        self.policy.load_state_dict(groups["policy"])
        if "reference" in groups:
            self.reference = copy.deepcopy(self.policy).eval().requires_grad_(False)
            self.reference.load_state_dict(groups["reference"])
        self.best_weights = groups.get("best", {})
        self.buffer.load_state_dict(groups.get("buffer", {}))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups.get("optimizer", {}).items():
            i, key = name.split(".", 1)
            state.setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step, self.temperature = record["step"], record["temperature"]
        self.best = (record["best"][0], int(record["best"][1]))

    def _recorded_batch(self) -> tuple[Tensor, TaskFeatures, Tensor]:
        """Recorded runs with features of fresh support draws; optimizer tokens are hidden at random."""
        generator = self._generator("recorded", self.accelerator.process_index)
        index = self.recordings.sample(self._share(self.config.recorded_batch_size), generator, self.sampler.rows)
        episodes = [self.sampler.whole_task_episode(self.recordings.tasks[int(i)], generator) for i in index]
        hidden = torch.rand(len(index), generator=generator) < self.config.optimizer_dropout
        return index, self._features(episodes), self.recordings.optimizers[index].masked_fill(hidden, 0)

    def _task_indices(self, index: Tensor) -> Tensor:
        names = sorted(set(self.recordings.tasks))
        return torch.tensor([names.index(self.recordings.tasks[int(i)]) for i in index])

    def _features(self, episodes: Sequence[Episode], bank: TaskBank | None = None) -> TaskFeatures:
        reference = self.policy.reference_tensors()
        bank = bank or self.bank
        return TaskFeatures.stack(
            [bank.features(e.support, e.support_labels, e.n_classes, reference) for e in episodes]
        )

    def _episodes(self, purpose: str, count: int) -> list[Episode]:
        first = self.accelerator.process_index * count
        return [self.sampler.sample(self._generator(purpose, first + i)) for i in range(count)]

    def _share(self, size: int) -> int:
        return max(1, size // self.accelerator.num_processes)

    def _schedule(self) -> float:
        """Warm-up and cosine decay within each phase."""
        first, cloning = self.step < self.config.cloning_steps, self.config.cloning_steps
        done, total = (self.step, cloning) if first else (self.step - cloning, self.config.training_steps)
        return min(1.0, (done + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / max(total, 1))))

    def _key(self, purpose: str, index: int = 0) -> int:
        text = f"{self.config.seed}/{self.step}/{purpose}/{index}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def _generator(self, purpose: str, index: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self._key(purpose, index))
