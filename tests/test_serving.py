"""Uniform adapters against the rules of the servers that load them, and what PEFT does with generated adapters in memory.

The rules are read from the sources of vLLM (`vllm/lora/peft_helper.py`, `lora_model.py`, `utils.py`, `vllm/config/lora.py`)
and SGLang (`python/sglang/srt/lora/lora_config.py`, `lora.py`, `mem_pool.py`, `utils.py`); neither server is installed here.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaModel

import tiny_world as tiny
from lohp_peft import GenerationConfig, LoHpConfig, generate_adapters, save_uniform_lora, to_plain_lora

RAW = GenerationConfig(choose=False)
TASKS = ("mood", "topic", "urgency")
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM: config/lora.py, MaxLoRARanks


def vllm_problems(config, tensors, expected_modules, max_lora_rank=16):
    """Why vLLM would not load an adapter, or would load something else than PEFT does.

    Args:
        config: `adapter_config.json`.
        tensors: By key.
        expected_modules: Last parts of the names of the server's linear layers.
        max_lora_rank: `--max-lora-rank`, 16 unless set.
    """
    problems = []
    # PEFTHelper: three fields have no default
    problems += [f"{name} is missing" for name in ("r", "lora_alpha", "target_modules") if config.get(name) is None]
    # PEFTHelper._validate_features and validate_legal
    if config.get("modules_to_save"):
        problems.append("modules_to_save must be None")
    if config.get("use_dora"):
        problems.append("DoRA is not supported")
    if config["r"] > max_lora_rank:
        problems.append(f"rank {config['r']} is greater than max_lora_rank {max_lora_rank}")
    if config.get("bias", "none") != "none":
        problems.append("bias must be none")
    # PEFTHelper.__post_init__: one scaling for all layers, of r and lora_alpha; patterns are no fields of it
    problems += [f"{name} would be ignored" for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    for key, tensor in tensors.items():
        # utils.parse_fine_tuned_lora_name: the prefix, the module, then lora_A.weight or lora_B.weight and nothing else
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            problems.append(f"{key} is unsupported LoRA weight")
            continue
        # LoRAModel.from_local_checkpoint, check_unexpected_modules: by the last part of the module's name
        if match[1].rsplit(".", 1)[-1] not in expected_modules:
            problems.append(f"{match[1]} is not among the expected target modules")
        # LoRALayerWeights: lora_a (rank, in), lora_b (out, rank), copied into buffers of that rank
        if tensor.shape[0 if match[2] == "A" else 1] != config["r"]:
            problems.append(f"{key} has shape {tuple(tensor.shape)}, but r is {config['r']}")
    return problems


def sglang_problems(config, tensors, num_layers, target_modules, max_lora_rank=16):
    """Why SGLang would not load an adapter, or would load something else than PEFT does.

    Args:
        config: `adapter_config.json`.
        tensors: By key.
        num_layers: Layers of the base model.
        target_modules: `--lora-target-modules`, last parts of names.
        max_lora_rank: `--max-lora-rank`.
    """
    problems = []
    # LoRAAdapter.__init__
    if str(config["peft_type"]).lower() != "lora":
        problems.append("peft_type must be LORA")
    # LoRAManager.validate_new_adapter
    if config.get("use_dora"):
        problems.append("DoRA is not supported")
    # LoRAMemoryPool.can_support: the rank, and the names of the targets
    if config["r"] > max_lora_rank:
        problems.append(f"rank {config['r']} does not fit the memory pool's {max_lora_rank}")
    # utils.get_normalized_target_modules: a string is all-linear or an error, a list counts by the last parts
    if isinstance(config["target_modules"], str):
        problems.append("target_modules must be a list")
    else:
        foreign = {name.split(".")[-1] for name in config["target_modules"]} - set(target_modules)
        problems += [f"{name} is not among the target modules" for name in sorted(foreign)]
    # LoRAAdapter: scaling = lora_alpha / r for all layers, whatever use_rslora says
    problems += [f"{name} is ignored" for name in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(name)]
    seen = {}
    for key, tensor in tensors.items():
        # LoRAAdapter.initialize_weights: the layer by this expression
        layer = re.search(r"layers\.(\d+)\.", key)
        if layer is None or int(layer[1]) >= num_layers:
            problems.append(f"{key} is in no layer")
        elif not re.search(r"\.lora_[AB]\.weight$", key):
            problems.append(f"{key} is neither lora_A nor lora_B")
        else:
            kind, side = key.split(".")[-3], key.split(".")[-2]
            seen.setdefault((layer[1], side), {})[kind] = tensor
    for (layer, side), found in seen.items():
        # normalize_qkv_proj: q and v together, k may lack and is taken as zeros of the shape of v
        if {"q_proj", "k_proj", "v_proj"} & set(found) and not {"q_proj", "v_proj"} <= set(found):
            problems.append(f"layer {layer}: {side} of q_proj and v_proj must both be there, got {sorted(found)}")
        ranks = {tensor.shape[0 if side == "lora_A" else 1] for tensor in found.values()}
        if ranks != {config["r"]}:
            problems.append(f"layer {layer}: {side} of ranks {sorted(ranks)}, but r is {config['r']}")
    return problems


def read(folder):
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    return config, load_file(Path(folder) / "adapter_model.safetensors")


def largest(one, other):
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


@pytest.fixture(scope="module")
def policy():
    return tiny.build_policy(tiny.build_llama(LlamaModel))


@pytest.fixture(scope="module")
def adapters(policy, tokenizer):
    """Three generated adapters, by task."""
    supports = [tiny.build_rows(n, seed=seed) for seed, n in enumerate((2, 3, 2))]
    made = generate_adapters(policy, tiny.build_llama(LlamaModel), tokenizer, supports, RAW)
    return dict(zip(TASKS, made, strict=True))


@pytest.fixture(scope="module")
def folders(adapters, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for task, made in adapters.items():
        made.save_pretrained(root / task, base_model_name="someone/tiny", uniform=True)
    return root


@pytest.fixture
def batch(tokenizer):
    return tokenizer([row["text"] for row in tiny.build_rows()], padding=True, return_tensors="pt")


@pytest.fixture
def run(batch):
    def run(model):
        with torch.no_grad():
            return model.eval()(**batch).last_hidden_state

    return run


@pytest.fixture
def alone(folders, run):
    """What each adapter gives on its own."""
    found = {}
    for task in TASKS:
        found[task] = run(PeftModel.from_pretrained(tiny.build_llama(LlamaModel), folders / task))
    base = run(tiny.build_llama(LlamaModel))
    assert min(largest(output, base) for output in found.values()) > 1e-2, (
        "the adapters do too little to be told apart"
    )
    return found


def several(folders):
    model = PeftModel.from_pretrained(tiny.build_llama(LlamaModel), folders / TASKS[0], adapter_name=TASKS[0])
    for task in TASKS[1:]:
        model.load_adapter(folders / task, adapter_name=task)
    return model


# The servers' rules

SERVED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_generated_adapters_follow_the_rules(folders):
    for task in TASKS:
        config, tensors = read(folders / task)
        assert vllm_problems(config, tensors, SERVED) == []
        assert sglang_problems(config, tensors, num_layers=2, target_modules=SERVED) == []
        assert config["lora_alpha"] / config["r"] == 1
        assert not (folders / task / "head.safetensors").exists()


def test_a_language_models_adapter_follows_the_rules(policy, tokenizer, tmp_path):
    """Generated through the model that is served, whose names have one part more; the output is the same."""
    policy.save_pretrained(tmp_path / "policy")
    base = tiny.build_llama(LlamaForCausalLM)
    model = get_peft_model(base, LoHpConfig(policy=str(tmp_path / "policy"), task_type="CAUSAL_LM"))
    model.generate_adapter(tiny.build_rows(), tokenizer=tokenizer, config=RAW)
    save_uniform_lora(model, tmp_path / "uniform")
    config, tensors = read(tmp_path / "uniform")
    assert vllm_problems(config, tensors, SERVED) == []
    assert sglang_problems(config, tensors, num_layers=2, target_modules=SERVED) == []
    assert all(key.startswith("base_model.model.model.layers.") for key in tensors)
    words = tokenizer("good1 word2 word3", return_tensors="pt")
    loaded = PeftModel.from_pretrained(tiny.build_llama(LlamaForCausalLM), tmp_path / "uniform")
    with torch.no_grad():
        assert torch.equal(loaded(**words).logits, model.eval()(**words).logits)


def test_a_uniform_export_repairs_what_the_rules_forbid(tmp_path, batch):
    """Ranks, scalings and a head that no server would take as they are; stated: at most 1e-5 apart."""
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 7},
        alpha_pattern={"q_proj": 11},
        modules_to_save=["score"],
        init_lora_weights=False,
        task_type="SEQ_CLS",
    )
    model = get_peft_model(tiny.build_llama_classifier(), config).eval()
    model.save_pretrained(tmp_path / "as-it-is")
    before = vllm_problems(*read(tmp_path / "as-it-is"), SERVED)
    assert (
        len([p for p in before if "modules_to_save" in p or "ignored" in p or "unsupported" in p or "shape" in p]) > 4
    )
    assert len(sglang_problems(*read(tmp_path / "as-it-is"), num_layers=2, target_modules=SERVED)) > 4
    save_uniform_lora(model, tmp_path / "uniform")
    assert vllm_problems(*read(tmp_path / "uniform"), SERVED) == []
    assert sglang_problems(*read(tmp_path / "uniform"), num_layers=2, target_modules=SERVED) == []
    loaded = PeftModel.from_pretrained(tiny.build_llama_classifier(), tmp_path / "uniform").eval()
    hidden = [m.base_model.model.model(**batch).last_hidden_state for m in (model, loaded)]
    assert largest(*hidden) < 1e-5


@pytest.mark.parametrize(
    ("change", "of_vllm", "of_sglang"),
    [
        ({"r": 64, "lora_alpha": 64}, "rank 64 is greater than max_lora_rank 16", "rank 64 does not fit"),
        ({"modules_to_save": ["score"]}, "modules_to_save", None),
        ({"use_dora": True}, "DoRA", "DoRA"),
        ({"bias": "all"}, "bias", None),
        ({"use_rslora": True}, None, "use_rslora is ignored"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern would be ignored", "rank_pattern is ignored"),
        ({"target_modules": ".*q_proj"}, None, "must be a list"),
        ({"target_modules": None}, "target_modules is missing", None),
        ({"peft_type": "LOHP"}, None, "peft_type must be LORA"),
    ],
)
def test_the_checkers_notice(folders, change, of_vllm, of_sglang):
    config, tensors = read(folders / TASKS[0])
    found = "; ".join(vllm_problems({**config, **change}, tensors, SERVED))
    assert of_vllm in found if of_vllm else not found
    if of_sglang:
        assert of_sglang in "; ".join(sglang_problems({**config, **change}, tensors, 2, SERVED))


def test_the_checkers_notice_keys(folders):
    config, tensors = read(folders / TASKS[0])
    key = next(name for name in tensors if "layers.0" in name and "v_proj.lora_A" in name)
    spoiled = {
        **tensors,
        key.replace("lora_A", "lora_A.default"): tensors[key],
        "base_model.model.score.weight": tensors[key],
    }
    assert len(vllm_problems(config, spoiled, SERVED)) == len(sglang_problems(config, spoiled, 2, SERVED)) == 2
    del spoiled[key]
    assert any("must both be there" in problem for problem in sglang_problems(config, spoiled, 2, SERVED))
    assert any("expected target modules" in problem for problem in vllm_problems(config, tensors, SERVED - {"q_proj"}))
    assert any("target modules" in problem for problem in sglang_problems(config, tensors, 2, SERVED - {"q_proj"}))


def test_there_is_a_rank_limit_for_it(folders):
    """vLLM's buffers have one of a few ranks; the smallest that holds the adapter wastes least."""
    config, tensors = read(folders / TASKS[0])
    limit = min(rank for rank in MAX_LORA_RANKS if rank >= config["r"])
    assert vllm_problems(config, tensors, SERVED, limit) == []


