import pytest

from lohp_peft.policy_learning import PolicyLearningConfig


def test_errors_list_all_that_is_wrong():
    with pytest.raises(
        ValueError,
        match="preset.*'ppo'.*mode.*'both'.*reference.*'bridge'.*batch_size.*got 0.*subtb_lambda.*contrast.*got 2",
    ):
        PolicyLearningConfig(preset="ppo", mode="both", reference="bridge", batch_size=0, subtb_lambda=-1, contrast=2)
    with pytest.raises(ValueError, match="`subtb_lambda` must be at least 0, got nan"):
        PolicyLearningConfig(subtb_lambda=float("nan"))


@pytest.mark.parametrize("value", [1000 / 3, 64.0, True, "8", None])
def test_counts_are_whole_numbers(value):
    """A fractional number of cloning steps would never be reached, and the hybrid phase never begin."""
    with pytest.raises(ValueError, match="whole numbers are needed, got {'cloning_steps': .*'buffer_size': "):
        PolicyLearningConfig(cloning_steps=value, buffer_size=value)


def test_rollouts_of_both_kinds_stay_in_the_buffer():
    with pytest.raises(ValueError, match="`buffer_size` must be at least 8.*got 7"):
        PolicyLearningConfig(buffer_size=7, rollouts_per_task=4)
    assert PolicyLearningConfig(buffer_size=4, rollouts_per_task=4, mode="on_policy").buffer_size == 4
    assert PolicyLearningConfig(buffer_size=1, mode="off_policy").buffer_size == 1


def test_a_straight_line_has_no_backward_policy():
    with pytest.raises(ValueError, match="`reference` must be clone with `final_weights_only`, got 'backward'"):
        PolicyLearningConfig(final_weights_only=True, reference="backward")


def test_the_limits_of_lambda_are_allowed():
    assert PolicyLearningConfig(subtb_lambda=float("inf")).subtb_lambda == float("inf")
    assert PolicyLearningConfig(subtb_lambda=0).subtb_lambda == 0


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("validate_every", 0, "at least 1"),
        ("save_every", 0, "at least 1"),
        ("validation_episodes", 0, "at least 1"),
        ("rollouts_per_task", 1, "at least 2"),
        ("support_size", 3, "at least 4"),
        ("max_classes", 1, "at least 2"),
        ("kl_target", 0.0, "above 0 nats"),
        ("max_grad_norm", 0.0, "above 0"),
        ("max_grad_norm", -1.0, "above 0"),
        ("robust_delta", 0.0, "above 0 nats"),
        ("noise_scale", 0.0, "above 0"),
        ("ridge", -1.0, "above 0"),
        ("cloning_weight", -1.0, "at least 0"),
        ("free_learning_rate", -1.0, "at least 0"),
        ("log_flow_learning_rate", float("nan"), "at least 0"),
        ("num_directions", 0, "at least 1"),
        ("path_weight", float("inf"), "finite"),
        ("learning_rate", float("inf"), "finite"),
        ("hidden_size", 30, "a multiple of 4 attention heads"),
        ("head", "rigde", "one of \\['ridge', 'prototype'\\]"),
    ],
)
def test_what_would_fail_late_fails_at_once(setting, value, rule):
    with pytest.raises(ValueError, match=f"`{setting}` must be {rule}, got {value!r}"):
        PolicyLearningConfig(**{setting: value})
