import io
import json
import math
from contextlib import nullcontext

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from transformers import TrainerCallback

from lohp_peft.adapters import AdapterLayout, CoreSpace, LoraBSpace, ModuleSpec, base_model_fingerprint
from lohp_peft.hub import check_folder
from lohp_peft.policy import LoHpPolicy
from lohp_peft.policy_learning import PolicyLearningConfig, plan_training, train_policy
from lohp_peft.tasks import TextEncoder, reading_fingerprint, rows_fingerprint, tokenizer_fingerprint
from lohp_peft.trajectories import TrajectoryDataset
from policy_learning.conftest import TASKS, assert_same_weights, build_dataset, build_trajectory, tiny_config
from tiny import build_encoder, build_task


@pytest.fixture
def dataset(encoder, tmp_path):
    return build_dataset(encoder, tmp_path / "recordings")


def train(encoder, dataset, folder, settings=(), **kwargs):
    config = tiny_config(cloning_steps=2, training_steps=2, **dict(settings))
    return train_policy(TASKS, encoder, dataset, folder, config, console=Console(quiet=True), **kwargs)


def test_recordings_in_policy_out(encoder, dataset, tmp_path):
    validation = [build_task("news", seed=7, family="news")]
    policy = train(encoder, dataset, tmp_path / "policy", validation_tasks=validation, provenance={"commit": "abc"})
    loaded = LoHpPolicy.from_pretrained(tmp_path / "policy")
    assert_same_weights(loaded.state_dict(), policy.state_dict())
    config = loaded.config
    assert (config.preset, config.policy_steps, config.max_text_length) == ("lohp+path", 3, encoder.max_length)
    assert config.base_model_name == "someone/tiny"
    assert config.base_fingerprint == base_model_fingerprint(encoder.base_model)
    assert config.tokenizer_fingerprint == tokenizer_fingerprint(encoder.tokenizer)
    assert config.tokenizer_reading == reading_fingerprint(encoder.tokenizer)
    assert config.optimizers == ["adamw", "sam"]
    assert set(config.provenance["training_tasks"]) == {"spam", "ham", "mood"}
    assert config.provenance["validation_tasks"] == ["news"]
    assert config.provenance["settings"]["cloning_steps"] == 2
    assert config.provenance["commit"] == "abc"
    reference = loaded.reference_set
    assert (reference.names, reference.families) == (("ham", "mood", "spam"), ("spam", "emotion", "spam"))
    assert reference.states[1].equal(build_trajectory(encoder.space, seed=5).states[-1])
    again = train(encoder, dataset, tmp_path / "policy", validation_tasks=validation)
    assert_same_weights(again.state_dict(), policy.state_dict())  # from its checkpoint
    kind, files = check_folder(tmp_path / "policy")  # as it is, it can be published
    assert kind == "policy"
    assert sorted(files) == ["config.json", *(f"{name}.safetensors" for name in ("model", "reference_set", "space"))]


def test_a_checkpoint_of_another_training_is_refused_with_all_that_differs(encoder, dataset, trajectories, tmp_path):
    """Other recordings in another weight space of the same shape, other rows, another validation task, another reading."""
    folder, news = tmp_path / "policy", build_task("news", seed=7)
    before = train(encoder, dataset, folder, validation_tasks=[news]).state_dict()
    layout, generator = encoder.space.layout, torch.Generator().manual_seed(1)
    bases = [torch.linalg.qr(torch.randn(spec.d_in, 2, generator=generator))[0] for spec in layout.modules]
    space = CoreSpace(layout, 2, bases, bases)
    other = TrajectoryDataset.create(
        tmp_path / "other", space=space, base_fingerprint=dataset.manifest.base_fingerprint, base_model_name="tiny"
    )
    tasks = [build_task("spam", seed=9), *TASKS[1:]]
    for task in tasks:
        other.append(task.name, [run for run in trajectories if run.task == task.name])
    reader = TextEncoder(encoder.base_model, encoder.tokenizer, space, pooling="last", max_length=9)
    config = tiny_config(cloning_steps=2, training_steps=2)
    with pytest.raises(ValueError, match="trained on other data") as error:
        train_policy(tasks, reader, other, folder, config, console=Console(quiet=True))
    named = ("'dataset'", "'recordings'", "'weight space'", "\"training task 'spam'\"", "\"validation task 'news'\"")
    for part in (*named, "'pooling': ('mean', 'last')", "'max_length': (128, 9)"):
        assert part in str(error.value)
    assert "training task 'ham'" not in str(error.value)
    assert_same_weights(LoHpPolicy.from_pretrained(folder).state_dict(), before)


def test_a_checkpoint_of_the_same_tasks_in_another_order_is_refused(encoder, dataset, tmp_path):
    """Episodes follow from the order."""
    train(encoder, dataset, tmp_path / "policy")
    with pytest.raises(ValueError, match=r"'order of tasks': \(\[\['spam', 'ham', 'mood'\]"):
        train_policy(
            TASKS[::-1],
            encoder,
            dataset,
            tmp_path / "policy",
            tiny_config(cloning_steps=2, training_steps=2),
            console=Console(quiet=True),
        )


