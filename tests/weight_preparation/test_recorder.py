import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification, EarlyStoppingCallback, TrainerCallback

from lohp_peft.adapters.layout import AdapterLayout, base_model_fingerprint
from lohp_peft.adapters.space import CoreSpace, LoraBSpace
from lohp_peft.trajectories import TrajectoryDataset
from lohp_peft.weight_preparation import TrajectoryRecorder
from lohp_peft.weight_preparation.snapshots import LiveAdapter, SnapshotStore
from tiny import build_base_model
from weight_preparation.conftest import lora_model, train


def final_update(model):
    return {
        name: (layer.get_delta_weight("default")).detach()
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "get_delta_weight") and "default" in getattr(layer, "lora_A", {})
    }


def recorded(folder, key="toy-adamw_torch_fused-3"):
    return TrajectoryDataset.open(folder)[key][0]


def full_rank_space(model):
    """Cores of full rank hold every update exactly."""
    layout = AdapterLayout.from_model(model, ["query", "value"])
    return CoreSpace.from_base_weights(model, layout, 16)


def test_recorded_states_are_the_updates_with_the_scaling_folded_in(tmp_path):
    space = full_rank_space(build_base_model())
    recorder = TrajectoryRecorder(tmp_path / "rec", "toy", record_every=5, space=space)
    model = train(tmp_path / "run", recorder)
    run = recorded(tmp_path / "rec")
    assert run.optimizer_steps.tolist() == [0, 5, 10, 12]
    assert not run.states[0].any()
    decoded = space.delta_weight(run.states[-1])
    assert decoded.keys() == final_update(model).keys()
    for name, delta in final_update(model).items():
        assert delta.any()
        torch.testing.assert_close(decoded[name], delta, atol=1e-5, rtol=1e-4)
    assert (run.task, run.optimizer, run.seed) == ("toy", "adamw_torch_fused", 3)
    assert run.hyperparameters["learning_rate"] == 0.02
    assert run.hyperparameters["lr_scheduler_type"] == "linear"


def test_bases_from_the_run_itself_and_the_residual(tmp_path):
    recorder = TrajectoryRecorder(tmp_path / "rec", "toy", record_every=3, r=8)
    model = train(tmp_path / "run", recorder)
    dataset = TrajectoryDataset.open(tmp_path / "rec")
    assert (dataset.space.kind, dataset.space.r) == ("core", 8)
    assert dataset.manifest.base_fingerprint == base_model_fingerprint(build_base_model())
    decoded, deltas = dataset.space.delta_weight(recorded(tmp_path / "rec").states[-1]), final_update(model)
    total = sum(delta.square().sum() for delta in deltas.values())
    lost = sum((deltas[name] - decoded[name]).square().sum() for name in deltas)
    assert recorder.report.energy_kept == pytest.approx(float(1 - lost / total), abs=1e-4)
    assert recorder.report.energy_kept > 0.95
    assert recorder.report.states == 5
    assert json.loads(json.dumps(recorder.report.to_dict()))["key"] == "toy-adamw_torch_fused-3"


def test_a_poor_space_is_reported(tmp_path, caplog):
    space = LoraBSpace.seeded(AdapterLayout.from_model(build_base_model(), ["query", "value"]), r=1, seed=0)
    recorder = TrajectoryRecorder(tmp_path / "rec", "toy", space=space)
    train(tmp_path / "run", recorder)
    assert recorder.report.energy_kept < 0.5
    assert "holds only" in caplog.text
    shares = recorded(tmp_path / "rec").metrics["scored_share"]  # by which policy learning knows it too
    assert float(shares[-1]) == pytest.approx(recorder.report.energy_kept)


