"""What is saved after a generation is an ordinary LoRA: it loads, bit for bit, where this package does not exist."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel, PeftType, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from transformers import AutoModel

import lohp_peft
import tiny_world as tiny
from lohp_peft import (
    GenerationConfig,
    LoHpConfig,
    generate_adapter,
    initialize_lohp_weights,
    save_uniform_lora,
    to_plain_lora,
)
from lohp_peft.adapters.export import GenerationRecord, plain_lora_config, save_plain_lora, tells_of_other_weights
from lohp_peft.adapters.importing import read_plain_lora
from lohp_peft.cards import adapter_card_of
from lohp_peft.config import RecordedLoraConfig
from lohp_peft.hub import check_folder

RAW = GenerationConfig(choose=False)
ROWS = tiny.build_rows()
PROVENANCE = {
    "policy",
    "revision",
    "base_fingerprint",
    "seed",
    "candidates",
    "scores",
    "label_names",
    "pooling",
    "max_length",
}

RECORD = {"lohp_provenance.json", "head.safetensors"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


@pytest.fixture(scope="module")
def policy():
    return tiny.build_policy(tiny.build_bert())


@pytest.fixture(scope="module")
def folders(policy, tokenizer, tmp_path_factory):
    """A policy and base models on disk."""
    root = tmp_path_factory.mktemp("world")
    policy.save_pretrained(root / "policy")
    for name, model in {"encoder": tiny.build_bert(), "classifier": tiny.build_bert_classifier()}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def outputs(model, tokenizer):
    batch = tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(**batch)
    return found.logits if "logits" in found else found.last_hidden_state


def generated(folders, kind, tokenizer, **fields):
    loader = {"encoder": type(tiny.build_bert()), "classifier": type(tiny.build_bert_classifier())}[kind]
    task = {"encoder": "FEATURE_EXTRACTION", "classifier": "SEQ_CLS"}[kind]
    base = loader.from_pretrained(folders / kind)
    model = get_peft_model(base, LoHpConfig(policy=str(folders / "policy"), task_type=task, **fields))
    model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    return model


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["lohp_peft"] = None
import torch
from peft import AutoPeftModel, AutoPeftModelForFeatureExtraction, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

base, adapter, kind, texts = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4].split("|")
auto, auto_peft = {
    "encoder": (AutoModel, AutoPeftModelForFeatureExtraction),
    "classifier": (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification),
}[kind]
batch = AutoTokenizer.from_pretrained(base)(texts, padding=True, return_tensors="pt")
direct = auto.from_pretrained(base)
direct.load_adapter(adapter)
models = {
    "peft": PeftModel.from_pretrained(auto.from_pretrained(base), adapter),
    "trainable": PeftModel.from_pretrained(auto.from_pretrained(base), adapter, is_trainable=True),
    "lean": PeftModel.from_pretrained(auto.from_pretrained(base), adapter, low_cpu_mem_usage=True),
    "renamed": PeftModel.from_pretrained(auto.from_pretrained(base), adapter, adapter_name="renamed"),
    "auto": auto_peft.from_pretrained(adapter),
    "transformers": direct,
}
found = {}
for name, model in models.items():
    with torch.no_grad():
        output = model.eval()(**batch)
    found[name] = (output.logits if "logits" in output else output.last_hidden_state).contiguous()
save_file(found, "found.safetensors")
print(*sorted({type(getattr(m, "base_model", m)).__name__ for m in (models["peft"], models["auto"])}))
"""


