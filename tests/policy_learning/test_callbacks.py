import json

import pytest
from accelerate import Accelerator, DistributedType
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from lohp_peft.policy_learning import callbacks as callbacks_module
from lohp_peft.policy_learning.callbacks import Events, reporters, training_arguments
from policy_learning.conftest import assert_same_weights, tiny_config


class Remember(TrainerCallback):
    """Every event with the training step it came at."""

    def __init__(self):
        self.events, self.logs, self.metrics = [], {}, {}

    def __getattribute__(self, name):
        if name.startswith("on_") and name not in ("on_log", "on_evaluate"):
            return lambda args, state, control, **kwargs: self.events.append((name, state.global_step))
        return super().__getattribute__(name)

    def on_log(self, args, state, control, logs, model, **kwargs):
        self.events.append(("on_log", state.global_step))
        self.logs[state.global_step], self.model = logs, model

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(("on_evaluate", state.global_step))
        self.metrics[state.global_step] = metrics, state.best_metric

    def steps(self, name):
        return [step for event, step in self.events if event == name]


class AskAt(TrainerCallback):
    def __init__(self, step, **wishes):
        self.step, self.wishes = step, wishes

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for name, value in self.wishes.items():
                setattr(control, name, value)
        return control


def test_the_trainers_events_come_in_their_order(build_trainer, tmp_path):
    remember, seen = Remember(), {}
    trainer = build_trainer(
        validate=True,
        log=lambda step, scalars: seen.update({step: dict(scalars)}),
        options={"callbacks": [remember]},
        save_every=3,
        validate_every=4,
    )
    trainer.train(tmp_path)
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    names = [name for name, _ in remember.events]
    assert names[:7] == ["on_init_end", "on_train_begin", "on_epoch_begin", *step]
    assert names[-5:] == ["on_evaluate", "on_log", "on_save", "on_epoch_end", "on_train_end"]
    assert names.count("on_train_begin") == names.count("on_train_end") == 1
    assert remember.steps("on_step_end") == list(range(1, 9))
    assert remember.steps("on_evaluate") == remember.steps("on_log") == [4, 8]
    assert remember.steps("on_save") == [3, 6, 8]
    assert remember.logs[8] == seen[8]
    assert {"cloning", "subtb", "path", "validation_accuracy", "validation_loss"} <= remember.logs[8].keys()
    assert remember.metrics[4][0].keys() == {"eval_loss", "eval_accuracy"}
    assert remember.metrics[4][1] is None  # the best so far is known after it, as early stopping needs
    assert remember.metrics[8][1] == seen[4]["validation_loss"]
    assert remember.model is trainer.policy
    assert trainer.events.state.log_history[-1]["step"] == trainer.events.state.max_steps == 8


def test_callbacks_do_not_change_what_is_learned(build_trainer):
    plain, watched = build_trainer(), build_trainer(options={"callbacks": [Remember]})
    assert_same_weights(watched.train().state_dict(), plain.train().state_dict())


def test_callbacks_may_ask_for_a_checkpoint_a_log_a_validation_and_the_end(build_trainer, tmp_path):
    remember = Remember()
    ask = AskAt(5, should_save=True, should_log=True, should_evaluate=True, should_training_stop=True)
    rhythm = {"save_every": 100, "validate_every": 100}
    trainer = build_trainer(validate=True, options={"callbacks": [ask, remember]}, **rhythm)
    trainer.train(tmp_path)
    for event in ("on_save", "on_log", "on_evaluate", "on_train_end"):
        assert remember.steps(event) == [5]
    assert trainer.step == 5
    again = build_trainer(validate=True, **rhythm)
    again.train(tmp_path)
    assert again.step == 8  # it continues where it was stopped
    assert again.events.state.best_metric == again.best[0] <= trainer.best[0]


