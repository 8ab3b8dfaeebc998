"""Sentence embeddings of a base model under generated adapters, with the frozen lower layers run once."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.nn.functional import pad

from lohp_peft.adapters.injection import evaluating, injected
from lohp_peft.adapters.layout import base_of
from lohp_peft.adapters.space import WeightSpace
from lohp_peft.tasks.features import TextStatistics
from lohp_peft.tasks.fingerprint import tokenizer_fingerprint
from lohp_peft.tasks.reading import tokenize
from lohp_peft.tasks.requirements import LayerCalls, check_base_model, check_inputs, check_length, check_tokens

POOLINGS = ("mean", "first", "last")
LEAST_CHUNK = 8
LEAST_CHUNK_ON_ACCELERATORS = 64
PROBE = ("a", "a b c d")
_PROBED: WeakKeyDictionary = WeakKeyDictionary()


@dataclass(frozen=True)
class EncodedTexts:
    """Texts ready for the adapted part of the base model.

    Args:
        hidden: Inputs of the first adapted layer, shape (n, tokens, d), or token ids (n, tokens) without a prefix.
        attention_mask: Shape (n, tokens), int64.
        token_ids: Shape (n, tokens), int64.
        token_types: Shape (n, tokens) for models that read segments, or `None`.
    """

    hidden: Tensor | None
    attention_mask: Tensor
    token_ids: Tensor
    token_types: Tensor | None

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, index: Tensor) -> "EncodedTexts":
        mask = self.attention_mask[index]
        width = max(int(mask.sum(-1).max()), 1)
        pick = lambda x: None if x is None else x[index][:, :width]  # noqa: E731
        return EncodedTexts(pick(self.hidden), mask[:, :width], pick(self.token_ids), pick(self.token_types))

    def to(self, dtype: torch.dtype) -> "EncodedTexts":
        """The same with hidden states in `dtype`."""
        hidden = None if self.hidden is None else self.hidden.to(dtype)
        return EncodedTexts(hidden, self.attention_mask, self.token_ids, self.token_types)

    @classmethod
    def concatenate(cls, parts: Sequence["EncodedTexts"]) -> "EncodedTexts":
        """All texts of `parts`, which are of one encoder, in order, padded to the widest."""
        width = max(part.attention_mask.shape[1] for part in parts)

        def stack(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            if any(t is None for t in tensors):
                return None
            return torch.cat([pad(t, (0, 0) * (t.dim() - 2) + (0, width - t.shape[1])) for t in tensors])

        return cls(*(stack(name) for name in ("hidden", "attention_mask", "token_ids", "token_types")))  # type: ignore[arg-type]


def _inverse(chunks: Sequence[Tensor]) -> Tensor:
    """Where each text went: undoes the order of `TextEncoder._chunks`."""
    return torch.cat(list(chunks)).argsort()


def _eagerly(model: nn.Module) -> AbstractContextManager:
    """Modules that were compiled in place run as they were written: every hook would compile them anew."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return getattr(torch.compiler, "set_stance", nullcontext)("force_eager")
    return nullcontext()


class _PrefixDone(Exception):
    """Raised inside the forward pass once the input of the first adapted layer is known."""


