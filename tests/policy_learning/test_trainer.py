import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from lohp_peft.policy import rollout
from lohp_peft.policy_learning import on_policy as on_policy_module
from lohp_peft.policy_learning import trainer as trainer_module
from lohp_peft.policy_learning.gradients import accumulate, precision_of
from lohp_peft.policy_learning.losses import log_probabilities
from lohp_peft.policy_learning.processes import Processes
from lohp_peft.policy_learning.recordings import Recordings, fit_scales
from policy_learning.conftest import assert_same_weights, build_trajectory, finite, make_trainer
from tiny import build_policy


class Killed(BaseException):
    pass


def run(trainer, folder=None):
    """Train to the end; the scalars of every step."""
    found = {}
    trainer.log = lambda step, scalars: found.__setitem__(step, dict(scalars))
    trainer.train(folder)
    return found


@pytest.mark.parametrize("settings", [{"refresh_kl": 0.0, "learning_rate": 0.01}, {"reference": "backward"}], ids=str)
@pytest.mark.parametrize("killed_at", [2, 3, 6], ids=lambda step: f"step{step}")
def test_a_run_that_was_killed_continues_bit_for_bit(build_trainer, tmp_path, killed_at, settings):
    def build(**kwargs):
        return build_trainer(validate=True, **settings, **kwargs)

    whole = build()
    expected = run(whole, tmp_path / "whole")

    def kill(step, _scalars):
        if step == killed_at:
            raise Killed

    with pytest.raises(Killed):
        build(log=kill).train(tmp_path / "killed")
    resumed = build()
    found = run(resumed, tmp_path / "killed")
    assert list(found) == list(range(killed_at, 9))
    assert all(found[step] == expected[step] for step in found)
    assert (resumed.best, resumed.temperature) == (whole.best, whole.temperature)
    assert_same_weights(resumed.policy.state_dict(), whole.policy.state_dict())
    assert_same_weights(resumed.buffer.state_dict(), whole.buffer.state_dict())
    again = build()
    assert not run(again, tmp_path / "killed")  # it was over
    assert_same_weights(again.policy.state_dict(), whole.policy.state_dict())