def run_without_the_package(base, adapter, kind, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    texts = "|".join(row["text"] for row in ROWS)
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(base), str(adapter), kind, texts]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "LoraModel\n"
    return load_file(cwd / "found.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "classifier"])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True, "use_rslora": True}], ids=["lora", "dora"])
def test_it_loads_bit_for_bit_without_the_package(kind, fields, folders, tokenizer, tmp_path):
    model = generated(folders, kind, tokenizer, **fields)
    wanted = outputs(model, tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    found = run_without_the_package(folders / kind, tmp_path / "adapter", kind, tmp_path)
    for name, output in found.items():
        if name == "transformers" and (kind == "classifier" or fields):
            continue  # transformers' own loader reads neither `modules_to_save` nor DoRA's magnitudes, of any adapter
        assert torch.equal(output, wanted), name


def test_what_is_in_the_folder(folders, tokenizer, tmp_path):
    model = generated(folders, "encoder", tokenizer)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True
    assert not {"policy", "support", "init_weights"} & set(config)
    provenance = json.loads((tmp_path / "lohp_provenance.json").read_text())
    assert set(provenance) >= PROVENANCE
    assert provenance["label_names"] == ["bad", "good"]
    assert provenance["policy"] == "policy"
    assert "reason" not in provenance
    written = " ".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert not any(row["text"] in written for row in ROWS)
    assert str(folders / "policy") not in written
    head = load_file(tmp_path / "head.safetensors")
    assert torch.equal(head["weight"], model.adapter_head().weight)
    assert torch.equal(head["bias"], model.adapter_head().bias)
    assert "peft_type" not in provenance
    assert model.peft_config["default"].peft_type == "LOHP"


def test_a_classifier_is_saved_with_the_adapter(folders, tokenizer, tmp_path):
    generated(folders, "classifier", tokenizer).save_pretrained(tmp_path)
    assert not (tmp_path / "head.safetensors").exists()
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert any(name.startswith("base_model.model.classifier.") for name in weights)


def test_pushing_uploads_the_same_files(folders, tokenizer, monkeypatch):
    sent = {}

    def upload(self, working_dir, *args, **kwargs):
        sent.update({path.name: path.read_bytes() for path in Path(working_dir).iterdir()})

    hub = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    card = SimpleNamespace(save=lambda _path: None)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: card)
    monkeypatch.setattr("peft.peft_model.PeftModel._upload_modified_files", upload)
    generated(folders, "encoder", tokenizer).push_to_hub("a/b")
    assert set(sent) >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lohp_provenance.json",
        "head.safetensors",
    }
    assert json.loads(sent["adapter_config.json"])["peft_type"] == "LORA"


def test_adapters_by_name_have_their_own_folders(folders, tokenizer, tmp_path):
    model = generated(folders, "encoder", tokenizer)
    model.add_adapter("other", LoHpConfig(policy=str(folders / "policy"), task_type="FEATURE_EXTRACTION"))
    model.save_pretrained(tmp_path)
    types = {
        path.parent.name: json.loads(path.read_text())["peft_type"] for path in tmp_path.rglob("adapter_config.json")
    }
    assert types == {tmp_path.name: "LORA", "other": "LORA"}, "PEFT loads adapters of one type into a model"
    assert not (tmp_path / "other" / "head.safetensors").exists()


def test_a_plain_configuration_keeps_the_record_too(policy, folders, tokenizer, tmp_path):
    base = AutoModel.from_pretrained(folders / "encoder")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    initialize_lohp_weights(model, policy, ROWS, tokenizer=tokenizer, config=RAW)
    wanted = outputs(model, tokenizer)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "lohp_provenance.json").exists()
    assert (tmp_path / "head.safetensors").exists()
    loaded = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert torch.equal(outputs(loaded, tokenizer), wanted)


def test_turned_into_plain_lora_in_memory(folders, tokenizer, tmp_path):
    model = generated(folders, "encoder", tokenizer)
    wanted = outputs(model, tokenizer)
    model.save_pretrained(tmp_path / "before")
    with pytest.raises(ValueError, match="Cannot combine adapters"):
        model.load_adapter(tmp_path / "before", "again")
    assert to_plain_lora(model) is model
    assert type(model.base_model) is LoraModel
    assert model.peft_type is PeftType.LORA
    assert torch.equal(outputs(model, tokenizer), wanted)
    model.load_adapter(tmp_path / "before", "again")
    model.set_adapter("again")
    assert torch.equal(outputs(model, tokenizer), wanted)
    model.save_pretrained(tmp_path / "after", selected_adapters=["default"])
    names = {path.name for path in (tmp_path / "before").iterdir()}
    assert {path.name for path in (tmp_path / "after").iterdir()} == names
    with pytest.raises(TypeError, match="LoHpConfig"):
        to_plain_lora(model)


