"""Each public job on a GPU, beside the same on the CPU where both give the same numbers: `pytest -m gpu`."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch.testing import assert_close

import tiny_world
from lohp_peft import (
    EvaluationConfig,
    GenerationConfig,
    LoHpConfig,
    LoHpPolicy,
    TrajectoryDataset,
    TrajectoryRecorder,
    WeightPreparationConfig,
    evaluate_tasks,
    generate_adapters,
    initialize_lohp_weights,
    prepare_trajectories,
    save_uniform_lora,
    to_plain_lora,
    train_policy,
)
from lohp_peft.tasks import TextEncoder
from policy_learning.conftest import TASKS, assert_same_weights, build_dataset, tiny_config
from tiny import build_base_model, build_encoder, build_policy, build_task
from weight_preparation import conftest as stage_1

GPU = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CLOSE = {"atol": 1e-4, "rtol": 1e-3}
QUIET = Console(quiet=True)
SUPPORTS = [task.draw_support(8, seed) for seed, task in enumerate(TASKS)]
ROWS = tiny_world.build_rows()


@pytest.fixture(autouse=True)
def any_device():
    """Accelerate keeps for a whole process which devices its first user asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def encoder_on(device, **kwargs):
    encoder = build_encoder(adapted=(1, 2), **kwargs)
    encoder.base_model.to(device)
    return encoder


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(),
        GenerationConfig(num_candidates=3, amplitudes=(0.5, 1.0, 2.0), seed=4),
        GenerationConfig(closed_loop=True),
        GenerationConfig(gradient_steps=4, head="prototype"),
    ],
    ids=["plain", "all", "loop", "steps"],
)
@pytest.mark.parametrize("whose", ["base model", "base model and policy"])
def test_adapters_are_those_of_the_cpu(config, whose, tmp_path):
    encoder = encoder_on("cpu")
    policy = build_policy(encoder, TASKS, size=0.3)
    expected = generate_adapters(policy, encoder.base_model, encoder.tokenizer, SUPPORTS, config)
    base = encoder.base_model.to(GPU)
    policy = policy.to(GPU) if "policy" in whose else policy
    found = generate_adapters(policy, base, encoder.tokenizer, SUPPORTS, config)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.report.chosen == theirs.report.chosen
        assert mine.report.gradient_steps == theirs.report.gradient_steps
        assert_close(mine.state.cpu(), theirs.state, **CLOSE)
        assert_close(mine.head.weight.cpu(), theirs.head.weight, **CLOSE)
    found[0].save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build_base_model(3), str(tmp_path / "adapter"))  # on the CPU
    weights = dict(again.named_parameters())
    for name, (a, _) in found[0].lora.items():
        assert_close(weights[f"base_model.model.{name}.lora_A.default.weight"], a.cpu())


def test_bfloat16_passes():
    encoder = encoder_on(GPU)
    policy = build_policy(encoder, TASKS, size=0.3)
    given = (encoder.base_model, encoder.tokenizer, SUPPORTS)
    full = generate_adapters(policy, *given, GenerationConfig(choose=False))
    half = generate_adapters(policy, *given, GenerationConfig(choose=False, mixed_precision="bf16"))
    for mine, theirs in zip(half, full, strict=True):
        assert_close(mine.state, theirs.state, atol=0.1, rtol=0.1)
        assert not mine.state.equal(theirs.state)


@pytest.mark.parametrize("kind", ["bert", "bert classifier", "llama", "llama classifier"])
def test_into_a_model(kind, tmp_path):
    """Generated into a model on the GPU: the outputs are those of the same model on the CPU, also after a reload."""
    name, *classifier = kind.split()
    build = getattr(tiny_world, f"build_{kind.replace(' ', '_')}")
    task_type = "SEQ_CLS" if classifier else "CAUSAL_LM" if name == "llama" else "FEATURE_EXTRACTION"
    tokenizer = tiny_world.build_tokenizer()
    tiny_world.build_policy(build(), tokenizer).save_pretrained(tmp_path / "policy")
    batch = tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    outputs, models = [], []
    for device in ("cpu", GPU):
        config = LoHpConfig(policy=str(tmp_path / "policy"), task_type=task_type)
        model = get_peft_model(build().to(device), config).eval()
        model.generate_adapter(ROWS, tokenizer=tokenizer, config=GenerationConfig(choose=False))
        assert {p.device.type for p in model.parameters()} == {torch.device(device).type}
        with torch.no_grad():
            outputs.append(model(**batch.to(device))[0].cpu())
        models.append(model)
    assert_close(*outputs, **CLOSE)
    models[1].save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build(), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert_close(again(**batch.to("cpu"))[0], outputs[0], **CLOSE)
        merged = to_plain_lora(models[1]).merge_and_unload()
        assert_close(merged(**batch.to(GPU))[0].cpu(), outputs[0], **CLOSE)


def test_as_a_start_for_training_and_for_servers(tmp_path):
    base, tokenizer = tiny_world.build_bert(), tiny_world.build_tokenizer()
    policy = tiny_world.build_policy(base, tokenizer)
    model = get_peft_model(base.to(GPU), LoraConfig(r=policy.config.r, target_modules=["query", "value"]))
    initialize_lohp_weights(model, policy, ROWS, tokenizer=tokenizer, config=GenerationConfig(choose=False))
    batch = tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt").to(GPU)
    loss = model(**batch).last_hidden_state.square().mean()
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.AdamW(trained, lr=1e-2).step()
    save_uniform_lora(model, tmp_path / "uniform")
    again = PeftModel.from_pretrained(tiny_world.build_bert().to(GPU), str(tmp_path / "uniform"))
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        assert_close(again(**batch).last_hidden_state, expected, **CLOSE)


