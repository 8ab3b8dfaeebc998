import pytest
import torch
from torch.nn.functional import cross_entropy

from lohp_peft.tasks import EpisodeSampler, Examples, Task, TaskBank, calibrated_cross_entropy, solve_head
from tiny import build_policy, build_task, features_of


@pytest.fixture(scope="module")
def bank(encoder):
    bank = TaskBank(encoder, rows_per_task=30, dtype=torch.float32)
    for task in (build_task("spam", rows=60), build_task("mood", n_classes=3, rows=60, seed=1)):
        bank.add(task)
    return bank


def test_rows_are_a_balanced_seeded_draw(bank):
    assert bank.labels["spam"].bincount().tolist() == [15, 15]
    assert bank.labels["mood"].bincount().tolist() == [12, 12, 12]  # at least twelve a class
    assert len(bank.statistics["mood"]) == len(bank.encoded["mood"]) == 36


def test_features_are_those_of_the_texts(bank, encoder):
    policy = build_policy(encoder)
    rows = torch.arange(10)
    found = bank.features([("spam", rows)], bank.labels["spam"][rows], 2, policy.reference_tensors())
    task = bank.tasks["spam"]
    examples = task.draw_support(15, 0).select(rows)
    assert examples.targets.equal(bank.labels["spam"][rows])
    expected = features_of(policy, encoder, examples)
    torch.testing.assert_close(found.modules, expected.modules, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.labels, expected.labels, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("head", "calibrated"),
    [("ridge", False), ("prototype", False), ("ridge", True)],
    ids=["ridge", "prototype", "calibrated"],
)
def test_episode_losses_are_query_losses_of_each_adapter(bank, encoder, head, calibrated):
    sampler = EpisodeSampler(bank.labels)
    episodes = [sampler.task_episode(name, torch.Generator().manual_seed(1)) for name in ("spam", "mood")]
    states = (torch.randn(2, 3, *encoder.space.shape) * encoder.space.mask).requires_grad_()
    losses, accuracies = bank.episode_losses(episodes, states, head=head, calibrated=calibrated)
    loss = calibrated_cross_entropy if calibrated else cross_entropy
    assert losses.shape == accuracies.shape == (2, 3)
    for i, episode in enumerate(episodes):
        for j in range(3):
            sides = [encoder.embed(bank.gather(part), states[i, j][None]) for part in (episode.support, episode.query)]
            solved = solve_head(sides[0], episode.support_labels, episode.n_classes, head)
            logits = solved.logits(sides[1])
            torch.testing.assert_close(losses[i, j], loss(logits, episode.query_labels), atol=1e-3, rtol=1e-3)
            assert accuracies[i, j] == (logits.argmax(1) == episode.query_labels).float().mean()
    losses[0, 1].backward()
    moved = states.grad.abs().amax((2, 3)) > 0
    assert moved.tolist() == [[False, True, False], [False, False, False]]


def test_rows_that_repeat_others_count_once(encoder):
    """Else texts that an episode is conditioned on would be among its query texts."""
    task, bank = build_task("once", rows=30, seed=3), TaskBank(encoder)
    examples = task.examples.distinct()
    twice = Examples(examples.texts * 2, examples.labels * 2, examples.label_names)
    bank.add(Task("twice", twice, ("train",) * len(twice)))
    assert len(bank.labels["twice"]) == len(examples)
