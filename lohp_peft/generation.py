"""A new task's adapter from a few examples: forward-only unless asked otherwise, any-time, seeded, scored, with the right to abstain."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from lohp_peft.adapters.injection import evaluating
from lohp_peft.adapters.layout import base_model_fingerprint, base_of
from lohp_peft.adapters.writing import only_active
from lohp_peft.candidates import CandidateSet, Choice, GenerationConfig
from lohp_peft.generated import GeneratedAdapter, GenerationReport
from lohp_peft.hub import find_policy
from lohp_peft.policy import LoHpPolicy
from lohp_peft.tasks import TaskFeatures, TextEncoder, tokenizer_problems
from lohp_peft.tasks.requirements import check_base_model
from lohp_peft.tasks.task import Support, read_support


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