def test_losses_are_of_evaluated_states_and_metrics_of_logged_steps(tmp_path):
    class Evaluations(TrainerCallback):
        losses = {}

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            self.losses[state.global_step] = metrics["eval_loss"]

    recorder = TrajectoryRecorder(tmp_path / "rec", "toy", record_every=6)
    evaluation = {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}
    train(tmp_path / "run", recorder, callbacks=[Evaluations()], **evaluation)
    run = recorded(tmp_path / "rec")
    assert run.optimizer_steps.tolist() == [0, 4, 6, 8, 12]
    expected = [Evaluations.losses.get(int(step), torch.nan) for step in run.optimizer_steps]
    torch.testing.assert_close(run.losses, torch.tensor(expected), equal_nan=True)
    assert run.losses.isfinite().tolist() == [True, True, False, True, True]
    assert run.metrics["loss"].isfinite().tolist() == [False, True, True, True, True]
    assert {"loss", "grad_norm", "learning_rate", "scored_share"} == set(run.metrics)


def test_a_run_that_stage_2_would_leave_out_is_said(tmp_path, caplog):
    evaluation = {"eval_strategy": "steps", "eval_steps": 4}
    train(tmp_path / "run", TrajectoryRecorder(tmp_path / "rec", "toy"), **evaluation)
    assert "policy learning will leave the run out. Set `eval_on_start=True`" in caplog.text
    caplog.clear()
    train(tmp_path / "run", TrajectoryRecorder(tmp_path / "scored", "toy"), eval_on_start=True, **evaluation)
    assert "leave the run out" not in caplog.text


def test_a_run_that_starts_from_an_adapter_is_said_before_it_runs(tmp_path, caplog):
    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            assert ("starts from an adapter that is not zero" in caplog.text) == warm

    model = lora_model()
    for warm in (False, True):  # what was trained is trained further
        caplog.clear()
        train(tmp_path / "run", TrajectoryRecorder(tmp_path / f"{warm}", "toy"), model=model, callbacks=[Look()])


