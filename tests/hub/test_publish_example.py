"""The how-to of publishing, as a script against the server of the tests."""

import pytest

import toy
from hub.conftest import BASE


@pytest.fixture
def folder(made, base_model, tmp_path):
    """A folder that holds a base model, and one of its adapters."""
    base_model.save_pretrained(tmp_path / "base")
    made.save_pretrained(tmp_path / "adapter", base_model_name=BASE)
    return tmp_path


def test_publish(hub, folder, capsys):
    publish = toy.load_script("examples/publish/publish.py")
    line = [str(folder / "adapter"), "me/mood", "--base-model", str(folder / "base")]
    assert publish.main(line) is None
    assert "Nothing was sent" in capsys.readouterr().out
    assert not hub.repositories
    commit = publish.main([*line, "--push", "--private", "--license", "mit"])
    assert hub.repositories["model", "me/mood"].private
    assert commit == hub.repositories["model", "me/mood"].branches["main"]
    assert "LORA of rank 2" in " ".join(capsys.readouterr().out.split())
