"""A folder of recorded trajectories that survives kills, several writers and damaged files."""

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save
from torch import nn

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import WeightSpace
from lohp_peft.files import TEMPORARY_SUFFIX, parse_tensors, sha256, write_atomically
from lohp_peft.hub import PushReport, find_trajectories, push_folder
from lohp_peft.trajectories.manifest import (
    MANIFEST_NAME,
    READING_KEY,
    ROWS_KEYS,
    SHARD_FOLDER,
    SPACE_NAME,
    Manifest,
    ShardEntry,
    inside,
)
from lohp_peft.trajectories.shard import decode_shard, describe, encode_shard, misfits, shard_header
from lohp_peft.trajectories.trajectory import Trajectory
from lohp_peft.warn import warn

DAMAGE_POLICIES = ("error", "skip")
LOCK_NAME = ".lock"
SAME_BASES_TOLERANCE = 1e-4


class TrajectoryDataset:
    """Recorded trajectories of one base model in one weight space, a shard for each key.

    The folder holds `manifest.json`, the bases of the weight space and one safetensors file a key, each with its
    SHA-256 in the manifest. A shard and its line in the manifest are written under a file lock with atomic renames:
    a process killed at any moment loses at most the shard it was writing, and processes that append different keys
    do not disturb each other. Every read checks the checksum again.

    Use `create` or `open`; iterating yields the trajectories in the order of their keys.
    """

    def __init__(self, folder: Path, manifest: Manifest, space: WeightSpace, on_damage: str) -> None:
        self.folder, self.manifest, self.space, self.on_damage = folder, manifest, space, on_damage
        self.damaged: dict[str, str] = {}

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        space: WeightSpace,
        base_fingerprint: str,
        base_model_name: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> "TrajectoryDataset":
        """Start an empty dataset in `folder`, which is made when it does not exist.

        Args:
            folder: Where the dataset lives.
            space: Weight space of all its states.
            base_fingerprint: From `base_model_fingerprint`.
            base_model_name: Name or path under which the base model was loaded.
            metadata: JSON values to keep with the dataset.

        Returns:
            The empty dataset.

        Raises:
            FileExistsError: When the folder already holds a dataset.
            ValueError: When a name is no text or metadata no JSON.
        """
        folder = Path(folder)
        (folder / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        bases = save({name: values.detach().cpu().contiguous() for name, values in space.to_tensors().items()})
        manifest = Manifest(
            dataset_id=secrets.token_hex(16),
            base_model_name=base_model_name,
            base_fingerprint=base_fingerprint,
            space_kind=space.kind,
            space_r=space.r,
            space_file=SPACE_NAME,
            space_sha256=sha256(bases),
            layout=space.layout.to_dict(),
            metadata=dict(metadata or {}),
        )
        record = manifest.to_json()
        with FileLock(folder / LOCK_NAME):
            if (folder / MANIFEST_NAME).exists():
                raise FileExistsError(f"{folder} already holds trajectories; open it, or choose another folder.")
            write_atomically(folder / SPACE_NAME, bases)
            write_atomically(folder / MANIFEST_NAME, record)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path, on_damage: str = "error") -> "TrajectoryDataset":
        """Open a dataset and check every shard.

        Args:
            folder: Where the dataset lives; nothing in it is changed.
            on_damage: What to do about damaged, missing and foreign shards: `"error"` lists them all and stops,
                `"skip"` warns, naming them, and leaves them out. An `append` under such a key replaces it.

        Returns:
            The dataset.

        Raises:
            FileNotFoundError: When the folder holds no dataset.
            ValueError: When the manifest or the bases are damaged or of a newer version, and with
                `on_damage="error"` on any shard that is not whole.
        """
        if on_damage not in DAMAGE_POLICIES:
            raise ValueError(f"`on_damage` must be one of {list(DAMAGE_POLICIES)}, got {on_damage!r}.")
        folder = Path(folder)
        manifest = Manifest.read(folder)
        dataset = cls(folder, manifest, _read_space(folder, manifest), on_damage)
        for key in manifest.shards:
            try:
                dataset._read(key)
            except ValueError as error:
                dataset.damaged[key] = str(error)
        problems = [*dataset.damaged.values(), *dataset._foreign_files()]
        if problems and on_damage == "error":
            raise ValueError(
                f"{len(problems)} files of {folder} cannot be used: "
                + "; ".join(problems)
                + ". Restore them, or open "
                'with on_damage="skip" to go on without them.'
            )
        for problem in problems:
            warn(f"Skipped in {folder}: {problem}.")
        return dataset

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        local_dir: str | Path | None = None,
        base_model: nn.Module | None = None,
        on_damage: str = "error",
        token: str | None = None,
    ) -> "TrajectoryDataset":
        """Open a dataset: a folder, or one on the Hub at a pinned commit.

        Args:
            name: A folder, or `owner/name@commit`.
            local_dir: Folder to fetch into; one for this commit in the Hub's home by default.
            base_model: The model that it is meant for; another one than it was recorded on is refused.
            on_damage: See `open`.
            token: Access token; the stored login by default.

        Returns:
            The dataset.

        Raises:
            ValueError: See `open` and `lohp_peft.hub.pull_folder`.
            RuntimeError: When the Hub refuses or cannot be reached.
        """
        return cls.open(find_trajectories(name, local_dir=local_dir, base_model=base_model, token=token), on_damage)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> PushReport:
        """Publish the folder of this dataset with a card.

        Args:
            repo_id: `owner/name`.
            **kwargs: See `lohp_peft.hub.push_folder`.

        Returns:
            What was uploaded; its `commit` is the revision to open.

        Raises:
            ValueError: When a shard is damaged, or see `lohp_peft.hub.push_folder`.
        """
        type(self).open(self.folder)
        return push_folder(self.folder, repo_id, **kwargs)

    def append(self, key: str, trajectories: Sequence[Trajectory], metadata: Mapping[str, Any] | None = None) -> None:
        """Write one shard; other processes may append other keys at the same time.

        Args:
            key: Unique name of the shard, for instance the task's.
            trajectories: At least one, all in this dataset's weight space.
            metadata: JSON values to keep with the shard, found again in `manifest.shards[key].metadata`.

        Raises:
            ValueError: When the key is taken (by an undamaged shard), there is nothing to write, a trajectory does not fit
                the weight space, or metadata is no JSON; the folder is as it was.
        """
        if not key or not trajectories:
            raise ValueError(f"A shard needs a key and at least one trajectory, got {key!r} and {len(trajectories)}.")
        problems = misfits(trajectories, self.space)
        if problems:
            raise ValueError(f"Shard {key!r} does not fit {self.folder}: " + "; ".join(problems) + ".")
        data = encode_shard(trajectories, self.manifest.dataset_id, key)
        entry = ShardEntry(
            _shard_file(key), sha256(data), tuple(describe(item) for item in trajectories), dict(metadata or {})
        )
        with FileLock(self.folder / LOCK_NAME):
            current = Manifest.read(self.folder)
            if current.dataset_id != self.manifest.dataset_id:
                raise ValueError(f"{self.folder} was replaced by another dataset while this one was open.")
            replaced = key in self.damaged and current.shards.get(key) == self.manifest.shards[key]
            if key in current.shards and not replaced:  # another process may have mended it meanwhile
                raise ValueError(f"{self.folder} already has a shard {key!r}; choose another key.")
            updated = replace(current, shards={**current.shards, key: entry})
            manifest = updated.to_json()
            self._clean(current)
            write_atomically(inside(self.folder, entry.file), data)
            write_atomically(self.folder / MANIFEST_NAME, manifest)
        self.manifest = updated
        self.damaged.pop(key, None)

    def keys(self) -> list[str]:
        """The keys of the usable shards, sorted."""
        return sorted(key for key in self.manifest.shards if key not in self.damaged)

    def tasks(self) -> list[str]:
        """The names of the tasks with a usable trajectory, sorted; they need not be the keys."""
        return sorted({run["task"] for key in self.keys() for run in self.manifest.shards[key].trajectories})

    def __getitem__(self, key: str) -> list[Trajectory]:
        """The trajectories of one shard.

        Raises:
            KeyError: When there is no such shard.
            ValueError: When it is damaged.
        """
        return self._read(key)

    def __iter__(self) -> Iterator[Trajectory]:
        for key in self.keys():
            try:
                trajectories = self._read(key)
            except ValueError as error:
                if self.on_damage == "error":
                    raise
                self.damaged[key] = str(error)
                warn(f"Skipped in {self.folder}: {error}.")
                continue
            yield from trajectories

    def __len__(self) -> int:
        """Number of usable trajectories."""
        return sum(len(self.manifest.shards[key].trajectories) for key in self.keys())

    def check_matches(
        self, *, space: WeightSpace, base_fingerprint: str, reading: Mapping[str, Any] | None = None
    ) -> None:
        """Make sure that the dataset was recorded on this base model and in this weight space.

        Args:
            space: Weight space at hand.
            base_fingerprint: From `base_model_fingerprint`, of the base model at hand.
            reading: `TextEncoder.reading`, how texts are read at hand; compared where the dataset says how its own were
                (those of earlier versions and of `TrajectoryRecorder` do not).

        Raises:
            ValueError: Listing every difference, both sides named.
        """
        mine, problems = self.space, []
        if self.manifest.base_fingerprint != base_fingerprint:
            problems.append(
                f"base model: recorded on {self.manifest.base_model_name!r} ({self.manifest.base_fingerprint[:12]}...), "
                f"got one with fingerprint {base_fingerprint[:12]}..."
            )
        if (mine.kind, mine.r) != (space.kind, space.r):
            problems.append(f"weight space: recorded {mine.kind!r} r={mine.r}, got {space.kind!r} r={space.r}")
        if mine.layout.fingerprint() != space.layout.fingerprint():
            problems.append(
                f"layout: recorded {len(mine.layout.modules)} modules {mine.layout.fingerprint()[:12]}..., "
                f"got {len(space.layout.modules)} modules {space.layout.fingerprint()[:12]}..."
            )
        if not problems:
            recorded, given = mine.to_tensors(), space.to_tensors()
            moved = [
                name
                for name, values in recorded.items()
                if not torch.allclose(values.cpu(), given[name].cpu(), atol=SAME_BASES_TOLERANCE)
            ]
            if moved:
                problems.append(f"bases {moved} differ; use the dataset's own `space`")
        before = self.manifest.metadata.get(READING_KEY)
        if reading is not None and isinstance(before, Mapping):
            names = [name for name in {**before, **reading} if before.get(name) != reading.get(name)]
            problems += [f"{n} of texts: recorded with {before.get(n)!r}, got {reading.get(n)!r}" for n in names]
        if problems:
            raise ValueError(f"{self.folder} does not fit: " + "; ".join(problems) + ".")

    def check_rows(self, fingerprint_of: Callable[[str, str], str | None]) -> None:
        """Make sure that tasks have the rows that they were recorded on, where the dataset says which those were.

        Args:
            fingerprint_of: From the names of a task and of a split to the fingerprint of its rows at hand, `None` where there
                are none; see `tasks.rows_at_hand`.

        Raises:
            ValueError: Listing every task that has other rows, both sides named.
        """
        problems = {}
        for entry in self.manifest.shards.values():
            split, before = (str(entry.metadata.get(key, "")) for key in ROWS_KEYS)
            for name in dict.fromkeys(str(run["task"]) for run in entry.trajectories) if before else ():
                if (now := fingerprint_of(name, split)) not in (None, before):
                    problems[name] = f"{name!r} was recorded on {before[:12]}... in split {split!r}, got {now[:12]}..."
        if problems:
            raise ValueError(
                f"The rows of these tasks are others than those recorded in {self.folder}: {'; '.join(problems.values())}. Give "
                "them the rows of then, or record them under another name or in another folder."
            )

    def _read(self, key: str) -> list[Trajectory]:
        entry = self.manifest.shards[key]
        try:
            data = inside(self.folder, entry.file).read_bytes()
            return decode_shard(data, entry, dataset_id=self.manifest.dataset_id, key=key, space=self.space)
        except FileNotFoundError:
            raise ValueError(f"shard {key!r} ({entry.file}) is missing") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"shard {key!r} ({entry.file}) is {error}") from error

    def _unlisted(self, manifest: Manifest) -> Iterator[tuple[Path, bool]]:
        """Files among the shards that the manifest does not name, and whether this dataset wrote them."""
        listed = {entry.file for entry in manifest.shards.values()}
        for path in sorted((self.folder / SHARD_FOLDER).glob("[!.]*.safetensors")):
            if f"{SHARD_FOLDER}/{path.name}" not in listed:
                try:
                    own = shard_header(path.read_bytes()).get("dataset_id") == self.manifest.dataset_id
                except (OSError, ValueError):
                    own = False
                yield path, own

    def _foreign_files(self) -> list[str]:
        current = Manifest.read(self.folder)  # another process may have appended meanwhile
        return [
            f"{path.relative_to(self.folder).as_posix()} is foreign: the manifest does not name it"
            for path, own in self._unlisted(current)
            if not own
        ]

    def _clean(self, manifest: Manifest) -> None:
        """Remove what killed writers left; only under the lock, which every living writer holds."""
        for folder in (self.folder, self.folder / SHARD_FOLDER):
            for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
                path.unlink(missing_ok=True)
        for path, own in self._unlisted(manifest):
            if own:
                path.unlink(missing_ok=True)


def _read_space(folder: Path, manifest: Manifest) -> WeightSpace:
    path = inside(folder, manifest.space_file)
    try:
        data = path.read_bytes()
        if sha256(data) != manifest.space_sha256:
            raise ValueError("its checksum is not the manifest's")
        layout = AdapterLayout.from_dict(dict(manifest.layout))
        return WeightSpace.from_tensors(layout, manifest.space_kind, manifest.space_r, parse_tensors(data))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; without its bases no state of {folder} means anything.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def _shard_file(key: str) -> str:
    """A readable file name that no other key has, whatever the file system makes of case and odd characters."""
    readable = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")[:40]
    return f"{SHARD_FOLDER}/{readable}-{sha256(key.encode())[:16]}.safetensors"
