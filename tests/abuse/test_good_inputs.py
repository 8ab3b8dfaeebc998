"""What the bad inputs are made of is good: without it, refusing everything would pass."""

import pytest

from abuse.world import COMMANDS, READ


@pytest.mark.parametrize("call", READ)
def test_python(world, call):
    READ[call](world)


@pytest.mark.parametrize("call", COMMANDS)
def test_command_line(world, call):
    result = COMMANDS[call](world)
    assert result.exit_code == 0, result.output
