"""Configuration of stage 2."""

import math
from dataclasses import dataclass, field

from lohp_peft.fields import check_switches, document_fields, take_whole_numbers
from lohp_peft.policy.config import NUM_HEADS
from lohp_peft.tasks.heads import HEADS

PRESETS = ("behaviour_cloning", "lohp", "lohp+path")
REFERENCES = ("clone", "backward")
MODES = ("hybrid", "on_policy", "off_policy")


def _field(default, help: str):
    return field(default=default, metadata={"help": help})


@document_fields
@dataclass(kw_only=True)
class PolicyLearningConfig:
    """Settings of policy learning; the presets are `lohp` (the paper's ingredients), `lohp+path`, `behaviour_cloning`.

    Defaults are Ours; `benchmarks/NOTES.md` and `DECISIONS.md` say which were compared, and with what.

    Raises:
        ValueError: Listing every value out of range.
    """

    preset: str = _field(
        "lohp+path", "one of behaviour_cloning, lohp, lohp+path; lohp+path adds the reward's gradient"
    )
    mode: str = _field("hybrid", "segments used: hybrid, on_policy only or off_policy only (ablations)")
    reference: str = _field(
        "clone",
        "in the place of the backward policy: clone (a frozen behaviour clone, the relative form) or backward (a backward "
        "policy fitted on the recordings)",
    )
    refresh_kl: float = _field(
        5.0,
        "nats a trajectory that the policy must have left its clone by, with a better validation loss, for the clone to "
        "be taken anew; inf for never",
    )
    final_weights_only: bool = _field(
        False, "use only the last recorded state of a run, reached on a straight line (ablation)"
    )
    subtb_lambda: float = _field(1.0, "lambda of SubTB; 0 is detailed balance, inf trajectory balance")
    cloning_steps: int = _field(400, "training steps of behaviour cloning before anything else")
    training_steps: int = _field(1500, "training steps after behaviour cloning")
    batch_size: int = _field(4, "episodes in a training step, over all processes")
    recorded_batch_size: int = _field(16, "recorded segments in a training step")
    rollouts_per_task: int = _field(4, "on-policy rollouts of an episode")
    on_policy_every: int = _field(50, "training steps between fresh rollouts; in between they are replayed")
    buffer_size: int = _field(64, "rollouts kept for replay")
    learning_rate: float = _field(3e-3, "Adam's learning rate of gates and directions")
    free_learning_rate: float = _field(5e-4, "Adam's learning rate of the transformer behind the free moves")
    log_flow_learning_rate: float = _field(1e-2, "Adam's learning rate of the log flow")
    cloning_weight: float = _field(
        0.1, "weight of the cloning gradient after behaviour cloning, once it is clipped to max_grad_norm"
    )
    subtb_weight: float = _field(
        0.1, "weight of the gradient of sub-trajectory balance, once it is clipped to max_grad_norm"
    )
    path_weight: float = _field(
        1.0, "weight of the pathwise gradient in lohp+path, once it is clipped to max_grad_norm"
    )
    path_prefix_weight: float = _field(0.0, "share of the pathwise loss on the states before the last (any-time)")
    kl_target: float = _field(3.0, "nats per trajectory that set the temperature")
    robust_delta: float = _field(20.0, "residual, in nats, beyond which SubTB is linear")
    support_size: int = _field(96, "most support texts of an episode; sets memory, with batch_size")
    max_classes: int = _field(20, "most classes of an episode")
    contrast: float = _field(0.3, "share of episodes with conflicting labelings of the same texts")
    optimizer_dropout: float = _field(0.3, "probability that the optimizer token is hidden")
    rows_per_task: int = _field(500, "texts kept per task")
    head: str = _field("ridge", "closed-form head, ridge or prototype")
    ridge: float = _field(3.0, "penalty of the ridge head")
    policy_steps: int = _field(4, "policy steps of a rollout")
    num_directions: int = _field(24, "learned directions mixed by the gates")
    hidden_size: int = _field(128, "width of the policy's networks, a multiple of its attention heads")
    dropout: float = _field(0.2, "dropout on the gates' features")
    noise_scale: float = _field(1.0, "policy standard deviation over the recorded root-mean-square step")
    max_grad_norm: float = _field(1.0, "norm above which the gradient of each loss is clipped, before its weight")
    validate_every: int = _field(250, "training steps between validations")
    validation_episodes: int = _field(48, "episodes of a validation")
    save_every: int = _field(100, "training steps between checkpoints")
    mixed_precision: str = _field(
        "no", "no or bf16, of the policy's networks; log-probabilities stay float32; the encoder has a type of its own"
    )
    seed: int = _field(0, "seed of everything")

    def __post_init__(self) -> None:
        take_whole_numbers(self)
        check_switches(self)
        problems = []
        choices_of = {"preset": PRESETS, "mode": MODES, "reference": REFERENCES, "head": HEADS}
        choices_of["mixed_precision"] = ("no", "bf16")
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                problems.append(f"`{name}` must be one of {list(choices)}, got {getattr(self, name)!r}")
        least = dict.fromkeys(
            ("batch_size", "recorded_batch_size", "on_policy_every", "policy_steps", "buffer_size"), 1
        )
        least |= dict.fromkeys(("validate_every", "validation_episodes", "save_every", "rows_per_task"), 1)
        least |= {"support_size": 4, "max_classes": 2, "num_directions": 1, "hidden_size": 1}
        least["rollouts_per_task"] = 2  # whose spread sets the temperature
        for name, low in least.items():
            if getattr(self, name) < low:
                problems.append(f"`{name}` must be at least {low}, got {getattr(self, name)}")
        made = self.rollouts_per_task * (2 if self.mode == "hybrid" else 1)
        if self.mode != "off_policy" and self.preset != "behaviour_cloning" and self.buffer_size < made:
            problems.append(
                f"`buffer_size` must be at least {made}, the rollouts made at a time (`rollouts_per_task`, and as many from "
                f"recorded prefixes in mode hybrid), got {self.buffer_size}"
            )
        if self.final_weights_only and self.reference == "backward":
            problems.append(
                "`reference` must be clone with `final_weights_only`, got 'backward': on a straight line the way back is certain "
                "and has no density"
            )
        if self.hidden_size % NUM_HEADS:
            problems.append(f"`hidden_size` must be a multiple of {NUM_HEADS} attention heads, got {self.hidden_size}")
        units = {"kl_target": " nats", "robust_delta": " nats", "max_grad_norm": "", "ridge": "", "noise_scale": ""}
        for name, unit in units.items():
            if not getattr(self, name) > 0:
                problems.append(f"`{name}` must be above 0{unit}, got {getattr(self, name)}")
        for name in (
            "cloning_steps",
            "training_steps",
            "subtb_lambda",
            "learning_rate",
            "free_learning_rate",
            "log_flow_learning_rate",
            "cloning_weight",
            "path_weight",
            "subtb_weight",
            "refresh_kl",
        ):
            if not getattr(self, name) >= 0:
                problems.append(f"`{name}` must be at least 0, got {getattr(self, name)}")
            elif math.isinf(getattr(self, name)) and name not in ("subtb_lambda", "refresh_kl"):
                problems.append(f"`{name}` must be finite, got {getattr(self, name)}")
        for name in ("contrast", "optimizer_dropout", "dropout", "path_prefix_weight"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"`{name}` must be a share in 0..1, got {getattr(self, name)}")
        if problems:
            raise ValueError("Policy learning: " + "; ".join(problems) + ".")

    @property
    def hybrid_steps(self) -> int:
        """Training steps that are taken after behaviour cloning: none where it is the whole preset."""
        return 0 if self.preset == "behaviour_cloning" else self.training_steps

    def learning_rate_share(self, step: int) -> float:
        """The share of the learning rates at training step `step`: warm-up and cosine decay within each phase."""
        first, cloning = step < self.cloning_steps, self.cloning_steps
        done, total = (step, cloning) if first else (step - cloning, self.training_steps)
        return min(1.0, (done + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / max(total, 1))))
