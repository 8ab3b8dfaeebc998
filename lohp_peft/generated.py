"""What a generation gives: the adapter with its head and its report, to be saved or published."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from lohp_peft.adapters.export import (
    GenerationRecord,
    plain_lora_config,
    plain_lora_tensors,
    provenance_of,
    save_plain_lora,
)
from lohp_peft.candidates import Candidate
from lohp_peft.cards import write_card
from lohp_peft.cards.ownership import is_replaced, metadata_of, read_card
from lohp_peft.cards.renewal import renewed_card
from lohp_peft.hub import PushReport, push_folder
from lohp_peft.tasks import Head

NAMED_OTHERWISE = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""PEFT's task types whose models hold the base model under a name of its own; models of `SEQ_2_SEQ_LM` do not."""


@dataclass(frozen=True)
class GenerationReport:
    """What was generated, why, and what it cost; no texts.

    Args:
        chosen: Name of the candidate, see `Candidate`.
        reason: Why, as a sentence.
        abstained: Whether `none` or `mean` was chosen.
        candidates: All that were compared, with their scores.
        nearest_task: Training task whose texts lie nearest, where the policy has a reference set.
        nearest_adapter: Training task whose adapter lies nearest, for an adapter that changes something.
        nearest_adapter_distance: Relative Frobenius distance to it.
        support: Number of examples by label.
        truncated_texts: Number of texts that were longer than the policy reads.
        policy_steps: Policy steps taken.
        gradient_steps: Gradient steps behind them that were kept; 0 is forward-only.
        seconds: From examples to adapter and head, the share of this task of a batch.
        bytes: Size of the LoRA.
        policy: Name, preset, base model and its fingerprint, pooling and maximum length.
        config: The settings.
    """

    chosen: str
    reason: str
    abstained: bool
    candidates: tuple[Candidate, ...]
    nearest_task: str | None
    nearest_adapter: str | None
    nearest_adapter_distance: float | None
    support: dict[str, int]
    truncated_texts: int
    policy_steps: int
    gradient_steps: int
    seconds: float
    bytes: int
    policy: dict[str, Any]
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class GeneratedAdapter:
    """A generated adapter.

    Args:
        lora: By module name `lora_A` (r, d_in) and `lora_B` (d_out, r), scaling 1.
        state: The same in the policy's weight space, shape (modules, width).
        path: Its any-time iterates, shape (policy steps + 1, modules, width).
        head: Closed-form classifier on the pooled embeddings of the adapted model.
        label_names: Class names by index of the head.
        report: What happened.
    """

    lora: dict[str, tuple[Tensor, Tensor]]
    state: Tensor
    path: Tensor
    head: Head
    label_names: tuple[str, ...]
    report: GenerationReport

    def record(
        self, *, policy_name: str | None = None, head: bool = True, label_names: Sequence[str] | None = None
    ) -> GenerationRecord:
        """What an adapter folder says of this generation.

        Args:
            policy_name: Name the policy was asked for by; that of its folder by default.
            head: Whether the head belongs to it.
            label_names: Class names in another order than that of the head.
        """
        tensors = {"weight": self.head.weight, "bias": self.head.bias} if head else None
        names = self.label_names if label_names is None else label_names
        return GenerationRecord(provenance_of(self.report.to_dict(), names, policy_name), tensors)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        base_model_name: str | None = None,
        task_type: str | None = "FEATURE_EXTRACTION",
        uniform: bool = False,
    ) -> None:
        """Write the adapter as a plain LoRA, with its provenance and a model card where somebody's own does not lie already.

        Args:
            folder: Folder to write.
            base_model_name: Hub id or folder of the base model; the policy's by default.
            task_type: PEFT's task type.
            uniform: Leave out `head.safetensors`, for servers that know LoRA only.

        Raises:
            ValueError: For the task type of a model with a head, in which the modules have other names; or when a card is there
                that is no text in UTF-8.
        """
        config, card = self._lora_config(base_model_name, task_type), read_card(folder)
        identity = self.report.chosen == "none"
        save_plain_lora(folder, self.lora, config, record=self.record(head=not uniform), allow_identity=identity)
        if is_replaced(card):
            write_card(folder, renewed_card("adapter", folder, metadata_of(card)))

    def to_tensors(
        self, base_model_name: str | None = None, task_type: str | None = "FEATURE_EXTRACTION"
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The adapter in memory, as `adapter_config.json` and `adapter_model.safetensors` would hold it.

        For `set_peft_model_state_dict`, and for servers that load adapters from tensors.

        Args:
            base_model_name: See `save_pretrained`.
            task_type: See `save_pretrained`.

        Raises:
            ValueError: See `save_pretrained`.
        """
        config = self._lora_config(base_model_name, task_type)
        fields = {**config.to_dict(), "peft_type": config.peft_type.value}  # plain values, as JSON would hold them
        return fields, plain_lora_tensors(self.lora, config.r)

    def _lora_config(self, base_model_name: str | None, task_type: str | None) -> Any:
        if task_type in NAMED_OTHERWISE:
            raise ValueError(
                f"`task_type` is {task_type!r}, but this adapter names modules as they are in {self.report.policy['base_model']!r} "
                "without a head, so it would change nothing in a model with one. Generate into that model: "
                "`get_peft_model(model, LoHpConfig(policy=...))` or `initialize_lohp_weights`."
            )
        name = base_model_name or self.report.policy["base_model"] or None
        rank = max(a.shape[0] for a, _ in self.lora.values())
        return plain_lora_config(name, self.lora, rank, task_type)

    def push_to_hub(
        self,
        repo_id: str,
        base_model_name: str | None = None,
        task_type: str | None = "FEATURE_EXTRACTION",
        uniform: bool = False,
        **kwargs: Any,
    ) -> PushReport:
        """Publish the adapter as a plain LoRA, with its provenance and its card.

        Args:
            repo_id: `owner/name`.
            base_model_name: See `save_pretrained`.
            task_type: See `save_pretrained`.
            uniform: See `save_pretrained`.
            **kwargs: See `lohp_peft.hub.push_folder`.

        Returns:
            What was uploaded; its `commit` is the revision to load.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, base_model_name, task_type, uniform)
            return push_folder(folder, repo_id, **kwargs)