# Without a model around it


@pytest.mark.parametrize("uniform", [False, True])
def test_a_generated_adapter_saves_itself(uniform, policy, folders, tokenizer, tmp_path):
    base = AutoModel.from_pretrained(folders / "encoder").eval()
    made = generate_adapter(policy, base, tokenizer, ROWS, RAW)
    made.save_pretrained(tmp_path, base_model_name="someone/encoder", uniform=uniform)
    for name, (a, b) in read_plain_lora(tmp_path).items():
        assert torch.equal(a, made.lora[name][0])
        assert torch.equal(b, made.lora[name][1])
    assert (tmp_path / "head.safetensors").exists() is not uniform
    kind, files = check_folder(tmp_path)
    assert kind == "adapter"
    assert "README.md" in files
    in_model = generated(folders, "encoder", tokenizer)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(outputs(loaded, tokenizer), outputs(in_model, tokenizer))


def test_two_exports_are_the_same_files(policy, tokenizer, tmp_path):
    made = generate_adapter(policy, tiny.build_bert(), tokenizer, ROWS, RAW)
    for name in ("a", "b"):
        made.save_pretrained(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        if path.name != "README.md":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_an_abstention_is_exported_and_says_so(policy, tokenizer, tmp_path):
    base = tiny.build_bert()
    made = generate_adapter(policy, base, tokenizer, ROWS, RAW)
    zero = {name: (a, torch.zeros_like(b)) for name, (a, b) in made.lora.items()}
    silent = type(made)(zero, made.state * 0, made.path, made.head, made.label_names, made.report)
    with pytest.raises(ValueError, match="every update is zero"):
        silent.save_pretrained(tmp_path / "silent")
    assert not (tmp_path / "silent").exists()
    fields = {**vars(made.report), "chosen": "none", "abstained": True, "reason": "Nothing to gain."}
    stated = type(made)(zero, silent.state, made.path, made.head, made.label_names, type(made.report)(**fields))
    stated.save_pretrained(tmp_path / "stated")
    provenance = json.loads((tmp_path / "stated" / "lohp_provenance.json").read_text())
    assert provenance["reason"] == "Nothing to gain"
    loaded = PeftModel.from_pretrained(tiny.build_bert(), tmp_path / "stated")
    assert torch.equal(outputs(loaded, tokenizer), outputs(tiny.build_bert(), tokenizer))


# One rank for servers


def test_uniform_export_of_patterns(tokenizer, tmp_path):
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["query", "value", "key"],
        rank_pattern={"key": 7, "layer.0.attention.self.value": 1},
        alpha_pattern={"value": 11},
        init_lora_weights=False,
        task_type="SEQ_CLS",
    )
    model = get_peft_model(tiny.build_bert_classifier(), config)
    wanted = outputs(model, tokenizer)
    save_uniform_lora(model, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (7, 7, False)
    assert (saved["rank_pattern"], saved["alpha_pattern"], saved["modules_to_save"]) == ({}, {}, None)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(w.shape) for name, w in weights.items() if "lora_A" in name} == {(7, 16)}
    assert all("lora_" in name for name in weights)
    loaded = PeftModel.from_pretrained(tiny.build_bert_classifier(), tmp_path)
    torch.testing.assert_close(outputs(loaded, tokenizer), wanted, atol=1e-5, rtol=1e-4)


def test_what_a_uniform_lora_cannot_hold(policy, tokenizer, tmp_path):
    config = LoraConfig(target_modules=["query"], use_dora=True, init_lora_weights=False)
    with pytest.raises(ValueError, match="cannot hold adapter 'default'.*Dora"):
        save_uniform_lora(get_peft_model(tiny.build_bert(), config), tmp_path / "dora")
    embedding = get_peft_model(tiny.build_bert(), LoraConfig(target_modules=["word_embeddings"]))
    with pytest.raises(ValueError, match="cannot hold adapter 'default'.*embedding"):
        save_uniform_lora(embedding, tmp_path / "embedding")
    every = LoraConfig(target_modules=["query"], lora_bias=True, bias="all", trainable_token_indices=[5])
    with pytest.raises(ValueError, match="lora_bias=True.*bias='all'.*trainable_token_indices.*query: has lora_bias"):
        save_uniform_lora(get_peft_model(tiny.build_bert(), every), tmp_path / "options")
    fresh = get_peft_model(tiny.build_bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="every update is zero"):
        save_uniform_lora(fresh, tmp_path / "zero")
    with pytest.raises(ValueError, match="must be one of"):
        save_uniform_lora(fresh, tmp_path / "zero", "other")
    with pytest.raises(TypeError, match="PeftModel"):
        save_uniform_lora(tiny.build_bert(), tmp_path / "none")
    assert not list(tmp_path.iterdir())


