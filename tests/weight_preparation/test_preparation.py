import io

import pytest
import torch
from accelerate import PartialState
from rich.console import Console
from torch.nn.functional import cross_entropy

from lohp_peft.adapters.space import LoraBSpace
from lohp_peft.tasks import Examples, Task
from lohp_peft.tasks.encoder import TextEncoder
from lohp_peft.tasks.fingerprint import tokenizer_fingerprint
from lohp_peft.tasks.heads import solve_head
from lohp_peft.weight_preparation import (
    WeightPreparationConfig,
    plan_preparation,
    prepare_trajectories,
    query_loss,
    record_run,
)
from lohp_peft.weight_preparation.preparation import _my_share
from lohp_peft.weight_preparation.rows import select_rows
from tiny import build_base_model, build_task


def _same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a.task, a.optimizer, a.seed) == (b.task, b.optimizer, b.seed)
        assert torch.equal(a.states, b.states)
        assert torch.equal(a.losses, b.losses)


def test_one_shard_a_task_with_every_optimizer_and_seed(tasks, encoder, tmp_path, config, quiet):
    dataset = prepare_trajectories(tasks, encoder, tmp_path / "out", config, console=quiet)
    assert dataset.keys() == ["mood", "spam"]
    for key in dataset.keys():
        runs = dataset[key]
        assert [(run.optimizer, run.seed) for run in runs] == [("adamw", 0), ("adamw", 1), ("sam", 0), ("sam", 1)]
        for run in runs:
            assert run.optimizer_steps.tolist() == [0, 3, 6, 8]
            assert not run.states[0].any()
            assert run.states[1:].flatten(1).any(1).all()
            assert run.losses.isfinite().all()
            assert run.metrics["query_accuracy"].isfinite().all()
            assert run.metrics["train_loss"].isnan().tolist() == [True, False, False, False]
            assert run.hyperparameters["lr"] > 0
        assert len({float(run.losses[0]) for run in runs}) == 1  # all start as the base model on the same rows
        assert not torch.equal(runs[0].states, runs[1].states)


def test_runs_lower_the_loss(encoder, tmp_path, quiet):
    slow = {name: {"lr": 0.01} for name in ("adamw", "sam")}
    many = {"rows_per_class": 32, "rows_per_task": 400, "score_query_rows": 128, "score_shots": 64}
    config = WeightPreparationConfig(
        optimizers=("adamw", "sam"), optimizer_steps=60, record_every=20, hyperparameters=slow, **many
    )
    dataset = prepare_trajectories([build_task("spam", rows=400)], encoder, tmp_path / "out", config, console=quiet)
    for run in dataset:
        assert run.losses[-1] < run.losses[0]
        assert run.metrics["train_loss"][-1] < run.metrics["train_loss"][1]


def test_the_score_can_be_computed_again_from_the_dataset_alone(tasks, encoder, tmp_path, config, quiet):
    """A later stage knows only the rows in the shard's metadata; it must find the recorded loss."""
    dataset = prepare_trajectories(tasks, encoder, tmp_path / "out", config, console=quiet)
    rows = dataset.manifest.shards["spam"].metadata
    split = tasks[0].split("train")
    support, query = (split.select(rows[name]) for name in ("score_support_rows", "score_query_rows"))
    run = dataset["spam"][0]
    for state, loss in zip(run.states, run.losses, strict=True):
        features = [encoder.embed(encoder.prepare(side.texts), states=state[None]) for side in (support, query)]
        head = solve_head(features[0], support.targets, split.n_classes, config.head)
        torch.testing.assert_close(cross_entropy(head.logits(features[1]), query.targets), loss, atol=1e-4, rtol=1e-4)


def test_preparation_is_deterministic(tasks, encoder, tmp_path, config, quiet):
    first = prepare_trajectories(tasks, encoder, tmp_path / "a", config, console=quiet)
    torch.manual_seed(123)
    _same(first, prepare_trajectories(tasks[::-1], encoder, tmp_path / "b", config, console=quiet))


def test_a_second_call_continues(tasks, encoder, tmp_path, config, quiet):
    whole = prepare_trajectories(tasks, encoder, tmp_path / "whole", config, console=quiet)
    prepare_trajectories(tasks[:1], encoder, tmp_path / "parts", config, console=quiet)
    shard = next((tmp_path / "parts" / "shards").glob("*"))
    written = shard.stat().st_mtime_ns
    continued = prepare_trajectories(tasks, encoder, tmp_path / "parts", config, console=quiet)
    assert shard.stat().st_mtime_ns == written
    _same(whole, continued)


