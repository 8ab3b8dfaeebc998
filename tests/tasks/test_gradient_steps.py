"""Gradient steps behind a generated adapter: kept where unseen examples confirm them, and only there."""

import dataclasses

import pytest
import torch

from lohp_peft.candidates import TOO_FEW_FOR_STEPS, GenerationConfig
from lohp_peft.generation import generate_adapters
from lohp_peft.tasks import Examples, leave_one_out_steps, verified_steps
from lohp_peft.tasks.gradient_steps import CHECK_EVERY, _halves
from tiny import build_encoder, build_policy, build_task

TASKS = [build_task("spam", test_rows=40), build_task("mood", n_classes=3, seed=1)]
STEPS = GenerationConfig(gradient_steps=12, gradient_learning_rate=0.1)
SUPPORT = build_task("much", rows=400).draw_support(200, 0)
ALWAYS = dataclasses.replace(STEPS, gradient_margin=-1e6)
GENERATOR = torch.Generator().manual_seed(0)
SHUFFLED = Examples(
    SUPPORT.texts,
    tuple(SUPPORT.labels[i] for i in torch.randperm(len(SUPPORT), generator=GENERATOR).tolist()),
    SUPPORT.label_names,
)


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(adapted=(0, 1, 2), r=4, max_length=24)


@pytest.fixture(scope="module")
def policy(encoder):
    return build_policy(encoder, TASKS, size=0.3)


@pytest.fixture
def generate(policy, encoder):
    def run(supports, config):
        return generate_adapters(policy, encoder.base_model, encoder.tokenizer, supports, config)

    return run


def test_steps_are_kept_where_unseen_examples_confirm_them(generate):
    for choose in (True, False):
        config = dataclasses.replace(STEPS, choose=choose)
        plain, stepped = (
            generate([SUPPORT], dataclasses.replace(config, gradient_steps=n))[0] for n in (0, config.gradient_steps)
        )
        kept = stepped.report.gradient_steps
        assert kept in range(CHECK_EVERY, STEPS.gradient_steps + 1, CHECK_EVERY)
        assert stepped.report.chosen == f"generated + {kept} gradient steps"
        mean, error = stepped.report.candidates[-1].excess
        assert mean + 2 * error < 0
        assert not stepped.state.equal(plain.state)
        assert stepped.path.equal(plain.path)
        assert not stepped.head.weight.equal(plain.head.weight)
        assert plain.report.gradient_steps == 0


def test_steps_that_help_nobody_are_not_kept(generate):
    plain, stepped = (
        generate([SHUFFLED], dataclasses.replace(STEPS, gradient_steps=n))[0] for n in (0, STEPS.gradient_steps)
    )
    assert stepped.state.equal(plain.state)
    assert stepped.report.chosen == plain.report.chosen
    assert f"{CHECK_EVERY} gradient steps change" in stepped.report.reason  # the first look ends them
    assert "not kept" in stepped.report.reason
    assert stepped.report.gradient_steps == 0
    assert "gradient" not in plain.report.reason


def test_the_margin_decides(generate):
    for config, kept in ((dataclasses.replace(STEPS, gradient_margin=1e6), False), (ALWAYS, True)):
        (made,) = generate([SHUFFLED], config)
        assert made.report.chosen.endswith("gradient steps") == kept


def test_too_few_examples(generate):
    (made,) = generate([TASKS[0].draw_support(3, 0)], STEPS)
    assert TOO_FEW_FOR_STEPS in made.report.reason


def test_the_change_is_that_of_unseen_examples(policy, encoder):
    """No steps, no change; and what is measured is not what the steps went down on."""
    encoded, start = encoder.prepare(SHUFFLED.texts), torch.zeros(tuple(policy.space.shape))
    given = encoder, encoded, SHUFFLED.targets, 2, start, policy.scale
    still = verified_steps(*given, steps=0, learning_rate=0.3, margin=-1e6)
    assert (still.change, still.steps, still.confirmed) == ((0.0, 0.0), 0, False)
    assert still.state.equal(start)
    # Labels at random: the examples of the steps are explained better, the others are not.
    taken = verified_steps(*given, steps=12, learning_rate=0.3, margin=2.0)
    mean, error = taken.change
    assert abs(mean) < 3 * error