def test_the_log_of_a_run_that_was_killed_goes_on_from_its_checkpoint(encoder, dataset, tmp_path):
    """What it had logged after it is not there twice, and earlier validations are in the table."""

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyError("killed")

    def run(folder, **kwargs):
        console = Console(record=True, width=200, file=io.StringIO())
        config = tiny_config(cloning_steps=2, training_steps=4, validate_every=1, save_every=2)
        train_policy(TASKS, encoder, dataset, folder, config, console=console, validation_tasks=[news], **kwargs)
        steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
        table = [line.split("│")[1].strip() for line in console.export_text().splitlines() if line.startswith("│")]
        return steps, table

    news = build_task("news", seed=7)
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyError):
        run(tmp_path / "killed", callbacks=[Kill])
    log = tmp_path / "killed" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "clo')
    assert run(tmp_path / "killed") == whole == ([1, 2, 3, 4, 5, 6], ["1", "2", "3", "4", "5", "6"])


def test_a_checkpoint_that_does_not_say_its_data_is_refused(encoder, dataset, tmp_path):
    """As those of earlier versions."""
    train(encoder, dataset, tmp_path / "policy")
    state = tmp_path / "policy" / "checkpoint" / "state.json"
    state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != "data"}))
    with pytest.raises(ValueError, match=rf"'dataset': \(None, '{dataset.manifest.dataset_id}'\)"):
        train(encoder, dataset, tmp_path / "policy")


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_the_base_model_is_frozen_for_the_training_only(encoder, dataset, tmp_path, fails):
    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(any(parameter.requires_grad for parameter in parameters))
            if fails:
                raise KeyError("out of luck")

    parameters, seen = list(encoder.base_model.parameters())[:3], []
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with pytest.raises(KeyError) if fails else nullcontext():
            train(encoder, dataset, tmp_path / "policy", callbacks=[Watch])
        assert seen
        assert not any(seen)
        assert [p.requires_grad for p in list(encoder.base_model.parameters())[:4]] == [True, True, True, False]
    finally:
        encoder.base_model.requires_grad_(False)


def test_one_run_a_folder(encoder, dataset, tmp_path):
    """A second training is refused and changes nothing; afterwards the folder is free."""
    folder = tmp_path / "policy"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(RuntimeError, match="another one is writing to"):
        train(encoder, dataset, folder)
    assert [file.name for file in folder.iterdir()] == [".lock"]
    train(encoder, dataset, folder)
    train(encoder, dataset, folder)  # the first one has let go