def test_modules_have_the_names_of_the_model_without_a_head():
    torch.manual_seed(0)
    model = BertForSequenceClassification(build_base_model().config)
    config = LoraConfig(r=2, target_modules=["query", "classifier"])
    adapter = LiveAdapter(get_peft_model(model, config))
    names = [f"encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert [module.name for module in adapter.layout.modules] == [*names, "classifier"]
    assert list(adapter.adapter(adapter.snapshot())) == [*names, "classifier"]


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    recorder = TrajectoryRecorder(tmp_path / "rec", "toy", record_every=2)
    train(tmp_path / "run", recorder, gradient_accumulation_steps=3, per_device_train_batch_size=2, max_steps=5)
    assert recorded(tmp_path / "rec").optimizer_steps.tolist() == [0, 2, 4, 5]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.parametrize(("cut", "checkpoint"), [(9, 8), (11, 4)])
def test_a_resumed_run_continues_its_recording(tmp_path, cut, checkpoint):
    """Also from a checkpoint before the last one: what was recorded after it belongs to a discarded branch."""
    space, saving = full_rank_space(build_base_model()), {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path / "whole", TrajectoryRecorder(tmp_path / "a", "toy", record_every=3, space=space), **saving)
    first = TrajectoryRecorder(tmp_path / "b", "toy", record_every=3, space=space)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", first, callbacks=[StopAt(cut)], **saving)
    second = TrajectoryRecorder(tmp_path / "b", "toy", record_every=3, space=space)
    resume = str(tmp_path / "cut" / f"checkpoint-{checkpoint}")
    train(tmp_path / "cut", second, model=lora_model(), resume=resume, **saving)
    whole, continued = recorded(tmp_path / "a"), recorded(tmp_path / "b")
    assert continued.optimizer_steps.tolist() == whole.optimizer_steps.tolist() == [0, 3, 6, 9, 12]
    torch.testing.assert_close(continued.states, whole.states, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(continued.metrics["learning_rate"], whole.metrics["learning_rate"], equal_nan=True)


def test_a_new_run_in_the_same_folder_forgets_the_old_one(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    for key in ("first", "second"):
        train(tmp_path / "run", TrajectoryRecorder(tmp_path / "rec", "toy", record_every=4, key=key), **saving)
    dataset = TrajectoryDataset.open(tmp_path / "rec")
    assert [run.optimizer_steps.tolist() for run in dataset] == [[0, 4, 8, 12]] * 2


def test_the_last_state_is_recorded_whatever_ended_the_run(tmp_path):
    """Early stopping ends between the recorded steps, and then the best checkpoint is loaded."""
    space = full_rank_space(build_base_model())
    recorder = TrajectoryRecorder(tmp_path / "rec", "toy", record_every=100, space=space)
    stopping = EarlyStoppingCallback(1, early_stopping_threshold=100.0)
    train(
        tmp_path / "run",
        recorder,
        callbacks=[stopping],
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    run = recorded(tmp_path / "rec")
    assert run.optimizer_steps.tolist() == [0, 3, 6]
    assert not torch.equal(run.states[1], run.states[2])


def test_recordings_share_a_dataset_under_free_keys(tmp_path, caplog):
    for seed in (3, 3, 4):
        train(tmp_path / "run", TrajectoryRecorder(tmp_path / "rec", "toy"), seed=seed)
    keys = TrajectoryDataset.open(tmp_path / "rec").keys()
    assert keys == ["toy-adamw_torch_fused-3", "toy-adamw_torch_fused-3-2", "toy-adamw_torch_fused-4"]
    assert "already has a recording" in caplog.text


def test_training_is_not_disturbed(tmp_path):
    with_recorder = train(tmp_path / "a", TrajectoryRecorder(tmp_path / "rec", "toy", record_every=1))
    without = train(tmp_path / "b", TrainerCallback())
    for name, values in without.state_dict().items():
        assert torch.equal(with_recorder.state_dict()[name], values)


def test_an_optimizer_given_to_the_trainer_is_recorded_as_it_is(tmp_path):
    model = lora_model()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    given = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    recorder = TrajectoryRecorder(tmp_path / "rec", "toy")
    train(tmp_path / "run", recorder, model=model, optimizer=given, max_steps=2, warmup_steps=1)
    run = recorded(tmp_path / "rec", "toy-sgd-3")
    assert run.optimizer == "sgd"
    wanted = {"learning_rate": 0.5, "momentum": 0.9, "nesterov": False, "lr_scheduler_type": "linear"}
    assert wanted.items() <= run.hyperparameters.items()
    assert not {"adam_beta1", "params"} & run.hyperparameters.keys()


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "rmsprop"])
def test_an_optimizer_of_the_arguments_is_known_by_their_name(tmp_path, optim):
    train(tmp_path / "run", TrajectoryRecorder(tmp_path / "rec", "toy"), optim=optim, max_steps=1, weight_decay=0.1)
    hyperparameters = recorded(tmp_path / "rec", f"toy-{optim}-3").hyperparameters
    assert (hyperparameters["learning_rate"], hyperparameters["weight_decay"]) == (0.02, 0.1)


def test_values_that_json_cannot_hold_are_recorded_as_text(tmp_path):
    train(tmp_path / "run", TrajectoryRecorder(tmp_path / "rec", "toy"), max_grad_norm=float("inf"), max_steps=1)
    assert recorded(tmp_path / "rec").hyperparameters["max_grad_norm"] == "inf"


class Frozen(TrainerCallback):
    """The query of the first layer stays as it began: its update is zero."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.get_submodule("base_model.model.encoder.layer.0.attention.self.query").requires_grad_(False)


def test_a_module_without_an_update_has_bases_all_the_same(tmp_path):
    recorder = TrajectoryRecorder(tmp_path / "rec", "toy", r=4)
    model = train(tmp_path / "run", recorder, callbacks=[Frozen()])
    deltas, space = final_update(model), TrajectoryDataset.open(tmp_path / "rec").space
    idle = "encoder.layer.0.attention.self.query"
    assert [name for name, delta in deltas.items() if not delta.any()] == [idle]
    state = recorded(tmp_path / "rec").states[-1]
    assert not space.delta_weight(state)[idle].any()
    assert all(space.delta_weight(state)[name].any() for name in deltas if name != idle)


def test_the_rank_of_the_bases_fits_the_narrowest_module(tmp_path):
    model = lora_model(rank_pattern={"0.attention.self.query": 32})
    train(tmp_path / "run", TrajectoryRecorder(tmp_path / "rec", "toy"), model=model, max_steps=2)
    assert TrajectoryDataset.open(tmp_path / "rec").space.r == 16
    message = "at most the smallest side of a module, here 16, got 64, which exceeds encoder.layer.0"
    _fails_at_the_start(tmp_path / "new", None, message, r=64)


class Appearing(TrainerCallback):
    """Another recording makes the dataset during training."""

    def __init__(self, folder, space, fingerprint):
        self.made = {"folder": folder, "space": space, "base_fingerprint": fingerprint, "base_model_name": "other"}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            TrajectoryDataset.create(**self.made)


def test_a_dataset_that_appears_during_training_is_checked(tmp_path):
    base = build_base_model()
    layout = AdapterLayout.from_model(base, ["query", "value"])
    spaces = LoraBSpace.seeded(layout, 2), LoraBSpace.seeded(AdapterLayout.from_model(base, ["query"]), 2)
    given, own = full_rank_space(base), base_model_fingerprint(base)
    for space, made, fingerprint, message in (
        (None, spaces[0], "0" * 64, "base model: recorded on 'other'"),
        (given, spaces[0], own, "weight space: recorded 'lora_b' r=2, got 'core' r=16"),
        (None, spaces[1], own, "value': adapter"),
    ):
        folder = tmp_path / message[:5]
        recorder = TrajectoryRecorder(folder / "rec", "toy", space=space)
        with pytest.raises(ValueError, match=message + ".*resume it from its last checkpoint"):
            train(folder / "run", recorder, callbacks=[Appearing(folder / "rec", made, fingerprint)], max_steps=1)
    recorder = TrajectoryRecorder(tmp_path / "rec", "toy")
    train(tmp_path / "run", recorder, callbacks=[Appearing(tmp_path / "rec", given, own)], max_steps=1)
    assert recorded(tmp_path / "rec").states.shape == (2, *given.shape)


def test_recordings_that_end_together_share_a_dataset(tmp_path, monkeypatch):
    """The other one makes the dataset after this one found none, and takes the key after this one found it free."""
    folder, others = tmp_path / "rec", []
    create, append = TrajectoryDataset.create, TrajectoryDataset.append

    def created_before(*args, **kwargs):
        if not others:
            others.append(create(*args, **kwargs))
        return create(*args, **kwargs)

    def appended_before(self, key, trajectories):
        if len(others) == 1:
            others.append(append(TrajectoryDataset.open(folder), key, trajectories))
        append(self, key, trajectories)

    monkeypatch.setattr(TrajectoryDataset, "create", created_before)
    monkeypatch.setattr(TrajectoryDataset, "append", appended_before)
    train(tmp_path / "run", TrajectoryRecorder(folder, "toy"), max_steps=1)
    assert TrajectoryDataset.open(folder).keys() == ["toy-adamw_torch_fused-3", "toy-adamw_torch_fused-3-2"]


class KilledWhileSaving(TrainerCallback):
    """Comes before the recorder: the checkpoint is there, its state is not yet written."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("record_every", [4, 100])
def test_the_state_of_a_checkpoint_is_taken_from_it_where_it_was_lost(tmp_path, record_every):
    """It was due by its number, or as an evaluated one."""
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    space = full_rank_space(build_base_model())

    def recorder(name):
        return TrajectoryRecorder(tmp_path / name, "toy", record_every=record_every, space=space)

    train(tmp_path / "whole", recorder("a"), **options)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", KilledWhileSaving(), callbacks=[recorder("b")], **options)
    train(tmp_path / "cut", recorder("b"), resume=str(tmp_path / "cut" / "checkpoint-8"), **options)
    whole, continued = recorded(tmp_path / "a"), recorded(tmp_path / "b")
    assert continued.optimizer_steps.tolist() == whole.optimizer_steps.tolist() == [0, 4, 8, 12]
    torch.testing.assert_close(continued.states, whole.states, atol=1e-6, rtol=1e-5)


def test_modules_outside_the_layers_are_warned_of(tmp_path, caplog):
    for targets, warned in ((["query"], False), (["query", "pooler.dense"], True)):
        recorder = TrajectoryRecorder(tmp_path / str(warned), "toy")
        train(tmp_path / "run", recorder, model=lora_model(target_modules=targets), max_steps=1)
        assert ("pooler.dense lie outside the layers" in caplog.text) == warned


def _fails_at_the_start(tmp_path, model, message, error=ValueError, **options):
    recorder = TrajectoryRecorder(tmp_path / "rec", "toy", **options)
    with pytest.raises(error, match=message):
        train(tmp_path / "run", recorder, model=model, callbacks=[StopAt(1)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"(?s)layer\.0.*query.*uses the variant Dora.*layer\.1.*value"),
        ({"lora_bias": True}, "has a LoRA bias"),
        ({"bias": "all"}, "bias='all' trains biases"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"target_modules": ["word_embeddings"]}, "is a Embedding"),
    ],
)
def test_adapters_that_are_no_plain_update_are_refused_before_training(tmp_path, changes, message):
    _fails_at_the_start(tmp_path, lora_model(**changes), message)


