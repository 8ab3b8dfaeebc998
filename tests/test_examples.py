"""Every example runs at toy size and shows what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

import toy
from lohp_peft.policy_learning import train_policy
from lohp_peft.tasks import Task, TextEncoder
from lohp_peft.trajectories import TrajectoryDataset
from policy_learning.conftest import tiny_config

EXAMPLES = toy.ROOT / "examples"
SCALING = toy.ROOT / "benchmarks" / "results" / "scaling.json"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    return toy.save_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def quickstart(base_model, tmp_path_factory) -> Path:
    """The folder that the quickstart wrote."""
    folder = tmp_path_factory.mktemp("quickstart")
    toy.save_policy(folder, base_model)
    return folder


def test_quickstart(quickstart):
    runs = list(TrajectoryDataset.open(quickstart / "trajectories"))
    assert {run.task for run in runs} == {"coffee_reviews", "coffee_topic", "helpdesk_urgency"}
    assert {run.optimizer for run in runs} == {"adamw", "sam"}
    assert json.loads((quickstart / "policy" / "config.json").read_text())["model_type"] == "lohp_policy"
    assert json.loads((quickstart / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_demo(quickstart, base_model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [EXAMPLES / "tasks" / f"{name}.jsonl" for name in ("coffee_reviews", "coffee_topic")]
    demo = toy.load_script("examples/demo.py")
    line = ["--policy", str(quickstart / "policy"), "--base-model", str(base_model), "--shots", "4", "--draws", "1"]
    demo.main([*line, "--task", *map(str, files), "--adamw-steps", "1", "2", "--output", str(tmp_path / "out")])

    shown = capsys.readouterr().out
    for word in ("generated", "wrong task", "shuffled labels", "adamw", "stock PEFT", "demo.png"):
        assert word in shown
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert set(report["results"]) == {"coffee_reviews", "coffee_topic"}
    for name, found in zip(report["results"], report["stock_peft"], strict=True):
        assert report["results"][name]["generated"]["per_draw"] == pytest.approx([found])
        assert len(report["path_accuracy"][name]) == 5  # four policy steps and the start
        assert report["path_accuracy"][name][0] == pytest.approx(report["results"][name]["none"]["accuracy"])
        assert [len(point) for point in report["adamw_seconds_accuracy"][name]] == [2, 2]
    assert (tmp_path / "out" / "coffee_topic" / "adapter_model.safetensors").exists()


def test_adapters_are_read_without_this_package_as_policies_pool(tmp_path):
    """Also those of policies that pool otherwise than the one that ships."""
    tokens, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import use_with_plain_peft as plain; from safetensors.torch import *; "
        f"x = load_file({str(tmp_path / 'in')!r}); "
        "found = {kind: plain.pooled(x['tokens'], x['mask'], kind).contiguous() for kind in ('mean', 'first', 'last')}; "
        f"save_file(found, {str(tmp_path / 'out')!r})"
    )
    save_file({"tokens": tokens, "mask": mask}, tmp_path / "in")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    expected = {
        "mean": torch.stack([row[: int(ones.sum())].mean(0) for row, ones in zip(tokens, mask, strict=True)]),
        "first": tokens[:, 0],
        "last": torch.stack([tokens[0, 4], tokens[1, 1], tokens[2, 2]]),
    }
    torch.testing.assert_close(load_file(tmp_path / "out"), expected)


def test_the_second_process_cannot_import_this_package():
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import use_with_plain_peft; import lohp_peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "lohp_peft" in done.stderr.splitlines()[-1]


def test_record_your_own_runs(base_model, tmp_path, capsys):
    example = toy.load_script("examples/record_your_own_runs.py")
    line = ["--base-model", str(base_model), "--steps", "10", "--optimizers", "adamw_torch", "sgd"]
    example.main([*line, "--output", str(tmp_path)])
    runs = list(TrajectoryDataset.open(tmp_path / "trajectories"))
    assert [run.optimizer for run in runs] == ["adamw_torch", "sgd"]
    assert [run.optimizer_steps.tolist() for run in runs] == [[0, 5, 10]] * 2
    assert all(run.losses.isfinite().all() for run in runs)
    assert re.search("Share of the update of .*-sgd-.* that the weight space holds", capsys.readouterr().out)


def test_stage_2_learns_from_what_a_run_of_ones_own_recorded(base_model, tmp_path):
    example = toy.load_script("examples/record_your_own_runs.py")
    example.main(["--base-model", str(base_model), "--steps", "10", "--output", str(tmp_path)])
    dataset = TrajectoryDataset.open(tmp_path / "trajectories")
    backbone, tokenizer = AutoModel.from_pretrained(base_model), AutoTokenizer.from_pretrained(base_model)
    task, config = Task.from_jsonl(example.TASK), tiny_config(cloning_steps=1, training_steps=1, policy_steps=2)
    encoder = TextEncoder(backbone, tokenizer, dataset.space)
    policy = train_policy([task], encoder, dataset, tmp_path / "policy", config, console=Console(quiet=True))
    assert policy.reference_set.names == ("coffee_reviews",)


def test_lohp_finetuning(quickstart, base_model, tmp_path):
    example = toy.load_script("examples/lohp_finetuning/lohp_finetuning.py")
    line = ["--base_model", str(base_model), "--data_path", str(EXAMPLES / "tasks" / "coffee_reviews.jsonl")]
    line += ["--shots", "4", "--output_dir", str(tmp_path), "--policy", str(quickstart / "policy")]
    (before,) = example.main(line)
    same, after = example.main([*line, "--max_steps", "2", "--eval_step", "2", "--learning_rate", "0.1"])
    assert same == before != after
    model = AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=2)
    model = PeftModel.from_pretrained(model, tmp_path)
    assert model.peft_config["default"].peft_type == "LORA"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    test = Task.from_jsonl(EXAMPLES / "tasks" / "coffee_reviews.jsonl").split("test")
    with torch.no_grad():
        logits = model.eval()(**tokenizer(list(test.texts), padding=True, return_tensors="pt")).logits
    assert float((logits.argmax(-1) == test.targets).float().mean()) == pytest.approx(after)
    (into_lora_config,) = example.main([*line, "--use_lora_config"])
    assert into_lora_config == before
    example.main([*line, "--use_lora", "--output_dir", str(tmp_path / "lora")])
    assert (tmp_path / "lohp_provenance.json").exists()
    assert not (tmp_path / "lora" / "lohp_provenance.json").exists()


def test_own_tasks(quickstart, base_model, tmp_path, capsys):
    example = toy.load_script("examples/own_tasks/own_tasks.py")
    line = ["--base-model", str(base_model), "--policy", str(quickstart / "policy"), "--output", str(tmp_path)]
    example.main([*line, "--shots", "4", "--draws", "1", "--test-share", "0.25"])
    task = Task.from_jsonl(tmp_path / "garden_questions.jsonl")
    assert [task.split(name).labels.count(0) for name in ("train", "test")] == [12, 4]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("shuffled labels", "wrong task", "over no adapter"))


def test_own_base_model(quickstart, base_model, tmp_path, capsys):
    example = toy.load_script("examples/own_base_model/own_base_model.py")
    line = ["--base-model", str(base_model), "--r", "4", "--target-modules", "query", "value", "--layers", "1"]
    example.main(line)
    shown = capsys.readouterr().out
    assert "is not for it" in shown
    assert "writes 32 numbers" in " ".join(shown.split())  # two modules, 4 x 4 each
    example.main([*line, "--policy", str(quickstart / "policy")])
    assert "is this base model's" in " ".join(capsys.readouterr().out.split())


def test_large_models(base_model, tmp_path, capsys):
    example = toy.load_script("examples/large_models/large_models.py")
    example.main(["--optimizer-steps", "4", "--training-steps", "2", "--hidden-size", "32", "--output", str(tmp_path)])
    capsys.readouterr()
    policy = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert policy["pooling"] == "last"
    shape = example.llama_config(32, 48, 2, 4, 2, vocab_size=64)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()  # sizes need no weights
    AutoTokenizer.from_pretrained(base_model).save_pretrained(tmp_path / "base")
    example.main(["--base-model", str(tmp_path / "base"), "--only-costs", "--output", str(tmp_path / "none")])
    expected = example.costs(shape, 4)["base model, bfloat16"]
    assert f"base model, bfloat16: {expected:,.2f} MB" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    config = example.llama_config(4096, 14336, 32, 32, 8, vocab_size=128256)
    sizes = example.costs(config, 16, [*example.TARGETS, "gate_proj", "up_proj", "down_proj"])
    (row,) = [r for r in json.loads(SCALING.read_text())["rows"] if r["shape"] == "Llama-3-8B"]
    assert sizes["generated adapter, float32"] == pytest.approx(row["adapter_mb"])
    assert sizes["base model, bfloat16"] == pytest.approx(2 * 7505, rel=0.01)  # without the head's 0.5 billion


def test_serve(quickstart, base_model, tmp_path, capsys):
    example = toy.load_script("examples/serve/serve.py")
    line = ["--base-model", str(base_model), "--policy", str(quickstart / "policy"), "--output", str(tmp_path)]
    answers = example.main([*line, "--shots", "4", "--tasks", "coffee_reviews", "library_intents"])
    ((_, labels),) = answers.items()
    assert [label.split(":")[0] for label in labels] == ["coffee_reviews", "library_intents"]
    apart = re.findall(r"from the mixed batch (\S+)", capsys.readouterr().out)
    assert len(apart) == 2
    assert max(map(float, apart)) < 1e-5
    assert not (tmp_path / "coffee_reviews" / "head.safetensors").exists()


def test_warm_start_in_a_trainer_run(quickstart, base_model, tmp_path, capsys):
    example = toy.load_script("examples/warm_start_trainer.py")
    line = ["--base-model", str(base_model), "--policy", str(quickstart / "policy"), "--shots", "4", "--steps", "3"]
    example.main([*line, "--output", str(tmp_path)])
    shown = re.findall(r"^step +(\d+) +loss ([\d.]+) +accuracy ([\d.]+)%", capsys.readouterr().out, re.MULTILINE)
    assert [step for step, _, _ in shown] == ["0", "1", "2", "3"]
    example.main([*line, "--cold", "--output", str(tmp_path / "cold")])
    cold = re.findall(r"^step +(\d+) +loss ([\d.]+) +accuracy ([\d.]+)%", capsys.readouterr().out, re.MULTILINE)
    assert float(shown[0][2]) > float(cold[0][2])  # at step 0 a head is solved already
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_warm_start_is_three_changed_lines():
    """The diff of the README has the marked lines of the script."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    added = [line[1:].strip() for line in diff.splitlines() if line.startswith("+")]
    marked = re.findall(r"^ *(.*?) {2}# lohp \d", (EXAMPLES / "warm_start_trainer.py").read_text(), re.MULTILINE)
    assert added == [line.replace("options.policy", '"shipped"') for line in marked]
    assert len(added) == 3


def test_every_example_is_described():
    """The table of examples/README.md has a row for every script and every how-to, and for nothing else."""
    listed = re.findall(r"^\| \[`([\w./]+)`\]", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    scripts = [path.name for path in EXAMPLES.glob("*.py")]
    assert sorted(listed) == sorted([*scripts, *{f"{path.parent.name}/" for path in EXAMPLES.glob("*/*.py")}])
