import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from lohp_peft.tasks import calibrated_cross_entropy, leave_one_out_loss, solve_head
from lohp_peft.tasks.heads import leave_one_out


@pytest.fixture
def data():
    features = torch.randn(15, 6, dtype=torch.float64)
    labels = torch.tensor([0] * 7 + [1] * 3 + [2] * 5)  # unbalanced
    return features, labels


def test_ridge_solves_the_weighted_normal_equations(data):
    features, labels = data
    head = solve_head(features, labels, 3, "ridge", ridge=0.7, temperature=0.1)
    x, y = normalize(features, dim=-1), one_hot(labels, 3).double()
    weight = (15 / 3) / y.sum(0)[labels]  # every class counts the same
    design = torch.cat([x, torch.ones(15, 1, dtype=x.dtype)], 1)
    penalty = 0.7 * torch.eye(7, dtype=x.dtype)
    penalty[-1, -1] = 0  # the intercept is free
    solution = torch.linalg.solve(design.T @ (weight[:, None] * design) + penalty, design.T @ (weight[:, None] * y))
    torch.testing.assert_close(head.weight * 0.1, solution[:-1].T)
    torch.testing.assert_close(head.bias * 0.1, solution[-1])


def test_ridge_equals_scikit_learn(data):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = data
    x, y = normalize(features, dim=-1), one_hot(labels, 3).double()
    theirs = linear_model.Ridge(alpha=3.0).fit(x, y, sample_weight=(5 / y.sum(0)[labels]).numpy())
    scores = solve_head(features, labels, 3, "ridge", temperature=1.0).logits(features)
    torch.testing.assert_close(scores, torch.as_tensor(theirs.predict(x)))


def test_prototype_is_the_nearest_mean(data):
    features, labels = data
    head = solve_head(features, labels, 3, "prototype", temperature=0.5)
    means = torch.stack([normalize(features[labels == c], dim=-1).mean(0) for c in range(3)])
    others = torch.randn(20, 6, dtype=torch.float64)
    distance = torch.cdist(normalize(others, dim=-1), means)
    scores = head.logits(others)
    assert scores.argmax(1).equal(distance.argmin(1))
    torch.testing.assert_close(scores.diff(dim=1) * 0.5, -distance.square().diff(dim=1))


@pytest.mark.parametrize("kind", ["ridge", "prototype"])
def test_gradients_reach_the_embeddings(data, kind):
    features, labels = data

    def query_loss(support):
        return solve_head(support, labels, 3, kind).logits(torch.ones(1, 6, dtype=support.dtype)).log_softmax(-1)[0, 0]

    assert torch.autograd.gradcheck(query_loss, features.clone().requires_grad_())


@pytest.mark.parametrize("kind", ["ridge", "prototype"])
def test_a_class_without_examples_never_wins(data, kind):
    features, labels = data
    with_absent = solve_head(features, labels, 5, kind)
    scores = with_absent.logits(torch.randn(50, 6, dtype=torch.float64))
    assert with_absent.weight.shape == (5, 6)
    assert scores.isfinite().all()
    assert scores.argmax(1).max() < 3
    torch.testing.assert_close(with_absent.weight[:3], solve_head(features, labels, 3, kind).weight)


@pytest.mark.parametrize("kind", ["ridge", "prototype"])
def test_one_example_a_class(kind):
    features = torch.eye(3)
    assert solve_head(features, torch.arange(3), 3, kind).logits(features).argmax(1).tolist() == [0, 1, 2]


def test_unknown_kind(data):
    with pytest.raises(ValueError, match=r"must be one of \['ridge', 'prototype'\], got 'svm'"):
        solve_head(*data, 3, "svm")


