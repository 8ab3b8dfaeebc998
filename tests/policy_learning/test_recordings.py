from dataclasses import replace

import pytest
import torch

from lohp_peft.policy_learning.recordings import MAX_RELATIVE_LOSS, Recordings
from lohp_peft.trajectories.trajectory import SCORED_SHARE
from policy_learning.conftest import build_trajectory


def test_runs_are_resampled_at_knots_with_relative_losses(trajectories, recordings):
    knots = trajectories[3].knots(3)
    assert recordings.states.shape[:2] == (6, 4)
    assert recordings.states[3].equal(knots.states)
    torch.testing.assert_close(recordings.losses[3], knots.losses / knots.losses[0])
    assert recordings.optimizer_names == ("adamw", "sam")
    assert recordings.optimizers.tolist() == [1, 2] * 3
    assert recordings.tasks[2:4] == ("ham", "ham")


def test_final_weights_only_is_a_straight_line(encoder):
    run = build_trajectory(encoder.space)
    bent = build_trajectory(encoder.space, states=run.states * torch.linspace(0, 1, 7)[:, None, None])
    found = Recordings.from_trajectories([bent], 3, final_weights_only=True)
    torch.testing.assert_close(found.states[0], torch.linspace(0, 1, 4)[:, None, None] * bent.states[-1])
    torch.testing.assert_close(found.losses[0], 1 - torch.linspace(0, 1, 4) * 0.5)
    assert not torch.allclose(Recordings.from_trajectories([bent], 3).states[0], found.states[0])


def test_runs_that_lack_losses_are_left_out_with_a_warning_and_failed_ones_clipped(encoder, caplog):
    start, end = torch.tensor([torch.nan] + [1.0] * 6), torch.tensor([1.0, 0.9] + [torch.nan] * 5)
    runs = [build_trajectory(encoder.space, losses=losses) for losses in (start, end)]
    runs.append(build_trajectory(encoder.space, task="mood", losses=torch.tensor([1.0] + [torch.nan] * 5 + [0.5])))
    exploded = build_trajectory(encoder.space, task="ham", losses=torch.tensor([1.0, 0.9, 0.8, 3, 4, 5, 6]))
    found = Recordings.from_trajectories([*runs, exploded], 3)
    assert found.tasks == ("ham",)
    assert found.losses.max() == MAX_RELATIVE_LOSS
    why = (
        "2 of 'spam' (no loss of the first or the last state), 1 of 'mood' (2 scored states, `policy_steps`=3 needs 4)"
    )
    assert f"Left out 3 of 4 recorded runs: {why}. A run of `TrajectoryRecorder` is scored by" in caplog.text
    with pytest.raises(ValueError, match=r"None of the 3 recorded trajectories can be learned from: 2 of 'spam' \(no"):
        Recordings.from_trajectories(runs, 3)


def test_runs_that_start_from_an_adapter_are_left_out(encoder, caplog):
    run = build_trajectory(encoder.space)
    warm = build_trajectory(encoder.space, task="ham", states=run.states + run.states[-1:])
    assert Recordings.from_trajectories([run, warm], 3).tasks == ("spam",)
    assert "1 of 'ham' (it does not start without an adapter, as a policy does)" in caplog.text


def test_runs_whose_losses_are_not_those_of_their_states_are_named(encoder, caplog):
    run = build_trajectory(encoder.space)
    Recordings.from_trajectories([replace(run, metrics={SCORED_SHARE: torch.full((len(run.losses),), 0.95)})], 3)
    assert not caplog.text
    poor = replace(run, task="ham", metrics={SCORED_SHARE: torch.tensor([1.0] + [0.09] * (len(run.losses) - 1))})
    assert len(Recordings.from_trajectories([run, poor], 3)) == 2
    assert "1 of 2 runs were measured on updates of which their states hold little: 'ham' by adamw 9%" in caplog.text


def test_runs_of_tasks_without_episodes_are_left_out(recordings, caplog):
    found = recordings.of_tasks({"spam", "ham"})
    assert found.tasks == ("spam", "spam", "ham", "ham")
    assert found.states.equal(recordings.states[:4])
    assert found.optimizers.equal(recordings.optimizers[:4])
    assert "Left out 2 of 6 recorded runs." in caplog.text
    assert "['mood']" in caplog.text
    with pytest.raises(ValueError, match=r"None of the recorded tasks can be trained on.*\['ham', 'mood', 'spam'\]"):
        recordings.of_tasks({"news"})


def test_knots_lie_among_the_scored_states(encoder, caplog):
    """As every second state of a `Trainer` run is evaluated."""
    run = build_trajectory(encoder.space)
    partly = build_trajectory(encoder.space, losses=torch.where(torch.arange(7) % 2 == 0, run.losses, torch.nan))
    found = Recordings.from_trajectories([partly], 3)
    assert found.states[0].equal(run.states[::2])
    torch.testing.assert_close(found.losses[0], run.losses[::2])
    assert not caplog.text


def test_scales_are_root_mean_squares_over_real_entries(recordings):
    mask = torch.ones(recordings.states.shape[2:], dtype=torch.bool)
    mask[0, 2:] = False
    states = recordings.states * mask
    masked = Recordings(states, recordings.losses, recordings.tasks, recordings.optimizers, recordings.optimizer_names)
    scale, steps = masked.scales(mask)
    assert float(scale[0]) == pytest.approx(float(states[:, -1, 0, :2].square().mean().sqrt()))
    assert float(scale[1]) == pytest.approx(float(states[:, -1, 1].square().mean().sqrt()))
    assert float(steps[1, 1]) == pytest.approx(float((states[:, 2, 1] - states[:, 1, 1]).square().mean().sqrt()))
    assert (scale.shape, steps.shape) == ((len(mask), 1), (3, len(mask), 1))
    still = Recordings(0 * states, recordings.losses, recordings.tasks, recordings.optimizers, ())
    assert min(float(x.min()) for x in still.scales(mask)) > 0  # nothing to divide by zero


def test_best_states_are_those_of_the_lowest_final_loss(recordings):
    best = recordings.best_states()
    assert list(best) == ["spam", "ham", "mood"]
    assert best["ham"].equal(recordings.states[3, -1])  # later seeds end lower


def test_samples_prefer_good_runs_of_allowed_tasks(recordings):
    index = recordings.sample(3000, torch.Generator().manual_seed(0), {"spam", "mood"})
    counts = index.bincount(minlength=6)
    assert counts[2] == counts[3] == 0
    assert counts[5] > counts[4] > counts[1] > counts[0] > 0
    assert index.equal(recordings.sample(3000, torch.Generator().manual_seed(0), {"spam", "mood"}))