class TextEncoder:
    """Embeds texts with a frozen base model, optionally under adapters given as states of a `WeightSpace`.

    The layers below the first adapted one never change, so `prepare` runs them once and `embed` starts above them
    (Ours: halves the cost of an episode when the upper half is adapted; exact, tested against the whole model).

    Args:
        base_model: A transformers encoder or decoder, frozen, or a `PeftModel` around one, whose adapter then counts
            as part of it; it is used in evaluation mode and left as it was.
        tokenizer: Its tokenizer.
        space: Weight space whose modules live in `base_model`.
        pooling: `"mean"` over tokens (sentence encoders), `"first"` token, or `"last"` token (decoders).
        max_length: Longest text, in tokens; longer ones are truncated.
        batch_size: Texts per forward pass.
        dtype: Autocast type of the forward passes, or `None` for the model's own.

    Raises:
        ValueError: When `pooling` is unknown, a module of the space is not in the model or reads something else than
            the tokens of the texts, or the model does not read texts, or none as long as `max_length`.
    """

    def __init__(
        self,
        base_model: nn.Module,
        tokenizer,
        space: WeightSpace,
        *,
        pooling: str = "mean",
        max_length: int = 128,
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {list(POOLINGS)}, got {pooling!r}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.base_model, self.tokenizer, self.space = base_of(base_model), tokenizer, space
        check_base_model(self.base_model, tokenizer)
        check_length(self.base_model, tokenizer, max_length)
        space.layout.check_fits(base_model)
        self.pooling, self.max_length, self.batch_size, self.dtype = pooling, max_length, batch_size, dtype
        self.layers, self.first_layer = self._find_layers()
        self._hidden: Tensor | None = None
        self._before_chunk: Callable[[EncodedTexts], None] | None = None
        known = _PROBED.setdefault(self.base_model, {})
        key = space.layout.fingerprint()
        if key not in known:
            known[key] = self._probe()
        if not known[key]:
            self.layers = None

    @torch.no_grad()
    def _probe(self) -> bool:
        """Run two short texts through the whole model, once per model and layout.

        Returns:
            Whether the layers below the first adapted one can be skipped.

        Raises:
            ValueError: See `check_inputs`.
        """
        texts = self._tokenize(PROBE)
        calls: dict[str, list[tuple[int, ...]]] = {spec.name: [] for spec in self.space.layout.modules}

        def keep(name):
            return lambda _module, args: calls[name].append(tuple(args[0].shape))

        handles = [self.base_model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in calls]
        layers = None if self.layers is None else LayerCalls(self.layers, self.first_layer)
        try:
            with self._evaluation():
                whole = self._pool(self._run(texts), texts.attention_mask)
        finally:
            for handle in [*handles, *(() if layers is None else layers.handles)]:
                handle.remove()
        check_inputs(calls, *texts.token_ids.shape)
        if layers is None or not layers.skippable:
            return False
        return torch.allclose(self.embed(self.prepare(PROBE)), whole, rtol=1e-4, atol=1e-5)

    def _find_layers(self) -> tuple[nn.ModuleList | None, int]:
        """The stack that holds every target module and the index of its first adapted layer."""
        found = [re.match(r"^(.*?)\.(\d+)\.", spec.name) for spec in self.space.layout.modules]
        stacks = {match.group(1) if match else None for match in found}
        if len(stacks) != 1 or None in stacks:
            return None, 0
        stack = self.base_model.get_submodule(stacks.pop())
        if not isinstance(stack, nn.ModuleList):
            return None, 0
        return stack, min(int(match.group(2)) for match in found if match)

    @property
    def device(self) -> torch.device:
        """Device of the base model."""
        return next(self.base_model.parameters()).device

    @property
    def reading(self) -> dict[str, Any]:
        """How texts become embeddings, as JSON values; recordings, policies and checkpoints are compared by it."""
        fingerprint = tokenizer_fingerprint(self.tokenizer)
        return {"pooling": self.pooling, "max_length": self.max_length, "tokenizer": fingerprint}

    @property
    def stays_on_cpu(self) -> bool:
        """Whether a run should leave the base model on the CPU: it is there, and this process uses no accelerator.

        One that a launcher gave, or that Accelerate was set up for before, by a `Trainer` or an `Accelerator()`: it keeps
        that for the whole process.
        """
        given = (
            "LOCAL_RANK" in os.environ and torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        )
        used = bool(PartialState._shared_state) and PartialState().device.type != "cpu"
        return self.device.type == "cpu" and not (given or used)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        with (
            evaluating(self.base_model),
            _eagerly(self.base_model),
            torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None),
        ):
            yield

    def prepare(self, texts: Sequence[str], texts_b: Sequence[str] | None = None) -> EncodedTexts:
        """Tokenize and run the frozen layers below the first adapted one, without gradients.

        Args:
            texts: `n` texts.
            texts_b: `n` second texts for pairs, or `None`.

        Returns:
            The texts as `embed` and `statistics` take them.

        Raises:
            ValueError: When there are no texts, or texts without a token, naming their rows, or with one that the base model
                does not know.
        """
        if not len(texts):
            raise ValueError("`texts` must hold at least one text, got none.")
        encoded = self._tokenize(texts, texts_b)
        if self.layers is None:
            return encoded
        pieces: list[Tensor] = []

        def capture(_module, args, kwargs):
            pieces.append(args[0] if args else kwargs["hidden_states"])
            raise _PrefixDone

        width = encoded.token_ids.shape[1]
        hidden = None
        with torch.no_grad(), self._evaluation():
            handle = self.layers[self.first_layer].register_forward_pre_hook(capture, with_kwargs=True)
            try:
                for rows in self._chunks(encoded):
                    try:
                        self._run(encoded[rows])
                    except _PrefixDone:
                        piece = pieces.pop()
                        if hidden is None:
                            hidden = piece.new_zeros(len(encoded), width, piece.shape[-1])
                        hidden[rows, : piece.shape[1]] = piece
            finally:
                handle.remove()
        return EncodedTexts(hidden, encoded.attention_mask, encoded.token_ids, encoded.token_types)

    def _tokenize(self, texts: Sequence[str], texts_b: Sequence[str] | None = None) -> EncodedTexts:
        if texts_b is not None:
            check_length(self.base_model, self.tokenizer, self.max_length, pairs=True)
        batch = tokenize(self.tokenizer, texts, texts_b, self.max_length)
        check_tokens(self.base_model, batch["input_ids"])
        batch = batch.to(self.device)
        empty = (batch["attention_mask"].sum(-1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"Every text needs at least one token, but {len(empty)} have none: rows {empty[:20]}.")
        return EncodedTexts(None, batch["attention_mask"], batch["input_ids"], batch.get("token_type_ids"))

    def embed(self, encoded: EncodedTexts, states: Tensor | None = None, owner: Tensor | None = None) -> Tensor:
        """The pooled embeddings, shape (n, d), differentiable in `states`.

        Args:
            encoded: From `prepare`.
            states: Adapters, shape (s, modules, width), or `None` for the base model alone.
            owner: For each text the index of its adapter, shape (n,); `None` when there is one adapter.
        """
        pieces = []
        owner = None if owner is None else owner.to(self.device)
        states = None if states is None else states.to(self.device)
        chunks = self._chunks(encoded)
        with self._evaluation(), self._replay():
            for rows in chunks:
                part = encoded[rows]
                self._hidden = part.hidden
                if self._before_chunk is not None:
                    self._before_chunk(part)
                if states is None:
                    tokens = self._run(part)
                else:
                    with injected(self.base_model, self.space, states, None if owner is None else owner[rows]):
                        tokens = self._run(part)
                pieces.append(self._pool(tokens, part.attention_mask))
        return torch.cat(pieces)[_inverse(chunks)]

    @torch.no_grad()
    def statistics(self, encoded: EncodedTexts, state: Tensor | None = None) -> TextStatistics:
        """What one forward pass shows: of every text its embedding and each module's mean input and output.

        Args:
            encoded: From `prepare`.
            state: The adapter to measure at, shape (modules, width), or `None` for the base model (open loop).
        """
        kept: list[dict[int, Tensor]] = []  # by chunk and module, shape (sides, n, r)
        masks: list[Tensor] = []

        def begin(part: EncodedTexts) -> None:
            kept.append({})
            masks.append(part.attention_mask)

        def keep(index):
            def hook(_module, args, output):
                mask = masks[-1][..., None].to(output.dtype)
                weight = mask / mask.sum(1, keepdim=True)
                sides = ((args[0], self.space.input_basis(index)), (output, self.space.output_basis(index)))
                means = [(x * weight).sum(1) @ basis.to(x) for x, basis in sides if basis is not None]
                kept[-1][index] = torch.stack(means).float()

            return hook

        modules = [self.base_model.get_submodule(spec.name) for spec in self.space.layout.modules]
        handles = [module.register_forward_hook(keep(i)) for i, module in enumerate(modules)]
        self._before_chunk = begin
        try:
            embeddings = self.embed(encoded, None if state is None else state[None])
        finally:
            self._before_chunk = None
            for handle in handles:
                handle.remove()
        means = torch.cat([torch.stack([part[i] for i in range(len(modules))], 2) for part in kept], 1)
        return TextStatistics(embeddings, *means[:, _inverse(self._chunks(encoded))])

    def _chunks(self, encoded: EncodedTexts) -> list[Tensor]:
        """Row indices in batches of similar length: at most `batch_size` texts, and little padding.

        A batch ends early where its next text is half as long again as its first and it has `LEAST_CHUNK` texts
        (Ours: in batches of 64 texts the padding was 42 % of the tokens, median of 14 validation tasks; so it is 14 %).
        On accelerators it has 64 then (Ours: generation took 0.5 and 0.7 of the time so, two tasks on an H100).
        """
        least = LEAST_CHUNK if self.device.type == "cpu" else LEAST_CHUNK_ON_ACCELERATORS
        lengths = encoded.attention_mask.sum(-1)
        order = lengths.argsort(stable=True)
        chunks, first = [], 0
        sorted_lengths = lengths[order].tolist()
        for i, length in enumerate(sorted_lengths):
            wide = i - first >= least and length > 1.5 * sorted_lengths[first]
            if i - first == self.batch_size or wide:
                chunks.append(order[first:i])
                first = i
        return [*chunks, order[first:]]

    def _run(self, part: EncodedTexts) -> Tensor:
        inputs = {"input_ids": part.token_ids, "attention_mask": part.attention_mask}
        if part.token_types is not None:
            inputs["token_type_ids"] = part.token_types
        return self.base_model(**inputs, return_dict=True).last_hidden_state

    def _pool(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tokens = tokens.float() if tokens.dtype in (torch.bfloat16, torch.float16) else tokens
        if self.pooling == "mean":
            weight = mask[..., None].to(tokens.dtype)
            return (tokens * weight).sum(1) / weight.sum(1)
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1) if self.pooling == "last" else torch.zeros_like(mask[:, 0])
        return tokens[torch.arange(len(tokens), device=tokens.device), last]

    @contextmanager
    def _replay(self) -> Iterator[None]:
        """Skip the layers below the first adapted one and feed it the prepared hidden states."""
        if self.layers is None:
            yield
            return
        skipped = [self.layers[i] for i in range(self.first_layer)]

        def passthrough(*args, **kwargs):
            return args[0] if args else kwargs["hidden_states"]

        def feed(_module, args, kwargs):
            if self._hidden is None:
                raise ValueError(
                    "These texts lack the hidden states of this encoder's frozen layers; `prepare` them with it."
                )
            if args:
                return (self._hidden.to(args[0].dtype), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._hidden.to(kwargs["hidden_states"].dtype)}

        handle = self.layers[self.first_layer].register_forward_pre_hook(feed, with_kwargs=True)
        replaced = [vars(layer).get("forward") for layer in skipped]
        for layer in skipped:
            layer.forward = passthrough
        try:
            yield
        finally:
            self._hidden = None
            handle.remove()
            for layer, forward in zip(skipped, replaced, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward
