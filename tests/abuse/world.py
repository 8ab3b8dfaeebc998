"""One good file of every format that is read, and every way to read it."""

import gzip
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console
from typer.testing import CliRunner

from lohp_peft.adapters import base_model_fingerprint
from lohp_peft.adapters.export import GenerationRecord, plain_lora_config, save_plain_lora
from lohp_peft.adapters.importing import read_plain_lora
from lohp_peft.cards import adapter_card_of, policy_card_of
from lohp_peft.cli.main import app
from lohp_peft.cli.overrides import read_config
from lohp_peft.config import read_support_file
from lohp_peft.hub import check_folder
from lohp_peft.policy import LoHpPolicy
from lohp_peft.policy_learning import LoHpTrainer, PolicyLearningConfig, train_policy
from lohp_peft.tasks import Task, TextEncoder
from lohp_peft.tasks.task import Examples
from lohp_peft.trajectories import TrajectoryDataset
from lohp_peft.trajectories.importing import import_checkpoints
from lohp_peft.weight_preparation import WeightPreparationConfig, prepare_trajectories
from lohp_peft.weight_preparation.snapshots import SnapshotStore
from policy_learning.conftest import TASKS, build_trajectory, tiny_config
from tiny import build_base_model, build_encoder, build_policy, build_tokenizer

SIGNATURE = "[]"
ADAPTED, RANK = [1, 2], 2
STAGE_1 = WeightPreparationConfig(
    optimizers=("sgd",), seeds=(0, 1), optimizer_steps=4, record_every=2, rows_per_task=24, score_query_rows=6
)
STAGE_2 = tiny_config(cloning_steps=2, training_steps=2, validate_every=4)


@dataclass(frozen=True)
class World:
    """A folder with a good file of every format, and what is needed to read them.

    Args:
        folder: Holds base, tasks (spam.jsonl and others), tasks.json, settings.yaml, store, policy, adapter, run, trained and
            snapshots.
        encoder: Encoder of the base model.
        trainer: A trainer that can continue the checkpoint in `trained`.
    """

    folder: Path
    encoder: TextEncoder
    trainer: LoHpTrainer


def rows_of(task: Task) -> list[dict[str, Any]]:
    examples = task.examples
    names = [examples.label_names[y] for y in examples.labels]
    splits = ["test" if i % 4 == 3 else "train" for i in range(len(names))]
    rows = zip(examples.texts, names, splits, strict=True)
    return [{"text": text, "label": label, "split": split} for text, label, split in rows]


def create_store(folder: Path, encoder: TextEncoder) -> TrajectoryDataset:
    fingerprint = base_model_fingerprint(encoder.base_model)
    return TrajectoryDataset.create(
        folder, space=encoder.space, base_fingerprint=fingerprint, base_model_name="someone/tiny"
    )


def prepare(encoder: TextEncoder, folder: Path) -> TrajectoryDataset:
    """Stage 1 at toy size."""
    return prepare_trajectories(TASKS, encoder, folder, STAGE_1, console=Console(quiet=True))


def train(encoder: TextEncoder, store: Path, folder: Path, **changes: Any) -> LoHpPolicy:
    """Stage 2 at toy size."""
    dataset = TrajectoryDataset.open(store)
    config = PolicyLearningConfig(**{**STAGE_2.__dict__, **changes})
    return train_policy(TASKS, encoder, dataset, folder, config, console=Console(quiet=True))


def build_world(folder: Path) -> World:
    encoder = build_encoder(adapted=ADAPTED, r=RANK)
    encoder.base_model.save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    for task in TASKS:
        lines = "\n".join(map(json.dumps, rows_of(task)))
        (folder / f"{task.name}.jsonl").write_text(lines)
    (folder / "spam.jsonl.gz").write_bytes(gzip.compress((folder / "spam.jsonl").read_bytes()))
    (folder / "tasks.json").write_text(json.dumps({"spam": {"family": "spam", "licence": "MIT"}}))
    settings = {"cloning_steps": 2, "training_steps": 1, "preset": "lohp", "learning_rate": 0.01}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    store = create_store(folder / "store", encoder)
    for seed, task in enumerate(TASKS):
        store.append(task.name, [build_trajectory(encoder.space, task.name, seed=seed, time=4)], {"rows": [seed]})
    build_policy(encoder, TASKS).save_pretrained(folder / "policy")
    adapter = encoder.space.decode(store["spam"][0].states[-1])
    record = GenerationRecord({"label_names": ["a", "b"], "policy": "p", "pooling": "mean"}, {"weight": torch.eye(2)})
    names = [spec.name for spec in encoder.space.layout.modules]
    save_plain_lora(folder / "adapter", adapter, plain_lora_config("someone/tiny", names, RANK), record=record)
    for step in (1, 2):
        config = LoraConfig(r=RANK, target_modules=names, init_lora_weights=False)
        get_peft_model(build_base_model(3), config).save_pretrained(folder / "run" / f"checkpoint-{step}")
    trainer = remember_trainer(lambda: train(encoder, folder / "store", folder / "trained"))
    snapshots = SnapshotStore(folder / "snapshots")
    snapshots.flush({0: torch.zeros(6), 2: torch.ones(6)}, follows=-1, signature=SIGNATURE)
    snapshots.flush({4: torch.ones(6)}, follows=2, signature=SIGNATURE)
    return World(folder, encoder, trainer)


