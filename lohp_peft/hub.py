"""Publishing to and fetching from the Hugging Face Hub: safetensors, JSON and Markdown only, revisions pinned."""

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from lohp_peft.cards import is_hub_id, write_adapter_card, write_policy_card
from lohp_peft.files import read_json

SAFE_SUFFIXES = (".json", ".md", ".safetensors")
SAFE_NAMES = ("LICENSE",)
SHIPPED_POLICIES = {"shipped": "minilm-text"}
"""Policies inside the package, by the name that finds them."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LEFT_OUT = re.compile(r"checkpoint(-\d+)?|\.lock")


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


def check_folder(folder: str | os.PathLike) -> tuple[str, dict[str, int]]:
    """Check that a folder is an adapter, a policy or a trajectory data set and holds nothing else.

    Folders named `checkpoint` or `checkpoint-<number>`, the state for resuming a run, and `.lock` are left out.

    Returns:
        Its kind and the size of every file that is to be published in bytes, by relative path.

    Raises:
        ValueError: Naming every file that is neither safetensors, JSON nor Markdown, every link and hidden file; when
            the kind cannot be told or what tells it is damaged; or when the base model is named by a path of this machine.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    problems, sizes = [], {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if _LEFT_OUT.fullmatch(Path(name).parts[0]):
            continue
        if path.is_symlink():
            problems.append(f"{name} (a link)")
        elif path.is_dir():
            continue
        elif any(part.startswith(".") for part in Path(name).parts):
            problems.append(f"{name} (hidden)")
        elif path.suffix not in SAFE_SUFFIXES and path.name not in SAFE_NAMES:
            problems.append(name)
        else:
            sizes[name] = path.stat().st_size
    if problems:
        allowed = ", ".join((*SAFE_SUFFIXES, *SAFE_NAMES))
        raise ValueError(
            f"Only {allowed} files are published, but {folder} also holds {len(problems)} others: "
            f"{', '.join(problems)}. Remove them or publish another folder."
        )
    kind, base_model = _kind(folder, sizes)
    if base_model and not is_hub_id(base_model):
        raise ValueError(
            f"The {kind} in {folder} names its base model by a local path, which nobody else has: {base_model!r}. "
            "Name the repository id of the base model instead."
        )
    return kind, sizes


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    branch: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> PushReport:
    """Publish an adapter, a policy or recorded trajectories; adapters and policies without a card get one.

    Args:
        folder: What to publish, see `check_folder`.
        repo_id: `owner/name`; created when it does not exist.
        private: Whether a created repository is private.
        branch: Branch to commit to; created when it does not exist, the default branch by default.
        commit_message: `"Upload <kind>"` by default.
        token: Access token; the stored login by default.
        dry_run: Only check and report; nothing is written or sent.

    Raises:
        ValueError: See `check_folder`; also when `repo_id` is not spelled `owner/name`.
    """
    if not is_hub_id(repo_id) or "/" not in repo_id:
        raise ValueError(f"`repo_id` must be spelled owner/name and name no local path, got {repo_id!r}.")
    kind, sizes = check_folder(folder)
    repo_type = "dataset" if kind == "trajectories" else "model"
    if dry_run:
        return PushReport(repo_id, repo_type, kind, sizes)
    if kind in ("adapter", "policy") and "README.md" not in sizes:
        write_card = write_adapter_card if kind == "adapter" else write_policy_card
        card = write_card(folder, name=repo_id.split("/")[1], location=repo_id)
        sizes = dict(sorted({**sizes, card.name: card.stat().st_size}.items()))
    api = HfApi(token=token)
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    if branch is not None:
        api.create_branch(repo_id, branch=branch, repo_type=repo_type, exist_ok=True)
    commit = api.upload_folder(
        folder_path=str(folder),
        repo_id=repo_id,
        repo_type=repo_type,
        revision=branch,
        commit_message=commit_message or f"Upload {kind}",
        allow_patterns=list(sizes),
    )
    return PushReport(repo_id, repo_type, kind, sizes, commit.oid, commit.commit_url)


def pull_folder(
    repo_id: str,
    *,
    revision: str,
    repo_type: str = "model",
    cache_dir: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """Fetch the safetensors, JSON and Markdown files of a repository at one commit.

    Args:
        repo_id: `owner/name`.
        revision: Commit hash of 40 hexadecimal digits. Branches and tags move, so they are not accepted.
        repo_type: `"model"` or `"dataset"`.
        cache_dir: Download cache; the Hub's own by default.
        token: Access token; the stored login by default.

    Returns:
        The local folder.

    Raises:
        ValueError: When `revision` is not a full commit hash.
    """
    if _COMMIT.fullmatch(revision) is None:
        raise ValueError(
            f"`revision` of {repo_id} must be a commit hash of 40 hexadecimal digits, got {revision!r}. "
            "The hash stands on the repository's page under 'Files and versions'."
        )
    folder = snapshot_download(
        repo_id,
        repo_type=repo_type,
        revision=revision,
        allow_patterns=[*(f"*{suffix}" for suffix in SAFE_SUFFIXES), *SAFE_NAMES],
        cache_dir=cache_dir,
        token=token,
    )
    return Path(folder)


def find_policy(name: str | os.PathLike) -> Path:
    """The local folder of a policy.

    Args:
        name: `"shipped"` for the policy in this package, a folder, or `owner/name@commit` for the Hub.

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
    if "/" in repo_id and is_hub_id(repo_id):
        return pull_folder(repo_id, revision=revision)
    raise ValueError(
        f"Policy {str(name)!r} is none of: {', '.join(map(repr, SHIPPED_POLICIES))}, an existing folder, owner/name@commit."
    )


def _kind(folder: Path, sizes: dict[str, int]) -> tuple[str, Any]:
    """The kind of a folder and the name of its base model."""
    if "adapter_config.json" in sizes:
        return "adapter", read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if "manifest.json" in sizes:
        manifest = read_json(folder / "manifest.json")
        if manifest.get("format") == "lohp_peft.trajectories":
            return "trajectories", manifest.get("base_model_name")
    if "config.json" in sizes:
        config = read_json(folder / "config.json")
        if str(config.get("model_type", "")).startswith("lohp"):
            return "policy", config.get("base_model_name")
    raise ValueError(
        f"{folder} is neither an adapter (adapter_config.json), a policy (config.json with a model_type of lohp) "
        "nor recorded trajectories (manifest.json)."
    )
