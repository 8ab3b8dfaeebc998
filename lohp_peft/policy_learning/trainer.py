"""Stage 2 from top to bottom: behaviour cloning, then hybrid-policy sub-trajectory balance, one Accelerate loop."""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from lohp_peft.objectives import BackwardReference, hybrid_loss, schedule_fractions
from lohp_peft.policy import LoHpPolicy, rollout
from lohp_peft.policy_learning.callbacks import LOG_EVERY, Events, training_arguments
from lohp_peft.policy_learning.checkpoint import (
    Groups,
    check_same_shapes,
    load_optimizer,
    optimizer_tensors,
    read_checkpoint,
    write_checkpoint,
)
from lohp_peft.policy_learning.config import PolicyLearningConfig
from lohp_peft.policy_learning.gradients import accumulate
from lohp_peft.policy_learning.losses import cloning_loss, divergence, segments
from lohp_peft.policy_learning.on_policy import OnPolicy, episode_features, reference_temperature
from lohp_peft.policy_learning.processes import Processes
from lohp_peft.policy_learning.recordings import Recordings
from lohp_peft.policy_learning.replay_buffer import ReplayBuffer, batches_by_source
from lohp_peft.policy_learning.sharding import placed, sharded_copy, shards_policy, whole
from lohp_peft.tasks import Episode, EpisodeSampler, TaskBank, TaskFeatures

Log = Callable[[int, Mapping[str, float]], None]


