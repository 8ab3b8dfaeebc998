"""The README's tables of the interface and of the files say what is there."""

import re
from pathlib import Path

import lohp_peft

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree_paths(text: str) -> list[str]:
    """Paths of the tree: two spaces of indentation a level, the name, then a comment."""
    (block,) = re.findall(r"^## Tree\n+```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    paths, parents = [], []
    for line in block.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], name]
        paths.append("".join(parents))
    return paths


def test_public_interface():
    """The table between `api:begin` and `api:end` names what `__all__` holds, each once."""
    (table,) = re.findall(r"<!-- api:begin -->(.*?)<!-- api:end -->", README, re.DOTALL)
    names = [name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert sorted(names) == sorted(lohp_peft.__all__)
    rows = [row for row in table.splitlines() if row.startswith("| `")]
    assert all(row.split(" | ")[1].strip(" |") for row in rows), "a name without a word of what it is"


def test_tree():
    paths = tree_paths(README)
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
    parts = {
        path.name for path in (ROOT / "lohp_peft").iterdir() if path.name[0] not in "_." and path.suffix != ".typed"
    }
    listed = {
        path.rstrip("/").split("/")[-1] for path in paths if path.startswith("lohp_peft/") and path.count("/") < 3
    }
    assert parts - {"templates"} <= listed


def test_tree_reader():
    text = "## Tree\n\n```text\na/            x\n  b.py        y\n  c/          z\n    d         w\ne.md          v\n```\n"
    assert tree_paths(text) == ["a/", "a/b.py", "a/c/", "a/c/d", "e.md"]


def test_paper_map_names_exist():
    """Every function of the paper map can be found in the package."""
    (section,) = re.findall(r"^## Paper map\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "lohp_peft").rglob("*.py"))
    rows = [row.split(" | ") for row in section.splitlines() if row.startswith("| ")][2:]
    assert len(rows) > 10
    for row in rows:
        assert re.search(r"Lo-Hp \(abstract\)|Known: |Ours", row[2]), row
        for name in re.findall(r"`([\w.]+)[^`]*`", row[1]):
            last = name.rsplit(".", 1)[-1]
            assert re.search(rf"(?:def|class) {last}\b", source) or (ROOT / "lohp_peft" / name).exists(), name
    identifiers = {number for row in rows for number in re.findall(r"\b\d{4}\.\d{5}\b", row[2])}
    assert not [number for number in identifiers if number not in source], "cited here but in no docstring"
