"""Publishing to and fetching from the Hugging Face Hub: safetensors, JSON and Markdown only, revisions pinned."""

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from lohp_peft.adapters import base_model_fingerprint
from lohp_peft.cards import is_hub_id, public_config
from lohp_peft.cards.ownership import CARD_FILE, is_replaced, metadata_of, read_card
from lohp_peft.cards.renewal import renewed_card
from lohp_peft.files import read_json, sha256
from lohp_peft.folders import SAFE_NAMES, SAFE_SUFFIXES, adapters_in, check_folder, is_safe, owned_by

__all__ = [
    "PushReport",
    "check_fingerprint",
    "check_folder",
    "find_policy",
    "find_trajectories",
    "pull_folder",
    "push_folder",
]

PICKLE_SUFFIXES = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
"""Formats that run code when they are read; a repository that holds one is not fetched."""
SHIPPED_POLICIES = {"shipped": "minilm-text"}
"""Policies inside the package, by the name that finds them."""
_ON_THE_HUB = "owner/name@commit with a commit hash of 40 hexadecimal digits"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FINGERPRINT_FILES = ("lohp_provenance.json", "manifest.json", "config.json")


@dataclass(frozen=True)
class PushReport:
    """What was, or with `dry_run` would be, uploaded.

    Args:
        repo_id: Repository on the Hub.
        repo_type: `"model"` for adapters and policies, `"dataset"` for recorded trajectories.
        kind: `"adapter"`, `"policy"` or `"trajectories"`.
        files: Size of every file in bytes, by its path in the repository.
        commit: Commit hash of the upload; `None` for a dry run.
        url: Address of the commit; `None` for a dry run.
    """

    repo_id: str
    repo_type: str
    kind: str
    files: dict[str, int]
    commit: str | None = None
    url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    branch: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> PushReport:
    """Publish an adapter, a policy or recorded trajectories, with a card.

    Nothing in the folder changes. Where it has no card, PEFT's empty one or one of ours, which ends with our mark, one is sent that
    is rendered anew; what somebody put into the metadata of that or of the card on the branch stays, such as the licence. A card
    of somebody's own is sent as it is. An adapter that was generated for a base model from a local folder is sent with the name of the policy's.
    Of the branch, what a folder of before left of its kind and this one lacks is removed: shards of trajectories, an
    adapter's head and provenance. Everything else there stays.

    Args:
        folder: What to publish, see `check_folder`.
        repo_id: `owner/name`; created when it does not exist.
        private: Whether a created repository is private.
        branch: Branch to commit to; created when it does not exist, the default branch by default.
        commit_message: `"Upload <kind>"` by default.
        license: Licence identifier of the Hub, for a card that is rendered; that of the earlier card by default.
        token: Access token; the stored login by default.
        dry_run: Only check and report; nothing is sent or asked, the card on the branch neither.

    Returns:
        What was, or would be, uploaded.

    Raises:
        ValueError: See `check_folder`; also when `repo_id` is not spelled `owner/name`, a licence is given beside a card, or
            the Hub finds the card's metadata invalid.
        RuntimeError: When the Hub refuses or cannot be reached. It can be repeated: what has arrived is not sent again.
    """
    if not is_hub_id(repo_id) or "/" not in repo_id:
        raise ValueError(f"`repo_id` must be spelled owner/name and name no local path, got {repo_id!r}.")
    kind, sizes = check_folder(folder)
    repo_type = "dataset" if kind == "trajectories" else "model"
    written = read_card(folder)
    sent: dict[str, Path | bytes] = {name: Path(folder) / name for name in sizes}
    if kind == "adapter":
        sent |= {name: public_config((Path(folder) / name).parent) for name in adapters_in(sizes)}
    card = partial(renewed_card, kind, folder, name=repo_id.split("/")[1], location=repo_id, license=license)
    rendered = is_replaced(written)
    if rendered:
        sent[CARD_FILE] = card(metadata_of(written)).encode()
    elif license is not None:
        raise ValueError(
            f"`license` is for a card that is rendered, and {Path(folder) / CARD_FILE} is somebody's own; write it there: "
            f"`license: {license}`."
        )
    if dry_run:
        return PushReport(repo_id, repo_type, kind, _sizes(sent))
    api = HfApi(token=token)
    with _told_clearly(f"Publishing {folder} to {repo_id} failed; it can be repeated"):
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repo_id, branch=branch, repo_type=repo_type, exist_ok=True)
        there = api.list_repo_files(repo_id, repo_type=repo_type, revision=branch)
        if rendered and CARD_FILE in there:
            path = api.hf_hub_download(repo_id, CARD_FILE, repo_type=repo_type, revision=branch)
            earlier = metadata_of(Path(path).read_text(encoding="utf-8", errors="replace"))
            sent[CARD_FILE] = card({**earlier, **metadata_of(written)}).encode()
        patterns = owned_by(kind, sizes)
        stale = [name for name in there if name not in sent and any(fnmatchcase(name, p) for p in patterns)]
        commit = api.create_commit(
            repo_id,
            [*starmap(CommitOperationAdd, sent.items()), *map(CommitOperationDelete, stale)],
            commit_message=commit_message or f"Upload {kind}",
            repo_type=repo_type,
            revision=branch,
        )
    return PushReport(repo_id, repo_type, kind, _sizes(sent), commit.oid, commit.commit_url)


