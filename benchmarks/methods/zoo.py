"""Methods that take or mix the training tasks' adapters, without gradients and without training of their own."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from methods.base import Method, Setting, Support


class Zero(Method):
    """No adapter, as a state."""

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        return setting.policy.scale.new_zeros(tuple(setting.policy.space.shape))


class Mean(Method):
    """The average adapter."""

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        return setting.policy.reference_set.mean_state()


class Nearest(Method):
    """The adapter of the training task whose texts lie nearest, or the average of several, weighted by similarity."""

    def __init__(self, count: int = 1, temperature: float = 0.1) -> None:
        self.count, self.temperature = count, temperature

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        reference = setting.policy.reference_set
        half = reference.features.set.shape[-1] // 2
        found = cosine_similarity(reference.features.set[:, :half], support.features.set[:, :half]).topk(
            min(self.count, len(reference.names))
        )
        weights = (found.values / self.temperature).softmax(0)
        return torch.einsum("n,nmw->mw", weights, reference.states[found.indices])


class BestBySupportLoss(Method):
    """The training adapter with the lowest leave-one-out loss on the support set: retrieval with a judge."""

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        states = setting.policy.reference_set.states
        return states[int(setting.support_losses(support, states).argmin())]


class LoraHub(Method):
    """A weighted sum of 20 training adapters, found without gradients (Known: 2307.13269).

    Weights within +-1.5 minimise the support loss plus 0.05 of their mean size, 40 evaluations from zero. The published
    search is nevergrad's NGOpt; this one is CMA-ES from the package `cma`, with its own step rule. Updates are added,
    not factors, which has no cross terms.
    """

    requires = ("cma",)

    def __init__(self, adapters: int = 20, evaluations: int = 40) -> None:
        self.adapters, self.evaluations = adapters, evaluations

    def state(self, setting: Setting, tensors: dict[str, Tensor], support: Support) -> Tensor:
        import cma

        states = setting.policy.reference_set.states
        generator = torch.Generator().manual_seed(support.seed)
        chosen = states[torch.randperm(len(states), generator=generator)[: self.adapters]]

        def mixed(weights) -> Tensor:
            return torch.einsum("n,nmw->mw", torch.as_tensor(weights, dtype=states.dtype), chosen)

        def loss(weights) -> float:
            return float(setting.support_losses(support, mixed(weights)[None])) + 0.05 * float(abs(weights).mean())

        options = {"bounds": [-1.5, 1.5], "maxfevals": self.evaluations, "seed": support.seed + 1, "verbose": -9}
        search = cma.CMAEvolutionStrategy([0.0] * len(chosen), 0.3, options)
        best, best_loss = torch.zeros(len(chosen)), loss(torch.zeros(len(chosen)).numpy())
        while search.countevals < self.evaluations and not search.stop():
            asked = search.ask()
            losses = [loss(weights) for weights in asked]
            search.tell(asked, losses)
            if min(losses) < best_loss:
                best, best_loss = asked[losses.index(min(losses))], min(losses)
        return mixed(best)
