"""Digests of tokenizers and tasks, by which another one is recognised."""

import json
from dataclasses import asdict
from weakref import WeakKeyDictionary

from lohp_peft.files import sha256
from lohp_peft.tasks.task import Task

_FINGERPRINTS: WeakKeyDictionary = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer) -> str:
    """The SHA-256 of a tokenizer's class-independent behaviour: its vocabulary, in order.

    Kept for each `tokenizer` as long as the size of its vocabulary stays (a seventh of a small generation's time; Ours).
    """
    size, found = _FINGERPRINTS.get(tokenizer, (None, ""))
    if size != len(tokenizer):
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        found = sha256(json.dumps(vocabulary).encode())
        _FINGERPRINTS[tokenizer] = len(tokenizer), found
    return found


def task_fingerprint(task: Task) -> str:
    """The SHA-256 of what can be learned from a `task`: its rows with their splits, the names of its classes, its family.

    Neither its own name nor the licence counts.
    """
    content = {"examples": asdict(task.examples), "splits": task.splits, "family": task.family}
    return sha256(json.dumps(content).encode())