# Tensors in memory


def test_tensors_in_memory_are_those_of_the_folder(adapters, folders):
    """For a server's calls that take a configuration and tensors: no folder is needed."""
    for task, made in adapters.items():
        config, tensors = made.to_tensors()
        saved_config, saved = read(folders / task)
        assert json.loads(json.dumps(config)) == saved_config
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensors[key], saved[key]) for key in saved)
        assert vllm_problems(config, tensors, SERVED) == []
        assert sglang_problems(config, tensors, num_layers=2, target_modules=SERVED) == []


def test_tensors_in_memory_load(adapters, run, alone):
    for task, made in adapters.items():
        config, tensors = made.to_tensors()
        model = get_peft_model(tiny.build_llama(LlamaModel), LoraConfig.from_peft_type(**config))
        assert get_peft_model_state_dict(model).keys() == tensors.keys()
        set_peft_model_state_dict(model, tensors)
        assert torch.equal(run(model), alone[task])


# Many adapters in one model


def test_switching_gives_what_each_gives_alone(folders, run, alone):
    model = several(folders)
    for task in (*TASKS, *reversed(TASKS)):
        model.set_adapter(task)
        assert torch.equal(run(model), alone[task])
    with model.disable_adapter():
        assert torch.equal(run(model), run(tiny.build_llama(LlamaModel)))
    model.delete_adapter(TASKS[0])
    model.set_adapter(TASKS[1])
    assert torch.equal(run(model), alone[TASKS[1]])