def test_a_damaged_shard_is_recorded_again(tasks, encoder, tmp_path, config, quiet):
    dataset = prepare_trajectories(tasks, encoder, tmp_path / "out", config, console=quiet)
    whole = list(dataset)
    path = dataset.folder / dataset.manifest.shards["spam"].file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="'spam'"):
        again = prepare_trajectories(tasks, encoder, tmp_path / "out", config, console=quiet)
    _same(whole, list(again))


def test_a_damaged_shard_of_another_task_loses_nothing(tasks, encoder, tmp_path, config, quiet):
    dataset = prepare_trajectories(tasks[:1], encoder, tmp_path / "out", config, console=quiet)
    path = dataset.folder / dataset.manifest.shards["spam"].file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="'spam'"):
        dataset = prepare_trajectories(tasks[1:], encoder, tmp_path / "out", config, console=quiet)
    assert dataset.keys() == ["mood"]


def test_another_weight_space_is_found_by_the_plan(tasks, encoder, tmp_path, config, quiet):
    prepare_trajectories(tasks[:1], encoder, tmp_path / "out", config, console=quiet)
    layout = encoder.space.layout
    assert plan_preparation(tasks, LoraBSpace.seeded(layout, 2, seed=1), config, tmp_path / "out").runs == 4
    with pytest.raises(ValueError, match=r"another weight space: .* \('lora_b', 2\), asked for \('lora_b', 4\)"):
        plan_preparation(tasks, LoraBSpace.seeded(layout, 4), config, tmp_path / "out")


