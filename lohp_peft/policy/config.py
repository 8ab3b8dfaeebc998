"""Configuration of the policy."""

import inspect
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lohp_peft.fields import is_number
from lohp_peft.files import read_json

SCHEMA_VERSION = 3
CONFIG_FILE = "config.json"
MAX_SIZE = 2**20
"""Above any size of a policy; nothing is allocated on the word of a file beyond it."""
MAX_LAYERS = 1000
NUM_HEADS = 4


class LoHpPolicyConfig(PretrainedConfig):
    """Shape and provenance of a [`LoHpPolicy`].

    Args:
        layout (`dict`): The target modules, from `AdapterLayout.to_dict`.
        space_kind (`str`): Weight space, `"core"` or `"lora_b"`.
        r (`int`): Rank of the adapters.
        base_model_name (`str`): Where the base model came from.
        base_fingerprint (`str`): Fingerprint of the base model; generation refuses any other.
        tokenizer_fingerprint (`str`): Fingerprint of the tokenizer's vocabulary; generation refuses any other.
        tokenizer_reading (`str`): Fingerprint of how it reads texts; empty where that was not recorded.
        pooling (`str`): How sentence embeddings are pooled.
        max_text_length (`int`): Longest text, in tokens.
        head (`str`): Closed-form head the policy was trained with.
        ridge (`float`): Penalty of the ridge head.
        policy_steps (`int`): Policy steps `K` of a rollout (Ours: 4; quality saturates there).
        embedding_size (`int`): Size of sentence embeddings.
        principal_directions (`int`): Directions of the set features.
        module_features (`int`): Width of a module's pooled input and output features together.
        hidden_size (`int`): Width of the networks.
        num_layers (`int`): Transformer layers over module tokens.
        num_heads (`int`): Attention heads.
        num_directions (`int`): Learned directions mixed by the gates (Ours: DESIGN measurements).
        dropout (`float`): Dropout on the gates' features.
        state_shape (`list[int]`): Modules and width of a state.
        optimizers (`list[str]`): Recorded optimizers the policy can imitate; token 0 is "none in particular".
        noise_scale (`float`): Policy standard deviation as a share of the recorded root-mean-square step
            (Ours: squared residuals of SubTB were 1e8 nats² at 0.3 and 3e6 at 1.0, in preset `lohp+path`).
        reads_previous (`bool`): Whether the mean depends on the previous move; off where a backward policy is the
            reference, under which such a mean would be all but certain.
        preset (`str`): How the policy was trained.
        provenance (`dict`): Training tasks, licences, seeds, commit.

    Raises:
        ValueError: Listing every value out of range.
    """

    model_type = "lohp_policy"

    def __init__(
        self,
        layout: dict[str, Any] | None = None,
        space_kind: str = "core",
        r: int = 8,
        base_model_name: str = "",
        base_fingerprint: str = "",
        tokenizer_fingerprint: str = "",
        tokenizer_reading: str = "",
        pooling: str = "mean",
        max_text_length: int = 128,
        head: str = "ridge",
        ridge: float = 3.0,
        policy_steps: int = 4,
        embedding_size: int = 384,
        principal_directions: int = 64,
        module_features: int = 16,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = NUM_HEADS,
        num_directions: int = 24,
        dropout: float = 0.2,
        state_shape: list[int] | None = None,
        optimizers: list[str] | None = None,
        noise_scale: float = 1.0,
        reads_previous: bool = True,
        preset: str = "",
        provenance: dict[str, Any] | None = None,
        schema_version: int = SCHEMA_VERSION,
        **kwargs: Any,
    ) -> None:
        if type(schema_version) is not int:
            raise ValueError(f"`schema_version` of a policy must be a whole number, got {schema_version!r}.")
        if schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"This policy has schema version {schema_version}, this lohp_peft reads version {SCHEMA_VERSION}: "
                + ("upgrade lohp_peft." if schema_version > SCHEMA_VERSION else "train the policy again with it.")
            )
        sizes = {
            "r": r,
            "policy_steps": policy_steps,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_directions": num_directions,
            "principal_directions": principal_directions,
            "embedding_size": embedding_size,
            "module_features": module_features,
            "max_text_length": max_text_length,
        }
        wrong: dict[str, Any] = {
            name: value
            for name, value in sizes.items()
            if type(value) is not int or not 0 < value <= (MAX_LAYERS if name == "num_layers" else MAX_SIZE)
        }
        if wrong or hidden_size % num_heads:
            raise ValueError(
                f"Policy sizes must be positive integers of at most {MAX_SIZE} and `hidden_size` a multiple of `num_heads`; "
                f"got {wrong or ''} hidden_size={hidden_size}, num_heads={num_heads}."
            )
        texts = {
            "space_kind": space_kind,
            "base_model_name": base_model_name,
            "base_fingerprint": base_fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "tokenizer_reading": tokenizer_reading,
            "pooling": pooling,
            "head": head,
            "preset": preset,
        }
        numbers = {"ridge": ridge, "dropout": dropout, "noise_scale": noise_scale}
        wrong = {name: value for name, value in texts.items() if not isinstance(value, str)}
        wrong |= {name: value for name, value in numbers.items() if not (is_number(value) and abs(value) < MAX_SIZE)}
        mappings = {"layout": layout, "provenance": provenance}
        wrong |= {name: value for name, value in mappings.items() if not isinstance(value, dict | None)}
        if state_shape is not None and not (_is_list_of(int, state_shape) and len(state_shape) == 2):
            wrong["state_shape"] = state_shape
        if optimizers is not None and not _is_list_of(str, optimizers):
            wrong["optimizers"] = optimizers
        if not isinstance(reads_previous, bool):
            wrong["reads_previous"] = reads_previous
        if wrong:
            raise ValueError(
                f"Of a policy {list(texts)} are texts, {list(numbers)} finite numbers, {list(mappings)} mappings, "
                f"`state_shape` two whole numbers, `optimizers` texts and `reads_previous` is true or false; got {wrong}."
            )
        self.layout = layout or {"modules": []}
        self.space_kind, self.r = space_kind, r
        self.base_model_name, self.base_fingerprint = base_model_name, base_fingerprint
        self.tokenizer_fingerprint, self.tokenizer_reading = tokenizer_fingerprint, tokenizer_reading
        self.pooling, self.max_text_length, self.head, self.ridge = pooling, max_text_length, head, ridge
        self.policy_steps, self.embedding_size = policy_steps, embedding_size
        self.principal_directions, self.module_features = principal_directions, module_features
        self.hidden_size, self.num_layers, self.num_heads = hidden_size, num_layers, num_heads
        self.num_directions, self.dropout = num_directions, dropout
        self.state_shape = list(state_shape or [1, 1])
        self.optimizers = list(optimizers or [])
        self.noise_scale, self.reads_previous = noise_scale, reads_previous
        self.preset, self.provenance = preset, dict(provenance or {})
        self.schema_version = schema_version
        super().__init__(**kwargs)

    @classmethod
    def read(cls, folder: Path) -> "LoHpPolicyConfig":
        """The configuration in a policy folder; entries of transformers that a policy has no use for are left out.

        Args:
            folder: The policy folder.

        Raises:
            OSError: When it cannot be read.
            ValueError: When it is damaged or not that of a policy.
        """
        values = read_json(folder / CONFIG_FILE)
        if values.get("model_type") != cls.model_type:
            raise ValueError(
                f"{folder / CONFIG_FILE} is not that of a policy: its model_type must be {cls.model_type!r}, got "
                f"{values.get('model_type')!r}."
            )
        known = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
        return cls(**{name: _decoded(value) for name, value in values.items() if name in known})


def _decoded(value: Any) -> Any:
    """A value with the infinities and NaN that transformers spells as objects, which JSON has none of."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {name: _decoded(item) for name, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is kind for item in value)
