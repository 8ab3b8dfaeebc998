from dataclasses import replace

import pytest
import torch

from lohp_peft.tasks import EpisodeSampler, Task, contrast_groups, contrast_task
from tiny import build_task

LABELS = {"a": torch.arange(40) % 2, "b": torch.arange(60) % 2, "many": torch.arange(120) % 8}


def rows_of(parts):
    return [(name, int(row)) for name, rows in parts for row in rows]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def episodes(count=150, **kwargs):
    sampler = EpisodeSampler(LABELS, [["a", "b"]], **kwargs)
    source = generator()
    return [sampler.sample(source) for _ in range(count)]


def test_support_and_query_are_disjoint_and_within_bounds():
    kinds, more = set(), set()
    for episode in episodes(merge=0.5, support_size=24, query_size=16):
        support, query = rows_of(episode.support), rows_of(episode.query)
        assert not set(support) & set(query)
        assert len(set(support)) == len(support) == len(episode.support_labels) <= 24
        assert 0 < len(query) == len(episode.query_labels) <= 16
        for labels in (episode.support_labels, episode.query_labels):
            assert labels.unique().tolist() == list(range(episode.n_classes))
        assert episode.support_labels.bincount().min() >= 2
        known = dict(zip(rows_of(episode.known), episode.known_labels.tolist(), strict=True))
        assert len(known) == len(episode.known_labels)
        assert not set(known) & set(query)
        assert [known[row] for row in support] == episode.support_labels.tolist()
        assert episode.known_labels.bincount().max() <= (16 if episode.kind == "subset" else 20)
        more.add(len(known) > len(support))
        kinds.add(episode.kind)
    assert kinds == {"subset", "merge", "contrast"}
    assert more == {False, True}


def test_the_support_size_holds_for_tasks_of_many_classes():
    """And each class has two of it, so that fewer classes take part."""
    sampler = EpisodeSampler({"many": torch.arange(40).repeat(8)}, support_size=12, query_size=6, merge=0.5)
    generator = torch.Generator().manual_seed(0)
    for episode in (sampler.sample(generator) for _ in range(200)):
        assert len(episode.support_labels) <= 12
        assert episode.support_labels.bincount().min() >= (1 if episode.kind == "merge" else 2)


def test_labels_are_those_of_the_rows():
    for episode in episodes(merge=0.5):
        if episode.kind == "contrast":
            continue
        found = {}
        for parts, labels in ((episode.support, episode.support_labels), (episode.query, episode.query_labels)):
            for (name, row), label in zip(rows_of(parts), labels.tolist(), strict=True):
                found.setdefault((name, int(LABELS[name][row])), set()).add(label)
        assert all(len(labels) == 1 for labels in found.values())  # one class has one label
        merged = len(found) > episode.n_classes
        assert merged == (episode.kind == "merge")


@pytest.mark.parametrize("draw", ["sample", "task", "contrast"])
def test_the_generator_alone_decides(draw):
    def made(seed):
        sampler, source = EpisodeSampler(LABELS, [["a", "b"]]), generator(seed)
        if draw == "sample":
            episode = sampler.sample(source)
        elif draw == "task":
            episode = sampler.whole_task_episode("many", source)
        else:
            episode = sampler.contrast_episode(["a", "b"], True, source)
        return rows_of(episode.support), rows_of(episode.query), episode.support_labels.tolist()

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_a_contrast_has_the_same_texts_under_two_labelings():
    sampler = EpisodeSampler(LABELS, [["a", "b"]])
    by_class, by_task = (sampler.contrast_episode(["a", "b"], by, generator()) for by in (False, True))
    assert rows_of(by_class.support) == rows_of(by_task.support)
    assert rows_of(by_class.query) == rows_of(by_task.query)
    rows = rows_of(by_class.support)
    assert by_class.support_labels.tolist() == [int(LABELS[name][row]) for name, row in rows]
    assert by_task.support_labels.tolist() == [["a", "b"].index(name) for name, _ in rows]


