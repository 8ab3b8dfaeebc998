"""A new task's adapter from a few examples: forward-only unless asked otherwise, any-time, seeded, scored, with the right to abstain."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn

from lohp_peft.adapters.export import (
    GenerationRecord,
    plain_lora_config,
    plain_lora_tensors,
    provenance_of,
    save_plain_lora,
)
from lohp_peft.adapters.injection import evaluating
from lohp_peft.adapters.layout import base_model_fingerprint, base_of
from lohp_peft.adapters.writing import only_active
from lohp_peft.candidates import Candidate, CandidateSet, Choice, GenerationConfig
from lohp_peft.cards import write_card
from lohp_peft.cards.ownership import is_replaced, metadata_of, read_card
from lohp_peft.cards.renewal import renewed_card
from lohp_peft.hub import PushReport, find_policy, push_folder
from lohp_peft.policy import LoHpPolicy
from lohp_peft.tasks import Head, TaskFeatures, TextEncoder, tokenizer_problems
from lohp_peft.tasks.requirements import check_base_model
from lohp_peft.tasks.task import Support, read_support

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


def load_policy(policy: LoHpPolicy | str | os.PathLike) -> LoHpPolicy:
    """A policy by its name, see `lohp_peft.hub.find_policy`, or the policy itself.

    Raises:
        ValueError: When there is no policy of that name.
    """
    name = policy_name(policy)
    return cast(LoHpPolicy, policy) if name is None else LoHpPolicy.from_pretrained(find_policy(name)).eval()


def policy_name(policy: LoHpPolicy | str | os.PathLike) -> str | None:
    """The name that a policy was asked for by, or `None` for the policy itself."""
    return os.fspath(policy) if isinstance(policy, str | os.PathLike) else None


def encoder_for(policy: LoHpPolicy, base_model: nn.Module, tokenizer: Any, mixed_precision: str = "no") -> TextEncoder:
    """The encoder the policy was trained with, around `base_model`.

    Args:
        policy: The policy.
        base_model: Its base model.
        tokenizer: Its tokenizer.
        mixed_precision: `"bf16"` for forward passes under autocast, `"no"` for the model's own type.

    Raises:
        ValueError: When base model, layout or tokenizer are not the policy's, naming both sides of all that differ, or
            the base model does not read texts.
    """
    check_base_model(base_of(base_model), tokenizer)
    config, problems = policy.config, []
    try:
        policy.layout.check_fits(base_model)
    except ValueError as error:
        problems.append(str(error))
    found = base_model_fingerprint(base_model)
    if config.base_fingerprint and found != config.base_fingerprint:
        name = getattr(getattr(base_model, "config", None), "_name_or_path", "") or type(base_model).__name__
        problems.append(
            f"the policy was trained on base model {config.base_model_name!r} (fingerprint {config.base_fingerprint[:12]}), "
            f"got {name!r} ({found[:12]}) in {getattr(base_model, 'dtype', 'an unknown type')}; the same weights in another "
            "type or quantised are another base model"
        )
    problems += tokenizer_problems(tokenizer, config.tokenizer_fingerprint, config.tokenizer_reading)
    if problems:
        raise ValueError(
            "The policy does not fit: " + "; ".join(problems) + ". Load what the policy was trained with."
        )
    dtype = torch.bfloat16 if mixed_precision == "bf16" else None
    reading = {"pooling": config.pooling, "max_length": config.max_text_length}
    return TextEncoder(base_model, tokenizer, policy.space, **reading, dtype=dtype)


def _check_encoder(encoder: TextEncoder, policy: LoHpPolicy, base_model: nn.Module) -> None:
    """Refuse an encoder that `encoder_for` would not give for this policy and base model."""
    if encoder.base_model is not base_of(base_model):
        raise ValueError(
            "`encoder` must be around `base_model`, got one around another model; make it with `encoder_for`."
        )
    config, problems = policy.config, []
    reads, wanted = (encoder.pooling, encoder.max_length), (config.pooling, config.max_text_length)
    if reads != wanted:
        problems.append(f"it reads texts with (pooling, max_length) = {reads}, the policy with {wanted}")
    if encoder.space is not policy.space:
        theirs, mine = encoder.space.to_tensors(), policy.space.to_tensors()
        if theirs.keys() != mine.keys() or not all(torch.equal(theirs[key].to(x), x) for key, x in mine.items()):
            problems.append("the bases of its weight space are not the policy's")
    if problems:
        raise ValueError(f"`encoder` must be the policy's, but {'; '.join(problems)}; make it with `encoder_for`.")


def generate_adapter(
    policy: LoHpPolicy | str | os.PathLike,
    base_model: nn.Module,
    tokenizer: Any,
    support: Support,
    config: GenerationConfig | None = None,
) -> GeneratedAdapter:
    """Generate the adapter of one task.

    Args:
        policy: The policy or its name.
        base_model: Its base model, with or without a PEFT wrapper.
        tokenizer: Its tokenizer.
        support: `Examples`, a `datasets.Dataset`, or rows `{text[, text_b], label}`.
        config: Settings.

    Returns:
        The adapter with its head and report, see `generate_adapters`.

    Raises:
        ValueError: See `generate_adapters`.
    """
    return generate_adapters(policy, base_model, tokenizer, [support], config)[0]


@contextmanager
def as_trained(policy: LoHpPolicy, base_model: nn.Module) -> Iterator[None]:
    """A context in which the policy has no dropout, the base model no adapters, and an autocast around it no effect.

    Raises:
        ValueError: When the base model holds merged adapters, or the policy is in half precision.
    """
    if policy.scale.dtype.itemsize < 4:
        raise ValueError(f"A policy computes in float32 or wider, got {policy.scale.dtype}; see `mixed_precision`.")
    devices = {x.device.type for x in (policy.scale, *base_model.parameters())} - {"meta"}
    with ExitStack() as stack, evaluating(policy), only_active(base_of(base_model), None):
        for device in sorted(devices):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@torch.inference_mode(False)  # gradient steps need gradients, and what is generated can be trained
@torch.no_grad()
def generate_adapters(
    policy: LoHpPolicy | str | os.PathLike,
    base_model: nn.Module,
    tokenizer: Any,
    supports: Sequence[Support],
    config: GenerationConfig | None = None,
    *,
    encoder: TextEncoder | None = None,
) -> list[GeneratedAdapter]:
    """Generate adapters for several tasks in one batch, without gradients unless `gradient_steps` asks for them.

    The policy's mean rollout is the generated adapter. When `choose` is on it is compared with no adapter, with the
    training tasks' mean adapter, with the average of the two adapters and with the further candidates asked for, by the
    leave-one-out loss of a ridge head on the support set, whichever head is used then; another one replaces it only when it is better by `margin`
    standard errors (Ours: the policy is better on average, so a noisy comparison has to be convincing; that it was
    conditioned on the examples it is scored on was worth 0.01 nats on validation tasks, and conditioning it on
    halves chose no better for two more passes over the texts).

    Args:
        policy: The policy or its name.
        base_model: Its base model, with or without a PEFT wrapper.
        tokenizer: Its tokenizer.
        supports: One support set a task: `Examples`, a `datasets.Dataset`, or rows `{text[, text_b], label}`.
        config: Settings.
        encoder: From `encoder_for`, to check and build it once for many calls; its precision is the one that counts.

    Returns:
        One `GeneratedAdapter` a task; a batch and single calls give the same up to rounding.

    Raises:
        ValueError: On a support set, base model, tokenizer or setting that does not fit, naming both sides.
    """
    config = config or GenerationConfig()
    if not len(supports):
        raise ValueError("`supports` must hold at least one support set, got none.")
    name, policy = policy_name(policy), load_policy(policy)
    policy.optimizer_index(config.optimizer, 1)  # refuses an unknown one before any work
    start = time.perf_counter()
    examples = [read_support(support) for support in supports]
    if encoder is not None:
        _check_encoder(encoder, policy, base_model)
    made = []
    with as_trained(policy, base_model):
        encoder = encoder or encoder_for(policy, base_model, tokenizer, config.mixed_precision)
        job = CandidateSet(policy, encoder, examples, config)
        features = TaskFeatures.stack([job.features(i) for i in range(len(examples))])
        paths = job.rollout(features)
        choices = job.choose(features, paths)
        embeddings = job.embeddings(choices)
        seconds = (time.perf_counter() - start) / len(examples)
        for i, (task, choice) in enumerate(zip(examples, choices, strict=True)):
            head = job.solve(embeddings[i], task.targets, task.n_classes)
            lora = policy.space.decode(choice.state)
            report = _report(job, i, features, choice, seconds, lora, name)
            made.append(GeneratedAdapter(lora, choice.state, paths[i], head, task.label_names, report))
    return made


def _report(
    job: CandidateSet,
    i: int,
    features: TaskFeatures,
    choice: Choice,
    seconds: float,
    lora: dict[str, tuple[Tensor, Tensor]],
    name: str | None,
) -> GenerationReport:
    policy, examples, reference, state = job.policy, job.examples[i], job.policy.reference_set, choice.state
    nearest, distance = (
        reference.nearest_state_distance(state) if reference is not None and state.any() else (None, None)
    )
    return GenerationReport(
        chosen=choice.name,
        reason=choice.reason,
        abstained=choice.name in ("none", "mean"),
        candidates=choice.candidates,
        nearest_task=None if reference is None else reference.names[reference.nearest(features[i])],
        nearest_adapter=None if nearest is None or reference is None else reference.names[nearest],
        nearest_adapter_distance=distance,
        support={name: examples.labels.count(c) for c, name in enumerate(examples.label_names)},
        truncated_texts=job.truncated[i],
        policy_steps=job.config.policy_steps or policy.config.policy_steps,
        gradient_steps=choice.gradient_steps,
        seconds=seconds,
        bytes=sum(x.nbytes for pair in lora.values() for x in pair),
        policy={
            "name": name or policy.name_or_path,
            "preset": policy.config.preset,
            "base_model": policy.config.base_model_name,
            "base_fingerprint": policy.config.base_fingerprint,
            "pooling": policy.config.pooling,
            "max_length": policy.config.max_text_length,
        },
        config={**asdict(job.config), "mixed_precision": "no" if job.encoder.dtype is None else "bf16"},
    )
