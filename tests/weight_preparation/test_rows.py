import pytest
import torch

from lohp_peft.tasks.task import Examples, Task
from lohp_peft.weight_preparation.config import WeightPreparationConfig
from lohp_peft.weight_preparation.rows import keyed_generator, select_rows


def _task(counts, name="t"):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    texts = tuple(f"text {i}" for i in range(len(labels)))
    return Task(name, Examples(texts, tuple(labels), tuple(map(str, range(len(counts))))), ("train",) * len(labels))


def _original_labels(rows, index):
    return rows.examples.targets[index]


def test_scored_query_rows_are_never_trained_on():
    rows = select_rows(_task([50, 30, 3]), WeightPreparationConfig())
    trained = torch.cat(rows.train)
    assert not set(trained.tolist()) & set(rows.score.query.tolist())
    assert set(rows.score.support.tolist()) <= set(trained.tolist())
    assert len(trained) + len(rows.score.query) == len(rows.examples)


def test_rows_are_positions_in_the_split():
    task = _task([20, 20])
    rows = select_rows(task, WeightPreparationConfig())
    assert task.split("train").select(rows.rows.tolist()) == rows.examples


@pytest.mark.parametrize("counts", [[500, 500], [4] * 150, [1000] * 60, [3, 3, 2, 0], [200, 3]])
def test_caps_hold_and_every_side_has_every_class(counts):
    config = WeightPreparationConfig(rows_per_task=64, score_query_rows=16, score_shots=4)
    rows = select_rows(_task(counts), config)
    n = rows.score.n_classes
    assert len(rows.examples) <= 64
    assert 2 <= n <= 8
    assert len(rows.score.query) <= max(16, n)
    for index, labels in (
        (rows.score.support, rows.score.support_labels),
        (rows.score.query, rows.score.query_labels),
    ):
        assert set(labels.tolist()) == set(range(n))
        assert len({(int(a), int(b)) for a, b in zip(labels, _original_labels(rows, index), strict=True)}) == n
    assert rows.score.support_labels.bincount().max() <= 4


def test_minibatches_are_balanced_halved_and_relabelled():
    config = WeightPreparationConfig(classes_per_step=3, rows_per_class=4, rows_per_task=100)
    rows = select_rows(_task([30] * 5), config)
    generator = keyed_generator("x")
    seen = set()
    for _ in range(30):
        batch = rows.sample(config, generator)
        assert batch.n_classes == 3
        assert batch.support_labels.bincount().tolist() == [2, 2, 2]
        assert batch.query_labels.bincount().tolist() == [2, 2, 2]
        assert not set(batch.support.tolist()) & set(batch.query.tolist())
        for label in range(3):
            both = torch.cat([batch.support[batch.support_labels == label], batch.query[batch.query_labels == label]])
            assert len(set(_original_labels(rows, both).tolist())) == 1
        seen |= set(_original_labels(rows, batch.support).tolist())
    assert seen == {0, 1, 2, 3, 4}


def test_small_classes_still_give_both_halves():
    rows = select_rows(_task([3, 3]), WeightPreparationConfig())
    batch = rows.sample(WeightPreparationConfig(), keyed_generator("x"))
    assert (len(batch.support), len(batch.query)) == (2, 2)


def test_too_few_rows_are_refused():
    with pytest.raises(
        ValueError, match=r"task 't' has 1 classes with at least 3 different rows in split 'train', but needs 2"
    ):
        select_rows(_task([9, 2, 1]), WeightPreparationConfig())


def test_selection_depends_on_the_name_only():
    first, again = (select_rows(_task([99, 99]), WeightPreparationConfig()) for _ in range(2))
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, select_rows(_task([99, 99], name="u"), WeightPreparationConfig()).rows)


def test_keyed_generators_differ_by_every_word():
    keys = [("a", "b", 0), ("a", "b", 1), ("a", "c", 0), ("ab", "", 0), ("a", "b0"), ("a", "b", 10)]
    draws = {int(torch.randint(2**62, (), generator=keyed_generator(*key))) for key in keys}
    assert len(draws) == len(keys)
    known = torch.randint(1000, (3,), generator=keyed_generator("spam", "adamw", 0))
    assert torch.equal(known, torch.randint(1000, (3,), generator=keyed_generator("spam", "adamw", 0)))


def test_rows_that_repeat_others_are_neither_trained_on_nor_scored():
    """A query row that lies among the trained ones too would reward memorizing."""
    task = _task([20, 20])
    twice = Examples(task.examples.texts * 2, task.examples.labels * 2, task.examples.label_names)
    with pytest.warns(UserWarning, match="40 of 80 rows of task 't' repeat others and count once"):
        rows = select_rows(Task("t", twice, ("train",) * 80), WeightPreparationConfig())
    assert len(set(rows.examples.texts)) == len(rows.examples) == 40
    assert rows.rows.max() < 40
    once = select_rows(task, WeightPreparationConfig())
    assert rows.rows.equal(once.rows)
