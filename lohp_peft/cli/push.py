"""`lohp-peft push`: publish an adapter, a policy or recorded trajectories."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lohp_peft.cli.resources import write_json


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter, a policy or trajectories.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name; created if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the Hub, for a card that is rendered.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files, send nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Publish a folder on the Hugging Face Hub, safetensors, JSON and Markdown only."""
    from lohp_peft.hub import push_folder

    report = push_folder(
        folder, repo_id, private=private, branch=branch, commit_message=message, license=license, dry_run=dry_run
    )
    if json:
        write_json(report.to_dict())
        return
    table = Table("file", "bytes", title=f"{report.kind} {'would go' if dry_run else 'went'} to {report.repo_id}")
    for name, size in report.files.items():
        table.add_row(name, f"{size:,}")
    Console().print(table)
    if report.url:
        typer.echo(report.url)