def test_the_trainers_early_stopping(build_trainer, monkeypatch):
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = build_trainer(validate=True, options={"callbacks": [stopping]}, validate_every=1)
    # The fourth is the clone's, at the start of the hybrid phase.
    scores = iter([3.0, 2.0, 2.5, 9.0, 2.6, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(
        trainer, "_validation_scores", lambda: {"validation_loss": next(scores), "validation_accuracy": 0.5}
    )
    trainer.train()
    assert (trainer.step, trainer.best) == (4, (2.0, 2))  # after two worse ones


def test_a_killed_run_stops_early_where_an_uninterrupted_one_does(build_trainer, monkeypatch, tmp_path):
    """Callbacks and the history come back from the checkpoint."""

    def trainer():
        options = {"callbacks": [EarlyStoppingCallback(early_stopping_patience=2), *([stop] if stop else [])]}
        made = build_trainer(validate=True, options=options, validate_every=1, save_every=1)
        scores = {0: 9.0, 1: 3.0, 2: 2.0}
        monkeypatch.setattr(
            made,
            "_validation_scores",
            lambda: {"validation_loss": scores.get(made.step, 2.5), "validation_accuracy": 0.5},
        )
        return made

    stop = None
    whole = trainer()
    whole.train(tmp_path / "whole")
    stop = AskAt(3, should_training_stop=True)
    trainer().train(tmp_path / "killed")
    stop = None
    again = trainer()
    again.train(tmp_path / "killed")
    assert again.step == whole.step == 4
    assert again.events.state.log_history == whole.events.state.log_history
    assert_same_weights(again.policy.state_dict(), whole.policy.state_dict())


class Lowest(TrainerCallback, ExportableState):
    """Keeps a value that is of no type before the first validation, and a count that becomes a fraction."""

    def __init__(self):
        self.lowest, self.count = None, 0

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.lowest, self.count = metrics["eval_loss"], self.count + 0.5

    def state(self):
        return {"args": {}, "attributes": {"lowest": self.lowest, "count": self.count}}


def test_callbacks_come_back_with_values_of_other_types_and_each_with_its_own(build_trainer, tmp_path):
    first, second = Lowest(), Lowest()
    second.on_evaluate = lambda *args, **kwargs: None
    options = {"callbacks": [first, second, AskAt(5, should_training_stop=True)]}
    build_trainer(validate=True, options=options).train(tmp_path)
    again = [Lowest(), Lowest()]
    build_trainer(validate=True, options={"callbacks": again}).load(tmp_path)
    assert (again[0].lowest, again[0].count) == (first.lowest, 1.0)
    assert isinstance(first.lowest, float)
    assert (again[1].lowest, again[1].count) == (None, 0)


def test_what_stops_the_run_while_it_logs_leaves_a_checkpoint(build_trainer, tmp_path):
    class Watch(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            control.should_training_stop = True
            return control

    trainer = build_trainer(validate=True, options={"callbacks": [Watch()]}, validate_every=3, save_every=100)
    trainer.train(tmp_path)
    assert trainer.step == 3
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 3


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"log_history": None}, "'log_history' is None"),
        ({"log_history": [3]}, r"'log_history' is \[3\]"),
        ({"callbacks": []}, r"'callbacks' is \[\]"),
        ({"callbacks": {"EarlyStoppingCallback": None}}, "'callbacks' is"),
        (
            {"callbacks": {"EarlyStoppingCallback": {"early_stopping_patience_counter": "2"}}},
            "'early_stopping_patience_counter' of EarlyStoppingCallback is '2'",
        ),
    ],
    ids=str,
)
def test_a_damaged_record_of_callbacks_is_refused_and_changes_nothing(build_trainer, record, problem):
    trainer = build_trainer(validate=True, options={"callbacks": [EarlyStoppingCallback()]})
    before = trainer.events.record()
    with pytest.raises(ValueError, match=problem):
        trainer.events.restore(record)
    assert trainer.events.record() == before


def test_reporters_that_are_missing_are_named_before_any_work(monkeypatch):
    module = "transformers.integrations.integration_utils"
    for name in ("wandb", "trackio"):
        monkeypatch.setattr(f"{module}.is_{name}_available", lambda: False)
    with pytest.raises(RuntimeError, match="(?s)not installed: .*wandb.*trackio.*leave the name out"):
        reporters(["wandb", "trackio"])
    with pytest.raises(ValueError, match="wanddb is not supported"):
        reporters("wanddb")
    assert reporters("none") == []


def test_reporters_of_the_arguments_are_called(build_trainer, monkeypatch):
    remember = Remember()
    monkeypatch.setattr(callbacks_module, "reporters", lambda names: [remember] if names == ["tensorboard"] else [])
    arguments = training_arguments(tiny_config(), Accelerator(cpu=True), "somewhere", "tensorboard")
    build_trainer(options={"arguments": arguments}).train()
    assert remember.steps("on_log") == [8]


def test_arguments_that_took_the_processes_apart_are_refused(build_trainer):
    trainer = build_trainer()
    arguments = TrainingArguments("somewhere", use_cpu=True)
    with pytest.raises(RuntimeError, match="resets its state"):
        Events((), arguments, trainer.policy, trainer.optimizer, trainer.accelerator, trainer.config, 8)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_other_ways_of_taking_a_policy_apart_are_refused(build_trainer, monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(RuntimeError, match=f"by FSDP2.*or not at all, got an accelerator of type {kind.value}"):
        build_trainer()