def test_a_checkpoint_is_safetensors_and_json_and_the_latest_only(build_trainer, tmp_path):
    build_trainer().train(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-8.safetensors", "state.json"]


def test_a_checkpoint_with_other_settings_is_refused(build_trainer, tmp_path):
    build_trainer().train(tmp_path)
    found = r"\(checkpoint, now\): {'training_steps': \(5, 4\), 'kl_target': \(3.0, 1.0\)}.*`training_steps` may grow"
    with pytest.raises(ValueError, match=found):
        build_trainer(training_steps=4, kl_target=1.0).train(tmp_path)
    with pytest.raises(ValueError, match=r"\(checkpoint, now\): {'kl_target': \(3.0, 1.0\)}"):
        build_trainer(training_steps=6, kl_target=1.0).train(tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 8


def test_a_run_that_ended_goes_on_for_more_steps(build_trainer, tmp_path):
    """From its last weights and moments, at the learning rates of the longer run; what validated best stays known."""
    short = build_trainer(validate=True, training_steps=2)
    before = run(short, tmp_path)
    assert not short.extended_at
    for total, expected in ((5, [5]), (7, [5, 8])):
        trainer = build_trainer(validate=True, training_steps=total)
        trainer.load(tmp_path)
        kept = load_file(tmp_path / f"state-{expected[-1]}.safetensors")
        assert_same_weights(
            trainer.policy.state_dict(), {n[7:]: x for n, x in kept.items() if n.startswith("policy.")}
        )
        found = run(trainer, tmp_path)
        assert list(found) == list(range(expected[-1] + 1, 3 + total + 1))
        assert trainer.extended_at == expected
        before |= found
        assert trainer.best[0] == min(s["validation_loss"] for s in before.values() if "validation_loss" in s)
    again = build_trainer(validate=True, training_steps=7)
    assert not run(again, tmp_path)
    assert again.extended_at == [5, 8]


def test_more_steps_asked_for_while_it_clones_are_as_if_asked_for_before(build_trainer, tmp_path):
    whole, longer = build_trainer(), build_trainer()
    expected = run(whole)

    def kill(step, _scalars):
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        build_trainer(training_steps=2, options={"log": kill}).train(tmp_path)
    assert run(longer, tmp_path)[8] == expected[8]
    assert not longer.extended_at
    assert_same_weights(longer.policy.state_dict(), whole.policy.state_dict())


@pytest.mark.parametrize(
    ("settings", "present", "absent"),
    [
        ({"preset": "behaviour_cloning"}, {"cloning"}, {"subtb", "path"}),
        ({"preset": "lohp"}, {"cloning", "subtb", "recorded/loss", "on_policy/loss", "spliced/loss"}, {"path"}),
        ({"preset": "lohp+path"}, {"cloning", "subtb", "path", "evidence_gap"}, set()),
        ({"preset": "lohp", "mode": "on_policy"}, {"on_policy/loss"}, {"recorded/loss", "spliced/loss", "path"}),
        ({"preset": "lohp", "mode": "off_policy"}, {"recorded/loss"}, {"on_policy/loss", "spliced/loss"}),
        ({"preset": "lohp", "subtb_lambda": 0.0}, {"subtb"}, {"path"}),
        ({"preset": "lohp", "subtb_lambda": math.inf}, {"subtb"}, {"path"}),
        ({"preset": "lohp+path", "subtb_weight": 0.0}, {"path", "path_grad_norm"}, {"subtb"}),
        ({"preset": "lohp+path", "path_prefix_weight": 0.5, "head": "prototype"}, {"path"}, set()),
        ({"preset": "lohp", "cloning_steps": 0}, {"subtb"}, set()),
        ({"preset": "lohp", "reference": "backward"}, {"subtb", "spliced/loss"}, {"divergence"}),
    ],
    ids=lambda value: (
        str(value) if isinstance(value, dict) else " ".join(sorted(value)) or "nothing"
    ),  # of sets in one order
)
def test_presets_and_ablations_run(build_trainer, settings, present, absent):
    trainer = build_trainer(**settings)
    before = {name: p.clone() for name, p in trainer.policy.named_parameters()}
    found = run(trainer)
    assert (
        len(found) == trainer.total_steps == (3 if settings["preset"] == "behaviour_cloning" else trainer.total_steps)
    )
    assert all(map(finite, found.values()))
    last = found[trainer.total_steps]
    assert present <= set().union(*found.values())
    assert not absent & set(last)
    moved = {name.split(".")[0] for name, p in trainer.policy.named_parameters() if not p.equal(before[name])}
    with_flow = settings["preset"] != "behaviour_cloning" and settings.get("subtb_weight") != 0
    assert moved == {"forward_network", "log_flow_network"} if with_flow else moved == {"forward_network"}
    assert not trainer.policy.training


def test_lambda_changes_the_objective(build_trainer):
    found = [run(build_trainer(preset="lohp", subtb_lambda=lam))[4]["subtb"] for lam in (0.0, 1.0, math.inf)]
    assert len(set(found)) == 3


def test_no_gradient_through_states_or_rewards_in_lohp(build_trainer, monkeypatch):
    trainer, other = build_trainer(preset="lohp"), build_trainer(preset="lohp+path")
    states, losses = trainer.recordings.states.requires_grad_(), trainer.recordings.losses.requires_grad_()
    asked = []
    reward = trainer.bank.episode_losses

    def watch(episodes, at, **kwargs):
        asked.append(at.requires_grad)
        return reward(episodes, at, **kwargs)

    monkeypatch.setattr(trainer.bank, "episode_losses", watch)
    run(trainer)
    assert states.grad is None
    assert losses.grad is None
    assert asked
    assert not any(asked)
    assert all(not item.losses.requires_grad and not item.states.requires_grad for item in trainer.buffer.rollouts)
    asked.clear()
    states.requires_grad_(False), losses.requires_grad_(False)
    run(other)
    assert any(asked)  # the pathwise term is the one that differentiates the reward


def test_behaviour_cloning_recovers_a_known_trajectory(build_trainer, encoder):
    runs = [build_trajectory(encoder.space, task=name) for name in ("spam", "ham", "mood")]  # one and the same path
    recordings = Recordings.from_trajectories(runs, 3)
    trainer = build_trainer(
        preset="behaviour_cloning", recordings=recordings, cloning_steps=600, learning_rate=0.02, dropout=0.0
    )
    policy, goal = trainer.policy, recordings.states[0]
    features = trainer._features([trainer.sampler.sample(g) for g in trainer._generators("test", range(3))])

    def error():
        with torch.no_grad():
            return float((rollout(policy.eval(), features) - goal).norm() / goal.expand(3, -1, -1, -1).norm())

    assert error() > 0.5
    run(trainer)
    assert error() < 0.1


def test_the_pathwise_loss_falls(build_trainer, monkeypatch):
    settings = {"subtb_weight": 0.0, "cloning_weight": 0.0, "learning_rate": 0.05, "ridge": 0.3, "dropout": 0.0}
    trainer = build_trainer(preset="lohp+path", cloning_steps=0, training_steps=60, **settings)
    episode = trainer.sampler.task_episode("spam", torch.Generator().manual_seed(0))
    monkeypatch.setattr(trainer.sampler, "sample", lambda generator: episode)
    found = run(trainer)
    assert found[60]["path"] < 0.7 * found[1]["path"]


def test_the_best_validated_weights_are_kept(build_trainer, monkeypatch):
    trainer = build_trainer(validate=True)
    kept, validate = {}, trainer.validate
    worse = iter((0.0, 1.0, 2.0, 3.0, 4.0))  # the second is the clone's, at the start of the hybrid phase

    def watch():
        scalars = validate()
        kept[trainer.step] = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
        return scalars

    def losses(episodes, states, **kwargs):
        return torch.tensor([[next(worse)]]).repeat(1, 1), torch.ones(1, 1)

    trainer.validation = (trainer.bank, trainer.validation[1][:1])
    monkeypatch.setattr(trainer, "validate", watch)
    bank = type("Bank", (), {"features": trainer.bank.features, "episode_losses": staticmethod(losses)})()
    trainer.validation = (bank, trainer.validation[1])
    run(trainer)
    assert list(kept) == [2, 4, 6, 8]
    assert trainer.best == (0.0, 2)
    assert_same_weights(trainer.policy.state_dict(), kept[2])


def test_divergence_is_an_error_and_no_update(build_trainer):
    trainer = build_trainer()
    with torch.no_grad():
        trainer.policy.forward_network.start.fill_(math.nan)
    with pytest.raises(RuntimeError, match="diverged at training step 0: cloning is nan.*Lower `learning_rate`"):
        trainer.training_step()
    assert trainer.policy.forward_network.gates.weight.isfinite().all()


def test_what_others_accumulate_in_the_process_stops_no_step(build_trainer):
    """A loop that was left in the middle of an accumulation leaves Accelerate's shared state behind."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with accelerator.accumulate(accelerator.prepare(torch.nn.Linear(2, 2))):
        pass
    try:
        trainer = build_trainer()
        before = trainer.policy.forward_network.start.clone()
        trainer.training_step()
        assert not trainer.policy.forward_network.start.equal(before)
    finally:
        accelerator.gradient_state._set_sync_gradients(True)


@pytest.mark.parametrize(("asked", "used"), [("no", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("last", ["no", "bf16"])
def test_mixed_precision_is_that_of_the_settings_whatever_ran_before(build_trainer, monkeypatch, asked, used, last):
    monkeypatch.setattr(Accelerator, "mixed_precision", last)
    trainer = build_trainer(mixed_precision=asked)
    found = []
    trainer.policy.forward_network.trunk.second.register_forward_hook(lambda *args: found.append(args[-1].dtype))
    trainer.training_step()
    assert set(found) == {used}


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_precisions_that_scale_gradients_are_refused(monkeypatch, precision):
    """They are taken by `torch.autograd.grad`, which knows no scaler."""
    monkeypatch.setattr(Accelerator, "mixed_precision", precision)
    with pytest.raises(ValueError, match=rf"one of \['no', 'bf16'\], got an accelerator of '{precision}'"):
        precision_of("no", Accelerator(cpu=True))
    assert precision_of("no", None) == "no"  # that of an accelerator which nobody gave is not asked
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(ValueError, match=f"got an accelerator of '{precision}'"):
        precision_of("bf16", None)


def test_a_launcher_may_ask_for_bf16(monkeypatch):
    assert precision_of("bf16", Accelerator(cpu=True)) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert precision_of("no", None) == "bf16"


def test_the_gradient_of_each_loss_is_clipped_on_its_own():
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    large = {"subtb": (1e6 * parameter.sum(), 0.5), "path": (parameter.flatten()[0] * 1e-4, 1.0)}
    scalars = accumulate(large, [parameter], 1e-3, Processes(), training_step=0)
    expected = torch.full_like(parameter, 0.5e-3 / parameter.numel() ** 0.5)
    expected.view(-1)[0] += 1e-4  # below the limit: left as it is
    torch.testing.assert_close(parameter.grad, expected)
    assert scalars["path_grad_norm"] == pytest.approx(1e-4)


def test_the_temperature_of_recordings_is_the_spread_of_their_ends(build_trainer, recordings):
    trainer = build_trainer(preset="lohp", mode="off_policy", kl_target=0.1)
    run(trainer)
    final = recordings.losses[:, -1].view(3, 2)
    assert trainer.temperature == pytest.approx(float((final.var(1).mean() / 0.2).sqrt()))


def test_a_single_recorded_run_has_a_temperature(encoder, bank, trajectories):
    one = Recordings.from_trajectories(trajectories[:1], 3)
    trainer = make_trainer(encoder, bank, one, preset="lohp", mode="off_policy")
    run(trainer)
    assert 0 < trainer.temperature < math.inf


def test_a_clipped_reward_has_the_temperature_of_the_floor(build_trainer, bank, monkeypatch, caplog):
    """Where every rollout does more harm than losses are told apart in."""
    trainer = build_trainer(preset="lohp", cloning_steps=0, training_steps=1)
    monkeypatch.setattr(
        bank, "episode_losses", lambda episodes, states, **kwargs: (states.flatten(2).any(-1) * 1e4 + 1, None)
    )
    trainer._start_hybrid_phase()
    losses = trainer.recordings.losses
    assert trainer.temperature == pytest.approx(float((losses[:, 0] - losses[:, -1]).mean()) / 20)
    assert "All rollouts of the reference end at the same loss" in caplog.text


def test_the_temperature_of_rollouts_follows_the_target(build_trainer):
    temperatures = []
    for kl_target in (0.01, 0.04):
        trainer = build_trainer(preset="lohp", kl_target=kl_target, cloning_steps=0, training_steps=1)
        run(trainer)
        temperatures.append(trainer.temperature)
    assert temperatures[0] == pytest.approx(2 * temperatures[1], rel=1e-5)
    assert temperatures[1] > 1e-3


def test_the_temperature_is_bounded_by_the_range_of_the_reward(build_trainer, recordings):
    trainer = build_trainer(preset="lohp", mode="off_policy", kl_target=1e6)
    run(trainer)
    decrease = 1 - recordings.losses[:, -1].mean()
    assert trainer.temperature == pytest.approx(float(decrease / on_policy_module.MAX_REWARD_RANGE))


def test_rollouts_are_scored_against_no_adapter_and_splices_keep_their_prefix(build_trainer, recordings):
    trainer = build_trainer(preset="lohp", cloning_steps=0)
    found = trainer.on_policy.fresh(torch.Generator().manual_seed(0), splice=True)
    on_policy, spliced = found[:2], found[2:]
    assert [item.prefix for item in on_policy] == [0, 0]
    assert len({item.prefix for item in spliced}) == 1
    prefix = spliced[0].prefix
    assert 1 <= prefix <= 2
    for item in spliced:
        same = [item.states[: prefix + 1].equal(run[: prefix + 1]) for run in recordings.states]
        assert any(same)
    assert not spliced[0].states[-1].equal(spliced[1].states[-1])
    for item in found:
        assert float(item.losses[0]) == pytest.approx(1, abs=1e-4)
        assert 0 < item.losses.max() <= 2


def test_effective_sample_sizes_are_by_task(build_trainer, monkeypatch):
    seen = []
    loss = trainer_module.hybrid_loss

    def watch(batches, weights, **kwargs):
        seen.append(batches)
        return loss(batches, weights, **kwargs)

    monkeypatch.setattr(trainer_module, "hybrid_loss", watch)
    run(build_trainer(preset="lohp", mode="on_policy", recorded_batch_size=8))
    tasks = seen[-1]["on_policy"].tasks
    assert tasks.bincount().tolist() == [2, 2, 2]  # two rollouts for each of the three support sets drawn so far


def test_one_policy_step_is_enough_for_every_term(encoder, bank, trajectories, build_trainer):
    recordings = Recordings.from_trajectories(trajectories, 1)
    trainer = build_trainer(policy_steps=1, path_prefix_weight=0.5)
    policy = build_policy(encoder, policy_steps=1)
    fit_scales(policy, recordings)
    trainer = type(trainer)(policy, bank, recordings, trainer.sampler, trainer.config, accelerator=trainer.accelerator)
    assert all(map(finite, run(trainer).values()))


def test_the_clone_is_taken_anew_when_the_policy_is_better_and_far(build_trainer, monkeypatch):
    trainer = build_trainer(preset="lohp", validate=True)
    run(trainer)
    old = trainer.reference
    with torch.no_grad():
        trainer.policy.forward_network.start.add_(1.0)
        trainer.policy.log_flow_network.out.bias.fill_(1.0)
    better, worse = trainer.reference_loss - 0.1, trainer.reference_loss + 0.1
    assert set(trainer._refresh_reference(worse)) == {"divergence"}
    assert trainer.reference is old
    found = trainer._refresh_reference(better)
    assert found["refreshed"] == 1.0
    assert found["divergence"] > 5
    assert found["temperature"] == trainer.temperature
    assert trainer.reference is not old
    assert trainer.reference_loss == better
    assert_same_weights(trainer.reference.forward_network.state_dict(), trainer.policy.forward_network.state_dict())
    assert not trainer.policy.log_flow_network.out.bias.any()  # the residual flow starts again
    assert trainer._refresh_reference(better - 1) == {"divergence": 0.0}  # better, but the clone is the policy
    never = build_trainer(preset="lohp", validate=True, refresh_kl=math.inf)
    run(never)
    with torch.no_grad():
        never.policy.forward_network.start.add_(1.0)
    assert "refreshed" not in never._refresh_reference(-1.0)


def bent_recordings(encoder, unit=1.0):
    """Runs that no contraction describes, all from no adapter, with weights in units of `unit`."""
    runs = []
    for seed, name in enumerate(("spam", "ham", "mood") * 2):
        run = build_trajectory(encoder.space, name, seed=seed)
        noise = torch.randn(run.states.shape, generator=torch.Generator().manual_seed(seed)) * encoder.space.mask
        runs.append(replace(run, states=unit * (run.states + 0.1 * noise * (run.states != 0))))
    return Recordings.from_trajectories(runs, 3)


def test_the_temperature_of_a_backward_policy_balances_the_recordings(build_trainer, encoder, monkeypatch, caplog):
    """The mean decrease of the loss behind the point mass, in nats, is the mean cost of the recorded paths there."""
    recordings = bent_recordings(encoder)
    trainer = build_trainer(preset="lohp", reference="backward", cloning_steps=0, recordings=recordings)
    trainer._start_hybrid_phase()
    assert "less likely than the fitted backward policy" in caplog.text  # of a policy that was not cloned
    assert trainer.temperature > 0
    assert trainer.reference.point_masses.tolist() == [True, False, False]
    decrease = float((recordings.losses[:, 1] - recordings.losses[:, -1]).mean())
    monkeypatch.setattr(on_policy_module, "_path_costs", lambda *args: torch.tensor([4.0, 12.0]))
    trainer._set_reference(trainer.reference)
    assert trainer.temperature == pytest.approx(decrease / 8)
    monkeypatch.setattr(on_policy_module, "_path_costs", lambda *args: torch.tensor([1e9]))
    trainer._set_reference(trainer.reference)
    whole = float((recordings.losses[:, 0] - recordings.losses[:, -1]).mean())
    assert trainer.temperature == pytest.approx(whole / on_policy_module.MAX_REWARD_RANGE)
    rising = torch.linspace(0.5, 0.9, 3).expand(6, -1)  # all that is won is won in the first step
    trainer.recordings.losses[:, 1:] = rising
    caplog.clear()
    trainer._set_reference(trainer.reference)
    assert "do not fall behind the first step (by -0.4 on average)" in caplog.text


def path_costs(trainer):
    trainer._start_hybrid_phase()
    return on_policy_module._path_costs(trainer.on_policy, trainer.reference, torch.Generator().manual_seed(0))


def test_path_costs_are_log_ratios_of_the_recorded_runs_without_the_point_mass(build_trainer, encoder):
    recordings = bent_recordings(encoder)
    trainer = build_trainer(preset="lohp", reference="backward", cloning_steps=0, recordings=recordings)
    costs = path_costs(trainer)
    assert costs.shape == (6,)
    generator = torch.Generator().manual_seed(0)
    episode = trainer.sampler.whole_task_episode(recordings.tasks[0], generator)
    run = recordings.states[:1], trainer._features([episode]), recordings.optimizers[:1]
    log_pf, log_ref = (x.detach() for x in log_probabilities(trainer.policy, trainer.reference, *run))
    assert float(costs[0].detach()) == pytest.approx(float((log_pf - log_ref)[:, 1:].sum()), rel=1e-4)


def test_path_costs_do_not_depend_on_the_unit_of_the_weights(build_trainer, encoder):
    settings = {"preset": "lohp", "reference": "backward", "cloning_steps": 0}
    found = [path_costs(build_trainer(recordings=bent_recordings(encoder, unit), **settings)) for unit in (1.0, 0.01)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0.1)


def test_tasks_without_episodes_do_not_count_in_path_costs(build_trainer):
    trainer = build_trainer(preset="lohp", reference="backward", cloning_steps=0)
    trainer._start_hybrid_phase()
    del trainer.sampler.rows["ham"]  # as if its classes were too small
    costs = on_policy_module._path_costs(trainer.on_policy, trainer.reference, torch.Generator().manual_seed(0))
    assert costs.shape == (4,)
