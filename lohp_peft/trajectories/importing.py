"""Trajectories out of training runs that were not recorded: PEFT's own checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lohp_peft.adapters.importing import read_checkpoints
from lohp_peft.adapters.space import Adapter, WeightSpace
from lohp_peft.trajectories.trajectory import Trajectory


def import_checkpoints(
    run: str | Path,
    space: WeightSpace,
    task: str,
    *,
    optimizer: str = "unknown",
    hyperparameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    prefix: str = "",
    min_energy: float = 0.0,
) -> Trajectory:
    """Project the checkpoints of a training run onto a weight space, as a trajectory that starts without an adapter.

    With A free and random per run a shared space holds little of an update (Ours: simulated). The share of the squared
    Frobenius norm that is held is the trajectory's metric `energy_kept`; whether the result is any good is a question
    of its task loss, which is not scored here.

    Args:
        run: Output folder of a `transformers.Trainer`, with folders `checkpoint-<optimizer step>`.
        space: Coordinates.
        task: Name of the task.
        optimizer: Name of the optimizer.
        hyperparameters: Its hyper-parameters, values that JSON can hold.
        seed: Seed of the run.
        prefix: Beginning of the run's module names that the space's names lack, such as `"bert."`.
        min_energy: Smallest share that is accepted, in 0..1.

    Returns:
        The trajectory, its losses NaN.

    Raises:
        ValueError: When checkpoints cannot be read, do not fit the space, or keep less than `min_energy`, listing all.
    """
    if not 0 <= min_energy <= 1:
        raise ValueError(f"`min_energy` must be in 0..1, got {min_energy}.")
    checkpoints = [
        (step, {name.removeprefix(prefix): pair for name, pair in adapter.items()})
        for step, adapter in read_checkpoints(run)
    ]
    trajectory = project_checkpoints(
        checkpoints, space, task, optimizer=optimizer, hyperparameters=hyperparameters, seed=seed
    )
    kept = zip(trajectory.optimizer_steps.tolist(), trajectory.metrics["energy_kept"].tolist(), strict=True)
    poor = [f"checkpoint-{step}: {share:.3f}" for step, share in kept if share < min_energy]
    if poor:
        raise ValueError(
            f"The weight space keeps less than `min_energy`={min_energy} of: {', '.join(poor)}. Use a larger rank, or "
            "bases taken from these runs (`CoreSpace.from_trajectories`)."
        )
    return trajectory


def project_checkpoints(
    checkpoints: Sequence[tuple[int, Adapter]],
    space: WeightSpace,
    task: str,
    *,
    optimizer: str = "unknown",
    hyperparameters: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Trajectory:
    """The unscored trajectory of adapters by their optimizer steps, after no adapter at step 0.

    Args:
        checkpoints: Optimizer steps, increasing, and adapters; one of step 0 is left out.
        space: Coordinates.
        task: See `import_checkpoints`, as all that follow.
        optimizer: See there.
        hyperparameters: See there.
        seed: See there.

    Returns:
        The trajectory, its losses NaN; its metric `energy_kept` is the share of the squared Frobenius norm that is held.

    Raises:
        ValueError: When an adapter does not fit the space.
    """
    states, steps, kept = [torch.zeros(space.shape)], [0], [1.0]
    for step, adapter in checkpoints:
        if step > 0:
            state = space.encode(adapter).state.float().cpu()
            energy = sum(float(((b.T @ b) * (a @ a.T)).sum()) for a, b in adapter.values())
            states.append(state)
            steps.append(step)
            kept.append(float(state.square().sum()) / energy if energy > 0 else 1.0)
    return Trajectory(
        states=torch.stack(states),
        optimizer_steps=torch.tensor(steps),
        losses=torch.full((len(steps),), float("nan")),
        metrics={"energy_kept": torch.tensor(kept)},
        task=task,
        optimizer=optimizer,
        hyperparameters=dict(hyperparameters or {}),
        seed=seed,
    )
