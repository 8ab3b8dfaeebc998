"""The policy: its raw rollout, and the full product with its candidates."""

import torch
from torch import Tensor

from lohp_peft import GenerationConfig, generate_adapters
from lohp_peft.policy import rollout
from methods.base import Adapted, Method, Setting, Support


class Rollout(Method):
    """The policy's mean rollout."""

    conditional = True

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        return rollout(setting.policy, support.features)[0, -1]


class Generated(Method):
    """What a user gets, forward-only or with `gradient_steps` that unseen examples confirm."""

    def __init__(self, gradient_steps: int = 0) -> None:
        self.config = GenerationConfig(gradient_steps=gradient_steps)

    def adapt(self, setting: Setting, tensors: dict[str, Tensor], support: Support, told=None) -> Adapted:
        encoder = setting.encoder
        with torch.no_grad():
            (made,) = generate_adapters(
                setting.policy,
                encoder.base_model,
                encoder.tokenizer,
                [support.examples],
                self.config,
                encoder=encoder,
            )
        return Adapted(made.head, made.state)
