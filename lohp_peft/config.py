"""`LoHpConfig`: LoRA whose weights a learned policy writes."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from lohp_peft.adapters.export import GenerationRecord, remove_record, unsupported_options
from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.writing import backbone_of
from lohp_peft.cards import is_hub_id
from lohp_peft.fields import SEEDS, take_whole_numbers
from lohp_peft.registration import ensure_peft_type
from lohp_peft.tasks.task import read_json_lines

_DEFAULT_RANK = LoraConfig.r
_NOT_CARRIED_OVER = {"peft_type", "peft_version", "runtime_config", "init_lora_weights"}


@dataclass
class RecordedLoraConfig(LoraConfig):
    """A `LoraConfig` that writes the record of a generation beside itself when it is saved."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and the record of the generation that wrote the weights beside it, if one did."""
        super().save_pretrained(save_directory, **kwargs)
        record = generation_record(self)
        if record is None:
            remove_record(save_directory)
        else:
            record.write(save_directory)


@dataclass
class LoHpConfig(LoraConfig):
    """This is the configuration class to store the configuration of a [`LoHpModel`].

    It is a `LoraConfig` with the name of a policy. `r`, `lora_alpha` and `target_modules` left at their defaults come
    from the policy; without a policy the method computes what LoRA does, and is saved under its own type.

    Args:
        policy (`str`):
            `"shipped"`, a policy folder, or `"owner/name@commit"` on the Hub.
        policy_revision (`str`):
            Commit hash of the policy, where `policy` does not carry it.
        support (`str`):
            Labelled examples to generate from at injection: a file of JSON lines `{text[, text_b], label}`, plain or
            gzipped (rows of other splits than `train` are left out), or the id of a data set with these columns.
            Without it, injection starts as the identity and `generate_adapter` generates.
        policy_steps (`int`):
            Policy steps taken by a generation; the policy's own number by default.
        num_candidates (`int`):
            Stochastic rollouts compared beside the mean one by a generation.
        seed (`int`):
            Seed of generations.
        init_weights (`bool`):
            `False` starts from random weights that change the output and generates nothing at injection, for tests.

    Raises:
        TypeError: When what is saved as a string is something else.
        ValueError: Listing every value out of range, and settings that need a policy without one.
    """

    policy: str | None = field(
        default=None, metadata={"help": "`shipped`, a policy folder, or owner/name@commit; none is plain LoRA."}
    )
    policy_revision: str | None = field(
        default=None, metadata={"help": "Commit hash of the policy where `policy` does not carry it."}
    )
    support: str | None = field(
        default=None,
        metadata={"help": "JSON lines {text[, text_b], label} or data set id to generate from at injection."},
    )
    policy_steps: int | None = field(
        default=None, metadata={"help": "Policy steps of a generation; none for the policy's own number."}
    )
    num_candidates: int = field(default=0, metadata={"help": "Stochastic rollouts compared beside the mean one."})
    seed: int = field(default=0, metadata={"help": "Seed of generations."})
    init_weights: bool = field(
        default=True, metadata={"help": "False starts from random weights and generates nothing, for tests."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ensure_peft_type()
        # What is saved with weights says so, whatever route reads it and whatever becomes of it: `is_trainable` loads too.
        # (A new one in inference mode, which is the caller's wish for a frozen adapter, has no targets yet.)
        self._saved_with_weights = self.inference_mode and self.target_modules is not None
        names = ("policy", "policy_revision", "support")
        wrong = {
            name: type(getattr(self, name)).__name__
            for name in names
            if not isinstance(getattr(self, name), str | None)
        }
        if wrong:
            raise TypeError(
                f"LoHpConfig is saved as JSON, so these must be strings: {wrong}. A loaded policy or a support set can be "
                "passed to `generate_adapter` or `initialize_lohp_weights`."
            )
        take_whole_numbers(self, ("policy_steps", "num_candidates", "seed"))
        problems = []
        if self.policy is None:
            given = {"support": self.support, "policy_revision": self.policy_revision}
            problems += [
                f"`{name}` needs a `policy`, got {value!r}" for name, value in given.items() if value is not None
            ]
        elif not self.policy:
            problems.append("`policy` is empty; leave it out for plain LoRA, or name one")
        elif self.policy_revision is not None and "@" in self.policy:
            problems.append(
                f"the revision stands in `policy` ({self.policy!r}) and in `policy_revision`; give it once"
            )
        if not 0 <= self.seed < SEEDS:
            problems.append(f"`seed` must be in 0..2**63 - 1, got {self.seed}")
        if self.num_candidates < 0:
            problems.append(f"`num_candidates` must be at least 0, got {self.num_candidates}")
        if self.policy_steps is not None and self.policy_steps < 1:
            problems.append(f"`policy_steps` must be at least 1, got {self.policy_steps}")
        if problems:
            raise ValueError("LoHpConfig: " + "; ".join(problems) + ".")
        if not self.init_weights:
            self.init_lora_weights = False

    @property
    def policy_id(self) -> str | None:
        """The policy with its revision, as one name."""
        if self.policy is None or self.policy_revision is None:
            return self.policy
        return f"{self.policy}@{self.policy_revision}"

    def to_lora_config(self) -> RecordedLoraConfig:
        """The plain LoRA that this is once its weights are written; it keeps the record of the generation."""
        names = {entry.name for entry in fields(LoraConfig) if entry.init} - _NOT_CARRIED_OVER
        # A start by name may have changed the base weights, which loading then has to do again.
        init = self.init_lora_weights if isinstance(self.init_lora_weights, str) else True
        config = RecordedLoraConfig(**{name: getattr(self, name) for name in names}, init_lora_weights=init)
        config.runtime_config = self.runtime_config
        keep_record(config, generation_record(self))
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write this configuration, or that of a plain LoRA and the record once an adapter of its model was generated."""
        if not is_plain_lora(self):
            super().save_pretrained(save_directory, **kwargs)
            remove_record(save_directory)
        else:
            self.to_lora_config().save_pretrained(save_directory, **kwargs)

    @property
    def follows_policy(self) -> bool:
        """Whether a new adapter takes its shape from a policy, rather than being loaded."""
        loaded = self._saved_with_weights or (self.inference_mode and self.target_modules is not None)
        return self.policy is not None and not loaded


def generation_record(config: LoraConfig) -> GenerationRecord | None:
    """What is known of the generation that wrote an adapter's weights, if any did."""
    return config.__dict__.get("_generation_record")


def keep_record(config: LoraConfig, record: GenerationRecord | None) -> None:
    """Attach the record of a generation to a configuration; it travels with it but is no field of it."""
    config.__dict__["_generation_record"] = record


def is_plain_lora(config: LoraConfig) -> bool:
    """Whether a configuration is saved as that of a plain LoRA: its adapter was generated, or another one of its model."""
    return generation_record(config) is not None or config.__dict__.get("_beside_generated", False)


def stand_beside_generated(config: LoHpConfig) -> None:
    """Have a configuration saved as that of a plain LoRA, because PEFT loads adapters of one type alone into a model."""
    config.__dict__["_beside_generated"] = True


def follow_policy(config: LoHpConfig, model: nn.Module) -> None:
    """Take `r`, `lora_alpha` and `target_modules` from the policy where they are at their defaults.

    Raises:
        ValueError: When the model has not the policy's modules, or a field was set to something else, naming both sides.
    """
    from lohp_peft.generation import LoHpPolicy
    from lohp_peft.hub import find_policy

    # The policy's configuration alone: its weights could not be read where PEFT makes modules without memory.
    policy = LoHpPolicy.config_class.read(find_policy(config.policy_id or ""))
    layout = AdapterLayout.from_dict(policy.layout)
    _, prefix = backbone_of(model, layout)
    names = [prefix + spec.name for spec in layout.modules]
    r, problems = policy.r, unsupported_options(config)
    for name in ("r", "lora_alpha"):
        if getattr(config, name) not in (_DEFAULT_RANK, r):
            problems.append(f"`{name}` is {getattr(config, name)}, the policy's is {r}")
        setattr(config, name, r)
    if config.policy_steps is not None and config.policy_steps > policy.policy_steps:
        problems.append(f"`policy_steps` is {config.policy_steps}, the policy has {policy.policy_steps}")
    if config.rank_pattern or config.alpha_pattern:
        problems.append(f"the policy has one rank and alpha, got {config.rank_pattern} and {config.alpha_pattern}")
    if config.target_modules is None:
        config.target_modules = set(names)
    else:
        given = _maybe_include_all_linear_layers(copy.copy(config), model).target_modules
        matched = AdapterLayout.from_model(model, given, config.layers_to_transform)
        found = [spec.name for spec in matched.modules]
        if set(found) != set(names):
            problems.append(f"`target_modules` matches {found}, the policy's are {names}")
    layers = config.layers_to_transform
    layers = {layers} if isinstance(layers, int) else set(layers or ())
    left_out = [name for name in names if not check_target_module_exists(config, name)]
    if layers:  # which PEFT does not look at where modules are named in full
        left_out += [prefix + spec.name for spec in layout.modules if spec.layer not in layers]
    if left_out:
        problems.append(f"`layers_to_transform`, `exclude_modules` or `modules_to_save` leaves out {left_out}")
    if problems:
        raise ValueError("LoHpConfig does not fit its policy: " + "; ".join(problems) + ". Leave them out.")


def read_support_file(source: str) -> Iterable[Mapping[str, Any]]:
    """Rows of split `train` from a file of JSON lines, plain or gzipped, or a data set `owner/name[@commit]`, which names its classes.

    Raises:
        ValueError: When it is neither, or not JSON lines, naming every malformed line, or the data set cannot be loaded.
    """
    path = Path(source)
    if not path.is_file():
        name, _, revision = source.partition("@")
        if path.suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt", ".gz") or "/" not in name or not is_hub_id(name):
            raise ValueError(
                f"`support` must be a file of JSON lines or a data set owner/name, and {source!r} does not exist."
            )
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            return load_dataset(name, split="train", revision=revision or None)
        except (OSError, ValueError, DatasetsError) as error:
            raise ValueError(f"The data set {source!r} of `support` cannot be loaded: {error}") from error
    rows = read_json_lines(path)
    return [row for row in rows if not isinstance(row, dict) or (row.get("split") or "train") == "train"]
