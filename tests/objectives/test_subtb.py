"""SubTB(λ) against its formula, its limits, its invariances and two toys that are solved exactly."""

import math

import pytest
import torch

from lohp_peft.objectives import (
    forward_looking_log_flow,
    gaussian_log_ratio,
    sub_trajectory_balance_loss,
    sub_trajectory_potentials,
)

from .reference import BridgeToy, RelativeToy, naive_loss

BATCH, TIME = 6, 5
LAMBDAS = [0.3, 0.9, 1.0, 2.0]


@pytest.fixture
def paths() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, TIME), (BATCH, TIME), (BATCH, TIME + 1)]
    return [4 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def trajectories(batch: int, time: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Wide random walks from 0: data of no policy in particular."""
    generator = torch.Generator().manual_seed(seed)
    steps = 1.5 * torch.randn((batch, time, dim), generator=generator, dtype=torch.float64)
    return torch.nn.functional.pad(steps.cumsum(1), (0, 0, 1, 0))


def gradients(function, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


def spread(potentials: torch.Tensor) -> float:
    return float((potentials.amax(1) - potentials.amin(1)).max())


@pytest.mark.parametrize("lam", [0.0, *LAMBDAS, math.inf])
@pytest.mark.parametrize("delta", [None, 5.0])
def test_exact_bridge_toy_is_balanced(lam, delta):
    toy = BridgeToy(m=torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
    states = trajectories(32, toy.steps, 3)
    paths = toy.log_pf(states), toy.log_pb(states), toy.log_flow(states)
    assert spread(sub_trajectory_potentials(*paths)) < 1e-9
    loss = lambda pf, flow: sub_trajectory_balance_loss(pf, paths[1], flow, lam=lam, robust_delta=delta)  # noqa: E731
    assert loss(paths[0], paths[2]) < 1e-18
    assert all(g.abs().max() < 1e-9 for g in gradients(loss, paths[0], paths[2]))


@pytest.mark.parametrize("lam", [0.0, *LAMBDAS, math.inf])
def test_exact_relative_toy_is_balanced(lam):
    generator = torch.Generator().manual_seed(1)
    drifts = torch.randn((6, 2), generator=generator, dtype=torch.float64)
    variances = 0.1 + torch.rand(6, generator=generator, dtype=torch.float64)
    toy = RelativeToy(m=torch.tensor([1.0, -2.0], dtype=torch.float64), drifts=drifts, variances=variances)
    states = trajectories(32, 6, 2)
    ratio, value = toy.log_ratio(states), toy.value(states)
    assert spread(sub_trajectory_potentials(ratio, None, value)) < 1e-9
    loss = lambda pf, flow: sub_trajectory_balance_loss(pf, None, flow, lam=lam)  # noqa: E731
    assert loss(ratio, value) < 1e-18
    assert all(g.abs().max() < 1e-9 for g in gradients(loss, ratio, value))


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("delta", [None, 3.0])
def test_equals_the_double_loop(paths, lam, delta):
    lengths = torch.tensor([5, 3, 1, 2, 4, 5])
    loss = sub_trajectory_balance_loss(*paths, lam=lam, lengths=lengths, robust_delta=delta, reduction="none")
    assert loss.tolist() == pytest.approx(naive_loss(*paths, lam, lengths, delta), rel=1e-12)
    mean = sub_trajectory_balance_loss(*paths, lam=lam, lengths=lengths, robust_delta=delta)
    assert mean.item() == pytest.approx(loss.mean().item(), rel=1e-14)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("delta", [None, 3.0])
def test_gradient_is_that_of_finite_differences(paths, lam, delta):
    lengths = torch.tensor([5, 3, 1, 2, 4, 5])

    def loss(log_pf, log_flow):
        return sub_trajectory_balance_loss(log_pf, paths[1], log_flow, lam=lam, lengths=lengths, robust_delta=delta)

    assert torch.autograd.gradcheck(loss, [paths[0].clone().requires_grad_(), paths[2].clone().requires_grad_()])


def test_limits_are_detailed_and_trajectory_balance(paths):
    u = sub_trajectory_potentials(*paths)
    detailed, full = u.diff(dim=1).square().mean(), (u[:, -1] - u[:, 0]).square().mean()
    assert sub_trajectory_balance_loss(*paths, lam=0.0).item() == pytest.approx(detailed.item(), rel=1e-14)
    assert sub_trajectory_balance_loss(*paths, lam=1e-9).item() == pytest.approx(detailed.item(), rel=1e-7)
    assert sub_trajectory_balance_loss(*paths, lam=math.inf).item() == pytest.approx(full.item(), rel=1e-14)
    assert sub_trajectory_balance_loss(*paths, lam=1e9).item() == pytest.approx(full.item(), rel=1e-7)
    lengths = torch.tensor([5, 3, 1, 2, 4, 5])
    ragged = (u.gather(1, lengths[:, None]).squeeze(1) - u[:, 0]).square()
    loss = sub_trajectory_balance_loss(*paths, lam=math.inf, lengths=lengths, reduction="none")
    assert torch.allclose(loss, ragged, rtol=1e-14)


def test_one_transition_has_one_loss(paths):
    log_pf, log_ref, log_flow = paths[0][:, :1], paths[1][:, :1], paths[2][:, :2]
    expected = (log_flow[:, 0] + log_pf[:, 0] - log_ref[:, 0] - log_flow[:, 1]).square().mean().item()
    for lam in (0.0, *LAMBDAS, math.inf):
        assert sub_trajectory_balance_loss(log_pf, log_ref, log_flow, lam=lam).item() == pytest.approx(expected)


def test_variance_form_equals_pairs(paths):
    u = sub_trajectory_potentials(*paths)
    pairs = (u[:, :, None] - u[:, None, :]).square().sum((1, 2)) / (TIME * (TIME + 1))
    loss = sub_trajectory_balance_loss(*paths, lam=1.0, reduction="none")
    assert torch.allclose(loss, pairs, rtol=1e-13)
    nearly = sub_trajectory_balance_loss(*paths, lam=1.0, robust_delta=1e9, reduction="none")
    assert torch.allclose(loss, nearly, rtol=1e-12)


def test_residuals_add_up(paths):
    log_pf, log_ref, log_flow = paths
    u = sub_trajectory_potentials(*paths)
    direct = log_flow[:, 1] + (log_pf - log_ref)[:, 1:4].sum(1) - log_flow[:, 4]
    assert torch.allclose(u[:, 4] - u[:, 1], direct, rtol=1e-12)
    assert torch.allclose((u[:, 2] - u[:, 1]) + (u[:, 4] - u[:, 2]), direct, rtol=1e-12)


@pytest.mark.parametrize("lam", [0.0, *LAMBDAS, math.inf])
def test_long_trajectories_do_not_overflow(lam):
    generator = torch.Generator().manual_seed(2)
    log_pf = torch.randn((2, 2000), generator=generator)
    log_flow = torch.randn((2, 2001), generator=generator)
    lengths = torch.tensor([2000, 900])
    loss = sub_trajectory_balance_loss(log_pf, None, log_flow, lam=lam, lengths=lengths, reduction="none")
    assert loss.isfinite().all()
    double = (log_pf.double(), None, log_flow.double())
    exact = sub_trajectory_balance_loss(*double, lam=lam, lengths=lengths, reduction="none")
    assert torch.allclose(loss.double(), exact, rtol=1e-3)
    if lam == 2.0:  # only the longest segments count: sum over gaps g of 2^-g
        u = sub_trajectory_potentials(*double)[1, :901]
        spans = range(900, 840, -1)
        squares = {d: (u[d:] - u[:-d]).square().sum().item() for d in spans}
        total = sum(squares[d] * 2.0 ** (d - 900) for d in spans)
        assert exact[1].item() == pytest.approx(total / sum((901 - d) * 2.0 ** (d - 900) for d in spans), rel=1e-9)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_invariances(paths, lam):
    log_pf, log_ref, log_flow = paths
    loss = sub_trajectory_balance_loss(*paths, lam=lam).item()

    def again(*changed, **options):
        return sub_trajectory_balance_loss(*changed, lam=lam, **options).item()

    shared = torch.linspace(-9, 9, BATCH * TIME, dtype=torch.float64).view(BATCH, TIME)
    assert again(log_pf, log_ref, log_flow + 7.5) == pytest.approx(loss, rel=1e-12)
    assert again(log_pf + shared, log_ref + shared, log_flow) == pytest.approx(loss, rel=1e-12)
    assert again(log_pf - log_ref, None, log_flow) == pytest.approx(loss, rel=1e-12)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    each = sub_trajectory_balance_loss(*paths, lam=lam, reduction="none")
    assert torch.equal(sub_trajectory_balance_loss(*(x[order] for x in paths), lam=lam, reduction="none"), each[order])


@pytest.mark.parametrize("lam", [0.0, *LAMBDAS, math.inf])
@pytest.mark.parametrize("delta", [None, 3.0])
@pytest.mark.parametrize("garbage", [0.0, 1e30, math.nan, -math.inf])
def test_padding_has_no_part(paths, lam, delta, garbage):
    options = {"lam": lam, "robust_delta": delta}
    padded = [torch.nn.functional.pad(x, (0, 3), value=garbage) for x in paths]
    lengths = torch.full((BATCH,), TIME)
    loss = sub_trajectory_balance_loss(*padded, lengths=lengths, **options)
    assert loss.item() == pytest.approx(sub_trajectory_balance_loss(*paths, **options).item(), rel=1e-13)
    log_pf, log_flow = gradients(
        lambda pf, flow: sub_trajectory_balance_loss(pf, padded[1], flow, lengths=lengths, **options),
        padded[0],
        padded[2],
    )
    assert not log_pf[:, TIME:].any()
    assert not log_flow[:, TIME + 1 :].any()
    assert log_pf.isfinite().all()
    assert log_flow.isfinite().all()


def test_forward_looking_is_a_reparameterisation(paths):
    log_pf, log_ref, log_flow = paths
    losses = torch.rand(BATCH, TIME + 1, dtype=torch.float64)
    temperature = 0.1
    log_flow = torch.cat([log_flow[:, :-1], -losses[:, -1:] / temperature], 1)
    for weights in (None, torch.linspace(0, 1, TIME + 1, dtype=torch.float64)):
        residual_flow = log_flow + (1.0 if weights is None else weights) * losses / temperature
        rebuilt = forward_looking_log_flow(residual_flow, losses, temperature, weights)
        assert torch.allclose(rebuilt, log_flow, rtol=1e-12)
        plain = gradients(lambda pf: sub_trajectory_balance_loss(pf, log_ref, log_flow), log_pf)
        looking = gradients(lambda pf, flow=rebuilt: sub_trajectory_balance_loss(pf, log_ref, flow), log_pf)
        assert torch.allclose(plain[0], looking[0], rtol=1e-10)


def test_terminal_flow_is_the_reward():
    residual_flow = torch.full((2, 4), 11.0, requires_grad=True)
    losses = torch.arange(8.0).view(2, 4).requires_grad_()
    log_flow = forward_looking_log_flow(residual_flow, losses, 2.0, weights=0.25)
    assert log_flow[:, -1].tolist() == [-1.5, -3.5]
    assert log_flow[0, :3].tolist() == [11.0, 10.875, 10.75]
    log_flow.sum().backward()
    assert losses.grad is None
    assert residual_flow.grad.tolist() == [[1, 1, 1, 0]] * 2


def test_segments_end_where_they_are_said_to_end():
    residual_flow, losses = torch.ones(3, 4), torch.full((3, 4), 2.0)
    is_terminal = torch.zeros(3, 4, dtype=torch.bool)
    is_terminal[1, 2] = True  # a shorter trajectory; row 0 is a segment cut out before the end
    log_flow = forward_looking_log_flow(residual_flow, losses, 1.0, weights=0.5, is_terminal=is_terminal)
    assert log_flow.tolist() == [[0, 0, 0, 0], [0, 0, -2, 0], [0, 0, 0, 0]]


def test_unscored_states_need_no_loss():
    losses = torch.tensor([[math.nan, math.nan, 3.0]])
    assert forward_looking_log_flow(torch.ones(1, 3), losses, 1.0, weights=0.0).tolist() == [[1, 1, -3]]


def test_no_gradient_through_reference_or_states():
    mean = torch.zeros(2, TIME, 3, 4, requires_grad=True)
    states = torch.randn(2, TIME + 1, 3, 4, requires_grad=True)
    ref_mean = torch.randn(2, TIME, 3, 4, requires_grad=True)
    log_ref = torch.randn(2, TIME, requires_grad=True)
    ratio = gaussian_log_ratio(states[:, 1:], mean, ref_mean, 0.3)
    sub_trajectory_balance_loss(ratio, log_ref, torch.zeros(2, TIME + 1)).backward()
    assert mean.grad.abs().sum() > 0
    assert states.grad is None
    assert ref_mean.grad is None
    assert log_ref.grad is None


def test_reference_policy_at_infinite_temperature_has_no_residual():
    generator = torch.Generator().manual_seed(4)
    states = 100 * torch.randn((3, TIME + 1, 2, 7), generator=generator)
    mean = torch.randn((3, TIME, 2, 7), generator=generator)
    ratio = gaussian_log_ratio(states[:, 1:], mean, mean.clone(), 1e-3)
    losses = torch.rand((3, TIME + 1), generator=generator)
    log_flow = forward_looking_log_flow(torch.zeros(3, TIME + 1), losses, math.inf)
    assert not sub_trajectory_potentials(ratio, None, log_flow).any()
    for lam in (0.0, *LAMBDAS, math.inf):
        assert sub_trajectory_balance_loss(ratio, None, log_flow, lam=lam).item() == 0


@pytest.mark.parametrize("time", [5, 6, 10, 18])
def test_constant_potentials_have_no_loss_in_float32(time):
    log_flow = torch.linspace(-2000.0, 2000.0, 99)[:, None].expand(-1, time + 1)
    assert sub_trajectory_balance_loss(torch.zeros(99, time), None, log_flow).item() == 0


def test_only_loss_over_temperature_matters(paths):
    losses = paths[2].abs()
    plain = forward_looking_log_flow(paths[2], losses, 0.03)
    scaled = forward_looking_log_flow(paths[2], 1000 * losses, torch.full((BATCH, 1), 30.0, dtype=torch.float64))
    assert torch.allclose(plain, scaled, rtol=1e-13)


def test_pseudo_huber_is_square_near_and_linear_far():
    def one(residual: float, delta: float | None) -> float:
        log_flow = torch.tensor([[residual, 0.0]])
        return sub_trajectory_balance_loss(torch.zeros(1, 1), None, log_flow, robust_delta=delta).item()

    assert one(1e-4, 10.0) == pytest.approx(1e-8, rel=1e-4)  # in float32, where sqrt(1 + x²) - 1 is 0
    assert one(1e6, 10.0) == pytest.approx(2 * 10.0 * 1e6, rel=1e-3)


def test_half_precision_is_widened():
    log_pf, log_flow = torch.full((1, 4), 0.1, dtype=torch.bfloat16), torch.zeros(1, 5, dtype=torch.bfloat16)
    assert sub_trajectory_potentials(log_pf, log_pf, log_flow).dtype == torch.float32
    assert sub_trajectory_balance_loss(log_pf, None, log_flow).dtype == torch.float32


def test_errors_name_everything_that_is_wrong():
    with pytest.raises(ValueError, match=r"(?s)log_ref.*log_flow.*lengths"):
        sub_trajectory_balance_loss(
            torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3), lengths=torch.ones(3, dtype=torch.long)
        )
    with pytest.raises(ValueError, match=r"\[0, 4\] in rows \[0, 2\]"):
        sub_trajectory_balance_loss(torch.zeros(3, 3), None, torch.zeros(3, 4), lengths=torch.tensor([0, 1, 4]))
    with pytest.raises(ValueError, match=r"(?s)lam.*robust_delta.*reduction"):
        sub_trajectory_balance_loss(
            torch.zeros(1, 1), None, torch.zeros(1, 2), lam=-1.0, robust_delta=0.0, reduction="sum"
        )
    with pytest.raises(ValueError, match="temperature"):
        forward_looking_log_flow(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)
    with pytest.raises(ValueError, match="same shape"):
        forward_looking_log_flow(torch.zeros(1, 2), torch.zeros(1, 3), 1.0)
