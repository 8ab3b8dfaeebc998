import pytest
import torch

from lohp_peft.weight_preparation.optimizers import OFFLINE_OPTIMIZERS, build_optimizer, hyperparameters, take_step

TARGET = torch.tensor([[0.3, -0.2], [0.1, 0.4]])


@pytest.mark.parametrize("name", OFFLINE_OPTIMIZERS)
def test_every_optimizer_descends_with_its_defaults(name):
    state = torch.zeros(2, 2, requires_grad=True)
    optimizer = build_optimizer(name, [state])

    def loss_of():
        return 0.1 * (state - TARGET).square().sum()  # as flat as a head's loss is in the cores of an encoder

    before = loss_of().item()
    for _ in range(60):
        returned = take_step(optimizer, loss_of)
    assert not returned.requires_grad
    assert loss_of().item() < 0.2 * before


@pytest.mark.parametrize("name", OFFLINE_OPTIMIZERS)
def test_padding_without_gradient_stays_zero(name):
    state = torch.zeros(2, 2, requires_grad=True)
    optimizer = build_optimizer(name, [state])
    for _ in range(5):
        take_step(optimizer, lambda: (state[:, 0] - 1).square().sum())
    assert state[:, 0].abs().min() > 0
    assert not state[:, 1].any()


@pytest.mark.parametrize("name", OFFLINE_OPTIMIZERS)
def test_every_default_says_where_it_is_from(name):
    offline = OFFLINE_OPTIMIZERS[name]
    assert "Known: " in offline.provenance
    assert "Ours: " in offline.provenance or "Lo-Hp (abstract)" in offline.provenance
    assert hyperparameters(name) == dict(offline.hyperparameters)


def test_sam_takes_the_gradient_at_the_ascent_point():
    """Against the rule written out: g at w + rho g / |g|, then the AdamW step of size lr from w."""
    state = torch.tensor([2.0, -1.0], requires_grad=True)
    seen = []

    def loss_of():
        seen.append(state.detach().clone())
        return (state**4).sum()

    optimizer = build_optimizer("sam", [state], lr=0.1, rho=0.5)
    take_step(optimizer, loss_of)
    gradient = 4 * torch.tensor([2.0, -1.0]) ** 3
    torch.testing.assert_close(seen[0], torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(seen[1], torch.tensor([2.0, -1.0]) + 0.5 * gradient / gradient.norm())
    assert len(seen) == 2
    torch.testing.assert_close(state.detach(), torch.tensor([1.9, -0.9]))


def test_sgd_has_momentum():
    state = torch.zeros(1, requires_grad=True)
    optimizer = build_optimizer("sgd", [state], lr=1.0, momentum=0.5, nesterov=False)
    moves = []
    for _ in range(3):
        before = state.item()
        take_step(optimizer, lambda: state.sum())
        moves.append(before - state.item())
    assert moves == pytest.approx([1.0, 1.5, 1.75])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"Unknown optimizer 'adamv'.*Did you mean 'adamw'"):
        build_optimizer("adamv", [torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match=r"'sgd' takes .*momentum.*but got \['bets', 'rho'\]"):
        build_optimizer("sgd", [torch.zeros(1, requires_grad=True)], rho=1, bets=2)
