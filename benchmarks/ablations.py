"""What each part of policy learning is worth: `python benchmarks/ablations.py WORK_FOLDER --trajectories FOLDER`.

Each cell (variant, seed) trains a policy on the same recordings, one thing changed, and scores its mean rollouts on the
validation episodes: calibrated query loss, accuracy, sharpness. Preset `lohp` unless the variant says otherwise: its objective
alone, without the pathwise term, which is stronger than everything else and would hide it. No test task is used. A run
that was stopped is continued by the same command.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from setting import RESULTS, check_settings, environment, load_base_model, with_interval, write_json
from splits import split_of

from lohp_peft import LoHpPolicy, PolicyLearningConfig, TrajectoryDataset
from lohp_peft.policy import rollout
from lohp_peft.policy_learning import LoHpTrainer, Recordings, build_policy
from lohp_peft.tasks import (
    Episode,
    EpisodeSampler,
    TaskBank,
    TaskFeatures,
    TextEncoder,
    contrast_groups,
    task_features,
)

SHARPNESS_RADIUS = 0.3
"""Length of the perturbations behind the sharpness, over the length of the adapter."""


@dataclass(frozen=True)
class Variant:
    """What is changed: settings of policy learning, which recordings it gets, how it is rolled out."""

    about: str
    settings: dict[str, Any] = field(default_factory=dict)
    optimizers: tuple[str, ...] = ()
    tasks: int | None = None
    trained_as: str | None = None
    token: str | None = None
    closed_loop: bool = False


VARIANTS = {
    "lohp": Variant("hybrid, lambda 1, 4 policy steps, all optimizers and tasks"),
    "behaviour_cloning": Variant("no SubTB, as many steps of cloning", {"preset": "behaviour_cloning"}),
    "final_weights": Variant("one policy step, to the final weights", {"policy_steps": 1}),
    "straight_line": Variant("4 policy steps along a line to the final weights", {"final_weights_only": True}),
    "off_policy": Variant("recorded segments only", {"mode": "off_policy"}),
    "on_policy": Variant("own segments only", {"mode": "on_policy"}),
    "lambda_0": Variant("detailed balance", {"subtb_lambda": 0.0}),
    "lambda_0.9": Variant("", {"subtb_lambda": 0.9}),
    "lambda_2": Variant("", {"subtb_lambda": 2.0}),
    "lambda_inf": Variant("trajectory balance", {"subtb_lambda": float("inf")}),
    "steps_2": Variant("2 policy steps", {"policy_steps": 2}),
    "steps_6": Variant("6 policy steps, all that is recorded", {"policy_steps": 6}),
    "backward_reference": Variant("a fitted backward policy in the place of the clone", {"reference": "backward"}),
    "adamw_only": Variant("recordings of AdamW", optimizers=("adamw",)),
    "sam_only": Variant("recordings of SAM", optimizers=("sam",)),
    "tasks_10": Variant("10 training tasks", tasks=10),
    "tasks_30": Variant("30 training tasks", tasks=30),
    "token_adamw": Variant("lohp asked to imitate AdamW", trained_as="lohp", token="adamw"),
    "token_sam": Variant("lohp asked to imitate SAM", trained_as="lohp", token="sam"),
    "closed_loop": Variant("lohp, features measured again at every step", trained_as="lohp", closed_loop=True),
}
"""By the name in results; the first is what the others are compared with."""


@dataclass
class World:
    """What all cells share: encoded tasks, recordings and validation episodes."""

    encoder: TextEncoder
    dataset: TrajectoryDataset
    bank: TaskBank
    held_out: TaskBank
    groups: list[list[str]]
    episodes: list[Episode]

    @classmethod
    def load(cls, trajectories: Path, base_model: str, rows_per_task: int, episodes: int) -> "World":
        dataset = TrajectoryDataset.open(trajectories)
        model, tokenizer = load_base_model(base_model, "eager")
        encoder = TextEncoder(model, tokenizer, dataset.space, max_length=64, dtype=torch.bfloat16)
        split = split_of("validation")
        tasks, validation = split.training_tasks(), split.validation_tasks()
        bank, held_out = (TaskBank(encoder, rows_per_task=rows_per_task) for _ in range(2))
        for side, members in ((bank, tasks), (held_out, validation)):
            for task in members:
                side.add(task)
        source = EpisodeSampler(held_out.labels, contrast_groups(validation), contrast=0.2)
        generator = torch.Generator().manual_seed(0)
        return cls(
            encoder,
            dataset,
            bank,
            held_out,
            contrast_groups(tasks),
            [source.sample(generator) for _ in range(episodes)],
        )

    def train(self, variant: Variant, seed: int, settings: dict[str, Any]) -> LoHpPolicy:
        """A policy from the recordings that the variant gets."""
        config = PolicyLearningConfig(**{"preset": "lohp", "seed": seed, **settings, **variant.settings})
        if config.preset == "behaviour_cloning":
            config.cloning_steps += config.training_steps
        names = sorted({run.task for run in self.dataset})
        chosen = set(_some(names, variant.tasks, seed))
        runs = [
            run
            for run in self.dataset
            if run.task in chosen and (not variant.optimizers or run.optimizer in variant.optimizers)
        ]
        labels = {name: labels for name, labels in self.bank.labels.items() if variant.tasks is None or name in chosen}
        groups = [kept for group in self.groups if len(kept := [name for name in group if name in labels]) > 1]
        sampler = EpisodeSampler(labels, groups, contrast=config.contrast)
        recordings = Recordings.from_trajectories(runs, config.policy_steps, config.final_weights_only)
        policy = build_policy(self.encoder, self.bank, recordings, sampler, self.dataset, config)
        return LoHpTrainer(policy, self.bank, recordings, sampler, config).train()

    @torch.no_grad()
    def score(self, policy: LoHpPolicy, variant: Variant) -> dict[str, Any]:
        """Means over the validation episodes, and the loss of each."""
        reference, rows = policy.reference_tensors(), []
        optimizer = None
        if variant.token is not None:
            optimizer = torch.tensor([policy.config.optimizers.index(variant.token) + 1])
        for number, episode in enumerate(self.episodes):
            given = episode.known_labels, episode.n_classes, reference
            features = TaskFeatures.stack([self.held_out.features(episode.known, *given)])
            measure = self._measure(episode, reference) if variant.closed_loop else None
            state = rollout(policy, features, optimizer=optimizer, measure=measure)[:, -1:]
            noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(number)) * policy.state_mask
            noise = noise * (SHARPNESS_RADIUS * state.norm() / noise.norm())
            states = torch.cat([state, state + noise, state - noise], 1)
            losses, accuracies = self.held_out.episode_losses(
                [episode], states, head=policy.config.head, ridge=policy.config.ridge, calibrated=True
            )
            sharpness = losses[0, 1:].mean() - losses[0, 0]
            rows.append((float(losses[0, 0]), float(accuracies[0, 0]), float(sharpness)))
        means = dict(zip(("loss", "accuracy", "sharpness"), map(fmean, zip(*rows, strict=True)), strict=True))
        return {**means, "losses": [row[0] for row in rows]}

    def _measure(self, episode: Episode, reference) -> Callable[[torch.Tensor, int], TaskFeatures]:
        encoded = self.held_out.gather(episode.known)

        def measure(states: torch.Tensor, _step: int) -> TaskFeatures:
            statistics = self.encoder.statistics(encoded, states[0])
            return TaskFeatures.stack([task_features(statistics, episode.known_labels, episode.n_classes, reference)])

        return measure


def _some(names: Sequence[str], count: int | None, seed: int) -> list[str]:
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return [names[i] for i in order[:count]]


def summarise(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By variant: means over seeds, and its loss minus that of the first at the same seeds, paired by episode."""
    grouped: dict[str, dict[str, dict[str, Any]]] = {}
    for key, cell in cells.items():
        name, seed = key.rsplit("-", 1)
        grouped.setdefault(name, {})[seed] = cell
    first = grouped.get(next(iter(VARIANTS)), {})
    made = {}
    for name in (name for name in VARIANTS if name in grouped):
        each = grouped[name]
        made[name] = {
            key: fmean(x[key] for x in each.values()) for key in ("loss", "accuracy", "sharpness", "minutes")
        }
        made[name] |= {"about": VARIANTS[name].about, "seeds": len(each)}
        if each is not first and (shared := sorted(each.keys() & first.keys())):
            mine, theirs = (np.mean([x[seed]["losses"] for seed in shared], axis=0) for x in (each, first))
            less = (mine - theirs).tolist()
            made[name]["loss_minus_first"] = {**with_interval(less), "seeds": len(shared)}
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the finished cells")
    parser.add_argument("--trajectories", type=Path, required=True, help="recordings of the training tasks")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--cloning-steps", type=int, default=120)
    parser.add_argument("--training-steps", type=int, default=300)
    parser.add_argument("--rows-per-task", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=96, help="validation episodes")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "ablations.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    learning = {
        "cloning_steps": options.cloning_steps,
        "training_steps": options.training_steps,
        "on_policy_every": 25,
        "rows_per_task": options.rows_per_task,
    }
    settings = {**learning, "episodes": options.episodes}
    check_settings(options.work, settings)
    world: World | None = None
    cells = {file.stem: json.loads(file.read_text()) for file in sorted((options.work / "cells").glob("*.json"))}
    for seed in options.seeds:
        for name in options.variants:
            key, variant = f"{name}-{seed}", VARIANTS[name]
            if key in cells:
                continue
            world = world or World.load(
                options.trajectories, options.base_model, options.rows_per_task, options.episodes
            )
            start, trained = time.perf_counter(), f"{variant.trained_as or name}-{seed}"
            policy = trained_policy(world, variant, seed, learning, options.work / "policies" / trained)
            minutes = (time.perf_counter() - start) / 60
            cells[key] = {**world.score(policy, variant), "minutes": minutes}
            write_json(options.work / "cells" / f"{key}.json", cells[key])
            print(f"{key:24} loss {cells[key]['loss']:.3f}  accuracy {100 * cells[key]['accuracy']:.1f} %", flush=True)
    result = {
        "benchmark": "ablations",
        "settings": {**settings, "sharpness_radius": SHARPNESS_RADIUS},
        "environment": environment(),
        "variants": summarise(cells),
    }
    write_json(options.output, result)


def trained_policy(world: World, variant: Variant, seed: int, settings: dict[str, Any], folder: Path) -> LoHpPolicy:
    """The policy of a cell, trained once for all cells that roll the same one out."""
    if (folder / "config.json").is_file():
        return LoHpPolicy.from_pretrained(folder)
    trained = VARIANTS[variant.trained_as] if variant.trained_as else variant
    policy = world.train(trained, seed, settings)
    policy.save_pretrained(folder)
    return policy


if __name__ == "__main__":
    main()
