"""Fetches the tests that belong to the installed PEFT: they are in its sdist, and are never kept in this repository."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]


def suite_folder() -> Path:
    """Where the tests of the installed PEFT lie once they are fetched; git ignores it."""
    return ROOT / "build" / f"peft-{version('peft')}"


def is_fetched() -> bool:
    return (suite_folder() / "tests" / "__init__.py").is_file()


def fetch() -> Path:
    """Download the sdist with the index that pip is configured with, and keep its test modules as package `tests`."""
    target = suite_folder() / "tests"
    if is_fetched():
        return target
    with tempfile.TemporaryDirectory() as folder:
        requirement = ["--no-deps", "--no-binary", "peft", f"peft=={version('peft')}"]
        line = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--dest", folder, *requirement]
        subprocess.run(line, check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers() if member.isfile()}
            modules = [name for name in members if Path(name).parent.as_posix() == "tests" and name.endswith(".py")]
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for name in modules:
                (target / Path(name).name).write_bytes(archive.extractfile(members[name]).read())
    (target / "__init__.py").touch()  # last: it says that the folder is complete
    return target


if __name__ == "__main__":
    fetch()