def test_a_mixed_batch_gives_what_each_gives_alone(folders, batch, alone):
    model = several(folders).eval()
    names = [TASKS[i % 3] for i in range(len(batch["input_ids"]))]
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).last_hidden_state
    for i, task in enumerate(names):
        assert largest(mixed[i], alone[task][i]) < 1e-6


def test_hot_swap_gives_what_each_gives_alone(adapters, folders, run, alone):
    model = PeftModel.from_pretrained(tiny.build_llama(LlamaModel), folders / TASKS[0])
    assert torch.equal(run(model), alone[TASKS[0]])
    for task in (*TASKS[1:], *TASKS):
        hotswap_adapter(model, str(folders / task), adapter_name="default", torch_device="cpu")
        assert torch.equal(run(model), alone[task])
    config, tensors = adapters[TASKS[1]].to_tensors()
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
    hotswap_adapter_from_state_dict(model, named, adapter_name="default", config=LoraConfig.from_peft_type(**config))
    assert torch.equal(run(model), alone[TASKS[1]])


def deltas(model, adapter):
    """The update of every module, in double precision."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and adapter in layer.lora_A:
            a, b = (side[adapter].weight.detach().double() for side in (layer.lora_A, layer.lora_B))
            found[name] = layer.scaling[adapter] * b @ a
    return found


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("cat", 1e-6), ("svd", 1e-5)],
)
def test_weighted_adapters_are_the_weighted_sum(folders, kind, limit):
    """`cat` of any adapters and `svd` at the sum of the ranks lose nothing but rounding."""
    model = several(folders)
    weights = [0.5, 0.3, -0.2]
    rank = {"svd_rank": 6} if kind == "svd" else {}
    model.add_weighted_adapter(list(TASKS), weights, "sum", combination_type=kind, **rank)
    parts = [deltas(model, task) for task in TASKS]
    for name, found in deltas(model, "sum").items():
        wanted = sum(weight * part[name] for weight, part in zip(weights, parts, strict=True))
        assert largest(found, wanted) < limit


def test_linear_combinations_average_the_factors(folders):
    """What PEFT's `linear` is: with weights w the factors are sums of sqrt(w) A and sqrt(w) B, so B A has cross terms."""
    model = several(folders)
    model.add_weighted_adapter([TASKS[0]], [0.49], "part", combination_type="linear")
    for name, found in deltas(model, "part").items():
        assert largest(found, 0.49 * deltas(model, TASKS[0])[name]) < 1e-6
    model.add_weighted_adapter(list(TASKS[:2]), [0.5, 0.5], "both", combination_type="linear")
    apart = [
        largest(delta, sum(0.5 * deltas(model, t)[name] for t in TASKS[:2]))
        for name, delta in deltas(model, "both").items()
    ]
    assert max(apart) > 1e-3, "PEFT's linear has become exact; say so"


