"""The gradient baseline: a stock PEFT LoRA trained by AdamW on the same examples."""

import copy
from collections.abc import Mapping, Sequence

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from lohp_peft.fields import is_number
from lohp_peft.policy import LoHpPolicy
from lohp_peft.tasks import Examples, Head, TextEncoder, solve_head

INITS = ("default", "eva")
_ADAPTER = "adamw_baseline"
"""Of the copy that is trained, which may hold other adapters."""


class AdamWBaseline:
    """Fine-tunes a LoRA of the policy's rank and target modules from one of PEFT's starts.

    It gets what the policy gets: the same examples, frozen lower layers run once, and the same closed-form head, which
    is solved first, trained along with the adapter by cross-entropy, and solved anew on the adapted embeddings.

    Args:
        base_model: The base model; a copy is adapted.
        tokenizer: Its tokenizer.
        policy: Gives rank, target modules, pooling and head.
        learning_rate: AdamW's learning rate of the adapter.
        steps: Optimizer steps.
        batch_size: Examples in a step.
        init: `"default"`, or `"eva"`: A along the leading directions of the modules' inputs on the support set
            (Known: 2410.07170), all modules at the same rank.
        dtype: Autocast type of the forward passes, or `None` for the model's own.
        head: `"ridge"` or `"prototype"`, or `None` for the policy's own.

    Raises:
        ValueError: When a value is out of range.
    """

    def __init__(
        self,
        base_model: nn.Module,
        tokenizer,
        policy: LoHpPolicy,
        *,
        learning_rate: float = 1e-3,
        steps: int = 20,
        batch_size: int = 32,
        init: str = "default",
        dtype: torch.dtype | None = None,
        head: str | None = None,
    ) -> None:
        if steps < 1 or batch_size < 1:
            raise ValueError(f"AdamW needs at least 1 step of at least 1 example, got {steps} steps of {batch_size}.")
        if not (is_number(learning_rate) and learning_rate > 0):
            raise ValueError(f"AdamW's learning rate must be a positive number, got {learning_rate!r}.")
        if init not in INITS:
            raise ValueError(f"`init` must be one of {list(INITS)}, got {init!r}.")
        self.base_model, self.tokenizer, self.policy, self.init = base_model, tokenizer, policy, init
        self.learning_rate, self.steps, self.batch_size, self.dtype = learning_rate, steps, batch_size, dtype
        self.head = head or policy.config.head

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(
        self,
        support: Examples,
        seed: int,
        checkpoints: tuple[int, ...] = (),
        start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> list[tuple[TextEncoder, Head]]:
        """Train on a support set.

        Args:
            support: The examples.
            seed: Seed of LoRA's start and of the batches.
            checkpoints: Further optimizer steps, ascending and below `steps`, at which to return a copy as well; 0 is
                the start.
            start: Adapter to start from in the place of `init`, by module name `lora_A` (r, d_in) and `lora_B` (d_out, r)
                with scaling 1, such as `GeneratedAdapter.lora`.

        Returns:
            The adapted encoder and its head, at every checkpoint and at the end.

        Raises:
            ValueError: When a checkpoint is out of range, or `start` is of other modules or of another rank than the policy's.
        """
        if outside := [step for step in checkpoints if not 0 <= step < self.steps]:
            raise ValueError(
                f"`checkpoints` must be in 0..{self.steps - 1}, below the {self.steps} steps; got {outside}."
            )
        config = self.policy.config
        names = [spec.name for spec in self.policy.layout.modules]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            eva = self.init == "eva" and start is None
            init = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)} if eva else {}
            adapted = get_peft_model(
                copy.deepcopy(self.base_model),
                LoraConfig(r=config.r, lora_alpha=config.r, target_modules=names, **init),
                adapter_name=_ADAPTER,
            )
            if eva:
                initialize_lora_eva_weights(
                    adapted, self._batches(support), adapter_name=_ADAPTER, show_progress_bar=False
                )
        adapted.base_model.enable_adapter_layers()  # those of a base model with adapters are off for its embeddings
        adapted.set_adapter(_ADAPTER)
        if start is not None:
            _load(adapted, start, names, config.r)
        if hasattr(adapted.get_base_model(), "set_attn_implementation"):
            # Fused attention goes backwards slowly on a CPU (measured: 3 times); the baseline gets the faster one.
            adapted.get_base_model().set_attn_implementation("eager")
        encoder = self._encoder(adapted.get_base_model())
        encoded = encoder.prepare(support.texts, support.texts_b)
        targets, found = support.targets.to(encoder.device), []
        with torch.no_grad():
            head = self._solve(encoder.embed(encoded), targets, support.n_classes)
        weight, bias = head.weight.clone().requires_grad_(True), head.bias.clone().requires_grad_(True)
        lora = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [{"params": lora, "lr": self.learning_rate}, {"params": [weight, bias], "lr": self.learning_rate}],
            weight_decay=0.01,
        )
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for step in range(self.steps + 1):
            if step in checkpoints or step == self.steps:
                with torch.no_grad():
                    found.append((encoder, self._solve(encoder.embed(encoded), targets, support.n_classes)))
                if step == self.steps:
                    break
                found[-1] = (self._encoder(copy.deepcopy(encoder.base_model)), found[-1][1])
            if len(order) < min(self.batch_size, len(targets)):
                order = torch.cat([order, torch.randperm(len(targets), generator=generator)])
            rows, order = order[: self.batch_size], order[self.batch_size :]
            logits = normalize(encoder.embed(encoded[rows]), dim=-1) @ weight.T + bias
            loss = cross_entropy(logits, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return found

    def _batches(self, support: Examples) -> list[dict[str, Tensor]]:
        """The support texts as a model reads them."""
        limits = {"truncation": True, "max_length": self.policy.config.max_text_length}
        size, pairs = self.batch_size, support.texts_b
        parts = [slice(i, i + size) for i in range(0, len(support), size)]
        return [
            dict(
                self.tokenizer(
                    list(support.texts[part]),
                    None if pairs is None else list(pairs[part]),
                    padding=True,
                    padding_side="right",
                    return_tensors="pt",
                    **limits,
                ).to(self.base_model.device)
            )
            for part in parts
        ]

    def _solve(self, embeddings: Tensor, targets: Tensor, n_classes: int) -> Head:
        return solve_head(embeddings, targets, n_classes, self.head, ridge=self.policy.config.ridge)

    def _encoder(self, model: nn.Module) -> TextEncoder:
        config = self.policy.config
        lengths = {"pooling": config.pooling, "max_length": config.max_text_length}
        return TextEncoder(model, self.tokenizer, self.policy.space, **lengths, dtype=self.dtype)


def _load(model: nn.Module, start: Mapping[str, tuple[Tensor, Tensor]], names: Sequence[str], r: int) -> None:
    """Write an adapter into a LoRA of rank `r` on the modules `names`."""
    ranks = sorted({len(a) for a, _ in start.values()})
    if set(start) != set(names) or ranks != [r]:
        raise ValueError(
            f"`start` must be a LoRA of rank {r} on the policy's {len(names)} modules, got rank {ranks} on {len(start)} modules "
            f"(missing {sorted(set(names) - set(start))}, unknown {sorted(set(start) - set(names))})."
        )
    tensors = {}
    for name, pair in start.items():
        for part, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
            tensors[f"base_model.model.{name}.{part}.weight"] = tensor
    set_peft_model_state_dict(model, tensors, adapter_name=_ADAPTER)
