"""What a control tells a conditional method in the place of the support set; head and scores keep the true one."""

import torch

from lohp_peft.tasks import Task, TaskFeatures, balanced_rows
from methods.base import Setting, Support


def wrong_task(setting: Setting, support: Support, task: Task) -> TaskFeatures:
    """A seeded training task of another family."""
    reference = setting.policy.reference_set
    index = reference.wrong_task(task.family, task.name, support.seed, reference.nearest(support.features[0]))
    return reference.features[index : index + 1]


def shuffled_labels(setting: Setting, support: Support, task: Task) -> TaskFeatures:
    """The same texts, labels exchanged between them."""
    examples, generator = support.examples, torch.Generator().manual_seed(support.seed)
    labels = examples.targets[torch.randperm(len(examples), generator=generator)]
    return setting.features(support.statistics, examples.with_labels(labels.tolist()))


def random_text(setting: Setting, support: Support, task: Task) -> TaskFeatures:
    """Random words, as many as each text has, with the true labels."""
    words = [word for word in sorted(setting.encoder.tokenizer.get_vocab()) if word.isalpha()]
    generator = torch.Generator().manual_seed(support.seed)
    counts = [len(text.split()) for text in support.examples.texts]
    texts = [" ".join(words[int(i)] for i in torch.randint(len(words), (n,), generator=generator)) for n in counts]
    return setting.features(setting.encoder.statistics(setting.encoder.prepare(texts)), support.examples)


def half_support(setting: Setting, support: Support, task: Task) -> TaskFeatures:
    """Half of the examples of every class, but two."""
    rows = balanced_rows(support.examples.targets, len(support.examples) // 2, support.seed)
    return setting.features(support.statistics[rows], support.examples.select(rows.tolist()))


CONTROLS = {control.__name__: control for control in (wrong_task, shuffled_labels, random_text, half_support)}
