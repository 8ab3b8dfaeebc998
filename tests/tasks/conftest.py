import pytest

from tiny import build_encoder, build_task


@pytest.fixture(scope="module")
def encoder():
    """Three layers, of which the last is adapted."""
    return build_encoder(batch_size=4)


@pytest.fixture(scope="module")
def texts():
    return build_task("texts", n_classes=3, rows=18, seed=4).examples