def test_a_task_that_lacks_a_class_is_no_part_of_a_contrast():
    short = torch.tensor([0] * 3 + [1] * 10 + [2] * 10)  # its class 1 would pass for class 0
    full = torch.arange(30) % 3
    sampler = EpisodeSampler({"short": short, "x": full, "y": full}, [["short", "x", "y"]], contrast=1.0)
    assert sampler.groups == [["x", "y"]]
    assert EpisodeSampler({"short": short, "x": full}, [["short", "x"]], contrast=1.0).contrast == 0


def test_the_share_of_contrasts():
    share = sum(episode.kind == "contrast" for episode in episodes(400, contrast=0.5)) / 400
    assert 0.4 < share < 0.6
    assert all(episode.kind != "contrast" for episode in episodes(50, contrast=0.0))


def test_sampler_errors():
    with pytest.raises(ValueError, match=r"not among the training tasks: \['c'\]"):
        EpisodeSampler(LABELS, [["a", "c"]])
    with pytest.raises(ValueError, match="No task has two classes with at least four rows each"):
        EpisodeSampler({"tiny": torch.tensor([0, 0, 0, 0, 1, 1, 1])})


def test_contrast_groups_share_label_names():
    tasks = [build_task("a"), build_task("b", seed=1), build_task("three", n_classes=3), build_task("p", pair=True)]
    assert contrast_groups(tasks) == [["a", "b"]]
    swapped = build_task("s")
    object.__setattr__(swapped.examples, "label_names", swapped.examples.label_names[::-1])
    assert contrast_groups([*tasks, swapped]) == [["a", "b"]]  # its class 0 is the others' class 1


def test_a_pool_is_not_pooled_with_its_sources():
    tasks = [build_task("a"), build_task("b", seed=1)]
    pools = [contrast_task(tasks, by, f"pool {by}") for by in (False, True)]
    assert contrast_groups([*tasks, *pools]) == [["a", "b"]]


def test_a_file_sorted_by_label_gives_all_classes():
    task, other = build_task("a", rows=60), build_task("b", seed=1, rows=60)
    order = sorted(range(60), key=lambda i: task.examples.labels[i])
    ordered = Task("sorted", task.examples.select(order), task.splits, task.family)
    pooled = contrast_task([ordered, other], False, "pool", rows_per_task=10)
    assert pooled.examples.targets.bincount().tolist() == [10, 10]


def test_contrast_tasks_pool_the_same_texts():
    tasks = [build_task("a", family="x"), build_task("b", seed=1, family="x")]
    by_class, by_task = (contrast_task(tasks, by, "pool", rows_per_task=10) for by in (False, True))
    assert by_class.examples.texts == by_task.examples.texts
    assert len(by_class.examples) == 20
    assert by_class.examples.label_names == ("class 0", "class 1")
    for i, task in enumerate(tasks):
        kept = {text: label for text, label in zip(task.examples.texts, task.examples.labels, strict=True)}
        for text, label in zip(
            by_class.examples.texts[10 * i :][:10], by_class.examples.labels[10 * i :], strict=False
        ):
            assert kept[text] == label
    assert by_task.examples.label_names == ("a", "b")
    assert by_task.examples.labels == (0,) * 10 + (1,) * 10
    assert (by_class.family, by_task.family) == ("x", "domain")
    with pytest.raises(ValueError, match="one label set; 'a' has .* but {'three': "):
        contrast_task([tasks[0], build_task("three", n_classes=3)], True, "pool")


def test_contrast_tasks_keep_pairs():
    pairs = []
    for task in (build_task("a"), build_task("b", seed=1)):
        second = tuple(f"{text} again" for text in task.examples.texts)
        pairs.append(replace(task, examples=replace(task.examples, texts_b=second)))
    pooled = contrast_task(pairs, True, "pool", rows_per_task=10).examples
    assert pooled.texts_b == tuple(f"{text} again" for text in pooled.texts)
    with pytest.raises(ValueError, match=r"texts or pairs of texts throughout; of 2 tasks \['b'\] have pairs"):
        contrast_task([build_task("a"), pairs[1]], True, "pool")
