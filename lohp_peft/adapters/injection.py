"""Running a base model under adapters given as states, without changing the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lohp_peft.adapters.layout import base_of
from lohp_peft.adapters.space import WeightSpace


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which all of `model` is in evaluation mode; what was in training is so again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def injected(model: nn.Module, space: WeightSpace, states: Tensor, owner: Tensor | None = None) -> Iterator[None]:
    """A context in which the updates of `states` are added to the outputs of the target modules.

    Args:
        model: A base model, or a `PeftModel` around it.
        space: Weight space of the states.
        states: Adapters, shape (s, modules, width); gradients flow to them.
        owner: Adapter of each row of a batch, shape (n,), or `None` when there is one adapter.

    Raises:
        ValueError: When a module of the space is not in the model.
    """
    base = base_of(model)
    modules = dict(base.named_modules())
    missing = [spec.name for spec in space.layout.modules if spec.name not in modules]
    if missing:
        raise ValueError(f"{type(base).__name__} lacks {len(missing)} target modules: {', '.join(missing)}.")

    def hook_for(index: int):
        def hook(_module, args, output):
            return output + space.apply(index, args[0], states, owner).to(output.dtype)

        return hook

    # Prepended, so that whoever listens to a module's output sees the adapted one.
    handles = [
        modules[spec.name].register_forward_hook(hook_for(i), prepend=True)
        for i, spec in enumerate(space.layout.modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
