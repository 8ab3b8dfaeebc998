import pytest
import torch

from lohp_peft.policy_learning import ReplayBuffer
from lohp_peft.policy_learning.replay_buffer import Rollout
from lohp_peft.tasks import TaskFeatures


def item(number):
    features = TaskFeatures(torch.randn(4), torch.randn(5), torch.randn(2, 6), torch.randn(2, 3, 4))
    return Rollout(torch.full((3, 2, 4), float(number)), torch.rand(3), features, number % 2)


def numbers(rollouts):
    return [int(rollout.states[0, 0, 0]) for rollout in rollouts]


def test_the_oldest_leave_first():
    buffer = ReplayBuffer(3)
    buffer.add([item(0), item(1)])
    buffer.add([item(2), item(3)])
    assert numbers(buffer.rollouts) == [1, 2, 3]
    assert len(buffer) == 3


def test_samples_are_seeded_and_without_repetition():
    buffer = ReplayBuffer(20)
    buffer.add([item(i) for i in range(20)])
    first = numbers(buffer.sample(8, torch.Generator().manual_seed(1)))
    assert len(set(first)) == 8
    assert first == numbers(buffer.sample(8, torch.Generator().manual_seed(1)))
    assert first != numbers(buffer.sample(8, torch.Generator().manual_seed(2)))
    assert sorted(numbers(buffer.sample(99, torch.Generator()))) == list(range(20))


def test_round_trip_keeps_the_order_beyond_ten():
    buffer, again = ReplayBuffer(12), ReplayBuffer(12)
    buffer.add([item(i) for i in range(12)])
    again.load_state_dict(dict(reversed(buffer.state_dict().items())))
    assert numbers(again.rollouts) == list(range(12))
    for mine, theirs in zip(buffer.rollouts, again.rollouts, strict=True):
        assert mine.losses.equal(theirs.losses)
        for name in ("set", "labels", "modules", "moments"):
            assert getattr(mine.features, name).equal(getattr(theirs.features, name))
        assert mine.prefix == theirs.prefix


def test_capacity():
    with pytest.raises(ValueError, match="`capacity` must be at least 1 rollout, got 0"):
        ReplayBuffer(0)