def trained(config, change=""):
    """A model with this configuration, whose trained parameters named like `change` differ from their start."""
    model = get_peft_model(tiny.build_bert(), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or (change and name.endswith(change))):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "", "init_lora_weights='pissa' changes the base weights"),
        ({"init_lora_weights": "olora"}, "", "init_lora_weights='olora' changes the base weights"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "", "another base model"),
        ({"bias": "all"}, "bias", "bias='all' trains biases"),
        ({"bias": "lora_only"}, "bias", "bias='lora_only' trains biases"),
        ({"trainable_token_indices": list(range(5, 25))}, "default", "trainable_token_indices trains embeddings"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_uniform_lora_is_refused_where_it_would_compute_something_else(fields, change, message, tmp_path):
    model = trained(LoraConfig(r=2, target_modules=["query", "value"], **fields), change)
    with pytest.raises(ValueError, match=message):
        save_uniform_lora(model, tmp_path / "uniform")
    assert not list(tmp_path.iterdir())


def test_modules_saved_whole_are_refused_but_a_classifier(folders, tokenizer, tmp_path):
    embeddings = LoraConfig(
        r=2, target_modules=["query"], modules_to_save=["word_embeddings"], init_lora_weights=False
    )
    model = get_peft_model(tiny.build_bert(), embeddings)
    save_uniform_lora(model, tmp_path / "untrained")
    model.get_input_embeddings().modules_to_save["default"].weight.data += 1
    with pytest.raises(ValueError, match="word_embeddings is another than the base model's"):
        save_uniform_lora(model, tmp_path / "trained")
    assert not (tmp_path / "trained").exists()
    classifier = generated(folders, "classifier", tokenizer)
    with pytest.warns(UserWarning, match="holds no head: classifier"):
        save_uniform_lora(classifier, tmp_path / "classifier")
    assert not any("classifier" in name for name in load_file(tmp_path / "classifier" / "adapter_model.safetensors"))


def test_a_uniform_lora_finds_its_base_model(folders, tmp_path):
    base = AutoModel.from_pretrained(folders / "encoder")
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    save_uniform_lora(get_peft_model(base, config, revision="v1"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v1"
    assert type(AutoPeftModel.from_pretrained(tmp_path).get_base_model()) is type(base)


@pytest.mark.parametrize("init", ["pissa", "olora", True])
def test_a_start_that_changed_the_base_weights_survives_the_turn_into_plain_lora(init, tokenizer, tmp_path):
    model = trained(LoHpConfig(r=2, target_modules=["query", "value"], init_lora_weights=init))
    wanted = outputs(model, tokenizer)
    to_plain_lora(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == init
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny.build_bert(), tmp_path), tokenizer), wanted)


def test_everything_wrong_with_an_adapter_is_named(tmp_path):
    config = plain_lora_config("someone/tiny", ["a", "b"], 2)
    good, bad = torch.ones(2, 4), torch.full((2, 4), float("nan"))
    with pytest.raises(
        ValueError, match=r"covers \['c'\] .* lacks \['a'\].*b: A \(3, 4\).*c: values that are not finite"
    ):
        save_plain_lora(tmp_path / "x", {"b": (torch.ones(3, 4), torch.ones(4, 3)), "c": (bad, good.T)}, config)
    with pytest.raises(ValueError, match="matches no module"):
        save_plain_lora(tmp_path / "x", {}, config)
    config.use_rslora = True
    with pytest.raises(ValueError, match="neither use_rslora nor patterns"):
        save_plain_lora(tmp_path / "x", {"a": (good, good.T), "b": (good, good.T)}, config)
    assert not (tmp_path / "x").exists()


def test_an_adapter_that_changes_nothing_is_exported_where_that_is_meant(folders, tmp_path):
    model = get_peft_model(tiny.build_bert(), LoHpConfig(policy=str(folders / "policy")))
    with pytest.raises(ValueError, match="every update is zero.*pass `allow_identity=True`"):
        save_uniform_lora(model, tmp_path)
    save_uniform_lora(model, tmp_path, allow_identity=True)
    assert not any(
        tensor.any() for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items() if "_B" in name
    )


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_tensors_for_a_model_with_a_head_are_refused(task_type, policy, tokenizer):
    """They would be loaded without a word and change nothing."""
    made = generate_adapter(policy, tiny.build_bert(), tokenizer, ROWS, RAW)
    with pytest.raises(ValueError, match=f"`task_type` is '{task_type}', but this adapter names modules"):
        made.to_tensors(task_type=task_type)


def test_a_head_of_before_does_not_stay(tmp_path):
    head = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    GenerationRecord({"seed": 0}, head).write(tmp_path)
    assert (tmp_path / "head.safetensors").exists()
    GenerationRecord({"seed": 1}).write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"lohp_provenance.json"}


