import math

import pytest
import torch

from lohp_peft.tasks import TaskFeatures, TextStatistics, fit_reference, task_features
from lohp_peft.tasks.features import log_f_ratio, support_errors
from lohp_peft.tasks.heads import leave_one_out

LABELS = torch.arange(24) % 3
PARTS = ("set", "labels", "modules", "moments")


def statistics_of(embeddings, modules):
    return TextStatistics(embeddings, *modules.chunk(2, -1))


@pytest.fixture
def statistics():
    """Classes that differ in every direction."""
    centres = torch.randn(3, 10)
    shifts = torch.randn(3, 2, 4)
    noise = torch.randn(24, 10), torch.randn(24, 2, 4)
    return statistics_of(centres[LABELS] + 0.5 * noise[0], shifts[LABELS] + 0.5 * noise[1])


@pytest.fixture
def reference(statistics):
    others = statistics_of(torch.randn(40, 10), torch.randn(40, 2, 4))
    return fit_reference([statistics, others], directions=6)


def test_shapes(statistics, reference):
    found = task_features(statistics, LABELS, 3, reference)
    assert (found.set.shape, found.labels.shape, found.modules.shape) == ((12,), (12,), (2, 8))
    assert found.moments.shape == (2, 6, 3)
    batch = TaskFeatures.stack([found, found])
    assert batch.modules.shape == (2, 2, 8)
    assert all(getattr(found, name).isfinite().all() for name in PARTS)


def test_neither_order_nor_names_matter_but_labels_do(statistics, reference):
    found = task_features(statistics, LABELS, 3, reference)
    order = torch.randperm(24)
    moved = task_features(statistics[order], LABELS[order], 3, reference)
    renamed = task_features(statistics, torch.tensor([2, 0, 1])[LABELS], 3, reference)
    for other in (moved, renamed):
        for name in PARTS:
            torch.testing.assert_close(getattr(other, name), getattr(found, name), atol=2e-5, rtol=1e-4)
    shuffled = task_features(statistics, LABELS[order], 3, reference)
    torch.testing.assert_close(shuffled.set, found.set)  # the same texts
    torch.testing.assert_close(shuffled.modules[:, 4:], found.modules[:, 4:])
    assert (found.labels[:6] - shuffled.labels[:6]).mean() > 1  # whose labels say less
    assert (found.modules[:, :4] - shuffled.modules[:, :4]).mean() > 1


def test_log_f_ratio_is_that_of_the_analysis_of_variance():
    stats = pytest.importorskip("scipy.stats")
    x = torch.randn(24, 5, dtype=torch.float64)
    theirs = stats.f_oneway(*(x[LABELS == c].numpy() for c in range(3))).statistic
    torch.testing.assert_close(log_f_ratio(x, LABELS, 3), torch.as_tensor(theirs).log(), atol=1e-3, rtol=1e-3)
    # classes without examples do not count, and neither does the scale
    torch.testing.assert_close(log_f_ratio(100 * x, LABELS, 7), log_f_ratio(x, LABELS, 3), atol=1e-5, rtol=1e-5)


def test_log_f_ratio_is_about_zero_under_random_labels():
    x, labels = torch.randn(60, 4000), torch.arange(60) % 3
    assert abs(log_f_ratio(x, labels, 3).exp().mean() - 1) < 0.1
    assert abs(log_f_ratio(x, labels, 3).median()) < 0.5
    told = x + 3 * torch.randn(3, 4000)[labels]
    assert log_f_ratio(told, labels, 3).median() > 3


def test_one_example_a_class_is_finite(statistics, reference):
    found = task_features(statistics[torch.arange(3)], torch.arange(3), 3, reference)
    assert all(getattr(found, name).isfinite().all() for name in PARTS)
    assert found.labels[-2:].tolist() == pytest.approx([math.log(3), 0])


def test_one_example_a_class_has_the_error_rate_of_chance():
    """All its leave-one-out scores are equal but for rounding."""
    for seed in range(5):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
        assert support_errors(x, torch.arange(3), 4)[2] == pytest.approx(2 / 3)


