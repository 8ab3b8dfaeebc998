"""The launch configurations that are shipped are what Accelerate understands, and are described."""

from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).parent.parent
FSDP2 = ROOT / "examples" / "accelerate_configs" / "fsdp2.yaml"
CONFIGS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_launches_several_processes(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert config.mixed_precision == ("bf16" if "bf16" in path.stem else "no")
    assert config.use_cpu == path.stem.startswith("cpu")
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    # Both take the launcher that starts one process for each rank, also on the CPU.
    assert arguments.use_fsdp if path.stem == "fsdp2" else arguments.multi_gpu
    assert (arguments.num_processes, arguments.mixed_precision) == (2, config.mixed_precision)


def test_policies_are_sharded_and_base_models_are_not(monkeypatch):
    arguments = launch_command_parser().parse_args(["--config_file", str(FSDP2), "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert not plugin.cpu_ram_efficient_loading  # else only one process would load the base model


def test_every_configuration_is_described():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert CONFIGS
    assert not [path.name for path in CONFIGS if f"accelerate_configs/{path.name}" not in text]
