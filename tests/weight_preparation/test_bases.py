import pytest
import torch
from accelerate import PartialState

from lohp_peft.adapters import CoreSpace
from lohp_peft.tasks import TextEncoder
from lohp_peft.weight_preparation import first_gradients, gradient_space, prepare_trajectories, process, query_loss
from lohp_peft.weight_preparation.rows import keyed_generator, select_rows


def full_gradient(encoder, task, config, draws=1):
    """By autograd, of the base weights themselves, of the last of `draws` minibatches."""
    rows, generator = select_rows(task, config), keyed_generator(task.name, "gradients")
    encoded = encoder.prepare(rows.examples.texts, rows.examples.texts_b)
    weights = [encoder.base_model.get_submodule(spec.name).weight for spec in encoder.space.layout.modules]
    batches = [rows.sample(config, generator) for _ in range(draws)]
    for weight in weights:
        weight.requires_grad_(True)
    loss = query_loss(encoder, encoded, batches[-1], torch.zeros(encoder.space.shape), config.head)
    return dict(zip([s.name for s in encoder.space.layout.modules], torch.autograd.grad(loss, weights), strict=True))


@pytest.mark.parametrize("batch_size", [64, 5])
def test_they_are_the_gradients_of_the_base_weights(encoder, tasks, config, batch_size):
    encoder.batch_size = batch_size
    found = list(first_gradients(tasks, encoder, config, minibatches=2))
    assert len(found) == 4
    for gradient, expected in (
        (found[1], full_gradient(encoder, tasks[0], config, 2)),
        (found[2], full_gradient(encoder, tasks[1], config)),
    ):
        for name, (a, b) in gradient.items():
            torch.testing.assert_close(b @ a, expected[name], atol=1e-6, rtol=1e-3)
    assert not any(module._forward_hooks for module in encoder.base_model.modules())


def test_the_space_holds_more_of_them_than_that_of_the_base_weights(encoder, tasks, config):
    found = gradient_space(tasks, encoder, 2, config)
    again = gradient_space(tasks, encoder, 2, config)
    assert all(again.input_basis(i).equal(found.input_basis(i)) for i in range(len(found.layout.modules)))
    base = CoreSpace.from_base_weights(encoder.base_model, encoder.space.layout, 2)
    gradients = list(first_gradients(tasks, encoder, config))
    kept = {name: 0.0 for name in ("found", "base")}
    for gradient in gradients:
        for name, space in (("found", found), ("base", base)):
            state = space.encode(gradient).state
            kept[name] += float(state.square().sum())
    assert kept["found"] > 1.5 * kept["base"]
    # and at full rank it holds all of them
    whole = gradient_space(tasks, encoder, 16, config)
    for gradient in gradients:
        assert min(whole.encode(gradient).energy_kept.values()) == pytest.approx(1, abs=1e-3)


def test_frozen_weights_stay_frozen_and_the_model_as_it_was(encoder, tasks, config, tokenizer):
    encoder.base_model.requires_grad_(False)
    encoder.base_model.train()
    space = gradient_space(tasks, encoder, 2, config)
    assert encoder.base_model.training
    assert not any(p.requires_grad or p.grad is not None for p in encoder.base_model.parameters())
    assert TextEncoder(encoder.base_model, tokenizer, space).statistics(encoder.prepare(["word1"])).outputs is not None


def test_a_preparation_that_continues_keeps_its_bases(encoder, tasks, config, tokenizer, quiet, tmp_path):
    first = gradient_space(tasks[:1], encoder, 2, config, output_dir=tmp_path / "runs")
    prepare_trajectories(
        tasks[:1], TextEncoder(encoder.base_model, tokenizer, first), tmp_path / "runs", config, console=quiet
    )
    again = gradient_space(tasks, encoder, 2, config, output_dir=tmp_path / "runs")
    assert all(again.input_basis(i).equal(first.input_basis(i)) for i in range(len(first.layout.modules)))
    with pytest.raises(ValueError, match=r"\(kind, rank\) \('core', 2\), asked for \('core', 3\)"):
        gradient_space(tasks, encoder, 3, config, output_dir=tmp_path / "runs")


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "by a launcher"])
def test_beside_a_gpu_a_base_model_stays_where_it_is_but_for_a_launcher(monkeypatch, encoder, tasks, config, launched):
    asked = []

    def state(cpu):
        asked.append(cpu)
        return PartialState(cpu=True)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(process, "PartialState", state)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    gradient_space(tasks[:1], encoder, 2, config)
    assert asked == [not launched]