def test_models_without_lora_are_refused(tmp_path):
    _fails_at_the_start(tmp_path, build_base_model(), "got BertModel", TypeError)


def test_a_space_of_other_modules_is_refused_before_training(tmp_path):
    base = build_base_model()
    space = LoraBSpace.seeded(AdapterLayout.from_model(base, ["query"]), r=2, seed=0)
    _fails_at_the_start(tmp_path, None, r"(?s)layer\.0.*value': adapter \(16, 16\), space None", space=space)


def test_a_dataset_of_another_base_model_is_refused_before_training(tmp_path):
    space = full_rank_space(build_base_model())
    TrajectoryDataset.create(tmp_path / "rec", space=space, base_fingerprint="0" * 64, base_model_name="other")
    _fails_at_the_start(tmp_path, None, "base model: recorded on 'other'")


def test_a_space_may_hold_more_modules_than_are_trained(tmp_path):
    space = full_rank_space(build_base_model())
    train(
        tmp_path / "run",
        TrajectoryRecorder(tmp_path / "rec", "toy", space=space),
        model=lora_model(target_modules=["query"]),
    )
    rows_of = {module.name: i for i, module in enumerate(space.layout.modules)}
    last = recorded(tmp_path / "rec").states[-1]
    assert all(last[i].any() == name.endswith("query") for name, i in rows_of.items())


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="at least 1 optimizer step, got 0"):
        TrajectoryRecorder(tmp_path, "toy", record_every=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TrajectoryRecorder(tmp_path, "toy", r=0)
    space = full_rank_space(build_base_model())
    with pytest.raises(ValueError, match="not both"):
        TrajectoryRecorder(tmp_path, "toy", space=space, r=2)


def test_snapshots_of_another_adapter_or_damaged_ones_are_refused(tmp_path):
    store = SnapshotStore(tmp_path)
    store.flush({0: torch.zeros(3)}, follows=-1, signature="one")
    with pytest.raises(ValueError, match="other modules"):
        store.load(5, "two")
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:9])
    with pytest.raises(ValueError, match="damaged"):
        store.load(5, "one")


def test_snapshots_of_a_discarded_branch_are_not_read(tmp_path):
    store = SnapshotStore(tmp_path)
    store.flush({0: torch.zeros(1), 3: torch.zeros(1), 6: torch.zeros(1), 7: torch.zeros(1)}, follows=-1, signature="")
    store.flush({6: torch.ones(1), 9: torch.ones(1)}, follows=3, signature="")
    read = store.load(8, "")
    assert {step: float(values) for step, values in read.items()} == {0: 0.0, 3: 0.0, 6: 1.0}


def test_a_run_that_diverged_ends_as_any_other_and_is_not_recorded(tmp_path, caplog):
    """An error at the end of training would take with it whatever was to be done after it."""

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 8:
                next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))

    recorder = TrajectoryRecorder(tmp_path / "data", "toy", record_every=3)
    train(tmp_path / "run", recorder, callbacks=[Break()])
    assert "'toy' is not recorded: its adapter is not finite from optimizer step 9 on" in caplog.text
    assert recorder.report is None
    assert not (tmp_path / "data").exists()
    train(tmp_path / "run", recorder)  # the recorder can be used again
    assert recorder.report.states == 5
