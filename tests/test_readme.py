"""Every block of README.md, and of the how-tos under examples/, is executed or checked.

Python blocks run in their order, in one namespace and a folder that holds nothing but the examples. An HTML comment that
opens with `setup` runs before the block that follows it, to put small stand-ins in place. Commands of shell blocks are
checked: `lohp-peft` lines go through the parser of the command line, other commands must exist. `<!-- run -->` directly
above a shell block also executes them, in order with the Python blocks; `<!-- no-run -->` exempts a block from all of it.
The Hub is a server on this machine.
"""

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import toy
from hub.conftest import hub  # noqa: F401 - a fixture
from lohp_peft.cli.main import app
from lohp_peft.cli.overrides import read_config

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
HOW_TOS = sorted((ROOT / "examples").glob("*/README.md"))
BLOCK = re.compile(
    r"(?:<!--\s*(?P<directive>no-run|run)\s*-->\s*\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```|^<!--\s*setup\n(?P<setup>.*?)-->",
    re.DOTALL | re.MULTILINE,
)
HARMLESS = {"cd", "git", "export", "ls", "cat", "source"}


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    run: bool = False


def blocks_of(text: str) -> list[Block]:
    """The blocks that are to be executed or checked; a setup is a Python block."""
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code" if match["code"] is not None else "setup"))
        if match["setup"] is not None:
            found.append(Block("python", match["setup"], line, run=True))
        elif match["directive"] != "no-run":
            run = match["language"] == "python" or match["directive"] == "run"
            found.append(Block(match["language"], match["code"], line, run))
    return found


def run(blocks: list[Block], file: str = "README.md") -> None:
    namespace = {"__name__": "readme"}
    for block in blocks:
        if block.run and block.language == "python":
            exec(compile("\n" * block.line + block.code, file, "exec"), namespace)
        elif block.run:
            for words in commands_of(block.code):
                run_command(words)


def run_command(words: list[str]) -> None:
    """Execute a verb of the command line or an example, in this process."""
    if words[0] == "lohp-peft":
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{words}: {result.output}"
    else:
        assert words[0] == "python", f"only lohp-peft and python are executed: {words}"
        toy.load_script(words[1]).main(words[2:])


def commands_of(code: str) -> list[list[str]]:
    """The words of every command, without prompts, comments, line continuations and environment assignments."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;", line.removeprefix("$ ")):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words.pop(0)
            if words:
                commands.append(words)
    return commands


def check_lohp_peft(arguments: list[str]) -> None:
    """Parse a command line without running its verb; overrides are checked against their dataclass."""
    group = get_command(app)
    context = group.make_context("lohp-peft", list(arguments))
    verb, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    inner = command.make_context(verb, rest, parent=context)
    config = {"prepare": "WeightPreparationConfig", "train": "PolicyLearningConfig", "generate": "GenerationConfig"}
    config |= {"import-checkpoints": config["prepare"], "evaluate": "EvaluationConfig"}
    if verb in config:
        import lohp_peft

        read_config(getattr(lohp_peft, config[verb]), None, inner.args, inner.params.get("sets") or ())


def check_command(words: list[str]) -> None:
    program, arguments = words[0], words[1:]
    if program == "accelerate":
        assert "-m" in arguments, words
        program, arguments = "python", arguments[arguments.index("-m") :]
    if program == "lohp-peft" or (program == "python" and arguments[:2] == ["-m", "lohp_peft.cli"]):
        check_lohp_peft(arguments[2:] if program == "python" else arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {a for a in arguments if "=" not in a} <= set(targets), f"no such target: {words}"
    elif program == "pip":
        assert arguments[0] == "install", words
        pyproject = (ROOT / "pyproject.toml").read_text()
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), f"no such extra: {extra}"
    elif program in ("python", "bash"):
        script = arguments[0]
        path = script if script != "-m" else arguments[1].replace(".", "/") + ".py"
        assert (ROOT / path).exists() or (ROOT / path).with_suffix("").is_dir(), f"no such file: {words}"
        if Path(path).parts[:-2] == ("examples",):
            check_options(path, arguments[1:])
    else:
        assert program in HARMLESS, f"a command the test does not know: {words}"


def check_options(script: str, arguments: list[str]) -> None:
    """Parse a command line of an example with its own parser, without running it."""

    class Parsed(Exception):
        pass

    def parse(parser, given=None):
        original(parser, given)
        raise Parsed

    original = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        try:
            with pytest.raises(Parsed):
                toy.load_script(script).main(arguments)
        except SystemExit:
            raise AssertionError(f"{script} does not know {arguments}") from None


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.slow
@pytest.mark.parametrize("readme", [README, *HOW_TOS], ids=named)
def test_blocks_run(readme, tmp_path, monkeypatch, hub):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run(blocks_of(readme.read_text(encoding="utf-8")), named(readme))


@pytest.mark.parametrize("readme", [README, *HOW_TOS], ids=named)
def test_shell_blocks(readme):
    for block in blocks_of(readme.read_text(encoding="utf-8")):
        for words in commands_of(block.code) if block.language in ("bash", "sh") else ():
            check_command(words)


def anchors_of(text: str) -> set[str]:
    """The anchors of the headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", [README, ROOT / "examples" / "README.md", *HOW_TOS], ids=named)
