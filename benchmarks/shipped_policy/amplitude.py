"""Choose the policy's amplitude on validation tasks: `python benchmarks/shipped_policy/amplitude.py POLICY [THREADS]`.

Writes `benchmarks/results/amplitude.json`; `ship.py` puts the number into the policy's configuration.
"""

import sys
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from setting import RESULTS, describe_policy, encoder_of, environment, load_subject, write_json
from text_suite import VALIDATION, load_tasks

from lohp_peft.policy import rollout
from lohp_peft.tasks import TaskFeatures, draw, solve_head, task_features

AMPLITUDES, DRAWS, SHOTS, MAX_TEST = (0.5, 0.7, 1.0, 1.3), 2, 16, 150


@torch.no_grad()
def accuracies(policy, encoder, task, seed: int) -> dict[str, float]:
    """Test accuracy by amplitude on one support set, beside no adapter (0) and the mean adapter."""
    support, test = task.draw_support(SHOTS, seed), task.split("test")
    test = draw(test, max(1, MAX_TEST // test.n_classes), 0)
    known, asked = (encoder.prepare(part.texts, part.texts_b) for part in (support, test))
    statistics = encoder.statistics(known)
    features = task_features(statistics, support.targets, support.n_classes, policy.reference_tensors())
    state = rollout(policy, TaskFeatures.stack([features]))[0, -1]
    states = {"0": 0 * state, "mean adapter": policy.reference_set.mean_state()}
    found = {}
    for name, adapter in (states | {f"{a:g}": a * state for a in AMPLITUDES}).items():
        x = encoder.embed(known, adapter[None])
        head = solve_head(x, support.targets, support.n_classes, policy.config.head, ridge=policy.config.ridge)
        predicted = head.logits(encoder.embed(asked, adapter[None])).argmax(-1)
        found[name] = float((predicted == test.targets).float().mean())
    return found


if __name__ == "__main__":
    if len(sys.argv) > 2:
        torch.set_num_threads(int(sys.argv[2]))
    policy, model, tokenizer = load_subject(sys.argv[1], "minilm")
    encoder = encoder_of(policy, model, tokenizer, torch.bfloat16)
    tasks = {}
    for task in load_tasks(VALIDATION):
        rows = [accuracies(policy, encoder, task, seed) for seed in range(DRAWS)]
        tasks[task.name] = {name: fmean(row[name] for row in rows) for name in rows[0]}
        print(task.name, {name: f"{100 * value:.1f}" for name, value in tasks[task.name].items()}, flush=True)
    mean = {name: fmean(row[name] for row in tasks.values()) for name in next(iter(tasks.values()))}
    best = max(AMPLITUDES, key=lambda a: mean[f"{a:g}"])
    settings = {"draws": DRAWS, "shots": SHOTS, "max_test": MAX_TEST, "policy": describe_policy(policy)}
    record = {"benchmark": "amplitude", "settings": settings, "environment": environment()}
    write_json(RESULTS / "amplitude.json", {**record, "amplitude": best, "accuracy": mean, "tasks": tasks})
    print({name: f"{100 * value:.2f}" for name, value in mean.items()}, "chosen", best)
