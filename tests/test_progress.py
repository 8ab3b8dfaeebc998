"""Progress of long work on terminals of any width and in files."""

import io
import re

import pytest
from rich.console import Console

from lohp_peft import progress
from lohp_peft.progress import Work


@pytest.fixture
def written():
    return io.StringIO()


def steps(console, notes=("loss 0.7", "loss 0.6"), **kwargs):
    with Work(console, **kwargs) as work:
        bar = work.add_task("policy learning", total=1500)
        for number, note in enumerate(notes, 1):
            work.update(bar, completed=700 + number, note=note)
            if not number % 2:
                work.advance(bar)


def test_a_file_gets_lines(written, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    steps(Console(file=written, width=40))
    lines = written.getvalue().splitlines()
    assert lines[0].startswith("policy learning 701/1500 after 0 s")
    assert lines[0].endswith("| loss 0.7")
    assert lines[2].startswith("policy learning 703/1500")


def test_a_file_gets_no_line_for_every_step(written):
    steps(Console(file=written, width=200))
    assert "701/1500" not in written.getvalue()
    assert "703/1500" in written.getvalue()  # the bar as it ended


@pytest.mark.parametrize("width", [80, 60])
def test_a_narrow_terminal_cuts_the_note_alone(written, width):
    steps(Console(file=written, width=width, force_terminal=True), notes=["cloning 1.104 subtb 1.652 path 0.658 " * 3])
    first, *rest = written.getvalue().split("\n")
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", first.split("\r")[-1])
    assert re.fullmatch(r"policy learning .* 701/1500 0:00:0\d -:--:-- cloning .*…", last)
    assert len(last) <= width
    assert not re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", "".join(rest))


def test_other_processes_are_silent(written, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    steps(Console(file=written), disable=True)
    assert not written.getvalue()
