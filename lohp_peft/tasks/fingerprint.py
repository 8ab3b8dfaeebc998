"""Digests of tokenizers and tasks, by which another one is recognised."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from weakref import WeakKeyDictionary

from lohp_peft.files import sha256
from lohp_peft.tasks.task import Examples, Task

PROBE = "The café, in 1942: GREAT 'Coffee'!"
_FINGERPRINTS: WeakKeyDictionary = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer) -> str:
    """The SHA-256 of a tokenizer's class-independent behaviour: its vocabulary, in order.

    Kept for each `tokenizer` as long as the size of its vocabulary stays (a seventh of a small generation's time; Ours).
    """
    size, found = _FINGERPRINTS.get(tokenizer, (None, ""))
    if size != len(tokenizer):
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        found = sha256(json.dumps(vocabulary).encode())
        _FINGERPRINTS[tokenizer] = len(tokenizer), found
    return found


def reading_fingerprint(tokenizer) -> str:
    """The SHA-256 of the tokens of a text with capitals, accents, digits and marks, special tokens included.

    Two tokenizers of one vocabulary may read it differently, as with and without lower-casing.

    Args:
        tokenizer: The tokenizer.

    Returns:
        The digest, in hexadecimal.
    """
    return sha256(json.dumps([int(token) for token in tokenizer(PROBE)["input_ids"]]).encode())


def tokenizer_problems(tokenizer, fingerprint: str, reading: str) -> list[str]:
    """What keeps a tokenizer from being the one with these fingerprints; an empty one was not recorded.

    Args:
        tokenizer: The tokenizer.
        fingerprint: From `tokenizer_fingerprint`.
        reading: From `reading_fingerprint`.
    """
    found = tokenizer_fingerprint(tokenizer)
    if fingerprint and found != fingerprint:
        return [f"the policy's tokenizer has fingerprint {fingerprint[:12]}, got {found[:12]}"]
    if reading and reading_fingerprint(tokenizer) != reading:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(PROBE)["input_ids"])
        return [f"the tokenizer has the vocabulary of the policy's, but reads texts as others: {PROBE!r} as {tokens}"]
    return []


def task_fingerprint(task: Task) -> str:
    """The SHA-256 of what can be learned from a `task`: its rows with their splits, the names of its classes, its family.

    Neither its own name nor the licence counts.
    """
    content = {"examples": asdict(task.examples), "splits": task.splits, "family": task.family}
    return sha256(json.dumps(content).encode())


def rows_fingerprint(examples: Examples) -> str:
    """The SHA-256 of `examples` in order: their texts and class indices. Names of classes do not count."""
    return sha256(json.dumps([examples.texts, examples.texts_b, examples.labels]).encode())


def rows_at_hand(tasks: Sequence[Task]) -> Callable[[str, str], str | None]:
    """Which rows the `tasks` have, as `TrajectoryDataset.check_rows` asks.

    Returns:
        A function from the names of a task and of a split to `rows_fingerprint` of its rows, `None` where there are none.
    """
    named = {task.name: task for task in tasks}

    def fingerprint_of(name: str, split: str) -> str | None:
        task = named.get(name)
        return None if task is None or split not in task.splits else rows_fingerprint(task.split(split))

    return fingerprint_of