def test_a_weighted_adapter_is_served_like_any_other(folders, tmp_path, run):
    model = several(folders)
    model.add_weighted_adapter(list(TASKS), [0.5, 0.3, -0.2], "sum", combination_type="cat")
    model.set_adapter("sum")
    save_uniform_lora(model, tmp_path / "sum", "sum")
    config, tensors = read(tmp_path / "sum")
    assert config["r"] == 6
    assert vllm_problems(config, tensors, SERVED) == []
    assert sglang_problems(config, tensors, 2, SERVED) == []
    loaded = PeftModel.from_pretrained(tiny.build_llama(LlamaModel), tmp_path / "sum")
    assert largest(run(loaded), run(model)) < 1e-6


def test_a_weighted_adapter_of_models_with_the_method(policy, tokenizer, tmp_path, run):
    """In a model whose adapters were generated in place, before and after it becomes plain LoRA."""
    policy.save_pretrained(tmp_path / "policy")
    config = LoHpConfig(policy=str(tmp_path / "policy"), task_type="FEATURE_EXTRACTION")
    model = get_peft_model(tiny.build_llama(LlamaModel), config, adapter_name="one")
    model.add_adapter("two", config)
    for seed, name in enumerate(("one", "two")):
        model.generate_adapter(tiny.build_rows(seed=seed), tokenizer=tokenizer, adapter_name=name, config=RAW)
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    wanted = run(model)
    save_uniform_lora(to_plain_lora(model), tmp_path / "sum", "sum")
    assert torch.equal(run(model), wanted)
    loaded = PeftModel.from_pretrained(tiny.build_llama(LlamaModel), tmp_path / "sum")
    assert largest(run(loaded), wanted) < 1e-6


