"""The table of models in README.md says what the tests of this folder prove, and nothing else."""

import re
from pathlib import Path

import pytest

from models import test_families, test_options, test_quantised
from models.zoo import TEXT_FAMILIES

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PROVED_ALONE = {
    "tied embeddings": test_options.test_tied_embeddings,
    "bfloat16 weights": test_options.test_bfloat16_weights,
    "gradient checkpointing": test_options.test_gradient_checkpointing,
    "torch.compile": test_options.test_a_compiled_model_sees_what_is_generated_into_it,
    "8-bit weights": test_quantised.test_an_adapter_over_quantised_weights,
    "4-bit weights": test_quantised.test_an_adapter_over_quantised_weights,
}
TESTED_MESSAGES = [
    *(message for _, _, messages in (test_families.REFUSED | test_families.PARTLY).values() for message in messages),
    *(message for _, message in test_options.REFUSED.values()),
    *(test_options.NO_PATTERNS, test_options.NOT_ZERO, test_quantised.NO_GRADIENTS, test_quantised.NO_DORA),
]


def rows(header):
    """By status the names of a table's rows; several names of one row are separated by commas."""
    (table,) = re.findall(rf"^\| {header} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    found = {"works": [], "refused": []}
    for line in table.splitlines():
        names, status, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        found[status] += [name.strip(" `") for name in names.split(",")]
    return found


def test_base_models():
    found = rows("base model")
    assert sorted(found["works"]) == sorted(family.name for family in TEXT_FAMILIES)
    assert sorted(found["refused"]) == sorted(test_families.REFUSED)


def test_options_of_an_adapter():
    found = rows("option")
    assert sorted(found["works"]) == sorted([*test_options.WORKS, *PROVED_ALONE])
    assert sorted(found["refused"]) == sorted([*test_options.REFUSED, "target_parameters"])


@pytest.mark.parametrize("header", ["base model", "option"])
def test_messages(header):
    """What a table quotes of an error is what a test expects of it."""
    (table,) = re.findall(rf"^\| {header} \|.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    quotes = re.findall(r"\"([^\"]+)\"", table)
    assert quotes
    assert not [quote for quote in quotes if not any(quote in message for message in TESTED_MESSAGES)]
