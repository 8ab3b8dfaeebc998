"""What a policy is learned from: whether it belongs together, and how a checkpoint recognises it."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lohp_peft.files import sha256
from lohp_peft.tasks import Task, TextEncoder, rows_at_hand, task_fingerprint
from lohp_peft.trajectories import TrajectoryDataset


def check_sources(tasks: Sequence[Task], dataset: TrajectoryDataset, validation_tasks: Sequence[Task] = ()) -> None:
    """Make sure that every recording has its task, and every task a name of its own.

    Args:
        tasks: Training tasks.
        dataset: Recorded trajectories.
        validation_tasks: Tasks that choose among the validated policies.

    Raises:
        ValueError: Listing every name that two tasks have, every recorded task that is missing, or every one that has other
            rows than those it was recorded on.
    """
    names, chosen = [task.name for task in tasks], [task.name for task in validation_tasks]
    problems = [
        f"{count} {kind} tasks are named {name!r}"
        for kind, every in (("training", names), ("validation", chosen))
        for name, count in Counter(every).items()
        if count > 1
    ]
    problems += [f"{name!r} is a training task and a validation task" for name in sorted({*names} & {*chosen})]
    if problems:
        raise ValueError(
            f"Tasks of policy learning need names of their own, and what is trained on cannot validate: {'; '.join(problems)}."
        )
    recorded = set(dataset.tasks())
    strangers = sorted(recorded - set(names))
    if strangers or not recorded:
        raise ValueError(
            f"The trajectories and the training tasks must belong together: recordings of {strangers or 'no task'} "
            f"have no task among the {len(names)} given. Pass the tasks that were recorded."
        )
    dataset.check_rows(rows_at_hand(tasks))


def sources_record(
    tasks: Sequence[Task], encoder: TextEncoder, dataset: TrajectoryDataset, validation_tasks: Sequence[Task] = ()
) -> dict[str, Any]:
    """Everything that a training run learns from besides its settings, as JSON values by names that a message can list.

    Args:
        tasks: Training tasks.
        encoder: How their texts are read.
        dataset: Recorded trajectories.
        validation_tasks: Tasks that choose among the validated policies.

    Returns:
        The dataset's id and the digest of its shards, that of the weight space, the encoder's reading, and a digest for
        each task; their order, which episodes follow from.
    """
    shards = {key: dataset.manifest.shards[key].sha256 for key in dataset.keys()}
    return {
        "dataset": dataset.manifest.dataset_id,
        "recordings": sha256(json.dumps(shards).encode()),
        "weight space": dataset.manifest.space_sha256,
        **encoder.reading,
        "order of tasks": [[task.name for task in every] for every in (tasks, validation_tasks)],
        **{f"training task {task.name!r}": task_fingerprint(task) for task in tasks},
        **{f"validation task {task.name!r}": task_fingerprint(task) for task in validation_tasks},
    }