def pull_folder(
    repo_id: str,
    *,
    revision: str,
    repo_type: str = "model",
    base_model: nn.Module | None = None,
    local_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """Fetch the safetensors, JSON and Markdown files of a repository at one commit, and check that they arrived whole.

    Args:
        repo_id: `owner/name`.
        revision: Commit hash of 40 hexadecimal digits. Branches and tags move, so they are not accepted.
        repo_type: `"model"` or `"dataset"`.
        base_model: The model that it is meant for; another one than it was made for is refused.
        local_dir: Folder for real files; by default the download cache, whose files are links. What lies there already is
            never written over: files of the commit are taken as they are, and trajectories to which more were appended.
        cache_dir: Download cache; the Hub's own by default.
        token: Access token; the stored login by default.

    Returns:
        The local folder.

    Raises:
        ValueError: When `revision` is not a full commit hash; listing all files of the repository that run code when
            they are read or whose paths lead elsewhere, or of `local_dir` that are others than the commit's, before anything
            is fetched; when the commit holds no readable file; listing all that differ from what the commit holds; or when
            `base_model` is not the recorded one, naming both.
        RuntimeError: When the Hub refuses or cannot be reached; then `local_dir` is taken only with files that its client has noted
            as those of the commit.
    """
    if _COMMIT.fullmatch(revision) is None:
        raise ValueError(
            f"`revision` of {repo_id} must be a commit hash of 40 hexadecimal digits, got {revision!r}. "
            "The hash stands on the repository's page under 'Files and versions'."
        )
    with _told_clearly(f"Fetching {repo_id} at {revision} failed"):
        files = _list_files(repo_id, revision, repo_type, token)
        wanted = None if files is None else _readable(repo_id, files)
        if wanted is None and local_dir is not None and any(Path(local_dir).glob("*")):
            wanted = _noted(Path(local_dir), revision, repo_type)
        if wanted is not None and local_dir is not None:
            wanted = _not_here(Path(local_dir), wanted, f"{repo_id} at {revision}", repo_type)
        if wanted is not None and not wanted:
            folder = str(local_dir)
        else:
            every = [*(f"*{suffix}" for suffix in SAFE_SUFFIXES), *SAFE_NAMES]
            folder = snapshot_download(
                repo_id,
                repo_type=repo_type,
                revision=revision,
                allow_patterns=every if wanted is None else [glob.escape(name) for name in wanted],
                local_dir=local_dir,
                cache_dir=cache_dir,
                token=token,
            )
    damaged = [name for name, digest in (wanted or {}).items() if not _arrived(Path(folder) / name, digest)]
    if damaged:
        raise ValueError(
            f"{len(damaged)} files of {repo_id} are not what commit {revision} holds: {', '.join(damaged)}. "
            f"Remove them from {folder} and fetch it again."
        )
    if base_model is not None:
        check_fingerprint(folder, base_model)
    return Path(folder)


def check_fingerprint(folder: str | os.PathLike, base_model: nn.Module) -> None:
    """Make sure that what `folder` holds, an adapter, a policy or trajectories, was made for `base_model`.

    Raises:
        ValueError: When the folder records no fingerprint, or that of another base model, naming both sides.
    """
    records = [read_json(Path(folder) / name) for name in _FINGERPRINT_FILES if (Path(folder) / name).is_file()]
    expected = next((record["base_fingerprint"] for record in records if record.get("base_fingerprint")), None)
    if expected is None:
        raise ValueError(f"{folder} records no `base_fingerprint`, so nobody knows which base model it was made for.")
    found = base_model_fingerprint(base_model)
    if found != expected:
        name = getattr(getattr(base_model, "config", None), "_name_or_path", "") or type(base_model).__name__
        raise ValueError(
            f"{folder} was made for a base model with fingerprint {str(expected)[:12]}, got {name!r} with "
            f"{found[:12]}. Load the base model that its card names."
        )


def find_policy(name: str | os.PathLike, *, token: str | None = None) -> Path:
    """The local folder of a policy.

    Args:
        name: `"shipped"` for the policy in this package, a folder, or `owner/name@commit` for the Hub.
        token: See `pull_folder`.

    Raises:
        ValueError: When it is none of them, or the commit is missing.
    """
    if str(name) in SHIPPED_POLICIES:
        folder = Path(__file__).parent / "policies" / SHIPPED_POLICIES[str(name)]
        if not folder.is_dir():
            raise ValueError(f"This installation of lohp_peft ships no policy ({folder.name} is missing).")
        return folder
    if Path(name).is_dir():
        return Path(name)
    repo_id, _, revision = str(name).partition("@")
    if "/" in repo_id and is_hub_id(repo_id) and revision:
        return pull_folder(repo_id, revision=revision, token=token)
    known = ", ".join(map(repr, SHIPPED_POLICIES))
    raise ValueError(f"Policy {str(name)!r} is none of: {known}, an existing folder, {_ON_THE_HUB}.")


def find_trajectories(
    name: str | os.PathLike,
    *,
    local_dir: str | Path | None = None,
    base_model: nn.Module | None = None,
    token: str | None = None,
) -> Path:
    """The local folder of recorded trajectories, with real files, so that more can be appended.

    Args:
        name: A folder, or `owner/name@commit` for the Hub.
        local_dir: Folder to fetch into; one for this commit in the Hub's home by default.
        base_model: See `pull_folder`.
        token: See `pull_folder`.

    Raises:
        ValueError: When it is neither, the commit is missing, or see `pull_folder`.
    """
    if Path(name).is_dir():
        if base_model is not None:
            check_fingerprint(name, base_model)
        return Path(name)
    repo_id, _, revision = str(name).partition("@")
    if "/" not in repo_id or not is_hub_id(repo_id) or not revision:
        raise ValueError(f"Trajectories {str(name)!r} are neither an existing folder nor {_ON_THE_HUB}.")
    home = Path(constants.HF_HOME) / "lohp_peft" / "trajectories"
    target = local_dir or home / repo_id.replace("/", "--") / revision
    return pull_folder(
        repo_id, revision=revision, repo_type="dataset", base_model=base_model, local_dir=target, token=token
    )


def _sizes(sent: Mapping[str, Path | bytes]) -> dict[str, int]:
    return {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in sorted(sent.items())}


def _list_files(repo_id: str, revision: str, repo_type: str, token: str | None) -> dict[str, RepoFile] | None:
    """The files of a commit by their paths; `None` where the Hub cannot be reached, so that only the cache can answer."""
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        tree = HfApi(token=token).list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    except HfHubHTTPError:
        raise
    except Exception:  # the transport's own errors, which differ between versions of the client
        return None


def _readable(repo_id: str, files: dict[str, RepoFile]) -> dict[str, str]:
    """The digests of the files of a repository that are fetched: SHA-256 of large files, git's SHA-1 of others.

    Raises:
        ValueError: Listing every file that runs code when it is read or leads elsewhere; when none is left.
    """
    problems = []
    for name in files:
        if "\\" in name or ":" in name or any(part in ("", ".", "..") for part in name.split("/")):
            problems.append(f"{name!r} (leads out of the folder)")
        elif Path(name).suffix.lower() in PICKLE_SUFFIXES:
            problems.append(f"{name!r} (runs code when it is read)")
    if problems:
        raise ValueError(
            f"{repo_id} is not fetched, because it holds {len(problems)} unsafe files: {', '.join(problems)}. "
            "Ask its owner for a commit with safetensors only."
        )
    kept = {name: file.lfs.sha256 if file.lfs else file.blob_id for name, file in files.items() if is_safe(Path(name))}
    if not kept:
        raise ValueError(f"{repo_id} is not fetched, because it holds no {', '.join(SAFE_SUFFIXES)} file.")
    return kept


def _noted(folder: Path, revision: str, repo_type: str) -> dict[str, str]:
    """The digests of a commit's files, see `_readable`, as the Hub's client has noted them beside those that it fetched.

    Raises:
        RuntimeError: When it has noted none; listing those that are gone, and those of a published kind that it has not noted, but
            for shards of trajectories, which may be appended.
    """
    notes, digests = folder / ".cache" / "huggingface" / "download", {}
    for path in notes.rglob("*.metadata"):
        commit, digest, *_ = [*path.read_text(errors="replace").splitlines(), "", ""]
        if commit == revision:
            digests[path.relative_to(notes).as_posix().removesuffix(".metadata")] = digest
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and is_safe(path)}
    read = {name for name in here if not name.startswith((".", "shards/") if repo_type == "dataset" else ".")}
    unknown = sorted({*(read - digests.keys()), *(digests.keys() - here)})
    if unknown or not digests:
        raise RuntimeError(
            f"{folder} cannot be compared offline with the commit; files that the Hub's client has not noted as its own, or that "
            f"are gone: {', '.join(unknown) or 'all'}. Connect and fetch it once, or choose an empty folder."
        )
    return digests