def test_a_plain_adapter_without_a_record_leaves_none_of_before(policy, tokenizer, tmp_path):
    made = generate_adapter(policy, tiny.build_bert(), tokenizer, ROWS, RAW)
    made.save_pretrained(tmp_path)
    names = [spec.name for spec in policy.layout.modules]
    save_plain_lora(tmp_path, made.lora, plain_lora_config("someone/tiny", names, 2))
    assert not RECORD & {path.name for path in tmp_path.iterdir()}


# What the record tells of


def recorded(folder):
    """What a folder tells of a generation: all, that the weights have changed since, or nothing."""
    found = RECORD & {path.name for path in folder.iterdir()}
    if not found:
        return "nothing"
    changed = json.loads((folder / "lohp_provenance.json").read_text()).get("weights_changed", False)
    assert found == ({"lohp_provenance.json"} if changed else RECORD)
    return "changed" if changed else "all"


def saved(model, folder):
    model.save_pretrained(folder)
    return recorded(folder)


def step(model, tokenizer):
    batch = tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()(**batch).last_hidden_state.square().mean().backward()
    optimizer.step()


def through_data(model, _tokenizer):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 1e-4


def only_a_magnitude(model, _tokenizer):
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.01)


@pytest.mark.parametrize(
    ("change", "fields"),
    [(step, {}), (through_data, {}), (step, {"use_dora": True}), (only_a_magnitude, {"use_dora": True})],
    ids=["one step", "data", "dora", "magnitude"],
)
def test_training_further_is_told_and_leaves_the_head_out(change, fields, folders, tokenizer, tmp_path):
    model = generated(folders, "encoder", tokenizer, **fields)
    assert saved(model, tmp_path) == "all"
    change(model, tokenizer)
    assert saved(model, tmp_path) == "changed"
    card = adapter_card_of(tmp_path)
    assert "have changed since" in card
    assert "forward-only" not in card
    model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    assert saved(model, tmp_path) == "all"


def test_training_as_a_plain_lora_beside_the_record_is_told(folders, tokenizer, tmp_path):
    """What is loaded again is a `LoraConfig`, which knows nothing of the record in the folder that it is saved into."""
    generated(folders, "encoder", tokenizer).save_pretrained(tmp_path)
    assert not tells_of_other_weights(tmp_path)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folders / "encoder"), tmp_path, is_trainable=True)
    model.save_pretrained(tmp_path)
    assert not tells_of_other_weights(tmp_path)
    step(model, tokenizer)
    model.save_pretrained(tmp_path)
    assert tells_of_other_weights(tmp_path)
    card = adapter_card_of(tmp_path)
    assert "have changed since" in card
    assert "head.safetensors" not in card
    with pytest.raises(
        ValueError, match="weights have changed since these heads were solved; remove them: .*head.saf"
    ):
        check_folder(tmp_path)
    (tmp_path / "head.safetensors").unlink()
    named = json.loads((tmp_path / "adapter_config.json").read_text()) | {"base_model_name_or_path": "someone/tiny"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(named))
    (tmp_path / "README.md").unlink()
    assert "head.safetensors" not in check_folder(tmp_path)[1]


