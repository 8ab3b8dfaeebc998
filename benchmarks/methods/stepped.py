"""The same gradient steps as ours may take, from the start of another method: what is left of a generator after them."""

from torch import Tensor

from lohp_peft import GenerationConfig
from lohp_peft.tasks import verified_steps
from methods.base import Method, Setting, Support, Training


class Stepped(Method):
    """Gradient steps from another method's adapter, kept where unseen examples confirm them."""

    def __init__(self, start: Method, steps: int, fitted_as: str | None = None) -> None:
        self.start, self.trained, self.fitted_as = start, start.trained, fitted_as
        self.config = GenerationConfig(gradient_steps=steps)

    def fit(self, training: Training) -> dict[str, Tensor]:
        return self.start.fit(training)

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        start, config = self.start.state(setting, tensors, support), self.config
        taken = verified_steps(
            setting.encoder,
            support.encoded,
            support.examples.targets,
            support.examples.n_classes,
            start,
            setting.policy.scale,
            steps=config.gradient_steps,
            learning_rate=config.gradient_learning_rate,
            margin=config.gradient_margin,
            ridge=setting.policy.config.ridge,
            seed=config.seed,
        )
        return taken.state if taken is not None and taken.confirmed else start
