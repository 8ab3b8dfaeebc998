import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import CoreSpace, LoraBSpace
from lohp_peft.policy import LoHpPolicy, LoHpPolicyConfig, rollout
from lohp_peft.policy.networks import ItemDropout
from lohp_peft.policy.reference_set import FEATURES
from lohp_peft.tasks import TaskFeatures, TextEncoder
from tiny import build_encoder, build_policy, features_of

STEPS = torch.tensor([0, 1, 2])


@pytest.fixture
def state(policy):
    return torch.randn(3, *policy.config.state_shape) * policy.space.mask


def test_without_gates_and_free_moves_the_mean_walks_straight_to_the_start_adapter(policy, features, state):
    with torch.no_grad():
        policy.forward_network.out.weight.zero_()
        policy.forward_network.out.bias.zero_()
        policy.forward_network.pull.zero_()
        for gates in (policy.forward_network.gates, policy.forward_network.feedback_gates):
            gates.weight.zero_()
            gates.bias.zero_()
    end = policy.forward_network.start * policy.scale
    torch.testing.assert_close(policy.forward_policy(state, STEPS, features), state + end / 3)
    path = rollout(policy, features)[0]
    torch.testing.assert_close(path, torch.linspace(0, 1, 4)[:, None, None] * end)


def test_the_pull_takes_back_a_share_of_the_state(policy, features, state):
    def pulled(share):
        with torch.no_grad():
            policy.forward_network.pull.fill_(share)
        return policy.forward_policy(state, STEPS, features)

    torch.testing.assert_close(pulled(0.0) - pulled(0.25), 0.25 * state)
    torch.testing.assert_close(pulled(0.0) - pulled(3.0), state)  # all of it at most
    torch.testing.assert_close(pulled(0.0), pulled(-1.0))


@pytest.mark.parametrize("share", [-0.1, 0.0, 0.5, 1.1])
def test_a_pull_out_of_bounds_still_learns(policy, features, state, share):
    """A few early steps take it below 0, from where it has to come back."""
    with torch.no_grad():
        policy.forward_network.pull.fill_(share)
    policy.forward_policy(state, STEPS, features).sum().backward()
    assert policy.forward_network.pull.grad[STEPS].ne(0).all()
    policy.zero_grad()


def test_free_moves_are_bounded_in_units_of_the_recorded_step(policy, features, state):
    with torch.no_grad():
        policy.forward_network.out.bias.fill_(50.0)
    before = policy.forward_policy(state, STEPS, features)
    with torch.no_grad():
        policy.forward_network.out.weight.zero_()
        policy.forward_network.out.bias.zero_()
    move = before - policy.forward_policy(state, STEPS, features)
    assert (move.abs() <= 3 * policy.step_rms[STEPS] + 1e-5).all()
    assert (move.abs() > 2.9 * policy.step_rms[STEPS]).all()


def test_a_new_policy_has_no_free_moves_and_no_log_flow(policy, features, state):
    new = LoHpPolicy(policy.config)
    new.set_space(policy.space)
    assert not rollout(new.eval(), features)[:, 0].any()
    assert not new.forward_network.out.weight.any()
    assert not new.log_flow(state, STEPS, features).any()


@pytest.mark.parametrize("changed", ["features", "step", "state", "previous", "optimizer"])
def test_the_mean_reads_its_inputs(policy, features, state, changed):
    arguments = {"state": state, "step": STEPS, "features": features, "previous": state * 0.5}
    arguments["optimizer"] = torch.tensor([1, 1, 1])
    before = policy.forward_policy(**arguments) - arguments["state"]
    other = {
        "features": features.map(lambda part: part.roll(1, 0)),
        "step": torch.tensor([1, 2, 0]),
        "state": state + 0.1 * policy.space.mask,
        "previous": state,
        "optimizer": torch.tensor([2, 0, 2]),
    }
    arguments[changed] = other[changed]
    after = policy.forward_policy(**arguments) - arguments["state"]
    assert ((after - before).abs().amax((1, 2)) > 1e-5).all()


def test_rows_do_not_read_each_other(policy, features, state):
    whole = policy.forward_policy(state, STEPS, features)
    torch.testing.assert_close(
        policy.forward_policy(state[1:2], STEPS[1:2], features[1:2])[0], whole[1], atol=1e-5, rtol=1e-4
    )


def test_padding_stays_zero(tasks):
    """Query, value and the wider intermediate layer: rows of different width in the space of B."""
    narrow = build_encoder()
    model = narrow.base_model
    model.encoder.layer[2].intermediate.dense = torch.nn.Linear(16, 24)
    model.encoder.layer[2].output.dense = torch.nn.Linear(24, 16)
    layout = AdapterLayout.from_model(model, ["query", "intermediate.dense"], [2])
    encoder = TextEncoder(model, narrow.tokenizer, LoraBSpace.seeded(layout, 2))
    policy = build_policy(encoder)
    assert not policy.space.mask.all()
    features = TaskFeatures.stack([features_of(policy, encoder, tasks[0].draw_support(4, 0))])
    path = rollout(policy, features, noise=1.0, generator=torch.Generator().manual_seed(0))
    assert not path[:, :, ~policy.space.mask].any()
    assert path[:, 1:, policy.space.mask].all()