def test_other_settings_cannot_be_mixed(tasks, encoder, tmp_path, config, quiet):
    prepare_trajectories(tasks[:1], encoder, tmp_path / "out", config, console=quiet)
    other = WeightPreparationConfig(optimizers=("sgd",), seeds=(0, 1), optimizer_steps=9, record_every=3)
    for call in (
        lambda: prepare_trajectories(tasks, encoder, tmp_path / "out", other, console=quiet),
        lambda: plan_preparation(tasks, encoder.space, other, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"`optimizer_steps` was 8, now 9.*`optimizers` was \['adamw', 'sam'\]"):
            call()


def test_another_base_model_is_refused(tasks, encoder, tokenizer, space, tmp_path, config, quiet):
    prepare_trajectories(tasks[:1], encoder, tmp_path / "out", config, console=quiet)
    other = build_base_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    with pytest.raises(ValueError, match="base model: recorded on"):
        prepare_trajectories(tasks, TextEncoder(other, tokenizer, space), tmp_path / "out", config, console=quiet)


def test_another_reading_of_texts_is_refused(tasks, encoder, tokenizer, space, base_model, tmp_path, config, quiet):
    dataset = prepare_trajectories(tasks[:1], encoder, tmp_path / "out", config, console=quiet)
    assert dataset.manifest.metadata["reading"] == encoder.reading
    assert encoder.reading == {"pooling": "mean", "max_length": 128, "tokenizer": tokenizer_fingerprint(tokenizer)}
    other = TextEncoder(base_model, tokenizer, space, pooling="last", max_length=4)
    with pytest.raises(ValueError, match="pooling of texts: recorded with 'mean', got 'last'; max_length of texts"):
        prepare_trajectories(tasks, other, tmp_path / "out", config, console=quiet)


def test_all_unusable_tasks_are_listed(encoder, tmp_path, config, quiet):
    tasks = [build_task("spam"), build_task("spam", seed=1), build_task("tiny", rows=4), build_task("small", rows=5)]
    with pytest.raises(ValueError, match=r"(?s)2 tasks are named 'spam'.*task 'tiny'.*task 'small'"):
        prepare_trajectories(tasks, encoder, tmp_path / "out", config, console=quiet)
    with pytest.raises(ValueError, match="there are no tasks"):
        prepare_trajectories([], encoder, tmp_path / "out", config, console=quiet)
    assert not (tmp_path / "out").exists()


def test_pairs_of_texts(encoder, tmp_path, config, quiet):
    pairs = prepare_trajectories([build_task("t", pair=True)], encoder, tmp_path / "pairs", config, console=quiet)
    single = prepare_trajectories([build_task("t")], encoder, tmp_path / "single", config, console=quiet)
    assert pairs["t"][0].losses[0] != single["t"][0].losses[0]


def test_the_base_model_is_left_as_it_was(tasks, encoder, tmp_path, config, quiet):
    model = encoder.base_model.train()
    next(model.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: values.clone() for name, values in model.state_dict().items()}
    prepare_trajectories(tasks[:1], encoder, tmp_path / "out", config, console=quiet)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_diverged_runs_are_left_out_and_counted(encoder, tmp_path):
    config = WeightPreparationConfig(
        optimizers=("adamw", "sgd"), optimizer_steps=4, record_every=2, hyperparameters={"sgd": {"lr": 1e38}}
    )
    stream = io.StringIO()
    console = Console(file=stream, width=120)
    dataset = prepare_trajectories([build_task("spam")], encoder, tmp_path / "out", config, console=console)
    assert [run.optimizer for run in dataset] == ["adamw"]
    lines = [line.replace("│", " ").split() for line in stream.getvalue().splitlines()]
    assert {line[0]: line[1:3] for line in lines if line and line[0] in ("adamw", "sgd")} == {
        "adamw": ["1", "0"],
        "sgd": ["1", "1"],
    }


def test_the_training_loss_is_differentiable_in_the_state(encoder, config):
    task = build_task("spam")
    rows = select_rows(task, config)
    encoded = encoder.prepare(rows.examples.texts)
    state = torch.zeros(tuple(encoder.space.shape), requires_grad=True)
    query_loss(encoder, encoded, rows.score, state, "ridge").backward()
    assert state.grad[encoder.space.mask].any()
    assert not state.grad[~encoder.space.mask].any()


def test_record_run_is_unscored(encoder, config):
    rows = select_rows(build_task("spam"), config)
    encoded = encoder.prepare(rows.examples.texts)
    run = record_run(encoder, rows, encoded, task="spam", optimizer="adamw", seed=0, config=config)
    assert run.losses.isnan().all()


def test_plan_counts_and_writes_nothing(tasks, encoder, tmp_path, config, quiet):
    plan = plan_preparation(tasks, encoder.space, config, tmp_path / "out")
    assert plan.tasks == ("spam", "mood")
    assert (plan.runs, plan.optimizer_steps, plan.gradient_passes, plan.states) == (8, 64, 96, 32)
    assert plan.bytes == 32 * encoder.space.mask.numel() * 4
    assert not (tmp_path / "out").exists()
    assert "gradient passes" in {str(cell) for cell in plan.table().columns[0].cells}
    dataset = prepare_trajectories(tasks[:1], encoder, tmp_path / "out", config, console=quiet)
    after = plan_preparation(tasks, encoder.space, config, tmp_path / "out")
    assert (after.tasks, after.recorded, after.runs) == (("mood",), ("spam",), 4)
    assert sum(run.states.nbytes for run in dataset) == plan.bytes // 2
    assert after.to_dict()["tasks"] == ["mood"]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_tasks(monkeypatch, count, processes):
    state = PartialState()
    shares = []
    for index in range(processes):
        monkeypatch.setattr(state, "num_processes", processes)
        monkeypatch.setattr(state, "process_index", index)
        shares.append(_my_share(list(range(count)), state))
    assert sorted(sum(shares, [])) == list(range(count))


def test_the_closing_table_sums_up_each_optimizer(tasks, encoder, tmp_path, config):
    stream = io.StringIO()
    prepare_trajectories(tasks[:1], encoder, tmp_path / "out", config, console=Console(file=stream, width=120))
    assert "1 tasks, 0 recorded before" in stream.getvalue()
    assert {"adamw", "sam"} <= set(stream.getvalue().split())


def test_a_recording_is_not_continued_with_other_rows(tasks, encoder, tmp_path, config, quiet):
    """Labels that were mended since: the runs of then would be imitated under the name of the task of now."""
    folder = tmp_path / "out"
    prepare_trajectories(tasks, encoder, folder, config, console=quiet)
    spam = tasks[0].examples
    mended = Task("spam", spam.with_labels([1 - label for label in spam.labels]), tasks[0].splits)
    more = [build_task("new", seed=8), mended, tasks[1]]
    for act in (
        lambda: prepare_trajectories(more, encoder, folder, config, console=quiet),
        lambda: plan_preparation(more, encoder.space, config, folder),
    ):
        with pytest.raises(
            ValueError, match=r"others than those recorded.*'spam' was recorded on .* in split 'train'"
        ):
            act()
    named = Examples(mended.examples.texts, spam.labels, ("x", "y"))  # the names are nobody's business
    again = [Task("spam", named, tasks[0].splits), *more[::2]]
    assert set(prepare_trajectories(again, encoder, folder, config, console=quiet).keys()) == {"spam", "mood", "new"}


def test_a_run_leaves_no_gradients_on_the_base_model(base_model, tokenizer, space, config):
    base_model.requires_grad_(True)
    encoder, task = TextEncoder(base_model, tokenizer, space), build_task("spam")
    rows = select_rows(task, config)
    encoded = encoder.prepare(rows.examples.texts)
    assert record_run(encoder, rows, encoded, task="spam", optimizer="sam", seed=0, config=config) is not None
    assert all(p.grad is None and p.requires_grad for p in base_model.parameters())
