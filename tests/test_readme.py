"""Every block of README.md is executed or checked.

Python blocks run in their order, in one namespace and an empty folder. An HTML comment that opens with `setup` runs
before the block that follows it, to put small stand-ins in place; `<!-- no-run -->` directly above a block exempts it.
Shell blocks are not run: their `lohp-peft` lines go through the parser of the command line, other commands must exist.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.main import get_command

from lohp_peft.cli.main import app
from lohp_peft.cli.overrides import read_config

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(
    r"(?P<exempt><!--\s*no-run\s*-->\s*\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```|^<!--\s*setup\n(?P<setup>.*?)-->",
    re.DOTALL | re.MULTILINE,
)
HARMLESS = {"cd", "git", "export", "ls", "cat", "source"}


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int


def blocks_of(text: str) -> list[Block]:
    """The blocks that are to be executed or checked; a setup is a Python block."""
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code" if match["code"] is not None else "setup"))
        if match["setup"] is not None:
            found.append(Block("python", match["setup"], line))
        elif not match["exempt"]:
            found.append(Block(match["language"], match["code"], line))
    return found


def run_python(blocks: list[Block], file: str = "README.md") -> None:
    namespace = {"__name__": "readme"}
    for block in blocks:
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, file, "exec"), namespace)


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
    config["import-checkpoints"] = config["prepare"]
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
    else:
        assert program in HARMLESS, f"a command the test does not know: {words}"


def test_python_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    blocks = blocks_of(README.read_text(encoding="utf-8"))
    assert any(block.language == "python" for block in blocks)
    run_python(blocks)


def test_shell_blocks():
    blocks = [block for block in blocks_of(README.read_text(encoding="utf-8")) if block.language in ("bash", "sh")]
    assert blocks
    for block in blocks:
        for words in commands_of(block.code):
            check_command(words)


def test_links_and_tree():
    """Relative links of the README lead somewhere."""
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


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
```bash
# a comment
lohp-peft evaluate --base-model minilm \\
  --task a.jsonl --shots 4  # more
X=1 make test && pip install "lohp-peft[minilm]"
```
"""


def test_the_reader_itself():
    blocks = blocks_of(SAMPLE)
    assert [(block.language, block.line) for block in blocks] == [("python", 2), ("python", 5), ("bash", 12)]
    run_python(blocks)
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
        "rm -rf data",
    ],
)
def test_the_reader_refuses(line):
    with pytest.raises(Exception):  # noqa: B017, PT011 - typer's own and assertion errors
        check_command(commands_of(line)[0])
