"""Ordinary checkpoints in, trajectories out: the recorder's own runs, and runs that share nothing."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import TrainerCallback

from lohp_peft.adapters.importing import read_plain_lora
from lohp_peft.adapters.layout import AdapterLayout, base_model_fingerprint
from lohp_peft.adapters.space import CoreSpace, LoraBSpace
from lohp_peft.cards import trajectory_card_of
from lohp_peft.policy_learning import train_policy
from lohp_peft.tasks import TextEncoder
from lohp_peft.trajectories import TrajectoryDataset
from lohp_peft.weight_preparation import (
    TrajectoryRecorder,
    WeightPreparationConfig,
    checkpoint_space,
    find_runs,
    import_runs,
    query_loss,
    report_table,
    score_trajectory,
)
from lohp_peft.weight_preparation.rows import select_rows
from policy_learning.conftest import assert_same_weights, tiny_config
from tiny import build_base_model
from weight_preparation.conftest import lora_model, train

QUIET = Console(quiet=True)
SCORING = WeightPreparationConfig(rows_per_task=32, score_query_rows=8)


def frozen_a(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


def shared_space(model):
    """The rows of a frozen lora_A, which every run of this start has."""
    layers = {n: m for n, m in model.get_base_model().named_modules() if "default" in getattr(m, "lora_A", {})}
    adapter = {n: (m.lora_A["default"].weight, torch.ones_like(m.lora_B["default"].weight)) for n, m in layers.items()}
    return LoraBSpace.from_trajectories(AdapterLayout.from_model(model, ["query", "value"]), 2, [adapter])


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Two runs, each with a lora_A of its own that it trains, as (task, folder)."""
    home = tmp_path_factory.mktemp("foreign")
    for seed, task in enumerate(("spam", "mood")):
        model = lora_model()
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                torch.nn.init.kaiming_uniform_(parameter, generator=torch.Generator().manual_seed(seed))
        train(home / task, TrainerCallback(), model=model, save_strategy="steps", save_steps=4, seed=seed)
    return [(task, home / task) for task in ("spam", "mood")]


def save_run(folder, adapters):
    """Checkpoints of adapters by optimizer step, as PEFT writes them."""
    for step, adapter in adapters.items():
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        ranks = {name: len(a) for name, (a, _) in adapter.items()}
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": ranks, "alpha_pattern": ranks}
        (path / "adapter_config.json").write_text(json.dumps(config))
        keys = {
            f"base_model.model.{n}.lora_{side}.weight": x
            for n, ab in adapter.items()
            for side, x in zip("AB", ab, strict=True)
        }
        save_file(keys, path / "adapter_model.safetensors")


def encoder_in(space, tokenizer):
    return TextEncoder(build_base_model(), tokenizer, space)


def test_importing_the_recorders_runs_gives_the_same_trajectories_and_the_same_policy(tmp_path, tasks, tokenizer):
    space = shared_space(lora_model())
    for seed, task in enumerate(tasks):
        recorder = TrajectoryRecorder(tmp_path / "recorded", task.name, record_every=3, space=space)
        saving = {"save_strategy": "steps", "save_steps": 3, "seed": seed, "learning_rate": 0.05}
        train(tmp_path / task.name, recorder, model=frozen_a(lora_model()), **saving)
    encoder = encoder_in(space, tokenizer)
    runs = find_runs([(task.name, tmp_path / task.name) for task in tasks], encoder.base_model)
    reports = import_runs(
        runs, tasks, encoder, tmp_path / "imported", SCORING, optimizer="adamw_torch_fused", min_gain=0, console=QUIET
    )
    for report in reports:
        assert report.energy_kept == pytest.approx([1] * 5, abs=1e-5)
        assert report.losses == pytest.approx(report.exact_losses, abs=1e-5)
        assert report.losses[-1] != pytest.approx(report.losses[0], abs=1e-3)

    recorded, imported = (TrajectoryDataset.open(tmp_path / name) for name in ("recorded", "imported"))
    scored = TrajectoryDataset.create(
        tmp_path / "scored",
        space=space,
        base_fingerprint=base_model_fingerprint(encoder.base_model),
        base_model_name="",
    )
    assert recorded.tasks() == imported.tasks() == sorted(task.name for task in tasks)
    for task in tasks:
        (mine,) = [run for run in imported if run.task == task.name]
        (theirs,) = [run for run in recorded if run.task == task.name]
        assert mine.optimizer_steps.tolist() == theirs.optimizer_steps.tolist() == [0, 3, 6, 9, 12]
        assert mine.states.equal(theirs.states)
        assert mine.states[-1].any()
        rows = select_rows(task, SCORING)
        encoded = encoder.prepare(rows.examples.texts, rows.examples.texts_b)
        scored.append(f"{task.name}-recorded", [score_trajectory(theirs, encoder, encoded, rows.score, SCORING.head)])

    config = tiny_config(cloning_steps=2, training_steps=2)
    policies = [
        train_policy(
            tasks, encoder, TrajectoryDataset.open(tmp_path / name), tmp_path / f"{name} policy", config, console=QUIET
        )
        for name in ("imported", "scored")
    ]
    assert_same_weights(policies[0].state_dict(), policies[1].state_dict())
    assert_same_weights(*(dict(enumerate(policy.reference_set.states)) for policy in policies))


