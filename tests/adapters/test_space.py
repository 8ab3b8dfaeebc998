import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.conftest import TARGETS, build_model, random_adapter
from lohp_peft.adapters.layout import AdapterLayout, ModuleSpec
from lohp_peft.adapters.space import CoreSpace, LoraBSpace, WeightSpace

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}  # the bases are stored as float32


def small_spaces():
    layout = AdapterLayout((ModuleSpec("0.a", 6, 5, "a", 0), ModuleSpec("1.b", 4, 9, "b", 1)))
    return [
        LoraBSpace.seeded(layout, 3),
        CoreSpace.from_trajectories(layout, 3, [random_adapter(layout, 2, seed=s) for s in range(5)]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_then_encode(space, dtype):
    state = torch.randn(space.shape, dtype=dtype).masked_fill(~space.mask, 0.0)
    adapter = space.decode(state)
    encoded = space.encode(adapter)
    assert encoded.state.dtype == dtype
    torch.testing.assert_close(encoded.state, state, atol=TOLERANCE[dtype], rtol=0)
    assert all(abs(kept - 1) < 1e-5 for kept in encoded.energy_kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_adapter_inside_the_space_keeps_its_update(space, dtype):
    inside = space.decode(torch.randn(space.shape, dtype=dtype).masked_fill(~space.mask, 0.0))
    mixed = {}
    for name, (a, b) in inside.items():
        m = torch.randn(space.r, space.r, dtype=torch.float64) + 3 * torch.eye(space.r, dtype=torch.float64)
        mixed[name] = ((m @ a.double()).to(dtype), (b.double() @ m.inverse()).to(dtype))
    for name, delta in space.delta_weight(space.encode(mixed).state).items():
        expected = inside[name][1] @ inside[name][0]
        torch.testing.assert_close(delta, expected, atol=3 * TOLERANCE[dtype], rtol=0)


def test_rank_and_shapes(space, state):
    for spec, (a, b) in zip(space.layout.modules, space.decode(state).values(), strict=True):
        assert a.shape == (space.r, spec.d_in)
        assert b.shape == (spec.d_out, space.r)
        torch.testing.assert_close(a @ a.T, torch.eye(space.r), atol=1e-5, rtol=0)


def test_norm_of_the_state_is_that_of_the_update(space, state):
    for i, delta in enumerate(space.delta_weight(state).values()):
        torch.testing.assert_close(state[i].norm(), delta.norm())


def test_energy_kept_is_the_share_of_the_update(space):
    adapter = random_adapter(space.layout, 2)
    encoded = space.encode(adapter)
    for name, delta in space.delta_weight(encoded.state).items():
        whole = adapter[name][1] @ adapter[name][0]
        share = float(delta.square().sum() / whole.square().sum())
        assert encoded.energy_kept[name] == pytest.approx(share, abs=1e-4)
        # a projection: what is left over is orthogonal to what is kept
        assert float((delta * (whole - delta)).sum()) == pytest.approx(0, abs=1e-3)
    assert min(encoded.energy_kept.values()) < 0.99


@pytest.mark.parametrize("space", small_spaces(), ids=lambda s: s.kind)
@given(seed=st.integers(0, 2**16), rank=st.integers(1, 4), log_gain=st.floats(-3, 3))
@settings(max_examples=20, deadline=None)
def test_gauge_invariance(space, seed, rank, log_gain):
    """(B M^-1, M A) is the same update as (B, A), so it is the same state."""
    adapter = random_adapter(space.layout, rank, torch.float64, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    other = {}
    for name, (a, b) in adapter.items():
        m = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        m = torch.linalg.qr(m)[0] @ torch.diag(torch.linspace(1, 2, rank, dtype=torch.float64)) * 10**log_gain
        other[name] = (m @ a, b @ m.inverse())
    torch.testing.assert_close(space.encode(other).state, space.encode(adapter).state, atol=1e-9, rtol=1e-9)


def test_missing_modules_are_zero(space):
    adapter = random_adapter(space.layout, 2)
    name = space.layout.modules[1].name
    encoded = space.encode({name: adapter[name]})
    assert encoded.state[1].any()
    assert not encoded.state[[0, *range(2, len(encoded.state))]].any()
    assert set(encoded.energy_kept) == {name}
    assert not space.encode({}).state.any()


def test_a_zero_update_keeps_all_of_its_energy(space):
    spec = space.layout.modules[0]
    encoded = space.encode({spec.name: (torch.ones(2, spec.d_in), torch.zeros(spec.d_out, 2))})
    assert encoded.energy_kept == {spec.name: 1.0}


def test_everything_that_does_not_fit_is_named(space):
    spec = space.layout.modules[0]
    wrong = {"head": (torch.ones(1, 2), torch.ones(2, 1)), spec.name: (torch.ones(2, 3), torch.ones(spec.d_out, 2))}
    with pytest.raises(ValueError, match="head: not in the layout") as error:
        space.encode(wrong)
    assert f"{spec.name}: A (2, 3)" in str(error.value)
    with pytest.raises(ValueError, match="has shape"):
        space.decode(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="at least 1"):
        LoraBSpace.seeded(space.layout, 0)
    with pytest.raises(ValueError, match="exceeds the smaller side"):
        LoraBSpace.seeded(space.layout, 20)


def test_apply_is_the_update(space, state):
    for i, (spec, delta) in enumerate(zip(space.layout.modules, space.delta_weight(state).values(), strict=True)):
        x = torch.randn(2, 5, spec.d_in)
        torch.testing.assert_close(space.apply(i, x, state[None]), x @ delta.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(space.apply(i, x[:, 0], state[None]), x[:, 0] @ delta.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [(), (4,), (2, 3)])
def test_apply_gives_each_input_its_own_adapter(space, tokens):
    states = torch.randn(3, *space.shape, requires_grad=True)
    owner = torch.tensor([2, 0, 0, 1])
    for i, spec in enumerate(space.layout.modules):
        x = torch.randn(4, *tokens, spec.d_in)
        found = space.apply(i, x, states, owner)
        assert found.shape == (4, *tokens, spec.d_out)
        for n in range(4):
            expected = space.apply(i, x[n : n + 1], states[owner[n]][None])
            torch.testing.assert_close(found[n : n + 1], expected, atol=1e-5, rtol=1e-4)
    found.sum().backward()
    assert states.grad.isfinite().all()
    assert states.grad[:, -1].any()
    with pytest.raises(ValueError, match="`owner`"):
        space.apply(0, torch.randn(4, space.layout.modules[0].d_in), states)


def test_tensors_round_trip(space, state):
    again = WeightSpace.from_tensors(space.layout, space.kind, space.r, space.to_tensors())
    assert again.shape == space.shape
    assert torch.equal(again.mask, space.mask)
    for (a, b), (c, d) in zip(space.decode(state).values(), again.decode(state).values(), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_bases_that_do_not_fit(space):
    tensors = space.to_tensors()
    name = space.layout.modules[1].name
    with pytest.raises(ValueError, match=r"input\.1 are missing"):
        WeightSpace.from_tensors(
            space.layout, space.kind, space.r, {k: v for k, v in tensors.items() if k != "input.1"}
        )
    with pytest.raises(ValueError, match=f"{name} d_in: columns are not orthonormal"):
        WeightSpace.from_tensors(space.layout, space.kind, space.r, {**tensors, "input.1": tensors["input.1"] * 2})
    with pytest.raises(ValueError, match=f"{name} d_in: shape"):
        WeightSpace.from_tensors(space.layout, space.kind, space.r, {**tensors, "input.1": tensors["input.1"].T})
    with pytest.raises(ValueError, match="`kind`"):
        WeightSpace.from_tensors(space.layout, "svd", space.r, tensors)


def test_mask_marks_what_decoding_reads(space):
    if space.kind == "core":
        assert space.mask.all()
        return
    sizes = [s.d_out * space.r for s in space.layout.modules]
    assert space.mask.sum(1).tolist() == sizes
    assert space.width == max(sizes)
    noise = torch.randn(space.shape)
    for (_, b), (_, c) in zip(
        space.decode(noise).values(), space.decode(noise.masked_fill(~space.mask, 7.0)).values(), strict=True
    ):
        assert torch.equal(b, c)


def test_base_weight_bases_hold_the_leading_part_of_the_weights(kind):
    model = build_model(kind)
    layout = AdapterLayout.from_model(model, TARGETS[kind])
    space = CoreSpace.from_base_weights(model, layout, r=3)
    for i, spec in enumerate(layout.modules):
        weight = model.get_submodule(spec.name).weight.detach()
        weight = weight.T if kind == "gpt2" else weight
        assert weight.shape == (spec.d_out, spec.d_in)
        core = space.output_basis(i).T @ weight @ space.input_basis(i)
        singular = torch.linalg.svdvals(weight)[:3]
        torch.testing.assert_close(core, torch.diag(singular), atol=1e-4, rtol=0)


def test_trajectory_bases_hold_what_the_trajectories_share(layout):
    """Updates inside one 3-dimensional space on both sides are held exactly, whatever the gauge of A and B."""
    hidden = (
        LoraBSpace.seeded(layout, 3, seed=5),
        {s.name: torch.linalg.qr(torch.randn(s.d_out, 3))[0] for s in layout.modules},
    )
    adapters = []
    for seed in range(6):
        torch.manual_seed(seed)
        gains = {s.name: torch.randn(3, 3) for s in layout.modules}
        adapters.append(
            {
                s.name: (gains[s.name] @ hidden[0].input_basis(i).T, hidden[1][s.name] @ torch.randn(3, 3))
                for i, s in enumerate(layout.modules)
            }
        )
    space = CoreSpace.from_trajectories(layout, 3, iter(adapters))
    assert min(min(space.encode(a).energy_kept.values()) for a in adapters) > 0.9999
    smaller = CoreSpace.from_trajectories(layout, 1, adapters)
    assert min(min(smaller.encode(a).energy_kept.values()) for a in adapters) < 0.9


def test_trajectory_bases_are_the_joint_svd(layout):
    """The sketch of many updates is exact: the same subspaces as from the sums of the Gram matrices."""
    adapters = [random_adapter(layout, 2, seed=s) for s in range(40)]
    space = CoreSpace.from_trajectories(layout, 2, adapters)
    deltas = [{name: (b @ a).double() for name, (a, b) in adapter.items()} for adapter in adapters]
    norms = [sum(d.square().sum() for d in delta.values()).sqrt() for delta in deltas]
    for i, spec in enumerate(layout.modules):
        stack = [delta[spec.name] / norm for delta, norm in zip(deltas, norms, strict=True)]
        for basis, gram in (
            (space.input_basis(i), sum(d.T @ d for d in stack)),
            (space.output_basis(i), sum(d @ d.T for d in stack)),
        ):
            expected = torch.linalg.eigh(gram)[1][:, -2:].float()
            torch.testing.assert_close(basis @ basis.T, expected @ expected.T, atol=1e-4, rtol=0)


def test_fewer_updates_than_directions():
    space = small_spaces()[1]
    one = [random_adapter(space.layout, 1)]
    wide = CoreSpace.from_trajectories(space.layout, 4, one)
    assert min(wide.encode(one[0]).energy_kept.values()) > 0.9999


def test_modules_without_an_update_have_no_bases(layout):
    adapter = random_adapter(layout, 2)
    first, second = layout.modules[0].name, layout.modules[1].name
    adapter.pop(first)
    adapter[second] = (adapter[second][0], adapter[second][1] * 0)
    with pytest.raises(ValueError, match="No recorded update") as error:
        CoreSpace.from_trajectories(layout, 2, [adapter])
    assert first in str(error.value)
    assert second in str(error.value)


def test_seeded_space_is_the_same_for_everybody(layout):
    a, b = LoraBSpace.seeded(layout, 2, seed=3), LoraBSpace.seeded(layout, 2, seed=3)
    assert all(torch.equal(a.input_basis(i), b.input_basis(i)) for i in range(len(layout.modules)))
    assert not torch.equal(a.input_basis(0), LoraBSpace.seeded(layout, 2, seed=4).input_basis(0))
