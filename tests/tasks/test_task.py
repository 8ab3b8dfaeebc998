import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from lohp_peft.tasks import Examples, Task, balanced_rows, draw, task_fingerprint

ROWS = [
    {"text": "late parcel", "label": "late", "split": "train"},
    {"text": "lost parcel", "label": "lost", "split": "train"},
    {"text": "later", "label": "late", "split": "test"},
]


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": " ", "label": "a"}], "row 0: 'text' must be a non-empty string, got ' '"),
        ([{"label": "a"}], r"none has \['text'\]; rename \['label'\]"),
        ([{"sentence": "x", "intent": "a"}] * 30, r"none has \['text', 'label'\]; rename \['intent', 'sentence'\]\.$"),
        ([{"text": "x", "label": 0}, {"label": 1}], "row 1: 'text' must be a non-empty string, got None"),
        ([{"text": "x"}, {"text": "y", "label": 1}], "row 0: 'label' must be a string or an int, got None"),
        ([{"text": "x", "label": True}], "row 0: 'label' must be a string or an int, got True"),
        ([{"text": "x", "label": 0.5}], "row 0: 'label' must be a string or an int, got 0.5"),
        (["x"], "row 0: expected a mapping with 'text' and 'label', got str"),
        ([{"text": "x", "label": 1}, {"text": "x", "label": "1"}], r"all strings or all ints, got \['int', 'str'\]"),
        (
            [{"text": "x", "text_b": "y", "label": 1}, {"text": "x", "label": 1}],
            "row 1: 'text_b' must be a string in all",
        ),
        (
            [{"text": "x", "label": 1}, {"text": "x", "text_b": "y", "label": 1}],
            "row 1: 'text_b' must be a string in all",
        ),
        ([{"text": "x", "text_b": 3, "label": 1}], "row 0: 'text_b' must be a string in all rows or in none, got 3"),
    ],
)
def test_malformed_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        Examples.from_rows(rows)


def test_all_malformed_rows_are_named():
    with pytest.raises(ValueError, match="2 malformed support rows: row 0: .*row 2: "):
        Examples.from_rows([{"label": 1}, {"text": "x", "label": 1}, {"text": "x"}])


def test_classes_are_the_sorted_labels():
    examples = Examples.from_rows([{"text": "x", "label": label} for label in ("b", "a", "b")])
    assert examples.label_names == ("a", "b")
    assert examples.targets.tolist() == [1, 0, 1]
    assert Examples.from_rows([{"text": "x", "label": label} for label in (10, 9)]).label_names == ("9", "10")


def test_a_dataset_is_read_as_rows():
    rows = [{"text": "x", "text_b": "y", "label": 1}, {"text": "z", "text_b": "w", "label": 0}]
    assert Examples.from_rows(Dataset.from_list(rows)) == Examples.from_rows(rows)
    assert Examples.from_rows(rows).texts_b == ("y", "w")


