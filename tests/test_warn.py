"""Warnings name the line of the user's program, whatever is between it and the place where they are said."""

import warnings

import pytest
from peft import get_peft_model
from typer.testing import CliRunner

import tiny_world
import toy
from lohp_peft import GenerationConfig, LoHpConfig, generate_adapter
from lohp_peft.cli.main import app
from lohp_peft.warn import warn

ROWS = tiny_world.build_rows()
TWICE = [*ROWS, ROWS[0]]


@pytest.fixture
def policy(tmp_path):
    tokenizer = tiny_world.build_tokenizer()
    tiny_world.build_policy(tiny_world.build_bert(), tokenizer).save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy"), tokenizer


def by_function(policy, tokenizer):
    generate_adapter(policy, tiny_world.build_bert(), tokenizer, TWICE, GenerationConfig(choose=False))


def by_method(policy, tokenizer):
    model = get_peft_model(tiny_world.build_bert(), LoHpConfig(policy=policy, task_type="FEATURE_EXTRACTION"))
    model.generate_adapter(TWICE, tokenizer=tokenizer, config=GenerationConfig(choose=False))


@pytest.mark.parametrize("call", [by_function, by_method])
def test_of_a_generation(call, policy):
    with pytest.warns(UserWarning, match="1 of 13 examples repeat others") as caught:
        call(*policy)
    (found,) = [one for one in caught if "repeat others" in str(one.message)]
    code = call.__code__
    assert found.filename == code.co_filename
    assert code.co_firstlineno < found.lineno <= code.co_firstlineno + 3


def test_each_line_is_told():
    """Python shows a warning once a place; what is said of two calls is said of two places."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            warn("first")
        warn("first")
    assert [one.lineno for one in caught] == sorted({one.lineno for one in caught})
    assert len(caught) == 2


def test_on_the_command_line(tmp_path):
    base = toy.save_base_model(tmp_path / "base")
    policy = toy.save_policy(tmp_path / "policy", base)
    task = tmp_path / "task.jsonl"
    row = '{"text": "one %s", "label": "%s"}\n'
    lines = [row % (word, label) for label in ("a", "b") for word in ("x", "y", "z")]
    task.write_text("".join([*lines, lines[0]]))
    given = ["generate", "--base-model", str(base), "--policy", str(policy), "--task", str(task)]
    result = CliRunner().invoke(app, [*given, "--output", str(tmp_path / "adapter")])
    assert result.exit_code == 0, result.output
    assert "Warning: 1 of 7 examples repeat others and count once.\n" in result.stderr
    assert "UserWarning" not in result.stderr
