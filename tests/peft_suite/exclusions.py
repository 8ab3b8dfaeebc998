"""The tests of PEFT that LOHP is not asked to pass, each with its reason. Every one of them has to match and to fail."""

import re
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Exclusion:
    """Tests that are expected to fail.

    Args:
        file: PEFT's test file.
        test: Regular expression that the test's name, with its parameters, matches in whole.
        reason: Why it cannot pass.
        generation: Whether it only fails when weights are generated at injection.
        peft: Versions of PEFT that it holds for.
    """

    file: str
    test: str
    reason: str
    generation: bool = False
    peft: str = ""

    def matches(self, file: str, test: str) -> bool:
        return file == self.file and re.fullmatch(self.test, test) is not None


MIXED = "PEFT lists the methods that a mixed model may hold, and refuses LOHP: there its policy would be ignored"

EXCLUSIONS = (
    Exclusion(
        "test_config.py",
        r"test_from_pretrained_cache_dir\[.*\]",
        "downloads a configuration into a fresh cache",
    ),
    Exclusion("test_custom_models.py", r"test_add_adapter_rejects_duplicate_name_without_mutation\[True\]", MIXED),
    Exclusion("test_mixed.py", r"test_target_(first|last|different)_layers?(_same_type)?_\d_LoHp_.*", MIXED),
    Exclusion("test_mixed.py", r"test_delete_.*", MIXED),
    Exclusion("test_mixed.py", r"test_(get_nb_trainable_parameters|incompatible_config_raises|decoder_model)", MIXED),
    Exclusion("test_mixed.py", r"test_(unload_)?modules_to_save(_when_active_adapter_does_not_use_it)?", MIXED),
)


def exclusions_of(version: str, generation: bool) -> list[Exclusion]:
    """Those that hold for a version of PEFT, with or without generation."""
    return [e for e in EXCLUSIONS if version in SpecifierSet(e.peft) and (generation or not e.generation)]
