"""A generator of every family is trained by the same two commands, `lohp-peft prepare` and `lohp-peft train`."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import tiny_world as tiny
from lohp_peft import LoHpConfig
from lohp_peft.cli.main import app
from models.zoo import BY_NAME, RAW, TEXT_FAMILIES, VIT, build_bart, build_resnet, run

QUICK = ("Llama", "GPT-2", "T5")
PREPARE = "--optimizers [adamw] --optimizer-steps 2 --record-every 1 --rows-per-task 24 --r 2".split()
TRAIN = "--cloning-steps 2 --training-steps 2 --policy-steps 2 --hidden-size 8 --num-directions 2".split()
READ = ["--pooling", "last", "--max-length", "16"]


def lohp_peft(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for k in range(2):
        rows = [{**row, "split": "train"} for row in tiny.build_rows(2 + k, 14, seed=k)]
        (folder / f"task{k}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [folder / f"task{k}.jsonl" for k in range(2)]


def save(model, folder):
    """A base model with a tokenizer that has no padding token, as most decoders' have none."""
    vocabulary = {word: i for i, word in enumerate([*tiny.WORDS, "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>").save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def prepare(base, tasks, output, *more, code=0):
    given = [word for task in tasks for word in ("--task", task)]
    return lohp_peft("prepare", "--base-model", base, *given, "--output", output, *PREPARE, *READ, *more, code=code)


def train_a_generator(family, tasks, tmp_path, dtype=torch.float32):
    """Both commands, and `lohp-peft generate`; the model is saved with a head where it has one."""
    task_type = next(iter(family.heads))
    base = save(family.build(task_type).to(dtype), tmp_path / "base")
    targets = [] if family.targets is None else ["--target-modules", ",".join(family.targets)]
    prepare(base, tasks, tmp_path / "runs", *targets)
    given = [word for task in tasks for word in ("--task", task)]
    policy, adapter = tmp_path / "policy", tmp_path / "adapter"
    reading = ["--base-model", base, *given, *READ]
    lohp_peft("train", "--trajectories", tmp_path / "runs", "--output", policy, *reading, *TRAIN)
    from_task = ["--base-model", base, "--task", tasks[0], "--shots", 4, "--choose", "false"]
    lohp_peft("generate", "--policy", policy, "--output", adapter, *from_task)
    return base, policy, adapter


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f.name in QUICK else pytest.mark.slow, id=f.name) for f in TEXT_FAMILIES],
)
def test_a_generator_is_trained_and_generates(family, tasks, tmp_path):
    base, _, adapter = train_a_generator(family, tasks, tmp_path)
    backbone = type(family.build())
    wanted = run(backbone.from_pretrained(base), family.inputs())
    loaded = PeftModel.from_pretrained(backbone.from_pretrained(base), adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert 0 < (run(loaded, family.inputs()) - wanted).abs().max() < 10


def test_a_decoder_in_bfloat16_and_its_models_with_heads(tasks, tmp_path):
    family = BY_NAME["Llama"]
    base, policy, _ = train_a_generator(family, tasks, tmp_path, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    heads = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
    for task_type, cls in heads.items():
        model = cls.from_pretrained(base)
        assert model.dtype == torch.bfloat16
        model = get_peft_model(model, LoHpConfig(policy=str(policy), task_type=task_type))
        before = run(model, family.inputs())
        model.generate_adapter(tiny.build_rows(), tokenizer=tokenizer, config=RAW)
        assert (run(model, family.inputs()) - before).abs().max() > 0
        model.save_pretrained(tmp_path / task_type)
        torch.manual_seed(1)
        loaded = PeftModel.from_pretrained(cls.from_pretrained(base), tmp_path / task_type)
        assert torch.equal(run(loaded, family.inputs()), run(model, family.inputs()))


REFUSED = {
    "BART": (build_bart, (), "it is an encoder with a decoder"),
    "ViT": (VIT.build, (), "it reads `pixel_values`"),
    "ResNet": (build_resnet, (), "it reads `pixel_values`"),
    "DeBERTa-v3": (BY_NAME["DeBERTa-v3"].build, (), "2 target modules do not read one row per token"),
    "Qwen3-MoE": (BY_NAME["Qwen3-MoE"].build, ("--target-modules", "experts"), "Only linear layers can be generated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_recorded(name, tasks, tmp_path):
    build, more, message = REFUSED[name]
    base = save(build(), tmp_path / "base")
    printed = prepare(base, tasks, tmp_path / "runs", *more, code=2)
    assert message in printed
    assert not (tmp_path / "runs").exists()


def test_of_a_model_with_a_decoder_the_encoder_is_trained(tmp_path):
    from lohp_peft.cli.resources import load_base_model

    base = save(BY_NAME["T5"].build("SEQ_2_SEQ_LM"), tmp_path)
    model, tokenizer = load_base_model(str(base))
    assert type(model) is type(AutoModelForTextEncoding.from_pretrained(base))
    assert tokenizer.pad_token == "<eos>"