def test_leave_one_out_equals_leaving_the_same_share_of_every_class_out(data):
    """Classes of 7, 3 and 5: one third at a time, by the first coordinate."""
    features, labels = data
    shares = {7: [0, 3, 5, 7], 3: [0, 1, 2, 3], 5: [0, 2, 4, 5]}
    x, y = normalize(features, dim=-1), one_hot(labels, 3).double()
    head, scores = leave_one_out(x, labels, 3, ridge=0.7, temperature=0.1)
    solved = solve_head(features, labels, 3, "ridge", ridge=0.7, temperature=0.1)
    torch.testing.assert_close(head.weight, solved.weight)
    torch.testing.assert_close(head.bias, solved.bias)
    weight = (15 / 3) / y.sum(0)[labels]  # with the means and class weights of all examples
    mean, target_mean = ((weight[:, None] * z).sum(0) / weight.sum() for z in (x, y))
    by_class = [sorted((labels == c).nonzero().flatten().tolist(), key=lambda i: float(x[i, 0])) for c in range(3)]
    for number in range(3):
        bounds = [shares[len(rows)] for rows in by_class]
        left_out = [
            i for rows, ends in zip(by_class, bounds, strict=True) for i in rows[ends[number] : ends[number + 1]]
        ]
        kept = [i for i in range(15) if i not in left_out]
        design, targets = (x - mean)[kept], (y - target_mean)[kept]
        normal = design.T @ (weight[kept, None] * design) + 0.7 * torch.eye(6, dtype=x.dtype)
        solution = torch.linalg.solve(normal, design.T @ (weight[kept, None] * targets))
        torch.testing.assert_close(scores[left_out] * 0.1, (x[left_out] - mean) @ solution + target_mean)


@pytest.mark.parametrize("counts", [(3, 3), (2, 16), (3, 30), (2, 8, 8)], ids=str)
def test_random_labels_look_random_with_few_examples(counts):
    """Also where one class has far fewer: the mean error of the classes is that of chance."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    errors = []
    for _ in range(100):
        x = normalize(torch.randn(len(labels), 384, generator=generator), dim=-1)
        wrong = (leave_one_out(x, labels, len(counts))[1].argmax(-1) != labels).float()
        errors.append(torch.stack([wrong[labels == c].mean() for c in range(len(counts))]).mean())
    assert abs(float(torch.stack(errors).mean()) - (1 - 1 / len(counts))) < 0.12


def test_a_class_of_one_example_does_not_leave_everything_out():
    labels = torch.tensor([0, 0, 0, 0, 1])
    x = normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    _, scores = leave_one_out(x, labels, 2)
    assert scores.isfinite().all()
    assert leave_one_out(x[:2], torch.tensor([0, 1]), 2)[1].isfinite().all()


def test_leave_one_out_loss_is_the_calibrated_cross_entropy_of_those_scores(data):
    features, labels = data
    found = leave_one_out_loss(features, labels, 3, ridge=0.7)
    _, scores = leave_one_out(normalize(features.float(), dim=-1), labels, 3, ridge=0.7)
    torch.testing.assert_close(found, calibrated_cross_entropy(scores, labels, "none"))
    torch.testing.assert_close(found.mean(), calibrated_cross_entropy(scores, labels))
    assert found.shape == (15,)
    assert not torch.allclose(found, leave_one_out_loss(features, labels, 3, ridge=7.0))


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 5, generator=generator), torch.randint(5, (40,), generator=generator)
    logits[torch.arange(40), labels] += 1.0
    return logits, labels


def test_calibrated_loss_is_the_least_over_temperatures(scores):
    logits, labels = scores
    found = calibrated_cross_entropy(logits, labels)
    each = [cross_entropy(factor * logits, labels) for factor in torch.logspace(-1, 1, 400)]
    assert float(found) == pytest.approx(float(min(each)), abs=1e-4)
    for factor in (0.3, 4.0):  # so that being surer earns nothing
        torch.testing.assert_close(calibrated_cross_entropy(factor * logits, labels), found, rtol=1e-4, atol=1e-5)
    assert calibrated_cross_entropy(logits.flip(0), labels) > found


def test_calibrated_loss_has_the_gradient_of_the_minimum(scores):
    logits, labels = (scores[0].double().requires_grad_(), scores[1])
    (gradient,) = torch.autograd.grad(calibrated_cross_entropy(logits, labels), logits)
    assert (gradient * logits).sum().item() == pytest.approx(0.0, abs=1e-6)  # none along the size of the scores
    step = 1e-4 * torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = calibrated_cross_entropy(logits + step, labels) - calibrated_cross_entropy(logits - step, labels)
    assert change.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-3)


def test_calibrated_loss_of_perfect_and_of_useless_scores_is_finite():
    labels = torch.tensor([0, 1, 1])
    perfect = 3.0 * one_hot(labels, 2).float()
    assert 0 <= float(calibrated_cross_entropy(perfect, labels)) < 1e-6
    assert float(calibrated_cross_entropy(-perfect, labels)) < 0.8
    assert float(calibrated_cross_entropy(torch.zeros(3, 2), labels)) == pytest.approx(0.6931, abs=1e-3)