def _not_here(folder: Path, files: dict[str, str], what: str, repo_type: str) -> dict[str, str]:
    """Those of a commit's files that a folder lacks. Appending to trajectories changes their manifest and, published, their card.

    Raises:
        ValueError: Listing all files of the folder in whose place the commit has others.
    """
    lacking = {name: digest for name, digest in files.items() if not (folder / name).exists()}
    others = [name for name, digest in files.items() if name not in lacking and not _arrived(folder / name, digest)]
    changing = {"manifest.json", CARD_FILE}
    if others and (lacking.keys() - {CARD_FILE} or repo_type != "dataset" or set(others) - changing):
        raise ValueError(
            f"{folder} holds {len(others)} files that are not those of {what}, and nothing was fetched over them: "
            f"{', '.join(others)}. Choose an empty folder, or remove them."
        )
    return lacking


def _arrived(path: Path, digest: str) -> bool:
    """Whether a file is what the Hub knows by a digest, see `_readable`."""
    data = path.read_bytes()
    if len(digest) == len(sha256(b"")):
        return sha256(data) == digest
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == digest


@contextmanager
def _told_clearly(what: str) -> Iterator[None]:
    """Say what was tried where the Hub's client fails; its errors have many types, some of them not `OSError`."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise RuntimeError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error
