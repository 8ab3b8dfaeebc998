"""A sample of PEFT's own tests against LOHP; `make test-peft` runs all of them."""

import importlib.util
import re
import subprocess

import pytest

from peft_suite.fetch import is_fetched
from peft_suite.run import command

NEEDED = [name for name in ("diffusers", "parameterized") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(not is_fetched(), reason="PEFT's sdist is not here: python tests/peft_suite/fetch.py")
@pytest.mark.skipif(bool(NEEDED), reason=f"PEFT's tests import {NEEDED}, which the extra `dev` installs")
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["test_config.py", "test_mapping.py"], id="plain"),
        pytest.param(
            ["--lohp-generation", "test_feature_extraction_models.py", "-k", "BertModel and not Roberta"],
            id="generation",
        ),
    ],
)
def test_sample_of_pefts_own_tests(arguments):
    line, environment = command(arguments)
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 30, done.stdout
    if "--lohp-generation" in arguments:
        assert "injections generated from texts" in done.stdout
