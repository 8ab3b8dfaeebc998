"""Training a method of the comparison: its tasks, episodes, recordings and budget, and the file it ends in."""

import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from methods import METHODS, Setting, Training
from methods.unfinished import minutes
from safetensors.torch import save_file
from setting import encoder_of, load_base_model, load_subject
from splits import Split, split_of

from lohp_peft.tasks import EpisodeSampler, TaskBank, contrast_groups
from lohp_peft.trajectories import TrajectoryDataset


@dataclass(frozen=True)
class Budget:
    """What every trained method may spend: query losses of `steps * batch_size` episodes through the base model."""

    steps: int = 600
    batch_size: int = 6
    validate_every: int = 100
    validation_episodes: int = 96
    rows_per_task: int = 300


@cache
def load_setting(policy: str, base_model: str, device: str = "cpu") -> Setting:
    """Loaded once in every process; the base model on `device`, the policy, and what a method trains, on the CPU."""
    policy, model, tokenizer = load_subject(policy, base_model)
    return Setting(policy, encoder_of(policy, model.to(device), tokenizer))


def training_of(
    setting: Setting,
    encoder,
    split: Split,
    budget: Budget,
    seed: int,
    recordings: tuple[list[str], torch.Tensor] | None = None,
) -> Training:
    """Training tasks, episodes and validation episodes, as in policy learning."""
    sides = []
    for tasks, contrast in ((split.training_tasks(), 0.3), (split.validation_tasks(), 0.2)):
        bank = TaskBank(encoder, rows_per_task=budget.rows_per_task)
        for task in tasks:
            bank.add(task)
        sides.append((bank, EpisodeSampler(bank.labels, contrast_groups(tasks), contrast=contrast)))
    (bank, sampler), (validation, source) = sides
    generator = torch.Generator().manual_seed(0)
    episodes = [source.sample(generator) for _ in range(budget.validation_episodes)]
    steps = (budget.steps, budget.batch_size, budget.validate_every)
    return Training(setting, bank, sampler, (validation, episodes), seed, *steps, recordings)


def recordings_of(trajectories: Path, setting: Setting) -> tuple[list[str], torch.Tensor]:
    """Task of each recorded run and its adapters at the policy's knots, (runs, knots, modules, width)."""
    dataset, policy = TrajectoryDataset.open(trajectories), setting.policy
    dataset.check_matches(space=policy.space, base_fingerprint=policy.config.base_fingerprint)
    runs = [run for run in dataset if run.states.isfinite().all()]
    paths = [run.knots(policy.config.policy_steps).states.float() for run in runs]
    return [run.task for run in runs], torch.stack(paths)


def fit(
    name: str,
    seed: int,
    split: str,
    budget: Budget,
    subject: tuple[str, str, str],
    trajectories: Path | None,
    target: Path,
) -> str:
    """Train one method on policy, base model and device, and keep its tensors and its cost.

    Until it is done it is kept at every validation in a folder beside the target; a training that was stopped goes on there.
    """
    setting, device = load_setting(*subject), subject[2]
    model, tokenizer = load_base_model(subject[1], "eager")
    encoder = encoder_of(setting.policy, model.to(device), tokenizer, torch.bfloat16)
    recordings = recordings_of(trajectories, setting) if trajectories else None
    folder = target.with_suffix(".unfinished")
    training = training_of(setting, encoder, split_of(split), budget, seed, recordings)
    tensors = METHODS[name].fit(replace(training, folder=folder))
    tensors["minutes"] = torch.tensor(minutes(folder))
    part = target.with_suffix(".part")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part)
    part.replace(target)
    shutil.rmtree(folder)
    return target.stem
