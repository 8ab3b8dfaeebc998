"""The pytest plugin under which PEFT's own tests run: they get `LoHpConfig` where they import `LoraConfig`.

Because the name itself is exchanged, whatever the tests say of LoRA by `config_cls == LoraConfig` holds for LOHP too.
Only tests that use the exchanged name are kept. See README.md.
"""

from collections import Counter, defaultdict
from pathlib import Path

import peft
import pytest

from lohp_peft import LoHpConfig
from peft_suite.exclusions import EXCLUSIONS, exclusions_of
from peft_suite.selection import concerns


class _AlwaysCached(defaultdict):
    """PEFT's table of models that need not be downloaded any more: all of them."""

    def __contains__(self, key):
        return True


def pytest_addoption(parser):
    parser.addoption("--lohp-generation", action="store_true", help="generate weights in every new LOHP adapter")
    parser.addoption("--lora-control", action="store_true", help="run the same tests against PEFT's own LoraConfig")


def pytest_configure(config):
    config.generated = Counter()
    if config.getoption("--lohp-generation"):
        from peft_suite.generation import generate_on_injection

        generate_on_injection(config.generated)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    with pytest.MonkeyPatch.context() as patch:
        if not session.config.getoption("--lora-control"):
            patch.setattr(peft, "LoraConfig", LoHpConfig)
        return (yield)


def pytest_collection_modifyitems(config, items):
    from tests import testing_utils

    testing_utils._HUB_MODEL_ACCESSES = _AlwaysCached(int)
    config_cls = peft.LoraConfig if config.getoption("--lora-control") else LoHpConfig
    kept = [item for item in items if concerns(item, config_cls)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    whole = {Path(argument).name for argument in config.args if "::" not in argument}
    if config.getoption("keyword"):
        whole = set()
    unused = []
    for exclusion in exclusions_of(peft.__version__, config.getoption("--lohp-generation")):
        found = [item for item in items if exclusion.matches(item)]
        for item in found:
            item.add_marker(pytest.mark.xfail(reason=exclusion.reason, raises=exclusion.raises, strict=True))
        if not found and exclusion.file in whole:
            unused.append(f"{exclusion.file}: {exclusion.test} ({exclusion.reason})")
    if unused:
        raise pytest.UsageError("exclusions that match no test:\n" + "\n".join(unused))


def pytest_terminal_summary(terminalreporter, config):
    counts = defaultdict(Counter)
    reasons = {exclusion.reason for exclusion in EXCLUSIONS}
    names = {"skipped": "skipped by PEFT", "xfailed": "expected by PEFT to fail"}
    for outcome in ("passed", "failed", "error", "xfailed", "skipped"):
        for report in terminalreporter.getreports(outcome):
            excluded = outcome == "xfailed" and report.wasxfail in reasons
            what = "excluded" if excluded else names.get(outcome, outcome)
            counts[Path(report.nodeid.split("::")[0]).name][what] += 1
    terminalreporter.section(f"PEFT {peft.__version__} against LOHP")
    for file, outcomes in sorted(counts.items()):
        terminalreporter.write_line(f"{file}: " + ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())))
    for what, n in config.generated.most_common():
        terminalreporter.write_line(f"injections {what}: {n}")
