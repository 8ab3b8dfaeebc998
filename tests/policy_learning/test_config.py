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


def test_the_limits_of_lambda_are_allowed():
    assert PolicyLearningConfig(subtb_lambda=float("inf")).subtb_lambda == float("inf")
    assert PolicyLearningConfig(subtb_lambda=0).subtb_lambda == 0
