"""Stage 2 as one call: recorded trajectories in, a policy folder out."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from lohp_peft.adapters import AdapterLayout, base_model_fingerprint
from lohp_peft.cards import is_hub_id
from lohp_peft.files import write_atomically
from lohp_peft.policy import LoHpPolicy, LoHpPolicyConfig, ReferenceSet
from lohp_peft.policy_learning.callbacks import LOG_EVERY, reporters, training_arguments
from lohp_peft.policy_learning.config import PolicyLearningConfig
from lohp_peft.policy_learning.gradients import precision_of
from lohp_peft.policy_learning.processes import only_writer
from lohp_peft.policy_learning.recordings import Recordings, fit_scales
from lohp_peft.policy_learning.sources import check_sources, sources_record
from lohp_peft.policy_learning.trainer import LoHpTrainer
from lohp_peft.progress import Work
from lohp_peft.tasks import (
    EpisodeSampler,
    Task,
    TaskBank,
    TaskFeatures,
    TextEncoder,
    contrast_groups,
    fit_reference,
    reading_fingerprint,
    tokenizer_fingerprint,
)
from lohp_peft.tasks.requirements import check_gradients, frozen
from lohp_peft.trajectories import TrajectoryDataset

LOG_FILE = "log.jsonl"
REFERENCE_SHOTS = 16
NORMALIZER_EPISODES = 200


@dataclass(frozen=True)
class TrainingPlan:
    """What `train_policy` is going to do.

    Args:
        tasks: Number of training tasks.
        validation_tasks: Number of validation tasks.
        trajectories: Number of recorded runs.
        contrast_groups: Names of tasks that are pooled into conflicting labelings, by group.
        cloning_steps: Training steps of behaviour cloning.
        training_steps: Training steps after it.
        policy_parameters: Number of the policy's parameters.
    """

    tasks: int
    validation_tasks: int
    trajectories: int
    contrast_groups: list[list[str]]
    cloning_steps: int
    training_steps: int
    policy_parameters: int


def plan_training(
    tasks: Sequence[Task],
    dataset: TrajectoryDataset,
    config: PolicyLearningConfig,
    validation_tasks: Sequence[Task] = (),
) -> TrainingPlan:
    """The plan of a training run, without running it.

    Args:
        tasks: Training tasks.
        dataset: Recorded trajectories.
        config: Settings.
        validation_tasks: Tasks that choose among the validated policies.

    Raises:
        ValueError: When recordings have no task among those given, or two tasks have one name.
    """
    check_sources(tasks, dataset, validation_tasks)
    space = dataset.space
    sides = 2 if space.kind == "core" else 1  # only a core has an output basis
    settings = _policy_config(
        dataset, config, embedding_size=_embedding_size(space.layout), module_features=sides * space.r
    )
    runs = [run for shard in dataset.keys() for run in dataset.manifest.shards[shard].trajectories]
    settings.optimizers = sorted({run["optimizer"] for run in runs})
    policy = LoHpPolicy(settings)
    return TrainingPlan(
        len(tasks),
        len(validation_tasks),
        len(dataset),
        contrast_groups(tasks),
        config.cloning_steps,
        config.hybrid_steps,
        policy.num_parameters(),
    )


def train_policy(
    tasks: Sequence[Task],
    encoder: TextEncoder,
    dataset: TrajectoryDataset,
    output_dir: str | Path,
    config: PolicyLearningConfig | None = None,
    *,
    validation_tasks: Sequence[Task] = (),
    accelerator: Accelerator | None = None,
    provenance: dict[str, Any] | None = None,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    report_to: str | Sequence[str] = "none",
) -> LoHpPolicy:
    """Learn a policy from recorded trajectories and write its folder.

    Stage 2 needs of stage 1 only the recorded states and their scores, never an optimizer, a gradient or a training
    loss of it (Lo-Hp (abstract): two decoupled stages).

    Args:
        tasks: Training tasks; those with recordings are imitated, all give episodes.
        encoder: Encoder of the base model, in the weight space of the recordings.
        dataset: Recorded trajectories.
        output_dir: Folder of the policy; `checkpoint/` inside it continues a run that was killed, or one that ended when
            `training_steps` has grown since. It says what it was trained on, and with anything else it is refused.
        config: Settings.
        validation_tasks: Tasks for choosing among the validated states of the policy.
        accelerator: Mixed precision, device and processes; made from the settings when absent.
        provenance: More entries for the policy's record.
        console: Where progress and the closing table go; standard error when absent.
        callbacks: The `Trainer`'s callbacks, see `LoHpTrainer`.
        report_to: The `Trainer`'s reporters, such as `"tensorboard"`, `"trackio"` or `"wandb"`; what they write as
            files goes into `output_dir`.

    Returns:
        The trained policy, as saved.

    Raises:
        ValueError: When dataset, encoder and tasks do not belong together, naming both sides, when two tasks have one name,
            when `output_dir` holds the checkpoint of another training, listing all differences, when a launcher asks
            for another mixed precision than bf16, when `provenance` is no JSON, or when `lohp+path` gets no gradients
            through the base model.
        RuntimeError: When a reporter is not installed, or another training writes to `output_dir`.
    """
    config = config or PolicyLearningConfig()
    reporters(report_to)  # whatever is missing is said before any work
    try:
        json.dumps(provenance)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`provenance` must hold plain JSON values: {error}.") from error
    if config.preset == "lohp+path" and config.path_weight > 0:
        check_gradients(encoder.base_model)
    config = replace(config, mixed_precision=precision_of(config.mixed_precision, accelerator))
    accelerator = accelerator or Accelerator(cpu=encoder.stays_on_cpu)
    encoder.base_model.to(accelerator.device)
    console = console or Console(stderr=True)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    fingerprint = base_model_fingerprint(encoder.base_model)
    dataset.check_matches(space=encoder.space, base_fingerprint=fingerprint, reading=encoder.reading)
    check_sources(tasks, dataset, validation_tasks)
    recordings = Recordings.from_trajectories(list(dataset), config.policy_steps, config.final_weights_only)
    with only_writer(output_dir, accelerator), frozen(encoder.base_model):
        with Work(console, disable=not accelerator.is_main_process) as progress:
            bank, held_out = (
                TaskBank(encoder, rows_per_task=config.rows_per_task, seed=config.seed) for _ in range(2)
            )
            bar = progress.add_task("encoding tasks", total=len(tasks) + len(validation_tasks))
            for task in tasks:
                bank.add(task)
                progress.advance(bar)
            for task in validation_tasks:
                held_out.add(task)
                progress.advance(bar)
            size = {"support_size": config.support_size, "max_classes": config.max_classes}
            sampler = EpisodeSampler(bank.labels, contrast_groups(tasks), contrast=config.contrast, **size)
            recordings = recordings.of_tasks(sampler.rows)
            policy = build_policy(encoder, bank, recordings, sampler, dataset, config)
            validation = None
            if validation_tasks:
                source = EpisodeSampler(held_out.labels, contrast_groups(validation_tasks), contrast=0.2, **size)
                generator = torch.Generator().manual_seed(config.seed)
                validation = held_out, [source.sample(generator) for _ in range(config.validation_episodes)]
            history: list[dict[str, float]] | None = None
            bar = progress.add_task("policy learning", total=None)

            def log(step: int, scalars: Mapping[str, float]) -> None:
                nonlocal history
                if history is None:
                    history = _continue_log(output_dir / LOG_FILE, step) if accelerator.is_main_process else []
                shown = {k: scalars[k] for k in ("cloning", "subtb", "path", "validation_accuracy") if k in scalars}
                text = " ".join(f"{k} {v:.3f}" for k, v in shown.items())
                progress.update(bar, completed=step, note=text)
                if accelerator.is_main_process and (step % LOG_EVERY == 0 or "validation_loss" in scalars):
                    with open(output_dir / LOG_FILE, "a", encoding="utf-8") as stream:
                        stream.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in scalars.items()}}) + "\n")
                if "validation_loss" in scalars:
                    history.append({"step": step, **scalars})

            trainer = LoHpTrainer(
                policy,
                bank,
                recordings,
                sampler,
                config,
                validation=validation,
                accelerator=accelerator,
                log=log,
                callbacks=callbacks,
                arguments=training_arguments(config, accelerator, output_dir, report_to),
                data=sources_record(tasks, encoder, dataset, validation_tasks),
            )
            progress.update(bar, total=trainer.total_steps)
            trainer.train(output_dir / "checkpoint")
            progress.update(bar, completed=trainer.step)
        policy.reference_set = build_reference_set(policy, bank, recordings)
        policy.config.preset = config.preset
        policy.config.provenance = {
            "training_tasks": {t.name: {"family": t.family, "licence": t.licence} for t in tasks},
            "validation_tasks": [t.name for t in validation_tasks],
            "settings": asdict(config),
            "best_training_step": trainer.best[1],
            "temperature": trainer.temperature,
            **({"extended_at_training_step": trainer.extended_at} if trainer.extended_at else {}),
            **(provenance or {}),
        }
        if accelerator.is_main_process:
            policy.save_pretrained(output_dir)
            if history is None:  # it had been finished before
                history = _continue_log(output_dir / LOG_FILE, trainer.step + 1)
                console.print("All training steps had been taken before.")
            if history:
                console.print(_table(history))
            console.print(f"The policy is in {output_dir}.", markup=False, soft_wrap=True)
        accelerator.wait_for_everyone()
    return policy


def build_policy(
    encoder: TextEncoder,
    bank: TaskBank,
    recordings: Recordings,
    sampler: EpisodeSampler,
    dataset: TrajectoryDataset,
    config: PolicyLearningConfig,
) -> LoHpPolicy:
    """A new policy with coordinates, scales and normalisers fitted to the training tasks.

    Args:
        encoder: Encoder of the base model.
        bank: The training tasks.
        recordings: Their recorded runs.
        sampler: Source of episodes, to fit normalisers to.
        dataset: Where the recordings come from: base model and weight space.
        config: Settings.
    """
    statistics = next(iter(bank.statistics.values()))
    settings = _policy_config(
        dataset, config, embedding_size=statistics.embeddings.shape[-1], module_features=statistics.modules.shape[-1]
    )
    recorded_name = getattr(getattr(encoder.base_model, "config", None), "_name_or_path", "")
    settings.base_model_name = _public_name(recorded_name) or settings.base_model_name
    settings.optimizers = list(recordings.optimizer_names)
    settings.pooling, settings.max_text_length = encoder.pooling, encoder.max_length
    settings.tokenizer_fingerprint = tokenizer_fingerprint(encoder.tokenizer)
    settings.tokenizer_reading = reading_fingerprint(encoder.tokenizer)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.default_generator.manual_seed(config.seed)
        policy = LoHpPolicy(settings)
    policy.set_space(dataset.space)
    reference = fit_reference(
        [s[torch.arange(min(len(s), 200))] for s in bank.statistics.values()], settings.principal_directions
    )
    for name, tensor in policy.feature_reference.named_buffers():
        tensor.copy_(reference[name])
    generator = torch.Generator().manual_seed(config.seed)
    episodes = [sampler.sample(generator) for _ in range(NORMALIZER_EPISODES)]
    features = TaskFeatures.stack([bank.features(e.known, e.known_labels, e.n_classes, reference) for e in episodes])
    policy.normalize_set.fit(features.set)
    policy.normalize_labels.fit(features.labels)
    policy.normalize_modules.fit(features.modules.flatten(1))
    fit_scales(policy, recordings)
    return policy


def build_reference_set(policy: LoHpPolicy, bank: TaskBank, recordings: Recordings) -> ReferenceSet:
    """Adapters and features of the training tasks, for baselines and controls."""
    best = {name: state for name, state in recordings.best_states().items() if name in bank.tasks}
    reference = policy.reference_tensors()
    features = []
    for name in best:
        task = bank.tasks[name]
        rows = draw_rows(bank.labels[name], task.examples.n_classes, REFERENCE_SHOTS)
        features.append(bank.features([(name, rows)], bank.labels[name][rows], task.examples.n_classes, reference))
    families = tuple(bank.tasks[name].family for name in best)
    return ReferenceSet(tuple(best), families, torch.stack(list(best.values())), TaskFeatures.stack(features))


def draw_rows(labels: torch.Tensor, n_classes: int, shots: int) -> torch.Tensor:
    """The first `shots` rows of every class (rows are in random order already)."""
    return torch.cat([(labels == c).nonzero().flatten()[:shots] for c in range(n_classes)])


def _policy_config(
    dataset: TrajectoryDataset, config: PolicyLearningConfig, embedding_size: int, module_features: int
) -> LoHpPolicyConfig:
    return LoHpPolicyConfig(
        layout=dataset.space.layout.to_dict(),
        space_kind=dataset.space.kind,
        r=dataset.space.r,
        state_shape=list(dataset.space.shape),
        base_model_name=_public_name(dataset.manifest.base_model_name),
        base_fingerprint=dataset.manifest.base_fingerprint,
        head=config.head,
        ridge=config.ridge,
        policy_steps=config.policy_steps,
        embedding_size=embedding_size,
        principal_directions=min(64, embedding_size),
        module_features=module_features,
        hidden_size=config.hidden_size,
        num_directions=config.num_directions,
        dropout=config.dropout,
        noise_scale=config.noise_scale,
        reads_previous=config.reference == "clone",
        preset=config.preset,
    )


def _embedding_size(layout: AdapterLayout) -> int:
    """Size of the base model's hidden states, which every module reads or writes; without the model, the smaller of two."""
    shared = set.intersection(*({spec.d_in, spec.d_out} for spec in layout.modules))
    return min(shared, default=layout.modules[0].d_in)


def _public_name(name: str) -> str:
    """A Hub id as it is; of a folder only `./` and its own name: its path means nothing elsewhere, and it is no Hub id."""
    return name if is_hub_id(name) or not name else f"./{Path(name).name}"


def _continue_log(file: Path, step: int) -> list[dict[str, float]]:
    """Cut a log off before `step`, from where a killed run logged what is done again; the validations that are left."""
    if not file.exists():
        return []
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):  # a line that a kill cut off
            if (entry := json.loads(line))["step"] < step:
                kept.append(entry)
    write_atomically(file, "".join(f"{json.dumps(entry)}\n" for entry in kept).encode())
    return [entry for entry in kept if "validation_loss" in entry]


def _table(history: Sequence[dict[str, float]]) -> Table:
    table = Table(title="Policy learning: validation tasks")
    columns = (
        "step",
        "validation_loss",
        "validation_accuracy",
        "path",
        "subtb",
        "recorded/residual",
        "on_policy/residual",
    )
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in history:
        table.add_row(*(f"{row[c]:.3f}" if c in row and c != "step" else str(row.get(c, "-")) for c in columns))
    return table
