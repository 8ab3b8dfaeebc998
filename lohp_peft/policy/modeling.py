"""`LoHpPolicy`: the learned optimization policy with its coordinates and its reference set."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import WeightSpace
from lohp_peft.files import FLOAT_TYPES, read_json, read_tensors, sha256
from lohp_peft.hub import PushReport, find_policy, push_folder
from lohp_peft.policy.config import CONFIG_FILE, LoHpPolicyConfig
from lohp_peft.policy.networks import FeatureNormalizer, ForwardNetwork, ItemDropout, LogFlowNetwork
from lohp_peft.policy.reference_set import ReferenceSet
from lohp_peft.tasks.features import TaskFeatures

WEIGHTS_FILE = "model.safetensors"
SPACE_FILE = "space.safetensors"
REFERENCE_FILE = "reference_set.safetensors"
DIGESTS = "digests"
"""Key of the configuration: the SHA-256 of each of the policy's other files. Policies saved before have none."""
NEW_FOLDER = ".new"
"""Where a policy is written before it takes the place of an earlier one."""


class LoHpPolicy(PreTrainedModel):
    """A Gaussian policy over adapters: `s[k+1] ~ N(mean(s[k], k, task), sigma[k]^2)` from `s[0]` = no adapter.

    The mean moves along a *drift*, a mixture of learned directions and of what the support set's errors ask for, both
    gated by the task's features, is pulled back by a learned share of the state, and adds a free bounded move per module:
    `mean = s + drift / K - pull * s + free`. Every prefix of the steps is a valid adapter (Ours: a policy whose last step
    has to arrive at a goal explains recorded steps worse than one that stands still; this one starts there). Inside the
    networks states are in units of `scale`, the root mean square of the recorded final adapters per module, and free
    moves in units of `step_rms`, that of the recorded steps (Ours: notes on normalising per tensor).

    Args:
        config ([`LoHpPolicyConfig`]): Shape and provenance.

    **Attributes**:
        - **space** (`WeightSpace`) -- Coordinates of the adapters.
        - **reference_set** (`ReferenceSet`) -- The training tasks, for baselines and controls; may be `None`.
    """

    config_class = LoHpPolicyConfig
    base_model_prefix = "policy"

    def __init__(self, config: LoHpPolicyConfig) -> None:
        super().__init__(config)
        modules, width = config.state_shape
        p, f = config.principal_directions, config.module_features
        sizes = (2 * p, p + 6, 2 * f)
        self.normalize_set = FeatureNormalizer(sizes[0])
        self.normalize_labels = FeatureNormalizer(sizes[1])
        self.normalize_modules = FeatureNormalizer(modules * sizes[2])
        self.forward_network = ForwardNetwork(config, sizes, (modules, width))
        self.log_flow_network = LogFlowNetwork(config, sizes, (modules, width))
        self.register_buffer("scale", torch.ones(modules, 1))
        self.register_buffer("step_rms", torch.ones(config.policy_steps, modules, 1))
        self.register_buffer("state_mask", torch.ones(modules, width, dtype=torch.bool))
        self.feature_reference = nn.Module()
        d = config.embedding_size
        shapes = {"embedding_mean": (d,), "axes": (d, p), "axes_std": (p,), "module_mean": (modules, f)}
        for name, shape in {**shapes, "module_std": (modules, f)}.items():
            self.feature_reference.register_buffer(name, torch.ones(shape))
        self._space: WeightSpace | None = None
        self._reference_set: ReferenceSet | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Networks initialise themselves."""

    @property
    def space(self) -> WeightSpace:
        """Coordinates of the adapters.

        Raises:
            RuntimeError: Before `set_space`.
        """
        if self._space is None:
            raise RuntimeError("This policy has no weight space yet; call `set_space` first.")
        return self._space

    @property
    def reference_set(self) -> ReferenceSet | None:
        """The training tasks, on the policy's device wherever that is moved to."""
        return self._reference_set

    @reference_set.setter
    def reference_set(self, reference: ReferenceSet | None) -> None:
        self._reference_set = None if reference is None else reference.to(self.scale.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoHpPolicy":
        super()._apply(fn, recurse)
        self.reference_set = self._reference_set
        return self

    @property
    def layout(self) -> AdapterLayout:
        """The target modules."""
        return AdapterLayout.from_dict(self.config.layout)

    def set_space(self, space: WeightSpace) -> None:
        """Attach the coordinates.

        Args:
            space: Of the kind, rank and layout that the configuration names.

        Raises:
            ValueError: When they do not fit the configuration, naming both sides.
        """
        mine = (self.layout.fingerprint(), self.config.space_kind, self.config.r, tuple(self.config.state_shape))
        theirs = (space.layout.fingerprint(), space.kind, space.r, tuple(space.shape))
        if mine != theirs:
            raise ValueError(f"The policy needs (layout, kind, r, shape) = {mine}, but the weight space has {theirs}.")
        self._space = space
        self.state_mask.copy_(space.mask)

    def reference_tensors(self) -> dict[str, Tensor]:
        """The coordinates of the features, for `task_features`."""
        return dict(self.feature_reference.named_buffers())

    @contextmanager
    def dropout_from(self, generators: Sequence[torch.Generator]) -> Iterator[None]:
        """Draw dropout from one generator for each item of a batch, while the context is open.

        Args:
            generators: One an item; its rows in the batch follow each other.

        Yields:
            Nothing.
        """
        layers = [module for module in self.modules() if isinstance(module, ItemDropout)]
        try:
            for layer in layers:
                layer.generators = generators
            yield
        finally:
            for layer in layers:
                layer.generators = None

    def _inputs(self, features: TaskFeatures) -> tuple[TaskFeatures, Tensor]:
        modules = self.normalize_modules(features.modules.flatten(-2)).view_as(features.modules)
        sides = self.normalize_set(features.set), self.normalize_labels(features.labels)
        scaled = TaskFeatures(*sides, modules, features.moments)
        ratios = modules[..., : modules.shape[-1] // 2].flatten(-2)
        return scaled, torch.cat([scaled.set, scaled.labels, ratios], -1)

    def optimizer_index(self, name: str | None, batch: int) -> Tensor | None:
        """What `forward_policy` takes for a recorded optimizer, shape (batch,), and `None` for none in particular.

        Args:
            name: The optimizer.
            batch: How many tasks imitate it.

        Raises:
            ValueError: When it was not recorded.
        """
        known = self.config.optimizers
        if name is None:
            return None
        if name not in known:
            raise ValueError(f"`optimizer` must be one of the recorded {known}, got {name!r}.")
        return torch.full((batch,), known.index(name) + 1, device=self.scale.device)

    def forward_policy(
        self,
        state: Tensor,
        step: Tensor,
        features: TaskFeatures,
        previous: Tensor | None = None,
        optimizer: Tensor | None = None,
    ) -> Tensor:
        """The mean of the next state, shape (batch, modules, width).

        Args:
            state: Current states, shape (batch, modules, width).
            step: Policy step index of each, int64, shape (batch,), below `policy_steps`.
            features: Batched task features.
            previous: The states one step before, or `None` for no previous move.
            optimizer: Index into `config.optimizers` plus one, shape (batch,); 0 or `None` is none in particular.
        """
        scaled, flat = self._inputs(features)
        optimizer = torch.zeros_like(step) if optimizer is None else optimizer
        blind = previous is None or not self.config.reads_previous
        move = torch.zeros_like(state) if blind else (state - previous) / self.scale
        drift, free = self.forward_network(state / self.scale, move, scaled, flat, step, optimizer)
        pull = self.forward_network.pull[step]
        pull = (
            pull + (pull.clamp(0, 1) - pull).detach()
        )  # a share; its gradient passes at the bounds too (Known: 1308.3432)
        mean = (1 - pull) * state + drift * self.scale / self.config.policy_steps + free * self.step_rms[step]
        return torch.where(self.state_mask, mean, torch.zeros_like(mean))

    def sigma(self, step: Tensor) -> Tensor:
        """The standard deviation of a step, shape (batch, modules, 1): `noise_scale` times the recorded step's size.

        Args:
            step: Policy step indices, int64, shape (batch,).
        """
        return self.config.noise_scale * self.step_rms[step]

    def log_flow(self, state: Tensor, step: Tensor, features: TaskFeatures, optimizer: Tensor | None = None) -> Tensor:
        """The residual log flow (nats before the forward-looking term), shape (batch,).

        Args:
            state: See `forward_policy`.
            step: See `forward_policy`.
            features: See `forward_policy`.
            optimizer: See `forward_policy`.
        """
        _, flat = self._inputs(features)
        optimizer = torch.zeros_like(step) if optimizer is None else optimizer
        start = self.forward_network.start.detach()
        return self.log_flow_network(state / self.scale, start, flat, step, optimizer)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the policy folder: configuration, weights, coordinates and reference set; safetensors and JSON only.

        Everything is written beside the files of an earlier policy before any of them is replaced. The configuration holds
        digests of the others and takes its place first, so that a mixture of two policies is refused when it is read.

        Raises:
            OSError: When it cannot be written; an earlier policy is still there unless files were taking its place already.
            ValueError: When the weights would be in several files, which are not read.
        """
        if not kwargs.get("is_main_process", True):
            return
        tensors, folder = self.space.to_tensors(), Path(save_directory)
        new = folder / NEW_FOLDER
        shutil.rmtree(new, ignore_errors=True)
        try:
            super().save_pretrained(new, **kwargs)
            if not (new / WEIGHTS_FILE).exists():
                raise ValueError(f"A policy's weights are one file, {WEIGHTS_FILE}; leave `max_shard_size` out.")
            save_file(tensors, new / SPACE_FILE)
            if self.reference_set is not None:
                tensors, metadata = self.reference_set.to_tensors()
                save_file(tensors, new / REFERENCE_FILE, metadata)
            digests = {path.name: sha256(path.read_bytes()) for path in new.iterdir() if path.name != CONFIG_FILE}
            config = json.dumps({**read_json(new / CONFIG_FILE), DIGESTS: digests}, indent=2, sort_keys=True)
            (new / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
            for path in new.iterdir():  # safetensors are written for their owner alone
                path.chmod((new / CONFIG_FILE).stat().st_mode)
            os.replace(new / CONFIG_FILE, folder / CONFIG_FILE)
            if REFERENCE_FILE not in digests:
                (folder / REFERENCE_FILE).unlink(missing_ok=True)
            for name in digests:
                os.replace(new / name, folder / name)
        except SafetensorError as error:
            raise OSError(f"Cannot write the policy to {folder}: {error}.") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> PushReport:
        """Publish the policy with its card.

        Args:
            repo_id: `owner/name`.
            **kwargs: See `lohp_peft.hub.push_folder`.

        Returns:
            What was uploaded; its `commit` is the revision to load.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        revision: str | None = None,
        token: str | None = None,
        **kwargs: Any,
    ) -> "LoHpPolicy":
        """Load a policy: a folder, `"shipped"`, or one on the Hub at a pinned `revision`.

        Args:
            pretrained_model_name_or_path: See `lohp_peft.hub.find_policy`.
            *args: See `PreTrainedModel.from_pretrained`.
            revision: Commit hash on the Hub, or write `owner/name@commit`.
            token: Access token of the Hub; the stored login by default.
            **kwargs: See `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: When files or tensors are missing, damaged or of another policy, naming them; or when the policy would
                be in half precision.
        """
        name = str(pretrained_model_name_or_path)
        folder = find_policy(name if revision is None or Path(name).is_dir() else f"{name}@{revision}", token=token)
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, SPACE_FILE) if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} is not a policy folder: it lacks {missing}.")
        try:
            config = kwargs.pop("config", None) or cls.config_class.read(folder)
            layout = AdapterLayout.from_dict(config.layout)
            tensors, _ = read_tensors(folder / SPACE_FILE)
            space = WeightSpace.from_tensors(layout, config.space_kind, config.r, tensors)
            if list(space.shape) != list(config.state_shape):
                raise ValueError(f"its states are {config.state_shape}, those of its weight space {list(space.shape)}")
            with torch.device("meta"):
                expected = cls(config).state_dict()
            _check_weights(read_tensors(folder / WEIGHTS_FILE)[0], expected)
            policy = super().from_pretrained(folder, *args, config=config, use_safetensors=True, **kwargs)
            for tensor in (*policy.parameters(), *policy.buffers()):
                tensor.data = tensor.data.clone()  # out of the mapped file, whose alignment would change the last bits
            half = {x.dtype for x in policy.state_dict().values()} & {torch.float16, torch.bfloat16}
            if half:
                types = ", ".join(sorted(map(str, half)))
                raise ValueError(f"a policy computes in float32 or wider, got {types}; pass dtype=torch.float32")
            policy.set_space(space)
            if (folder / REFERENCE_FILE).is_file():
                policy.reference_set = ReferenceSet.from_tensors(*read_tensors(folder / REFERENCE_FILE))
                _check_reference(policy, policy.reference_set)
            _check_digests(folder)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"The policy in {folder} cannot be loaded: {error}") from error
        return policy.eval()