def test_links(readme):
    """Relative links and anchors lead somewhere."""
    text = readme.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        file = readme.parent / target if target else readme
        assert file.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors_of(file.read_text(encoding="utf-8")), f"{target} has no #{anchor}"


def test_every_how_to_has_something_to_run():
    """A how-to is a folder with a README that is executed and one script, which it names."""
    scripts = {path.parent: path for path in (ROOT / "examples").glob("*/*.py")}
    assert len(scripts) > 5
    for folder, script in scripts.items():
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert any(block.run for block in blocks_of(text)), folder
        assert script.name in text


SAMPLE = """
<!-- setup
value = 1
-->
```python
value += 1
```
<!-- no-run -->
```python
raise RuntimeError
```
<!-- run -->
```bash
lohp-peft env --json
```
```bash
# a comment
lohp-peft evaluate --base-model minilm \\
  --task a.jsonl --shots 4  # more
X=1 make test && pip install "lohp-peft[minilm]"
```
"""


def test_the_reader_itself():
    blocks = blocks_of(SAMPLE)
    assert [(b.language, b.line) for b in blocks] == [("python", 2), ("python", 5), ("bash", 13), ("bash", 16)]
    assert [block.run for block in blocks] == [True, True, True, False]
    run(blocks)
    words = commands_of(blocks[-1].code)
    assert words[0] == ["lohp-peft", "evaluate", "--base-model", "minilm", "--task", "a.jsonl", "--shots", "4"]
    assert words[1:] == [["make", "test"], ["pip", "install", "lohp-peft[minilm]"]]
    for command in words:
        check_command(command)


@pytest.mark.parametrize(
    "line",
    [
        "lohp-peft evaluate --base-model minilm",
        "lohp-peft evaluate --base-model minilm --task a --shots many",
        "lohp-peft evaluate --base-model minilm --task a --no-such-option 1",
        "lohp-peft dance",
        "make coffee",
        "pip install lohp-peft[nothing]",
        "python examples/nothing.py",
        "python examples/serve/serve.py --no-such-option 1",
        "rm -rf data",
    ],
)
def test_the_reader_refuses(line):
    with pytest.raises(Exception):  # noqa: B017, PT011 - typer's own and assertion errors
        check_command(commands_of(line)[0])


@pytest.mark.parametrize("line", ["make test", "lohp-peft push nothing me/nothing", "lohp-peft dance"])
def test_a_command_that_fails_is_noticed(line):
    with pytest.raises(AssertionError):
        run_command(commands_of(line)[0])
