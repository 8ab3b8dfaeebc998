"""The tests of PEFT that LOHP is not asked to pass, each with its reason. Every one of them has to match and to fail."""

import re
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Exclusion:
    """Tests that are expected to fail.

    Args:
        file: PEFT's test file.
        test: Regular expression for the start of the test's name with its parameters, see `label`.
        reason: Why it cannot pass.
        raises: How it fails; another exception is a failure of ours.
        generation: Whether it only fails when weights are generated at injection.
        peft: Versions of PEFT that it holds for.
    """

    file: str
    test: str
    reason: str
    raises: type[Exception] = ValueError
    generation: bool = False
    peft: str = ""

    def matches(self, item: Any) -> bool:
        return item.path.name == self.file and re.match(self.test, label(item)) is not None


def label(item: Any) -> str:
    """A test's name with its parameters, and the arguments of the configuration that the name only counts."""
    arguments = item.callspec.params.get("config_kwargs", "") if hasattr(item, "callspec") else ""
    return f"{item.name} {arguments}"


DOWNLOAD = "downloads a configuration into a fresh cache"
MIXED = "PEFT lists the methods that a mixed model may hold, and refuses LOHP: there its policy would be ignored"
IDENTITY = "requires that a new adapter changes nothing"
SAVED_AS_LORA = (
    "loads a generated adapter, saved as a plain LoRA, beside LOHP adapters: PEFT holds one type in a model; "
    "`to_plain_lora` makes it LoRA's"
)
SHARED_A = (
    "adapters of one policy share A, and these combinations add up A apart from B: weights of both signs cancel in A; "
    "`cat` and `svd` are exact"
)
DORA_KEYS = "PEFT before 0.21 shortens DoRA's keys for LORA only; both spellings are loaded"
GONE_FROM_TRANSFORMERS = "PEFT before 0.21 asks a sequence-to-sequence model for a method that transformers 5.23 does not have, with LORA as well"
NOT_GENERATED = r"(?!.*(alora_invocation_tokens|LlamaForSequenceClassification))"  # rows that are left as LoRA
NO_AUTOCAST = rf"test_add_adapter_no_autocast_adapter_dtype\[{NOT_GENERATED}"

EXCLUSIONS = (
    Exclusion("test_config.py", r"test_from_pretrained_cache_dir\[", DOWNLOAD),
    Exclusion(
        "test_custom_models.py",
        r"test_add_adapter_rejects_duplicate_name_without_mutation\[True\]",
        MIXED,
        peft=">=0.21",
    ),
    Exclusion("test_custom_models.py", r"test_dora_save_and_load_remapping", DORA_KEYS, AssertionError, peft="<0.21"),
    Exclusion(
        "test_encoder_decoder_models.py",
        r"test_(?!load_model_low_cpu_mem_usage|save_shared_tensors)",
        GONE_FROM_TRANSFORMERS,
        AttributeError,
        peft="<0.21",
    ),
    Exclusion("test_mixed.py", r"test_target_(first|last|different)_layers?(_same_type)?_\d_LoHp_", MIXED),
    Exclusion("test_mixed.py", r"test_delete_", MIXED),
    Exclusion("test_mixed.py", r"test_(get_nb_trainable_parameters|incompatible_config_raises|decoder_model) ", MIXED),
    Exclusion("test_mixed.py", r"test_(unload_)?modules_to_save", MIXED),
    Exclusion(
        "test_custom_models.py",
        r"test_disable_adapters(_with_merging)?\["
        r"((Vanilla MLP \d|Conv[23]d 2) LoRA(-| with DoRA)|Embedding \+ transformers Conv1D [13]|MHA)",
        IDENTITY,
        AssertionError,
        generation=True,
    ),
    Exclusion(
        "test_custom_models.py",
        r"test_add_weighted_adapter_with_different_scaling\[(linear|ties|dare_ties|dare_linear|magnitude_prune)-.*4\]",
        SHARED_A,
        AssertionError,
        generation=True,
        peft=">=0.21",
    ),
    Exclusion(
        "test_custom_models.py",
        r"test_loading_(adapter_preserves_custom_requires_grad|model_requires_grad_set_correctly\[)",
        SAVED_AS_LORA,
        generation=True,
        peft=">=0.21",
    ),
    Exclusion("test_decoder_models.py", NO_AUTOCAST, SAVED_AS_LORA, generation=True, peft=">=0.21"),
    Exclusion("test_encoder_decoder_models.py", NO_AUTOCAST, SAVED_AS_LORA, generation=True, peft=">=0.21"),
    Exclusion("test_seq_classifier.py", NO_AUTOCAST, SAVED_AS_LORA, generation=True, peft=">=0.21"),
)


def exclusions_of(version: str, generation: bool) -> list[Exclusion]:
    """Those that hold for a version of PEFT, with or without generation."""
    return [e for e in EXCLUSIONS if version in SpecifierSet(e.peft) and (generation or not e.generation)]
