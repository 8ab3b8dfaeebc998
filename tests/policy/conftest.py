import pytest

from lohp_peft.tasks import TaskFeatures
from tiny import build_encoder, build_policy, build_task, features_of


@pytest.fixture(scope="session")
def encoder():
    return build_encoder()


@pytest.fixture(scope="session")
def tasks():
    return [
        build_task("spam", family="spam"),
        build_task("ham", seed=2, family="spam"),
        build_task("mood", n_classes=3, seed=1, family="emotion"),
    ]


@pytest.fixture
def policy(encoder, tasks):
    return build_policy(encoder, tasks)


@pytest.fixture
def features(policy, encoder, tasks):
    """Of one support set a task."""
    return TaskFeatures.stack([features_of(policy, encoder, task.draw_support(4, 1)) for task in tasks])