# Merging


def test_merging_and_back(folders, run, alone):
    """Merged: at most 1e-5 apart from the adapter beside the weights; unmerged: the base weights to 1e-6."""
    model = several(folders)
    before = {
        name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items() if "base_layer" in name
    }
    for task in TASKS:
        model.set_adapter(task)
        model.merge_adapter()
        assert largest(run(model), alone[task]) < 1e-5
        model.unmerge_adapter()
        assert largest(run(model), alone[task]) < 1e-5
    after = model.get_base_model().state_dict()
    assert max(largest(after[name], tensor) for name, tensor in before.items()) < 1e-6


def test_a_merged_model_needs_no_peft(folders, run, alone, tmp_path):
    model = PeftModel.from_pretrained(tiny.build_llama(LlamaModel), folders / TASKS[0])
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path / "merged")
    loaded = LlamaModel.from_pretrained(tmp_path / "merged")
    assert type(merged) is LlamaModel
    assert torch.equal(run(loaded), run(merged))
    assert largest(run(loaded), alone[TASKS[0]]) < 1e-5


def test_a_round_trip_over_all_of_it_loses_nothing(adapters, folders, tmp_path):
    """Folder, model, uniform export, hot swap, combination of one, uniform export again: the same bits."""
    made = adapters[TASKS[0]]
    model = PeftModel.from_pretrained(tiny.build_llama(LlamaModel), folders / TASKS[1])
    hotswap_adapter(model, str(folders / TASKS[0]), adapter_name="default", torch_device="cpu")
    save_uniform_lora(model, tmp_path / "first")
    model = PeftModel.from_pretrained(tiny.build_llama(LlamaModel), tmp_path / "first")
    model.add_weighted_adapter(["default"], [1.0], "copy", combination_type="cat")
    save_uniform_lora(model, tmp_path / "second", "copy")
    _, tensors = read(tmp_path / "second")
    for name, (a, b) in made.lora.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], a)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], b)
