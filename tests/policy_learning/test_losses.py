import copy

import pytest
import torch

from lohp_peft.objectives import BackwardReference, hybrid_loss
from lohp_peft.policy import rollout
from lohp_peft.policy_learning.losses import (
    cloning_loss,
    divergence,
    repeat_features,
    segments,
    step_sigmas,
    teacher_forced_means,
)
from lohp_peft.policy_learning.recordings import fit_scales
from lohp_peft.tasks import EpisodeSampler, TaskFeatures
from tiny import build_policy


@pytest.fixture
def policy(encoder, recordings):
    policy = build_policy(encoder)
    fit_scales(policy, recordings)
    return policy


@pytest.fixture
def features(policy):
    p, f = policy.config.principal_directions, policy.config.module_features
    modules, r = policy.config.state_shape[0], policy.config.r
    sizes = (2 * p,), (p + 6,), (modules, 2 * f), (modules, p, r + 1)
    return TaskFeatures(*(torch.randn(6, *size) for size in sizes))


def test_teacher_forcing_along_a_rollout_gives_the_rollout(policy, features):
    optimizers = torch.tensor([0, 1, 2, 0, 1, 2])
    states = rollout(policy, features, optimizer=optimizers)
    means = teacher_forced_means(policy, states, features, optimizers)
    torch.testing.assert_close(means, states[:, 1:], atol=1e-5, rtol=1e-4)


def test_cloning_is_zero_for_the_policys_own_steps_but_for_the_noise(policy, features):
    states = rollout(policy, features).detach()
    other, generators = torch.zeros(6, dtype=torch.long), [torch.Generator() for _ in range(6)]
    assert (cloning_loss(policy, states, features, other, generators) > 1e-4).all()
    policy.config.noise_scale = 1e-3
    far = cloning_loss(policy, states + policy.space.mask, features, other, generators)
    near = cloning_loss(policy, states, features, other, generators)
    assert (near < 1e-3 * far).all()


def test_relative_segments_vanish_at_the_clone_and_cut_all_gradients(policy, features, recordings):
    clone = copy.deepcopy(policy)
    states = recordings.states.clone().requires_grad_()
    losses = recordings.losses.clone().requires_grad_()
    at_clone = segments(policy, clone, states, losses, features, None, 0.1)
    assert not at_clone.log_pf.any()  # whatever the data
    torch.testing.assert_close(at_clone.log_flow[:, -1], -recordings.losses[:, -1] / 0.1)
    with torch.no_grad():
        policy.forward_network.start.add_(0.3)
    moved = segments(policy, clone, states, losses, features, None, 0.1)
    assert moved.log_pf.all()
    loss, _ = hybrid_loss({"recorded": moved}, {"recorded": 1.0})
    loss.backward()
    assert states.grad is None
    assert losses.grad is None
    assert all(p.grad is None for p in clone.parameters())
    for network in (policy.forward_network, policy.log_flow_network):
        assert any(p.grad is not None and p.grad.any() for p in network.parameters())


def test_dropout_does_not_set_the_policy_apart_from_its_clone(policy, features, recordings):
    clone = copy.deepcopy(policy).eval()
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    policy.train()
    found = segments(policy, clone, recordings.states, recordings.losses, features, None, 0.1)
    assert not found.log_pf.any()
    assert policy.training


def test_log_ratios_are_those_of_gaussians(policy, features, recordings):
    clone = copy.deepcopy(policy)
    with torch.no_grad():
        policy.forward_network.start.add_(0.1)
    found = segments(policy, clone, recordings.states, recordings.losses, features, None, 0.1)
    log_prob = {}
    for name, model in (("policy", policy), ("clone", clone)):
        means = teacher_forced_means(model, recordings.states, features, None)
        sigma = policy.sigma(torch.arange(3)).expand_as(means[0])
        normal = torch.distributions.Normal(means.double(), sigma.double())
        log_prob[name] = normal.log_prob(recordings.states[:, 1:].double()).sum((-1, -2))
    torch.testing.assert_close(found.log_pf.double(), log_prob["policy"] - log_prob["clone"], atol=1e-3, rtol=1e-3)


def test_mixed_precision_keeps_log_probabilities_and_rewards_in_float32(policy, features, recordings, bank):
    clone, episode = copy.deepcopy(policy), EpisodeSampler(bank.labels).task_episode("spam", torch.Generator())
    with torch.no_grad():
        policy.forward_network.start.add_(0.3)
    states = recordings.states[:1, -1:]
    arguments = recordings.states, recordings.losses, features, None, 0.1
    exact, loss = segments(policy, clone, *arguments), bank.episode_losses([episode], states)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed, mixed_loss = segments(policy, clone, *arguments), bank.episode_losses([episode], states)[0]
    assert mixed.log_pf.dtype == mixed.log_flow.dtype == torch.float32
    torch.testing.assert_close(mixed.log_pf, exact.log_pf, atol=0.3, rtol=0.05)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy.log_flow_network.out.weight.zero_()
        policy.log_flow_network.out.bias.fill_(1001.3)  # bfloat16 has 1000 and 1004
        flow = policy.log_flow(recordings.states[:, 1], torch.ones(6, dtype=torch.long), features)
    torch.testing.assert_close(flow, torch.full_like(flow, 1001.3))
    torch.testing.assert_close(mixed_loss, loss, atol=1e-4, rtol=1e-4)


def test_repeat(features):
    twice = repeat_features(features, 2)
    assert twice.labels[2].equal(features.labels[1])
    assert twice.labels[3].equal(features.labels[1])


def test_a_backward_policy_takes_the_place_of_the_clone(policy, features, recordings):
    backward = BackwardReference.fit(recordings.states)
    found = segments(policy, backward, recordings.states, recordings.losses, features, None, 0.1)
    means, sigma = teacher_forced_means(policy, recordings.states, features, None), step_sigmas(policy, 3)
    forward = torch.distributions.Normal(means.double(), sigma.expand_as(means[0]).double())
    expected = forward.log_prob(recordings.states[:, 1:].double()).sum((-1, -2))
    torch.testing.assert_close(found.log_pf.double(), expected, atol=1e-2, rtol=1e-3)
    for k in range(3):
        steps = torch.full((6,), k)
        assert found.log_ref[:, k].equal(
            backward.log_prob(recordings.states[:, k], recordings.states[:, k + 1], steps)
        )
    _, diagnostics = hybrid_loss({"recorded": found}, {"recorded": 1.0})
    assert diagnostics["recorded/residual"].isfinite()


def test_divergence_is_that_of_gaussians(policy, features):
    clone = copy.deepcopy(policy)
    assert not divergence(policy, clone, features).any()
    with torch.no_grad():
        policy.forward_network.start.add_(0.1)
    states = rollout(policy, features)
    sides = []
    for model in (policy, clone):
        means = teacher_forced_means(model, states, features, None)
        sides.append(torch.distributions.Normal(means, step_sigmas(policy, 3).expand_as(means)))
    expected = torch.distributions.kl_divergence(*sides).sum((1, 2, 3))
    torch.testing.assert_close(divergence(policy, clone, features), expected, rtol=1e-3, atol=1e-4)


def test_a_policy_for_a_backward_reference_does_not_read_its_previous_move(policy, features, recordings):
    states, step = recordings.states[:, 1], torch.ones(6, dtype=torch.long)
    assert not policy.forward_policy(states, step, features, states - 1).equal(
        policy.forward_policy(states, step, features)
    )
    policy.config.reads_previous = False
    assert policy.forward_policy(states, step, features, states - 1).equal(
        policy.forward_policy(states, step, features)
    )