def test_they_go_on_while_a_further_look_is_better(policy, encoder):
    """The kept adapter is the mean of both halves' at the look before the first one that is no better."""
    encoded, start = encoder.prepare(SUPPORT.texts), torch.zeros(tuple(policy.space.shape))
    given = encoder, encoded, SUPPORT.targets, 2
    settings = {"steps": 40, "learning_rate": 0.3}
    taken = verified_steps(*given, start, policy.scale, **settings, margin=2.0)
    assert taken.confirmed
    assert CHECK_EVERY < taken.steps < 40
    path = list(leave_one_out_steps(*given, _halves(SUPPORT.targets, 0), start, policy.scale, **settings))
    torch.testing.assert_close(taken.state, path[taken.steps - 1].mean(0))
    looks = [
        verified_steps(*given, start, policy.scale, steps=n, learning_rate=0.3, margin=2.0).change[0]
        for n in range(CHECK_EVERY, taken.steps + 1, CHECK_EVERY)
    ]
    assert looks == sorted(looks, reverse=True)
    more = verified_steps(*given, start, policy.scale, **{**settings, "steps": taken.steps + CHECK_EVERY}, margin=2.0)
    assert more.state.equal(taken.state)


def test_a_batch_equals_single_calls_and_a_seed_decides(generate):
    supports, config = [TASKS[1].draw_support(8, 1), TASKS[0].draw_support(8, 0)], dataclasses.replace(ALWAYS, seed=2)
    batch = generate(supports, config)
    for made, support in zip(batch, supports, strict=True):
        (single,) = generate([support], config)
        torch.testing.assert_close(made.state, single.state, atol=1e-4, rtol=1e-3)
    first, again, other = (
        generate(supports[:1], dataclasses.replace(ALWAYS, seed=seed))[0].state for seed in (2, 2, 3)
    )
    assert again.equal(first)
    assert not other.equal(first)


def test_nobody_else_gets_a_gradient(generate, policy, encoder):
    parameters = [*encoder.base_model.parameters(), *policy.parameters()]
    wanted = [p.requires_grad for p in parameters]
    encoder.base_model.requires_grad_(True)
    (made,) = generate([SUPPORT], STEPS)
    encoder.base_model.requires_grad_(False)
    assert all(p.grad is None for p in parameters)
    assert not made.state.requires_grad
    for parameter, before in zip(parameters, wanted, strict=True):
        parameter.requires_grad_(before)


def test_refusals():
    with pytest.raises(ValueError, match="`gradient_steps` must be at least 0, got -1; `gradient_learning_rate`"):
        GenerationConfig(gradient_steps=-1, gradient_learning_rate=0.0)


def test_steps_end_where_a_further_look_is_not_a_number(policy, encoder, monkeypatch):
    """A confirmation is of the adapter that was looked at, not of what comes after it."""

    def broken(*args, **kwargs):
        for step, ends in enumerate(leave_one_out_steps(*args, **kwargs), 1):
            yield ends if step <= CHECK_EVERY else torch.full_like(ends, torch.nan)

    monkeypatch.setattr("lohp_peft.tasks.gradient_steps.leave_one_out_steps", broken)
    encoded = encoder.prepare(SUPPORT.texts)
    start = torch.zeros(tuple(encoder.space.shape))
    taken = verified_steps(
        encoder,
        encoded,
        SUPPORT.targets,
        SUPPORT.n_classes,
        start,
        policy.scale,
        steps=8,
        learning_rate=0.3,
        margin=2.0,
    )
    assert taken.confirmed
    assert taken.steps == CHECK_EVERY
    assert taken.state.isfinite().all()
