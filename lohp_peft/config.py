"""`LoHpConfig`: LoRA whose weights a learned policy writes."""

import os
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig

from lohp_peft.adapters.export import GenerationRecord
from lohp_peft.registration import ensure_peft_type

_NOT_CARRIED_OVER = {"peft_type", "peft_version", "runtime_config", "init_lora_weights"}


@dataclass
class RecordedLoraConfig(LoraConfig):
    """A `LoraConfig` that writes the record of a generation beside itself when it is saved."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and `lohp_provenance.json` and `head.safetensors` where there is a record."""
        super().save_pretrained(save_directory, **kwargs)
        record = generation_record(self)
        if record is not None:
            record.write(save_directory)


@dataclass
class LoHpConfig(LoraConfig):
    """This is the configuration class to store the configuration of a [`LoHpModel`].

    It is a `LoraConfig` with the name of a policy. `r`, `lora_alpha` and `target_modules` left at their defaults come
    from the policy; without a policy the method is plain LoRA.

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
        problems = []
        if self.policy is None:
            given = {"support": self.support, "policy_revision": self.policy_revision}
            problems += [
                f"`{name}` needs a `policy`, got {value!r}" for name, value in given.items() if value is not None
            ]
        elif self.policy_revision is not None and "@" in self.policy:
            problems.append(
                f"the revision stands in `policy` ({self.policy!r}) and in `policy_revision`; give it once"
            )
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
        config = RecordedLoraConfig(**{name: getattr(self, name) for name in names})
        config.runtime_config = self.runtime_config
        keep_record(config, generation_record(self))
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write this configuration, or that of a plain LoRA and the record once an adapter has been generated."""
        if generation_record(self) is None:
            super().save_pretrained(save_directory, **kwargs)
        else:
            self.to_lora_config().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> "LoHpConfig":
        """Read a saved configuration; weights are read along with it, so nothing is generated from it."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.__dict__["_from_checkpoint"] = True  # not a field, which would be saved
        return config


def generation_record(config: LoraConfig) -> GenerationRecord | None:
    """What is known of the generation that wrote an adapter's weights, if any did."""
    return config.__dict__.get("_generation_record")


def keep_record(config: LoraConfig, record: GenerationRecord | None) -> None:
    """Attach the record of a generation to a configuration; it travels with it but is no field of it."""
    config.__dict__["_generation_record"] = record
