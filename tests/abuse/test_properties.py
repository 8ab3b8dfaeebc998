"""What holds for any trajectories, any layout and any adapter, not just for the examples of the other tests."""

import json
import re
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from lohp_peft.adapters.export import plain_lora_config, save_plain_lora
from lohp_peft.adapters.importing import read_plain_lora
from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import CoreSpace, LoraBSpace
from lohp_peft.trajectories import Trajectory, TrajectoryDataset

bounded = settings(max_examples=25, derandomize=True, deadline=None, database=None)

PATHS = st.lists(st.sampled_from(["layer", "0", "1", "12", "mlp", "Ünicode"]), max_size=3)
LINEAR = st.sampled_from(["query", "value", "q-proj", "w"])
NAMES = st.lists(st.tuples(PATHS, LINEAR).map(lambda x: ".".join([*x[0], x[1]])), min_size=1, max_size=4, unique=True)
SIZES = st.integers(1, 9)
VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False)
MEASURED = st.floats(width=32, allow_infinity=False)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=8), JSON, max_size=3)


@st.composite
def models(draw):
    """A model with linear layers of any shape under any names."""
    model = nn.Module()
    for name in draw(NAMES):
        *path, last = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(draw(SIZES), draw(SIZES), bias=False))
    return model


def linear_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@st.composite
def layouts(draw):
    model = draw(models())
    return AdapterLayout.from_model(model, linear_names(model))


@st.composite
def spaces(draw):
    layout = draw(layouts())
    r = draw(st.integers(1, min(min(s.d_in, s.d_out) for s in layout.modules)))
    seed = draw(st.integers(0, 9))
    if draw(st.booleans()):
        return LoraBSpace.seeded(layout, r, seed)
    return CoreSpace.from_trajectories(layout, r, [random_adapter(layout, [r] * len(layout.modules), seed)])


def random_adapter(layout, ranks, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        s.name: (
            torch.randn(r, s.d_in, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(s.d_out, r, generator=generator, dtype=torch.float64).to(dtype),
        )
        for s, r in zip(layout.modules, ranks, strict=True)
    }


@st.composite
def trajectories(draw, space):
    time = draw(st.integers(1, 4))
    few = torch.tensor(draw(st.lists(VALUES, min_size=1, max_size=5)))
    states = few[torch.arange(time * space.mask.numel()) % len(few)].view(time, *space.shape) * space.mask
    if draw(st.booleans()):
        states = states.transpose(1, 2).contiguous().transpose(1, 2)  # the same values in another order in memory
    steps = sorted(draw(st.sets(st.integers(0, 2**62), min_size=time, max_size=time)))
    series = st.lists(MEASURED, min_size=time, max_size=time).map(torch.tensor)
    return Trajectory(
        states=states,
        optimizer_steps=torch.tensor(steps),
        losses=draw(series),
        metrics=draw(st.dictionaries(st.text(max_size=8), series, max_size=3)),
        task=draw(st.text(max_size=8)),
        optimizer=draw(st.text(max_size=8)),
        hyperparameters=draw(OBJECTS),
        seed=draw(st.integers(-(2**63), 2**63)),
    )


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes()


@bounded
@given(st.data())
def test_what_a_store_gives_back_is_what_it_got(data):
    space = data.draw(spaces())
    runs = st.lists(trajectories(space), min_size=1, max_size=2)
    shards = data.draw(st.dictionaries(st.text(min_size=1), st.tuples(runs, OBJECTS), max_size=3))
    about = data.draw(OBJECTS)
    with tempfile.TemporaryDirectory() as folder:
        made = TrajectoryDataset.create(folder, space=space, base_fingerprint="f", base_model_name="m", metadata=about)
        for key, (written, metadata) in shards.items():
            made.append(key, written, metadata)
        opened = TrajectoryDataset.open(folder)
        assert opened.keys() == sorted(shards)
        assert opened.manifest.metadata == about
        assert {name: bits(x) for name, x in opened.space.to_tensors().items()} == {
            name: bits(x) for name, x in space.to_tensors().items()
        }
        for key, (written, metadata) in shards.items():
            assert opened.manifest.shards[key].metadata == metadata
            for one, other in zip(opened[key], written, strict=True):
                for name in ("states", "optimizer_steps", "losses"):
                    assert bits(getattr(one, name)) == bits(getattr(other, name))
                assert {name: bits(x) for name, x in one.metrics.items()} == {
                    name: bits(x) for name, x in other.metrics.items()
                }
                for name in ("task", "optimizer", "hyperparameters", "seed"):
                    assert getattr(one, name) == getattr(other, name)


@bounded
@given(spaces(), st.sampled_from([torch.float64, torch.float16, torch.bfloat16, torch.int64]))
def test_states_of_another_type_are_refused(space, dtype):
    one = torch.zeros(1)
    try:
        Trajectory(torch.zeros(1, *space.shape, dtype=dtype), torch.tensor([0]), one, {}, "t", "o", {}, 0)
    except ValueError as error:
        assert "must be float32" in str(error)  # noqa: PT017 - hypothesis counts one example, not one raise
    else:
        raise AssertionError(f"{dtype} was accepted")


@bounded
@given(models(), st.data())
def test_a_layout_is_what_peft_would_adapt(model, data):
    names = linear_names(model)
    last = sorted({name.rsplit(".", 1)[-1] for name in names})
    target = data.draw(
        st.sets(st.sampled_from(last), min_size=1).map(sorted)
        | st.sets(st.sampled_from(names), min_size=1).map(sorted)
        | st.sampled_from(last).map(lambda part: rf"(.*\.)?{re.escape(part)}")
    )
    before = AdapterLayout.from_model(model, target)
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=target))
    found = [name for name, layer in adapted.get_base_model().named_modules() if isinstance(layer, LoraLayer)]
    assert [spec.name for spec in before.modules] == found
    assert AdapterLayout.from_model(adapted, target) == before