def test_sigma_follows_the_recorded_steps(policy):
    torch.testing.assert_close(policy.sigma(STEPS), policy.config.noise_scale * policy.step_rms)


def test_the_space_must_fit(policy):
    new = LoHpPolicy(policy.config)
    with pytest.raises(RuntimeError, match="no weight space yet"):
        new.space  # noqa: B018
    with pytest.raises(RuntimeError, match="no weight space yet"):
        new.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="policy needs .*'core', 2.* but the weight space has .*'lora_b', 2"):
        new.set_space(LoraBSpace.seeded(policy.layout, 2))


def test_round_trip_bit_for_bit(policy, features, tmp_path):
    policy.config.provenance = {"seed": 3}
    policy.save_pretrained(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors", ".safetensors"]
    loaded = LoHpPolicy.from_pretrained(tmp_path)
    assert not loaded.training
    mine, theirs = policy.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)
    assert rollout(loaded, features).equal(rollout(policy, features))
    spaces = policy.space.to_tensors(), loaded.space.to_tensors()
    assert isinstance(loaded.space, CoreSpace)
    assert all(spaces[0][name].equal(spaces[1][name]) for name in spaces[0])
    assert loaded.layout == policy.layout
    assert loaded.config.provenance == {"seed": 3}
    assert loaded.config.optimizers == ["adamw", "sam"]
    ours, kept = policy.reference_set, loaded.reference_set
    assert (kept.names, kept.families) == (ours.names, ours.families)
    assert kept.states.equal(ours.states)
    assert kept.features.modules.equal(ours.features.modules)


def test_a_policy_without_reference_set(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    policy.reference_set = None
    policy.save_pretrained(tmp_path)  # nor does it take that of the policy before it
    assert LoHpPolicy.from_pretrained(tmp_path).reference_set is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "space.safetensors"])
def test_missing_files_are_named(policy, tmp_path, name):
    policy.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"is not a policy folder: it lacks \['{name}'\]"):
        LoHpPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "space.safetensors", "reference_set.safetensors"]
)
def test_damaged_files_are_named(policy, tmp_path, name):
    policy.save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=name):
        LoHpPolicy.from_pretrained(tmp_path)


def test_the_reference_set_is_where_the_policy_is(policy):
    """The meta device stands in for an accelerator."""
    reference, kind = policy.reference_set, torch.device("meta")
    policy.to(kind)
    moved = policy.reference_set
    assert {moved.states.device, *(getattr(moved.features, name).device for name in FEATURES)} == {kind}
    assert (moved.names, moved.families) == (reference.names, reference.families)
    policy.reference_set = reference
    assert policy.reference_set.states.device == kind
    policy.reference_set = None
    assert policy.to(kind).reference_set is None


def test_a_change_of_type_leaves_the_reference_set_alone(policy):
    states = policy.reference_set.states
    assert policy.double().reference_set.states.equal(states)
    assert policy.scale.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "bfloat16"])
def test_half_precision_is_refused(policy, tmp_path, dtype):
    policy.save_pretrained(tmp_path)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"float32 or wider, got torch.{kind}; pass dtype=torch.float32"):
        LoHpPolicy.from_pretrained(tmp_path, dtype=dtype)


def test_a_policy_saved_in_half_precision_can_be_widened(policy, features, tmp_path):
    policy.bfloat16().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="float32 or wider, got torch.bfloat16"):
        LoHpPolicy.from_pretrained(tmp_path)
    loaded = LoHpPolicy.from_pretrained(tmp_path, dtype=torch.float32)
    assert rollout(loaded, features).equal(rollout(policy.float(), features))


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_mixture_of_two_policies_is_refused(policy, encoder, tasks, tmp_path, monkeypatch, failing):
    """A save over another policy that breaks off leaves that policy or what is noticed, wherever it does."""
    policy.save_pretrained(tmp_path)
    other = build_policy(encoder, tasks[:2], size=0.4)
    other.set_space(CoreSpace(policy.layout, 2, *([x.flip(1) for x in side] for side in bases_of(policy.space))))
    replaced, replace = [], os.replace

    def flaky(source, target):
        if len(replaced) + 1 == failing:
            raise OSError("disk trouble")
        replaced.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", flaky)
    with pytest.raises(OSError, match="disk trouble"):
        other.save_pretrained(tmp_path)
    monkeypatch.undo()
    if not replaced:
        assert LoHpPolicy.from_pretrained(tmp_path).space.input_basis(0).equal(policy.space.input_basis(0))
    else:
        with pytest.raises(ValueError, match="was not saved with its config.json; save or fetch"):
            LoHpPolicy.from_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    assert LoHpPolicy.from_pretrained(tmp_path).space.input_basis(0).equal(other.space.input_basis(0))