class LoHpTrainer:
    """Trains a [`LoHpPolicy`] on recordings (off-policy), rollouts (on-policy) and splices of both.

    Every random number is keyed by (seed, training step, purpose, index in the global batch): an interrupted run that
    resumes equals an uninterrupted one, bit for bit, and several processes that share a batch learn what one does, up to
    the order of sums. It computes in the type of the policy, float32 or float64.

    Args:
        policy: The policy, with space, scales and normalisers fitted.
        bank: Training tasks.
        recordings: Their recorded runs.
        sampler: Source of episodes.
        config: Settings.
        validation: Fixed validation episodes and the bank that holds their tasks, or `None`.
        accelerator: Device placement and processes; mixed precision is that of `config`.
        log: Called with the training step and its scalars, after every step.
        callbacks: The `Trainer`'s callbacks; they may ask for validation, a checkpoint, a log or the end.
        arguments: What callbacks see of the settings, with the reporters in `report_to`; made from `config` when absent.
        data: What it learns from, as JSON values by their names; a checkpoint made with other values is refused.

    Raises:
        RuntimeError: When the accelerator would take the policy apart by anything but FSDP2, or reporters are missing.

    **Attributes**:
        - **policy** (`LoHpPolicy`) -- What is trained: the given policy, or under FSDP2 a copy of which every process
          holds its part.
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
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        arguments: TrainingArguments | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator()
        self.processes, self.given = Processes(self.accelerator), policy
        self.sharded = shards_policy(self.accelerator)
        self.policy = self._copy(policy) if self.sharded else policy.to(self.accelerator.device)
        self.bank, self.recordings = bank, recordings.to(self.accelerator.device, policy.dtype)
        self.sampler, self.config, self.data = sampler, config, dict(data or {})
        self.validation, self.log = validation, log or (lambda step, scalars: None)
        self.reference: LoHpPolicy | BackwardReference | None = None
        self.reference_loss = math.inf  # validation loss at which the reference was taken
        self.temperature = float("nan")
        self.on_policy = OnPolicy(self.policy, bank, self.recordings, sampler, config)
        self.buffer = ReplayBuffer(config.buffer_size)
        self.step, self.best = 0, (math.inf, -1)
        self.extended_at: list[int] = []  # steps of the hybrid phase at which it was given more of them
        self.total_steps = config.cloning_steps + config.hybrid_steps
        network = self.policy.forward_network
        groups = [
            {"params": network.gate_parameters(), "lr": config.learning_rate},
            {"params": network.free_parameters(), "lr": config.free_learning_rate},
            {"params": list(self.policy.log_flow_network.parameters()), "lr": config.log_flow_learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups)  # Accelerate's takes no steps after a loop left amid an accumulation
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.best_weights: dict[str, Tensor] = {}
        arguments = arguments or training_arguments(config, self.accelerator, "trainer_output")
        self.events = Events(
            callbacks, arguments, self.policy, self.optimizer, self.accelerator, config, self.total_steps
        )

    def train(self, folder: Path | None = None) -> LoHpPolicy:
        """Run to the end, from the checkpoint in `folder` when there is one, and load the best validated weights.

        A run that a callback stopped, as at the end of the time it was given, goes on where it stopped. One that ended goes
        on when `training_steps` is larger now, at the learning rates of the longer run (Ours: as the `Trainer` does).

        Returns:
            The policy that was given, with these weights.
        """
        if folder is not None and (folder / "state.json").is_file():
            self.load(folder)
        self.processes.agree(self.step, "The training step to continue from (a checkpoint that all of them can read)")
        self.events.at(self.step)
        self.events("train_begin")
        self.events("epoch_begin")
        while self.step < self.total_steps and not self.events.control.should_training_stop:
            self._one_step(folder)
        self.events("epoch_end")
        if self.best_weights:
            self.policy.load_state_dict(self.best_weights)
        self.events("train_end")
        if self.sharded:
            self.given.to(self.accelerator.device).load_state_dict(whole(self.policy.state_dict()))
        return self.given.eval()

    def _one_step(self, folder: Path | None) -> None:
        """A training step and what is due after it."""
        config, events = self.config, self.events
        if self.step == config.cloning_steps and self.reference is None:
            self._start_hybrid_phase()
        events("step_begin")
        scalars = self.training_step()
        self.step += 1
        events.at(self.step)
        events("step_end")
        last = self.step == self.total_steps
        validates = self.step % config.validate_every == 0 or last or events.control.should_evaluate
        if self.validation is not None and validates:
            scores = self.validate()
            scalars |= scores | self._refresh_reference(scores["validation_loss"])
            events.validated(scores, self.best)
        last = last or events.control.should_training_stop
        self.log(self.step, scalars)
        if self.step % LOG_EVERY == 0 or "validation_loss" in scalars or last or events.control.should_log:
            events.log(scalars)
        last = last or events.control.should_training_stop
        if folder is not None and (self.step % config.save_every == 0 or last or events.control.should_save):
            self.save(folder)
            events("save")

    def training_step(self) -> dict[str, float]:
        """The losses and diagnostics, by name, of one training step, which is taken."""
        self.policy.train()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.config.learning_rate_share(self.step)
        mixed = self.config.mixed_precision == "bf16"
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=mixed):
            losses, scalars = self._cloning_phase() if self.reference is None else self._hybrid_phase()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        scalars |= accumulate(losses, parameters, self.config.max_grad_norm, self.processes, self.step)
        self.events("pre_optimizer_step")
        self.optimizer.step()
        self.events("optimizer_step")
        return scalars

    def _cloning_phase(self) -> tuple[dict[str, tuple[Tensor, float]], dict[str, float]]:
        return {"cloning": (self._cloning_loss(*self._recorded_batch()), 1.0)}, {}

    def _hybrid_phase(self) -> tuple[dict[str, tuple[Tensor, float]], dict[str, float]]:
        config = self.config
        scalars: dict[str, float] = {}
        index, features, optimizers = self._recorded_batch()
        losses = {"cloning": (self._cloning_loss(index, features, optimizers), config.cloning_weight)}
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

    def _cloning_loss(self, index: Tensor, features: TaskFeatures, optimizers: Tensor) -> Tensor:
        mine = self.processes.mine(len(index))
        states, noise = self.recordings.states[index[mine]], self._generators("noise", mine)
        with self.policy.dropout_from(self._generators("dropout", mine)):
            losses = cloning_loss(self.policy, states, features, optimizers, noise)
        return self.processes.gather(losses, len(index)).mean()

    def _calibrated_losses(self, bank: TaskBank, episodes: Sequence[Episode], states: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return bank.episode_losses(episodes, states, head=config.head, ridge=config.ridge, calibrated=True)

    def _path_loss(self) -> Tensor:
        """The gradient of the calibrated query loss through the mean rollout (Known: path gradient; off in `lohp`).

        The reward of SubTB stays at the fixed temperature that recordings were scored at.
        """
        size = self.config.batch_size
        mine = self.processes.mine(size)
        episodes = [self.sampler.sample(generator) for generator in self._generators("path", mine)]
        with self.policy.dropout_from(self._generators("path_dropout", mine)):
            states = rollout(self.policy, self._features(episodes))
        losses, _ = self._calibrated_losses(self.bank, episodes, states[:, -1:])
        loss = self.processes.gather(losses, size).mean()
        if self.config.path_prefix_weight > 0 and self.config.policy_steps > 1:
            generator = self._generator("prefix")
            k = 1 + int(torch.randint(self.config.policy_steps - 1, (1,), generator=generator))
            early, _ = self._calibrated_losses(self.bank, episodes, states[:, k : k + 1])
            early = self.processes.gather(early, size).mean()
            loss = (1 - self.config.path_prefix_weight) * loss + self.config.path_prefix_weight * early
        return loss

    def _segments(self, index: Tensor, features: TaskFeatures, optimizers: Tensor) -> dict:
        """Recorded, spliced and on-policy segments of this step."""
        if self.reference is None:
            raise RuntimeError("There is no reference before the hybrid phase.")
        made = {}
        balance = partial(
            segments, self.policy, self.reference, temperature=self.temperature, processes=self.processes
        )
        if self.config.mode != "on_policy":
            states, losses = self.recordings.states[index], self.recordings.losses[index]
            tasks = self.recordings.task_indices(index)
            made["recorded"] = balance(states, losses, features, optimizers, tasks=tasks)
        if self.config.mode != "off_policy":
            if (self.step - self.config.cloning_steps) % self.config.on_policy_every == 0:
                self.policy.eval()
                self.buffer.add(self.on_policy.fresh(self._generator("rollout"), splice=self.config.mode == "hybrid"))
                self.policy.train()
            replayed = self.buffer.sample(self.config.recorded_batch_size, self._generator("replay"))
            for source, batch in batches_by_source(replayed, self.processes.mine):
                made[source] = balance(batch.states, batch.losses, batch.features, None, tasks=batch.tasks)
        return made

    def _start_hybrid_phase(self) -> None:
        """Take the reference: freeze the behaviour clone, or fit a backward policy on the recordings."""
        if self.validation is not None:
            self.reference_loss = self._validation_scores()["validation_loss"]
        if self.config.reference == "backward":
            self._set_reference(BackwardReference.fit(self.recordings.states, self.policy.state_mask))
        else:
            self._set_reference(self._clone())

    def _copy(self, policy: LoHpPolicy) -> LoHpPolicy:
        return sharded_copy(policy, self.accelerator) if self.sharded else copy.deepcopy(policy)

    def _clone(self) -> LoHpPolicy:
        return self._copy(self.policy).eval().requires_grad_(False)

    def _set_reference(self, reference: LoHpPolicy | BackwardReference) -> None:
        """The reference and the temperature that follows from it."""
        self.reference = reference
        self.temperature = reference_temperature(
            self.on_policy, reference, lambda i: self._generator("temperature", i)
        )

    def _refresh_reference(self, validation_loss: float) -> dict[str, float]:
        """Take the clone anew once the policy is better than at the last taking and far from it.

        The optimum of the relative form is the clone tilted by the reward; starting again from a better clone tilts it
        further without a temperature so small that residuals explode (Ours: iterated, that is mirror descent).
        """
        if self.validation is None or not isinstance(self.reference, LoHpPolicy) or self.config.subtb_weight == 0:
            return {}
        bank, episodes = self.validation[0], self.validation[1][:8]
        self.policy.eval()
        mine = [episodes[i] for i in self.processes.mine(len(episodes))]
        found = divergence(self.policy, self.reference, self._features(mine, bank))
        nats = float(self.processes.gather(found, len(episodes)).mean())
        if not (validation_loss < self.reference_loss and nats > self.config.refresh_kl):
            return {"divergence": nats}
        self.reference_loss = validation_loss
        for parameter in self.policy.log_flow_network.out.parameters():
            parameter.data.zero_()
            self.optimizer.state.pop(parameter, None)
        self._set_reference(self._clone())
        return {"divergence": nats, "refreshed": 1.0, "temperature": self.temperature}

    def validate(self) -> dict[str, float]:
        """The mean query loss and accuracy of mean rollouts on the fixed validation episodes; keeps the best weights."""
        scores = self._validation_scores()
        if scores["validation_loss"] < self.best[0]:
            self.best = (scores["validation_loss"], self.step)
            self.best_weights = {k: v.detach().clone() for k, v in self.policy.state_dict().items()}
        return scores

    @torch.no_grad()
    def _validation_scores(self) -> dict[str, float]:
        if self.validation is None:
            raise RuntimeError("This trainer has no validation episodes.")
        bank, episodes = self.validation
        self.policy.eval()
        found = []
        for i in self.processes.mine(len(episodes)):
            final = rollout(self.policy, self._features([episodes[i]], bank))[:, -1:]
            found.append(torch.stack([x.view(()) for x in self._calibrated_losses(bank, [episodes[i]], final)]))
        loss, accuracy = self.processes.gather(torch.stack(found), len(episodes)).double().mean(0).tolist()
        return {"validation_loss": loss, "validation_accuracy": accuracy}

    def save(self, folder: Path) -> None:
        """Write everything needed to continue into `folder`, atomically, without pickle; tensors in full."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "policy": self.policy.state_dict(),
            "best": self.best_weights,
            "buffer": self.buffer.state_dict(),
        }
        if isinstance(self.reference, BackwardReference):
            groups["reference"] = self.reference.to_tensors()
        elif self.reference is not None:
            groups["reference"] = self.reference.state_dict()
        groups["optimizer"] = optimizer_tensors(self.optimizer)
        groups = {name: whole(tensors) for name, tensors in groups.items()}
        if not self.accelerator.is_main_process:
            return
        record = {"best": list(self.best), "temperature": self.temperature, "reference_loss": self.reference_loss}
        record |= {"config": asdict(self.config), "data": self.data, "events": self.events.record()}
        record["extended_at"] = self.extended_at
        write_checkpoint(folder, self.step, groups, record)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote into `folder`.

        Raises:
            ValueError: When the checkpoint is damaged, or was made with other settings but for fewer `training_steps`, from
                other data or for another policy, naming both sides.
        """
        groups, record = read_checkpoint(folder, asdict(self.config), self.data, str(self.accelerator.device))
        clones = {"best", "reference"} if self.config.reference == "clone" else {"best"}
        state, policies = self.policy.state_dict(), {"policy", *(clones & groups.keys())}
        check_same_shapes(folder, groups, state, policies)
        groups |= {name: placed(groups[name], state) for name in policies}
        self.policy.load_state_dict(groups["policy"])
        self._load_reference(groups)
        self.best_weights = groups.get("best", {})
        self.buffer.load_state_dict(groups.get("buffer", {}))
        load_optimizer(self.optimizer, groups.get("optimizer", {}))
        self.step, self.temperature = record["step"], record["temperature"]
        self.best, self.reference_loss = (record["best"][0], int(record["best"][1])), record["reference_loss"]
        self.extended_at = record["extended_at"]
        self.events.restore(record["events"])
        if self.best_weights:
            self.events.best(self.best)

    def _load_reference(self, groups: Groups) -> None:
        if "reference" not in groups:
            return
        if self.config.reference == "backward":
            self.reference = BackwardReference.from_tensors(groups["reference"])
            return
        self.reference = self._clone()
        self.reference.load_state_dict(groups["reference"])

    def _recorded_batch(self) -> tuple[Tensor, TaskFeatures, Tensor]:
        """Recorded runs; of this process's, features of fresh support draws and optimizers, hidden at random."""
        size = self.config.recorded_batch_size
        index = self.recordings.sample(size, self._generator("recorded"), self.sampler.rows)
        mine = self.processes.mine(size)
        runs, generators = index[mine], self._generators("support", mine)
        names = [self.recordings.tasks[int(i)] for i in runs]
        episodes = [self.sampler.whole_task_episode(name, g) for name, g in zip(names, generators, strict=True)]
        hidden = torch.stack([torch.rand((), generator=g) for g in generators]) < self.config.optimizer_dropout
        hidden = hidden.to(self.recordings.optimizers.device)
        return index, self._features(episodes), self.recordings.optimizers[runs].masked_fill(hidden, 0)

    def _features(self, episodes: Sequence[Episode], bank: TaskBank | None = None) -> TaskFeatures:
        return episode_features(self.policy, bank or self.bank, episodes)

    def _generator(self, purpose: str, index: int = 0) -> torch.Generator:
        text = f"{self.config.seed}/{self.step}/{purpose}/{index}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))

    def _generators(self, purpose: str, indices: Sequence[int]) -> list[torch.Generator]:
        return [self._generator(purpose, i) for i in indices]