def remember_trainer(training) -> LoHpTrainer:
    """The trainer that a call of `training` made."""
    found, keep = [], LoHpTrainer.train
    LoHpTrainer.train = lambda self, folder=None: found.append(self) or keep(self, folder)
    try:
        training()
    finally:
        LoHpTrainer.train = keep
    return found[0]


def skipping(folder: Path) -> TrajectoryDataset:
    """What is left of a damaged store; fewer than three shards are expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TrajectoryDataset.open(folder, on_damage="skip")


def command(verb: str, *line: str):
    """A call of the command line in this process; what it raises is in the result."""
    return lambda world: CliRunner().invoke(app, [verb, *(word.format(world=world.folder) for word in line)])


_BASE, _TASK = ("--base-model", "{world}/base"), ("--task", "{world}/spam.jsonl")
_PREPARE = ("prepare", *_BASE, *_TASK, "--output", "{world}/new", "--r", "2", "--target-modules", "query", "--dry-run")
_TASKS = tuple(word for task in TASKS for word in ("--task", f"{{world}}/{task.name}.jsonl"))
_TRAIN = ("train", *_BASE, *_TASKS, "--trajectories", "{world}/store", "--output", "{world}/new", "--dry-run")

READ = {
    "store": lambda world: TrajectoryDataset.open(world.folder / "store"),
    "rest of store": lambda world: skipping(world.folder / "store"),
    "policy": lambda world: LoHpPolicy.from_pretrained(world.folder / "policy"),
    "adapter": lambda world: read_plain_lora(world.folder / "adapter"),
    "run": lambda world: import_checkpoints(world.folder / "run", world.encoder.space, "spam"),
    "checkpoint": lambda world: world.trainer.load(world.folder / "trained" / "checkpoint"),
    "snapshots": lambda world: SnapshotStore(world.folder / "snapshots").load(4, SIGNATURE),
    "task": lambda world: Task.from_jsonl(world.folder / "spam.jsonl").draw_support(2, 0),
    "gzipped task": lambda world: Task.from_jsonl(world.folder / "spam.jsonl.gz"),
    "support": lambda world: Examples.from_rows(read_support_file(str(world.folder / "spam.jsonl"))),
    "settings": lambda world: read_config(PolicyLearningConfig, world.folder / "settings.yaml"),
    "folder to push": lambda world: check_folder(world.folder / "adapter"),
    "policy to push": lambda world: check_folder(world.folder / "policy"),
    "store to push": lambda world: check_folder(world.folder / "store"),
    "adapter card": lambda world: adapter_card_of(world.folder / "adapter"),
    "policy card": lambda world: policy_card_of(world.folder / "policy"),
}
"""Calls of the Python interface."""

COMMANDS = {
    "lohp-peft generate": command(
        "generate", *_BASE, *_TASK, "--policy", "{world}/policy", "--shots", "2", "--output", "{world}/new"
    ),
    "lohp-peft evaluate": command(
        "evaluate", *_BASE, *_TASK, "--policy", "{world}/policy", "--shots", "2", "--draws", "1", "--json", "-"
    ),
    "lohp-peft prepare": command(*_PREPARE),
    "lohp-peft train": command(*_TRAIN),
    "lohp-peft train --config": command(*_TRAIN, "--config", "{world}/settings.yaml"),
    "lohp-peft push": command("push", "{world}/adapter", "me/task", "--dry-run"),
    "lohp-peft push policy": command("push", "{world}/policy", "me/policy", "--dry-run"),
}
"""Verbs of the command line."""


def content_of(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder with its content, but for locks."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or (path.is_file() and path.name != ".lock")
    }