def test_foreign_runs_lose_what_the_rank_does_not_hold(tmp_path, foreign, tasks, tokenizer):
    runs = find_runs(foreign, build_base_model())
    least = {}
    for r in (2, 8):
        encoder = encoder_in(checkpoint_space(runs, build_base_model(), "core", r), tokenizer)
        reports = import_runs(
            runs, tasks, encoder, tmp_path / str(r), SCORING, min_energy=0.97, min_gain=0, console=QUIET
        )
        least[r] = [min(report.energy_kept) for report in reports]
        for report, (_, folder) in zip(reports, foreign, strict=True):
            adapter = read_plain_lora(folder / "checkpoint-12")
            total = sum((b @ a).square().sum() for a, b in adapter.values())
            kept = encoder.space.delta_weight(encoder.space.encode(adapter).state)
            lost = sum((b @ a - kept[name]).square().sum() for name, (a, b) in adapter.items())
            assert report.energy_kept[-1] == pytest.approx(float(1 - lost / total), abs=1e-3)
            assert report.optimizer_steps == [0, 4, 8, 12]
    assert max(least[2]) < 0.97 < min(least[8])
    assert not (tmp_path / "2").exists()  # nobody was accepted
    assert len(TrajectoryDataset.open(tmp_path / "8")) == 2


def test_an_exact_loss_is_that_of_the_saved_adapter(tmp_path, foreign, tasks, tokenizer):
    """In a space of full rank, reconstructed and exact are the same; in a poor one only the exact loss stays."""
    layout = AdapterLayout.from_model(build_base_model(), ["query", "value"])
    runs, found = find_runs(foreign, build_base_model()), {}
    for name, space in (
        ("full", CoreSpace.from_base_weights(build_base_model(), layout, 16)),
        ("poor", LoraBSpace.seeded(layout, 1)),
    ):
        options = {"min_energy": 0, "min_gain": 0, "console": QUIET}
        found[name] = import_runs(runs, tasks, encoder_in(space, tokenizer), tmp_path / name, SCORING, **options)
    for full, poor in zip(found["full"], found["poor"], strict=True):
        assert full.losses == pytest.approx(full.exact_losses, abs=1e-4)
        assert poor.exact_losses == pytest.approx(full.exact_losses, abs=1e-4)
        assert poor.losses[-1] != pytest.approx(poor.exact_losses[-1], abs=1e-3)


