"""A table of bad inputs: each gets a clear error of the promised kind, and nothing on the disk is changed by the attempt."""

import re
from dataclasses import dataclass

import pytest
import torch

from abuse.damage import (
    DEEP,
    HUGE,
    LONG_HEADER,
    OVERFLOWING,
    PICKLE,
    STRANGE_TYPE,
    Damage,
    both,
    cut,
    edit,
    fill,
    first,
    flip,
    in_manifest,
    link,
    put,
    remove,
    renamed,
    tensors,
)
from abuse.world import COMMANDS, READ, content_of


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        name: What is bad.
        damage: How the good world is made bad.
        call: What is called then, a name in `READ` or `COMMANDS`.
        words: Regular expression that the message must match.
        error: Exactly the type of the error.
        keeps: Another call that must still work.
    """

    name: str
    damage: Damage
    call: str
    words: str
    error: type[Exception] = ValueError
    keeps: str | None = None


MANIFEST, SPACE, SHARD = "store/manifest.json", "store/weight_space.safetensors", "store/shards/spam-*"
CONFIG, WEIGHTS = "policy/config.json", "policy/model.safetensors"
BASES, REFERENCE = "policy/space.safetensors", "policy/reference_set.safetensors"
ADAPTER, LORA = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
STATE, TRAINED = "trained/checkpoint/state.json", "trained/checkpoint/state-4.safetensors"
PART = "snapshots/part-000001.safetensors"
REST = "rest of store"
TWO_ROWS = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'


def shard_of(**entries):
    return edit(MANIFEST, lambda manifest: manifest["shards"]["spam"].update(entries))


def run_of(**entries):
    return edit(MANIFEST, lambda manifest: manifest["shards"]["spam"]["trajectories"][0].update(entries))


def module_of(file, **entries):
    return edit(file, lambda content: content["layout"]["modules"][0].update(entries))


def agreeing(change):
    return in_manifest(tensors(SHARD, change), SHARD, "spam")


def agreeing_space(change):
    return in_manifest(tensors(SPACE, change), SPACE)


def to(dtype):
    return lambda x: x.to(dtype)


def with_nan(x):
    x.view(-1)[0] = torch.nan
    return x


def with_infinity(x):
    x.view(-1)[0] = torch.inf
    return x


STORE_CASES = [
    Case("manifest missing", remove(MANIFEST), "store", "holds no trajectories", FileNotFoundError),
    Case("manifest empty", fill(MANIFEST, ""), "store", "manifest.json is damaged, it is not JSON"),
    Case("manifest cut", cut(MANIFEST), "store", "manifest.json is damaged, it is not JSON"),
    Case("manifest is no object", fill(MANIFEST, "[1]"), "store", "no JSON object but a list"),
    Case("manifest nested deeply", fill(MANIFEST, DEEP), "store", "manifest.json is damaged.*nested too deeply"),
    Case("manifest not UTF-8", fill(MANIFEST, b'{"format": "\xff"}'), "store", "manifest.json is damaged.*utf-8"),
    Case("manifest names a key twice", fill(MANIFEST, '{"shards": {}, "shards": {}}'), "store", "repeated: .'shards'"),
    Case("manifest of another format", put(MANIFEST, format="other"), "store", "'format' must be"),
    Case("manifest of the future", put(MANIFEST, schema_version=99), "store", "schema version 99.*Upgrade"),
    Case("manifest of version true", put(MANIFEST, schema_version=True), "store", "'schema_version' must be a whole"),
    Case("manifest of wrong types", put(MANIFEST, space_r="2", shards=[]), "store", "'space_r'.*int.*'shards'.*dict"),
    Case("manifest with a path upwards", shard_of(file="../../spam"), "store", "relative path inside the folder"),
    Case("manifest with an absolute path", put(MANIFEST, space_file="/etc/passwd"), "store", "relative path inside"),
    Case("shard is a link out", link(SHARD, "elsewhere"), "store", "'spam'.*link that leads out", keeps=REST),
    Case("bases are a link out", link(SPACE, "elsewhere"), "store", "link that leads out"),
    Case("metrics are no names", run_of(metrics=[{}]), "store", "'metrics'.*must name its metrics"),
    Case("module described wrongly", module_of(MANIFEST, d_in="16"), "store", "damaged.*module 0"),
    Case("module of a huge size", module_of(MANIFEST, d_out=10**15), "store", "damaged.*1..1048576"),
    Case("no module", put(MANIFEST, layout={"modules": []}), "store", "must list its target modules"),
    Case(
        "module named twice",
        edit(MANIFEST, lambda manifest: manifest["layout"]["modules"].append(manifest["layout"]["modules"][0])),
        "store",
        "name a module once",
    ),
    Case("bases missing", remove(SPACE), "store", "weight_space.safetensors is missing"),
    Case("bases with a flipped bit", flip(SPACE), "store", "damaged: its checksum"),
    Case("bases in float64", agreeing_space(first(to(torch.float64))), "store", "input.0 is torch.float64"),
    Case("bases of integers", agreeing_space(first(to(torch.int64))), "store", "input.0 is torch.int64"),
    Case("bases with NaN", agreeing_space(first(with_nan)), "store", "not orthonormal"),
    Case(
        "bases with one too many", agreeing_space(lambda old: {**old, "x": torch.ones(1)}), "store", "x belongs to no"
    ),
    Case("bases of another shape", agreeing_space(first(lambda x: x[1:])), "store", r"shape \(15, 2\), expected \(16"),
    Case("shard missing", remove(SHARD), "store", "'spam'.*is missing", keeps=REST),
    Case("shard empty", fill(SHARD, b""), "store", "'spam'.*damaged: its SHA-256", keeps=REST),
    Case("shard cut", cut(SHARD), "store", "'spam'.*damaged: its SHA-256", keeps=REST),
    Case("shard with a flipped bit", flip(SHARD), "store", "'spam'.*damaged: its SHA-256", keeps=REST),
    Case(
        "shard is a pickle", in_manifest(fill(SHARD, PICKLE), SHARD, "spam"), "store", "not a safetensors", keeps=REST
    ),
    Case("shard declares terabytes", in_manifest(fill(SHARD, HUGE), SHARD, "spam"), "store", "not a safe", keeps=REST),
    Case("shard of a type unknown", in_manifest(fill(SHARD, STRANGE_TYPE), SHARD, "spam"), "store", "of known types"),
    Case(
        "shard of another store",
        in_manifest(tensors(SHARD, dict, dataset_id="another"), SHARD, "spam"),
        "store",
        "foreign: it was written as 'spam' of folder 'another'",
        keeps=REST,
    ),
    Case("a stranger among shards", fill("store/shards/x.safetensors", PICKLE), "store", "foreign", keeps=REST),
    Case(
        "states in bfloat16", agreeing(first(to(torch.bfloat16), "states")), "store", "must be float32.*got bfloat16"
    ),
    Case("states in float64", agreeing(first(to(torch.float64), "states")), "store", "must be float32.*got float64"),
    Case("states with NaN", agreeing(first(with_nan, "states")), "store", "NaN or infinite", keeps=REST),
    Case("losses infinite", agreeing(first(with_infinity, "losses")), "store", "got infinities", keeps=REST),
    Case("states of another width", agreeing(first(lambda x: x[..., 1:], "states")), "store", "of shape", keeps=REST),
    Case("a tensor renamed", agreeing(renamed), "store", "tensors missing .* unexpected ..stranger", keeps=REST),
    Case(
        "steps that go back", agreeing(first(lambda x: x.flip(0), "steps")), "store", "increase strictly", keeps=REST
    ),
    Case("store cut, on the command line", cut(MANIFEST), "lohp-peft train", "manifest.json is damaged"),
    Case("shard flipped, on the command line", flip(SHARD), "lohp-peft train", "1 files.*'spam'.*damaged"),
    Case("another shard's task missing", remove("ham.jsonl"), "lohp-peft train", "Cannot read .*ham.jsonl"),
]

POLICY_CASES = [
    Case("no policy", remove(WEIGHTS), "policy", "is not a policy folder: it lacks .'model.safetensors'"),
    Case("configuration cut", cut(CONFIG), "policy", "config.json is damaged, it is not JSON"),
    Case("configuration is a list", fill(CONFIG, "[]"), "policy", "no JSON object but a list"),
    Case("configuration nested deeply", fill(CONFIG, DEEP), "policy", "nested too deeply"),
    Case("configuration of a BERT", put(CONFIG, model_type="bert"), "policy", "model_type must be 'lohp_policy'"),
    Case("policy of the future", put(CONFIG, schema_version=99), "policy", "schema version 99.*upgrade"),
    Case("policy of the past", put(CONFIG, schema_version=1), "policy", "schema version 1.*train the policy again"),
    Case("version is text", put(CONFIG, schema_version="3"), "policy", "`schema_version`.*whole number, got '3'"),
    Case(
        "sizes are text", put(CONFIG, r="2", num_heads=0), "policy", "sizes must be positive.*'r': '2', 'num_heads': 0"
    ),
    Case("sizes are huge", put(CONFIG, hidden_size=10**12, num_heads=1), "policy", "at most 1048576.*hidden_size"),
    Case(
        "large hidden size",
        put(CONFIG, hidden_size=2**16),
        "policy",
        "does not fit config.json, shapes .found, expected",
    ),
    Case("texts are numbers", put(CONFIG, pooling=3, ridge="x"), "policy", "'pooling': 3, 'ridge': 'x'"),
    Case("dropout of 400 digits", put(CONFIG, dropout=10**400), "policy", "finite numbers.*'dropout': 1000"),
    Case("states are huge", put(CONFIG, state_shape=[10**6, 10**6]), "policy", "its states are .1000000, 1000000"),
    Case("states are no shape", put(CONFIG, state_shape=[None]), "policy", "`state_shape` two whole numbers"),
    Case("policy's layout is a list", put(CONFIG, layout=[1]), "policy", "mappings.*'layout': .1"),
    Case("policy of a huge module", module_of(CONFIG, d_in=2**40), "policy", "1..1048576"),
    Case("policy's weights cut", cut(WEIGHTS), "policy", "model.safetensors is damaged, it is not a safetensors"),
    Case("policy's weights empty", fill(WEIGHTS, b""), "policy", "model.safetensors is damaged"),
    Case("policy's weights are a pickle", fill(WEIGHTS, PICKLE), "policy", "model.safetensors is damaged"),
    Case("policy's weights overflow", fill(WEIGHTS, OVERFLOWING), "policy", "model.safetensors is damaged"),
    Case("policy's header is endless", fill(WEIGHTS, LONG_HEADER), "policy", "model.safetensors is damaged"),
    Case("policy's weights with NaN", tensors(WEIGHTS, first(with_nan, "weight")), "policy", "not finite"),
    Case(
        "policy's weights are integers",
        tensors(WEIGHTS, first(to(torch.int64), "scale")),
        "policy",
        "scale is torch.int64",
    ),
    Case("policy's weights renamed", tensors(WEIGHTS, renamed), "policy", "does not fit config.json.*stranger"),
    Case("policy's bases missing", remove(BASES), "policy", "lacks .'space.safetensors'"),
    Case("policy's bases in half precision", tensors(BASES, first(to(torch.float16))), "policy", "is torch.float16"),
    Case("policy's bases not orthonormal", tensors(BASES, first(lambda x: 2 * x)), "policy", "not orthonormal"),
    Case("reference set cut", cut(REFERENCE), "policy", "reference_set.safetensors is damaged"),
    Case("reference set lacks a part", tensors(REFERENCE, renamed), "policy", "needs the tensors .'labels'"),
    Case(
        "reference set without names", tensors(REFERENCE, dict, tasks="[]"), "policy", "needs `names` and `families`"
    ),
    Case(
        "reference set's names cut",
        tensors(REFERENCE, dict, tasks="{"),
        "policy",
        "name its tasks in JSON: Expecting",
    ),
    Case("reference set with NaN", tensors(REFERENCE, first(with_nan, "states")), "policy", "states are not finite"),
    Case(
        "reference set is smaller", tensors(REFERENCE, first(lambda x: x[1:], "set")), "policy", "needs as many|shape"
    ),
    Case(
        "reference set of other sizes",
        tensors(REFERENCE, first(lambda x: x[:, 1:], "set")),
        "policy",
        "set have shape",
    ),
    Case("policy cut, on the command line", cut(WEIGHTS), "lohp-peft generate", "model.safetensors is damaged"),
    Case("policy of another base model", put(CONFIG, base_fingerprint="0" * 64), "lohp-peft generate", "does not fit"),
    Case("policy of another tokenizer", put(CONFIG, tokenizer_fingerprint="0"), "lohp-peft evaluate", "does not fit"),
    Case("policy's head unknown", put(CONFIG, head="oracle"), "lohp-peft generate", "oracle"),
    Case("policy's pooling unknown", put(CONFIG, pooling="oracle"), "lohp-peft generate", "oracle"),
    Case("policy's card from a list", put(CONFIG, provenance=[1]), "policy card", "provenance"),
    Case(
        "policy's tasks are a number", put(CONFIG, provenance={"training_tasks": 3}), "policy card", "training_tasks"
    ),
    Case("policy cut, to push", cut(CONFIG), "lohp-peft push policy", "config.json is damaged"),
]

ADAPTER_CASES = [
    Case("adapter without configuration", remove(ADAPTER), "adapter", "cannot read adapter_config.json"),
    Case("adapter's configuration cut", cut(ADAPTER), "adapter", "cannot read adapter_config.json"),
    Case("adapter's configuration not UTF-8", fill(ADAPTER, b"\xff\xfe\xff"), "adapter", "cannot read adapter_config"),
    Case("adapter's configuration deep", fill(ADAPTER, DEEP), "adapter", "nested too deeply"),
    Case("adapter's rank twice", fill(ADAPTER, '{"r": 1, "r": 2}'), "adapter", "repeated: .'r'"),
    Case("adapter of another type", put(ADAPTER, peft_type="IA3"), "adapter", "'IA3'"),
    Case("adapter's alpha infinite", put(ADAPTER, lora_alpha=float("inf")), "adapter", "lora_alpha=inf"),
    Case("adapter's alpha of 400 digits", put(ADAPTER, lora_alpha=10**400), "adapter", "lora_alpha=1000"),
    Case("adapter's ranks are a list", put(ADAPTER, rank_pattern=[1]), "adapter", "rank_pattern=.1"),
    Case("adapter's pattern of text", put(ADAPTER, alpha_pattern={"query": "x"}), "adapter", "'query'.='x'"),
    Case("adapter's pattern is no expression", put(ADAPTER, rank_pattern={"(": 2}), "adapter", "no simple regular"),
    Case("adapter's pattern never ends", put(ADAPTER, rank_pattern={"(a|a|.)+x": 2}), "adapter", "no simple regular"),
    Case("adapter's kept modules are a number", put(ADAPTER, modules_to_save=3), "adapter", "modules_to_save=3"),
    Case("adapter's weights missing", remove(LORA), "adapter", "only safetensors are read"),
    Case(
        "adapter's weights are a pickle",
        both(remove(LORA), fill("adapter/adapter_model.bin", PICKLE)),
        "adapter",
        "only safetensors are read",
    ),
    Case("adapter's pickle is renamed", fill(LORA, PICKLE), "adapter", "is not a safetensors file"),
    Case("adapter's weights cut", cut(LORA), "adapter", "is not a safetensors file"),
    Case("adapter's header flipped", flip(LORA, 9), "adapter", "damaged|cannot be read"),
    Case("adapter declares terabytes", fill(LORA, HUGE), "adapter", "is not a safetensors file"),
    Case("adapter of a type unknown", fill(LORA, STRANGE_TYPE), "adapter", "of known types"),
    Case("adapter of integers", tensors(LORA, first(to(torch.int32))), "adapter", "lora_A of type torch.int32"),
    Case("adapter in 8 bits", tensors(LORA, first(to(torch.float8_e4m3fn))), "adapter", "of type torch.float8"),
    Case("adapter with NaN", tensors(LORA, first(with_nan)), "adapter", "not finite"),
    Case("adapter lacks a half", tensors(LORA, lambda old: dict(list(old.items())[1:])), "adapter", "only lora_"),
    Case(
        "adapter with a stranger",
        tensors(LORA, lambda old: {**old, "x": torch.ones(1)}),
        "adapter",
        "x: neither lora_A",
    ),
    Case(
        "adapter has a half twice",
        tensors(LORA, lambda old: old | {k.removeprefix("base_model.model."): x + 1 for k, x in old.items()}),
        "adapter",
        "the second lora_A of its module",
    ),
    Case("adapter of another rank", put(ADAPTER, r=5), "adapter", "rank 2, but the configuration says 5"),
    Case(
        "run without checkpoints",
        lambda folder: (folder / "run").rename(folder / "x"),
        "run",
        "no folder named checkp",
    ),
    Case("a checkpoint of the run cut", cut("run/checkpoint-2/*.safetensors"), "run", "checkpoint-2.*damaged"),
    Case("adapter's record cut", cut("adapter/lohp_provenance.json"), "adapter card", "lohp_provenance.json"),
    Case(
        "adapter's record is a list",
        fill("adapter/lohp_provenance.json", "[]"),
        "adapter card",
        "lohp_provenance.json",
    ),
    Case(
        "adapter's labels are a number",
        put("adapter/lohp_provenance.json", label_names=3),
        "adapter card",
        "label_names",
    ),
    Case("adapter's configuration cut, to push", cut(ADAPTER), "folder to push", "adapter_config.json is damaged"),
    Case("a pickle to push", fill("adapter/x.bin", PICKLE), "folder to push", "also holds 1 others: x.bin"),
    Case("a link to push", link(LORA, "elsewhere"), "lohp-peft push", "adapter_model.safetensors .a link"),
    Case("a manifest not UTF-8, to push", fill(MANIFEST, b"\xff"), "store to push", "manifest.json is damaged"),
]

TRAINING_CASES = [
    Case("state empty", fill(STATE, ""), "checkpoint", "state.json is damaged, it is not JSON"),
    Case("state cut", cut(STATE), "checkpoint", "state.json is damaged, it is not JSON"),
    Case("state without a step", edit(STATE, lambda s: s.pop("step")), "checkpoint", "'step' is None.*start again"),
    Case("state of wrong types", put(STATE, config=3, best="x"), "checkpoint", "'config' is 3; 'best' is 'x'"),
    Case("state with a short best", put(STATE, best=[]), "checkpoint", "'best' is .*start again"),
    Case("state with a path upwards", put(STATE, file="../state-4.safetensors"), "checkpoint", "names the file '../"),
    Case("state of other settings", edit(STATE, lambda s: s["config"].update(seed=9)), "checkpoint", "'seed': .9, 0"),
    Case("state's tensors missing", remove(TRAINED), "checkpoint", "damaged: .*No such file"),
    Case("state's tensors cut", cut(TRAINED), "checkpoint", "state-4.safetensors is not what was written"),
    Case("state's tensors flipped", flip(TRAINED), "checkpoint", "state-4.safetensors is not what was written"),
    Case("snapshots cut", cut(PART), "snapshots", "part-000001.safetensors are damaged"),
    Case("snapshots not numbered", tensors(PART, renamed), "snapshots", "are damaged"),
    Case("snapshots that follow nothing", tensors(PART, dict, follows="x"), "snapshots", "are damaged"),
    Case("snapshots of another adapter", tensors(PART, dict, signature="x"), "snapshots", "another|other modules"),
    Case("snapshots in float64", tensors(PART, first(to(torch.float64))), "snapshots", "are damaged"),
    Case("snapshots named oddly", fill("snapshots/part-x.safetensors", b""), "snapshots", "are damaged"),
]

TASK_CASES = [
    Case("task missing", remove("spam.jsonl"), "task", "Cannot read .*spam.jsonl"),
    Case("task empty", fill("spam.jsonl", "\n\n"), "task", "it has no rows"),
    Case("task cut", cut("spam.jsonl"), "task", "spam.jsonl is not JSON lines: line"),
    Case("task not UTF-8", fill("spam.jsonl", b'{"text": "\xe4"}'), "task", "Cannot read .*utf-8"),
    Case("task is a pickle", fill("spam.jsonl", PICKLE), "task", "Cannot read|not JSON lines"),
    Case("task nested deeply", fill("spam.jsonl", DEEP), "task", "line 1: it is nested too deeply"),
    Case(
        "task with a key twice", fill("spam.jsonl", '{"text": "a", "text": "b"}'), "task", "line 1: keys are repeated"
    ),
    Case("task with a number of 5000 digits", fill("spam.jsonl", "9" * 5000), "task", "line 1: .*4300"),
    Case("row is no object", fill("spam.jsonl", "3\n" + TWO_ROWS), "task", "row 0: expected a mapping"),
    Case("row without text", fill("spam.jsonl", '{"label": "x"}\n' + TWO_ROWS), "task", "row 0: 'text' must be"),
    Case("text empty", fill("spam.jsonl", '{"text": " ", "label": "x"}'), "task", "row 0: 'text' must be a non-empty"),
    Case(
        "text is half a character",
        fill("spam.jsonl", r'{"text": "\ud800", "label": "x"}'),
        "task",
        "line 1: .*half of a char",
    ),
    Case("label is null", fill("spam.jsonl", '{"text": "a", "label": null}'), "task", "row 0: 'label' must be"),
    Case(
        "labels mixed", fill("spam.jsonl", TWO_ROWS + '{"text": "c", "label": 1}'), "task", "all strings or all ints"
    ),
    Case(
        "some pairs",
        fill("spam.jsonl", TWO_ROWS + '{"text": "c", "label": "x", "text_b": "d"}'),
        "task",
        "row 2: 'text_b'",
    ),
    Case(
        "split is a list",
        fill("spam.jsonl", '{"text": "a", "label": "x", "split": []}'),
        "task",
        "row 0: 'split' must",
    ),
    Case(
        "no such split",
        fill("spam.jsonl", TWO_ROWS.replace("}", ', "split": "x"}')),
        "task",
        "no rows in split 'train'",
    ),
    Case("gzipped task cut", cut("spam.jsonl.gz"), "gzipped task", "Cannot read .*spam.jsonl.gz"),
    Case("gzipped task flipped", flip("spam.jsonl.gz", 100), "gzipped task", "Cannot read|not JSON|Task file"),
    Case("gzipped task is plain", fill("spam.jsonl.gz", TWO_ROWS), "gzipped task", "Not a gzipped file"),
    Case("support cut", cut("spam.jsonl"), "support", "spam.jsonl is not JSON lines: line"),
    Case("support missing", remove("spam.jsonl"), "support", "does not exist"),
    Case(
        "one class",
        fill("spam.jsonl", '{"text": "a", "label": "x"}\n' * 4),
        "lohp-peft generate",
        "at least two classes",
    ),
    Case("task cut, on the command line", cut("spam.jsonl"), "lohp-peft generate", "spam.jsonl is not JSON lines"),
    Case("task not to be recorded", fill("spam.jsonl", TWO_ROWS), "lohp-peft prepare", "Cannot prepare.*task 'spam'"),
    Case("list of tasks cut", cut("tasks.json"), "lohp-peft prepare", "tasks.json is damaged"),
    Case("list of tasks flat", put("tasks.json", spam="MIT"), "lohp-peft prepare", "by an object, got str"),
]

SETTINGS_CASES = [
    Case("settings missing", remove("settings.yaml"), "settings", "Cannot read the configuration"),
    Case("settings are a list", fill("settings.yaml", "- 1"), "settings", "must be a mapping"),
    Case("settings not UTF-8", fill("settings.yaml", b"a: \xff"), "settings", "not valid YAML.*utf-8"),
    Case("settings broken", fill("settings.yaml", "a: [1"), "settings", "not valid YAML"),
    Case("settings nested deeply", fill("settings.yaml", "seed: " + DEEP[:3000]), "settings", "YAML"),
    Case("settings with a key twice", fill("settings.yaml", "seed: 1\nseed: 2"), "settings", "'seed' is repeated"),
    Case("settings with an alias", fill("settings.yaml", "a: &a [1]\nb: [*a, *a]"), "settings", "alias .a"),
    Case("settings with a list as key", fill("settings.yaml", "[1]: 2"), "settings", "key in line 1 must be text"),
    Case(
        "settings that run code", fill("settings.yaml", "seed: !!python/object/apply:os.getcwd []"), "settings", "YAML"
    ),
    Case("settings unknown", fill("settings.yaml", "sead: 1"), "settings", "did you mean `seed`"),
    Case(
        "a number of 400 digits", fill("settings.yaml", "learning_rate: 1" + "0" * 400), "settings", "must be a number"
    ),
    Case("a number that is none", fill("settings.yaml", "kl_target: .nan"), "settings", "`kl_target` must be above 0"),
    Case("settings broken, on the command line", fill("settings.yaml", "a: [1"), "lohp-peft train --config", "YAML"),
]

BASE_CASES = [
    Case("base model cut", cut("base/model.safetensors"), "lohp-peft generate", "base model.*damaged"),
    Case("base model missing", remove("base/model.safetensors"), "lohp-peft generate", "model.safetensors"),
    Case("base model's configuration cut", cut("base/config.json"), "lohp-peft generate", "config"),
    Case("base model's tokenizer cut", cut("base/tokenizer.json"), "lohp-peft generate", "tokenizer cannot be loaded"),
    Case("base model's tokenizer empty", fill("base/tokenizer.json", "{}"), "lohp-peft generate", "tokenizer"),
    Case(
        "base model's weights renamed",
        tensors("base/model.safetensors", renamed),
        "lohp-peft generate",
        "lacks the weights embed",
    ),
    Case("base model's weights a pickle", fill("base/model.safetensors", PICKLE), "lohp-peft generate", "base model"),
]

CASES = [*STORE_CASES, *POLICY_CASES, *ADAPTER_CASES, *TRAINING_CASES, *TASK_CASES, *SETTINGS_CASES, *BASE_CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_gets_a_clear_error_and_nothing_is_lost(world, case):
    case.damage(world.folder)
    before = content_of(world.folder)
    if case.call in COMMANDS:
        result = COMMANDS[case.call](world)
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code == 2
        assert result.stdout == ""
        message = result.stderr
        assert message.startswith("Error: ")
        assert message.count("\n") == 1
    else:
        with pytest.raises(case.error) as caught:
            READ[case.call](world)
        assert caught.type is case.error
        message = str(caught.value)
    assert re.search(case.words, message, re.DOTALL), message[:1000]
    assert content_of(world.folder) == before
    if case.keeps is not None:
        READ[case.keeps](world)


def test_the_table_is_long_and_its_names_differ():
    assert len({case.name for case in CASES}) == len(CASES) >= 60
