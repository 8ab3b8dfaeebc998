import pytest
import torch

from lohp_peft.policy import rollout


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_starts_from_no_adapter(policy, features):
    path = rollout(policy, features)
    assert path.shape == (3, 4, *policy.config.state_shape)
    assert not path[:, 0].any()
    assert path[:, 1:].abs().amax((-1, -2)).min() > 0


def test_every_prefix_of_the_steps_is_the_shorter_rollout(policy, features):
    whole = rollout(policy, features)
    noisy = rollout(policy, features, noise=1.0, generator=generator())
    for steps in (1, 2, 3):
        assert rollout(policy, features, policy_steps=steps).equal(whole[:, : steps + 1])
        assert rollout(policy, features, noise=1.0, generator=generator(), policy_steps=steps).equal(
            noisy[:, : steps + 1]
        )


def test_a_prefix_is_kept_bit_for_bit_and_continued(policy, features):
    prefix = torch.randn(3, 3, *policy.config.state_shape)
    path = rollout(policy, features, prefix=prefix)
    assert path.shape[1] == 4
    assert path[:, :3].equal(prefix)
    last = policy.forward_policy(prefix[:, 2], torch.full((3,), 2), features, prefix[:, 1])
    assert path[:, 3].equal(last)
    own = rollout(policy, features)
    assert rollout(policy, features, prefix=own[:, :2]).equal(own)
    assert rollout(policy, features, prefix=own).equal(own)


def test_noise_is_seeded_and_of_the_size_of_sigma(policy, features):
    mean = rollout(policy, features, policy_steps=1)[:, 1]
    first = rollout(policy, features, noise=1.0, generator=generator(1))
    assert first.equal(rollout(policy, features, noise=1.0, generator=generator(1)))
    assert not first.equal(rollout(policy, features, noise=1.0, generator=generator(2)))
    draws = [rollout(policy, features, noise=2.0, generator=generator(i), policy_steps=1)[:, 1] for i in range(300)]
    spread = (torch.stack(draws) - mean).square().mean((0, 1, 3)).sqrt()
    torch.testing.assert_close(spread, 2 * policy.sigma(torch.tensor([0]))[0, :, 0], rtol=0.05, atol=0)


def test_one_generator_a_row_makes_rows_independent_of_their_company(policy, features):
    both = rollout(policy, features, noise=1.0, generator=[generator(5) for _ in range(3)])
    torch.testing.assert_close(
        rollout(policy, features[2:], noise=1.0, generator=generator(5))[0], both[2], atol=1e-5, rtol=1e-4
    )


def test_a_closed_loop_measures_at_every_state_but_the_first(policy, features):
    calls = []

    def measure(states, step):
        calls.append((states, step))
        return features.map(lambda part: part + step)

    path = rollout(policy, features, measure=measure)
    assert [step for _, step in calls] == [1, 2]
    assert all(states.equal(path[:, step]) for states, step in calls)
    open_loop = rollout(policy, features)
    assert path[:, 1].equal(open_loop[:, 1])
    assert not path[:, 2].equal(open_loop[:, 2])


def test_optimizer_tokens_change_the_path(policy, features):
    paths = [rollout(policy, features, optimizer=torch.full((3,), i)) for i in range(3)]
    assert paths[0].equal(rollout(policy, features))
    assert not paths[1].equal(paths[0])
    assert not paths[2].equal(paths[1])


def test_gradients_reach_the_policy_through_all_steps(policy, features):
    rollout(policy, features)[:, -1].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.forward_network.gate_parameters() if p.numel() > 48)


def test_errors(policy, features):
    for steps in (0, 4):
        with pytest.raises(ValueError, match=rf"`policy_steps` must be in 1..3 \(the policy's own\), got {steps}"):
            rollout(policy, features, policy_steps=steps)
    with pytest.raises(ValueError, match=r"`prefix` must hold 1..4 states, got 5"):
        rollout(policy, features, prefix=torch.zeros(3, 5, *policy.config.state_shape))
