"""Configurations from YAML and the command line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lohp_peft.cli.overrides import read_config

EXTRA = {"lr": -2e4, "betas": [0.9, 1.0], "name": "1e-3", "commit": "1e5a"}


@dataclass(kw_only=True)
class Inner:
    width: int = 4
    rates: tuple[float, ...] = (0.1,)


@dataclass(kw_only=True)
class Settings:
    steps: int = 10
    learning_rate: float = 1e-3
    name: str = "a"
    optimizers: Sequence[str] = ("adamw",)
    seeds: list[int] = field(default_factory=lambda: [0])
    kind: Literal["core", "lora_b"] = "core"
    limit: int | None = None
    targets: str | list[str] | None = None
    resume: bool = False
    folder: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")


@dataclass(kw_only=True)
class Needy:
    path: str
    count: int = 1


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_defaults():
    assert read_config(Settings) == Settings()


def test_yaml_then_overrides(tmp_path):
    path = write(tmp_path, "steps: 5\nlearning-rate: 1e-4\ninner: {width: 8}\noptimizers: [sam, sgd]\n")
    config = read_config(Settings, path, ["--steps", "7", "--inner.rates", "0.5,1e-2"], ["name=b"])
    expected = Settings(
        steps=7, learning_rate=1e-4, name="b", optimizers=["sam", "sgd"], inner=Inner(width=8, rates=(0.5, 0.01))
    )
    assert config == expected
    assert isinstance(config.inner.rates, tuple)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--learning-rate", "3e-4"], "learning_rate", 3e-4),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--steps", "1e3"], "steps", 1000),
        (["--name", "007"], "name", "007"),
        (["--name", "a=b: c"], "name", "a=b: c"),
        (["--optimizers", "sam,sgd"], "optimizers", ["sam", "sgd"]),
        (["--optimizers", "sam"], "optimizers", ["sam"]),
        (["--seeds", "[1, 2]"], "seeds", [1, 2]),
        (["--seeds", "3,4"], "seeds", [3, 4]),
        (["--kind", "lora_b"], "kind", "lora_b"),
        (["--limit", "null"], "limit", None),
        (["--limit", "-5"], "limit", -5),
        (["--targets", "query"], "targets", "query"),
        (["--targets", "[query, value]"], "targets", ["query", "value"]),
        (["--resume"], "resume", True),
        (["--resume", "false"], "resume", False),
        (["--folder", "a/b"], "folder", Path("a/b")),
        (["--extra.weight_decay", "0.1"], "extra", {"weight_decay": 0.1}),
        (["--extra.lr", "1e-3"], "extra", {"lr": 1e-3}),
        (["--extra", "{lr: -2.E+4, betas: [.9, 1e0], name: '1e-3', commit: 1e5a}"], "extra", EXTRA),
    ],
)
def test_values(arguments, name, value):
    got = getattr(read_config(Settings, None, arguments), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], r"unknown key `learning_rat`, did you mean `learning_rate`\?"),
        (["--inner.widht", "1"], r"unknown key `inner.widht`, did you mean `width`\?"),
        (["--zzz", "1"], r"unknown key `zzz` \(valid keys: steps, "),
        (["--steps", "1", "--steps", "2"], "`steps` is given more than once"),
        (["--learning-rate", "1", "--learning_rate=2"], "`learning_rate` is given more than once"),
        (["--steps", "many"], "`steps` must be a whole number, got 'many'"),
        (["--steps", "1.5"], "`steps` must be a whole number, got 1.5"),
        (["--steps", "true"], "`steps` must be a whole number, got True"),
        (["--resume", "perhaps"], "`resume` must be true or false"),
        (["--kind", "both"], r"`kind` must be one of \['core', 'lora_b'\], got 'both'"),
        (["--limit", "x"], "`limit` must be a whole number or null, got 'x'"),
        (["--steps", "0"], "`steps` must be at least 1, got 0"),
        (["steps", "0"], "unexpected argument 'steps'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        read_config(Settings, None, arguments)


def test_all_mistakes_at_once():
    with pytest.raises(ValueError, match="Needy") as error:
        read_config(Needy, None, ["--count", "x"], ["cuont=1", "oops"])
    for part in ("`--set` takes field=value", "`count` must be", "did you mean `count`", "`path` is required"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "'steps' is repeated in line 2"),
        ("inner: {width: 1, width: 2}\n", "'width' is repeated"),
        ("- steps\n", "must be a mapping"),
        ("steps: [", "not valid YAML"),
        ("name: 5\n", "`name` must be text, got 5"),
        ("inner: 5\n", "`inner` must be a mapping, got 5"),
        ("seeds: 5\n", "`seeds` must be a list, got 5"),
    ],
)
def test_yaml_mistakes(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_config(Settings, write(tmp_path, text))


def test_numbers_without_a_point_are_numbers_where_any_value_is_taken(tmp_path):
    assert read_config(Settings, write(tmp_path, "extra: {lr: 1e-3, eps: 2}\n")).extra == {"lr": 1e-3, "eps": 2}


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="Cannot read the configuration"):
        read_config(Settings, tmp_path / "none.yaml")


def test_yaml_builds_no_objects(tmp_path):
    path = write(tmp_path, "name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_config(Settings, path)


@pytest.mark.parametrize("order", [1, -1])
def test_the_whole_and_a_part_of_it_at_any_depth_are_refused(order):
    both = [["--extra", "{adamw: {lr: 0.1}}"], ["--extra.sgd.lr", "0.2"]][::order]
    with pytest.raises(ValueError, match="`extra` is given as a whole and in parts"):
        read_config(Settings, None, sum(both, []))


def test_two_spellings_of_a_key_are_refused(tmp_path):
    path = write(tmp_path, "learning-rate: 0.1\nlearning_rate: 0.2\n")
    with pytest.raises(ValueError, match="gives `learning_rate` more than once"):
        read_config(Settings, path)


def test_numbers_are_those_of_today():
    """YAML 1.1 reads 010 as eight and 1:30 as ninety."""
    assert read_config(Settings, None, ["--seeds", "010,+7,0x10"]).seeds == [10, 7, 16]
    assert read_config(Settings, None, ["--learning-rate", "1e-4"]).learning_rate == 1e-4
    assert read_config(Settings, None, ["--extra", "{a: .5, b: -.inf, c: 1., d: 1:30}"]).extra == {
        "a": 0.5,
        "b": -math.inf,
        "c": 1.0,
        "d": "1:30",
    }
    with pytest.raises(ValueError, match="`steps` must be a whole number, got '1:30'"):
        read_config(Settings, None, ["--steps", "1:30"])
