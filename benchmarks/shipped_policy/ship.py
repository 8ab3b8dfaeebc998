"""Put a trained policy where the package finds it, with its card: `python benchmarks/shipped_policy/ship.py POLICY`.

The card's results are those of `benchmarks/results/few_shot.json`, if they are of this policy.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from setting import RESULTS, describe_policy

from lohp_peft import LoHpPolicy
from lohp_peft.cards import policy_card_of, write_card

TARGET = Path(__file__).parents[2] / "lohp_peft" / "policies" / "minilm-text"
FILES = ("config.json", "model.safetensors", "reference_set.safetensors", "space.safetensors")
LIMIT_MIB = 10
LIMITS = (
    "It knows English texts of up to 64 tokens, classified into up to 20 classes in training, 16 examples of each.",
    "It belongs to one base model, one set of target modules and one rank, and refuses everything else.",
    "Nearly all of what it gains on held-out tasks one fixed adapter, trained on all training tasks, gains as well, also where "
    "the same texts are labelled in two ways.",
    "The results above are percent, on 22 held-out tasks, 16 examples a class, 3 draws; AdamW takes 80 steps.",
)

if __name__ == "__main__":
    source = Path(sys.argv[1])
    mebibytes = sum((source / name).stat().st_size for name in FILES) / 2**20
    if mebibytes > LIMIT_MIB:
        raise SystemExit(f"A policy that ships has at most {LIMIT_MIB} MiB, got {mebibytes:.1f}.")
    if source.resolve() != TARGET.resolve():
        for name in FILES:
            shutil.copyfile(source / name, TARGET / name)
    policy = LoHpPolicy.from_pretrained(TARGET)
    few_shot = json.loads((RESULTS / "few_shot.json").read_text())
    results = None
    if few_shot["settings"]["policy"] == describe_policy(policy):
        results = {
            method: {key: row[key] for key in ("accuracy", "macro_f1")} for method, row in few_shot["methods"].items()
        }
    write_card(TARGET, policy_card_of(TARGET, location="shipped", results=results, limits=LIMITS))
    print(f"{mebibytes:.1f} MiB, results {'in the card' if results else 'not measured yet'}")
