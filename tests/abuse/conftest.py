import shutil
from dataclasses import replace

import pytest
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from abuse.world import build_world


@pytest.fixture(scope="session")
def good_world(tmp_path_factory):
    """A good file of every format; not to be changed."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(good_world, tmp_path):
    """A copy that may be broken."""
    shutil.copytree(good_world.folder, tmp_path / "world")
    return replace(good_world, folder=tmp_path / "world")


@pytest.fixture(autouse=True, scope="session")
def no_bars():
    """Standard error holds what this package says."""
    disable_progress_bar()
    yield
    enable_progress_bar()