def bases_of(space):
    count = len(space.layout.modules)
    return [[basis(i) for i in range(count)] for basis in (space.input_basis, space.output_basis)]


def test_policies_without_digests_still_load(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert sorted(config.pop("digests")) == [f"{name}.safetensors" for name in ("model", "reference_set", "space")]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "reference_set.safetensors").unlink()
    assert LoHpPolicy.from_pretrained(tmp_path).reference_set is None
    (tmp_path / "config.json").write_text(json.dumps({**config, "digests": []}))
    with pytest.raises(ValueError, match="`digests` in config.json must be an object, got list"):
        LoHpPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused(policy, tmp_path, damage):
    policy.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if damage == "missing":
        del tensors["step_rms"]
    elif damage == "unexpected":
        tensors["surprise"] = torch.zeros(1)
    else:
        tensors["step_rms"] = tensors["step_rms"][:2].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="surprise" if damage == "unexpected" else "step_rms|mismatch"):
        LoHpPolicy.from_pretrained(tmp_path)


def test_bases_that_do_not_fit_are_refused(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    save_file({"input.0": torch.zeros(16, 2)}, tmp_path / "space.safetensors")
    with pytest.raises(ValueError, match=r"do not fit the layout: input.1"):
        LoHpPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize(("version", "advice"), [(4, "upgrade lohp_peft"), (2, "train the policy again")])
def test_another_schema_is_refused(policy, tmp_path, version, advice):
    policy.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["schema_version"] == 3
    (tmp_path / "config.json").write_text(json.dumps({**config, "schema_version": version}))
    with pytest.raises(ValueError, match=rf"schema version {version}, this lohp_peft reads version 3: {advice}"):
        LoHpPolicy.from_pretrained(tmp_path)


def test_moments_reach_the_mean_through_the_feedback_alone(policy, features, state):
    """`gate * feedback @ moments @ inward`, in units of the scale over the steps, is all that moments do."""
    without = TaskFeatures(features.set, features.labels, features.modules, torch.zeros_like(features.moments))
    last = torch.full((3,), policy.config.policy_steps - 1)
    difference = policy.forward_policy(state, last, features) - policy.forward_policy(state, last, without)
    network, (_, flat) = policy.forward_network, policy._inputs(features)
    gates = network.feedback_gates(network.trunk(flat, last, torch.zeros_like(last)))
    for i, moments in enumerate(features.moments):
        for m in range(len(moments)):
            core = gates[i, m] * (network.feedback[m] @ moments[m] @ network.inward[m])
            expected = core.flatten() * policy.scale[m] / policy.config.policy_steps
            torch.testing.assert_close(difference[i, m], expected, atol=1e-4, rtol=1e-3)
    assert difference.abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("name", ["nowhere/policy", "/nowhere"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="commit|none of"):
        LoHpPolicy.from_pretrained(name)


def test_config_errors_list_all():
    with pytest.raises(ValueError, match="'r': 0, 'policy_steps': 0"):
        LoHpPolicyConfig(r=0, policy_steps=0)
    with pytest.raises(ValueError, match="hidden_size=10, num_heads=4"):
        LoHpPolicyConfig(hidden_size=10)


def test_dropout_of_an_item_does_not_depend_on_its_company():
    dropout, x = ItemDropout(0.25), torch.ones(4 * 50, 30)
    generators = lambda items: [torch.Generator().manual_seed(i) for i in items]  # noqa: E731
    dropout.generators = generators(range(4))
    together = dropout(x).view(4, 50, 30)
    dropout.generators = generators([2, 1])
    apart = dropout(x[:100]).view(2, 50, 30)
    assert apart.equal(together[[2, 1]])
    assert not together[0].equal(together[1])
    assert together.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert float((together == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert dropout.eval()(x).equal(x)


def test_dropout_is_by_item_only_where_it_is_asked_for(policy):
    layers = [module for module in policy.modules() if isinstance(module, ItemDropout)]
    generators = [torch.Generator()]
    with policy.dropout_from(generators):
        assert all(layer.generators is generators for layer in layers)
    assert layers
    assert all(layer.generators is None for layer in layers)


def test_weights_in_several_files_are_refused_before_an_earlier_policy_is_touched(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match="A policy's weights are one file, model.safetensors; leave `max_shard_size` out"
    ):
        policy.save_pretrained(tmp_path, max_shard_size=1000)
    policy.save_pretrained(tmp_path, is_main_process=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
