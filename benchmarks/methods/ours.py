"""The policy: its raw rollout, and the full product with its candidates."""

import torch
from torch import Tensor

from lohp_peft import generate_adapters
from lohp_peft.policy import rollout
from methods.base import Adapted, Method, Setting, Support


class Rollout(Method):
    """The policy's mean rollout."""

    conditional = True

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        return rollout(setting.policy, support.features)[0, -1]


class Generated(Method):
    """What a user gets."""

    def adapt(self, setting: Setting, tensors: dict[str, Tensor], support: Support, told=None) -> Adapted:
        encoder = setting.encoder
        with torch.no_grad():
            (made,) = generate_adapters(
                setting.policy, encoder.base_model, encoder.tokenizer, [support.examples], encoder=encoder
            )
        return Adapted(made.head, made.state)