def test_an_adapter_of_transformers_own_keeps_its_record(folders, tokenizer, tmp_path):
    """Its configuration is saved before its weights: there are none yet, or those of an adapter of before."""
    rows = tmp_path / "support.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    model, out = AutoModel.from_pretrained(folders / "encoder"), tmp_path / "adapter"
    fields = {"policy": str(folders / "policy"), "support": str(rows), "task_type": "FEATURE_EXTRACTION"}
    model.add_adapter(LoHpConfig(**fields))
    for _ in range(2):
        model.save_pretrained(out)
        assert recorded(out) == "all"
        assert not tells_of_other_weights(out)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(1.0)
    model.save_pretrained(out)
    assert tells_of_other_weights(out)
    assert "have changed since" in adapter_card_of(out)


def test_weights_that_cannot_be_compared_leave_no_record_and_say_so(folders, tokenizer, tmp_path):
    with pytest.warns(UserWarning, match="Neither head nor provenance is saved in .*safe_serialization=True"):
        generated(folders, "encoder", tokenizer).save_pretrained(tmp_path, safe_serialization=False)
    assert recorded(tmp_path) == "nothing"


def test_a_classifier_that_was_trained_is_told(folders, tokenizer, tmp_path):
    model = generated(folders, "classifier", tokenizer)
    model.save_pretrained(tmp_path)
    assert "weights_changed" not in json.loads((tmp_path / "lohp_provenance.json").read_text())
    model.get_base_model().classifier.modules_to_save["default"].weight.data.mul_(1.1)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "lohp_provenance.json").read_text())["weights_changed"] is True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_does_not_change_the_weights_keeps_the_record(dtype, folders, tokenizer, tmp_path):
    model = generated(folders, "encoder", tokenizer)
    model.load_state_dict(model.state_dict())
    model.merge_adapter()
    model.unmerge_adapter()
    assert saved(model, tmp_path / "merged") == "all"
    for name, other in {"copied": copy.deepcopy(model), "pickled": pickle.loads(pickle.dumps(model))}.items():
        assert saved(other, tmp_path / name) == "all"
        step(other, tokenizer)
        assert saved(other, tmp_path / name) == "changed"
    assert saved(model.to(dtype), tmp_path / "cast") == "all"
    assert saved(model.float(), tmp_path / "back") == "all"
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert saved(model, tmp_path / "replaced") == "all"


def test_other_weights_loaded_over_it_are_told(folders, tokenizer, tmp_path):
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(tiny.build_bert(), config).save_pretrained(tmp_path / "other")
    model = generated(folders, "encoder", tokenizer)
    model.load_adapter(tmp_path / "other", "default")
    assert saved(model, tmp_path / "mixed") == "changed"


@pytest.mark.parametrize("plain", [False, True])
def test_a_configuration_used_again_takes_no_record_along(plain, folders, tokenizer, tmp_path):
    model = generated(folders, "encoder", tokenizer)
    model = to_plain_lora(model) if plain else model
    config = model.peft_config["default"]
    model.add_adapter("b", config)
    assert saved(get_peft_model(tiny.build_bert(), config), tmp_path / "fresh") == "nothing"
    assert saved(model, tmp_path / "both") == "all"
    assert recorded(tmp_path / "both" / "b") == "nothing"


def test_an_adapter_without_a_record_leaves_none_of_before(folders, tokenizer, tmp_path):
    assert saved(generated(folders, "encoder", tokenizer), tmp_path) == "all"
    fresh = get_peft_model(AutoModel.from_pretrained(folders / "encoder"), LoHpConfig(policy=str(folders / "policy")))
    assert saved(fresh, tmp_path) == "nothing"
    assert saved(generated(folders, "encoder", tokenizer), tmp_path) == "all"
    RecordedLoraConfig(target_modules=["query"]).save_pretrained(tmp_path)
    assert recorded(tmp_path) == "nothing"


