import pytest
import torch

from lohp_peft.policy import ReferenceSet
from lohp_peft.tasks import TaskFeatures


@pytest.fixture
def reference(policy):
    return policy.reference_set


def test_mean_and_nearest_adapter(reference):
    torch.testing.assert_close(
        reference.mean_state(), (reference.states[0] + reference.states[1] + reference.states[2]) / 3
    )
    index, distance = reference.nearest_state_distance(1.1 * reference.states[1])
    assert index == 1
    assert distance == pytest.approx(0.1 / 1.1, rel=1e-4)


def test_the_nearest_task_is_where_the_texts_lie(reference):
    for index in range(3):
        mine = reference.task_features(index)
        assert reference.nearest(mine) == index
        half = len(mine.set) // 2
        moved = torch.cat([2 * mine.set[:half], mine.set[half:] + 9])
        scaled = TaskFeatures(moved, mine.labels + 1, -mine.modules, -mine.moments)
        assert reference.nearest(scaled) == index  # by direction of the mean alone


def test_the_wrong_task_is_seeded_and_of_another_family(reference):
    assert {reference.wrong_task("spam", "new", seed) for seed in range(20)} == {2}
    assert {reference.wrong_task("emotion", "new", seed) for seed in range(20)} == {0, 1}
    assert reference.wrong_task("emotion", "new", 3) == reference.wrong_task("emotion", "new", 3)
    assert {reference.wrong_task("emotion", "spam", seed) for seed in range(20)} == {1}  # never the task itself
    assert {reference.wrong_task("", "new", seed, nearest=2) for seed in range(20)} == {0, 1}


def test_there_must_be_another_family(reference):
    only = ReferenceSet(
        reference.names[:2],
        reference.families[:2],
        reference.states[:2],
        reference.features[:2],
    )
    with pytest.raises(ValueError, match=r"not like 'new', of family spam; there are 2, of families \['spam'\]"):
        only.wrong_task("spam", "new", 0)
    assert not only.has_wrong_task("spam", "new")
    assert only.has_wrong_task("other", "new")
    assert {only.wrong_task("", "new", seed, nearest=1) for seed in range(20)} == {0}  # all there is but the nearest
    assert only.has_wrong_task("", "new")
    assert not only.has_wrong_task("", only.names[0])
    with pytest.raises(ValueError, match="of family unknown"):
        only.wrong_task("", only.names[0], 0, nearest=1)


def test_unknown_families_are_no_family(reference):
    """As of a policy that was trained on files alone."""
    unknown = ReferenceSet(reference.names, ["", "", ""], reference.states, reference.features)
    assert {unknown.wrong_task("", "new", seed, nearest=1) for seed in range(20)} == {0, 2}
    assert {unknown.wrong_task("spam", "new", seed, nearest=1) for seed in range(20)} == {0, 1, 2}


def test_sizes_are_checked(reference):
    with pytest.raises(
        ValueError, match=r"reference set of 2 tasks .* got \{'families': 3, 'states': 3, 'features': 3\}"
    ):
        ReferenceSet(reference.names[:2], reference.families, reference.states, reference.features)


def test_round_trip(reference):
    again = ReferenceSet.from_tensors(*reference.to_tensors())
    assert (again.names, again.families) == (reference.names, reference.families)
    assert again.states.equal(reference.states)
    for name in ("set", "labels", "modules"):
        assert getattr(again.features, name).equal(getattr(reference.features, name))
    torch.testing.assert_close(
        again.features.moments, reference.features.moments, atol=1e-3, rtol=1e-3
    )  # kept in half