def test_scores_are_those_of_the_cpu():
    tasks = [build_task("spam", family="spam", test_rows=30), build_task("mood", n_classes=3, seed=1, test_rows=30)]
    settings = EvaluationConfig(shots=6, draws=2, seed=3, adamw_steps=3)
    found = []
    for device in ("cpu", GPU):
        encoder = encoder_on("cpu")
        policy = build_policy(encoder, TASKS, size=0.3)
        base = encoder.base_model.to(device)
        found.append(evaluate_tasks(policy, base, encoder.tokenizer, tasks, config=settings, console=QUIET)["tasks"])
    expected, mine = found
    for task, methods in expected.items():
        assert mine[task].keys() == methods.keys()
        for method, entry in methods.items():
            assert mine[task][method]["accuracy"] == pytest.approx(entry["accuracy"], abs=0.04)  # one text of 30


@pytest.mark.parametrize("head", ["ridge", "prototype"])
def test_recordings_are_those_of_the_cpu(head, tmp_path):
    counts = {"optimizer_steps": 8, "record_every": 3, "rows_per_task": 32, "score_query_rows": 8}
    config = WeightPreparationConfig(optimizers=("adamw", "sam"), seeds=(0, 1), head=head, **counts)
    tasks = [build_task("spam"), build_task("mood", n_classes=3, seed=1)]
    runs = [
        list(prepare_trajectories(tasks, encoder_on(device), tmp_path / name, config, console=QUIET))
        for name, device in (("cpu", "cpu"), ("gpu", GPU))
    ]
    assert len(runs[0]) == len(runs[1]) == 8
    for mine, theirs in zip(runs[1], runs[0], strict=True):
        assert (mine.task, mine.optimizer, mine.seed) == (theirs.task, theirs.optimizer, theirs.seed)
        assert_close(mine.losses, theirs.losses, atol=5e-3, rtol=5e-3)
        assert_close(mine.states, theirs.states, atol=5e-3, rtol=5e-2)


def test_the_recorder_under_the_trainer(tmp_path):
    recorder = TrajectoryRecorder(tmp_path / "recorded", "toy", record_every=5, r=8)
    model = stage_1.train(tmp_path / "run", recorder, model=stage_1.lora_model(), use_cpu=False)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    dataset = TrajectoryDataset.open(tmp_path / "recorded")
    (run,) = dataset["toy-adamw_torch_fused-3"]
    decoded = dataset.space.delta_weight(run.states[-1])
    for name, delta in decoded.items():
        expected = model.get_base_model().get_submodule(name).get_delta_weight("default").detach().cpu()
        assert (delta - expected).norm() < 0.2 * expected.norm()


def test_policy_learning_after_something_else_on_the_gpu(tmp_path):
    """A base model on the CPU follows the accelerator that the process uses already."""
    Accelerator()
    encoder, settings = encoder_on("cpu"), tiny_config(cloning_steps=2, training_steps=2)
    policy = train_policy(
        TASKS, encoder, build_dataset(encoder, tmp_path / "r"), tmp_path / "p", settings, console=QUIET
    )
    assert {policy.device.type, encoder.device.type} == {"cuda"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_precision": "bf16"},
        {"preset": "lohp"},
        {"preset": "lohp", "reference": "backward"},
        {"preset": "behaviour_cloning"},
    ],
    ids=lambda changes: "-".join(changes.values()) or "default",
)
def test_policy_learning(changes, tmp_path):
    encoder = encoder_on(GPU)
    dataset = build_dataset(encoder, tmp_path / "recordings")
    validation = [build_task("news", seed=7)]
    settings = tiny_config(cloning_steps=2, training_steps=2, **changes)

    def learn(name):
        given = (TASKS, encoder, dataset, tmp_path / name, settings)
        return train_policy(*given, validation_tasks=validation, console=QUIET)

    policy = learn("policy")
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
    loaded = LoHpPolicy.from_pretrained(tmp_path / "policy")
    assert_same_weights(loaded.state_dict(), {name: x.cpu() for name, x in policy.state_dict().items()})
    again = learn("policy")  # goes on from its checkpoint, and has nothing to do
    assert_same_weights({name: x.cpu() for name, x in again.state_dict().items()}, loaded.state_dict())
    generated = generate_adapters(loaded, copy.deepcopy(encoder.base_model), encoder.tokenizer, SUPPORTS)
    assert all(adapter.state.isfinite().all() for adapter in generated)


def test_embeddings_of_whole_and_replayed_passes():
    """The hidden states of the frozen layers below the first adapted one are kept on the GPU."""
    encoder = encoder_on(GPU, max_length=24)
    examples = build_task("texts", rows=30).examples
    encoded = encoder.prepare(examples.texts)
    assert encoded.hidden.device.type == "cuda"
    state = torch.randn(tuple(encoder.space.shape)) * encoder.space.mask
    whole = TextEncoder(encoder.base_model, encoder.tokenizer, encoder.space, max_length=24)
    whole.layers = None
    assert_close(encoder.embed(encoded, state[None]), whole.embed(whole.prepare(examples.texts), state[None]), **CLOSE)