@bounded
@given(layouts(), st.data())
def test_a_layout_survives_json_and_its_fingerprint_tells_it(layout, data):
    content = json.loads(json.dumps(layout.to_dict()))
    assert AdapterLayout.from_dict(content) == layout
    assert AdapterLayout.from_dict(content).fingerprint() == layout.fingerprint()
    module = data.draw(st.sampled_from(content["modules"]))
    module[data.draw(st.sampled_from(["d_in", "d_out"]))] += 1
    assert AdapterLayout.from_dict(content).fingerprint() != layout.fingerprint()


@bounded
@given(layouts(), st.data(), st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
def test_export_and_import_keep_the_update_exactly(layout, data, seed, dtype):
    ranks = [data.draw(st.integers(1, 4)) for _ in layout.modules]
    adapter = random_adapter(layout, ranks, seed, dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_plain_lora(folder, adapter, plain_lora_config("someone/tiny", layout, max(ranks)))
        back = read_plain_lora(folder)
    assert list(back) == sorted(adapter)
    for name, (a, b) in adapter.items():
        rank, (read_a, read_b) = len(a), back[name]
        assert bits(read_a[:rank]) == bits(a)
        assert bits(read_b[:, :rank]) == bits(b)
        assert not read_a[rank:].any()
        assert not read_b[:, rank:].any()


@bounded
@given(layouts(), st.data(), st.integers(0, 99))
def test_import_scales_as_peft_does(layout, data, seed):
    ranks = [data.draw(st.integers(1, 4)) for _ in layout.modules]
    alphas = [data.draw(st.integers(1, 64)) for _ in layout.modules]
    rslora = data.draw(st.booleans())
    adapter = random_adapter(layout, ranks, seed)
    keys = [f"^{re.escape(spec.name)}" for spec in layout.modules]
    config = {"peft_type": "LORA", "r": 7, "lora_alpha": 3, "use_rslora": rslora}
    config |= {
        "rank_pattern": dict(zip(keys, ranks, strict=True)),
        "alpha_pattern": dict(zip(keys, alphas, strict=True)),
    }
    tensors = {
        f"base_model.model.{n}.lora_{s}.weight": x for n, ab in adapter.items() for s, x in zip("AB", ab, strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        back = read_plain_lora(folder)
    for spec, rank, alpha in zip(layout.modules, ranks, alphas, strict=True):
        (a, b), (read_a, read_b) = adapter[spec.name], back[spec.name]
        expected = b @ a * alpha / (rank**0.5 if rslora else rank)
        torch.testing.assert_close(read_b @ read_a, expected, atol=1e-12, rtol=1e-12)


@bounded
@given(spaces(), st.integers(0, 99))
def test_a_space_holds_what_it_decodes(space, seed):
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(space.shape, generator=generator, dtype=torch.float64) * space.mask
    again = space.encode(space.decode(state))
    torch.testing.assert_close(again.state, state, atol=1e-9, rtol=1e-9)
    assert min(again.energy_kept.values()) > 1 - 1e-5