def _check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Make sure that a file's weights are finite numbers of the expected names and shapes."""
    wrong = [f"{name} is {x.dtype}" for name, x in found.items() if x.dtype not in (*FLOAT_TYPES, torch.bool)]
    wrong += [f"{name} is not finite" for name, x in found.items() if not x.float().isfinite().all()]
    if wrong:
        raise ValueError(f"{WEIGHTS_FILE} must hold finite floating-point numbers: {'; '.join(sorted(wrong))}")
    sides = [{name: tuple(x.shape) for name, x in side.items()} for side in (found, expected)]
    pairs = {name: tuple(side.get(name) for side in sides) for name in sorted(found.keys() | expected.keys())}
    differ = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if differ:
        raise ValueError(f"{WEIGHTS_FILE} does not fit {CONFIG_FILE}, shapes (found, expected): {differ}")


def _check_digests(folder: Path) -> None:
    """Make sure that a folder's files were saved together."""
    recorded = read_json(folder / CONFIG_FILE).get(DIGESTS)
    if recorded is None:
        return
    if not isinstance(recorded, dict):
        raise ValueError(f"`{DIGESTS}` in {CONFIG_FILE} must be an object, got {type(recorded).__name__}")
    paths = [folder / name for name in (WEIGHTS_FILE, SPACE_FILE, REFERENCE_FILE)]
    found = {path.name: sha256(path.read_bytes()) for path in paths if path.is_file()}
    wrong = sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))
    if wrong:
        raise ValueError(f"{', '.join(wrong)} was not saved with its {CONFIG_FILE}; save or fetch the policy again")


def _check_reference(policy: LoHpPolicy, reference: ReferenceSet) -> None:
    """Make sure that the training tasks have this policy's states and features."""
    config = policy.config
    modules, width = config.state_shape
    p, f, features = config.principal_directions, config.module_features, reference.features
    parts = {
        "states": (reference.states, (modules, width)),
        "set": (features.set, (2 * p,)),
        "labels": (features.labels, (p + 6,)),
        "modules": (features.modules, (modules, 2 * f)),
        "moments": (features.moments, (modules, p, config.r + 1)),
    }
    wrong = [
        f"{name} have shape {tuple(x.shape)}, not {(len(reference.names), *shape)}"
        for name, (x, shape) in parts.items()
        if tuple(x.shape) != (len(reference.names), *shape)
    ]
    wrong += [f"{name} are not finite" for name, (x, _) in parts.items() if not x.isfinite().all()]
    if wrong:
        raise ValueError(f"{REFERENCE_FILE} does not fit the policy: {'; '.join(wrong)}")