def test_tensorboard_gets_the_scalars(encoder, dataset, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(encoder, dataset, tmp_path / "policy", report_to=["tensorboard"])
    check_folder(tmp_path / "policy")
    (folder,) = (tmp_path / "policy" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert {"train/cloning", "train/subtb", "train/path"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/cloning")] == [4]


def test_a_reporter_that_is_missing_is_said_before_any_work(encoder, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(RuntimeError, match="`report_to` needs packages that are not installed: WandbCallback"):
        train(encoder, dataset, tmp_path / "policy", report_to="wandb")
    assert not (tmp_path / "policy").exists()


def test_a_provenance_that_json_cannot_hold_is_refused_before_any_work(encoder, dataset, tmp_path):
    with pytest.raises(ValueError, match="`provenance` must hold plain JSON values: .*PosixPath"):
        train(encoder, dataset, tmp_path / "policy", provenance={"data": tmp_path})
    assert not (tmp_path / "policy").exists()


def test_a_finished_training_is_said_to_be_and_shows_its_validations(encoder, dataset, tmp_path):
    shown, settings = [], {"validate_every": 2}
    for _ in range(2):
        console = Console(file=io.StringIO(), width=200)
        config = tiny_config(cloning_steps=2, training_steps=2, **settings)
        more = {"validation_tasks": [build_task("news", seed=7, family="news")], "console": console}
        train_policy(TASKS, encoder, dataset, tmp_path / "policy", config, **more)
        shown.append(console.file.getvalue())
    assert "4/4" in shown[1]
    assert "All training steps had been taken before." in shown[1]
    tables = [text[text.index("Policy learning: validation tasks") :] for text in shown]
    assert tables[0] == tables[1]
    assert str(tmp_path / "policy") in tables[0]


def test_a_finished_training_goes_on_for_more_steps_and_says_so(encoder, dataset, tmp_path):
    for training_steps, recorded in ((2, None), (4, [4]), (4, [4])):
        console = Console(file=io.StringIO(), width=200)
        config = tiny_config(cloning_steps=2, training_steps=training_steps)
        policy = train_policy(TASKS, encoder, dataset, tmp_path / "policy", config, console=console)
        assert policy.config.provenance.get("extended_at_training_step") == recorded
        assert policy.config.provenance["settings"]["training_steps"] == training_steps
        assert f"{2 + training_steps}/{2 + training_steps}" in console.file.getvalue()


def test_infinite_settings_come_back_from_the_record(encoder, dataset, tmp_path):
    train(encoder, dataset, tmp_path / "policy", {"refresh_kl": math.inf, "subtb_lambda": math.inf})
    settings = LoHpPolicy.from_pretrained(tmp_path / "policy").config.provenance["settings"]
    assert PolicyLearningConfig(**settings).refresh_kl == math.inf


def test_fp16_is_refused_before_any_work(encoder, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="got an accelerator of 'fp16'"):
        train(encoder, dataset, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize(
    ("name", "recorded"), [("me/tiny-bert", "me/tiny-bert"), ("tiny-bert", "tiny-bert"), ("/somewhere/tiny", "./tiny")]
)
def test_the_base_model_is_named_by_its_hub_id_or_by_its_folder_alone(encoder, dataset, tmp_path, name, recorded):
    """No path of this machine, and nothing that could be taken for a Hub id: such a policy is not published as it is."""
    encoder.base_model.config._name_or_path = name
    try:
        assert train(encoder, dataset, tmp_path / "policy").config.base_model_name == recorded
        if recorded != name:
            with pytest.raises(ValueError, match="local path, which nobody else has: './tiny'"):
                check_folder(tmp_path / "policy")
    finally:
        encoder.base_model.config._name_or_path = ""


def test_the_plan_is_what_happens(encoder, dataset, tmp_path):
    config = tiny_config(cloning_steps=2, training_steps=2)
    plan = plan_training(TASKS, dataset, config, [build_task("news")])
    assert (plan.tasks, plan.validation_tasks, plan.trajectories) == (3, 1, 6)
    assert plan.contrast_groups == [["spam", "ham"]]
    assert (plan.cloning_steps, plan.training_steps) == (2, 2)
    assert plan_training(TASKS, dataset, tiny_config(preset="behaviour_cloning")).training_steps == 0
    policy = train(encoder, dataset, tmp_path / "policy")
    assert plan.policy_parameters == policy.num_parameters()


def test_the_plan_does_not_depend_on_which_module_comes_first(tmp_path):
    """The output of an MLP reads more than the hidden states have."""
    modules = [ModuleSpec("mlp.output", 24, 16, "output", 0), ModuleSpec("query", 16, 16, "query", 0)]
    counts = []
    for name, order in (("mlp first", modules), ("query first", modules[::-1])):
        space = LoraBSpace.seeded(AdapterLayout(tuple(order)), 2)
        about = {"base_fingerprint": "f", "base_model_name": "tiny"}
        made = TrajectoryDataset.create(tmp_path / name, space=space, **about)
        made.append("spam", [build_trajectory(space)])
        counts.append(plan_training(TASKS, made, tiny_config()).policy_parameters)
    assert counts[0] == counts[1]


def test_the_seed_alone_decides_and_the_callers_random_numbers_stay(encoder, dataset, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train(encoder, dataset, tmp_path / "first").state_dict()
    assert torch.rand(3).equal(expected)
    assert_same_weights(train(encoder, dataset, tmp_path / "second").state_dict(), first)


def test_what_does_not_belong_together_is_refused(encoder, dataset, tmp_path):
    with pytest.raises(ValueError, match=r"recordings of \['mood'\] have no task among the 2 given"):
        plan_training(TASKS[:2], dataset, tiny_config())
    with pytest.raises(ValueError, match="recordings of"):
        plan_training([build_task("news")], dataset, tiny_config())
    twice = r"2 training tasks are named 'spam'; 'ham' is a training task and a validation task\."
    with pytest.raises(ValueError, match=twice):
        plan_training([*TASKS, build_task("spam", seed=9)], dataset, tiny_config(), [TASKS[1]])
    with pytest.raises(ValueError, match="'mood' is a training task and a validation task"):
        train(encoder, dataset, tmp_path / "policy", validation_tasks=[TASKS[2], build_task("news")])
    other = build_encoder(adapted=(2,))
    with pytest.raises(ValueError, match="weight space|layout|space"):
        train(other, dataset, tmp_path / "policy")
    reading = {"reading": {**encoder.reading, "pooling": "last"}}
    about = {"base_fingerprint": dataset.manifest.base_fingerprint, "base_model_name": "tiny", "metadata": reading}
    read = TrajectoryDataset.create(tmp_path / "read", space=encoder.space, **about)
    with pytest.raises(ValueError, match="pooling of texts: recorded with 'last', got 'mean'"):
        train(encoder, read, tmp_path / "policy")
    changed = build_encoder(adapted=(1, 2))
    with torch.no_grad():
        changed.base_model.embeddings.word_embeddings.weight.mul_(2)
    with pytest.raises(ValueError, match="base model"):
        train(changed, dataset, tmp_path / "policy")


def test_recordings_of_other_rows_are_refused(encoder, dataset, tmp_path):
    old = build_task("spam", seed=6)
    rows = {"split": "train", "rows_sha256": rows_fingerprint(old.split("train"))}
    dataset.append("of then", [build_trajectory(encoder.space)], metadata=rows)
    with pytest.raises(ValueError, match="others than those recorded.*'spam' was recorded on"):
        plan_training(TASKS, dataset, tiny_config())
    assert plan_training([old, *(task for task in TASKS if task.name != "spam")], dataset, tiny_config()).tasks == 3
