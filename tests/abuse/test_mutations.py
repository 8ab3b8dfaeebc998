"""Seeded mutations of every file that is read: the same content or the promised error, never another one, never a hang."""

import json
import random
import signal

import pytest

from abuse.children import in_child
from abuse.damage import HUGE, OVERFLOWING, edit, fill, find, in_manifest
from abuse.test_kills import equal
from abuse.world import READ

ODD = (
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "\ud800",
    [],
    [[]],
    {},
    {"x": 1},
)
LIMIT_S = 120
"""Of the processor's time; a format takes a hundredth of it, and only a hang reaches it."""


def changed_bytes(data, chance):
    """One to three changes of bytes: a bit, a byte, a block removed, doubled, zeroed or moved, the end cut off."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at, size = chance.randrange(max(len(data), 1)), chance.choice([1, 2, 8, 64])
        kind = chance.choice(["bit", "byte", "remove", "double", "zero", "move", "cut", "early"])
        if kind == "early" and len(data) > 400:  # headers are where most is to be said
            data[chance.randrange(400)] = chance.randrange(256)
        elif kind == "bit" and data:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == "byte" and data:
            data[at] = chance.choice([0, 0x22, 0x2C, 0x5B, 0x7B, 0x7D, 0xFF, chance.randrange(256)])
        elif kind == "remove":
            del data[at : at + size]
        elif kind == "double":
            data[at:at] = data[at : at + size]
        elif kind == "zero":
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif kind == "move":
            block = data[at : at + size]
            del data[at : at + size]
            to = chance.randrange(len(data) + 1)
            data[to:to] = block
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def places(value, path=()):
    """Every place inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed_json(data, chance):
    """A JSON value, or line, of which one part is missing or something odd."""
    lines = data.decode().splitlines()
    single = len(lines) == 1 or not lines[0].endswith("}")
    number = 0 if single else chance.randrange(len(lines))
    value = json.loads(data if single else lines[number])
    *path, last = chance.choice(list(places(value)))
    parent = value
    for key in path:
        parent = parent[key]
    if chance.random() < 0.2:
        del parent[last]
    else:
        parent[last] = chance.choice(ODD)
    text = json.dumps(value)
    return (text if single else "\n".join([*lines[:number], text, *lines[number + 1 :]])).encode()


def policy_content(policy):
    return dict(policy.state_dict()), policy.space.to_tensors()


FORMATS = {
    "manifest": ("store/manifest.json", "store", None),
    "bases": ("store/weight_space.safetensors", "store", lambda dataset: dataset.space.to_tensors()),
    "shard": ("store/shards/spam-*", "store", lambda dataset: [(run.states, run.losses) for run in dataset]),
    "policy's configuration": ("policy/config.json", "policy", None),
    "policy's weights": ("policy/model.safetensors", "policy", None),
    "policy's bases": ("policy/space.safetensors", "policy", None),
    "reference set": ("policy/reference_set.safetensors", "policy", None),
    "adapter's configuration": ("adapter/adapter_config.json", "adapter", None),
    "adapter's weights": ("adapter/adapter_model.safetensors", "adapter", None),
    "imported run": ("run/checkpoint-2/adapter_model.safetensors", "run", None),
    "imported run's configuration": ("run/checkpoint-2/adapter_config.json", "run", None),
    "provenance": ("adapter/lohp_provenance.json", "adapter card", None),
    "adapter to push": ("adapter/adapter_config.json", "folder to push", None),
    "policy's card": ("policy/config.json", "policy card", None),
    "state of training": ("trained/checkpoint/state.json", "checkpoint", None),
    "tensors of training": (
        "trained/checkpoint/state-4.safetensors",
        "checkpoint",
        lambda _: [],  # read or refused as a whole, by its checksum
    ),
    "snapshots": ("snapshots/part-000001.safetensors", "snapshots", None),
    "task": ("spam.jsonl", "task", None),
    "gzipped task": ("spam.jsonl.gz", "gzipped task", lambda task: task),
    "support": ("spam.jsonl", "support", None),
    "settings": ("settings.yaml", "settings", None),
}
"""By format: the file, how it is read, and, where a checksum guards it, the content that must not change unnoticed."""


