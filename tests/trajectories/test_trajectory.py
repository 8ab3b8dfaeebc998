import pytest
import torch

NAN = float("nan")


def test_at_keeps_every_series_aligned(make_trajectory):
    trajectory = make_trajectory()
    part = trajectory.at([0, 2, 5])
    assert part.optimizer_steps.tolist() == [0, 20, 50]
    torch.testing.assert_close(part.states, trajectory.states[[0, 2, 5]])
    torch.testing.assert_close(part.losses, trajectory.losses[[0, 2, 5]])
    torch.testing.assert_close(part.metrics["accuracy"], trajectory.metrics["accuracy"][[0, 2, 5]])
    assert (part.task, part.optimizer, part.seed) == (trajectory.task, trajectory.optimizer, trajectory.seed)


@pytest.mark.parametrize("indices", [[], [0, 0], [2, 1], [-1, 2], [0, 7]])
def test_at_refuses_indices_that_do_not_increase_inside(make_trajectory, indices):
    with pytest.raises(ValueError, match=r"increase strictly within 0\.\.6"):
        make_trajectory().at(indices)


def test_knots_at_equal_loss_decrease(make_trajectory):
    losses = torch.tensor([1.0, 0.9, 0.8, 0.5, 0.49, 0.1, 0.0])
    assert make_trajectory(losses=losses).knots(2).optimizer_steps.tolist() == [0, 30, 60]
    fast = torch.tensor([1.0, 0.2, 0.15, 0.1, 0.05, 0.02, 0.0])
    assert make_trajectory(losses=fast).knots(3).optimizer_steps.tolist() == [0, 10, 20, 60]


def test_knots_ignore_a_rise_and_interpolate_unscored_states(make_trajectory):
    rising = torch.tensor([1.0, 0.5, 2.0, 0.5, 0.5, 0.0, 0.3])
    assert make_trajectory(losses=rising).knots(2).optimizer_steps.tolist() == [0, 10, 60]
    gaps = torch.tensor([1.0, NAN, NAN, NAN, NAN, NAN, 0.0])
    assert make_trajectory(losses=gaps).knots(2).optimizer_steps.tolist() == [0, 30, 60]


@pytest.mark.parametrize("losses", [[NAN] * 7, [1.0] * 7, [1.0, 2, 3, 4, 5, 6, 7], [NAN, 1, 0.9, 0.8, 0.5, 0.2, 0.1]])
def test_knots_fall_back_to_a_power_of_time(make_trajectory, losses):
    knots = make_trajectory(losses=torch.tensor(losses)).knots(2)
    assert knots.optimizer_steps.tolist() == [0, 20, 60]  # 60 / 2 ** 1.5 = 21.2


@pytest.mark.parametrize("policy_steps", range(1, 7))
def test_knots_are_distinct_and_keep_both_ends(make_trajectory, policy_steps):
    for seed in range(20):
        losses = torch.rand(7, generator=torch.Generator().manual_seed(seed))
        knots = make_trajectory(losses=losses).knots(policy_steps)
        assert len(knots) == policy_steps + 1
        assert (knots.optimizer_steps[0], knots.optimizer_steps[-1]) == (0, 60)


@pytest.mark.parametrize("policy_steps", [0, 7])
def test_knots_need_enough_transitions(make_trajectory, policy_steps):
    with pytest.raises(ValueError, match="6 recorded transitions of task 'spam'"):
        make_trajectory().knots(policy_steps)


def test_every_malformed_field_is_listed(make_trajectory):
    states = make_trajectory().states.clone()
    states[3, 0, 0] = NAN
    with pytest.raises(
        ValueError, match=r"(?s)states \[3\].*`optimizer_steps` must increase.*`losses` must be float32"
    ):
        make_trajectory(states=states, optimizer_steps=torch.zeros(7, dtype=torch.int64), losses=torch.zeros(6))
    with pytest.raises(ValueError, match="got float64"):
        make_trajectory(states=states.double())
    with pytest.raises(ValueError, match="infinities"):
        make_trajectory(metrics={"accuracy": torch.full((7,), torch.inf)})
