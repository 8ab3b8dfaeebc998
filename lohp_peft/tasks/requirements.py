"""What a base model must be so that `TextEncoder` can read and adapt it; found out before any work."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lohp_peft.adapters.layout import unloaded

POSITIONS = re.compile(r"(^|\.)(position_embeddings?|embed_positions|wpe)$")
"""Names of tables of learned positions in the models of transformers."""


def check_base_model(model: nn.Module, tokenizer: Any = None) -> None:
    """Refuse a base model that gives no hidden state per token of a text, and a tokenizer that cannot pad.

    Args:
        model: A base model, without a PEFT wrapper.
        tokenizer: Its tokenizer, when it is known.

    Raises:
        ValueError: Listing everything that stands in the way and what to do about it.
    """
    problems = []
    reads = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids":
        problems.append(
            f"it reads `{reads}`, but a policy is conditioned on texts; other adapters of such a model can be encoded, "
            "decoded and saved (`WeightSpace`, `save_plain_lora`)"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        problems.append(
            "it is an encoder with a decoder; pass its encoder alone, such as T5EncoderModel (AutoModelForTextEncoding): "
            "what is generated for that loads into the whole model too"
        )
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        problems.append(f"it has a head; pass `model.{prefix}`, which is what AutoModel loads")
    if problem := unloaded({name: x for name, x in model.named_parameters() if ".lora_" not in name}):
        problems.append(problem)
    if getattr(tokenizer, "pad_token", "") is None:
        problems.append("its tokenizer has no padding token; set `tokenizer.pad_token = tokenizer.eos_token`")
    if problems:
        raise ValueError(f"{type(model).__name__} cannot be read as texts are: " + "; ".join(problems) + ".")


def check_length(model: nn.Module, tokenizer: Any, max_length: int, *, pairs: bool = False) -> None:
    """Refuse a length of texts that the model has no positions for, or that special tokens alone fill.

    Args:
        model: A base model.
        tokenizer: Its tokenizer.
        max_length: Longest text, in tokens.
        pairs: Whether texts are pairs.

    Raises:
        ValueError: Naming both numbers.
    """
    tables = [m for name, m in model.named_modules() if POSITIONS.search(name) and isinstance(m, nn.Embedding)]
    most = [m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1) for m in tables]
    if tables and (said := getattr(getattr(model, "config", None), "max_position_embeddings", None)):
        most.append(said)  # some tables have rows in front
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if most and max_length > min(most):
        raise ValueError(
            f"`max_length` must be at most {min(most)}, the positions of the base model, got {max_length}."
        )
    if max_length <= special:
        kind = "pair of texts" if pairs else "text"
        raise ValueError(f"`max_length` must be above the {special} special tokens of a {kind}, got {max_length}.")


def check_tokens(model: nn.Module, ids: Tensor) -> None:
    """Refuse tokens that the model has no embeddings of.

    Args:
        model: A base model.
        ids: Token ids.

    Raises:
        ValueError: Naming the highest token and the number of embeddings.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is not None and (highest := int(ids.max())) >= rows:
        raise ValueError(
            f"The tokenizer gives token {highest}, but {type(model).__name__} has embeddings of {rows} tokens. Use the tokenizer "
            "that belongs to it, or call `resize_token_embeddings(len(tokenizer))` on the model."
        )


def give_padding(tokenizer: Any) -> Any:
    """A tokenizer that can pad: without a padding token it gets its end-of-text token, for padding is masked."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_gradients(model: nn.Module) -> None:
    """Refuse a base model that passes no gradients on to its lower layers, which both stages of training need.

    Raises:
        ValueError: For 4-bit weights on a CPU.
    """
    weights: dict[str, Any] = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    packed = [n for n, w in weights.items() if getattr(w, "quant_state", None) is not None and w.device.type == "cpu"]
    if packed:
        raise ValueError(
            f"{len(packed)} modules have 4-bit weights on a CPU, such as {packed[0]}: bitsandbytes passes no gradients through "
            "them in evaluation mode. Train on a GPU, or with weights of 8 bits or more."
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the parameters of a base model while it is learned from; afterwards they are as they were."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def check_inputs(calls: Mapping[str, Sequence[tuple[int, ...]]], texts: int, tokens: int) -> None:
    """Refuse target modules that read anything else than one row per token of each text.

    Args:
        calls: By module name the shape of its input at every call of one forward pass.
        texts: Texts of that pass.
        tokens: Tokens of each, with padding.

    Raises:
        ValueError: Naming every such module and what it read.
    """
    wrong = {
        name: shapes for name, shapes in calls.items() if not shapes or any(s[:-1] != (texts, tokens) for s in shapes)
    }
    if wrong:
        found = "; ".join(
            f"{name}: {list(shapes[-1]) if shapes else 'never called'}" for name, shapes in wrong.items()
        )
        raise ValueError(
            f"{len(wrong)} target modules do not read one row per token (expected [{texts}, {tokens}, d_in]): {found}. "
            "Routed experts and projections of relative positions do not; leave them out of `target_modules`."
        )


class LayerCalls:
    """What the layers of a stack gave in one forward pass, to tell whether the lower ones can be run once and skipped.

    (Ours: some models hand position biases from layer to layer, or run one layer several times.)

    Args:
        layers: The stack.
        first: Index of the first adapted layer.
    """

    def __init__(self, layers: Sequence[nn.Module], first: int) -> None:
        self._calls: dict[int, list[Any]] = {i: [] for i in range(first + 1)}
        self._first = first
        self.handles = [layers[i].register_forward_hook(self._keep(i)) for i in self._calls]

    def _keep(self, index: int):
        def hook(_module, _args, output):
            self._calls[index].append(output)

        return hook

    @property
    def skippable(self) -> bool:
        """Whether every layer up to the first adapted one ran once and the lower ones gave hidden states only."""
        once = all(len(calls) == 1 for calls in self._calls.values())
        return once and all(
            isinstance(self._calls[i][0], Tensor) and self._calls[i][0].dim() == 3 for i in range(self._first)
        )