@pytest.fixture
def no_hang():
    def stop(*_):
        raise AssertionError(f"not done after {LIMIT_S} s of the processor")

    if hasattr(signal, "setitimer"):
        before = signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    else:
        yield


def fuzz(world, name, rounds, seed=0):
    """Mutate one file `rounds` times; the share of mutations that was refused."""
    pattern, call, content = FORMATS[name]
    path, chance, refused = find(world.folder, pattern), random.Random(f"{seed}/{name}"), 0
    good = path.read_bytes()
    expected = content(READ[call](world)) if content else None
    structured = pattern.endswith((".json", ".jsonl"))
    for number in range(rounds):
        data = (changed_json if structured and number % 2 else changed_bytes)(good, chance)
        path.write_bytes(data)
        try:
            found = READ[call](world)
        except Exception as raised:
            found, error = None, raised
        else:
            error = None
        if error is not None:
            refused += 1
            promised = type(error) is ValueError or isinstance(error, OSError)
            assert promised, f"mutation {number} of {name}: {error!r}\n{data[:3000]!r}"
            assert str(error).strip()
        elif content is not None:
            assert equal(content(found), expected), f"mutation {number} of {name} went unnoticed"
    path.write_bytes(good)
    READ[call](world)
    return refused / rounds


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_mutations(world, name, no_hang):
    assert fuzz(world, name, 30) > 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutations(world, name, no_hang):
    assert fuzz(world, name, 300, seed=1) > 0.1


def sizes(**entries):
    return lambda content: content["layout"]["modules"][0].update(entries)


SHARD = "store/shards/spam-*"
HUGE_CLAIMS = {
    "shard": (in_manifest(fill(SHARD, HUGE), SHARD, "spam"), "store"),
    "shard that overflows": (in_manifest(fill(SHARD, OVERFLOWING), SHARD, "spam"), "store"),
    "module of the manifest": (edit("store/manifest.json", sizes(d_in=2**19, d_out=2**19)), "store"),
    "policy's weights": (fill("policy/model.safetensors", HUGE), "policy"),
    "policy's states": (edit("policy/config.json", lambda c: c.update(state_shape=[2**19, 2**19])), "policy"),
    "policy's width": (edit("policy/config.json", lambda c: c.update(hidden_size=2**19, num_heads=1)), "policy"),
    "policy's layers": (edit("policy/config.json", lambda c: c.update(num_layers=2**20)), "policy"),
    "policy's embeddings": (edit("policy/config.json", lambda c: c.update(embedding_size=2**20)), "policy"),
    "adapter's weights": (fill("adapter/adapter_model.safetensors", HUGE), "adapter"),
    "snapshots": (fill("snapshots/part-000001.safetensors", HUGE), "snapshots"),
}


@pytest.mark.parametrize("name", HUGE_CLAIMS)
def test_no_memory_is_taken_on_the_word_of_a_file(world, name):
    resource = pytest.importorskip("resource")
    damage, call = HUGE_CLAIMS[name]
    damage(world.folder)

    def read():
        with open("/proc/self/statm") as stream:
            now = int(stream.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, now + 2**29))
        READ[call](world)

    code, error = in_child(read)
    assert code == 0
    assert type(error) is ValueError, repr(error)
    assert "allocate" not in str(error), error


def test_odd_values_reach_every_field():
    """The generator itself: without variety the mutations above would prove nothing."""
    data, chance = json.dumps({"a": [1, {"b": 2}], "c": "x"}).encode(), random.Random(0)
    assert len({changed_json(data, chance) for _ in range(200)}) > 60
    assert len({changed_bytes(data, chance) for _ in range(200)}) > 150