def test_a_dataset_names_its_classes():
    """All of them, so that a class without examples keeps the others' indices; rows without a class are refused."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["world", "business", "arts"])})
    examples = Examples.from_rows(Dataset.from_list([{"text": "x", "label": 2}, {"text": "y", "label": 0}], features))
    assert examples.label_names == ("world", "business", "arts")
    assert examples.labels == (2, 0)
    hidden = Dataset.from_list([{"text": "x", "label": 1}, {"text": "y", "label": -1}], features)
    with pytest.raises(ValueError, match=r"1 malformed support rows: row 1: 'label' must be in 0..2, .* got -1"):
        Examples.from_rows(hidden)


def test_examples_check_their_sizes_and_labels():
    with pytest.raises(ValueError, match=r"2 texts, but got \{'labels': 1, 'texts_b': 3\}"):
        Examples(("x", "y"), (0,), ("a",), ("1", "2", "3"))
    with pytest.raises(ValueError, match=r"Labels must be in 0..1 \(2 names\), got \[-1, 2\]"):
        Examples(("x", "y", "z"), (2, 0, -1), ("a", "b"))


def test_examples_keep_tuples_of_strings():
    examples = Examples(["x", "y"], np.array([1, 0]), ["a", "b"])
    assert (examples.texts, examples.labels, examples.label_names) == (("x", "y"), (1, 0), ("a", "b"))
    with pytest.raises(
        ValueError, match=r"Examples hold strings, got {'texts': \['int'\], 'texts_b': \['NoneType'\]}"
    ):
        Examples(("x", 3), (0, 1), ("a", "b"), ("y", None))
    with pytest.raises(ValueError, match=r"Label names must differ, got \['a', 'a'\]"):
        Examples(("x", "y"), (0, 1), ("a", "a"))


@pytest.mark.parametrize("rows", ["file.jsonl", Path("file.jsonl"), {"text": ["x"], "label": [1]}, b"x"], ids=repr)
def test_what_is_no_rows_is_told_at_once(rows):
    with pytest.raises(TypeError, match="Examples are rows {'text', 'label'}, got .*Task.from_jsonl.*to_dict"):
        Examples.from_rows(rows)


def test_a_table_is_told_how_to_become_rows():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": ["x", "y"], "label": [0, 1]})
    with pytest.raises(TypeError, match="got DataFrame"):
        Examples.from_rows(table)
    assert len(Examples.from_rows(table.to_dict("records"))) == 2


def test_numpy_labels_become_ints():
    examples = Examples(["a", "b"], np.array([0, 1]), ["x", "y"])
    assert [type(label) for label in examples.labels] == [int, int]
    assert task_fingerprint(Task("t", examples, ("train",) * 2))


def test_class_indices_are_ints():
    with pytest.raises(ValueError, match="Labels must be class indices, ints, got float"):
        Examples(("a", "b"), (0.7, 1.2), ("x", "y"))
    rows = [{"text": text, "label": label} for text, label in zip("abc", np.array([3, 1, 3]), strict=True)]
    assert Examples.from_rows(rows).label_names == ("1", "3")
    rows = [{"text": "a", "label": np.str_("x")}, {"text": "b", "label": "y"}]
    assert Examples.from_rows(rows).labels == (0, 1)


def test_rows_that_repeat_others_are_left_out():
    """Another label or another second text makes another row; of equal ones the first stays where it was."""
    repeated = Examples(("b", "a", "b", "b", "b"), (0, 1, 0, 1, 0), ("x", "y"), ("c", "c", "c", "c", "d"))
    assert repeated.distinct() == repeated.select([0, 1, 3, 4])


def test_select_and_relabel():
    examples = Examples(("x", "y", "z"), (0, 1, 1), ("a", "b"), ("p", "q", "r"))
    assert examples.select([2, 0]) == Examples(("z", "x"), (1, 0), ("a", "b"), ("r", "p"))
    assert examples.with_labels([1, 0, 0]).labels == (1, 0, 0)
    assert examples.with_labels([0, 0, 0], ["c"]).label_names == ("c",)


@pytest.mark.parametrize("zipped", [False, True])
def test_from_jsonl(tmp_path, zipped):
    path = write(tmp_path / "parcels.jsonl", [*ROWS, ""])
    if zipped:
        text, path = path.read_bytes(), tmp_path / "parcels.jsonl.gz"
        path.write_bytes(gzip.compress(text))
    task = Task.from_jsonl(path, family="service", licence="CC0-1.0")
    assert (task.name, task.family, task.licence) == ("parcels", "service", "CC0-1.0")
    assert task.split("train").texts == ("late parcel", "lost parcel")
    assert task.split("test") == Examples(("later",), (0,), ("late", "lost"))
    assert Task.from_jsonl(path, name="other").name == "other"


def test_rows_without_a_split_are_for_training(tmp_path):
    path = write(tmp_path / "task.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": 2}])
    assert Task.from_jsonl(path).splits == ("train", "train")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "task.jsonl is not JSON lines: it has no rows"),
        (["{", ROWS[0], "no"], "task.jsonl is not JSON lines: line 1: .* at column 2; line 3: .* at column 1"),
        (
            [{"text": "x"}],
            r"Task file .*task.jsonl: Rows need 'text' and 'label', but none has \['label'\]; rename \['text'\]",
        ),
    ],
)
def test_bad_files(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        Task.from_jsonl(write(tmp_path / "task.jsonl", rows))


@pytest.mark.parametrize("damage", ["absent", "not gzip", "truncated", "flipped", "not text"])
def test_unreadable_files(tmp_path, damage):
    path = tmp_path / "task.jsonl.gz"
    content = gzip.compress(("\n".join(map(json.dumps, ROWS * 50))).encode())
    if damage == "not gzip":
        path.write_text("{}")
    elif damage == "truncated":
        path.write_bytes(content[:-20])
    elif damage == "flipped":
        path.write_bytes(content[:12] + bytes(255 - byte for byte in content[12:40]) + content[40:])
    elif damage == "not text":
        path.write_bytes(gzip.compress(b"\xff\xfe\xfa"))
    with pytest.raises(ValueError, match=r"Cannot read .*task.jsonl.gz"):
        Task.from_jsonl(path)


def test_task_errors():
    examples = Examples(("x", "y"), (0, 1), ("a", "b"))
    with pytest.raises(ValueError, match="Task 't' has 2 rows but 1 split entries"):
        Task("t", examples, ("train",))
    with pytest.raises(ValueError, match=r"no rows in split 'test'; its splits are \['dev', 'train'\]"):
        Task("t", examples, ("train", "dev")).split("test")
    with pytest.raises(ValueError, match="`shots` must be at least 1 example per class, got 0"):
        draw(examples, 0, 0)


def test_draws_are_balanced_seeded_and_give_what_there_is():
    examples = Examples(tuple(f"t{i}" for i in range(11)), (0,) * 8 + (1,) * 3, ("a", "b", "never"))
    task = Task("t", examples, ("train",) * 11)
    support = task.draw_support(5, seed=3)
    assert (support.labels.count(0), support.labels.count(1), support.n_classes) == (5, 3, 3)
    assert len(set(support.texts)) == 8
    assert all(
        examples.labels[examples.texts.index(t)] == y for t, y in zip(support.texts, support.labels, strict=True)
    )
    assert support == task.draw_support(5, seed=3)
    assert support != task.draw_support(5, seed=4)
    assert support.labels != tuple(sorted(support.labels))  # in random order


def test_balanced_rows_are_sorted_seeded_and_at_least_two_a_class():
    targets = torch.tensor([0] * 6 + [1] * 5 + [3])
    assert balanced_rows(targets, 64, 0).tolist() == list(range(12))
    rows = balanced_rows(targets, 9, 0)
    assert targets[rows].bincount().tolist() == [3, 3, 0, 1]
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert targets[balanced_rows(targets, 2, 0)].bincount().tolist() == [2, 2, 0, 1]
    assert rows.tolist() != balanced_rows(targets, 9, 1).tolist()