def test_public_names_are_sorted_and_documented():
    assert lohp_peft.__all__ == sorted(lohp_peft.__all__)
    assert set(lohp_peft.__all__) <= set(dir(lohp_peft))


# Folders of before


@pytest.mark.parametrize("save", ["lohp", "uniform"])
def test_a_head_of_somebody_else_stays(save, tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"mine")
    config = (LoHpConfig if save == "lohp" else LoraConfig)(target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(tiny.build_bert(), config)
    model.save_pretrained(tmp_path) if save == "lohp" else save_uniform_lora(model, tmp_path)
    assert (tmp_path / "head.safetensors").read_bytes() == b"mine"


def test_a_save_that_fails_leaves_no_head_of_before(folders, tokenizer, tmp_path, monkeypatch):
    generated(folders, "encoder", tokenizer).save_pretrained(tmp_path)
    write = lohp_peft.adapters.export.write_atomically

    def fail_at_head(path, data):
        if path.name == "head.safetensors":
            raise OSError("disk full")
        write(path, data)

    monkeypatch.setattr("lohp_peft.adapters.export.write_atomically", fail_at_head)
    model = get_peft_model(tiny.build_bert(), LoHpConfig(policy=str(folders / "policy")))
    model.generate_adapter(tiny.build_rows(3), tokenizer=tokenizer, config=RAW)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "head.safetensors").exists()


def test_weights_never_lie_under_the_scaling_of_others(policy, tokenizer, tmp_path, monkeypatch):
    config = LoraConfig(r=2, lora_alpha=64, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(tiny.build_bert(), config).save_pretrained(tmp_path)
    made = generate_adapter(policy, tiny.build_bert(), tokenizer, ROWS, RAW)
    monkeypatch.setattr(LoraConfig, "save_pretrained", lambda *_, **__: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        made.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()


def test_the_scaling_of_the_moment_is_not_generated_for(folders, tokenizer):
    model = get_peft_model(tiny.build_bert(), LoHpConfig(policy=str(folders / "policy")))
    with (
        rescale_adapter_scale(model, 0.5),
        pytest.raises(ValueError, match="query: its scaling is 0.5 .* 1 by its configuration; restore it first"),
    ):
        model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)


def test_adapters_of_one_model_are_saved_in_one_type(folders, tokenizer, tmp_path):
    config = LoHpConfig(policy=str(folders / "policy"))
    model = get_peft_model(tiny.build_bert(), config)
    model.add_adapter("before", config)
    model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    model.add_adapter("after", config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build_bert(), tmp_path)
    for name in ("before", "after"):
        loaded.load_adapter(tmp_path / name, name)
    assert loaded.peft_type == PeftType.LORA
    assert not RECORD & {path.name for path in (tmp_path / "before").iterdir()}
    get_peft_model(tiny.build_bert(), config).save_pretrained(tmp_path / "other")
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["peft_type"] == "LOHP"


@pytest.mark.parametrize("dora", [False, True])
def test_a_head_in_double_precision_is_kept(dora, tokenizer, tmp_path):
    base = tiny.build_bert().double()
    tiny.build_policy(base).save_pretrained(tmp_path / "policy")
    model = get_peft_model(base, LoHpConfig(policy=str(tmp_path / "policy"), use_dora=dora))
    model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= RECORD
    assert "weights_changed" not in json.loads((tmp_path / "adapter" / "lohp_provenance.json").read_text())


def test_a_start_from_the_base_weights_is_turned_into_one_of_zeros(tokenizer, tmp_path):
    """As with LoRA: saved as the difference to its start, so that the base weights are those that everybody has."""
    model = get_peft_model(tiny.build_bert(), LoHpConfig(r=2, target_modules=["query"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    wanted = outputs(model, tokenizer)
    model.save_pretrained(tmp_path / "turned", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = PeftModel.from_pretrained(tiny.build_bert(), tmp_path / "turned")
    torch.testing.assert_close(outputs(loaded, tokenizer), wanted, atol=1e-4, rtol=1e-4)
