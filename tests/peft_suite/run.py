"""Runs PEFT's own tests against LOHP: fetches them, builds the tiny models they name, and starts pytest.

python tests/peft_suite/run.py [--lohp-generation] [test_config.py ...] [options of pytest]
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILES = (
    "test_config.py",
    "test_mapping.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_mixed.py",
)


def command(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The line and the environment that start pytest on PEFT's tests, which have to be there."""
    from peft_suite.fetch import suite_folder
    from peft_suite.hub import build_hub

    home = suite_folder() / "huggingface"
    build_hub(home)
    tests = suite_folder() / "tests"
    files = [argument for argument in arguments if ".py" in argument]
    options = [argument for argument in arguments if argument not in files]
    line = [sys.executable, "-m", "pytest", "-c", str(HERE / "suite.ini"), "--rootdir", str(suite_folder())]
    line += ["-p", "peft_suite.plugin", *options, *(str(tests / file) for file in files or FILES)]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": path, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return line, {**os.environ, **settings}


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    from peft_suite.fetch import fetch

    fetch()
    line, environment = command(sys.argv[1:])
    sys.exit(subprocess.run(line, env=environment).returncode)