def test_a_run_that_loses_its_improvement_is_refused(tmp_path, encoder, tasks, tokenizer):
    """A run that does improve its task, and a space that holds little of it."""
    layout = AdapterLayout.from_model(encoder.base_model, ["query", "value"])
    whole = encoder_in(LoraBSpace.seeded(layout, 16), tokenizer)
    rows = select_rows(tasks[0], SCORING)
    encoded = whole.prepare(rows.examples.texts, rows.examples.texts_b)
    state = torch.zeros(whole.space.shape, requires_grad=True)
    optimizer = torch.optim.Adam([state], lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        query_loss(whole, encoded, rows.score, state, SCORING.head).backward()
        optimizer.step()
    save_run(tmp_path / "run", {20: whole.space.decode(state.detach())})
    runs = find_runs([("spam", tmp_path / "run")], encoder.base_model)
    narrow, options = encoder_in(LoraBSpace.seeded(layout, 1), tokenizer), {"min_energy": 0, "console": QUIET}
    (report,) = import_runs(runs, tasks, narrow, tmp_path / "out", SCORING, min_gain=0.9, **options)
    assert report.exact_losses[-1] < report.exact_losses[0] - 0.05
    expected = (report.losses[0] - report.losses[-1]) / (report.exact_losses[0] - report.exact_losses[-1])
    assert report.gain_kept == pytest.approx(expected)
    assert report.gain_kept < 0.9
    assert report.refused == f"it keeps {expected:.3f} of the loss improvement, `min_gain` is 0.9"
    assert not (tmp_path / "out").exists()
    (report,) = import_runs(runs, tasks, whole, tmp_path / "out", SCORING, min_gain=0.9, **options)
    assert report.refused is None
    assert report.gain_kept == pytest.approx(1, abs=1e-3)
    assert replace(report, exact_losses=[1.0, 1.1], losses=[1.0, 0.9]).gain_kept is None


def test_of_the_settings_only_those_of_the_scores_are_kept(tmp_path, foreign, tasks, tokenizer):
    """The others say how runs are to be trained, which these were not."""
    runs = find_runs(foreign, build_base_model())
    encoder = encoder_in(checkpoint_space(runs, build_base_model(), "core", 8), tokenizer)
    options = {"min_gain": 0, "console": QUIET}
    import_runs(runs[:1], tasks, encoder, tmp_path, replace(SCORING, optimizer_steps=7), **options)
    kept = TrajectoryDataset.open(tmp_path).manifest.metadata["weight_preparation"]
    names = {"rows_per_class", "rows_per_task", "score_shots", "score_query_rows", "split", "head"}
    assert kept == {name: getattr(SCORING, name) for name in names}
    assert "optimizer_steps" not in trajectory_card_of(tmp_path)
    reports = import_runs(runs, tasks, encoder, tmp_path, replace(SCORING, optimizer_steps=8), **options)
    assert [report.imported_before for report in reports] == [True, False]


def test_modules_may_have_ranks_of_their_own(tmp_path, tasks, tokenizer):
    """The highest rank is more than the narrowest module has."""
    base = build_base_model()
    base.encoder.layer[0].intermediate.dense = torch.nn.Linear(16, 4)
    base.encoder.layer[0].output.dense = torch.nn.Linear(4, 16)
    names = {"encoder.layer.0.attention.self.query": (16, 16, 8), "encoder.layer.0.output.dense": (16, 4, 2)}
    torch.manual_seed(0)
    adapter = {name: (torch.randn(r, d_in), 0.1 * torch.randn(d_out, r)) for name, (d_out, d_in, r) in names.items()}
    save_run(tmp_path / "run", {5: adapter})
    runs = find_runs([("spam", tmp_path / "run")], base)
    encoder = TextEncoder(base, tokenizer, checkpoint_space(runs, base))
    assert encoder.space.r == 4
    (report,) = import_runs(runs, tasks, encoder, tmp_path / "out", SCORING, min_gain=0, console=QUIET)
    for name, (a, b) in adapter.items():
        base.get_submodule(name).weight.data += b @ a
    rows = select_rows(tasks[0], SCORING)
    encoded = encoder.prepare(rows.examples.texts)
    merged = query_loss(encoder, encoded, rows.score, torch.zeros(encoder.space.shape), SCORING.head)
    assert report.exact_losses[-1] == pytest.approx(merged.item(), abs=1e-4)


def test_an_import_is_continued_and_added_to(tmp_path, foreign, tasks, tokenizer):
    runs = find_runs(foreign, build_base_model())
    encoder = encoder_in(checkpoint_space(runs, build_base_model(), "core", 8), tokenizer)
    folder, options = tmp_path / "out", {"min_gain": 0, "console": QUIET}
    import_runs(runs[:1], tasks, encoder, folder, SCORING, **options)
    reports = import_runs(runs, tasks, encoder, folder, **options)  # settings of the scores are the folder's
    assert [report.imported_before for report in reports] == [True, False]
    assert reports[0].losses == pytest.approx(TrajectoryDataset.open(folder)[runs[0].key][0].losses.tolist())
    table = report_table([reports[0], replace(reports[1], refused="too little")])
    assert [cells for column in table.columns[-1:] for cells in column.cells] == ["before", "refused"]
    assert table.caption == "Refused:\nmood (mood): too little"
    with pytest.raises(ValueError, match=r"scored with other settings: `score_query_rows` was 8, now 4"):
        import_runs(runs, tasks, encoder, folder, replace(SCORING, score_query_rows=4), **options)
    last = TextEncoder(encoder.base_model, tokenizer, encoder.space, pooling="last")
    with pytest.raises(ValueError, match="pooling of texts: recorded with 'mean', got 'last'"):
        import_runs(runs, tasks, last, folder, **options)
    other = encoder_in(checkpoint_space(runs, build_base_model(), "core", 4), tokenizer)
    with pytest.raises(ValueError, match="r=8, got 'core' r=4"):
        import_runs(runs, tasks, other, folder, **options)


def test_everything_that_cannot_be_imported_is_listed(tmp_path, foreign, tasks, tokenizer):
    model = build_base_model()
    folders = [*foreign, ("spam", tmp_path / "nowhere"), ("mood", foreign[0][1])]
    with pytest.raises(ValueError, match=r"nowhere holds no folder.*spam holds the same adapters as .*spam"):
        find_runs(folders, model)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.attention\.self\.value \(16, 16\), base model absent"):
        find_runs(foreign, build_base_model(layers=1))
    with pytest.raises(ValueError, match="there are no runs"):
        find_runs([], model)
    runs = find_runs(foreign, model)
    narrow = LoraBSpace.seeded(AdapterLayout.from_model(model, ["query"]), 2)
    with pytest.raises(
        ValueError, match=r"no task is named 'mood'; .*spam adapts .*value, which the weight space lacks; .*mood"
    ):
        import_runs(runs, tasks[:1], encoder_in(narrow, tokenizer), tmp_path / "out", SCORING, console=QUIET)
    encoder = encoder_in(checkpoint_space(runs, model), tokenizer)
    with pytest.raises(ValueError, match=r"0\.\.1, got `min_energy`=2, `min_gain`=-1"):
        import_runs(runs, tasks, encoder, tmp_path / "out", min_energy=2, min_gain=-1, console=QUIET)
    with pytest.raises(ValueError, match=r"must be one of \['core', 'lora_b'\], got 'dense'"):
        checkpoint_space(runs, model, "dense")


def test_a_dry_run_projects_only(tmp_path, foreign, tasks, tokenizer):
    runs = find_runs(foreign, build_base_model())
    encoder = encoder_in(checkpoint_space(runs, build_base_model(), "core", 2), tokenizer)
    reports = import_runs(
        runs, tasks, encoder, tmp_path / "out", SCORING, min_energy=0.99, dry_run=True, console=QUIET
    )
    assert all("`min_energy` is 0.99" in report.refused and not report.losses for report in reports)
    assert not (tmp_path / "out").exists()


def test_a_models_prefix_is_taken_off(tmp_path, foreign):
    adapter = read_plain_lora(foreign[0][1] / "checkpoint-12")
    save_run(tmp_path, {12: {f"bert.{name}": pair for name, pair in adapter.items()}})
    (run,) = find_runs([("spam", tmp_path)], build_base_model())
    assert [name.removeprefix("bert.") for name in run.modules] == list(run.modules.values())
    assert all(name.startswith("encoder") for _, named in run.adapters() for name in named)