def test_the_reference_is_an_orthonormal_frame(statistics, reference):
    torch.testing.assert_close(reference["axes"].T @ reference["axes"], torch.eye(6), atol=1e-5, rtol=0)
    assert (reference["axes_std"].diff() <= 1e-6).all()
    assert fit_reference([statistics], 99)["axes"].shape == (10, 10)
    same = statistics_of(torch.ones(30, 10), torch.ones(30, 2, 4))
    flat = task_features(same, torch.arange(30) % 2, 2, fit_reference([same], 4))
    assert all(getattr(flat, name).isfinite().all() for name in PARTS)
    with pytest.raises(ValueError, match="6 principal directions need at least as many texts, got 4"):
        fit_reference([statistics[torch.arange(4)]], 6)


def test_statistics_are_joined(statistics):
    joined = TextStatistics.concatenate([statistics[torch.arange(3)], statistics[torch.arange(3, 24)]])
    assert joined.embeddings.equal(statistics.embeddings)
    assert len(joined) == 24


def test_errors_are_the_gradient_of_the_leave_one_out_loss_averaged_over_classes():
    """With the weights of the head held fixed, class-balanced, and normalised embeddings."""
    embeddings, labels = torch.randn(12, 5), torch.tensor([0] * 6 + [1] * 2 + [2] * 4)
    errors, loss, error_rate = support_errors(embeddings, labels, 3)
    x = torch.nn.functional.normalize(embeddings, dim=-1)
    head, logits = leave_one_out(x, labels, 3)
    count = labels.bincount()[labels]
    for i in range(12):
        row = embeddings[i].clone().requires_grad_(True)
        moved = logits[i] + (torch.nn.functional.normalize(row, dim=0) - x[i]) @ head.weight.T
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(moved, labels[i]), row)
        torch.testing.assert_close(errors[i], -gradient * embeddings[i].norm() / (3 * count[i]), atol=1e-5, rtol=1e-4)
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert error_rate == pytest.approx(float((logits.argmax(-1) != labels).float().mean()))


def test_errors_vanish_where_the_classes_are_apart():
    labels = torch.arange(64) % 2
    apart = torch.randn(2, 8)[labels] + 0.01 * torch.randn(64, 8)
    near = 0.1 * torch.randn(2, 8)[labels] + torch.randn(64, 8)
    assert support_errors(apart, labels, 2)[0].norm() < 0.05 * support_errors(near, labels, 2)[0].norm()


def test_moments_are_products_of_error_and_input(statistics, reference):
    found = task_features(statistics, LABELS, 3, reference)
    errors = support_errors(statistics.embeddings, LABELS, 3)[0] @ reference["axes"]
    modules = (statistics.modules - reference["module_mean"]) / reference["module_std"]
    inputs = torch.cat([modules[..., :2], torch.ones(24, 2, 1)], -1)
    expected = torch.stack([sum(errors[n][:, None] * inputs[n, m] for n in range(24)) for m in range(2)])
    size = expected.square().mean().sqrt()
    torch.testing.assert_close(found.moments, expected / size, atol=1e-4, rtol=1e-3)
    assert found.labels[9] == pytest.approx(float(size.log()), abs=1e-3)


def test_the_size_of_the_errors_is_that_of_the_task_and_not_of_the_support_set(reference):
    def size(shots):
        labels = torch.arange(3).repeat(shots)
        centres = 0.3 * torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
        embeddings = centres[labels] + torch.randn(len(labels), 10)
        shifts = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
        statistics = statistics_of(embeddings, shifts[labels] + 0.1 * torch.randn(len(labels), 2, 4))
        return float(task_features(statistics, labels, 3, reference).labels[9])

    torch.manual_seed(0)
    few, many = (sum(size(shots) for _ in range(20)) / 20 for shots in (16, 128))
    assert abs(few - many) < 0.7 < math.log(8)  # which is what a mean over eight times as many would add


def test_autocast_does_not_reach_the_features(statistics, reference):
    expected = task_features(statistics, LABELS, 3, reference)
    with torch.autocast("cpu", torch.bfloat16):
        found = task_features(statistics, LABELS, 3, reference)
    assert all(getattr(found, name).equal(getattr(expected, name)) for name in PARTS)
